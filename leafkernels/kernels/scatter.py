"""Spread span values over the tokens, and its adjoint: sums of token gradients per span.

Programs share a long row block by block to write it; sums are taken by one program, in one fixed order.
"""

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION, load_block, num_splits, row_stride, store_block

if TYPE_CHECKING:
    from leafkernels.rows.layout import Layout

BLOCK = 1024  # tokens written or summed at a time


@triton.jit(do_not_specialize=["stride_tokens_row", "stride_mask_row", "num_spans"])
def _scatter_spans_kernel(
    tokens_ptr,
    values_ptr,
    span_ends_ptr,
    mask_ptr,
    slot_starts_ptr,
    slot_ends_ptr,
    row_starts_ptr,
    stride_tokens_row,
    stride_mask_row,
    num_spans,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # tokens, mask: rows of storage, padding included; values, span_ends: (N, S).
    slot_start = tl.load(slot_starts_ptr + row)
    size = tl.load(slot_ends_ptr + row) - slot_start
    lead = tl.load(row_starts_ptr + row) - slot_start
    # The whole storage of the row is written, padding included, so that nothing need clear it first.
    for block in range(tl.program_id(1), tl.cdiv(size, BLOCK), tl.num_programs(1)):
        start = block * BLOCK
        # (BLOCK,), counted from the row's first unmasked token: negative in padding before it.
        position = start + tl.arange(0, BLOCK) - lead
        value = tl.zeros([BLOCK], tokens_ptr.dtype.element_ty)
        # An int64 zero: what a loop changes must keep its type.
        previous = lead * 0
        for span in range(num_spans):
            end = tl.load(span_ends_ptr + row * num_spans + span).to(tl.int64)
            span_value = tl.load(values_ptr + row * num_spans + span).to(tokens_ptr.dtype.element_ty)
            value = tl.where((position >= previous) & (position < end), span_value, value)
            previous = tl.maximum(previous, end)
        if HAS_MASK:
            live = load_block(mask_ptr, row * stride_mask_row + slot_start, start, size, 0, BLOCK)
            value = tl.where(live != 0, value, tl.zeros([BLOCK], tokens_ptr.dtype.element_ty))
        store_block(tokens_ptr, row * stride_tokens_row + slot_start, start, size, value, BLOCK)


@triton.jit(do_not_specialize=["stride_gradients_row", "stride_mask_row", "num_spans"])
def _gather_spans_kernel(
    sums_ptr,
    gradients_ptr,
    span_ends_ptr,
    mask_ptr,
    slot_starts_ptr,
    slot_ends_ptr,
    row_starts_ptr,
    stride_gradients_row,
    stride_mask_row,
    num_spans,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot_start = tl.load(slot_starts_ptr + row)
    size = tl.load(slot_ends_ptr + row) - slot_start
    lead = tl.load(row_starts_ptr + row) - slot_start
    previous = lead
    for span in range(num_spans):
        end = lead + tl.load(span_ends_ptr + row * num_spans + span).to(tl.int64)
        # An end may exceed the row, and an empty span ends where it begins.
        end = tl.maximum(tl.minimum(end, size), previous)
        # (BLOCK,) sums that meet once at the end: one fixed order.
        total = tl.zeros([BLOCK], tl.float64)
        for block in range(previous // BLOCK, tl.cdiv(end, BLOCK)):
            start = block * BLOCK
            offs = start + tl.arange(0, BLOCK)
            gradient = load_block(gradients_ptr, row * stride_gradients_row + slot_start, start, size, 0.0, BLOCK)
            counts = (offs >= previous) & (offs < end)
            if HAS_MASK:
                live = load_block(mask_ptr, row * stride_mask_row + slot_start, start, size, 0, BLOCK)
                counts = counts & (live != 0)
            total += tl.where(counts, gradient.to(tl.float64), 0.0)
        tl.store(sums_ptr + row * num_spans + span, tl.sum(total, axis=0))
        previous = end


def scatter_spans(
    values: Tensor, span_ends: Tensor, mask: Tensor | None, layout: "Layout", size: list[int], dtype: torch.dtype
) -> Tensor:
    """One value per token in ``dtype``, shaped ``size``; 0 outside the spans and where the mask is False."""
    tokens = torch.empty(size, dtype=dtype, device=values.device)
    num_rows, num_spans = values.shape
    if math.prod(size):
        _scatter_spans_kernel[(num_rows, num_splits(size[-1], BLOCK, num_rows))](
            tokens,
            values.contiguous(),
            span_ends.contiguous(),
            mask,
            *layout.slots,
            layout.row_starts,
            row_stride(tokens),
            0 if mask is None else row_stride(mask),
            num_spans,
            HAS_MASK=mask is not None,
            BLOCK=BLOCK,
            enable_fp_fusion=FP_FUSION,
        )
    return tokens


def gather_spans(gradients: Tensor, span_ends: Tensor, mask: Tensor | None, layout: "Layout") -> Tensor:
    """Adjoint of ``scatter_spans``: (N, S) float64 sums of the token gradients of each span."""
    num_rows, num_spans = span_ends.shape
    sums = torch.empty((num_rows, num_spans), dtype=torch.float64, device=gradients.device)
    if num_rows:
        _gather_spans_kernel[(num_rows,)](
            sums,
            gradients,
            span_ends.contiguous(),
            mask,
            *layout.slots,
            layout.row_starts,
            row_stride(gradients),
            0 if mask is None else row_stride(mask),
            num_spans,
            HAS_MASK=mask is not None,
            BLOCK=BLOCK,
            enable_fp_fusion=FP_FUSION,
        )
    return sums
