"""Longest common prefixes: small problems compare all pairs at once, all others refine.

Refinement reads every row about once, however many rows share its prefix.

All rows of a group are compared with one representative. Prefix lengths are an ultrametric: rows that left the
representative at different places i, j share exactly min(i, j) tokens, and rows that left it at the same place with
different tokens share exactly that many. Only rows that left it at the same place with the same token go on, with a
representative of their own and from that place. Exact; nothing is hashed.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._layout import group_members
from leafkernels.eager._rows import aligned_rows

# Comparing all pairs takes a tenth of the steps of a refinement, and is for problems of at most so many tokens; in one
# step, if there are hardly any.
_FEW_TOKENS = 1 << 20
_HARDLY_ANY_TOKENS = 1 << 15
_HEAD = 32


def common_prefix_lengths(
    token_ids: Tensor,
    row_starts: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
    limit: Tensor | None,
    max_group: int,
) -> Tensor:
    """(N, max_group) int32: row i against the j-th row of its group, counting at most ``limit[group]`` tokens."""
    num_rows = row_starts.shape[0]
    device = token_ids.device
    lengths = torch.zeros((num_rows, max_group), dtype=torch.int32, device=device)
    if lengths.numel() == 0:
        return lengths
    caps = (
        row_lengths if limit is None else torch.minimum(row_lengths, limit.to(torch.int64)[group_of_row].clamp_min(0))
    )
    members, is_member = group_members(rows_by_group, group_starts, group_of_row, max_group)
    width = int(caps.max())
    if num_rows * max_group * width <= _FEW_TOKENS:
        return _all_pairs(aligned_rows(token_ids, row_starts, width), caps, members, is_member)
    return _refine(*_flat(token_ids, row_starts), caps, members, is_member)


def _all_pairs(tokens: Tensor, caps: Tensor, members: Tensor, is_member: Tensor) -> Tensor:
    """Compare every row (N, width) with every row of its group: first where most pairs part, then behind it."""
    num_pairs, width = members.numel(), tokens.shape[1]
    head = width if num_pairs * width <= _HARDLY_ANY_TOKENS else min(_HEAD, width)
    start = tokens[:, :head]
    differs = start.index_select(0, members.view(-1)).view(*members.shape, head) != start[:, None]
    shared = _first_true(differs.view(num_pairs, head)).view(members.shape)
    ends = torch.minimum(caps[members], caps[:, None]).masked_fill_(~is_member, 0)
    if head < width:
        left, rank = ((shared >= head) & (ends > head)).nonzero(as_tuple=True)
        rest = tokens[:, head:]
        differs = rest.index_select(0, left) != rest.index_select(0, members[left, rank])
        shared[left, rank] = _first_true(differs).add_(head)
    return torch.minimum(shared, ends).to(torch.int32)


def _refine(tokens: Tensor, offsets: Tensor, caps: Tensor, members: Tensor, is_member: Tensor) -> Tensor:
    """Compare the rows that begin at ``offsets`` with one representative after another."""
    every_row = torch.arange(caps.shape[0], device=tokens.device)
    lengths = torch.zeros(members.shape, dtype=torch.int32, device=tokens.device)
    representative = members[:, 0]
    rows = ((representative != every_row) & (caps > 0)).nonzero().squeeze(1)
    representative = representative[rows]
    shared = torch.zeros_like(rows)
    while rows.numel():
        ends = torch.minimum(caps[rows], caps[representative])
        shared = _first_mismatch(tokens, offsets[rows], offsets[representative], shared, ends)

        # Within a class the smaller of two lengths is the pair's; ties are raised by the rounds that follow.
        of_class = torch.full_like(every_row, -1)
        left_at = caps.clone()
        of_class[rows] = representative
        of_class[representative] = representative
        left_at[rows] = shared
        same = (of_class[members] == of_class[:, None]) & is_member & (of_class >= 0)[:, None]
        pair = torch.minimum(left_at[members], left_at[:, None]).to(torch.int32)
        lengths = torch.where(same, pair, lengths)

        rows, representative, shared = _split(rows, representative, shared, caps, tokens, offsets)
    diagonal = (members == every_row[:, None]) & is_member
    return torch.where(diagonal, caps[:, None].to(torch.int32), lengths)


def _first_true(table: Tensor) -> Tensor:
    """Column of the first True of each row of a bool table; its width or more where there is none.

    Eight columns at a time, as one integer, and then among those eight: argmax is slow on bytes.
    """
    table = pad(table, (0, 8 - table.shape[1] % 8), value=True)
    word = (table.view(torch.int64) != 0).view(torch.uint8).argmax(1)  # of equal maxima the first
    every_row = torch.arange(table.shape[0], device=table.device)
    byte = table.view(torch.uint8).view(*word.shape, table.shape[1] // 8, 8)[every_row, word].argmax(1)
    return word * 8 + byte


def _flat(token_ids: Tensor, row_starts: Tensor) -> tuple[Tensor, Tensor]:
    """The storage of the tokens as one dimension, and where each row starts in it."""
    if token_ids.dim() == 1:
        return token_ids, row_starts
    num_rows, width = token_ids.shape
    stride = token_ids.stride(0)
    extent = (num_rows - 1) * stride + width
    every_row = torch.arange(num_rows, device=token_ids.device)
    return token_ids.as_strided((extent,), (1,)), row_starts + every_row * stride


def _first_mismatch(tokens: Tensor, a: Tensor, b: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Per pair of rows the first t in [start, end) with tokens[a + t] != tokens[b + t], or end.

    Blocks grow as rows go on agreeing, so that rows which part early cost a few tokens and long ones few steps.
    """
    shared = start.clone()
    going = (start < end).nonzero().squeeze(1)
    block = 64
    last = tokens.shape[0] - 1
    while going.numel():
        t = shared[going, None] + torch.arange(block, device=tokens.device)
        left = tokens[(a[going, None] + t).clamp_max_(last)]
        right = tokens[(b[going, None] + t).clamp_max_(last)]
        first = _first_true((left != right).logical_or_(t >= end[going, None])).clamp_max_(block)
        shared[going] += first
        going = going[(first == block) & (shared[going] < end[going])]
        if going.numel():
            block = min(block * 8, 16384, int((end - shared)[going].max()))
    return shared


def _split(
    rows: Tensor, representative: Tensor, shared: Tensor, caps: Tensor, tokens: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that still tie with others: same representative left at the same place with the same token.

    The smallest row of each such class becomes its representative and drops out; the others go on behind that token.
    """
    unfinished = shared < caps[rows]
    rows, representative, shared = rows[unfinished], representative[unfinished], shared[unfinished]
    if rows.numel() < 2:
        return rows[:0], representative[:0], shared[:0]
    token = tokens[offsets[rows] + shared]
    place = representative * (caps.max() + 1) + shared
    by_token = token.argsort(stable=True)
    order = by_token[place[by_token].argsort(stable=True)]
    rows, shared, token, place = rows[order], shared[order], token[order], place[order]
    is_first = torch.ones_like(rows, dtype=torch.bool)
    is_first[1:] = (token[1:] != token[:-1]) | (place[1:] != place[:-1])
    representative = rows[is_first][is_first.cumsum(0) - 1]
    ties = ~is_first
    return rows[ties], representative[ties], shared[ties] + 1
