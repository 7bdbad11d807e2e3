"""Divergence of two distributions over the vocabulary from rows of logits, and its gradient for the first.

With z = (x - top) / T and log_total = log sum e^z of each row, which ``leafkernels.kernels.surprisal`` finds exactly:

    log p = z_student - log_total      log q = z_teacher - log_total      u = log p - log q

A KL is summed as terms that are not negative, of which the last two add up to 0 over the row:

    KL(p || m) = sum p log(p / m) - p + m = sum p (e^y - 1 - y),   y = log m - log p

Each term keeps its own relative rounding, by the series of e^y - 1 - y near 0, so nothing cancels; and an error of the
log_totals, which moves all y of a row by the same number, moves the sum by its square alone. m is q of the reverse KL,
y = -u; the forward KL changes the two, y = u; the JSD has m = beta q + (1 - beta) p and is

    (1 - beta) KL(p || m) + beta KL(q || m)

where y comes from the larger of p and q, log m - log p = log1p(beta expm1(-u)) for u >= 0, so that nothing overflows;
from the other it is |u| more. Gradients in the student's logits, times T:

    reverse  p (u - KL)      forward  p - q = -p expm1(-u)      JSD  -(1 - beta) p (y + KL(p || m))

An id that lies 10,000 below the top is banned, as is -inf: its probability is 0 in every dtype. Where it is banned in
the second of a KL alone, that is infinite.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION, LOG2_E, num_splits, store_block
from leafkernels.kernels.surprisal import FLOOR, WARP

if TYPE_CHECKING:
    from leafkernels.vocabulary.divergence_rows import DivergenceKind, Pair, PairStatistics, PairTops

BLOCK = 2048  # ids at a time; tests shrink it to cross blocks with small vocabularies
THREADS = 256  # that share a block
MAX_SPLITS = 64  # programs that share a row at most

# What no compiled code depends on.
_VARYING = [f"stride_{rows}_row" for rows in ("student", "teacher", "gradients")]
_VARYING += ["vocab_size", "num_rows", "num_splits", "split_blocks"]

KINDS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}
REVERSE = tl.constexpr(0)
FORWARD = tl.constexpr(1)


@triton.jit
def _series(y):
    """e^y - 1 - y for |y| < 0.5, to its own rounding."""
    # Of all polynomials of this degree the nearest, to 2.4e-8 of it; a Taylor series takes one term more for 4e-8.
    tail = 0.008333452 + y * (0.0013981997 + y * 0.00019875629)
    return y * y * (0.5 + y * (0.16666666 + y * (0.041665796 + y * tail)))


@triton.jit
def _excess(p, other, y):
    """p (e^y - 1 - y), of which ``other`` is p e^y."""
    return tl.where(tl.abs(y) < 0.5, p * _series(y), other - p - p * y)


@triton.jit
def _expm1(y):
    return tl.where(tl.abs(y) < 0.5, y + _series(y), tl.exp2(y * LOG2_E) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) for -1 <= x <= 0."""
    one_plus = 1.0 + x
    # What 1 + x rounds away: 2^-25 at most, and nothing from x = -0.5 on, so it need not be divided by 1 + x.
    return tl.log(one_plus) + (x - (one_plus - 1.0))


@triton.jit
def _to_mixture(u, beta):
    """log m - log p, and log m - log q."""
    size = tl.abs(u)
    student_is_larger = u >= 0.0
    share = tl.where(student_is_larger, beta, 1.0 - beta)
    of_larger = _log1p(share * _expm1(-size))
    of_smaller = of_larger + size
    return tl.where(student_is_larger, of_larger, of_smaller), tl.where(student_is_larger, of_smaller, of_larger)


@triton.jit
def _pair_of_blocks(student_ptr, base, teacher_ptr, teacher_base, numbers_ptr, start, vocab_size, BLOCK: tl.constexpr):
    """A block of both rows: the student's logits; how far each lies below its top, over the temperature, at least
    FLOOR; p, q, and u. What lies outside of the rows is banned by both."""
    offs = start + tl.arange(0, BLOCK)
    # As ``load_block`` does, but that one branch is for both, and whole blocks need no mask.
    if (base % 16 == 0) & (teacher_base % 16 == 0) & (start + BLOCK <= vocab_size):
        x = tl.load(student_ptr + base // 16 * 16 + offs).to(tl.float32)
        y = tl.load(teacher_ptr + teacher_base // 16 * 16 + offs).to(tl.float32)
    else:
        in_row = offs < vocab_size
        x = tl.load(student_ptr + base + offs, mask=in_row, other=float("-inf")).to(tl.float32)
        y = tl.load(teacher_ptr + teacher_base + offs, mask=in_row, other=float("-inf")).to(tl.float32)
    log_total = tl.load(numbers_ptr + 1)
    teacher_total = tl.load(numbers_ptr + 4)
    # Nothing is fused across a maximum: equal rows have equal z, and u = 0.
    z = (x - tl.load(numbers_ptr)) * tl.load(numbers_ptr + 2)
    z = tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    teacher_z = (y - tl.load(numbers_ptr + 3)) * tl.load(numbers_ptr + 5)
    teacher_z = tl.maximum(teacher_z, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(z * LOG2_E - log_total * LOG2_E)
    q = tl.exp2(teacher_z * LOG2_E - teacher_total * LOG2_E)
    return x, z, teacher_z, p, q, (z - teacher_z) - (log_total - teacher_total)


@triton.jit
def _by_thread(terms, THREADS: tl.constexpr, WORD: tl.constexpr):
    """(words of a thread, THREADS, WORD), as a wide load hands a block to the threads, so nothing moves."""
    return tl.reshape(terms, [terms.shape[0] // (THREADS * WORD), THREADS, WORD])


@triton.jit(do_not_specialize=_VARYING)
def _divergence_sums_kernel(
    sums_ptr,
    student_ptr,
    teacher_ptr,
    numbers_ptr,
    mask_ptr,
    beta,
    stride_student_row,
    stride_teacher_row,
    vocab_size,
    num_rows,
    num_splits,
    split_blocks,
    KIND: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    WORD: tl.constexpr = 128 // student_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    base = row * stride_student_row
    teacher_base = row * stride_teacher_row
    total = tl.zeros([THREADS], tl.float32)  # and so the others
    part = tl.zeros([THREADS], tl.float32)
    nearest = tl.full([THREADS], float("-inf"), tl.float32)
    last = tl.minimum((split + 1) * split_blocks, tl.cdiv(vocab_size, BLOCK))
    if HAS_MASK:
        last = tl.where(tl.load(mask_ptr + row) != 0, last, 0)
    for block in range(split * split_blocks, last):
        _, z, teacher_z, p, q, u = _pair_of_blocks(
            student_ptr, base, teacher_ptr, teacher_base, numbers_ptr + 6 * row, block * BLOCK, vocab_size, BLOCK
        )
        if KIND == REVERSE:
            terms = tl.where((teacher_z <= FLOOR) & (z > FLOOR), float("inf"), _excess(p, q, -u))
        elif KIND == FORWARD:
            terms = tl.where((z <= FLOOR) & (teacher_z > FLOOR), float("inf"), _excess(q, p, u))
        else:
            to_student, to_teacher = _to_mixture(u, beta)
            mixture = beta * q + (1.0 - beta) * p
            of_student = _excess(p, mixture, to_student)
            part += tl.sum(tl.sum(_by_thread(of_student, THREADS, WORD), axis=0), axis=1)
            terms = (1.0 - beta) * of_student + beta * _excess(q, mixture, to_teacher)
        total += tl.sum(tl.sum(_by_thread(terms, THREADS, WORD), axis=0), axis=1)
        near = tl.max(tl.max(_by_thread(z + teacher_z, THREADS, WORD), axis=2), axis=0)
        nearest = tl.maximum(nearest, near)
    plane = num_rows.to(tl.int64) * num_splits
    # sums: (3, N, splits), a plane for each.
    sum_ptr = sums_ptr + row * num_splits + split
    tl.store(sum_ptr, tl.sum(total))
    tl.store(sum_ptr + plane, tl.sum(part))
    tl.store(sum_ptr + 2 * plane, tl.max(nearest))


@triton.jit(do_not_specialize=_VARYING)
def _divergence_gradient_kernel(
    gradients_ptr,
    student_ptr,
    teacher_ptr,
    numbers_ptr,
    divergence_gradients_ptr,
    entropy_gradients_ptr,
    entropy_ptr,
    part_ptr,
    mask_ptr,
    beta,
    inv_softcap,
    stride_student_row,
    stride_teacher_row,
    stride_gradients_row,
    vocab_size,
    split_blocks,
    KIND: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = row * stride_student_row
    teacher_base = row * stride_teacher_row
    first = tl.program_id(1) * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(vocab_size, BLOCK))
    out = row * stride_gradients_row
    is_live = vocab_size > 0
    if HAS_MASK:
        is_live = tl.load(mask_ptr + row) != 0
    if is_live:
        log_total = tl.load(numbers_ptr + 6 * row + 1)
        scale = tl.load(numbers_ptr + 6 * row + 2)
        weight = tl.load(divergence_gradients_ptr + row).to(tl.float32)
        part = tl.load(part_ptr + row)
        # An infinite divergence has no gradient; where it does not count, that is 0.
        is_infinite = part == float("inf")
        if KIND != FORWARD:
            weight = tl.where(is_infinite & (weight != 0.0), float("nan"), weight)
        part = tl.where(is_infinite, 0.0, part)
        for done in range(first, last):
            # The last block comes first: it is the likeliest to be in a cache still.
            start = (first + last - 1 - done) * BLOCK
            x, z, _, p, q, u = _pair_of_blocks(
                student_ptr, base, teacher_ptr, teacher_base, numbers_ptr + 6 * row, start, vocab_size, BLOCK
            )
            if KIND == REVERSE:
                gradient = weight * p * (u - part)
            elif KIND == FORWARD:
                gradient = weight * tl.where(tl.abs(u) < 0.5, p * (u - _series(-u)), p - q)
            else:
                to_student, _ = _to_mixture(u, beta)
                gradient = (beta - 1.0) * weight * p * (to_student + part)
            if HAS_ENTROPY:
                grad_entropy = tl.load(entropy_gradients_ptr + row).to(tl.float32)
                gradient -= grad_entropy * p * (z - log_total + tl.load(entropy_ptr + row))
            if HAS_SOFTCAP:
                # Capped logits c tanh(y / c) were given: their own derivative in y.
                capped = x * inv_softcap
                gradient *= 1.0 - capped * capped
            gradient = (gradient * scale).to(gradients_ptr.dtype.element_ty)
            if BLOCK < WARP:
                tl.debug_barrier()
            store_block(gradients_ptr, out, start, vocab_size, gradient, BLOCK)
    else:
        for block in range(first, last):
            # Written, not skipped: the memory is uninitialised, or holds the logits.
            zero = tl.zeros([BLOCK], gradients_ptr.dtype.element_ty)
            store_block(gradients_ptr, out, block * BLOCK, vocab_size, zero, BLOCK)


def _splits(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """Programs for each row, several where there are too few rows to fill a device, and blocks for each program."""
    splits = min(MAX_SPLITS, num_splits(vocab_size, BLOCK, num_rows))
    return splits, triton.cdiv(triton.cdiv(vocab_size, BLOCK), splits)


def _pack(tops: "PairTops", pair: "Pair") -> Tensor:
    """(N, 6) float32: top, log-total and reciprocal temperature of the student's row, and of the teacher's."""
    scales = [(1.0 / temperature).to(torch.float32) for temperature in pair[:2]]
    return torch.stack((*tops[:2], scales[0], *tops[2:], scales[1]), 1)


def divergence_sums(student: Tensor, teacher: Tensor, tops: "PairTops", pair: "Pair", kind: "DivergenceKind") -> Tensor:
    """(3, N, splits), float32, of each row's stretches: sums of the divergence, and of KL(student || mixture) where
    that is another; and the largest sum of both distances from the tops, 0 where one id is the top of both.
    """
    num_rows, vocab_size = student.shape
    splits, split_blocks = _splits(num_rows, vocab_size)
    sums = torch.empty((3, num_rows, splits), dtype=torch.float32, device=student.device)
    if num_rows:
        _divergence_sums_kernel[(num_rows, splits)](
            sums,
            student,
            teacher,
            _pack(tops, pair),
            pair.mask,
            kind.beta,
            student.stride(0),
            teacher.stride(0),
            vocab_size,
            num_rows,
            splits,
            split_blocks,
            KIND=KINDS[kind.name],
            HAS_MASK=pair.mask is not None,
            BLOCK=BLOCK,
            THREADS=THREADS,
            num_warps=max(1, THREADS // 32),
            enable_fp_fusion=FP_FUSION,
        )
    return sums


def write_gradients(
    gradients: Tensor,
    student: Tensor,
    teacher: Tensor,
    grad_divergence: Tensor,
    grad_entropy: Tensor | None,
    statistics: "PairStatistics",
    pair: "Pair",
    kind: "DivergenceKind",
    softcap: float | None = None,
) -> None:
    """Write the gradient of the student's logits, 0 in masked rows, into ``gradients`` (N, V), which may be those.

    With ``softcap`` the student's logits were capped, and it is the gradient of what they were before.
    """
    num_rows, vocab_size = student.shape
    if not student.numel():
        return
    splits, split_blocks = _splits(num_rows, vocab_size)
    _divergence_gradient_kernel[(num_rows, splits)](
        gradients,
        student,
        teacher,
        _pack(statistics.tops, pair),
        grad_divergence.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
        statistics.student_entropy,
        statistics.student_part,
        pair.mask,
        kind.beta,
        1.0 / (softcap or 1.0),
        student.stride(0),
        teacher.stride(0),
        gradients.stride(0),
        vocab_size,
        split_blocks,
        KIND=KINDS[kind.name],
        HAS_ENTROPY=grad_entropy is not None,
        HAS_MASK=pair.mask is not None,
        HAS_SOFTCAP=softcap is not None,
        BLOCK=BLOCK,
        num_warps=max(1, THREADS // 32),
        enable_fp_fusion=FP_FUSION,
    )
