"""Run the benches and write the results down: ``python bench/report.py`` (``--tiny``, ``--out DIR``).

Writes <device>-<date>.json, compact, and the same as Markdown tables, to ``bench/results``; prints the tables. Ends
with pytest's exit status: a case that fails its correctness gate has no number, and the tables say that one failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

Case = dict[str, Any]


def run_benches(options: Sequence[str], target: Path) -> int:
    """Run pytest on this folder, with the results in the file ``target``; its exit status."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench"), "-q", "--benchmark-quiet"]
    # The package need not be installed.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [*command, f"--benchmark-json={target}", *options], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}
    ).returncode


def summary(results: dict[str, Any], exit_status: int) -> dict[str, Any]:
    """What is worth keeping of pytest-benchmark's file."""
    cases = []
    for benchmark in results["benchmarks"]:
        case_info, stats = benchmark["extra_info"], benchmark["stats"]
        cases.append(
            {
                **case_info,
                "median_seconds": stats["median"],
                "min_seconds": stats["min"],
                "rounds": stats["rounds"],
            }
        )
    return {
        "machine": results["machine_info"]["leafkernels"],
        "commit": results["commit_info"].get("id"),
        "uncommitted_changes": results["commit_info"].get("dirty"),
        "all_passed": exit_status == 0,
        "copy_bytes_per_second": results["copy_bytes_per_second"],
        "promises": results["promises"],
        "skipped": results["skipped"],
        "cases": cases,
    }


def as_time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    scale, unit = (1e6, "us") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1.0, "s")
    return f"{seconds * scale:.3g} {unit}" if seconds * scale < 100 else f"{seconds * scale:.0f} {unit}"


def _number(value: float | None, scale: float = 1.0, suffix: str = "") -> str:
    if value is None:
        return ""
    number = value / scale
    return (f"{number:.0f}" if number >= 100 else f"{number:.3g}") + suffix


COLUMNS: dict[str, Callable[[Case], str]] = {
    "shape": lambda case: case["shape"],
    "inputs": lambda case: case["inputs"],
    "backend": lambda case: case["backend"],
    "median": lambda case: as_time(case["median_seconds"]),
    "min": lambda case: as_time(case["min_seconds"]),
    "x python_ref": lambda case: _number(case.get("ratio_python_ref")),
    "x torch": lambda case: _number(case.get("ratio_torch")),
    "MB": lambda case: _number(case["bytes"], 1e6),
}

DEVICE_COLUMNS: dict[str, Callable[[Case], str]] = {
    "device time": lambda case: as_time(case.get("device_seconds")),
    "taken by": lambda case: case.get("timing", ""),
    "GB/s": lambda case: _number(case.get("bytes_per_second"), 1e9),
    "of a copy": lambda case: "" if "copy_share" not in case else f"{case['copy_share']:.1%}",
    "peak MB": lambda case: _number(case.get("peak_bytes"), 1e6),
}


def _both(promise: dict[str, Any]) -> tuple[float, float]:
    return promise["theirs"], promise["ours"]


def _error(case: Case, name: str) -> str:
    """Largest relative error, and the absolute one, of a result against float64."""
    error = case.get("errors", {}).get(name)
    if error is None:
        return ""
    relative, absolute = ("NaN" if error[kind] is None else f"{error[kind]:.1e}" for kind in ("relative", "absolute"))
    return f"{relative} ({absolute})"


def _of_table(cases: Sequence[Case], columns: dict[str, Callable[[Case], str]]) -> dict[str, Callable[[Case], str]]:
    """The columns that say something about these cases: those that every table has, and ratios and errors they have."""
    columns = dict(columns)
    for baseline in ("plain", "usual", "products", "composed", "trl"):
        if any(f"ratio_{baseline}" in case for case in cases):
            columns[f"x {baseline}"] = lambda case, key=f"ratio_{baseline}": _number(case.get(key))
    for name in dict.fromkeys(name for case in cases for name in case.get("errors", {})):
        columns[f"error of {name}"] = lambda case, name=name: _error(case, name)
    return columns


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def markdown(report: dict[str, Any]) -> str:
    """The results as tables, one for each operation, under what they were taken on."""
    machine = report["machine"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("python", "torch", "triton", "cuda") if machine[name] is not None
    )
    threads = f"{machine['cpu_threads']} thread{'s' if machine['cpu_threads'] != 1 else ''}"
    lines = [
        f"# {machine['device']}, {machine['date']}",
        "",
        f"{versions}. CPU: {machine['cpu']}, {machine['cpu_cores']} cores, PyTorch on {threads}; load average when the "
        f"results were written: {machine['load_average']}. Commit {report['commit']}"
        f"{' with uncommitted changes' if report['uncommitted_changes'] else ''}.",
        "",
    ]
    if machine["tiny"]:
        lines += ["**Tiny shapes, one round: these numbers say only that the benches run.**", ""]
    if not report["all_passed"]:
        lines += ["**A bench failed or a promise was broken; what failed its correctness gate has no number.**", ""]
    if machine["load_average"] and machine["load_average"][0] > machine["cpu_cores"]:
        lines += [
            "**The machine was busy, its load above its cores: times on the CPU in different rows do not compare. The "
            "promises do, whose two sides are timed in turns.**",
            "",
        ]
    if any("errors" in case for case in report["cases"]):
        lines += [
            "Errors: the largest relative one against float64 on the inputs as rounded, and in brackets the largest "
            "absolute one; of a gradient relative to its largest entry. Peers: "
            + ", ".join(f"{name} {number or 'not installed'}" for name, number in machine["peers"].items())
            + ". usual: eager PyTorch, log_softmax, gather, entropy; compile: the same, compiled.",
            "",
        ]
    columns = dict(COLUMNS)
    lines += [
        "Median and min are wall time per call, results ready. x: how many times as fast, by median. MB: what any "
        "implementation has to read and write, by the formula in the bench of the operation.",
        "",
    ]
    if report["copy_bytes_per_second"]:
        columns |= DEVICE_COLUMNS
        lines += [
            f"Device time, from events: around replays of a CUDA graph, or around plain calls, gaps between kernels "
            f"included. A large copy on the device, measured in the same run: "
            f"{report['copy_bytes_per_second'] / 1e9:.0f} GB/s, read plus written. Peak: beyond the inputs.",
            "",
        ]
    for op in dict.fromkeys(case["op"] for case in report["cases"]):
        cases = [case for case in report["cases"] if case["op"] == op]
        table_columns = _of_table(cases, columns)
        rows = [[cell(case) for cell in table_columns.values()] for case in cases]
        lines += [f"## {op}", "", *table(list(table_columns), rows), ""]
    if report["promises"]:
        rows = [
            [
                promise["op"],
                promise["shape"],
                promise["of"],
                *(as_time(x) if promise["unit"] == "s" else _number(x, 1e6, " MB") for x in _both(promise)),
                f"{promise['ratio']:.2f}",
                f"{promise['least']:g}",
                promise["verdict"],
            ]
            for promise in report["promises"]
        ]
        header = ["operation", "shape", "of", "theirs, least", "ours, least", "ratio", "promised", "verdict"]
        lines += ["## Promises on the CPU", "", *table(header, rows), ""]
    if report["skipped"]:
        lines += ["## Not timed", "", *(f"- {case}: {why}" for case, why in report["skipped"].items()), ""]
    return "\n".join(lines)


def write(report: dict[str, Any], text: str, folder: Path, kind: str = "") -> None:
    """Print the tables; write them and the JSON as ``<device>-<date>[-kind][-tiny]``."""
    machine = report["machine"]
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    name = "-".join([slug, machine["date"], *filter(None, [kind, "tiny" if machine["tiny"] else ""])])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"wrote {folder / name}.json and .md")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the benches; write the results as JSON and as Markdown tables.")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the two files")
    parser.add_argument("--kind", default="", help="added to the names of the files: for a run of some benches only")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, one round: proves that the benches run")
    arguments, options = parser.parse_known_args()  # the rest goes to pytest: -k, --threads, --seconds
    if arguments.tiny:
        options.append("--tiny")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "results.json"
        status = run_benches(options, target)
        if not target.exists() or not target.stat().st_size:
            print(f"the benches left no results (pytest ended with {status})", file=sys.stderr)
            return status or 1
        report = summary(json.loads(target.read_text(encoding="utf-8")), status)
    write(report, markdown(report), arguments.out, arguments.kind)
    return status


if __name__ == "__main__":
    sys.exit(main())
