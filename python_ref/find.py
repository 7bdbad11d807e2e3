"""A row is the stretch of a rollout from its first to its last unmasked token; positions count from its start."""

from collections.abc import Sequence


def stretch(mask: Sequence[bool]) -> tuple[int, int]:
    """Half-open range from the first to the last True of ``mask``; (0, 0) where there is none."""
    live = [t for t, is_live in enumerate(mask) if is_live]
    if not live:
        return 0, 0
    return live[0], live[-1] + 1


def full_mask(rows: Sequence[Sequence[object]], response_mask: Sequence[Sequence[bool]] | None) -> list[list[bool]]:
    """The mask as lists of bool; all True where none is given."""
    if response_mask is None:
        return [[True] * len(row) for row in rows]
    return [[bool(m) for m in mask] for mask in response_mask]


def cut(row: Sequence, mask: Sequence[bool]) -> list:
    """The part of ``row`` that lies in the stretch of ``mask``."""
    start, end = stretch(mask)
    return list(row[start:end])
