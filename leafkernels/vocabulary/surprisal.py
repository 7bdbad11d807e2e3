"""Surprisal of sampled tokens and entropy of their distributions, in one pass over the logits."""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

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
from leafkernels._core.operation import operation
from leafkernels._core.precision import compute_dtype
from leafkernels._core.reference import from_reference
from leafkernels.vocabulary.inputs import (
    RowStatistics,
    SampledTokens,
    check_own_memory,
    check_temperature,
    for_live_rows,
)
from leafkernels.vocabulary.kept import add_logit_gradient, gradient_of, joined, kept_logits, statistics_of, with_states
from leafkernels.vocabulary.sampling_mask import Kept, SamplingMask, check_sampling_mask, kept_ids, lists_of
from leafkernels.vocabulary.slices import Slice, find_slice, merge_slices, whole_vocabulary
from leafkernels.vocabulary.statistics import (
    Likeliest,
    TokenStatistics,
    at_half,
    check_statistics,
    from_lists,
    known_ids,
    sum_of_squares,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from leafkernels.vocabulary.inputs import VocabularyOptions


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


@operation("surprisal")
def _surprisal_entropy(logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None) -> RowStatistics:
    dtype = compute_dtype(logits.dtype)
    return RowStatistics(*(logits.new_empty((logits.shape[0],), dtype=dtype) for _ in RowStatistics._fields))


def _written_anew(backend: str, logits: Tensor, *others: Any) -> Tensor:
    gradients = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    implementation(backend, "surprisal").write_gradients(gradients, logits, *others)
    return gradients


def _written_over(backend: str, logits: Tensor, *others: Any) -> None:
    implementation(backend, "surprisal").write_gradients(logits, logits, *others)


@operation(run=_written_anew)
def _surprisal_entropy_backward(
    logits: Tensor,
    grad_surprisal: Tensor,
    grad_entropy: Tensor | None,
    statistics: RowStatistics,
    tokens: SampledTokens,
) -> Tensor:
    return logits.new_empty(logits.shape)


@operation(run=_written_over, mutates=("logits",))
def _surprisal_entropy_backward_(
    logits: Tensor,
    grad_surprisal: Tensor,
    grad_entropy: Tensor | None,
    statistics: RowStatistics,
    tokens: SampledTokens,
) -> None: ...


def _statistics(
    logits: Tensor,
    tokens: SampledTokens,
    kept: Kept | None,
    live: Tensor | None,
    backend: str,
    vocab_group: "dist.ProcessGroup | None",
) -> RowStatistics:
    """Of rows of which the logits may be a slice: those of ``tokens``, and beside them those of ``kept``."""
    if kept is not None:
        values = kept_logits(logits, kept)
        of_kept = statistics_of(backend, values, kept, tokens.temperature)
    if vocab_group is None:
        statistics = _surprisal_entropy(backend, logits, *tokens)
        return statistics if kept is None else joined(statistics, of_kept)
    with torch.cuda.device_of(logits):
        states, picked = implementation(backend, "surprisal").surprisal_states(logits, *tokens)
        if kept is not None:
            states, picked = with_states(states, picked, of_kept, values, kept, tokens.temperature)
        return merge_slices(states, picked, tokens.temperature, live, backend, vocab_group)


class _SurprisalEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: SampledTokens,
        kept: Kept | None,
        live: Tensor | None,
        backend: str,
        vocab_group: "dist.ProcessGroup | None",
        in_place: bool,
    ) -> RowStatistics:
        statistics = _statistics(logits, tokens, kept, live, backend, vocab_group)
        ctx.save_for_backward(logits, *statistics, *tokens, *(kept or ()))
        ctx.backend = backend
        # torch.compile plans the memory of what it compiles itself.
        ctx.given = weakref.ref(logits) if in_place and not torch.compiler.is_compiling() else None
        # A gradient that nobody asks for stays None, and the backward pass then leaves its terms out.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics.top, statistics.log_total)
        return statistics

    @staticmethod
    def backward(
        ctx: Any, grad_surprisal: Tensor | None, grad_entropy: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("surprisal_entropy")
        if ctx.given is not None:
            refuse_second_pass(ctx, "surprisal_entropy with inplace_backward=True")
        logits, surprisal, entropy, top, log_total, *rest = ctx.saved_tensors
        if grad_surprisal is None:
            grad_surprisal = torch.zeros_like(surprisal)
        statistics, tokens = RowStatistics(surprisal, entropy, top, log_total), SampledTokens(*rest[:3])
        kept = Kept(*rest[3:]) if rest[3:] else None
        arguments = (ctx.backend, logits, grad_surprisal, grad_entropy, statistics, tokens)
        if kept is not None:
            # Before the gradient of the other rows is written, with zeros in these, perhaps over the logits.
            values = kept_logits(logits, kept)
            gradients = (grad_surprisal, grad_entropy)
            grad_values = gradient_of(ctx.backend, *gradients, statistics, values, kept, tokens.temperature)
        # What a saved-tensor hook unpacked (offloaded, or computed again by a checkpoint) may be another's as well, and
        # autograd checks no version of it.
        if ctx.given is None or ctx.given() is not logits:
            grad_logits = _surprisal_entropy_backward(*arguments)
            if kept is not None:
                add_logit_gradient(grad_logits, grad_values, kept)
            return grad_logits, None, None, None, None, None, None
        _surprisal_entropy_backward_(*arguments)
        if kept is not None:
            with torch.no_grad():
                add_logit_gradient(logits.detach(), grad_values, kept)
        # Autograd then refuses every other backward pass that kept the logits.
        torch.autograd.graph.increment_version(logits)
        return logits, None, None, None, None, None, None


def _more_statistics(
    wanted: Sequence[str],
    statistics: RowStatistics,
    logits: Tensor,
    tokens: SampledTokens,
    kept: Kept | None,
    live: Tensor | None,
    own: Slice | None,
    backend: str,
    vocab_group: "dist.ProcessGroup | None",
) -> dict[str, Tensor]:
    """Those of ``wanted``, (N,) each; rows as in ``_statistics``."""
    log_total = statistics.log_total
    found = {"top_logprobs": 0.0 - log_total}
    if "sum_squares" in wanted:
        squared = _statistics(logits, at_half(tokens), kept, live, backend, vocab_group)
        found["sum_squares"] = sum_of_squares(log_total, squared.log_total, live)
    if "top_ids" in wanted:
        likeliest = Likeliest.of(logits)
        if kept is not None and tokens.mask is not None:
            likeliest = likeliest.with_kept(kept_logits(logits, kept), kept, tokens.mask)
        if own is not None and vocab_group is not None:
            likeliest = likeliest.of_ranks(statistics.top, own, vocab_group)
        found["top_ids"] = known_ids(likeliest.ids, log_total, live)
    return {name: found[name] for name in wanted}


def _by_reference(
    logits: Tensor,
    tokens: SampledTokens,
    vocab_group: "dist.ProcessGroup | None",
    in_place: bool,
    sampling_mask: SamplingMask | None,
    wanted: Sequence[str] | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    import python_ref

    rows = tokens.live()
    ids = tokens.token_ids[rows].tolist()
    options: dict[str, Any] = {
        "temperature": tokens.temperature[rows].tolist(),
        "sampling_mask": lists_of(sampling_mask, rows),
    }

    def compute(logits: Tensor) -> tuple[Tensor, Tensor]:
        whole, _ = whole_vocabulary(logits, 1, vocab_group)
        found = python_ref.surprisal_entropy(whole[rows].tolist(), ids, **options)
        return for_live_rows(found, rows, logits)

    def gradient(grad_surprisal: Tensor, grad_entropy: Tensor, logits: Tensor) -> tuple[Tensor]:
        refuse_second_derivative("surprisal_entropy")
        whole, own = whole_vocabulary(logits, 1, vocab_group)
        surprisal_grads, entropy_grads = (grad[rows].tolist() for grad in (grad_surprisal, grad_entropy))
        found = python_ref.surprisal_entropy_backward(
            surprisal_grads, entropy_grads, whole[rows].tolist(), ids, **options
        )
        gradients = logits if in_place else torch.empty_like(logits)
        gradients.zero_()
        gradients[rows] = torch.tensor(found, dtype=torch.float64).reshape(len(rows), whole.shape[1])[:, own].to(logits)
        return (gradients,)

    more: dict[str, Tensor] = {}
    if wanted:
        whole, _ = whole_vocabulary(logits.detach(), 1, vocab_group)
        more = from_lists(python_ref.token_statistics(whole[rows].tolist(), ids, **options), rows, logits)
    once = "surprisal_entropy with inplace_backward=True" if in_place else ""
    surprisal, entropy = from_reference("surprisal_entropy", compute, gradient, logits, once=once)
    return surprisal, entropy, {name: more[name] for name in wanted or ()}


@overload
def surprisal_entropy(
    logits: Tensor,
    token_ids: Tensor,
    *,
    statistics: None = None,
    inplace_backward: bool = False,
    **options: "Unpack[VocabularyOptions]",
) -> SurprisalEntropy: ...
@overload
def surprisal_entropy(
    logits: Tensor,
    token_ids: Tensor,
    *,
    statistics: Sequence[str],
    inplace_backward: bool = False,
    **options: "Unpack[VocabularyOptions]",
) -> TokenStatistics: ...
def surprisal_entropy(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    response_mask: Tensor | None = None,
    sampling_mask: SamplingMask | None = None,
    vocab_group: "dist.ProcessGroup | None" = None,
    inplace_backward: bool = False,
    statistics: Sequence[str] | None = None,
    backend: str = "auto",
) -> SurprisalEntropy | TokenStatistics:
    """Surprisal of each sampled token and entropy of the distribution it was drawn from, from one read of the logits.

    With x = logits / temperature and p = softmax(x): surprisal = -log p[token], entropy = -sum p log p, in nats.
    Differentiable in the logits, once and in reverse mode, for any weights on both outputs; the gradient is a new
    tensor in their dtype, and the entropy's share of the work is skipped where only the surprisal's gradient is asked
    for.

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
        sampling_mask: the ids that each token could have been, where top-p, top-k or min-p truncated what it was drawn
            from: the distribution is that over these, as if all other logits were -inf, whose gradient is 0. Of such
            rows only the kept logits are read. The rows are those of ``token_ids``, flattened; the ids those of the
            whole vocabulary, also with ``vocab_group``.
        vocab_group: the tensor-parallel ranks, if each has a slice of the vocabulary: V is then the number of ids of
            this rank's, the slices follow each other in the order of the ranks and may differ in size, and all else is
            the same on every rank. So are the results, and each rank gets the gradient of its slice, for one loss that
            every rank computes from them. No value is read back; not for ``torch.compile(fullgraph=True)``.
        inplace_backward: write the gradient over the logits, which saves their size in memory. They must be the result
            of a computation, or a view of such a result, with memory of its own for each entry: a leaf, a view of one
            and an expanded tensor are refused. Tensors that share their memory (``logits.detach()``, the tensor they
            are a view of) hold the gradient afterwards; another backward pass for which autograd saved them raises,
            and so does a second backward pass. Under saved-tensor hooks (checkpointing, offloading) and
            ``torch.compile`` the gradient is a new tensor.
        statistics: names of more numbers of each row's distribution p, which are then fields of the result,
            ``TokenStatistics``: "sum_squares", sum p^2, to some 1e-6 of it; "top_ids", the likeliest id; and
            "top_logprobs", its log p. They are constants to autograd. Each of the first two reads the logits once more.
        backend: "auto", "triton", "torch" or "reference".

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, 2.0, 3.0]])
        >>> leafkernels.surprisal_entropy(logits, torch.tensor([0, 2]))
        SurprisalEntropy(surprisal=tensor([0.6931, 0.4076]), entropy=tensor([0.6931, 0.8324]))
    """
    check_real("logits", logits)
    token_ids = check_integer("token_ids", token_ids)
    wanted = check_statistics(statistics)
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
    refuse_forward_mode("surprisal_entropy", logits)
    if inplace_backward and logits.requires_grad:
        check_own_memory("logits", logits)
    if sampling_mask is not None:
        sampling_mask = check_sampling_mask(sampling_mask, num_rows, logits.device)
    own = None if vocab_group is None else find_slice(ids, vocab_size, vocab_group)
    if own is not None and backend != "reference":
        ids = ids.to(torch.int64) - own.first
    live = row_mask = None if mask is None else mask.reshape(num_rows).contiguous()
    kept = None
    if sampling_mask is not None and backend != "reference" and num_rows:
        kept, row_mask = kept_ids(sampling_mask, ids, vocab_size, live, own)
    tokens = SampledTokens(ids, temperatures.reshape(num_rows).contiguous(), row_mask)
    if backend == "reference":
        options = vocab_group, inplace_backward, sampling_mask, wanted
        surprisal, entropy, more = _by_reference(rows, tokens, *options)
    else:
        others = kept, live, backend, vocab_group
        if logits.requires_grad:
            found = RowStatistics(*_SurprisalEntropy.apply(rows, tokens, *others, inplace_backward))
        else:
            found = _statistics(rows, tokens, *others)
        surprisal, entropy = found.surprisal, found.entropy
        more = {}
        if wanted:
            with torch.no_grad():
                call = rows, tokens, kept, live, own, backend, vocab_group
                more = _more_statistics(wanted, found, *call)
    shape = token_ids.shape
    if wanted is None:
        return SurprisalEntropy(surprisal.view(shape), entropy.view(shape))
    shaped = {name: numbers.view(shape) for name, numbers in more.items()}
    return TokenStatistics(surprisal.view(shape), entropy.view(shape), **shaped)
