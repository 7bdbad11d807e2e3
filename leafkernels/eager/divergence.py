"""Divergence of two distributions over the vocabulary, a few rows at a time, so that what is in between stays cached.

See ``leafkernels.kernels.divergence`` for the mathematics. The logarithms of p and q are float64: two models
that are near to each other keep the digits of their difference where the rows lead by far.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.precision import compute_dtype

if TYPE_CHECKING:
    from leafkernels.vocabulary.divergence_rows import DivergenceKind, Pair, PairStatistics, PairTops

# Entries of a chunk.
_CHUNK = 1 << 17

# e^-10,000 is 0 in every dtype: what lies this far below the top is banned, as -inf is.
_FLOOR = -1e4


class _Chunk(NamedTuple):
    """Some rows of both models, (n, V) each; what is not said to be float64 in the dtype of computing."""

    rows: slice | Tensor
    log_p: Tensor  # of the student, float64
    log_q: Tensor  # of the teacher, float64
    gap: Tensor  # u = log p - log q
    p: Tensor
    q: Tensor
    totals: tuple[Tensor, Tensor]  # (n, 1) float64: -log p and -log q of the tops
    room: Tensor  # (4, n, V) scratch


def _chunks(student: Tensor, teacher: Tensor, tops: "PairTops", pair: "Pair") -> Iterator[_Chunk]:
    num_rows, vocab_size = student.shape
    dtype, step = compute_dtype(student.dtype), max(1, _CHUNK // max(student.shape[1], 1))
    parts: Iterable[slice | Tensor] = (slice(start, start + step) for start in range(0, num_rows, step))
    if pair.mask is not None:
        parts = (rows for rows in pair.mask.nonzero().squeeze(1).split(step) if rows.numel())
    # Memory that is given back comes again page by page, which takes as long as the exponentials.
    wide = torch.empty((3, min(step, num_rows), vocab_size), dtype=torch.float64, device=student.device)
    narrow = torch.empty((7, min(step, num_rows), vocab_size), dtype=dtype, device=student.device)
    for rows in parts if vocab_size else ():

        def logs(
            out: Tensor,
            logits: Tensor,
            top: Tensor,
            total: Tensor,
            temperature: Tensor,
            rows: slice | Tensor = rows,
        ) -> tuple[Tensor, Tensor]:
            top, total, scale = (column[rows].double()[:, None] for column in (top, total, temperature.reciprocal()))
            x = out[: top.shape[0]].copy_(logits[rows])
            return x.sub_(top).mul_(scale).clamp_min_(_FLOOR).sub_(total), total

        log_p, total = logs(wide[0], student, *tops[:2], pair.student_temperature)
        log_q, teacher_total = logs(wide[1], teacher, *tops[2:], pair.teacher_temperature)
        n = log_p.shape[0]
        gap = narrow[0, :n].copy_(torch.sub(log_p, log_q, out=wide[2, :n]))
        p, q = narrow[1, :n].copy_(log_p).exp_(), narrow[2, :n].copy_(log_q).exp_()
        yield _Chunk(rows, log_p, log_q, gap, p, q, (total, teacher_total), narrow[3:, :n])


def _series(y: Tensor, out: Tensor) -> Tensor:
    """e^y - 1 - y for |y| < 0.5, to its own rounding."""
    if y.dtype == torch.float64:
        return torch.expm1(y, out=out).sub_(y)
    torch.mul(y, 1 / 40320, out=out).add_(1 / 5040)
    for factorial in (720, 120, 24, 6, 2):
        out.mul_(y).add_(1 / factorial)
    return out.mul_(y).mul_(y)


def _excess(p: Tensor, other: Tensor, y: Tensor, room: Tensor) -> Tensor:
    """p (e^y - 1 - y), of which ``other`` is p e^y; never below 0, each to its own rounding. In room[2]."""
    near, far = _series(y, room[0]).mul_(p), torch.sub(other, p, out=room[1]).addcmul_(p, y, value=-1)
    return torch.where(torch.abs(y, out=room[2]) < 0.5, near, far, out=room[2])


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
    sums[2] = -torch.inf
    name, beta = kind
    for rows, log_p, log_q, gap, p, q, (total, teacher_total), room in _chunks(student, teacher, tops, pair):
        if name == "jsd":
            to_student, to_teacher = _to_mixture(gap, beta)
            mixture = beta * q + (1.0 - beta) * p
            part = _excess(p, mixture, to_student, room).clone()
            terms = _excess(q, mixture, to_teacher, room).mul_(beta).add_(part, alpha=1.0 - beta)
            sums[1, rows, 0] = part.sum(1).to(sums.dtype)
        else:
            least, other_least = _FLOOR - total, _FLOOR - teacher_total
            if name == "reverse_kl":
                terms = _excess(p, q, torch.neg(gap, out=room[3]), room)
                first, second, bounds = log_p, log_q, (least, other_least)
            else:
                terms = _excess(q, p, gap, room)
                first, second, bounds = log_q, log_p, (other_least, least)
            # Steps that make booleans cost as much as exponentials: none where nothing is banned.
            if bool((second.amin(1, keepdim=True) <= bounds[1]).any()):
                terms.masked_fill_((second <= bounds[1]) & (first > bounds[0]), torch.inf)
        sums[0, rows, 0] = terms.sum(1).to(sums.dtype)
        sums[2, rows, 0] = (log_p.add_(log_q).amax(1, keepdim=True) + (total + teacher_total)).squeeze(1).to(sums.dtype)
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
    for rows, log_p, _, gap, p, q, _, room in _chunks(student, teacher, statistics.tops, pair):
        weight, part = (numbers[rows].to(p.dtype)[:, None] for numbers in (grad_divergence, statistics.student_part))
        # An infinite divergence has no gradient; where it does not count, that is 0.
        if name != "forward_kl":
            weight = torch.where(part.isinf() & (weight != 0), torch.nan, weight)
        part = part.masked_fill(part.isinf(), 0.0)
        if name == "forward_kl":
            near = torch.sub(gap, _series(torch.neg(gap, out=room[3]), room[0]), out=room[1]).mul_(p)
            far = torch.sub(p, q, out=room[0])
            slope = torch.where(torch.abs(gap, out=room[2]) < 0.5, near, far, out=room[2]).mul_(weight)
        elif name == "reverse_kl":
            slope = torch.sub(gap, part, out=room[0]).mul_(p).mul_(weight)
        else:
            slope = (_to_mixture(gap, beta)[0] + part).mul_(p).mul_((beta - 1.0) * weight)
        if grad_entropy is not None:
            entropy, grad = (
                numbers[rows].to(p.dtype)[:, None] for numbers in (statistics.student_entropy, grad_entropy)
            )
            slope -= (log_p.to(p.dtype) + entropy).mul_(p).mul_(grad)
        slope /= pair.student_temperature[rows].to(p.dtype)[:, None]
        if softcap is not None:
            slope *= 1.0 - (student[rows].to(p.dtype) / softcap).square()
        gradients[rows] = slope.to(gradients.dtype)
    if pair.mask is not None:
        gradients.masked_fill_(~pair.mask[:, None], 0.0)
