"""First and last unmasked token of every row, from one running count over all rows."""

import torch
from torch import Tensor


def mask_stretches(mask: Tensor, slot_starts: Tensor, slot_ends: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) start in the row's storage and (N,) length; the start of the storage and 0 where nothing is unmasked."""
    base = 0 if mask.dim() == 1 else torch.arange(mask.shape[0], device=mask.device) * mask.shape[1]
    counts = mask.reshape(-1).cumsum(0, dtype=torch.int32 if mask.numel() < 1 << 31 else torch.int64)
    before = _count_before(counts, slot_starts + base)
    after = _count_before(counts, slot_ends + base)
    first = torch.searchsorted(counts, before + 1) - base
    last = torch.searchsorted(counts, after) - base
    is_empty = after == before
    return torch.where(is_empty, slot_starts, first), (last + 1 - first).masked_fill(is_empty, 0)


def _count_before(counts: Tensor, place: Tensor) -> Tensor:
    return counts[(place - 1).clamp_min(0)].masked_fill_(place == 0, 0)
