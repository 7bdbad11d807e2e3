"""Other libraries' surprisal and entropy, each behind a few lines, with its version and what it cannot do.

    from logits (N, V)                               function(logits, token_ids) -> surprisal, entropy
    from hidden states (N, D) and a weight (V, D)    function(hidden, weight, token_ids) -> surprisal, entropy

The entropy is None where a library has none. Wheels without their dependencies are enough for trl, liger-kernel and
cut-cross-entropy: ``pip install --no-deps --target build/peers 'trl==1.16.0' 'liger-kernel==0.8.5' cut-cross-entropy``,
and that folder on PYTHONPATH.
"""

import contextlib
import importlib.util
import math
import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Peer:
    """A function of another package."""

    package: str
    load: Callable[[], Function]
    runs_on: str = "any"
    """"triton": on CUDA, and on a CPU under Triton's interpreter; "cuda": on CUDA alone."""
    has_gradient: bool = True

    @property
    def version(self) -> str | None:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def why_not(self, device: str) -> str | None:
        """The reason why it does not run on this kind of device, or None."""
        if self.version is None:
            return f"{self.package} is not installed"
        interpreting = os.environ.get("TRITON_INTERPRET") == "1"
        if device == "cpu" and (self.runs_on == "cuda" or (self.runs_on == "triton" and not interpreting)):
            return f"{self.package} {self.version} needs a CUDA device here"
        try:
            loaded(self)
        except Exception as error:  # what importing a package may raise is its own affair
            return f"{self.package} {self.version} does not import: {first_line(error)}"
        return None


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


@cache
def loaded(peer: Peer) -> Function:
    return peer.load()


def _trl_logits() -> Function:
    # The package imports transformers; the file of the kernel needs torch and triton only.
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "kernels" / "logprob_entropy.py"
    spec = importlib.util.spec_from_file_location("trl_kernels_logprob_entropy", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def function(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = module.selective_log_softmax_and_entropy(logits, token_ids)
        return -logprobs, entropy

    return function


def _liger_logits() -> Function:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    def function(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, None]:
        # It leaves out the last row, which in a trainer has no next token: here it is missing from the result.
        return -fused_selective_log_softmax(logits[None], token_ids[None, :-1], 1.0)[0], None

    return function


def _trl_hidden() -> Function:
    try:
        import trl.trainer.utils  # noqa: F401
    except ImportError:
        # Its backward pass takes one thing from there, which does nothing without DeepSpeed.
        standing_in: Any = types.ModuleType("trl.trainer.utils")
        standing_in.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()
        sys.modules["trl.trainer.utils"] = standing_in
    from trl.kernels import ChunkedLogProbFunction

    def function(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        chunk = min(32_768, weight.shape[0])  # as its trainers have it
        logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, token_ids, 1.0, chunk, None, 1.0, ("entropy",)
        )
        return -logprobs, entropy

    return function


def _trl_divergence() -> Function:
    _trl_hidden()  # stands in for what is not installed
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}

    def function(
        hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, kind: str
    ) -> tuple[Tensor, Tensor]:
        heads = hidden, weight, None, other, other_weight, None
        return ChunkedDivergenceFunction.apply(*heads, betas[kind])  # type: ignore[no-any-return]

    return function


def _liger_hidden() -> Function:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def function(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        return LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden, weight, token_ids, temperature=1.0, return_entropy=True
        )

    return function


def _cut_cross_entropy() -> Function:
    from cut_cross_entropy import linear_cross_entropy

    def function(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, None]:
        return linear_cross_entropy(hidden, weight, token_ids, reduction="none"), None

    return function


def _verl() -> Function:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def function(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = linear_cross_entropy(hidden, weight, token_ids, 1.0, "none")
        return -logprobs, entropy

    return function


LOGITS = {
    "trl": Peer("trl", _trl_logits, "triton"),
    "liger": Peer("liger-kernel", _liger_logits, "triton", has_gradient=False),
}

# On a CPU, trl and liger-kernel take their own way in PyTorch; on Hopper, liger-kernel needs nvidia-cutlass-dsl.
HIDDEN = {
    "trl": Peer("trl", _trl_hidden),
    "liger": Peer("liger-kernel", _liger_hidden),
    "cut-cross-entropy": Peer("cut-cross-entropy", _cut_cross_entropy, "cuda"),
    "verl": Peer("verl", _verl, "cuda"),
}


DIVERGENCE = {"trl": Peer("trl", _trl_divergence)}


def versions() -> dict[str, str | None]:
    return {peer.package: peer.version for peer in (*LOGITS.values(), *HIDDEN.values())}


def usual(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What trainers write in eager PyTorch, and torch.compile is given to fuse."""
    logprobs = logits.float().log_softmax(-1)
    surprisal = -logprobs.gather(1, token_ids[:, None]).squeeze(1)
    return surprisal, -(logprobs.exp() * logprobs).sum(-1)


def usual_divergence(
    hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """What trainers write in eager PyTorch; the student's entropy, and the divergence from all logits of both."""
    p, q = (hidden @ weight.T).float().log_softmax(-1), (other @ other_weight.T).float().log_softmax(-1)
    entropy = -(p.exp() * p).sum(-1)
    if kind == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1), entropy
    if kind == "forward_kl":
        return (q.exp() * (q - p)).sum(-1), entropy
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)), entropy


def usual_linear(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    return usual(hidden @ weight.T, token_ids)


def weighted(function: Function, weights: Tensor, *inputs: Any) -> Tensor:
    """A scalar with gradients to both outputs, of as many rows as a function has results for; () -> its loss."""
    surprisal, entropy = function(*inputs)
    loss = (weights[0, : surprisal.shape[0]] * surprisal).sum()
    return loss if entropy is None else loss + (weights[1] * entropy).sum()


def worst(found: Sequence[Tensor | None], expected: dict[str, Tensor]) -> dict[str, dict[str, float | None]]:
    """Largest absolute and relative error of each result that there is, against ``expected``, in float64.

    Relative: to the number itself for surprisal and entropy; for a gradient to its largest entry, since a small entry
    beside large ones matters to nobody. None stands for a NaN, or an infinity, where a finite number is right.
    """
    errors: dict[str, dict[str, float | None]] = {}
    for result, (name, want) in zip(found, expected.items(), strict=True):
        if result is None:
            continue
        rows = min(result.shape[0], want.shape[0])
        want = want[:rows].double()
        off = (result[:rows].detach().to(want.device).double() - want).abs()
        scale = want.abs() if want.dim() == 1 else want.abs().max().expand_as(want)
        relative = torch.where(off == 0, 0.0, off / scale)
        errors[name] = {"absolute": _number(off), "relative": _number(relative)}
    return errors


def _number(values: Tensor) -> float | None:
    largest = float(values.amax()) if values.numel() else 0.0
    return largest if math.isfinite(largest) else None
