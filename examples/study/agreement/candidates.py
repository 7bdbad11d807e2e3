"""Estimators that were tried beside those of the package; they take (splits, K, T) tensors without holes.

Written for the search, dense in the tokens: a table of every row at every position. What was better went into the
package; what it gave is in results/ and in README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import leafkernels

Scheme = Callable[..., Tensor]


class Tree(NamedTuple):
    """Of each prefix s_0 .. s_T of each row: rollouts that share it, their mean reward, whether rows leave there."""

    count: Tensor  # (splits, K, T + 1)
    mean: Tensor  # (splits, K, T + 1)
    leaves: Tensor  # (splits, K, T) bool: the token at which the count falls
    shared: Tensor  # (splits, K, K)
    mask: Tensor  # (splits, K, T) bool


def grow(token_ids: Tensor, rewards: Tensor, response_mask: Tensor) -> Tree:
    shared = leafkernels.common_prefix_lengths(token_ids, response_mask=response_mask).long()
    shape = (*token_ids.shape[:2], token_ids.shape[2] + 1)

    def from_here_on(entries: Tensor) -> Tensor:
        table = torch.zeros(shape, dtype=torch.float64).scatter_add_(2, shared, entries)
        return table.flip(2).cumsum(2).flip(2)

    other_rewards = rewards.double()[:, None, :].expand(shared.shape)
    count, total = from_here_on(torch.ones_like(other_rewards)), from_here_on(other_rewards)
    leaves = (count[..., 1:] != count[..., :-1]) & response_mask
    return Tree(count, total / count.clamp_min(1), leaves, shared, response_mask)


def values_of(tree: Tree, weight: Tensor, mean: Tensor | None = None) -> Tensor:
    """V(s_0) .. V(s_T) where V moves by ``weight`` of the way to the node's mean wherever rows leave."""
    means = tree.mean if mean is None else mean
    values = [tree.mean[..., 0]]
    for t in range(weight.shape[2]):
        moved = values[-1] + weight[..., t] * (means[..., t + 1] - values[-1])
        values.append(torch.where(tree.leaves[..., t], moved, values[-1]))
    return torch.stack(values, 2)


def node_weight(tree: Tree, shrinkage: Tensor | float) -> Tensor:
    count = tree.count[..., 1:]
    return torch.where(count > 0, count / (count + shrinkage), 0.0)


def centred(rewards: Tensor) -> Tensor:
    return (rewards.double() - rewards.double().mean(1, keepdim=True))[..., None]


def finish(credit: Tensor, tree: Tree) -> Tensor:
    return torch.where(tree.mask, credit, 0.0).float()


def within_over_between(tree: Tree, rewards: Tensor, prior: float, pull: float) -> Tensor:
    """(splits,): shrinkage by moments. Pairs of rows with a shared prefix of the longer half estimate the variance
    within nodes; what all pairs differ by more, the variance between them. ``pull`` prior pairs at ratio ``prior``."""
    upper = torch.triu(torch.ones(tree.shared.shape[1:], dtype=torch.bool), 1)
    lengths = tree.shared[:, upper].double()
    halves = (rewards.double()[:, :, None] - rewards.double()[:, None, :]).square()[:, upper] / 2
    is_near = lengths > lengths.median(1, keepdim=True).values
    total = halves.mean(1)
    near = (halves * is_near).sum(1) / is_near.sum(1).clamp_min(1)
    pairs = is_near.sum(1)
    within = (pairs * near + pull * total * prior / (1 + prior)) / (pairs + pull).clamp_min(1e-9)
    between = (total - within).clamp_min(1e-3 * total.clamp_min(1e-9))
    return (within / between).clamp(0.0, 64.0)


def left_after_parting(tree: Tree, rewards: Tensor, pull: float, prior: float, by_row: bool) -> Tensor:
    """Share of the variance that is left between a row and those that part from it last: (splits, 1, 1) or by row."""
    size = rewards.shape[1]
    itself = torch.eye(size, dtype=torch.bool)
    lengths = tree.shared.masked_fill(itself, -1)
    nearest = (lengths == lengths.amax(2, keepdim=True)) & ~itself
    halves = (rewards.double()[:, :, None] - rewards.double()[:, None, :]).square() / 2
    near = (halves * nearest).sum(2) / nearest.sum(2)
    total = halves.sum((1, 2))[:, None] / (size * (size - 1))
    ratio = near / total.clamp_min(1e-9)
    if not by_row:
        pulled = (ratio.sum(1) + pull * prior) / (size + pull)
        return pulled[:, None, None]
    return ((ratio + pull * prior) / (1 + pull))[..., None]


def fixed(logprobs: Tensor, token_ids: Tensor, rewards: Tensor, *, response_mask: Tensor, **options: float) -> Tensor:
    return leafkernels.tree_td(logprobs, token_ids, rewards, response_mask=response_mask, **options)


def batch_shrinkage(
    logprobs: Tensor, token_ids: Tensor, rewards: Tensor, *, response_mask: Tensor, pull: float, group_weight: float
) -> Tensor:
    tree = grow(token_ids, rewards, response_mask)
    shrinkage = within_over_between(tree, rewards, 4.0, pull)[:, None, None]
    values = values_of(tree, node_weight(tree, shrinkage))
    return finish(values.diff(dim=2) + group_weight * centred(rewards), tree)


def variogram(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor,
    scale: float,
    pull: float,
    by_row: bool,
    shrinkage: float = 4.0,
) -> Tensor:
    """Group weight = scale * share of the variance left after rollouts part."""
    tree = grow(token_ids, rewards, response_mask)
    left = left_after_parting(tree, rewards, pull, 1.0, by_row)
    values = values_of(tree, node_weight(tree, shrinkage))
    return finish(values.diff(dim=2) + scale * left * centred(rewards), tree)


def apart(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor,
    shrinkage: float,
    alone: float,
    group_weight: float,
) -> Tensor:
    """A row that is left alone moves by ``alone`` of the way to its own reward; nodes of several by n / (n + k)."""
    tree = grow(token_ids, rewards, response_mask)
    weight = torch.where(tree.count[..., 1:] == 1, alone, node_weight(tree, shrinkage))
    values = values_of(tree, weight)
    return finish(values.diff(dim=2) + group_weight * centred(rewards), tree)


def remainder(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor,
    shrinkage: float,
    group_weight: float,
) -> Tensor:
    """r - V(s_t) in place of r - mean."""
    tree = grow(token_ids, rewards, response_mask)
    values = values_of(tree, node_weight(tree, shrinkage))
    left = rewards.double()[..., None] - values[..., :-1]
    return finish(values.diff(dim=2) + group_weight * left, tree)


def leave_one_out(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor,
    shrinkage: float,
    group_weight: float,
) -> Tensor:
    """Values of nodes from the others that share them, a node of none else having its parent's; then what a token
    changed in the others' rewards, plus a part of r less the prompt's others."""
    tree = grow(token_ids, rewards, response_mask)
    own = rewards.double()[..., None]
    others = (tree.count - 1).clamp_min(0)
    mean = (tree.mean * tree.count - own) / others.clamp_min(1)
    tree = tree._replace(mean=mean)
    weight = torch.where(others[..., 1:] > 0, others[..., 1:] / (others[..., 1:] + shrinkage), 0.0)
    values = values_of(tree, weight)
    return finish(values.diff(dim=2) + group_weight * (own - values[..., :1]), tree)


def baseline_at_nodes(
    logprobs: Tensor, token_ids: Tensor, rewards: Tensor, *, response_mask: Tensor, shrinkage: float
) -> Tensor:
    """r less the shrunk mean of the others that share s_t: a baseline that does not see the action."""
    tree = grow(token_ids, rewards, response_mask)
    own = rewards.double()[..., None]
    others = (tree.count - 1).clamp_min(0)
    mean = (tree.mean * tree.count - own) / others.clamp_min(1)
    tree = tree._replace(mean=mean)
    weight = torch.where(others[..., 1:] > 0, others[..., 1:] / (others[..., 1:] + shrinkage), 0.0)
    return finish(own - values_of(tree, weight)[..., :-1], tree)


def by_entropy(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor,
    power: float,
    floor: float,
    shrinkage: float,
    group_weight: float,
    everywhere: bool,
) -> Tensor:
    """Weights (H_t + floor) ** power, H_t the policy's entropy after s_t, which comes in the place of -logprobs."""
    tree = grow(token_ids, rewards, response_mask)
    weight = (-logprobs.double() + floor).clamp_min(0.0).pow(power).masked_fill(~response_mask, 0.0)
    weight = weight / (weight.sum((1, 2), keepdim=True) / response_mask.sum((1, 2), keepdim=True)).clamp_min(1e-9)
    values = values_of(tree, node_weight(tree, shrinkage))
    credit = values.diff(dim=2) * (weight if everywhere else 1.0) + group_weight * centred(rewards) * weight
    return finish(credit, tree)


def by_length(
    logprobs: Tensor, token_ids: Tensor, rewards: Tensor, *, response_mask: Tensor, power: float, **options: float
) -> Tensor:
    """tree_td, and the part r - mean of a row times (mean length / its length) ** power."""
    tree = grow(token_ids, rewards, response_mask)
    lengths = response_mask.sum(2, keepdim=True).double().clamp_min(1.0)
    weight = (lengths.mean(1, keepdim=True) / lengths).pow(power)
    values = values_of(tree, node_weight(tree, options["shrinkage"]))
    return finish(values.diff(dim=2) + options["group_weight"] * weight * centred(rewards), tree)


def whole_by_length(
    logprobs: Tensor, token_ids: Tensor, rewards: Tensor, *, response_mask: Tensor, scheme: Scheme, power: float
) -> Tensor:
    """A scheme's credit times (mean length / the row's length) ** power; at 1 what a loss does that takes the mean over
    each row's tokens first."""
    credit = scheme(logprobs, token_ids, rewards, response_mask=response_mask)
    lengths = response_mask.sum(2, keepdim=True).double().clamp_min(1.0)
    return (credit.double() * (lengths.mean(1, keepdim=True) / lengths).pow(power)).float()


def by_distance(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor,
    reach: float,
    floor: float,
    group_weight: float,
) -> Tensor:
    """tree_td, and the part r - mean fades with the distance to the last token at which rows left."""
    tree = grow(token_ids, rewards, response_mask)
    at = torch.arange(token_ids.shape[2]).expand(token_ids.shape)
    last = torch.where(tree.leaves, at, -1).cummax(2).values
    fading = floor + (1.0 - floor) * torch.exp(-(at - last.clamp_min(0)) / reach)
    weight = torch.where(last >= 0, fading, 1.0)
    values = values_of(tree, node_weight(tree, 4.0))
    return finish(values.diff(dim=2) + group_weight * weight * centred(rewards), tree)


def on_tails(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor,
    shared: float,
    tails: float,
) -> Tensor:
    """tree_td whose group weight is one for tokens that rollouts share, and another for those of a row alone."""
    tree = grow(token_ids, rewards, response_mask)
    weight = torch.where(tree.count[..., 1:] > 1, shared, tails)
    values = values_of(tree, node_weight(tree, 4.0))
    return finish(values.diff(dim=2) + weight * centred(rewards), tree)


def by_node_size(
    logprobs: Tensor, token_ids: Tensor, rewards: Tensor, *, response_mask: Tensor, power: float, group_weight: float
) -> Tensor:
    """tree_td whose differences are multiplied by (rows before / rows of the prompt) ** power."""
    tree = grow(token_ids, rewards, response_mask)
    scale = (tree.count[..., :-1].clamp_min(1) / rewards.shape[1]).pow(power)
    values = values_of(tree, node_weight(tree, 4.0))
    return finish(values.diff(dim=2) * scale + group_weight * centred(rewards), tree)


def traces(
    logprobs: Tensor, token_ids: Tensor, rewards: Tensor, *, response_mask: Tensor, decay: float, group_weight: float
) -> Tensor:
    """Differences of later forks count for earlier ones, less by ``decay`` for each fork between (GAE by forks)."""
    tree = grow(token_ids, rewards, response_mask)
    difference = values_of(tree, node_weight(tree, 4.0)).diff(dim=2)
    later = torch.zeros_like(difference[..., 0])
    found = []
    for t in range(difference.shape[2] - 1, -1, -1):
        is_fork = tree.leaves[..., t]
        found.append(torch.where(is_fork, difference[..., t] + decay * later, 0.0))
        later = torch.where(is_fork, found[-1], later)
    return finish(torch.stack(found[::-1], 2) + group_weight * centred(rewards), tree)


def leaf_at_forks(
    logprobs: Tensor, token_ids: Tensor, rewards: Tensor, *, response_mask: Tensor, after: bool, **options: Any
) -> Tensor:
    """LEAF with its boundaries at (or, ``after``, right behind) the tokens at which most rollouts leave one another."""
    tree = grow(token_ids, rewards, response_mask)
    parted = (tree.leaves & (tree.count[..., :-1] > 1)).double().sum(1, keepdim=True)
    if after:
        parted = torch.nn.functional.pad(parted[..., :-1], (1, 0))
    scores = parted.expand(token_ids.shape).float()
    return leafkernels.span_advantages(
        logprobs, token_ids, rewards, response_mask=response_mask, boundary_scores=scores.contiguous(), **options
    )


def candidates() -> dict[str, Scheme]:
    """All that is tried on log-probabilities as logged; those by entropy are in ``candidates_by_entropy``."""
    found: dict[str, Scheme] = {
        "dr_grpo": leafkernels.dr_grpo,
        "tempo": leafkernels.tempo,
        "leaf": leafkernels.span_advantages,
    }
    for shrinkage in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0):
        for group_weight in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0):
            found[f"fixed {shrinkage:g}, {group_weight:g}"] = partial(
                fixed, shrinkage=shrinkage, group_weight=group_weight
            )
    for pull in (0.0, 8.0, 32.0):
        for group_weight in (0.1, 0.2):
            found[f"batch shrinkage, pull {pull:g}, {group_weight:g}"] = partial(
                batch_shrinkage, pull=pull, group_weight=group_weight
            )
    for scale in (0.1, 0.2, 0.4):
        for pull in (0.0, 4.0, 16.0):
            for by_row in (False, True):
                name = f"variogram {scale:g}, pull {pull:g}, {'row' if by_row else 'prompt'}"
                found[name] = partial(variogram, scale=scale, pull=pull, by_row=by_row)
    for shrinkage in (0.0, 2.0, 4.0):
        for alone in (0.0, 0.1, 0.2, 0.4, 0.7, 1.0):
            for group_weight in (0.1, 0.2):
                found[f"apart {shrinkage:g}, alone {alone:g}, {group_weight:g}"] = partial(
                    apart, shrinkage=shrinkage, alone=alone, group_weight=group_weight
                )
    for shrinkage in (1.0, 4.0):
        for group_weight in (0.1, 0.2, 0.4):
            for name, scheme in (("remainder", remainder), ("leave one out", leave_one_out)):
                found[f"{name} {shrinkage:g}, {group_weight:g}"] = partial(
                    scheme, shrinkage=shrinkage, group_weight=group_weight
                )
        found[f"baseline at nodes {shrinkage:g}"] = partial(baseline_at_nodes, shrinkage=shrinkage)
    # The second round: where the part r - mean does harm, and how far a fork reaches.
    for power in (0.5, 1.0):
        for shrinkage, group_weight in ((4.0, 0.2), (1e12, 1.0)):
            found[f"by length {power:g}, {shrinkage:g}, {group_weight:g}"] = partial(
                by_length, power=power, shrinkage=shrinkage, group_weight=group_weight
            )
    for reach in (8.0, 32.0):
        for floor, group_weight in ((0.0, 0.2), (0.3, 0.2), (0.3, 0.4)):
            found[f"by distance {reach:g}, floor {floor:g}, {group_weight:g}"] = partial(
                by_distance, reach=reach, floor=floor, group_weight=group_weight
            )
    for shared in (0.0, 0.1, 0.2, 0.4):
        for tails in (0.1, 0.2, 0.3):
            found[f"shared {shared:g}, tails {tails:g}"] = partial(on_tails, shared=shared, tails=tails)
    for power in (-0.5, -0.25, 0.25, 0.5):
        found[f"node size {power:g}, 0.2"] = partial(by_node_size, power=power, group_weight=0.2)
    for decay in (0.3, 0.6):
        for group_weight in (0.1, 0.2):
            found[f"traces {decay:g}, {group_weight:g}"] = partial(traces, decay=decay, group_weight=group_weight)
    for name, options in {
        "": {},
        ", no z-score": {"normalize": "none"},
        ", leave one out": {"leave_one_out": True},
        ", leave one out, no z-score": {"leave_one_out": True, "normalize": "none"},
        ", power 0, no z-score": {"multiplicity_power": 0.0, "normalize": "none"},
        ", power 0, leave one out, no z-score": {
            "multiplicity_power": 0.0,
            "leave_one_out": True,
            "normalize": "none",
        },
    }.items():
        for boundaries in (2, 8):
            call: dict[str, Any] = {"num_boundaries": boundaries, "min_separation": 2 if boundaries == 8 else None}
            found[f"leaf B {boundaries}{name}"] = partial(leafkernels.span_advantages, **call, **options)
            call = {"num_boundaries": boundaries, "min_separation": 1}
            for after in (False, True):
                place = "after" if after else "at"
                found[f"leaf {place} forks B {boundaries}{name}"] = partial(
                    leaf_at_forks, after=after, **call, **options
                )
    return found


def candidates_by_length() -> dict[str, Scheme]:
    """The third round: all of a row's credit by its length."""
    found: dict[str, Scheme] = {
        "dr_grpo": leafkernels.dr_grpo,
        "fixed 4, 0.2": partial(fixed, shrinkage=4.0, group_weight=0.2),
    }
    schemes = {name: leafkernels.ESTIMATORS[name] for name in ("dr_grpo", "tempo", "leaf", "treerl")}
    schemes["tree_td 1, 0.3"] = partial(leafkernels.tree_td, shrinkage=1.0, group_weight=0.3)
    for name, scheme in schemes.items():
        for power in (0.0, 0.5, 1.0, 1.5, 2.0):
            found[f"{name}, length {power:g}"] = partial(whole_by_length, scheme=scheme, power=power)
    return found


def candidates_by_entropy() -> dict[str, Scheme]:
    """These are given the policy's entropy, negated, in the place of the log-probabilities."""
    found: dict[str, Scheme] = {
        "dr_grpo": leafkernels.dr_grpo,
        "fixed 4, 0.2": partial(fixed, shrinkage=4.0, group_weight=0.2),
    }
    for power in (0.5, 1.0, -0.5):
        for floor in (0.01, 0.3):
            call: dict[str, Any] = {"power": power, "floor": floor}
            name = f"power {power:g}, floor {floor:g}"
            flat = partial(by_entropy, **call, shrinkage=1e12, group_weight=1.0, everywhere=False)
            tail = partial(by_entropy, **call, shrinkage=4.0, group_weight=0.2, everywhere=False)
            both = partial(by_entropy, **call, shrinkage=4.0, group_weight=0.2, everywhere=True)
            found |= {f"entropy on dr_grpo, {name}": flat, f"entropy on the tail, {name}": tail}
            found[f"entropy on all, {name}"] = both
    return found
