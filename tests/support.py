"""What tests repeat: estimators and their reference, how many cases are generated, Python in a process of its own."""

import gzip
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from pages import ROOT
from rollouts import DEVICE, Rollouts
from torch import Tensor

import python_ref
from leafkernels import ESTIMATORS

every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
# For laws of many generated cases: `make quick` holds one scheme to them.
every_estimator_slowly = pytest.mark.parametrize(
    "name", [name if name == "leaf" else pytest.param(name, marks=pytest.mark.slow) for name in ESTIMATORS]
)


def takes(name: str, option: str) -> bool:
    return option in inspect.signature(ESTIMATORS[name]).parameters


def options_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options, drawn for LEAF, that the estimator takes."""
    found = {option: value for option, value in options.items() if takes(name, option)}
    if name == "tree_td" and found.get("normalize") in ("span", "batch"):  # it has no spans to compare
        found["normalize"] = "none"
    return found


def reference_of(name: str) -> Callable[..., list[list[float]]]:
    return getattr(python_ref, ESTIMATORS[name].__name__)


def expected(name: str, case: Rollouts) -> list[list[float]]:
    """Advantages from the reference."""
    rows = case.logprobs, case.token_ids, case.rewards
    options = options_of(name, case.options)
    return reference_of(name)(*rows, response_mask=case.mask, groups=case.groups, **options)


def examples(backend: str = "torch", *, torch: int = 150, triton: int = 8, reference: int = 40) -> settings:
    """How many cases hypothesis generates: Triton's interpreter takes up to a second for one, a GPU does not.

    A fifth of them in CI, where they are the same every time.
    """
    most = {"torch": torch, "triton": torch if DEVICE == "cuda" else triton, "reference": reference}[backend]
    return settings(max_examples=max(most // 5, min(most, 5)) if os.environ.get("CI") else most)


def compare_with_compiled(loss: Callable[[Tensor, Tensor], Tensor], logprobs: Tensor, rewards: Tensor) -> None:
    """Value and gradients of a function of both, as it is and compiled into one graph."""
    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [tensor.clone().requires_grad_() for tensor in (logprobs, rewards)]
        value = function(*inputs)
        value.backward()
        assert inputs[1].grad is not None
        assert inputs[1].grad.any()
        results.append((value.detach(), *(tensor.grad for tensor in inputs)))
    torch.testing.assert_close(results[1], results[0])


def without_interpreter(**changes: str) -> dict[str, str]:
    """The environment of a process that leaves Triton as it is, and finds the package of this checkout.

    What concerns this run of pytest (options, number of its worker) is not for one that it starts.
    """
    ours = ("TRITON_INTERPRET", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return environment | {"PYTHONPATH": str(ROOT)} | changes


def run_python(
    *arguments: object, cwd: Path = ROOT, timeout: float = 300, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python without Triton's interpreter; ``check``: it must not fail."""
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env=without_interpreter(PYTHONIOENCODING="utf-8", **environment),
        timeout=timeout,
    )
    assert run.returncode == 0 or not check, run.stdout[-4000:] + run.stderr[-4000:]
    return run


def results_of(study: Path, part: str) -> list[Any]:
    """What a study of examples/study found in one of its parts."""
    with gzip.open(study / "results" / "runs.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [line["result"] for line in lines if line["part"] == part]


def cells_of(text: str) -> list[list[str]]:
    """The cells of all rows of all tables of a page, without the lines below their heads."""
    rows = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in rows]
    return [row for row in rows if set("".join(row)) != {"-"}]
