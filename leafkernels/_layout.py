"""One description of where the rows of a batch lie, whatever the caller's layout.

Padded or packed, masked or not, the kernels see the same five numbers for a row: the first element of its storage
(``slot_starts``), the end of it (``slot_ends``), its first token (``row_starts``), its length (``row_lengths``) and
its group. Token t of row i of a tensor lies at ``i * stride_row + row_starts[i] + t``, where ``stride_row`` is the
tensor's own for a padded tensor and 0 for a packed one: no token is copied, and no kernel knows which it was.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from leafkernels._backend import implementation
from leafkernels._ops import register
from leafkernels.stretches import mask_stretches


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

    def without(self, is_out: Tensor) -> "Layout":
        """The layout in which the rows of a mask (N,) have no token."""
        return Layout(
            self.slot_starts,
            self.slot_ends,
            self.row_starts,
            self.row_lengths.masked_fill(is_out, 0),
            self.rows_by_group,
            self.group_starts,
            self.group_of_row,
            self.max_length,
            self.max_group,
        )


def values_readable(tensor: Tensor) -> bool:
    """Whether reading values costs no device synchronisation and no graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def as_rows(tensor: Tensor) -> Tensor:
    """View (..., T) as (N, T) and leave 1-D tensors alone; copies only where the strides allow no such view."""
    rows = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def build_layout(
    rows: Tensor,
    mask: Tensor | None,
    groups: Tensor | int,
    cu_seqlens: Tensor | None,
    backend: str = "torch",
) -> Layout:
    """Layout of ``rows`` (N, T), or (total,) with ``cu_seqlens``; arguments have been checked.

    ``mask`` is a bool tensor shaped like ``rows``, which ``backend`` looks for the rows in; ``groups`` an int
    (consecutive runs) or a tensor (N,).
    """
    num_rows = rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    width = rows.shape[-1]
    group = max(groups, 1) if isinstance(groups, int) else 1
    # What does not hold for packed rows, or groups that are named, is replaced below.
    regular = _regular_layout if backend == "triton" else _regular_layout_in_steps
    slot_starts, slot_ends, rows_by_group, group_starts, group_of_row = regular(rows, num_rows, width, group)
    max_length, max_group = width, groups if isinstance(groups, int) else num_rows
    if cu_seqlens is not None:
        # A cu_seqlens that breaks its rules on a GPU, where nobody looks at it, must still stay inside the tensors, and
        # its rows must not overlap: what is allotted by the sum of their lengths holds no more than all tokens.
        bounds = cu_seqlens.to(torch.int64).clamp(0, width).cummax(0).values
        slot_starts, slot_ends = bounds[:-1], bounds[1:]
        if num_rows and values_readable(slot_starts):
            max_length = int((slot_ends - slot_starts).max())

    if mask is not None and mask.numel():
        row_starts, row_lengths = mask_stretches(mask, slot_starts, slot_ends, backend)
    else:
        # Views, because torch.compile refuses an autograd function that is given one tensor twice.
        row_starts = slot_starts.view(-1)
        row_lengths = slot_ends.view(-1) if cu_seqlens is None else slot_ends - slot_starts

    if isinstance(groups, Tensor):
        rows_by_group, group_starts, group_of_row, max_group = _scattered_groups(groups)
    return Layout(
        slot_starts,
        slot_ends,
        row_starts,
        row_lengths,
        rows_by_group,
        group_starts,
        group_of_row,
        max_length,
        max_group,
    )


def _regular_layout_in_steps(like: Tensor, num_rows: int, width: int, group: int) -> tuple[Tensor, ...]:
    """What the kernel of this name gives in one launch."""
    slot_starts = torch.zeros(num_rows, dtype=torch.int64, device=like.device)
    rows_by_group = torch.arange(num_rows, device=like.device)
    group_starts = torch.arange(0, num_rows + 1, group, device=like.device)
    return slot_starts, torch.full_like(slot_starts, width), rows_by_group, group_starts, rows_by_group // group


def _regular_layout_fake(like: Tensor, num_rows: int, width: int, group: int) -> tuple[Tensor, ...]:
    sizes = num_rows, num_rows, num_rows, num_rows // group + 1, num_rows
    return tuple(like.new_empty((size,), dtype=torch.int64) for size in sizes)


_regular_layout = register(
    "regular_layout(Tensor like, SymInt num_rows, SymInt width, SymInt group) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda *args: implementation("triton").regular_layout(*args),
    _regular_layout_fake,
)


def _scattered_groups(groups: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows by group, group starts, group of each row, largest group; equal names make a group wherever they stand."""
    num_rows = groups.shape[0]
    rows_by_group = torch.argsort(groups, stable=True)
    names = groups[rows_by_group]
    is_new = torch.ones_like(names, dtype=torch.bool)
    is_new[1:] = names[1:] != names[:-1]
    sorted_groups = is_new.cumsum(0) - 1
    # Counting the groups would synchronise a device: there, N groups are laid out and the last ones stay empty.
    num_groups = max_group = num_rows
    if num_rows and values_readable(groups):
        num_groups = int(sorted_groups[-1]) + 1
    group_starts = torch.searchsorted(sorted_groups, torch.arange(num_groups + 1, device=groups.device))
    if num_rows and values_readable(groups):
        max_group = int(group_starts.diff().max())
    group_of_row = torch.empty_like(sorted_groups)
    group_of_row[rows_by_group] = sorted_groups
    return rows_by_group, group_starts, group_of_row, max_group


def group_members(
    rows_by_group: Tensor, group_starts: Tensor, group_of_row: Tensor, max_group: int
) -> tuple[Tensor, Tensor]:
    """For each row the rows of its group, (N, max_group), and which entries are real."""
    index = group_starts[group_of_row][:, None] + torch.arange(max_group, device=rows_by_group.device)
    is_member = index < group_starts[group_of_row + 1][:, None]
    return rows_by_group[index.clamp_max(max(rows_by_group.shape[0] - 1, 0))], is_member
