"""Tensors to lists, ``python_ref``, and back."""

import torch
from torch import Tensor

import python_ref
from leafkernels.reference._lists import slot_masks, take_row


def scatter_spans(
    values: Tensor,
    span_ends: Tensor,
    mask: Tensor | None,
    slot_starts: Tensor,
    slot_ends: Tensor,
    row_starts: Tensor,
    size: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """See ``python_ref.scatter_spans``; arguments and result as the PyTorch implementation."""
    slots, masks = slot_masks(mask, slot_starts, slot_ends)
    tokens = torch.zeros(size, dtype=dtype)
    for i, row in enumerate(python_ref.scatter_spans(values.tolist(), span_ends.tolist(), masks)):
        of_row = tokens[i] if len(size) == 2 else tokens
        of_row[slots[i][0] : slots[i][1]] = torch.tensor(row, dtype=dtype)
    return tokens.to(values.device)


def gather_spans(
    gradients: Tensor,
    span_ends: Tensor,
    mask: Tensor | None,
    slot_starts: Tensor,
    slot_ends: Tensor,
    row_starts: Tensor,
) -> Tensor:
    """See ``python_ref.gather_spans``; arguments and result as the PyTorch implementation."""
    slots, masks = slot_masks(mask, slot_starts, slot_ends)
    rows = [take_row(gradients, i, start, end) for i, (start, end) in enumerate(slots)]
    sums = python_ref.gather_spans(rows, span_ends.tolist(), masks)
    return torch.tensor(sums, dtype=torch.float64, device=gradients.device).reshape(span_ends.shape)
