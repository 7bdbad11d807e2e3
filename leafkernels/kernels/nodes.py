"""Nodes of the prefix tree from a table of prefix lengths: a program for each row looks for the smallest row of its
group that shares the prefix at each boundary, and names the node by it.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION
from leafkernels.kernels.prefix_lengths import common_prefix_lengths

if TYPE_CHECKING:
    from leafkernels.rows.layout import Layout

BLOCK = 32  # rows of a group at a time
FAR = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["max_group"])
def _prefix_nodes_kernel(
    nodes_ptr,
    prefix_lengths_ptr,
    boundaries_ptr,
    row_lengths_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    group_of_row_ptr,
    max_group,
    NUM_BOUNDARIES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.load(group_of_row_ptr + row)
    first = tl.load(group_starts_ptr + group)
    size = tl.load(group_starts_ptr + group + 1) - first
    length = tl.load(row_lengths_ptr + row)
    # offs_b, at, smallest, node: (BLOCK_B,), one for each boundary. boundaries: (P, B); nodes: (N, B).
    offs_b = tl.arange(0, BLOCK_B)
    in_table = offs_b < NUM_BOUNDARIES
    at = tl.load(boundaries_ptr + group * NUM_BOUNDARIES + offs_b, mask=in_table, other=-1)

    # Rows ascend with their rank, so the smallest rank that shares the prefix is the smallest row.
    smallest = tl.full([BLOCK_B], FAR, tl.int32)
    for block in range(0, tl.cdiv(size, BLOCK)):
        # rank, member, shared: (BLOCK,), rows of the group; ranks: (BLOCK, BLOCK_B). prefix_lengths: (N, max_group).
        rank = block * BLOCK + tl.arange(0, BLOCK)
        member = tl.load(rows_by_group_ptr + first + rank, mask=rank < size, other=0)
        other_length = tl.load(row_lengths_ptr + member, mask=rank < size, other=0)
        shared = tl.load(prefix_lengths_ptr + row * max_group + rank, mask=rank < size, other=0)
        # Identical rows go together beyond every boundary; rows without a token, with none.
        shared = tl.where((shared == length) & (other_length == length), FAR, shared)
        shared = tl.where((other_length > 0) & (length > 0), shared, -1)
        ranks = tl.where(shared[:, None] >= at[None, :], rank[:, None].to(tl.int32), FAR)
        smallest = tl.minimum(smallest, tl.min(ranks, axis=0))
    is_shared = (at >= 0) & (smallest < FAR)
    node = tl.load(rows_by_group_ptr + first + smallest, mask=is_shared, other=0)
    tl.store(nodes_ptr + row * NUM_BOUNDARIES + offs_b, tl.where(is_shared, node, row), mask=in_table)


def nodes_of_prefix_lengths(prefix_lengths: Tensor, boundaries: Tensor, layout: "Layout") -> Tensor:
    """(N, B) int64: see ``leafkernels.eager.nodes.nodes_of_prefix_lengths``."""
    num_rows, num_boundaries = prefix_lengths.shape[0], boundaries.shape[1]
    nodes = torch.empty((num_rows, num_boundaries), dtype=torch.int64, device=prefix_lengths.device)
    if nodes.numel():
        _prefix_nodes_kernel[(num_rows,)](
            nodes,
            prefix_lengths.contiguous(),
            boundaries.contiguous(),
            layout.row_lengths,
            *layout.groups,
            prefix_lengths.shape[1],
            NUM_BOUNDARIES=num_boundaries,
            BLOCK_B=triton.next_power_of_2(num_boundaries),
            BLOCK=BLOCK,
            num_warps=1,
            enable_fp_fusion=FP_FUSION,
        )
    return nodes


def prefix_nodes(token_ids: Tensor, boundaries: Tensor, layout: "Layout") -> Tensor:
    """(N, B) int64: see ``leafkernels.eager.nodes.prefix_nodes``."""
    if boundaries.shape[1] == 0:
        return layout.row_starts.new_empty((layout.row_starts.shape[0], 0))
    # No prefix matters after the last boundary.
    table = common_prefix_lengths(token_ids, boundaries.amax(1), None, layout)
    return nodes_of_prefix_lengths(table, boundaries, layout)
