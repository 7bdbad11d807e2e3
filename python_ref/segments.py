"""Running sums within segments of a list."""

import math
from collections.abc import Sequence


def running_sums(entries: Sequence[float], starts: Sequence[int], lasts: Sequence[int]) -> list[float]:
    """Of each entry its sum with all before it in its segment, which is from place ``starts`` to place ``lasts``."""
    return [math.fsum(entries[starts[i] : i + 1]) for i in range(len(entries))]
