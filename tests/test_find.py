"""mask_stretches: where rows begin and how long they are, exactly as the reference cuts them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE
from support import examples

from leafkernels.kernels import find as kernels
from leafkernels.rows.find import mask_stretches
from python_ref.find import stretch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["padded", "view", "packed"])
def test_agrees_with_the_reference(backend: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 4)

    @given(st.lists(st.lists(st.sampled_from([0, 0, 1]), max_size=19), min_size=1, max_size=5))
    @examples(backend, torch=100, triton=40, reference=100)
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
        found, lengths = mask_stretches(mask, starts, ends, backend)
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
    found, lengths = mask_stretches(mask, starts, torch.full_like(starts, size), backend)
    assert found.tolist() == [kernels.BLOCK + 5, 0, size - 1]
    assert lengths.tolist() == [kernels.BLOCK - 4, 0, 1]
