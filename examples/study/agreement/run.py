"""Which credit fits real rollouts? The table, the search for a better estimator, and the policy that is a table.

    python examples/study/agreement/run.py ROLLOUTS --part table
    python examples/study/agreement/run.py ROLLOUTS --part first      # by the first rule for which problems count
    python examples/study/agreement/run.py ROLLOUTS --part search
    python examples/study/agreement/run.py ROLLOUTS --part lengths
    python examples/study/agreement/run.py --part tabular
    python examples/study/agreement/run.py --part sweep
    python examples/study/agreement/run.py --part exact       # and its tables
    python examples/study/agreement/run.py --part picture     # results/agreement.png, exact.png

ROLLOUTS is a file of many rollouts a prompt, in the format of ``python -m leafkernels``; PROTOCOL.md says what is run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from candidates import batch_shrinkage, candidates, candidates_by_entropy, candidates_by_length, on_tails, variogram
from rich.console import Console
from rich.progress import track
from torch import Tensor

import leafkernels
from leafkernels.credit import agreement

sys.path.append(str(Path(__file__).resolve().parents[1]))
import tabular
from runs import Runs

RESULTS = Path(__file__).resolve().parent / "results"
RUNS = Runs(RESULTS.parent)
CONTEXTS = (2, 4, 8)
Prompt = dict[str, Tensor]


def prompts_of(path: Path) -> Iterator[Prompt]:
    with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            rows = json.loads(line)["completions"]
            lengths = torch.tensor([0, *(len(row["token_ids"]) for row in rows)])
            yield {
                "logprobs": torch.tensor([x for row in rows for x in row["logprobs"]]),
                "token_ids": torch.tensor([x for row in rows for x in row["token_ids"]]),
                "rewards": torch.tensor([row["reward"] for row in rows], dtype=torch.float64),
                "cu_seqlens": lengths.cumsum(0).int(),
            }


def entropies(prompt: Prompt, context: int) -> Tensor:
    """Of the next token after each context of so many tokens, as counted on all rollouts of the prompt."""
    rows = [row.tolist() for row in prompt["token_ids"].split(prompt["cu_seqlens"].diff().tolist())]
    before = [tuple(row[max(0, t - context) : t]) for row in rows for t in range(len(row))]
    counts: dict[tuple[int, ...], Counter[int]] = {}
    for name, token in zip(before, (token for row in rows for token in row), strict=True):
        counts.setdefault(name, Counter())[token] += 1
    found = {
        name: math.log(of.total()) - sum(n * math.log(n) for n in of.values()) / of.total()
        for name, of in counts.items()
    }
    return torch.tensor([found[name] for name in before])


def measure(
    path: Path,
    schemes: dict[str, Callable[..., Tensor]],
    rollouts: int,
    context: int,
    seed: int,
    by_entropy: bool = False,
) -> leafkernels.GradientAgreement:
    """All prompts of the file; prompt p draws its 16 splits with seed + p."""
    found = []
    for number, prompt in enumerate(prompts_of(path)):
        call = prompt | ({"logprobs": -entropies(prompt, context)} if by_entropy else {})
        found.append(
            leafkernels.gradient_agreement(
                schemes, **call, num_rollouts=rollouts, num_splits=16, context=context, seed=seed + number
            )
        )
    columns = ("cosines", "token_accuracy", "differing")
    return leafkernels.GradientAgreement(
        tuple(schemes), *(torch.cat([getattr(one, column) for one in found]) for column in columns)
    )


def rounded(found: leafkernels.GradientAgreement, name: str, to: str) -> list[float]:
    """Mean, low and high of the difference."""
    return [round(x, 4) for x in found.difference(name, to)]


def table(path: Path) -> None:
    schemes: dict[str, Callable[..., Tensor]] = dict(leafkernels.ESTIMATORS)
    schemes["leaf, 8 boundaries"] = partial(leafkernels.span_advantages, num_boundaries=8, min_separation=2)
    schemes |= weights((0.0, 0.0), (0.0, 0.2), (1.0, 0.3), (4.0, 0.2), (8.0, 0.2))
    rows = []
    for rollouts in (4, 8, 16, 32):
        for context in CONTEXTS:
            found = measure(path, schemes, rollouts, context, seed=0)
            means, accuracy, differing = (found.mean(of) for of in ("cosines", "token_accuracy", "differing"))
            for name in schemes:
                row = {"rollouts": rollouts, "context": context, "problems": found.num_measured, "scheme": name}
                row |= {"agreement": round(means[name], 4), "to_dr_grpo": rounded(found, name, "dr_grpo")}
                row |= {"token_accuracy": round(accuracy[name], 3), "differing": round(differing[name], 3)}
                rows.append(row)
            RUNS.replace("table", rows)


def first_rule(path: Path) -> None:
    """Agreement where one reward unlike the commonest is enough for a problem to count; with the seeds of the table and
    with those of the search."""
    agreement.LEAST_COMMON = 1
    schemes: dict[str, Callable[..., Tensor]] = {
        name: leafkernels.ESTIMATORS[name] for name in ("dr_grpo", "leaf", "tempo", "tree_td")
    }
    schemes |= weights((1.0, 0.3), (4.0, 0.2))
    unlike = []
    for prompt in prompts_of(path):
        counts = prompt["rewards"].unique(return_counts=True)[1]
        unlike.append(int(counts.sum() - counts.max()))
    rows: list[dict[str, Any]] = [
        {"unlike": least, "problems": sum(count >= least for count in unlike)} for least in (1, 2, 3, 8)
    ]
    for seed in (0, 1000):
        for context in CONTEXTS:
            found = measure(path, schemes, 8, context, seed)
            for name in list(schemes)[1:]:
                row = {"seed": seed, "context": context, "problems": found.num_measured, "scheme": name}
                rows.append(row | {"to_dr_grpo": rounded(found, name, "dr_grpo")})
            RUNS.replace("first", rows)


def search(path: Path, name: str, sets: list[tuple[bool, dict[str, Callable[..., Tensor]]]]) -> None:
    """Each set of candidates at each K; the first of the pair says whether they are given entropies."""
    rows = []
    for by_entropy, schemes in sets:
        for rollouts in (8, 4, 16, 32):
            found = [measure(path, schemes, rollouts, context, 1000, by_entropy) for context in CONTEXTS]
            # The splits are those of every context, so that a mean over contexts is one measure more.
            score = found[0]._replace(cosines=torch.stack([one.cosines for one in found]).mean(0))
            halves = [score._replace(cosines=score.cosines[first::2]) for first in (0, 1)]
            for candidate in schemes:
                row: dict[str, Any] = {"rollouts": rollouts, "candidate": candidate, "by_entropy": by_entropy}
                row |= {
                    f"context {c}": rounded(one, candidate, "dr_grpo") for c, one in zip(CONTEXTS, found, strict=True)
                }
                row |= {
                    "score": rounded(score, candidate, "dr_grpo"),
                    "to_fixed": rounded(score, candidate, "fixed 4, 0.2"),
                }
                row |= {
                    f"{half} to_fixed": rounded(one, candidate, "fixed 4, 0.2")[0]
                    for half, one in zip(("even", "odd"), halves, strict=True)
                }
                rows.append(row)
            RUNS.replace(name, rows)


def tabular_settings() -> list[tabular.Setting]:
    """The eight settings of the protocol."""
    prefix, fraction, every = tabular.BASES
    return [
        prefix,
        replace(prefix, sharpness=3.0),
        replace(prefix, decisions=32),
        replace(prefix, rollouts=32),
        fraction,
        replace(fraction, sharpness=3.0),
        every,
        replace(every, rollouts=4),
    ]


def sweep_settings() -> list[tabular.Setting]:
    """All but those that vary the number of boundaries, which is LEAF's alone."""
    return [s for s in tabular.settings() if s.boundaries == tabular.Setting.boundaries]


def train_all(name: str, settings: list[tabular.Setting], schemes: dict[str, Callable[..., Tensor]]) -> None:
    """Mean reward over training less GRPO's, 64 seeds each."""
    rows = []
    for setting in track([replace(setting, seeds=64) for setting in settings], description=name):
        grpo = tabular.train(setting, "grpo")[:, :-1].mean(1)
        for scheme, function in schemes.items():
            gain = tabular.train(setting, function)[:, :-1].mean(1) - grpo
            half = 1.998 * float(gain.std()) / len(gain) ** 0.5
            row = {"setting": asdict(setting), "scheme": scheme, "grpo": round(float(grpo.mean()), 4)}
            rows.append(row | {"gain": round(float(gain.mean()), 4), "interval": round(half, 4)})
        RUNS.replace(name, rows)


def hold_against_exact(schemes: dict[str, Callable[..., Tensor]]) -> None:
    """The part "exact", of which finished settings are kept, and its tables."""
    import exact

    rows = RUNS.of("exact")
    done = [row["setting"] for row in rows]
    settings = [replace(setting, seeds=64) for setting in sweep_settings()]
    for setting in track([s for s in settings if asdict(s) not in done], "exact", console=Console(stderr=True)):
        rows.append(exact.measure(setting, {"grpo": "grpo", "dr_grpo": "dr_grpo", **schemes}))
        RUNS.add("exact", rows[-1])
    print(exact.report(rows, RUNS.of("sweep")))


def weights(*pairs: tuple[float, float]) -> dict[str, Callable[..., Tensor]]:
    """tree_td by shrinkage and group weight."""
    return {
        f"tree_td {shrinkage:g}, {group_weight:g}": partial(
            leafkernels.tree_td, shrinkage=shrinkage, group_weight=group_weight
        )
        for shrinkage, group_weight in pairs
    }


def draw() -> None:
    """Left the differences in agreement by K, right what training gained in each setting, over agreement at K = 8."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = [row for row in RUNS.of("table") if row["context"] == 4]
    gains = RUNS.of("tabular")
    named = {"tree_td 0, 0.5": "tree_td"}
    figure, (by_size, by_gain) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    by_size.axhline(0.0, color="grey", linewidth=0.8)
    by_gain.axhline(0.0, color="grey", linewidth=0.8)
    for place, scheme in enumerate(("tree_td", "tree_td 1, 0.3", "tree_td 4, 0.2", "tempo", "leaf")):
        rows = [row for row in table if row["scheme"] == scheme]
        means, lows, highs = zip(*(row["to_dr_grpo"] for row in rows), strict=True)
        sizes = [row["rollouts"] * 1.03 ** (place - 2) for row in rows]
        bars = [
            [m - low for m, low in zip(means, lows, strict=True)],
            [h - m for h, m in zip(highs, means, strict=True)],
        ]
        by_size.errorbar(sizes, means, bars, marker="o", markersize=4, capsize=2, label=scheme)
        (at,) = (row["to_dr_grpo"][0] for row in rows if row["rollouts"] == 8)
        found = [row["gain"] for row in gains if named.get(row["scheme"], row["scheme"]) == scheme]
        by_gain.plot([at] * len(found), found, "o", markersize=5, alpha=0.7, label=scheme)
    by_size.set_xscale("log", base=2)
    by_size.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    by_size.set(xlabel="K, rollouts that a scheme sees", ylabel="gradient agreement less Dr. GRPO's (context 4)")
    by_size.legend(frameon=False, fontsize=8)
    by_gain.set(
        xlabel="agreement less Dr. GRPO's on code (K = 8, context 4)",
        ylabel="mean reward over training less GRPO's,\neight settings of the policy that is a table",
    )
    figure.savefig(RESULTS / "agreement.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rollouts", nargs="?", type=Path, metavar="ROLLOUTS")
    parts = ("table", "first", "search", "lengths", "tabular", "sweep", "exact", "picture")
    parser.add_argument("--part", choices=parts, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "picture":
        import exact

        exact.draw(RUNS.of("exact"), RUNS.of("sweep"), RESULTS / "exact.png")
        return draw()
    if arguments.part not in ("tabular", "sweep", "exact") and arguments.rollouts is None:
        parser.error("name a file of rollouts")
    peers: dict[str, Callable[..., Tensor]] = {"tempo": leafkernels.tempo, "leaf": leafkernels.span_advantages}
    if arguments.part == "tabular":
        estimated = {
            "batch shrinkage, pull 32, 0.2": partial(batch_shrinkage, pull=32.0, group_weight=0.2),
            "variogram 0.2, pull 4, prompt": partial(variogram, scale=0.2, pull=4.0, by_row=False),
            "shared 0.4, tails 0.2": partial(on_tails, shared=0.4, tails=0.2),
        }
        tried = weights((4.0, 0.2), (2.0, 0.5), (1.0, 0.3), (1.0, 0.4), (0.25, 0.4), (0.0, 0.4), (0.0, 0.5), (0.0, 0.6))
        train_all("tabular", tabular_settings(), {**peers, **estimated, **tried})
    elif arguments.part == "sweep":
        train_all("sweep", sweep_settings(), {**peers, **weights((4.0, 0.2), (1.0, 0.3), (0.0, 0.5))})
    elif arguments.part == "exact":
        hold_against_exact({**peers, **weights((0.0, 0.5), (1.0, 0.3), (4.0, 0.2))})
    elif arguments.part == "table":
        table(arguments.rollouts)
    elif arguments.part == "first":
        first_rule(arguments.rollouts)
    elif arguments.part == "search":
        search(arguments.rollouts, "search", [(False, candidates()), (True, candidates_by_entropy())])
    else:
        search(arguments.rollouts, "lengths", [(False, candidates_by_length())])


if __name__ == "__main__":
    main()
