"""Tensors to lists, ``python_ref``, and back."""

import math

import torch
from torch import Tensor

import python_ref
from leafkernels._core.precision import compute_dtype
from leafkernels.reference._lists import live_rows


def surprisal_entropy(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``python_ref.surprisal_entropy``; arguments and results as the PyTorch implementation."""
    live = live_rows(mask, logits.shape[0])
    rows, tokens, temperatures = logits.tolist(), token_ids.tolist(), temperature.tolist()
    surprisals, entropies = python_ref.surprisal_entropy(
        [rows[i] for i in live], [tokens[i] for i in live], temperature=[temperatures[i] for i in live]
    )
    results = torch.zeros((4, logits.shape[0]), dtype=compute_dtype(logits.dtype))
    for i, surprisal, entropy in zip(live, surprisals, entropies, strict=True):
        # The top and log sum e^(x - top), which the gradient starts from, are surprisals as well: of the id at the top.
        top = max(rows[i], default=math.nan)
        at_top = rows[i].index(top) if rows[i] else 0
        log_total = python_ref.surprisal_entropy([rows[i]], [at_top], temperature=temperatures[i])[0][0]
        results[:, i] = torch.tensor([surprisal, entropy, top, log_total], dtype=results.dtype)
    return tuple(results.to(logits.device).unbind())  # type: ignore[return-value]


def surprisal_states(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See ``python_ref.surprisal_state``; arguments and results as the PyTorch implementation."""
    rows, tokens, temperatures = logits.tolist(), token_ids.tolist(), temperature.tolist()
    states = torch.zeros((3, len(rows), 1), dtype=compute_dtype(logits.dtype))
    states[0], states[1] = torch.finfo(states.dtype).min, -1.0
    picked = torch.full((len(rows),), torch.nan, dtype=states.dtype)
    for i in live_rows(mask, len(rows)):
        states[:, i, 0] = torch.tensor(python_ref.surprisal_state(rows[i], temperatures[i]), dtype=states.dtype)
        if 0 <= tokens[i] < len(rows[i]):
            picked[i] = rows[i][tokens[i]]
    states[0].clamp_min_(torch.finfo(states.dtype).min)  # a state of banned ids alone has -inf there
    return states.to(logits.device), picked.to(logits.device)


def merge_surprisal_states(
    states: Tensor, picked: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``python_ref.merge_surprisal_states``; arguments and results as the PyTorch implementation."""
    of_rows, ids, temperatures = states.permute(1, 2, 0).tolist(), picked.tolist(), temperature.tolist()
    results = torch.zeros((4, len(ids)), dtype=states.dtype)
    for i in live_rows(mask, len(ids)):
        merged = python_ref.merge_surprisal_states(of_rows[i], ids[i], temperatures[i])
        results[:, i] = torch.tensor(merged, dtype=states.dtype)
    return tuple(results.to(states.device).unbind())  # type: ignore[return-value]


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
    """See ``python_ref.surprisal_entropy_backward``; arguments as the PyTorch implementation.

    What is known of the whole rows is used, because only a slice of the vocabulary may be at hand.
    """
    rows, tokens, temperatures = logits.tolist(), token_ids.tolist(), temperature.tolist()
    of_surprisal = surprisal_gradients.tolist()
    of_entropy = [0.0] * len(rows) if entropy_gradients is None else entropy_gradients.tolist()
    of_rows = torch.stack((surprisal, entropy, tops, log_totals), dim=1).tolist()
    gradients.zero_()
    for i in live_rows(mask, len(rows)):
        (gradient,) = python_ref.surprisal_entropy_backward(
            [of_surprisal[i]],
            [of_entropy[i]],
            [rows[i]],
            [tokens[i]],
            temperature=temperatures[i],
            of_rows=[of_rows[i]],
        )
        if softcap is not None:
            gradient = [g * (1 - (x / softcap) ** 2) for g, x in zip(gradient, rows[i], strict=True)]
        gradients[i] = torch.tensor(gradient, dtype=gradients.dtype)
