"""policy_loss_from_logits: loss and gradient from one pass, beside a forward and a backward pass with the same loss.

``composed`` is surprisal_entropy and policy_loss, ``trl`` trl's kernel and policy_loss; trl's kernel alone, forward and
backward, stands under "surprisal_entropy with gradient".
"""

from typing import Any

import torch
from torch import Tensor

import leafkernels
from bench import bench_surprisal, peers
from bench.bench_surprisal import INPUTS, SHAPES, TINY, Logits, skip_absent
from bench.harness import BACKENDS as OURS
from bench.harness import Bench, Call, Prepare, compiled

__all__ = ["INPUTS", "SHAPES", "TINY"]  # read by the cases of each bench

OP = "policy_loss_from_logits with gradient"
BACKENDS = ("torch", "usual", "compile", "composed", "trl", "triton")
OPTIONS: dict[str, Any] = {"clip": (0.2, 0.28), "entropy_coef": 0.01, "aggregate": "sum"}


def tokens_of(batch: Logits) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(1, N) ids, old log-probabilities near those of the logits, advantages of either sign, and a mask of ones."""
    surprisal, _ = leafkernels.surprisal_entropy(batch.logits, batch.token_ids)
    old = -surprisal + batch.weights[0] - 0.5
    mask = torch.ones_like(batch.token_ids, dtype=torch.bool)
    return batch.token_ids[None], old[None], (batch.weights[1] - 0.5)[None], mask[None]


def loss_and_gradient(loss_of: Any) -> Prepare:
    def prepare(batch: Any) -> Call:
        logits = batch.logits.detach().requires_grad_()
        tokens = tokens_of(batch)

        def call() -> tuple[Tensor, Tensor]:
            loss = loss_of(logits, *tokens)
            return loss.detach(), torch.autograd.grad(loss, logits)[0]

        return call

    return prepare


def one_pass(backend: str) -> Any:
    def loss(logits: Tensor, *tokens: Tensor) -> Tensor:
        return leafkernels.policy_loss_from_logits(logits[None], *tokens, **OPTIONS, backend=backend).loss

    return loss


def two_passes(function: Any) -> Any:
    """The same loss of the results of a function of logits (N, V) and ids (N,)."""

    def loss(logits: Tensor, token_ids: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        surprisal, entropy = function(logits, token_ids[0])
        result = leafkernels.policy_loss(-surprisal[None], old, advantages, mask, entropy=entropy[None], **OPTIONS)
        return result.loss

    return loss


PREPARES = {
    "torch": loss_and_gradient(one_pass("torch")),
    "usual": loss_and_gradient(two_passes(peers.usual)),
    "compile": lambda batch: loss_and_gradient(two_passes(compiled(peers.usual)))(batch),
    "composed": loss_and_gradient(two_passes(leafkernels.surprisal_entropy)),
    "trl": lambda batch: loss_and_gradient(two_passes(peers.loaded(peers.LOGITS["trl"])))(batch),
    "triton": loss_and_gradient(one_pass("triton")),
}


def truth(batch: Logits) -> dict[str, Tensor]:
    """The gradient of the first rows, by float64 autograd through the composed loss: the loss is a sum over rows."""
    tokens = [tensor[:, : batch.few.logits.shape[0]] for tensor in tokens_of(batch)]
    logits = batch.few.logits.double().requires_grad_()

    def function(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = x.log_softmax(-1)
        return -logprobs.gather(1, ids[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)

    ids, old, advantages, mask = tokens
    loss = two_passes(function)(logits, ids, old.double(), advantages.double(), mask)
    return {"gradient": torch.autograd.grad(loss, logits)[0]}


def gate(batch: Logits, result: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """One rounding to the dtype of the logits, and float32 noise of a few units on the ratio."""
    return _gate(batch, result, max(1e-4, torch.finfo(batch.logits.dtype).eps))


def gate_of_peers(batch: Logits, result: tuple[Tensor, Tensor]) -> dict[str, Any]:
    return _gate(batch, result, bench_surprisal.PEERS_RTOL)


def _gate(batch: Logits, result: tuple[Tensor, Tensor], rtol: float) -> dict[str, Any]:
    errors = peers.worst(result[1:], truth(batch))
    relative = errors["gradient"]["relative"]
    assert relative is not None and relative <= rtol, errors
    return errors


def bytes_moved(batch: Logits) -> int:
    """Twice the logits: read once, gradient written; and per row an id, a mask, three inputs and six terms."""
    return 2 * batch.logits.numel() * batch.logits.element_size() + batch.logits.shape[0] * (8 + 1 + 3 * 4 + 6 * 4)


def test_policy_loss_from_logits(shape: Any, inputs: str, backend: str, bench: Bench) -> None:
    if backend == "trl":
        skip_absent(backend, peers.LOGITS, OP, bench.session)
    check = gate if backend in (*OURS, "composed") else gate_of_peers
    tolerance = 2e-2 if shape.dtype == torch.bfloat16 else 1e-3
    bench(OP, shape, inputs, backend, PREPARES, check, bytes_moved, tolerance)
