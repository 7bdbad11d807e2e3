"""In what precision numbers are computed."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are computed in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
