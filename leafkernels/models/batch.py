"""Rows that have been read: in depth-first order, with the few numbers of each that a plan is made by."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_integer, check_mask
from leafkernels.rows.find import find_rows
from leafkernels.rows.layout import as_rows
from leafkernels.rows.prefix_tree import order_of_rows


class Rows(NamedTuple):
    """Rows in depth-first order, each from its first token on, and the few numbers of them that Python decides by."""

    ids: Tensor  # (N, L)
    scored: Tensor  # (N, L) bool, never at a row's first token
    lengths: list[int]  # at least 1
    shared: list[int]  # with the row before
    firsts: list[int]  # the first token of each row that is asked for; its length if none is
    cells: Tensor | None = None  # (N, L): where the kept ids of each token stand in a sampling mask

    def part(self, first: int, last: int) -> "Rows":
        parts: list[Any] = [None if part is None else part[first:last] for part in self]
        return Rows(*parts)


class TreeBatch(NamedTuple):
    """What ``tree_batch`` has read of rows; ``tree_logprobs`` and ``tree_stats`` take it in place of the ids."""

    rows: Rows
    order: Tensor  # (n,) of the caller's rows, those in ``rows``
    starts: Tensor  # (n,) where each begins in its columns
    prompts: list[int] | None  # where prompts begin, where they were named
    shape: torch.Size  # of the caller's ids

    def spread(self, found: Tensor) -> Tensor:
        """What the rows have, (n, L, ...), as the caller's rows stand, (N, T, ...), 0 elsewhere."""
        zeros = found.new_zeros((*self.shape, *found.shape[2:]))
        if not found.numel():
            return zeros
        columns = torch.arange(self.shape[1], device=found.device) - self.starts[:, None]
        is_there = (columns >= 0) & (columns < found.shape[1])
        more = (1,) * (found.dim() - 2)
        places = (
            columns.clamp(0, found.shape[1] - 1).view(*columns.shape, *more).expand(*columns.shape, *found.shape[2:])
        )
        found = torch.where(is_there.view(*columns.shape, *more), found.gather(1, places), 0.0)
        return zeros.index_copy(0, self.order, found)


def tree_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
) -> TreeBatch:
    """Read rows once, for several models (policy, reference) or several questions; the arguments of ``tree_logprobs``.

    Four numbers of each row are read back from the device, in one piece.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.
    """
    input_ids = check_integer("input_ids", input_ids)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape (rows, tokens), got shape {tuple(input_ids.shape)}")
    backend = resolve_backend("auto", input_ids.device)
    found = find_rows("input_ids", input_ids, attention_mask, groups, group_size, None, backend)
    layout, ids = found.layout, as_rows(input_ids)
    order, shared = order_of_rows(ids, layout, backend)
    asked = check_mask(response_mask, "input_ids", input_ids.shape, input_ids.device)
    columns = torch.arange(ids.shape[1], device=ids.device)
    starts, ends = layout.row_starts[:, None], (layout.row_starts + layout.row_lengths)[:, None]
    scored = (columns > starts) & (columns < ends)
    if asked is not None:
        scored &= asked
    firsts = torch.where(scored, columns - starts, ends - starts).amin(1) if ids.shape[1] else layout.row_lengths
    # An empty prompt begins where the next does, or behind the last row.
    begins = pad(torch.zeros_like(order), (0, 1)).index_fill_(0, layout.group_starts[:-1], 1)[:-1]
    holes = torch.zeros_like(begins) if found.mask is None else layout.row_lengths - found.mask.sum(1)
    # The one look at the device.
    *numbers, missing = torch.stack([layout.row_lengths[order], shared, firsts[order], begins, holes[order]]).tolist()
    if any(missing):
        place = next(place for place, number in enumerate(missing) if number)
        raise ValueError(
            "attention_mask must be one stretch of each row, got a hole in row "
            f"{int(order[place])}: {missing[place]} of the {numbers[0][place]} entries from its first to its last "
            "token are 0"
        )
    kept = [place for place, length in enumerate(numbers[0]) if length]
    lengths, common, first_asked, begin = ([column[place] for place in kept] for column in numbers)
    if len(kept) < len(numbers[0]):
        order = order[torch.tensor(kept, dtype=torch.int64, device=order.device)]
    prompts = [place for place, is_first in enumerate(begin) if is_first or place == 0]
    begins, longest = layout.row_starts[order], max(lengths, default=0)
    # Rows from their first token on, so that padding on the left costs nothing.
    places = (begins[:, None] + torch.arange(longest, device=ids.device)).clamp_max(ids.shape[1] - 1)
    is_scored = scored[order].gather(1, places)
    if longest and min(lengths) < longest:
        # What stands behind a row may be no id: its last token, which stands for no recording or image.
        last = begins + layout.row_lengths[order] - 1
        is_scored &= places <= last[:, None]
        places = torch.minimum(places, last[:, None])
    # Models look up ids of 32 or 64 bits alone.
    rows = Rows(ids[order].gather(1, places).to(torch.int64), is_scored, lengths, common, first_asked)
    named = prompts if groups is not None or group_size is not None else None
    return TreeBatch(rows, order, begins, named, input_ids.shape)


def as_batch(input_ids: Any, attention_mask: Any, **others: Any) -> TreeBatch:
    """The batch that is given in place of ids, or that of the ids."""
    if not isinstance(input_ids, TreeBatch):
        return tree_batch(input_ids, attention_mask, **others)
    for name, value in {"attention_mask": attention_mask, **others}.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None with a TreeBatch, which has been read with its own, got {value!r:.80}"
            )
    return input_ids
