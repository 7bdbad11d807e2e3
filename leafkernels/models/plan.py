"""How rows are run through a model: each alone, or what several of them share once.

Plain Python on a few numbers a row. Rows stand in depth-first order, each beside what it shares with the one before.
Every way to run them is of one kind: *trunks*, the tokens that neighbouring rows begin with, run first (or there are
none), and then *bins*, which hold the nodes of neighbouring rows behind their trunk. With bins of a row each, and
without trunks, they are ordinary rows.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

# A plan has to be this much cheaper than rows by the estimate, which is one.
_MARGIN = 0.95
# Rows of a trunk, so that looking for the best ones stays linear in the rows.
_MOST_ROWS = 256
# Widths of bins that are tried: from the longest row's on, each so many times the one before.
_STEP = 1.41

ROWS, TRUNKS, TREE, TREE_BELOW = "rows", "trunks", "tree", "tree below trunks"
KINDS = (ROWS, TRUNKS, TREE, TREE_BELOW)


class Cluster(NamedTuple):
    """Rows ``first`` to ``last - 1`` in depth-first order, the first ``depth`` tokens of which run once."""

    first: int
    last: int
    depth: int


class Bin(NamedTuple):
    """Rows ``first`` to ``last - 1`` in depth-first order, their ``nodes`` behind a trunk in one row of a batch."""

    first: int
    last: int
    nodes: int


class Piece(NamedTuple):
    """What one forward pass runs, or two: trunks, if there are any, and the bins behind them."""

    trunks: list[Cluster]
    bins: list[Bin]

    @property
    def deepest(self) -> int:
        return max((trunk.depth for trunk in self.trunks), default=0)

    @property
    def widest(self) -> int:
        return max((of_rows.nodes for of_rows in self.bins), default=0)

    @property
    def tokens(self) -> int:
        return len(self.trunks) * self.deepest + len(self.bins) * self.widest

    def depth_of(self, trunk: int) -> int:
        """0 where there are no trunks."""
        return self.trunks[trunk].depth if self.trunks else 0

    @property
    def is_masked(self) -> bool:
        """Whether a bin holds several rows, which must not see each other."""
        return any(of_rows.last - of_rows.first > 1 for of_rows in self.bins)


class Plan(NamedTuple):
    """How all rows are run: one of ``KINDS``, and pieces that follow each other."""

    kind: str
    pieces: list[Piece]

    @property
    def tokens(self) -> int:
        """Of all forward passes, padding included."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def trunks(self) -> int:
        return sum(len(piece.trunks) for piece in self.pieces)


class Weights(NamedTuple):
    """What a model costs, in operations, or as long as so many take."""

    token: float
    """All products of a token with a weight, but for the head's."""
    pair: float
    """Of a token and one that it may see, in all layers."""
    masked: float
    """The same under a mask of ours."""
    forward: float
    """A forward pass, however small."""


def best_clusters(shared: Sequence[int], lengths: Sequence[int], whole: Sequence[int] | None = None) -> list[Cluster]:
    """The trunks that leave the fewest tokens to run, where the rest is run a row each.

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


def count_nodes(shared: Sequence[int], lengths: Sequence[int]) -> int:
    """Of the trees of all rows, a node for each different prefix."""
    return sum(lengths) - sum(shared)


def plans(
    shared: Sequence[int],
    lengths: Sequence[int],
    weights: Weights,
    prompts: Sequence[int] | None = None,
    max_tokens: int | None = None,
    must_have_trunks: bool = False,
) -> dict[str, tuple[Plan, float]]:
    """The cheapest plan of each kind, and its estimate; kinds of which none keeps within ``max_tokens`` are missing.

    Args:
        shared, lengths: as in ``best_clusters``.
        prompts: places at which prompts begin, where they were named.
        max_tokens: of the trunks and bins of a piece, padding included.
        must_have_trunks: each prompt has one trunk, and rows alone are no plan.
    """
    count = len(lengths)
    if not count:
        return {}
    roots = [row for row, common in enumerate(shared) if not common]
    below = [best_clusters(shared, lengths, prompts)]
    if not must_have_trunks:
        below = [best_clusters(shared, lengths), best_clusters(shared, lengths, roots), *(below if prompts else [])]
    alone = [] if must_have_trunks else [[Cluster(0, count, 0)]]
    below = [c for n, c in enumerate(below) if all(cluster.depth for cluster in c) and c not in below[:n]]
    found: dict[str, tuple[Plan, float]] = {}
    for choices, of_rows, of_trees in ((alone, ROWS, TREE), (below, TRUNKS, TREE_BELOW)):
        for clusters in choices:
            tried = None
            for width in _widths(clusters, shared, lengths):
                pieces = _pieces(clusters, shared, lengths, width, max_tokens)
                if pieces is None or pieces == tried:
                    continue
                tried = pieces
                plan = Plan(of_trees if any(piece.is_masked for piece in pieces) else of_rows, pieces)
                cost = estimate(plan, weights)
                if plan.kind not in found or cost < found[plan.kind][1]:
                    found[plan.kind] = plan, cost
    return found


def _widths(clusters: Sequence[Cluster], shared: Sequence[int], lengths: Sequence[int]) -> Iterator[int]:
    """Nodes that a bin may hold: 0, a row each, and more and more up to all nodes of a cluster."""
    tails = [lengths[row] - cluster.depth for cluster in clusters for row in range(cluster.first, cluster.last)]
    most = max((_count_behind(cluster, shared, lengths) for cluster in clusters), default=0)
    width: float = max(tails, default=0)
    yield 0
    while width < most:
        yield int(width)
        width = max(width * _STEP, width + 1)
    yield most


def _count_behind(cluster: Cluster, shared: Sequence[int], lengths: Sequence[int]) -> int:
    """Nodes of a cluster behind its trunk."""
    own = [lengths[row] - max(shared[row], cluster.depth) for row in range(cluster.first + 1, cluster.last)]
    return lengths[cluster.first] - cluster.depth + sum(own)


def _pieces(
    clusters: Sequence[Cluster],
    shared: Sequence[int],
    lengths: Sequence[int],
    width: int,
    max_tokens: int | None,
) -> list[Piece] | None:
    """As few bins of at most ``width`` nodes as there can be, in as few pieces; None: a row is longer than a piece.

    Rows are cut in depth-first order, and a cut repeats the path to it.
    """
    pieces, deepest, widest = [Piece([], [])], 0, 0
    for cluster in clusters:
        for filled in _bins(cluster, shared, lengths, width):
            trunks, bins = pieces[-1]
            is_new = bool(cluster.depth) and not (trunks and cluster.first <= trunks[-1].first < cluster.last)
            deepest, widest = max(deepest, cluster.depth), max(widest, filled.nodes)
            if max_tokens is not None and (len(trunks) + is_new) * deepest + (len(bins) + 1) * widest > max_tokens:
                if cluster.depth + filled.nodes > max_tokens:
                    return None
                trunks, bins, is_new, deepest, widest = [], [], bool(cluster.depth), cluster.depth, filled.nodes
                pieces.append(Piece(trunks, bins))
            if is_new:
                trunks.append(Cluster(filled.first, filled.last, cluster.depth))
            elif cluster.depth:
                trunks[-1] = trunks[-1]._replace(last=filled.last)
            bins.append(filled)
    return [piece for piece in pieces if piece.bins]


def whole_bins(clusters: Sequence[Cluster], shared: Sequence[int], lengths: Sequence[int]) -> list[Bin]:
    """All rows of each cluster in one bin."""
    return [held for cluster in clusters for held in _bins(cluster, shared, lengths, sum(lengths))]


def _bins(cluster: Cluster, shared: Sequence[int], lengths: Sequence[int], width: int) -> Iterator[Bin]:
    first, nodes = cluster.first, lengths[cluster.first] - cluster.depth
    for row in range(cluster.first + 1, cluster.last):
        own = lengths[row] - max(shared[row], cluster.depth)
        if nodes + own > width:
            yield Bin(first, row, nodes)
            first, nodes = row, lengths[row] - cluster.depth
        else:
            nodes += own
    yield Bin(first, cluster.last, nodes)


def estimate(plan: Plan, weights: Weights) -> float:
    """Operations of the forward passes, padding included."""
    cost = 0.0
    for piece in plan.pieces:
        depth, width = piece.deepest, piece.widest
        pair = weights.masked if piece.is_masked else weights.pair
        cost += len(piece.trunks) * depth * (weights.token + depth * weights.pair)
        cost += len(piece.bins) * width * (weights.token + (depth + width) * pair)
        cost += weights.forward * (2 if piece.trunks else 1)
    return cost


def cheapest(costs: dict[str, float]) -> str:
    """The kind to run: rows unless another is cheaper by enough to trust the estimate."""
    best = min(costs, key=lambda kind: (costs[kind], KINDS.index(kind)))
    if best != ROWS and ROWS in costs and costs[best] >= _MARGIN * costs[ROWS]:
        return ROWS
    return best
