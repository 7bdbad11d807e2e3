"""What is counted over all prompts, and the table that shows it."""

import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from leafkernels.command.credit import Credit, no_signal, scored
from leafkernels.command.reading import Prompt
from leafkernels.command.screen import INDENT, print_line
from leafkernels.command.text import visible

_NOTES = (
    "¹ tokens before the last boundary at which their rollout shares its prefix with another; the tokens after it "
    "get the credit of the rollout's own reward, as in GRPO. Rollouts without a reward do not count here.",
    "² two or more rollouts share the prefix up to the boundary",
    "³ and the rewards differ within one of the groups that share it",
)


@dataclass
class Statistics:
    """What the summary shows, counted prompt by prompt."""

    prompts: int = 0
    equal_prompts: int = 0
    rollouts: int = 0
    repeated: int = 0
    unscorable: int = 0
    empty: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    shared_tokens: int = 0
    boundaries: int = 0
    shared: int = 0
    mixed: int = 0

    def add(self, prompt: Prompt, credit: Credit) -> None:
        """Count one prompt."""
        self.prompts += 1
        self.equal_prompts += no_signal(prompt.rewards)
        self.rollouts += len(prompt.rewards)
        self.repeated += len(prompt.rewards) - len({tuple(row) for row in prompt.token_ids})
        self.unscorable += len(prompt.rewards) - len(scored(prompt.rewards))
        self.empty += sum(not row for row in prompt.token_ids)
        for row, length in enumerate(prompt.lengths):
            counts = [True] * length if prompt.is_trained is None else prompt.is_trained[row]
            self.tokens += length
            self.scored_tokens += 0 if math.isnan(prompt.rewards[row]) else sum(counts)
            self.shared_tokens += sum(counts[: credit.shared_length(row)])
        self.boundaries += len(credit.boundaries)
        for boundary in range(len(credit.boundaries)):
            nodes = credit.members(boundary, prompt.rewards)
            self.shared += bool(nodes)
            self.mixed += not all(map(no_signal, nodes))


def draw_summary(console: Console, statistics: Statistics, out: Path | None, has_spans: bool) -> None:
    """The counts and what they mean; counts of what is out of the ordinary are shown only where there is any.

    Without ``has_spans`` nothing is said of boundaries.
    """
    counts = statistics
    rows = [
        ("prompts", counts.prompts, None),
        ("  with all rewards equal", counts.equal_prompts, counts.prompts),
        ("rollouts", counts.rollouts, None),
        ("  same tokens as an earlier one", counts.repeated, counts.rollouts),
        *([("  without a reward, left out", counts.unscorable, counts.rollouts)] if counts.unscorable else []),
        *([("  without a token", counts.empty, counts.rollouts)] if counts.empty else []),
        ("tokens", counts.tokens, None),
    ]
    if has_spans:
        rows += [
            ("  with span credit ¹", counts.shared_tokens, counts.scored_tokens),
            ("boundaries selected", counts.boundaries, None),
            ("  with a shared prefix ²", counts.shared, counts.boundaries),
            ("  with different rewards ³", counts.mixed, counts.boundaries),
        ]
    name_width = max(len(name) for name, _, _ in rows)
    count_width = max(len(f"{count:,}") for _, count, _ in rows)
    console.rule(Text("summary", style="bold"), align="left", style="dim")
    for name, count, whole in rows:
        line = Text(f"{name:<{name_width}}  ").append(f"{count:>{count_width},}", style="bold")
        if whole:
            line.append(f"  {count / whole:>6.1%}")
        print_line(console, line)
    if has_spans:
        console.print()
    for note in _NOTES if has_spans else ():
        for line in Text(note, style="dim").wrap(console, max(20, console.width - len(INDENT))):
            print_line(console, line)
    if out is not None:
        draw_written(console, out)


def draw_written(console: Console, path: Path) -> None:
    """Say that a file has been written."""
    console.print()
    console.print(Text(f"{INDENT}wrote {visible(str(path), spaces=False)}"), soft_wrap=True)
