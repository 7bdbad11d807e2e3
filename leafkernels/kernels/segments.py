"""Running sums within segments of a list, in one launch, of float64 numbers.

The first entries of each segment are added one by one, many segments at a time. What comes after them is cut into
tiles, from the segment's start on; a program takes the tiles that begin in its stretch of the list, one after the
other: it sums what lies before the tile in the segment, and scans the tile from there on. All is in an order of places
within the segment, so what a segment gives depends neither on where it lies nor on its neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION

STRETCH = 128  # places that a program looks at
FIRST = 16  # entries of each segment that are added one by one: rows of a prompt, tokens that lie outside of rows
TILE = 512  # entries


@triton.jit(do_not_specialize=["size"])
def _running_sums_kernel(
    sums_ptr,
    entries_ptr,
    starts_ptr,
    lasts_ptr,
    size,
    STRETCH: tl.constexpr,
    FIRST: tl.constexpr,
    TILE: tl.constexpr,
):
    # spots, starts, nth, sums: (STRETCH,)
    first = tl.program_id(0).to(tl.int64) * STRETCH
    spots = tl.arange(0, STRETCH)
    is_in = first + spots < size
    starts = tl.load(starts_ptr + first + spots, mask=is_in, other=0)
    nth = tl.where(is_in, first + spots - starts, -1)
    is_early = is_in & (nth < FIRST)
    sums = tl.zeros([STRETCH], tl.float64)
    for i in range(tl.max(tl.where(is_early, nth + 1, 0).to(tl.int32))):
        sums += tl.load(entries_ptr + starts + i, mask=is_early & (i <= nth), other=0.0)
    tl.store(sums_ptr + first + spots, sums, mask=is_early)

    begins = (nth >= FIRST) & ((nth - FIRST) % TILE == 0)
    offs = tl.arange(0, TILE)
    spot = -1
    for _ in range(tl.sum(begins.to(tl.int32))):
        spot = tl.min(tl.where(begins & (spots > spot), spots, STRETCH))
        place = first + spot
        # before, own: (TILE,)
        before = tl.zeros([TILE], tl.float64)
        for at in range(tl.load(starts_ptr + place), place, TILE):
            before += tl.load(entries_ptr + at + offs, mask=at + offs < place, other=0.0)
        is_own = place + offs <= tl.load(lasts_ptr + place)
        own = tl.load(entries_ptr + place + offs, mask=is_own, other=0.0)
        tl.store(sums_ptr + place + offs, tl.sum(before) + tl.cumsum(own), mask=is_own)


def running_sums(entries: Tensor, starts: Tensor, lasts: Tensor, longest: int) -> Tensor:
    """(E,) float64: each entry plus all before it in its segment [starts, lasts]; ``longest`` is not needed."""
    sums, size = torch.empty_like(entries), entries.shape[0]
    if size:
        _running_sums_kernel[(triton.cdiv(size, STRETCH),)](
            sums,
            entries,
            starts,
            lasts,
            size,
            STRETCH=STRETCH,
            FIRST=FIRST,
            TILE=TILE,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )
    return sums
