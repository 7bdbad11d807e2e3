"""Credit from what a token changed: TEMPO, its variant with shrinkage and TreeRL."""

import math

from python_ref.estimators import (
    Groups,
    Mask,
    Rewards,
    Rows,
    StepRewards,
    Table,
    is_flat,
    scored_groups,
)
from python_ref.find import full_mask, stretch
from python_ref.returns import returns_to_go, total_returns
from python_ref.scatter import scatter_spans
from python_ref.tree import span_tree
from python_ref.values import deviation, mean, settled


def tempo(
    logprobs: Table,
    token_ids: Rows,
    rewards: Rewards,
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    step_rewards: StepRewards = None,
) -> list[list[float]]:
    """(r - mean + V(s_{t+1}) - V(s_t)) / (std + 1e-6); V(s_t) is the mean reward of the rows that begin with s_t."""
    return tree_td(
        logprobs,
        token_ids,
        rewards,
        response_mask=response_mask,
        groups=groups,
        step_rewards=step_rewards,
        shrinkage=0.0,
        group_weight=1.0,
        normalize="reward_std",
    )


def tree_td(
    logprobs: Table,
    token_ids: Rows,
    rewards: Rewards,
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    step_rewards: StepRewards = None,
    shrinkage: float = 0.0,
    group_weight: float = 0.5,
    normalize: str = "none",
) -> list[list[float]]:
    """Q_t - V_t + group_weight (R_t - mean): V_t is what the rows that share the first t tokens have still to earn, Q_t
    what those have that share token t as well. Where rows diverge, Q moves from V towards the mean of the n rows that
    remain, by a share of n / (n + shrinkage). Without step rewards that is V(s_{t+1}) - V(s_t)."""
    masks = full_mask(token_ids, response_mask)
    to_go = returns_to_go(token_ids, rewards, response_mask, step_rewards)
    totals = [row[0] for row in to_go]
    advantages = [[0.0] * len(mask) for mask in masks]
    for rows in scored_groups(totals, groups):
        kept = settled([totals[j] for j in rows])
        # Returns that differ by rounding alone count as the least.
        left = {j: [x - (totals[j] - k) for x in to_go[j]] for j, k in zip(rows, kept, strict=True)}
        flat, least = is_flat(kept), min(kept)
        if len(rows) < 2 or (flat and (step_rewards is None or normalize == "reward_std")):
            continue
        centred = [k - least for k in kept]
        scale = deviation(centred) + 1e-6 if normalize == "reward_std" else 1.0
        group_mean = mean(centred) + least
        ranges = {j: stretch(masks[j]) for j in rows}
        for i in rows:
            start, end = ranges[i]
            sharing, value = rows, group_mean
            for t in range(end - start):
                # Rows that continue, with the same token.
                staying = [
                    j
                    for j in sharing
                    if t < ranges[j][1] - ranges[j][0] and token_ids[j][ranges[j][0] + t] == token_ids[i][start + t]
                ]
                after = value
                if staying != sharing:
                    weight = len(staying) / (len(staying) + shrinkage)
                    after = weight * mean([left[j][t] for j in staying]) + (1.0 - weight) * value
                if masks[i][start + t]:
                    credit = group_weight * (left[i][t] - group_mean) + after - value
                    advantages[i][start + t] = credit / scale
                # What the token itself earned is no more to come.
                value = after - mean([left[j][t] - left[j][t + 1] for j in staying])
                sharing = staying
    return advantages


def mean_of_others(own: float, group_rewards: list[float]) -> float:
    return (math.fsum(group_rewards) - own) / (len(group_rewards) - 1)


def treerl(
    logprobs: Table,
    token_ids: Rows,
    rewards: Rewards,
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    step_rewards: StepRewards = None,
    num_boundaries: int = 2,
    min_separation: int | None = None,
    boundary_scores: Table | None = None,
) -> list[list[float]]:
    """2 V_k / sqrt(n_k) - V_{k-1} / sqrt(n_{k-1}) on rewards centred leave-one-out; a tail is a leaf with n = 1."""
    masks = full_mask(token_ids, response_mask)
    rewards = total_returns(token_ids, rewards, response_mask, step_rewards)
    advantages = [[0.0] * len(mask) for mask in masks]
    trees = span_tree(
        logprobs,
        token_ids,
        rewards,
        response_mask=response_mask,
        groups=groups,
        num_boundaries=num_boundaries,
        min_separation=min_separation,
        boundary_scores=boundary_scores,
    )
    for rows in scored_groups(rewards, groups):
        (tree,) = (tree for tree in trees if rows[0] in tree.rows)
        group_rewards = [rewards[i] for i in rows]
        if is_flat(group_rewards):
            continue
        centred = {i: rewards[i] - mean_of_others(rewards[i], group_rewards) for i in rows}
        for i in rows:
            rank = tree.rows.index(i)
            values = []
            parent = rows
            for k in range(len(tree.raw[rank])):
                sharing = [tree.rows[j] for j in tree.nodes[k][rank]] if k < len(tree.boundaries) else []
                node = sharing if len(sharing) >= 2 else [i]
                scaled, scaled_parent = (mean([centred[j] for j in n]) / math.sqrt(len(n)) for n in (node, parent))
                values.append(scaled - scaled_parent + scaled)
                parent = node
            ends = [end for _, end, _ in tree.raw[rank]]
            advantages[i] = scatter_spans([values], [ends], [masks[i]])[0]
    return advantages
