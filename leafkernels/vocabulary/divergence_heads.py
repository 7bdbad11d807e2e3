"""Divergence of the logits that two heads make: a chunk of both at a time, in buffers that are used again."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.backend import implementation
from leafkernels._core.derivatives import refuse_second_derivative
from leafkernels._core.operation import operation
from leafkernels._core.precision import compute_dtype
from leafkernels.vocabulary.chunks import ChunkedHead, HeadGradients, HeadOptions, HeadTensors, no_gradients
from leafkernels.vocabulary.divergence_rows import DivergenceKind, Pair, PairStatistics, pair_statistics


class _Chunk(NamedTuple):
    rows: slice | Tensor
    states: Tensor
    logits: Tensor


def make_head(tensors: HeadTensors, mask: Tensor | None, options: HeadOptions, num_ids: int) -> ChunkedHead:
    hidden, weight, bias = tensors
    # Half-precision logits would be a noise of 1e-3 nats between two models that are near to each other.
    return ChunkedHead(hidden, weight[:num_ids], None if bias is None else bias[:num_ids], mask, options, wide=True)


def chunks_of(head: ChunkedHead) -> Iterator[_Chunk]:
    for rows in head.chunks():
        states = head.states(rows)
        yield _Chunk(rows, states, head.logits(states))


def with_one_more(temperature: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """With a last row that stands for none, for chunks whose rows may be fewer than was said; these alone are masked,
    since no others come."""
    is_row = None if mask is None else pad(torch.ones_like(mask), (0, 1))
    return pad(temperature, (0, 1), value=1.0), is_row


def _with_one_more(pair: Pair) -> Pair:
    temperature, is_row = with_one_more(pair.student_temperature, pair.mask)
    return Pair(temperature, with_one_more(pair.teacher_temperature, None)[0], is_row)


def blank_results(hidden: Tensor, num_rows: int, width: int, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(width, N + 1): 0 where no row counts, NaN where one does, until a chunk reaches it."""
    results = hidden.new_full((width, num_rows + 1), torch.nan, dtype=dtype)
    if mask is not None:
        results[:, :-1].masked_fill_(~mask, 0.0)
    return results


def fold_pairs(
    backend: str,
    student: HeadTensors,
    teacher: HeadTensors,
    pair: Pair,
    kind: DivergenceKind,
    num_ids: int,
    student_options: HeadOptions,
    teacher_options: HeadOptions,
    vocab_group: "dist.ProcessGroup | None" = None,
) -> PairStatistics:
    """``pair_statistics`` of the logits that two heads make."""
    hidden, width = student.hidden, len(PairStatistics._fields)
    results = blank_results(hidden, hidden.shape[0], width, pair.mask, compute_dtype(student_options.dtype))
    more = _with_one_more(pair)
    with torch.autocast(hidden.device.type, enabled=False):
        own = make_head(student, pair.mask, student_options, num_ids)
        other = make_head(teacher, pair.mask, teacher_options._replace(num_live=own.num_live), num_ids)
        for (rows, _, logits), (_, _, teacher_logits) in zip(chunks_of(own), chunks_of(other), strict=True):
            found = pair_statistics(backend, logits, teacher_logits, more.chunk(rows), kind, vocab_group)
            results[:, rows] = torch.stack([numbers.to(results.dtype) for numbers in found])
    found = PairStatistics(*(result.clone() for result in results[:, :-1]))
    return found._replace(top1_agrees=found.top1_agrees == 1)


@operation(run=fold_pairs)
def _linear_divergence(
    student: HeadTensors,
    teacher: HeadTensors,
    pair: Pair,
    kind: DivergenceKind,
    num_ids: int,
    student_options: HeadOptions,
    teacher_options: HeadOptions,
) -> PairStatistics:
    dtype = compute_dtype(student_options.dtype)
    kinds = (torch.bool if field == "top1_agrees" else dtype for field in PairStatistics._fields)
    return PairStatistics(*(student.hidden.new_empty((student.hidden.shape[0],), dtype=kind) for kind in kinds))


def _backward_of_pairs(
    backend: str,
    student: HeadTensors,
    teacher: HeadTensors,
    grad_divergence: Tensor,
    grad_entropy: Tensor | None,
    statistics: PairStatistics,
    pair: Pair,
    kind: DivergenceKind,
    num_ids: int,
    student_options: HeadOptions,
    teacher_options: HeadOptions,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    write_gradients = implementation(backend, "divergence").write_gradients
    more, grad_divergence = _with_one_more(pair), pad(grad_divergence, (0, 1))
    grad_entropy = None if grad_entropy is None else pad(grad_entropy, (0, 1))
    statistics = PairStatistics(*(pad(numbers, (0, 1)) for numbers in statistics))
    with torch.autocast(student.hidden.device.type, enabled=False):
        own = make_head(student, pair.mask, student_options, num_ids)
        other = make_head(teacher, pair.mask, teacher_options._replace(num_live=own.num_live), num_ids)
        gradients = HeadGradients(own, student, needs)
        for (rows, states, logits), (_, _, teacher_logits) in zip(chunks_of(own), chunks_of(other), strict=True):
            write_gradients(
                gradients.buffer[: logits.shape[0]],
                logits,
                teacher_logits,
                grad_divergence[rows],
                None if grad_entropy is None else grad_entropy[rows],
                PairStatistics(*(numbers[rows] for numbers in statistics)),
                more.chunk(rows),
                kind,
                student_options.softcap,
            )
            gradients.add(rows, states)
    return gradients.results()


@operation(run=_backward_of_pairs)
def _linear_divergence_backward(
    student: HeadTensors,
    teacher: HeadTensors,
    grad_divergence: Tensor,
    grad_entropy: Tensor | None,
    statistics: PairStatistics,
    pair: Pair,
    kind: DivergenceKind,
    num_ids: int,
    student_options: HeadOptions,
    teacher_options: HeadOptions,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the student's hidden, weight and bias, each empty where it is not needed."""
    return no_gradients(student, needs)


class LinearPairs(torch.autograd.Function):
    """Divergence, both entropies and whether the tops agree, of the logits that two heads make."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: HeadTensors,
        pair: Pair,
        kind: DivergenceKind,
        num_ids: int,
        options: tuple[HeadOptions, HeadOptions],
        backend: str,
        vocab_group: "dist.ProcessGroup | None",
    ) -> tuple[Tensor, ...]:
        student = HeadTensors(hidden, weight, bias)
        arguments = (backend, student, teacher, pair, kind, num_ids, *options)
        if vocab_group is None:
            statistics = _linear_divergence(*arguments)
        else:
            with torch.cuda.device_of(hidden):
                statistics = fold_pairs(*arguments, vocab_group)
        ctx.save_for_backward(*student, *teacher, *pair, *statistics)
        ctx.constants = kind, num_ids, *options
        ctx.backend, ctx.vocab_group = backend, vocab_group
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics.teacher_entropy, statistics.top1_agrees)
        return statistics[:4]

    @staticmethod
    def backward(ctx: Any, grad_divergence: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative("linear_divergence")
        saved = ctx.saved_tensors
        student, teacher = HeadTensors._make(saved[:3]), HeadTensors._make(saved[3:6])
        pair, statistics = Pair._make(saved[6:9]), PairStatistics._make(saved[9:])
        needs = list(ctx.needs_input_grad[:3])
        if grad_divergence is None:
            grad_divergence = torch.zeros_like(statistics.divergence)
        grads = grad_divergence, grad_entropy
        arguments = (ctx.backend, student, teacher, *grads, statistics, pair, *ctx.constants, needs)
        gradients = _linear_divergence_backward(*arguments)
        if ctx.vocab_group is not None and needs[0]:
            dist.all_reduce(gradients[0], group=ctx.vocab_group)
        needed = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return *needed, *[None] * 7
