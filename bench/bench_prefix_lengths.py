"""common_prefix_lengths: the ids of a row are read until it has left all others; a table for each prompt is written.

The hard inputs are here: rows that never part, and rows that part at places of their own, far in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import leafkernels
import python_ref
from bench.harness import Bench, Call, Prepare, compiled
from bench.rollouts import Batch, Shape

INPUTS = ("sampled", "identical", "comb")

# Rows of a prompt that literal Python checks: it takes rows * rows * tokens steps where all rows are equal.
GATE_ROWS = 16


def literal(batch: Batch) -> Call:
    lists = batch.lists
    prompts = lists.prompts(lists.token_ids, batch.token_ids.shape[1])
    return lambda: [python_ref.common_prefix_lengths(rows) for rows in prompts]


def backend_of_package(backend: str) -> Prepare:
    def prepare(batch: Batch) -> Call:
        return lambda: leafkernels.common_prefix_lengths(batch.token_ids, backend=backend)

    return prepare


def dense(token_ids: Tensor, lengths: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(P, G, G) int32: the first place where the rows of a pair differ, for every pair and at every place."""
    num_tokens = token_ids.shape[-1]
    position = torch.arange(num_tokens, dtype=torch.int32, device=token_ids.device)
    differs = token_ids[:, left] != token_ids[:, right]
    shared = torch.where(differs, position, num_tokens).amin(-1)
    shared = torch.minimum(shared, torch.minimum(lengths[:, left], lengths[:, right]))
    table = torch.diag_embed(lengths)
    table[:, left, right] = shared
    table[:, right, left] = shared
    return table


def dense_by_chunks(batch: Batch, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """``dense`` for a few prompts at a time, so that its elements, if it does not fuse, have an int32 index."""
    group, num_tokens = batch.shape.group, batch.shape.tokens
    left, right = torch.triu_indices(group, group, 1, device=batch.token_ids.device)
    prompts = max(1, (1 << 29) // max(left.numel() * num_tokens, 1))
    if batch.mask is None:
        lengths = torch.full(batch.rewards.shape, num_tokens, dtype=torch.int32, device=batch.token_ids.device)
    else:
        lengths = batch.mask.sum(-1, dtype=torch.int32)
    chunks = list(zip(batch.token_ids.split(prompts), lengths.split(prompts), strict=True))

    def call() -> Tensor:
        tables = [function(ids, row_lengths, left, right) for ids, row_lengths in chunks]
        return tables[0] if len(tables) == 1 else torch.cat(tables)

    return call


def dense_compiled(batch: Batch) -> Call:
    """All pairs, which fuse into one pass; the PyTorch backend's refinement is a loop that no compiler can unroll."""
    return dense_by_chunks(batch, compiled(dense))


PREPARES = {
    "python_ref": literal,
    "torch": backend_of_package("torch"),
    "compile": dense_compiled,
    "triton": backend_of_package("triton"),
}


def gate(batch: Batch, result: Any) -> None:
    of = batch.sample
    expected = literal(Batch(of.shape, of.token_ids[:, :GATE_ROWS], of.logprobs, of.rewards, None))()
    result = torch.as_tensor(result)[: len(expected), :GATE_ROWS, :GATE_ROWS]
    torch.testing.assert_close(result.cpu().long(), torch.tensor(expected))


def ids_needed(prefix_lengths: Tensor, num_tokens: int) -> Tensor:
    """(P, G): of each row the tokens up to the first that no other row shares, that one included."""
    others = prefix_lengths - torch.diag_embed(prefix_lengths.diagonal(dim1=1, dim2=2))
    return (others.amax(-1) + 1).clamp_max(num_tokens)


def bytes_moved(batch: Batch) -> int:
    """An int64 id for each token needed, once; group * group int32 per prompt."""
    prefix_lengths = leafkernels.common_prefix_lengths(batch.token_ids, backend="torch")
    return int(ids_needed(prefix_lengths, batch.shape.tokens).sum()) * 8 + prefix_lengths.numel() * 4


def test_common_prefix_lengths(shape: Shape, inputs: str, backend: str, bench: Bench) -> None:
    bench("common_prefix_lengths", shape, inputs, backend, PREPARES, gate, bytes_moved, tolerance=0.0)
