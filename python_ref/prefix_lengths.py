"""Longest common prefix of every pair of rows, token by token."""

from collections.abc import Sequence

from python_ref.rows import cut, full_mask


def common_prefix_lengths(
    token_ids: Sequence[Sequence[int]], *, response_mask: Sequence[Sequence[bool]] | None = None
) -> list[list[int]]:
    """Entry [i][j] counts the leading tokens that rows i and j share; the diagonal holds the lengths."""
    rows = [cut(row, mask) for row, mask in zip(token_ids, full_mask(token_ids, response_mask), strict=True)]
    lengths = []
    for a in rows:
        of_row = []
        for b in rows:
            shared = 0
            while shared < min(len(a), len(b)) and a[shared] == b[shared]:
                shared += 1
            of_row.append(shared)
        lengths.append(of_row)
    return lengths
