"""FiRe-OPD's statistics and weights, all tokens at a time; see ``leafkernels.kernels.distillation``."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

# No entropy counts as large that is not above this.
_LEAST_MAX = 1e-6
# A rank this near to an integer is one: 0.29 * 100 is not 29 in float64.
_RANK_ROUNDING = 1e-9


def fire_statistics(
    teacher_logprobs: Tensor,
    student_entropy: Tensor | None,
    teacher_entropy: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """(N, 7) float64, in the order of ``FireStatistics``; NaN for what needs an entropy that is missing."""

    def live(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor.to(torch.float64), 0.0)

    def reduce(tensor: Tensor, how: str) -> Tensor:
        if cu_seqlens is None:
            return pad(tensor, (1, 0)).amax(1) if how == "max" else tensor.sum(1)
        lengths = _lengths(cu_seqlens, tensor.shape[0])
        return torch.segment_reduce(tensor, how, lengths=lengths, initial=0.0, unsafe=True)

    counts = reduce(mask.to(torch.float64), "sum")
    missing = torch.full_like(counts, math.nan)
    # Below 0 there is rounding only, and the weights are those of 0.
    teacher, student = (None if h is None else live(h).clamp_min(0.0) for h in (teacher_entropy, student_entropy))
    columns = [counts, reduce(live(teacher_logprobs), "sum")]
    for how in ("max", "sum"):
        columns += [missing if h is None else reduce(h, how) for h in (teacher, student)]
    columns.append(missing if teacher is None or student is None else reduce(teacher * student, "sum"))
    return torch.stack(columns, 1)


def fire_scope(rows: Tensor, scores: Tensor, drop: float, alpha: float, beta: float, of_kept: bool) -> Tensor:
    """(5,) float64: the quantile, the least score that reaches it, M_T, M_S, and the mean weight."""
    # NaN goes last, and one more to be there.
    ranked = pad(scores, (0, 1), value=math.nan).sort().values.to(torch.float64)
    rank = drop * (~scores.isnan()).sum().sub(1).clamp_min(0).to(torch.float64)
    low, high = rank.add(_RANK_ROUNDING).floor(), rank.sub(_RANK_ROUNDING).ceil()
    # Not by a scalar index, which would be read back.
    below, least = ranked.gather(0, torch.stack([low, high]).long()).unbind()
    share = (rank - low).clamp(0, 1)
    quantile = torch.where((below == least) | (high <= low), below, below * (1 - share) + least * share)
    counting = ~(scores < least)[:, None] if of_kept else torch.ones_like(scores, dtype=torch.bool)[:, None]
    sums = torch.where(counting, rows, 0.0).sum(0)
    teacher_max, student_max = pad(rows[:, 2:4], (0, 0, 0, 1)).amax(0).clamp_min(_LEAST_MAX).unbind()
    mean = _mean_weight(sums, teacher_max, student_max, alpha, beta)
    return torch.stack([quantile, least, teacher_max, student_max, mean])


def fire_weights(
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

    def of_tokens(of_rows: Tensor) -> Tensor:
        if cu_seqlens is None:
            return of_rows[:, None]
        lengths = _lengths(cu_seqlens, mask.shape[0])
        return of_rows.repeat_interleave(lengths, output_size=mask.shape[0])

    _, least, teacher_max, student_max, mean = numbers.unbind()
    keep = (rows[:, 0] > 0) & ~(scores < least)
    if per_row:
        mean = _mean_weight(rows, teacher_max, student_max, alpha, beta)
    weights = of_tokens(mean.reciprocal().to(dtype).expand_as(scores))
    if teacher_entropy is not None:
        weights = weights * (1 + alpha * (1 - teacher_entropy.to(dtype) / teacher_max.to(dtype)).clamp(0, 1))
    if student_entropy is not None:
        weights = weights * (1 + beta * (student_entropy.to(dtype) / student_max.to(dtype)).clamp(0, 1))
    target = teacher_logprobs.to(dtype)
    if base_logprobs is not None:
        target = extrapolation * target + (1 - extrapolation) * base_logprobs.to(dtype)
    kept = mask & of_tokens(keep)
    advantages = torch.where(kept, weights * (target - old_logprobs.to(dtype)), 0.0)
    return advantages, torch.where(mask, weights, 0.0), kept, keep


def _mean_weight(sums: Tensor, teacher_max: Tensor, student_max: Tensor, alpha: float, beta: float) -> Tensor:
    """Of (1 + alpha (1 - H_T / M_T)) (1 + beta H_S / M_S), from sums (..., 7) over rows; 1 of no token."""
    counts, _, _, _, teacher, student, products = sums.unbind(-1)
    total = counts
    if alpha:
        total = total + alpha * (counts - teacher / teacher_max)
    if beta:
        total = total + beta * (student / student_max)
    if alpha and beta:
        total = total + alpha * beta * ((student - products / teacher_max) / student_max)
    return torch.where(counts > 0, total / counts, 1.0)


def _lengths(cu_seqlens: Tensor, total: int) -> Tensor:
    """Tokens of each packed row; they fill the tensor also where ``cu_seqlens`` breaks its rules, unseen on a GPU."""
    bounds = cu_seqlens.to(torch.int64).clamp(0, total).cummax(0).values
    ends = torch.cat([bounds[1:-1], bounds.new_full((1,), total)]) if bounds.shape[0] > 1 else bounds[1:]
    return ends.diff(prepend=bounds.new_zeros(1))
