"""Tensors to lists, ``python_ref``, and back."""

import torch
from torch import Tensor

import python_ref
from leafkernels._core.precision import compute_dtype
from leafkernels.reference._lists import live_rows


def policy_loss_from_logits(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor,
    weights: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    max_log_ratio: float,
    kl_coef: float,
    entropy_coef: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """See ``python_ref.policy_loss_from_logits``; arguments and results as the PyTorch implementation."""
    terms = torch.zeros((6, logits.shape[0]), dtype=compute_dtype(logits.dtype))
    gradients = torch.zeros(logits.shape if with_gradient else (0,), dtype=logits.dtype)
    for i in live_rows(mask, logits.shape[0]):
        found, gradient = python_ref.policy_loss_from_logits(
            [[logits[i].tolist()]],
            [[int(token_ids[i])]],
            None if old_logprobs is None else [[float(old_logprobs[i])]],
            [[float(advantages[i])]],
            [[True]],
            temperature=[[float(temperature[i])]],
            clip=(clip_low, clip_high),
            dual_clip=dual_clip,
            max_log_ratio=max_log_ratio,
            ref_logprobs=None if ref_logprobs is None else [[float(ref_logprobs[i])]],
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
        )
        weight = float(weights[i])
        terms[:, i] = torch.tensor([weight * found["loss"], *list(found.values())[1:]], dtype=terms.dtype)
        if with_gradient:
            gradients[i] = torch.tensor(gradient[0][0], dtype=torch.float64).mul_(weight).to(logits.dtype)
    return terms.to(logits.device), gradients.to(logits.device)


def scale_gradient(gradients: Tensor, factor: Tensor) -> None:
    """Multiply the gradients by one number, in place."""
    gradients.mul_(float(factor))
