"""Gradients of the credit schemes against the exact one, in the policy that is a table.

``run.py --part exact`` runs it and prints the tables; PROTOCOL.md, "Against the exact gradient", says what is run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy import stats
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import paired
import tabular

STEPS = (0, 25, 50, 100, 150)  # of GRPO's training, whose policies all schemes are held against
GROUP = 8  # batches that one call draws, and that "eight" sums
BATCHES = 64
MEASURES = {"one": "one batch", "eight": "eight batches", "bias": "bias", "decision": "decision by decision"}
TRAINED = ("tempo", "leaf", "tree_td 0, 0.5", "tree_td 1, 0.3", "tree_td 4, 0.2")  # those of the part "sweep"
Scheme = str | Callable[..., Tensor]
Row = dict[str, Any]


def exact_gradient(logits: Tensor, target: Tensor, reward: str) -> Tensor:
    """Gradient of each table's expected reward, (tables, decisions, options) float64."""
    logits = logits.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(tabular.expected_rewards(logits, target, reward).sum(), logits)
    return found


def policy_gradient(credit: Tensor, token_ids: Tensor, chances: Tensor) -> Tensor:
    """Sum over rollouts of credit * grad log pi: (..., K, T), (..., K, T) and (..., T, V) to (..., T, V)."""
    credit = credit.to(chances.dtype)
    credit_per_choice = torch.zeros_like(chances).scatter_add_(-1, token_ids.mT, credit.mT)
    return credit_per_choice - credit.sum(-2)[..., None] * chances


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Of the last dimension; 0 where one of them is 0: it agrees with nothing."""
    sizes = first.norm(dim=-1) * second.norm(dim=-1)
    return torch.where(sizes > 0, (first * second).sum(-1) / sizes, 0.0)


def decision_cosines(gradients: Tensor, truth: Tensor, options: int) -> Tensor:
    """Mean over the decisions of the cosine of each decision's own logits."""
    apart, truth_parts = (of.unflatten(-1, (-1, options)) for of in (gradients, truth))
    # Where all rollouts choose alike, float32 credit that sums to 0 leaves a rounding: no direction.
    is_rounding = apart.norm(dim=-1) <= 1e-5 * gradients.norm(dim=-1)[..., None]
    return cosines(apart, truth_parts).masked_fill(is_rounding, 0.0).mean(-1)


def mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """Over the first dimension; NaN where nothing counts."""
    return torch.where(counted, values, torch.nan).nanmean(0)


def hold_against_exact(
    logits: Tensor,
    target: Tensor,
    setting: tabular.Setting,
    schemes: Mapping[str, Scheme],
    seed: int,
    batches: int = BATCHES,
) -> tuple[dict[str, Tensor], float]:
    """The measures, each (schemes, seeds) with NaN where a seed says nothing, and the share of mixed batches.

    ``logits`` are those of the policy that is sampled: divided by its temperature.
    """
    generator = torch.Generator().manual_seed(seed)
    num_seeds, size = len(logits), target.shape[1] * setting.options
    truth = exact_gradient(logits, target, setting.reward).reshape(num_seeds, size)
    logprobs_all, chances = logits.log_softmax(-1).repeat(GROUP, 1, 1), logits.double().softmax(-1).repeat(GROUP, 1, 1)
    one, eight, mixed = [], [], []
    total = truth.new_zeros((len(schemes), num_seeds, size))
    squares = truth.new_zeros((len(schemes), num_seeds))
    for _ in range(batches // GROUP):
        token_ids, logprobs = tabular.sample(logprobs_all, setting.rollouts, generator)
        rewards = tabular.rewards_of(token_ids == target.repeat(GROUP, 1)[:, None], setting.reward)
        is_mixed = (rewards != rewards[:, :1]).any(1)
        found = []
        for scheme in schemes.values():
            credit = tabular.advantages(scheme, logprobs, token_ids, rewards, setting)
            found.append(policy_gradient(credit, token_ids, chances) * is_mixed[:, None, None])
        # (groups of batches are a dimension of their own): schemes, batches, seeds, parameters.
        gradients = torch.stack(found).reshape(len(schemes), GROUP, num_seeds, size)
        if not one:
            decision = decision_cosines(gradients, truth, setting.options)
        one.append(cosines(gradients, truth))
        eight.append(cosines(gradients.sum(1), truth))
        mixed.append(is_mixed.reshape(GROUP, num_seeds))
        total += gradients.sum(1)
        squares += gradients.square().sum((1, 3))
    signal = total.square().sum(2)
    is_mixed, has_truth = torch.stack(mixed), (truth != 0).any(1)
    # Three times as much signal as noise in the mean: the root is else of little but noise.
    is_clear = ((signal >= 4 * squares) & (squares > 0)).all(0) & has_truth
    is_clear &= is_mixed.sum((0, 1)) >= batches // 2
    length = ((signal - squares) / (batches * (batches - 1))).clamp_min(0).sqrt()
    bias = (total * truth).sum(2) / batches / (truth.norm(dim=1) * length)
    in_batch = (is_mixed.flatten(0, 1) & has_truth)[:, None]
    measures = {
        "one": mean_where(torch.cat(one, 1).transpose(0, 1), in_batch),
        # The first batches are enough for a mean over seeds.
        "decision": mean_where(decision.transpose(0, 1), in_batch[:GROUP]),
        "eight": mean_where(torch.stack(eight), (is_mixed.any(1) & has_truth)[:, None]),
        "bias": torch.where(is_clear, bias, torch.nan),
    }
    return measures, float(is_mixed.double().mean())


def summary(values: Tensor, names: Iterable[str]) -> dict[str, list[float]]:
    """By scheme: mean over seeds, its difference to GRPO's, half of the interval of that. Empty without a seed."""
    kept = values[:, ~values.isnan().any(0)]
    count = kept.shape[1]
    if count == 0:
        return {}
    less = kept - kept[list(names).index("grpo")]
    if count > 1:
        half = less.std(1) * float(stats.t.ppf(0.975, count - 1)) / count**0.5
    else:
        half = torch.full((len(kept),), 2.0)  # all that two cosines can differ by
    columns = zip(kept.mean(1).tolist(), less.mean(1).tolist(), half.tolist(), strict=True)
    return {name: [round(x, 4) for x in of] for name, of in zip(names, columns, strict=True)}


def measure(setting: tabular.Setting, schemes: Mapping[str, Scheme]) -> Row:
    """All policies of one setting."""
    found = []
    unscaled = replace(setting, rescale=False)
    for step, (logits, target) in enumerate(islice(tabular.policies(setting, "grpo"), STEPS[-1] + 1)):
        if step in STEPS:
            values, mixed = hold_against_exact(logits / setting.temperature, target, unscaled, schemes, 1000 + step)
            row: Row = {"step": step, "mixed": round(mixed, 4)}
            row["reward"] = round(float(tabular.expected_rewards(logits, target, setting.reward).mean()), 4)
            row["seeds"] = {name: int((~of.isnan().any(0)).sum()) for name, of in values.items()}
            found.append(row | {name: summary(of, schemes) for name, of in values.items()})
    return {"setting": asdict(setting), "policies": found}


# What is printed


def setting_mean(row: Row, measure: str, scheme: str, column: int = 1, step: int | None = None) -> float:
    """A setting's mean over its policies (or one of them); NaN where none says anything."""
    found = [p[measure][scheme][column] for p in row["policies"] if p[measure] and step in (None, p["step"])]
    return fmean(found) if found else float("nan")


def correlation(pairs: Iterable[tuple[float, float]]) -> float:
    """Spearman's, of the pairs without a NaN; NaN where one side is constant."""
    kept = [pair for pair in pairs if pair[0] == pair[0]]
    if any(len({pair[side] for pair in kept}) < 2 for side in (0, 1)):
        return float("nan")
    return float(stats.spearmanr(*zip(*kept, strict=True)).statistic)


def mean_of(values: Iterable[float]) -> float:
    kept = [value for value in values if value == value]
    return fmean(kept) if kept else float("nan")


def kinds(rows: list[Row]) -> dict[str, list[Row]]:
    """Settings by what the tables tell apart."""
    names = {"prefix": "prefix", "fraction": "fraction", "all": "all or nothing", "first": "first M"}
    found = {name: [r for r in rows if r["setting"]["reward"].split("_")[0] == key] for key, name in names.items()}
    sharp = [row for row in rows if row["setting"]["sharpness"] >= 2]
    for key, name in list(names.items())[:3]:
        found[f"{name}, sharpness 2 and 3"] = [r for r in sharp if r["setting"]["reward"] == key]
    found["K = 32 and 64"] = [row for row in rows if row["setting"]["rollouts"] >= 32]
    found["K = 4"] = [row for row in rows if row["setting"]["rollouts"] == 4]
    return found | {"all": rows}


def counted(rows: list[Row], measure: str) -> float:
    """Share of seeds and policies that the measure could be taken of."""
    return fmean(policy["seeds"][measure] / row["setting"]["seeds"] for row in rows for policy in row["policies"])


def report(rows: list[Row], trained: list[Row]) -> str:
    """The tables of README.md."""
    gains: dict[tuple[str, str], float] = {(str(row["setting"]), row["scheme"]): row["gain"] for row in trained}
    rows_per_kind = kinds(rows)

    def gain(row: Row, scheme: str) -> float:
        return gains[str(row["setting"]), scheme]

    def less_grpo(chosen: list[Row], measure: str, scheme: str, step: int | None = None) -> str:
        return f"{mean_of(setting_mean(row, measure, scheme, 1, step) for row in chosen):+.3f}"

    def grpo_mean(chosen: list[Row], measure: str, step: int | None = None) -> str:
        return f"{mean_of(setting_mean(row, measure, 'grpo', 0, step) for row in chosen):.3f}"

    parts = []
    lines = []
    for kind, chosen in rows_per_kind.items():
        cells = [f"{less_grpo(chosen, 'one', s)} ({mean_of(gain(r, s) for r in chosen):+.3f})" for s in TRAINED]
        lines.append([f"{kind}, {len(chosen)}", grpo_mean(chosen, "one"), *cells])
    parts.append(paired.table(["one batch (gain in training)", "grpo", *TRAINED], lines))

    lines = []
    for measure in list(MEASURES)[1:]:
        for kind, chosen in list(rows_per_kind.items())[:4]:
            line = [f"{MEASURES[measure]}, {kind}", f"{counted(chosen, measure):.0%}", grpo_mean(chosen, measure)]
            lines.append(line + [less_grpo(chosen, measure, scheme) for scheme in ("dr_grpo", *TRAINED)])
    parts.append(paired.table(["measure", "counted", "grpo", "dr_grpo", *TRAINED], lines))

    lines = []
    for step in STEPS:
        policies = [p for row in rows for p in row["policies"] if p["step"] == step]
        line = [str(step), f"{fmean(p['reward'] for p in policies):.3f}", f"{fmean(p['mixed'] for p in policies):.0%}"]
        lines.append([*line, grpo_mean(rows, "one", step), *(less_grpo(rows, "one", s, step) for s in TRAINED)])
    parts.append(paired.table(["one batch, step", "reward", "mixed", "grpo", *TRAINED], lines))

    def over(chosen: list[Row], measure: str, step: int | None = None) -> str:
        pairs = ((setting_mean(r, measure, s, 1, step), gain(r, s)) for r in chosen for s in TRAINED)
        return f"{correlation(pairs):+.2f}"

    def within(chosen: list[Row], measure: str, step: int | None = None) -> str:
        found = (correlation((setting_mean(r, measure, s, 1, step), gain(r, s)) for s in TRAINED) for r in chosen)
        return f"{mean_of(found):+.2f}"

    def within_schemes(measure: str) -> str:
        return f"{mean_of(correlation((setting_mean(r, measure, s), gain(r, s)) for r in rows) for s in TRAINED):+.2f}"

    lines = [[f"all pairs, {len(rows) * len(TRAINED)}", *(over(rows, measure) for measure in MEASURES)]]
    for kind, chosen in list(rows_per_kind.items())[:4]:
        lines.append([f"{kind}, {len(chosen) * len(TRAINED)}", *(over(chosen, measure) for measure in MEASURES)])
    for kind in ("all", *list(rows_per_kind)[:3]):
        lines.append([f"within settings, {kind}", *(within(rows_per_kind[kind], measure) for measure in MEASURES)])
    lines.append(["within schemes", *map(within_schemes, MEASURES)])
    for step in STEPS:
        cells = [f"{over(rows, measure, step)}, {within(rows, measure, step)}" for measure in MEASURES]
        lines.append([f"policy of step {step}: all pairs, within settings", *cells])
    parts.append(paired.table(["correlation with the gain", *MEASURES.values()], lines))

    def chosen_by(row: Row, measure: str) -> float:
        # GRPO is at 0; where nothing could be measured it is taken.
        agreements = {s: setting_mean(row, measure, s) for s in TRAINED}
        best = max(TRAINED, key=lambda scheme: agreements[scheme])
        return gain(row, best) if agreements[best] > 0 else 0.0

    choices = {f"that of most agreement, {title}": [chosen_by(r, m) for r in rows] for m, title in MEASURES.items()}
    choices |= {f"always {scheme}": [gain(row, scheme) for row in rows] for scheme in TRAINED}
    choices["that of most gain"] = [max(0.0, *(gain(row, scheme) for scheme in TRAINED)) for row in rows]
    lines = [
        [words, f"{fmean(of):+.4f}", f"{min(of):+.3f}", str(sum(x < -0.003 for x in of))]
        for words, of in choices.items()
    ]
    parts.append(paired.table(["scheme taken", "mean gain", "least", "settings below -0.003"], lines))
    return "\n".join(parts)


def draw(rows: list[Row], trained: list[Row], path: Path) -> None:
    """Gain over agreement of one batch, a point a setting and scheme, a panel a reward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gains = {(str(row["setting"]), row["scheme"]): row["gain"] for row in trained}
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharex=True)
    for panel, (kind, chosen) in zip(panels, kinds(rows).items(), strict=False):
        panel.axhline(0.0, color="grey", linewidth=0.8)
        panel.axvline(0.0, color="grey", linewidth=0.8)
        for scheme in ("tree_td 0, 0.5", "tree_td 1, 0.3", "tree_td 4, 0.2", "tempo", "leaf"):
            at = [setting_mean(row, "one", scheme) for row in chosen]
            panel.plot(
                at, [gains[str(row["setting"]), scheme] for row in chosen], "o", markersize=4, alpha=0.7, label=scheme
            )
        panel.set(title=kind, xlabel="cosine with the exact gradient less GRPO's")
    panels[0].set_ylabel("mean reward over training less GRPO's")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
