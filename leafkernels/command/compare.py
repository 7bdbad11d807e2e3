"""``python -m leafkernels compare``: which credit scheme fits the rollouts of a file."""

import argparse
import importlib.util
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leafkernels import ESTIMATORS, GradientAgreement, gradient_agreement
from leafkernels.command.credit import pack_prompt
from leafkernels.command.reading import Failure, Prompt, RolloutFile, sample
from leafkernels.command.screen import INDENT, Screen, print_line, progress
from leafkernels.command.summary import draw_written
from leafkernels.command.writing import check_outputs, replacing
from leafkernels.credit.agreement import FEWEST

_BASE = "grpo"
# Credit is float32: schemes that differ by a factor for each prompt have cosines that differ by its rounding.
_ROUNDING = 1e-6
_NOTES = (
    "¹ mean over prompts of the cosine of a scheme's gradient and that of RLOO on the rollouts it has not seen, "
    "{policy}. * the best, and those whose difference from it may be 0: its interval holds 0.",
    f"² difference to GRPO's agreement, with a 95% interval by bootstrap over prompts ({FEWEST} or more)",
    "³ cosine of credit and truth token by token. It misleads, because a gradient sums over rollouts. Choose by the "
    "gradient.",
    "⁴ share of the tokens whose credit is no multiple of GRPO's",
)


@dataclass
class Comparison:
    """What was measured, and of how many prompts; all that is kept of a prompt is a few numbers a split."""

    arguments: argparse.Namespace
    parts: list[GradientAgreement] = field(default_factory=list)
    prompts: int = 0
    too_few: int = 0
    empty: int = 0

    def add(self, prompt: Prompt) -> None:
        """Measure one prompt."""
        needed = 2 * self.arguments.rollouts + 8
        scored = sum(not math.isnan(reward) for reward in prompt.rewards)
        number, self.prompts = self.prompts, self.prompts + 1
        if scored < needed:
            self.too_few += 1
            return
        if not any(prompt.token_ids):
            self.empty += 1
            return
        names = dict.fromkeys([*self.arguments.schemes, _BASE])
        try:
            found = gradient_agreement(
                {name: ESTIMATORS[name] for name in names},
                **pack_prompt(prompt),
                num_rollouts=self.arguments.rollouts,
                num_splits=self.arguments.splits,
                context=self.arguments.context,
                seed=number,
            )
        except ValueError as error:  # rewards that are too large
            raise Failure(f"{prompt.where}: {error}") from error
        self.parts.append(found)

    def whole(self) -> GradientAgreement:
        """All prompts; a Failure where none could be measured."""
        columns = ("cosines", "token_accuracy", "differing")
        if self.parts:
            tensors = (torch.cat([getattr(part, column) for part in self.parts]) for column in columns)
            found = GradientAgreement(self.parts[0].names, *tensors)
            if found.num_measured:
                return found
        rollouts, few, empty, total = self.arguments.rollouts, self.too_few, self.empty, self.prompts
        rare = total - few - empty
        reasons = {
            f"{few:,} of {total:,} have fewer than {2 * rollouts + 8} scored completions, which --rollouts {rollouts} "
            "needs": few,
            f"in {empty:,} of {total:,} all completions are empty": empty,
            f"in {rare:,} of {total:,} fewer than 8 rewards differ from the commonest": rare,
        }
        shown = [reason for reason, count in reasons.items() if count]
        raise Failure(f"{self.arguments.file}: no prompt can be measured: {', and '.join(shown)}")


def compare(arguments: argparse.Namespace) -> int:
    """Do what the options say and return the exit code."""
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise Failure("--plot needs matplotlib: pip install matplotlib")
    kind = "png" if arguments.plot is None else arguments.plot.suffix[1:].lower() or "png"
    if kind not in _STABLE:
        raise Failure(f"--plot must name a picture (.png, .svg or .pdf), got {arguments.plot}")
    screen = Screen()
    comparison = Comparison(arguments)
    with ExitStack() as stack:
        arguments.file = arguments.file or stack.enter_context(sample())
        source = stack.enter_context(RolloutFile(arguments.file))
        written = check_outputs({"--json": arguments.json, "--plot": arguments.plot}, [arguments.file])
        files = {path: stack.enter_context(replacing(path)) for path in written}
        tick = stack.enter_context(progress(source, 1))
        for prompt in source:
            comparison.add(prompt)
            tick(comparison.prompts)
        if not comparison.prompts:
            raise Failure(f"{arguments.file} is empty: there is no prompt in it")
        result = _result(comparison)
        if arguments.json is not None:
            text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            files[arguments.json].write(text.encode())
        if arguments.plot is not None:
            _plot(result, files[arguments.plot], kind)
    screen.show(partial(draw_comparison, result=result))
    for path in written:
        screen.show(partial(draw_written, path=path))
    if screen.failure is not None:
        raise Failure(screen.failure)
    return 141 if screen.is_closed and not written else 0


def _result(comparison: Comparison) -> dict[str, Any]:
    """All that is shown, drawn and written; schemes from the best to the worst, or as asked for where prompts are too
    few for an order."""
    found, arguments = comparison.whole(), comparison.arguments
    means, accuracy, differing = (found.mean(of) for of in ("cosines", "token_accuracy", "differing"))
    names = list(found.names)
    if found.num_measured >= FEWEST:
        names.sort(key=lambda name: -means[name])
    rows = []
    for name in names:
        to_base, to_best = (found.difference(name, other) for other in (_BASE, names[0]))
        rows.append(
            {
                "scheme": name,
                "agreement": means[name],
                "to_grpo": to_base.mean,
                "to_grpo_low": _known(to_base.low),
                "to_grpo_high": _known(to_base.high),
                "is_beaten": to_best.high < -_ROUNDING,
                "token_accuracy": _known(accuracy[name]),
                "differing": differing[name],
            }
        )
    result = {
        "file": str(arguments.file),
        "rollouts": arguments.rollouts,
        "context": arguments.context,
        "splits": arguments.splits,
        "prompts": comparison.prompts,
        "measured": found.num_measured,
        "too_few_completions": comparison.too_few,
        "empty": comparison.empty,
        "schemes": rows,
    }
    return result | {"in_words": _in_words(result)}


def _known(value: float) -> float | None:
    """A number that JSON has."""
    return None if math.isnan(value) else value


def _in_words(result: dict[str, Any]) -> str:
    measured = result["measured"]
    if measured < FEWEST:
        return (
            f"{measured} {'prompt is' if measured == 1 else 'prompts are'} too few to say which scheme agrees best: "
            f"{FEWEST} are needed."
        )
    best, *others = result["schemes"]
    base = next(row for row in result["schemes"] if row["scheme"] == _BASE)
    text = f"On these rollouts {best['scheme']} agrees best with what it has not seen ({best['agreement']:.3f})"
    if best is base:
        text += "."
    elif best["to_grpo_low"] > _ROUNDING:
        interval = f"{best['to_grpo_low']:+.3f} to {best['to_grpo_high']:+.3f}"
        text += f", better than grpo by {best['to_grpo']:.3f} ({interval})."
    else:
        text += ", but its difference from grpo may be 0."
    level = [row["scheme"] for row in others if not row["is_beaten"] and row is not base]
    if level:
        text += f" May be as good: {', '.join(level)}."
    worse = [row["scheme"] for row in others if row["to_grpo_high"] < -_ROUNDING]
    if worse:
        text += f" Worse than grpo: {', '.join(worse)}."
    return text


def draw_comparison(console: Console, result: dict[str, Any]) -> None:
    """The table, what it means, and what was left out."""
    rows = result["schemes"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("scheme", no_wrap=True)
    for name in ("gradient ¹", "to GRPO ²", "tokens ³", "differ ⁴"):
        table.add_column(name, justify="right", no_wrap=True)
    has_order = result["measured"] >= FEWEST
    for row in rows:
        interval = f" [{row['to_grpo_low']:+.3f}, {row['to_grpo_high']:+.3f}]" if has_order else ""
        accuracy = "-" if row["token_accuracy"] is None else f"{row['token_accuracy']:.2f}"
        is_marked = has_order and not row["is_beaten"]
        table.add_row(
            Text(f"{INDENT}{'*' if is_marked else ' '} {row['scheme']}", style="bold" if is_marked else ""),
            f"{row['agreement']:.3f}",
            "" if row["scheme"] == _BASE else f"{row['to_grpo']:+.3f}{interval}",
            accuracy,
            f"{row['differing']:.0%}",
        )
    console.rule(Text(f"credit from {result['rollouts']} rollouts", style="bold"), align="left", style="dim")
    console.print(table)
    console.print()
    lines = [Text(result["in_words"], style="bold")]
    left = result["prompts"] - result["measured"]
    rare = left - result["too_few_completions"] - result["empty"]
    counted = f"{result['measured']:,} of {result['prompts']:,} prompts, {result['splits']} splits of each."
    if result["too_few_completions"]:
        counted += f" {result['too_few_completions']:,} have fewer than {2 * result['rollouts'] + 8} scored rollouts."
    if result["empty"]:
        counted += f" In {result['empty']:,} all completions are empty."
    if rare:
        counted += f" In {rare:,} nearly all rewards are equal."
    policy = f"for an n-gram policy that looks back {result['context']} tokens"
    lines += [Text(counted), *(Text(note.format(policy=policy), style="dim") for note in _NOTES)]
    for line in lines:
        for part in line.wrap(console, max(20, console.width - len(INDENT))):
            print_line(console, part)


# The date, by the kind of picture: without it two runs write the same bytes.
_STABLE: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def _plot(result: dict[str, Any], file: BinaryIO, kind: str) -> None:
    """Differences to GRPO with their intervals, the best on top."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in result["schemes"] if row["scheme"] != _BASE][::-1]
    figure = Figure(figsize=(6.5, 1.3 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    means = [row["to_grpo"] for row in rows]
    ends = None
    if result["measured"] >= FEWEST:
        # Of a skewed sample both ends may lie to one side of the mean.
        ends = [
            [max(0.0, row["to_grpo"] - row["to_grpo_low"]) for row in rows],
            [max(0.0, row["to_grpo_high"] - row["to_grpo"]) for row in rows],
        ]
    axes.errorbar(means, range(len(rows)), xerr=ends, fmt="o", capsize=3, color="C0")
    axes.axvline(0.0, color="0.6", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["scheme"] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("difference to GRPO's gradient agreement, 95% over prompts")
    axes.set_title(
        f"{result['rollouts']} rollouts seen, {result['measured']} prompts, context {result['context']}", fontsize=10
    )
    # Names within an SVG are drawn at random but for the salt.
    with matplotlib.rc_context({"svg.hashsalt": "leafkernels"}):
        figure.savefig(file, format=kind, dpi=150, metadata=_STABLE[kind])
