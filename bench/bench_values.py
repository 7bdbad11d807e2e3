"""span_values: a table of prefix lengths for each prompt is read, five small tables for each row are written."""

from typing import Any

import torch
from torch import Tensor

import leafkernels
import python_ref
from bench.harness import Bench, Call, Prepare, compiled
from bench.rollouts import Batch, Shape
from leafkernels.credit.options import CreditOptions
from leafkernels.eager import nodes
from leafkernels.eager import values as values_of
from leafkernels.rows.find import build_layout

INPUTS = ("sampled",)


def arguments(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operations before it give: prefix lengths, boundaries, rewards, lengths."""
    boundaries = leafkernels.select_boundaries(
        batch.surprisal, num_boundaries=batch.shape.num_boundaries, backend="torch"
    )
    prefix_lengths = leafkernels.common_prefix_lengths(batch.token_ids, backend="torch")
    lengths = torch.full(batch.rewards.shape, batch.shape.tokens, device=batch.rewards.device)
    return prefix_lengths, boundaries, batch.rewards, lengths


def literal(batch: Batch) -> Call:
    prefix_lengths, boundaries, rewards, lengths = (tensor.tolist() for tensor in arguments(batch))
    positions = [[p for p in prompt_boundaries if p >= 0] for prompt_boundaries in boundaries]

    def call() -> list[list[list[python_ref.values.Span]]]:
        raw = [
            python_ref.span_values(*prompt_inputs)
            for prompt_inputs in zip(prefix_lengths, positions, rewards, lengths, strict=True)
        ]
        return python_ref.normalize_spans(raw, rewards)

    return call


def backend_of_package(backend: str) -> Prepare:
    def prepare(batch: Batch) -> Call:
        tensors = arguments(batch)
        return lambda: leafkernels.span_values(*tensors, backend=backend).values

    return prepare


def eager_compiled(batch: Batch) -> Call:
    """The PyTorch backend's own functions: the compiler sees into them, and the layout is made before."""
    prefix_lengths, boundaries, rewards, lengths = arguments(batch)
    nodes_of, values = compiled(nodes.nodes_of_prefix_lengths), compiled(values_of.span_values)
    table = prefix_lengths.flatten(0, 1)
    layout = build_layout(table, None, batch.shape.group, None)._replace(row_lengths=lengths.flatten())

    def call() -> Tensor:
        named = nodes_of(table, boundaries, layout)
        return values(rewards.flatten(), named, boundaries, layout, CreditOptions())[0].view(*rewards.shape, -1)

    return call


PREPARES = {
    "python_ref": literal,
    "torch": backend_of_package("torch"),
    "compile": eager_compiled,
    "triton": backend_of_package("triton"),
}


def gate(batch: Batch, result: Any) -> None:
    num_slots = batch.shape.num_boundaries + 1

    def table(spans_per_prompt: list) -> Tensor:
        rows = [[[value for _, _, value in spans] for spans in rows] for rows in spans_per_prompt]
        return torch.tensor([[row + [0.0] * (num_slots - len(row)) for row in rows] for rows in rows]).double()

    expected = table(literal(batch.sample)())
    result = table(result) if isinstance(result, list) else result
    torch.testing.assert_close(result[: len(expected)].cpu(), expected, rtol=1e-6, atol=1e-7)


def bytes_moved(batch: Batch) -> int:
    """Per row read group int32, a reward and a length, and written three float64 and two int32 per span."""
    shape = batch.shape
    bytes_per_row = shape.group * 4 + 4 + 8 + (shape.num_boundaries + 1) * (3 * 8 + 2 * 4)
    return shape.prompts * (shape.group * bytes_per_row + shape.num_boundaries * 4)


def test_span_values(shape: Shape, inputs: str, backend: str, bench: Bench) -> None:
    bench("span_values", shape, inputs, backend, PREPARES, gate, bytes_moved, tolerance=1e-9)
