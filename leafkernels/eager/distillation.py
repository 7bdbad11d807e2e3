"""FiRe-OPD's statistics and weights, all tokens at a time; see ``leafkernels.kernels.distillation``."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.precision import compute_dtype

# No entropy counts as large that is not above this.
_LEAST_MAX = 1e-6
# Of scores, -inf alone is below it: the teacher bans a token, and the row is never kept.
_LOWEST = torch.finfo(torch.float32).min
# A rank this near to an integer is one: 0.29 * 100 is not 29 in float64.
_RANK_ROUNDING = 1e-9


# Tokens at a time, in whole rows, so that what is made of them stays in a cache.
_CHUNK = 1 << 16


def fire_statistics(
    teacher_logprobs: Tensor,
    student_entropy: Tensor | None,
    teacher_entropy: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """(N, 7) float64, in the order of ``FireStatistics``; NaN for what needs an entropy that is missing."""
    num_rows = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    found = torch.full((num_rows, 7), math.nan, dtype=torch.float64, device=mask.device)
    lengths = None if cu_seqlens is None else _lengths(cu_seqlens, mask.shape[0])
    for tokens, rows in _chunks(mask, lengths):
        of_rows, live = found[rows], mask[tokens]
        of_rows[:, 0] = _sums(live.view(torch.uint8), lengths)
        of_rows[:, 1] = _sums(_live(teacher_logprobs[tokens], live), lengths)
        # Below 0 there is rounding only, and the weights are those of 0.
        teacher, student = (
            None if entropy is None else _live(entropy[tokens], live).clamp_min_(0.0)
            for entropy in (teacher_entropy, student_entropy)
        )
        for column, entropy in ((2, teacher), (3, student)):
            if entropy is not None:
                of_rows[:, column] = _maxima(entropy, lengths)
                of_rows[:, column + 2] = _sums(entropy, lengths)
        if teacher is not None and student is not None:
            of_rows[:, 6] = _sums(teacher.mul_(student), lengths)
    return found


def _chunks(mask: Tensor, lengths: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Slices of the first dimension of tokens, and of the rows that these are; packed tokens are one chunk."""
    if lengths is not None:
        yield slice(None), slice(None)
        return
    step = max(mask.shape[0] if mask.is_cuda else _CHUNK // max(mask.shape[1], 1), 1)
    for start in range(0, mask.shape[0], step):
        yield slice(start, start + step), slice(start, start + step)


def _live(tokens: Tensor, mask: Tensor) -> Tensor:
    """A tensor of its own, 0 where no token counts."""
    return torch.where(mask, tokens, 0.0).to(compute_dtype(tokens.dtype))


def _sums(tokens: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return tokens.sum(1, dtype=torch.float64 if tokens.is_floating_point() else torch.int64)
    return torch.segment_reduce(tokens.to(torch.float64), "sum", lengths=lengths, initial=0.0, unsafe=True)


def _maxima(tokens: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return pad(tokens, (1, 0)).amax(1)
    return torch.segment_reduce(tokens, "max", lengths=lengths, initial=0.0, unsafe=True)


def fire_scope(rows: Tensor, scores: Tensor, drop: float, alpha: float, beta: float, of_kept: bool) -> Tensor:
    """(5,) float64: the quantile, the least score that a kept row may have, M_T, M_S, and the mean weight."""
    # NaN goes last, and one more to be there.
    ranked = pad(scores, (0, 1), value=math.nan).sort().values.to(torch.float64)
    rank = drop * (~scores.isnan()).sum().sub(1).clamp_min(0).to(torch.float64)
    low, high = rank.add(_RANK_ROUNDING).floor(), rank.sub(_RANK_ROUNDING).ceil()
    # Not by a scalar index, which would be read back.
    below, least = ranked.gather(0, torch.stack([low, high]).long()).unbind()
    share = (rank - low).clamp(0, 1)
    quantile = torch.where((below == least) | (high <= low), below, below * (1 - share) + least * share)
    least = least.clamp_min(_LOWEST)
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

    _, least, teacher_max, student_max, mean = numbers.unbind()
    keep = (rows[:, 0] > 0) & ~(scores < least)
    if per_row:
        mean = _mean_weight(rows, teacher_max, student_max, alpha, beta)
    scale = mean.reciprocal().to(dtype).expand_as(scores)
    lengths = None if cu_seqlens is None else _lengths(cu_seqlens, mask.shape[0])
    advantages, weights = (torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(2))
    kept = torch.empty_like(mask)
    for tokens, of_rows in _chunks(mask, lengths):
        weight, counting = weights[tokens], kept[tokens]
        weight.copy_(_spread(scale[of_rows], lengths, mask.shape[0]))
        if teacher_entropy is not None:
            sure = teacher_entropy[tokens].to(dtype).div(teacher_max.to(dtype)).neg_().add_(1).clamp_(0, 1)
            weight.mul_(sure.mul_(alpha).add_(1))
        if student_entropy is not None:
            unsure = student_entropy[tokens].to(dtype).div(student_max.to(dtype)).clamp_(0, 1)
            weight.mul_(unsure.mul_(beta).add_(1))
        advantage = teacher_logprobs[tokens].to(dtype)
        if base_logprobs is not None:
            advantage = extrapolation * advantage + (1 - extrapolation) * base_logprobs[tokens].to(dtype)
        advantage = torch.sub(advantage, old_logprobs[tokens].to(dtype), out=advantages[tokens]).mul_(weight)
        torch.logical_and(mask[tokens], _spread(keep[of_rows], lengths, mask.shape[0]), out=counting)
        # What cannot be sampled has no ratio to be compared by.
        for needed in (old_logprobs, base_logprobs):
            if needed is not None:
                counting.logical_and_(needed[tokens] != -math.inf)
        advantage.masked_fill_(~counting, 0.0)
        weight.masked_fill_(~mask[tokens], 0.0)
    return advantages, weights, kept, keep


def _spread(of_rows: Tensor, lengths: Tensor | None, total: int) -> Tensor:
    """What each token's row has."""
    return of_rows[:, None] if lengths is None else of_rows.repeat_interleave(lengths, output_size=total)


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
