"""mask_stretches: where rows begin and how long they are, exactly as the reference cuts them."""

from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import DEVICE
from support import examples

import leafkernels
from leafkernels.kernels import find as kernels
from leafkernels.rows.find import _mask_stretches, find_rows
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
