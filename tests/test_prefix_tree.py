"""The prefix tree: by hand, against the reference on every layout, its laws, and what a larger prompt costs."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, Rollouts, rollouts, token_rows, unmasked
from support import examples

import leafkernels
import python_ref
from leafkernels import PrefixTree

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FIELDS = ("token_ids", "positions", "parents", "ends", "counts")

# Rows -> their nodes, worked by hand.
BY_HAND = [
    ([[1, 2, 3], [1, 2, 4], [1, 5, 6]], [[0, 1, 2], [0, 1, 3], [0, 4, 5]]),
    # The smallest row goes first whatever its tokens, the others by token.
    ([[5, 9], [5, 7], [5, 8], [5, 7]], [[0, 1], [0, 2], [0, 3], [0, 2]]),
    # A row that ends inside of another; one without a token; a forest.
    ([[1, 2, 3], [1], [], [2, 2]], [[0, 1, 2], [0], [], [3, 4]]),
    ([[], [3], [2], [3, 3]], [[], [1], [0], [1, 2]]),
    ([], []),
]


def lists(tree: PrefixTree) -> dict[str, list]:
    return {name: getattr(tree, name).tolist() for name in PrefixTree._fields}


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows), default=0)
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), width)
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows]).reshape(-1, 1)
    return {"token_ids": ids.to(DEVICE), "response_mask": mask.to(DEVICE)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "nodes"), BY_HAND)
def test_by_hand(rows: list[list[int]], nodes: list[list[int]], backend: str) -> None:
    tree = leafkernels.prefix_tree(**padded(rows), backend=backend)
    found = [numbers[: len(row)] for numbers, row in zip(tree.nodes.tolist(), rows, strict=True)]
    assert found == nodes
    assert python_ref.prefix_tree(rows).nodes == nodes


def test_every_field_by_hand() -> None:
    found = python_ref.prefix_tree([[1, 2, 3], [1, 2, 4], [1, 5, 6], [7]], groups="aabb")
    assert found.token_ids == [1, 2, 3, 4, 1, 5, 6, 7]
    assert found.positions == [0, 1, 2, 2, 0, 1, 2, 0]
    assert found.parents == [-1, 0, 1, 1, -1, 4, 5, -1]
    assert found.ends == [4, 4, 3, 4, 7, 7, 7, 8]
    assert found.counts == [2, 2, 1, 1, 1, 1, 1, 1]
    assert found.nodes == [[0, 1, 2], [0, 1, 3], [4, 5, 6], [7]]
    assert found.starts == [0, 4, 8]


def expected(case: Rollouts) -> python_ref.PrefixTree:
    return python_ref.prefix_tree(case.token_ids, response_mask=case.mask, groups=case.groups)


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(backend: str, layout: str, small_blocks: None) -> None:
    @examples(backend, torch=200, triton=6, reference=40)
    @given(rollouts())
    @example(unmasked([[1, 1], [1, 1, 0], [1, 1]], [0.0] * 3))
    @example(unmasked([[], [], [0]], [0.0] * 3))
    # Three rows leave the first at one place: one ends there, two tie.
    @example(unmasked([[0, 0, 0, 0], [0, 0], [0, 0, 1, 1], [0, 0, 1], [1, 0], [0, 1]], [0.0] * 6))
    def check(case: Rollouts) -> None:
        tensors = case.packed() if layout == "packed" else case.padded(layout)
        kept = {
            name: tensors[name] for name in ("token_ids", "response_mask", "groups", "cu_seqlens") if name in tensors
        }
        tree = leafkernels.prefix_tree(**kept, backend=backend)
        listed = expected(case)
        for name in FIELDS:
            assert getattr(tree, name).tolist() == getattr(listed, name), name
        assert case.rows_of(tree.nodes, layout) == listed.nodes
        starts = listed.starts
        assert tree.starts.tolist() == starts + starts[-1:] * (len(case.groups) + 1 - len(starts))
        # As many nodes as asked for: those that there are, and empty ones that see themselves.
        sized = leafkernels.prefix_tree(**kept, max_nodes=starts[-1] + 2, backend=backend)
        for name, empty in zip(FIELDS, (0, 0, -1, None, 0), strict=True):
            after = [empty] * 2 if empty is not None else [starts[-1] + 1, starts[-1] + 2]
            assert getattr(sized, name).tolist() == getattr(listed, name) + after, name
        assert torch.equal(sized.nodes, tree.nodes)

    check()


def prefixes(rows: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(row[: t + 1]) for row in rows for t in range(len(row))}


@pytest.mark.parametrize("backend", BACKENDS)
def test_laws(backend: str) -> None:
    """A node for each different prefix; its tokens; who is above whom; rows agree exactly where their nodes do."""

    @examples(backend, torch=150, triton=5, reference=30)
    @given(token_rows(6, vocabulary=3), st.randoms())
    def check(rows: list[list[int]], rng) -> None:
        call = padded(rows)
        mask = call["response_mask"]
        tree = leafkernels.prefix_tree(**call, backend=backend)
        number = tree.token_ids.shape[0]
        assert number == len(prefixes(rows))
        assert torch.equal(tree.token_ids[tree.nodes[mask]], call["token_ids"][mask])
        assert (tree.nodes[~mask] == -1).all()
        assert int(tree.counts.sum()) == sum(map(len, rows))
        every = torch.arange(number, device=DEVICE)
        assert (tree.parents < every).all() and (tree.ends > every).all()
        by_end = (every[:, None] <= every) & (every < tree.ends[:, None])
        above = torch.eye(number, dtype=torch.bool, device=DEVICE)
        for node in range(number):
            if tree.parents[node] >= 0:
                above[:, node] |= above[:, tree.parents[node]]
        assert torch.equal(by_end, above)
        assert torch.equal(tree.positions, above.sum(0) - 1)
        if rows:
            shared = leafkernels.common_prefix_lengths(**call, backend="torch")
            same = (tree.nodes[:, None] == tree.nodes) & (tree.nodes >= 0)
            assert torch.equal(same.sum(-1), shared.long())
        # Other orders of the rows and copies of them have the same nodes, under other numbers.
        other = rng.sample(rows, len(rows))
        again = leafkernels.prefix_tree(**padded(other + other[:2]), backend=backend)
        assert again.token_ids.shape[0] == number
        assert sorted(again.token_ids.tolist()) == sorted(tree.token_ids.tolist())

    check()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integers(dtype: torch.dtype, backend: str) -> None:
    ids = torch.tensor([[200, 7, 3], [200, 7, 90], [3, 7, 3]], device=DEVICE).to(dtype)
    tree = leafkernels.prefix_tree(ids, backend=backend)
    assert tree.token_ids.dtype == dtype and torch.equal(tree.token_ids[tree.nodes], ids)
    assert tree.nodes.tolist() == [[0, 1, 2], [0, 1, 3], [4, 5, 6]]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_views_and_batches(backend: str) -> None:
    ids = torch.randint(0, 2, (2, 3, 9), device=DEVICE)
    tree = leafkernels.prefix_tree(ids[..., 1:8], backend=backend)
    by_size = leafkernels.prefix_tree(ids[..., 1:8].flatten(0, 1), group_size=3, backend=backend)
    assert tree.nodes.shape == (2, 3, 7) and torch.equal(tree.nodes.flatten(0, 1), by_size.nodes)
    assert torch.equal(tree.token_ids[tree.nodes], ids[..., 1:8])
    for a, b in zip(tree[:5], by_size[:5], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(tree.starts, by_size.starts) and tree.starts.shape == (3,)
    assert leafkernels.prefix_tree(ids[:, :0], backend=backend).starts.tolist() == [0, 0, 0]


def test_thousands_of_rows() -> None:
    """4,096 rows of one prompt, in memory that grows with the tokens: no table of pairs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 3, (4096, 12), generator=generator)
    tree = leafkernels.prefix_tree(ids, backend="torch")
    assert torch.equal(tree.token_ids[tree.nodes], ids)
    assert tree.token_ids.shape[0] == sum(len(ids[:, : t + 1].unique(dim=0)) for t in range(12))
    assert torch.equal(tree.counts, tree.nodes.flatten().bincount())


def test_bad_arguments_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    with pytest.raises(ValueError, match=r"^max_nodes must be at least the number of nodes, 4, got 3$"):
        leafkernels.prefix_tree(ids, max_nodes=3)
    many = torch.randint(0, 2, (40, 30), generator=torch.Generator().manual_seed(0))
    number = leafkernels.prefix_tree(many).token_ids.shape[0]
    for backend in BACKENDS[:2]:
        monkeypatch.setattr("leafkernels.eager.prefix_tree._CHUNK", 40)  # fewer entries than there are nodes
        with pytest.raises(ValueError, match=rf"^max_nodes must be at least the number of nodes, {number}, got 500$"):
            leafkernels.prefix_tree(many, max_nodes=500, backend=backend)
    with pytest.raises(ValueError, match=r"^max_nodes must be at least 0, got -1$"):
        leafkernels.prefix_tree(ids, max_nodes=-1)
    with pytest.raises(TypeError, match=r"^max_nodes must be an int, got float$"):
        leafkernels.prefix_tree(ids, max_nodes=4.0)
    with pytest.raises(TypeError, match=r"^token_ids must hold integers, got torch.float32$"):
        leafkernels.prefix_tree(ids.float())
