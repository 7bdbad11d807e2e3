"""FiRe-OPD: the numbers of each row, what all rows say together, the weights and advantages of each token.

    c_T = clip(1 - H_T / M_T)    c_S = clip(H_S / M_S)    w = (1 + alpha c_T)(1 + beta c_S) / mean    (clip to [0, 1])
    A = w (target - old), where the row is kept           target = teacher, or lambda teacher + (1 - lambda) base

(arXiv 2606.02684.) Two launches read the tokens. The one between them is a single program, and reads eight numbers of a
row: those rows are the scope, and may lie in other micro-batches or on other ranks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._rows import load_block, num_splits, row_stride, store_block

COLUMNS = 7  # tokens, sum of l_T, largest H_T, largest H_S, sum of H_T, of H_S, of H_T H_S
BLOCK = 1024
STATISTICS_WARPS = 4  # of 16 bytes of bfloat16 a thread
SCOPE_WARPS = 8
WEIGHTS_WARPS = 8
# What all rows say together: the quantile, the least score that a kept row may have, M_T, M_S, the mean weight.
NUMBERS = 5
# The lowest finite float32. Of scores, -inf alone is below it: the teacher bans a token, and the row is never kept.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
# No entropy counts as large that is not above this.
LEAST_MAX = tl.constexpr(1e-6)
# A rank this near to an integer is one: 0.29 * 100 is not 29 in float64.
RANK_ROUNDING = tl.constexpr(1e-9)


@triton.jit
def _slot(cu_seqlens_ptr, row, width, PACKED: tl.constexpr):
    """Where a row begins in its storage, and how many tokens it holds."""
    if PACKED:
        # Offsets that break their rules must still stay inside of the tensors.
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + row).to(tl.int64), 0), width)
        last = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + row + 1).to(tl.int64), first), width)
    else:
        first, last = row * 0, row * 0 + width
    return first, last - first


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
    first, size = _slot(cu_seqlens_ptr, row, width, PACKED)
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


@triton.jit
def _to_keys(scores):
    """int32 in the order of the float32 scores."""
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _to_score(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mean_weight(count, teachers, students, products, teacher_max, student_max, alpha, beta, HAS_TEACHER, HAS_STUDENT):
    """Of (1 + alpha (1 - H_T / M_T)) (1 + beta H_S / M_S), from sums; 1 of no token."""
    total = count
    if HAS_TEACHER:
        total += alpha * (count - teachers / teacher_max)
    if HAS_STUDENT:
        total += beta * (students / student_max)
    if HAS_TEACHER and HAS_STUDENT:
        total += alpha * beta * ((students - products / teacher_max) / student_max)
    return tl.where(count > 0.0, total / count, 1.0)


@triton.jit(do_not_specialize=["num_rows"])
def _fire_scope_kernel(
    numbers_ptr,
    rows_ptr,
    scores_ptr,
    drop_high,
    drop_low,
    alpha,
    beta,
    num_rows,
    KEPT: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # rows: (N, COLUMNS) float64; scores: (N,) float32, NaN for a row without a token.
    zeros = tl.zeros([BLOCK], tl.int32)
    are_scores = zeros
    teacher_max, student_max = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    teacher_nan, student_nan = teacher_max, student_max
    for block in range(0, tl.cdiv(num_rows, BLOCK)):
        row = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        score = tl.load(scores_ptr + row, mask=row < num_rows, other=float("nan"))
        are_scores += (score == score).to(tl.int32)
        if HAS_TEACHER:
            found = tl.load(rows_ptr + row * COLUMNS + 2, mask=row < num_rows, other=0.0)
            teacher_max = tl.where(found > teacher_max, found, teacher_max)
            teacher_nan += tl.where(found == found, 0.0, found)
        if HAS_STUDENT:
            found = tl.load(rows_ptr + row * COLUMNS + 3, mask=row < num_rows, other=0.0)
            student_max = tl.where(found > student_max, found, student_max)
            student_nan += tl.where(found == found, 0.0, found)
    of_teacher = tl.maximum(tl.max(teacher_max, axis=0), LEAST_MAX) + tl.sum(teacher_nan, axis=0)
    of_student = tl.maximum(tl.max(student_max, axis=0), LEAST_MAX) + tl.sum(student_nan, axis=0)

    num_scores = tl.sum(are_scores, axis=0)
    last = tl.maximum(num_scores - 1, 0).to(tl.float64)
    rank = drop_high * last + drop_low * last
    low = tl.floor(rank + RANK_ROUNDING)
    high = tl.ceil(rank - RANK_ROUNDING)
    # The key of rank k is the largest that at most k keys are below of: bit by bit, from the top.
    below = tl.full([], -(2**31), tl.int64)
    least = below
    for bit in range(0, 32):
        step = tl.full([], 2**31, tl.int64) >> bit
        are_below, are_least = zeros, zeros
        for block in range(0, tl.cdiv(num_rows, BLOCK)):
            row = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
            score = tl.load(scores_ptr + row, mask=row < num_rows, other=float("nan"))
            key = _to_keys(score).to(tl.int64)
            are_below += ((score == score) & (key < below + step)).to(tl.int32)
            are_least += ((score == score) & (key < least + step)).to(tl.int32)
        below = tl.where(tl.sum(are_below, axis=0).to(tl.float64) <= low, below + step, below)
        least = tl.where(tl.sum(are_least, axis=0).to(tl.float64) <= high, least + step, least)
    low_score = tl.where(num_scores > 0, _to_score(below.to(tl.int32)), float("nan"))
    high_score = tl.where(num_scores > 0, _to_score(least.to(tl.int32)), float("nan"))
    share = tl.minimum(tl.maximum(rank - low, 0.0), 1.0)
    between = low_score.to(tl.float64) * (1.0 - share) + high_score.to(tl.float64) * share
    is_a_score = (low_score == high_score) | (high <= low)
    # Comparisons keep NaN, the mark of no score at all.
    least_kept = tl.where(high_score < LOWEST, LOWEST, high_score)

    counts, teachers, students, products = teacher_max * 0, teacher_max * 0, teacher_max * 0, teacher_max * 0
    for block in range(0, tl.cdiv(num_rows, BLOCK)):
        row = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        counting = row < num_rows
        if KEPT:
            score = tl.load(scores_ptr + row, mask=counting, other=float("nan"))
            counting = counting & ((score >= least_kept) | (score != score))
        counts += tl.load(rows_ptr + row * COLUMNS, mask=counting, other=0.0)
        # An empty row adds nothing.
        if HAS_TEACHER:
            teachers += tl.load(rows_ptr + row * COLUMNS + 4, mask=counting, other=0.0)
        if HAS_STUDENT:
            students += tl.load(rows_ptr + row * COLUMNS + 5, mask=counting, other=0.0)
        if HAS_TEACHER and HAS_STUDENT:
            products += tl.load(rows_ptr + row * COLUMNS + 6, mask=counting, other=0.0)
    mean = _mean_weight(
        tl.sum(counts, axis=0),
        tl.sum(teachers, axis=0),
        tl.sum(students, axis=0),
        tl.sum(products, axis=0),
        of_teacher,
        of_student,
        alpha,
        beta,
        HAS_TEACHER,
        HAS_STUDENT,
    )
    tl.store(numbers_ptr, tl.where(is_a_score, low_score.to(tl.float64), between))
    tl.store(numbers_ptr + 1, least_kept.to(tl.float64))
    tl.store(numbers_ptr + 2, of_teacher)
    tl.store(numbers_ptr + 3, of_student)
    tl.store(numbers_ptr + 4, mean)


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
    keep_ptr,
    old_logprobs_ptr,
    teacher_logprobs_ptr,
    base_logprobs_ptr,
    student_entropy_ptr,
    teacher_entropy_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    rows_ptr,
    scores_ptr,
    numbers_ptr,
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
    PER_ROW: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    PACKED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, size = _slot(cu_seqlens_ptr, row, width, PACKED)
    score, least = tl.load(scores_ptr + row), tl.load(numbers_ptr + 1).to(tl.float32)
    found = rows_ptr + row * COLUMNS
    count = tl.load(found)
    # Not what is at least the least: NaN stays, to be seen.
    keep = tl.where((count > 0.0) & ((score >= least) | (score != score) | (least != least)), 1, 0)
    if tl.program_id(1) == 0:
        tl.store(keep_ptr + row, keep != 0)
    teacher_max, student_max = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3)
    mean = tl.load(numbers_ptr + 4)
    if PER_ROW:
        teachers, students, products = tl.load(found + 4), tl.load(found + 5), tl.load(found + 6)
        mean = _mean_weight(
            count, teachers, students, products, teacher_max, student_max, alpha, beta, HAS_TEACHER, HAS_STUDENT
        )
    scale = (1.0 / mean).to(tl.float32)
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
            of_base = _load(base_logprobs_ptr, row * stride_base_row + first, start, size, live, BLOCK)
            target = extrapolation * target + (1.0 - extrapolation) * of_base
        old = _load(old_logprobs_ptr, row * stride_old_row + first, start, size, live, BLOCK)
        # What cannot be sampled has no ratio to be compared by.
        kept = live & (keep != 0) & (old != float("-inf"))
        if HAS_BASE:
            kept = kept & (of_base != float("-inf"))
        out = row * stride_out_row + first
        store_block(advantages_ptr, out, start, size, tl.where(kept, weight * (target - old), 0.0), BLOCK)
        store_block(weights_ptr, out, start, size, tl.where(live, weight, 0.0), BLOCK)
        store_block(kept_ptr, out, start, size, kept, BLOCK)


def launch_fire_statistics(
    teacher_logprobs: Tensor,
    student_entropy: Tensor | None,
    teacher_entropy: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """(N, 7) float64, in the order of ``FireStatistics``; NaN for what needs an entropy that is missing."""
    num_rows = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = torch.empty((num_rows, COLUMNS), dtype=torch.float64, device=mask.device)
    inputs = [_readable(tensor) for tensor in (teacher_logprobs, student_entropy, teacher_entropy, mask)]
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
        )
    return rows


def launch_fire_scope(rows: Tensor, scores: Tensor, drop: float, alpha: float, beta: float, of_kept: bool) -> Tensor:
    """(5,) float64: the quantile, the least score that a kept row may have, M_T, M_S, and the mean weight."""
    numbers = torch.empty(NUMBERS, dtype=torch.float64, device=rows.device)
    # Kernels take float32, in which a fifth of 10,000 rows is no integer.
    drop_high = torch.tensor(drop, dtype=torch.float32).item()
    _fire_scope_kernel[(1,)](
        numbers,
        rows.contiguous(),
        scores.contiguous(),
        drop_high,
        drop - drop_high,
        float(alpha),
        float(beta),
        rows.shape[0],
        KEPT=of_kept,
        HAS_TEACHER=alpha != 0,
        HAS_STUDENT=beta != 0,
        COLUMNS=COLUMNS,
        BLOCK=BLOCK,
        num_warps=SCOPE_WARPS,
    )
    return numbers


def launch_fire_weights(
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    base_logprobs: Tensor | None,
    student_entropy: Tensor | None,
    teacher_entropy: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    rows: Tensor,
    scores: Tensor,
    numbers: Tensor,
    alpha: float,
    beta: float,
    extrapolation: float,
    per_row: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages and weights in ``dtype``, the mask without the rows that are dropped, and which rows are kept (N,)."""
    advantages, weights = (torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(2))
    kept = torch.empty(mask.shape, dtype=torch.bool, device=mask.device)
    tokens = (old_logprobs, teacher_logprobs, base_logprobs, student_entropy, teacher_entropy, mask)
    inputs = [_readable(tensor) for tensor in tokens]
    num_rows = rows.shape[0]
    keep = torch.empty(num_rows, dtype=torch.bool, device=mask.device)
    if num_rows:
        _fire_weights_kernel[(num_rows, num_splits(mask.shape[-1], BLOCK, num_rows))](
            advantages,
            weights,
            kept,
            keep,
            *inputs,
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            rows.contiguous(),
            scores.contiguous(),
            numbers,
            float(alpha),
            float(beta),
            float(extrapolation),
            *map(_stride, inputs),
            _stride(advantages),
            mask.shape[-1],
            PER_ROW=per_row,
            HAS_BASE=base_logprobs is not None,
            HAS_STUDENT=student_entropy is not None,
            HAS_TEACHER=teacher_entropy is not None,
            PACKED=cu_seqlens is not None,
            COLUMNS=COLUMNS,
            BLOCK=BLOCK,
            num_warps=WEIGHTS_WARPS,
        )
    return advantages, weights, kept, keep


def _readable(tensor: Tensor | None) -> Tensor | None:
    """Tokens of a row one after the other, as the kernels read them."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else row_stride(tensor)
