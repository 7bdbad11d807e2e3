"""In what precision numbers are computed, and what of a reward is rounding."""

import torch
from torch import Tensor

# Of the largest reward of a prompt: rewards that lie within that of each other are one, known to float32, in which most
# are summed. It is four units of float32's last place at 1. A power of 2, so that no bound is rounded.
ROUNDING = 2.0**-21


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are computed in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_rounding(least: Tensor, most: Tensor) -> Tensor:
    """Whether the rewards of a prompt, float64 from ``least`` to ``most``, differ by rounding alone; infinite ones do
    not."""
    spread = most - least
    return (spread <= ROUNDING * torch.maximum(least.abs(), most.abs())) & (spread < torch.inf)
