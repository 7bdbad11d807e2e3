"""Surprisal and entropy over the vocabulary, a few rows at a time, so that what is in between stays in the cache.

See ``leafkernels.kernels.surprisal`` for the mathematics. Memory beside the results: one chunk of rows. Steps that make
or take booleans cost as much as an exponential here, so there are none over the vocabulary.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leafkernels._core.precision import compute_dtype

if TYPE_CHECKING:
    from leafkernels.vocabulary.inputs import RowStatistics, SampledTokens

# Logits of a chunk: large enough that a step costs more than its call, small enough for the cache.
_CHUNK = 1 << 18

# e^-10,000 is 0 in every dtype, and 0 * -10,000 is 0, where 0 * -inf is not a number.
_FLOOR = -1e4


def chunks(logits: Tensor, mask: Tensor | None) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """Rows that count, a chunk at a time; their logits in the dtype of computing; scratch for two more such tensors.

    Masked rows are not read. All chunks share the scratch: memory given back after each comes from the system again,
    page by page, which takes as long as the exponentials.
    """
    num_rows, vocab_size = logits.shape
    dtype = compute_dtype(logits.dtype)
    step = max(1, min(_CHUNK // max(vocab_size, 1), num_rows))
    room = torch.empty((3, step, vocab_size), dtype=dtype, device=logits.device)
    live: Iterable[slice | Tensor]
    if mask is None:
        live = (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
    else:
        live = (_run(rows) for rows in mask.nonzero().squeeze(1).split(step) if rows.numel())
    for rows in live if vocab_size else ():
        x = logits[rows]
        chunk_room = room[:, : x.shape[0]]
        yield rows, x if x.dtype == dtype else chunk_room[2].copy_(x), chunk_room[:2]


def _run(rows: Tensor) -> slice | Tensor:
    """Ascending rows as a slice, which copies nothing, where they follow each other."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == rows.shape[0] else rows


def surprisal_states(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """State (3, N, 1) m, r, t of each row, and the logit of its id, (N,); NaN where the id lies outside.

    float32, or float64 for float64 logits; masked rows are not read and empty.
    """
    num_rows = logits.shape[0]
    dtype = compute_dtype(logits.dtype)
    states = torch.zeros((3, num_rows, 1), dtype=dtype, device=logits.device)
    states[0], states[1] = torch.finfo(dtype).min, -1.0
    picked = torch.full((num_rows,), torch.nan, dtype=dtype, device=logits.device)
    scale = temperature.to(dtype).reciprocal()
    for rows, x, room in chunks(logits, mask):
        states[:, rows, 0] = fold(x, scale[rows], room)
        picked[rows] = pick(x, token_ids[rows])
    return states, picked


def fold(x: Tensor, scale: Tensor, room: Tensor) -> Tensor:
    """State (3, n) of whole rows ``x`` (n, V); ``room`` (2, n, V) is scratch."""
    top, at = x.max(1, keepdim=True)
    m = top.clamp_min(torch.finfo(x.dtype).min)
    z = torch.sub(x, m, out=room[0])
    z.mul_(scale[:, None]).clamp_min_(_FLOOR)
    e = torch.exp(z, out=room[1])
    t = z.mul_(e).sum(1) / scale
    # One logit at the top is left out: what stands beside it may be far below the rounding of 1.
    r = e.scatter_(1, at, 0.0).sum(1)
    return torch.stack((m.squeeze(1), r.masked_fill_(top.squeeze(1) == -torch.inf, -1.0), t))


def pick(x: Tensor, token_ids: Tensor) -> Tensor:
    """The logits of the sampled ids, NaN for ids outside of the rows."""
    tokens = token_ids.to(torch.int64)
    in_row = (tokens >= 0) & (tokens < x.shape[1])
    picked = x.gather(1, tokens.clamp(0, x.shape[1] - 1)[:, None]).squeeze(1)
    return picked.masked_fill_(~in_row, torch.nan)


def surprisal_entropy(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Surprisal, entropy, and what the gradient needs (the top logit and log sum e^(x - top)), (N,) each.

    float32, or float64 for float64 logits; 0 in masked rows.
    """
    states, picked = surprisal_states(logits, token_ids, temperature, mask)
    return merge_surprisal_states(states, picked, temperature, mask)


def merge_surprisal_states(
    states: Tensor, picked: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``surprisal_entropy`` gives, from any number of partial states of each row, (3, N, states)."""
    scale = temperature.to(states.dtype).reciprocal()
    top = states[0].amax(1)
    ones, r, t = surprisal_sums(states, top, temperature)
    r += ones - 1.0
    log_total = r.log1p().masked_fill_((r < 0) | ~top.isfinite(), torch.nan)
    entropy = log_total - t * scale / (1.0 + r)
    surprisal = log_total - (picked - top) * scale
    results = surprisal, entropy, top, log_total
    if mask is not None:
        for result in results:
            result.masked_fill_(~mask, 0.0)
    return results


def surprisal_sums(states: Tensor, tops: Tensor, temperature: Tensor) -> Tensor:
    """The sums of the rule of merging (3, N), counted from ``tops`` (N,), over partial states (3, N, states):

    how many lie at the top, all that counts beside the one that each of these leaves out, and t.
    """
    m, r, t = states
    scale = temperature.to(states.dtype).reciprocal()[:, None]
    drop = (m - tops[:, None]).mul_(scale).clamp_min_(_FLOOR)
    fade = drop.exp()
    is_top = m == tops[:, None]
    beside = torch.where(is_top, r, fade * (1.0 + r))
    return torch.stack((is_top.to(r.dtype), beside, fade * (t + drop / scale * (1.0 + r)))).sum(2)


def write_gradients(
    gradients: Tensor,
    logits: Tensor,
    grad_surprisal: Tensor,
    grad_entropy: Tensor | None,
    statistics: "RowStatistics",
    tokens: "SampledTokens",
    softcap: float | None = None,
) -> None:
    """Write the gradient of the logits, 0 in masked rows, into ``gradients`` (N, V), which may be ``logits``.

    With ``softcap`` the logits were capped, and it is the gradient of what they were before.
    """
    token_ids, temperature, mask = tokens
    dtype = compute_dtype(logits.dtype)
    scale = temperature.to(dtype).reciprocal()
    grad_surprisal = grad_surprisal.to(dtype)
    grad_entropy = None if grad_entropy is None else grad_entropy.to(dtype)
    for rows, x, room in chunks(logits, mask):
        gradient = logit_gradient(
            x,
            token_ids[rows],
            statistics.surprisal[rows],
            statistics.entropy[rows],
            statistics.top[rows],
            statistics.log_total[rows],
            grad_surprisal[rows],
            None if grad_entropy is None else grad_entropy[rows],
            scale[rows],
            room,
        )
        if softcap is not None:
            gradient.mul_(torch.div(x, softcap, out=room[1]).square_().neg_().add_(1.0))
        gradients[rows] = gradient.to(gradients.dtype)
    if mask is not None:
        gradients.masked_fill_(~mask[:, None], 0.0)


def logit_gradient(
    x: Tensor,
    token_ids: Tensor,
    surprisal: Tensor,
    entropy: Tensor,
    tops: Tensor,
    log_totals: Tensor,
    grad_surprisal: Tensor,
    grad_entropy: Tensor | None,
    scale: Tensor,
    room: Tensor,
) -> Tensor:
    """Gradient of whole rows from those of their surprisal and entropy; in ``room[0]``, and all of it is written over.

    The ids are those of the whole vocabulary, of which ``x`` may be a slice.
    """
    # An id outside of the vocabulary has no surprisal, and a loss that counts it no gradient.
    grad_surprisal = torch.where(surprisal.isnan() & (grad_surprisal != 0), surprisal, grad_surprisal) * scale
    grad_entropy = None if grad_entropy is None else grad_entropy * scale
    gradient = torch.sub(x, tops[:, None], out=room[0])
    gradient.mul_(scale[:, None]).clamp_min_(_FLOOR)
    p = torch.sub(gradient, log_totals[:, None], out=room[1]).exp_()
    at_token = grad_surprisal * (-surprisal).expm1()
    if grad_entropy is None:
        torch.mul(p, grad_surprisal[:, None], out=gradient)
    else:
        a = grad_surprisal + grad_entropy * (log_totals - entropy)
        gradient.mul_(-grad_entropy[:, None]).add_(a[:, None]).mul_(p)
        p_token = (-surprisal).exp()
        at_token += (grad_entropy * p_token * (surprisal - entropy)).masked_fill_(p_token == 0, 0.0)
    tokens = token_ids.to(torch.int64)[:, None]
    in_row = (tokens >= 0) & (tokens < x.shape[1])
    tokens = tokens.clamp(0, x.shape[1] - 1)
    return gradient.scatter_(1, tokens, torch.where(in_row, at_token[:, None], gradient.gather(1, tokens)))
