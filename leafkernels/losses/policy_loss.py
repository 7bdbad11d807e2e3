"""The policy losses with one advantage for each token, and their usual statistics."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_kernel_dtype, check_like, check_mask, check_real, check_tensor
from leafkernels._core.derivatives import refuse_forward_mode, refuse_second_derivative
from leafkernels._core.operation import operation
from leafkernels._core.precision import compute_dtype
from leafkernels._core.reference import from_reference
from leafkernels.losses.aggregates import check_aggregate, row_weights
from leafkernels.losses.kinds import LossOptions, check_loss
from leafkernels.losses.tokens import (
    LossInputs,
    batch_weights,
    check_token_weights,
    drawn_numbers,
    row_lists,
    spread_rows,
)
from leafkernels.rows.find import check_cu_seqlens


class PolicyLoss(NamedTuple):
    """The loss, and statistics over the unmasked tokens: scalars on the device of the inputs, without gradient."""

    loss: Tensor
    """To be minimised; differentiable in ``logprobs`` and ``entropy``."""
    clip_fraction: Tensor
    """Share of tokens whose loss a bound decides: with "clip" the clip range, where the ratio lies beyond it on the
    side where the clipped term is the smaller, or ``dual_clip``."""
    approx_kl: Tensor
    """Mean of ratio - 1 - log(ratio) of the tokens, never negative: how far the policy has moved from the old one; no
    option of the loss changes it."""
    mean_ratio: Tensor
    """Mean importance ratio, within ``max_log_ratio``; 1 on policy."""
    mean_kl: Tensor
    """Mean estimate of the KL divergence to the reference policy, as ``kl_kind`` has it; 0 without one."""
    mean_entropy: Tensor
    """Mean of ``entropy``; 0 without it."""


@operation("policy_loss")
def _policy_loss(
    logprobs: Tensor, inputs: LossInputs, entropy: Tensor | None, options: LossOptions, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logprobs.dtype)
    num_rows = logprobs.shape[0] if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
    sums = logprobs.new_empty((7, num_rows), dtype=dtype)
    return sums, logprobs.new_empty(logprobs.shape if with_gradient else (0,), dtype=dtype)


class _PolicyLoss(torch.autograd.Function):
    """The sum of each row's losses, and all sums; PyTorch applies the weights of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        inputs: LossInputs,
        options: LossOptions,
        with_gradient: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        sums, gradients = _policy_loss(backend, logprobs, inputs, entropy, options, with_gradient)
        ctx.save_for_backward(gradients, inputs.mask if ctx.needs_input_grad[1] else None, inputs.cu_seqlens)
        ctx.dtypes = logprobs.dtype, None if entropy is None else entropy.dtype
        ctx.entropy_coef = options.entropy_coef
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("policy_loss")
        gradients, mask, cu_seqlens = ctx.saved_tensors
        grad_rows = grad_rows[:, None] if cu_seqlens is None else spread_rows(grad_rows, cu_seqlens, gradients.numel())
        grad_logprobs = grad_entropy = None
        if ctx.needs_input_grad[0]:
            grad_logprobs = (gradients * grad_rows).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            grad_entropy = torch.where(mask, -ctx.entropy_coef * grad_rows, 0.0).to(ctx.dtypes[1])
        return grad_logprobs, grad_entropy, None, None, None, None


def _by_reference(
    logprobs: Tensor, entropy: Tensor | None, inputs: LossInputs, drawn: Tensor | None, words: dict[str, Any]
) -> PolicyLoss:
    import python_ref

    def lists(tensor: Tensor | None) -> Any:
        return None if tensor is None else row_lists(tensor, inputs.cu_seqlens)

    tables = [lists(tensor) for tensor in (inputs.old_logprobs, inputs.advantages, inputs.mask)]
    words = words | {"ref_logprobs": lists(inputs.ref_logprobs), "token_weights": lists(inputs.token_weights)}
    words["drawn"] = lists(drawn)

    def compute(logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, ...]:
        found = python_ref.policy_loss(lists(logprobs), *tables, entropy=lists(entropy), **words)
        dtype = compute_dtype(logprobs.dtype)
        return tuple(torch.tensor(number, dtype=dtype, device=logprobs.device) for number in found.values())

    def gradient(grad_loss: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("policy_loss")
        *_, logprobs, entropy = others
        found = python_ref.policy_loss_backward(lists(logprobs), *tables, **words)
        flat = ([slope for row in table for slope in row] for table in found)
        grads = (torch.tensor(row, dtype=torch.float64).reshape(logprobs.shape).to(grad_loss) for row in flat)
        grad_logprobs, grad_entropy = (grad * grad_loss for grad in grads)
        return grad_logprobs, None if entropy is None else grad_entropy

    return PolicyLoss(*from_reference("policy_loss", compute, gradient, logprobs, entropy, constants=range(1, 6)))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    kind: str = "clip",
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    max_log_ratio: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    kl_weighted: bool = False,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    token_weights: Tensor | None = None,
    importance: str = "token",
    aggregate: str = "token_mean",
    constant: float | None = None,
    num_tokens: int | Tensor | None = None,
    num_rows: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    **options: Any,
) -> PolicyLoss:
    """A policy loss with per-token advantages, an optional KL penalty and an optional entropy bonus.

    With ratio = exp(logprobs - old_logprobs), each token's loss is

        token_weight * surrogate + kl_coef * kl - entropy_coef * entropy

    where the surrogate of the default kind "clip" is -min(ratio * A, clamp(ratio, 1 - clip[0], 1 + clip[1]) * A) (PPO,
    arXiv 1707.06347; two clip sides: DAPO, arXiv 2503.14476), and the kl is "k3", exp(ref - logprobs) - (ref -
    logprobs) - 1 (DeepSeekMath, arXiv 2402.03300). docs/losses.md has the formulas of all kinds. Where the mask is
    False, values enter no sum and the gradient is exactly 0, also where they are NaN. No value is read back to the
    host. The gradient is written in the same pass, one number for each token, and kept as long as the loss.

    Example:
        >>> old, advantages = torch.tensor([[-1.0, -2.0]]), torch.tensor([[1.0, -1.0]])
        >>> result = leafkernels.policy_loss(old + 0.5, old, advantages, torch.ones(1, 2))
        >>> result.loss, result.clip_fraction
        (tensor(0.2244), tensor(0.5000))

    Args:
        logprobs: (N, T) log-probabilities of the sampled tokens under the policy that is trained, nats; or (total,)
            with ``cu_seqlens``, and so all that is said to be (N, T).
        old_logprobs: (N, T) under the policy that sampled; a constant. Pass ``logprobs.detach()`` on policy.
        advantages: (N, T), as from ``span_advantages``; a constant.
        response_mask: (N, T), nonzero where a token counts.
        kind: "clip", "cispo", "sapo", "vespo", "gmpo", "dppo_tv", "dppo_kl", "dro", "reinforce", "clip_cov", "kl_cov"
            or "fipo". "clip_cov" draws from PyTorch's generator which tokens it drops.
        clip: how far the ratio may fall below, and rise above, 1; the second may be ``math.inf``. "gmpo" bounds the
            log-ratio so, and "dppo_tv" and "dppo_kl" the divergence. None: the kind's default, (0.2, 0.2) for "clip".
        dual_clip: above 1; where the advantage is negative, the clipped term loses at most -dual_clip * A, and there it
            has no gradient (arXiv 1912.09729; 3 is usual). None: no such bound.
        max_log_ratio: positive; the log-ratio, or a row's mean log-ratio with importance="sequence", is clamped to
            [-max_log_ratio, max_log_ratio] before the exponential, and has no gradient where it is (verl: 20). None: no
            bound. The KL is not clamped.
        ref_logprobs: (N, T) under a reference policy; needed where ``kl_coef`` is not 0.
        kl_coef: weight of the KL; at 0 it is a statistic alone, and may be anything.
        kl_kind: "k3", "k1", "k2", "abs", or "k3+": the value of k3 with the gradient of k2. What each one's gradient is
            that of stands in docs/losses.md.
        kl_weighted: multiply the KL by the ratio, as TRL does by default; the gradient is that of the product, but for
            "k3+", where the ratio is a constant.
        entropy: (N, T), as from ``surprisal_entropy``; needed where ``entropy_coef`` is not 0.
        entropy_coef: weight of the entropy, which is rewarded; as ``kl_coef`` at 0.
        token_weights: (N, T), at least 0, as from ``rollout_weights``: a constant that multiplies the surrogate, not
            the KL and the entropy; "vespo" takes the product of a row's into its ratio instead. A negative one is
            refused on a CPU; on other devices it is not looked for.
        importance: "token", or "sequence", for "clip", "cispo" and "sapo": every token of a row has the exponential of
            the row's mean log-ratio as its ratio, and its own log-probability as the gradient of that (GSPO-token,
            arXiv 2507.18071).
        aggregate: "token_mean" over all tokens of the batch (DAPO), "sequence_mean" over each row's tokens and then
            over the rows that have any (GRPO), "sequence_sum" the mean over these rows of their sums, "sum", or
            "constant": the sum over ``constant`` (Dr. GRPO, arXiv 2503.20783). TRL's by its ``loss_type`` ("grpo",
            "bnpo", "dr_grpo", "dapo", "luspo"), where a row without a token counts as a row; verl's by its
            ``loss_agg_mode``.
        constant: what the sum is divided by with aggregate="constant", positive: rows times the longest response, say;
            with "dr_grpo" the longest response, by which, and by the rows, is divided.
        num_tokens, num_rows: how many there are in the whole step, where this call is a part of it, for an aggregate
            that divides by them: the losses of the parts then add up to that of the step, and a step without any has
            the loss 0. Tensors need no host synchronisation.
        cu_seqlens: (N + 1,) int32, the offsets of packed rows.
        backend: "auto", "triton", "torch" or "reference". Triton takes no float64, for which "auto" is "torch".
        options: those of the kind: "sapo" ``tau``; "vespo" ``shape``, ``shape_negative``; "dppo_tv" and "dppo_kl"
            ``max_ratio``; "dro" ``beta``; "clip_cov" ``share``, ``covariance``; "kl_cov" ``share``, ``penalty``;
            "fipo" ``half_life``, ``future_clip``. One that the kind does not read is refused.
    """
    check_real("logprobs", logprobs)
    shape, device = logprobs.shape, logprobs.device
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "logprobs", logprobs)
    elif logprobs.dim() != 2:
        raise ValueError(f"logprobs must have shape (rows, tokens), got shape {tuple(shape)}")
    tensors = {"old_logprobs": old_logprobs, "advantages": advantages}
    optional = {"ref_logprobs": ref_logprobs, "entropy": entropy, "token_weights": token_weights}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in tensors.items():
        check_real(name, tensor)
        check_like(name, tensor, "logprobs", shape, device)
    mask = cast(Tensor, check_mask(check_tensor("response_mask", response_mask), "logprobs", shape, device))
    check_token_weights(token_weights, mask)
    given = {"clip": clip, "dual_clip": dual_clip, "max_log_ratio": max_log_ratio, **options}
    loss = check_loss(kind, given, importance, ref_logprobs, kl_coef, kl_kind, kl_weighted, entropy_coef)
    counts = check_aggregate(aggregate, constant, num_tokens, num_rows, shape[-1] if cu_seqlens is None else None)
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
    ref_logprobs, token_weights = (None if x is None else x.detach() for x in (ref_logprobs, token_weights))
    inputs = LossInputs(old_logprobs.detach(), advantages.detach(), mask, ref_logprobs, token_weights, None, cu_seqlens)
    drawn = drawn_numbers(logprobs) if kind == "clip_cov" else None
    if backend == "reference":
        words = loss.words | {"aggregate": aggregate, **counts.in_words()}
        return _by_reference(logprobs, entropy, inputs, drawn, words)
    inputs = batch_weights(kind, logprobs.detach(), inputs, drawn, loss.words)
    with_gradient = logprobs.requires_grad and torch.is_grad_enabled()
    losses, sums = _PolicyLoss.apply(logprobs, entropy, inputs, loss.options, with_gradient, backend)
    tokens = sums[6]
    means = sums[1:6].sum(1) / tokens.sum().clamp_min(1)
    return PolicyLoss((losses * row_weights(tokens, aggregate, counts)).sum(), *means.unbind())
