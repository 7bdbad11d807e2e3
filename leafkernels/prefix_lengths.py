"""How many leading tokens every two rows of a prompt share."""

import torch
from torch import Tensor

from leafkernels._backend import implementation, resolve_backend
from leafkernels._checks import check_integer, check_layout
from leafkernels._layout import Layout, as_rows
from leafkernels._ops import register


def _impl(token_ids: Tensor, *args: object) -> Tensor:
    *arguments, backend = args
    return implementation(str(backend)).common_prefix_lengths(token_ids, *arguments)


def _fake(
    token_ids: Tensor,
    row_starts: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
    limit: Tensor | None,
    max_group: int,
    backend: str,
) -> Tensor:
    return token_ids.new_empty((row_starts.shape[0], max_group), dtype=torch.int32)


_common_prefix_lengths = register(
    "common_prefix_lengths(Tensor token_ids, Tensor row_starts, Tensor row_lengths, Tensor rows_by_group, "
    "Tensor group_starts, Tensor group_of_row, Tensor? limit, SymInt max_group, str backend) -> Tensor",
    _impl,
    _fake,
)


def prefix_lengths_of_groups(token_ids: Tensor, layout: Layout, limit: Tensor | None, backend: str) -> Tensor:
    """(N, max_group) int32: row i against the j-th row of its group, 0 behind the last.

    ``limit`` (P,) int32 stops the comparison: longer prefixes count as that long. The arguments have been checked.
    """
    return _common_prefix_lengths(
        token_ids,
        layout.row_starts,
        layout.row_lengths,
        layout.rows_by_group,
        layout.group_starts,
        layout.group_of_row,
        limit,
        layout.max_group,
        backend,
    )


def common_prefix_lengths(
    token_ids: Tensor,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Length of the longest common prefix of every two rows of a prompt, exact; the diagonal holds the row lengths.

    Args:
        token_ids: (G, T), (B, G, T), (N, T) with ``groups``, or (total,) with ``cu_seqlens``; any integer dtype, read
            as it is. Tokens inside a row's stretch count also where the mask has a hole.
        response_mask: shaped like ``token_ids``; the row is the stretch from its first to its last nonzero entry.
        groups: rows of each prompt; see ``span_advantages``.
        cu_seqlens: (N + 1,) int32, the offsets of packed rows.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        int32: (G, G) for one prompt; (B, G, G) for a batch or an int ``groups``; (N, N), -1 between rows of different
        prompts, where ``groups`` is a tensor.
    """
    check_integer("token_ids", token_ids)
    layout, _, row_shape = check_layout("token_ids", token_ids, response_mask, groups, cu_seqlens)
    backend = resolve_backend(backend, token_ids.device)
    lengths = prefix_lengths_of_groups(as_rows(token_ids), layout, None, backend)
    if isinstance(groups, Tensor):
        return _between_all_rows(lengths, layout)
    if groups is None:
        return lengths.reshape(*row_shape, row_shape[-1])
    return lengths.reshape(lengths.shape[0] // groups, groups, groups)


def _between_all_rows(lengths: Tensor, layout: Layout) -> Tensor:
    """(N, N) from the table by rank within the group; -1 between groups."""
    num_rows = lengths.shape[0]
    ranks = torch.empty_like(layout.rows_by_group)
    by_group = layout.group_of_row[layout.rows_by_group]
    every_row = torch.arange(num_rows, device=lengths.device)
    ranks[layout.rows_by_group] = every_row - layout.group_starts[by_group]
    same = layout.group_of_row[:, None] == layout.group_of_row
    return lengths.gather(1, ranks.expand(num_rows, num_rows)).masked_fill(~same, -1)
