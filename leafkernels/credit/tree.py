"""The prefix tree of the advantages, for debugging and display."""

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from leafkernels.credit.advantages import credit_spans
from leafkernels.credit.options import CreditFields, CreditOptions
from leafkernels.credit.values import SpanValues, finish
from leafkernels.rows.layout import Layout, group_members
from leafkernels.rows.rollouts import read_rollouts


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
    rewards: Tensor,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    boundary_scores: Tensor | None = None,
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
    rollouts = read_rollouts(logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens, backend)
    credit = credit_spans(rollouts, logprobs, boundary_scores, CreditOptions(**options))
    rows, layout = rollouts.rows, rollouts.layout
    of_rows = credit.boundaries[layout.group_of_row]
    spans = finish(credit.spans, of_rows, rows.row_shape)
    has_node = spans.node_sizes.reshape(of_rows.shape[0], of_rows.shape[1] + 1)[:, 1:] > 0
    nodes = _node_names(credit.prefix_lengths, of_rows, layout).masked_fill_(~has_node, -1)
    if rows.prompt_shape is not None:
        nodes = torch.where(nodes < 0, nodes, nodes % max(layout.max_group, 1))
    return SpanTree(
        boundaries=rows.per_prompt(credit.boundaries, missing=-1),
        lengths=layout.row_lengths.reshape(rows.row_shape),
        nodes=nodes.to(torch.int32).reshape(*rows.row_shape, nodes.shape[-1]),
        spans=spans,
    )


def _node_names(prefix_lengths: Tensor, boundaries_of_rows: Tensor, layout: Layout) -> Tensor:
    """(N, B) the smallest row that shares each row's prefix at each boundary."""
    num_rows = prefix_lengths.shape[0]
    members, is_member = group_members(layout.rows_by_group, layout.group_starts, layout.group_of_row, layout.max_group)
    lengths = layout.row_lengths[:, None]
    identical = (prefix_lengths == lengths) & (layout.row_lengths[members] == lengths)
    names = torch.full_like(boundaries_of_rows, num_rows, dtype=torch.int64)
    for k in range(boundaries_of_rows.shape[1]):
        shares = (identical | (prefix_lengths >= boundaries_of_rows[:, k, None])) & is_member & (lengths > 0)
        names[:, k] = members.masked_fill(~shares, num_rows).amin(1) if num_rows else num_rows
    return names
