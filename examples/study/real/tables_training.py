"""Tables and curves of training and of distillation, for report.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import paired  # noqa: E402
from runs import Runs  # noqa: E402

Line = dict[str, Any]


def power_table(runs: Runs) -> str:
    by_family: dict[str, list[Line]] = {}
    for line in runs.of("power"):
        by_family.setdefault(line["family"], []).append(line)
    rows = [
        [family, f"{lines[0]['deviation']:.4f}", *(f"{line['least difference']:.3f}" for line in lines)]
        for family, lines in by_family.items()
    ]
    seeds = (f"least difference seen, {line['seeds']} seeds" for line in next(iter(by_family.values())))
    return paired.table(["family", "deviation of a pair", *seeds], rows)


def training_table(runs: Runs, part: str, base: str) -> str:
    """What ran, finished or not; differences to the base over as many steps as both have."""
    found = dict(sorted((name, run) for name, run in training_runs(runs, part).items() if run["reward"]))
    rows = []
    for (seed, family, arm), run in found.items():
        reward, greedy, other = run["reward"], run["greedy"], found.get((seed, family, base))
        cells = [family, str(seed), arm, str(len(reward)), f"{sum(reward) / max(len(reward), 1):.3f}"]
        both = min(len(reward), len(other["reward"])) if other and arm != base else 0
        cells.append(f"{fmean(reward[:both]) - fmean(other['reward'][:both]):+.3f}" if other and both else "")
        rows.append([*cells, ", ".join(f"{value:.3f} at {step}" for step, value in greedy.items())])
    head = ["family", "seed", "arm", "steps", "sampled reward", f"less {base}", "greedy, 48 problems"]
    return paired.table(head, rows)


def training_runs(runs: Runs, part: str) -> dict[tuple[int, str, str], Line]:
    return {tuple(run["run"]): run for run in [*runs.of(f"{part} so far"), *runs.of(part)]}


Outcome = Callable[[Line], float]
OUTCOMES: dict[str, Outcome] = {
    "greedy, mean": lambda run: fmean([value for step, value in run["greedy"].items() if step != "0"]),
    "greedy, end": lambda run: list(run["greedy"].values())[-1],
    "sampled, mean": lambda run: fmean(run["reward"]),
}


def paired_runs(runs: Runs, part: str, family: str) -> dict[str, list[Line]]:
    """Of each arm the finished runs, seed by seed, of the seeds that all arms of the family have."""
    found = {tuple(run["run"]): run for run in runs.of(part)}
    arms = list(dict.fromkeys(arm for _, of, arm in found if of == family))
    seeds = [seed for seed in range(64) if all((seed, family, arm) in found for arm in arms)]
    return {arm: [found[seed, family, arm] for seed in seeds] for arm in arms}


def gains_table(runs: Runs, part: str, base: str) -> str:
    """By family and arm, over the seeds that all arms of the family have: means, and what they are less the base, with
    95% t intervals."""
    rows = []
    for family in dict.fromkeys(run["run"][1] for run in runs.of(part)):
        arms = paired_runs(runs, part, family)
        for arm, chosen in arms.items():
            cells = [family, arm, str(len(chosen))]
            for outcome in OUTCOMES.values():
                ours, theirs = ([outcome(run) for run in of] for of in (chosen, arms.get(base, [])))
                cells += [f"{fmean(ours):.3f}" if ours else "", less(ours, theirs) if arm != base else ""]
            rows.append(cells)
    head = ["family", "arm", "seeds", *(cell for name in OUTCOMES for cell in (name, f"less {base}"))]
    return paired.table(head, rows)


def less(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference seed by seed with its 95% t interval; of one seed there is no interval, of none nothing."""
    if not theirs:
        return ""
    if len(ours) < 2:
        return "".join(f"{a - b:+.3f}" for a, b in zip(ours, theirs, strict=True))
    return paired.less(np.array(ours), np.array(theirs))


DISTILLED: dict[str, Outcome] = {
    "greedy, mean": lambda run: fmean(run["greedy"]),
    "greedy, end": lambda run: run["greedy"][-1],
    "KL to the teacher, last third": lambda run: fmean(run["divergence"][-max(1, len(run["divergence"]) // 3) :]),
    "sampled, mean": lambda run: fmean(run["reward"]),
}


def distillation_table(runs: Runs) -> str:
    """Over the seeds that all arms have: means and what they are less the sampled token's plain loss; and FiRe less
    plain of each loss. 95% t intervals over seeds."""
    found = {tuple(run["run"]): run for run in runs.of("distillation")}
    arms = list(dict.fromkeys(run[1:] for run in found))
    seeds = [seed for seed in range(64) if all((seed, *arm) in found for arm in arms)]
    base = ("sampled", "plain")

    def of(arm: tuple[str, ...], outcome: Outcome) -> list[float]:
        return [outcome(found[(seed, *arm)]) for seed in seeds]

    rows = []
    for history in runs.of("teacher"):
        before, *_, after = (f"{value:.3f}" for value in history["greedy"].values())
        rows += [[name, value, "", value, *[""] * 5] for name, value in (("start", before), ("teacher", after))]
    for arm in arms:
        cells = [", ".join(arm)]
        for outcome in DISTILLED.values():
            ours = of(arm, outcome)
            cells += [f"{fmean(ours):.3f}" if ours else "", "" if arm == base else less(ours, of(base, outcome))]
        rows.append(cells)
    for loss in (loss for loss, weights in arms if weights == "FiRe" and (loss, "plain") in arms):
        pairs = ((of((loss, "FiRe"), outcome), of((loss, "plain"), outcome)) for outcome in DISTILLED.values())
        rows.append([f"{loss}: FiRe less plain", *(cell for pair in pairs for cell in ("", less(*pair)))])
    head = [f"seeds: {len(seeds)}", *(cell for name in DISTILLED for cell in (name, "less sampled, plain"))]
    return paired.table(head, rows)


BLOCK = 5  # steps that a point of a curve is the mean of


def curves(runs: Runs, part: str, path: Path) -> None:
    """Sampled reward above, greedy reward below, by family: means over finished runs, with 95% t intervals over seeds
    where there are two."""
    from matplotlib import pyplot

    found = {tuple(run["run"]): run for run in runs.of(part)}
    families, arms = (list(dict.fromkeys(run[at] for run in found)) for at in (1, 2))
    size = (5 * len(families), 6.4)
    figure, axes = pyplot.subplots(2, len(families), figsize=size, squeeze=False, sharex=True, layout="constrained")
    for column, family in enumerate(families):
        for shift, arm in enumerate(arms):
            chosen = [run for (_, of, name), run in found.items() if (of, name) == (family, arm)]
            sampled: dict[float, list[float]] = {}
            greedy: dict[float, list[float]] = {}
            for run in chosen:
                for first in range(0, len(run["reward"]) - BLOCK + 1, BLOCK):
                    sampled.setdefault(first + BLOCK / 2, []).append(fmean(run["reward"][first : first + BLOCK]))
                for step, value in run["greedy"].items():
                    greedy.setdefault(float(step), []).append(value)
            for axis, points in zip(axes[:, column], (sampled, greedy), strict=True):
                middles = [fmean(values) for values in points.values()]
                halves = [paired.interval(np.array(values))[1] if len(values) > 1 else 0 for values in points.values()]
                places = [place + 0.4 * (shift - 1) for place in points]
                axis.errorbar(places, middles, yerr=halves, fmt="o-", ms=3, capsize=2, color=f"C{shift}", label=arm)
        axes[0, column].set(title=family, ylabel=f"sampled reward, means of {BLOCK} steps")
        axes[1, column].set(xlabel="step", ylabel="greedy reward, 48 problems")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=130)
