"""FiRe-OPD: the numbers of each row, and the weights and advantages of each token.

    c_T = clip(1 - H_T / M_T)    c_S = clip(H_S / M_S)    w = (1 + alpha c_T)(1 + beta c_S) / mean    (clip to [0, 1])
    A = w (target - old), where the row is kept           target = teacher, or lambda teacher + (1 - lambda) base

(arXiv 2606.02684.) Between the two launches stands what all rows in scope say together, in PyTorch: those may lie in
other micro-batches or on other ranks.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION, load_block, num_splits, row_slot, row_stride, store_block

if TYPE_CHECKING:
    from leafkernels.credit.distillation import FireOptions, FireTokens

COLUMNS = 7  # tokens, sum of l_T, largest H_T, largest H_S, sum of H_T, of H_S, of H_T H_S
BLOCK = 1024
STATISTICS_WARPS = 4  # of 16 bytes of bfloat16 a thread
WEIGHTS_WARPS = 8


@triton.jit
def _load(ptr, base, start, size, live, BLOCK: tl.constexpr):
    """In float32, and 0 where a token does not count, whatever stands there."""
    return tl.where(live, load_block(ptr, base, start, size, 0.0, BLOCK).to(tl.float32), 0.0)


@triton.jit
def _clip(x):
    """To [0, 1]; comparisons keep NaN, where a minimum may drop it."""
    return tl.where(x < 0.0, 0.0, tl.where(x > 1.0, 1.0, x))


@triton.jit(
    do_not_specialize=["stride_teacher_row", "stride_student_h_row", "stride_teacher_h_row", "stride_mask_row", "width"]
)
def _fire_statistics_kernel(
    rows_ptr,
    teacher_logprobs_ptr,
    student_entropy_ptr,
    teacher_entropy_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    stride_teacher_row,
    stride_student_h_row,
    stride_teacher_h_row,
    stride_mask_row,
    width,
    HAS_STUDENT: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    PACKED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, size = row_slot(cu_seqlens_ptr, row, width, PACKED)
    # (BLOCK,) sums that meet once at the end, in one fixed order. Those of the scores are taken in float64, so that
    # equal rows tie whatever their padding; of the others a thousandth part each is added up in float32.
    zeros = tl.zeros([BLOCK], tl.float32)
    counts, teachers, students, products, teacher_max, student_max = zeros, zeros, zeros, zeros, zeros, zeros
    logprobs = zeros.to(tl.float64)
    for block in range(0, tl.cdiv(size, BLOCK)):
        start = block * BLOCK
        live = load_block(mask_ptr, row * stride_mask_row + first, start, size, 0, BLOCK) != 0
        counts += live.to(tl.float32)
        base = row * stride_teacher_row + first
        logprobs += _load(teacher_logprobs_ptr, base, start, size, live, BLOCK).to(tl.float64)
        # Below 0 there is rounding only, and the weights are those of 0.
        if HAS_TEACHER:
            teacher = _load(teacher_entropy_ptr, row * stride_teacher_h_row + first, start, size, live, BLOCK)
            teacher = tl.where(teacher < 0.0, 0.0, teacher)
            teacher_max = tl.where(teacher > teacher_max, teacher, teacher_max)
            teachers += teacher
        if HAS_STUDENT:
            student = _load(student_entropy_ptr, row * stride_student_h_row + first, start, size, live, BLOCK)
            student = tl.where(student < 0.0, 0.0, student)
            student_max = tl.where(student > student_max, student, student_max)
            students += student
        if HAS_TEACHER and HAS_STUDENT:
            products += teacher * student
    found = rows_ptr + row * COLUMNS
    tl.store(found, tl.sum(counts.to(tl.float64), axis=0))
    tl.store(found + 1, tl.sum(logprobs, axis=0))
    # An entropy that is NaN passes the maxima by, and shows in the sums.
    if HAS_TEACHER:
        total = tl.sum(teachers.to(tl.float64), axis=0)
        tl.store(found + 2, tl.where(total == total, tl.max(teacher_max, axis=0).to(tl.float64), total))
        tl.store(found + 4, total)
    else:
        tl.store(found + 2, float("nan"))
        tl.store(found + 4, float("nan"))
    if HAS_STUDENT:
        total = tl.sum(students.to(tl.float64), axis=0)
        tl.store(found + 3, tl.where(total == total, tl.max(student_max, axis=0).to(tl.float64), total))
        tl.store(found + 5, total)
    else:
        tl.store(found + 3, float("nan"))
        tl.store(found + 5, float("nan"))
    if HAS_TEACHER and HAS_STUDENT:
        tl.store(found + 6, tl.sum(products.to(tl.float64), axis=0))
    else:
        tl.store(found + 6, float("nan"))


@triton.jit(
    do_not_specialize=[
        "stride_old_row",
        "stride_teacher_row",
        "stride_base_row",
        "stride_student_h_row",
        "stride_teacher_h_row",
        "stride_mask_row",
        "stride_out_row",
        "width",
    ]
)
def _fire_weights_kernel(
    advantages_ptr,
    weights_ptr,
    kept_ptr,
    old_logprobs_ptr,
    teacher_logprobs_ptr,
    base_logprobs_ptr,
    student_entropy_ptr,
    teacher_entropy_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    keep_ptr,
    means_ptr,
    maxima_ptr,
    alpha,
    beta,
    extrapolation,
    stride_old_row,
    stride_teacher_row,
    stride_base_row,
    stride_student_h_row,
    stride_teacher_h_row,
    stride_mask_row,
    stride_out_row,
    width,
    HAS_BASE: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, size = row_slot(cu_seqlens_ptr, row, width, PACKED)
    keep = tl.load(keep_ptr + row).to(tl.int32)
    teacher_max, student_max = tl.load(maxima_ptr), tl.load(maxima_ptr + 1)
    scale = (1.0 / tl.load(means_ptr + row)).to(tl.float32)
    # Divided once, and not for each token.
    per_teacher, per_student = (1.0 / teacher_max).to(tl.float32), (1.0 / student_max).to(tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(size, BLOCK), tl.num_programs(1)):
        start = block * BLOCK
        live = load_block(mask_ptr, row * stride_mask_row + first, start, size, 0, BLOCK) != 0
        weight = tl.zeros([BLOCK], tl.float32) + scale
        if HAS_TEACHER:
            teacher = _load(teacher_entropy_ptr, row * stride_teacher_h_row + first, start, size, live, BLOCK)
            weight *= 1.0 + alpha * _clip(1.0 - teacher * per_teacher)
        if HAS_STUDENT:
            student = _load(student_entropy_ptr, row * stride_student_h_row + first, start, size, live, BLOCK)
            weight *= 1.0 + beta * _clip(student * per_student)
        target = _load(teacher_logprobs_ptr, row * stride_teacher_row + first, start, size, live, BLOCK)
        if HAS_BASE:
            base_logprob = _load(base_logprobs_ptr, row * stride_base_row + first, start, size, live, BLOCK)
            target = extrapolation * target + (1.0 - extrapolation) * base_logprob
        old = _load(old_logprobs_ptr, row * stride_old_row + first, start, size, live, BLOCK)
        # What cannot be sampled has no ratio to be compared by.
        kept = live & (keep != 0) & (old != float("-inf"))
        if HAS_BASE:
            kept = kept & (base_logprob != float("-inf"))
        out = row * stride_out_row + first
        store_block(advantages_ptr, out, start, size, tl.where(kept, weight * (target - old), 0.0), BLOCK)
        store_block(weights_ptr, out, start, size, tl.where(live, weight, 0.0), BLOCK)
        store_block(kept_ptr, out, start, size, kept, BLOCK)


def fire_statistics(tokens: "FireTokens") -> Tensor:
    """(N, 7) float64, in the order of ``FireStatistics``; NaN for what needs an entropy that is missing."""
    _, student_entropy, teacher_entropy, mask, cu_seqlens = tokens
    num_rows = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = torch.empty((num_rows, COLUMNS), dtype=torch.float64, device=mask.device)
    inputs = [_readable(tensor) for tensor in tokens[:4]]
    if num_rows:
        _fire_statistics_kernel[(num_rows,)](
            rows,
            *inputs,
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            *map(_stride, inputs),
            mask.shape[-1],
            HAS_STUDENT=student_entropy is not None,
            HAS_TEACHER=teacher_entropy is not None,
            PACKED=cu_seqlens is not None,
            COLUMNS=COLUMNS,
            BLOCK=BLOCK,
            num_warps=STATISTICS_WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return rows


def fire_weights(
    old_logprobs: Tensor,
    base_logprobs: Tensor | None,
    tokens: "FireTokens",
    keep: Tensor,
    means: Tensor,
    maxima: Tensor,
    options: "FireOptions",
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages and weights in ``dtype``, and the mask of the tokens in the loss.

    ``keep`` (N,) bool: rows that passed the filter; ``means`` (N,) float64: of the weights, what each row's are divided
    by; ``maxima`` (2,) float64: the largest teacher's and student's entropy.
    """
    teacher_logprobs, student_entropy, teacher_entropy, mask, cu_seqlens = tokens
    advantages, weights = (torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(2))
    kept = torch.empty(mask.shape, dtype=torch.bool, device=mask.device)
    token_tensors = (old_logprobs, teacher_logprobs, base_logprobs, student_entropy, teacher_entropy, mask)
    inputs = [_readable(tensor) for tensor in token_tensors]
    num_rows = keep.shape[0]
    if num_rows:
        _fire_weights_kernel[(num_rows, num_splits(mask.shape[-1], BLOCK, num_rows))](
            advantages,
            weights,
            kept,
            *inputs,
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            keep,
            means,
            maxima,
            *options,
            *map(_stride, inputs),
            _stride(advantages),
            mask.shape[-1],
            HAS_BASE=base_logprobs is not None,
            HAS_STUDENT=student_entropy is not None,
            HAS_TEACHER=teacher_entropy is not None,
            PACKED=cu_seqlens is not None,
            BLOCK=BLOCK,
            num_warps=WEIGHTS_WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return advantages, weights, kept


def _readable(tensor: Tensor | None) -> Tensor | None:
    """Tokens of a row one after the other, as the kernels read them."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else row_stride(tensor)
