"""The precision in which numbers are computed, sums of the same bits, and which differences of rewards are rounding."""

import torch
from torch import Tensor

# Relative to a prompt's largest reward: rewards that lie this near to each other count as equal, because most are
# summed in float32. Four units of float32's last place at 1; a power of 2, so that no bound is rounded.
ROUNDING = 2.0**-21
# Up to here float32 holds every whole number.
EXACT = 2.0**24


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_rounding(least: Tensor, most: Tensor) -> Tensor:
    """Whether the rewards of a prompt, float64 from ``least`` to ``most``, differ by rounding alone; infinite ones do
    not, nor whole numbers that float32 cannot have rounded."""
    spread, size = most - least, torch.maximum(least.abs(), most.abs())
    are_whole = (least == least.floor()) & (most == most.floor()) & (spread > 0)
    # Of these float32 makes no sum that is rounded up to 2 ** 24, and beyond it holds none that lie so near.
    are_exact = are_whole & ((size <= EXACT) | (spread * EXACT < size))
    return (spread <= ROUNDING * size) & (spread < torch.inf) & ~are_exact


def add_by(names: Tensor, entries: Tensor, num_names: int) -> Tensor:
    """(num_names,) the sum of the entries (n,) of each name; the same bits on every run."""
    sums = entries.new_zeros(num_names)
    if sums.is_cuda:
        return sums.index_put_((names,), entries, accumulate=True)  # sorts; index_add_ adds in any order there
    return sums.index_add_(0, names, entries)
