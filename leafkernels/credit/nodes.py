"""Which rows of a prompt share the prefix at a boundary, each node named by the smallest of its rows."""

from torch import Tensor

from leafkernels._core.ops import register
from leafkernels.rows.layout import Layout

_prefix_nodes = register(
    "prefix_nodes(Tensor token_ids, Tensor row_starts, Tensor row_lengths, Tensor rows_by_group, "
    "Tensor group_starts, Tensor group_of_row, Tensor boundaries, SymInt max_group, str backend) -> Tensor",
    lambda token_ids, row_starts, lengths, by_group, starts, of_row, boundaries, *_: row_starts.new_empty(
        (row_starts.shape[0], boundaries.shape[1])
    ),
)

_nodes_of_prefix_lengths = register(
    "nodes_of_prefix_lengths(Tensor prefix_lengths, Tensor boundaries, Tensor row_lengths, Tensor rows_by_group, "
    "Tensor group_starts, Tensor group_of_row, str backend) -> Tensor",
    lambda prefix_lengths, boundaries, row_lengths, *_: row_lengths.new_empty(
        (row_lengths.shape[0], boundaries.shape[1])
    ),
)


def nodes_of_groups(token_ids: Tensor, layout: Layout, boundaries: Tensor, backend: str) -> Tensor:
    """(N, B) int64: the smallest row that shares each row's prefix at each boundary of ``boundaries`` (P, B).

    The row itself where it is alone, has no token, or the boundary is -1. The arguments have been checked.
    """
    return _prefix_nodes(
        token_ids,
        *layout.rows,
        *layout.groups,
        boundaries,
        layout.max_group,
        backend,
    )


def nodes_of_table(prefix_lengths: Tensor, layout: Layout, boundaries: Tensor, backend: str) -> Tensor:
    """The same from a table (N, max_group) of prefix lengths, by rank within the group."""
    return _nodes_of_prefix_lengths(
        prefix_lengths,
        boundaries,
        layout.row_lengths,
        *layout.groups,
        backend,
    )
