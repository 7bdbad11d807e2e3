"""``backend="reference"`` of the divergences: what ``python_ref`` finds for the rows that count."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leafkernels._core.derivatives import refuse_second_derivative
from leafkernels._core.precision import compute_dtype
from leafkernels._core.reference import from_reference
from leafkernels.vocabulary.chunks import HeadTensors
from leafkernels.vocabulary.slices import whole_vocabulary

Found = tuple[Tensor, Tensor, Tensor, Tensor]


def _rows_of(numbers: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int]]:
    rows = torch.arange(numbers.shape[0], device=numbers.device) if mask is None else mask.nonzero().squeeze(1)
    return numbers[rows], rows.tolist()


def _words(options: Any, temperature: Tensor, rows: list[int], teacher: Any, dtype: torch.dtype) -> dict[str, Any]:
    (kind, beta), top_k, tail, _ = options
    words = {"kind": kind, "beta": beta, "top_k": top_k, "tail": tail, "temperature": temperature[rows].tolist()}
    if teacher is not None:
        ids, logprobs = (numbers[rows].tolist() for numbers in teacher)
        words |= {"ids": ids, "logprobs": logprobs, "least_rest": torch.finfo(compute_dtype(dtype)).eps}
    return words


def _results(found: Any, rows: list[int], like: Tensor) -> Found:
    numbers = like.new_zeros((3, like.shape[0]), dtype=compute_dtype(like.dtype))
    numbers[:, rows] = torch.tensor(found[:3], dtype=numbers.dtype, device=like.device)
    agrees = torch.zeros(like.shape[0], dtype=torch.bool, device=like.device)
    agrees[rows] = torch.tensor(found[3], dtype=torch.bool, device=like.device)
    return numbers[0].clone(), numbers[1].clone(), numbers[2].clone(), agrees


def logits_by_reference(
    student: Tensor,
    teacher: Tensor | None,
    served: tuple[Tensor, Tensor] | None,
    temperature: Tensor,
    mask: Tensor | None,
    options: Any,
    vocab_group: "dist.ProcessGroup | None",
) -> Found:
    """Of rows of logits (N, V), or of those and (N, k) ids and log-probabilities."""
    import python_ref

    rows = _rows_of(student, mask)[1]
    words = _words(options, temperature, rows, served, student.dtype)
    others = None
    if teacher is not None:
        others = whole_vocabulary(teacher[:, : options.num_ids], 1, vocab_group)[0][rows].tolist()

    def compute(student: Tensor) -> Found:
        whole, _ = whole_vocabulary(student[:, : options.num_ids], 1, vocab_group)
        return _results(python_ref.divergence(whole[rows].tolist(), others, **words), rows, student)

    def gradient(grad_divergence: Tensor, grad_entropy: Tensor, _: Any, __: Any, student: Tensor) -> tuple[Tensor]:
        refuse_second_derivative("divergence")
        whole, own = whole_vocabulary(student[:, : options.num_ids], 1, vocab_group)
        grads = grad_divergence[rows].tolist(), grad_entropy[rows].tolist()
        found = python_ref.divergence_backward(grads[0], grads[1], whole[rows].tolist(), others, **words)
        gradients = torch.zeros_like(student)
        number = torch.tensor(found, dtype=torch.float64).reshape(len(rows), whole.shape[1])[:, own]
        gradients[rows, : options.num_ids] = number.to(student)
        return (gradients,)

    return from_reference("divergence", compute, gradient, student, constants=(2, 3))


def heads_by_reference(
    student: HeadTensors,
    teacher: HeadTensors | None,
    served: tuple[Tensor, Tensor] | None,
    scales: tuple[tuple[float, float | None], tuple[float, float | None]],
    temperature: Tensor,
    mask: Tensor | None,
    options: Any,
    vocab_group: "dist.ProcessGroup | None",
) -> Found:
    """Of what makes the logits; ``scales`` holds the scale and the softcap of each."""
    import python_ref

    rows = _rows_of(student.hidden, mask)[1]
    words = _words(options, temperature, rows, served, student.hidden.dtype)
    num_ids = options.num_ids

    def head(tensors: HeadTensors, scale: tuple[float, float | None]) -> tuple[Any, slice]:
        hidden, weight, bias = tensors
        whole, own = whole_vocabulary(weight[:num_ids], 0, vocab_group)
        biases = None if bias is None else whole_vocabulary(bias[:num_ids], 0, vocab_group)[0].tolist()
        return python_ref.Head(hidden[rows].tolist(), whole.tolist(), biases, *scale), own

    other = None if teacher is None else head(teacher, scales[1])[0]

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Found:
        own, _ = head(HeadTensors(hidden, weight, bias), scales[0])
        return _results(python_ref.linear_divergence(own, other, **words), rows, hidden)

    def gradient(
        grad_divergence: Tensor,
        grad_entropy: Tensor,
        _: Any,
        __: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_divergence")
        own, part = head(HeadTensors(hidden, weight, bias), scales[0])
        grads = grad_divergence[rows].tolist(), grad_entropy[rows].tolist()
        found = python_ref.linear_divergence_backward(grads[0], grads[1], own, other, **words)
        numbers = [torch.tensor(values, dtype=torch.float64, device=hidden.device) for values in found]
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        grad_hidden[rows] = numbers[0].reshape(len(rows), hidden.shape[1]).to(hidden)
        grad_weight[:num_ids] = numbers[1].reshape(-1, weight.shape[1])[part].to(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        if grad_bias is not None:
            grad_bias[:num_ids] = numbers[2][part].to(grad_bias)
        return grad_hidden, grad_weight, grad_bias

    return from_reference("linear_divergence", compute, gradient, *student, constants=(2, 3))
