"""Rows of a call as the lists that ``python_ref`` takes, and lists of rows as a tensor again."""

from typing import Any

import torch
from torch import Tensor

from leafkernels.rows.find import Rows
from leafkernels.rows.layout import Layout, as_rows


def to_lists(tensor: Tensor | None, rows: Rows) -> Any:
    """What is stored of each row of a per-token tensor, padding and holes included; None stays None."""
    if tensor is None:
        return None
    tensor = as_rows(tensor.detach())
    slots = zip(*(places.tolist() for places in rows.layout.slots), strict=True)
    if tensor.dim() == 1:
        return [tensor[start:end].tolist() for start, end in slots]
    return [row[start:end].tolist() for row, (start, end) in zip(tensor, slots, strict=True)]


def to_tokens(row_values: list[list[Any]], like: Tensor, dtype: torch.dtype) -> Tensor:
    """What each row has for what is stored of it, shaped like the per-token tensor ``like``."""
    flat = [value for values in row_values for value in values]
    return torch.tensor(flat, dtype=dtype, device=like.device).reshape(like.shape)


def rows_of_groups(layout: Layout) -> list[list[int]]:
    """The rows of each group, ascending."""
    rows, starts = layout.rows_by_group.tolist(), layout.group_starts.tolist()
    return [rows[start:end] for start, end in zip(starts, starts[1:], strict=False)]
