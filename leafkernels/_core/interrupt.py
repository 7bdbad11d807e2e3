"""Ctrl-C while ``python -m leafkernels`` imports: one sentence and 130, as afterwards. Of standard modules alone.

A package is imported before its ``__main__`` runs, and PyTorch takes its seconds. What it then remarks on a numpy that
is not installed is left out: the command needs none.
"""

import os
import signal
import sys
import warnings
from functools import partial
from typing import Any


def _leave(command: str, *_: Any) -> None:
    os.write(2, f"{command}: interrupted\n".encode())
    os._exit(130)


def watch() -> None:
    """Leave at Ctrl-C until ``unwatch``, where Python is on its way to a command of this package."""
    if os.path.basename(sys.argv[0] if sys.argv else "") == "leafkernels":  # the console script
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    if sys.argv[:1] != ["-m"]:  # what it is until ``__main__`` is found
        return
    command = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    if command.split(".")[0] == "leafkernels":
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    if command.split(".")[0] == "leafkernels" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, partial(_leave, command))


def unwatch() -> None:
    """Let Ctrl-C be a ``KeyboardInterrupt`` again."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, partial) and handler.func is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


watch()
