"""The options of the command, and the help that explains them and the format of the file."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from leafkernels import ESTIMATORS, PRESETS, __version__
from leafkernels.command.credit import BOUNDARY_OPTIONS, DEFAULT, options_of

# The options of schemes; each scheme takes some of them, and its own defaults.
CREDIT_OPTIONS = (
    "num_boundaries", "min_separation", "terms", "normalize", "leave_one_out", "multiplicity_power", "shrinkage",
    "group_weight",
)  # fmt: skip

_EPILOG = """\
ROLLOUTS holds one prompt a line, as JSON; blank lines are skipped:

  {"prompt_id": "p7", "prompt": "3+4=", "completions": [
    {"token_ids": [5, 9], "logprobs": [-0.1, null], "reward": 1.0,
     "tokens": ["7", "<end>"]}, ...]}

leafkernels.save_rollouts writes it from tensors. prompt_id, prompt and tokens
are for display and may be missing; other fields are kept. completions must not
be empty; token_ids may be. A position whose logprob is null is never a
boundary. A rollout whose reward is null is left out of every mean and gets 0.
A completion may have "step_rewards", a number for each token, which are added
where they happen; then its reward may be missing.

python -m leafkernels compare [ROLLOUTS] measures which credit scheme fits a file
of many rollouts a prompt (compare --help).

Exit codes: 0; 2 for a wrong option or file; 130, 143 or 129 after Ctrl-C,
SIGTERM or SIGHUP; 141 where the reader of the output went away (with --out
the file is written all the same).
"""


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type for argparse: integers from ``least``, and to ``most`` where that is given."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be an integer of at most {most}, got {text!r}")
        return value

    return parse


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def _lines(text: str) -> float:
    return math.inf if text == "all" else _integer(1)(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options as typed, over the preset's, over the estimator's defaults; ``options``: those given."""
    parser = _build_parser()
    arguments = parser.parse_args(argv)
    preset = PRESETS.get(arguments.preset, {})
    taken = options_of(arguments.estimator)
    arguments.options = {}
    for name in CREDIT_OPTIONS:
        typed = getattr(arguments, name)
        value = preset.get(name) if typed is None else typed
        # The report has the tree of boundaries, whichever scheme is chosen.
        if value is not None and name not in taken and (arguments.html is None or name not in BOUNDARY_OPTIONS):
            known = ", ".join(_flag(option) for option in taken if option in CREDIT_OPTIONS) or "none"
            parser.error(f"{_flag(name)} is not an option of --estimator {arguments.estimator} (its options: {known})")
        if value is not None:
            arguments.options[name] = value
        setattr(arguments, name, taken.get(name) if value is None else value)
    return arguments


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _build_parser() -> argparse.ArgumentParser:
    """The parser; the options of schemes are None where they are not given."""
    parser = argparse.ArgumentParser(
        prog="python -m leafkernels",
        description="Compute advantages for the rollouts in a file and show the prefix trees they form.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # As from Python 3.14 on: -1e-3 is a number too, and no option.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    parser.add_argument("rollouts", nargs="?", type=Path, metavar="ROLLOUTS", help=".jsonl or .jsonl.gz (none: sample)")
    parser.add_argument("--version", action="version", version=f"leafkernels {__version__}")
    files = parser.add_argument_group("reading and writing")
    files.add_argument("--out", type=Path, metavar="FILE", help="write the lines with 'advantages' in every completion")
    files.add_argument("--limit", type=_integer(1), metavar="N", help="stop after N prompts")
    files.add_argument("--show", type=_integer(0), default=3, metavar="N", help="print N trees at most (default: 3)")
    files.add_argument(
        "--lines",
        type=_lines,
        metavar="N",
        help="lines of a tree at most, or 'all' (default: the terminal's height, else 60)",
    )
    files.add_argument("--html", type=Path, metavar="FILE", help="write a report that any browser opens, in one file")
    files.add_argument(
        "--html-prompts", type=_integer(1), default=50, metavar="N", help="trees in the report at most (default: 50)"
    )
    files.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="show ids without tokens as text: a tokenizer on the Hugging Face Hub, or its folder",
    )
    credit = parser.add_argument_group("credit", "Each scheme takes those of the options that are its own.")
    credit.add_argument(
        "--estimator", choices=tuple(ESTIMATORS), default=DEFAULT, help=f"the credit scheme (default: {DEFAULT})"
    )
    credit.add_argument(
        "--backend",
        choices=("auto", "torch", "triton", "reference"),
        default="auto",
        help="auto and torch: PyTorch on the CPU; triton: the GPU; reference: plain Python (default: auto)",
    )
    credit.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="leaf-paper: boundaries, terms and power of the LEAF paper, which samples 8 rollouts of a prompt; options "
        "given beside it win",
    )
    credit.add_argument(
        "--num-boundaries", type=_integer(0), metavar="B", help="boundaries of a prompt at most (default: 2)"
    )
    credit.add_argument(
        "--min-separation",
        type=_integer(1),
        metavar="D",
        help="least distance of two boundaries (default: max(2, shortest rollout // (B + 1)))",
    )
    credit.add_argument(
        "--terms",
        choices=("both", "global", "local"),
        help="leaf: credit against the group, against the parent node, or both (default: both)",
    )
    credit.add_argument(
        "--normalize",
        choices=("span", "reward_std", "none"),
        help="leaf: z-scores over a prompt's spans, division by the deviation of its rewards, or none (default: "
        "span); tree_td: reward_std or none (default: none). The library's 'batch' needs all prompts at once and "
        "is not offered, because the file is read one by one",
    )
    credit.add_argument(
        "--leave-one-out", action="store_true", default=None, help="leaf: the unbiased variant of both terms"
    )
    credit.add_argument(
        "--multiplicity-power",
        type=_finite,
        metavar="X",
        help="leaf: scale spans that n rollouts share by n ** -X (default: 0.5)",
    )
    credit.add_argument(
        "--shrinkage",
        type=float,
        metavar="X",
        help="tree_td: how many rollouts the parent's value counts for at a node (default: 0)",
    )
    credit.add_argument(
        "--group-weight",
        type=_finite,
        metavar="X",
        help="tree_td: weight of the reward minus the group's mean (default: 0.5)",
    )
    return parser


# Left out unless asked for: but for step rewards they are grpo times a number for each prompt, which no cosine sees.
_AS_GRPO = tuple(name for name, scheme in ESTIMATORS.items() if scheme.is_scaled_grpo)

_COMPARE = """\
Each scheme sees a few of a prompt's rollouts, and its policy gradient is held
against that of RLOO on all others; an n-gram policy counted on the prompt's
rollouts stands in for the model. No training, no model, no GPU.
"""


def _schemes(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    wrong = [name for name in names if name not in ESTIMATORS]
    if wrong:
        raise argparse.ArgumentTypeError(f"must be some of {','.join(ESTIMATORS)}, got {wrong[0]!r}")
    return names


def parse_compare(argv: Sequence[str]) -> argparse.Namespace:
    """The options of ``compare``, without its name."""
    parser = argparse.ArgumentParser(
        prog="python -m leafkernels compare",
        description="Measure on logged rollouts which credit scheme's gradient agrees best with unseen rollouts.",
        epilog=_COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="ROLLOUTS", help=".jsonl or .jsonl.gz, one prompt a line (none: sample)"
    )
    parser.add_argument(
        "--rollouts",
        type=_integer(2),
        default=8,
        metavar="K",
        help="rollouts that a scheme sees; a prompt needs 2 K + 8 (default: 8)",
    )
    parser.add_argument(
        "--context",
        type=_integer(0),
        default=4,
        metavar="C",
        help="tokens that the n-gram policy looks back (default: 4)",
    )
    parser.add_argument(
        "--splits",
        type=_integer(1, 10_000),
        default=8,
        metavar="N",
        help="random splits of a prompt's rollouts (default: 8)",
    )
    parser.add_argument(
        "--schemes",
        type=_schemes,
        default=[name for name in ESTIMATORS if name not in _AS_GRPO],
        metavar="NAMES",
        help=f"names with commas between, of {', '.join(ESTIMATORS)} (default: all but {', '.join(_AS_GRPO)})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw differences and intervals (needs matplotlib)")
    return parser.parse_args(argv)
