"""The prefix tree of the rows of a prompt, in two steps after the refinement of kernels/prefix_lengths.py.

    order_rows   a program for each row: how many rows of its group stand before it in depth-first order?
    tree_nodes   a program for each prompt and share of its columns walks down the rows in that order and keeps, for
                 each column, the node that the last row is at: what a row shares with the one before stays, and what
                 comes after begins anew, which ends the subtrees of what was there

Every token is read once and its node written once, and no number is written by two programs. The walk is G steps long,
whatever the rows share.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION, num_splits, row_stride
from leafkernels.kernels.prefix_lengths import refine

if TYPE_CHECKING:
    from leafkernels.rows.layout import Layout

BLOCK_RANKS = 128  # rows that a row is compared with at a time
BLOCK = 256  # columns of a walk


@triton.jit
def _order_rows_kernel(
    order_ptr,
    shared_in_order_ptr,
    parents_ptr,
    shared_ptr,
    next_ids_ptr,
    row_lengths_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    group_of_row_ptr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.load(group_of_row_ptr + row)
    first = tl.load(group_starts_ptr + group)
    size = tl.load(group_starts_ptr + group + 1) - first
    rank = size * 0
    for start in range(0, tl.cdiv(size, BLOCK)):
        # All (BLOCK,): a way from this row and one from each other to where they meet, over their representatives, and
        # the last row of each before that, -1 where the way has no step.
        offs = start * BLOCK + tl.arange(0, BLOCK)
        is_member = offs < size
        there = tl.load(rows_by_group_ptr + first + offs, mask=is_member, other=row)
        here = tl.zeros([BLOCK], tl.int64) + row
        last_here = tl.full([BLOCK], -1, tl.int64)
        last_there = tl.full([BLOCK], -1, tl.int64)
        while tl.max((here != there).to(tl.int32), axis=0) > 0:
            # A representative is a smaller row: the larger of the two takes the next step.
            steps_here = here > there
            steps_there = there > here
            last_here = tl.where(steps_here, here, last_here)
            last_there = tl.where(steps_there, there, last_there)
            up_here = tl.load(parents_ptr + here, mask=steps_here, other=0).to(tl.int64)
            up_there = tl.load(parents_ptr + there, mask=steps_there, other=0).to(tl.int64)
            here = tl.where(steps_here, up_here, here)
            there = tl.where(steps_there, up_there, there)
        # Both left one row: first goes who left it last, who ended there, who went on with the smaller token.
        has_both = (last_here >= 0) & (last_there >= 0)
        mine = tl.where(has_both, last_here, 0)
        theirs = tl.where(has_both, last_there, 0)
        my_shared = tl.load(shared_ptr + mine, mask=has_both, other=0)
        their_shared = tl.load(shared_ptr + theirs, mask=has_both, other=0)
        i_end = my_shared == tl.load(row_lengths_ptr + mine, mask=has_both, other=0)
        they_end = their_shared == tl.load(row_lengths_ptr + theirs, mask=has_both, other=0)
        my_id = tl.load(next_ids_ptr + mine, mask=has_both & (i_end == 0), other=0)
        their_id = tl.load(next_ids_ptr + theirs, mask=has_both & (they_end == 0), other=0)
        by_row = theirs < mine
        by_id = tl.where(i_end & they_end, by_row, their_id < my_id)
        by_end = tl.where(i_end == they_end, by_id, they_end)
        before = tl.where(their_shared == my_shared, by_end, their_shared > my_shared)
        # A row stands before all that it represents.
        before = tl.where(has_both, before, (last_here >= 0) & (last_there < 0))
        rank += tl.sum((before & is_member).to(tl.int64), axis=0)
    shared = tl.load(shared_ptr + row)
    is_first = tl.load(rows_by_group_ptr + first) == row
    # order, shared_in_order: (N,) int64.
    tl.store(order_ptr + first + rank, row)
    tl.store(shared_in_order_ptr + first + rank, tl.where(is_first, 0, shared).to(tl.int64))


@triton.jit(do_not_specialize=["stride_tokens_row", "stride_nodes_row", "max_length", "num_nodes"])
def _tree_nodes_kernel(
    ids_ptr,
    positions_ptr,
    parents_ptr,
    ends_ptr,
    counts_ptr,
    nodes_ptr,
    token_ids_ptr,
    order_ptr,
    shared_ptr,
    firsts_ptr,
    row_starts_ptr,
    row_lengths_ptr,
    group_starts_ptr,
    stride_tokens_row,
    stride_nodes_row,
    max_length,
    num_nodes,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    begin = tl.load(group_starts_ptr + group)
    end = tl.load(group_starts_ptr + group + 1)
    at = tl.program_id(1).to(tl.int64) * BLOCK
    while at < max_length:
        # All (BLOCK,) int64: the column, the node that the walk is at there and one column before, and the place in
        # the order of the row that began it.
        column = at + tl.arange(0, BLOCK)
        node = tl.zeros([BLOCK], tl.int64)
        left = tl.full([BLOCK], -1, tl.int64)
        began_at = tl.zeros([BLOCK], tl.int64)
        last_length = begin * 0
        for place in range(begin, end):
            row = tl.load(order_ptr + place)
            shared = tl.load(shared_ptr + place)
            first = tl.load(firsts_ptr + place)
            length = tl.load(row_lengths_ptr + row)
            is_new = column >= shared
            is_over = is_new & (column < last_length) & (node < num_nodes)
            tl.store(ends_ptr + node, tl.zeros([BLOCK], tl.int64) + first, mask=is_over)
            tl.store(counts_ptr + node, place - began_at, mask=is_over)
            node = tl.where(is_new, first + column - shared, node)
            left = tl.where(column - 1 >= shared, first + column - 1 - shared, left)
            began_at = tl.where(is_new, place, began_at)
            is_token = column < length
            row_start = tl.load(row_starts_ptr + row)
            tl.store(nodes_ptr + row * stride_nodes_row + row_start + column, node, mask=is_token)
            is_own = is_token & is_new & (node < num_nodes)
            token = tl.load(token_ids_ptr + row * stride_tokens_row + row_start + column, mask=is_own, other=0)
            tl.store(ids_ptr + node, token, mask=is_own)
            tl.store(positions_ptr + node, column, mask=is_own)
            tl.store(parents_ptr + node, left, mask=is_own)
            last_length = length
        is_over = (column < last_length) & (node < num_nodes)
        tl.store(ends_ptr + node, tl.zeros([BLOCK], tl.int64) + tl.load(firsts_ptr + end), mask=is_over)
        tl.store(counts_ptr + node, end - began_at, mask=is_over)
        at += tl.num_programs(1).to(tl.int64) * BLOCK


def order_rows(token_ids: Tensor, layout: "Layout") -> tuple[Tensor, Tensor]:
    """See ``leafkernels.eager.prefix_tree.order_rows``."""
    order, shared_in_order = torch.empty_like(layout.row_starts), torch.empty_like(layout.row_starts)
    if order.shape[0]:
        parents, shared, next_ids = refine(token_ids, layout)
        _order_rows_kernel[(order.shape[0],)](
            order,
            shared_in_order,
            parents,
            shared,
            next_ids,
            layout.row_lengths,
            *layout.groups,
            BLOCK=BLOCK_RANKS,
            enable_fp_fusion=FP_FUSION,
        )
    return order, shared_in_order


def tree_nodes(
    token_ids: Tensor, order: Tensor, shared: Tensor, firsts: Tensor, layout: "Layout", num_nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``leafkernels.eager.prefix_tree.tree_nodes``."""
    device, num_groups, max_length = token_ids.device, layout.group_starts.shape[0] - 1, layout.max_length
    ids = token_ids.new_empty(num_nodes)
    positions, parents, ends, counts = (torch.empty(num_nodes, dtype=torch.int64, device=device) for _ in range(4))
    nodes = torch.full(token_ids.shape, -1, dtype=torch.int64, device=device)
    if order.shape[0] and max_length and num_groups:
        _tree_nodes_kernel[(num_groups, num_splits(max_length, BLOCK, num_groups))](
            ids,
            positions,
            parents,
            ends,
            counts,
            nodes,
            token_ids,
            order,
            shared,
            firsts,
            *layout.rows,
            layout.group_starts,
            row_stride(token_ids),
            row_stride(nodes),
            max_length,
            num_nodes,
            BLOCK=BLOCK,
            enable_fp_fusion=FP_FUSION,
        )
    return ids, positions, parents, ends, counts, nodes
