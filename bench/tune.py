"""Which block and how many warps the vocabulary kernels like: ``python bench/tune.py`` (``--tiny``, ``--limit S``).

Times each kernel with each setting on bfloat16 logits, best first, as a share of the rate of a copy measured in the
same run, and writes the tables and a JSON to ``bench/results``. The results of every setting are compared with those of
the first, which are the constants as they stand. For a GPU; ``--tiny`` runs anywhere and only proves that it runs.
"""

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

from bench import report  # noqa: E402
from bench.harness import DEVICE, best_of, copy_bandwidth, describe_machine, graph_of, median_of_events  # noqa: E402
from leafkernels.kernels import policy_loss_from_logits, surprisal  # noqa: E402
from leafkernels.losses.kinds import LossOptions  # noqa: E402
from leafkernels.losses.policy_loss_from_logits import LossConstants  # noqa: E402
from leafkernels.vocabulary.inputs import RowStatistics, SampledTokens  # noqa: E402

SHAPES = tuple(itertools.product((64, 8192), (151_936, 128_256)))
TINY_SHAPES = ((2, 300),)
BLOCKS = (1024, 2048, 4096, 8192, 16_384)
WARPS = (4, 8, 16)
TINY_SETTINGS = ((256, 1), (512, 1))
ELEMENTS = range(8, 65)  # of a thread in a block: at least a 16-byte load, and not more than registers hold
ROUNDS = 15


def settings() -> list[tuple[int, int]]:
    return [(block, warps) for block in BLOCKS for warps in WARPS if block // (32 * warps) in ELEMENTS]


@contextmanager
def constants(block: int, warps: int) -> Iterator[None]:
    """The kernels with this block and these warps."""
    before = surprisal.BLOCK, surprisal.THREADS
    surprisal.BLOCK, surprisal.THREADS = block, 32 * warps
    try:
        yield
    finally:
        surprisal.BLOCK, surprisal.THREADS = before


class Case:
    """Logits of one shape, the three kernels on them, and how often each moves the logits through memory."""

    TIMES = {"states": 1, "backward": 2, "loss and gradient": 2}

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        self.num_rows, self.vocab_size = num_rows, vocab_size
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.logits = torch.empty((num_rows, vocab_size), dtype=torch.bfloat16, device=DEVICE)
        self.logits.normal_(0, 3, generator=generator)
        self.gradients = torch.empty_like(self.logits)
        self.ids = torch.randint(vocab_size, (num_rows,), generator=generator, device=DEVICE)
        self.ones = torch.ones(num_rows, device=DEVICE)
        self.mask = torch.ones(num_rows, dtype=torch.bool, device=DEVICE)
        self.statistics = RowStatistics(*surprisal.surprisal_entropy(self.logits, self.ids, self.ones, None))

    def states(self) -> tuple[Tensor, ...]:
        return surprisal.surprisal_entropy(self.logits, self.ids, self.ones, None)

    def backward(self) -> tuple[Tensor, ...]:
        surprisal.write_gradients(
            self.gradients, self.logits, self.ones, self.ones, self.statistics, SampledTokens(self.ids, self.ones, None)
        )
        return (self.gradients,)

    def loss(self) -> tuple[Tensor, ...]:
        options = LossOptions((0.2, 0.2, math.inf, 0.0), entropy_coef=0.01)
        old_logprobs = -self.statistics.surprisal
        constants = LossConstants(self.ids, self.ones, self.mask, self.ones, old_logprobs, self.ones, None, None)
        return policy_loss_from_logits.policy_loss_from_logits(self.logits, constants, options, True)

    def kernels(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        return {"states": self.states, "backward": self.backward, "loss and gradient": self.loss}


def few(results: tuple[Tensor, ...]) -> list[Tensor]:
    """What is compared: results for each row in full, gradients of the first and last rows."""
    return [x.clone() if x.shape[-1] == x.numel() or x.shape[0] < 16 else x[[0, -1]].clone() for x in results]


def seconds_of(call: Callable[[], Any]) -> float:
    if DEVICE == "cpu":
        return best_of(call, 1)
    if median_of_events(call, 3) > 1e-3:
        return median_of_events(call, ROUNDS)
    replay, count = graph_of([call])  # a launch takes as long as such a kernel
    return median_of_events(replay, ROUNDS) / count


def measure(shapes: Any, tried: list[tuple[int, int]], deadline: float) -> tuple[list[dict[str, Any]], list[str]]:
    """One setting after another, on all shapes: a kernel compiles once for a setting."""
    rows, left_out = [], []
    all_cases = [Case(*shape) for shape in shapes]
    expected = [{kernel: few(call()) for kernel, call in case.kernels().items()} for case in all_cases]
    shipped = (surprisal.BLOCK, surprisal.num_warps())
    for setting in dict.fromkeys([*([shipped] if DEVICE == "cuda" else []), *tried]):
        if time.monotonic() > deadline:
            left_out.append(f"{setting}: the time is spent")
            continue
        with constants(*setting):
            for case, right in zip(all_cases, expected, strict=True):
                for kernel, call in case.kernels().items():
                    try:
                        result = few(call())
                    except Exception as error:  # a setting that does not fit the device
                        left_out.append(f"{setting}, {kernel}: {type(error).__name__}: {str(error).splitlines()[0]}")
                        continue
                    # One rounding of a gradient to bfloat16, and the order of float32 sums.
                    torch.testing.assert_close(result, right[kernel], rtol=2**-7, atol=1e-5)
                    del result
                    seconds = seconds_of(call)
                    moved = Case.TIMES[kernel] * case.logits.numel() * case.logits.element_size()
                    rows.append(
                        {
                            "kernel": kernel,
                            "num_rows": case.num_rows,
                            "vocab_size": case.vocab_size,
                            "block": setting[0],
                            "num_warps": setting[1],
                            "is_shipped": setting == shipped,
                            "seconds": seconds,
                            "bytes": moved,
                            "copy_share": moved / seconds / copy_bandwidth() if DEVICE == "cuda" else None,
                        }
                    )
    return rows, left_out


def markdown(found: dict[str, Any]) -> str:
    machine = found["machine"]
    lines = [
        f"# Settings of the vocabulary kernels on {machine['device']}, {machine['date']}",
        "",
        f"python {machine['python']}, torch {machine['torch']}, triton {machine['triton']}, cuda {machine['cuda']}. "
        "bfloat16 logits; medians of the device's time, best first. The share is of a large copy's rate, by logits "
        "read once (states, merging included), or read once and a gradient written.",
        "",
    ]
    if machine["tiny"]:
        lines += ["**Tiny, perhaps under the interpreter: these numbers say only that it runs.**", ""]
    keys = dict.fromkeys((row["kernel"], row["num_rows"], row["vocab_size"]) for row in found["rows"])
    for key in keys:
        rows = [row for row in found["rows"] if (row["kernel"], row["num_rows"], row["vocab_size"]) == key]
        rows.sort(key=lambda row: row["seconds"])
        cells = [
            [
                f"{row['block']}{' (shipped)' if row['is_shipped'] else ''}",
                str(row["num_warps"]),
                report.as_time(row["seconds"]),
                "" if row["copy_share"] is None else f"{row['copy_share']:.1%}",
            ]
            for row in rows
        ]
        kernel, num_rows, vocab_size = key
        lines += [f"## {kernel}, {num_rows} x {vocab_size}", ""]
        lines += [*report.table(["block", "warps", "time", "of a copy"], cells), ""]
    if found["left_out"]:
        lines += ["## Left out", "", *(f"- {line}" for line in found["left_out"]), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the vocabulary kernels with every block and number of warps.")
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench" / "results", help="folder of the two files")
    parser.add_argument("--tiny", action="store_true", help="one tiny shape, two settings: proves that it runs")
    parser.add_argument("--limit", type=float, default=170.0, help="seconds after which settings are left out")
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.tiny:
        print("needs a CUDA device: timing Triton's interpreter would mean nothing (--tiny runs)", file=sys.stderr)
        return 1
    deadline = math.inf if arguments.tiny else time.monotonic() + arguments.limit
    tried = list(TINY_SETTINGS) if arguments.tiny else settings()
    rows, left_out = measure(TINY_SHAPES if arguments.tiny else SHAPES, tried, deadline)
    found = {"machine": describe_machine(arguments.tiny), "rows": rows, "left_out": left_out}
    report.write(found, markdown(found), arguments.out, "tune")
    return 0


if __name__ == "__main__":
    sys.exit(main())
