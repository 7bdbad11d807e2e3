"""Show and write the span advantages of the rollouts in a file."""

import argparse
import importlib.resources
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

from leafkernels.command.credit import check_backend, credit_prompt
from leafkernels.command.display import draw_prompt
from leafkernels.command.html import Report, schemes_of_prompt
from leafkernels.command.options import CREDIT_OPTIONS
from leafkernels.command.reading import Failure, RolloutFile
from leafkernels.command.screen import Screen, progress
from leafkernels.command.summary import Statistics, draw_summary, draw_written
from leafkernels.command.writing import Writer, check_outputs, replacing

_SAMPLE = "sample_rollouts.jsonl.gz"


def show(arguments: argparse.Namespace) -> int:
    """Do what the options say and return the exit code."""
    options = {name: getattr(arguments, name) for name in CREDIT_OPTIONS}
    device = check_backend(arguments.backend)
    screen = Screen()
    statistics = Statistics()
    with ExitStack() as stack:
        path = arguments.rollouts or stack.enter_context(_sample())
        # The writer leaves first and replaces its file only when all is read, so --out may name the input.
        source = stack.enter_context(RolloutFile(path))
        check_outputs({"--html": arguments.html}, [path])
        check_outputs({"--out": arguments.out, "--html": arguments.html}, [])
        writer = None
        if arguments.out is not None:
            _check_out(path, arguments.out, arguments.limit)
            writer = stack.enter_context(Writer(arguments.out))
        report = None
        if arguments.html is not None:
            report = _report(path, arguments)
            page = stack.enter_context(replacing(arguments.html))
        tick = stack.enter_context(progress(source, arguments.show))
        for prompt in islice(source, None if arguments.limit is None else min(arguments.limit, sys.maxsize)):
            credit = credit_prompt(prompt, options, device)
            if statistics.prompts < arguments.show:
                screen.show(partial(draw_prompt, prompt=prompt, credit=credit))
            statistics.add(prompt, credit)
            if report is not None:
                report.add(prompt, credit, schemes_of_prompt(prompt, credit, options))
            if writer is not None:
                writer.write(prompt, credit.advantages([len(row) for row in prompt.token_ids]))
            elif screen.is_closed and report is None:
                break
            tick(statistics.prompts)
        if not statistics.prompts:
            raise Failure(f"{path} is empty: there is no prompt in it")
        if report is not None:
            report.write(page)
    screen.show(partial(draw_summary, statistics=statistics, out=arguments.out))
    if arguments.html is not None:
        screen.show(partial(draw_written, path=arguments.html))
    written = [str(path) for path in (arguments.out, arguments.html) if path is not None]
    if screen.failure is not None:
        raise Failure(screen.failure + (f" ({' and '.join(written)} has been written)" if written else ""))
    return 141 if screen.is_closed and not written else 0


def _report(path: Path, arguments: argparse.Namespace) -> Report:
    """An empty report; raises where it could not be made."""
    options = {name: getattr(arguments, name) for name in CREDIT_OPTIONS if name != "backend"}
    shown = {name: value for name, value in options.items() if value is not None and value is not False}
    preset = {} if arguments.preset is None else {"preset": arguments.preset}
    try:
        return Report(path.name, {**preset, **shown}, arguments.html_prompts)
    except ImportError as error:
        raise Failure(str(error)) from error


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
