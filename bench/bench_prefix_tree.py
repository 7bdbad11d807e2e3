"""Finding the prefix tree, beside the trie of TRL's AsyncGRPO: ``python -m bench.bench_prefix_tree``.

Both give the packed tokens of one forward pass, with their positions and whom they see, ours from a tensor of rows and
theirs from a list of samples, as each is handed them. Ours includes ``tree_segments``, which is TRL's layout. In turns
in one process; no case is timed before both trees have shown each token the same prefixes.
"""

import argparse
import itertools
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import leafkernels
from bench import report
from bench.harness import DEVICE, describe_machine, interleaved
from bench.rollouts import Shape
from leafkernels.models import tree_segments

SIZES = ((8, 200), (8, 1024), (64, 200), (64, 4096))
TINY_SIZES = ((4, 24),)
INPUTS = ("sampled", "comb", "identical")


def samples(ids: Tensor) -> list[dict[str, Any]]:
    numbers = torch.zeros(ids.shape[1])
    return [
        {"input_ids": row, "completion_mask": numbers, "old_log_probs": numbers, "advantage": 0.0, "group_id": 0}
        for row in ids.cpu()
    ]


def trie(of_rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    from trl.experimental.async_grpo.packing import TreeRow

    row = TreeRow()
    for sample in of_rows:
        row.add(sample)
    packed: dict[str, Tensor] = row.pack()
    return packed


def tree(ids: Tensor) -> tuple[Any, Any]:
    found = leafkernels.prefix_tree(ids)
    return found, tree_segments(found)


def gate(ids: Tensor, packed: dict[str, Tensor] | None) -> None:
    """The nodes are the different prefixes; TRL has one more for each way on beyond the first."""
    found, _ = tree(ids)
    prefixes: dict[tuple[int, int], int] = {}  # node of the token before, token -> node
    ways: dict[int, set[int | None]] = {}
    for row in ids.tolist():
        before = -1
        for token in row:
            before_that, before = before, prefixes.setdefault((before, token), len(prefixes))
            ways.setdefault(before_that, set()).add(token)
        ways.setdefault(before, set()).add(None)
    assert len(found.token_ids) == len(prefixes)
    if packed is not None:
        ways.pop(-1)
        assert len(packed["input_ids"]) == sum(map(len, ways.values()))


def measure(rows: int, tokens: int, inputs: str, seconds: float, has_trl: bool) -> dict[str, Any]:
    ids = Shape("", 1, rows, tokens, 1, (inputs,), "").batches(inputs, DEVICE, 1)[0].token_ids[0]
    of_rows = samples(ids)
    gate(ids, trie(of_rows) if has_trl else None)
    theirs, ours = interleaved(lambda: trie(of_rows), lambda: tree(ids), seconds) if has_trl else (None, None)
    if ours is None:
        _, ours = interleaved(lambda: None, lambda: tree(ids), seconds)
    ratio = None if theirs is None else theirs / ours
    return {"rows": rows, "tokens": tokens, "inputs": inputs, "trl": theirs, "ours": ours, "ratio": ratio}


def markdown(found: dict[str, Any]) -> str:
    machine = found["machine"]
    lines = [
        f"# Finding the prefix tree on {machine['device']}, {machine['date']}",
        "",
        f"python {machine['python']}, torch {machine['torch']}, TRL {found['trl'] or 'not installed'}, "
        f"{machine['cpu_threads']} thread; load average when written: {machine['load_average']}. One prompt; "
        "`TreeRow.add` of every row and `pack`, and `prefix_tree` and `tree_segments`, in turns, the least of their "
        "times.",
        "",
    ]
    if machine["tiny"]:
        lines += ["**Tiny: these numbers say only that it runs.**", ""]
    cells = [
        [
            f"{case['rows']} x {case['tokens']}",
            case["inputs"],
            report.as_time(case["trl"]),
            report.as_time(case["ours"]),
            "" if case["ratio"] is None else f"{case['ratio']:.1f}",
        ]
        for case in found["cases"]
    ]
    return "\n".join([*lines, *report.table(["rows", "inputs", "TRL", "ours", "ratio"], cells), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the prefix tree beside TRL's trie.")
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench" / "results", help="folder of the two files")
    parser.add_argument("--tiny", action="store_true", help="few tokens: proves that it runs")
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a case is timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        trl = version("trl")
    except PackageNotFoundError:
        trl = None
    seconds = 0.0 if arguments.tiny else arguments.seconds
    cases = [
        measure(*size, inputs, seconds, trl is not None)
        for size, inputs in itertools.product(TINY_SIZES if arguments.tiny else SIZES, INPUTS)
    ]
    found = {"machine": describe_machine(arguments.tiny), "trl": trl, "cases": cases}
    report.write(found, markdown(found), arguments.out, "finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
