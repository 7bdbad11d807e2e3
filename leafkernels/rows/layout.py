"""One description of where the rows of a batch lie, whatever the caller's layout.

Padded or packed, masked or not, the kernels see the same five numbers for a row: the first element of its storage
(``slot_starts``), the end of it (``slot_ends``), its first token (``row_starts``), its length (``row_lengths``) and
its group. Token t of row i of a tensor lies at ``i * stride_row + row_starts[i] + t``, where ``stride_row`` is the
tensor's own for a padded tensor and 0 for a packed one: no token is copied, and no kernel knows which it was.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Rows and groups of a call. All tensors are int64 and on the device of the tokens.

    A row is the stretch from the first to the last unmasked token of a rollout; a row without one has length 0.
    ``rows_by_group[group_starts[g]:group_starts[g + 1]]`` are the rows of group g in ascending order, so a smaller rank
    within a group is a smaller row. ``max_length`` and ``max_group`` bound the length of a row and the size of a group
    without looking at values on a device: a CUDA ``groups`` tensor leaves only the number of rows as a bound.
    """

    slot_starts: Tensor  # (N,)
    slot_ends: Tensor  # (N,)
    row_starts: Tensor  # (N,)
    row_lengths: Tensor  # (N,)
    rows_by_group: Tensor  # (N,)
    group_starts: Tensor  # (P + 1,)
    group_of_row: Tensor  # (N,)
    max_length: int
    max_group: int

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Where each row lies: its first token, and its length."""
        return self.row_starts, self.row_lengths

    @property
    def slots(self) -> tuple[Tensor, Tensor]:
        """Where the storage of each row begins and ends."""
        return self.slot_starts, self.slot_ends

    @property
    def groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which rows are a prompt: rows by group, group starts, group of each row."""
        return self.rows_by_group, self.group_starts, self.group_of_row

    def members(self, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """For each of some rows, or of all, the rows of its group, (n, max_group), and which entries are real."""
        group_of_row = self.group_of_row if rows is None else self.group_of_row[rows]
        index = self.group_starts[group_of_row][:, None] + torch.arange(self.max_group, device=group_of_row.device)
        is_member = index < self.group_starts[group_of_row + 1][:, None]
        return self.rows_by_group[index.clamp_max(max(self.rows_by_group.shape[0] - 1, 0))], is_member

    def without(self, is_out: Tensor) -> "Layout":
        """The layout in which the rows of a mask (N,) have no token."""
        return self._replace(row_lengths=self.row_lengths.masked_fill(is_out, 0))


def as_rows(tensor: Tensor) -> Tensor:
    """View (..., T) as (N, T) and leave 1-D tensors alone; copies only where the strides allow no such view."""
    rows = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def to_int32(positions: Tensor) -> Tensor:
    """Positions of any integer dtype as int32; what lies beyond is far: one less than the largest, which marks none."""
    if positions.dtype in (torch.int64, torch.int32):
        positions = positions.clamp(-1, torch.iinfo(torch.int32).max - 1)
    return positions.to(torch.int32)
