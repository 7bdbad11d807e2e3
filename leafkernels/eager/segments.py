"""Running sums within segments of a list: each step doubles how far an entry's sum reaches.

In an order of places within the segment: ``torch.cumsum`` of floats goes through all of the list, so that entries of
another segment would change the rounding.
"""

import torch
from torch import Tensor


def running_sums(entries: Tensor, starts: Tensor, lasts: Tensor, longest: int) -> Tensor:
    """(E,): each entry plus all before it, from place ``starts`` (E,) on, less than ``longest`` places away."""
    before = torch.arange(entries.shape[0], device=entries.device) - starts
    sums, step = entries.clone(), 1
    while step < min(longest, entries.shape[0]):
        reached = torch.where(before[step:] >= step, sums[:-step], 0.0)
        sums = torch.cat([sums[:step], sums[step:] + reached])
        step *= 2
    return sums
