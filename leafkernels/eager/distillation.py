"""FiRe-OPD's statistics and weights, all tokens at a time; see ``leafkernels.kernels.distillation``."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


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


def fire_weights(
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    base_logprobs: Tensor | None,
    student_entropy: Tensor | None,
    teacher_entropy: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    scale: Tensor,
    keep: Tensor,
    teacher_max: Tensor,
    student_max: Tensor,
    alpha: float,
    beta: float,
    extrapolation: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages and weights in ``dtype``, and the mask without the rows that are dropped, shaped like ``mask``."""

    def of_tokens(of_rows: Tensor) -> Tensor:
        if cu_seqlens is None:
            return of_rows[:, None]
        lengths = _lengths(cu_seqlens, mask.shape[0])
        return of_rows.repeat_interleave(lengths, output_size=mask.shape[0])

    weights = of_tokens(scale.to(dtype))
    if teacher_entropy is not None:
        weights = weights * (1 + alpha * (1 - teacher_entropy.to(dtype) / teacher_max.to(dtype)).clamp(0, 1))
    if student_entropy is not None:
        weights = weights * (1 + beta * (student_entropy.to(dtype) / student_max.to(dtype)).clamp(0, 1))
    target = teacher_logprobs.to(dtype)
    if base_logprobs is not None:
        target = extrapolation * target + (1 - extrapolation) * base_logprobs.to(dtype)
    kept = mask & of_tokens(keep)
    advantages = torch.where(kept, weights * (target - old_logprobs.to(dtype)), 0.0)
    return advantages, torch.where(mask, weights, 0.0), kept


def _lengths(cu_seqlens: Tensor, total: int) -> Tensor:
    """Tokens of each packed row; they fill the tensor also where ``cu_seqlens`` breaks its rules, unseen on a GPU."""
    bounds = cu_seqlens.to(torch.int64).clamp(0, total).cummax(0).values
    ends = torch.cat([bounds[1:-1], bounds.new_full((1,), total)]) if bounds.shape[0] > 1 else bounds[1:]
    return ends.diff(prepend=bounds.new_zeros(1))
