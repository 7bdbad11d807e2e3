"""Show and write the advantages of the rollouts in a file."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from leafkernels.command.credit import Credit, check_scheme, credit_prompt, mean, no_signal, scored
from leafkernels.command.html import Report, advantages_of_prompt
from leafkernels.command.reading import Failure, Prompt, RolloutFile, sample
from leafkernels.command.screen import INDENT, Screen, print_line, progress
from leafkernels.command.summary import Statistics, draw_summary, draw_written
from leafkernels.command.text import NamedTexts, line_of_numbers, line_of_tokens, shorten, visible
from leafkernels.command.tree import Line, lines_of
from leafkernels.command.writing import check_outputs, line_of, replacing, writing


def show(arguments: argparse.Namespace) -> int:
    """Do what the options say and return the exit code."""
    name, options, backend = arguments.estimator, arguments.options, arguments.backend
    device = check_scheme(name, options, backend)
    texts = None if arguments.tokenizer is None else NamedTexts(arguments.tokenizer)
    screen = Screen()
    statistics = Statistics()
    with ExitStack() as stack:
        path = arguments.rollouts or stack.enter_context(sample())
        # The writer leaves first and replaces its file only when all is read, so --out may name the input.
        source = stack.enter_context(RolloutFile(path))
        check_outputs({"--html": arguments.html}, [path])
        check_outputs({"--out": arguments.out, "--html": arguments.html}, [])
        out = None
        if arguments.out is not None:
            _check_out(path, arguments.out, arguments.limit)
            out = stack.enter_context(writing(arguments.out))
        report = None
        if arguments.html is not None:
            report = _report(path, arguments)
            page = stack.enter_context(replacing(arguments.html))
        tick = stack.enter_context(progress(source, arguments.show))
        for prompt in islice(source, None if arguments.limit is None else min(arguments.limit, sys.maxsize)):
            if texts is not None:
                texts.fill(prompt)
            credit = credit_prompt(prompt, options, device, name, backend)
            if statistics.prompts < arguments.show:
                screen.show(partial(draw_prompt, prompt=prompt, credit=credit, most=arguments.lines))
            statistics.add(prompt, credit)
            if report is not None:
                report.add(prompt, credit, advantages_of_prompt(prompt, credit, report.schemes, name, options))
            if out is not None:
                for completion, values in zip(prompt.record["completions"], credit.advantages, strict=True):
                    completion["advantages"] = values
                out.write(line_of(prompt.record))
            elif screen.is_closed and report is None:
                break
            tick(statistics.prompts)
        if not statistics.prompts:
            raise Failure(f"{path} is empty: there is no prompt in it")
        if report is not None:
            report.write(page)
    screen.show(partial(draw_summary, statistics=statistics, out=arguments.out, has_spans=credit.has_spans))
    if arguments.html is not None:
        screen.show(partial(draw_written, path=arguments.html))
    written = [str(path) for path in (arguments.out, arguments.html) if path is not None]
    if screen.failure is not None:
        raise Failure(screen.failure + (f" ({' and '.join(written)} has been written)" if written else ""))
    return 141 if screen.is_closed and not written else 0


def _report(path: Path, arguments: argparse.Namespace) -> Report:
    """An empty report; raises where it could not be made."""
    preset = {} if arguments.preset is None else {"preset": arguments.preset}
    try:
        return Report(path.name, {**preset, **arguments.options}, arguments.html_prompts, arguments.estimator)
    except ImportError as error:
        raise Failure(str(error)) from error


def _check_out(path: Path, out: Path, limit: int | None) -> None:
    if limit is not None and os.path.exists(out) and os.path.samefile(out, path):
        raise Failure(f"--limit would drop the other prompts of {out}: name another file for --out")


_NO_CREDIT = "·"

# Light text on a dark ground of the same lightness everywhere can be read on dark and on light terminals.
_GROUND, _RED, _GREEN = (58, 58, 58), (150, 24, 24), (16, 112, 48)


# Lines of a tree where the height of no terminal says how many.
_LINES = 60


def draw_prompt(console: Console, prompt: Prompt, credit: Credit, most: int | None = None) -> None:
    """The heading and the tree of one prompt, in ``most`` lines at most; None: what the terminal has room for."""
    tree = lines_of(prompt, credit)
    if most is None:
        most = max(10, console.height - 8) if console.is_terminal else _LINES
    # A line that says that one is left out is no shorter than the line.
    shown = tree if len(tree) <= most + 1 else tree[:most]
    lines = [(line, *_advantage(line, prompt, credit)) for line in shown]
    width = console.width - len(INDENT)
    rewards = scored(prompt.rewards)

    console.rule(Text(shorten(visible(prompt.name, spaces=False), width - 8), style="bold"), align="left", style="dim")
    if prompt.text:
        print_line(console, Text(shorten(visible(prompt.text, spaces=False), width)))
    if credit.has_spans:
        print_line(console, Text(shorten(_boundary_list(credit), width), style="dim"))
    if no_signal(prompt.rewards):
        reason = "all rewards are equal" if rewards else "no rollout has a reward"
        print_line(console, Text(f"{reason}: every advantage is 0", style="yellow"))

    label_width = max(14, width // 3)
    table = [("rollouts", "tokens", "reward", "advantage")]
    table.append((f"all {len(prompt.rewards)}", "", _number(mean(rewards)), ""))
    for line, low, high, _ in lines:
        advantage = _NO_CREDIT if math.isnan(low) else f"{low:+.3f}" if low == high else f"{low:+.3f}…{high:+.3f}"
        reward = _number(mean(scored(prompt.rewards[row] for row in line.rows)))
        table.append((_label(line, label_width), f"{line.start}–{line.end}", reward, advantage))
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    text_width = max(8, width - sum(widths) - 2 * len(widths))
    largest = max((abs(average) for *_, average in lines if not math.isnan(average)), default=0.0)

    print_line(console, _row(table[0], widths, ["dim"] * 4))
    print_line(console, _row(table[1], widths, ["bold"] * 4))
    for (line, _, _, average), cells in zip(lines, table[2:], strict=True):
        row = _row(cells, widths, ["", "dim", "", _sign_style(average)])
        print_line(console, row.append("  ").append(_tokens(prompt, line, average / (largest or 1.0), text_width)))
    if len(shown) < len(tree):
        print_line(console, Text(f"… {len(tree) - len(shown):,} more lines (--lines all shows them)", style="dim"))
    console.print()


def _advantage(line: Line, prompt: Prompt, credit: Credit) -> tuple[float, float, float]:
    """The least, the largest and the mean advantage of a line's tokens over its scored rollouts; NaN without any."""
    rows = [row for row in line.rows if not math.isnan(prompt.rewards[row])]
    if not rows or line.start >= line.end:
        return math.nan, math.nan, math.nan
    values = [credit.advantages[row][line.start : line.end] for row in rows]
    low, high = min(map(min, values)), max(map(max, values))
    return low, high, low if low == high else mean([mean(row) for row in values])


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


def _label(line: Line, width: int) -> str:
    count = len(line.rows)
    # 3: rollouts of a node; 3×: identical ones.
    start = line.guide + ("" if count == 1 else f"{count}× " if line.is_leaf else f"{count}: ")
    return shorten(start + shorten(_names(line.rows), max(8, width - cell_len(start))), width)


def _names(rows: list[int]) -> str:
    """Ascending rows with three or more in succession as a range: "#0–3 #5"."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][-1] + 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return " ".join(f"#{run[0]}–{run[-1]}" if len(run) > 2 else " ".join(f"#{row}" for row in run) for run in runs)


def _number(value: float) -> str:
    if math.isnan(value):
        return "none"
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def _sign_style(advantage: float) -> str:
    if math.isnan(advantage) or advantage == 0:
        return "dim"
    return "bold green" if advantage > 0 else "bold red"


def _tokens(prompt: Prompt, line: Line, share: float, width: int) -> Text:
    """The tokens of a line, on red or green by its share of the largest advantage; or why there is none to show."""
    if line.start >= line.end:
        return Text("(no token)" if not line.end else "(ends here)", style="dim")
    first = line.rows[0]
    tokens = prompt.tokens[first]
    if tokens is None:
        text = line_of_numbers(prompt.token_ids[first][line.start : line.end], width)
    else:
        text = line_of_tokens(tokens[line.start : line.end], width)
    return Text(text, style=_ground(share))


def _ground(share: float) -> Style:
    if math.isnan(share) or share == 0:
        return Style()
    full = _GREEN if share > 0 else _RED
    red, green, blue = (round(low + abs(share) * (high - low)) for low, high in zip(_GROUND, full, strict=True))
    return Style(color="rgb(238,238,238)", bgcolor=f"rgb({red},{green},{blue})")
