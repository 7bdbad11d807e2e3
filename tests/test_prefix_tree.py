"""The prefix tree: by hand, against the reference on every layout, its laws, and what a larger prompt costs."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, Rollouts, rollouts, token_rows, unmasked
from support import examples

import leafkernels
import python_ref
from leafkernels import PrefixTree, prefix_tree
from leafkernels.models import TreeSegments, tree_segments

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


# --- The layout of TRL's packed row -----------------------------------------------------------------------------------


ROWS = st.lists(st.lists(st.integers(3, 5), max_size=6), max_size=6)


def tree_of(rows: list[list[int]]) -> PrefixTree:
    width = max(map(len, rows), default=0)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), width)
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return prefix_tree(ids, response_mask=mask)


def paths(ids: list[int], segments: Any) -> list[tuple[list[int], list[int]]]:
    """Tokens of the queries and of the keys of each segment."""
    index, q, k = (getattr(segments, f"tree_{name}").tolist() for name in ("kv_index", "cu_seqlens_q", "cu_seqlens_k"))
    spans = zip(q, q[1:], k, k[1:], strict=False)
    return [(ids[a:b], [ids[n] for n in index[c:d]]) for a, b, c, d in spans]


def test_segments_by_hand() -> None:
    """1 2 3, 1 2 4 5, and 1 2, which ends where the others part."""
    tree = tree_of([[1, 2, 3], [1, 2, 4, 5], [1, 2], [7]])
    found = tree_segments(tree)
    assert tree.token_ids.tolist() == [1, 2, 3, 4, 5, 7]
    assert paths(tree.token_ids.tolist(), found) == [
        ([1, 2], [1, 2]),
        ([3], [1, 2, 3]),
        ([4, 5], [1, 2, 4, 5]),
        ([7], [7]),
    ]
    assert found.tree_max_seqlens.tolist() == [2, 4]
    # A chain is cut where a row ends, so that rows are whole segments.
    assert [q for q, _ in paths([8, 9], tree_segments(tree_of([[8, 9], [8]])))] == [[8], [9]]


@given(ROWS)
@examples(torch=100)
@example([])
@example([[], [3]])
def test_each_node_sees_its_path(rows: list[list[int]]) -> None:
    tree = tree_of(rows)
    found = tree_segments(tree)
    index, cu_q, cu_k = (part.tolist() for part in found[:3])
    ends, count = tree.ends.tolist(), len(tree.ends)
    assert cu_q[0] == cu_k[0] == 0 and cu_q[-1] == count and cu_k[-1] == len(index)
    for first, last, begin, end in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        for query in range(first, last):
            seen = index[begin : end - (last - 1 - query)]
            assert seen == [k for k in range(count) if k <= query < ends[k]]
    for nodes in tree.nodes.tolist():
        inside = {node for node in nodes if node >= 0}
        assert all(len({*range(a, b)} & inside) in (0, b - a) for a, b in zip(cu_q, cu_q[1:], strict=False))


@given(ROWS)
@examples(torch=60)
def test_beside_the_packed_row_of_trl(rows: list[list[int]]) -> None:
    packing = pytest.importorskip("trl.experimental.async_grpo.packing", reason="needs TRL 1.16: the extra trl")
    rows = [row for row in rows if row]
    if not rows:
        return
    theirs = packing.TreeRow()
    for row in rows:
        numbers = {"input_ids": torch.tensor(row), "completion_mask": torch.ones(len(row))}
        theirs.add({**numbers, "old_log_probs": torch.zeros(len(row)), "advantage": 0.0, "group_id": 0})
    packed = theirs.pack()
    tree = tree_of(rows)
    ours = tree_segments(tree)
    # One node more for each way on beyond the first, an end among them.
    prefixes = {tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}
    ways = {prefix: {tuple(r[len(prefix) : len(prefix) + 1]) for r in rows if (*r[: len(prefix)],) == prefix}
            for prefix in prefixes}  # fmt: skip
    assert len(tree.token_ids) == len(prefixes)
    assert len(packed["input_ids"]) == sum(map(len, ways.values()))

    # Whatever the nodes, each sees the tokens of one prefix, and the prefixes are the same.
    def prefixes_seen(ids: list[int], segments: Any) -> set[tuple[int, ...]]:
        return {tuple(keys[: len(keys) - len(queries) + 1 + n])
                for queries, keys in paths(ids, segments) for n in range(len(queries))}  # fmt: skip

    names = {name: packed[name] for name in TreeSegments._fields}
    assert prefixes_seen(packed["input_ids"].tolist(), TreeSegments(**names)) == prefixes
    assert prefixes_seen(tree.token_ids.tolist(), ours) == prefixes
    if all(len(way) == 1 for way in ways.values()) and len({tuple(row) for row in rows}) == len(rows):
        starts = [row[0] for row in rows]
        order = torch.argsort(torch.tensor(starts), stable=True)
        if order.tolist() == list(range(len(rows))):
            for name in TreeSegments._fields:
                assert getattr(ours, name).tolist() == packed[name].tolist(), name


def test_the_room_that_is_left() -> None:
    tree = prefix_tree(torch.tensor([[1, 2], [1, 3]]), max_nodes=5)
    assert tree_segments(tree).tree_cu_seqlens_q.tolist() == [0, 1, 2, 3, 4, 5]
