"""surprisal_entropy: the logits are read once forward, and once more backward, where their gradient is written."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import leafkernels
import python_ref
from bench.harness import Bench, Call, Prepare, compiled


@dataclass(frozen=True)
class Logits:
    """One batch of logits (N, V), and for the gradient a weight for each of the two outputs."""

    logits: Tensor
    token_ids: Tensor
    weights: Tensor

    @cached_property
    def few(self) -> "Logits":
        """The first rows, as many as literal Python checks in a second."""
        return Logits(self.logits[:2], self.token_ids[:2], self.weights[:, :2])


@dataclass(frozen=True)
class Vocabulary:
    """Rows of logits, in a dtype, and why they are timed."""

    name: str
    num_rows: int
    vocab_size: int
    dtype: torch.dtype
    reason: str
    inputs: tuple[str, ...] = ("normal",)

    @property
    def num_tokens(self) -> int:
        """Numbers to work on, in the unit of the limits of the harness."""
        return self.num_rows * self.vocab_size

    @property
    def bytes_of_batch(self) -> int:
        return self.num_tokens * self.dtype.itemsize

    def batches(self, inputs: str, device: str, count: int) -> tuple[Logits, ...]:
        return _batches(self, device, count)


@lru_cache(maxsize=1)
def _batches(shape: Vocabulary, device: str, count: int) -> tuple[Logits, ...]:
    """Normal logits of deviation 3: a few likely ids, and a long tail, as a model gives them."""
    result = []
    for seed in range(count):
        generator = torch.Generator(device).manual_seed(seed)
        size = (shape.num_rows, shape.vocab_size)
        logits = torch.empty(size, dtype=shape.dtype, device=device).normal_(0, 3, generator=generator)
        ids = torch.randint(shape.vocab_size, size[:1], generator=generator, device=device)
        result.append(Logits(logits, ids, torch.rand(2, shape.num_rows, generator=generator, device=device)))
    return tuple(result)


INPUTS = ("normal",)
SHAPES = (
    Vocabulary("4x151936", 4, 151_936, torch.float32, "a few rows, small enough for literal Python and a compiled CPU"),
    Vocabulary(
        "64x151936", 64, 151_936, torch.bfloat16, "one decoding step of a batch: fewer rows than multiprocessors"
    ),
    Vocabulary("8192x151936", 8192, 151_936, torch.bfloat16, "a training step's tokens, 2.5 GB of logits"),
    Vocabulary("32768x128256", 32768, 128_256, torch.bfloat16, "more than 2^31 logits"),
)
TINY = (Vocabulary("tiny-3x65", 3, 65, torch.float32, "for a run that only proves it runs"),)


def usual(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What trainers write, and torch.compile is given to fuse."""
    logprobs = logits.float().log_softmax(-1)
    surprisal = -logprobs.gather(1, token_ids[:, None]).squeeze(1)
    return surprisal, -(logprobs.exp() * logprobs).sum(-1)


def literal(batch: Logits) -> Call:
    rows, ids = batch.logits.tolist(), batch.token_ids.tolist()
    return lambda: python_ref.surprisal_entropy(rows, ids)


def backend_of_package(backend: str) -> Prepare:
    def prepare(batch: Any) -> Call:
        return lambda: tuple(leafkernels.surprisal_entropy(batch.logits, batch.token_ids, backend=backend))

    return prepare


def usual_compiled(batch: Logits) -> Call:
    function = compiled(usual)
    return lambda: function(batch.logits, batch.token_ids)


PREPARES = {
    "python_ref": literal,
    "torch": backend_of_package("torch"),
    "compile": usual_compiled,
    "triton": backend_of_package("triton"),
}


def gate(batch: Logits, result: Any) -> None:
    """1e-4 is what is asked of peaked rows; these are not peaked."""
    few = batch.few
    for found, expected in zip(result, literal(few)(), strict=True):
        found = torch.as_tensor(found)[: len(expected)].cpu().double()
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)


def bytes_read(batch: Logits) -> int:
    """Every logit, and beside it per row an int64 id and four float32 results."""
    return batch.logits.numel() * batch.logits.element_size() + batch.logits.shape[0] * (8 + 16)


def test_surprisal_entropy(shape: Any, inputs: str, backend: str, bench: Bench) -> None:
    bench("surprisal_entropy", shape, inputs, backend, PREPARES, gate, bytes_read, tolerance=1e-4)


def gradient_of(function: Any) -> Prepare:
    """Forward and backward, through autograd, of a weighted sum of both outputs."""

    def prepare(batch: Any) -> Call:
        logits = batch.logits.detach().requires_grad_()

        def call() -> Tensor:
            surprisal, entropy = function(logits, batch.token_ids)
            loss = (batch.weights[0] * surprisal).sum() + (batch.weights[1] * entropy).sum()
            return torch.autograd.grad(loss, logits)[0]

        return call

    return prepare


def literal_gradient(batch: Logits) -> Call:
    """The definition takes each id's own surprisal, V passes over V logits: float64 autograd stands for it here."""

    def call() -> Tensor:
        logits = batch.logits.double().requires_grad_()
        logprobs = logits.log_softmax(-1)
        surprisal = -logprobs.gather(1, batch.token_ids[:, None]).squeeze(1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return torch.autograd.grad((batch.weights[0] * surprisal + batch.weights[1] * entropy).sum(), logits)[0]

    return call


def of_package(backend: str) -> Any:
    return lambda logits, ids: leafkernels.surprisal_entropy(logits, ids, backend=backend)


GRADIENTS = {
    "torch": gradient_of(of_package("torch")),
    "compile": lambda batch: gradient_of(compiled(usual))(batch),
    "triton": gradient_of(of_package("triton")),
}


def gate_gradient(batch: Logits, result: Tensor) -> None:
    """One rounding to the dtype of the logits, and float32 noise on sums of terms of order 1."""
    expected = literal_gradient(batch.few)()
    unit = torch.finfo(batch.logits.dtype).eps
    torch.testing.assert_close(result[: len(expected)].double(), expected, rtol=unit, atol=1e-5)


def bytes_forward_and_backward(batch: Logits) -> int:
    """Three times the logits: read forward, read backward, gradient written."""
    return 3 * batch.logits.numel() * batch.logits.element_size() + batch.logits.shape[0] * (16 + 32)


def test_surprisal_entropy_with_gradient(shape: Any, inputs: str, backend: str, bench: Bench) -> None:
    if backend == "python_ref":
        pytest.skip("the definition takes V passes over V logits")
    bench(
        "surprisal_entropy with gradient",
        shape,
        inputs,
        backend,
        GRADIENTS,
        gate_gradient,
        bytes_forward_and_backward,
        tolerance=2e-2 if shape.dtype == torch.bfloat16 else 1e-4,
    )
