"""Rows and groups as dense tables."""

import torch
from torch import Tensor


def aligned_rows(tensor: Tensor, row_starts: Tensor, width: int) -> Tensor:
    """(N, width) with the first token of every row in column 0; what lies behind a row's end is arbitrary.

    A view where the rows already start in column 0, else a gathered copy.
    """
    if tensor.dim() == 2 and width <= tensor.shape[1] and not bool(row_starts.any()):
        return tensor[:, :width]
    index = row_starts[:, None] + torch.arange(width, device=tensor.device)
    index = index.clamp_max(max(tensor.shape[-1] - 1, 0))
    return tensor.gather(1, index) if tensor.dim() == 2 else tensor[index]


def group_members(
    rows_by_group: Tensor, group_starts: Tensor, group_of_row: Tensor, max_group: int
) -> tuple[Tensor, Tensor]:
    """For each row the rows of its group, (N, max_group), and which entries are real."""
    index = group_starts[group_of_row][:, None] + torch.arange(max_group, device=rows_by_group.device)
    is_member = index < group_starts[group_of_row + 1][:, None]
    return rows_by_group[index.clamp_max(max(rows_by_group.shape[0] - 1, 0))], is_member
