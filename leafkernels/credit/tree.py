"""The prefix tree behind the advantages, for debugging and display."""

from typing import NamedTuple

import torch
from torch import Tensor

from leafkernels.credit.advantages import credit_spans
from leafkernels.credit.boundaries import per_prompt
from leafkernels.credit.values import SpanValues, finish


class SpanTree(NamedTuple):
    """The prefix tree behind the advantages, and what ``span_advantages`` scatters; for debugging and display."""

    boundaries: Tensor
    """int32, ascending, -1 where there is none; shaped as by ``select_boundaries``."""
    lengths: Tensor
    """int64, one for each row: tokens from its first to its last unmasked one; 0 for rows whose reward is NaN."""
    nodes: Tensor
    """(..., B) int32: a name for the row's node at each boundary, the smallest of its rows (counted within the prompt,
    or over all rows where ``groups`` is a tensor); -1 where the row retains none."""
    spans: SpanValues
    """Values, ends, members and mean rewards of every row's spans."""


def span_tree(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    num_boundaries: int = 2,
    min_separation: int | None = None,
    boundary_scores: Tensor | None = None,
    terms: str = "both",
    multiplicity_power: float = 0.5,
    leave_one_out: bool = False,
    normalize: str = "span",
    backend: str = "auto",
) -> SpanTree:
    """The tree that ``span_advantages`` credits; same arguments. Rows lead every field, in the caller's shape."""
    credit = credit_spans(
        logprobs,
        token_ids,
        rewards,
        response_mask=response_mask,
        groups=groups,
        cu_seqlens=cu_seqlens,
        num_boundaries=num_boundaries,
        min_separation=min_separation,
        boundary_scores=boundary_scores,
        terms=terms,
        multiplicity_power=multiplicity_power,
        leave_one_out=leave_one_out,
        normalize=normalize,
        backend=backend,
    )
    layout, row_shape = credit.rollouts.layout, credit.rollouts.row_shape
    of_rows = credit.boundaries[layout.group_of_row]
    spans = finish(credit.spans, of_rows, row_shape)
    has_node = spans.members.flatten(0, -2)[:, 1:] > 0
    nodes = credit.nodes.masked_fill(~has_node, -1)
    if not isinstance(groups, Tensor):
        nodes = torch.where(nodes < 0, nodes, nodes % max(layout.max_group, 1))
    return SpanTree(
        boundaries=per_prompt(credit.boundaries, layout, row_shape, groups),
        lengths=layout.row_lengths.reshape(row_shape),
        nodes=nodes.to(torch.int32).reshape(*row_shape, nodes.shape[-1]),
        spans=spans,
    )
