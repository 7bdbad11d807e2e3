"""The clipped policy loss with one advantage for each token, and its usual statistics."""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import (
    check_choice,
    check_finite,
    check_kernel_dtype,
    check_like,
    check_mask,
    check_positive,
    check_real,
    check_tensor,
)
from leafkernels._core.derivatives import refuse_forward_mode, refuse_second_derivative
from leafkernels._core.operation import operation
from leafkernels._core.precision import compute_dtype
from leafkernels._core.reference import from_reference

AGGREGATES = ("token_mean", "sequence_mean", "sum", "constant")
IMPORTANCE = ("token", "sequence")


class PolicyLoss(NamedTuple):
    """The loss, and statistics over the unmasked tokens: scalars on the device of the inputs, without gradient."""

    loss: Tensor
    """To be minimised; differentiable in ``logprobs`` and ``entropy``."""
    clip_fraction: Tensor
    """Share of tokens whose loss a bound decides: the clip range, where the ratio lies beyond it on the side where the
    clipped term is the smaller, or ``dual_clip``."""
    approx_kl: Tensor
    """Mean of ratio - 1 - log(ratio) of the tokens, never negative: how far the policy has moved from the old one; no
    option of the loss changes it."""
    mean_ratio: Tensor
    """Mean importance ratio, within ``max_log_ratio``; 1 on policy."""
    mean_kl: Tensor
    """Mean k3 estimate of the KL divergence to the reference policy; 0 without one."""
    mean_entropy: Tensor
    """Mean of ``entropy``; 0 without it."""


class LossOptions(NamedTuple):
    """Options of a policy loss, which ``policy_loss`` documents."""

    clip_low: float
    clip_high: float
    dual_clip: float  # infinite: no such bound
    max_log_ratio: float  # likewise
    kl_coef: float
    entropy_coef: float
    per_sequence: bool
    aggregate: str
    constant: float | None

    def in_words(self) -> dict[str, Any]:
        """As ``python_ref`` takes them."""
        clip, importance = (self.clip_low, self.clip_high), "sequence" if self.per_sequence else "token"
        names = ("dual_clip", "max_log_ratio", "kl_coef", "entropy_coef", "aggregate", "constant")
        return {"clip": clip, "importance": importance, **{name: getattr(self, name) for name in names}}


@operation("policy_loss")
def _policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    options: LossOptions,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logprobs.dtype)
    sums = logprobs.new_empty((7, logprobs.shape[0]), dtype=dtype)
    return sums, logprobs.new_empty(logprobs.shape if with_gradient else (0,), dtype=dtype)


class _PolicyLoss(torch.autograd.Function):
    """The sum of each row's losses, and all sums; PyTorch applies the weights of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        constants: tuple[Tensor, Tensor, Tensor, Tensor | None],
        options: LossOptions,
        with_gradient: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        _, _, mask, _ = constants
        sums, gradients = _policy_loss(backend, logprobs, *constants, entropy, options, with_gradient)
        ctx.save_for_backward(gradients, mask if ctx.needs_input_grad[1] else None)
        ctx.dtypes = logprobs.dtype, None if entropy is None else entropy.dtype
        ctx.entropy_coef = options.entropy_coef
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("policy_loss")
        gradients, mask = ctx.saved_tensors
        grad_rows = grad_rows[:, None]
        grad_logprobs = grad_entropy = None
        if ctx.needs_input_grad[0]:
            grad_logprobs = (gradients * grad_rows).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            grad_entropy = torch.where(mask, -ctx.entropy_coef * grad_rows, 0.0).to(ctx.dtypes[1])
        return grad_logprobs, grad_entropy, None, None, None, None


def _by_reference(
    logprobs: Tensor,
    entropy: Tensor | None,
    constants: tuple[Tensor, Tensor, Tensor, Tensor | None],
    options: LossOptions,
) -> PolicyLoss:
    import python_ref

    lists: list[Any] = [None if constant is None else constant.tolist() for constant in constants]
    old_logprobs, advantages, mask, ref_logprobs = lists
    words = options.in_words() | {"ref_logprobs": ref_logprobs}

    def compute(logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, ...]:
        entropies = None if entropy is None else entropy.tolist()
        found = python_ref.policy_loss(logprobs.tolist(), old_logprobs, advantages, mask, entropy=entropies, **words)
        dtype = compute_dtype(logprobs.dtype)
        return tuple(torch.tensor(number, dtype=dtype, device=logprobs.device) for number in found.values())

    def gradient(grad_loss: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("policy_loss")
        *_, logprobs, entropy = others
        found = python_ref.policy_loss_backward(logprobs.tolist(), old_logprobs, advantages, mask, **words)
        grads = (torch.tensor(table, dtype=torch.float64).reshape(logprobs.shape).to(grad_loss) for table in found)
        grad_logprobs, grad_entropy = (grad * grad_loss for grad in grads)
        return grad_logprobs, None if entropy is None else grad_entropy

    return PolicyLoss(*from_reference("policy_loss", compute, gradient, logprobs, entropy, constants=range(1, 6)))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    max_log_ratio: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    importance: str = "token",
    aggregate: str = "token_mean",
    constant: float | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """Clipped surrogate loss with per-token advantages, an optional KL penalty and an optional entropy bonus.

    With ratio = exp(logprobs - old_logprobs), each token's loss is

        -min(ratio * A, clamp(ratio, 1 - clip[0], 1 + clip[1]) * A) + kl_coef * k3 - entropy_coef * entropy,
        k3 = exp(ref - logprobs) - (ref - logprobs) - 1

    (PPO, arXiv 1707.06347; k3: DeepSeekMath, arXiv 2402.03300; two clip sides: DAPO, arXiv 2503.14476). Where the mask
    is False, values enter no sum and the gradient is exactly 0, also where they are NaN. No value is read back to the
    host. The gradient is written in the same pass, one number for each token, and kept as long as the loss.

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
        dual_clip: above 1; where the advantage is negative, the clipped term loses at most -dual_clip * A, and there it
            has no gradient (arXiv 1912.09729; 3 is usual). None: no such bound.
        max_log_ratio: positive; the log-ratio, or a row's mean log-ratio with importance="sequence", is clamped to
            [-max_log_ratio, max_log_ratio] before the exponential, and has no gradient where it is (verl: 20). None: no
            bound. k3 is not clamped.
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
        backend: "auto", "triton", "torch" or "reference". Triton takes no float64, for which "auto" is "torch".
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
    options = check_loss_options(
        clip, dual_clip, max_log_ratio, kl_coef, entropy_coef, importance, aggregate, constant, ref_logprobs
    )
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy must be given where entropy_coef is not 0, got entropy_coef={entropy_coef}")
    if backend == "auto" and logprobs.dtype == torch.float64:
        backend = "torch"
    backend = resolve_backend(backend, device)
    check_kernel_dtype("logprobs", logprobs.dtype, backend)

    if entropy is not None and entropy_coef == 0:
        # A statistic: what computed it is to get no gradient, which is less work than one of zeros.
        entropy = entropy.detach()
    refuse_forward_mode("policy_loss", logprobs, entropy)
    ref_logprobs = None if ref_logprobs is None else ref_logprobs.detach()
    constants = (old_logprobs.detach(), advantages.detach(), mask, ref_logprobs)
    if backend == "reference":
        return _by_reference(logprobs, entropy, constants, options)
    with_gradient = logprobs.requires_grad and torch.is_grad_enabled()
    losses, sums = _PolicyLoss.apply(logprobs, entropy, constants, options, with_gradient, backend)
    counts = sums[6]
    means = sums[1:6].sum(1) / counts.sum().clamp_min(1)
    return PolicyLoss((losses * row_weights(counts, aggregate, constant)).sum(), *means.unbind())


def row_weights(counts: Tensor, aggregate: str, constant: float | None) -> Tensor:
    """The share that a token's loss has in the whole loss, for each row, from the numbers of tokens that count (N,)."""
    if aggregate == "token_mean":
        return counts.sum().clamp_min(1).reciprocal().expand_as(counts)
    if aggregate == "sequence_mean":
        return (counts.clamp_min(1) * (counts > 0).sum().clamp_min(1)).reciprocal()
    return torch.full_like(counts, 1.0 if constant is None else 1.0 / constant)


def token_weights(mask: Tensor, aggregate: str, constant: float | None, dtype: torch.dtype) -> Tensor:
    """(N, T): the share that each token's loss has in the whole loss."""
    return mask * row_weights(mask.sum(1).to(dtype), aggregate, constant)[:, None]


def check_loss_options(
    clip: Any,
    dual_clip: float | None,
    max_log_ratio: float | None,
    kl_coef: float,
    entropy_coef: float,
    importance: str,
    aggregate: str,
    constant: float | None,
    ref_logprobs: Tensor | None,
) -> LossOptions:
    """The options of a loss; raises where they are not what they must be."""
    check_choice("importance", importance, IMPORTANCE)
    check_choice("aggregate", aggregate, AGGREGATES)
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"clip must be a pair (below, above), got {clip!r}")
    low, high = clip
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"clip must be (below, above) with 0 <= below <= 1 and above >= 0, got {clip!r}")
    if dual_clip is not None:
        check_finite("dual_clip", dual_clip)
        if dual_clip <= 1:
            raise ValueError(f"dual_clip must be greater than 1, got {dual_clip}")
    if max_log_ratio is not None:
        check_positive("max_log_ratio", max_log_ratio)
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
    most, bound = (math.inf if option is None else float(option) for option in (dual_clip, max_log_ratio))
    low, high, kl_coef, entropy_coef = (float(option) for option in (low, high, kl_coef, entropy_coef))
    per_sequence = importance == "sequence"
    return LossOptions(low, high, most, bound, kl_coef, entropy_coef, per_sequence, aggregate, constant)
