"""Surprisal of sampled tokens and entropy of their distributions, in one pass over the logits."""

import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from leafkernels._core.backend import implementation, resolve_backend
from leafkernels._core.checks import (
    check_device,
    check_integer,
    check_kernel_dtype,
    check_mask,
    check_real,
)
from leafkernels._core.derivatives import refuse_forward_mode, refuse_second_derivative, refuse_second_pass
from leafkernels._core.ops import register
from leafkernels._core.precision import compute_dtype
from leafkernels.vocabulary.inputs import check_own_memory, check_temperature
from leafkernels.vocabulary.slices import ids_in_slice, merge_slices

_INPUTS = "Tensor logits, Tensor token_ids, Tensor temperature, Tensor? mask, str backend"


class SurprisalEntropy(NamedTuple):
    """Per-token surprisal and entropy in nats; 0 where the mask is False."""

    surprisal: Tensor
    """-log p of the token, shaped like ``token_ids``, float32 (float64 for float64 logits)."""
    entropy: Tensor
    """-sum p log p, likewise."""

    @property
    def logprobs(self) -> Tensor:
        """Log-probability of the token: minus the surprisal."""
        return -self.surprisal


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty((logits.shape[0],), dtype=compute_dtype(logits.dtype)) for _ in range(4))


_surprisal_entropy = register(f"surprisal_entropy({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", _fake)


def _backward_impl(surprisal_gradients: Tensor, *args: Any) -> Tensor:
    *arguments, softcap, backend = args
    logits = arguments[5]
    gradients = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    implementation(backend).surprisal_entropy_backward(gradients, surprisal_gradients, *arguments, softcap)
    return gradients


def _backward_fake(*args: Any) -> Tensor:
    logits = args[6]
    return logits.new_empty(logits.shape)


_BACKWARD = (
    "(Tensor surprisal_gradients, Tensor? entropy_gradients, Tensor surprisal, Tensor entropy, Tensor tops, "
    "Tensor log_totals, {logits}, Tensor token_ids, Tensor temperature, Tensor? mask, float? softcap, str backend) -> "
)
_surprisal_entropy_backward = register(
    f"surprisal_entropy_backward{_BACKWARD.format(logits='Tensor logits')}Tensor", _backward_fake, _backward_impl
)


def _backward_in_place_impl(surprisal_gradients: Tensor, *args: Any) -> None:
    *arguments, softcap, backend = args
    implementation(backend).surprisal_entropy_backward(arguments[5], surprisal_gradients, *arguments, softcap)


_surprisal_entropy_backward_ = register(
    f"surprisal_entropy_backward_{_BACKWARD.format(logits='Tensor(a!) logits')}()",
    lambda *_: None,
    _backward_in_place_impl,
)


def _of_rows(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    backend: str,
    vocab_group: "dist.ProcessGroup | None",
) -> tuple[Tensor, ...]:
    """Surprisal, entropy, top and log sum e^(x - top) of rows, of which the logits may be a slice."""
    if vocab_group is None:
        return _surprisal_entropy(logits, token_ids, temperature, mask, backend)
    with torch.cuda.device_of(logits):
        states, picked = implementation(backend).surprisal_states(logits, token_ids, temperature, mask)
        return merge_slices(states, picked, temperature, mask, backend, vocab_group)


class _SurprisalEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *arguments, backend, _, in_place = args
        surprisal, entropy, tops, log_totals = _of_rows(logits, *args[:-1])
        ctx.save_for_backward(surprisal, entropy, tops, log_totals, logits, *arguments)
        ctx.backend = backend
        # torch.compile plans the memory of what it compiles itself.
        ctx.given = weakref.ref(logits) if in_place and not torch.compiler.is_compiling() else None
        # A gradient that nobody asks for stays None, and the backward pass then leaves its terms out.
        ctx.set_materialize_grads(False)
        return surprisal, entropy

    @staticmethod
    def backward(ctx: Any, of_surprisal: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("surprisal_entropy")
        if ctx.given is not None:
            refuse_second_pass(ctx, "surprisal_entropy with inplace_backward=True")
        *of_rows, logits, token_ids, temperature, mask = ctx.saved_tensors
        if of_surprisal is None:
            of_surprisal = torch.zeros_like(of_rows[0])
        everything = (of_surprisal, of_entropy, *of_rows, logits, token_ids, temperature, mask, None, ctx.backend)
        # What a saved-tensor hook unpacked (offloaded, or computed again by a checkpoint) may be another's as well, and
        # autograd checks no version of it.
        if ctx.given is None or ctx.given() is not logits:
            return _surprisal_entropy_backward(*everything), *[None] * 6
        _surprisal_entropy_backward_(*everything)
        # Whoever else kept the logits for a backward pass is told by autograd.
        torch.autograd.graph.increment_version(logits)
        return logits, *[None] * 6


def surprisal_entropy(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    response_mask: Tensor | None = None,
    vocab_group: "dist.ProcessGroup | None" = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> SurprisalEntropy:
    """Surprisal of each sampled token and entropy of the distribution it was drawn from, from one read of the logits.

    With x = logits / temperature and p = softmax(x): surprisal = -log p[token], entropy = -sum p log p, in nats.
    Differentiable in the logits, once and in reverse mode, for any weights on both outputs; the gradient is a new
    tensor in their dtype, and the entropy's part of the work is left out where only the surprisal's is asked for.

    Nothing cancels: rows shifted by 1e4 lose no digit, and a row whose top logit leads by 60 has its entropy of 1e-25
    with a relative error of about 1e-6, where ``lse - E[x]`` gives 0 or noise. A banned id (-inf) adds nothing; sampled
    all the same, it has surprisal inf. A row that holds NaN or +inf, or -inf alone, gives NaN, for that row only. An id
    outside the vocabulary is not read and gives a surprisal of NaN, and NaN gradients where that surprisal counts.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64 (computed in float32, float64 for float64; the Triton
            backend takes no float64); rows may have any stride.
        token_ids: (...) integers of any dtype.
        temperature: positive; a float, or one for each row, shaped like ``token_ids``.
        response_mask: (...); rows where it is False are not read, give 0, and get zero gradient.
        vocab_group: the tensor-parallel ranks, if each has a slice of the vocabulary: V is then the number of ids of
            this rank's, the slices follow each other in the order of the ranks and may differ in size, and all else is
            the same on every rank. So are the results, and each rank gets the gradient of its slice, for one loss that
            every rank computes from them. No value is read back; not for ``torch.compile(fullgraph=True)``.
        inplace_backward: write the gradient over the logits, which saves their size in memory. They must be the result
            of a computation, or a view of such a result, with memory of its own for each entry: a leaf, a view of one
            and an expanded tensor are refused. What shares their memory (``logits.detach()``, the tensor they are a
            view of) holds the gradient afterwards; what autograd kept of them for another backward pass makes that one
            raise, and a second backward pass raises. Under saved-tensor hooks (checkpointing, offloading) and
            ``torch.compile`` the gradient is a new tensor.
        backend: "auto", "triton", "torch" or "reference".

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, 2.0, 3.0]])
        >>> leafkernels.surprisal_entropy(logits, torch.tensor([0, 2]))
        SurprisalEntropy(surprisal=tensor([0.6931, 0.4076]), entropy=tensor([0.6931, 0.8324]))
    """
    check_real("logits", logits)
    token_ids = check_integer("token_ids", token_ids)
    if logits.dim() == 0 or token_ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"token_ids must have one entry for each row of logits, shape {tuple(logits.shape[:-1])}, "
            f"got shape {tuple(token_ids.shape)}"
        )
    check_device("token_ids", token_ids, "logits", logits.device)
    mask = check_mask(response_mask, "token_ids", token_ids.shape, logits.device)
    temperatures = check_temperature(temperature, token_ids, mask)
    backend = resolve_backend(backend, logits.device)
    check_kernel_dtype("logits", logits.dtype, backend)

    num_rows, vocab_size = token_ids.numel(), logits.shape[-1]
    rows = logits.reshape(num_rows, vocab_size)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    ids = token_ids.reshape(num_rows).contiguous()  # reshape leaves the strides of what is 1-D
    if vocab_group is not None:
        ids = ids_in_slice(ids, vocab_size, vocab_group)
    arguments = (
        rows,
        ids,
        temperatures.reshape(num_rows).contiguous(),
        None if mask is None else mask.reshape(num_rows).contiguous(),
        backend,
        vocab_group,
    )
    refuse_forward_mode("surprisal_entropy", logits)
    if logits.requires_grad:
        if inplace_backward:
            check_own_memory("logits", logits)
        surprisal, entropy = _SurprisalEntropy.apply(*arguments, inplace_backward)
    else:
        surprisal, entropy, _, _ = _of_rows(*arguments)
    return SurprisalEntropy(surprisal.view(token_ids.shape), entropy.view(token_ids.shape))
