"""Nodes of the prefix tree: exactly the smallest rows that share a prefix, on every backend, from tokens or a table."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rollouts import DEVICE, token_rows
from support import examples

import leafkernels
from leafkernels.credit.nodes import nodes_of_groups, nodes_of_table
from leafkernels.credit.prefix_lengths import prefix_lengths_of_groups
from leafkernels.eager import prefix_lengths as eager_prefix_lengths
from leafkernels.rows.find import Rows, build_layout
from leafkernels.rows.layout import Layout

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Packed = tuple[torch.Tensor, Layout, torch.Tensor]


def smallest_sharing(rows: Sequence[Sequence[int]], groups: Sequence[int], boundaries: list[list[int]]) -> list:
    """By a dictionary of prefixes; a row shorter than the boundary is its own prefix."""
    first: dict[tuple, int] = {}
    names = []
    for i, (row, group) in enumerate(zip(rows, groups, strict=True)):
        keys = [(p, group, tuple(row[:p])) if row and p >= 0 else (p, i) for p in boundaries[group]]
        names.append([first.setdefault((k, key), i) for k, key in enumerate(keys)])
    return names


def packed(rows: Sequence[Sequence[int]], groups: Sequence[int], boundaries: list[list[int]]) -> Packed:
    """Tokens, layout, and the boundaries of the groups 0 to P - 1, in that order."""
    lengths = torch.tensor([0] + [len(row) for row in rows])
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64, device=DEVICE)
    bounds = lengths.cumsum(0).to(DEVICE)
    layout = build_layout(ids, None, torch.tensor(groups, dtype=torch.int64, device=DEVICE), bounds)
    table = torch.tensor(boundaries, dtype=torch.int32, device=DEVICE).reshape(len(boundaries), -1)
    if DEVICE == "cuda":  # as many groups are laid out as there are rows
        table = torch.nn.functional.pad(table, (0, 0, 0, len(rows) - len(boundaries)), value=-1)
    return ids, layout, table


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Prompts of unequal sizes, their rows shuffled, and for each as many ascending boundaries, -1 after the last."""
    rows, groups, boundaries = [], [], []
    num_boundaries = draw(st.integers(1, 3))
    for group in range(draw(st.integers(1, 4))):
        group_tokens = draw(token_rows(draw(st.integers(1, 6))))
        found = sorted(draw(st.sets(st.integers(1, 8), max_size=num_boundaries)))
        boundaries.append(found + [-1] * (num_boundaries - len(found)))
        rows += group_tokens
        groups += [group] * len(group_tokens)
    order = draw(st.permutations(range(len(rows))))
    return [rows[i] for i in order], [groups[i] for i in order], boundaries


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_smallest_rows_that_share_a_prefix(backend: str, few: bool, request: pytest.FixtureRequest) -> None:
    if not few:  # chunks of a few pairs, and no problem is small enough to compare all
        request.getfixturevalue("small_blocks")

    @examples(backend, torch=200, triton=8)
    @given(prompts())
    # A row that another goes on from, between two that are identical, and a boundary after their end.
    @example(([[1, 1], [1, 1, 0], [1, 1]], [0, 0, 0], [[3]]))
    @example(([[], [], [0]], [0, 0, 0], [[1]]))
    def check(case: tuple[list[list[int]], list[int], list[list[int]]]) -> None:
        ids, layout, boundaries = packed(*case)
        expected = smallest_sharing(*case)
        assert nodes_of_groups(ids, layout, boundaries, backend).tolist() == expected
        last = boundaries.amax(1)
        for limit in (None, last):
            table = prefix_lengths_of_groups(ids, Rows(layout, None, (), None), limit, "torch")
            assert nodes_of_table(table, layout, boundaries, backend).tolist() == expected

    check()


@given(st.lists(st.integers(1, 2500), min_size=1, max_size=3), st.integers(1, 6), st.integers(0, 10**6))
@examples(torch=15)
@example([2500, 1, 1500], 6, 0)
def test_groups_of_thousands(sizes: list[int], longest: int, seed: int) -> None:
    """Short rows of two tokens: nodes of hundreds of rows, and many rows that are identical."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=generator)].tolist()
    ids = torch.randint(2, (len(groups), longest), generator=generator).tolist()
    lengths = torch.randint(longest + 1, (len(groups),), generator=generator).tolist()
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    boundaries = [sorted({1, max(1, longest // 2), longest}) for _ in sizes]
    case = packed(rows, groups, boundaries)
    assert nodes_of_groups(*case, "torch").tolist() == smallest_sharing(rows, groups, boundaries)


def test_a_tree_names_the_same_nodes() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6], [7, 5, 6]], device=DEVICE)
    scores = torch.tensor([[0.0, 2.0, 1.0]], device=DEVICE).expand(4, 3)
    named = torch.tensor([1, 1, 2, 2], device=DEVICE)
    for prompts, names in (({}, [0, 1]), ({"group_size": 2}, [0, 1]), ({"groups": named}, [0, 1, 2, 3])):
        tree = leafkernels.span_tree(
            -scores, ids, torch.arange(4.0, device=DEVICE), **prompts, num_boundaries=2, min_separation=1
        )
        assert set(tree.nodes.flatten().tolist()) <= {-1, *names}
        expected = [[0, 0], [0, 0], [0, -1], [-1, -1]] if not prompts else [[0, 0], [0, 0], [-1, -1], [-1, -1]]
        assert tree.nodes.tolist() == expected


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_rows_that_part_after_the_head(num_prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pairs are compared in their first tokens before the rest; of one prompt, too."""
    monkeypatch.setattr(eager_prefix_lengths, "_HARDLY_ANY_TOKENS", 0)
    monkeypatch.setattr(eager_prefix_lengths, "_HEAD", 4)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.zeros(num_prompts, 6, 40, dtype=torch.long)
    token_ids[..., 20:] = torch.randint(0, 2, (num_prompts, 6, 20), generator=generator)
    logprobs = -torch.rand(num_prompts, 6, 40, generator=generator)
    rewards = torch.rand(num_prompts, 6, generator=generator)
    found, expected = (
        leafkernels.span_tree(logprobs, token_ids, rewards, num_boundaries=6, backend=backend).nodes
        for backend in ("torch", "reference")
    )
    assert torch.equal(found, expected) and bool((found > 0).any())
