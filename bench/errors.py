"""Errors of ours and of others: surprisal, entropy and gradient against float64, on rows easy and hard.

``python bench/errors.py`` (``--tiny``, ``--out DIR``) prints tables, and writes them with a JSON to ``bench/results``.
Runs on a GPU, or on a CPU with Triton's kernels, ours and others', under its interpreter. No time is taken.

Libraries that take hidden states are given a hidden state that picks its row out of the weight, so that their logits
are exactly those of the others: a product with 1 and products with 0, which -inf does not survive.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

import leafkernels  # noqa: E402
import python_ref  # noqa: E402
from bench import peers, report  # noqa: E402
from bench.harness import DEVICE, describe_machine  # noqa: E402

VOCAB = 151_936
TINY_VOCAB = 1000
WIDTH = 128  # of hidden states: what verl asks for at least

Errors = dict[str, dict[str, float | None]]


def cases(vocab: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Float32 logits (rows, V) and sampled ids; the first row's id is the likeliest, as most are in training."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.empty(3, vocab).normal_(0, 3, generator=generator)
    random_ids = torch.randint(vocab, (3,), generator=generator)

    def peaked(lead: float) -> Tensor:
        rows = torch.rand(3, vocab, generator=generator)
        rows[torch.arange(3), vocab // torch.tensor([2, 3, 5])] = 1 + lead
        return rows

    some, leading, all_but_one = normal.clone(), normal.clone(), torch.full_like(normal, -math.inf)
    some[torch.rand(3, vocab, generator=generator) < 0.3] = -math.inf
    leading[:, : vocab * 2 // 3] = -math.inf
    all_but_one[torch.arange(3), random_ids] = 1.0
    rows = {
        "normal": normal,
        "shifted by 1e4": normal + 1e4,
        "shifted by -1e4": normal - 1e4,
        "lead 10": peaked(10),
        "lead 30": peaked(30),
        "lead 60": peaked(60),
        "-inf: some": some,
        "-inf: leading two thirds": leading,
        "-inf: all but one": all_but_one,
    }
    return {name: (logits, _ids(logits, random_ids)) for name, logits in rows.items()}


def _ids(logits: Tensor, random_ids: Tensor) -> Tensor:
    ids = torch.where(logits.gather(1, random_ids[:, None]).squeeze(1).isfinite(), random_ids, logits.argmax(1))
    ids[0] = logits[0].argmax()
    return ids


def truth(logits: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """By definition, with exact sums; the gradient of the weighted sum from them, in float64."""
    surprisal, entropy = python_ref.surprisal_entropy(logits.tolist(), ids.tolist())
    x, h = logits.double(), torch.tensor(entropy, dtype=torch.float64)
    z = x - x.amax(1, keepdim=True)
    # log sum e^z, with what is not at the top kept apart, where 1 + rest would round it away.
    top = z == 0
    ties, rest = top.sum(1, keepdim=True).double(), z.exp().masked_fill(top, 0.0).sum(1, keepdim=True)
    logp = z - ties.log() - (rest / ties).log1p()
    p = logp.exp()
    exact_surprisal = torch.tensor(surprisal, dtype=torch.float64)
    # p - 1 of the sampled id, where p may be 1 to within rounding.
    gradient = weights[0, :, None] * p.scatter(1, ids[:, None], (-exact_surprisal).expm1()[:, None])
    gradient -= weights[1, :, None] * torch.where(p == 0, 0.0, p * (logp + h[:, None]))
    return {"surprisal": exact_surprisal, "entropy": h, "gradient": gradient}


def through_hidden(function: peers.Function) -> peers.Function:
    """A function of hidden states and weight as one of logits: row i of the hidden states is the i-th unit vector."""

    def from_logits(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = torch.eye(logits.shape[0], WIDTH, dtype=logits.dtype, device=logits.device)
        weight = torch.nn.functional.pad(logits.T, (0, WIDTH - logits.shape[0]))
        return function(hidden, weight.contiguous(), ids)

    return from_logits


def implementations(tiny: bool) -> tuple[dict[str, tuple[peers.Function, bool, bool]], dict[str, str]]:
    """By name: a function of logits, whether it has a gradient, whether it takes hidden states; and who is absent."""

    def ours(function: Callable[..., Any], backend: str) -> peers.Function:
        return lambda *inputs: tuple(function(*inputs, backend=backend))

    where = "interpreter" if DEVICE == "cpu" else "GPU"
    found: dict[str, tuple[peers.Function, bool, bool]] = {}
    for backend, name in (("torch", "ours, PyTorch"), ("triton", f"ours, Triton ({where})")):
        found[name] = ours(leafkernels.surprisal_entropy, backend), True, False
        hidden = through_hidden(ours(leafkernels.linear_surprisal_entropy, backend))
        found[f"{name}, hidden"] = hidden, True, True
    found["PyTorch eager"] = peers.usual, True, False
    absent = {}
    if tiny:
        absent["torch.compile"] = "compiling takes longer than --tiny allows"
    else:
        found["torch.compile"] = torch.compile(peers.usual, dynamic=False), True, False
    for of, hint in ((peers.LOGITS, ""), (peers.HIDDEN, ", hidden")):
        for name, peer in of.items():
            reason = peer.why_not(DEVICE)
            if reason:
                absent[f"{name}{hint}"] = reason
                continue
            function = peers.loaded(peer)
            ran_by = f" ({where})" if peer.runs_on == "triton" and DEVICE == "cpu" else ""
            label = f"{peer.package} {peer.version}{hint}{ran_by}"
            found[label] = (through_hidden(function) if hint else function), peer.has_gradient, bool(hint)
    return found, absent


def errors_of(
    function: peers.Function, has_gradient: bool, logits: Tensor, ids: Tensor, weights: Tensor, expected: Any
) -> Errors:
    leaf = logits.detach().clone().requires_grad_(has_gradient)
    surprisal, entropy = function(leaf, ids)
    gradient = None
    if has_gradient:
        loss = (weights[0] * surprisal).sum()
        if entropy is not None:
            loss = loss + (weights[1] * entropy).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
    if entropy is None and gradient is not None:
        only_surprisal = weights * torch.tensor([[1.0], [0.0]], device=weights.device)
        expected = truth(logits.cpu(), ids.cpu(), only_surprisal.cpu())
    return peers.worst([surprisal, entropy, gradient], expected)


def measure(vocab: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    functions, absent = implementations(vocab == TINY_VOCAB)
    weights = torch.tensor([[1.0, 0.5, 2.0], [0.5, 2.0, 1.0]])
    results = []
    inputs = [
        (case, dtype, rows.to(dtype), ids, truth(rows.to(dtype), ids, weights))
        for case, (rows, ids) in cases(vocab).items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    # One after another, ours first: what breaks a GPU's context ends nobody's row but its own and those behind.
    for name, (function, has_gradient, is_hidden) in functions.items():
        print(name, file=sys.stderr)
        for case, dtype, logits, ids, expected in inputs:
            if is_hidden and logits.isinf().any():
                continue
            try:
                arguments = logits.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE)
                errors = errors_of(function, has_gradient, *arguments, expected)
            except Exception as error:
                if name.startswith("ours"):
                    raise
                absent.setdefault(f"{name}, {dtype}", f"it fails on {case}: {peers.first_line(error)}")
                continue
            results.append({"case": case, "dtype": str(dtype).split(".")[1], "of": name, "errors": errors})
    return results, absent


def _cell(error: dict[str, float | None] | None) -> str:
    if error is None:
        return ""
    relative, absolute = error["relative"], error["absolute"]
    if absolute is None:
        return "**NaN**"
    if absolute == 0:
        return "0"
    # 0 is right, and a number came.
    return f"{'inf' if relative is None else f'{relative:.0e}'} ({absolute:.0e})"


def markdown(found: dict[str, Any]) -> str:
    machine = found["machine"]
    rounding = ""
    if machine["device_type"] == "cpu":
        rounding = " Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds: bfloat16 gradients show it."
    where = "the GPU" if machine["device_type"] == "cuda" else "a CPU, Triton kernels under Triton's interpreter"
    lines = [
        f"# Errors on {machine['device']}, {machine['date']}",
        "",
        f"Taken on {where}: python {machine['python']}, torch {machine['torch']}, triton {machine['triton']}. "
        f"3 rows of {found['vocab']} logits a case; no times.",
        "",
        "Largest relative error against float64 on the inputs as rounded to the dtype, and in brackets the largest "
        "absolute error (nats). Of the gradient of a weighted sum of both: relative to its largest entry. NaN: NaN or "
        "infinity where the answer is finite; inf: a number where it is 0. Empty: has no such result, or cannot be "
        "given such rows (-inf does not come out of a product of finite numbers). Those that take hidden states get "
        "exactly these logits too." + rounding,
        "",
    ]
    if machine["tiny"]:
        lines += ["**A tiny vocabulary: this says only that the table is made.**", ""]
    names = list(dict.fromkeys(result["of"] for result in found["results"]))
    case_names = list(dict.fromkeys(result["case"] for result in found["results"]))
    for what in ("entropy", "surprisal", "gradient"):
        for dtype in dict.fromkeys(result["dtype"] for result in found["results"]):
            errors = {
                (result["of"], result["case"]): result["errors"].get(what)
                for result in found["results"]
                if result["dtype"] == dtype
            }
            rows = [[name, *(_cell(errors.get((name, case))) for case in case_names)] for name in names]
            rows = [row for row in rows if any(row[1:])]
            lines += [f"## {what}, {dtype} logits", "", *report.table(["", *case_names], rows), ""]
    if found["absent"]:
        lines += ["## Not measured", "", *(f"- {name}: {why}" for name, why in found["absent"].items()), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of ours and others against float64, as tables and JSON.")
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench" / "results", help="folder of the two files")
    parser.add_argument("--tiny", action="store_true", help="a tiny vocabulary: proves that the table is made")
    arguments = parser.parse_args()
    vocab = TINY_VOCAB if arguments.tiny else VOCAB
    results, absent = measure(vocab)
    found = {"machine": describe_machine(arguments.tiny), "vocab": vocab, "results": results, "absent": absent}
    report.write(found, markdown(found), arguments.out, "errors")


if __name__ == "__main__":
    main()
