"""Prompts whose rollouts were all given the same reward."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from leafkernels._core.checks import check_mask, check_rewards, check_tensor
from leafkernels._core.precision import is_rounding
from leafkernels.losses.tokens import count_tokens, spread_rows
from leafkernels.rows.find import find_rows


class DroppedEqual(NamedTuple):
    """A mask without the rows of prompts whose rewards are all equal, and how many there were."""

    response_mask: Tensor
    """bool, for a loss: what is left out of it is in no mean and no KL."""
    dropped_rows: Tensor
    """int64: rows that had a token, and have none now."""
    dropped_prompts: Tensor
    """int64: prompts with such a row."""


@torch.no_grad()
def drop_equal(
    response_mask: Tensor,
    rewards: Tensor,
    *,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> DroppedEqual:
    """Leave the rows of prompts out whose rewards are all equal: their credit is 0, and a mean is diluted by them.

    Equal are those that the estimators take for equal: also where they differ by rounding alone, as sums in float32 do.
    A loss that averages then counts the other rows alone, and adds no KL for these; DAPO (arXiv 2503.14476) samples
    others in their place. A row whose reward is NaN is not scored, and does not count; a prompt of which no row is
    scored is dropped too. Nothing is read back to the host.

    Args:
        response_mask: (N, T), (prompts, rows, T), or (total,) with ``cu_seqlens``; nonzero where a token counts.
        rewards: one for each row.
        groups, group_size, cu_seqlens: which rows are a prompt, as in ``span_advantages``.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.

    Example:
        >>> mask, rewards = torch.ones(4, 2), torch.tensor([1.0, 1.0, 0.0, 1.0])
        >>> found = leafkernels.drop_equal(mask, rewards, group_size=2)
        >>> found.response_mask[:, 0], found.dropped_rows, found.dropped_prompts
        (tensor([False, False,  True,  True]), tensor(2), tensor(1))
    """
    check_tensor("response_mask", response_mask)
    shape, device = response_mask.shape, response_mask.device
    mask = cast(Tensor, check_mask(response_mask, "response_mask", shape, device))
    rows = find_rows("response_mask", response_mask, None, groups, group_size, cu_seqlens)
    values: Any = check_rewards(rewards, "response_mask", rows.row_shape, device, tuple(shape)).double()
    names, num_groups = rows.layout.group_of_row, rows.layout.group_starts.shape[0] - 1
    is_scored = ~values.isnan()
    bounds = []
    for fill, how in ((torch.inf, "amin"), (-torch.inf, "amax")):
        start = torch.full((num_groups,), fill, dtype=torch.float64, device=device)
        bounds.append(start.scatter_reduce(0, names, values.masked_fill(~is_scored, fill), how))
    # Of a prompt without a scored row the least is above the most; infinite ones that are equal have no spread.
    is_equal = (bounds[0] >= bounds[1]) | is_rounding(*bounds)
    drops = is_equal[names]
    if cu_seqlens is None:
        kept = mask & ~drops.reshape(shape[:-1])[..., None]
    else:
        kept = mask & ~spread_rows(drops, cu_seqlens, shape[0])
    rows_of_mask = mask.flatten(0, -2) if mask.dim() > 2 else mask
    dropped = drops & (count_tokens(rows_of_mask, cu_seqlens) > 0)
    prompts = torch.zeros(num_groups, dtype=torch.int64, device=device).scatter_reduce(0, names, dropped.long(), "amax")
    return DroppedEqual(kept, dropped.sum(), prompts.sum())
