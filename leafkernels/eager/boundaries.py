"""Boundaries by non-maximum suppression on the column maxima, which equals the walk over all tokens.

A column first appears in the walk at its own maximum; rejected there, it stays rejected, because the accepted set only
grows. So one maximum over the rows and ``num_boundaries`` rounds of "take the best, blank its neighbours" suffice.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leafkernels.eager._rows import aligned_rows, are_in_runs
from leafkernels.rows.layout import Layout

if TYPE_CHECKING:
    from leafkernels.credit.options import CreditOptions

# Scores ranked at a time, and columns at least, so that intermediate results stay in a cache.
_CHUNK = 1 << 17
_COLUMNS = 64

# Sorts after every score: marks positions that can be no boundary.
_NEVER = torch.iinfo(torch.int64).max
# Stands for infinity in float64, where infinity itself marks positions that can be no boundary: above any float32.
_FAR = 1e300


def select_boundaries(
    scores: Tensor, mask: Tensor | None, layout: Layout, options: "CreditOptions", negate: bool
) -> Tensor:
    """(P, num_boundaries) int32, ascending, -1 where there are fewer; ``negate`` ranks by -scores."""
    row_lengths, group_of_row, num_groups = layout.row_lengths, layout.group_of_row, layout.group_starts.shape[0] - 1
    num_boundaries, min_separation = options.num_boundaries, options.min_separation
    if num_groups * num_boundaries * row_lengths.shape[0] == 0 or (width := int(row_lengths.max())) < 2:
        return scores.new_full((num_groups, num_boundaries), -1, dtype=torch.int32)
    shortest = int(row_lengths.min())
    columns = _columns(scores, mask, layout, shortest, width, negate)

    separation: Tensor | int
    if min_separation is not None:
        separation = min_separation
    elif shortest == width:
        separation = max(shortest // (num_boundaries + 1), 2)
    else:
        lengths = torch.where(row_lengths > 0, row_lengths, width)
        shortest_per_group = lengths.new_full((num_groups,), width).scatter_reduce_(0, group_of_row, lengths, "amin")
        separation = (shortest_per_group // (num_boundaries + 1)).clamp_min_(2).unsqueeze(1)
    positions = torch.arange(width, device=scores.device)
    found = []
    for k in range(num_boundaries):
        # Of equal keys the first, hence the smallest position; and 0, which is no boundary, where none is left.
        found.append(columns.min(1, keepdim=True).indices)
        if k + 1 < num_boundaries:
            columns.masked_fill_((positions - found[k]).abs_() < separation, _NEVER)
    accepted = torch.cat(found, dim=1)
    accepted = accepted.masked_fill_(accepted == 0, width).sort(dim=1).values
    return accepted.masked_fill_(accepted == width, -1).to(torch.int32)


def _columns(scores: Tensor, mask: Tensor | None, layout: Layout, shortest: int, width: int, negate: bool) -> Tensor:
    """(P, width) int64: the best score of each column, and of equal scores the smallest row, as one number to sort by;
    the best column has the least."""
    row_starts, row_lengths = layout.rows
    num_rows, group_of_row, num_groups = row_starts.shape[0], layout.group_of_row, layout.group_starts.shape[0] - 1
    in_runs = are_in_runs(group_of_row, num_groups)
    columns = []
    step = max(_CHUNK // num_rows, _COLUMNS)
    for start in range(0, width, step):
        end = min(start + step, width)
        least = aligned_rows(scores, row_starts, end, start).to(torch.float32)
        if not negate:
            least = -least
        # One sum shows that nothing is NaN; where it is itself, infinities of both signs may be the reason.
        has_excluded = shortest < end or mask is not None or bool(least.sum().isnan())
        if has_excluded:
            excluded = least.isnan()
            if shortest < end:
                excluded.logical_or_(torch.arange(start, end, device=scores.device) >= row_lengths.unsqueeze(1))
            if mask is not None:
                excluded.logical_or_(aligned_rows(mask, row_starts, end, start).logical_not())
            least = least.to(torch.float64).clamp_max_(_FAR).masked_fill_(excluded, torch.inf)
        if in_runs:
            best, row = least.view(num_groups, num_rows // num_groups, end - start).min(1)
        else:
            best, row = _least_by_group(least, num_groups, group_of_row)
        # As integers floats sort alike, but for those below 0; + 0 turns -0 into 0, so that the two tie.
        bits = (best.to(torch.float32) + 0.0).view(torch.int32)
        bits = bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
        keys = torch.add(row, bits, alpha=1 << 32)
        if has_excluded:
            keys.masked_fill_(best == torch.inf, _NEVER)
        columns.append(keys)
    columns[0].select(1, 0).fill_(_NEVER)
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _least_by_group(entries: Tensor, num_groups: int, group_of_row: Tensor) -> tuple[Tensor, Tensor]:
    """(P, W) least entry of each column of ``entries`` (N, W) in each group, and the first row that has it."""
    num_rows, width = entries.shape
    groups = group_of_row.unsqueeze(1).expand_as(entries)
    least = entries.new_full((num_groups, width), torch.inf).scatter_reduce_(0, groups, entries, "amin")
    rows = torch.arange(num_rows, device=entries.device).unsqueeze(1)
    rows = torch.where(entries == least[group_of_row], rows, num_rows)
    first = rows.new_full((num_groups, width), num_rows).scatter_reduce_(0, groups, rows, "amin")
    return least, first
