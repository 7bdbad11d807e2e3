"""Tensors to lists, ``python_ref``, and back."""

from typing import Any

import torch
from torch import Tensor

from leafkernels.reference._lists import take_row
from python_ref import distillation


def fire_statistics(
    teacher_logprobs: Tensor,
    student_entropy: Tensor | None,
    teacher_entropy: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """See ``python_ref.fire_statistics``; arguments and results as the PyTorch implementation."""
    tables = (_rows(tensor, cu_seqlens) for tensor in (teacher_logprobs, student_entropy, teacher_entropy, mask))
    rows = distillation.fire_statistics(*tables)
    return torch.tensor(rows, dtype=torch.float64, device=mask.device).reshape(len(rows), 7)


def fire_scope(rows: Tensor, scores: Tensor, drop: float, alpha: float, beta: float, of_kept: bool) -> Tensor:
    """See ``python_ref.distillation.fire_scope``; arguments and results as the PyTorch implementation."""
    numbers = distillation.fire_scope(
        rows.tolist(), scores.tolist(), drop=drop, alpha=alpha, beta=beta, of_kept=of_kept
    )
    return torch.tensor(numbers, dtype=torch.float64, device=rows.device)


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
    """See ``python_ref.distillation``; arguments and results as the PyTorch implementation."""
    masks, of_rows = _rows(mask, cu_seqlens), rows.tolist()
    _, least, teacher_max, student_max, mean = numbers.tolist()
    keeps = [of_row[0] > 0 and not score < least for of_row, score in zip(of_rows, scores.tolist(), strict=True)]
    means = [mean] * len(of_rows)
    if per_row:
        means = [distillation.mean_weight([of_row], teacher_max, student_max, alpha, beta) for of_row in of_rows]
    weights = distillation.fire_weights(
        _rows(student_entropy, cu_seqlens),
        _rows(teacher_entropy, cu_seqlens),
        masks,
        [1 / of_row for of_row in means],
        teacher_max,
        student_max,
        alpha=alpha,
        beta=beta,
    )
    advantages = distillation.fire_advantages(
        _rows(old_logprobs, cu_seqlens),
        _rows(teacher_logprobs, cu_seqlens),
        weights,
        masks,
        keeps,
        base_logprobs=_rows(base_logprobs, cu_seqlens),
        extrapolation=extrapolation,
    )
    tokens_in_loss = distillation.in_loss(
        _rows(old_logprobs, cu_seqlens), masks, keeps, _rows(base_logprobs, cu_seqlens), extrapolation
    )
    kept = [[t in tokens for t in range(len(row))] for row, tokens in zip(masks, tokens_in_loss, strict=True)]

    def to_tensor(rows: list, kind: torch.dtype) -> Tensor:
        flat = [value for row in rows for value in row]
        return torch.tensor(flat, dtype=kind, device=mask.device).reshape(mask.shape)

    tokens = to_tensor(advantages, dtype), to_tensor(weights, dtype), to_tensor(kept, torch.bool)
    return *tokens, torch.tensor(keeps, dtype=torch.bool, device=mask.device)


def _rows(tensor: Tensor | None, cu_seqlens: Tensor | None) -> Any:
    if tensor is None or cu_seqlens is None:
        return None if tensor is None else tensor.tolist()
    bounds = cu_seqlens.tolist()
    return [take_row(tensor, row, start, end) for row, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))]
