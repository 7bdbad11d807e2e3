"""The clipped policy loss and its gradient from the logits, a few rows at a time while they are in the cache.

See ``leafkernels.kernels.policy_loss_from_logits`` for the mathematics.
"""

import torch
from torch import Tensor

from leafkernels._core.precision import compute_dtype
from leafkernels.eager.policy_loss import surrogate
from leafkernels.eager.surprisal import chunks, fold, logit_gradient, merge_surprisal_states, pick


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
    """Terms (6, N) of each row, in the order of ``PolicyLoss``, the first times its weight.

    And the gradient (N, V) of the sum of the first, in the dtype of the logits; empty if unwanted.
    """
    dtype = compute_dtype(logits.dtype)
    terms = torch.zeros((6, logits.shape[0]), dtype=dtype, device=logits.device)
    gradients = torch.zeros(logits.shape if with_gradient else (0,), dtype=logits.dtype, device=logits.device)
    scale = temperature.to(dtype).reciprocal()
    for rows, x, room in chunks(logits, mask):
        states = fold(x, scale[rows], room)[..., None]
        surprisal, entropy, tops, log_totals = merge_surprisal_states(
            states, pick(x, token_ids[rows]), temperature[rows], None
        )
        log_ratio = surprisal * 0 if old_logprobs is None else -surprisal - old_logprobs[rows]
        loss, of_logprob, ratio, is_clipped = surrogate(
            log_ratio, advantages[rows], clip_low, clip_high, dual_clip, max_log_ratio
        )
        if entropy_coef:
            loss -= entropy_coef * entropy
        kl = torch.zeros_like(loss)
        if ref_logprobs is not None:
            distance = ref_logprobs[rows] + surprisal
            kl = distance.expm1() - distance
            if kl_coef:
                loss += kl_coef * kl
                of_logprob -= kl_coef * distance.expm1()
        moved = log_ratio.expm1() - log_ratio
        terms[:, rows] = torch.stack((weights[rows] * loss, is_clipped.to(dtype), moved, ratio, kl, entropy))
        if with_gradient:
            of_entropy = -entropy_coef * weights[rows] if entropy_coef else None
            gradients[rows] = logit_gradient(
                x,
                token_ids[rows],
                surprisal,
                entropy,
                tops,
                log_totals,
                -of_logprob * weights[rows],
                of_entropy,
                scale[rows],
                room,
            ).to(logits.dtype)
    return terms, gradients


def scale_gradient(gradients: Tensor, factor: Tensor) -> None:
    """Multiply the gradients by one number, in place; nothing is done where that is 1."""
    if float(factor) != 1:
        gradients.mul_(factor)
