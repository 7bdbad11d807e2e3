"""Tensors to lists, ``python_ref``, and back."""

import torch
from torch import Tensor

import python_ref
from leafkernels.reference._lists import take_row


def prefix_tree(
    token_ids: Tensor,
    row_starts: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
) -> tuple[Tensor, ...]:
    """See ``python_ref.prefix_tree``; the fields of ``leafkernels.PrefixTree``."""
    starts, ends = row_starts.tolist(), (row_starts + row_lengths).tolist()
    groups = group_of_row.tolist()
    rows = [take_row(token_ids, i, start, end) for i, (start, end) in enumerate(zip(starts, ends, strict=True))]
    tree = python_ref.prefix_tree(rows, groups=groups)
    nodes = torch.full(token_ids.shape, -1, dtype=torch.int64)
    for i, numbers in enumerate(tree.nodes):
        of_row = nodes[i] if nodes.dim() == 2 else nodes
        of_row[starts[i] : ends[i]] = torch.tensor(numbers, dtype=torch.int64)
    # Groups without a row begin where the next one does.
    begins = dict(zip(sorted(set(groups)), tree.starts, strict=False))
    of_groups = [len(tree.token_ids)]
    for group in reversed(range(group_starts.shape[0] - 1)):
        of_groups.insert(0, begins.get(group, of_groups[0]))
    fields = (tree.positions, tree.parents, tree.ends, tree.counts)
    ids = torch.tensor(tree.token_ids, dtype=token_ids.dtype)
    found = ids, *(torch.tensor(values, dtype=torch.int64) for values in fields), nodes, torch.tensor(of_groups)
    return tuple(tensor.to(token_ids.device) for tensor in found)
