"""linear_surprisal_entropy over the kept ids of a sampling mask, beside the whole vocabulary, masked.

Both passes, with a head that is frozen, as with LoRA, and with one that is trained.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

import leafkernels
from bench import peers
from bench.harness import Bench, Call, Prepare

OP = "linear_surprisal_entropy of kept ids"


@dataclass(frozen=True)
class Hidden:
    """Hidden states (N, D), the weight (V, D) of a head, kept ids (N, k) of which the first was sampled."""

    hidden: Tensor
    weight: Tensor
    kept: Tensor
    weights: Tensor

    @property
    def token_ids(self) -> Tensor:
        return self.kept[:, 0]

    @cached_property
    def mask(self) -> leafkernels.SamplingMask:
        num_rows, kept = self.kept.shape
        offsets = torch.arange(0, num_rows * kept + 1, kept, device=self.kept.device)
        return leafkernels.SamplingMask(self.kept.flatten(), offsets)

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """Both results and the gradient of the hidden states, in float64."""
        hidden = self.hidden.double().requires_grad_()
        logprobs = torch.einsum("nd,nkd->nk", hidden, self.weight[self.kept].double()).log_softmax(1)
        surprisal, entropy = -logprobs[:, 0], -(logprobs.exp() * logprobs).sum(1)
        (self.weights[0] * surprisal + self.weights[1] * entropy).sum().backward()
        assert hidden.grad is not None
        return surprisal.detach(), entropy.detach(), hidden.grad


@dataclass(frozen=True)
class Head:
    """Tokens, kept ids of each, width and vocabulary, in a dtype."""

    num_rows: int
    kept: int
    width: int
    vocab_size: int
    dtype: torch.dtype
    reason: str
    inputs: tuple[str, ...] = ("frozen", "trained")

    @property
    def name(self) -> str:
        return f"{self.num_rows}x{self.width}x{self.vocab_size}, {self.kept} kept"

    @property
    def num_tokens(self) -> int:
        """Kept logits, in the unit of the limits of the harness."""
        return self.num_rows * self.kept

    @property
    def bytes_of_batch(self) -> int:
        return (self.num_rows + self.vocab_size) * self.width * self.dtype.itemsize

    def batches(self, inputs: str, device: str, count: int) -> tuple[Hidden, ...]:
        return _batches(self, device)


@lru_cache(maxsize=1)
def _batches(shape: Head, device: str) -> tuple[Hidden, ...]:
    """Normal numbers, scaled so that logits have a deviation of 3; kept ids at random places of the vocabulary."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, deviation: float) -> Tensor:
        numbers = torch.empty((rows, shape.width), dtype=shape.dtype, device=device)
        return numbers.normal_(0, deviation, generator=generator)

    hidden, weight = normal(shape.num_rows, 1.0), normal(shape.vocab_size, 3 / shape.width**0.5)
    # Different ids in each row: a first one, and from there in steps.
    first = torch.randint(shape.vocab_size, (shape.num_rows, 1), generator=generator, device=device)
    step = shape.vocab_size // shape.kept
    kept = (first + step * torch.arange(shape.kept, device=device)) % shape.vocab_size
    weights = torch.rand(2, shape.num_rows, generator=generator, device=device)
    return (Hidden(hidden, weight, kept, weights),)


INPUTS = ("frozen", "trained")
# The whole vocabulary first: the others are compared with it.
BACKENDS = ("masked", "torch", "triton")
SHAPES = (
    *(Head(512, k, 1024, 151_936, torch.float32, "a small batch, on a CPU too") for k in (1, 8, 32, 64, 512)),
    *(Head(8192, k, 4096, 151_936, torch.bfloat16, "a training step's tokens") for k in (1, 8, 64, 512)),
)
TINY = (Head(3, 4, 16, 65, torch.float32, "for a run that only proves it runs"),)


def masked(hidden: Tensor, weight: Tensor, batch: Hidden) -> tuple[Tensor, Tensor]:
    """Product, mask and log-softmax over the vocabulary, as trainers that take a mask compute it."""
    is_banned = torch.ones((hidden.shape[0], weight.shape[0]), dtype=torch.bool, device=hidden.device)
    is_banned.scatter_(1, batch.kept, False)
    logprobs = (hidden @ weight.T).float().masked_fill(is_banned, torch.finfo(torch.float32).min).log_softmax(1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    return -logprobs.gather(1, batch.token_ids[:, None]).squeeze(1), entropy


def of_package(backend: str) -> Any:
    def function(hidden: Tensor, weight: Tensor, batch: Hidden) -> tuple[Tensor, Tensor]:
        options = {"sampling_mask": batch.mask, "backend": backend}
        return leafkernels.linear_surprisal_entropy(hidden, weight, batch.token_ids, **options)

    return function


def gradients_of(function: Any, trained: bool) -> Prepare:
    """Both results and the gradient of the hidden states; that of the head too, where it is trained."""

    def prepare(batch: Any) -> Call:
        hidden, weight = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_(trained)

        def call() -> tuple[Tensor, ...]:
            surprisal, entropy = function(hidden, weight, batch)
            loss = (batch.weights[0] * surprisal + batch.weights[1] * entropy).sum()
            gradient, *_ = torch.autograd.grad(loss, (hidden, weight) if trained else (hidden,))
            return surprisal.detach(), entropy.detach(), gradient

        return call

    return prepare


def gate(batch: Hidden, result: Any) -> dict[str, Any]:
    """As in the bench of linear_surprisal_entropy: four times the error of a logit, and a gradient's rounding."""
    unit = torch.finfo(batch.hidden.dtype).eps
    of_logit = 17 * (unit / 2 + 5 * batch.hidden.shape[1] ** 0.5 * torch.finfo(torch.float32).eps / 2)
    errors = peers.worst(result, dict(zip(("surprisal", "entropy", "gradient of hidden"), batch.truth, strict=True)))
    for name, error in errors.items():
        kind, bound = ("relative", 4 * of_logit + unit) if "gradient" in name else ("absolute", 4 * of_logit)
        # Of one kept id nothing is left: the largest of zeros is no scale.
        kind = "absolute" if batch.kept.shape[1] == 1 else kind
        assert error[kind] is not None and error[kind] <= bound, (name, error, bound)
    return errors


def bytes_moved(batch: Hidden, trained: bool) -> int:
    """N k D numbers of the weight in each pass; where it is trained, N k D of the hidden states, and V D written."""
    of_kept, size = batch.kept.numel() * batch.hidden.shape[1], batch.hidden.element_size()
    return size * (2 * of_kept + 2 * batch.hidden.numel() + (of_kept + batch.weight.numel() if trained else 0))


def test_sampling_mask(shape: Any, inputs: str, backend: str, bench: Bench) -> None:
    trained = inputs == "trained"
    functions = {"masked": masked, "torch": of_package("torch"), "triton": of_package("triton")}
    prepares = {name: gradients_of(function, trained) for name, function in functions.items()}
    op = f"{OP}, trained head" if trained else OP
    bench(op, shape, inputs, backend, prepares, gate, lambda batch: bytes_moved(batch, trained), tolerance=None)
