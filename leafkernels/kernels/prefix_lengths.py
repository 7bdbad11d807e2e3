"""Longest common prefixes by refinement (docs/design.md): ids are read about twice, whatever the rows share.

    represent       the first row of a group represents all others
    first_mismatch  a program for each row and share of its blocks: where does the row diverge from its representative?
    refine_ties     a program for each group: rows that diverge from one representative at one place with the same token
                    tie, and the smallest tied row represents the others from there on; all others are settled
    prefix_table    a program for each row: two rows share the least number on the way from one to the other, over
                    their representatives

A settled row keeps its representative and the length of their shared prefix. The two in the middle alternate a fixed
number of times, with the whole GPU; the last refine_ties then runs until nothing ties. The host never reads how far the
device is, and the number of rounds changes the time only. The minimum of atomics does not depend on their order, so
every run is the same.

Small problems compare every pair of rows in one launch instead.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION, load_block, num_splits, row_stride

if TYPE_CHECKING:
    from leafkernels.rows.layout import Layout

# Pairs are compared one by one where that reads at most so many ids: one launch takes less time than six.
FEW_TOKENS = 1 << 24
ROUNDS = 2  # comparisons by the whole GPU, before every group goes on by itself
BLOCK_PAIRS = 512  # tokens of a pair at a time: most pairs diverge early
BLOCK = 1024  # tokens that first_mismatch compares at a time
BLOCK_ROWS = 16  # rows that refine_ties compares at a time, and
BLOCK_TOKENS = 128  # how many tokens of each
BLOCK_TIES = 64  # rows among which it looks for ties at a time
BLOCK_RANKS = 128  # entries of a line of the table at a time

# What a test counts with, int64 (2,): ids read, and how often a row was compared with a representative.
counts: Tensor | None = None

FAR = tl.constexpr(2147483647)


@triton.jit
def _end(row, other, row_lengths_ptr, limit_ptr, group, HAS_LIMIT: tl.constexpr):
    """How many tokens of two rows are compared at most."""
    end = tl.minimum(tl.load(row_lengths_ptr + row), tl.load(row_lengths_ptr + other))
    if HAS_LIMIT:
        end = tl.minimum(end, tl.maximum(tl.load(limit_ptr + group).to(tl.int64), 0))
    return end


@triton.jit(do_not_specialize=["stride_tokens_row", "max_group"])
def _compare_pairs_kernel(
    lengths_ptr,
    counts_ptr,
    token_ids_ptr,
    row_starts_ptr,
    row_lengths_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    group_of_row_ptr,
    limit_ptr,
    start_ptr,
    stride_tokens_row,
    max_group,
    HAS_LIMIT: tl.constexpr,
    HAS_START: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # lengths: (N, max_group), row by rank of the other row; a program for each entry.
    pair = tl.program_id(0).to(tl.int64)
    left = pair // max_group
    right_rank = pair % max_group
    group = tl.load(group_of_row_ptr + left)
    first = tl.load(group_starts_ptr + group)
    size = tl.load(group_starts_ptr + group + 1) - first
    if right_rank >= size:
        tl.store(lengths_ptr + pair, 0)
        return
    right = tl.load(rows_by_group_ptr + first + right_rank)
    if right < left:
        return  # the program of (right, left) writes both
    end = _end(left, right, row_lengths_ptr, limit_ptr, group, HAS_LIMIT)

    shared = end
    if right != left:
        left_base = left * stride_tokens_row + tl.load(row_starts_ptr + left)
        right_base = right * stride_tokens_row + tl.load(row_starts_ptr + right)
        # An int64 zero: what a loop changes must keep its type.
        begin = end * 0
        if HAS_START:
            begin = tl.maximum(tl.load(start_ptr + group).to(tl.int64), 0)
        block = begin // BLOCK
        while block * BLOCK < shared:
            at = block * BLOCK
            a = load_block(token_ids_ptr, left_base, at, end, 0, BLOCK)
            b = load_block(token_ids_ptr, right_base, at, end, 0, BLOCK)
            offs = at + tl.arange(0, BLOCK)
            # Past the end both hold 0 and agree. The minimum ends the loop, and is the answer.
            shared = tl.minimum(shared, tl.min(tl.where((a != b) & (offs >= begin), offs, end), axis=0))
            if COUNT:
                tl.atomic_add(counts_ptr, 2 * tl.minimum(end - at, BLOCK))
            block += 1
        # Rows of a group ascend with their rank; the rank of this one is the number of smaller ones before it.
        low = first
        high = first + right_rank
        while low < high:
            middle = (low + high) // 2
            is_before = tl.load(rows_by_group_ptr + middle) < left
            low = tl.where(is_before, middle + 1, low)
            high = tl.where(is_before, high, middle)
        tl.store(lengths_ptr + right * max_group + (low - first), shared.to(tl.int32))
    tl.store(lengths_ptr + pair, shared.to(tl.int32))


@triton.jit(do_not_specialize=["num_rows"])
def _represent_kernel(
    parents_ptr,
    tied_to_ptr,
    shared_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    group_of_row_ptr,
    start_ptr,
    num_rows,
    HAS_START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_table = row < num_rows
    group = tl.load(group_of_row_ptr + row, mask=in_table, other=0)
    first = tl.load(rows_by_group_ptr + tl.load(group_starts_ptr + group), mask=in_table, other=0)
    # All (BLOCK,) rows; parents, tied_to, shared: (N,) int32.
    start = tl.zeros([BLOCK], tl.int32)
    if HAS_START:
        start = tl.minimum(tl.maximum(tl.load(start_ptr + group), 0), FAR - 1).to(tl.int32)
    tl.store(parents_ptr + row, first.to(tl.int32), mask=in_table)
    tl.store(tied_to_ptr + row, tl.where(row == first, -1, start), mask=in_table)
    tl.store(shared_ptr + row, FAR, mask=in_table)


@triton.jit(do_not_specialize=["stride_tokens_row"])
def _first_mismatch_kernel(
    shared_ptr,
    counts_ptr,
    parents_ptr,
    tied_to_ptr,
    token_ids_ptr,
    row_starts_ptr,
    row_lengths_ptr,
    group_of_row_ptr,
    limit_ptr,
    stride_tokens_row,
    HAS_LIMIT: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # parents, tied_to, shared: (N,); a settled row, whose tied_to is -1, costs this one load.
    tied_to = tl.load(tied_to_ptr + row).to(tl.int64)
    if tied_to < 0:
        return
    parent = tl.load(parents_ptr + row).to(tl.int64)
    end = _end(row, parent, row_lengths_ptr, limit_ptr, tl.load(group_of_row_ptr + row), HAS_LIMIT)
    base = row * stride_tokens_row + tl.load(row_starts_ptr + row)
    parent_base = parent * stride_tokens_row + tl.load(row_starts_ptr + parent)
    if COUNT:
        if tl.program_id(1) == 0:
            tl.atomic_add(counts_ptr + 1, 1)
    # Where load_block may find whole words.
    at = tied_to // 16 * 16 + tl.program_id(1).to(tl.int64) * BLOCK
    step = tl.num_programs(1).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    # What other programs found ends the search here; to see it late costs time, not truth. A load would be one of every
    # thread for itself, and warps that see different numbers part; an atomic is done once and handed to all threads.
    end = tl.minimum(end, tl.atomic_min(shared_ptr + row, FAR, sem="relaxed").to(tl.int64))
    while at < end:
        a = load_block(token_ids_ptr, base, at, end, 0, BLOCK)
        b = load_block(token_ids_ptr, parent_base, at, end, 0, BLOCK)
        # Past the end both hold 0 and agree.
        first = tl.min(tl.where((a != b) & (offs >= (tied_to - at).to(tl.int32)), offs, BLOCK), axis=0)
        if COUNT:
            tl.atomic_add(counts_ptr, 2 * tl.minimum(end - at, BLOCK))
        found = tl.where(first < BLOCK, at + first, FAR).to(tl.int32)
        found = tl.minimum(found, tl.atomic_min(shared_ptr + row, found, sem="relaxed"))
        end = tl.minimum(end, found.to(tl.int64))
        at += step


@triton.jit
def _compare_with_parents(
    shared_ptr,
    parents_ptr,
    tied_to_ptr,
    counts_ptr,
    token_ids_ptr,
    row_starts_ptr,
    row_lengths_ptr,
    rows_ptr,
    size,
    limit,
    stride_tokens_row,
    COUNT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Store what each tied row of a group shares with its representative."""
    for tile in range(0, tl.cdiv(size, BLOCK_ROWS)):
        # rank, row, at, parent, end, found: (BLOCK_ROWS,).
        rank = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row = tl.load(rows_ptr + rank, mask=rank < size, other=0)
        at = tl.load(tied_to_ptr + row, mask=rank < size, other=-1).to(tl.int64)
        is_tied = at >= 0
        if tl.max(is_tied.to(tl.int32), axis=0) > 0:
            parent = tl.load(parents_ptr + row, mask=is_tied, other=0).to(tl.int64)
            end = tl.minimum(
                tl.load(row_lengths_ptr + row, mask=is_tied, other=0),
                tl.load(row_lengths_ptr + parent, mask=is_tied, other=0),
            )
            end = tl.minimum(end, limit)
            base = row * stride_tokens_row + tl.load(row_starts_ptr + row, mask=is_tied, other=0)
            parent_base = parent * stride_tokens_row + tl.load(row_starts_ptr + parent, mask=is_tied, other=0)
            found = tl.minimum(at, end)
            is_going = is_tied & (at < end)
            if COUNT:
                tl.atomic_add(counts_ptr + 1, tl.sum(is_tied.to(tl.int64), axis=0))
            while tl.max(is_going.to(tl.int32), axis=0) > 0:
                # offs, a, b: (BLOCK_ROWS, BLOCK_TOKENS). Rows go on from places of their own, so no load is aligned.
                offs = found[:, None] + tl.arange(0, BLOCK_TOKENS)[None, :]
                is_read = is_going[:, None] & (offs < end[:, None])
                a = tl.load(token_ids_ptr + base[:, None] + offs, mask=is_read, other=0)
                b = tl.load(token_ids_ptr + parent_base[:, None] + offs, mask=is_read, other=0)
                if COUNT:
                    tl.atomic_add(counts_ptr, 2 * tl.sum(tl.sum(is_read.to(tl.int64), axis=1), axis=0))
                next_at = tl.minimum(found + BLOCK_TOKENS, end)
                # Where the whole block agrees, its end.
                found_now = tl.min(tl.where(a != b, offs, next_at[:, None]), axis=1)
                is_over = (found_now < next_at) | (next_at == end)
                found = tl.where(is_going, found_now, found)
                is_going = is_going & (is_over == 0)
            tl.store(shared_ptr + row, found.to(tl.int32), mask=is_tied)


@triton.jit
def _load_next_ids(
    next_ids_ptr,
    shared_ptr,
    parents_ptr,
    tied_to_ptr,
    counts_ptr,
    token_ids_ptr,
    row_starts_ptr,
    row_lengths_ptr,
    rows_ptr,
    size,
    limit,
    group_start,
    stride_tokens_row,
    COUNT: tl.constexpr,
    BLOCK_TIES: tl.constexpr,
):
    """Prepare the tie search: store each open row's next token, and settle the rows that end."""
    for tile in range(0, tl.cdiv(size, BLOCK_TIES)):
        # All (BLOCK_TIES,) rows of the group.
        rank = tile * BLOCK_TIES + tl.arange(0, BLOCK_TIES)
        row = tl.load(rows_ptr + rank, mask=rank < size, other=0)
        is_tied = tl.load(tied_to_ptr + row, mask=rank < size, other=-1) >= 0
        parent = tl.load(parents_ptr + row, mask=is_tied, other=0).to(tl.int64)
        length = tl.minimum(tl.load(row_lengths_ptr + row, mask=is_tied, other=0), limit)
        shared = tl.load(shared_ptr + row, mask=is_tied, other=0).to(tl.int64)
        shared = tl.minimum(shared, tl.minimum(length, tl.load(row_lengths_ptr + parent, mask=is_tied, other=0)))
        is_open = is_tied & (shared < length)
        # A parent may end before the start, where all tokens count as equal.
        is_read = is_open & (shared >= group_start)
        base = row * stride_tokens_row + tl.load(row_starts_ptr + row, mask=is_tied, other=0)
        next_id = tl.load(token_ids_ptr + base + shared, mask=is_read, other=0)
        if COUNT:
            tl.atomic_add(counts_ptr, tl.sum(is_read.to(tl.int64), axis=0))
        tl.debug_barrier()  # threads may share rows: none writes before all have read
        tl.store(next_ids_ptr + row, next_id.to(tl.int64), mask=is_tied)
        tl.store(shared_ptr + row, shared.to(tl.int32), mask=is_tied)
        tl.store(tied_to_ptr + row, -1, mask=is_tied & (is_open == 0))


@triton.jit
def _represent_ties(
    parents_ptr,
    tied_to_ptr,
    shared_ptr,
    next_ids_ptr,
    rows_ptr,
    size,
    group_start,
    BLOCK_TIES: tl.constexpr,
):
    """Let the smallest row of each tie represent the others, settle all other rows, and return how many tie."""
    num_ties = size * 0
    # From the last rows to the first: what is written of a row no later search reads.
    for tile_from_end in range(0, tl.cdiv(size, BLOCK_TIES)):
        tile = tl.cdiv(size, BLOCK_TIES) - 1 - tile_from_end
        rank = tile * BLOCK_TIES + tl.arange(0, BLOCK_TIES)
        row = tl.load(rows_ptr + rank, mask=rank < size, other=0)
        is_tied = tl.load(tied_to_ptr + row, mask=rank < size, other=-1) >= 0
        if tl.max(is_tied.to(tl.int32), axis=0) > 0:
            parent = tl.load(parents_ptr + row, mask=is_tied, other=-1)
            shared = tl.load(shared_ptr + row, mask=is_tied, other=-1)
            next_id = tl.load(next_ids_ptr + row, mask=is_tied, other=0)
            # smallest: (BLOCK_TIES,), the least of the rows before that ties with each, FAR where none does.
            smallest = tl.full([BLOCK_TIES], FAR, tl.int32)
            for other_tile in range(0, tile + 1):
                other_rank = other_tile * BLOCK_TIES + tl.arange(0, BLOCK_TIES)
                other = tl.load(rows_ptr + other_rank, mask=other_rank < size, other=0)
                other_tied = tl.load(tied_to_ptr + other, mask=other_rank < size, other=-1) >= 0
                if tl.max(other_tied.to(tl.int32), axis=0) > 0:
                    other_parent = tl.load(parents_ptr + other, mask=other_tied, other=-2)
                    other_shared = tl.load(shared_ptr + other, mask=other_tied, other=-2)
                    other_id = tl.load(next_ids_ptr + other, mask=other_tied, other=0)
                    # (BLOCK_TIES, BLOCK_TIES). Rows that are settled hold -1 and -2, which are never equal.
                    ties = (parent[:, None] == other_parent[None, :]) & (shared[:, None] == other_shared[None, :])
                    ties = ties & (next_id[:, None] == other_id[None, :])
                    tile_least = tl.min(tl.where(ties, other.to(tl.int32)[None, :], FAR), axis=1)
                    smallest = tl.minimum(smallest, tile_least)
            tl.debug_barrier()
            ties = is_tied & (smallest < row)
            # They agree on the token where they left, so up to one after it.
            tied_to = tl.maximum(shared.to(tl.int64) + 1, group_start).to(tl.int32)
            tl.store(tied_to_ptr + row, tl.where(ties, tied_to, -1), mask=is_tied)
            tl.store(parents_ptr + row, smallest, mask=ties)
            tl.store(shared_ptr + row, FAR, mask=ties)
            num_ties += tl.sum(ties.to(tl.int64), axis=0)
    return num_ties


@triton.jit(do_not_specialize=["stride_tokens_row"])
def _refine_ties_kernel(
    parents_ptr,
    tied_to_ptr,
    shared_ptr,
    next_ids_ptr,
    counts_ptr,
    token_ids_ptr,
    row_starts_ptr,
    row_lengths_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    limit_ptr,
    start_ptr,
    stride_tokens_row,
    COMPARE_FIRST: tl.constexpr,
    TO_THE_END: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_START: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TIES: tl.constexpr,
):
    """Find and represent ties; with TO_THE_END compare what ties and find ties again until there are none.

    ``tied_to`` of a row is up to where it agrees with its parent for certain, or -1 once the row is settled; ``shared``
    is what it shares with it, once compared.

    The rounds of one group are a chain, and a chain of G rounds exists: each representative the first to leave all
    others. Then a round costs one step of loads for BLOCK_ROWS rows at a time and one comparison of BLOCK_TIES rows
    with as many: about G * G / (2 * BLOCK_ROWS) steps of the first and G ** 3 / (6 * BLOCK_TIES ** 2) of the second,
    one after another: 33 and 44 thousand for G = 1,024. Rows that leave one line, a comb, take one round.
    """
    # One program for a group, so that barriers keep its rounds apart; rows_ptr: its rows, ascending.
    group = tl.program_id(0).to(tl.int64)
    first = tl.load(group_starts_ptr + group)
    size = tl.load(group_starts_ptr + group + 1) - first
    limit = tl.full([], FAR, tl.int64)
    if HAS_LIMIT:
        limit = tl.maximum(tl.load(limit_ptr + group).to(tl.int64), 0)
    group_start = tl.zeros([], tl.int64)
    if HAS_START:
        group_start = tl.minimum(tl.maximum(tl.load(start_ptr + group).to(tl.int64), 0), FAR - 1)
    rows_ptr = rows_by_group_ptr + first
    should_compare = COMPARE_FIRST
    goes_on = size > 1
    while goes_on:
        if COMPARE_FIRST or TO_THE_END:
            if should_compare:
                _compare_with_parents(
                    shared_ptr,
                    parents_ptr,
                    tied_to_ptr,
                    counts_ptr,
                    token_ids_ptr,
                    row_starts_ptr,
                    row_lengths_ptr,
                    rows_ptr,
                    size,
                    limit,
                    stride_tokens_row,
                    COUNT,
                    BLOCK_ROWS,
                    BLOCK_TOKENS,
                )
        should_compare = True
        tl.debug_barrier()
        _load_next_ids(
            next_ids_ptr,
            shared_ptr,
            parents_ptr,
            tied_to_ptr,
            counts_ptr,
            token_ids_ptr,
            row_starts_ptr,
            row_lengths_ptr,
            rows_ptr,
            size,
            limit,
            group_start,
            stride_tokens_row,
            COUNT,
            BLOCK_TIES,
        )
        tl.debug_barrier()
        num_ties = _represent_ties(
            parents_ptr, tied_to_ptr, shared_ptr, next_ids_ptr, rows_ptr, size, group_start, BLOCK_TIES
        )
        tl.debug_barrier()
        goes_on = num_ties > 0
        if not TO_THE_END:
            # Never, in a form that keeps the type of the condition.
            goes_on = num_ties < 0


@triton.jit(do_not_specialize=["max_group"])
def _prefix_table_kernel(
    lengths_ptr,
    parents_ptr,
    shared_ptr,
    row_lengths_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    group_of_row_ptr,
    limit_ptr,
    max_group,
    HAS_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.load(group_of_row_ptr + row)
    first = tl.load(group_starts_ptr + group)
    size = tl.load(group_starts_ptr + group + 1) - first
    own_length = _end(row, row, row_lengths_ptr, limit_ptr, group, HAS_LIMIT)
    for start in range(0, max_group, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        is_member = rank < size
        other = tl.load(rows_by_group_ptr + first + rank, mask=is_member, other=row)
        # A parent is a smaller row: of two different rows the larger one takes the next step on the way.
        # here, there, least: (BLOCK,), one way for each entry of the line.
        here = tl.zeros([BLOCK], tl.int64) + row
        there = other
        least = tl.zeros([BLOCK], tl.int32) + own_length.to(tl.int32)
        while tl.max((here != there).to(tl.int32), axis=0) > 0:
            larger = tl.maximum(here, there)
            there = tl.minimum(here, there)
            is_apart = larger != there
            least = tl.minimum(least, tl.load(shared_ptr + larger, mask=is_apart, other=FAR))
            here = tl.load(parents_ptr + larger, mask=is_apart, other=0).to(tl.int64)
            here = tl.where(is_apart, here, there)
        tl.store(lengths_ptr + row * max_group + rank, tl.where(is_member, least, 0), mask=rank < max_group)


def refine(
    token_ids: Tensor, layout: "Layout", limit: Tensor | None = None, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row its representative, what the two share, and the token at which it leaves, (N,) each.

    The first row of a group has none: its parent is the row itself, and the others say nothing. A row that ends where
    it leaves has no such token.
    """
    num_rows = layout.row_starts.shape[0]
    has = {"HAS_LIMIT": limit is not None, "COUNT": counts is not None}
    stride = row_stride(token_ids)
    parents, tied_to, shared = torch.empty((3, num_rows), dtype=torch.int32, device=token_ids.device)
    next_ids = torch.empty(num_rows, dtype=torch.int64, device=token_ids.device)
    _represent_kernel[(triton.cdiv(num_rows, BLOCK_RANKS),)](
        parents,
        tied_to,
        shared,
        *layout.groups,
        start,
        num_rows,
        HAS_START=start is not None,
        BLOCK=BLOCK_RANKS,
        enable_fp_fusion=FP_FUSION,
    )
    # No row is longer than the tokens are wide, or, packed, than they are many.
    splits = num_splits(token_ids.shape[-1], BLOCK, num_rows)
    for turn in range(max(ROUNDS, 1)):
        if ROUNDS:
            _first_mismatch_kernel[(num_rows, splits)](
                shared,
                counts,
                parents,
                tied_to,
                token_ids,
                *layout.rows,
                layout.group_of_row,
                limit,
                stride,
                BLOCK=BLOCK,
                **has,
                enable_fp_fusion=FP_FUSION,
            )
        _refine_ties_kernel[(layout.group_starts.shape[0] - 1,)](
            parents,
            tied_to,
            shared,
            next_ids,
            counts,
            token_ids,
            *layout.rows,
            layout.rows_by_group,
            layout.group_starts,
            limit,
            start,
            stride,
            COMPARE_FIRST=not ROUNDS,
            TO_THE_END=turn >= ROUNDS - 1,
            HAS_START=start is not None,
            BLOCK_TOKENS=BLOCK_TOKENS,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_TIES=BLOCK_TIES,
            num_warps=8,
            **has,
            enable_fp_fusion=FP_FUSION,
        )
    return parents, shared, next_ids


def common_prefix_lengths(token_ids: Tensor, limit: Tensor | None, start: Tensor | None, layout: "Layout") -> Tensor:
    """(N, max_group) int32: row i against the j-th row of its group.

    At most ``limit[group]`` tokens count, and the first ``start[group]`` are taken to be equal.
    """
    num_rows, max_group = layout.row_starts.shape[0], layout.max_group
    lengths = torch.empty((num_rows, max_group), dtype=torch.int32, device=token_ids.device)
    if not lengths.numel():
        return lengths
    has = {"HAS_LIMIT": limit is not None, "COUNT": counts is not None}
    stride = row_stride(token_ids)
    if token_ids.numel() * max_group <= FEW_TOKENS:
        _compare_pairs_kernel[(num_rows * max_group,)](
            lengths,
            counts,
            token_ids,
            *layout.rows,
            *layout.groups,
            limit,
            start,
            stride,
            max_group,
            HAS_START=start is not None,
            BLOCK=BLOCK_PAIRS,
            **has,
            enable_fp_fusion=FP_FUSION,
        )
        return lengths

    parents, shared, _ = refine(token_ids, layout, limit, start)
    _prefix_table_kernel[(num_rows,)](
        lengths,
        parents,
        shared,
        layout.row_lengths,
        *layout.groups,
        limit,
        max_group,
        HAS_LIMIT=limit is not None,
        BLOCK=BLOCK_RANKS,
        enable_fp_fusion=FP_FUSION,
    )
    return lengths
