"""fire_opd: the statistics of each row, then the weights and advantages of each token.

``plain`` is the same in a few lines of PyTorch, as one writes it with ``torch.quantile``; ``compile`` is those lines,
compiled. The first look at a token reads three numbers and a bool, the second four and a bool, and writes two numbers
and a bool. All numbers but the log-probabilities are made from them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import leafkernels
import python_ref
from bench.harness import Bench, Call, Prepare, compiled
from bench.rollouts import SHAPES as OF_ROLLOUTS
from bench.rollouts import TINY as OF_TINY
from bench.rollouts import Batch, Shape

INPUTS = ("sampled", "ragged")
OP = "fire_opd"
BACKENDS = ("python_ref", "plain", "torch", "compile", "triton")
SHAPES = (
    *OF_ROLLOUTS[:2],
    Shape("1024x1x1k", 1024, 1, 1024, 2, ("ragged",), "the paper's batch, with short answers: fits a CPU"),
    Shape("1024x1x16k", 1024, 1, 16384, 2, ("ragged",), "the paper's batch and longest response: 17 million tokens"),
)
TINY = OF_TINY


class Tokens(NamedTuple):
    """(N, T) each, in the order of ``fire_opd``."""

    old_logprobs: Tensor
    teacher_logprobs: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    response_mask: Tensor


def tokens_of(batch: Batch) -> Tokens:
    old = batch.logprobs.flatten(0, 1)
    mask = torch.ones_like(old, dtype=torch.bool) if batch.mask is None else batch.mask.flatten(0, 1)
    return Tokens(old, old + 0.3 * (100 * old).cos(), 2 * (50 * old).sin().abs(), 2 * (70 * old).sin().abs(), mask)


def plain(
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    student_entropy: Tensor,
    teacher_entropy: Tensor,
    response_mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, weights and mask."""
    lengths = response_mask.sum(1).clamp_min(1)
    scores = teacher_logprobs.masked_fill(~response_mask, 0.0).sum(1) / lengths
    keep = scores >= scores.quantile(0.2)
    h_teacher, h_student = (h.masked_fill(~response_mask, 0.0) for h in (teacher_entropy, student_entropy))
    sure = (1 - h_teacher / h_teacher.max().clamp_min(1e-6)).clamp(0, 1)
    unsure = (h_student / h_student.max().clamp_min(1e-6)).clamp(0, 1)
    weights = ((1 + sure) * (1 + unsure)).masked_fill(~response_mask, 0.0)
    weights = weights / (weights.sum() / response_mask.sum().clamp_min(1))
    mask = response_mask & keep[:, None]
    return (weights * (teacher_logprobs - old_logprobs)).masked_fill(~mask, 0.0), weights, mask


def literal(batch: Batch) -> Call:
    lists = [tensor.tolist() for tensor in tokens_of(batch)]

    def call() -> list[Any]:
        found = python_ref.fire_opd(*lists)
        return [found[name] for name in ("advantages", "weights", "response_mask")]

    return call


def plain_call(batch: Batch) -> Call:
    tokens = tokens_of(batch)
    return lambda: plain(*tokens)


def compiled_call(batch: Batch) -> Call:
    tokens, function = tokens_of(batch), compiled(plain)
    return lambda: function(*tokens)


def backend_of_package(backend: str) -> Prepare:
    def prepare(batch: Batch) -> Call:
        tokens = tokens_of(batch)

        def call() -> tuple[Tensor, Tensor, Tensor]:
            fire = leafkernels.fire_opd(*tokens, backend=backend)
            return fire.advantages, fire.weights, fire.response_mask

        return call

    return prepare


PREPARES = {
    "python_ref": literal,
    "plain": plain_call,
    "torch": backend_of_package("torch"),
    "compile": compiled_call,
    "triton": backend_of_package("triton"),
}


def gate(batch: Batch, result: Any) -> None:
    """Against literal Python where that sees the whole scope; of a larger one, sums that a law gives."""
    advantages, weights, mask = (torch.as_tensor(part).cpu() for part in result)
    live = tokens_of(batch).response_mask.cpu()
    if batch.sample is batch:
        for found, want in zip((advantages, weights, mask), literal(batch)(), strict=True):
            torch.testing.assert_close(found, torch.tensor(want, dtype=found.dtype), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.double().sum(), live.double().sum(), rtol=1e-5, atol=0)
    assert not advantages[~mask].any()
    assert not weights[~live].any()


def bytes_moved(batch: Batch) -> int:
    """Every token is needed twice, since nothing is known of the scope before its end; 56 bytes for a row between."""
    shape = batch.shape
    return shape.num_tokens * ((3 * 4 + 1) + (4 * 4 + 1) + (2 * 4 + 1)) + shape.prompts * shape.group * 2 * 56


def test_fire_opd(shape: Shape, inputs: str, backend: str, bench: Bench) -> None:
    bench(OP, shape, inputs, backend, PREPARES, gate, bytes_moved, tolerance=1e-4)
