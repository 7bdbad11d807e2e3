"""Weights of tokens by their entropy, from their definitions."""

import math
from collections.abc import Sequence


def stare_weights(
    advantages: Sequence[float],
    logprobs: Sequence[float],
    mask: Sequence[bool] | None = None,
    *,
    share: float = 0.1,
    up: float = 1.1,
    down: float = 1.0,
    entropy: Sequence[float] | None = None,
    target_entropy: float | None = None,
) -> list[float]:
    """``up`` for the most surprising share of the tokens of positive advantage, ``down`` for that of negative."""
    counted = [t for t in range(len(advantages)) if mask is None or mask[t]]
    weights = [1.0] * len(advantages)
    total = None if entropy is None else math.fsum(entropy[t] for t in counted)
    if total is not None and target_entropy is not None and total >= target_entropy * len(counted):
        return weights
    for sign, weight in ((1, up), (-1, down)):
        ranked = [t for t in counted if advantages[t] * sign > 0 and not math.isnan(logprobs[t])]
        ranked.sort(key=lambda t: logprobs[t])
        for t in ranked[: math.ceil(share * len(ranked) - 1e-9)]:
            weights[t] = weight
    return weights


def top_entropy_weights(
    entropy: Sequence[float], mask: Sequence[bool] | None = None, *, share: float = 0.2
) -> list[float]:
    """1 for the share of highest entropy, 0 for the rest."""
    ranked = [t for t in range(len(entropy)) if (mask is None or mask[t]) and not math.isnan(entropy[t])]
    ranked.sort(key=lambda t: -entropy[t])
    chosen = ranked[: math.ceil(share * len(ranked) - 1e-9)]
    return [1.0 if t in chosen else 0.0 for t in range(len(entropy))]


def entropy_weights(
    advantages: Sequence[float], entropy: Sequence[float], *, alpha: float = 0.4, kappa: float = 2.0
) -> list[float]:
    """(A + min(alpha H, |A| / kappa)) / A; 1 where A is 0."""
    return [(a + min(alpha * h, abs(a) / kappa)) / a if a else 1.0 for a, h in zip(advantages, entropy, strict=True)]
