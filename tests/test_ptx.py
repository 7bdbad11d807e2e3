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
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", params=[None, 1, 3, 5])
def order(request: pytest.FixtureRequest, shared: Path, cache: Path) -> dict:
    """What came of all cases in order, or interleaved by a seed."""
    executor = shared / "tools" / "ptx"
    if not executor.is_dir():
        pytest.skip(f"needs {executor}, which is not here")
    seed = [] if request.param is None else [request.param]
    options = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    return json.loads(run_python(compiled_kernels.__file__, executor, *seed, timeout=1800, **options).stdout)


def test_every_case_agrees(order: dict) -> None:
    assert order["failed"] == {}


def test_no_race_and_no_read_of_what_nobody_wrote(order: dict) -> None:
    """Threads that write one place together must write one value: else the result is that of the last."""
    assert order["seen"] == []


def test_every_kernel_was_executed(order: dict) -> None:
    assert len(launched()) >= 25
    assert launched() - set(order["kernels"]) == set()
