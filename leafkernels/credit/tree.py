"""The prefix tree of the advantages, for debugging and display."""

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from leafkernels.credit.advantages import credit_spans
from leafkernels.credit.options import CreditFields, CreditOptions
from leafkernels.credit.values import SpanValues, finish
from leafkernels.rows.gather import GatheredGroups
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
    rollouts = read_rollouts(logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens, backend)
    credit = credit_spans(rollouts, logprobs, boundary_scores, CreditOptions(**options), gathered)
    rows, layout = rollouts.rows, rollouts.layout
    of_rows = credit.boundaries[layout.group_of_row]
    spans = finish(credit.spans, of_rows, rows.row_shape)
    has_node = spans.node_sizes.flatten(0, -2)[:, 1:] > 0
    nodes = credit.nodes.masked_fill(~has_node, -1)
    if rows.prompt_shape is not None:
        nodes = torch.where(nodes < 0, nodes, nodes % max(layout.max_group, 1))
    return SpanTree(
        boundaries=rows.per_prompt(credit.boundaries),
        lengths=layout.row_lengths.reshape(rows.row_shape),
        nodes=nodes.to(torch.int32).reshape(*rows.row_shape, nodes.shape[-1]),
        spans=spans,
    )
