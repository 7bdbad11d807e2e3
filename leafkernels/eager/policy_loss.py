"""The clipped policy loss and its gradient, all tokens at a time; see ``leafkernels.kernels.policy_loss``."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leafkernels._core.precision import compute_dtype

if TYPE_CHECKING:
    from leafkernels.losses.policy_loss import LossOptions


def token_loss(
    logprob: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    ref_logprob: Tensor | None,
    entropy: Tensor | None,
    options: "LossOptions",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each token: its loss, the derivative in its log-probability, the ratio, whether it is clipped, and k3."""
    loss, slope, ratio, is_clipped = surrogate(log_ratio, advantage, options)
    kl = torch.zeros_like(loss)
    if ref_logprob is not None:
        distance = ref_logprob - logprob
        kl = distance.expm1() - distance
        if options.kl_coef:
            loss = loss + options.kl_coef * kl
            slope = slope - options.kl_coef * distance.expm1()
    if entropy is not None and options.entropy_coef:
        loss = loss - options.entropy_coef * entropy
    return loss, slope, ratio, is_clipped, kl


def surrogate(log_ratio: Tensor, advantage: Tensor, options: "LossOptions") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each token: what its ratio loses, the derivative of that in the log-ratio, the ratio, and if it is clipped."""
    ratio = log_ratio.clamp(-options.max_log_ratio, options.max_log_ratio).exp()
    # An advantage of 0 contributes 0, also where the ratio has overflowed.
    gain = (ratio * advantage).masked_fill((advantage == 0.0) & ratio.isinf(), 0.0)
    bounded = ratio.clamp(1 - options.clip_low, 1 + options.clip_high) * advantage
    is_bounded = bounded < gain
    is_dual = (advantage < 0.0) & (gain < options.dual_clip * advantage)
    is_clipped = is_bounded | is_dual
    loss = -torch.where(is_bounded, bounded, torch.where(is_dual, options.dual_clip * advantage, gain))
    return loss, -gain.masked_fill(is_clipped | (log_ratio.abs() > options.max_log_ratio), 0.0), ratio, is_clipped


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    options: "LossOptions",
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
    if options.per_sequence:
        log_ratio = (log_ratio.sum(1) / counts.clamp_min(1))[:, None].expand_as(policy)
    reference = None if ref_logprobs is None else live(ref_logprobs)
    bonus = None if entropy is None else live(entropy)
    loss, slope, ratio, is_clipped, kl = token_loss(policy, log_ratio, live(advantages), reference, bonus, options)
    moved = token_log_ratio.expm1() - token_log_ratio
    bonus = torch.zeros_like(policy) if bonus is None else bonus
    # Inputs are 0 where the mask is False, and so are all results; but a slope may be 0 * NaN, with its row's ratio.
    sums = [term.sum(1).to(dtype) for term in (loss, is_clipped, moved, live(ratio), kl, bonus)]
    return torch.stack((*sums, counts)), live(slope) if with_gradient else policy.new_empty(0)
