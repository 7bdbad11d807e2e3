"""Surprisal and entropy over the vocabulary, a few rows at a time, so that what is in between stays in the cache.

See ``leafkernels.kernels.surprisal`` for the mathematics. Memory beside the results: one chunk of rows. Steps that make
or take booleans cost as much as an exponential here, so there are none over the vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from leafkernels._ops import compute_dtype

# Logits of a chunk: large enough that a step costs more than its call, small enough for the cache.
_CHUNK = 1 << 18

# e^-10,000 is 0 in every dtype, and 0 * -10,000 is 0, where 0 * -inf is not a number.
_FLOOR = -1e4


def _chunks(logits: Tensor, mask: Tensor | None) -> Iterator[slice | Tensor]:
    """Rows that count, a chunk at a time; masked ones are not read."""
    num_rows, vocab_size = logits.shape
    step = max(1, _CHUNK // max(vocab_size, 1))
    if mask is None:
        yield from (slice(start, start + step) for start in range(0, num_rows, step))
    else:
        yield from (rows for rows in mask.nonzero().squeeze(1).split(step) if rows.numel())


def surprisal_entropy(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Surprisal, entropy, and what the gradient needs (the top logit and log sum e^(x - top)), (N,) each.

    float32, or float64 for float64 logits; 0 in masked rows.
    """
    num_rows, vocab_size = logits.shape
    dtype = compute_dtype(logits)
    results = tuple(torch.full((num_rows,), torch.nan, dtype=dtype, device=logits.device) for _ in range(4))
    surprisal, entropy, tops, log_totals = results
    scale = temperature.to(dtype).reciprocal()
    for rows in _chunks(logits, mask) if vocab_size else ():
        x = logits[rows].to(dtype)
        top = x.amax(1, keepdim=True)
        z = (x - top).mul_(scale[rows, None]).clamp_min_(_FLOOR)
        e = z.exp()
        # 0 at the top and 1 below it: what is added there may be far below the rounding of 1.
        is_rest = (z * -torch.finfo(dtype).max).clamp_max_(1.0)
        ties = vocab_size - is_rest.sum(1)
        rest = e.mul_(is_rest).sum(1)
        log_total = ties.log() + (rest / ties).log1p_()
        is_bad = top.squeeze(1).isinf()
        entropy[rows] = (log_total - z.mul_(e).sum(1) / (ties + rest)).masked_fill_(is_bad, torch.nan)
        log_totals[rows] = log_total = log_total.masked_fill_(is_bad, torch.nan)
        tops[rows] = top = top.squeeze(1)

        tokens = token_ids[rows].to(torch.int64)
        in_row = (tokens >= 0) & (tokens < vocab_size)
        x_token = x.gather(1, tokens.clamp(0, vocab_size - 1)[:, None]).squeeze(1)
        surprisal[rows] = (log_total - (x_token - top) * scale[rows]).masked_fill_(~in_row, torch.nan)
    if mask is not None:
        for result in results:
            result.masked_fill_(~mask, 0.0)
    return surprisal, entropy, tops, log_totals


def surprisal_entropy_backward(
    surprisal_gradients: Tensor,
    entropy_gradients: Tensor | None,
    entropy: Tensor,
    tops: Tensor,
    log_totals: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Gradient of the logits (N, V) in their dtype; 0 in masked rows."""
    dtype = compute_dtype(logits)
    make = torch.empty if mask is None else torch.zeros
    gradients = make(logits.shape, dtype=logits.dtype, device=logits.device)
    vocab_size = logits.shape[1]
    scale = temperature.to(dtype).reciprocal()
    of_surprisal = surprisal_gradients.to(dtype) * scale
    of_entropy = None if entropy_gradients is None else entropy_gradients.to(dtype) * scale
    for rows in _chunks(logits, mask) if vocab_size else ():
        x = logits[rows].to(dtype)
        log_p = (x - tops[rows, None]).mul_(scale[rows, None]).sub_(log_totals[rows, None]).clamp_min_(_FLOOR)
        p = log_p.exp()
        gradient = p * of_surprisal[rows, None]
        tokens = token_ids[rows].to(torch.int64)
        in_row = (tokens >= 0) & (tokens < vocab_size)
        gradient.scatter_add_(1, tokens.clamp(0, vocab_size - 1)[:, None], -(of_surprisal[rows] * in_row)[:, None])
        if of_entropy is not None:
            gradient.sub_(log_p.add_(entropy[rows, None]).mul_(p).mul_(of_entropy[rows, None]))
        gradients[rows] = gradient.to(logits.dtype)
    return gradients
