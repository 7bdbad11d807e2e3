"""Three families of tasks from reasoning-gym, each with its verifier.

``sums``: a chain of three numbers, step by step; 1 if the last number is right, else 0. ``reversal``: words in reverse
order; 1 if all are right, else 0. ``sorting``: numbers in ascending order; the share that stands in its right place.
Problems come from reasoning-gym's generators and right or wrong is for its own ``score_answer``; the words of the
question and of the worked answers are ours, short, so that a small model can follow them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from model import Message

# Seeds of reasoning-gym's generators, which make problem i from seed + i: far apart, so that no two uses share one.
USES = ("start", "pilot", "measured", "held out", "trained", "evaluated", "power", "preferred", "answered", "distilled")
SEEDS = {use: 100_000 * (1 + place) for place, use in enumerate(USES)}
NUMBER = re.compile(r"-?\d+")


class Problem(NamedTuple):
    family: str
    question: str
    worked: str  # an answer without a mistake, as the supervised start shows it
    entry: dict[str, Any]  # of reasoning-gym

    @property
    def messages(self) -> list[Message]:
        """The conversation up to the answer."""
        return [("user", self.question)]

    def score(self, text: str) -> float:
        return FAMILIES[self.family].score(self, text)


class Family(NamedTuple):
    options: dict[str, Any]  # of the generator
    generator: str
    limit: int  # tokens of an answer
    write: Callable[[dict[str, Any]], tuple[str, str]]  # question and worked answer
    score: Callable[[Problem, str], float]


def numbers(text: str) -> list[int]:
    return [int(found) for found in NUMBER.findall(text)]


def is_right(problem: Problem, answer: str) -> float:
    return float(dataset(problem.family, 0).score_answer(answer, problem.entry) == 1.0)


def write_sum(entry: dict[str, Any]) -> tuple[str, str]:
    words = entry["metadata"]["expression"].split()
    total, steps = int(words[0]), []
    for sign, term in zip(words[1::2], words[2::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {after}")
        total = after
    return "Work out: " + " ".join(words), "\n".join(steps)


def score_sum(problem: Problem, text: str) -> float:
    found = numbers(text.rpartition("=")[2])
    return is_right(problem, str(found[0])) if found else 0.0


def write_reversal(entry: dict[str, Any]) -> tuple[str, str]:
    return "Reverse: " + ", ".join(entry["metadata"]["words"]), entry["answer"]


def score_reversal(problem: Problem, text: str) -> float:
    return is_right(problem, text.strip())


def write_sorting(entry: dict[str, Any]) -> tuple[str, str]:
    given = [int(float(number)) for number in entry["metadata"]["original_numbers"]]
    return "Sort: " + ", ".join(map(str, given)), ", ".join(map(str, sorted(given)))


def score_sorting(problem: Problem, text: str) -> float:
    right, found = numbers(problem.worked), numbers(text)
    if len(found) > len(right):
        return 0.0
    return sum(ours == theirs for ours, theirs in zip(right, found, strict=False)) / len(right)


FAMILIES = {
    "sums": Family(
        {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2}, "chain_sum", 40, write_sum, score_sum
    ),
    "reversal": Family({"min_words": 5, "max_words": 6}, "word_sequence_reversal", 40, write_reversal, score_reversal),
    "sorting": Family(
        {"min_numbers": 5, "max_numbers": 6, "max_decimals": 0, "min_value": 1, "max_value": 99},
        "number_sorting",
        40,
        write_sorting,
        score_sorting,
    ),
}


@cache
def dataset(family: str, seed: int, size: int = 4000) -> Any:
    """Of reasoning-gym, which makes a problem when it is asked for, and holds its verifier."""

    import reasoning_gym

    of = FAMILIES[family]
    return reasoning_gym.create_dataset(of.generator, seed=seed, size=size, **of.options)


def problem(family: str, use: str, index: int) -> Problem:
    entry = dataset(family, SEEDS[use])[index]
    return Problem(family, *FAMILIES[family].write(entry), entry)
