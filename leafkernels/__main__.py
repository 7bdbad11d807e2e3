"""``python -m leafkernels``: show and write the span advantages of rollouts that lie in a file."""

import argparse
import importlib.resources
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from leafkernels.command.credit import check_backend, credit_prompt
from leafkernels.command.display import draw_prompt
from leafkernels.command.options import CREDIT_OPTIONS, build_parser
from leafkernels.command.reading import Failure, RolloutFile
from leafkernels.command.screen import Screen, complain, open_streams
from leafkernels.command.summary import Statistics, draw_summary
from leafkernels.command.writing import Writer

_SAMPLE = "sample_rollouts.jsonl.gz"


def run(arguments: argparse.Namespace) -> int:
    """Do what the options say and return the exit code."""
    options = {name: getattr(arguments, name) for name in CREDIT_OPTIONS}
    device = check_backend(arguments.backend)
    screen = Screen()
    statistics = Statistics()
    with ExitStack() as stack:
        path = arguments.rollouts or stack.enter_context(_sample())
        # The writer leaves first and replaces its file only when all is read, so --out may name the input.
        source = stack.enter_context(RolloutFile(path))
        writer = None
        if arguments.out is not None:
            _check_out(path, arguments.out, arguments.limit)
            writer = stack.enter_context(Writer(arguments.out))
        tick = stack.enter_context(_progress(source, arguments.show))
        for prompt in islice(source, arguments.limit):
            credit = credit_prompt(prompt, options, device)
            if statistics.prompts < arguments.show:
                screen.show(partial(draw_prompt, prompt=prompt, credit=credit))
            statistics.add(prompt, credit)
            if writer is not None:
                writer.write(prompt, credit.advantages([len(row) for row in prompt.token_ids]))
            elif screen.is_closed:
                break
            tick(statistics.prompts)
        if not statistics.prompts:
            raise Failure(f"{path} is empty: there is no prompt in it")
    screen.show(partial(draw_summary, statistics=statistics, out=arguments.out))
    if screen.failure is not None:
        raise Failure(screen.failure + ("" if arguments.out is None else f" ({arguments.out} has been written)"))
    return 141 if screen.is_closed and arguments.out is None else 0


@contextmanager
def _sample() -> Iterator[Path]:
    """The rollouts that come with the package."""
    resource = importlib.resources.files("leafkernels.data").joinpath(_SAMPLE)
    if not resource.is_file():
        raise Failure(f"the sample {_SAMPLE} is missing from this installation: name a file of rollouts")
    with importlib.resources.as_file(resource) as path:
        yield path


def _check_out(path: Path, out: Path, limit: int | None) -> None:
    if limit is not None and os.path.exists(out) and os.path.samefile(out, path):
        raise Failure(f"--limit would drop the other prompts of {out}: name another file for --out")


@contextmanager
def _progress(source: RolloutFile, show: int) -> Iterator[Callable[[int], None]]:
    """A function that is told how many prompts are done; it draws a bar on standard error, on a terminal only."""
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
            # Behind the trees, because a bar that is redrawn would tear them.
            if sys.stderr.isatty() and count == max(show, 1):
                stack.enter_context(bar)
            bar.update(task, completed=source.position(), prompts=count)

        yield tick


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; whatever a person can mend is one sentence on standard error."""
    open_streams()
    arguments = build_parser().parse_args(argv)
    try:
        return run(arguments)
    except Failure as failure:
        complain(str(failure))
        return 2
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
