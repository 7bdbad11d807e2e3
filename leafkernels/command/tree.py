"""The prefix tree of one prompt as the lines that are drawn, top to bottom."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from leafkernels.command.credit import Credit
from leafkernels.command.reading import Prompt


@dataclass
class Branch:
    """A line of the tree: a node that ``rows`` share, or, as a leaf, what follows in rows that are the same.

    ``start`` to ``end`` are its tokens in any of the rows. ``reward`` is the mean of a node's rows; NaN: not scored.
    """

    rows: list[int]
    is_leaf: bool
    guide: str
    start: int
    end: int
    reward: float
    advantage: float


def branches(prompt: Prompt, credit: Credit) -> Iterator[Branch]:
    """Every node and leaf, parents first, siblings by their smallest row.

    Leaves are merged where neither tokens nor rewards differ, because their advantages do not differ either.
    """
    # A stack in place of recursion: the tree may be as deep as there are boundaries, and users choose how many.
    stack = _children(prompt, credit, list(range(len(prompt.rewards))), 0, "")
    while stack:
        branch, depth, below = stack.pop()
        yield branch
        if not branch.is_leaf:
            stack += _children(prompt, credit, branch.rows, depth + 1, below)


def _children(prompt: Prompt, credit: Credit, rows: list[int], depth: int, guide: str) -> list[tuple[Branch, int, str]]:
    """What hangs on a node at ``depth`` (0: the group), last first, each with its depth and its children's guide."""
    families: dict[object, list[int]] = {}
    for row in rows:
        is_leaf = credit.depths[row] == depth
        # NaN differs from itself, and rows that cannot be scored are merged all the same.
        reward = None if math.isnan(prompt.rewards[row]) else prompt.rewards[row]
        key = (tuple(prompt.token_ids[row]), reward) if is_leaf else credit.nodes[row][depth]
        families.setdefault(key, []).append(row)

    found: list[tuple[Branch, int, str]] = []
    for number, members in enumerate(families.values(), 1):
        first = members[0]
        is_leaf = credit.depths[first] == depth
        start = credit.ends[first][depth - 1] if depth else 0
        is_last = number == len(families)
        branch = Branch(
            rows=members,
            is_leaf=is_leaf,
            guide=guide + ("└─ " if is_last else "├─ "),
            start=start,
            end=len(prompt.token_ids[first]) if is_leaf else credit.ends[first][depth],
            reward=prompt.rewards[first] if is_leaf else credit.means[first][depth + 1],
            advantage=credit.values[first][depth],
        )
        found.append((branch, depth, guide + ("   " if is_last else "│  ")))
    return found[::-1]
