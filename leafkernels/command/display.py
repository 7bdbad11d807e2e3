"""A prompt on the terminal: its prefix tree, what every span earned, and the tokens coloured by it."""

import math
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from leafkernels.command.credit import Credit, no_signal, scored
from leafkernels.command.reading import Prompt
from leafkernels.command.screen import INDENT, print_line
from leafkernels.command.text import line_of_numbers, line_of_tokens, shorten, visible
from leafkernels.command.tree import Branch, branches

_NO_CREDIT = "·"

# Light text on a dark ground of the same lightness everywhere can be read on dark and on light terminals.
_GROUND, _RED, _GREEN = (58, 58, 58), (150, 24, 24), (16, 112, 48)


def draw_prompt(console: Console, prompt: Prompt, credit: Credit) -> None:
    """The heading and the tree of one prompt."""
    lines = list(branches(prompt, credit))
    width = console.width - len(INDENT)
    rewards = scored(prompt.rewards)
    mean = credit.means[0][0] if rewards else math.nan

    console.rule(Text(shorten(visible(prompt.name, spaces=False), width - 8), style="bold"), align="left", style="dim")
    if prompt.text:
        print_line(console, Text(shorten(visible(prompt.text, spaces=False), width)))
    print_line(console, Text(shorten(_boundary_list(credit), width), style="dim"))
    if no_signal(prompt.rewards):
        reason = "all rewards are equal" if rewards else "no rollout has a reward"
        print_line(console, Text(f"{reason}: every advantage is 0", style="yellow"))

    label_width = max(14, width // 3)
    table = [("rollouts", "tokens", "reward", "advantage"), (f"all {len(prompt.rewards)}", "", _number(mean), "")]
    for line in lines:
        advantage = f"{line.advantage:+.3f}" if _has_credit(line) else _NO_CREDIT
        table.append((_label(line, label_width), f"{line.start}–{line.end}", _number(line.reward), advantage))
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    text_width = max(8, width - sum(widths) - 2 * len(widths))
    largest = max(abs(line.advantage) for line in lines)

    print_line(console, _row(table[0], widths, ["dim"] * 4))
    print_line(console, _row(table[1], widths, ["bold"] * 4))
    for line, cells in zip(lines, table[2:], strict=True):
        row = _row(cells, widths, ["", "dim", "", _sign_style(line)])
        print_line(console, row.append("  ").append(_tokens(prompt, line, largest, text_width)))
    console.print()


def _row(cells: Sequence[str], widths: Sequence[int], styles: Sequence[str]) -> Text:
    """The first cell to the left, the numbers to the right of their columns."""
    row = Text().append(cells[0].ljust(widths[0]), style=styles[0])
    for cell, width, style in zip(cells[1:], widths[1:], styles[1:], strict=True):
        row.append("  ").append(cell.rjust(width), style=style)
    return row


def _boundary_list(credit: Credit) -> str:
    if not credit.boundaries:
        return "no boundary"
    names = []
    for k, position in enumerate(credit.boundaries):
        is_shared = any(row[k] >= 0 for row in credit.nodes)
        names.append(f"{position}" if is_shared else f"{position} (not shared)")
    return ("boundaries " if len(names) > 1 else "boundary ") + ", ".join(names)


def _label(line: Branch, width: int) -> str:
    if not line.is_leaf:
        return shorten(f"{line.guide}{len(line.rows)}: {_names(line.rows)}", width)
    names = [f"#{row}" for row in line.rows]
    if len(names) > 3:
        names = [names[0], "…", f"{names[-1]} ({len(names)} times)"]
    return shorten(line.guide + " = ".join(names), width)


def _names(rows: list[int]) -> str:
    """Ascending rows with three or more in succession as a range: "#0–3 #5"."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][-1] + 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return " ".join(f"#{run[0]}–{run[-1]}" if len(run) > 2 else " ".join(f"#{row}" for row in run) for run in runs)


def _has_credit(line: Branch) -> bool:
    return line.end > line.start and not math.isnan(line.reward)


def _number(value: float) -> str:
    if math.isnan(value):
        return "none"
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def _sign_style(line: Branch) -> str:
    if not _has_credit(line) or line.advantage == 0:
        return "dim"
    return "bold green" if line.advantage > 0 else "bold red"


def _tokens(prompt: Prompt, line: Branch, largest: float, width: int) -> Text:
    """The tokens of a line, on red or green by the advantage; or why there is none to show."""
    if line.start >= line.end:
        return Text("(no token)" if not line.end else "(ends here)", style="dim")
    first = line.rows[0]
    tokens = prompt.tokens[first]
    if tokens is None:
        text = line_of_numbers(prompt.token_ids[first][line.start : line.end], width)
    else:
        text = line_of_tokens(tokens[line.start : line.end], width)
    return Text(text, style=_ground(line.advantage, largest))


def _ground(advantage: float, largest: float) -> Style:
    if advantage == 0 or largest == 0:
        return Style()
    share = abs(advantage) / largest
    full = _GREEN if advantage > 0 else _RED
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(_GROUND, full, strict=True))
    return Style(color="rgb(238,238,238)", bgcolor=f"rgb({red},{green},{blue})")
