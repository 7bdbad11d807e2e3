"""Tensors to lists, ``python_ref``, and back."""

import torch
from torch import Tensor

import python_ref
from leafkernels.reference._lists import rows_of_groups, take_row


def select_boundaries(
    scores: Tensor,
    mask: Tensor | None,
    row_starts: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
    max_length: int,
    num_boundaries: int,
    min_separation: int | None,
    negate: bool,
) -> Tensor:
    """See ``python_ref.select_boundaries``; arguments and result as the PyTorch implementation."""
    starts, lengths = row_starts.tolist(), row_lengths.tolist()
    result = []
    for rows in rows_of_groups(rows_by_group, group_starts):
        group_scores = [take_row(scores, i, starts[i], starts[i] + lengths[i]) for i in rows]
        if negate:
            group_scores = [[-x for x in row] for row in group_scores]
        masks = None if mask is None else [take_row(mask, i, starts[i], starts[i] + lengths[i]) for i in rows]
        found = python_ref.select_boundaries(
            group_scores, response_mask=masks, num_boundaries=num_boundaries, min_separation=min_separation
        )
        result.append(found + [-1] * (num_boundaries - len(found)))
    return torch.tensor(result, dtype=torch.int32, device=scores.device).reshape(len(result), num_boundaries)
