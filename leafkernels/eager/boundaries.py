"""Boundaries by non-maximum suppression on the column maxima, which equals the walk over all tokens.

A column first appears in the walk at its own maximum; rejected there, it stays rejected, because the accepted set only
grows. So one maximum over the rows and ``num_boundaries`` rounds of "take the best, blank its neighbours" suffice.
"""

import torch
from torch import Tensor

from leafkernels.eager._rows import aligned_rows

# Scores ranked at a time, and columns at least: what is computed of them stays in a cache.
_CHUNK = 1 << 17
_COLUMNS = 64

# Sorts below every score, -inf included, so that it marks what can be no boundary.
_NEVER = torch.iinfo(torch.int64).min


def select_boundaries(
    scores: Tensor,
    mask: Tensor | None,
    row_starts: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
    max_length: int,
    num_boundaries: int,
    min_separation: int | None,
    negate: bool,
) -> Tensor:
    """(P, num_boundaries) int32, ascending, -1 where there are fewer; ``negate`` ranks by -scores."""
    num_groups = group_starts.shape[0] - 1
    boundaries = scores.new_full((num_groups, num_boundaries), -1, dtype=torch.int32)
    if num_boundaries == 0 or boundaries.numel() == 0 or row_lengths.numel() == 0:
        return boundaries
    width = int(row_lengths.max())
    if width < 2:
        return boundaries
    columns = _column_maxima(scores, mask, row_starts, row_lengths, group_starts, group_of_row, width, negate)

    if min_separation is None:
        lengths = torch.where(row_lengths > 0, row_lengths, width)
        shortest = lengths.new_full((num_groups,), width).scatter_reduce_(0, group_of_row, lengths, "amin")
        separation = (shortest // (num_boundaries + 1)).clamp_min_(2)[:, None]
    else:
        separation = torch.full((num_groups, 1), min_separation, device=scores.device)
    positions = torch.arange(width, device=scores.device)
    keys, found = [], []
    for k in range(num_boundaries):
        key, best = columns.max(1, keepdim=True)  # of equal maxima the first, hence the smallest position
        keys.append(key)
        found.append(best)
        if k + 1 < num_boundaries:
            columns.masked_fill_((positions - best).abs_() < separation, _NEVER)
    accepted = torch.cat(found, dim=1).masked_fill_(torch.cat(keys, dim=1) == _NEVER, width).sort(dim=1).values
    return accepted.masked_fill_(accepted == width, -1).to(torch.int32)


def _column_maxima(
    scores: Tensor,
    mask: Tensor | None,
    row_starts: Tensor,
    row_lengths: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
    width: int,
    negate: bool,
) -> Tensor:
    """(P, width) int64: the best score of each column, and of equal scores the smallest row, in one sortable number."""
    num_rows, num_groups = row_starts.shape[0], group_starts.shape[0] - 1
    rank = torch.arange(0xFFFFFFFF, 0xFFFFFFFF - num_rows, -1, device=scores.device)[:, None]
    in_runs = num_groups == 1
    if not in_runs:
        runs = torch.arange(num_rows, device=scores.device) // max(num_rows // num_groups, 1)
        in_runs = torch.equal(group_of_row, runs)
    columns = []
    step = max(_CHUNK // num_rows, _COLUMNS)
    for start in range(0, width, step):
        end = min(start + step, width)
        aligned = aligned_rows(scores, row_starts, end, start).to(torch.float32)
        # 0 - x and x + 0 turn -0 into 0, so that the two tie, as they do when floats are compared.
        bits = (0.0 - aligned if negate else aligned + 0.0).view(torch.int32)
        bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
        keys = torch.add(rank, bits.to(torch.int64), alpha=1 << 32)

        positions = torch.arange(start, end, device=scores.device)
        excluded = (positions >= row_lengths[:, None]).logical_or_(aligned.isnan())
        if start == 0:
            excluded[:, 0] = True
        if mask is not None:
            excluded.logical_or_(aligned_rows(mask, row_starts, end, start).logical_not())
        keys.masked_fill_(excluded, _NEVER)
        if in_runs:
            # A maximum over a dimension takes a tenth of the time of a scattered one.
            columns.append(keys.view(num_groups, -1, end - start).amax(1))
        else:
            of_groups = keys.new_full((num_groups, end - start), _NEVER)
            columns.append(of_groups.scatter_reduce_(0, group_of_row[:, None].expand_as(keys), keys, "amax"))
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
