"""A prefix tree as attention kernels of variable lengths read it: keys and values gathered along each path."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels.rows.prefix_tree import PrefixTree


class TreeSegments(NamedTuple):
    """The tree's nodes in S segments, chains of nodes between branches; the names are those of TRL's packed row.

    A segment's queries are its nodes; its keys are those of the whole path from the root to its last node, so that a
    causal mask aligned to the last query is the tree's. A row is a sequence of whole segments.
    """

    tree_kv_index: Tensor
    """(K,) int64: the nodes of all paths, one path after the other."""
    tree_cu_seqlens_q: Tensor
    """(S + 1,) int32: where each segment begins among the nodes."""
    tree_cu_seqlens_k: Tensor
    """(S + 1,) int32: where each path begins in ``tree_kv_index``."""
    tree_max_seqlens: Tensor
    """(2,) int64: nodes of the longest segment, and of the longest path."""


def tree_segments(tree: PrefixTree) -> TreeSegments:
    """What flash attention's varlen form takes for a ``tree``: an index of keys and values, and the lengths.

    Keys are ``keys.index_select(0, tree_kv_index)``.

    TRL's ``TreeRow.pack`` (AsyncGRPO) gives the same of a tree that has a node for each token *and* the token after it,
    one more for every branch beyond the first. The numbers of segments and of keys are read back from the device.
    """
    count = len(tree.parents)
    every = torch.arange(count, device=tree.parents.device)
    has_parent = tree.parents >= 0
    parents = tree.parents.clamp_min(0)
    children, rows_on = torch.zeros((2, count), dtype=torch.int64, device=every.device)
    children = children.index_add(0, parents, has_parent.long())
    rows_on = rows_on.index_add(0, parents, tree.counts.where(has_parent, 0))
    # A chain goes on where all rows of a node go on, and in one way.
    goes_on = (children == 1) & (rows_on == tree.counts)
    is_first = ~(has_parent & (parents == every - 1) & goes_on[parents]) if count else has_parent
    firsts = is_first.nonzero().flatten()
    begins = pad(firsts, (0, 1), value=count)
    lasts = begins[1:] - 1
    lengths = tree.positions[lasts] + 1
    offsets = pad(lengths.cumsum(0), (1, 0))
    # Of each path: the number of its segment, and the position. In depth-first order the node above another at a
    # position is the last one there that comes before it.
    segment = torch.repeat_interleave(torch.arange(len(firsts), device=every.device), lengths)
    position = torch.arange(len(segment), device=every.device) - offsets[segment]
    key = tree.positions * count + every
    keys, order = key.sort()
    found = torch.searchsorted(keys, position * count + lasts[segment], right=True) - 1
    widest = [sizes.amax() if count else sizes.sum() for sizes in (begins.diff(), lengths)]
    return TreeSegments(order[found], begins.int(), offsets.int(), torch.stack(widest))
