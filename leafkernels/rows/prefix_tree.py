"""Which tokens of the rows of a prompt are the same: the prefix tree, a node for each different prefix."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_count, check_integer, values_readable
from leafkernels._core.operation import operation
from leafkernels.rows.find import Rows, find_rows, to_lists, to_tokens
from leafkernels.rows.layout import Layout, as_rows


class PrefixTree(NamedTuple):
    """The M nodes of the prefix trees of P prompts, each tree in depth-first order, one after the other.

    Node k is above node q, or q itself, exactly where ``k <= q < ends[k]``.
    """

    token_ids: Tensor
    """(M,) the token of each node, in the dtype of the input."""
    positions: Tensor
    """(M,) int64: how many tokens stand before it in its rows."""
    parents: Tensor
    """(M,) int64: the node of the token before, -1 for the first of a row."""
    ends: Tensor
    """(M,) int64: one past the last node of its subtree."""
    counts: Tensor
    """(M,) int64: how many rows pass through it."""
    nodes: Tensor
    """Shaped like the input, int64: the node of each token, -1 outside the rows."""
    starts: Tensor
    """(P + 1,) int64: where the nodes of each prompt begin, and M. With ``groups`` (N + 1,), the prompts by ascending
    name, M after the last."""


@operation("prefix_tree")
def _order_rows(token_ids: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    return torch.empty_like(layout.row_starts), torch.empty_like(layout.row_starts)


@operation("prefix_tree")
def _tree_nodes(
    token_ids: Tensor, order: Tensor, shared: Tensor, firsts: Tensor, layout: Layout, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    positions, parents, ends, counts = (order.new_empty((num_nodes,)) for _ in range(4))
    nodes = token_ids.new_empty(token_ids.shape, dtype=torch.int64)
    return token_ids.new_empty((num_nodes,)), positions, parents, ends, counts, nodes


def order_of_rows(token_ids: Tensor, layout: Layout, backend: str) -> tuple[Tensor, Tensor]:
    """The rows of a layout in depth-first order, and how many tokens each shares with the one before, both (N,) int64.

    Groups keep their places; the first row of one shares nothing. The arguments have been checked, ``backend`` is
    "triton" or "torch".
    """
    return _order_rows(backend, token_ids, layout)


def tree_of_rows(
    token_ids: Tensor, rows: Rows, max_nodes: int | None, backend: str, num_starts: int | None = None
) -> PrefixTree:
    """The tree of some rows; the arguments have been checked."""
    layout = rows.layout
    if backend == "reference":
        tree = _by_reference(token_ids, rows)
        _check_room(tree.starts[-1], max_nodes)
    else:
        order, shared = order_of_rows(token_ids, layout, backend)
        own = layout.row_lengths[order] - shared
        firsts = pad(own.cumsum(0), (1, 0))
        _check_room(firsts[-1], max_nodes)
        num_nodes = int(firsts[-1]) if max_nodes is None else max_nodes
        found = _tree_nodes(backend, token_ids, order, shared, firsts, layout, num_nodes)
        tree = PrefixTree(*found, firsts[layout.group_starts])
    if max_nodes is not None:
        tree = _sized(tree, max_nodes)
    if num_starts is not None:
        after = tree.starts[-1:].expand(num_starts - tree.starts.shape[0])
        tree = tree._replace(starts=torch.cat([tree.starts, after]))
    return tree


def _by_reference(token_ids: Tensor, rows: Rows) -> PrefixTree:
    import python_ref

    groups = rows.layout.group_of_row.tolist()
    tree = python_ref.prefix_tree(to_lists(token_ids, rows), response_mask=to_lists(rows.mask, rows), groups=groups)
    # Groups without a row begin where the next one does.
    begins = dict(zip(sorted(set(groups)), tree.starts, strict=False))
    starts = [len(tree.token_ids)]
    for group in reversed(range(rows.layout.group_starts.shape[0] - 1)):
        starts.insert(0, begins.get(group, starts[0]))
    numbers = (tree.positions, tree.parents, tree.ends, tree.counts)
    fields = [torch.tensor(field, dtype=torch.int64, device=token_ids.device) for field in (*numbers, starts)]
    positions, parents, ends, counts, begun = fields
    ids = torch.tensor(tree.token_ids, dtype=token_ids.dtype, device=token_ids.device)
    return PrefixTree(ids, positions, parents, ends, counts, to_tokens(tree.nodes, token_ids, torch.int64), begun)


def _check_room(number: Tensor, max_nodes: int | None) -> None:
    if max_nodes is not None and values_readable(number) and int(number) > max_nodes:
        raise ValueError(f"max_nodes must be at least the number of nodes, {int(number)}, got {max_nodes}")


def _sized(tree: PrefixTree, max_nodes: int) -> PrefixTree:
    """The tree with what stands after its nodes made empty."""
    missing = max_nodes - tree.token_ids.shape[0]
    ids, positions, parents, ends, counts = (pad(field, (0, missing)) for field in tree[:5])
    every = torch.arange(max_nodes, device=ids.device)
    is_empty = every >= tree.starts[-1]
    ids, positions, counts = (field.masked_fill(is_empty, 0) for field in (ids, positions, counts))
    return PrefixTree(
        ids,
        positions,
        parents.masked_fill(is_empty, -1),
        torch.where(is_empty, every + 1, ends),
        counts,
        tree.nodes,
        tree.starts,
    )


def prefix_tree(
    token_ids: Tensor,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_nodes: int | None = None,
    backend: str = "auto",
) -> PrefixTree:
    """The prefix tree that the rows of each prompt form: one node for each different prefix, in depth-first order.

    A model's result at a token depends on the tokens before it alone, so one node serves all rows that share it: a
    batch of ``token_ids`` at ``positions``, in which token q sees token k where ``k <= q < ends[k]``, is a forward pass
    of all rows; ``result[nodes]`` spreads it over the rows again. Every id is read about three times, and memory grows
    with the tokens, however many rows there are.

    The first child of a node is the one in which its smallest row continues; the others follow by token id.

    Args:
        token_ids: (G, T), (P, G, T), (N, T) with ``groups``, or (total,) with ``cu_seqlens``; any integer dtype.
        response_mask: shaped like ``token_ids``; a row is the stretch from its first to its last nonzero entry, and
            tokens inside count also where the mask has a hole. An attention mask is one.
        groups, group_size: rows of each prompt; see ``span_advantages``. Without them all rows of a 2-D tensor are one
            prompt; they may differ in their first token, so rows need no grouping.
        cu_seqlens: (N + 1,) int32, the offsets of packed rows.
        max_nodes: size of the result, for callers that cannot wait for the device. Entries after the last node have
            token, position and count 0, parent -1, and see themselves alone. None: the number of nodes, which is read
            back from the device, the one synchronisation. More nodes than that are an error on a CPU; on a GPU
            ``starts[-1]`` is their number, and those beyond are in ``nodes`` only.
        backend: "auto", "triton", "torch" or "reference".

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.
        RuntimeError: the backend asked for cannot run here.

    Example:
        >>> tree = leafkernels.prefix_tree(torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]]))
        >>> tree.token_ids.tolist(), tree.parents.tolist()
        ([1, 2, 3, 4, 5, 6], [-1, 0, 1, 1, 0, 4])
        >>> tree.nodes
        tensor([[0, 1, 2],
                [0, 1, 3],
                [0, 4, 5]])
    """
    token_ids = check_integer("token_ids", token_ids)
    if max_nodes is not None:
        check_count("max_nodes", max_nodes, 0)
    backend = resolve_backend(backend, token_ids.device)
    rows = find_rows("token_ids", token_ids, response_mask, groups, group_size, cu_seqlens, backend)
    num_starts = rows.layout.row_starts.shape[0] + 1 if rows.prompt_shape is None else None
    tree = tree_of_rows(as_rows(token_ids), rows, max_nodes, backend, num_starts)
    return tree._replace(nodes=tree.nodes.reshape(token_ids.shape))
