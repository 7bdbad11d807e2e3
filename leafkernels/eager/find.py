"""First and last unmasked token of every row, from a running count over the storage of all rows.

Two questions answer it: how many are unmasked before a place, and where is the k-th. A count for each token answers
both at once. Of many tokens it would be larger than their mask by far: there, a count for 64 tokens, and a look at
these.
"""

import torch
from torch import Tensor

_BLOCK = 64
_MANY = 1 << 20  # tokens; below, a few calls less are worth more


def mask_stretches(mask: Tensor, slot_starts: Tensor, slot_ends: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) start in the row's storage and (N,) length; the start of the storage and 0 where nothing is unmasked."""
    flat = mask.reshape(-1)
    bounds = torch.stack([slot_starts, slot_ends])
    base = 0 if mask.dim() == 1 else torch.arange(mask.shape[0], device=mask.device) * mask.shape[1]
    if flat.shape[0] < _MANY:
        until = flat.cumsum(0, dtype=torch.int32)
        before, after = _until_before(until, bounds + base)
        first, last = torch.searchsorted(until, torch.stack([before + 1, after])) - base
    else:
        until = _block_counts(flat).cumsum(0)
        before, after = _count_before(flat, until, bounds + base)
        first, last = _place_of(flat, until, torch.stack([before + 1, after])) - base
    is_empty = after == before
    return torch.where(is_empty, slot_starts, first), (last + 1 - first).masked_fill_(is_empty, 0)


def _count(live: Tensor) -> Tensor:
    """How many of (..., 64) bool are True, (...) int64.

    A word holds eight of them: each byte of the sum of words counts to 8, and the product adds them in the highest.
    """
    return live.view(torch.int64).sum(-1).mul_(0x0101010101010101).bitwise_right_shift_(56)


def _block_counts(flat: Tensor) -> Tensor:
    """How many of each 64 entries of a bool (n,) are True, and last how many of the rest, (n // 64 + 1,) int64."""
    whole = flat.shape[0] // _BLOCK * _BLOCK
    if flat.storage_offset() % 8:
        flat = flat.clone()  # words begin at whole words
    return torch.cat([_count(flat[:whole].view(-1, _BLOCK)), flat[whole:].sum(0, keepdim=True)])


def _until_before(until: Tensor, place: Tensor) -> Tensor:
    """The count before entry ``place`` of the running count."""
    return until[(place - 1).clamp_min_(0)].masked_fill_(place == 0, 0)


def _window(flat: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Places of a block's entries, (..., 64), and what stands there; after the last entry, the last one."""
    places = (block * _BLOCK).unsqueeze(-1) + torch.arange(_BLOCK, device=flat.device)
    return places, flat[places.clamp_max(flat.shape[0] - 1)]


def _count_before(flat: Tensor, until: Tensor, place: Tensor) -> Tensor:
    block = place // _BLOCK
    places, live = _window(flat, block)
    return _until_before(until, block) + _count(live & (places < place.unsqueeze(-1)))


def _place_of(flat: Tensor, until: Tensor, count: Tensor) -> Tensor:
    """Where the ``count``-th True stands, from 1; anything where there are not so many."""
    block = torch.searchsorted(until, count).clamp_max_(until.shape[0] - 1)
    _, live = _window(flat, block)
    rank = (count - _until_before(until, block)).clamp_max_(_BLOCK + 1).to(torch.int8)
    return block * _BLOCK + _count(live.cumsum(-1, dtype=torch.int8) < rank.unsqueeze(-1))
