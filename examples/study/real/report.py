"""Tables and pictures of results/runs.jsonl.gz: ``python examples/study/real/report.py`` prints them for README.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import paired  # noqa: E402
from runs import Runs  # noqa: E402
from tables_lookahead import judged_table, lookahead_table  # noqa: E402
from tables_training import curves, distillation_table, gains_table, power_table, training_runs, training_table  # noqa: E402

from leafkernels.credit.agreement import GradientAgreement  # noqa: E402

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


def agreement_table(columns: dict[str, GradientAgreement]) -> str:
    head = ["to GRPO", *(f"{name} ({of.num_measured})" for name, of in columns.items())]
    rows = [["grpo", *(f"{of.mean()['grpo']:.3f}" for of in columns.values())]]
    names = [name for name in next(iter(columns.values())).names if name != "grpo"]
    rows += [[name, *(paired.in_words(*of.difference(name, "grpo")) for of in columns.values())] for name in names]
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
        rows.append([f"{name} less {to}", *(paired.in_words(*of.difference(name, to)) for of in columns.values())])
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
    ):
        if RUNS.of(part):
            yield name, table()
    if RUNS.of("power"):
        yield "Power", power_table(RUNS)
    for part, name, base in (("training", "Training", "grpo"), ("training with masks", "Masks", "top_p_mask")):
        if training_runs(RUNS, part):
            yield f"{name}, run by run", training_table(RUNS, part, base)
        if RUNS.of(part):
            yield name, gains_table(RUNS, part, base)
    if any(line["unit"][1] == "samples" for line in RUNS.of("look ahead")):
        yield "Looking ahead", lookahead_table(RUNS, FAMILIES)
        yield "What the channels know", judged_table(RUNS)
    if RUNS.of("distillation"):
        yield "Distillation", distillation_table(RUNS)


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
        if RUNS.of(part):
            curves(RUNS, part, HERE / "results" / file)


def main() -> None:
    for name, table in tables():
        print(f"{name}\n\n{table}")
    if "--draw" in sys.argv[1:]:
        draw()


if __name__ == "__main__":
    main()
