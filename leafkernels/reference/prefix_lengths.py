"""Tensors to lists, ``python_ref``, and back."""

import torch
from torch import Tensor

import python_ref
from leafkernels.reference._lists import rows_of_groups, take_row


def common_prefix_lengths(
    token_ids: Tensor,
    row_starts: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
    limit: Tensor | None,
    start: Tensor | None,
    max_group: int,
) -> Tensor:
    """See ``python_ref.common_prefix_lengths``; arguments and result as the PyTorch implementation."""
    starts, lengths = row_starts.tolist(), row_lengths.tolist()
    result = torch.zeros((len(starts), max_group), dtype=torch.int32)
    for g, rows in enumerate(rows_of_groups(rows_by_group, group_starts)):
        shared = python_ref.common_prefix_lengths(
            [take_row(token_ids, i, starts[i], starts[i] + lengths[i]) for i in rows],
            limit=None if limit is None else max(int(limit[g]), 0),
            start=0 if start is None else max(int(start[g]), 0),
        )
        for i, row in zip(rows, shared, strict=True):
            result[i, : len(rows)] = torch.tensor(row, dtype=torch.int32)
    return result.to(token_ids.device)
