"""From rewards to one advantage for each token, by name, and how much of the batch the tree reached."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import leafkernels

METHODS = {
    "leaf": leafkernels.span_advantages,
    "grpo": leafkernels.grpo,
    "dr_grpo": leafkernels.dr_grpo,
    "tempo": leafkernels.tempo,
    "tree_td": leafkernels.tree_td,
    "tree_td 1, 0.3": partial(leafkernels.tree_td, shrinkage=1.0, group_weight=0.3),
}


@dataclass(frozen=True)
class Batch:
    """Sampled answers, the rows of a prompt one after the other."""

    logprobs: Tensor  # (N, T)
    token_ids: Tensor  # (N, T)
    mask: Tensor  # (N, T)
    rewards: Tensor  # (N,)
    rollouts: int  # rows of a prompt


def advantages(batch: Batch, method: str, num_boundaries: int, *, rescale: bool) -> Tensor:
    """Return (N, T) advantages; ``rescale`` brings their root mean square over the live tokens of the batch to 1.

    Methods differ in how large their advantages are, and so in how far a step goes. With the same scale for all, what
    is left between them is where the credit lies.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    options = {"num_boundaries": num_boundaries} if method == "leaf" else {}
    credit = METHODS[method](
        batch.logprobs,
        batch.token_ids,
        batch.rewards,
        response_mask=batch.mask,
        group_size=batch.rollouts,
        **options,
    )
    size = credit[batch.mask].square().mean().sqrt()
    return credit / size if rescale and size > 0 else credit


@dataclass(frozen=True)
class Reach:
    """How much of a batch the tree of LEAF reaches, whatever the method in use."""

    span_share: float  # share of the live tokens that lie in a span shared by several rollouts
    nodes: float  # nodes (several rollouts with the same prefix at a boundary) in a group, on average
    fire_rate: float  # share of the boundaries that have a node
    part_rate: float  # share of the boundaries at whose very token rollouts of one node part
    chosen: list[int]  # boundaries at each position
    fired: list[int]  # those that have a node
    parted: list[int]  # those at which rollouts part


def reach(batch: Batch, num_boundaries: int) -> Reach:
    tree = leafkernels.span_tree(
        batch.logprobs,
        batch.token_ids,
        batch.rewards,
        response_mask=batch.mask,
        group_size=batch.rollouts,
        num_boundaries=num_boundaries,
    )
    length = batch.token_ids.shape[1]
    inner_ends = torch.where(tree.nodes >= 0, tree.spans.span_ends[:, :-1], 0).amax(1) if num_boundaries else 0
    shared = torch.minimum(torch.as_tensor(inner_ends), tree.lengths).sum() / tree.lengths.sum().clamp_min(1)
    counts = {name: [0] * length for name in ("chosen", "fired", "parted")}
    nodes = 0
    prompts = batch.token_ids.view(-1, batch.rollouts, length)
    for rows, boundaries, names, lengths in zip(
        prompts,
        tree.boundaries.view(len(prompts), -1),
        tree.nodes.view(len(prompts), batch.rollouts, -1),
        tree.lengths.view(len(prompts), -1),
        strict=True,
    ):
        for k, position in enumerate(boundaries.tolist()):
            if position < 0:
                continue
            row_names = names[:, k].tolist()
            present = {name for name in row_names if name >= 0}
            # A rollout that has ended goes on with "nothing", which is another way than any token.
            after = [
                (name, int(row[position]) if position < size else -1)
                for name, row, size in zip(row_names, rows, lengths.tolist(), strict=True)
                if name >= 0
            ]
            nodes += len(present)
            counts["chosen"][position] += 1
            counts["fired"][position] += bool(present)
            counts["parted"][position] += len(set(after)) > len(present)
    total = max(sum(counts["chosen"]), 1)
    return Reach(
        span_share=float(shared),
        nodes=nodes / max(len(prompts), 1),
        fire_rate=sum(counts["fired"]) / total,
        part_rate=sum(counts["parted"]) / total,
        **counts,
    )
