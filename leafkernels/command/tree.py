"""The prefix tree of a prompt's rollouts, as both the report and the terminal show it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from leafkernels.command.credit import Credit
from leafkernels.command.reading import Prompt


@dataclass
class Piece:
    """Tokens [start, end) that all the rollouts in ``rows`` share.

    It ends at a fork, at the end of its rollouts, or at a boundary where they are a node (``is_node``). ``ending``:
    the rollouts that end with it.
    """

    parent: int
    start: int
    end: int
    rows: list[int]
    is_node: bool = False
    ending: list[int] = field(default_factory=list)


@dataclass
class Line:
    """A line of the terminal: tokens [start, end) of ``rows``, which are identical rollouts where ``is_leaf``."""

    rows: list[int]
    is_leaf: bool
    start: int
    end: int
    guide: str = ""


def pieces_of(token_ids: Sequence[Sequence[int]], credit: Credit) -> list[Piece]:
    """The tree, every shared token once. Parents come first, siblings by their smallest rollout.

    The first piece is the prompt: all rollouts, no token.
    """
    pieces: list[Piece] = []
    depths = [credit.depth(row) for row in range(len(token_ids))]
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
            # Rollouts without a reward are in no node.
            depth = max(depths[row] for row in rows)
            boundary = next((p for p in credit.boundaries[:depth] if piece.end < p <= end), None)
            found.append(Piece(number, piece.end, end if boundary is None else boundary, rows, boundary is not None))
        waiting += found[::-1]
    return pieces


def _common_end(token_ids: Sequence[Sequence[int]], rows: list[int], start: int) -> int:
    """Where the rows, the same up to ``start``, stop being the same."""
    first = token_ids[rows[0]]
    end = len(first)
    for row in rows[1:]:
        other = token_ids[row]
        # Whole stretches first: identical rollouts cost no loop.
        if first[start:end] == other[start:end]:
            continue
        position = start
        while position < min(end, len(other)) and first[position] == other[position]:
            position += 1
        end = position
    return end


def lines_of(prompt: Prompt, credit: Credit) -> list[Line]:
    """The tree for the terminal, parents first: nodes and leaves where the credit has spans, else all forks and leaves.

    Identical rollouts with the same reward are one leaf.
    """
    pieces = pieces_of(prompt.token_ids, credit if credit.has_spans else replace(credit, boundaries=[]))
    has_children = {piece.parent for piece in pieces}
    children: list[list[int]] = [[]]
    lines = [Line(pieces[0].rows, False, 0, 0)]
    line_of_piece: list[int] = []
    for number, piece in enumerate(pieces):
        above = line_of_piece[piece.parent] if number else 0
        by_reward: dict[str, list[int]] = {}
        for row in piece.ending:
            by_reward.setdefault(str(prompt.rewards[row]), []).append(row)
        is_leaf = number not in has_children and len(by_reward) == 1
        if number and not is_leaf and (piece.is_node or not credit.has_spans):
            children[above].append(len(lines))
            lines.append(Line(piece.rows, False, lines[above].end, piece.end))
            children.append([])
            above = len(lines) - 1
        line_of_piece.append(above)
        for rows in by_reward.values():
            children[above].append(len(lines))
            lines.append(Line(rows, True, lines[above].end, piece.end))
            children.append([])

    ordered: list[Line] = []
    stack = [(0, "")]
    while stack:
        number, guide = stack.pop()
        ordered.append(lines[number])
        below = sorted(children[number], key=lambda child: lines[child].rows[0])
        for place, child in enumerate(below[::-1]):
            lines[child].guide = guide + ("├─ " if place else "└─ ")
            stack.append((child, guide + ("│  " if place else "   ")))
    return ordered[1:]
