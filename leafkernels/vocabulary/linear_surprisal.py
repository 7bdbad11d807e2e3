"""Surprisal and entropy from hidden states: a chunk of logits at a time, in one buffer that is used again."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.backend import implementation, resolve_backend
from leafkernels._core.checks import (
    check_count,
    check_device,
    check_integer,
    check_kernel_dtype,
    check_mask,
    check_positive,
    check_real,
)
from leafkernels._core.derivatives import refuse_forward_mode, refuse_second_derivative
from leafkernels._core.ops import register
from leafkernels._core.precision import compute_dtype
from leafkernels.vocabulary.inputs import check_temperature
from leafkernels.vocabulary.slices import ids_in_slice, join_states, merge_slices
from leafkernels.vocabulary.surprisal import SurprisalEntropy

# What a chunk's logits may take. Chunks must be long: after each, the float32 gradient of the weight is read and
# written once, which at 1,000 tokens moves as many bytes as one of the four matrix products takes time for.
_CHUNK_BYTES = 960 << 20

# Elements of a chunk's gradient that are widened to float32 at a time, where no matrix product does so itself.
_WIDENED = 1 << 22

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor temperature, Tensor? mask, float? softcap, "
    "SymInt? num_live, SymInt chunk, ScalarType dtype, str backend"
)


class _Head:
    """The chunks of live rows, and the logits of each in one buffer."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        softcap: float | None,
        num_live: int | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> None:
        self.hidden, self.mask, self.softcap, self.chunk, self.dtype = hidden, mask, softcap, chunk, dtype
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.num_rows = hidden.shape[0]
        if num_live is None:
            num_live = self.num_rows if mask is None else int(mask.sum())  # reads one number back from a device
        self.num_live = min(num_live, self.num_rows)
        self.buffer = hidden.new_empty((min(chunk, self.num_live), weight.shape[0]), dtype=dtype)

    def chunks(self) -> Iterator[slice | Tensor]:
        """Live rows in order; indices of ``num_rows`` stand for none, where fewer are live than was said."""
        if self.mask is None:
            yield from (slice(i, min(i + self.chunk, self.num_rows)) for i in range(0, self.num_rows, self.chunk))
        elif self.num_live:
            # Each live row goes to its rank; all others, and those that were not expected, after the last.
            ranks = (self.mask.cumsum(0) - 1).clamp_max_(self.num_live).masked_fill_(~self.mask, self.num_live)
            rows = torch.full((self.num_live + 1,), self.num_rows, device=self.mask.device)
            rows[ranks] = torch.arange(self.num_rows, device=self.mask.device)
            yield from rows[:-1].split(self.chunk)

    def states(self, rows: slice | Tensor) -> Tensor:
        """Hidden states of a chunk, 0 where there is no row."""
        if isinstance(rows, slice):
            return self.hidden[rows].to(self.dtype)
        taken = self.hidden[rows.clamp_max(self.num_rows - 1)].to(self.dtype)
        return taken.masked_fill_((rows == self.num_rows)[:, None], 0.0)

    def logits(self, states: Tensor) -> Tensor:
        """In the buffer, until the next chunk."""
        logits = self.buffer[: states.shape[0]]
        if self.bias is None:
            torch.mm(states, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, states, self.weight.T, out=logits)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def _impl(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, bias, token_ids, temperature, mask, softcap, num_live, chunk, dtype, backend = args
    num_rows = hidden.shape[0]
    if backend == "reference":
        return implementation(backend).linear_surprisal_entropy(
            hidden, weight, bias, token_ids, temperature, mask, softcap
        )
    module = implementation(backend)
    # A live row that no chunk reaches stays NaN.
    results = hidden.new_full((4, num_rows + 1), torch.nan, dtype=compute_dtype(dtype))
    if mask is not None:
        results[:, :-1].masked_fill_(~mask, 0.0)
    ids, temperatures = pad(token_ids, (0, 1)), pad(temperature, (0, 1), value=1.0)
    with torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, bias, mask, softcap, num_live, chunk, dtype)
        for rows in head.chunks():
            logits = head.logits(head.states(rows))
            of_chunk = module.surprisal_entropy(logits, ids[rows], temperatures[rows], None)
            results[:, rows] = torch.stack(of_chunk)
    return tuple(result.clone() for result in results[:, :-1])


def _fake(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dtype = compute_dtype(args[-2])
    return tuple(hidden.new_empty((hidden.shape[0],), dtype=dtype) for _ in range(4))


_linear_surprisal_entropy = register(
    f"linear_surprisal_entropy({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", _fake, _impl
)


def _of_rows(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Surprisal, entropy, top and log sum e^(x - top) of rows, of whose logits the head may make a slice."""
    *arguments, vocab_group = args
    if vocab_group is None:
        return _linear_surprisal_entropy(hidden, *arguments)
    weight, bias, token_ids, temperature, mask, softcap, num_live, chunk, dtype, backend = arguments
    module = implementation(backend)
    size, widest = hidden.shape[0] + 1, compute_dtype(dtype)
    # A row that no chunk reaches has an empty state, which is merged to NaN.
    states = hidden.new_zeros((3, size, 1), dtype=widest)
    states[0], states[1] = torch.finfo(widest).min, -1.0
    picked = hidden.new_full((size,), torch.nan, dtype=widest)
    ids, temperatures = pad(token_ids, (0, 1)), pad(temperature, (0, 1), value=1.0)
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, bias, mask, softcap, num_live, chunk, dtype)
        for rows in head.chunks():
            logits = head.logits(head.states(rows))
            of_chunk, picked[rows] = module.surprisal_states(logits, ids[rows], temperatures[rows], None)
            states[:, rows] = join_states(of_chunk, temperatures[rows])
        return merge_slices(states[:, :-1], picked[:-1], temperature, mask, backend, vocab_group)


def _backward_impl(of_surprisal: Tensor, of_entropy: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, hidden, weight, bias, token_ids, temperature, mask, softcap, _, _, _, backend, needs = args
    if backend == "reference":
        return implementation(backend).linear_surprisal_entropy_backward(
            of_surprisal, of_entropy, hidden, weight, bias, token_ids, temperature, mask, softcap, needs
        )
    return _backward_in_chunks(of_surprisal, of_entropy, *args)


def _backward_in_chunks(of_surprisal: Tensor, of_entropy: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *of_rows, hidden, weight, bias, token_ids, temperature, mask, softcap, num_live, chunk, dtype, backend, needs = args
    module = implementation(backend)
    widest = compute_dtype(dtype)
    of_hidden, of_weight, of_bias = _new_gradients(hidden, weight, bias, needs, widest)
    of_surprisal, *of_rows, ids = (pad(vector, (0, 1)) for vector in (of_surprisal, *of_rows, token_ids))
    of_entropy = None if of_entropy is None else pad(of_entropy, (0, 1))
    temperatures = pad(temperature, (0, 1), value=1.0)
    with torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, bias, mask, softcap, num_live, chunk, dtype)
        for rows in head.chunks():
            states = head.states(rows)
            logits = head.logits(states)
            module.surprisal_entropy_backward(
                logits,
                of_surprisal[rows],
                None if of_entropy is None else of_entropy[rows],
                *(vector[rows] for vector in of_rows),
                logits,
                ids[rows],
                temperatures[rows],
                None,
                softcap,
            )
            if needs[0]:
                of_hidden[rows] = (logits @ head.weight).to(of_hidden.dtype)
            if needs[1]:
                _add_product(of_weight, logits.T, states)
            if needs[2]:
                of_bias += logits.sum(0, dtype=widest)
    if needs[0]:
        of_hidden = of_hidden[:-1]
    return of_hidden, of_weight.to(weight.dtype), of_bias if bias is None else of_bias.to(bias.dtype)


def _new_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], dtype: torch.dtype
) -> list[Tensor]:
    """Of the hidden states, with one row more, and in ``dtype`` of weight and bias; empty where not needed."""
    shapes = (hidden.shape[0] + 1, hidden.shape[1]), weight.shape, weight.shape[:1]
    dtypes = hidden.dtype, dtype, dtype
    return [
        hidden.new_zeros(shape if needed else (0,), dtype=dtype)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    ]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with sums and ``total`` in float32 whatever ``a`` and ``b`` are."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # PyTorch 2.8 and later
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        wide = b.to(total.dtype)
        step = max(1, _WIDENED // max(a.shape[1], 1))
        for part, columns in zip(total.split(step), a.split(step), strict=True):
            part.addmm_(columns.to(total.dtype), wide)


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias, needs = args[6], args[7], args[8], args[-1]
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if needs[2] else (0,)),
    )


_linear_surprisal_entropy_backward = register(
    "linear_surprisal_entropy_backward(Tensor surprisal_gradients, Tensor? entropy_gradients, Tensor surprisal, "
    f"Tensor entropy, Tensor tops, Tensor log_totals, {_INPUTS}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    _backward_impl,
)


class _LinearSurprisalEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        surprisal, entropy, tops, log_totals = _of_rows(*args)
        ctx.save_for_backward(surprisal, entropy, tops, log_totals, *args[:6])
        ctx.options = args[6:]
        ctx.set_materialize_grads(False)
        return surprisal, entropy

    @staticmethod
    def backward(ctx: Any, of_surprisal: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_surprisal_entropy")
        saved = ctx.saved_tensors
        if of_surprisal is None:
            of_surprisal = torch.zeros_like(saved[0])
        needs = ctx.needs_input_grad[:3]
        *options, vocab_group = ctx.options
        arguments = (of_surprisal, of_entropy, *saved, *options, needs)
        if vocab_group is None:
            gradients = _linear_surprisal_entropy_backward(*arguments)
        else:
            with torch.cuda.device_of(of_surprisal):
                gradients = _backward_in_chunks(*arguments)
                if needs[0]:
                    dist.all_reduce(gradients[0], group=vocab_group)
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 9


def _dtype_of_products(tensor: Tensor) -> torch.dtype:
    """Its own, or autocast's, which leaves float64 alone."""
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return tensor.dtype
    return torch.get_autocast_dtype(tensor.device.type)


def linear_surprisal_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    response_mask: Tensor | None = None,
    num_live: int | None = None,
    chunk_tokens: int | None = None,
    vocab_group: "dist.ProcessGroup | None" = None,
    backend: str = "auto",
) -> SurprisalEntropy:
    """``surprisal_entropy`` of ``hidden @ lm_head_weight.T + bias``, without ever holding those logits.

    A chunk of tokens at a time: their logits go into one buffer, are folded, and are forgotten; the backward pass
    computes them again, writes their gradient over them, and adds it to the gradients of weight and bias, which are
    summed in float32. Masked tokens are left out before any product. Where the weight is frozen, as with LoRA, its
    gradient is not computed. Gradients flow to hidden, weight and bias, once and in reverse mode, for any weights
    on both outputs.

    Memory beside the results: the buffer; with a gradient of a half-precision weight, also its float32 sum. Under
    autocast the products run in autocast's dtype, those of float64 in float64, as in ``torch.nn.functional.linear``.

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64 (not with Triton): what the language-model head is given.
        lm_head_weight: (V, D), of the dtype of ``hidden``; under autocast, of any but float64 where that has any other.
        token_ids: (...) integers of any dtype.
        bias: (V,) or None.
        temperature: positive; a float, or one for each token, shaped like ``token_ids``.
        logit_scale: the logits are multiplied by it, before all else: Cohere's ``logit_scale``, 1 / Granite's
            ``logits_scaling``.
        logit_softcap: c: the logits are c tanh(logits / c) (Gemma 2, arXiv 2408.00118), before the temperature.
        response_mask: (...); tokens where it is False are not read, give 0, and get zero gradient.
        num_live: tokens that are unmasked, or a bound of them; more than that give NaN. None counts them, which on a
            GPU waits for the device once a pass; a loop that builds its masks on the host knows the number.
        chunk_tokens: tokens at a time; None: as many as take 960 MiB.
        vocab_group: the tensor-parallel ranks, if each has a slice of the head's rows: V is then the number of ids of
            this rank's; the slices follow each other in the order of the ranks and may differ in size, as
            ``chunk_tokens`` may, and all else is the same on every rank. So are the results. For one loss that every
            rank computes from them, each rank gets the gradients of its slice and the whole gradient of hidden, which
            the backward pass sums over the ranks, in hidden's dtype, as a column-parallel linear layer does: sum it
            nowhere else. Not for ``torch.compile(fullgraph=True)``.
        backend: "auto", "triton", "torch" or "reference", for what follows the products.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
        >>> leafkernels.linear_surprisal_entropy(hidden, weight, torch.tensor([0, 2]))
        SurprisalEntropy(surprisal=tensor([1.0986, 0.4076]), entropy=tensor([1.0986, 0.8324]))
    """
    check_real("hidden", hidden)
    device = hidden.device
    for name, parameter in (("lm_head_weight", lm_head_weight), ("bias", bias)):
        if parameter is not None:
            check_real(name, parameter)
            check_device(name, parameter, "hidden", device)
    token_ids = check_integer("token_ids", token_ids)
    if hidden.dim() == 0 or token_ids.shape != hidden.shape[:-1]:
        raise ValueError(
            f"token_ids must have one entry for each row of hidden, shape {tuple(hidden.shape[:-1])}, "
            f"got shape {tuple(token_ids.shape)}"
        )
    if lm_head_weight.dim() != 2 or lm_head_weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"lm_head_weight must have shape (vocabulary, {hidden.shape[-1]}), got shape {tuple(lm_head_weight.shape)}"
        )
    if bias is not None and bias.shape != lm_head_weight.shape[:1]:
        raise ValueError(
            f"bias must have one entry for each id, shape {tuple(lm_head_weight.shape[:1])}, "
            f"got shape {tuple(bias.shape)}"
        )
    check_device("token_ids", token_ids, "hidden", device)
    mask = check_mask(response_mask, "token_ids", token_ids.shape, device)
    check_positive("logit_scale", logit_scale)
    # c tanh(s x / c) / T = c/s tanh(x / (c/s)) / (T/s): a scale costs nothing.
    temperatures = check_temperature(temperature, token_ids, mask, logit_scale)
    if logit_softcap is not None:
        check_positive("logit_softcap", logit_softcap)
        logit_softcap = logit_softcap / logit_scale
        check_positive("logit_softcap / logit_scale", logit_softcap)
    if num_live is not None:
        check_count("num_live", num_live, 0)
    dtype = _dtype_of_products(hidden)
    for name, parameter in (("lm_head_weight", lm_head_weight), ("bias", bias)):
        if parameter is not None and _dtype_of_products(parameter) != dtype:
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {parameter.dtype}")
    backend = resolve_backend(backend, device)
    check_kernel_dtype("hidden", dtype, backend)
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_BYTES // max(lm_head_weight.shape[0] * dtype.itemsize, 1))
    check_count("chunk_tokens", chunk_tokens, 1)

    refuse_forward_mode("linear_surprisal_entropy", hidden, lm_head_weight, bias)
    num_rows = token_ids.numel()
    ids = token_ids.reshape(num_rows).contiguous()
    if vocab_group is not None:
        ids = ids_in_slice(ids, lm_head_weight.shape[0], vocab_group)
    arguments = (
        hidden.reshape(num_rows, hidden.shape[-1]),
        lm_head_weight,
        bias,
        ids,
        temperatures.reshape(num_rows).contiguous(),
        None if mask is None else mask.reshape(num_rows).contiguous(),
        None if logit_softcap is None else float(logit_softcap),
        num_rows if mask is None else num_live,
        chunk_tokens,
        dtype,
        backend,
        vocab_group,
    )
    surprisal, entropy = _LinearSurprisalEntropy.apply(*arguments)
    return SurprisalEntropy(surprisal.view(token_ids.shape), entropy.view(token_ids.shape))
