"""The prefix tree of rows that stand in depth-first order, each beside what it shares with the one before.

Down a column the node is that of the last row that began it, which is a running maximum; the first later row that
shares less ends it, a running minimum the other way.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels.eager.prefix_lengths import refine
from leafkernels.rows.layout import Layout

# Entries of a table that are worked on together, so that intermediate results stay in a cache.
_CHUNK = 1 << 17


def order_rows(token_ids: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The rows in depth-first order, and how many tokens each shares with the one before in its group, (N,) int64."""
    if layout.row_starts.shape[0] == 0:
        return layout.row_starts.clone(), layout.row_starts.clone()
    return refine(token_ids, layout.row_lengths, torch.zeros_like(layout.row_lengths), layout)


def tree_nodes(
    token_ids: Tensor, order: Tensor, shared: Tensor, firsts: Tensor, layout: Layout, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(M,) token ids, positions, parents, ends and counts, and the node of each token, shaped like ``token_ids``.

    ``firsts`` (N + 1,): the number of the first node that each row of ``order`` begins.
    """
    device, num_rows = token_ids.device, order.shape[0]
    ids = token_ids.new_empty(num_nodes)
    positions, parents, ends, counts = (torch.empty(num_nodes, dtype=torch.int64, device=device) for _ in range(4))
    nodes = torch.full(token_ids.shape, -1, dtype=torch.int64, device=device)
    if num_rows == 0 or token_ids.numel() == 0:
        return ids, positions, parents, ends, counts, nodes

    lengths = layout.row_lengths[order]
    bases = layout.row_starts[order]
    if token_ids.dim() == 2:
        bases = bases + order * token_ids.shape[1]
    flat_ids, flat_nodes = token_ids.reshape(-1), nodes.view(-1)
    places = torch.arange(num_rows, device=device)[:, None]
    # After the last row one that shares nothing, and begins where the nodes end.
    later = torch.arange(1, num_rows + 1, device=device)[:, None]
    next_shared = pad(shared[1:], (0, 1), value=-1)[:, None]
    width, is_short = int(lengths.max()), int(firsts[-1]) > num_nodes
    step = max(_CHUNK // num_rows, 1)
    for start in range(0, width, step):
        columns = torch.arange(start, min(start + step, width), device=device)
        # Both (N, columns): the row that began the node of a token, and the first later one that is not below it.
        begun = torch.where(shared[:, None] <= columns, places, 0).cummax(0).values
        ended = torch.where(next_shared <= columns, later, num_rows).flip(0).cummin(0).values.flip(0)
        number = firsts[begun] + columns - shared[begun]
        is_token = columns < lengths[:, None]
        flat_nodes[(bases[:, None] + columns)[is_token]] = number[is_token]
        is_own = is_token & (begun == places)
        own, place, column = number[is_own], places.expand_as(is_own)[is_own], columns.expand_as(is_own)[is_own]
        if is_short:
            keep = own < num_nodes
            own, place, column = own[keep], place[keep], column[keep]
        ids[own] = flat_ids[bases[place] + column]
        positions[own] = column
        parents[own] = own - 1
        after = ended[place, column - start]
        ends[own] = firsts[after]
        counts[own] = after - place
    # The first node of a row hangs on the path that the row shares.
    has_own = lengths > shared
    fork = torch.where(shared > 0, flat_nodes[(bases + shared - 1).clamp_min(0)], -1)
    own = firsts[:-1][has_own]
    keep = own < num_nodes
    parents[own[keep]] = fork[has_own][keep]
    return ids, positions, parents, ends, counts, nodes
