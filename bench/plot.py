"""A picture of a report's speed-ups: ``python bench/plot.py bench/results/NAME.json`` writes NAME.png beside it.

One panel for each operation that the usual way in eager PyTorch was timed at, with its largest shape; a bar says how
many times as fast as that. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path
from typing import Any

Case = dict[str, Any]

COLOURS = {"triton": "#c1440e", "torch": "#e8964f", "composed": "#e8964f"}  # ours; all others are grey
NAMES = {
    "triton": "leafkernels, Triton",
    "torch": "leafkernels, PyTorch",
    "composed": "leafkernels, two passes",
    "usual": "eager PyTorch",
    "compile": "torch.compile",
    "products": "bare matrix products",
}


def seconds(case: Case) -> float:
    """The device's own time where there is one."""
    return case.get("device_seconds", case["median_seconds"])


def panels(cases: list[Case]) -> dict[tuple[str, str], dict[str, float]]:
    """By operation and shape: how many times as fast as the usual way each is, slowest first."""
    found = {}
    for op in dict.fromkeys(case["op"] for case in cases if case["backend"] == "usual"):
        timed = [case for case in cases if case["op"] == op and case["backend"] == "usual"]
        usual = max(timed, key=lambda case: case["tokens"])
        same_shape = [case for case in cases if case["op"] == op and case["shape"] == usual["shape"]]
        speedups = {case["backend"]: seconds(usual) / seconds(case) for case in same_shape}
        found[op, usual["shape"]] = dict(sorted(speedups.items(), key=lambda item: item[1]))
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = panels(report["cases"])
    if not found:
        raise SystemExit("no operation of this report was timed the usual way, so there is nothing to compare with")
    heights = [len(speedups) + 1.5 for speedups in found.values()]
    figure, axes = pyplot.subplots(
        len(found), figsize=(8, 0.3 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for ax, ((op, shape), speedups) in zip(axes[:, 0], found.items(), strict=True):
        labels = [NAMES.get(backend, backend) for backend in speedups]
        bars = ax.barh(labels, list(speedups.values()), color=[COLOURS.get(name, "#999999") for name in speedups])
        ax.bar_label(bars, fmt="%.2fx", padding=3)
        ax.set_title(f"{op}, {shape}", loc="left", fontsize="medium")
        ax.margins(x=0.15)
        ax.spines[["top", "right"]].set_visible(False)
    machine = report["machine"]
    figure.supxlabel(f"times as fast as eager PyTorch; {machine['device']}, {machine['date']}", fontsize="medium")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the speed-ups of a report that bench/report.py wrote.")
    parser.add_argument("report", type=Path, help="the JSON that it wrote")
    path = parser.parse_args().report
    draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
