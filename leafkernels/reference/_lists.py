"""Tensors to lists, ``python_ref``, and back."""

from torch import Tensor


def take_row(tensor: Tensor, row: int, start: int, end: int) -> list:
    of_row = tensor[row] if tensor.dim() == 2 else tensor
    return of_row[start:end].tolist()


def rows_of_groups(rows_by_group: Tensor, group_starts: Tensor) -> list[list[int]]:
    rows, starts = rows_by_group.tolist(), group_starts.tolist()
    return [rows[starts[g] : starts[g + 1]] for g in range(len(starts) - 1)]


def live_rows(mask: Tensor | None, num_rows: int) -> list[int]:
    return list(range(num_rows)) if mask is None else mask.nonzero().flatten().tolist()


def slot_masks(
    mask: Tensor | None, slot_starts: Tensor, slot_ends: Tensor
) -> tuple[list[tuple[int, int]], list[list[bool]]]:
    slots = list(zip(slot_starts.tolist(), slot_ends.tolist(), strict=True))
    if mask is None:
        return slots, [[True] * (end - start) for start, end in slots]
    return slots, [take_row(mask, i, start, end) for i, (start, end) in enumerate(slots)]
