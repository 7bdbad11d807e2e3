"""Options, the cases of each bench, and what the report reads beside the times."""

import datetime
import math
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness import BACKENDS, DEVICE, Bench, Session, copy_bandwidth
from bench.rollouts import SHAPES, TINY

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("leafkernels benches")
    options.addoption("--tiny", action="store_true", help="tiny shapes, one round: proves that the benches run")
    options.addoption("--threads", type=int, default=1, help="threads of PyTorch on the CPU (default 1)")
    options.addoption("--seconds", type=float, default=0.5, help="about how long a case is timed (default 0.5)")
    options.addoption(
        "--compile-seconds", type=float, default=120.0, help="once compiling took so long, skip the rest (default 120)"
    )
    options.addoption("--limit", type=float, default=math.inf, help="seconds after which remaining cases are skipped")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y"):
        raise pytest.UsageError("unset TRITON_INTERPRET: timing Triton's interpreter means nothing")
    torch.set_num_threads(config.getoption("--threads"))
    config.stash[_SESSION] = Session(
        tiny=config.getoption("--tiny"),
        seconds=config.getoption("--seconds"),
        compile_seconds=config.getoption("--compile-seconds"),
        deadline=time.monotonic() + config.getoption("--limit"),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every shape, with the inputs that both the bench (its INPUTS) and the shape name, on every backend."""
    if "backend" in metafunc.fixturenames:
        is_tiny = metafunc.config.getoption("--tiny")
        # A bench that is not about rollouts brings its own.
        shapes = getattr(metafunc.module, "TINY" if is_tiny else "SHAPES", TINY if is_tiny else SHAPES)
        cases = [(shape, inputs) for shape in shapes for inputs in metafunc.module.INPUTS if inputs in shape.inputs]
        metafunc.parametrize("shape, inputs", cases, ids=[f"{shape.name}-{inputs}" for shape, inputs in cases])
        metafunc.parametrize("backend", BACKENDS)


@pytest.fixture
def session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[_SESSION]


@pytest.fixture
def bench(benchmark: Any, session: Session) -> Bench:
    return Bench(benchmark, session)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a number means nothing without."""
    machine_info["leafkernels"] = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _cpu(),
        "device_type": DEVICE,
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "tiny": config.getoption("--tiny"),
    }


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    output_json["promises"] = config.stash[_SESSION].promises
    output_json["copy_bytes_per_second"] = copy_bandwidth() if DEVICE == "cuda" else None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    promises = config.stash[_SESSION].promises
    if promises:
        terminalreporter.section("promises on the CPU, against literal Python")
    for promise in promises:
        terminalreporter.line(
            f"{promise['shape']}, {promise['num_boundaries']} boundaries: {promise['ratio']:.2f}x "
            f"({promise['python_ref_seconds'] * 1e3:.3f} ms against {promise['torch_seconds'] * 1e3:.3f} ms), "
            f"promised {promise['least']:g}x: {promise['verdict']}"
        )
