"""The tables of docs/evidence.md, printed, and its pictures: ``python docs/evidence.py``, with the extra ``study``.

All numbers are those of ``results/runs.jsonl.gz`` of the studies, which were run by the commands that the page names.
"""

import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
STUDY = HERE.parent / "examples" / "study"
sys.path[:0] = [str(STUDY), str(STUDY / "real"), str(HERE.parent)]

paired = importlib.import_module("paired")
runs = importlib.import_module("runs")

SCHEMES = {"tree_td": "C3", "tempo": "C2", "leaf": "C0"}
SPEECH = {
    (2, "final", 0.5): "speech, 2 digits, right or wrong",
    (4, "final", 0.5): "speech, 4 digits, right or wrong",
    (4, "prefix", 0.5): "speech, 4 digits, right prefix",
    (4, "prefix", 0.9): "the same, sure and wrong start",
}
REAL = {
    "sums": "SmolLM2, sums, right or wrong",
    "reversal": "SmolLM2, reversal, right or wrong",
    "sorting": "SmolLM2, sorting, share right",
}
TABULAR = ("prefix", "prefix, sure and wrong", "prefix, 32 decisions", "prefix, K = 32")
TABULAR += ("fraction", "fraction, sure and wrong", "all or nothing", "all or nothing, K = 4")


class Found(NamedTuple):
    """A scheme less GRPO in one setting, with its 95% interval."""

    setting: str
    scheme: str
    mean: float
    low: float
    high: float

    @property
    def words(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def of_study(folder: str, part: str) -> list[Any]:
    return runs.Runs(STUDY / folder).of(part)


def agreement() -> list[Found]:
    """Gradient agreement with unseen rollouts, K = 8: by the model's own gradients, on code by an n-gram policy."""
    found = []
    for row in of_study("agreement", "table"):
        scheme = {"tree_td": "tree_td", "tempo": "tempo", "leaf": "leaf"}.get(row["scheme"])
        if scheme and row["rollouts"] == 8 and row["context"] == 4:
            found.append(Found("code, unit tests (n-gram policy)", scheme, *row["to_dr_grpo"]))
    for task in of_study("agreement", "speech"):
        for scheme, name in (("tree_td", "tree_td"), ("tempo", "tempo"), ("leaf", "leaf_b2")):
            found.append(Found(SPEECH[tuple(task["task"])], scheme, *task["adapter"][name][1:]))
    real = importlib.import_module("report")
    for family, measured in real.by_family(real.MODEL).items():
        if family in REAL:
            found += [Found(REAL[family], scheme, *measured.difference(scheme, "grpo")) for scheme in SCHEMES]
    return found


def compared(setting: str, scheme: str, ours: np.ndarray, theirs: np.ndarray) -> Found:
    """Seed by seed, with the t interval."""
    gain = paired.compare(ours, theirs)
    middle, half = gain["difference"], gain["half"]
    return Found(setting, scheme, middle, middle - half, middle + half)


def training() -> list[Found]:
    """Mean sampled reward over training; LEAF's on speech is of the first round, the others of the second. SmolLM2 was
    not trained with TEMPO."""
    analyse = importlib.import_module("analyse")
    found = []
    for task, setting in SPEECH.items():
        for scheme, name, arm in (
            ("tree_td", "second", "tree_td"),
            ("tempo", "second", "tempo"),
            ("leaf", "first", "leaf_b2"),
        ):
            speech = analyse.Speech(name)
            ours, theirs = (speech.outcome(task, which, "reward") for which in (arm, "grpo"))
            found.append(compared(setting, scheme, ours, theirs))
    real, tables = importlib.import_module("report"), importlib.import_module("tables_training")
    for family in ("sums", "sorting"):
        arms = tables.paired_runs(real.RUNS, "training", family)
        rewards = {arm: np.array([np.mean(run["reward"]) for run in of]) for arm, of in arms.items()}
        for scheme in ("tree_td", "leaf"):
            found.append(compared(REAL[family], scheme, rewards[scheme], rewards["grpo"]))
    named = {"tree_td 0, 0.5": "tree_td", "tempo": "tempo", "leaf": "leaf"}
    settings: list[Any] = []
    for row in of_study("agreement", "tabular"):
        if row["setting"] not in settings:
            settings.append(row["setting"])
        if row["scheme"] in named:
            setting = f"table, {TABULAR[settings.index(row['setting'])]}"
            gain, half = row["gain"], row["interval"]
            found.append(Found(setting, named[row["scheme"]], gain, gain - half, gain + half))
    return found


def ahead() -> str:
    """Look-ahead of SmolLM2 less greedy decoding."""
    real = importlib.import_module("report")
    return str(real.lookahead_table(real.RUNS, real.FAMILIES, "look ahead"))


def distilled() -> str:
    real = importlib.import_module("report")
    return str(real.distillation_table(real.RUNS))


def table(rows: list[Found]) -> str:
    settings = list(dict.fromkeys(row.setting for row in rows))
    by_key = {(row.setting, row.scheme): row.words for row in rows}
    lines = [[setting, *(by_key.get((setting, scheme), "") for scheme in SCHEMES)] for setting in settings]
    return paired.table(["less GRPO", *SCHEMES], lines)


def draw(rows: list[Found], label: str, path: Path) -> None:
    from matplotlib import pyplot

    settings = list(dict.fromkeys(row.setting for row in rows))
    figure, axis = pyplot.subplots(figsize=(8.5, 0.8 + 0.42 * len(settings)), layout="constrained")
    axis.axvline(0.0, color="grey", linewidth=0.8)
    for shift, (scheme, color) in enumerate(SCHEMES.items()):
        of = [row for row in rows if row.scheme == scheme]
        means = [row.mean for row in of]
        bars = [[row.mean - row.low for row in of], [row.high - row.mean for row in of]]
        places = [len(settings) - settings.index(row.setting) - 0.2 * (shift - 1) for row in of]
        axis.errorbar(means, places, xerr=bars, fmt="o", markersize=4, color=color, label=scheme)
    axis.set_yticks(range(len(settings), 0, -1), settings)
    axis.set_xlabel(label)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    parts = {"agreement": agreement(), "training": training()}
    labels = {
        "agreement": "agreement with the gradient of unseen rollouts, less GRPO's (K = 8)",
        "training": "mean reward over training, less GRPO's",
    }
    for name, rows in parts.items():
        print(table(rows))
        draw(rows, labels[name], HERE / f"evidence_{name}.png")
    print(f"{ahead()}\n{distilled()}")


if __name__ == "__main__":
    main()
