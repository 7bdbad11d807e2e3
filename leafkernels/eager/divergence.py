"""Divergence of two distributions over the vocabulary, a few rows at a time, so that what is in between stays cached.

See ``leafkernels.kernels.divergence`` for the mathematics. The logarithms of p and q are float64: two models
that are near to each other keep the digits of their difference where the rows lead by far. Steps that make or take
booleans cost as much as several exponentials here: what is chosen by entry is chosen by 1.0 and 0.0.
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
    room: Tensor  # (5, n, V) scratch


def _chunks(student: Tensor, teacher: Tensor, tops: "PairTops", pair: "Pair") -> Iterator[_Chunk]:
    num_rows, vocab_size = student.shape
    dtype, step = compute_dtype(student.dtype), max(1, _CHUNK // max(student.shape[1], 1))
    parts: Iterable[slice | Tensor] = (slice(start, start + step) for start in range(0, num_rows, step))
    if pair.mask is not None:
        parts = (rows for rows in pair.mask.nonzero().squeeze(1).split(step) if rows.numel())
    # Memory that is given back comes again page by page, which takes as long as the exponentials.
    wide = torch.empty((3, min(step, num_rows), vocab_size), dtype=torch.float64, device=student.device)
    narrow = torch.empty((8, min(step, num_rows), vocab_size), dtype=dtype, device=student.device)
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


def _is_near(y: Tensor, out: Tensor) -> Tensor:
    """1.0 where |y| < 0.5."""
    return torch.lt(torch.abs(y, out=out), 0.5, out=out)


def _series(y: Tensor, out: Tensor) -> Tensor:
    """e^y - 1 - y for |y| < 0.5, to its own rounding, and finite elsewhere."""
    if y.dtype == torch.float64:
        return torch.clamp_max(y, 0.5, out=out).expm1_().sub_(y)
    # As in the kernel: of all polynomials of this degree the nearest.
    torch.mul(y, 0.00019875629, out=out).add_(0.0013981997)
    for coefficient in (0.008333452, 0.041665796, 0.16666666, 0.5):
        out.mul_(y).add_(coefficient)
    return out.mul_(y).mul_(y)


def _excess(p: Tensor, other: Tensor, y: Tensor, room: Tensor) -> Tensor:
    """p (e^y - 1 - y), of which ``other`` is p e^y; never below 0, each to its own rounding. Written over y."""
    near, far = _series(y, room[0]).mul_(p), torch.sub(other, p, out=room[1]).addcmul_(p, y, value=-1)
    # Between two numbers, at 0 or 1, lies exactly the one or the other.
    return torch.lerp(far, near, _is_near(y, room[2]), out=y)


def _to_mixture(gap: Tensor, beta: float, room: Tensor) -> tuple[Tensor, Tensor]:
    """log m - log p of the student's p and of the teacher's, m = beta p_teacher + (1 - beta) p_student. In room[:2]."""
    least, most = (gap.new_full((), share) for share in (1.0 - beta, beta))
    share = torch.lerp(least, most, torch.ge(gap, 0.0, out=room[0]), out=room[0])
    of_larger = torch.abs(gap, out=room[1]).neg_().expm1_().mul_(share).log1p_()
    to_student = torch.neg(gap, out=room[0]).clamp_min_(0.0).add_(of_larger)
    return to_student, of_larger.add_(gap.clamp_min_(0.0))


def divergence_sums(student: Tensor, teacher: Tensor, tops: "PairTops", pair: "Pair", kind: "DivergenceKind") -> Tensor:
    """(3, N, 1) the divergence, KL(student || mixture) where that is another, and whether one id is the top of both.

    The last as the largest sum of both distances from the tops: 0 if so, and negative if not. 0 in masked rows.
    """
    sums = torch.zeros((3, student.shape[0], 1), dtype=compute_dtype(student.dtype), device=student.device)
    sums[2] = -torch.inf
    name, beta = kind
    for rows, log_p, log_q, gap, p, q, (total, teacher_total), room in _chunks(student, teacher, tops, pair):
        if name == "jsd":
            to_student, to_teacher = _to_mixture(gap, beta, room[3:])
            mixture = torch.mul(q, beta, out=gap).add_(p, alpha=1.0 - beta)
            part = _excess(p, mixture, to_student, room)
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
            slope = torch.lerp(far, near, _is_near(gap, room[2]), out=room[3]).mul_(weight)
        elif name == "reverse_kl":
            slope = torch.sub(gap, part, out=room[0]).mul_(p).mul_(weight)
        else:
            slope = _to_mixture(gap, beta, room)[0].add_(part).mul_(p).mul_((beta - 1.0) * weight)
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
