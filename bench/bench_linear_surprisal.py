"""linear_surprisal_entropy, forward and backward, beside the four matrix products that it cannot do without."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import leafkernels
from bench import peers
from bench.bench_surprisal import skip_absent
from bench.harness import Bench, Call, Prepare, compiled

OP = "linear_surprisal_entropy with gradient"


@dataclass(frozen=True)
class Hidden:
    """Hidden states (N, D), the weight (V, D) of the head, and for the gradient a weight for each output."""

    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    weights: Tensor

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """All results, in float64, some rows at a time."""
        weight = self.weight.double().requires_grad_()
        parts = []
        for rows in torch.arange(self.hidden.shape[0], device=weight.device).split(1024):
            hidden = self.hidden[rows].double().requires_grad_()
            logprobs = (hidden @ weight.T).log_softmax(-1)
            surprisal = -logprobs.gather(1, self.token_ids[rows, None]).squeeze(1)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            (self.weights[0, rows] * surprisal + self.weights[1, rows] * entropy).sum().backward()
            parts.append((surprisal.detach(), entropy.detach(), hidden.grad))
        surprisal, entropy, grad_hidden = (torch.cat(part) for part in zip(*parts, strict=True))
        return {
            "surprisal": surprisal,
            "entropy": entropy,
            "gradient of hidden": grad_hidden,
            "gradient of weight": weight.grad,
        }


@dataclass(frozen=True)
class Head:
    """Tokens, width and vocabulary, in a dtype, and why they are timed."""

    name: str
    num_rows: int
    width: int
    vocab_size: int
    dtype: torch.dtype
    reason: str
    inputs: tuple[str, ...] = ("normal",)

    @property
    def num_tokens(self) -> int:
        """Logits there would be, in the unit of the limits of the harness."""
        return self.num_rows * self.vocab_size

    @property
    def bytes_of_batch(self) -> int:
        return (self.num_rows + self.vocab_size) * self.width * self.dtype.itemsize

    def batches(self, inputs: str, device: str, count: int) -> tuple[Hidden, ...]:
        return _batches(self, device, 1)  # no cache holds the weight of a head


@lru_cache(maxsize=1)
def _batches(shape: Head, device: str, count: int) -> tuple[Hidden, ...]:
    """Normal numbers, scaled so that logits have a deviation of 3, as in the bench of surprisal_entropy."""
    result = []
    for seed in range(count):
        generator = torch.Generator(device).manual_seed(seed)

        def normal(rows: int, deviation: float, generator: torch.Generator = generator) -> Tensor:
            numbers = torch.empty((rows, shape.width), dtype=shape.dtype, device=device)
            return numbers.normal_(0, deviation, generator=generator)

        hidden, weight = normal(shape.num_rows, 1.0), normal(shape.vocab_size, 3 / shape.width**0.5)
        ids = torch.randint(shape.vocab_size, (shape.num_rows,), generator=generator, device=device)
        weights = torch.rand(2, shape.num_rows, generator=generator, device=device)
        result.append(Hidden(hidden, weight, ids, weights))
    return tuple(result)


INPUTS = ("normal",)
# The products first: all others are compared with them.
BACKENDS = ("products", "torch", "usual", "compile", *peers.HIDDEN, "triton")
SHAPES = (
    Head("512x256x32000", 512, 256, 32_000, torch.float32, "a small model, on a CPU too"),
    Head("8192x4096x151936", 8192, 4096, 151_936, torch.bfloat16, "a training step's tokens, a model of 8 billion"),
    Head("65536x4096x151936", 65_536, 4096, 151_936, torch.bfloat16, "20 GB of logits, if they existed"),
)
TINY = (Head("tiny-3x16x65", 3, 16, 65, torch.float32, "for a run that only proves it runs"),)
# Beyond these rows only what the goal is about: everything else takes about a second a call, or does not fit.
ALL_ROWS = 8192


def gradients_of(function: Any) -> Prepare:
    """Both results and both gradients, through autograd, of a weighted sum of the results."""

    def prepare(batch: Any) -> Call:
        hidden, weight = (tensor.detach().requires_grad_() for tensor in (batch.hidden, batch.weight))
        results: list[Any] = []

        def kept(*inputs: Any) -> tuple[Tensor, Tensor | None]:
            results[:] = function(*inputs)
            return results[0], results[1]

        def call() -> tuple[Tensor | None, ...]:
            loss = peers.weighted(kept, batch.weights, hidden, weight, batch.token_ids)
            gradients = torch.autograd.grad(loss, (hidden, weight))
            surprisal, entropy = results
            results.clear()
            if entropy is None:  # the gradients are those of another function
                return surprisal.detach(), None, None, None
            return surprisal.detach(), entropy.detach(), *gradients

        return call

    return prepare


def from_package(backend: str) -> Any:
    return lambda hidden, weight, ids: leafkernels.linear_surprisal_entropy(hidden, weight, ids, backend=backend)


def products(batch: Any) -> Call:
    """Logits, logits again as a backward pass needs them, and from them both gradients; into memory that is there."""
    hidden, weight = batch.hidden, batch.weight
    logits = hidden.new_empty((hidden.shape[0], weight.shape[0]))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)

    return call


PREPARES = {
    "products": products,
    "torch": gradients_of(from_package("torch")),
    "usual": gradients_of(peers.usual_linear),
    "compile": lambda batch: gradients_of(compiled(peers.usual_linear))(batch),
    **{name: lambda batch, peer=peer: gradients_of(peers.loaded(peer))(batch) for name, peer in peers.HIDDEN.items()},
    "triton": gradients_of(from_package("triton")),
}


def gate(batch: Hidden, result: Any) -> dict[str, Any] | None:
    """Nobody's logits are exact: they are sums of ``width`` products in float32, rounded to the dtype.

    They stay below 17 here, 5.7 deviations of 3. A sum's error is a random walk of ``width`` roundings of half a unit,
    of which 5 deviations are allowed for. A surprisal depends on two logits, an entropy on all, by p (log p + entropy),
    a gradient on p and the entropy: four times the error of one logit covers each, and a gradient is rounded itself.
    """
    if result is None:  # bare products
        return None
    unit = torch.finfo(batch.hidden.dtype).eps
    logit_error = 17 * (unit / 2 + 5 * batch.hidden.shape[1] ** 0.5 * torch.finfo(torch.float32).eps / 2)
    errors = peers.worst(result, batch.truth)
    for name, error in errors.items():
        kind, bound = ("relative", 4 * logit_error + unit) if "gradient" in name else ("absolute", 4 * logit_error)
        assert error[kind] is not None and error[kind] <= bound, (name, error, bound)
    return errors


def bytes_moved(batch: Hidden) -> int:
    """Hidden states and weight read, their gradients written. What takes the time are the products."""
    return 2 * sum(tensor.numel() * tensor.element_size() for tensor in (batch.hidden, batch.weight))


def test_linear_surprisal_entropy(shape: Any, inputs: str, backend: str, bench: Bench) -> None:
    if shape.num_rows > ALL_ROWS and backend not in ("products", "triton"):
        pytest.skip(f"timed up to {ALL_ROWS} rows")
    skip_absent(backend, peers.HIDDEN, OP, bench.session)
    bench(OP, shape, inputs, backend, PREPARES, gate, bytes_moved, tolerance=None)
