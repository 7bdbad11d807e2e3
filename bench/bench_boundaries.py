"""select_boundaries: every score is read once; a few positions for each prompt are written."""

from typing import Any

import torch

import leafkernels
import python_ref
from bench.harness import Bench, Call, Prepare, compiled
from bench.rollouts import Batch, Shape
from leafkernels.credit.options import CreditOptions
from leafkernels.eager import boundaries
from leafkernels.rows.find import build_layout
from leafkernels.rows.layout import as_rows

INPUTS = ("sampled",)


def literal(batch: Batch) -> Call:
    lists, count = batch.lists, batch.shape.num_boundaries
    prompts = lists.prompts(lists.surprisal, batch.shape.group)
    return lambda: [python_ref.select_boundaries(rows, num_boundaries=count) for rows in prompts]


def backend_of_package(backend: str) -> Prepare:
    def prepare(batch: Batch) -> Call:
        scores, count = batch.surprisal, batch.shape.num_boundaries
        return lambda: leafkernels.select_boundaries(scores, num_boundaries=count, backend=backend)

    return prepare


def eager_compiled(batch: Batch) -> Call:
    """The PyTorch backend's own function: the compiler sees into it, and the layout is made before."""
    layout = build_layout(as_rows(batch.surprisal), None, batch.shape.group, None)
    function = compiled(boundaries.select_boundaries)
    scores, options = as_rows(batch.surprisal), CreditOptions(num_boundaries=batch.shape.num_boundaries)
    return lambda: function(scores, None, layout, options, False)


PREPARES = {
    "python_ref": literal,
    "torch": backend_of_package("torch"),
    "compile": eager_compiled,
    "triton": backend_of_package("triton"),
}


def gate(batch: Batch, result: Any) -> None:
    count = batch.shape.num_boundaries
    expected = [found + [-1] * (count - len(found)) for found in literal(batch.sample)()]
    if isinstance(result, list):
        result = torch.tensor([found + [-1] * (count - len(found)) for found in result])
    torch.testing.assert_close(result[: len(expected)].cpu().long(), torch.tensor(expected))


def bytes_moved(batch: Batch) -> int:
    """A float32 score per token, and num_boundaries int32 per prompt."""
    return batch.shape.num_tokens * 4 + batch.shape.prompts * batch.shape.num_boundaries * 4


def test_select_boundaries(shape: Shape, inputs: str, backend: str, bench: Bench) -> None:
    bench("select_boundaries", shape, inputs, backend, PREPARES, gate, bytes_moved, tolerance=0.0)
