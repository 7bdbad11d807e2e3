"""Divergence of two distributions over the vocabulary, a few rows at a time, so that what is in between stays cached.

See ``leafkernels.kernels.divergence`` for the mathematics. What is in between is float64, in which e^y - 1 - y of
numbers that float32 tells apart keeps its digits.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.precision import compute_dtype

if TYPE_CHECKING:
    from leafkernels.vocabulary.divergence_rows import DivergenceKind, Pair, PairStatistics, PairTops

# Entries of a chunk.
_CHUNK = 1 << 16

# e^-10,000 is 0 in every dtype: what lies this far below the top is banned, as -inf is.
_FLOOR = -1e4


class _Chunk(NamedTuple):
    """Some rows of both models, (n, V) float64 each."""

    rows: Tensor
    student_below: Tensor  # (x - top) / temperature
    teacher_below: Tensor
    gap: Tensor  # log p_student - log p_teacher
    student: Tensor  # probabilities
    teacher: Tensor


def _chunks(student: Tensor, teacher: Tensor, tops: "PairTops", pair: "Pair") -> Iterator[_Chunk]:
    num_rows, vocab_size = student.shape
    mask = pair.mask
    live = torch.arange(num_rows, device=student.device) if mask is None else mask.nonzero().squeeze(1)
    for rows in live.split(max(1, _CHUNK // max(vocab_size, 1))) if live.numel() and vocab_size else ():

        def column(numbers: Tensor, rows: Tensor = rows) -> Tensor:
            return numbers[rows].double()[:, None]

        def below(logits: Tensor, top: Tensor, temperature: Tensor, rows: Tensor = rows) -> Tensor:
            return logits[rows].double().sub_(top).div_(temperature).clamp_min_(_FLOOR)

        student_total, teacher_total = column(tops.student_log_total), column(tops.teacher_log_total)
        student_below = below(student, column(tops.student_top), column(pair.student_temperature))
        teacher_below = below(teacher, column(tops.teacher_top), column(pair.teacher_temperature))
        gap = (student_below - teacher_below).sub_(student_total - teacher_total)
        yield _Chunk(
            rows,
            student_below,
            teacher_below,
            gap,
            (student_below - student_total).exp_(),
            (teacher_below - teacher_total).exp_(),
        )


def _excess(p: Tensor, other: Tensor, y: Tensor) -> Tensor:
    """p (e^y - 1 - y), of which ``other`` is p e^y; never below 0, and each to its own relative rounding."""
    return torch.where(y.abs() < 0.5, p * (y.expm1() - y), other - p - p * y)


def _to_mixture(gap: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log m - log p of the student's p and of the teacher's, m = beta p_teacher + (1 - beta) p_student."""
    size, student_is_larger = gap.abs(), gap >= 0
    share = torch.full_like(size, 1.0 - beta).masked_fill_(student_is_larger, beta)
    of_larger = (share * (-size).expm1()).log1p()
    of_smaller = of_larger + size
    return (
        torch.where(student_is_larger, of_larger, of_smaller),
        torch.where(student_is_larger, of_smaller, of_larger),
    )


def divergence_sums(student: Tensor, teacher: Tensor, tops: "PairTops", pair: "Pair", kind: "DivergenceKind") -> Tensor:
    """(3, N, 1) the divergence, KL(student || mixture) where that is another, and whether one id is the top of both.

    The last as the largest sum of both distances from the tops: 0 if so, and negative if not. 0 in masked rows.
    """
    sums = torch.zeros((3, student.shape[0], 1), dtype=compute_dtype(student.dtype), device=student.device)
    name, beta = kind
    for rows, student_below, teacher_below, gap, p, q in _chunks(student, teacher, tops, pair):
        if name == "jsd":
            to_student, to_teacher = _to_mixture(gap, beta)
            mixture = beta * q + (1.0 - beta) * p
            part = _excess(p, mixture, to_student)
            terms = (1.0 - beta) * part + beta * _excess(q, mixture, to_teacher)
            sums[1, rows, 0] = part.sum(1).to(sums.dtype)
        else:
            if name == "reverse_kl":
                terms, is_infinite = _excess(p, q, -gap), (teacher_below <= _FLOOR) & (student_below > _FLOOR)
            else:
                terms, is_infinite = _excess(q, p, gap), (student_below <= _FLOOR) & (teacher_below > _FLOOR)
            terms.masked_fill_(is_infinite, torch.inf)
        sums[0, rows, 0] = terms.sum(1).to(sums.dtype)
        sums[2, rows, 0] = (student_below + teacher_below).amax(1).to(sums.dtype)
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
    name, beta = kind
    for rows, student_below, _, gap, p, q in _chunks(student, teacher, statistics.tops, pair):
        weight = grad_divergence[rows].double()[:, None]
        part = statistics.student_part[rows].double()[:, None]
        # An infinite divergence has no gradient; where it does not count, that is 0.
        if name != "forward_kl":
            weight = torch.where(part.isinf() & (weight != 0), torch.nan, weight)
        part = part.masked_fill(part.isinf(), 0.0)
        if name == "forward_kl":
            slope = weight * torch.where(gap.abs() < 0.5, -p * (-gap).expm1(), p - q)
        elif name == "reverse_kl":
            slope = weight * p * (gap - part)
        else:
            slope = (beta - 1.0) * weight * p * (_to_mixture(gap, beta)[0] + part)
        if grad_entropy is not None:
            entropy = statistics.student_entropy[rows].double()[:, None]
            log_p = student_below - statistics.student_log_total[rows].double()[:, None]
            slope -= grad_entropy[rows].double()[:, None] * p * (log_p + entropy)
        slope /= pair.student_temperature[rows].double()[:, None]
        if softcap is not None:
            slope *= 1.0 - (student[rows].double() / softcap).square()
        gradients[rows] = slope.to(gradients.dtype)
    if pair.mask is not None:
        gradients.masked_fill_(~pair.mask[:, None], 0.0)
