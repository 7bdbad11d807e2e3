"""Rows, groups and masks of tensors as the lists that ``python_ref`` takes."""

from torch import Tensor


def take_row(tensor: Tensor, row: int, start: int, end: int) -> list:
    """Elements [start, end) of a row of (N, T), or of packed rows (total,)."""
    of_row = tensor[row] if tensor.dim() == 2 else tensor
    return of_row[start:end].tolist()


def rows_of_groups(rows_by_group: Tensor, group_starts: Tensor) -> list[list[int]]:
    """The rows of each group."""
    rows, starts = rows_by_group.tolist(), group_starts.tolist()
    return [rows[starts[g] : starts[g + 1]] for g in range(len(starts) - 1)]


def live_rows(mask: Tensor | None, num_rows: int) -> list[int]:
    """The rows that a mask (N,) leaves, all of them without one."""
    return list(range(num_rows)) if mask is None else mask.nonzero().flatten().tolist()


def slot_masks(
    mask: Tensor | None, slot_starts: Tensor, slot_ends: Tensor
) -> tuple[list[tuple[int, int]], list[list[bool]]]:
    """Where the storage of each row begins and ends, and its mask there."""
    slots = list(zip(slot_starts.tolist(), slot_ends.tolist(), strict=True))
    if mask is None:
        return slots, [[True] * (end - start) for start, end in slots]
    return slots, [take_row(mask, i, start, end) for i, (start, end) in enumerate(slots)]
