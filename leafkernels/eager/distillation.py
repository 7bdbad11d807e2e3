"""FiRe-OPD's statistics and weights, all tokens at a time; see ``leafkernels.kernels.distillation``."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.precision import compute_dtype

if TYPE_CHECKING:
    from leafkernels.credit.distillation import FireOptions, FireTokens

# Tokens at a time, in whole rows, so that intermediate results stay in a cache.
_CHUNK = 1 << 16


def fire_statistics(tokens: "FireTokens") -> Tensor:
    """(N, 7) float64, in the order of ``FireStatistics``; NaN for what needs an entropy that is missing."""
    teacher_logprobs, student_entropy, teacher_entropy, mask, cu_seqlens = tokens
    num_rows = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    found = torch.full((num_rows, 7), math.nan, dtype=torch.float64, device=mask.device)
    lengths = None if cu_seqlens is None else _lengths(cu_seqlens, mask.shape[0])
    for part, rows in _chunks(mask, lengths):
        row_statistics, live = found[rows], mask[part]
        row_statistics[:, 0] = _sums(live.view(torch.uint8), lengths)
        row_statistics[:, 1] = _sums(_live(teacher_logprobs[part], live), lengths)
        # An entropy below 0 is rounding, and weighs as 0.
        teacher, student = (
            None if entropy is None else _live(entropy[part], live).clamp_min_(0.0)
            for entropy in (teacher_entropy, student_entropy)
        )
        for column, entropy in ((2, teacher), (3, student)):
            if entropy is not None:
                row_statistics[:, column] = _maxima(entropy, lengths)
                row_statistics[:, column + 2] = _sums(entropy, lengths)
        if teacher is not None and student is not None:
            row_statistics[:, 6] = _sums(teacher.mul_(student), lengths)
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
    teacher_max, student_max = maxima.to(dtype).unbind()
    scale = means.reciprocal().to(dtype)
    lengths = None if cu_seqlens is None else _lengths(cu_seqlens, mask.shape[0])
    advantages, weights = (torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(2))
    kept = torch.empty_like(mask)
    for part, rows in _chunks(mask, lengths):
        weight, counting = weights[part], kept[part]
        weight.copy_(_spread(scale[rows], lengths, mask.shape[0]))
        if teacher_entropy is not None:
            sure = teacher_entropy[part].to(dtype).div(teacher_max).neg_().add_(1).clamp_(0, 1)
            weight.mul_(sure.mul_(options.alpha).add_(1))
        if student_entropy is not None:
            unsure = student_entropy[part].to(dtype).div(student_max).clamp_(0, 1)
            weight.mul_(unsure.mul_(options.beta).add_(1))
        advantage = teacher_logprobs[part].to(dtype)
        if base_logprobs is not None:
            share = options.extrapolation
            advantage = share * advantage + (1 - share) * base_logprobs[part].to(dtype)
        advantage = torch.sub(advantage, old_logprobs[part].to(dtype), out=advantages[part]).mul_(weight)
        torch.logical_and(mask[part], _spread(keep[rows], lengths, mask.shape[0]), out=counting)
        # A token of probability 0 has no ratio.
        for needed in (old_logprobs, base_logprobs):
            if needed is not None:
                counting.logical_and_(needed[part] != -math.inf)
        advantage.masked_fill_(~counting, 0.0)
        weight.masked_fill_(~mask[part], 0.0)
    return advantages, weights, kept


def _spread(per_row: Tensor, lengths: Tensor | None, total: int) -> Tensor:
    """What each token's row has."""
    return per_row[:, None] if lengths is None else per_row.repeat_interleave(lengths, output_size=total)


def _lengths(cu_seqlens: Tensor, total: int) -> Tensor:
    """Tokens of each packed row; they fill the tensor also where ``cu_seqlens`` breaks its rules, unseen on a GPU."""
    bounds = cu_seqlens.to(torch.int64).clamp(0, total).cummax(0).values
    ends = torch.cat([bounds[1:-1], bounds.new_full((1,), total)]) if bounds.shape[0] > 1 else bounds[1:]
    return ends.diff(prepend=bounds.new_zeros(1))
