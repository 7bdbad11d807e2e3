"""How time grows when tokens, rows and prompts double, and what a GPU is to reach: ``python -m bench.bench_growth``.

The exponents are those of a line through log time over log size. On a CPU they are promised. On a GPU the script prints
device times and the goals beside what was measured, and ``pytest bench/bench_growth.py`` judges both.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence

import pytest
import torch

import leafkernels
from bench.bench_prefix_lengths import dense_compiled
from bench.harness import DEVICE, Call, Session, copy_bandwidth, device_seconds
from bench.rollouts import Batch, Shape

INPUTS = ("sampled", "identical", "last", "comb", "families")

# From half a million tokens, where a step of PyTorch costs little beside them, to what takes a CPU a moment.
BASE = {"prompts": 1, "group": 32, "tokens": 16384}
TINY_BASE = {"prompts": 1, "group": 4, "tokens": 64}
DOUBLINGS = 3
# Short answers in large groups; only the whole function, for a table of all pairs has as many entries as pairs.
SHORT_BASE = {"prompts": 1, "group": 512, "tokens": 512}

# The largest exponent that is promised, by the axis that grows.
PROMISES = {"tokens": 1.1, "prompts": 1.1, "group": 1.3, "short": 1.3}

OPERATIONS: dict[str, Callable[[Batch], Call]] = {
    "common_prefix_lengths": lambda batch: lambda: leafkernels.common_prefix_lengths(batch.token_ids),
    "span_advantages": lambda batch: (
        lambda: leafkernels.span_advantages(batch.logprobs, batch.token_ids, batch.rewards)
    ),
}


CASES = [
    (operation, axis)
    for operation in OPERATIONS
    for axis in PROMISES
    if (operation, axis) != ("common_prefix_lengths", "short")
]


def batches(axis: str, inputs: str, base: dict[str, int], device: str) -> list[Batch]:
    """The same kind of rollouts in sizes that double along one axis; "short" is that of the group."""
    axis = axis.replace("short", "group")
    made = []
    for doubling in range(DOUBLINGS + 1):
        size = {**base, axis: base[axis] << doubling}
        shape = Shape("x".join(map(str, size.values())), *size.values(), 2, (inputs,), "a step of a growing size")
        made.append(shape.batches(inputs, device, 1)[0])
    return made


def cpu_seconds(calls: Sequence[Call], seconds: float) -> list[float]:
    """Least CPU time of each call over rounds in which all take turns."""
    best = [math.inf] * len(calls)
    end = time.monotonic() + seconds
    rounds = 0
    while rounds < 3 or time.monotonic() < end:
        for i, call in enumerate(calls):
            start = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - start)
        rounds += 1
    return best


def exponent(seconds: Sequence[float]) -> float:
    """Slope of log time over log size, where every size is twice the one before."""
    steps = range(len(seconds))
    mean = sum(steps) / len(seconds)
    logs = [math.log2(second) for second in seconds]
    return sum((step - mean) * log for step, log in zip(steps, logs, strict=True)) / sum(
        (step - mean) ** 2 for step in steps
    )


def measure(operation: str, axis: str, inputs: str, session: Session) -> list[float]:
    """Seconds of each size: CPU time, or the device's time on a GPU."""
    base = SHORT_BASE if axis == "short" else BASE
    made = batches(axis, inputs, TINY_BASE if session.tiny else base, DEVICE)
    calls = [OPERATIONS[operation](batch) for batch in made]
    if DEVICE == "cuda":
        return [device_seconds([call], "triton", session)[0] for call in calls]
    return cpu_seconds(calls, 0.0 if session.tiny else 2 * session.seconds)


@pytest.mark.promise
@pytest.mark.parametrize(("operation", "axis"), CASES)
@pytest.mark.skipif(DEVICE == "cuda", reason="promised on a CPU")
def test_growth(operation: str, axis: str, session: Session) -> None:
    slopes = {inputs: exponent(measure(operation, axis, inputs, session)) for inputs in INPUTS}
    print(operation, axis, ", ".join(f"{name} {slope:.2f}" for name, slope in slopes.items()))
    if not session.tiny:  # which says only that it runs
        assert max(slopes.values()) <= PROMISES[axis], f"{operation} in {axis}: {slopes}"


def ids_read(batch: Batch) -> int:
    """Ids that the kernels read, as they count them themselves."""
    from leafkernels.kernels import prefix_lengths

    prefix_lengths.counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    try:
        leafkernels.common_prefix_lengths(batch.token_ids)
        return int(prefix_lengths.counts[0])
    finally:
        prefix_lengths.counts = None


STEP = Shape("64x16x8k", 64, 16, 8192, 2, ("sampled",), "a step of a reasoning run")
LARGEST = Shape("64x64x32k", 64, 64, 32768, 2, ("identical", "comb"), "the largest batch a single GPU is given")


def on_a_gpu(shape: Shape, inputs: str, session: Session) -> tuple[float, float]:
    """Device seconds in a graph, and how often all ids could have been read meanwhile; prints more."""
    from leafkernels.kernels import prefix_lengths

    batch = shape.batches(inputs, DEVICE, 1)[0]
    call = OPERATIONS["common_prefix_lengths"](batch)
    rounds = prefix_lengths.ROUNDS
    round_times = []
    for prefix_lengths.ROUNDS in (0, 1, 2, 3):
        round_times.append(f"{prefix_lengths.ROUNDS}: {device_seconds([call], 'triton', session)[0] * 1e6:.0f} us")
    prefix_lengths.ROUNDS = rounds
    seconds = device_seconds([call], "triton", session)[0]
    one_read = batch.token_ids.numel() * 8 / copy_bandwidth()
    read = ids_read(batch)
    print(
        f"{shape.name} {inputs}: {seconds * 1e6:.0f} us, {seconds / one_read:.2f} reads of all ids, "
        f"{read / seconds / 1e9:.0f} billion ids read a second, {read * 8 / seconds / copy_bandwidth():.1%} of a copy; "
        f"by rounds of the whole GPU: {', '.join(round_times)}"
    )
    return seconds, seconds / one_read


def peer_seconds(shape: Shape, inputs: str, session: Session) -> float:
    """Device seconds of ``torch.where`` and ``amin`` over all pairs, compiled."""
    torch._dynamo.reset()
    call = dense_compiled(shape.batches(inputs, DEVICE, 1)[0])
    seconds = device_seconds([call], "compile", session)[0]
    print(f"{shape.name} {inputs}: all pairs, compiled: {seconds * 1e6:.0f} us")
    return seconds


on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="a goal for a CUDA device")


def skip_if_needed(shape: Shape, session: Session) -> None:
    reason = "tiny shapes reach no goal" if session.tiny else session.why_not("triton", shape)
    if reason:
        pytest.skip(reason)


@on_gpu
@pytest.mark.promise
def test_a_step_takes_less_than_40_us(session: Session) -> None:
    skip_if_needed(STEP, session)
    assert on_a_gpu(STEP, "sampled", session)[0] < 40e-6


@on_gpu
@pytest.mark.promise
@pytest.mark.parametrize(("inputs", "most"), [("identical", 2.5), ("comb", 6.0)])
def test_the_largest_batch_takes_a_few_reads(inputs: str, most: float, session: Session) -> None:
    skip_if_needed(LARGEST, session)
    seconds, reads = on_a_gpu(LARGEST, inputs, session)
    assert reads <= most
    assert peer_seconds(LARGEST, inputs, session) >= 10 * seconds


def main() -> int:
    torch.set_num_threads(1)
    session = Session("--tiny" in sys.argv[1:], 0.5, 0.0, math.inf)
    for operation, axis in CASES:
        for inputs in INPUTS:
            seconds = measure(operation, axis, inputs, session)
            sizes = ", ".join(f"{second * 1e3:.3g}" for second in seconds)
            label = f"{operation:22} {axis:8} {inputs:10}"
            print(f"{label} ^{exponent(seconds):.2f} (at most {PROMISES[axis]})  {sizes} ms")
    if DEVICE == "cuda" and not session.tiny:
        on_a_gpu(STEP, "sampled", session)
        for inputs in LARGEST.inputs:
            on_a_gpu(LARGEST, inputs, session)
            peer_seconds(LARGEST, inputs, session)
    return 0


if __name__ == "__main__":
    sys.exit(main())
