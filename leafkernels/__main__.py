"""``python -m leafkernels``."""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from leafkernels._core.interrupt import unwatch
from leafkernels.command.compare import compare
from leafkernels.command.options import parse_arguments, parse_compare
from leafkernels.command.reading import Failure
from leafkernels.command.screen import complain, open_streams
from leafkernels.command.show import show


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; whatever a person can mend is one sentence on standard error."""
    open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    run: Callable[[Namespace], int]
    # A file of that name is ./compare.
    if words[:1] == ["compare"]:
        run, arguments = compare, parse_compare(words[1:])
    else:
        run, arguments = show, parse_arguments(words)
    try:
        unwatch()
        return run(arguments)
    except Failure as failure:
        complain(str(failure))
        return 2
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
