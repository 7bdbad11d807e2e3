"""Credit from what a token changed: TEMPO, its variant with shrinkage and TreeRL."""

import math
from collections.abc import Sequence

from python_ref.estimators import Groups, Mask, Rows, Table, mean_of_others, scored_groups
from python_ref.find import full_mask, stretch
from python_ref.scatter import scatter_spans
from python_ref.tree import span_tree
from python_ref.values import deviation, mean


def tempo(
    logprobs: Table,
    token_ids: Rows,
    rewards: Sequence[float],
    *,
    response_mask: Mask = None,
    groups: Groups = None,
) -> list[list[float]]:
    """(r - mean + V(s_{t+1}) - V(s_t)) / (std + 1e-6); V(s_t) is the mean reward of the rows that begin with s_t."""
    return tree_td(
        logprobs,
        token_ids,
        rewards,
        response_mask=response_mask,
        groups=groups,
        shrinkage=0.0,
        group_weight=1.0,
        normalize="reward_std",
    )


def tree_td(
    logprobs: Table,
    token_ids: Rows,
    rewards: Sequence[float],
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    shrinkage: float = 0.0,
    group_weight: float = 0.5,
    normalize: str = "none",
) -> list[list[float]]:
    """V(s_{t+1}) - V(s_t) + group_weight (r - mean); where rows diverge, V moves from the parent's value towards the
    mean of the n rows that remain, by a share of n / (n + shrinkage)."""
    masks = full_mask(token_ids, response_mask)
    advantages = [[0.0] * len(mask) for mask in masks]
    for rows in scored_groups(rewards, groups):
        group_rewards = [rewards[j] for j in rows]
        group_mean = mean(group_rewards)
        scale = deviation(group_rewards) + 1e-6 if normalize == "reward_std" else 1.0
        ranges = {j: stretch(masks[j]) for j in rows}
        for i in rows:
            start, end = ranges[i]
            sharing, after = rows, group_mean
            for t in range(end - start):
                # Rows that continue, with the same token.
                staying = [
                    j
                    for j in sharing
                    if t < ranges[j][1] - ranges[j][0] and token_ids[j][ranges[j][0] + t] == token_ids[i][start + t]
                ]
                before = after
                if staying != sharing:
                    weight = len(staying) / (len(staying) + shrinkage)
                    after = weight * mean([rewards[j] for j in staying]) + (1.0 - weight) * before
                sharing = staying
                if masks[i][start + t]:
                    credit = group_weight * (rewards[i] - group_mean) + after - before
                    advantages[i][start + t] = credit / scale
    return advantages


def treerl(
    logprobs: Table,
    token_ids: Rows,
    rewards: Sequence[float],
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    num_boundaries: int = 2,
    min_separation: int | None = None,
    boundary_scores: Table | None = None,
) -> list[list[float]]:
    """2 V_k / sqrt(n_k) - V_{k-1} / sqrt(n_{k-1}) on rewards centred leave-one-out; a tail is a leaf with n = 1."""
    masks = full_mask(token_ids, response_mask)
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
