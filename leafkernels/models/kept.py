"""A sampling mask of rows on the tree of their prefixes: what follows a prefix was sampled from one distribution."""

from typing import NamedTuple

import torch
from torch import Tensor

from leafkernels.models.batch import TreeBatch
from leafkernels.vocabulary.sampling_mask import SamplingMask, check_sampling_mask, rows_of

# Larger than the ids of any vocabulary, and small enough for a cell beside it in int64.
_IDS = 1 << 31


class KeptOfTree(NamedTuple):
    """The kept ids that follow each prefix, of all rows that have it."""

    mask: SamplingMask  # over cells: the place of a prefix's last token, in the first row that has it
    cells: Tensor  # (n, L) int64: the cell of the prefix before each token of the rows
    num_unions: Tensor  # () int64: prefixes whose rows have kept different ids


def kept_of_tree(mask: SamplingMask, batch: TreeBatch) -> KeptOfTree:
    """From a mask of (N, T) tokens as the caller has them; how many ids that makes is read back.

    Rows that have a prefix in common share the union of what they kept behind it.
    """
    rows, order, starts, _, shape = batch
    device = rows.ids.device
    checked = check_sampling_mask(mask, shape.numel(), device)
    count, length = rows.ids.shape
    columns, numbers = torch.arange(length, device=device), torch.arange(count, device=device)
    shared = torch.tensor(rows.shared, device=device, dtype=torch.int64)
    # Rows lie in depth-first order: the first that has a prefix is the last, up to here, that did not share it.
    owner = torch.where(shared[:, None] <= columns, numbers[:, None], 0).cummax(0).values if count else rows.ids
    cells = torch.nn.functional.pad(owner * length + columns, (1, 0))[:, :-1]

    place = torch.full((shape[0] + 1,), -1, dtype=torch.int64, device=device)
    place[order] = numbers
    flat, ids = rows_of(checked).clamp(0, max(shape.numel(), 1)), checked.token_ids.to(torch.int64)
    row = place[flat // max(shape[1], 1)] if count else torch.full_like(flat, -1)
    column = flat % max(shape[1], 1) - (starts[row] if count else 0)
    is_there = (row >= 0) & (column >= 1) & (column < length) & (ids >= 0) & (ids < _IDS)
    row, column, ids = row[is_there], column[is_there], ids[is_there]
    is_asked = rows.scored[row, column]
    row, column, ids = row[is_asked], column[is_asked], ids[is_asked]
    cell = cells[row, column]
    keys = (cell * _IDS + ids).unique()
    every = torch.arange(count * length + 1, device=device)
    joined = SamplingMask(keys % _IDS, torch.searchsorted(keys, every * _IDS))
    # Each row's own ids, once each, beside those of all.
    own = ((row * length + column) * _IDS + ids).unique() // _IDS
    tokens, counts = own.unique_consecutive(return_counts=True)
    of_token = cells.flatten()[tokens]
    is_less = counts < joined.offsets.diff()[of_token]
    return KeptOfTree(joined, cells, torch.zeros_like(every).index_fill_(0, of_token[is_less], 1).sum())
