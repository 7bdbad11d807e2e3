"""The clipped policy loss and its gradient, all tokens at a time; see ``leafkernels.kernels.policy_loss``."""

import torch
from torch import Tensor

from leafkernels._core.precision import compute_dtype


def surrogate(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float, max_log_ratio: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each token: what its ratio loses, the derivative of that in the log-ratio, the ratio, and if it is clipped."""
    ratio = log_ratio.clamp(-max_log_ratio, max_log_ratio).exp()
    # An advantage of 0 gains nothing, also of a ratio that has overflowed.
    gain = (ratio * advantage).masked_fill((advantage == 0.0) & ratio.isinf(), 0.0)
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    is_bounded = bounded < gain
    is_dual = (advantage < 0.0) & (gain < dual_clip * advantage)
    is_clipped = is_bounded | is_dual
    loss = -torch.where(is_bounded, bounded, torch.where(is_dual, dual_clip * advantage, gain))
    return loss, -gain.masked_fill(is_clipped | (log_ratio.abs() > max_log_ratio), 0.0), ratio, is_clipped


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    max_log_ratio: float,
    kl_coef: float,
    entropy_coef: float,
    of_sequence: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Sums (7, N) over each row's unmasked tokens, in the order of ``PolicyLoss``, the last their number.

    And the derivative (N, T) of each token's loss in its log-probability; empty if unwanted.
    """
    dtype = compute_dtype(logprobs.dtype)

    def live(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor.to(dtype), 0.0)

    policy = live(logprobs)
    token_log_ratio = log_ratio = policy - live(old_logprobs)
    counts = mask.sum(1).to(dtype)
    if of_sequence:
        log_ratio = (log_ratio.sum(1) / counts.clamp_min(1))[:, None].expand_as(policy)
    loss, slope, ratio, is_clipped = surrogate(
        log_ratio, live(advantages), clip_low, clip_high, dual_clip, max_log_ratio
    )
    kl = bonus = torch.zeros_like(policy)
    if ref_logprobs is not None:
        distance = live(ref_logprobs) - policy
        kl = distance.expm1() - distance
        if kl_coef:
            loss = loss + kl_coef * kl
            slope = slope - kl_coef * distance.expm1()
    if entropy is not None:
        bonus = live(entropy)
        if entropy_coef:
            loss = loss - entropy_coef * bonus
    moved = token_log_ratio.expm1() - token_log_ratio
    # Of inputs that are 0 where the mask is False, all else is 0 too; a slope may be 0 * NaN, of its row's ratio.
    sums = [term.sum(1).to(dtype) for term in (loss, is_clipped, moved, live(ratio), kl, bonus)]
    return torch.stack((*sums, counts)), live(slope) if with_gradient else policy.new_empty(0)
