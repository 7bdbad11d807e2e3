"""scatter_spans: one value per token is written; what is read is small."""

from typing import Any

import torch
from torch import Tensor

import leafkernels
import python_ref
from bench.harness import Bench, Call, Prepare, compiled
from bench.rollouts import Batch, Shape
from leafkernels.eager import scatter
from leafkernels.rows.find import build_layout
from leafkernels.rows.layout import as_rows

INPUTS = ("sampled", "ragged")


def spans(batch: Batch) -> tuple[Tensor, Tensor]:
    """Values and ends of the spans that ``span_advantages`` spreads over the tokens, as float32 like its result."""
    tree = leafkernels.span_tree(
        batch.logprobs,
        batch.token_ids,
        batch.rewards,
        response_mask=batch.mask,
        num_boundaries=batch.shape.num_boundaries,
        backend="torch",
    )
    return tree.spans.values.float(), tree.spans.span_ends


def literal(batch: Batch) -> Call:
    values, ends = (tensor.flatten(0, 1).tolist() for tensor in spans(batch))
    mask = batch.lists.mask
    return lambda: python_ref.scatter_spans(values, ends, mask)


def backend_of_package(backend: str) -> Prepare:
    def prepare(batch: Batch) -> Call:
        values, ends = spans(batch)
        return lambda: leafkernels.scatter_spans(
            values, ends, batch.shape.tokens, response_mask=batch.mask, backend=backend
        )

    return prepare


def eager_compiled(batch: Batch) -> Call:
    """The PyTorch backend's own function: the compiler sees into it, and the layout is made before."""
    values, ends = (tensor.flatten(0, 1) for tensor in spans(batch))
    mask = None if batch.mask is None else as_rows(batch.mask)
    layout = build_layout(as_rows(batch.token_ids), mask, batch.shape.group, None)
    size = [values.shape[0], batch.shape.tokens]
    function = compiled(scatter.scatter_spans)
    return lambda: function(values, ends, mask, layout, size, torch.float32).view(batch.token_ids.shape)


PREPARES = {
    "python_ref": literal,
    "torch": backend_of_package("torch"),
    "compile": eager_compiled,
    "triton": backend_of_package("triton"),
}


def gate(batch: Batch, result: Any) -> None:
    expected = torch.tensor(literal(batch.sample)())
    result = torch.tensor(result) if isinstance(result, list) else result.flatten(0, 1)
    torch.testing.assert_close(result[: len(expected)].cpu(), expected, rtol=0.0, atol=0.0)


def bytes_moved(batch: Batch) -> int:
    """A float32 per token written, a bool per token read if there is a mask; per row 8 bytes a span and three int64."""
    shape = batch.shape
    bytes_per_token = 4 if batch.mask is None else 5
    bytes_per_row = (shape.num_boundaries + 1) * 8 + 3 * 8
    return shape.num_tokens * bytes_per_token + shape.prompts * shape.group * bytes_per_row


def test_scatter_spans(shape: Shape, inputs: str, backend: str, bench: Bench) -> None:
    bench("scatter_spans", shape, inputs, backend, PREPARES, gate, bytes_moved, tolerance=0.0)
