"""Every kernel as it is compiled for a GPU, executed thread by thread on a CPU: results, and what the executor saw.

The executor of PTX is a tool beside a development checkout; without it these tests skip.
"""

import ast
import json
from pathlib import Path

import compiled_kernels
import pytest
from support import run_python

pytestmark = pytest.mark.slow
pytest.importorskip("triton")

KERNELS = Path(__file__).parents[1] / "leafkernels" / "kernels"


def launched() -> set[str]:
    """Kernels of the package: names that are called with a grid in brackets."""
    return {
        call.func.value.id
        for file in KERNELS.glob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
    }


@pytest.fixture(scope="module")
def orders(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    executor = shared / "tools" / "ptx"
    if not executor.is_dir():
        pytest.skip(f"needs {executor}, which is not here")
    cache = tmp_path_factory.mktemp("compiled")
    run = run_python(
        compiled_kernels.__file__, executor, timeout=1800, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache)
    )
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def test_every_case_agrees_in_every_order(orders: list[dict]) -> None:
    assert [order["seed"] for order in orders] == list(compiled_kernels.ORDERS)
    assert {order["seed"]: order["failed"] for order in orders if order["failed"]} == {}


def test_no_race_and_no_read_of_what_nobody_wrote(orders: list[dict]) -> None:
    """Threads that write one place together must write one value: else the result is that of the last."""
    assert {order["seed"]: order["seen"] for order in orders if order["seen"]} == {}


def test_every_kernel_was_executed(orders: list[dict]) -> None:
    assert len(launched()) >= 25
    for order in orders:
        assert launched() - set(order["kernels"]) == set()
