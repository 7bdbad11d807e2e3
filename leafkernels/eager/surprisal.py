"""Surprisal and entropy over the vocabulary, a few rows at a time, so that what is in between stays in the cache.

See ``leafkernels.kernels.surprisal`` for the mathematics. Memory beside the results: one chunk of rows. Steps that make
or take booleans cost as much as an exponential here, so there are none over the vocabulary.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from leafkernels._core.precision import compute_dtype

# Logits of a chunk: large enough that a step costs more than its call, small enough for the cache.
_CHUNK = 1 << 18

# e^-10,000 is 0 in every dtype, and 0 * -10,000 is 0, where 0 * -inf is not a number.
_FLOOR = -1e4


def chunks(logits: Tensor, mask: Tensor | None) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """Rows that count, a chunk at a time; their logits, as computed with; and room for three more such tensors.

    Masked rows are not read. The room is the same for all chunks: memory that is given back after each comes from the
    system again, page by page, which takes as long as the exponentials.
    """
    num_rows, vocab_size = logits.shape
    dtype = compute_dtype(logits.dtype)
    step = max(1, min(_CHUNK // max(vocab_size, 1), num_rows))
    room = torch.empty((4, step, vocab_size), dtype=dtype, device=logits.device)
    live: Iterable[slice | Tensor]
    if mask is None:
        live = (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
    else:
        live = (_run(rows) for rows in mask.nonzero().squeeze(1).split(step) if rows.numel())
    for rows in live if vocab_size else ():
        x = logits[rows]
        of_chunk = room[:, : x.shape[0]]
        yield rows, x if x.dtype == dtype else of_chunk[3].copy_(x), of_chunk[:3]


def _run(rows: Tensor) -> slice | Tensor:
    """Ascending rows as a slice, which copies nothing, where they follow each other."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == rows.shape[0] else rows


def surprisal_states(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """State (4, N, 1) m, n, r, t of each row, and the logit of its id, (N,); NaN where the id lies outside.

    float32, or float64 for float64 logits; masked rows are not read and empty.
    """
    num_rows = logits.shape[0]
    dtype = compute_dtype(logits.dtype)
    states = torch.zeros((4, num_rows, 1), dtype=dtype, device=logits.device)
    states[0] = -torch.inf
    picked = torch.full((num_rows,), torch.nan, dtype=dtype, device=logits.device)
    scale = temperature.to(dtype).reciprocal()
    for rows, x, room in chunks(logits, mask):
        states[:, rows, 0] = fold(x, scale[rows], room)
        picked[rows] = pick(x, token_ids[rows])
    return states, picked


def fold(x: Tensor, scale: Tensor, room: Tensor) -> Tensor:
    """State (4, n) of whole rows ``x`` (n, V); ``room`` (3, n, V) is written over."""
    top = x.amax(1, keepdim=True)
    # Of banned ids only, nothing is known; -inf - -inf must not be asked for.
    z = torch.sub(x, top.clamp_min(torch.finfo(x.dtype).min), out=room[0])
    z.mul_(scale[:, None]).clamp_min_(_FLOOR)
    e = torch.exp(z, out=room[1])
    # 0 at the top and 1 below it: what is added there may be far below the rounding of 1.
    is_rest = torch.mul(z, -torch.finfo(x.dtype).max, out=room[2]).clamp_max_(1.0)
    ties = x.shape[1] - is_rest.sum(1)
    rest = e.mul_(is_rest).sum(1)
    return torch.stack((top.squeeze(1), ties, rest, z.mul_(e).sum(1)))


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
    """What ``surprisal_entropy`` gives, from any number of partial states of each row, (4, N, states)."""
    scale = temperature.to(states.dtype).reciprocal()
    if states.shape[2] == 1:
        top, ties, rest, moment = states.squeeze(2)
    else:
        top = states[0].amax(1)
        ties, rest, moment = surprisal_sums(states, top, temperature)
    is_bad = top.isinf()
    log_total = (ties.log() + (rest / ties).log1p_()).masked_fill_(is_bad, torch.nan)
    entropy = log_total - moment / (ties + rest)
    surprisal = log_total - (picked - top) * scale
    results = surprisal, entropy, top, log_total
    return results if mask is None else tuple(result.masked_fill(~mask, 0.0) for result in results)


def surprisal_sums(states: Tensor, tops: Tensor, temperature: Tensor) -> Tensor:
    """n, r, t (3, N) of rows whose top logit is ``tops`` (N,), as far as partial states (4, N, states) of them go."""
    m, n, r, t = states
    scale = temperature.to(states.dtype).reciprocal()
    drop = ((m - tops[:, None]) * scale[:, None]).clamp_min(_FLOOR)
    fade = drop.exp()
    # At the top nothing fades, and what was at the top of a lower part is among the rest now.
    below = torch.where(m == tops[:, None], 0.0, n)
    return torch.stack((n - below, fade * (r + below), fade * (t + drop * (r + below)))).sum(2)


def surprisal_entropy_backward(
    gradients: Tensor,
    surprisal_gradients: Tensor,
    entropy_gradients: Tensor | None,
    surprisal: Tensor,
    entropy: Tensor,
    tops: Tensor,
    log_totals: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
) -> None:
    """Write the gradient of the logits, 0 in masked rows, into ``gradients`` (N, V), which may be ``logits``."""
    dtype = compute_dtype(logits.dtype)
    scale = temperature.to(dtype).reciprocal()
    of_surprisal = surprisal_gradients.to(dtype) * scale
    of_entropy = None if entropy_gradients is None else entropy_gradients.to(dtype) * scale
    for rows, x, room in chunks(logits, mask):
        gradient = logit_gradient(
            x,
            token_ids[rows],
            tops[rows],
            log_totals[rows],
            entropy[rows],
            of_surprisal[rows],
            None if of_entropy is None else of_entropy[rows],
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
    tops: Tensor,
    log_totals: Tensor,
    entropy: Tensor,
    of_surprisal: Tensor,
    of_entropy: Tensor | None,
    scale: Tensor,
    room: Tensor,
) -> Tensor:
    """Gradient of whole rows from those of their surprisal and entropy, already over the temperature.

    It lies in ``room[0]``; all of ``room`` (3, n, V) is written over.
    """
    log_p = torch.sub(x, tops[:, None], out=room[1])
    log_p.mul_(scale[:, None]).sub_(log_totals[:, None]).clamp_min_(_FLOOR)
    p = torch.exp(log_p, out=room[2])
    gradient = torch.mul(p, of_surprisal[:, None], out=room[0])
    tokens = token_ids.to(torch.int64)
    in_row = (tokens >= 0) & (tokens < x.shape[1])
    gradient.scatter_add_(1, tokens.clamp(0, x.shape[1] - 1)[:, None], -(of_surprisal * in_row)[:, None])
    if of_entropy is not None:
        gradient.sub_(log_p.add_(entropy[:, None]).mul_(p).mul_(of_entropy[:, None]))
    return gradient
