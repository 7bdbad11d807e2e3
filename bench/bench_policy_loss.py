"""policy_loss and its gradient: three numbers and a bool are read for each token, and one is written.

``compile`` is the PyTorch backend's own function, compiled; what stands around it is the same for all.
"""

from typing import Any

import torch
from torch import Tensor

import leafkernels
import python_ref
from bench.harness import Bench, Call, Prepare, compiled
from bench.rollouts import Batch, Shape
from leafkernels.eager import policy_loss
from leafkernels.losses.kinds import LossOptions
from leafkernels.losses.tokens import LossInputs

INPUTS = ("sampled", "ragged")
OP = "policy_loss with gradient"
BOUNDS: dict[str, Any] = {"clip": (0.2, 0.28), "dual_clip": 3.0, "max_log_ratio": 20.0}


def tokens_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N, T): a policy near the one that sampled, that one, advantages of either sign, and the mask."""
    old = batch.logprobs.flatten(0, 1)
    mask = torch.ones_like(old, dtype=torch.bool) if batch.mask is None else batch.mask.flatten(0, 1)
    return old + 0.3 * (100 * old).cos(), old, (50 * old).sin(), mask


def literal(batch: Batch) -> Call:
    lists = [tensor.tolist() for tensor in tokens_of(batch)]

    def call() -> tuple[float, list[list[float]]]:
        loss = python_ref.policy_loss(*lists, **BOUNDS, aggregate="sum")["loss"]
        return loss, python_ref.policy_loss_backward(*lists, **BOUNDS, aggregate="sum")[0]

    return call


def backend_of_package(backend: str) -> Prepare:
    def prepare(batch: Batch) -> Call:
        policy, *others = tokens_of(batch)
        policy.requires_grad_()

        def call() -> tuple[Tensor, Tensor]:
            loss = leafkernels.policy_loss(policy, *others, **BOUNDS, aggregate="sum", backend=backend).loss
            return loss.detach(), torch.autograd.grad(loss, policy)[0]

        return call

    return prepare


def eager_compiled(batch: Batch) -> Call:
    tokens = tokens_of(batch)
    logprobs, *others = tokens
    inputs = LossInputs(*others, None, None, None, None)
    options = LossOptions((*BOUNDS["clip"], BOUNDS["dual_clip"], 0.0), BOUNDS["max_log_ratio"])
    function = compiled(policy_loss.policy_loss)

    def call() -> tuple[Tensor, Tensor]:
        sums, gradient = function(logprobs, inputs, None, options, True)
        return sums[0].sum(), gradient

    return call


PREPARES = {
    "python_ref": literal,
    "torch": backend_of_package("torch"),
    "compile": eager_compiled,
    "triton": backend_of_package("triton"),
}


def gate(batch: Batch, result: Any) -> None:
    """float32 of numbers of order 1; a sum of as many as the sample has errs by far less than their number's root."""
    loss, gradient = result
    want, slopes = literal(batch.sample)()
    gradient = torch.as_tensor(gradient)[: len(slopes)].cpu()
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=gradient.dtype), rtol=1e-5, atol=1e-6)
    if batch.sample is batch:
        assert abs(float(loss) - want) <= 1e-5 * max(1.0, batch.shape.num_tokens**0.5)


def bytes_moved(batch: Batch) -> int:
    """Three float32 and a bool read and one float32 written for each token, and for each row seven sums."""
    shape = batch.shape
    return shape.num_tokens * (3 * 4 + 1 + 4) + shape.prompts * shape.group * 7 * 4


def test_policy_loss(shape: Shape, inputs: str, backend: str, bench: Bench) -> None:
    bench(OP, shape, inputs, backend, PREPARES, gate, bytes_moved, tolerance=1e-3)
