"""The clipped policy loss with one advantage for each token, and the statistics that people watch."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from leafkernels._core.checks import (
    check_choice,
    check_finite,
    check_like,
    check_mask,
    check_positive,
    check_real,
    check_tensor,
)
from leafkernels._core.precision import compute_dtype

AGGREGATES = ("token_mean", "sequence_mean", "sum", "constant")
IMPORTANCE = ("token", "sequence")


class PolicyLoss(NamedTuple):
    """The loss, and statistics over the unmasked tokens: scalars on the device of the inputs, without gradient."""

    loss: Tensor
    """To be minimised; differentiable in ``logprobs`` and ``entropy``."""
    clip_fraction: Tensor
    """Share of tokens whose ratio lies beyond the clip range on the side where the clipped term decides."""
    approx_kl: Tensor
    """Mean of ratio - 1 - log(ratio) of the tokens, never negative: how far the policy has moved from the old one."""
    mean_ratio: Tensor
    """Mean importance ratio; 1 on policy."""
    mean_kl: Tensor
    """Mean k3 estimate of the KL divergence to the reference policy; 0 without one."""
    mean_entropy: Tensor
    """Mean of ``entropy``; 0 without it."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    importance: str = "token",
    aggregate: str = "token_mean",
    constant: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate loss with per-token advantages, an optional KL penalty and an optional entropy bonus.

    With ratio = exp(logprobs - old_logprobs), each token's loss is

        -min(ratio * A, clamp(ratio, 1 - clip[0], 1 + clip[1]) * A) + kl_coef * k3 - entropy_coef * entropy,
        k3 = exp(ref - logprobs) - (ref - logprobs) - 1

    (PPO, arXiv 1707.06347; k3: DeepSeekMath, arXiv 2402.03300; two clip sides: DAPO, arXiv 2503.14476). Where the mask
    is False nothing is read into any sum, and the gradient is exactly 0, also where NaN stands there. No value is read
    back to the host.

    Example:
        >>> old, advantages = torch.tensor([[-1.0, -2.0]]), torch.tensor([[1.0, -1.0]])
        >>> result = leafkernels.policy_loss(old + 0.5, old, advantages, torch.ones(1, 2))
        >>> result.loss, result.clip_fraction
        (tensor(0.2244), tensor(0.5000))

    Args:
        logprobs: (N, T) log-probabilities of the sampled tokens under the policy that is trained, nats.
        old_logprobs: (N, T) under the policy that sampled; a constant. Pass ``logprobs.detach()`` on policy.
        advantages: (N, T), as from ``span_advantages``; a constant.
        response_mask: (N, T), nonzero where a token counts.
        clip: how far the ratio may fall below, and rise above, 1; the second may be ``math.inf``.
        ref_logprobs: (N, T) under a reference policy; needed where ``kl_coef`` is not 0.
        kl_coef: weight of k3; at 0 it is a statistic alone, and may be anything.
        entropy: (N, T), as from ``surprisal_entropy``; needed where ``entropy_coef`` is not 0.
        entropy_coef: weight of the entropy, which is rewarded; as ``kl_coef`` at 0.
        importance: "token", or "sequence": every token of a row has the exponential of the row's mean log-ratio as its
            ratio, and its own log-probability as the gradient of that (GSPO-token, arXiv 2507.18071).
        aggregate: "token_mean" over all tokens of the batch (DAPO), "sequence_mean" over each row's tokens and then
            over the rows that have any (GRPO), "sum", or "constant": the sum over ``constant`` (Dr. GRPO, arXiv
            2503.20783).
        constant: what the sum is divided by with aggregate="constant", positive: rows times the longest response, say.
    """
    check_real("logprobs", logprobs)
    shape, device = logprobs.shape, logprobs.device
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must have shape (rows, tokens), got shape {tuple(shape)}")
    tensors = {"old_logprobs": old_logprobs, "advantages": advantages}
    for name, optional in (("ref_logprobs", ref_logprobs), ("entropy", entropy)):
        if optional is not None:
            tensors[name] = optional
    for name, tensor in tensors.items():
        check_real(name, tensor)
        check_like(name, tensor, "logprobs", shape, device)
    mask = cast(Tensor, check_mask(check_tensor("response_mask", response_mask), "logprobs", shape, device))
    check_choice("importance", importance, IMPORTANCE)
    low, high = check_loss_options(clip, aggregate, constant, ref_logprobs, kl_coef, entropy_coef)
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy must be given where entropy_coef is not 0, got entropy_coef={entropy_coef}")

    dtype = compute_dtype(logprobs.dtype)

    def live(tensor: Tensor) -> Tensor:
        # Filled before anything is computed from it: 0 * NaN would bring NaN back through the gradient.
        return tensor.to(dtype).masked_fill(~mask, 0.0)

    policy, advantage = live(logprobs), live(advantages.detach())
    log_ratio = token_log_ratio = policy - live(old_logprobs.detach())
    counts = mask.sum(1, keepdim=True)
    if importance == "sequence":
        mean_log_ratio = log_ratio.sum(1, keepdim=True) / counts.clamp_min(1)
        # Each token carries the row's ratio as its value, and its own log-probability as its gradient.
        log_ratio = mean_log_ratio.detach() + policy - policy.detach()
    ratio = log_ratio.detach().exp()
    bounded = ratio.clamp(1 - low, 1 + high) * advantage
    is_clipped = bounded < ratio * advantage
    # Where the bound decides, or the advantage is 0, the ratio has no say: of one that has overflowed, 0 * inf would
    # make NaN, in the loss or in the gradient.
    has_no_say = is_clipped | ((advantage == 0.0) & ratio.isinf())
    gain = log_ratio.masked_fill(has_no_say, 0.0).exp() * advantage
    losses = -torch.where(is_clipped, bounded, gain)
    zero = losses.new_zeros(())
    kl = bonus = None
    if ref_logprobs is not None:
        distance = live(ref_logprobs.detach()) - policy
        kl = distance.expm1() - distance
        if kl_coef != 0:
            losses = losses + kl_coef * kl
    if entropy is not None:
        bonus = live(entropy)
        if entropy_coef != 0:
            losses = losses - entropy_coef * bonus
    losses = losses.masked_fill(~mask, 0.0)

    loss = (losses * token_weights(mask, aggregate, constant, dtype)).sum()
    number = counts.sum().clamp_min(1)

    def mean(values: Tensor) -> Tensor:
        return values.detach().masked_fill(~mask, 0.0).sum() / number

    return PolicyLoss(
        loss=loss,
        clip_fraction=mean(is_clipped.to(dtype)),
        approx_kl=mean(token_log_ratio.expm1() - token_log_ratio),
        mean_ratio=mean(ratio),
        mean_kl=zero if kl is None else mean(kl),
        mean_entropy=zero if bonus is None else mean(bonus),
    )


def token_weights(mask: Tensor, aggregate: str, constant: float | None, dtype: torch.dtype) -> Tensor:
    """(N, T): the share that each token's loss has in the whole loss."""
    weights = mask.to(dtype)
    if aggregate == "token_mean":
        return weights / mask.sum().clamp_min(1)
    if aggregate == "sequence_mean":
        counts = mask.sum(1, keepdim=True)
        return weights / (counts.clamp_min(1) * (counts > 0).sum().clamp_min(1))
    return weights if constant is None else weights / constant


def check_loss_options(
    clip: Any,
    aggregate: str,
    constant: float | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[float, float]:
    """The two sides of ``clip``; raises where the options of a loss are not what they must be."""
    check_choice("aggregate", aggregate, AGGREGATES)
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"clip must be a pair (below, above), got {clip!r}")
    low, high = clip
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"clip must be (below, above) with 0 <= below <= 1 and above >= 0, got {clip!r}")
    check_finite("kl_coef", kl_coef)
    check_finite("entropy_coef", entropy_coef)
    if kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs must be given where kl_coef is not 0, got kl_coef={kl_coef}")
    if (aggregate == "constant") != (constant is not None):
        raise ValueError(
            f"constant must be given with aggregate='constant', and only then, got constant={constant} and "
            f"aggregate={aggregate!r}"
        )
    if constant is not None:
        check_positive("constant", constant)
    return float(low), float(high)
