"""Surprisal and entropy over the kept ids of a sampling mask: ragged lists of logits, and the products that make them.

A row of kept ids is short, so one program reads it twice: for its top, and for the sums beside the top. The state that
comes of it is that of ``leafkernels.kernels.surprisal``, as if all other ids were -inf.

A gradient of the head is a sum by id. Its terms are sorted by id and the program of the first of each id adds them in
their order: no atomic addition, and the same bits every time.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION, LOG2_E, expm1
from leafkernels.kernels.surprisal import FLOOR, LEAST, log_total_entropy

if TYPE_CHECKING:
    from leafkernels.vocabulary.inputs import RowStatistics
    from leafkernels.vocabulary.sampling_mask import Kept

BLOCK = 128  # kept ids of a row at a time
ENTRIES = 16  # kept ids at a time, where each has a row of the weight
COLUMNS = 128  # of the weight, at a time


@triton.jit(do_not_specialize=["num_rows"])
def _kept_statistics_kernel(
    statistics_ptr, values_ptr, offsets_ptr, sampled_ptr, temperature_ptr, num_rows, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    surprisal = 0.0
    entropy = 0.0
    top = 0.0
    log_total = 0.0
    if end > start:
        inv_temperature = 1.0 / tl.load(temperature_ptr + row).to(tl.float32)
        floor = FLOOR / inv_temperature
        # tops, ones, r, t: (BLOCK,), each of every BLOCK-th id.
        tops = tl.full([BLOCK], LEAST, tl.float32)
        for first in range(start, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tops = tl.maximum(tops, tl.load(values_ptr + at, mask=at < end, other=float("-inf")))
        top = tl.max(tops, axis=0)
        ones = tl.zeros([BLOCK], tl.float32)
        r = tl.zeros([BLOCK], tl.float32)
        t = tl.zeros([BLOCK], tl.float32)
        for first in range(start, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(values_ptr + at, mask=at < end, other=float("-inf"))
            d = tl.maximum(x - top, floor, propagate_nan=tl.PropagateNan.ALL)
            e = tl.exp2(d * (inv_temperature * LOG2_E))
            ones += tl.where(d == 0.0, 1.0, 0.0)
            r += tl.where(d == 0.0, 0.0, e)
            t += d * e
        beside = tl.sum(ones, axis=0) - 1.0 + tl.sum(r, axis=0)
        log_total, entropy = log_total_entropy(top, beside, tl.sum(t, axis=0), inv_temperature)
        place = tl.load(sampled_ptr + row)
        picked = tl.load(values_ptr + place, mask=place >= 0, other=float("nan"))
        surprisal = log_total - (picked - top) * inv_temperature
    plane = num_rows.to(tl.int64)
    tl.store(statistics_ptr + row, surprisal)
    tl.store(statistics_ptr + plane + row, entropy)
    tl.store(statistics_ptr + 2 * plane + row, top)
    tl.store(statistics_ptr + 3 * plane + row, log_total)


@triton.jit
def _kept_statistics_backward_kernel(
    gradients_ptr,
    surprisal_gradients_ptr,
    entropy_gradients_ptr,
    surprisal_ptr,
    entropy_ptr,
    tops_ptr,
    log_totals_ptr,
    values_ptr,
    offsets_ptr,
    sampled_ptr,
    temperature_ptr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    if end > start:
        inv_temperature = 1.0 / tl.load(temperature_ptr + row).to(tl.float32)
        surprisal = tl.load(surprisal_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        top = tl.load(tops_ptr + row)
        log_total = tl.load(log_totals_ptr + row)
        grad_surprisal = tl.load(surprisal_gradients_ptr + row).to(tl.float32)
        # An id outside of the vocabulary has no surprisal, and a loss that counts it no gradient.
        grad_surprisal = tl.where((surprisal != surprisal) & (grad_surprisal != 0.0), surprisal, grad_surprisal)
        grad_surprisal *= inv_temperature
        p_sampled = tl.exp(-surprisal)
        at_sampled = grad_surprisal * expm1(-surprisal)
        a = grad_surprisal
        b = 0.0
        if HAS_ENTROPY:
            grad_entropy = tl.load(entropy_gradients_ptr + row).to(tl.float32) * inv_temperature
            a += grad_entropy * (log_total - entropy)
            b = -grad_entropy * inv_temperature
            at_sampled += tl.where(p_sampled == 0.0, 0.0, grad_entropy * p_sampled * (surprisal - entropy))
        place = tl.load(sampled_ptr + row)
        floor = FLOOR / inv_temperature
        for first in range(start, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(values_ptr + at, mask=at < end, other=0.0)
            d = tl.maximum(x - top, floor, propagate_nan=tl.PropagateNan.ALL)
            p = tl.exp2(d * (inv_temperature * LOG2_E) - log_total * LOG2_E)
            gradient = p * (a + b * d) if HAS_ENTROPY else p * a
            tl.store(gradients_ptr + at, tl.where(at == place, at_sampled, gradient), mask=at < end)


@triton.jit(do_not_specialize=["stride_weight", "num_rows", "width", "num_entries"])
def _kept_products_kernel(
    products_ptr,
    hidden_ptr,
    weight_ptr,
    ids_ptr,
    rows_ptr,
    offsets_ptr,
    stride_weight,
    num_rows,
    width,
    num_entries,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
):
    width = width // UNIT * UNIT
    stride_weight = stride_weight // UNIT * UNIT
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    is_kept = at < tl.load(offsets_ptr + num_rows)
    ids = tl.load(ids_ptr + at, mask=is_kept, other=0)
    rows = tl.load(rows_ptr + at, mask=is_kept, other=0)
    # total, h, w: (ENTRIES, COLUMNS).
    total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        here = is_kept[:, None] & (columns < width)
        h = tl.load(hidden_ptr + rows[:, None] * width + columns, mask=here, other=0.0)
        w = tl.load(weight_ptr + ids[:, None] * stride_weight + columns, mask=here, other=0.0)
        total += h.to(tl.float32) * w.to(hidden_ptr.dtype.element_ty).to(tl.float32)
    tl.store(products_ptr + at, tl.sum(total, axis=1), mask=at < num_entries)


@triton.jit(do_not_specialize=["stride_weight", "width"])
def _add_hidden_gradient_kernel(
    gradients_ptr,
    grad_products_ptr,
    hidden_ptr,  # for its dtype, that of the products
    weight_ptr,
    ids_ptr,
    offsets_ptr,
    stride_weight,
    width,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
):
    width = width // UNIT * UNIT
    stride_weight = stride_weight // UNIT * UNIT
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    if end > start:
        total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
        for first in range(start, end, ENTRIES):
            at = first + tl.arange(0, ENTRIES)
            g = tl.load(grad_products_ptr + at, mask=at < end, other=0.0)
            ids = tl.load(ids_ptr + at, mask=at < end, other=0)
            here = (at < end)[:, None] & (columns < width)
            w = tl.load(weight_ptr + ids[:, None] * stride_weight + columns, mask=here, other=0.0)
            total += g[:, None] * w.to(hidden_ptr.dtype.element_ty).to(tl.float32)
        out_ptrs = gradients_ptr + row * width + columns
        before = tl.load(out_ptrs, mask=columns < width, other=0.0).to(tl.float32)
        found = before + tl.sum(total, axis=0)
        tl.store(out_ptrs, found.to(gradients_ptr.dtype.element_ty), mask=columns < width)


@triton.jit(do_not_specialize=["vocab_size", "width"])
def _add_weight_gradient_kernel(
    gradients_ptr,
    grad_products_ptr,
    hidden_ptr,
    rows_ptr,
    ids_ptr,
    order_ptr,
    ends_ptr,
    vocab_size,
    width,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
):
    width = width // UNIT * UNIT
    start = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(ids_ptr + start)
    before = tl.load(ids_ptr + start - 1, mask=start > 0, other=-1)
    if (token != before) & (token < vocab_size):
        end = tl.load(ends_ptr + start)
        total = tl.zeros([ENTRIES, COLUMNS], tl.float32)
        for first in range(start, end, ENTRIES):
            at = first + tl.arange(0, ENTRIES)
            places = tl.load(order_ptr + at, mask=at < end, other=0)
            g = tl.load(grad_products_ptr + places, mask=at < end, other=0.0)
            rows = tl.load(rows_ptr + places, mask=at < end, other=0)
            here = (at < end)[:, None] & (columns < width)
            h = tl.load(hidden_ptr + rows[:, None] * width + columns, mask=here, other=0.0)
            total += g[:, None] * h.to(tl.float32)
        out_ptrs = gradients_ptr + token * width + columns
        found = tl.load(out_ptrs, mask=columns < width, other=0.0).to(tl.float32) + tl.sum(total, axis=0)
        tl.store(out_ptrs, found.to(gradients_ptr.dtype.element_ty), mask=columns < width)


def kept_statistics(
    values: Tensor, offsets: Tensor, sampled: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Surprisal, entropy, and what the gradient needs, (N,) each, from logits (M,); 0 in rows without ids."""
    num_rows = sampled.shape[0]
    statistics = torch.empty((4, num_rows), dtype=torch.float32, device=values.device)
    if num_rows:
        _kept_statistics_kernel[(num_rows,)](
            statistics,
            values,
            offsets,
            sampled,
            temperature,
            num_rows,
            BLOCK=BLOCK,
            num_warps=1,
            enable_fp_fusion=FP_FUSION,
        )
    surprisal, entropy, top, log_total = (numbers.clone() for numbers in statistics)
    return surprisal, entropy, top, log_total


def kept_statistics_backward(
    grad_surprisal: Tensor,
    grad_entropy: Tensor | None,
    statistics: "RowStatistics",
    values: Tensor,
    offsets: Tensor,
    sampled: Tensor,
    temperature: Tensor,
) -> Tensor:
    """The gradient (M,) of the logits, 0 behind those of the last row."""
    gradients = torch.zeros_like(values)
    if sampled.shape[0]:
        _kept_statistics_backward_kernel[(sampled.shape[0],)](
            gradients,
            grad_surprisal.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            *statistics,
            values,
            offsets,
            sampled,
            temperature,
            HAS_ENTROPY=grad_entropy is not None,
            BLOCK=BLOCK,
            num_warps=1,
            enable_fp_fusion=FP_FUSION,
        )
    return gradients


def kept_products(hidden: Tensor, weight: Tensor, kept: "Kept") -> Tensor:
    """hidden of a row . weight of an id, (M,), summed in float32; 0 behind the last row."""
    num_entries, width = kept.ids.shape[0], hidden.shape[1]
    products = torch.empty(num_entries, dtype=torch.float32, device=hidden.device)
    if num_entries:
        weight = _columns_together(weight)
        _kept_products_kernel[(triton.cdiv(num_entries, ENTRIES),)](
            products,
            hidden.contiguous(),
            weight,
            kept.ids,
            kept.rows,
            kept.offsets,
            weight.stride(0),
            kept.sampled.shape[0],
            width,
            num_entries,
            ENTRIES=ENTRIES,
            COLUMNS=COLUMNS,
            UNIT=_unit(width, weight.stride(0)),
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )
    return products


def add_hidden_gradient(gradients: Tensor, grad_products: Tensor, hidden: Tensor, weight: Tensor, kept: "Kept") -> None:
    """Add to ``gradients`` (N, D) of each row the sum of gradient times weight over its ids."""
    num_rows, width = gradients.shape
    if gradients.numel():
        weight = _columns_together(weight)
        _add_hidden_gradient_kernel[(num_rows, triton.cdiv(width, COLUMNS))](
            gradients,
            grad_products,
            hidden,
            weight,
            kept.ids,
            kept.offsets,
            weight.stride(0),
            width,
            ENTRIES=ENTRIES,
            COLUMNS=COLUMNS,
            UNIT=_unit(width, weight.stride(0)),
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )


def add_weight_gradient(gradients: Tensor, grad_products: Tensor, hidden: Tensor, kept: "Kept") -> None:
    """Add to ``gradients`` (V, D) of each id the sum of gradient times hidden state over its rows, in their order."""
    vocab_size, width = gradients.shape
    if not kept.ids.numel() or not gradients.numel():
        return
    # What is not needed goes behind the last id.
    ids = torch.where(kept.rows < kept.sampled.shape[0], kept.ids, vocab_size)
    ids, order = ids.sort(stable=True)
    _add_weight_gradient_kernel[(ids.shape[0], triton.cdiv(width, COLUMNS))](
        gradients,
        grad_products,
        hidden.contiguous(),
        kept.rows,
        ids,
        order,
        torch.searchsorted(ids, ids, right=True),
        vocab_size,
        width,
        ENTRIES=ENTRIES,
        COLUMNS=COLUMNS,
        UNIT=_unit(width),
        num_warps=4,
        enable_fp_fusion=FP_FUSION,
    )


def _columns_together(weight: Tensor) -> Tensor:
    """The weight with the columns of an id side by side in memory, as every head has it."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _unit(*sizes: int) -> int:
    """16 where all sizes are multiples of it, as those of models: the kernel divides by it and takes wide loads."""
    return 16 if all(size % 16 == 0 for size in sizes) else 1
