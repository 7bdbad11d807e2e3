"""Longest common prefix of every pair of rows of a group: a program for each pair, which leaves at the first mismatch.

Two rows are read block by block until one differs. Reads are the tokens up to the mismatch, times the pairs; rows of a
group are read by many programs at about the same time, so most of it comes from the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._rows import load_block, row_stride

BLOCK = 512  # tokens compared at a time: most pairs part early


@triton.jit(do_not_specialize=["stride_tokens_row", "max_group"])
def _common_prefix_lengths_kernel(
    lengths_ptr,
    token_ids_ptr,
    row_starts_ptr,
    row_lengths_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    group_of_row_ptr,
    limit_ptr,
    stride_tokens_row,
    max_group,
    HAS_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    end = tl.minimum(tl.load(row_lengths_ptr + left), tl.load(row_lengths_ptr + right))
    if HAS_LIMIT:
        end = tl.minimum(end, tl.maximum(tl.load(limit_ptr + group).to(tl.int64), 0))

    shared = end
    if right != left:
        left_base = left * stride_tokens_row + tl.load(row_starts_ptr + left)
        right_base = right * stride_tokens_row + tl.load(row_starts_ptr + right)
        block = end * 0
        while block * BLOCK < shared:
            start = block * BLOCK
            a = load_block(token_ids_ptr, left_base, start, end, 0, BLOCK)
            b = load_block(token_ids_ptr, right_base, start, end, 0, BLOCK)
            offs = start + tl.arange(0, BLOCK)
            # Behind the end both hold 0 and agree. The minimum ends the loop, and is the answer.
            shared = tl.minimum(shared, tl.min(tl.where(a != b, offs, end), axis=0))
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


def launch_common_prefix_lengths(
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
    lengths = torch.empty((num_rows, max_group), dtype=torch.int32, device=token_ids.device)
    if lengths.numel():
        _common_prefix_lengths_kernel[(num_rows * max_group,)](
            lengths,
            token_ids,
            row_starts,
            row_lengths,
            rows_by_group,
            group_starts,
            group_of_row,
            limit,
            row_stride(token_ids),
            max_group,
            HAS_LIMIT=limit is not None,
            BLOCK=BLOCK,
        )
    return lengths
