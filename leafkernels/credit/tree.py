"""The prefix tree of the advantages, for debugging and display."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from leafkernels._core.reference import from_reference, gradient_by
from leafkernels.credit.advantages import check_credit, credit_spans, refuse_batch_of_ranks
from leafkernels.credit.options import CreditFields, CreditOptions
from leafkernels.credit.values import SpanValues, finish, spans_of_trees
from leafkernels.distributed import GatheredGroups
from leafkernels.rows.rollouts import Rollouts, read_rollouts


class SpanTree(NamedTuple):
    """The prefix tree of the advantages, and what ``span_advantages`` scatters; for debugging and display."""

    boundaries: Tensor
    """int32, ascending, -1 where there is none; shaped as by ``select_boundaries``."""
    lengths: Tensor
    """int64, one for each row: tokens from its first to its last unmasked one; 0 for rows whose reward is NaN."""
    nodes: Tensor
    """(..., B) int32: a name for the row's node at each boundary, the smallest of its rows (counted within the prompt,
    or over all rows where ``groups`` is a tensor); -1 where the row retains none."""
    spans: SpanValues
    """Values, ends, node sizes and mean rewards of every row's spans."""


def span_tree(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    step_rewards: Tensor | None = None,
    reward_weights: Sequence[float] | Tensor | None = None,
    boundary_scores: Tensor | None = None,
    gathered: GatheredGroups | None = None,
    backend: str = "auto",
    **options: Unpack[CreditFields],
) -> SpanTree:
    """The tree that ``span_advantages`` credits; same arguments. Rows lead every field, in the caller's shape.

    Example:
        >>> token_ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
        >>> logprobs = torch.tensor([-0.1, -0.1, -3.0]).expand(3, 3)
        >>> tree = leafkernels.span_tree(logprobs, token_ids, torch.tensor([1.0, 0.0, 0.0]))
        >>> tree.boundaries.tolist(), tree.nodes.tolist()
        ([2, -1], [[0, -1], [0, -1], [-1, -1]])
    """
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    checked = check_credit(rollouts, boundary_scores, CreditOptions(**options), gathered)
    rows, layout = rollouts.rows, rollouts.layout
    if rollouts.backend == "reference":
        boundaries, nodes, spans = _by_reference(rollouts, boundary_scores, checked, gathered)
    else:
        boundaries, nodes, found = credit_spans(rollouts, boundary_scores, checked, gathered)
        spans = finish(found, boundaries[layout.group_of_row], rows.row_shape)
    nodes = nodes.masked_fill(spans.node_sizes.flatten(0, -2)[:, 1:] == 0, -1)
    if rows.prompt_shape is not None:
        nodes = torch.where(nodes < 0, nodes, nodes % max(layout.max_group, 1))
    return SpanTree(
        boundaries=rows.per_prompt(boundaries),
        lengths=layout.row_lengths.reshape(rows.row_shape),
        nodes=nodes.to(torch.int32).reshape(*rows.row_shape, nodes.shape[-1]),
        spans=spans,
    )


def _by_reference(
    rollouts: Rollouts, boundary_scores: Tensor | None, options: CreditOptions, gathered: GatheredGroups | None
) -> tuple[Tensor, Tensor, SpanValues]:
    """Boundaries (P, B), nodes (N, B) and spans."""
    import python_ref

    refuse_batch_of_ranks(options, gathered)
    rows, layout, num_boundaries = rollouts.rows, rollouts.layout, options.num_boundaries
    lists = rollouts.as_lists(boundary_scores=boundary_scores, **options._asdict())
    boundaries = torch.full((layout.group_starts.shape[0] - 1, num_boundaries), -1, dtype=torch.int32)
    nodes = torch.arange(layout.row_starts.shape[0])[:, None].repeat(1, num_boundaries)
    trees = python_ref.span_tree(rewards=rollouts.rewards.tolist(), **lists)
    for tree in trees:
        group = lists["groups"][tree.rows[0]]
        boundaries[group, : len(tree.boundaries)] = torch.tensor(tree.boundaries, dtype=torch.int32)
        for k, members_per_row in enumerate(tree.nodes):
            for i, members in zip(tree.rows, members_per_row, strict=True):
                nodes[i, k] = min((tree.rows[j] for j in members), default=i)

    def compute(rewards: Tensor) -> SpanValues:
        return spans_of_trees(trees, rewards, num_boundaries, rows.row_shape)

    def twin(rewards: Tensor) -> SpanValues:
        torch_rollouts = rollouts._replace(rewards=rewards, backend="torch")
        found = credit_spans(torch_rollouts, boundary_scores, options)
        return finish(found.spans, found.boundaries[layout.group_of_row], rows.row_shape)

    spans = SpanValues(*from_reference("span_tree", compute, gradient_by(twin), rollouts.rewards, constants=(2, 3, 4)))
    device = rollouts.token_ids.device
    return boundaries.to(device), nodes.to(device), spans
