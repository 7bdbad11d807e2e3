"""The task: write down spoken digits and their running sums; ``3 5 9`` is answered by ``3+5=8 8+9=17``."""

from __future__ import annotations

import random
from collections.abc import Sequence

ALPHABET = "0123456789+= "
REWARDS = ("final", "prefix", "fraction")


def worked_answer(digits: Sequence[int], rng: random.Random | None = None, slip_rate: float = 0.0) -> str:
    """Write the sums one after the other; a single digit is answered by itself.

    With ``slip_rate``, a sum comes out one too large that often, and the next goes on from there.
    """
    if len(digits) == 1:
        return str(digits[0])
    steps, total = [], digits[0]
    for digit in digits[1:]:
        result = total + digit + (rng is not None and rng.random() < slip_rate)
        steps.append(f"{total}+{digit}={result}")
        total = result
    return " ".join(steps)


def scores(reference: str, text: str) -> dict[str, float]:
    """Score an answer in three ways, from 0 to 1.

    ``final``: 1 if what stands behind the last equals sign is the sum, and nothing before it counts. ``prefix``: the
    share of the reference's characters before the first wrong one. ``fraction``: the share of its characters that the
    answer has in the same place.
    """
    right = [a == b for a, b in zip(text, reference, strict=False)]
    return {
        "final": float(text.rpartition("=")[2] == reference.rpartition("=")[2]),
        "prefix": (right.index(False) if False in right else len(right)) / len(reference),
        "fraction": sum(right) / len(reference),
    }
