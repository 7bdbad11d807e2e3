"""From the arguments of a call to the layout of its rows: where each lies, and whose it is."""

from typing import Any

import torch
from torch import Tensor

from leafkernels._core.backend import implementation
from leafkernels._core.checks import check_device, check_integer, check_mask, check_tensor, values_readable
from leafkernels._core.ops import register
from leafkernels.rows.layout import Layout, as_rows


def _stretches_impl(mask: Tensor, slot_starts: Tensor, slot_ends: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return implementation(backend).mask_stretches(mask, slot_starts, slot_ends)


mask_stretches = register(
    "mask_stretches(Tensor mask, Tensor slot_starts, Tensor slot_ends, str backend) -> (Tensor, Tensor)",
    _stretches_impl,
    lambda mask, slot_starts, slot_ends, backend: tuple(slot_starts.new_empty(slot_starts.shape) for _ in range(2)),
)


def check_named_groups(groups: Tensor, num_rows: int, name: str, device: torch.device) -> None:
    """Raise unless ``groups`` holds an integer for each row of the argument ``name``, on its device."""
    check_integer("groups", groups)
    if groups.shape != (num_rows,):
        raise ValueError(f"groups must name one prompt for each of {num_rows} rows, got shape {tuple(groups.shape)}")
    check_device("groups", groups, name, device)


def check_layout(
    name: str, tensor: Tensor, response_mask: Any, groups: Any, cu_seqlens: Any, backend: str = "torch"
) -> tuple[Layout, Tensor | None, tuple[int, ...]]:
    """Layout, mask as rows, and the shape of "one entry for each row" for the argument ``name``, the per-token tensor.

    ``backend``, a resolved one, looks for the rows in the mask.

    See ``span_advantages`` for the layouts.
    """
    mask = check_mask(response_mask, name, tensor.shape, tensor.device)
    if cu_seqlens is None:
        if tensor.dim() not in (2, 3):
            raise ValueError(
                f"{name} must have shape (rows, tokens) or (prompts, rows, tokens), or (total,) together with "
                f"cu_seqlens, got shape {tuple(tensor.shape)}"
            )
        row_shape = tuple(tensor.shape[:-1])
    else:
        row_shape = (check_cu_seqlens(cu_seqlens, name, tensor),)
    num_rows = row_shape[0] if len(row_shape) == 1 else row_shape[0] * row_shape[1]
    if len(row_shape) == 2 and groups is not None:
        raise ValueError(
            f"groups must be None where {name} is (prompts, rows, tokens), each prompt being a group; "
            f"got {name} of shape {tuple(tensor.shape)} and groups={_brief(groups)}"
        )
    is_one_or_batch = groups is None
    if groups is None:
        groups = row_shape[-1]
    elif isinstance(groups, Tensor):
        check_named_groups(groups, num_rows, name, tensor.device)
    else:
        if isinstance(groups, bool) or not isinstance(groups, int):
            raise TypeError(f"groups must be an int or an integer tensor, got {type(groups).__name__}")
        if groups < 1 or num_rows % groups:
            raise ValueError(f"groups must be a positive divisor of the number of rows, {num_rows}, got {groups}")
    rows = as_rows(tensor)
    mask_rows = None if mask is None else as_rows(mask)
    layout = build_layout(rows, mask_rows, groups, cu_seqlens, backend)
    return (with_prompts(layout, row_shape) if is_one_or_batch else layout), mask_rows, row_shape


def with_prompts(layout: Layout, row_shape: tuple[int, ...]) -> Layout:
    """The layout of one prompt or of a batch of them, counted also where no prompt has a row."""
    if row_shape[-1]:
        return layout
    num_prompts = row_shape[0] if len(row_shape) == 2 else 1
    return layout._replace(group_starts=layout.group_starts.new_zeros(num_prompts + 1))


def _brief(groups: Any) -> str:
    return f"a tensor of shape {tuple(groups.shape)}" if isinstance(groups, Tensor) else repr(groups)


def check_cu_seqlens(cu_seqlens: Any, name: str, tensor: Tensor) -> int:
    """Number of rows that ``cu_seqlens`` describes."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 (or int64), got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (rows + 1,), got shape {tuple(cu_seqlens.shape)}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must have shape (total,) together with cu_seqlens, got shape {tuple(tensor.shape)}")
    check_device("cu_seqlens", cu_seqlens, name, tensor.device)
    if values_readable(cu_seqlens):
        if int(cu_seqlens[0]) != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {int(cu_seqlens[0])}")
        if int(cu_seqlens[-1]) != tensor.shape[0]:
            raise ValueError(
                f"cu_seqlens must end at the number of tokens, {tensor.shape[0]}, got {int(cu_seqlens[-1])}"
            )
        falls = (cu_seqlens.diff() < 0).nonzero()
        if falls.shape[0]:
            at = int(falls[0])
            raise ValueError(
                f"cu_seqlens must not fall, got {int(cu_seqlens[at])} followed by {int(cu_seqlens[at + 1])} at {at + 1}"
            )
    return cu_seqlens.shape[0] - 1


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
