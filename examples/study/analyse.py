"""Tables and figures of the study, from results/runs.jsonl.gz; run.py calls it at the end."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from paired import compare, holm, interval, table
from runs import ROUNDS, TASKS, Runs, Task
from tabular import BASES, VARIANTS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
OUTCOMES = {
    "during": "greedy, mean of steps 10 to 80",
    "end": "greedy, after step 80",
    "reward": "sampled reward, mean of 80 steps",
}
FACTORS = ("decisions", "options", "rollouts", "boundaries", "sharpness", "warm", "temperature")
REWARDS = {"prefix": "length of the right prefix", "fraction": "fraction right", "all": "all or nothing"}
SIGNED = "{difference:+.3f} ± {half:.3f}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


class Speech:
    """The runs of a round by task and arm, ordered by seed."""

    def __init__(self, name: str) -> None:
        self.round = ROUNDS[name]
        self.arms = self.round.arms
        by_seed: dict[tuple[Task, int], dict[str, Any]] = defaultdict(dict)
        for run in Runs(HERE).of("speech"):
            what = run["run"]
            by_seed[(what["digits"], what["reward"], what["slip"]), what["seed"]][what["arm"]] = run
        # A seed counts where all arms of it have run, so that every comparison is paired.
        whole = {
            key: arms for key, arms in by_seed.items() if key[1] in self.round.seeds and len(arms) == len(self.arms)
        }
        self.tasks = [task for task in TASKS if any(task == found for found, _ in whole)]
        self.runs = {
            (task, arm): [whole[key][arm] for key in sorted(whole) if key[0] == task]
            for task in self.tasks
            for arm in self.arms
        }

    def curve(self, task: Task, arm: str) -> np.ndarray:
        """Greedy answers, (seeds, evaluations), measured by what is rewarded."""
        return np.array([run["evaluated"][task[1]] for run in self.runs[task, arm]])

    def steps(self, task: Task, arm: str, name: str) -> np.ndarray:
        return np.array([run["steps"][name] for run in self.runs[task, arm]])

    def outcome(self, task: Task, arm: str, name: str) -> np.ndarray:
        if name == "during":
            return self.curve(task, arm)[:, 1:].mean(1)
        return self.curve(task, arm)[:, -1] if name == "end" else self.steps(task, arm, "reward").mean(1)

    def tables(self) -> tuple[str, dict[str, Any]]:
        keys = [(task, arm) for task in self.tasks for arm in self.arms if arm != "grpo"]
        found = {
            (task, arm, name): compare(self.outcome(task, arm, name), self.outcome(task, "grpo", name))
            for task, arm in keys
            for name in OUTCOMES
        }
        corrected = {}
        for family in self.round.primary:
            family = [key for key in family if key in keys]
            corrected.update(zip(family, holm([found[(*key, "during")]["p"] for key in family]), strict=True))
        text = ""
        for task in self.tasks:
            rows = []
            for arm, (_, _, label, _) in self.arms.items():
                row = [label]
                for name in OUTCOMES:
                    mean, half = interval(self.outcome(task, arm, name))
                    row.append(f"{mean:.3f} ± {half:.3f}")
                    row.append("" if arm == "grpo" else SIGNED.format(**found[task, arm, name]))
                    row.append("" if arm == "grpo" else p_value(found[task, arm, name]["p"]))
                row.append(p_value(corrected[task, arm]) if (task, arm) in corrected else "")
                rows.append(row)
            head = ["arm"]
            for label in OUTCOMES.values():
                head += [label, "to GRPO", "p"]
            start = self.curve(task, "grpo")[:, 0]
            text += f"**{TASKS[task]}**, {len(start)} seeds; before the first step {start.mean():.3f}\n\n"
            text += table([*head, "p, first column, Holm"], rows) + "\n"
        rows = []
        for task in self.tasks:
            for arm, (_, _, label, _) in self.arms.items():
                runs = self.runs[task, arm]
                shares = [self.steps(task, arm, "span_share").mean()]
                for name in ("nodes", "fire_rate", "part_rate", "mixed_groups", "length"):
                    shares.append(np.mean([run["means"][name] for run in runs]))
                rows.append([TASKS[task], label, *(f"{share:.3f}" for share in shares)])
        head = ["task", "arm", "tokens in shared spans", "nodes a group", "boundaries with a node"]
        head += ["boundaries where rollouts part", "groups of mixed reward", "tokens"]
        text += table(head, rows)
        others = {
            (task, f"{arm} less {base}", name): compare(self.outcome(task, arm, name), self.outcome(task, base, name))
            for task in self.tasks
            for arm, base in self.round.pairs
            for name in OUTCOMES
        }
        if others:
            rows = []
            for task in self.tasks:
                for arm, base in self.round.pairs:
                    row = [TASKS[task], f"{self.arms[arm].label} less {self.arms[base].label}"]
                    for name in OUTCOMES:
                        pair = others[task, f"{arm} less {base}", name]
                        row += [SIGNED.format(**pair), p_value(pair["p"])]
                    rows.append(row)
            head = ["task", "arms"]
            for label in OUTCOMES.values():
                head += [label, "p"]
            text += "\n" + table(head, rows)
        compared = {**found, **others}
        summary = {f"{' '.join(map(str, task))} {arm} {name}": value for (task, arm, name), value in compared.items()}
        return text, summary

    def draw_curves(self, path: Path) -> None:
        figure, axes = plt.subplots(
            2, len(self.tasks), figsize=(6 * len(self.tasks), 8), layout="constrained", squeeze=False
        )
        for (above, below), task in zip(axes.T, self.tasks, strict=True):
            for arm, (_, _, label, color) in self.arms.items():
                mean, half = interval(self.curve(task, arm))
                steps = self.runs[task, arm][0]["evaluated"]["step"]
                above.plot(steps, mean, color=color, label=label)
                above.fill_between(steps, mean - half, mean + half, color=color, alpha=0.12, linewidth=0)
                blocks = self.steps(task, arm, "reward")
                blocks = blocks.reshape(len(blocks), -1, 5).mean(2)
                mean, half = interval(blocks)
                steps = 5 * np.arange(len(mean)) + 3
                below.plot(steps, mean, color=color, label=label)
                below.fill_between(steps, mean - half, mean + half, color=color, alpha=0.12, linewidth=0)
            above.set(title=TASKS[task], ylabel="greedy answers, unheard voices", xlabel="policy step")
            below.set(ylabel="sampled answers, voices of training", xlabel="policy step")
            above.legend()
        figure.suptitle("Mean over seeds; bands: 95% t intervals, which hold the spread between voices too")
        figure.savefig(path, dpi=72)
        plt.close(figure)

    def draw_differences(self, path: Path) -> None:
        figure, axes = plt.subplots(
            2, len(self.tasks), figsize=(6 * len(self.tasks), 7.5), layout="constrained", squeeze=False
        )
        for pair, task in zip(axes.T, self.tasks, strict=True):
            for arm, (_, _, label, color) in self.arms.items():
                if arm == "grpo":
                    continue
                evaluated = self.runs[task, arm][0]["evaluated"]["step"]
                greedy = self.curve(task, arm) - self.curve(task, "grpo")
                sampled = self.steps(task, arm, "reward") - self.steps(task, "grpo", "reward")
                sampled = sampled.reshape(len(sampled), -1, 10).mean(2)
                steps = 10 * np.arange(sampled.shape[1]) + 5.5
                for axis, at, differences in ((pair[0], evaluated, greedy), (pair[1], steps, sampled)):
                    mean, half = interval(differences)
                    axis.plot(at, mean, color=color, label=label)
                    axis.fill_between(at, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
            for axis, what in zip(pair, ("greedy answers, unheard voices", "sampled answers, training"), strict=True):
                axis.axhline(0, color="black", linewidth=0.6)
                axis.set(title=TASKS[task], ylabel=f"{what}, less GRPO's", xlabel="policy step")
                axis.legend()
        figure.suptitle("Mean of the differences seed by seed; bands: 95% t intervals")
        figure.savefig(path, dpi=72)
        plt.close(figure)

    def draw_tree(self, path: Path) -> None:
        figure, axes = plt.subplots(
            2, len(self.tasks), figsize=(6 * len(self.tasks), 7.5), layout="constrained", squeeze=False
        )
        for (above, below), task in zip(axes.T, self.tasks, strict=True):
            for arm, (_, _, label, color) in self.arms.items():
                mean, half = interval(self.steps(task, arm, "span_share"))
                above.plot(np.arange(1, len(mean) + 1), mean, color=color, label=label)
            above.set(title=TASKS[task], ylabel="tokens in shared spans", xlabel="policy step", ylim=(0, 1))
            above.legend()
            for arm in ("leaf_b2", "leaf_b4"):
                _, _, label, color = self.arms[arm]
                length = max(len(run["boundaries"]["chosen"]) for run in self.runs[task, arm])
                total = {
                    name: sum(
                        np.pad(run["boundaries"][name], (0, length - len(run["boundaries"][name])))
                        for run in self.runs[task, arm]
                    )
                    for name in ("chosen", "fired", "parted")
                }
                # Where a boundary lay less than once in a thousand, a rate would be noise.
                often = total["chosen"] >= total["chosen"].sum() / 1000
                at = np.flatnonzero(often)
                below.bar(at, (total["chosen"] / total["chosen"].sum())[often], color=color, alpha=0.3, width=0.8)
                below.plot(at, (total["fired"] / total["chosen"].clip(1))[often], color=color, label=f"{label}: fires")
                rate = (total["parted"] / total["chosen"].clip(1))[often]
                below.plot(at, rate, color=color, linestyle=":", label=f"{label}: rollouts part there")
            below.set(ylabel="of the boundaries there (bars: their share)", xlabel="token", ylim=(0, 1.05))
            below.legend(fontsize=7)
        figure.savefig(path, dpi=72)
        plt.close(figure)


class Tabular:
    def __init__(self) -> None:
        self.rows = Runs(HERE).of("tabular")
        self.settings = {json.dumps(row["setting"], sort_keys=True): row["setting"] for row in self.rows}
        self.values = {
            (json.dumps(row["setting"], sort_keys=True), row["method"]): np.array(row["mean"]) for row in self.rows
        }

    def base(self, reward: str) -> dict[str, Any]:
        return next(asdict(base) for base in BASES if base.reward == reward)

    def get(self, setting: dict[str, Any], method: str) -> np.ndarray | None:
        found = self.values.get((json.dumps(setting, sort_keys=True), method))
        if found is None and method != "leaf":
            # Only leaf depends on the boundaries; the others have run once.
            found = self.values.get((json.dumps({**setting, "boundaries": 2}, sort_keys=True), method))
        return found

    def compare(self, setting: dict[str, Any], method: str, seeds: int | None = None) -> dict[str, float] | None:
        ours, theirs = self.get(setting, method), self.get(setting, "grpo")
        return None if ours is None or theirs is None else compare(ours[:seeds], theirs[:seeds])

    def values_of(self, reward: str, factor: str) -> list[Any]:
        base = self.base(reward)
        rest = {name: value for name, value in base.items() if name != factor}
        return sorted(
            {s[factor] for s in self.settings.values() if {k: v for k, v in s.items() if k != factor} == rest}
        )

    def tables(self) -> str:
        rows = []
        for key, setting in self.settings.items():
            plain = {**self.base("prefix"), "reward": setting["reward"]}
            differing = {name for name in setting if setting[name] != plain[name]}
            if setting["reward"] in REWARDS and differing <= {"sharpness", "learning_rate", "rescale"}:
                if setting["sharpness"] not in (0.0, 1.0):
                    continue
                row = [REWARDS[setting["reward"]], "even" if setting["sharpness"] == 0 else "random"]
                row += [str(setting["learning_rate"]), "yes" if setting["rescale"] else "no"]
                row.append(f"{self.values[key, 'grpo'].mean():.3f}")
                for method in ("leaf", "tempo"):
                    for seeds in (None, 10):
                        row.append(SIGNED.format(**self.compare(setting, method, seeds)))
                rows.append(row)
        head = ["reward", "first table", "learning rate", "rescaled", "GRPO", "LEAF - GRPO", "the same, first 10 seeds"]
        text = "Earlier try\n\n" + table([*head, "TEMPO - GRPO", "the same, first 10 seeds"], sorted(rows)) + "\n"
        rows = []
        for reward, label in REWARDS.items():
            for factor in FACTORS:
                for value in self.values_of(reward, factor):
                    setting = {**self.base(reward), factor: value}
                    row = [label, f"{factor} {value:g}", f"{self.get(setting, 'grpo').mean():.3f}"]
                    for method in ("leaf", "tempo", "dr_grpo"):
                        found = self.compare(setting, method)
                        row.append(SIGNED.format(**found))
                        row.append(p_value(found["p"]))
                    rows.append(row)
        for setting in self.settings.values():
            if setting["reward"].startswith("first_"):
                row = [f"first {setting['reward'][6:]} right", "warm 1", f"{self.get(setting, 'grpo').mean():.3f}"]
                for method in ("leaf", "tempo", "dr_grpo"):
                    found = self.compare(setting, method)
                    row.append(SIGNED.format(**found))
                    row.append(p_value(found["p"]))
                rows.append(row)
        head = ["reward", "setting", "GRPO", "LEAF - GRPO", "p", "TEMPO - GRPO", "p", "Dr. GRPO - GRPO", "p"]
        text += "One factor at a time\n\n" + table(head, rows) + "\n"
        rows, head = [], ["variant"]
        for name in VARIANTS:
            rows.append([name])
            for reward in REWARDS:
                for sharpness in (1.0, 3.0):
                    found = self.compare({**self.base(reward), "sharpness": sharpness}, name)
                    rows[-1].append(SIGNED.format(**found))
        head += [f"{label}, sharpness {sharpness}" for label in REWARDS.values() for sharpness in (1, 3)]
        return text + "Parts of LEAF, less GRPO\n\n" + table(head, rows)

    def draw(self, path: Path) -> None:
        figure, axes = plt.subplots(
            len(REWARDS), len(FACTORS), figsize=(19, 8), layout="constrained", sharey="row", squeeze=False
        )
        for row, (reward, label) in zip(axes, REWARDS.items(), strict=True):
            for axis, factor in zip(row, FACTORS, strict=True):
                values = self.values_of(reward, factor)
                for method, name, color in (("leaf", "LEAF", "C0"), ("tempo", "TEMPO", "C2")):
                    found = [self.compare({**self.base(reward), factor: value}, method) for value in values]
                    at = np.arange(len(values)) + (0.1 if method == "tempo" else -0.1)
                    means, halves = [f["difference"] for f in found], [f["half"] for f in found]
                    axis.errorbar(at, means, halves, fmt="o-", color=color, label=name, markersize=3, linewidth=0.8)
                axis.axhline(0, color="black", linewidth=0.6)
                axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
                axis.set_title(factor, fontsize=9)
            row[0].set_ylabel(f"{label}\nmean reward less GRPO's", fontsize=9)
        axes[0, 0].legend(fontsize=7)
        figure.suptitle("Tabular policy: expected reward, averaged over training, less that of GRPO; 95% t intervals")
        figure.savefig(path, dpi=80)
        plt.close(figure)


def tables() -> tuple[str, dict[str, Any]]:
    """All of tables.md, and every comparison by round."""
    first, second = (Speech(name).tables() for name in ROUNDS)
    text = f"# Speech\n\n{first[0]}\n# Speech, second round\n\n{second[0]}\n# Table\n\n{Tabular().tables()}"
    return text, {"first": first[1], "second": second[1]}


def main() -> None:
    (RESULTS / "tables.md").write_text(tables()[0], encoding="utf-8")
    first, second = map(Speech, ROUNDS)
    first.draw_curves(RESULTS / "curves.png")
    first.draw_differences(RESULTS / "differences.png")
    first.draw_tree(RESULTS / "tree.png")
    second.draw_differences(RESULTS / "second.png")
    Tabular().draw(RESULTS / "tabular.png")


if __name__ == "__main__":
    main()
