"""linear_divergence, forward and backward, beside the six matrix products that it cannot do without.

TRL sums lse - E[x] of the logits; its errors stand beside its times. ``hard`` are models that agree but for a little,
and lead by far, where that sum has no digit left.
"""

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

KINDS = ("reverse_kl", "forward_kl", "jsd")
OPS = {kind: f"linear_divergence {kind} with gradient" for kind in KINDS}


@dataclass(frozen=True)
class Pair:
    """Hidden states (N, D) and head (V, D) of a student and a teacher; weights (N,) of the divergences."""

    student: tuple[Tensor, Tensor]
    teacher: tuple[Tensor, Tensor]
    weights: Tensor

    @cached_property
    def truth(self) -> dict[str, dict[str, Tensor]]:
        """Of each kind all results, in float64, some rows at a time."""
        return {kind: self._truth(kind) for kind in KINDS}

    def _truth(self, kind: str) -> dict[str, Tensor]:
        weight, parts = self.student[1].double().requires_grad_(), []
        for rows in torch.arange(self.weights.shape[0], device=weight.device).split(256):
            hidden = self.student[0][rows].double().requires_grad_()
            others = self.teacher[0][rows].double() @ self.teacher[1].double().T
            found = leafkernels.divergence(hidden @ weight.T, others, kind=kind, backend="torch")
            (self.weights[rows] * found.divergence).sum().backward()
            parts.append((found.divergence.detach(), found.student_entropy.detach(), hidden.grad))
        divergence, entropy, grad_hidden = (torch.cat(part) for part in zip(*parts, strict=True))
        gradients = {"gradient of hidden": grad_hidden, "gradient of weight": weight.grad}
        return {"divergence": divergence, "entropy": entropy, **gradients}


@dataclass(frozen=True)
class Heads:
    """Tokens, width and vocabulary, in a dtype, and why they are timed."""

    name: str
    num_rows: int
    width: int
    vocab_size: int
    dtype: torch.dtype
    reason: str
    inputs: tuple[str, ...] = ("normal", "hard")

    @property
    def num_tokens(self) -> int:
        """Logits there would be, in the unit of the limits of the harness."""
        return 2 * self.num_rows * self.vocab_size

    @property
    def bytes_of_batch(self) -> int:
        return 2 * (self.num_rows + self.vocab_size) * self.width * self.dtype.itemsize

    def batches(self, inputs: str, device: str, count: int) -> tuple[Pair, ...]:
        return (_batch(self, inputs, device),)  # no cache holds the weight of a head


@lru_cache(maxsize=1)
def _batch(shape: Heads, inputs: str, device: str) -> Pair:
    """Normal numbers, scaled so that logits have a deviation of 3; hard: a teacher that is the student but for a
    thousandth, of states that point to one id, whose logit leads by about 30."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, deviation: float) -> Tensor:
        numbers = torch.empty((rows, shape.width), dtype=torch.float32, device=device)
        return numbers.normal_(0, deviation, generator=generator)

    def head() -> tuple[Tensor, Tensor]:
        return normal(shape.num_rows, 1.0), normal(shape.vocab_size, 3 / shape.width**0.5)

    student, teacher = head(), head()
    if inputs == "hard":
        ids = torch.randint(shape.vocab_size, (shape.num_rows,), generator=generator, device=device)
        rows = student[1][ids]
        student = student[0] + 40 * rows / rows.square().sum(1, keepdim=True), student[1]
        teacher = tuple(own + 1e-3 * other for own, other in zip(student, teacher, strict=True))  # type: ignore
    weights = torch.rand(shape.num_rows, generator=generator, device=device)
    dtyped = [tuple(tensor.to(shape.dtype) for tensor in model) for model in (student, teacher)]
    return Pair(*dtyped, weights)  # type: ignore[arg-type]


INPUTS = ("normal", "hard")
# The products first: all others are compared with them.
BACKENDS = ("products", "torch", "usual", "compile", *peers.DIVERGENCE, "triton")
SHAPES = (
    Heads("256x256x32000", 256, 256, 32_000, torch.float32, "a small model, on a CPU too"),
    Heads("8192x4096x151936", 8192, 4096, 151_936, torch.bfloat16, "a training step's tokens, a model of 8 billion"),
)
TINY = (Heads("tiny-3x16x65", 3, 16, 65, torch.float32, "for a run that only proves it runs"),)


def gradients_of(function: Any, kind: str) -> Prepare:
    """Results and both gradients, through autograd, of a weighted sum of the divergences."""

    def prepare(batch: Any) -> Call:
        hidden, weight = (tensor.detach().requires_grad_() for tensor in batch.student)

        def call() -> tuple[Tensor, ...]:
            divergence, entropy = function(hidden, weight, *batch.teacher, kind)
            gradients = torch.autograd.grad((batch.weights * divergence).sum(), (hidden, weight))
            return divergence.detach(), entropy.detach(), *gradients

        return call

    return prepare


def from_package(backend: str) -> Any:
    def function(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, kind: str) -> Any:
        return leafkernels.linear_divergence(hidden, weight, other, other_weight, kind=kind, backend=backend)[:2]

    return function


def products(batch: Any) -> Call:
    """The logits of both, these again as a backward pass needs them, and both gradients; into memory that is there."""
    (hidden, weight), (other, other_weight) = batch.student, batch.teacher
    logits, others = hidden.new_empty((2, hidden.shape[0], weight.shape[0]))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        for _ in range(2):
            torch.mm(hidden, weight.T, out=logits)
            torch.mm(other, other_weight.T, out=others)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)

    return call


def prepares(kind: str) -> dict[str, Any]:
    return {
        "products": products,
        "torch": gradients_of(from_package("torch"), kind),
        "usual": gradients_of(peers.usual_divergence, kind),
        "compile": lambda batch: gradients_of(compiled(peers.usual_divergence), kind)(batch),
        **{
            name: lambda batch, peer=peer: gradients_of(peers.loaded(peer), kind)(batch)
            for name, peer in peers.DIVERGENCE.items()
        },
        "triton": gradients_of(from_package("triton"), kind),
    }


def gate(kind: str) -> Any:
    """As ``bench_linear_surprisal.gate``: what an error of the logits makes of each number, and no more of anybody.

    A divergence depends on all logits of both models; gradients of hard rows are small differences, and not bounded.
    """

    def errors_of(batch: Pair, result: Any) -> dict[str, Any] | None:
        if result is None:  # bare products
            return None
        unit = torch.finfo(batch.student[0].dtype).eps
        width = batch.student[0].shape[1]
        logit_error = 45 * (unit / 2 + 5 * width**0.5 * torch.finfo(torch.float32).eps / 2)
        errors = peers.worst(result, batch.truth[kind])
        for name in ("divergence", "entropy"):
            assert errors[name]["absolute"] is not None and errors[name]["absolute"] <= 8 * logit_error, (name, errors)
        return errors

    return errors_of


def bytes_moved(batch: Pair) -> int:
    """States and weights of both read, the student's gradients written. What takes the time are the products."""
    student, teacher = (sum(x.numel() * x.element_size() for x in model) for model in (batch.student, batch.teacher))
    return 2 * student + teacher


@pytest.mark.parametrize("kind", KINDS)
def test_linear_divergence(shape: Any, inputs: str, backend: str, kind: str, bench: Bench) -> None:
    skip_absent(backend, peers.DIVERGENCE, OPS[kind], bench.session)
    bench(OPS[kind], shape, inputs, backend, prepares(kind), gate(kind), bytes_moved, tolerance=None)
