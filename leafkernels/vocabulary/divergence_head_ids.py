"""The split at a few ids of the logits that a head makes: a chunk of them at a time, in a buffer that is used again."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.derivatives import refuse_second_derivative
from leafkernels._core.operation import operation
from leafkernels._core.precision import compute_dtype
from leafkernels.vocabulary.chunks import HeadGradients, HeadOptions, HeadTensors, no_gradients
from leafkernels.vocabulary.divergence_heads import (
    blank_results,
    chunks_of,
    make_head,
    with_one_more,
)
from leafkernels.vocabulary.divergence_ids import Split, split_rows, write_split_gradients


def _of(is_row: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    return None if is_row is None else is_row[rows]


def _split_of_head(
    backend: str,
    head: HeadTensors,
    ids: Tensor | None,
    k: int,
    temperature: Tensor,
    mask: Tensor | None,
    num_ids: int,
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, hidden, dtype = head.hidden.shape[0], head.hidden, compute_dtype(options.dtype)
    results = blank_results(hidden, num_rows, k + 4, mask, dtype)
    found_ids = torch.zeros((num_rows + 1, k), dtype=torch.int64, device=hidden.device)
    if ids is not None:
        found_ids[:-1] = ids
    temperature, is_row = with_one_more(temperature, mask)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, _, logits in chunks_of(make_head(head, mask, options, num_ids)):
            if ids is None:
                found_ids[rows] = logits.topk(k, 1).indices
            picked, *rest = split_rows(backend, logits, found_ids[rows], temperature[rows], _of(is_row, rows))
            results[:k, rows] = picked.T
            results[k:, rows] = torch.stack(rest)
    split = results[:, :-1]
    return found_ids[:-1].clone(), split[:k].T.contiguous(), *(numbers.clone() for numbers in split[k:])


@operation(run=_split_of_head)
def _linear_split(
    head: HeadTensors,
    ids: Tensor | None,
    k: int,
    temperature: Tensor,
    mask: Tensor | None,
    num_ids: int,
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, dtype = head.hidden, compute_dtype(options.dtype)
    classes = hidden.new_empty((hidden.shape[0], k), dtype=dtype)
    rest = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4))
    return classes.new_empty(classes.shape, dtype=torch.int64), classes, *rest  # type: ignore[return-value]


def _backward_of_split(
    backend: str,
    head: HeadTensors,
    ids: Tensor,
    split: Split,
    grad_picked: Tensor,
    grad_rest: Tensor,
    grad_rest_entropy: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    num_ids: int,
    options: HeadOptions,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_picked, ids, *columns = (pad(numbers, (0, 0, 0, 1)) for numbers in (grad_picked, ids, split.picked))
    split = Split(columns[0], *(pad(numbers, (0, 1)) for numbers in split[1:]))
    grad_rest, grad_rest_entropy = pad(grad_rest, (0, 1)), pad(grad_rest_entropy, (0, 1))
    temperature, is_row = with_one_more(temperature, mask)
    with torch.autocast(head.hidden.device.type, enabled=False):
        own = make_head(head, mask, options, num_ids)
        gradients = HeadGradients(own, head, needs)
        for rows, states, logits in chunks_of(own):
            write_split_gradients(
                backend,
                gradients.buffer[: logits.shape[0]],
                logits,
                ids[rows],
                Split(*(numbers[rows] for numbers in split)),
                (grad_picked[rows], grad_rest[rows], grad_rest_entropy[rows]),
                temperature[rows],
                _of(is_row, rows),
                options.softcap,
            )
            gradients.add(rows, states)
    return gradients.results()


@operation(run=_backward_of_split)
def _linear_split_backward(
    head: HeadTensors,
    ids: Tensor,
    split: Split,
    grad_picked: Tensor,
    grad_rest: Tensor,
    grad_rest_entropy: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    num_ids: int,
    options: HeadOptions,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return no_gradients(head, needs)


class LinearSplit(torch.autograd.Function):
    """``Split`` at given ids of the logits that a head makes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: Tensor,
        mask: Tensor | None,
        num_ids: int,
        options: HeadOptions,
        backend: str,
    ) -> tuple[Tensor, ...]:
        head = HeadTensors(hidden, weight, bias)
        split = linear_split(backend, head, ids, ids.shape[1], temperature, mask, num_ids, options)[1]
        ctx.save_for_backward(*head, ids, temperature, mask, *split)
        ctx.num_ids, ctx.options, ctx.backend = num_ids, options, backend
        ctx.mark_non_differentiable(split.rest_top, split.rest_total)
        return tuple(split)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_derivative("linear_divergence")
        hidden, weight, bias, ids, temperature, mask, *split = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        gradients = _linear_split_backward(
            ctx.backend,
            HeadTensors(hidden, weight, bias),
            ids,
            Split._make(split),
            grads[0],
            grads[1],
            grads[2],
            temperature,
            mask,
            ctx.num_ids,
            ctx.options,
            needs,
        )
        needed = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return *needed, *[None] * 6


def linear_split(
    backend: str,
    head: HeadTensors,
    ids: Tensor | None,
    k: int,
    temperature: Tensor,
    mask: Tensor | None,
    num_ids: int,
    options: HeadOptions,
) -> tuple[Tensor, Split]:
    """The split at ``ids``, or at the k most likely ones; and the ids. No gradient."""
    found, *split = _linear_split(backend, head, ids, k, temperature, mask, num_ids, options)
    return found, Split._make(split)
