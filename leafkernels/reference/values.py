"""Tensors to lists, ``python_ref``, and back."""

import torch
from torch import Tensor

import python_ref
from leafkernels.reference._lists import rows_of_groups
from python_ref.values import credit, mean, settled


def span_values(
    rewards: Tensor,
    nodes_of_rows: Tensor,
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
    """See ``python_ref.values.credit`` and ``normalize_spans``; arguments and results as the PyTorch implementation."""
    num_rows, num_slots = rewards.shape[0], boundaries.shape[1] + 1
    all_rewards, all_lengths, all_names = rewards.tolist(), row_lengths.tolist(), nodes_of_rows.tolist()
    values = torch.zeros((num_rows, num_slots), dtype=torch.float64)
    raw = torch.zeros_like(values)
    ends = torch.zeros((num_rows, num_slots), dtype=torch.int32)
    sizes = torch.zeros_like(ends)
    node_values = torch.full_like(values, torch.nan)

    groups = rows_of_groups(rows_by_group, group_starts)
    group_rewards = [settled([all_rewards[i] for i in rows]) for rows in groups]
    raw_spans = []
    for g, rows in enumerate(groups):
        positions = [p for p in boundaries[g].tolist() if p >= 0]
        nodes: list[list[list[int]]] = []
        for k in range(len(positions)):
            names = [all_names[i][k] for i in rows]
            nodes.append([[j for j, name in enumerate(names) if name == own] for own in names])
        raw_spans.append(
            credit(
                nodes,
                positions,
                group_rewards[g],
                [all_lengths[i] for i in rows],
                terms=terms,
                multiplicity_power=multiplicity_power,
                leave_one_out=leave_one_out,
            )
        )
        scored = [r for r in group_rewards[g] if r == r]
        for rank, i in enumerate(rows):
            sizes[i, 0], node_values[i, 0] = len(scored), mean(scored)
            for k, members_of_rows in enumerate(nodes):
                members = [group_rewards[g][j] for j in members_of_rows[rank]]
                sizes[i, k + 1], node_values[i, k + 1] = len(members), mean(members)

    normalized = python_ref.normalize_spans(raw_spans, group_rewards, normalize)
    for rows, raw_rows, rows_of_spans in zip(groups, raw_spans, normalized, strict=True):
        for i, raw_row, spans in zip(rows, raw_rows, rows_of_spans, strict=True):
            for s, (_, end, value) in enumerate(spans):
                values[i, s], raw[i, s], ends[i, s:] = value, raw_row[s][2], end
    device = rewards.device
    return values.to(device), raw.to(device), ends.to(device), sizes.to(device), node_values.to(device)
