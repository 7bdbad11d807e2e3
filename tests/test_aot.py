"""Every kernel compiles for real GPUs, without one: no spills, no stack, wide accesses where tokens are streamed."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
compiler = pytest.importorskip("triton.compiler")
if "constexprs" not in inspect.signature(compiler.ASTSource).parameters:
    pytest.skip("needs the interface to Triton's compiler of version 3.3 or later", allow_module_level=True)


@pytest.fixture(scope="module")
def table() -> list[dict]:
    program = Path(__file__).with_name("aot.py")
    root = str(program.parents[1])
    run = subprocess.run(
        [sys.executable, str(program), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": root},
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_no_spills_and_no_stack(table: list[dict]) -> None:
    assert [row for row in table if row["spills"] or row["stack"]] == []


def test_wide_accesses_where_tokens_are_streamed(table: list[dict]) -> None:
    assert [row for row in table if row["contiguous"] and row["widest"] < 16] == []


def test_no_size_is_compiled_in(table: list[dict]) -> None:
    """A new length, number of rows or stride must find a compiled kernel."""
    assert [row for row in table if row["specialised"]] == []


def test_one_exponential_for_each_logit(table: list[dict]) -> None:
    """At each look at it: one is free beside the memory traffic, two are not. A block takes one more to merge states,
    and the loss of a token two."""
    looks = {"surprisal_states": 1, "surprisal_entropy_backward": 1, "policy_loss": 2}
    over_logits = [(looks[row["name"].split()[0]], row) for row in table if row["name"].split()[0] in looks]
    assert over_logits
    assert [row for passes, row in over_logits if not passes <= row["exponentials"] < passes + 0.25] == []


def test_every_kernel_and_architecture_is_in_the_table(table: list[dict]) -> None:
    kernels = Path(__file__).parents[1] / "leafkernels" / "kernels"
    defined = {
        name for file in kernels.glob("*.py") for name in re.findall(r"^def _(\w+)_kernel\(", file.read_text(), re.M)
    }
    assert defined == {row["name"].split()[0] for row in table}
    assert {row["arch"] for row in table} == {80, 90, 100}
