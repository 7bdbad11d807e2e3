"""Kept ids by PyTorch: ragged rows of like length side by side, filled up with -inf, and folded as whole rows are.

What is not needed of a list stands at its end; how much that is is read back.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leafkernels._core.precision import compute_dtype
from leafkernels.eager.surprisal import fold, logit_gradient, merge_surprisal_states

if TYPE_CHECKING:
    from leafkernels.vocabulary.inputs import RowStatistics
    from leafkernels.vocabulary.sampling_mask import Kept

# Numbers at a time: enough for a step to cost more than its call, few enough for the cache.
_CHUNK = 1 << 18


def _like_rows(offsets: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows that have ids, longest first: their numbers (n,), where their ids stand (n, k), and which there are.

    Beyond its last id a row shows that one again.
    """
    lengths = offsets.diff()
    order = lengths.argsort(descending=True, stable=True)[: int((lengths > 0).sum())]
    start = 0
    while start < order.shape[0]:
        longest = int(lengths[order[start]])
        rows = order[start : start + max(1, _CHUNK // max(longest * width, 1))]
        column = torch.arange(longest, device=offsets.device)
        at = torch.minimum(offsets[rows, None] + column, offsets[rows + 1, None] - 1)
        yield rows, at, column < lengths[rows, None]
        start += rows.shape[0]


def kept_statistics(
    values: Tensor, offsets: Tensor, sampled: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Surprisal, entropy, and what the gradient needs, (N,) each, from logits (M,); 0 in rows without ids."""
    results = values.new_zeros((4, sampled.shape[0]))
    scale = temperature.to(values.dtype).reciprocal()
    for rows, at, is_kept in _like_rows(offsets, 1):
        x = values[at].masked_fill_(~is_kept, -torch.inf)
        states = fold(x, scale[rows], x.new_empty((2, *x.shape)))
        place = sampled[rows]
        picked = values[place.clamp_min(0)].masked_fill_(place < 0, torch.nan)
        results[:, rows] = torch.stack(merge_surprisal_states(states.unsqueeze(2), picked, temperature[rows], None))
    surprisal, entropy, top, log_total = (result.clone() for result in results)
    return surprisal, entropy, top, log_total


def kept_statistics_backward(
    grad_surprisal: Tensor,
    grad_entropy: Tensor | None,
    statistics: "RowStatistics",
    values: Tensor,
    offsets: Tensor,
    sampled: Tensor,
    temperature: Tensor,
) -> Tensor:
    """The gradient (M,) of the logits, 0 behind those of the last row."""
    gradients = torch.zeros_like(values)
    scale = temperature.to(values.dtype).reciprocal()
    grad_surprisal = grad_surprisal.to(values.dtype)
    grad_entropy = None if grad_entropy is None else grad_entropy.to(values.dtype)
    for rows, at, is_kept in _like_rows(offsets, 1):
        x = values[at].masked_fill_(~is_kept, -torch.inf)
        gradient = logit_gradient(
            x,
            torch.where(sampled[rows] < 0, -1, sampled[rows] - offsets[rows]),
            statistics.surprisal[rows],
            statistics.entropy[rows],
            statistics.top[rows],
            statistics.log_total[rows],
            grad_surprisal[rows],
            None if grad_entropy is None else grad_entropy[rows],
            scale[rows],
            x.new_empty((2, *x.shape)),
        )
        gradients[at[is_kept]] = gradient[is_kept]
    return gradients


def kept_products(hidden: Tensor, weight: Tensor, kept: "Kept") -> Tensor:
    """hidden of a row . weight of an id, (M,), summed in float32 (float64 for float64); 0 behind the last row."""
    dtype = compute_dtype(hidden.dtype)
    products = torch.zeros(kept.ids.shape, dtype=dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, at, is_kept in _like_rows(kept.offsets, hidden.shape[1]):
            taken = weight[kept.ids[at]].to(hidden.dtype).to(dtype)
            found = torch.bmm(taken, hidden[rows, :, None].to(dtype)).squeeze(2)
            products[at[is_kept]] = found[is_kept]
    return products


def add_hidden_gradient(gradients: Tensor, grad_products: Tensor, hidden: Tensor, weight: Tensor, kept: "Kept") -> None:
    """Add to ``gradients`` (N, D) of each row the sum of gradient times weight over its ids."""
    dtype = grad_products.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, at, is_kept in _like_rows(kept.offsets, hidden.shape[1]):
            taken = weight[kept.ids[at]].to(hidden.dtype).to(dtype)
            factors = grad_products[at].masked_fill_(~is_kept, 0.0)
            gradients[rows] += torch.bmm(factors[:, None], taken).squeeze(1).to(gradients.dtype)


def add_weight_gradient(gradients: Tensor, grad_products: Tensor, hidden: Tensor, kept: "Kept") -> None:
    """Add to ``gradients`` (V, D) of each id the sum of gradient times hidden state over its rows, in their order.

    Sums of stretches of equal ids: no atomic addition, the same bits every time.
    """
    dtype, width = grad_products.dtype, hidden.shape[1]
    ids, order = kept.ids[: int(kept.offsets[-1])].sort(stable=True)
    found, place = ids.unique_consecutive(return_inverse=True)
    # Sums of half precision are rounded once.
    is_exact = gradients.dtype == dtype
    total = gradients if is_exact else torch.zeros((found.shape[0], width), dtype=dtype, device=hidden.device)
    step = max(1, _CHUNK // max(width, 1))
    for rows, at in zip((ids if is_exact else place).split(step), order.split(step), strict=True):
        terms = hidden[kept.rows[at]].to(dtype).mul_(grad_products[at, None])
        ids_here, counts = rows.unique_consecutive(return_counts=True)
        # Each id once, so that the order in which entries are added does not matter.
        total.index_add_(0, ids_here, torch.segment_reduce(terms, "sum", lengths=counts, unsafe=True))
    if not is_exact:
        gradients[found] += total.to(gradients.dtype)
