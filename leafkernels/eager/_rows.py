"""Rows as a dense table, groups as runs of them, and sums by name."""

import torch
from torch import Tensor


def aligned_rows(tensor: Tensor, row_starts: Tensor, end: int, start: int = 0) -> Tensor:
    """(N, end - start): tokens [start, end) of every row; after a row's end anything may stand.

    A view where the rows already start in column 0, else a gathered copy.
    """
    if tensor.dim() == 2 and end <= tensor.shape[1] and not bool(row_starts.any()):
        return tensor[:, start:end]
    index = row_starts[:, None] + torch.arange(start, end, device=tensor.device)
    index = index.clamp_max(max(tensor.shape[-1] - 1, 0))
    return tensor.gather(1, index) if tensor.dim() == 2 else tensor[index]


def are_in_runs(group_of_row: Tensor, num_groups: int) -> bool:
    """Whether each group is as many rows as every other, one after the other, in the order of the groups."""
    num_rows = group_of_row.shape[0]
    if num_groups == 1:
        return True
    if num_rows % num_groups:
        return False
    runs = torch.arange(num_rows, device=group_of_row.device) // max(num_rows // num_groups, 1)
    return torch.equal(group_of_row, runs)
