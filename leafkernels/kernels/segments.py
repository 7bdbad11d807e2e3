"""Running sums within segments of a list, in one launch, of float64 numbers.

A segment is cut into tiles from its first entry on. A program takes the tiles that begin in its stretch of the list,
one after the other: it sums what lies before the tile in the segment, in an order of places within the segment, and
goes on from there a block at a time. So what a segment gives depends neither on where it lies nor on its neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION

STRETCH = 64  # places that a program looks for tiles in
TILE = 1024  # entries
BLOCK = 64  # of them at a time: its square is summed


@triton.jit(do_not_specialize=["size"])
def _running_sums_kernel(
    sums_ptr,
    entries_ptr,
    starts_ptr,
    lasts_ptr,
    size,
    STRETCH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # places, starts, begins: (STRETCH,)
    places = tl.program_id(0).to(tl.int64) * STRETCH + tl.arange(0, STRETCH)
    starts = tl.load(starts_ptr + places, mask=places < size, other=0)
    begins = (places < size) & ((places - starts) % TILE == 0)
    place = tl.min(places) - 1
    for _ in range(tl.sum(begins.to(tl.int32))):
        place = tl.min(tl.where(begins & (places > place), places, size))
        start = tl.load(starts_ptr + place)
        # (TILE,) sums that meet once at the end: one fixed order.
        before = tl.zeros([TILE], tl.float64)
        for at in range(start, place, TILE):
            before += tl.load(entries_ptr + at + tl.arange(0, TILE))
        carry = tl.sum(before)
        end = tl.minimum(tl.load(lasts_ptr + place) + 1, place + TILE)
        for at in range(place, end, BLOCK):
            # offs, own, sums: (BLOCK,); what each sums: (BLOCK, BLOCK).
            offs = tl.arange(0, BLOCK)
            own = tl.load(entries_ptr + at + offs, mask=at + offs < end, other=0.0)
            sums = carry + tl.sum(tl.where(offs[None, :] <= offs[:, None], own[None, :], 0.0), axis=1)
            tl.store(sums_ptr + at + offs, sums, mask=at + offs < end)
            carry = tl.sum(tl.where(offs == BLOCK - 1, sums, 0.0))


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
            TILE=TILE,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )
    return sums
