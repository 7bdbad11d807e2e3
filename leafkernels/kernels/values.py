"""Span values: a program for each row averages the rewards of the rows of its nodes and credits its spans; a second
kernel z-scores them over the group (or the call).

    A_k = [w_g (V_k - V_0) + w_l (V_k - V_{k-1})] * n_k ** -power,  the tail: w_g (r - V_0) + w_l (r - V_R)

Sums are float64, centred on the least reward of the group, and taken in one fixed order: rows of a node get the same
bits.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION

if TYPE_CHECKING:
    from leafkernels.credit.options import CreditOptions
    from leafkernels.rows.layout import Layout

BLOCK = 32  # rows of a group at a time
# As in leafkernels._core.precision.
ROUNDING = tl.constexpr(2.0**-21)
EXACT = tl.constexpr(2.0**24)


@triton.jit
def _span_values_kernel(
    raw_ptr,
    span_ends_ptr,
    sizes_ptr,
    node_values_ptr,
    reward_std_ptr,
    rewards_ptr,
    nodes_ptr,
    boundaries_ptr,
    row_lengths_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    group_of_row_ptr,
    NUM_SLOTS: tl.constexpr,
    USE_GLOBAL: tl.constexpr,
    USE_LOCAL: tl.constexpr,
    MULTIPLICITY_POWER: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.load(group_of_row_ptr + row)
    first = tl.load(group_starts_ptr + group)
    size = tl.load(group_starts_ptr + group + 1) - first
    length = tl.load(row_lengths_ptr + row).to(tl.int32)

    # slot, at, node, parent, sizes, sums: (BLOCK_S,). boundaries: (P, S - 1); nodes: (N, S - 1); results: (N, S).
    # Slot s ends at the node of boundary s. Its parent is the node of the boundary before; the first one's, the group.
    slot = tl.arange(0, BLOCK_S)
    has_node = slot < NUM_SLOTS - 1
    has_parent = (slot > 0) & (slot < NUM_SLOTS)
    at = tl.load(boundaries_ptr + group * (NUM_SLOTS - 1) + slot, mask=has_node, other=-1)
    node = tl.load(nodes_ptr + row * (NUM_SLOTS - 1) + slot, mask=has_node, other=-1)
    parent = tl.load(nodes_ptr + row * (NUM_SLOTS - 1) + slot - 1, mask=has_parent, other=-1)

    # Counted from the least reward, equal rewards are exactly 0, and so are all sums over them.
    least = tl.full([BLOCK], float("inf"), tl.float64)
    most = tl.full([BLOCK], float("-inf"), tl.float64)
    for block in range(0, tl.cdiv(size, BLOCK)):
        rank = block * BLOCK + tl.arange(0, BLOCK)
        member = tl.load(rows_by_group_ptr + first + rank, mask=rank < size, other=0)
        reward = tl.load(rewards_ptr + member, mask=rank < size, other=float("nan")).to(tl.float64)
        least = tl.minimum(least, tl.where(reward == reward, reward, float("inf")))
        most = tl.maximum(most, tl.where(reward == reward, reward, float("-inf")))
    lowest = tl.min(least, axis=0)
    highest = tl.max(most, axis=0)
    # Rewards that differ by rounding alone count as the least; infinite ones do not, nor exact whole numbers.
    largest = tl.maximum(tl.abs(lowest), tl.abs(highest))
    is_flat = highest - lowest <= ROUNDING * largest
    are_whole = (lowest == tl.floor(lowest)) & (highest == tl.floor(highest))
    is_exact = are_whole & ((largest <= EXACT) | ((highest - lowest) * EXACT < largest))
    is_flat = is_flat & (is_exact == 0)
    highest = tl.where(is_flat & (highest - lowest < float("inf")), lowest, highest)

    sizes = tl.zeros([BLOCK_S], tl.float64)
    sums = tl.zeros([BLOCK_S], tl.float64)
    parent_sizes = tl.zeros([BLOCK_S], tl.float64)
    parent_sums = tl.zeros([BLOCK_S], tl.float64)
    for block in range(0, tl.cdiv(size, BLOCK)):
        rank = block * BLOCK + tl.arange(0, BLOCK)
        member = tl.load(rows_by_group_ptr + first + rank, mask=rank < size, other=0)
        reward = tl.load(rewards_ptr + member, mask=rank < size, other=float("nan")).to(tl.float64)
        is_in = (reward == reward)[:, None]
        centred = tl.where(reward == reward, tl.minimum(reward, highest) - lowest, 0.0)[:, None]
        # (BLOCK, BLOCK_S), rows of the group by slots. -2 equals no name, nor the -1 of slots without a node.
        offs = member[:, None] * (NUM_SLOTS - 1) + slot[None, :]
        other = tl.load(nodes_ptr + offs, mask=is_in & has_node[None, :], other=-2)
        same = (other == node[None, :]).to(tl.float64)
        sizes += tl.sum(same, axis=0)
        sums += tl.sum(same * centred, axis=0)
        # The slot before, whose node is the parent; the first slot's parent is the group, all rows with a reward.
        other = tl.load(nodes_ptr + offs - 1, mask=is_in & has_parent[None, :], other=-2)
        same = (((slot == 0)[None, :] & is_in) | (other == parent[None, :])).to(tl.float64)
        parent_sizes += tl.sum(same, axis=0)
        parent_sums += tl.sum(same * centred, axis=0)

    group_size = tl.sum(tl.where(slot == 0, parent_sizes, 0.0), axis=0)
    group_value = tl.sum(tl.where(slot == 0, parent_sums, 0.0), axis=0) / tl.maximum(group_size, 1.0)
    values = sums / tl.maximum(sizes, 1.0)
    parent_values = parent_sums / tl.maximum(parent_sizes, 1.0)

    spread = tl.zeros([BLOCK], tl.float64)
    for block in range(0, tl.cdiv(size, BLOCK)):
        rank = block * BLOCK + tl.arange(0, BLOCK)
        member = tl.load(rows_by_group_ptr + first + rank, mask=rank < size, other=0)
        reward = tl.load(rewards_ptr + member, mask=rank < size, other=float("nan")).to(tl.float64)
        distance = tl.where(reward == reward, tl.minimum(reward, highest) - lowest - group_value, 0.0)
        spread += distance * distance
    reward_std = tl.sqrt(tl.sum(spread, axis=0) / tl.maximum(group_size - 1.0, 1.0))

    # Node sizes fall from slot to slot, so the retained ones come first and the tail follows them.
    is_retained = sizes >= 2.0
    num_retained = tl.sum(is_retained.to(tl.int32), axis=0)
    last = tl.max(tl.where(is_retained, at, 0), axis=0)
    is_tail = (slot == num_retained) & (length > last)
    own_reward = tl.minimum(tl.load(rewards_ptr + row).to(tl.float64), highest) - lowest
    own = tl.where(is_tail, own_reward, values)

    # n ** -power; n is 0 in slots without a node, and log 0 must not come in.
    weight = tl.exp(tl.log(tl.maximum(sizes, 1.0)) * (-MULTIPLICITY_POWER))
    weight = tl.where(is_tail, 1.0, weight)
    raw = tl.zeros([BLOCK_S], tl.float64)
    if USE_GLOBAL:
        term = own - group_value
        if LEAVE_ONE_OUT:
            term = term * (group_size / tl.maximum(group_size - 1.0, 1.0))
        raw += term
    if USE_LOCAL:
        term = own - parent_values
        if LEAVE_ONE_OUT:
            term = term * (parent_sizes / tl.maximum(parent_sizes - 1.0, 1.0))
        raw += term
    raw = tl.where(is_retained | is_tail, raw * weight, 0.0)

    in_row = slot < NUM_SLOTS
    offs = row * NUM_SLOTS + slot
    tl.store(raw_ptr + offs, raw, mask=in_row)
    tl.store(span_ends_ptr + offs, tl.where(is_retained, at, tl.maximum(length, last)), mask=in_row)
    tl.store(sizes_ptr + offs, parent_sizes.to(tl.int32), mask=in_row)
    tl.store(node_values_ptr + offs, parent_values + lowest, mask=in_row)
    tl.store(reward_std_ptr + row, reward_std)


@triton.jit
def _slots(
    rows_by_group_ptr,
    span_ends_ptr,
    start,
    last,
    NUM_SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the slots of rows [start, start + BLOCK) by group lie, which are real, which hold a span, and the rows."""
    # rank: (BLOCK,); slot: (1, BLOCK_S); row: (BLOCK, 1); offs, in_table, end: (BLOCK, BLOCK_S).
    rank = start + tl.arange(0, BLOCK)
    slot = tl.arange(0, BLOCK_S)[None, :]
    row = tl.load(rows_by_group_ptr + rank, mask=rank < last, other=0)[:, None]
    in_table = (rank < last)[:, None] & (slot < NUM_SLOTS)
    offs = row * NUM_SLOTS + slot
    end = tl.load(span_ends_ptr + offs, mask=in_table, other=0)
    begin = tl.load(span_ends_ptr + offs - 1, mask=in_table & (slot > 0), other=0)
    return offs, in_table, end > begin, row


@triton.jit(do_not_specialize=["num_rows"])
def _normalize_spans_kernel(
    values_ptr,
    raw_ptr,
    span_ends_ptr,
    reward_std_ptr,
    rows_by_group_ptr,
    group_starts_ptr,
    num_rows,
    WHOLE_CALL: tl.constexpr,
    BY_REWARD_STD: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = num_rows * 0
    last = num_rows
    if not WHOLE_CALL:
        group = tl.program_id(0).to(tl.int64)
        first = tl.load(group_starts_ptr + group)
        last = tl.load(group_starts_ptr + group + 1)

    shift = tl.sum(tl.zeros([BLOCK_S], tl.float64), axis=0)
    scale = shift
    if not BY_REWARD_STD:
        # Each entry of (BLOCK, BLOCK_S) sums its own slots, and all meet once at the end: one fixed order.
        number = tl.zeros([BLOCK, BLOCK_S], tl.float64)
        total = tl.zeros([BLOCK, BLOCK_S], tl.float64)
        for start in range(first, last, BLOCK):
            offs, in_table, is_span, _ = _slots(
                rows_by_group_ptr, span_ends_ptr, start, last, NUM_SLOTS, BLOCK_S, BLOCK
            )
            number += tl.where(is_span, 1.0, 0.0)
            total += tl.load(raw_ptr + offs, mask=in_table, other=0.0)
        count = tl.sum(tl.sum(number, axis=1), axis=0)
        shift = tl.sum(tl.sum(total, axis=1), axis=0) / tl.maximum(count, 1.0)
        spread = tl.zeros([BLOCK, BLOCK_S], tl.float64)
        for start in range(first, last, BLOCK):
            offs, in_table, is_span, _ = _slots(
                rows_by_group_ptr, span_ends_ptr, start, last, NUM_SLOTS, BLOCK_S, BLOCK
            )
            # A second pass, because the difference of two sums of squares cancels.
            distance = tl.load(raw_ptr + offs, mask=in_table, other=0.0) - shift
            spread += tl.where(is_span, distance * distance, 0.0)
        variance = tl.sum(tl.sum(spread, axis=1), axis=0) / tl.maximum(count - 1.0, 1.0)
        scale = tl.maximum(tl.sqrt(variance), 1e-6)

    for start in range(first, last, BLOCK):
        offs, in_table, is_span, row = _slots(rows_by_group_ptr, span_ends_ptr, start, last, NUM_SLOTS, BLOCK_S, BLOCK)
        raw = tl.load(raw_ptr + offs, mask=in_table, other=0.0)
        # The deviation of rewards is exactly 0 where they are all equal, and so must the advantages be.
        std = tl.load(reward_std_ptr + row, mask=row < num_rows, other=0.0)
        if BY_REWARD_STD:
            value = raw / (std + 1e-6)
        else:
            value = (raw - shift) / scale
        tl.store(values_ptr + offs, tl.where(is_span & (std > 0.0), value, 0.0), mask=in_table)


def span_values(
    rewards: Tensor, nodes: Tensor, boundaries: Tensor, layout: "Layout", options: "CreditOptions"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalised and raw values (N, S) float64, span_ends (N, S) int32, node sizes (N, S) int32 and values (N, S).

    See ``leafkernels.eager.values.span_values``.
    """
    num_rows, num_slots = rewards.shape[0], boundaries.shape[1] + 1
    raw = torch.empty((num_rows, num_slots), dtype=torch.float64, device=rewards.device)
    span_ends = torch.empty((num_rows, num_slots), dtype=torch.int32, device=rewards.device)
    sizes = torch.empty_like(span_ends)
    node_values = torch.empty_like(raw)
    reward_std = torch.empty(num_rows, dtype=torch.float64, device=rewards.device)
    if not num_rows:
        return torch.empty_like(raw), raw, span_ends, sizes, node_values
    block_s = max(2, triton.next_power_of_2(num_slots))
    _span_values_kernel[(num_rows,)](
        raw,
        span_ends,
        sizes,
        node_values,
        reward_std,
        rewards.contiguous(),
        nodes.contiguous(),
        boundaries.contiguous(),
        layout.row_lengths,
        *layout.groups,
        NUM_SLOTS=num_slots,
        USE_GLOBAL=options.terms != "local",
        USE_LOCAL=options.terms != "global",
        MULTIPLICITY_POWER=options.multiplicity_power,
        LEAVE_ONE_OUT=options.leave_one_out,
        BLOCK_S=block_s,
        BLOCK=BLOCK,
        num_warps=1,
        enable_fp_fusion=FP_FUSION,
    )
    # A clone, because an operation must not return one tensor twice.
    if options.normalize == "none":
        return raw.clone(), raw, span_ends, sizes, node_values
    values = torch.empty_like(raw)
    whole_call = options.normalize == "batch"
    _normalize_spans_kernel[(1 if whole_call else layout.group_starts.shape[0] - 1,)](
        values,
        raw,
        span_ends,
        reward_std,
        layout.rows_by_group,
        layout.group_starts,
        num_rows,
        WHOLE_CALL=whole_call,
        BY_REWARD_STD=options.normalize == "reward_std",
        NUM_SLOTS=num_slots,
        BLOCK_S=block_s,
        BLOCK=BLOCK,
        num_warps=4 if whole_call else 1,
        enable_fp_fusion=FP_FUSION,
    )
    return values, raw, span_ends, sizes, node_values
