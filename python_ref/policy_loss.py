"""The clipped policy loss with per-token advantages, token by token."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from python_ref.values import mean

Table = Sequence[Sequence[float]]


def policy_loss(
    logprobs: Table,
    old_logprobs: Table,
    advantages: Table,
    response_mask: Sequence[Sequence[bool]],
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    max_log_ratio: float | None = None,
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
            token_loss = surrogate(log_ratio, advantages[i][t], clip, dual_clip, max_log_ratio)
            loss = token_loss.loss
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
            clipped.append(float(token_loss.is_clipped))
            moved.append(expm1(log_ratios[t]) - log_ratios[t])
            ratios.append(token_loss.ratio)
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


def policy_loss_backward(
    logprobs: Table,
    old_logprobs: Table,
    advantages: Table,
    response_mask: Sequence[Sequence[bool]],
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    max_log_ratio: float | None = None,
    ref_logprobs: Table | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    importance: str = "token",
    aggregate: str = "token_mean",
    constant: float | None = None,
) -> tuple[list[list[float]], list[list[float]]]:
    """The derivatives of the loss in each log-probability and in each entropy, 0 where the mask is False.

    With importance="sequence" the row's ratio is taken to move with the token's log-ratio (GSPO-token).
    """
    number = sum(map(sum, response_mask))
    rows_with_any = sum(map(any, response_mask))
    grad_logprobs, grad_entropies = [], []
    for i, mask in enumerate(response_mask):
        live = [t for t, m in enumerate(mask) if m]
        weight = {
            "token_mean": 1 / max(number, 1),
            "sequence_mean": 1 / (max(len(live), 1) * max(rows_with_any, 1)),
            "sum": 1.0,
            "constant": 1 / (constant or 1.0),
        }[aggregate]
        slopes = [0.0] * len(mask)
        for t in live:
            log_ratio = logprobs[i][t] - old_logprobs[i][t]
            if importance == "sequence":
                log_ratio = math.fsum(logprobs[i][u] - old_logprobs[i][u] for u in live) / len(live)
            slope = surrogate(log_ratio, advantages[i][t], clip, dual_clip, max_log_ratio).slope
            if ref_logprobs is not None and kl_coef != 0:
                slope -= kl_coef * expm1(ref_logprobs[i][t] - logprobs[i][t])
            slopes[t] = weight * slope
        grad_logprobs.append(slopes)
        grad_entropies.append([-weight * entropy_coef if m else 0.0 for m in mask])
    return grad_logprobs, grad_entropies


class Surrogate(NamedTuple):
    """What a token loses by its ratio, and the derivative of that in the log-ratio."""

    loss: float
    slope: float
    ratio: float
    is_clipped: bool


def surrogate(
    log_ratio: float,
    advantage: float,
    clip: tuple[float, float],
    dual_clip: float | None = None,
    max_log_ratio: float | None = None,
) -> Surrogate:
    """The clipped loss of one token, without KL and entropy."""
    moves = True
    if max_log_ratio is not None and abs(log_ratio) > max_log_ratio:
        log_ratio, moves = math.copysign(max_log_ratio, log_ratio), False
    ratio = exp(log_ratio)
    if advantage == 0 and not math.isnan(ratio):
        # Nothing is gained, also where the ratio is infinite.
        return Surrogate(0.0, 0.0, ratio, False)
    gain = ratio * advantage
    bounded = min(max(ratio, 1 - clip[0]), 1 + clip[1]) * advantage
    if bounded < gain:
        return Surrogate(-bounded, 0.0, ratio, True)
    if dual_clip is not None and advantage < 0 and gain < dual_clip * advantage:
        return Surrogate(-dual_clip * advantage, 0.0, ratio, True)
    return Surrogate(-gain, -gain if moves else 0.0, ratio, False)


def exp(x: float) -> float:
    """e^x, inf where it is too large for a float."""
    return math.exp(x) if not x > 709.7 else math.inf


def expm1(x: float) -> float:
    """e^x - 1, inf where it is too large for a float."""
    return math.expm1(x) if not x > 709.7 else math.inf
