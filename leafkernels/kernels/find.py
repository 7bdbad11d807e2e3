"""Where rows lie, and which are a prompt.

First and last unmasked token of every row: a program for each row looks from the front, then from the back. What lies
between is not read: most rows take one block at either end. Prompts of equally many padded rows take one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION, load_block, row_stride

BLOCK = 2048  # tokens looked at at a time


@triton.jit(do_not_specialize=["stride_mask_row"])
def _mask_stretches_kernel(
    row_starts_ptr,
    row_lengths_ptr,
    mask_ptr,
    slot_starts_ptr,
    slot_ends_ptr,
    stride_mask_row,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot_start = tl.load(slot_starts_ptr + row)
    size = tl.load(slot_ends_ptr + row) - slot_start
    base = row * stride_mask_row + slot_start

    first = size
    # An int64 zero: what a loop changes must keep its type.
    block = size * 0
    while block * BLOCK < first:
        live = load_block(mask_ptr, base, block * BLOCK, size, 0, BLOCK)
        # live, offs: (BLOCK,), counted from the start of the row's storage.
        offs = block * BLOCK + tl.arange(0, BLOCK)
        first = tl.minimum(first, tl.min(tl.where(live != 0, offs, size), axis=0))
        block += 1
    end = first * 0
    block = tl.cdiv(size, BLOCK)
    while (first < size) & (block * BLOCK > end):
        block -= 1
        live = load_block(mask_ptr, base, block * BLOCK, size, 0, BLOCK)
        offs = block * BLOCK + tl.arange(0, BLOCK)
        end = tl.maximum(end, tl.max(tl.where(live != 0, offs + 1, 0), axis=0))
    is_empty = first == size
    tl.store(row_starts_ptr + row, slot_start + tl.where(is_empty, 0, first))
    tl.store(row_lengths_ptr + row, tl.where(is_empty, 0, end - first))


def mask_stretches(mask: Tensor, slot_starts: Tensor, slot_ends: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) start in the row's storage and (N,) length; the start of the storage and 0 where nothing is unmasked."""
    row_starts, row_lengths = torch.empty_like(slot_starts), torch.empty_like(slot_starts)
    if slot_starts.shape[0]:
        _mask_stretches_kernel[(slot_starts.shape[0],)](
            row_starts,
            row_lengths,
            mask,
            slot_starts,
            slot_ends,
            row_stride(mask),
            BLOCK=BLOCK,
            enable_fp_fusion=FP_FUSION,
        )
    return row_starts, row_lengths


BLOCK_ROWS = 256  # rows of a program of _regular_layout_kernel


@triton.jit(do_not_specialize=["num_rows", "width", "group"])
def _regular_layout_kernel(
    slot_starts_ptr,
    slot_ends_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    group_of_row_ptr,
    num_rows,
    width,
    group,
    BLOCK: tl.constexpr,
):
    # (BLOCK,) rows. group_starts has one entry more than there are groups, hence the last mask.
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < num_rows
    tl.store(slot_starts_ptr + row, row * 0, mask=is_row)
    tl.store(slot_ends_ptr + row, row * 0 + width, mask=is_row)
    tl.store(rows_by_group_ptr + row, row, mask=is_row)
    tl.store(group_of_row_ptr + row, row // group, mask=is_row)
    tl.store(group_starts_ptr + row, row * group, mask=row <= num_rows // group)


def regular_layout(like: Tensor, num_rows: int, width: int, group: int) -> tuple[Tensor, ...]:
    """Slot starts and ends (N,), rows by group (N,), group starts (N / group + 1,), group of each row (N,): int64."""
    sizes = num_rows, num_rows, num_rows, num_rows // group + 1, num_rows
    parts = tuple(torch.empty(size, dtype=torch.int64, device=like.device) for size in sizes)
    _regular_layout_kernel[(triton.cdiv(num_rows + 1, BLOCK_ROWS),)](
        *parts, num_rows, width, group, BLOCK=BLOCK_ROWS, enable_fp_fusion=FP_FUSION
    )
    return parts
