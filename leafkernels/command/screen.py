"""Standard output: colours on a terminal, plain text elsewhere, and no fuss when the reader goes away."""

import io
import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

INDENT = "  "


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # The base class, from rich 13.8 on, ends the process; the caller may still have a file to write.
        raise BrokenPipeError


class Screen:
    """Prints until nobody reads any more; ``is_closed`` says that it has come to that."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Tokens hold every character there is, and the terminal's encoding may not.
            sys.stdout.reconfigure(errors="replace")
        self.console: Console = _Console(highlight=False, markup=False, emoji=False)
        self.is_closed = False

    def show(self, draw: Callable[[Console], None]) -> None:
        """Let ``draw`` print, unless nobody reads any more."""
        if self.is_closed:
            return
        try:
            draw(self.console)
        except BrokenPipeError:
            self.is_closed = True
            # What Python still flushes when it ends must not fail a second time.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def print_line(console: Console, line: Text) -> None:
    """One line, indented, and cut where the terminal is too narrow for it."""
    line.rstrip()
    console.print(Text(INDENT) + line, no_wrap=True, overflow="ellipsis")
