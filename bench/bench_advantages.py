"""span_advantages, the whole function, and the speed that it promises on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import leafkernels
import python_ref
from bench.bench_prefix_lengths import dense, dense_by_chunks, ids_needed
from bench.harness import Bench, Call, Prepare, Session, compiled, interleaved
from bench.rollouts import SHAPES, TINY, Batch, Shape
from leafkernels.credit.options import CreditOptions
from leafkernels.eager import boundaries as boundaries_of
from leafkernels.eager import nodes
from leafkernels.eager import scatter as scatter_of
from leafkernels.eager import values as values_of
from leafkernels.rows.find import build_layout
from leafkernels.rows.layout import as_rows

INPUTS = ("sampled", "ragged")


def literal(batch: Batch) -> Call:
    lists = batch.lists
    return lambda: python_ref.span_advantages(
        lists.logprobs,
        lists.token_ids,
        lists.rewards,
        response_mask=None if batch.mask is None else lists.mask,
        groups=lists.groups,
        num_boundaries=batch.shape.num_boundaries,
    )


def backend_of_package(backend: str) -> Prepare:
    def prepare(batch: Batch) -> Call:
        return lambda: leafkernels.span_advantages(
            batch.logprobs,
            batch.token_ids,
            batch.rewards,
            response_mask=batch.mask,
            num_boundaries=batch.shape.num_boundaries,
            backend=backend,
        )

    return prepare


def dense_compiled(
    batch: Batch,
    credit: CreditOptions = CreditOptions(),  # noqa: B008
    finish: Callable[[Tensor], Tensor] = lambda values: values,
) -> Call:
    """The PyTorch backend's functions, compiled one by one: together they break into the same graphs.

    The layout is made before, and all pairs are compared; see the bench of common_prefix_lengths. ``credit`` are the
    options of the span values, ``finish`` what an estimator makes of them.
    """
    mask = None if batch.mask is None else as_rows(batch.mask)
    scores, rewards, shape = as_rows(batch.logprobs), batch.rewards.flatten(), batch.token_ids.shape
    layout = build_layout(as_rows(batch.token_ids), mask, batch.shape.group, None)
    select, nodes_of = map(compiled, (boundaries_of.select_boundaries, nodes.nodes_of_prefix_lengths))
    values, scatter = map(compiled, (values_of.span_values, scatter_of.scatter_spans))
    prefixes = dense_by_chunks(batch, compiled(dense))
    options, size = credit._replace(num_boundaries=batch.shape.num_boundaries), [rewards.shape[0], batch.shape.tokens]

    def call() -> Tensor:
        boundaries = select(scores, mask, layout, options, True)
        named = nodes_of(prefixes().flatten(0, 1), boundaries, layout)
        normalized, _, ends, _, _ = values(rewards, named, boundaries, layout, options)
        return scatter(finish(normalized), ends, mask, layout, size, torch.float32).view(shape)

    return call


PREPARES = {
    "python_ref": literal,
    "torch": backend_of_package("torch"),
    "compile": dense_compiled,
    "triton": backend_of_package("triton"),
}


def gate(batch: Batch, result: Any) -> None:
    expected = torch.tensor(literal(batch.sample)())
    result = torch.tensor(result) if isinstance(result, list) else result.flatten(0, 1)
    torch.testing.assert_close(result[: len(expected)].cpu(), expected, rtol=1e-6, atol=1e-7)


def bytes_moved(batch: Batch) -> int:
    """A float32 per token read and one written, a bool read if there is a mask; an int64 id for each token that is
    needed to part the rows before the last boundary. What is small beside the tokens is left out."""
    tree = leafkernels.span_tree(
        batch.logprobs,
        batch.token_ids,
        batch.rewards,
        response_mask=batch.mask,
        num_boundaries=batch.shape.num_boundaries,
        backend="torch",
    )
    lengths = leafkernels.common_prefix_lengths(batch.token_ids, response_mask=batch.mask, backend="torch")
    last = tree.boundaries.amax(-1, keepdim=True).clamp_min(0)
    ids = torch.minimum(ids_needed(lengths, batch.shape.tokens), last)
    return batch.shape.num_tokens * (8 if batch.mask is None else 9) + int(ids.sum()) * 8


def test_span_advantages(shape: Shape, inputs: str, backend: str, bench: Bench) -> None:
    bench("span_advantages", shape, inputs, backend, PREPARES, gate, bytes_moved, tolerance=1e-6)


# How many times the speed of literal Python the PyTorch backend reaches, at least, on any CPU.
PROMISES = {"8x200": 1.0, "64x8x200": 22.0, "64x8192": 50.0}


@pytest.mark.promise
@pytest.mark.parametrize("name", PROMISES)
def test_promise(name: str, session: Session) -> None:
    least = PROMISES[name]
    shape = TINY[0] if session.tiny else next(shape for shape in SHAPES if shape.name == name)
    batch = shape.batches("sampled", "cpu", 1)[0]
    python, torch_backend = literal(batch), PREPARES["torch"](batch)
    gate(batch, torch_backend())
    # For a fixed time, kept or not: stopping at the first ratio that is good enough would be picking it.
    python_seconds, torch_seconds = interleaved(python, torch_backend, 0.0 if session.tiny else 6.0)
    name = f"{shape.name}, {shape.num_boundaries} boundaries"
    session.promise("span_advantages", name, "speed against literal Python", least, python_seconds, torch_seconds, "s")
