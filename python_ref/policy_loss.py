"""The clipped policy loss with per-token advantages, token by token."""

import math
from collections.abc import Sequence

from python_ref.values import mean

Table = Sequence[Sequence[float]]


def policy_loss(
    logprobs: Table,
    old_logprobs: Table,
    advantages: Table,
    response_mask: Sequence[Sequence[bool]],
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    ref_logprobs: Table | None = None,
    kl_coef: float = 0.0,
    entropy: Table | None = None,
    entropy_coef: float = 0.0,
    importance: str = "token",
    aggregate: str = "token_mean",
    constant: float | None = None,
) -> dict[str, float]:
    """The loss and its statistics; see ``leafkernels.policy_loss`` for the definitions."""
    rows: list[list[float]] = []
    clipped, moved, ratios, kls, entropies = [], [], [], [], []
    for i, mask in enumerate(response_mask):
        live = [t for t, m in enumerate(mask) if m]
        log_ratios = {t: logprobs[i][t] - old_logprobs[i][t] for t in live}
        losses = []
        for t in live:
            log_ratio = log_ratios[t]
            if importance == "sequence":
                log_ratio = math.fsum(log_ratios.values()) / len(live)
            ratio = exp(log_ratio)
            gain, bounded_gain = gains(ratio, advantages[i][t], clip)
            loss = -min(gain, bounded_gain)
            if ref_logprobs is not None:
                distance = ref_logprobs[i][t] - logprobs[i][t]
                kls.append(expm1(distance) - distance)
                # Without a weight it is a statistic: 0 * inf would be NaN.
                if kl_coef != 0:
                    loss += kl_coef * kls[-1]
            if entropy is not None:
                entropies.append(entropy[i][t])
                if entropy_coef != 0:
                    loss -= entropy_coef * entropy[i][t]
            losses.append(loss)
            clipped.append(float(bounded_gain < gain))
            moved.append(expm1(log_ratios[t]) - log_ratios[t])
            ratios.append(ratio)
        rows.append(losses)

    tokens = [loss for losses in rows for loss in losses]
    if aggregate == "token_mean":
        total = mean(tokens)
    elif aggregate == "sequence_mean":
        total = mean([mean(losses) for losses in rows if losses])
    elif constant is None:
        total = math.fsum(tokens)
    else:
        total = math.fsum(tokens) / constant
    return {
        "loss": total,
        "clip_fraction": mean(clipped),
        "approx_kl": mean(moved),
        "mean_ratio": mean(ratios),
        "mean_kl": mean(kls),
        "mean_entropy": mean(entropies),
    }


def exp(x: float) -> float:
    """e^x, inf where it is too large for a float."""
    return math.exp(x) if not x > 709.7 else math.inf


def expm1(x: float) -> float:
    """e^x - 1, inf where it is too large for a float."""
    return math.expm1(x) if not x > 709.7 else math.inf


def gains(ratio: float, advantage: float, clip: tuple[float, float]) -> tuple[float, float]:
    """The advantage times the ratio, and times the ratio within the clip range; an advantage of 0 gains nothing."""
    if advantage == 0 and not math.isnan(ratio):
        return 0.0, 0.0
    return ratio * advantage, min(max(ratio, 1 - clip[0]), 1 + clip[1]) * advantage
