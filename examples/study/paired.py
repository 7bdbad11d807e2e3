"""Means with intervals, and paired comparisons over seeds."""

from __future__ import annotations

import numpy as np
from scipy import stats


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the mean over the first axis and half the width of its 95% t interval."""
    count = len(values)
    half = stats.t.ppf(0.975, count - 1) * values.std(axis=0, ddof=1) / np.sqrt(count)
    return values.mean(axis=0), half


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Compare two methods seed by seed, (seeds,) each.

    The p value is that of the two-sided sign-flip test: if the methods did not differ, each seed's difference could as
    well have the other sign. All flips up to 12 seeds, 20,000 drawn ones beyond.
    """
    difference = ours - theirs
    mean, half = interval(difference)
    count = len(difference)
    if count <= 12:
        flips = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        flips = np.random.default_rng(0).choice([-1, 1], size=(20_000, count))
        flips[0] = 1
    # The small allowance keeps flips that only rounding sets apart from the observed sum on its side.
    reached = np.abs(flips @ difference) >= np.abs(difference.sum()) - 1e-12
    return {"difference": float(mean), "half": float(half), "p": float(reached.mean()), "seeds": count}


def in_words(middle: float, low: float, high: float) -> str:
    """A difference and its interval, which is left out where it is NaN."""
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]" if low == low else f"{middle:+.3f}"


def less(ours: np.ndarray, theirs: np.ndarray) -> str:
    """The mean difference seed by seed with its 95% t interval, in words."""
    found = compare(ours, theirs)
    middle, half = found["difference"], found["half"]
    return in_words(middle, middle - half, middle + half)


def holm(p_values: list[float]) -> list[float]:
    """Correct p values for their number (Holm 1979)."""
    order = np.argsort(p_values)
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def cheapest(cost: float, peers: dict[str, float]) -> str | None:
    """The name of the cheapest of ``peers`` that costs at least ``cost``, so that it is never the poorer for it."""
    found = [(peer_cost, name) for name, peer_cost in peers.items() if peer_cost >= cost]
    return min(found)[1] if found else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
