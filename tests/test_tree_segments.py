"""The tree in the layout of attention kernels of variable lengths: by hand, its laws, and beside TRL's packed row."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import examples

from leafkernels import PrefixTree, prefix_tree
from leafkernels.models import TreeSegments, tree_segments

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


def test_by_hand() -> None:
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
