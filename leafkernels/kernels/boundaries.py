"""Boundaries by non-maximum suppression on the column maxima (see ``leafkernels.eager.boundaries`` for why).

    C[p]   = max over the rows of (score at p, then the smaller row)        one read of every score
    repeat B times: take the best C (then the smaller p); blank all columns closer than D

A score becomes an integer that sorts as the score does (the bits of a float, the negative ones flipped), with the row
below it, so that one integer maximum settles score and row, in any order of evaluation.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION, load_block, num_splits, row_stride

if TYPE_CHECKING:
    from leafkernels.credit.options import CreditOptions
    from leafkernels.rows.layout import Layout

BLOCK = 1024  # columns of a program; tests shrink it to cross blocks with small inputs

NEVER = tl.constexpr(-(2**63))  # below every score, -inf included


@triton.jit(do_not_specialize=["stride_scores_row", "stride_mask_row"])
def _column_maxima_kernel(
    columns_ptr,
    column_starts_ptr,
    scores_ptr,
    mask_ptr,
    row_starts_ptr,
    row_lengths_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    stride_scores_row,
    stride_mask_row,
    NEGATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # columns: int64, a group's from column_starts on, at least as many as its longest row has tokens.
    group = tl.program_id(0).to(tl.int64)
    first = tl.load(group_starts_ptr + group)
    last = tl.load(group_starts_ptr + group + 1)
    column_start = tl.load(column_starts_ptr + group)
    # An int64 zero: what a loop changes must keep its type.
    longest = first * 0
    for j in range(first, last):
        longest = tl.maximum(longest, tl.load(row_lengths_ptr + tl.load(rows_by_group_ptr + j)))

    for block in range(tl.program_id(1), tl.cdiv(longest, BLOCK), tl.num_programs(1)):
        start = block * BLOCK
        offs = start + tl.arange(0, BLOCK)
        # offs, best, score, key: (BLOCK,), one for each column.
        best = tl.full([BLOCK], NEVER, tl.int64)
        for j in range(first, last):
            row = tl.load(rows_by_group_ptr + j)
            length = tl.load(row_lengths_ptr + row)
            if start < length:
                row_start = tl.load(row_starts_ptr + row)
                score = load_block(scores_ptr, row * stride_scores_row + row_start, start, length, 0.0, BLOCK)
                score = score.to(tl.float32)
                if NEGATE:
                    score = -score
                # NaN differs from itself; the first token of a row can start no span but the first.
                candidate = (score == score) & (offs >= 1) & (offs < length)
                if HAS_MASK:
                    live = load_block(mask_ptr, row * stride_mask_row + row_start, start, length, 0, BLOCK)
                    candidate = candidate & (live != 0)
                score = tl.where(score == 0.0, 0.0, score)  # -0 and 0 tie
                # Negative floats fall as their bits rise. The low half settles equal scores: the smaller row wins.
                bits = score.to(tl.int32, bitcast=True)
                bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
                key = bits.to(tl.int64) * 4294967296 + (4294967295 - row)
                best = tl.maximum(best, tl.where(candidate, key, NEVER))
        tl.store(columns_ptr + column_start + offs, best, mask=offs < longest)


@triton.jit(do_not_specialize=["min_separation"])
def _select_boundaries_kernel(
    boundaries_ptr,
    columns_ptr,
    column_starts_ptr,
    row_lengths_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    min_separation,
    NUM_BOUNDARIES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    first = tl.load(group_starts_ptr + group)
    last = tl.load(group_starts_ptr + group + 1)
    column_start = tl.load(column_starts_ptr + group)
    longest = 0
    shortest = 2147483647
    for j in range(first, last):
        length = tl.load(row_lengths_ptr + tl.load(rows_by_group_ptr + j)).to(tl.int32)
        longest = tl.maximum(longest, length)
        shortest = tl.where(length > 0, tl.minimum(shortest, length), shortest)
    separation = tl.maximum(shortest // (NUM_BOUNDARIES + 1), 2)
    separation = tl.where(min_separation > 0, min_separation, separation)

    offs_b = tl.arange(0, BLOCK_B)
    # offs_b, accepted: (BLOCK_B,), in the order of their scores.
    accepted = tl.full([BLOCK_B], 2147483647, tl.int32)
    for k in range(NUM_BOUNDARIES):
        # Each of (BLOCK,) lanes keeps the best of its own columns, and lanes meet once, after all blocks.
        best = tl.full([BLOCK], NEVER, tl.int64)
        where = tl.full([BLOCK], 0, tl.int32)
        for block in range(0, tl.cdiv(longest, BLOCK)):
            offs = block * BLOCK + tl.arange(0, BLOCK)
            key = load_block(columns_ptr, column_start, block * BLOCK, longest, NEVER, BLOCK)
            # (BLOCK, BLOCK_B). An unused entry is so large that the distance to it suffices; none is negative, so no
            # difference leaves int32.
            distance = tl.abs(accepted[None, :] - offs[:, None])
            blanked = tl.min(distance, axis=1) < separation
            key = tl.where(blanked, NEVER, key)
            where = tl.where(key > best, offs, where)  # of equal keys the smaller position stays
            best = tl.maximum(best, key)
        top = tl.max(best, axis=0)
        position = tl.min(tl.where(best == top, where, 2147483647), axis=0)
        position = tl.where(top == NEVER, 2147483647, position)
        accepted = tl.where(offs_b == k, position, accepted)

    # Distinct positions, so a boundary's place is the number of smaller ones; those not found keep the last places.
    found = accepted < 2147483647
    smaller = (accepted[None, :] < accepted[:, None]).to(tl.int32)
    place = tl.where(found, tl.sum(smaller, axis=1), offs_b)
    tl.store(
        boundaries_ptr + group * NUM_BOUNDARIES + place, tl.where(found, accepted, -1), mask=offs_b < NUM_BOUNDARIES
    )


def select_boundaries(
    scores: Tensor, mask: Tensor | None, layout: "Layout", options: "CreditOptions", negate: bool
) -> Tensor:
    """(P, B) int32, ascending, -1 after the last where there are fewer; ``negate`` ranks by -scores."""
    num_groups, max_length = layout.group_starts.shape[0] - 1, layout.max_length
    boundaries = torch.empty((num_groups, options.num_boundaries), dtype=torch.int32, device=scores.device)
    if boundaries.numel() == 0:
        return boundaries
    if 0 < num_groups * max_length <= scores.numel():
        num_columns = num_groups * max_length
        column_starts = torch.arange(0, num_columns, max_length, device=scores.device)
    else:
        # Packed rows, or groups of unknown size: a group has no more columns than tokens.
        num_columns = scores.numel()
        before = torch.nn.functional.pad(layout.row_lengths[layout.rows_by_group].cumsum(0), (1, 0))
        column_starts = before[layout.group_starts[:-1]]
    columns = torch.empty(num_columns, dtype=torch.int64, device=scores.device)

    _column_maxima_kernel[(num_groups, num_splits(max_length, BLOCK, num_groups))](
        columns,
        column_starts,
        scores,
        mask,
        *layout.rows,
        layout.rows_by_group,
        layout.group_starts,
        row_stride(scores),
        0 if mask is None else row_stride(mask),
        NEGATE=negate,
        HAS_MASK=mask is not None,
        BLOCK=BLOCK,
        enable_fp_fusion=FP_FUSION,
    )
    _select_boundaries_kernel[(num_groups,)](
        boundaries,
        columns,
        column_starts,
        layout.row_lengths,
        layout.rows_by_group,
        layout.group_starts,
        min(options.min_separation or 0, max(max_length, 1)),  # none are farther apart
        NUM_BOUNDARIES=options.num_boundaries,
        BLOCK_B=triton.next_power_of_2(options.num_boundaries),
        BLOCK=BLOCK,
        enable_fp_fusion=FP_FUSION,
    )
    return boundaries
