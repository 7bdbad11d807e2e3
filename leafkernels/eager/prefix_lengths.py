"""Longest common prefixes: small problems compare all pairs at once, all others refine.

Refinement (docs/design.md) compares all rows of a group with one representative. Rows that left it at
different places i, j share exactly min(i, j) tokens, and rows that left it at the same place with different tokens
share exactly that many. Only rows that left it at the same place with the same token go on, with a representative of
their own and from that place on: every row is read about once, however many rows share its prefix. Exact; nothing is
hashed.

The rows are sorted as they part: after a representative come those that left it last. Then one number between
neighbours says all, and two rows share the least number that stands between them.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels.eager._rows import aligned_rows
from leafkernels.rows.layout import Layout

# Comparing all pairs takes a tenth of the steps of a refinement, and is for problems of at most so many tokens; in one
# step, if there are hardly any.
_FEW_TOKENS = 1 << 20
_HARDLY_ANY_TOKENS = 1 << 15
_HEAD = 32
_FEW_BYTES = 1 << 14

# Ids that one step of the refinement reads at most for a row, half of them the row's own and half its representative's,
# and about how many for all rows: enough to hide the cost of a step, few enough to stay in a cache.
_BLOCK = 8192
_STEP = 1 << 18

# Pairs in one chunk of lines of the table.
_CHUNK = 1 << 16

_FAR = torch.iinfo(torch.int32).max

# What a test counts with, int64 (2,): ids read, and how often a row was compared with a representative.
counts: Tensor | None = None


def common_prefix_lengths(token_ids: Tensor, limit: Tensor | None, start: Tensor | None, layout: Layout) -> Tensor:
    """(N, max_group) int32: row i against the j-th row of its group.

    At most ``limit[group]`` tokens count, and the first ``start[group]`` are taken to be equal.
    """
    num_rows, max_group, group_of_row = layout.row_starts.shape[0], layout.max_group, layout.group_of_row
    if num_rows * max_group == 0:
        return torch.zeros((num_rows, max_group), dtype=torch.int32, device=token_ids.device)
    caps = layout.row_lengths
    if limit is not None:
        caps = torch.minimum(caps, limit.to(torch.int64)[group_of_row].clamp_min(0))
    if start is None and are_few(num_rows * max_group, int(caps.max())):
        return all_pairs(aligned_rows(token_ids, layout.row_starts, int(caps.max())), caps, *layout.members())
    starts = torch.zeros_like(caps) if start is None else start.to(torch.int64)[group_of_row]
    order, left_at = refine(token_ids, caps, starts, layout)
    return _least_between(order, left_at, caps, layout)


def are_few(num_pairs: int, width: int) -> bool:
    """Whether pairs of rows of so many tokens are compared all, and not refined."""
    return num_pairs * width <= _FEW_TOKENS


def head_width(num_pairs: int, width: int) -> int:
    """How many columns all pairs are compared in first: most pairs diverge there, and few need the others."""
    return width if num_pairs * width <= _HARDLY_ANY_TOKENS else min(_HEAD, width)


def all_pairs(tokens: Tensor, caps: Tensor, members: Tensor, is_member: Tensor) -> Tensor:
    """Compare every row (N, width) with every row of its group: first where most pairs diverge, then the rest."""
    num_pairs, width = members.numel(), tokens.shape[1]
    head = head_width(num_pairs, width)
    start = tokens[:, :head]
    differs = start.index_select(0, members.view(-1)).view(*members.shape, head) != start[:, None]
    shared = first_true(differs.view(num_pairs, head)).view(members.shape)
    ends = torch.minimum(caps[members], caps[:, None]).masked_fill_(~is_member, 0)
    if head < width:
        left, rank = ((shared >= head) & (ends > head)).nonzero(as_tuple=True)
        rest = tokens[:, head:]
        differs = rest.index_select(0, left) != rest.index_select(0, members[left, rank])
        shared[left, rank] = first_true(differs).add_(head)
    return torch.minimum(shared, ends).to(torch.int32)


def refine(token_ids: Tensor, caps: Tensor, starts: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The rows in their sorted order, and what each shares with the one before, both (N,) int64.

    Row i counts up to ``caps[i]`` tokens, and its first ``starts[i]`` as equal. Groups keep their places. Of rows that
    share some prefix the smallest comes first, and identical rows that are not cut are side by side.
    """
    tokens, offsets = _flat(token_ids, layout.row_starts)
    order = layout.rows_by_group.clone()
    left_at = torch.zeros_like(order)
    every_place = torch.arange(order.shape[0], device=order.device)
    head = layout.group_starts[layout.group_of_row[order]]  # where the representative stands: at the head of its class
    at = (head != every_place).nonzero().squeeze(1)
    head = head[at]
    shared = starts[order[at]]
    most = caps.max() + 1
    while at.numel() and tokens.numel():
        rows, representatives = order[at], order[head]
        ends = torch.minimum(caps[rows], caps[representatives])
        shared = _first_mismatch(tokens, offsets[rows], offsets[representatives], shared, ends)
        is_done = shared == caps[rows]
        token = tokens[(offsets[rows] + shared).clamp_max_(tokens.shape[0] - 1)]
        # A representative may end before the start, where all tokens count as equal.
        token.masked_fill_((shared < starts[rows]).logical_or_(is_done), 0)

        # Within its class first who left last, and first who ends there, so that identical rows are side by side; then,
        # of those that can still tie, equal tokens side by side.
        key = (head * most + (most - 1 - shared)) * 2 + is_done.logical_not()
        by_token = token.argsort(stable=True)
        sort = by_token[key[by_token].argsort(stable=True)]
        key, token, shared, is_done = key[sort], token[sort], shared[sort], is_done[sort]
        order[at] = rows[sort]
        left_at[at] = shared
        ties = torch.zeros_like(is_done)
        ties[1:] = (key[1:] == key[:-1]) & (token[1:] == token[:-1]) & ~is_done[1:]
        head = at.masked_fill(ties, 0).cummax(0).values[ties]
        at, shared = at[ties], shared[ties] + 1
        shared = torch.maximum(shared, starts[order[at]])
    return order, left_at


def _least_between(order: Tensor, left_at: Tensor, caps: Tensor, layout: Layout) -> Tensor:
    """(N, max_group) int32 by rank: the least of ``left_at`` after the earlier row, up to the later one."""
    num_rows, max_group = order.shape[0], layout.max_group
    every_rank = torch.arange(max_group, device=order.device)
    places = torch.empty_like(order)
    places[order] = torch.arange(num_rows, device=order.device)
    left_at, caps = left_at.to(torch.int32), caps.to(torch.int32)
    lengths = left_at.new_empty((num_rows, max_group))
    # Each line of the table is independent, so a chunk of lines bounds the memory.
    step = max(1, _CHUNK // max_group)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        first = layout.group_starts[layout.group_of_row[rows]][:, None]
        own = places[rows, None] - first
        between = left_at[(first + every_rank).clamp_max_(num_rows - 1)]
        later = between.masked_fill(every_rank <= own, _FAR).cummin(1).values
        # Backwards from the row: what stands at a place is between it and the place before.
        earlier = between.roll(-1, 1).masked_fill_(every_rank >= own, _FAR).flip(1).cummin(1).values.flip(1)
        members, is_member = layout.members(rows)
        theirs = (places[members] - first).masked_fill_(is_member.logical_not(), 0)
        shared = torch.minimum(later, earlier).gather(1, theirs)
        torch.where(theirs == own, caps[rows, None], shared, out=lengths[rows]).masked_fill_(~is_member, 0)
    return lengths


def first_true(table: Tensor) -> Tensor:
    """Column of the first True of each row of a bool table; its width where there is none.

    Eight columns at a time, as one integer, and then among those eight: a search among bytes is slow, and quicker
    only where there are few.
    """
    width = table.shape[1]
    if 0 < table.numel() <= _FEW_BYTES:
        is_there, column = table.max(1)  # of equal maxima the first
        return column.masked_fill_(is_there.logical_not_(), width)
    if width % 8 or not width:
        table = pad(table, (0, 8 - width % 8))
    is_there, word = (table.view(torch.int64) != 0).max(1)  # of equal maxima the first
    byte = table.view(torch.int64).gather(1, word.unsqueeze(1)).view(torch.uint8).argmax(1)
    return (word * 8 + byte).masked_fill_(~is_there, width)


def _flat(token_ids: Tensor, row_starts: Tensor) -> tuple[Tensor, Tensor]:
    """The storage of the tokens as one dimension, and where each row starts in it."""
    if token_ids.dim() == 1 or token_ids.numel() == 0:
        return token_ids.view(-1), row_starts
    num_rows, width = token_ids.shape
    stride = token_ids.stride(0)
    extent = (num_rows - 1) * stride + width
    every_row = torch.arange(num_rows, device=token_ids.device)
    return token_ids.as_strided((extent,), (1,)), row_starts + every_row * stride


def _first_mismatch(tokens: Tensor, a: Tensor, b: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Per pair of rows the first t in [start, end) with tokens[a + t] != tokens[b + t]; end, or start if that is more.

    Blocks grow as rows go on agreeing, so that rows which part early cost a few tokens and long ones few steps.
    """
    shared = torch.minimum(start, end)
    going = (shared < end).nonzero().squeeze(1)
    block = 16
    if counts is not None:
        counts[1] += start.shape[0]
        counts[0] += start.shape[0]  # the next token, which the caller reads
    while going.numel():
        begin, left = shared[going], end[going]
        block = min(block * 4, _BLOCK // 2, max(_STEP // (2 * going.shape[0]), 16))
        block = min(block, int((left - begin).max()), tokens.shape[0])
        if counts is not None:
            counts[0] += 2 * block * going.shape[0]
        first = first_true(_block(tokens, a[going] + begin, block) != _block(tokens, b[going] + begin, block))
        # Tokens after the end may differ or not.
        reached = torch.minimum(begin + first, left)
        shared[going] = reached
        going = going[(first == block) & (reached < left)]
    return shared


def _block(tokens: Tensor, begin: Tensor, size: int) -> Tensor:
    """(n, size) tokens from ``begin`` on; whole slices of a view of overlapping windows, not element by element."""
    last = tokens.shape[0] - size
    block = tokens.unfold(0, size, 1).index_select(0, begin.clamp_max(last))
    over = (begin > last).nonzero().squeeze(1)
    if over.numel():
        index = begin[over, None] + torch.arange(size, device=tokens.device)
        block[over] = tokens[index.clamp_max_(tokens.shape[0] - 1)]
    return block
