"""Span values: mean rewards of the rows that share a prefix, against the group's mean and the parent node's.

Everything is small, float64, and centred on the smallest reward of the group, so that equal rewards give exactly 0.
A row has S = num_boundaries + 1 slots for spans. Slot s holds the span that ends at the row's node of boundary s, or
the tail. In tables of nodes, (N, S + 1), column 0 is the group, column s + 1 the node at which slot s ends, and the
last one the row alone, so that columns [:-1] are the parents of columns [1:]. A tail, too, ends at a node of one row,
its own. Sums go by node: a row reads its own nodes and its own group, and nothing of another.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.precision import add_by, is_rounding
from leafkernels.rows.layout import Layout

if TYPE_CHECKING:
    from leafkernels.credit.options import CreditOptions


class _Nodes(NamedTuple):
    names: Tensor  # (N * (S + 1),) one number for each node and column
    group_of_row: Tensor  # (N,)
    num_groups: int
    sizes: Tensor  # (N, S + 1) float64
    is_out: Tensor  # (N,) rows without a reward
    is_missing: Tensor  # (N, S) slots without a span
    span_ends: Tensor  # (N, S) int32


def _sum_by(names: Tensor, entries: Tensor, num_names: int) -> Tensor:
    """For every entry the sum of all entries of its name, all (n,); the same bits on every run."""
    return add_by(names, entries, num_names).index_select(0, names)


def _nodes(rewards: Tensor, nodes: Tensor, boundaries: Tensor, layout: Layout) -> _Nodes:
    num_rows, num_columns = nodes.shape[0], nodes.shape[1] + 2
    every_row = torch.arange(num_rows, device=nodes.device).unsqueeze(1)
    # A group has no more names than rows, so its own name is among its rows'.
    names = torch.cat([layout.group_of_row.unsqueeze(1), nodes, every_row], dim=1)
    names = torch.add(torch.arange(num_columns, device=nodes.device), names, alpha=num_columns).view(-1)
    is_out = rewards.isnan()
    ones = is_out.logical_not().to(torch.float64).unsqueeze(1).expand(-1, num_columns).reshape(-1)
    sizes = _sum_by(names, ones, names.shape[0]).view(num_rows, num_columns)

    column = layout.row_lengths.to(torch.int32).unsqueeze(1)
    at = pad(boundaries.index_select(0, layout.group_of_row), (0, 1))
    is_retained = sizes[:, 1:] >= 2
    last = (at * is_retained).amax(1, keepdim=True)
    span_ends = torch.where(is_retained, at, torch.maximum(column, last))
    # Retained boundaries come first; the slot after them ends at the row's length, and is the tail if it gets there.
    is_missing = span_ends <= pad(span_ends, (1, -1))
    return _Nodes(names, layout.group_of_row, layout.group_starts.shape[0] - 1, sizes, is_out, is_missing, span_ends)


def _centred(rewards: Tensor, nodes: _Nodes) -> tuple[Tensor, Tensor]:
    """Rewards (N, 1) above the least of their group, 0 for rows without one and where all differ by rounding alone; and
    the least (N, 1)."""
    rewards = rewards.to(torch.float64)
    least, most = (rewards.new_full((nodes.num_groups,), end) for end in (torch.inf, -torch.inf))
    least.scatter_reduce_(0, nodes.group_of_row, rewards.masked_fill(nodes.is_out, torch.inf), "amin")
    most.scatter_reduce_(0, nodes.group_of_row, rewards.masked_fill(nodes.is_out, -torch.inf), "amax")
    is_flat = is_rounding(least, most).index_select(0, nodes.group_of_row)
    least = least.index_select(0, nodes.group_of_row)
    return (rewards - least).masked_fill_(nodes.is_out | is_flat, 0.0).unsqueeze(1), least.unsqueeze(1)


def _by_node(entries: Tensor, nodes: _Nodes) -> Tensor:
    """(N, S + 1) sums of the entries (N, S + 1), or (N, 1), over the rows of each row's nodes."""
    entries = entries.expand(nodes.sizes.shape).reshape(-1)
    return _sum_by(nodes.names, entries, entries.shape[0]).view(nodes.sizes.shape)


def _by_group(entries: Tensor, nodes: _Nodes, normalize: str) -> Tensor:
    """(N, 1) sums over the entries (N, C) of each row's group, or of the whole call for "batch"."""
    sum_per_row = entries.sum(1, dtype=torch.float64)
    if normalize == "batch":
        return sum_per_row.sum().expand(entries.shape[0], 1)
    return _sum_by(nodes.group_of_row, sum_per_row, nodes.num_groups).unsqueeze(1)


def _weights(nodes: _Nodes, options: "CreditOptions") -> tuple[Tensor | float, Tensor | float]:
    """Factors of each slot's global and local term, (N, S)."""
    sizes = nodes.sizes[:, 1:]
    # Looked up in a table of whole vectors: PyTorch raises the last few numbers of a tensor to a power by other code,
    # which rounds differently, and a row's result must not depend on the number of rows in the call.
    powers = torch.arange(-(-(sizes.shape[0] + 1) // 64) * 64, dtype=torch.float64, device=sizes.device)
    powers = powers.clamp_min_(1.0).pow_(-options.multiplicity_power)
    weight = powers[sizes.long()].masked_fill_(nodes.is_missing, 0.0)
    global_weight = weight if options.terms != "local" else 0.0
    local_weight = weight if options.terms != "global" else 0.0
    if options.leave_one_out:
        # Of the parent node: the group for the first span, the node before for the others. A group of one gives 0.
        unbiased = nodes.sizes[:, :-1] / (nodes.sizes[:, :-1] - 1.0).clamp_min(1.0)
        return global_weight * unbiased[:, :1], local_weight * unbiased
    return global_weight, local_weight


def _statistics(raw: Tensor, nodes: _Nodes, normalize: str) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and deviation (ddof 1) of the spans among which a row's are z-scored, (N, 1) each."""
    number = _by_group(nodes.is_missing.logical_not(), nodes, normalize)
    mean = _by_group(raw, nodes, normalize) / number.clamp_min(1.0)
    spread = _by_group((raw - mean).square_().masked_fill_(nodes.is_missing, 0.0), nodes, normalize)
    return number, mean, (spread / (number - 1.0).clamp_min(1.0)).sqrt_()


def _reward_std(centred: Tensor, mean: Tensor, nodes: _Nodes) -> Tensor:
    """(N, 1) deviation of the rewards of each row's group, ddof 1; 0 for a group of one."""
    spread = (centred - mean).square_().masked_fill_(nodes.is_out[:, None], 0.0)
    return (_by_group(spread, nodes, "reward_std") / (nodes.sizes[:, :1] - 1.0).clamp_min(1.0)).sqrt_()


def span_values(
    rewards: Tensor, nodes: Tensor, boundaries: Tensor, layout: Layout, options: "CreditOptions"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalised and raw values (N, S) float64, span_ends (N, S) int32, node sizes (N, S) int32 and values (N, S).

    ``nodes`` is (N, S - 1) as by ``prefix_nodes``, ``boundaries`` (P, S - 1); a row without a reward has length
    0. Sizes and values of nodes have the group in column 0; those of nodes that a row does not retain are not defined.
    """
    tree, normalize = _nodes(rewards, nodes, boundaries, layout), options.normalize
    centred, least = _centred(rewards, tree)
    sums = _by_node(centred, tree)
    values = sums / tree.sizes.clamp_min(1.0)
    mean, own = values[:, :1], values[:, 1:]
    global_weight, local_weight = _weights(tree, options)
    raw = ((own - mean) * global_weight + (own - values[:, :-1]) * local_weight).masked_fill_(tree.is_missing, 0.0)
    if normalize == "none":
        normalized = raw.clone()
    elif normalize == "reward_std":
        normalized = raw / (_reward_std(centred, mean, tree) + 1e-6)
    else:
        _, shift, scale = _statistics(raw, tree, normalize)
        is_zero = tree.is_missing | (sums[:, :1] == 0.0)  # all rewards are the least one
        normalized = (raw - shift).div_(scale.clamp_min_(1e-6)).masked_fill_(is_zero, 0.0)
    return normalized, raw, tree.span_ends, tree.sizes[:, :-1].to(torch.int32), values[:, :-1] + least


def span_values_backward(
    gradients: Tensor,
    raw_gradients: Tensor,
    raw: Tensor,
    rewards: Tensor,
    nodes: Tensor,
    boundaries: Tensor,
    layout: Layout,
    options: "CreditOptions",
) -> Tensor:
    """(N,) float64 gradient of the rewards, given those of the normalised and of the raw values (N, S).

    Averaging over a node is its own adjoint, so gradients take the same sums as rewards.
    """
    tree, normalize = _nodes(rewards, nodes, boundaries, layout), options.normalize
    centred, _ = _centred(rewards, tree)
    size, total = tree.sizes[:, :1], _by_group(centred, tree, "reward_std")
    grad_raw = gradients = gradients.to(torch.float64).masked_fill(tree.is_missing, 0.0)
    grad_rewards = torch.zeros_like(size)
    if normalize == "reward_std":
        mean = total / size.clamp_min(1.0)
        std = _reward_std(centred, mean, tree)
        grad_raw = gradients / (std + 1e-6)
        grad_std = -_by_group(grad_raw * raw, tree, normalize) / (std + 1e-6)
        # d std / d r_j = (r_j - mean) / ((G - 1) std)
        grad_rewards = (grad_std * (centred - mean) / ((size - 1.0) * std)).masked_fill(std == 0.0, 0.0)
    elif normalize != "none":
        number, shift, std = _statistics(raw, tree, normalize)
        gradients = gradients.masked_fill(total == 0.0, 0.0)
        scale = std.clamp_min(1e-6)
        scores = (raw - shift) / scale
        # Below its floor the scale is a constant, and only the mean passes gradients on.
        along = _by_group(gradients * scores, tree, normalize) / (number - 1.0).clamp_min(1.0)
        along = along.masked_fill(std <= 1e-6, 0.0)
        mean_gradient = _by_group(gradients, tree, normalize) / number.clamp_min(1.0)
        grad_raw = (gradients - mean_gradient - scores * along) / scale
    grad_raw = (grad_raw + raw_gradients).masked_fill(tree.is_missing, 0.0)

    global_weight, local_weight = _weights(tree, options)
    grad_values = pad(grad_raw * (global_weight + local_weight), (1, 0))
    grad_values[:, :-1] -= grad_raw * local_weight
    grad_values[:, 0] -= (grad_raw * global_weight).sum(1)
    grad_values /= tree.sizes.clamp_min(1.0)
    grad_through_nodes = _by_node(grad_values, tree).sum(1, keepdim=True)
    return (grad_rewards + grad_through_nodes).masked_fill(tree.is_out[:, None], 0.0).squeeze(1)
