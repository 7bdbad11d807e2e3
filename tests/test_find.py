"""mask_stretches: where rows begin and how long they are, exactly as the reference cuts them."""

import math
import re
from importlib import import_module
from typing import Any

import numpy
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rollouts import DEVICE, random_group
from support import examples

import leafkernels
from leafkernels.kernels import find as kernels
from leafkernels.rows.find import _mask_stretches, build_layout, find_rows
from python_ref.find import stretch

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["padded", "view", "packed"])
@pytest.mark.parametrize("size", ["few", "many"])
def test_agrees_with_the_reference(backend: str, layout: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 4)
    if size == "many":
        if backend != "torch":
            pytest.skip("only PyTorch takes another way for many tokens")
        monkeypatch.setattr(import_module("leafkernels.eager.find"), "_MANY", 0)
    longest = 19 if size == "few" else 150

    @given(
        st.lists(
            st.one_of(
                st.lists(st.sampled_from([0, 0, 1]), max_size=19),
                st.tuples(*[st.integers(0, longest)] * 3).map(lambda n: [0] * n[0] + [1] * n[1] + [0] * n[2]),
            ),
            min_size=1,
            max_size=5,
        )
    )
    @examples(backend, torch=100, triton=40)
    def check(rows: list[list[int]]) -> None:
        width = max(map(len, rows))
        if layout == "packed":
            mask = torch.tensor(sum(rows, []), dtype=torch.bool, device=DEVICE)
            bounds = torch.tensor([0] + [len(row) for row in rows], device=DEVICE).cumsum(0)
            starts, ends = bounds[:-1], bounds[1:]
        else:
            table = [[*row, *[0] * (width - len(row)), 1, 1] for row in rows]
            mask = torch.tensor(table, dtype=torch.bool, device=DEVICE)[:, :width]
            mask = mask if layout == "view" else mask.contiguous()
            starts = torch.zeros(len(rows), dtype=torch.int64, device=DEVICE)
            ends = torch.full_like(starts, width)
        if not mask.numel():
            return
        found, lengths = _mask_stretches(backend, mask, starts, ends)
        for start, at, length, row in zip(starts.tolist(), found.tolist(), lengths.tolist(), rows, strict=True):
            first, end = stretch(row)
            assert (at - start, length) == (first, end - first)

    check()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_long_rows_cross_whole_blocks(backend: str) -> None:
    size = 3 * kernels.BLOCK
    mask = torch.zeros(3, size, dtype=torch.bool, device=DEVICE)
    mask[0, kernels.BLOCK + 5] = mask[0, 2 * kernels.BLOCK] = True
    mask[2, size - 1] = True
    starts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    found, lengths = _mask_stretches(backend, mask, starts, torch.full_like(starts, size))
    assert found.tolist() == [kernels.BLOCK + 5, 0, size - 1]
    assert lengths.tolist() == [kernels.BLOCK - 4, 0, 1]


def test_a_mask_without_holes_is_in_the_layout_alone() -> None:
    for offset in (0, 3):
        storage = torch.zeros(3 * 2000 + offset, dtype=torch.bool)
        mask = storage[offset:].view(3, 2000)
        mask[0, 5:1999] = mask[2, :7] = True
        assert find_rows("tokens", mask, mask, None, None, None).mask is None
        mask[0, 1200] = False
        assert find_rows("tokens", mask, mask, None, None, None).mask is not None


def test_ends_beyond_a_mask_without_holes() -> None:
    mask = torch.tensor([[False, True, True, False, False], [True, True, True, True, True]])
    found = leafkernels.scatter_spans(
        torch.ones(2, 2), torch.tensor([[1, 4], [2, 3]]), 5, response_mask=mask, backend="torch"
    )
    assert found.tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]]


# ---- the layout that carries every batch into the kernels


@given(st.lists(st.integers(-9, 40), min_size=1, max_size=6), st.integers(0, 30))
@examples(torch=200)
@example([0, 30, 0, 30, 0], 30)
def test_broken_cu_seqlens_give_rows_inside_the_tokens_that_do_not_overlap(bounds: list[int], total: int) -> None:
    """On a GPU nobody looks at the values; the kernels rely on this instead."""
    tokens = torch.zeros(total, dtype=torch.int64, device=DEVICE)
    mask = torch.ones(total, dtype=torch.bool, device=DEVICE)
    for response_mask in (None, mask):
        layout = build_layout(tokens, response_mask, 1, torch.tensor(bounds, dtype=torch.int32, device=DEVICE))
        starts, ends = layout.slot_starts.tolist(), layout.slot_ends.tolist()
        edges = [0, *(edge for slot in zip(starts, ends, strict=True) for edge in slot), total]
        assert edges == sorted(edges)
        assert int(layout.row_lengths.sum()) <= total
        assert (layout.row_starts + layout.row_lengths <= layout.slot_ends).all()


def test_no_token_is_copied() -> None:
    """Rows of a padded, a sliced and a packed batch are views of what the caller holds."""
    from leafkernels.rows.layout import as_rows

    batch = torch.zeros(2, 3, 20, dtype=torch.int64, device=DEVICE)
    for tensor in (batch, batch[..., 4:17], batch[0], batch.flatten()):
        assert as_rows(tensor).untyped_storage().data_ptr() == batch.untyped_storage().data_ptr()


@pytest.mark.parametrize("num_rows", [0, 1, 6, 300])
@pytest.mark.parametrize("group", [0, 1, 3, 6])
def test_one_launch_lays_out_what_steps_do(num_rows: int, group: int) -> None:
    if group and num_rows % group:
        pytest.skip("no runs of that many rows")
    rows = torch.zeros(num_rows, 7, device=DEVICE)
    kernel, steps = (build_layout(rows, None, group, None, backend) for backend in ("triton", "torch"))
    for name, left, right in zip(kernel._fields, kernel, steps, strict=True):
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right), name
            assert left.dtype == torch.int64
        else:
            assert left == right, name


# ---- group_index


def test_numbers_names_in_order_of_appearance() -> None:
    index = leafkernels.group_index(["b", "a", "b", ("x", 1), "a"], device=DEVICE)
    assert index.tolist() == [0, 1, 0, 2, 1]
    assert index.dtype == torch.int64
    assert leafkernels.group_index([]).shape == (0,)


IDS = torch.tensor([7, 3, 7, 7])


@pytest.mark.parametrize(
    "names",
    [IDS, IDS.int(), IDS.double(), list(IDS), [(i, "a") for i in IDS], IDS.numpy(), list(IDS.numpy()), iter(IDS)]
    + [
        [numpy.array(int(i)) for i in IDS],
        [("a", (i,)) for i in IDS.numpy()],
        numpy.array(["u", "v", "u", "u"], object),
    ]
    + [[IDS[0], 3, numpy.int64(7), 7.0]],
)
def test_what_tensors_and_arrays_hold_is_the_name(names: Any) -> None:
    """Tensors hash by identity: taken as they are, every row would be a prompt of its own."""
    assert leafkernels.group_index(names).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (IDS.view(2, 2), ValueError, "names must hold one name for each row, shape (rows,), got shape (2, 2)"),
        (numpy.array(3), ValueError, "names must hold one name for each row, shape (rows,), got shape ()"),
        ([1.0, math.nan], ValueError, "names must not hold NaN, which equals no other name, got nan for row 1"),
        (
            [("a", math.nan)],
            ValueError,
            "names must not hold NaN, which equals no other name, got ('a', nan) for row 0",
        ),
        (
            IDS * torch.tensor([1, math.nan, 1, 1]),
            ValueError,
            "names must not hold NaN, which equals no other name, got nan for row 1",
        ),
        (
            [0, IDS],
            TypeError,
            "names must hold names that can be compared (strings, ints, tuples), got [7, 3, 7, 7] for row 1",
        ),
        ("abab", TypeError, "names must be a list or a tensor of names for the rows, got str"),
        (3, TypeError, "names must be a list or a tensor of names for the rows, got int"),
    ],
)
def test_names_that_name_nothing(names: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        leafkernels.group_index(names)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_scattered_groups_equal_their_prompts_alone(backend: str) -> None:
    group = random_group(6, 12, seed=9, vocabulary=2)
    names = ["u1", "u2", "u1", "u1", "u2", "u3"]
    advantages = leafkernels.span_advantages(
        **group, groups=leafkernels.group_index(names, device=DEVICE), backend=backend
    )
    for name in set(names):
        rows = [i for i, other in enumerate(names) if other == name]
        alone = leafkernels.span_advantages(**{k: v[rows] for k, v in group.items()}, backend=backend)
        assert torch.equal(advantages[rows], alone)
