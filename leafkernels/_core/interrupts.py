"""Ctrl-C while ``python -m leafkernels`` is being imported, which takes seconds: as it is once the command runs."""

import os
import sys
from types import TracebackType


def end_at_interrupts() -> None:
    """Let an interrupt that nothing catches end the process with a sentence and exit code 130, without a traceback."""
    others = sys.excepthook

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            others(kind, error, trace)
            return
        if sys.stderr is not None:
            print("leafkernels: interrupted", file=sys.stderr, flush=True)
        # Python would send itself the signal again, which shells tell from an exit code.
        os._exit(130)

    sys.excepthook = end
