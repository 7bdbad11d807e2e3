"""Boundaries of one group: walk all tokens by falling score, keep those far enough from the ones kept before."""

import math
from collections.abc import Sequence

from python_ref.find import cut, full_mask


def select_boundaries(
    scores: Sequence[Sequence[float]],
    *,
    response_mask: Sequence[Sequence[bool]] | None = None,
    num_boundaries: int = 2,
    min_separation: int | None = None,
) -> list[int]:
    """At most ``num_boundaries`` positions of one group, ascending.

    ``scores`` holds one list of per-token scores (surprisal in nats, usually) for each row. Every unmasked position
    p >= 1 whose score is not NaN is a candidate; ties go to the smaller row, then to the smaller position.
    Two boundaries are at least D apart, D = max(2, shortest non-empty row // (max(num_boundaries, 1) + 1)).
    """
    masks = full_mask(scores, response_mask)
    rows = [cut(row, mask) for row, mask in zip(scores, masks, strict=True)]
    live = [cut(mask, mask) for mask in masks]
    lengths = [len(row) for row in rows if row]
    if not lengths or num_boundaries == 0:
        return []
    if min_separation is None:
        min_separation = max(2, min(lengths) // (max(num_boundaries, 1) + 1))

    candidates = []
    for i, row in enumerate(rows):
        for p in range(1, len(row)):
            if live[i][p] and not math.isnan(row[p]):
                candidates.append((-row[p], i, p))
    accepted: list[int] = []
    for _, _, p in sorted(candidates):
        if len(accepted) == num_boundaries:
            break
        if all(abs(p - q) >= min_separation for q in accepted):
            accepted.append(p)
    return sorted(accepted)
