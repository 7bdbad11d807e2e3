"""The prefix tree of one or more prompts."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from python_ref.boundaries import select_boundaries
from python_ref.find import cut, full_mask
from python_ref.returns import total_returns
from python_ref.values import Span, credit, normalize_spans


@dataclass
class SpanTree:
    """The prefix tree of one group: ``nodes[k][i]`` lists the rows that share row i's node at ``boundaries[k]``."""

    rows: list[int]
    boundaries: list[int]
    nodes: list[list[list[int]]]
    raw: list[list[Span]]
    spans: list[list[Span]]


def prefix_nodes(rows: Sequence[Sequence[int]], boundary: int, taking_part: Sequence[bool]) -> list[list[int]]:
    """For each row the rows with the same key: their first ``boundary`` tokens, or the whole row if it is shorter."""
    keys = [tuple(row[:boundary]) for row in rows]
    nodes = []
    for i in range(len(rows)):
        members = []
        for j in range(len(rows)):
            if taking_part[i] and taking_part[j] and keys[i] == keys[j]:
                members.append(j)
        nodes.append(members)
    return nodes


def span_tree(
    logprobs: Sequence[Sequence[float]],
    token_ids: Sequence[Sequence[int]],
    rewards: Sequence[float] | None,
    *,
    response_mask: Sequence[Sequence[bool]] | None = None,
    groups: Sequence[Hashable] | None = None,
    step_rewards: Sequence[Sequence[float]] | None = None,
    num_boundaries: int = 2,
    min_separation: int | None = None,
    boundary_scores: Sequence[Sequence[float]] | None = None,
    terms: str = "both",
    multiplicity_power: float = 0.5,
    leave_one_out: bool = False,
    normalize: str = "span",
) -> list[SpanTree]:
    """One tree for each group, in the order in which the groups first appear; arguments as ``span_advantages``."""
    masks = full_mask(token_ids, response_mask)
    rewards = total_returns(token_ids, rewards, response_mask, step_rewards)
    scores = boundary_scores if boundary_scores is not None else [[-x for x in row] for row in logprobs]
    names = list(groups) if groups is not None else [0] * len(token_ids)

    trees = []
    for name in dict.fromkeys(names):
        members = [i for i, other in enumerate(names) if other == name]
        # An unscorable row is treated as if it had no token: no candidate, no node, no part in the shortest length.
        group_masks = [[m and not math.isnan(rewards[i]) for m in masks[i]] for i in members]
        group_rewards = [rewards[i] for i in members]
        rows = [cut(token_ids[i], mask) for i, mask in zip(members, group_masks, strict=True)]
        boundaries = select_boundaries(
            [scores[i] for i in members],
            response_mask=group_masks,
            num_boundaries=num_boundaries,
            min_separation=min_separation,
        )
        nodes = [prefix_nodes(rows, p, [len(row) > 0 for row in rows]) for p in boundaries]
        raw = credit(
            nodes,
            boundaries,
            group_rewards,
            [len(row) for row in rows],
            terms=terms,
            multiplicity_power=multiplicity_power,
            leave_one_out=leave_one_out,
        )
        trees.append(SpanTree(members, boundaries, nodes, raw, raw))
    normalized = normalize_spans([tree.raw for tree in trees], [[rewards[i] for i in t.rows] for t in trees], normalize)
    for tree, spans in zip(trees, normalized, strict=True):
        tree.spans = spans
    return trees
