"""Surprisal and entropy from hidden states: a chunk of logits at a time, in one buffer that is used again."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

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
)
from leafkernels._core.derivatives import refuse_forward_mode, refuse_second_derivative
from leafkernels._core.operation import operation
from leafkernels._core.precision import compute_dtype
from leafkernels._core.reference import from_reference
from leafkernels.vocabulary.chunks import (
    CHUNK_BYTES,
    ChunkedHead,
    HeadGradients,
    HeadOptions,
    HeadTensors,
    check_head,
    no_gradients,
    scaled_softcap,
)
from leafkernels.vocabulary.inputs import RowStatistics, SampledTokens, check_temperature, for_live_rows
from leafkernels.vocabulary.kept import add_head_gradients, gradient_of, head_logits, joined, statistics_of, with_states
from leafkernels.vocabulary.sampling_mask import Kept, SamplingMask, check_sampling_mask, kept_ids, lists_of
from leafkernels.vocabulary.slices import Slice, find_slice, join_states, merge_slices, whole_vocabulary
from leafkernels.vocabulary.statistics import (
    Likeliest,
    TokenStatistics,
    at_half,
    check_statistics,
    from_lists,
    known_ids,
    sum_of_squares,
)
from leafkernels.vocabulary.surprisal import SurprisalEntropy

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from leafkernels.vocabulary.inputs import VocabularyOptions


def _fold_chunks(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: SampledTokens,
    options: HeadOptions,
) -> RowStatistics:
    fold = implementation(backend, "surprisal").surprisal_entropy
    # A live row that no chunk reaches stays NaN.
    results = hidden.new_full((4, hidden.shape[0] + 1), torch.nan, dtype=compute_dtype(options.dtype))
    if tokens.mask is not None:
        results[:, :-1].masked_fill_(~tokens.mask, 0.0)
    more = tokens.with_one_more()
    with torch.autocast(hidden.device.type, enabled=False):
        head = ChunkedHead(hidden, weight, bias, tokens.mask, options)
        for rows in head.chunks():
            logits = head.logits(head.states(rows))
            results[:, rows] = torch.stack(fold(logits, *more.chunk(rows)))
    return RowStatistics(*(result.clone() for result in results[:, :-1]))


@operation(run=_fold_chunks)
def _linear_surprisal_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: SampledTokens,
    options: HeadOptions,
) -> RowStatistics:
    dtype = compute_dtype(options.dtype)
    return RowStatistics(*(hidden.new_empty((hidden.shape[0],), dtype=dtype) for _ in RowStatistics._fields))


def _states_of_slices(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: SampledTokens,
    options: HeadOptions,
    likeliest: Likeliest | None = None,
) -> tuple[Tensor, Tensor]:
    """``surprisal_states`` of rows of whose logits the head makes a slice, one state of each.

    The largest logits go into ``likeliest``, which has one row more.
    """
    fold = implementation(backend, "surprisal").surprisal_states
    size, widest = hidden.shape[0] + 1, compute_dtype(options.dtype)
    # A row that no chunk reaches has an empty state, which is merged to NaN.
    states = hidden.new_zeros((3, size, 1), dtype=widest)
    states[0], states[1] = torch.finfo(widest).min, -1.0
    picked = hidden.new_full((size,), torch.nan, dtype=widest)
    more = tokens.with_one_more()
    head = ChunkedHead(hidden, weight, bias, tokens.mask, options)
    for rows in head.chunks():
        chunk = more.chunk(rows)
        logits = head.logits(head.states(rows))
        chunk_states, picked[rows] = fold(logits, *chunk)
        states[:, rows] = join_states(chunk_states, chunk.temperature)
        if likeliest is not None:
            for numbers, of_chunk in zip(likeliest, Likeliest.of(logits), strict=True):
                numbers[rows] = of_chunk.to(numbers.dtype)
    return states[:, :-1], picked[:-1]


class HalfStates(NamedTuple):
    """Of each row at half its temperature a state (3, N, 1), and the largest logit and its id."""

    states: Tensor
    logits: Tensor
    ids: Tensor


def _states_and_likeliest(
    backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: SampledTokens, options: HeadOptions
) -> HalfStates:
    likeliest = Likeliest.none(hidden.new_empty(0, dtype=compute_dtype(options.dtype)), hidden.shape[0] + 1)
    with torch.autocast(hidden.device.type, enabled=False):
        states, _ = _states_of_slices(backend, hidden, weight, bias, tokens, options, likeliest)
    return HalfStates(states.clone(), *(numbers[:-1].clone() for numbers in likeliest))


@operation(run=_states_and_likeliest)
def _linear_states(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: SampledTokens,
    options: HeadOptions,
) -> HalfStates:
    num_rows, dtype = hidden.shape[0], compute_dtype(options.dtype)
    logits, ids = (hidden.new_empty((num_rows,), dtype=kind) for kind in (dtype, torch.int64))
    return HalfStates(hidden.new_empty((3, num_rows, 1), dtype=dtype), logits, ids)


@operation("surprisal")
def _merge_surprisal_states(states: Tensor, picked: Tensor, temperature: Tensor, mask: Tensor | None) -> RowStatistics:
    return RowStatistics(*(picked.new_empty(picked.shape) for _ in RowStatistics._fields))


def _more_statistics(
    wanted: Sequence[str],
    statistics: RowStatistics,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: SampledTokens,
    options: HeadOptions,
    kept: Kept | None,
    live: Tensor | None,
    own: Slice | None,
    backend: str,
    vocab_group: "dist.ProcessGroup | None",
) -> dict[str, Tensor]:
    """Those of ``wanted``, (N,) each: from the products once more, at half the temperature.

    The id whose surprisal comes beside them is the likeliest: nobody looks at it.
    """
    log_total = statistics.log_total
    found = {"top_logprobs": 0.0 - log_total}
    if not {"sum_squares", "top_ids"} & set(wanted):
        return {name: found[name] for name in wanted}
    half = at_half(tokens)
    states, picked, ids = _linear_states(backend, hidden, weight, bias, half, options)
    likeliest, of_kept = Likeliest(picked, ids), None
    if kept is not None and tokens.mask is not None:
        values = head_logits(backend, hidden.to(options.dtype), weight, bias, kept, options.softcap)
        of_kept = statistics_of(backend, values, kept, half.temperature)
        likeliest = likeliest.with_kept(values, kept, tokens.mask)
    if own is None or vocab_group is None:
        squared = _merge_surprisal_states(backend, states, picked, half.temperature, tokens.mask)
        squared = squared if of_kept is None else joined(squared, of_kept)
    else:
        if of_kept is not None and kept is not None:
            states, picked = with_states(states, picked, of_kept, values, kept, half.temperature)
        with torch.cuda.device_of(hidden):
            squared = merge_slices(states, picked, half.temperature, live, backend, vocab_group)
        likeliest = likeliest.of_ranks(statistics.top, own, vocab_group)
    found["sum_squares"] = sum_of_squares(log_total, squared.log_total, live)
    found["top_ids"] = known_ids(likeliest.ids, log_total, live)
    return {name: found[name] for name in wanted}


def _backward_in_chunks(
    backend: str,
    grad_surprisal: Tensor,
    grad_entropy: Tensor | None,
    statistics: RowStatistics,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: SampledTokens,
    options: HeadOptions,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    write_gradients = implementation(backend, "surprisal").write_gradients
    grad_surprisal, more = pad(grad_surprisal, (0, 1)), tokens.with_one_more()
    grad_entropy = None if grad_entropy is None else pad(grad_entropy, (0, 1))
    statistics = RowStatistics(*(pad(numbers, (0, 1)) for numbers in statistics))
    with torch.autocast(hidden.device.type, enabled=False):
        head = ChunkedHead(hidden, weight, bias, tokens.mask, options)
        gradients = HeadGradients(head, HeadTensors(hidden, weight, bias), needs)
        for rows in head.chunks():
            states = head.states(rows)
            logits = head.logits(states)
            write_gradients(
                logits,
                logits,
                grad_surprisal[rows],
                None if grad_entropy is None else grad_entropy[rows],
                RowStatistics(*(numbers[rows] for numbers in statistics)),
                more.chunk(rows),
                options.softcap,
            )
            gradients.add(rows, states)
    return gradients.results()


@operation(run=_backward_in_chunks)
def _linear_surprisal_entropy_backward(
    grad_surprisal: Tensor,
    grad_entropy: Tensor | None,
    statistics: RowStatistics,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: SampledTokens,
    options: HeadOptions,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each empty where it is not needed."""
    return no_gradients(HeadTensors(hidden, weight, bias), needs)


class _LinearSurprisalEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: SampledTokens,
        kept: Kept | None,
        live: Tensor | None,
        options: HeadOptions,
        backend: str,
        vocab_group: "dist.ProcessGroup | None",
    ) -> RowStatistics:
        arguments = (backend, hidden, weight, bias, tokens, options)
        saved: tuple[Tensor, ...] = ()
        of_kept = None
        if kept is not None:
            values = head_logits(backend, hidden.to(options.dtype), weight, bias, kept, options.softcap)
            of_kept = statistics_of(backend, values, kept, tokens.temperature)
            saved = (values, *kept)
        if vocab_group is None:
            statistics = _linear_surprisal_entropy(*arguments)
            statistics = statistics if of_kept is None else joined(statistics, of_kept)
        else:
            with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
                states, picked = _states_of_slices(*arguments)
                if kept is not None and of_kept is not None:
                    states, picked = with_states(states, picked, of_kept, values, kept, tokens.temperature)
                statistics = merge_slices(states, picked, tokens.temperature, live, backend, vocab_group)
        ctx.save_for_backward(*statistics, hidden, weight, bias, *tokens, *saved)
        ctx.options, ctx.backend, ctx.vocab_group = options, backend, vocab_group
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics.top, statistics.log_total)
        return statistics

    @staticmethod
    def backward(
        ctx: Any, grad_surprisal: Tensor | None, grad_entropy: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_surprisal_entropy")
        surprisal, entropy, top, log_total, hidden, weight, bias, *rest = ctx.saved_tensors
        statistics, tokens, saved = (
            RowStatistics(surprisal, entropy, top, log_total),
            SampledTokens(*rest[:3]),
            rest[3:],
        )
        if grad_surprisal is None:
            grad_surprisal = torch.zeros_like(surprisal)
        needs = list(ctx.needs_input_grad[:3])
        head = (hidden, weight, bias, tokens, ctx.options)
        arguments = (ctx.backend, grad_surprisal, grad_entropy, statistics, *head, needs)
        if ctx.vocab_group is None:
            gradients = _linear_surprisal_entropy_backward(*arguments)
        else:
            with torch.cuda.device_of(grad_surprisal):
                gradients = _backward_in_chunks(*arguments)
        if saved:
            values, kept = saved[0], Kept(*saved[1:])
            grads = grad_surprisal, grad_entropy
            grad_values = gradient_of(ctx.backend, *grads, statistics, values, kept, tokens.temperature)
            states, softcap = hidden.to(ctx.options.dtype), ctx.options.softcap
            add_head_gradients(ctx.backend, gradients, grad_values, values, states, weight, kept, softcap, needs)
        if ctx.vocab_group is not None and needs[0]:
            dist.all_reduce(gradients[0], group=ctx.vocab_group)
        needed = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return *needed, None, None, None, None, None, None


def _by_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: SampledTokens,
    options: HeadOptions,
    vocab_group: "dist.ProcessGroup | None",
    sampling_mask: SamplingMask | None,
    wanted: Sequence[str] | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    import python_ref

    rows = tokens.live()
    ids, temperatures = tokens.token_ids[rows].tolist(), tokens.temperature[rows].tolist()
    constants: dict[str, Any] = {"temperature": temperatures, "logit_softcap": options.softcap}
    constants["sampling_mask"] = lists_of(sampling_mask, rows)

    def head(weight: Tensor, bias: Tensor | None) -> tuple[Any, slice, dict[str, Any]]:
        whole, own = whole_vocabulary(weight, 0, vocab_group)
        whole_bias = None if bias is None else whole_vocabulary(bias, 0, vocab_group)[0].tolist()
        return whole.tolist(), own, {"bias": whole_bias, **constants}

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        whole_weight, _, others = head(weight, bias)
        found = python_ref.linear_surprisal_entropy(hidden[rows].tolist(), whole_weight, ids, **others)
        return for_live_rows(found, rows, hidden)

    def gradient(
        grad_surprisal: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_surprisal_entropy")
        whole_weight, own, others = head(weight, bias)
        surprisal_grads, entropy_grads = (grad[rows].tolist() for grad in (grad_surprisal, grad_entropy))
        found = python_ref.linear_surprisal_entropy_backward(
            surprisal_grads, entropy_grads, hidden[rows].tolist(), whole_weight, ids, **others
        )
        grad_states, grad_weight, grad_bias = (torch.tensor(numbers, dtype=torch.float64) for numbers in found)
        grad_hidden = torch.zeros_like(hidden)
        grad_hidden[rows] = grad_states.reshape(len(rows), hidden.shape[1]).to(hidden)
        return (
            grad_hidden,
            grad_weight.reshape(len(whole_weight), weight.shape[1])[own],
            None if bias is None else grad_bias[own],
        )

    more: dict[str, Tensor] = {}
    if wanted:
        whole_weight, _, others = head(weight.detach(), None if bias is None else bias.detach())
        found = python_ref.linear_token_statistics(hidden[rows].tolist(), whole_weight, ids, **others)
        more = from_lists(found, rows, hidden)
    surprisal, entropy = from_reference("linear_surprisal_entropy", compute, gradient, hidden, weight, bias)
    return surprisal, entropy, {name: more[name] for name in wanted or ()}


@overload
def linear_surprisal_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    num_live: int | None = None,
    chunk_tokens: int | None = None,
    statistics: None = None,
    **options: "Unpack[VocabularyOptions]",
) -> SurprisalEntropy: ...
@overload
def linear_surprisal_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    num_live: int | None = None,
    chunk_tokens: int | None = None,
    statistics: Sequence[str],
    **options: "Unpack[VocabularyOptions]",
) -> TokenStatistics: ...
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
    sampling_mask: SamplingMask | None = None,
    vocab_group: "dist.ProcessGroup | None" = None,
    statistics: Sequence[str] | None = None,
    backend: str = "auto",
) -> SurprisalEntropy | TokenStatistics:
    """``surprisal_entropy`` of ``hidden @ lm_head_weight.T + bias``, without ever holding those logits.

    Works on a chunk of tokens at a time: their logits go into one buffer and are reduced; the backward pass recomputes
    them, writes their gradient over them, and adds it to the gradients of weight and bias, which are summed in
    float32. Masked tokens are left out before any product. Where the weight is frozen, as with LoRA, its
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
        num_live: number of unmasked tokens, or an upper bound; with more, the results are NaN. None counts them, which
            on a GPU waits for the device once a pass; a loop that builds its masks on the host has the number.
        chunk_tokens: tokens at a time; None: as many as take 960 MiB.
        sampling_mask: the ids that each token could have been, as in ``surprisal_entropy``. Of such tokens only the
            products with the kept rows of the head are made, both passes, summed in float32; nothing of the size of
            the vocabulary is, unless its gradient is. Tokens without kept ids take the whole vocabulary, and are
            counted once a pass, as None of ``num_live`` counts.
        vocab_group: the tensor-parallel ranks, if each has a slice of the head's rows: V is then the number of ids of
            this rank's; the slices follow each other in the order of the ranks and may differ in size, as
            ``chunk_tokens`` may, and all else is the same on every rank. So are the results. For one loss that every
            rank computes from them, each rank gets the gradients of its slice and the whole gradient of hidden, which
            the backward pass sums over the ranks, in hidden's dtype, as a column-parallel linear layer does: sum it
            nowhere else. Not for ``torch.compile(fullgraph=True)``.
        statistics: as in ``surprisal_entropy``; for any of the first two the products are made once more.
        backend: "auto", "triton", "torch" or "reference", for what follows the products.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
        >>> leafkernels.linear_surprisal_entropy(hidden, weight, torch.tensor([0, 2]))
        SurprisalEntropy(surprisal=tensor([1.0986, 0.4076]), entropy=tensor([1.0986, 0.8324]))
    """
    dtype, device = check_head(hidden, lm_head_weight, bias), hidden.device
    token_ids = check_integer("token_ids", token_ids)
    wanted = check_statistics(statistics)
    if token_ids.shape != hidden.shape[:-1]:
        raise ValueError(
            f"token_ids must have one entry for each row of hidden, shape {tuple(hidden.shape[:-1])}, "
            f"got shape {tuple(token_ids.shape)}"
        )
    check_device("token_ids", token_ids, "hidden", device)
    mask = check_mask(response_mask, "token_ids", token_ids.shape, device)
    softcap = scaled_softcap(logit_scale, logit_softcap)
    temperatures = check_temperature(temperature, token_ids, mask, logit_scale)
    if num_live is not None:
        check_count("num_live", num_live, 0)
    backend = resolve_backend(backend, device)
    check_kernel_dtype("hidden", dtype, backend)
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_BYTES // max(lm_head_weight.shape[0] * dtype.itemsize, 1))
    check_count("chunk_tokens", chunk_tokens, 1)

    refuse_forward_mode("linear_surprisal_entropy", hidden, lm_head_weight, bias)
    num_rows = token_ids.numel()
    ids = token_ids.reshape(num_rows).contiguous()
    if sampling_mask is not None:
        sampling_mask = check_sampling_mask(sampling_mask, num_rows, device)
    own = None if vocab_group is None else find_slice(ids, lm_head_weight.shape[0], vocab_group)
    if own is not None and backend != "reference":
        ids = ids.to(torch.int64) - own.first
    live = row_mask = None if mask is None else mask.reshape(num_rows).contiguous()
    kept = None
    if sampling_mask is not None and backend != "reference" and num_rows:
        kept, row_mask = kept_ids(sampling_mask, ids, lm_head_weight.shape[0], live, own)
        num_live = None  # of those that are left
    tokens = SampledTokens(ids, temperatures.reshape(num_rows).contiguous(), row_mask)
    options = HeadOptions(softcap, num_rows if row_mask is None else num_live, chunk_tokens, dtype)
    rows = hidden.reshape(num_rows, hidden.shape[-1])
    head = rows, lm_head_weight, bias, tokens
    if backend == "reference":
        surprisal, entropy, more = _by_reference(*head, options, vocab_group, sampling_mask, wanted)
    else:
        found = RowStatistics(*_LinearSurprisalEntropy.apply(*head, kept, live, options, backend, vocab_group))
        surprisal, entropy = found.surprisal, found.entropy
        more = {}
        if wanted:
            with torch.no_grad():
                more = _more_statistics(wanted, found, *head, options, kept, live, own, backend, vocab_group)
    shape = token_ids.shape
    if wanted is None:
        return SurprisalEntropy(surprisal.view(shape), entropy.view(shape))
    shaped = {name: numbers.view(shape) for name, numbers in more.items()}
    return TokenStatistics(surprisal.view(shape), entropy.view(shape), **shaped)
