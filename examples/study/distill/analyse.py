"""Tables and figures of the study, from results/runs.jsonl.gz; run.py calls it at the end."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from paired import compare, holm, interval, table  # noqa: E402
from runs import Runs  # noqa: E402

STEPS = 150
ARMS = {
    "opd": ("OPD", "C7"),
    "filter": ("filter alone", "C1"),
    "weights": ("weights alone", "C2"),
    "fire_row": ("FiRe, scope of a row", "C3"),
    "fire_batch": ("FiRe, scope of the batch", "C0"),
    "fire_trajectory": ("FiRe, weights by trajectory", "C4"),
}
OUTCOMES = {
    "during": "greedy, mean of all evaluations",
    "end": "greedy, at the end",
    "sampled": "sampled, mean of all steps",
    "divergence": "l_S - l_T a token, last third of the steps",
}
KINDS = {"result": "results of a step", "operand": "operands", "sign": "signs"}
SIGNED = "{difference:+.3f} ± {half:.3f}"


def shortened(run: dict[str, Any]) -> dict[str, Any]:
    """What a run had come to after STEPS; the first seeds went on (PROTOCOL.md, Changes)."""
    at = [step for step in run["evaluated"]["step"] if step <= STEPS]
    evaluated = {"step": at, "greedy": run["evaluated"]["greedy"][: len(at)]}
    return {**run, "evaluated": evaluated, "steps": {name: of[:STEPS] for name, of in run["steps"].items()}}


class Study:
    """The runs of each arm, ordered by seed."""

    def __init__(self, folder: Path) -> None:
        by_seed: dict[int, dict[str, Any]] = defaultdict(dict)
        for run in Runs(folder).of("runs"):
            by_seed[run["seed"]][run["arm"]] = run
        # A seed counts where all arms of it have run, so that every comparison is paired.
        self.seeds = [seed for seed in sorted(by_seed) if len(by_seed[seed]) == len(ARMS)]
        self.runs = {arm: [shortened(by_seed[seed][arm]) for seed in self.seeds] for arm in ARMS}

    def curve(self, arm: str) -> np.ndarray:
        """Greedy accuracy, (seeds, evaluations), the first before the first step."""
        return np.array([run["evaluated"]["greedy"] for run in self.runs[arm]])

    def steps(self, arm: str, name: str) -> np.ndarray:
        return np.array([run["steps"][name] for run in self.runs[arm]])

    def outcome(self, arm: str, name: str) -> np.ndarray:
        if name == "during":
            return self.curve(arm)[:, 1:].mean(1)
        if name == "end":
            return self.curve(arm)[:, -1]
        if name == "sampled":
            return self.steps(arm, "sampled").mean(1)
        gaps = self.steps(arm, "gap")
        return -gaps[:, -max(1, gaps.shape[1] // 3) :].mean(1)

    def ratio(self, arm: str, above: str, below: str) -> str:
        """A mean over seeds of a count by another; nothing where there is none to count."""
        counts = [run["counts"] for run in self.runs[arm]]
        found = [one.get(above, 0) / one[below] for one in counts if one.get(below)]
        return f"{np.mean(found):.3f}" if found else ""

    def tables(self) -> str:
        others = [arm for arm in ARMS if arm != "opd"]
        found = {
            (arm, name): compare(self.outcome(arm, name), self.outcome("opd", name))
            for arm in others
            for name in OUTCOMES
        }
        corrected = dict(zip(others, holm([found[arm, "during"]["p"] for arm in others]), strict=True))
        rows = []
        for arm, (label, _) in ARMS.items():
            row = [label]
            for name in OUTCOMES:
                mean, half = interval(self.outcome(arm, name))
                row.append(f"{mean:.3f} ± {half:.3f}")
                is_base = arm == "opd"
                row.append("" if is_base else SIGNED.format(**found[arm, name]))
                row.append("" if is_base else f"{found[arm, name]['p']:.3f}")
            rows.append([*row, "" if arm == "opd" else f"{corrected[arm]:.3f}"])
        head = ["arm", *(name for label in OUTCOMES.values() for name in (label, "less OPD's", "p"))]
        teachers = interval(np.array([run["teacher"]["greedy"] for run in self.runs["opd"]]))
        students = interval(self.curve("opd")[:, 0])
        text = f"{len(self.seeds)} seeds. Greedy held-out accuracy of teachers {teachers[0]:.3f} ± {teachers[1]:.3f}, "
        text += f"of students before the first step {students[0]:.3f} ± {students[1]:.3f}\n\n"
        text += table([*head, "p, first column, Holm"], rows)

        text += "\nFiRe with the scope of the batch, less\n\n"
        rows = []
        for arm in ("fire_row", "fire_trajectory"):
            row = [ARMS[arm][0]]
            for name in OUTCOMES:
                scope = compare(self.outcome("fire_batch", name), self.outcome(arm, name))
                row += [SIGNED.format(**scope), f"{scope['p']:.3f}"]
            rows.append(row)
        text += table(["arm", *(name for label in OUTCOMES.values() for name in (label, "p"))], rows)

        text += "\nSeed by seed, greedy accuracy, mean of all evaluations\n\n"
        rows = [[label, *(f"{x:.3f}" for x in self.outcome(arm, "during"))] for arm, (label, _) in ARMS.items()]
        text += table(["arm", *(f"seed {seed}" for seed in self.seeds)], rows)

        text += "\nThe filter\n\n"
        rows = []
        for arm, (label, _) in ARMS.items():
            kept = self.steps(arm, "kept").mean()
            counts = [run["counts"] for run in self.runs[arm]]
            tokens = [
                one.get("dropped_tokens", 0) / (one.get("dropped_tokens", 0) + one["kept_tokens"]) for one in counts
            ]
            row = [label, f"{1 - kept:.3f}", f"{np.mean(tokens):.3f}"]
            row += [self.ratio(arm, f"{name}_right", f"{name}_rows") for name in ("dropped", "kept")]
            rows.append(row + [self.ratio(arm, f"{name}_tokens", f"{name}_rows") for name in ("dropped", "kept")])
        head = ["arm", "rollouts dropped", "tokens dropped", "right, of those dropped", "right, of those kept"]
        text += table([*head, "tokens of one dropped", "tokens of one kept"], rows)

        text += "\nTokens by kind, all that were sampled\n\n"
        rows = []
        for arm, (label, _) in ARMS.items():
            row = [label]
            for measure in ("weight", "gap"):
                row += [self.ratio(arm, f"{kind}_{measure}", f"{kind}_tokens") for kind in KINDS]
            rows.append([*row, f"{self.steps(arm, 'norm').mean():.2f}", f"{self.steps(arm, 'clipped').max():.3f}"])
        head = [f"{measure}, {kind}" for measure in ("mean weight", "mean l_T - l_S") for kind in KINDS.values()]
        return text + table(["arm", *head, "norm of the gradient", "ratios clipped"], rows)

    def draw_curves(self, path: Path) -> None:
        figure, axes = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
        for arm, (label, color) in ARMS.items():
            at = self.runs[arm][0]["evaluated"]["step"]
            mean, half = interval(self.curve(arm))
            axes[0].plot(at, mean, color=color, label=label)
            axes[0].fill_between(at, mean - half, mean + half, color=color, alpha=0.1, linewidth=0)
            gaps = -self.steps(arm, "gap")
            width = max(1, gaps.shape[1] // 15)
            blocks = gaps[:, : gaps.shape[1] // width * width].reshape(len(gaps), -1, width).mean(2).mean(0)
            axes[2].plot(width * (np.arange(len(blocks)) + 0.5), blocks, color=color, label=label)
            if arm != "opd":
                mean, half = interval(self.curve(arm) - self.curve("opd"))
                axes[1].plot(at, mean, color=color, label=label)
                axes[1].fill_between(at, mean - half, mean + half, color=color, alpha=0.1, linewidth=0)
        teacher = np.mean([run["teacher"]["greedy"] for run in self.runs["opd"]])
        axes[0].axhline(teacher, color="black", linewidth=0.8, linestyle=":", label="teachers")
        axes[1].axhline(0, color="black", linewidth=0.6)
        axes[0].set(ylabel="greedy answers right, held out")
        axes[1].set(ylabel="the same, less those of OPD, seed by seed")
        axes[2].set(ylabel="l_S - l_T of a sampled token")
        for axis in axes:
            axis.set(xlabel="step of distillation")
            axis.legend(fontsize=8)
        figure.suptitle(f"Means over {len(self.seeds)} seeds; bands: 95% t intervals")
        figure.savefig(path, dpi=72)
        plt.close(figure)

    def draw_weights(self, path: Path) -> None:
        """Answers of the first batch, which all arms share, a row each; the colour of a token is its weight."""
        arms = ("fire_row", "fire_batch", "fire_trajectory")
        figure, axes = plt.subplots(1, len(arms), figsize=(19, 5), layout="constrained")
        image = None
        for axis, arm in zip(axes, arms, strict=True):
            rows = self.runs[arm][0]["shown"]["first"]
            width = max(len(row["answer"]) for row in rows)
            weights = np.full((len(rows), width), np.nan)
            for index, row in enumerate(rows):
                weights[index, : len(row["weights"])] = row["weights"]
                for place, character in enumerate(row["answer"]):
                    is_gap = row["gaps"][place] < -1
                    color, heavy = ("red", "bold") if is_gap else ("black", "normal")
                    axis.text(place, index, character, ha="center", va="center", fontsize=8, color=color, weight=heavy)
            image = axis.imshow(weights, aspect="auto", cmap="Blues", vmin=0.6, vmax=2.2)
            axis.set_yticks(
                range(len(rows)),
                [
                    row["prompt"] + (" right" if row["right"] else "") + ("" if row["keep"] else " DROPPED")
                    for row in rows
                ],
                fontsize=7,
            )
            axis.set(title=ARMS[arm][0], xlabel="token of the answer")
        figure.colorbar(image, ax=axes, label="weight")
        figure.suptitle(
            "The same answers, before the first step; red: the teacher finds it e times less likely, or less"
        )
        figure.savefig(path, dpi=72)
        plt.close(figure)


def main(folder: Path = HERE) -> None:
    study = Study(folder)
    folder /= "results"
    (folder / "tables.md").write_text(study.tables(), encoding="utf-8")
    study.draw_curves(folder / "curves.png")
    study.draw_weights(folder / "weights.png")


if __name__ == "__main__":
    main()
