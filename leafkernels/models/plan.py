"""How rows are run through a model: each alone, or what several of them share once, and then what each has of its own.

Plain Python on a few numbers a row: which rows share a trunk, how long it is, and whether it pays.
"""

from collections.abc import Sequence
from typing import NamedTuple

# A plan has to be this much cheaper than rows by the estimate: it has a second forward, and keys that are copied.
_MARGIN = 0.93
# Rows of a trunk, so that looking for the best ones stays linear in the rows.
_MOST_ROWS = 256


class Cluster(NamedTuple):
    """Rows ``first`` to ``last - 1`` in depth-first order, the first ``depth`` tokens of which run once."""

    first: int
    last: int
    depth: int


class Cost(NamedTuple):
    """What a forward pass is estimated to take, padding included."""

    tokens: int
    pairs: int
    """Of a token and one that it sees."""

    def of(self, tokens_weight: float, pairs_weight: float) -> float:
        return self.tokens * tokens_weight + self.pairs * pairs_weight


def best_clusters(shared: Sequence[int], lengths: Sequence[int], whole: Sequence[int] | None = None) -> list[Cluster]:
    """The trunks that leave the fewest tokens to run.

    Args:
        shared: what each row of the depth-first order has in common with the one before; 0 where a prompt begins.
        lengths: of the rows, in that order; at least 1.
        whole: where given, the places at which prompts begin: each prompt is one cluster.
    """
    if whole is not None:
        ends = [*whole[1:], len(lengths)]
        return [_cluster(first, last, shared, lengths) for first, last in zip(whole, ends, strict=True) if last > first]

    # Of the first rows: how many tokens are saved at most, and where the last cluster begins that does it.
    saved, begins = [0], [0]
    for last in range(1, len(lengths) + 1):
        most, begin, depth = saved[last - 1], last - 1, lengths[last - 1]
        for first in range(last - 2, max(last - _MOST_ROWS, 0) - 1, -1):
            depth = min(depth, shared[first + 1])
            if not depth:
                break
            found = saved[first] + (last - first - 1) * depth
            # Of equal choices the larger cluster: fewer trunks.
            if found >= most:
                most, begin = found, first
        saved.append(most)
        begins.append(begin)
    clusters, last = list[Cluster](), len(lengths)
    while last:
        clusters.append(_cluster(begins[last], last, shared, lengths))
        last = begins[last]
    return clusters[::-1]


def _cluster(first: int, last: int, shared: Sequence[int], lengths: Sequence[int]) -> Cluster:
    # A row alone has a trunk of one token: a trunk without any would be a row of padding.
    depth = min(shared[first + 1 : last], default=1)
    return Cluster(first, last, max(depth, 1) if last - first == 1 else depth)


def cost_of_rows(lengths: Sequence[int]) -> Cost:
    """Of one forward of all rows, padded to the longest."""
    width = max(lengths, default=0)
    return Cost(len(lengths) * width, len(lengths) * width * width)


def cost_of_trunks(clusters: Sequence[Cluster], lengths: Sequence[int]) -> Cost:
    """Of a forward of the trunks and one of the tails, each padded to its longest."""
    deepest = max((cluster.depth for cluster in clusters), default=0)
    tails = [length - cluster.depth for cluster in clusters for length in lengths[cluster.first : cluster.last]]
    width = max(tails, default=0)
    tokens = len(clusters) * deepest + len(tails) * width
    return Cost(tokens, len(clusters) * deepest * deepest + len(tails) * width * (deepest + width))


def shares_trunks(rows: Cost, trunks: Cost, tokens_weight: float, pairs_weight: float) -> bool:
    """Whether the trunks pay."""
    return trunks.of(tokens_weight, pairs_weight) < _MARGIN * rows.of(tokens_weight, pairs_weight)
