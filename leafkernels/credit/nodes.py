"""Which rows of a prompt share the prefix at a boundary, each node named by the smallest of its rows."""

from torch import Tensor

from leafkernels._core.operation import operation
from leafkernels.rows.layout import Layout


@operation("nodes")
def _prefix_nodes(token_ids: Tensor, boundaries: Tensor, layout: Layout) -> Tensor:
    return layout.row_starts.new_empty((layout.row_starts.shape[0], boundaries.shape[1]))


@operation("nodes")
def _nodes_of_prefix_lengths(prefix_lengths: Tensor, boundaries: Tensor, layout: Layout) -> Tensor:
    return layout.row_lengths.new_empty((layout.row_lengths.shape[0], boundaries.shape[1]))


def nodes_of_groups(token_ids: Tensor, layout: Layout, boundaries: Tensor, backend: str) -> Tensor:
    """(N, B) int64: the smallest row that shares each row's prefix at each boundary of ``boundaries`` (P, B).

    The row itself where it is alone, has no token, or the boundary is -1. The arguments have been checked.
    """
    return _prefix_nodes(backend, token_ids, boundaries, layout)


def nodes_of_table(prefix_lengths: Tensor, layout: Layout, boundaries: Tensor, backend: str) -> Tensor:
    """The same from a table (N, max_group) of prefix lengths, by rank within the group."""
    return _nodes_of_prefix_lengths(backend, prefix_lengths, boundaries, layout)
