"""From the arguments of a call to the layout of its rows: where each lies, and whose it is."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.checks import check_count, check_device, check_integer, check_mask, check_tensor, values_readable
from leafkernels._core.operation import operation
from leafkernels.rows.layout import Layout, as_rows


@operation("find")
def _mask_stretches(mask: Tensor, slot_starts: Tensor, slot_ends: Tensor) -> tuple[Tensor, Tensor]:
    return slot_starts.new_empty(slot_starts.shape), slot_starts.new_empty(slot_starts.shape)


@operation("find")
def _regular_layout(
    like: Tensor, num_rows: int, width: int, group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes = num_rows, num_rows, num_rows, num_rows // group + 1, num_rows
    return tuple(like.new_empty((size,), dtype=torch.int64) for size in sizes)  # type: ignore[return-value]


class Rows(NamedTuple):
    """Where the rows of a per-token argument lie, and how the caller counts rows and prompts."""

    layout: Layout
    mask: Tensor | None
    """(N, T) or (total,) bool; None also where nothing is masked between the first and the last token of any row."""
    row_shape: tuple[int, ...]
    """Shape of one entry for each row."""
    prompt_shape: tuple[int, ...] | None
    """Shape of one entry for each prompt; None: prompts are named by a tensor, and each row holds its prompt's."""
    is_cut: bool = False
    """Whether the mask is in the layout alone: tokens after a row's length are masked."""

    def per_prompt(self, per_group: Tensor) -> Tensor:
        """An entry for each group, in the shape of the caller's prompts."""
        if self.prompt_shape is None:
            return per_group[self.layout.group_of_row]
        return per_group.reshape(*self.prompt_shape, *per_group.shape[1:])


def check_named_groups(groups: Any, num_rows: int, name: str, device: torch.device) -> Tensor:
    """``groups`` as ``check_integer`` gives it; raise unless it holds one for each row of ``name``, on its device."""
    if isinstance(groups, int) and not isinstance(groups, bool):
        raise TypeError(
            "groups must be an integer tensor that names the prompt of each row, got an int: for prompts of "
            f"{groups} consecutive rows pass group_size={groups}"
        )
    if isinstance(groups, Iterable) and not isinstance(groups, Tensor | str | bytes):
        raise TypeError(
            f"groups must be a torch.Tensor, got {type(groups).__name__}: of names, one for each row, "
            "groups=leafkernels.group_index(names) makes one"
        )
    groups = check_integer("groups", groups)
    if groups.shape != (num_rows,):
        raise ValueError(f"groups must name one prompt for each of {num_rows} rows, got shape {tuple(groups.shape)}")
    check_device("groups", groups, name, device)
    return groups


def check_one_grouping(groups: Any, group_size: Any) -> None:
    """Raise where both ``groups`` and ``group_size`` are given, or ``group_size`` is no count."""
    if group_size is None:
        return
    if groups is not None:
        raise ValueError(f"group_size must be None where groups names the prompts, got {group_size!r}")
    check_count("group_size", group_size, 1)


def find_rows(
    name: str,
    tensor: Tensor,
    response_mask: Any,
    groups: Any,
    group_size: Any,
    cu_seqlens: Any,
    backend: str = "torch",
) -> Rows:
    """Find the rows of the argument ``name``, the per-token tensor; see ``span_advantages`` for the layouts.

    ``backend``, a resolved one, looks for the rows in the mask.
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
    for argument, value in (("groups", groups), ("group_size", group_size)):
        if len(row_shape) == 2 and value is not None:
            raise ValueError(
                f"{argument} must be None where {name} is (prompts, rows, tokens), each prompt being a group; "
                f"got {name} of shape {tuple(tensor.shape)} and {argument}={_brief(value)}"
            )
    check_one_grouping(groups, group_size)
    prompt_shape: tuple[int, ...] | None
    prompts: Tensor | int
    if groups is not None:
        prompt_shape, prompts = None, check_named_groups(groups, num_rows, name, tensor.device)
    elif group_size is not None:
        if num_rows % group_size:
            raise ValueError(f"group_size must divide the number of rows, {num_rows}, got {group_size}")
        prompt_shape, prompts = (num_rows // group_size,), group_size
    else:
        prompt_shape, prompts = row_shape[:-1], row_shape[-1]
    # Of the tokens only the shape and the device matter here: strides need no copy.
    rows = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor
    mask_rows = None if mask is None else as_rows(mask)
    layout = build_layout(rows, mask_rows, prompts, cu_seqlens, backend)
    if groups is None and group_size is None:
        layout = with_prompts(layout, row_shape)
    if mask_rows is not None and backend == "torch" and values_readable(mask_rows) and _has_no_hole(mask_rows, layout):
        return Rows(layout, None, row_shape, prompt_shape, is_cut=True)
    return Rows(layout, mask_rows, row_shape, prompt_shape)


def _has_no_hole(mask: Tensor, layout: Layout) -> bool:
    flat = mask.reshape(-1)
    # Of 128 words of eight entries no byte counts to more than 128: a sum of words is eight sums at once.
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.shape[0] // 1024 * 1024
    counts = flat[:whole].view(torch.int64).view(-1, 128).sum(1).view(torch.uint8)
    return int(counts.sum()) + int(flat[whole:].sum()) == int(layout.row_lengths.sum())


def with_prompts(layout: Layout, row_shape: tuple[int, ...]) -> Layout:
    """The layout of one prompt or of a batch of prompts, also where no prompt has a row."""
    if row_shape[-1]:
        return layout
    num_prompts = row_shape[0] if len(row_shape) == 2 else 1
    return layout._replace(group_starts=layout.group_starts.new_zeros(num_prompts + 1))


def _brief(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


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
    # Replaced below for packed rows and for named groups.
    sizes = num_rows, width, group
    regular = _regular_layout("triton", rows, *sizes) if backend == "triton" else _regular_in_steps(rows, *sizes)
    slot_starts, slot_ends, rows_by_group, group_starts, group_of_row = regular
    max_length, max_group = width, groups if isinstance(groups, int) else num_rows
    if cu_seqlens is not None:
        # A cu_seqlens that breaks its rules on a GPU is not checked, but must stay inside the tensors, and rows must
        # not overlap: memory allotted by the sum of their lengths holds no more than all tokens.
        bounds = cu_seqlens.to(torch.int64).clamp(0, width).cummax(0).values
        slot_starts, slot_ends = bounds[:-1], bounds[1:]
        if num_rows and values_readable(slot_starts):
            max_length = int((slot_ends - slot_starts).max())

    if mask is not None and mask.numel():
        # The reference looks at the mask itself.
        backend = "torch" if backend == "reference" else backend
        row_starts, row_lengths = _mask_stretches(backend, mask, slot_starts, slot_ends)
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


def _regular_in_steps(like: Tensor, num_rows: int, width: int, group: int) -> tuple[Tensor, ...]:
    """What the kernel gives in one launch; on a CPU five calls cost less than those of an operation."""
    slot_starts = torch.zeros(num_rows, dtype=torch.int64, device=like.device)
    rows_by_group = torch.arange(num_rows, device=like.device)
    group_starts = torch.arange(0, num_rows + 1, group, device=like.device)
    return slot_starts, torch.full_like(slot_starts, width), rows_by_group, group_starts, rows_by_group // group


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


def to_lists(tensor: Tensor | None, rows: Rows) -> Any:
    """What is stored of each row of a per-token tensor, padding and holes included; None stays None."""
    if tensor is None:
        return None
    tensor = as_rows(tensor.detach())
    slots = zip(*(places.tolist() for places in rows.layout.slots), strict=True)
    if tensor.dim() == 1:
        return [tensor[start:end].tolist() for start, end in slots]
    return [row[start:end].tolist() for row, (start, end) in zip(tensor, slots, strict=True)]


def to_tokens(of_rows: list[list[Any]], like: Tensor, dtype: torch.dtype) -> Tensor:
    """What each row has for what is stored of it, shaped like the per-token tensor ``like``."""
    flat = [value for of_row in of_rows for value in of_row]
    return torch.tensor(flat, dtype=dtype, device=like.device).reshape(like.shape)


def rows_of_groups(layout: Layout) -> list[list[int]]:
    """The rows of each group, ascending."""
    rows, starts = layout.rows_by_group.tolist(), layout.group_starts.tolist()
    return [rows[start:end] for start, end in zip(starts, starts[1:], strict=False)]
