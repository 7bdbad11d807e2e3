"""Nodes of the prefix tree, from the tokens or from a table of prefix lengths. A node is named by its smallest row.

Refinement leaves the rows sorted, and in that order every node is a run: it begins where a row shares less than the
boundary with the row before. No table of all pairs is needed.
"""

import torch
from torch import Tensor

from leafkernels.eager import prefix_lengths as pairs
from leafkernels.eager._rows import aligned_rows, are_in_runs
from leafkernels.rows.layout import Layout

# A missing boundary lies beyond the shared length of identical rows, which lies beyond every boundary.
_NOWHERE = torch.iinfo(torch.int32).max
_IDENTICAL = _NOWHERE - 1

# All pairs are compared where they are few: a pair costs as much memory as a few tokens.
_TOKENS_OF_PAIR = 16

# Pairs that are looked at together in a table, times boundaries.
_CHUNK = 1 << 16


def prefix_nodes(token_ids: Tensor, boundaries: Tensor, layout: Layout) -> Tensor:
    """(N, B) int64: the smallest row of each row's node at the B boundaries of its group, ``boundaries`` (P, B).

    Two rows are of one node where they share the tokens before the boundary, or are identical. A row without a token,
    and every row at a boundary of -1, is alone.
    """
    row_starts, row_lengths = layout.rows
    num_rows, num_boundaries = row_starts.shape[0], boundaries.shape[1]
    if num_rows * num_boundaries == 0:
        return row_starts.new_empty((num_rows, num_boundaries))
    at = boundaries.index_select(0, layout.group_of_row)
    # A prefix ends at the boundary, or with the row before it: only identical rows share that.
    ends = torch.minimum(at, row_lengths.unsqueeze(1))
    width = max(int(ends.max()), 0)
    if pairs.are_few(num_rows * layout.max_group, max(width, _TOKENS_OF_PAIR)):
        tokens = aligned_rows(token_ids, row_starts, width)
        return _compare_all(tokens, ends, layout)

    # No prefix matters after the last boundary.
    caps = ends.amax(1).clamp_min_(0)
    at = at.masked_fill(at < 0, _NOWHERE)
    order, left_at = pairs.refine(token_ids, caps, torch.zeros_like(caps), layout)
    lengths = row_lengths[order]
    is_identical = (left_at == lengths).logical_and_(lengths > 0)
    is_identical[1:].logical_and_(lengths[1:] == lengths[:-1])
    shared = left_at.masked_fill_(is_identical, _IDENTICAL)[:, None]
    place = torch.arange(num_rows, device=order.device)[:, None]
    first = torch.where(shared < at[order], place, 0).cummax(0).values
    nodes = torch.empty_like(first)
    nodes[order] = order[first]
    return nodes


def _compare_all(tokens: Tensor, ends: Tensor, layout: Layout) -> Tensor:
    """The nodes of rows of few ``tokens`` (N, width) from all pairs; ``ends`` (N, B) are where their prefixes end.

    Two rows share a prefix that ends at the same place in both, and not after the first token that differs.
    """
    num_rows, width = tokens.shape
    num_groups = layout.group_starts.shape[0] - 1
    itself = torch.arange(-1, -1 - num_rows, -1, device=ends.device).unsqueeze(1)
    ends = torch.where(ends > 0, ends, itself)  # a place that no other row has
    in_runs = are_in_runs(layout.group_of_row, num_groups)
    head = pairs.head_width(num_rows * layout.max_group, width)
    start = tokens[:, :head]
    if in_runs:
        groups = num_groups, num_rows // num_groups
        start, ends = start.view(*groups, head), ends.view(*groups, -1)
        others, ends_of_others = start.unsqueeze(1), ends.unsqueeze(1)
        start, ends = start.unsqueeze(2), ends.unsqueeze(2)
    else:
        members, is_member = layout.members()
        others, ends_of_others = start[members], ends[members]
        start, ends = start.unsqueeze(1), ends.unsqueeze(1)
    differs = start != others
    shared = pairs.first_true(differs.flatten(0, -2)).view(differs.shape[:-1])
    if head < width:
        if in_runs:
            members = torch.arange(num_rows, device=ends.device).view(num_groups, 1, -1).expand_as(shared)
        _look_further(shared.view(num_rows, -1), tokens, members.reshape(num_rows, -1), head)
    is_shared = (shared.unsqueeze(-1) >= ends).logical_and_(ends == ends_of_others)
    if in_runs:
        rank = is_shared.max(2).indices  # of equal maxima the first, hence the smallest row
        return rank.add_(layout.group_starts[:-1].view(-1, 1, 1)).view(num_rows, -1)
    rank = is_shared.logical_and_(is_member.unsqueeze(2)).max(1).indices
    return layout.rows_by_group[rank + layout.group_starts[layout.group_of_row].unsqueeze(1)]


def _look_further(shared: Tensor, tokens: Tensor, members: Tensor, head: int) -> None:
    """Correct ``shared`` (N, G) of rows and their ``members`` where all of the first ``head`` tokens are alike.

    A node is named by its smallest row: only pairs with a smaller row are compared, the others taken as alike.
    """
    is_alike = shared == head
    shared.masked_fill_(is_alike, tokens.shape[1])
    smaller = members < torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)
    at = is_alike.logical_and_(smaller).view(-1).nonzero().squeeze(1)
    rest = tokens[:, head:]
    differs = rest.index_select(0, at // members.shape[1]) != rest.index_select(0, members.reshape(-1)[at])
    shared.view(-1)[at] = pairs.first_true(differs).add_(head)


def nodes_of_prefix_lengths(prefix_lengths: Tensor, boundaries: Tensor, layout: Layout) -> Tensor:
    """The same from ``prefix_lengths`` (N, G) by rank within the group, cut at the last boundary or not."""
    num_rows, max_group = prefix_lengths.shape
    num_boundaries, row_lengths = boundaries.shape[1], layout.row_lengths
    nodes = row_lengths.new_empty((num_rows, num_boundaries))
    at = boundaries.masked_fill(boundaries < 0, _NOWHERE)
    step = max(1, _CHUNK // max(max_group * num_boundaries, 1))
    for start in range(0, num_rows if num_boundaries else 0, step):
        rows = slice(start, start + step)
        members, is_member = layout.members(rows)
        is_member = is_member.logical_and_(row_lengths[members] > 0).logical_and_(row_lengths[rows, None] > 0)
        shared = prefix_lengths[rows].masked_fill(is_member.logical_not_(), 0)
        nodes[rows] = _smallest(shared, members, row_lengths, at[layout.group_of_row[rows]], rows)
    return nodes


def _smallest(shared: Tensor, members: Tensor, row_lengths: Tensor, at: Tensor, rows: slice) -> Tensor:
    """(n, B) for some rows the smallest of their members (n, G) that shares as much as ``at`` (n, B), or themselves.

    ``shared`` (n, G) is 0 with what is no member, and with rows without a token.
    """
    own = row_lengths[rows, None]
    is_identical = (shared == own).logical_and_(row_lengths[members] == own).logical_and_(own > 0)
    shared = shared.masked_fill(is_identical, _IDENTICAL)
    itself = torch.arange(row_lengths.shape[0], device=at.device)[rows, None, None]
    return torch.where(shared[:, None, :] >= at[:, :, None], members[:, None, :], itself).amin(2)
