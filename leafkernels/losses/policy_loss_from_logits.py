"""The policy losses for callers who hold logits: loss and gradient from one pass over them."""

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import (
    check_device,
    check_integer,
    check_kernel_dtype,
    check_mask,
    check_real,
    check_tensor,
)
from leafkernels._core.derivatives import refuse_forward_mode, refuse_second_derivative, refuse_second_pass
from leafkernels._core.operation import operation
from leafkernels._core.precision import compute_dtype
from leafkernels._core.reference import from_reference
from leafkernels.losses.aggregates import check_aggregate, row_weights
from leafkernels.losses.kinds import LossOptions, check_loss
from leafkernels.losses.policy_loss import PolicyLoss, policy_loss
from leafkernels.losses.tokens import check_token_weights, count_tokens, drawn_numbers, row_lists, spread_rows
from leafkernels.rows.find import check_cu_seqlens
from leafkernels.vocabulary.inputs import check_temperature
from leafkernels.vocabulary.sampling_mask import SamplingMask
from leafkernels.vocabulary.surprisal import surprisal_entropy


class LossConstants(NamedTuple):
    """What a token's loss needs beside its logits, for N tokens."""

    token_ids: Tensor
    temperature: Tensor
    mask: Tensor
    weights: Tensor  # of the token's loss in the whole
    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None
    token_weights: Tensor | None


@operation("policy_loss_from_logits")
def _policy_loss_from_logits(
    logits: Tensor, constants: LossConstants, options: LossOptions, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    terms = logits.new_empty((6, logits.shape[0]), dtype=compute_dtype(logits.dtype))
    return terms, logits.new_empty(logits.shape if with_gradient else (0,))


@operation("policy_loss_from_logits", mutates=("gradients",))
def _scale_gradient(gradients: Tensor, factor: Tensor) -> None: ...


class _PolicyLossFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, constants: LossConstants, options: LossOptions, with_gradient: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        terms, gradients = _policy_loss_from_logits(backend, logits, constants, options, with_gradient)
        ctx.save_for_backward(gradients)
        ctx.backend = backend
        ctx.mark_non_differentiable(terms)
        return terms[0].sum(), terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("policy_loss_from_logits")
        refuse_second_pass(ctx, "policy_loss_from_logits")
        (gradients,) = ctx.saved_tensors
        _scale_gradient(ctx.backend, gradients, grad_loss)
        return gradients, None, None, None, None


def _by_reference(
    logits: Tensor, tensors: dict[str, Tensor | None], cu_seqlens: Tensor | None, words: dict[str, Any]
) -> PolicyLoss:
    import python_ref

    def lists(tensor: Tensor | None) -> Any:
        return None if tensor is None else row_lists(tensor.detach(), cu_seqlens)

    words = words | {name: lists(tensor) for name, tensor in tensors.items()}

    def compute(logits: Tensor) -> tuple[Tensor, ...]:
        found, _ = python_ref.policy_loss_from_logits(lists(logits), **words)
        dtype = compute_dtype(logits.dtype)
        return tuple(torch.tensor(number, dtype=dtype, device=logits.device) for number in found.values())

    def gradient(grad_loss: Tensor, *others: Tensor) -> tuple[Tensor]:
        refuse_second_derivative("policy_loss_from_logits")
        logits = others[-1]
        _, found = python_ref.policy_loss_from_logits(lists(logits), **words)
        flat = [token for row in found for token in row]
        return (torch.tensor(flat, dtype=torch.float64).reshape(logits.shape).to(grad_loss.device) * grad_loss,)

    name = "policy_loss_from_logits"
    return PolicyLoss(*from_reference(name, compute, gradient, logits, constants=range(1, 6), once=name))


def policy_loss_from_logits(
    logits: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    kind: str = "clip",
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    max_log_ratio: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    kl_weighted: bool = False,
    entropy_coef: float = 0.0,
    token_weights: Tensor | None = None,
    importance: str = "token",
    aggregate: str = "token_mean",
    constant: float | None = None,
    num_tokens: int | Tensor | None = None,
    num_rows: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sampling_mask: SamplingMask | None = None,
    vocab_group: "dist.ProcessGroup | None" = None,
    backend: str = "auto",
    **options: Any,
) -> PolicyLoss:
    """``policy_loss`` of the log-probabilities and entropies of ``surprisal_entropy``, in one pass over the logits.

    The loss and the gradient of a token need its own logits only, so the gradient is written in the same launch, while
    the row is still in the cache: a third less traffic than a forward and a backward pass. The gradient, as large as
    the logits, is kept until ``backward`` and given away there: a second backward pass raises. The upstream gradient (1
    from ``loss.backward()``, which costs nothing; a loss scale; one over accumulation steps) multiplies it after it was
    rounded to the dtype of the logits: for float16 logits with a loss scale use ``surprisal_entropy`` and
    ``policy_loss``.

    A loss that needs other tokens first (kind="vespo", "gmpo", "clip_cov", "kl_cov" or "fipo", or
    importance="sequence") is ``surprisal_entropy`` followed by ``policy_loss``, and reads the logits twice.

    Args:
        logits: (N, T, V), float32, bfloat16, float16 or float64 (not with Triton); or (total, V) with ``cu_seqlens``,
            and then (total,) is all that is said to be (N, T).
        token_ids: (N, T) integers of any dtype: the sampled ids.
        old_logprobs: (N, T) under the policy that sampled; a constant. None: on policy, every ratio is 1.
        advantages: (N, T), as from ``span_advantages``; a constant.
        response_mask: (N, T), nonzero where a token counts; the logits of others are not read.
        temperature: positive; a float, or one for each token, (N, T).
        kind, clip, dual_clip, max_log_ratio, ref_logprobs, kl_coef, kl_kind, kl_weighted, entropy_coef, token_weights,
            importance, aggregate, constant, num_tokens, num_rows, cu_seqlens, options: as in ``policy_loss``.
        sampling_mask: the ids that each token could have been, as ``surprisal_entropy`` takes it. Of such rows only the
            kept logits are read, by ``surprisal_entropy`` followed by ``policy_loss``: what is said above of one pass
            does not hold.
        vocab_group: the tensor-parallel ranks, if each has a slice of the vocabulary, as ``surprisal_entropy`` takes
            it. The gradient then needs the results of the other ranks, so this too is ``surprisal_entropy`` followed by
            ``policy_loss``. The results are the same on every rank, and each gets the gradient of its slice.
        backend: "auto", "triton", "torch" or "reference".

    Example:
        >>> logits, token_ids = torch.tensor([[[0.0, 0.0], [1.0, 2.0]]]), torch.tensor([[0, 1]])
        >>> advantages = torch.tensor([[1.0, -0.5]])
        >>> leafkernels.policy_loss_from_logits(logits, token_ids, None, advantages, torch.ones(1, 2)).loss
        tensor(-0.2500)
    """
    check_real("logits", logits)
    if logits.dim() != (3 if cu_seqlens is None else 2):
        expected = (
            "(rows, tokens, vocabulary)" if cu_seqlens is None else "(total, vocabulary) together with cu_seqlens"
        )
        raise ValueError(f"logits must have shape {expected}, got shape {tuple(logits.shape)}")
    shape, device = logits.shape[:-1], logits.device
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "logits", logits[:, 0] if logits.shape[1] else logits.new_empty(shape))
    token_ids = check_integer("token_ids", token_ids)
    constants = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "token_weights": token_weights}
    tensors = {"token_ids": token_ids, "advantages": advantages}
    tensors |= {name: tensor for name, tensor in constants.items() if tensor is not None}
    for name, tensor in tensors.items():
        if name != "token_ids":
            check_real(name, tensor)
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have one entry for each row of logits, shape {tuple(shape)}, "
                f"got shape {tuple(tensor.shape)}"
            )
        check_device(name, tensor, "logits", device)
    mask = cast(Tensor, check_mask(check_tensor("response_mask", response_mask), "token_ids", shape, device))
    check_token_weights(token_weights, mask)
    temperatures = check_temperature(temperature, token_ids, mask)
    given = {"clip": clip, "dual_clip": dual_clip, "max_log_ratio": max_log_ratio, **options}
    loss = check_loss(kind, given, importance, ref_logprobs, kl_coef, kl_kind, kl_weighted, entropy_coef)
    counts = check_aggregate(aggregate, constant, num_tokens, num_rows, shape[-1] if cu_seqlens is None else None)
    backend = resolve_backend(backend, device)
    check_kernel_dtype("logits", logits.dtype, backend)

    refuse_forward_mode("policy_loss_from_logits", logits)
    is_composed = vocab_group is not None or sampling_mask is not None
    if backend == "reference" and not is_composed:
        drawn = drawn_numbers(logits[..., 0]) if kind == "clip_cov" else None
        words = loss.words | {"aggregate": aggregate, **counts.in_words()}
        given = {"token_ids": token_ids, "advantages": advantages, "response_mask": mask, "temperature": temperatures}
        return _by_reference(logits, given | constants | {"drawn": drawn}, cu_seqlens, words)
    if is_composed or loss.kind.reads != "token" or importance == "sequence":
        found = surprisal_entropy(
            logits,
            token_ids,
            temperature=temperature,
            response_mask=mask,
            sampling_mask=sampling_mask,
            vocab_group=vocab_group,
            backend=backend,
        )
        return policy_loss(
            found.logprobs,
            found.logprobs.detach() if old_logprobs is None else old_logprobs,
            advantages,
            mask,
            kind=kind,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_kind=kl_kind,
            kl_weighted=kl_weighted,
            entropy=found.entropy,
            entropy_coef=entropy_coef,
            token_weights=token_weights,
            importance=importance,
            aggregate=aggregate,
            constant=constant,
            num_tokens=num_tokens,
            num_rows=num_rows,
            cu_seqlens=cu_seqlens,
            backend=backend,
            **given,
        )
    dtype = compute_dtype(logits.dtype)
    shares = row_weights(count_tokens(mask, cu_seqlens).to(dtype), aggregate, counts)
    shares = shares[:, None] if cu_seqlens is None else spread_rows(shares, cu_seqlens, shape[0])
    inputs = LossConstants(
        token_ids.flatten().contiguous(),
        temperatures.flatten().contiguous(),
        mask.flatten().contiguous(),
        (mask * shares).flatten(),
        _flat_constant(old_logprobs, dtype),
        cast(Tensor, _flat_constant(advantages, dtype)),
        _flat_constant(ref_logprobs, dtype),
        _flat_constant(token_weights, dtype),
    )
    rows = logits.flatten(0, -2)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    total, terms = _PolicyLossFromLogits.apply(
        rows if rows.stride(-1) == 1 else rows.contiguous(), inputs, loss.options, with_gradient, backend
    )
    means = terms.sum(1) / mask.sum().clamp_min(1)
    return PolicyLoss(total, *means[1:].unbind())


def _flat_constant(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype).flatten().contiguous()
