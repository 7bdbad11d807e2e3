"""Rows as a dense table."""

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
