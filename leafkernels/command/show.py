"""Show and write the advantages of the rollouts in a file."""

import argparse
import os
import sys
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

from leafkernels.command.credit import check_scheme, credit_prompt
from leafkernels.command.display import draw_prompt
from leafkernels.command.html import Report, advantages_of_prompt
from leafkernels.command.reading import Failure, RolloutFile, sample
from leafkernels.command.screen import Screen, progress
from leafkernels.command.summary import Statistics, draw_summary, draw_written
from leafkernels.command.tokens import NamedTexts
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
