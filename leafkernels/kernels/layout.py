"""Where the rows of a padded batch lie, and which are a prompt, for prompts of equally many rows: one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # rows of a program


@triton.jit(do_not_specialize=["num_rows", "width", "group"])
def _regular_layout_kernel(
    slot_starts_ptr,
    slot_ends_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    group_of_row_ptr,
    num_rows,
    width,
    group,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < num_rows
    tl.store(slot_starts_ptr + row, row * 0, mask=is_row)
    tl.store(slot_ends_ptr + row, row * 0 + width, mask=is_row)
    tl.store(rows_by_group_ptr + row, row, mask=is_row)
    tl.store(group_of_row_ptr + row, row // group, mask=is_row)
    tl.store(group_starts_ptr + row, row * group, mask=row <= num_rows // group)


def launch_regular_layout(like: Tensor, num_rows: int, width: int, group: int) -> tuple[Tensor, ...]:
    """Slot starts and ends (N,), rows by group (N,), group starts (N / group + 1,), group of each row (N,): int64."""
    sizes = num_rows, num_rows, num_rows, num_rows // group + 1, num_rows
    parts = tuple(torch.empty(size, dtype=torch.int64, device=like.device) for size in sizes)
    _regular_layout_kernel[(triton.cdiv(num_rows + 1, BLOCK),)](*parts, num_rows, width, group, BLOCK=BLOCK)
    return parts
