"""Options, the cases of each bench, and what the report reads beside the times."""

import math
import time
from typing import Any

import pytest
import torch

from bench.harness import BACKENDS, DEVICE, Bench, Session, copy_bandwidth, describe_machine
from bench.rollouts import SHAPES, TINY
from leafkernels._core.backend import INTERPRETING

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
    if INTERPRETING:
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
        metafunc.parametrize("backend", getattr(metafunc.module, "BACKENDS", BACKENDS))


@pytest.fixture
def session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[_SESSION]


@pytest.fixture
def bench(benchmark: Any, session: Session) -> Bench:
    return Bench(benchmark, session)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["leafkernels"] = describe_machine(config.getoption("--tiny"))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    output_json["promises"] = config.stash[_SESSION].promises
    output_json["skipped"] = config.stash[_SESSION].skipped
    output_json["copy_bytes_per_second"] = copy_bandwidth() if DEVICE == "cuda" else None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    promises = config.stash[_SESSION].promises
    if promises:
        terminalreporter.section("promises on the CPU")
    for promise in promises:
        terminalreporter.line(
            f"{promise['op']} on {promise['shape']}, {promise['of']}: {promise['ratio']:.3g}, promised "
            f"{promise['least']:g}: {promise['verdict']}"
        )
