"""Tensors to lists, ``python_ref``, and back."""

from collections.abc import Callable

import torch
from torch import Tensor

from leafkernels.reference._lists import rows_of_groups, take_row
from python_ref.tree import prefix_nodes as nodes_of_rows
from python_ref.values import nodes_from_prefix_lengths


def prefix_nodes(
    token_ids: Tensor,
    row_starts: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
    boundaries: Tensor,
    max_group: int,
) -> Tensor:
    """See ``python_ref.tree.prefix_nodes``; arguments and result as the PyTorch implementation."""
    starts, lengths = row_starts.tolist(), row_lengths.tolist()

    def nodes(rows: list[int], boundary: int) -> list[list[int]]:
        tokens = [take_row(token_ids, i, starts[i], starts[i] + lengths[i]) for i in rows]
        return nodes_of_rows(tokens, boundary, [lengths[i] > 0 for i in rows])

    return _names(nodes, boundaries, rows_by_group, group_starts)


def nodes_of_prefix_lengths(
    prefix_lengths: Tensor,
    boundaries: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
) -> Tensor:
    """See ``python_ref.values.nodes_from_prefix_lengths``; arguments and result as the PyTorch implementation."""
    all_lengths = row_lengths.tolist()

    def nodes(rows: list[int], boundary: int) -> list[list[int]]:
        shared = [row[: len(rows)] for row in prefix_lengths[rows].tolist()]
        lengths = [all_lengths[i] for i in rows]
        return nodes_from_prefix_lengths(shared, lengths, boundary, [length > 0 for length in lengths])

    return _names(nodes, boundaries, rows_by_group, group_starts)


def _names(
    nodes: Callable[[list[int], int], list[list[int]]],
    boundaries: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
) -> Tensor:
    """(N, B) the smallest row of each row's node; the row itself where it is in none."""
    names = torch.arange(rows_by_group.shape[0])[:, None].repeat(1, boundaries.shape[1])
    for rows, positions in zip(rows_of_groups(rows_by_group, group_starts), boundaries.tolist(), strict=True):
        for k, position in enumerate(positions):
            if position >= 0:
                for i, members in zip(rows, nodes(rows, position), strict=True):
                    names[i, k] = min((rows[j] for j in members), default=i)
    return names.to(boundaries.device)
