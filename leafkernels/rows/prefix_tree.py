"""Which tokens of the rows of a prompt are the same: the prefix tree, a node for each different prefix."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.backend import implementation, resolve_backend
from leafkernels._core.checks import check_count, check_integer, values_readable
from leafkernels._core.ops import register
from leafkernels.rows.find import find_rows
from leafkernels.rows.layout import Layout, as_rows

_order_rows = register(
    "order_rows(Tensor token_ids, Tensor row_starts, Tensor row_lengths, Tensor rows_by_group, Tensor group_starts, "
    "Tensor group_of_row, str backend) -> (Tensor, Tensor)",
    lambda token_ids, row_starts, *_: (torch.empty_like(row_starts), torch.empty_like(row_starts)),
)


def _fake(token_ids: Tensor, order: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_, num_nodes, _backend = args
    numbers = [order.new_empty((num_nodes,)) for _ in range(4)]
    return token_ids.new_empty((num_nodes,)), *numbers, token_ids.new_empty(token_ids.shape, dtype=torch.int64)


_tree_nodes = register(
    "tree_nodes(Tensor token_ids, Tensor order, Tensor shared, Tensor firsts, Tensor row_starts, Tensor row_lengths, "
    "Tensor group_starts, SymInt max_length, SymInt num_nodes, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


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


def order_of_rows(token_ids: Tensor, layout: Layout, backend: str) -> tuple[Tensor, Tensor]:
    """The rows of a layout in depth-first order, and how many tokens each shares with the one before, both (N,) int64.

    Groups keep their places; the first row of one shares nothing. The arguments have been checked, ``backend`` is
    "triton" or "torch".
    """
    return _order_rows(token_ids, *layout.rows, *layout.groups, backend)


def tree_of_rows(
    token_ids: Tensor, layout: Layout, max_nodes: int | None, backend: str, num_starts: int | None = None
) -> PrefixTree:
    """The tree of the rows of a layout; the arguments have been checked."""
    if backend == "reference":
        tree = PrefixTree(*implementation(backend).prefix_tree(token_ids, *layout.rows, *layout.groups))
        _check_room(tree.starts[-1], max_nodes)
    else:
        order, shared = order_of_rows(token_ids, layout, backend)
        own = layout.row_lengths[order] - shared
        firsts = pad(own.cumsum(0), (1, 0))
        _check_room(firsts[-1], max_nodes)
        size = layout.max_length, int(firsts[-1]) if max_nodes is None else max_nodes
        found: list[Tensor] = _tree_nodes(
            token_ids, order, shared, firsts, *layout.rows, layout.group_starts, *size, backend
        )
        tree = PrefixTree(*(*found, firsts[layout.group_starts]))
    if max_nodes is not None:
        tree = _sized(tree, max_nodes)
    if num_starts is not None:
        after = tree.starts[-1:].expand(num_starts - tree.starts.shape[0])
        tree = tree._replace(starts=torch.cat([tree.starts, after]))
    return tree


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

    What a model computes for a token depends on the tokens before it and no others, so that one node serves all rows
    that share it: a batch of ``token_ids`` at ``positions``, in which token q sees token k where ``k <= q < ends[k]``,
    is a forward pass of all rows; ``result[nodes]`` spreads it over them again. Every id is read about three times,
    and memory grows with the tokens, however many rows there are.

    Of the children of a node comes first the one that its smallest row goes on in, then the others by token id.

    Args:
        token_ids: (G, T), (P, G, T), (N, T) with ``groups``, or (total,) with ``cu_seqlens``; any integer dtype.
        response_mask: shaped like ``token_ids``; a row is the stretch from its first to its last nonzero entry, and
            tokens inside count also where the mask has a hole. An attention mask is one.
        groups, group_size: rows of each prompt; see ``span_advantages``. Without them all rows of a 2-D tensor are one
            prompt; they may differ in their first token, so that nobody has to know which of them belong together.
        cu_seqlens: (N + 1,) int32, the offsets of packed rows.
        max_nodes: size of the result, for who cannot wait for the device. Nodes beyond those that there are have token,
            position and count 0, parent -1, and see themselves alone. None: as many as there are, which is read back
            from the device, the one synchronisation. More nodes than that are an error on a CPU; on a GPU
            ``starts[-1]`` tells their number, and those beyond are in ``nodes`` only.
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
    tree = tree_of_rows(as_rows(token_ids), rows.layout, max_nodes, backend, num_starts)
    return tree._replace(nodes=tree.nodes.reshape(token_ids.shape))
