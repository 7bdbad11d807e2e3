"""The prefix tree of rows of tokens: one node for each different prefix."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from python_ref.find import full_mask, stretch


@dataclass
class PrefixTree:
    """Nodes in depth-first order, those of one prompt after those of the one before."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    nodes: list[list[int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])


def prefix_tree(
    token_ids: Sequence[Sequence[int]],
    *,
    response_mask: Sequence[Sequence[bool]] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> PrefixTree:
    """The node of token t of a row is the row's first t + 1 tokens, whichever row of the prompt they are read in.

    Prompts follow each other by ascending name. The first child of a node is the one in which the node's smallest row
    continues; the others follow by token id.
    """
    tree = PrefixTree(nodes=[[-1] * len(row) for row in token_ids])
    masks = full_mask(token_ids, response_mask)
    names = list(groups) if groups is not None else [0] * len(token_ids)
    for name in sorted(set(names)):  # type: ignore[type-var]
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(token_ids):
            if names[i] == name:
                start, end = stretch(masks[i])
                for length in range(end - start + 1):
                    rows_of.setdefault(tuple(row[start : start + length]), []).append(i)

        def place(prefix: tuple[int, ...], rows_of: dict[tuple[int, ...], list[int]] = rows_of) -> list[tuple]:
            """Key of depth-first order: at each step down, whether it diverges from the smallest row, and the token."""
            steps = []
            for t, token in enumerate(prefix):
                leaves = min(rows_of[prefix[:t]]) != min(rows_of[prefix[: t + 1]])
                steps.append((leaves, token))
            return steps

        prefixes = sorted((prefix for prefix in rows_of if prefix), key=place)
        first = len(tree.token_ids)
        numbers = {prefix: first + k for k, prefix in enumerate(prefixes)}
        for prefix in prefixes:
            tree.token_ids.append(prefix[-1])
            tree.positions.append(len(prefix) - 1)
            tree.parents.append(numbers.get(prefix[:-1], -1))
            tree.counts.append(len(rows_of[prefix]))
            below = [other for other in prefixes if other[: len(prefix)] == prefix]
            tree.ends.append(numbers[prefix] + len(below))
            for i in rows_of[prefix]:
                tree.nodes[i][stretch(masks[i])[0] + len(prefix) - 1] = numbers[prefix]
        tree.starts.append(len(tree.token_ids))
    return tree
