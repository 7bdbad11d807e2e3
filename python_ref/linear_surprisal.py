"""Surprisal and entropy from hidden states: the logits as sums of products, then as from logits."""

import math
from collections.abc import Sequence

from python_ref.surprisal import surprisal_entropy, surprisal_entropy_backward

Matrix = Sequence[Sequence[float]]


def linear_surprisal_entropy(
    hidden: Matrix,
    lm_head_weight: Matrix,
    token_ids: Sequence[int],
    *,
    bias: Sequence[float] | None = None,
    temperature: float | Sequence[float] = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    sampling_mask: Sequence[Sequence[int]] | None = None,
) -> tuple[list[float], list[float]]:
    """Surprisal and entropy of each row's logits s (hidden . weight of an id + bias), capped at c as c tanh(x / c)."""
    logits = head_logits(hidden, lm_head_weight, bias, logit_scale, logit_softcap)
    return surprisal_entropy(logits, token_ids, temperature=temperature, sampling_mask=sampling_mask)


def linear_surprisal_entropy_backward(
    surprisal_gradients: Sequence[float],
    entropy_gradients: Sequence[float],
    hidden: Matrix,
    lm_head_weight: Matrix,
    token_ids: Sequence[int],
    *,
    bias: Sequence[float] | None = None,
    temperature: float | Sequence[float] = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    sampling_mask: Sequence[Sequence[int]] | None = None,
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """Gradients of the hidden states, the weight and the bias, from that of the logits."""
    logits = head_logits(hidden, lm_head_weight, bias, logit_scale, logit_softcap)
    grad_logits = surprisal_entropy_backward(
        surprisal_gradients,
        entropy_gradients,
        logits,
        token_ids,
        temperature=temperature,
        sampling_mask=sampling_mask,
    )
    return head_gradients(grad_logits, logits, hidden, lm_head_weight, logit_scale, logit_softcap)


def head_gradients(
    grad_logits: Matrix, logits: Matrix, hidden: Matrix, weight: Matrix, scale: float, softcap: float | None
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """Gradients of the hidden states, the weight and the bias, from that of the logits: d tanh = 1 - tanh^2."""
    if softcap is not None:
        grad_logits = [
            [g * (1 - (x / softcap) ** 2) for g, x in zip(gradients, row, strict=True)]
            for gradients, row in zip(grad_logits, logits, strict=True)
        ]
    grad_logits = [[scale * g for g in gradients] for gradients in grad_logits]
    width = range(len(weight[0]))
    grad_hidden = [
        [math.fsum(g * w[d] for g, w in zip(row, weight, strict=True)) for d in width] for row in grad_logits
    ]
    ids = range(len(weight))
    grad_weight = [
        [math.fsum(g[j] * h[d] for g, h in zip(grad_logits, hidden, strict=True)) for d in width] for j in ids
    ]
    return grad_hidden, grad_weight, [math.fsum(g[j] for g in grad_logits) for j in ids]


def head_logits(
    hidden: Matrix, weight: Matrix, bias: Sequence[float] | None, scale: float, softcap: float | None
) -> list[list[float]]:
    """s (hidden . weight of an id + bias), capped at c as c tanh(x / c)."""
    biases = [0.0] * len(weight) if bias is None else bias
    logits = [
        [
            scale * math.fsum([b, *(x * y for x, y in zip(h, w, strict=True))])
            for w, b in zip(weight, biases, strict=True)
        ]
        for h in hidden
    ]
    return logits if softcap is None else [[softcap * math.tanh(x / softcap) for x in row] for row in logits]
