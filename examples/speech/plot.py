"""One picture of a run's curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw_curves(history: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw reward and tree of the training steps, and the scores on voices never heard in training."""
    steps = [line for line in history if "reward" in line]
    evaluated = [line for line in history if "held_out" in line]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    left.plot([line["step"] for line in steps], [line["reward"] for line in steps], linewidth=0.8)
    left.set(title="mean reward of sampled answers", xlabel="policy step", ylim=(0, 1))
    for name in evaluated[0]["held_out"] if evaluated else ():
        middle.plot(
            [line["step"] for line in evaluated], [line["held_out"][name] for line in evaluated], marker=".", label=name
        )
    middle.set(title="greedy answers, unheard voices", xlabel="policy step", ylim=(0, 1))
    middle.legend()
    for name in ("span_share", "fire_rate", "part_rate", "mixed_groups"):
        right.plot([line["step"] for line in steps], [line[name] for line in steps], linewidth=0.8, label=name)
    right.set(title="tree", xlabel="policy step", ylim=(0, 1.02))
    right.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
