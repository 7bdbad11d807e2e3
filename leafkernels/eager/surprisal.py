"""Surprisal and entropy over the vocabulary, a few rows at a time, so that what is in between stays in the cache.

See ``leafkernels.kernels.surprisal`` for the mathematics. Memory beside the results: one chunk of rows.
"""

import torch
from torch import Tensor

# Logits of a chunk: large enough that a step costs more than its call, small enough for the cache.
_CHUNK = 1 << 18


def _chunks(logits: Tensor) -> list[slice]:
    num_rows, vocab_size = logits.shape
    rows = max(1, _CHUNK // max(vocab_size, 1))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def surprisal_entropy(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Surprisal, entropy, and what the gradient needs (the top logit and log sum e^(x - top)), (N,) each.

    float32, or float64 for float64 logits; 0 in masked rows.
    """
    num_rows, vocab_size = logits.shape
    dtype = _compute_dtype(logits)
    surprisal, entropy, tops, log_totals = (
        torch.full((num_rows,), torch.nan, dtype=dtype, device=logits.device) for _ in range(4)
    )
    scale = temperature.to(dtype).reciprocal()
    for rows in _chunks(logits) if vocab_size else []:
        x = logits[rows].to(dtype)
        top = x.amax(1, keepdim=True)
        is_top = x == top
        # A copy of our own, whatever the dtype was: the steps below write in place.
        z = (x - top).mul_(scale[rows, None])
        e = z.exp()
        e.masked_fill_(is_top, 0.0)
        ties = is_top.sum(1)
        rest = e.sum(1)
        log_total = ties.to(dtype).log_() + (rest / ties).log1p_()
        # A banned id adds 0, not -inf * 0.
        t = z.masked_fill_(x == -torch.inf, 0.0).mul_(e).sum(1)
        is_bad = top.squeeze(1).isinf()
        entropy[rows] = (log_total - t / (ties + rest)).masked_fill_(is_bad, torch.nan)
        log_totals[rows] = log_total.masked_fill_(is_bad, torch.nan)
        tops[rows] = top.squeeze(1)

    if vocab_size:
        in_row = (token_ids >= 0) & (token_ids < vocab_size)
        x_token = logits.gather(1, token_ids.to(torch.int64).clamp(0, vocab_size - 1)[:, None]).squeeze(1).to(dtype)
        surprisal = (log_totals - (x_token - tops) * scale).masked_fill_(~in_row, torch.nan)
    if mask is not None:
        for result in (surprisal, entropy, tops, log_totals):
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
    dtype = _compute_dtype(logits)
    gradients = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    vocab_size = logits.shape[1]
    if not gradients.numel():
        return gradients
    scale = temperature.to(dtype).reciprocal()
    of_surprisal = surprisal_gradients.to(dtype) * scale
    of_entropy = None if entropy_gradients is None else entropy_gradients.to(dtype) * scale
    in_row = (token_ids >= 0) & (token_ids < vocab_size)
    tokens = token_ids.to(torch.int64).clamp(0, vocab_size - 1)[:, None]
    for rows in _chunks(logits):
        x = logits[rows].to(dtype)
        log_p = (x - tops[rows, None]).mul_(scale[rows, None]).sub_(log_totals[rows, None])
        p = log_p.exp()
        gradient = p * of_surprisal[rows, None]
        gradient.scatter_add_(1, tokens[rows], -(of_surprisal[rows] * in_row[rows])[:, None])
        if of_entropy is not None:
            # p log p is 0 for a banned id, not 0 * -inf.
            term = log_p.add_(entropy[rows, None]).mul_(p).masked_fill_(x == -torch.inf, 0.0)
            gradient.sub_(term.mul_(of_entropy[rows, None]))
        if mask is not None:
            gradient.masked_fill_(~mask[rows, None], 0.0)
        gradients[rows] = gradient.to(logits.dtype)
    return gradients
