"""Rows as a dense table."""

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
