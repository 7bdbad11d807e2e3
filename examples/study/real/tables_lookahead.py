"""Tables of answers that look ahead, for report.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import paired  # noqa: E402
from runs import Runs  # noqa: E402


def resampled(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference problem by problem, with its 95% bootstrap interval over problems."""
    difference = np.array(ours) - np.array(theirs)
    drawn = np.random.default_rng(0).integers(len(difference), size=(10_000, len(difference)))
    low, high = np.quantile(difference[drawn].mean(1), (0.025, 0.975))
    return paired.in_words(float(difference.mean()), float(low), float(high))


class Answers(NamedTuple):
    """Of one system, problem by problem."""

    rewards: list[float]
    tokens: list[float]


UNTAUGHT = "look ahead, nothing learnt"


def answers_to(runs: Runs, family: str) -> dict[str, Answers]:
    """All systems that answered all problems of a family; those that choose among samples are made here."""
    lines = {tuple(line["unit"][1:]): line for line in runs.of("look ahead") if line["unit"][0] == family}
    found = {}
    for (system, channel), line in lines.items():
        if system != "samples":
            found[f"{system}, {channel}" if channel else system] = Answers(line["rewards"], line["tokens"])
    if ("samples", "") not in lines:
        return found
    line = lines["samples", ""]
    rewards, tokens = line["rewards"], line["tokens"]
    count = len(rewards[0])
    found["one sample"] = Answers([fmean(row) for row in rewards], [fmean(row) for row in tokens])
    for channel, scores in line["scores"].items():
        for size in range(2, count + 1):
            picked = [max(range(size), key=lambda at, row=row: row[at]) for row in scores]
            best = [row[at] for row, at in zip(rewards, picked, strict=True)]
            found[f"best of {size}, {channel}"] = Answers(best, [float(sum(row[:size])) for row in tokens])
    every = [float(sum(row)) for row in tokens]
    commonest = [row.index(max(row, key=row.count)) for row in line["answers"]]
    found[f"commonest of {count}"] = Answers([row[at] for row, at in zip(rewards, commonest, strict=True)], every)
    found[f"best of {count}, by the task itself"] = Answers([max(row) for row in rewards], every)
    return found


def lookahead_table(runs: Runs, families: Sequence[str], only: str = "") -> str:
    """Over the families that have been answered greedily and by samples: the systems that answered all of them, those
    first that decide, or only those whose name begins so."""
    by_family = {family: found for family in families if "one sample" in (found := answers_to(runs, family))}
    names = [name for name in next(iter(by_family.values())) if all(name in of for of in by_family.values())]
    joined = {
        name: Answers(*(sum((list(of[name][part]) for of in by_family.values()), []) for part in (0, 1)))
        for name in names
    }
    tokens = {name: fmean(of.tokens) for name, of in joined.items()}
    rows = []
    for name in sorted(names, key=lambda name: (not name.startswith(("greedy", "look")), name.startswith("one"), name)):
        channel = name.rpartition(", ")[2]
        peers = {other: cost for other, cost in tokens.items() if other.startswith("best") and other.endswith(channel)}
        peer = paired.cheapest(tokens[name], peers) if name.startswith(("look", "paper")) else None
        ours = joined[name].rewards
        if not name.startswith(only):
            continue
        cells = [name, f"{tokens[name]:.1f}", f"{fmean(ours):.3f}"]
        cells.append("" if name == "greedy" else resampled(ours, joined["greedy"].rewards))
        cells.append(f"{resampled(ours, joined[peer].rewards)} ({peer.partition(',')[0]})" if peer else "")
        untaught = name.startswith("look") and name != UNTAUGHT and UNTAUGHT in names
        cells.append(resampled(ours, joined[UNTAUGHT].rewards) if untaught else "")
        for of in by_family.values():
            gain = "" if name == "greedy" else f" ({resampled(of[name].rewards, of['greedy'].rewards)})"
            cells.append(f"{fmean(of[name].rewards):.3f}{gain}")
        rows.append(cells)
    head = ["system, channel", "tokens", "reward", "less greedy", "less best of n", "less nothing learnt", *by_family]
    return paired.table(head, rows)


def judged_table(runs: Runs) -> str:
    """How often a channel puts the better of two samples of a problem first; of equal scores half."""
    rows = []
    for line in runs.of("look ahead"):
        if line["unit"][1] != "samples":
            continue
        cells = [line["unit"][0]]
        for scores in line["scores"].values():
            right = [
                (better[0] > worse[0]) + (better[0] == worse[0]) / 2
                for ours, theirs in zip(scores, line["rewards"], strict=True)
                for better in zip(ours, theirs, strict=True)
                for worse in zip(ours, theirs, strict=True)
                if better[1] > worse[1]
            ]
            cells.append(f"{fmean(right):.3f} of {len(right)}" if right else "")
        rows.append(cells)
    return paired.table(["better sample first", "channel: known", "held out"], rows)
