"""Longest common prefix of every pair of rows, token by token."""

from collections.abc import Sequence

from python_ref.find import cut, full_mask


def common_prefix_lengths(
    token_ids: Sequence[Sequence[int]],
    *,
    response_mask: Sequence[Sequence[bool]] | None = None,
    limit: int | None = None,
    start: int = 0,
) -> list[list[int]]:
    """Entry [i][j] counts the leading tokens that rows i and j share; the diagonal holds the lengths.

    Rows are cut to ``limit`` tokens first, and the first ``start`` tokens of two rows count as equal.
    """
    rows = [cut(row, mask)[:limit] for row, mask in zip(token_ids, full_mask(token_ids, response_mask), strict=True)]
    lengths = []
    for a in rows:
        row_lengths = []
        for b in rows:
            shared = min(start, len(a), len(b))
            while shared < min(len(a), len(b)) and a[shared] == b[shared]:
                shared += 1
            row_lengths.append(shared)
        lengths.append(row_lengths)
    return lengths
