"""The policy losses with one advantage for each token, token by token."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from python_ref.values import mean, total

Table = Sequence[Sequence[float]]

# What a kind reads beside the numbers of a token, and its papers' defaults.
KINDS: dict[str, dict[str, Any]] = {
    "clip": {"clip": (0.2, 0.2), "dual_clip": None},
    "cispo": {"clip": (1.0, 4.0)},
    "sapo": {"tau": (1.0, 1.05)},
    "vespo": {"shape": (2.0, 3.0), "shape_negative": (3.0, 2.0)},
    "gmpo": {"clip": (0.4, 0.4)},
    "dppo_tv": {"clip": (0.15, 0.15), "max_ratio": 20.0},
    "dppo_kl": {"clip": (0.05, 0.05), "max_ratio": 20.0},
    "dro": {"beta": 1.0},
    "reinforce": {},
    "clip_cov": {"clip": (0.2, 0.2), "dual_clip": None, "share": 2e-4, "covariance": (1.0, 5.0)},
    "kl_cov": {"share": 2e-4, "penalty": 1.0},
    "fipo": {"clip": (0.2, 0.2), "dual_clip": None, "half_life": 32.0, "future_clip": (0.0, 0.2)},
}


class Token(NamedTuple):
    """What a token loses, the derivative of that in its log-probability, and what the statistics are of."""

    loss: float
    slope: float
    ratio: float
    is_clipped: bool
    kl: float
    moved: float


def policy_loss(
    logprobs: Table,
    old_logprobs: Table,
    advantages: Table,
    response_mask: Sequence[Sequence[bool]],
    *,
    entropy: Table | None = None,
    entropy_coef: float = 0.0,
    aggregate: str = "token_mean",
    constant: float | None = None,
    num_tokens: float | None = None,
    num_rows: float | None = None,
    **options: Any,
) -> dict[str, float]:
    """The loss and its statistics; see ``leafkernels.policy_loss`` for the definitions. Rows may differ in length."""
    tokens = token_terms(logprobs, old_logprobs, advantages, response_mask, **options)
    weights = row_weights(response_mask, aggregate, constant, num_tokens, num_rows)
    losses, entropies = [], []
    for i, row in enumerate(tokens):
        of_row = []
        for t, token in row.items():
            loss = token.loss
            if entropy is not None:
                entropies.append(entropy[i][t])
                # Without a weight it is a statistic: 0 * inf would be NaN.
                if entropy_coef != 0:
                    loss -= entropy_coef * entropy[i][t]
            of_row.append(loss)
        losses.append(weights[i] * total(of_row))
    found = [token for row in tokens for token in row.values()]
    return {
        "loss": total(losses),
        "clip_fraction": mean([float(token.is_clipped) for token in found]),
        "approx_kl": mean([token.moved for token in found]),
        "mean_ratio": mean([token.ratio for token in found]),
        "mean_kl": mean([token.kl for token in found]),
        "mean_entropy": mean(entropies),
    }


def policy_loss_backward(
    logprobs: Table,
    old_logprobs: Table,
    advantages: Table,
    response_mask: Sequence[Sequence[bool]],
    *,
    entropy_coef: float = 0.0,
    aggregate: str = "token_mean",
    constant: float | None = None,
    num_tokens: float | None = None,
    num_rows: float | None = None,
    **options: Any,
) -> tuple[list[list[float]], list[list[float]]]:
    """The derivatives of the loss in each log-probability and in each entropy, 0 where the mask is False.

    What a row's, or the batch's, tokens give a token is taken for a constant.
    """
    tokens = token_terms(logprobs, old_logprobs, advantages, response_mask, **options)
    weights = row_weights(response_mask, aggregate, constant, num_tokens, num_rows)
    grad_logprobs, grad_entropies = [], []
    for weight, row, mask in zip(weights, tokens, response_mask, strict=True):
        grad_logprobs.append([weight * row[t].slope if t in row else 0.0 for t in range(len(mask))])
        grad_entropies.append([-weight * entropy_coef if m else 0.0 for m in mask])
    return grad_logprobs, grad_entropies


def row_weights(
    response_mask: Sequence[Sequence[bool]],
    aggregate: str,
    constant: float | None = None,
    num_tokens: float | None = None,
    num_rows: float | None = None,
) -> list[float]:
    """The share that a token's loss has in the whole loss, for each row."""
    counts = [sum(map(bool, mask)) for mask in response_mask]
    # A step without a token, or a row, has the loss 0.
    tokens = (sum(counts) if num_tokens is None else num_tokens) or 1
    alive = (sum(count > 0 for count in counts) if num_rows is None else num_rows) or 1
    every = (len(counts) if num_rows is None else num_rows) or 1
    width = max(map(len, response_mask), default=1) if constant is None else constant
    return [
        {
            "token_mean": 1 / tokens,
            "sequence_mean": 1 / (max(count, 1) * alive),
            "sequence_sum": 1 / alive,
            "sum": 1.0,
            "constant": 1 / (constant or 1.0),
            # TRL's, where a row without a token counts as a row.
            "grpo": 1 / (max(count, 1) * every),
            "bnpo": 1 / tokens,
            "dr_grpo": 1 / (every * (constant or 1.0)),
            "dapo": 1 / tokens,
            "luspo": 1 / every,
            # verl's, where it does not.
            "token-mean": 1 / tokens,
            "token-sum": 1.0,
            "seq-mean-token-mean": 1 / (max(count, 1) * alive),
            "seq-mean-token-sum": 1 / alive,
            "seq-mean-token-sum-norm": 1 / (alive * max(width, 1)),
        }[aggregate]
        for count in counts
    ]


def token_terms(
    logprobs: Table,
    old_logprobs: Table,
    advantages: Table,
    response_mask: Sequence[Sequence[bool]],
    *,
    kind: str = "clip",
    max_log_ratio: float | None = None,
    ref_logprobs: Table | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    kl_weighted: bool = False,
    importance: str = "token",
    token_weights: Table | None = None,
    drawn: Table | None = None,
    **given: Any,
) -> list[dict[int, Token]]:
    """For each row, by position, the tokens that count. ``drawn``: for "clip_cov", by which candidates are chosen."""
    options = KINDS[kind] | {name: value for name, value in given.items() if value is not None}
    live = [[t for t, m in enumerate(mask) if m] for mask in response_mask]
    log_ratios = [{t: logprobs[i][t] - old_logprobs[i][t] for t in row} for i, row in enumerate(live)]
    marked = marked_tokens(kind, logprobs, log_ratios, advantages, drawn, options)
    rows = []
    for i, row in enumerate(live):
        weights = {t: 1.0 if token_weights is None else token_weights[i][t] for t in row}
        signed = [(log_ratios[i][t], advantages[i][t]) for t in row]
        if kind == "vespo":
            log_weight = math.fsum(clamp(x, -20.0, 20.0) for x, _ in signed)
            log_weight += math.fsum(clamp(log(weights[t]), math.log(1e-8), 20.0) for t in row)
            log_weight = clamp(log_weight, math.log(1e-8), 20.0)
        elif kind == "gmpo":
            side = mean([on_the_side(x, a, options["clip"]) for x, a in signed])
        tokens = {}
        for t in row:
            advantage, weight, log_ratio = advantages[i][t], weights[t], log_ratios[i][t]
            token_log_ratio = log_ratio
            if importance == "sequence":
                log_ratio = mean(list(log_ratios[i].values()))
            moves = True
            if max_log_ratio is not None and abs(log_ratio) > max_log_ratio:
                log_ratio, moves = math.copysign(max_log_ratio, log_ratio), False
            ratio = exp(log_ratio)
            if kind == "vespo":
                k, scale = options["shape_negative"] if advantage < 0 else options["shape"]
                weight = exp(scale + k * log_weight - scale * exp(log_weight))
                loss, slope, is_clipped = reinforce(logprobs[i][t], advantage)
            elif kind == "gmpo":
                gain = times(exp(side), advantage)
                is_clipped = on_the_side(log_ratio, advantage, options["clip"]) != log_ratio and advantage != 0
                loss, slope = -gain, 0.0 if is_clipped else -gain
            else:
                formula = SURROGATES.get(kind, clipped)
                loss, slope, is_clipped = formula(
                    logprobs[i][t], old_logprobs[i][t], log_ratio, ratio, advantage, moves, options
                )
            if kind == "clip_cov" and marked[i][t]:
                weight = 0.0
            if kind == "fipo":
                future = total([0.5 ** ((u - t) / options["half_life"]) * log_ratios[i][u] for u in row if u >= t])
                low, high = options["future_clip"]
                weight *= clamp(exp(future), 1 - low, 1 + high)
            if kind == "kl_cov" and marked[i][t]:
                loss += options["penalty"] * abs(log_ratio)
                slope += options["penalty"] * sign(log_ratio)
            loss, slope = times(loss, weight), times(slope, weight)
            kl = 0.0
            if ref_logprobs is not None:
                kl, kl_slope = divergence(kl_kind, ref_logprobs[i][t] - logprobs[i][t])
                if kl_weighted:
                    kl = times(ratio, kl)
                    kl_slope = times(ratio, kl_slope) + (kl if moves and kl_kind != "k3+" else 0.0)
                # Without a weight it is a statistic: 0 * inf would be NaN.
                if kl_coef != 0:
                    loss += kl_coef * kl
                    slope += kl_coef * kl_slope
            moved = expm1(token_log_ratio) - token_log_ratio
            tokens[t] = Token(loss, slope, ratio, is_clipped, kl, moved)
        rows.append(tokens)
    return rows


def clipped(
    logprob: float, old: float, log_ratio: float, ratio: float, advantage: float, moves: bool, options: dict[str, Any]
) -> tuple[float, float, bool]:
    """-min(r A, clip(r) A), at most -dual_clip A where A < 0: PPO's, and GSPO's, Clip-Cov's and FIPO's."""
    clip, most = options.get("clip", (1.0, math.inf)), options.get("dual_clip")
    if advantage == 0 and not math.isnan(ratio):
        # Nothing is gained, also where the ratio is infinite.
        return 0.0, 0.0, False
    gain = ratio * advantage
    bounded = min(max(ratio, 1 - clip[0]), 1 + clip[1]) * advantage
    if bounded < gain:
        return -bounded, 0.0, True
    if most is not None and advantage < 0 and gain < most * advantage:
        return -most * advantage, 0.0, True
    return -gain, -gain if moves else 0.0, False


def cispo(
    logprob: float, old: float, log_ratio: float, ratio: float, advantage: float, moves: bool, options: dict[str, Any]
) -> tuple[float, float, bool]:
    """-sg(clip(r)) A log p."""
    low, high = options["clip"]
    bounded = clamp(ratio, 1 - low, 1 + high)
    gain = times(bounded, advantage)
    return -times(logprob, gain), -gain, bounded < ratio or bounded > ratio


def sapo(
    logprob: float, old: float, log_ratio: float, ratio: float, advantage: float, moves: bool, options: dict[str, Any]
) -> tuple[float, float, bool]:
    """-(4 / tau) sigmoid(tau (r - 1)) A."""
    tau = options["tau"][0 if advantage > 0 else 1]
    rise, fall = sigmoid(tau * (ratio - 1)), sigmoid(-tau * (ratio - 1))
    slope = -4 * times(ratio, rise * fall) * advantage
    return -4 / tau * rise * advantage, slope if moves else 0.0, False


def dppo(
    logprob: float,
    old: float,
    log_ratio: float,
    ratio: float,
    advantage: float,
    moves: bool,
    options: dict[str, Any],
    is_variation: bool = False,
) -> tuple[float, float, bool]:
    """-sg(min(r, max_ratio)) A log p, 0 where the probability has moved too far on the advantage's side."""
    low, high = options["clip"]
    p, q = exp(logprob), exp(old)
    if is_variation:
        is_far = p - q > high if advantage > 0 else q - p > low
    else:
        # Of the two events "this token" and "another one"; what rounding left above 0 is 0.
        new, old = min(logprob, 0.0), min(old, 0.0)
        others = 0.0 if old == 0 else (log(-expm1(old)) - log(-expm1(new))) * -expm1(old)
        distance = times(old - new, exp(old)) + others
        is_far = p > q and distance > high if advantage > 0 else p < q and distance > low
    gain = times(min(ratio, options["max_ratio"]) if ratio == ratio else ratio, advantage)
    return (0.0, 0.0, True) if is_far else (-times(logprob, gain), -gain, False)


def dro(
    logprob: float, old: float, log_ratio: float, ratio: float, advantage: float, moves: bool, options: dict[str, Any]
) -> tuple[float, float, bool]:
    """-(A log p - beta / 2 log^2 r)."""
    loss, slope, _ = reinforce(logprob, advantage)
    return loss + options["beta"] / 2 * log_ratio**2, slope + options["beta"] * log_ratio, False


def reinforce(logprob: float, advantage: float, *_: Any) -> tuple[float, float, bool]:
    """-A log p."""
    return -times(logprob, advantage), -advantage, False


SURROGATES: dict[str, Callable[..., tuple[float, float, bool]]] = {
    "cispo": cispo,
    "sapo": sapo,
    "dppo_tv": partial(dppo, is_variation=True),
    "dppo_kl": dppo,
    "dro": dro,
    "reinforce": lambda logprob, *numbers: reinforce(logprob, numbers[3]),
}


def marked_tokens(
    kind: str,
    logprobs: Table,
    log_ratios: list[dict[int, float]],
    advantages: Table,
    drawn: Table | None,
    options: dict[str, Any],
) -> list[dict[int, bool]]:
    """By row and position: the share of tokens that "clip_cov" drops, or "kl_cov" penalises."""
    marked = [dict.fromkeys(row, False) for row in log_ratios]
    if kind not in ("clip_cov", "kl_cov"):
        return marked
    places = [(i, t) for i, row in enumerate(log_ratios) for t in row]
    mean_advantage = mean([advantages[i][t] for i, t in places])
    mean_logprob = mean([logprobs[i][t] for i, t in places])
    covariance = {(i, t): (advantages[i][t] - mean_advantage) * (logprobs[i][t] - mean_logprob) for i, t in places}
    count = max(int(options["share"] * len(places)), 1)
    if kind == "kl_cov":
        ranked = sorted(places, key=lambda place: -covariance[place])
    else:
        assert drawn is not None
        low, high = options["covariance"]
        open_ones = [
            (i, t)
            for i, t in places
            if low < covariance[i, t] < high
            and not clipped(0, 0, 0, exp(log_ratios[i][t]), advantages[i][t], True, {**options, "dual_clip": None})[2]
        ]
        ranked = sorted(open_ones, key=lambda place: drawn[place[0]][place[1]])
    for i, t in ranked[:count]:
        marked[i][t] = True
    return marked


def divergence(kind: str, distance: float) -> tuple[float, float]:
    """An estimate of KL(policy || ref) from ``distance`` = ref - logprob, and its derivative in the log-probability."""
    k3 = expm1(distance) - distance
    return {
        "k1": (-distance, 1.0),
        "k2": (distance**2 / 2, -distance),
        "k3": (k3, -expm1(distance)),
        "abs": (abs(distance), -sign(distance)),
        "k3+": (k3, -distance),
    }[kind]


def on_the_side(log_ratio: float, advantage: float, clip: tuple[float, float]) -> float:
    """The log-ratio, no further than ``clip`` to the side to which the advantage pulls; 0 where it pulls to none."""
    if advantage == 0:
        return 0.0 * log_ratio if log_ratio != log_ratio else 0.0
    if advantage > 0:
        return clip[1] if log_ratio > clip[1] else log_ratio
    return -clip[0] if log_ratio < -clip[0] else log_ratio


def clamp(x: float, low: float, high: float) -> float:
    """x in [low, high]; NaN stays."""
    return low if x < low else high if x > high else x


def times(x: float, weight: float) -> float:
    """x weight; a weight of 0 makes 0 of an infinity too."""
    return 0.0 if weight == 0 and x == x else x * weight


def sign(x: float) -> float:
    """-1, 0 or 1; NaN stays."""
    return x if x == 0 or x != x else math.copysign(1.0, x)


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1 / (1 + exp(-x)) if x >= 0 else exp(x) / (1 + exp(x))


def log(x: float) -> float:
    """Natural logarithm, -inf of 0."""
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def exp(x: float) -> float:
    """e^x, inf where it is too large for a float."""
    return math.exp(x) if not x > 709.7 else math.inf


def expm1(x: float) -> float:
    """e^x - 1, inf where it is too large for a float."""
    return math.expm1(x) if not x > 709.7 else math.inf
