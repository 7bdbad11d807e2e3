"""How a case is run: a correctness gate, then timing. No gate, no number.

on a CPU   pytest-benchmark's rounds of wall time, on one thread: literal Python has one too, and threads that wait
           for each other on a busy machine measure its other users (``--threads`` changes it)
on a GPU   the same wall time with a synchronisation behind each call, and the device's own time: events around
           replays of a CUDA graph, or around calls where the code reads results back and no graph can hold it
"""

import datetime
import math
import os
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import peers
from bench.rollouts import CPU_TOKENS, LITERAL_TOKENS, Batch, Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# In this order, so that what a ratio is against has been timed before.
BACKENDS = ("python_ref", "torch", "compile", "triton")

# What a table gives ratios to, where the case has been timed before the others.
BASELINES = ("python_ref", "torch", "plain", "usual", "products", "composed", "trl", "masked")

# Whose calls a CUDA graph can hold: the others read sizes back from the device. Worth it for short calls only, where
# the gaps between kernels count; eight long ones would take seconds a round.
GRAPHED = ("plain", "usual", "composed", "trl", "triton")
GRAPHED_SECONDS = 0.01

Call = Callable[[], Any]
Prepare = Callable[[Batch], Call]
"""Arranges a batch as an implementation takes it, outside of the time, and returns what is timed."""


@dataclass
class Session:
    """What one run of the benches knows."""

    tiny: bool
    seconds: float
    compile_seconds: float
    deadline: float
    medians: dict[tuple[str, str, str, str], float] = field(default_factory=dict)
    promises: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a peer has no numbers, by operation and name."""

    def promise(self, op: str, shape: str, of: str, least: float, theirs: float, ours: float, unit: str) -> None:
        """Write down, and outside of --tiny demand, that ``theirs`` is at least ``least`` times ``ours``."""
        ratio = theirs / ours
        verdict = "not judged on tiny shapes" if self.tiny else "kept" if ratio >= least else "broken"
        self.promises.append(
            {
                "op": op,
                "shape": shape,
                "of": of,
                "theirs": theirs,
                "ours": ours,
                "unit": unit,
                "ratio": ratio,
                "least": least,
                "verdict": verdict,
            }
        )
        if verdict == "broken":
            pytest.fail(
                f"{op} on {shape}, {of}: {ours:.4g} {unit} against {theirs:.4g} {unit} is {ratio:.2f}x, promised "
                f"{least:g}x ({torch.get_num_threads()} threads)"
            )

    def why_not(self, backend: str, shape: Shape) -> str | None:
        """The reason to skip a case, or None."""
        if time.monotonic() > self.deadline:
            return "the time for all benches (--limit) is spent"
        if DEVICE == "cpu" and shape.num_tokens > CPU_TOKENS:
            return f"{shape.num_tokens / 1e6:.0f} million tokens: on a GPU only"
        if backend == "triton" and DEVICE == "cpu":
            return "needs a CUDA device: timing Triton's interpreter would mean nothing"
        if backend == "python_ref" and shape.num_tokens > LITERAL_TOKENS:
            return f"literal Python is timed up to {LITERAL_TOKENS} tokens, this shape has {shape.num_tokens}"
        if backend == "compile":
            if self.tiny:
                return "compiling takes longer than --tiny allows"
            if self.compile_seconds <= 0:
                return "the time for compiling (--compile-seconds) is spent"
            if DEVICE == "cpu" and shape.num_tokens > LITERAL_TOKENS:
                return f"compiled for the CPU up to {LITERAL_TOKENS} tokens, this shape has {shape.num_tokens}"
            if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
                return "torch.compile needs a C++ compiler, and there is none on the path"
        return None


@dataclass
class Bench:
    """The fixture ``bench``: one case of one operation."""

    benchmark: Any
    session: Session

    def __call__(
        self,
        op: str,
        shape: Shape,
        inputs: str,
        backend: str,
        prepares: dict[str, Prepare],
        gate: Callable[[Batch, Any], Any],
        bytes_moved: Callable[[Batch], int],
        tolerance: float | None,
    ) -> None:
        """Check and time ``prepares[backend]`` on rollouts of a shape.

        ``gate(batch, result)`` compares a result with literal Python, on a sample of the prompts where the shape is
        large; what is neither literal nor the PyTorch backend is also compared with the latter, in full, to a relative
        and absolute ``tolerance``, unless that is None.
        What ``gate`` returns, if anything, are the errors to be written beside the times.
        ``bytes_moved`` counts what any implementation has to read and write, each byte once.
        """
        reason = self.session.why_not(backend, shape)
        if reason:
            pytest.skip(reason)
        if backend == "compile":
            torch._dynamo.reset()  # nothing, sizes seen before least of all, is to depend on the cases before
        sets = shape.batches(inputs, DEVICE, _num_sets(shape))
        calls = [prepares[backend](batch) for batch in sets]
        result = self._first_call(op, backend, calls[0])
        errors = gate(sets[0], result)
        if backend in ("compile", "triton") and tolerance is not None:
            expected = prepares["torch"](sets[0])()
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
            del expected
        del result

        on_device = DEVICE == "cuda" and backend != "python_ref"
        info: dict[str, Any] = {
            "op": op,
            "shape": shape.name,
            "inputs": inputs,
            "backend": backend,
            "device": "cuda" if on_device else "cpu",
            "tokens": shape.num_tokens,
            "bytes": bytes_moved(sets[0]),
        }
        if errors is not None:
            info["errors"] = errors
        if on_device:
            info.update(_on_device(calls, backend, info["bytes"], self.session))
        self.benchmark.group = f"{op} {shape.name} {inputs}"
        self.benchmark.extra_info.update(info)
        self._wall_time(calls[0], backend, on_device)
        self._ratios(op, shape.name, inputs, backend)

    def _skip(self, op: str, backend: str, reason: str) -> None:
        if backend not in BACKENDS:
            self.session.skipped[f"{op}, {backend}"] = reason
        pytest.skip(reason)

    def _first_call(self, op: str, backend: str, call: Call) -> Any:
        """The result to check; also the warm-up, which for torch.compile is most of the work."""
        if backend in BACKENDS and backend != "compile":
            return call()
        if backend != "compile":
            try:
                return call()
            except Exception as error:  # what a peer cannot do here, for want of memory too
                reason = f"it fails: {peers.first_line(error)}"
            self._skip(op, backend, reason)
        start = time.perf_counter()
        try:
            return call()
        except (torch._dynamo.exc.TorchDynamoException, torch.OutOfMemoryError) as error:
            pytest.skip(f"torch.compile fails: {type(error).__name__}: {str(error).splitlines()[0]}")
        finally:
            self.session.compile_seconds -= time.perf_counter() - start

    def _wall_time(self, call: Call, backend: str, on_device: bool) -> None:
        def synchronized() -> None:
            call()
            torch.cuda.synchronize()

        timed = synchronized if on_device else call
        rounds = iterations = 1
        if not self.session.tiny:
            once = best_of(timed, 1 if backend == "python_ref" else 3)
            # Rounds long enough for the clock, and enough of them for a median; the slowest of literal Python get two.
            iterations = max(1, math.ceil(2e-4 / once))
            rounds = max(2, min(100, int(self.session.seconds / (once * iterations))))
        self.benchmark.pedantic(timed, rounds=rounds, iterations=iterations, warmup_rounds=0)

    def _ratios(self, op: str, shape: str, inputs: str, backend: str) -> None:
        if self.benchmark.stats is None:  # --benchmark-disable
            return
        medians = self.session.medians
        median = medians[op, shape, inputs, backend] = self.benchmark.stats.stats.median
        for other in BASELINES:
            if (op, shape, inputs, other) in medians:
                self.benchmark.extra_info[f"ratio_{other}"] = medians[op, shape, inputs, other] / median


def best_of(call: Call, rounds: int) -> float:
    """Least seconds of a call: other work only ever adds time."""
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def interleaved(first: Call, second: Call, seconds: float) -> tuple[float, float]:
    """Seconds of two calls, each the best of as many rounds, in turns: a busy spell of the machine meets both.

    The quicker one is called several times a round and averaged, so that its rounds last as long as the other's: the
    least of many short moments would find it a quiet one where the slower call has none.
    """
    once = best_of(first, 1), best_of(second, 1)
    calls = [max(1, round(max(once) / seconds_of_call)) for seconds_of_call in once]
    best = [math.inf, math.inf]
    end = time.perf_counter() + seconds
    while True:
        for i, call in enumerate((first, second)):
            start = time.perf_counter()
            for _ in range(calls[i]):
                call()
            best[i] = min(best[i], (time.perf_counter() - start) / calls[i])
        if time.perf_counter() > end:
            return best[0], best[1]


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for the exact shapes at hand: its best case. Every case compiles afresh."""
    return torch.compile(function, dynamic=False)


def _l2_bytes() -> int:
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20


def _num_sets(shape: Shape) -> int:
    """Batches to rotate among on a GPU, so that none is still in its cache (small ones always come from there)."""
    if DEVICE == "cpu":
        return 1
    return max(1, min(16, math.ceil(2 * _l2_bytes() / shape.bytes_of_batch)))


def median_of_events(call: Call, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _rounds(call: Call, session: Session) -> int:
    if session.tiny:
        return 1
    return max(3, min(100, int(session.seconds / max(median_of_events(call, 2), 1e-6))))


def graph_of(calls: Sequence[Call]) -> tuple[Call, int]:
    """A CUDA graph of the calls in turn, and how many it holds: several, so that its launch does not count."""
    many = list(calls) * math.ceil(8 / len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in many:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, len(many)


def device_seconds(calls: Sequence[Call], backend: str, session: Session) -> tuple[float, str]:
    """Device seconds of one call, and how they were taken."""
    if backend in GRAPHED and median_of_events(calls[0], 3) < GRAPHED_SECONDS:
        try:
            replay, count = graph_of(calls)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph holds this call: {error}", stacklevel=2)
        else:
            return median_of_events(replay, _rounds(replay, session)) / count, "graph"

    def all_calls() -> None:
        for call in calls:
            call()

    all_calls()
    return median_of_events(all_calls, _rounds(all_calls, session)) / len(calls), "events"


def _on_device(calls: Sequence[Call], backend: str, num_bytes: int, session: Session) -> dict[str, Any]:
    """Device time, rate, share of the rate of a copy, and the memory a call takes beyond what it is given."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    calls[0]()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    seconds, timing = device_seconds(calls, backend, session)
    rate = num_bytes / seconds
    return {
        "device_seconds": seconds,
        "timing": timing,
        "bytes_per_second": rate,
        "copy_share": rate / copy_bandwidth(),
        "peak_bytes": peak,
    }


@cache
def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, those read plus those written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * source.numel() / median_of_events(lambda: target.copy_(source), 20)


def describe_machine(tiny: bool) -> dict[str, Any]:
    """What a number means nothing without."""
    return {
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
        "peers": peers.versions(),
        "date": datetime.date.today().isoformat(),
        "tiny": tiny,
    }


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
