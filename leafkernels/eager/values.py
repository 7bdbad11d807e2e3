"""Span values: mean rewards of the rows that share a prefix, against the group's mean and the parent node's.

Everything is small, float64, and centred on the smallest reward of the group, so that equal rewards give exactly 0.
A row has S = num_boundaries + 1 slots for spans. Slot s holds the span that ends at the row's node of boundary s, or
the tail. In tables of nodes column 0 is the group and column s + 1 the node at which slot s ends (for the tail: no
matter), so that columns [:-1] are the parents of columns [1:].
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels.rows.layout import group_members

_FAR = torch.iinfo(torch.int32).max


class _Nodes(NamedTuple):
    members: Tensor  # (N, G) rows of the group
    same: Tensor  # (N, G, S + 1) float64: 1 where the member is in the row's node
    sizes: Tensor  # (N, S + 1) float64
    is_tail: Tensor  # (N, S)
    is_missing: Tensor  # (N, S) slots without a span
    span_ends: Tensor  # (N, S) int32


def _nodes(
    rewards: Tensor,
    prefix_lengths: Tensor,
    boundaries: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
) -> _Nodes:
    members, is_member = group_members(rows_by_group, group_starts, group_of_row, prefix_lengths.shape[1])
    lengths = row_lengths.to(torch.int32)
    column = lengths[:, None]
    at = pad(boundaries.masked_fill(boundaries < 0, _FAR), (1, 1), value=_FAR)
    at[:, 0] = -1
    at = at[group_of_row]

    # How far two rows go together: beyond every boundary if they are identical (two empty rows are not), and not even
    # to the group's, at -1, if one has no reward.
    identical = (prefix_lengths == column).logical_and_(lengths[members] == column).logical_and_(column > 0)
    shared = prefix_lengths.masked_fill(identical, _FAR)
    shared.masked_fill_(rewards.isnan()[members].logical_or_(is_member.logical_not_()), -2)
    same = (shared[:, :, None] >= at[:, None, :]).to(torch.float64)
    sizes = same.sum(1)

    at = at[:, 1:]
    is_retained = (sizes[:, 1:] >= 2).logical_and_(at < _FAR)
    last = (at * is_retained).amax(1, keepdim=True)
    span_ends = torch.where(is_retained, at, torch.maximum(column, last))
    # Retained boundaries come first; the slot behind them ends at the row's length, and is the tail if it gets there.
    is_missing = span_ends <= torch.cat([torch.zeros_like(column), span_ends[:, :-1]], dim=1)
    return _Nodes(members, same, sizes, (is_retained | is_missing).logical_not_(), is_missing, span_ends)


def _centred(rewards: Tensor, nodes: _Nodes) -> tuple[Tensor, Tensor]:
    """Rewards (N, G) of each row's group above the least of them, (N, 1); 0 for rows without one."""
    of_members = rewards.to(torch.float64)[nodes.members]
    is_out = nodes.same[:, :, 0] == 0.0
    least = of_members.masked_fill(is_out, torch.inf).amin(1, keepdim=True)
    return (of_members - least).masked_fill_(is_out, 0.0), least


def _weights(
    nodes: _Nodes, terms: str, multiplicity_power: float, leave_one_out: bool
) -> tuple[Tensor | float, Tensor | float]:
    """What each slot's global and local term is multiplied by, (N, S)."""
    weight = nodes.sizes[:, 1:].clamp_min(1.0).pow_(-multiplicity_power)
    weight.masked_fill_(nodes.is_tail, 1.0).masked_fill_(nodes.is_missing, 0.0)
    of_global = weight if terms != "local" else 0.0
    of_local = weight if terms != "global" else 0.0
    if leave_one_out:
        # Of the parent node: the group for the first span, the node before for the others. A group of one gives 0.
        unbiased = nodes.sizes[:, :-1] / (nodes.sizes[:, :-1] - 1.0).clamp_min(1.0)
        return of_global * unbiased[:, :1], of_local * unbiased
    return of_global, of_local


def _total(entries: Tensor, nodes: _Nodes, normalize: str) -> Tensor:
    """(N, 1) sums over the entries (N, S) of each row's group, or of the whole call for "batch"."""
    of_rows = entries.sum(1)
    if normalize == "batch":
        return of_rows.sum().expand(entries.shape[0], 1)
    return (of_rows[nodes.members] * nodes.same[:, :, 0]).sum(1, keepdim=True)


def _statistics(raw: Tensor, nodes: _Nodes, normalize: str) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and deviation (ddof 1) of the spans among which a row's are z-scored, (N, 1) each."""
    number = _total(nodes.is_missing.logical_not(), nodes, normalize)
    mean = _total(raw, nodes, normalize) / number
    spread = _total((raw - mean).square_().masked_fill_(nodes.is_missing, 0.0), nodes, normalize)
    return number, mean, (spread / (number - 1.0).clamp_min(1.0)).sqrt_()


def _reward_std(centred: Tensor, mean: Tensor, nodes: _Nodes) -> Tensor:
    """(N, 1) deviation of the rewards of each row's group, ddof 1; 0 for a group of one."""
    spread = ((centred - mean).square_() * nodes.same[:, :, 0]).sum(1, keepdim=True)
    return (spread / (nodes.sizes[:, :1] - 1.0).clamp_min(1.0)).sqrt_()


def span_values(
    rewards: Tensor,
    prefix_lengths: Tensor,
    boundaries: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
    terms: str,
    multiplicity_power: float,
    leave_one_out: bool,
    normalize: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalised and raw values (N, S) float64, span_ends (N, S) int32, node sizes (N, S) int32 and values (N, S).

    ``prefix_lengths`` is (N, G) by rank within the group, ``boundaries`` (P, S - 1); a row without a reward has length
    0. Sizes and values of nodes have the group in column 0; those of nodes that a row does not retain are not defined.
    """
    nodes = _nodes(rewards, prefix_lengths, boundaries, row_lengths, rows_by_group, group_starts, group_of_row)
    centred, least = _centred(rewards, nodes)
    values = torch.bmm(centred[:, None, :], nodes.same).squeeze(1) / nodes.sizes.clamp_min(1.0)
    mean = values[:, :1]

    own = torch.where(nodes.is_tail, rewards.to(torch.float64)[:, None] - least, values[:, 1:])
    of_global, of_local = _weights(nodes, terms, multiplicity_power, leave_one_out)
    raw = ((own - mean) * of_global + (own - values[:, :-1]) * of_local).masked_fill_(nodes.is_missing, 0.0)
    if normalize == "none":
        normalized = raw.clone()
    elif normalize == "reward_std":
        normalized = raw / (_reward_std(centred, mean, nodes) + 1e-6)
    else:
        _, shift, scale = _statistics(raw, nodes, normalize)
        is_zero = nodes.is_missing | (centred.amax(1, keepdim=True) == 0.0)
        normalized = ((raw - shift) / scale.clamp_min(1e-6)).masked_fill_(is_zero, 0.0)
    return normalized, raw, nodes.span_ends, nodes.sizes[:, :-1].to(torch.int32), values[:, :-1] + least


def span_values_backward(
    gradients: Tensor,
    raw_gradients: Tensor,
    raw: Tensor,
    rewards: Tensor,
    prefix_lengths: Tensor,
    boundaries: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
    terms: str,
    multiplicity_power: float,
    leave_one_out: bool,
    normalize: str,
) -> Tensor:
    """(N,) float64 gradient of the rewards, given those of the normalised and of the raw values (N, S).

    Averaging over a node is its own adjoint, so gradients take the same sums as rewards.
    """
    nodes = _nodes(rewards, prefix_lengths, boundaries, row_lengths, rows_by_group, group_starts, group_of_row)
    centred, least = _centred(rewards, nodes)
    size = nodes.sizes[:, :1]
    of_raw = gradients = gradients.to(torch.float64).masked_fill(nodes.is_missing, 0.0)
    of_rewards = torch.zeros_like(size)
    if normalize == "reward_std":
        mean = centred.sum(1, keepdim=True) / size.clamp_min(1.0)
        std = _reward_std(centred, mean, nodes)
        of_raw = gradients / (std + 1e-6)
        of_std = -_total(of_raw * raw, nodes, normalize) / (std + 1e-6)
        # d std / d r_j = (r_j - mean) / ((K - 1) std)
        distance = rewards.to(torch.float64)[:, None] - least - mean
        of_rewards = (of_std * distance / ((size - 1.0) * std)).masked_fill(std == 0.0, 0.0)
    elif normalize != "none":
        number, shift, std = _statistics(raw, nodes, normalize)
        gradients = gradients.masked_fill(centred.amax(1, keepdim=True) == 0.0, 0.0)
        scale = std.clamp_min(1e-6)
        scores = (raw - shift) / scale
        # Below its floor the scale is a constant, and only the mean passes gradients on.
        along = _total(gradients * scores, nodes, normalize) / (number - 1.0).clamp_min(1.0)
        along = along.masked_fill(std <= 1e-6, 0.0)
        of_raw = (gradients - _total(gradients, nodes, normalize) / number - scores * along) / scale
    of_raw = (of_raw + raw_gradients).masked_fill(nodes.is_missing, 0.0)

    of_global, of_local = _weights(nodes, terms, multiplicity_power, leave_one_out)
    of_own = of_raw * (of_global + of_local)
    of_rewards = of_rewards + of_own.masked_fill(~nodes.is_tail, 0.0).sum(1, keepdim=True)
    of_values = torch.zeros_like(nodes.sizes)
    of_values[:, 1:] += of_own.masked_fill(nodes.is_tail, 0.0)
    of_values[:, :-1] -= of_raw * of_local
    of_values[:, 0] -= (of_raw * of_global).sum(1)
    of_values /= nodes.sizes.clamp_min(1.0)
    of_members = (of_values[nodes.members] * nodes.same).sum((1, 2))
    return (of_rewards.squeeze(1) + of_members).masked_fill(rewards.isnan(), 0.0)
