"""The rollouts of a prompt as a tree in which every token that they share stands once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from leafkernels.command.credit import Credit


@dataclass
class Piece:
    """Tokens [start, end) of all the rollouts in ``rows``.

    It ends where they part, with them, or at a boundary where they are a node (``is_node``).
    """

    parent: int
    start: int
    end: int
    rows: list[int]
    is_node: bool = False
    ending: list[int] = field(default_factory=list)


def pieces_of(token_ids: Sequence[Sequence[int]], credit: Credit) -> list[Piece]:
    """The tree, parents first, siblings by their smallest row. The first piece is the prompt: all rows, no token."""
    pieces: list[Piece] = []
    # A stack in place of recursion: a tree may be as deep as it has rollouts and boundaries.
    waiting = [Piece(parent=-1, start=0, end=0, rows=list(range(len(token_ids))))]
    while waiting:
        piece = waiting.pop()
        number = len(pieces)
        pieces.append(piece)
        families: dict[int, list[int]] = {}
        for row in piece.rows:
            if len(token_ids[row]) == piece.end:
                piece.ending.append(row)
            else:
                families.setdefault(token_ids[row][piece.end], []).append(row)
        found = []
        for rows in families.values():
            end = _common_end(token_ids, rows, piece.end)
            boundary = next((p for p in _shared_boundaries(credit, rows) if piece.end < p <= end), None)
            is_node = boundary is not None
            found.append(Piece(number, piece.end, end if boundary is None else boundary, rows, is_node))
        waiting += found[::-1]
    return pieces


def _common_end(token_ids: Sequence[Sequence[int]], rows: list[int], start: int) -> int:
    """Where the rows, the same up to ``start``, stop being the same."""
    first = token_ids[rows[0]]
    end = len(first)
    for row in rows[1:]:
        other = token_ids[row]
        position = start
        end = min(end, len(other))
        while position < end and first[position] == other[position]:
            position += 1
        end = position
    return end


def _shared_boundaries(credit: Credit, rows: list[int]) -> list[int]:
    """The boundaries at which some of the rows are in a node; rows without a reward are in none."""
    deepest = max(rows, key=lambda row: credit.depths[row])
    return credit.boundaries[: credit.depths[deepest]]
