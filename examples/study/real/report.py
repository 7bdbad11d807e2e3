"""Tables and pictures of results/runs.jsonl.gz: ``python examples/study/real/report.py`` prints them for README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import paired  # noqa: E402
from runs import Runs  # noqa: E402

from leafkernels.credit.agreement import Difference, GradientAgreement  # noqa: E402

RUNS = Runs(HERE)
FAMILIES = ("sums", "reversal", "sorting")
CONTEXTS = ("context 2", "context 4", "context 8")
MODEL = "model"
LABELS = {MODEL: "model's own"}
Line = dict[str, Any]


def assembled(lines: Sequence[Line], of: str) -> GradientAgreement:
    """The cosines of several prompts, as ``gradient_agreement`` gives them in one call."""
    nan = float("nan")
    rows = [[[nan if x is None else x for x in split] for split in line[of]] for line in lines]
    cosines = torch.tensor(rows, dtype=torch.float64)
    unknown = torch.full_like(cosines, nan)
    return GradientAgreement(tuple(lines[0]["schemes"]), cosines, unknown, unknown)


def measured(use: str, family: str | None = None) -> list[Line]:
    return [line for line in RUNS.of("agreement") if line["use"] == use and family in (None, line["family"])]


def in_words(difference: Difference) -> str:
    mean, low, high = difference
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if low == low else f"{mean:+.3f}"


def agreement_table(columns: dict[str, GradientAgreement]) -> str:
    head = ["to GRPO", *(f"{name} ({of.num_measured})" for name, of in columns.items())]
    rows = [["grpo", *(f"{of.mean()['grpo']:.3f}" for of in columns.values())]]
    names = [name for name in next(iter(columns.values())).names if name != "grpo"]
    rows += [[name, *(in_words(of.difference(name, "grpo")) for of in columns.values())] for name in names]
    return paired.table(head, rows)


def by_family(of: str, use: str = "measured") -> dict[str, GradientAgreement]:
    found = {"all": assembled(measured(use), of)}
    for family in FAMILIES:
        lines = measured(use, family)
        if lines:
            found[family] = assembled(lines, of)
    return found


def quick_table() -> str:
    """Does the n-gram policy give the verdict that the model's own gradients give?"""
    rows = []
    for context in CONTEXTS:
        cells = []
        for own, quick in zip(by_family(MODEL).values(), by_family(context).values(), strict=True):
            names = [name for name in own.names if name != "grpo"]
            ours, theirs = ([of.difference(name, "grpo").mean for name in names] for of in (own, quick))
            same = sum(a * b > 0 for a, b in zip(ours, theirs, strict=True))
            cells.append(f"{same} of {len(names)}, {spearmanr(ours, theirs).statistic:+.2f}")
        rows.append([context, *cells])
    return paired.table(["same sign, Spearman", *by_family(MODEL)], rows)


def held_out_table() -> str:
    columns = by_family(MODEL, "held out")
    head = ["held out", *(f"{name} ({of.num_measured})" for name, of in columns.items())]
    rows = [[name, *(f"{of.mean()[name]:.3f}" for of in columns.values())] for name in ("tree_td", "tempo", "grpo")]
    for name, to in (("tree_td", "grpo"), ("tempo", "grpo"), ("tree_td", "tempo")):
        rows.append([f"{name} less {to}", *(in_words(of.difference(name, to)) for of in columns.values())])
    return paired.table(head, rows)


def blocks_table() -> str:
    """The adapter on all blocks beside the adapter on the last ones, on the first split of the prompts checked."""
    checked = {line["prompt_id"]: line for line in RUNS.of("all blocks")}
    own = [line for line in measured("measured") if line["prompt_id"] in checked]
    rows = []
    for line in own:
        every = assembled([checked[line["prompt_id"]]], "all blocks")
        last = assembled([{**line, MODEL: line[MODEL][:1]}], MODEL)
        if not every.num_measured:
            continue
        cells = [line["prompt_id"]]
        for of in (last, every):
            mean = of.mean()
            cells += [f"{mean['grpo']:.3f}", *(f"{mean[x] - mean['grpo']:+.3f}" for x in ("leaf", "tempo", "tree_td"))]
        rows.append(cells)
    head = [
        "prompt",
        *(f"{x}, {which}" for which in ("last 4", "all 30") for x in ("grpo", "leaf", "tempo", "tree_td")),
    ]
    return paired.table(head, rows)


def steps_table() -> str:
    """Seconds of the CPU: the clock counts what other programs take."""
    rows = []
    for line in RUNS.of("steps"):
        prompt, tokens, clock, cpu = line["prompt"], line["tokens"], line["clock"], line["cpu"]
        cells = [str(prompt), str(line["K"]), f"{line['answer']:.0f}", line["plan"], f"{tokens[0] / tokens[1]:.2f}"]
        cells += [f"{cpu['rows']:.2f}", f"{cpu['auto']:.2f}", f"{cpu['rows'] / cpu['auto']:.2f}"]
        rows.append([*cells, f"{clock['rows'] / clock['auto']:.2f}"])
    head = ["prompt", "K", "answer", "plan", "token ratio", "rows, CPU s", "shared, CPU s", "CPU time ratio"]
    return paired.table([*head, "clock ratio"], rows)


def masks_table() -> str:
    rows = []
    for line in sorted(RUNS.of("masks"), key=lambda line: -line["top_p"]):
        for name in ("whole softmax", "sampling mask"):
            kept = f"{line['kept mean']:.0f} ({line['kept median']:.0f})" if line["top_p"] < 1 else "all"
            cells = [f"{line['top_p']:g}", name, kept]
            for of in ("token", "answer"):
                found = line[name][of]
                cells.append(f"{found['mean']:.4f} ± {found['deviation']:.4f}")
                cells.append(f"{found['low']:.4f} to {found['high']:.4f}")
            rows.append(cells)
    head = [
        "top-p",
        "ratio with",
        "ids kept, mean (median)",
        "a token's ratio",
        "5% to 95%",
        "an answer's",
        "5% to 95%",
    ]
    return paired.table(head, rows)


def power_table() -> str:
    by_family: dict[str, list[Line]] = {}
    for line in RUNS.of("power"):
        by_family.setdefault(line["family"], []).append(line)
    rows = [
        [family, f"{lines[0]['deviation']:.4f}", *(f"{line['least difference']:.3f}" for line in lines)]
        for family, lines in by_family.items()
    ]
    seeds = (f"least difference seen, {line['seeds']} seeds" for line in next(iter(by_family.values())))
    return paired.table(["family", "deviation of a pair", *seeds], rows)


def training_table(part: str, base: str) -> str:
    """What ran, finished or not; differences to the base over as many steps as both have."""
    runs = dict(sorted((name, run) for name, run in training_runs(part).items() if run["reward"]))
    rows = []
    for (seed, family, arm), run in runs.items():
        reward, greedy, other = run["reward"], run["greedy"], runs.get((seed, family, base))
        cells = [family, str(seed), arm, str(len(reward)), f"{sum(reward) / max(len(reward), 1):.3f}"]
        both = min(len(reward), len(other["reward"])) if other and arm != base else 0
        cells.append(f"{mean_of(reward[:both]) - mean_of(other['reward'][:both]):+.3f}" if other and both else "")
        rows.append([*cells, ", ".join(f"{value:.3f} at {step}" for step, value in greedy.items())])
    head = ["family", "seed", "arm", "steps", "sampled reward", f"less {base}", "greedy, 48 problems"]
    return paired.table(head, rows)


def training_runs(part: str) -> dict[tuple[int, str, str], Line]:
    return {tuple(run["run"]): run for run in [*RUNS.of(f"{part} so far"), *RUNS.of(part)]}


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


Outcome = Callable[[Line], float]
OUTCOMES: dict[str, Outcome] = {
    "greedy, mean": lambda run: mean_of([value for step, value in run["greedy"].items() if step != "0"]),
    "greedy, end": lambda run: list(run["greedy"].values())[-1],
    "sampled, mean": lambda run: mean_of(run["reward"]),
}


def gains_table(part: str, base: str) -> str:
    """Finished runs by family and arm, over the seeds that all arms of the family have: means, and what they are less
    the base, with 95% t intervals."""
    runs = {tuple(run["run"]): run for run in RUNS.of(part)}
    arms = list(dict.fromkeys(arm for _, _, arm in runs))
    rows = []
    for family in dict.fromkeys(family for _, family, _ in runs):
        seeds = [seed for seed in range(64) if all((seed, family, arm) in runs for arm in (*arms, base))]
        for arm in arms:
            cells = [family, arm, str(len(seeds))]
            for outcome in OUTCOMES.values():
                ours, theirs = ([outcome(runs[seed, family, one]) for seed in seeds] for one in (arm, base))
                cells += [f"{mean_of(ours):.3f}" if ours else "", less(ours, theirs) if arm != base else ""]
            rows.append(cells)
    head = ["family", "arm", "seeds", *(cell for name in OUTCOMES for cell in (name, f"less {base}"))]
    return paired.table(head, rows)


def less(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference seed by seed with its 95% t interval; of one seed there is none."""
    if len(ours) < 2:
        return "".join(f"{a - b:+.3f}" for a, b in zip(ours, theirs, strict=True))
    return paired.less(np.array(ours), np.array(theirs))


def resampled(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference problem by problem, with its 95% bootstrap interval over problems."""
    difference = np.array(ours) - np.array(theirs)
    drawn = np.random.default_rng(0).integers(len(difference), size=(10_000, len(difference)))
    low, high = np.quantile(difference[drawn].mean(1), (0.025, 0.975))
    return in_words(Difference(float(difference.mean()), float(low), float(high)))


class Answers(NamedTuple):
    """Of one system, problem by problem."""

    rewards: list[float]
    tokens: list[float]


UNTAUGHT = "look ahead, nothing learnt"


def answers_to(family: str) -> dict[str, Answers]:
    """All systems that answered all problems of a family; those that choose among samples are made here."""
    lines = {tuple(line["unit"][1:]): line for line in RUNS.of("look ahead") if line["unit"][0] == family}
    found = {}
    for (system, channel), line in lines.items():
        if system != "samples":
            found[f"{system}, {channel}" if channel else system] = Answers(line["rewards"], line["tokens"])
    if ("samples", "") not in lines:
        return found
    line = lines["samples", ""]
    rewards, tokens = line["rewards"], line["tokens"]
    count = len(rewards[0])
    found["one sample"] = Answers([mean_of(row) for row in rewards], [mean_of(row) for row in tokens])
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


def lookahead_table(only: str = "") -> str:
    """Over the families that have been answered greedily and by samples: the systems that answered all of them, those
    first that decide, or only those whose name begins so."""
    by_family = {family: found for family in FAMILIES if "one sample" in (found := answers_to(family))}
    names = [name for name in next(iter(by_family.values())) if all(name in of for of in by_family.values())]
    joined = {
        name: Answers(*(sum((list(of[name][part]) for of in by_family.values()), []) for part in (0, 1)))
        for name in names
    }
    tokens = {name: mean_of(of.tokens) for name, of in joined.items()}
    rows = []
    for name in sorted(names, key=lambda name: (not name.startswith(("greedy", "look")), name.startswith("one"), name)):
        channel = name.rpartition(", ")[2]
        peers = {other: cost for other, cost in tokens.items() if other.startswith("best") and other.endswith(channel)}
        peer = paired.cheapest(tokens[name], peers) if name.startswith(("look", "paper")) else None
        ours = joined[name].rewards
        if not name.startswith(only):
            continue
        cells = [name, f"{tokens[name]:.1f}", f"{mean_of(ours):.3f}"]
        cells.append("" if name == "greedy" else resampled(ours, joined["greedy"].rewards))
        cells.append(f"{resampled(ours, joined[peer].rewards)} ({peer.partition(',')[0]})" if peer else "")
        untaught = name.startswith("look") and name != UNTAUGHT and UNTAUGHT in names
        cells.append(resampled(ours, joined[UNTAUGHT].rewards) if untaught else "")
        for of in by_family.values():
            gain = "" if name == "greedy" else f" ({resampled(of[name].rewards, of['greedy'].rewards)})"
            cells.append(f"{mean_of(of[name].rewards):.3f}{gain}")
        rows.append(cells)
    head = ["system, channel", "tokens", "reward", "less greedy", "less best of n", "less nothing learnt", *by_family]
    return paired.table(head, rows)


def judged_table() -> str:
    """How often a channel puts the better of two samples of a problem first; of equal scores half."""
    rows = []
    for line in RUNS.of("look ahead"):
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
            cells.append(f"{mean_of(right):.3f} of {len(right)}" if right else "")
        rows.append(cells)
    return paired.table(["better sample first", "channel: known", "held out"], rows)


DISTILLED: dict[str, Outcome] = {
    "greedy, mean": lambda run: mean_of(run["greedy"]),
    "greedy, end": lambda run: run["greedy"][-1],
    "KL to the teacher, last third": lambda run: mean_of(run["divergence"][-max(1, len(run["divergence"]) // 3) :]),
    "sampled, mean": lambda run: mean_of(run["reward"]),
}


def distillation_table() -> str:
    """Over the seeds that all arms have: means and what they are less the sampled token's plain loss; and FiRe less
    plain of each loss. 95% t intervals over seeds."""
    runs = {tuple(run["run"]): run for run in RUNS.of("distillation")}
    arms = list(dict.fromkeys(run[1:] for run in runs))
    seeds = [seed for seed in range(64) if all((seed, *arm) in runs for arm in arms)]
    base = ("sampled", "plain")

    def of(arm: tuple[str, ...], outcome: Outcome) -> list[float]:
        return [outcome(runs[(seed, *arm)]) for seed in seeds]

    rows = []
    for history in RUNS.of("teacher"):
        before, *_, after = (f"{value:.3f}" for value in history["greedy"].values())
        rows += [[name, value, "", value, *[""] * 5] for name, value in (("start", before), ("teacher", after))]
    for arm in arms:
        cells = [", ".join(arm)]
        for outcome in DISTILLED.values():
            ours = of(arm, outcome)
            cells += [f"{mean_of(ours):.3f}" if ours else "", "" if arm == base else less(ours, of(base, outcome))]
        rows.append(cells)
    for loss in (loss for loss, weights in arms if weights == "FiRe" and (loss, "plain") in arms):
        pairs = ((of((loss, "FiRe"), outcome), of((loss, "plain"), outcome)) for outcome in DISTILLED.values())
        rows.append([f"{loss}: FiRe less plain", *(cell for pair in pairs for cell in ("", less(*pair)))])
    head = [f"seeds: {len(seeds)}", *(cell for name in DISTILLED for cell in (name, "less sampled, plain"))]
    return paired.table(head, rows)


def tables() -> Iterator[tuple[str, str]]:
    """A name and a table, of what has been run."""
    if measured("measured"):
        yield "The model's own gradients", agreement_table(by_family(MODEL))
        yield "The n-gram policy", agreement_table({name: assembled(measured("measured"), name) for name in CONTEXTS})
        yield "Its verdict beside the model's", quick_table()
    if measured("held out"):
        yield "Held out", held_out_table()
    for part, name, table in (
        ("all blocks", "All blocks", blocks_table),
        ("steps", "Step time", steps_table),
        ("masks", "Sampling masks", masks_table),
        ("power", "Power", power_table),
    ):
        if RUNS.of(part):
            yield name, table()
    for part, name, base in (("training", "Training", "grpo"), ("training with masks", "Masks", "top_p_mask")):
        if training_runs(part):
            yield f"{name}, run by run", training_table(part, base)
        if RUNS.of(part):
            yield name, gains_table(part, base)
    if any(line["unit"][1] == "samples" for line in RUNS.of("look ahead")):
        yield "Looking ahead", lookahead_table()
        yield "What the channels know", judged_table()
    if RUNS.of("distillation"):
        yield "Distillation", distillation_table()


def draw() -> None:
    """results/agreement.png: differences to GRPO by family; steps.png: times of an update; training.png: curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = ("tree_td", "tree_td 1, 0.3", "tempo", "opo", "leaf", "treerl")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.8), sharex=True, sharey=True, layout="constrained")
    for axis, of, title in zip(axes, (MODEL, "context 4"), ("the model's own gradients", "n-gram policy"), strict=True):
        axis.axvline(0.0, color="grey", linewidth=0.8)
        for shift, (family, found) in enumerate(by_family(of).items()):
            for place, name in enumerate(shown):
                mean, low, high = found.difference(name, "grpo")
                at = len(shown) - place - 0.18 * (shift - 1.5)
                label = {"label": family} if place == 0 else {}
                axis.errorbar(mean, at, xerr=[[mean - low], [high - mean]], fmt="o", ms=4, color=f"C{shift}", **label)
        axis.set_yticks(range(len(shown), 0, -1), shown)
        axis.set(title=title, xlabel="agreement with unseen rollouts, less GRPO's")
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(HERE / "results" / "agreement.png", dpi=130)
    if RUNS.of("steps"):
        figure, axis = pyplot.subplots(figsize=(5.5, 3.8), layout="constrained")
        for system, color in ((False, "C0"), (True, "C3")):
            lines = [line for line in RUNS.of("steps") if line["system"] == system]
            sizes = [line["K"] for line in lines]
            for plan, style, name in (("rows", "--", "rows"), ("auto", "-", "shared prefixes")):
                label = f"prompt of {lines[0]['prompt']}, {name}"
                axis.plot(sizes, [line["cpu"][plan] for line in lines], f"{style}o", color=color, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks([4, 8, 16], ["4", "8", "16"])
        axis.set(xlabel="K, rollouts of the prompt", ylabel="CPU seconds, forward and backward", ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)
        figure.savefig(HERE / "results" / "steps.png", dpi=130)
    for part, file in (("training", "training.png"), ("training with masks", "masks.png")):
        if len(training_runs(part)) > 1:
            curves(part, HERE / "results" / file)


BLOCK = 5  # steps that a point of a curve is the mean of


def curves(part: str, path: Path) -> None:
    """Sampled reward above, greedy reward below, by family: means over finished runs, with 95% t intervals over seeds
    where there are two."""
    from matplotlib import pyplot

    runs = {tuple(run["run"]): run for run in RUNS.of(part)}
    families, arms = (list(dict.fromkeys(run[at] for run in runs)) for at in (1, 2))
    size = (5 * len(families), 6.4)
    figure, axes = pyplot.subplots(2, len(families), figsize=size, squeeze=False, sharex=True, layout="constrained")
    for column, family in enumerate(families):
        for shift, arm in enumerate(arms):
            chosen = [run for (_, of, name), run in runs.items() if (of, name) == (family, arm)]
            sampled: dict[float, list[float]] = {}
            greedy: dict[float, list[float]] = {}
            for run in chosen:
                for first in range(0, len(run["reward"]) - BLOCK + 1, BLOCK):
                    sampled.setdefault(first + BLOCK / 2, []).append(mean_of(run["reward"][first : first + BLOCK]))
                for step, value in run["greedy"].items():
                    greedy.setdefault(float(step), []).append(value)
            for axis, points in zip(axes[:, column], (sampled, greedy), strict=True):
                middles = [mean_of(values) for values in points.values()]
                halves = [paired.interval(np.array(values))[1] if len(values) > 1 else 0 for values in points.values()]
                places = [place + 0.4 * (shift - 1) for place in points]
                axis.errorbar(places, middles, yerr=halves, fmt="o-", ms=3, capsize=2, color=f"C{shift}", label=arm)
        axes[0, column].set(title=family, ylabel=f"sampled reward, means of {BLOCK} steps")
        axes[1, column].set(xlabel="step", ylabel="greedy reward, 48 problems")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    for name, table in tables():
        print(f"{name}\n\n{table}")
    if "--draw" in sys.argv[1:]:
        draw()


if __name__ == "__main__":
    main()
