"""In what precision numbers are computed, and what of a reward is rounding."""

import torch
from torch import Tensor

# Of the largest reward of a prompt: rewards that lie within that of each other are one, known to float32, in which most
# are summed. It is four units of float32's last place at 1. A power of 2, so that no bound is rounded.
ROUNDING = 2.0**-21
# Up to here float32 holds every whole number.
EXACT = 2.0**24


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are computed in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_rounding(least: Tensor, most: Tensor) -> Tensor:
    """Whether the rewards of a prompt, float64 from ``least`` to ``most``, differ by rounding alone; infinite ones do
    not, nor whole numbers that float32 cannot have rounded."""
    spread, size = most - least, torch.maximum(least.abs(), most.abs())
    are_whole = (least == least.floor()) & (most == most.floor()) & (spread > 0)
    # Of these float32 makes no sum that is rounded up to 2 ** 24, and beyond it holds none that lie so near.
    are_exact = are_whole & ((size <= EXACT) | (spread * EXACT < size))
    return (spread <= ROUNDING * size) & (spread < torch.inf) & ~are_exact
