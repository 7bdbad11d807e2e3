"""The layout that carries every batch into the kernels."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rollouts import DEVICE
from support import examples

from leafkernels.rows.find import build_layout


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
