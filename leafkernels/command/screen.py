"""The standard streams: colours on a terminal, plain text elsewhere, and no fuss when the reader goes away."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from leafkernels.command.reading import RolloutFile

INDENT = "  "


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # The base class, from rich 13.8 on, ends the process; the caller may still have a file to write.
        raise BrokenPipeError


def open_streams() -> None:
    """Put the null device where the caller has closed standard output or standard error.

    The next file that is opened would get its number, and with it what libraries write there.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the process ends


def complain(sentence: str) -> None:
    """Print what went wrong on standard error, if that can be written."""
    with suppress(OSError):
        print(f"leafkernels: {sentence}", file=sys.stderr)


class Screen:
    """Prints until nothing can be printed any more.

    ``is_closed`` says that it has come to that, and ``failure`` why, unless the reader simply went away.
    """

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Tokens hold every character there is, and the terminal's encoding may not.
            sys.stdout.reconfigure(errors="replace")
        self.console: Console = _Console(highlight=False, markup=False, emoji=False)
        self.is_closed = False
        self.failure: str | None = None

    def show(self, draw: Callable[[Console], None]) -> None:
        """Let ``draw`` print, unless that has failed before."""
        if self.is_closed:
            return
        try:
            draw(self.console)
        except OSError as error:
            self.is_closed = True
            if not isinstance(error, BrokenPipeError):
                self.failure = f"cannot print: {(error.strerror or str(error)).lower()}"
            # What Python still flushes when it ends must not fail a second time.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def print_line(console: Console, line: Text) -> None:
    """One line, indented, and cut where the terminal is too narrow for it."""
    line.rstrip()
    console.print(Text(INDENT) + line, no_wrap=True, overflow="ellipsis")


@contextmanager
def progress(source: RolloutFile, first: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of prompts done; from ``first`` on it draws a bar on a terminal's standard
    error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[prompts]:,} prompts"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with ExitStack() as stack:
        bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        task = bar.add_task("reading", total=source.size, prompts=0)

        def tick(count: int) -> None:
            # After the trees, because a bar that is redrawn would tear them.
            if sys.stderr.isatty() and count == max(first, 1):
                stack.enter_context(bar)
            bar.update(task, completed=source.position(), prompts=count)

        yield tick
