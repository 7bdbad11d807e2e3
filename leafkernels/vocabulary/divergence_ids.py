"""Divergences over a few ids of each row and, as one class, all others: a teacher's most likely ids.

Both distributions are brought to k + 1 classes, whose divergence is then that of any two rows. The class of all others
is summed without the k ids, which in a trained model hold nearly everything: 1 - sum p would leave noise.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.backend import implementation
from leafkernels._core.derivatives import refuse_second_derivative
from leafkernels._core.operation import operation
from leafkernels._core.precision import compute_dtype
from leafkernels.vocabulary.divergence_rows import DivergenceKind, Pair, divergence_of_rows
from leafkernels.vocabulary.inputs import RowStatistics, SampledTokens
from leafkernels.vocabulary.slices import join_states

# Logits that are copied at a time, bytes: an id's logit is taken out of its row by writing -inf over it.
_CHUNK_BYTES = 256 << 20

# What lies this far below the row's top, over the temperature, is banned.
_BANNED = -1e4


class Split(NamedTuple):
    """Logits of k ids of each row, and what the others sum up to: the k + 1 classes, and three numbers that are not
    differentiated. Logits of classes count from the row's largest, over the temperature. All 0 in masked rows."""

    picked: Tensor  # (N, k), -inf where an entry is missing
    rest: Tensor  # (N,) log of the others' sum, -inf where there are none
    rest_entropy: Tensor  # (N,) of the distribution among the others
    rest_top: Tensor  # (N,) the largest logit of the others, the least finite number where there are none
    rest_total: Tensor  # (N,) log of the others' sum, counted from that; 0 where there are none


def taken_out(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write -inf over the ids (n, k) of each row, of which those outside of the row are missing.

    Returns what stood there, -inf where an entry is missing; which are there; where to write, and what not to: an entry
    that is missing stands for the first that is there, so that all who write in one place write the same.
    """
    is_here = (ids >= 0) & (ids < logits.shape[1])
    first = is_here.to(torch.uint8).argmax(1, keepdim=True)
    at = torch.where(is_here, ids, ids.gather(1, first)).clamp(0, logits.shape[1] - 1)
    picked = logits.gather(1, at)
    no_id = ~is_here.gather(1, first)
    logits.scatter_(1, at, torch.where(no_id, picked, -torch.inf))
    return picked.masked_fill(~is_here, -torch.inf), is_here, at, first


def split_rows(backend: str, logits: Tensor, ids: Tensor, temperature: Tensor, mask: Tensor | None) -> Split:
    """Split ``logits`` (n, V), which are written over: they lose the ids (n, k)."""
    picked = taken_out(logits, ids)[0]
    no_ids = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    states, _ = implementation(backend, "surprisal").surprisal_states(logits, no_ids, temperature, mask)
    top, r, t = join_states(states, temperature).squeeze(2)
    picked = picked.to(top.dtype)
    scale = temperature.to(top.dtype).reciprocal()
    total = r.log1p()
    row_top = torch.maximum(top, picked.amax(1))
    classes, rest = (picked - row_top[:, None]) * scale[:, None], (top - row_top) * scale
    is_empty = (r < 0) | (rest <= _BANNED)
    split = Split(
        classes.masked_fill_(classes <= _BANNED, -torch.inf),
        (rest + total).masked_fill_(is_empty, -torch.inf),
        (total - t * scale / (1.0 + r)).masked_fill_(is_empty, 0.0),
        top,
        total.masked_fill(is_empty, 0.0),
    )
    if mask is None:
        return split
    return Split(*(numbers.masked_fill_(~(mask[:, None] if numbers.dim() == 2 else mask), 0.0) for numbers in split))


def write_split_gradients(
    backend: str,
    gradients: Tensor,
    logits: Tensor,
    ids: Tensor,
    split: Split,
    grads: tuple[Tensor, Tensor, Tensor],
    temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None = None,
) -> None:
    """Write the gradient of the logits into ``gradients``, which may be ``logits``; these are written over anyhow."""
    grad_picked, grad_rest, grad_rest_entropy = grads
    picked, is_here, at, first = taken_out(logits, ids)
    scale = temperature.to(split.rest.dtype).reciprocal()
    none = torch.full((logits.shape[0],), -1, dtype=torch.int64, device=logits.device)
    statistics = RowStatistics(torch.zeros_like(scale), *split[2:])
    # Others that are all banned have no share in a gradient.
    grad_rest = grad_rest.masked_fill(split.rest == -torch.inf, 0.0)
    # The gradient of the others' log-sum is that of a surprisal without its id.
    implementation(backend, "surprisal").write_gradients(
        gradients, logits, grad_rest, grad_rest_entropy, statistics, SampledTokens(none, temperature, mask), softcap
    )
    own = grad_picked * scale[:, None]
    if softcap is not None:
        own = own * (1.0 - (picked.to(own.dtype) / softcap).square())
    own = own.masked_fill(~is_here, 0.0)
    if mask is not None:
        own = own.masked_fill(~mask[:, None], 0.0)
    own = torch.where(is_here, own, own.gather(1, first)).to(gradients.dtype)
    no_id = ~is_here.gather(1, first)
    gradients.scatter_(1, at, torch.where(no_id, gradients.gather(1, at), own))


def _copies(logits: Tensor) -> Any:
    """Rows, a chunk at a time, and a copy of their logits."""
    step = max(1, _CHUNK_BYTES // max(logits.shape[1] * logits.element_size(), 1))
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        yield rows, logits[rows].clone(memory_format=torch.contiguous_format)


def _new_split(logits: Tensor, k: int) -> Split:
    num_rows, dtype = logits.shape[0], compute_dtype(logits.dtype)
    return Split(
        logits.new_empty((num_rows, k), dtype=dtype), *(logits.new_empty(num_rows, dtype=dtype) for _ in range(4))
    )


def _split_logits(backend: str, logits: Tensor, ids: Tensor, temperature: Tensor, mask: Tensor | None) -> Split:
    split = _new_split(logits, ids.shape[1])
    for rows, copy in _copies(logits):
        found = split_rows(backend, copy, ids[rows], temperature[rows], None if mask is None else mask[rows])
        for whole, part in zip(split, found, strict=True):
            whole[rows] = part
    return split


@operation(run=_split_logits)
def _split(logits: Tensor, ids: Tensor, temperature: Tensor, mask: Tensor | None) -> Split:
    return _new_split(logits, ids.shape[1])


def _split_logits_backward(
    backend: str,
    logits: Tensor,
    ids: Tensor,
    split: Split,
    grad_picked: Tensor,
    grad_rest: Tensor,
    grad_rest_entropy: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    width: int,
) -> Tensor:
    num_ids = logits.shape[1]
    gradients = torch.empty((logits.shape[0], width), dtype=logits.dtype, device=logits.device)
    gradients[:, num_ids:] = 0
    for rows, copy in _copies(logits):
        write_split_gradients(
            backend,
            gradients[rows, :num_ids],
            copy,
            ids[rows],
            Split(*(numbers[rows] for numbers in split)),
            (grad_picked[rows], grad_rest[rows], grad_rest_entropy[rows]),
            temperature[rows],
            None if mask is None else mask[rows],
        )
    return gradients


@operation(run=_split_logits_backward)
def _split_backward(
    logits: Tensor,
    ids: Tensor,
    split: Split,
    grad_picked: Tensor,
    grad_rest: Tensor,
    grad_rest_entropy: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    width: int,
) -> Tensor:
    return logits.new_empty((logits.shape[0], width))


class SplitLogits(torch.autograd.Function):
    """``Split`` of rows of logits at given ids, with a gradient for the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, temperature: Tensor, mask: Tensor | None, num_ids: int, backend: str
    ) -> tuple[Tensor, ...]:
        split = _split(backend, logits[:, :num_ids], ids, temperature, mask)
        ctx.save_for_backward(logits, ids, temperature, mask, *split)
        ctx.num_ids, ctx.backend = num_ids, backend
        ctx.mark_non_differentiable(split.rest_top, split.rest_total)
        return tuple(split)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_derivative("divergence")
        logits, ids, temperature, mask, *split = ctx.saved_tensors
        common, width = logits[:, : ctx.num_ids], logits.shape[1]
        others = (Split._make(split), *grads[:3], temperature, mask, width)
        gradient = _split_backward(ctx.backend, common, ids, *others)
        return gradient, None, None, None, None, None


def _top_of_logits(
    backend: str, logits: Tensor, k: int, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    split = _new_split(logits, k)
    ids = torch.empty(split.picked.shape, dtype=torch.int64, device=logits.device)
    for rows, copy in _copies(logits):
        ids[rows] = copy.topk(k, 1).indices
        found = split_rows(backend, copy, ids[rows], temperature[rows], None if mask is None else mask[rows])
        for whole, part in zip(split, found, strict=True):
            whole[rows] = part
    return ids, *split  # type: ignore[return-value]


@operation(run=_top_of_logits)
def _split_at_top(
    logits: Tensor, k: int, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    split = _new_split(logits, k)
    return split.picked.new_empty(split.picked.shape, dtype=torch.int64), *split  # type: ignore[return-value]


def top_of_logits(
    backend: str, logits: Tensor, k: int, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Split]:
    """The k most likely ids of each row (N, k), and the split at these."""
    ids, *split = _split_at_top(backend, logits, k, temperature, mask)
    return ids, Split._make(split)


def split_of_logprobs(ids: Tensor, logprobs: Tensor, dtype: torch.dtype) -> Split:
    """What log-probabilities (N, k) say, of which those of negative ids are missing: the others have what is left of 1.

    That is known to a rounding of 1, and no less is taken for them, so that no distribution is infinitely far away
    because of a rounding.
    """
    picked = logprobs.to(torch.float64).masked_fill(ids < 0, -torch.inf)
    least = math.log(torch.finfo(compute_dtype(dtype)).eps)
    rest = (-picked.exp().sum(1)).log1p().nan_to_num_(least, posinf=torch.inf, neginf=least).clamp_min_(least)
    rest = torch.where(picked.isnan().any(1), torch.nan, rest)
    zero = torch.zeros_like(rest)
    return Split(*(numbers.to(compute_dtype(dtype)) for numbers in (picked, rest, zero, zero, zero)))


def divergence_of_splits(
    student: Split,
    teacher: Split,
    mask: Tensor | None,
    kind: DivergenceKind,
    tail: bool,
    is_whole: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergence, both entropies, and whether the tops agree, of two rows that were split at the same ids.

    ``is_whole``: the teacher's others are told apart, so that its entropy is that of its whole vocabulary.
    """
    num_rows, k = student.picked.shape
    one = torch.ones(num_rows, dtype=torch.float64, device=student.picked.device)
    classes = [torch.cat((split.picked, split.rest[:, None]), 1) for split in (student, teacher)]
    pair = Pair(one, one, mask)
    found = divergence_of_rows(*classes, pair, kind, k + 1, backend)
    divergence, student_entropy, teacher_entropy, _ = found
    if not tail:
        given = (numbers[:, :k].contiguous() for numbers in classes)
        divergence, _, entropy_of_given, _ = divergence_of_rows(*given, pair, kind, k, backend)
        teacher_entropy = teacher_entropy if is_whole else entropy_of_given
    # The entropy of the whole is that of the classes, and what there is within the last.
    student_entropy = student_entropy + classes[0].softmax(1)[:, k] * student.rest_entropy
    if is_whole:
        teacher_entropy = teacher_entropy + classes[1].softmax(1)[:, k] * teacher.rest_entropy
    agrees = _tops_agree(student, teacher) & ~divergence.isnan()
    return divergence, student_entropy, teacher_entropy, agrees if mask is None else agrees & mask


def _tops_agree(student: Split, teacher: Split) -> Tensor:
    """Whether the student's likeliest id of all is one of those that are the teacher's."""
    is_top = (student.picked == 0) & (teacher.picked == teacher.picked.amax(1, keepdim=True))
    return (is_top & (teacher.picked > -torch.inf)).any(1)
