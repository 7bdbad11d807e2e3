"""Tensors to lists, ``python_ref``, and back."""

from torch import Tensor

from leafkernels.reference._lists import slot_masks
from python_ref.find import stretch


def mask_stretches(mask: Tensor, slot_starts: Tensor, slot_ends: Tensor) -> tuple[Tensor, Tensor]:
    """See ``python_ref.find.stretch``; arguments and results as the PyTorch implementation."""
    slots, masks = slot_masks(mask, slot_starts, slot_ends)
    stretches = [stretch(of_row) for of_row in masks]
    starts = [slot[0] + of_row[0] for slot, of_row in zip(slots, stretches, strict=True)]
    lengths = [end - start for start, end in stretches]
    return slot_starts.new_tensor(starts), slot_starts.new_tensor(lengths)
