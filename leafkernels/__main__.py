"""``python -m leafkernels``."""

import sys
from collections.abc import Sequence

from leafkernels.command.options import parse_arguments
from leafkernels.command.reading import Failure
from leafkernels.command.screen import complain, open_streams
from leafkernels.command.show import show


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; whatever a person can mend is one sentence on standard error."""
    open_streams()
    arguments = parse_arguments(argv)
    try:
        return show(arguments)
    except Failure as failure:
        complain(str(failure))
        return 2
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
