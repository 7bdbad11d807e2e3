"""FiRe-OPD, token by token: which rollouts a teacher's numbers keep, and what their tokens weigh."""

import math
import struct
from collections.abc import Sequence
from fractions import Fraction

from python_ref.values import total

Table = Sequence[Sequence[float]]
# The lowest finite float32: of scores, -inf alone is below it.
LOWEST = -(2.0 - 2.0**-23) * 2.0**127


def fire_statistics(
    teacher_logprobs: Table,
    student_entropy: Table | None,
    teacher_entropy: Table | None,
    response_mask: Sequence[Sequence[bool]],
) -> list[list[float]]:
    """Seven numbers of every row; see ``leafkernels.FireStatistics`` for their order."""
    rows = []
    for i, mask in enumerate(response_mask):
        live = [t for t, m in enumerate(mask) if m]
        teacher = _entropies(teacher_entropy, i, live)
        student = _entropies(student_entropy, i, live)
        rows.append(
            [
                float(len(live)),
                total([teacher_logprobs[i][t] for t in live]),
                math.nan if teacher is None else _largest(teacher),
                math.nan if student is None else _largest(student),
                math.nan if teacher is None else total(teacher),
                math.nan if student is None else total(student),
                math.nan
                if teacher is None or student is None
                else total([h_t * h_s for h_t, h_s in zip(teacher, student, strict=True)]),
            ]
        )
    return rows


def fire_opd(
    old_logprobs: Table | None,
    teacher_logprobs: Table | None,
    student_entropy: Table | None,
    teacher_entropy: Table | None,
    response_mask: Sequence[Sequence[bool]],
    *,
    drop: float = 0.2,
    alpha: float = 1.0,
    beta: float = 1.0,
    normalize: str = "batch",
    base_logprobs: Table | None = None,
    extrapolation: float = 1.0,
    divergence: Table | None = None,
    statistics: Table | None = None,
) -> dict[str, list]:
    """Weights, advantages, and what the filter found; see ``leafkernels.fire_opd``.

    All rows are the scope, or, where they are given, those of ``statistics``, as from ``fire_statistics``. A
    ``divergence`` takes the place of both log-probabilities: minus it is their difference, and the teacher's.
    """
    if divergence is not None:
        old_logprobs, teacher_logprobs = (
            [[0.0] * len(row) for row in divergence],
            [[-d for d in row] for row in divergence],
        )
    assert old_logprobs is not None and teacher_logprobs is not None
    live = [[t for t, m in enumerate(mask) if m] for mask in response_mask]
    scores = [score(teacher_logprobs[i], tokens) for i, tokens in enumerate(live)]
    own = fire_statistics(teacher_logprobs, student_entropy, teacher_entropy, response_mask)
    scope = own if statistics is None else statistics
    in_scope, threshold, least = keep_rows([_mean_of(row) for row in scope], drop)
    keep = [not row_score < least and bool(tokens) for row_score, tokens in zip(scores, live, strict=True)]
    teacher_max, student_max = (max(_largest([row[column] for row in scope]), 1e-6) for column in (2, 3))

    def mean_weight(rows: Table) -> float:
        return _mean_weight(rows, teacher_max, student_max, alpha, beta)

    if normalize == "trajectory":
        means = [mean_weight([row]) for row in own]
    elif normalize == "kept":
        means = [mean_weight([row for row, kept in zip(scope, in_scope, strict=True) if kept])] * len(own)
    else:
        means = [mean_weight(scope)] * len(own)
    weights = fire_weights(
        student_entropy,
        teacher_entropy,
        response_mask,
        [1 / row_mean for row_mean in means],
        teacher_max,
        student_max,
        alpha=alpha,
        beta=beta,
    )
    return {
        "advantages": fire_advantages(
            old_logprobs,
            teacher_logprobs,
            weights,
            response_mask,
            keep,
            base_logprobs=base_logprobs,
            extrapolation=extrapolation,
        ),
        "response_mask": [
            [t in tokens for t in range(len(mask))]
            for mask, tokens in zip(
                response_mask, in_loss(old_logprobs, response_mask, keep, base_logprobs, extrapolation), strict=True
            )
        ],
        "weights": weights,
        "keep": keep,
        "scores": scores,
        "threshold": [threshold],
    }


def _mean_weight(rows: Table, teacher_max: float, student_max: float, alpha: float, beta: float) -> float:
    """The mean weight of the tokens of rows, by their seven numbers; 1 of no token.

    (1 + a (1 - h_t)) (1 + b h_s) = (1 + a) + (1 + a) b h_s - a h_t - a b h_t h_s, with entropies as shares of the
    largest, summed over tokens.
    """
    count = total([row[0] for row in rows])
    if not count:
        return 1.0
    weight = (1 + alpha) * count
    if beta:
        weight += (1 + alpha) * beta / student_max * total([row[5] for row in rows])
    if alpha:
        weight -= alpha / teacher_max * total([row[4] for row in rows])
    if alpha and beta:
        weight -= alpha * beta / (teacher_max * student_max) * total([row[6] for row in rows])
    return weight / count


def fire_weights(
    student_entropy: Table | None,
    teacher_entropy: Table | None,
    response_mask: Sequence[Sequence[bool]],
    scale: Sequence[float],
    teacher_max: float,
    student_max: float,
    *,
    alpha: float,
    beta: float,
) -> list[list[float]]:
    """(1 + alpha * how sure the teacher is) (1 + beta * how unsure the student is), times the row's ``scale``.

    0 where the mask is False.
    """
    weights = []
    for i, mask in enumerate(response_mask):
        row = []
        for t, live in enumerate(mask):
            weight = scale[i] if live else 0.0
            if live and alpha and teacher_entropy is not None:
                weight *= 1 + alpha * _clip(1 - teacher_entropy[i][t] / teacher_max)
            if live and beta and student_entropy is not None:
                weight *= 1 + beta * _clip(student_entropy[i][t] / student_max)
            row.append(weight)
        weights.append(row)
    return weights


def fire_advantages(
    old_logprobs: Table,
    teacher_logprobs: Table,
    weights: Table,
    response_mask: Sequence[Sequence[bool]],
    keep: Sequence[bool],
    *,
    base_logprobs: Table | None = None,
    extrapolation: float = 1.0,
) -> list[list[float]]:
    """Weight times what the teacher gives a token more than the student, 0 where a token is not in the loss."""
    advantages = [[0.0] * len(mask) for mask in response_mask]
    for i, tokens in enumerate(in_loss(old_logprobs, response_mask, keep, base_logprobs, extrapolation)):
        for t in tokens:
            target = teacher_logprobs[i][t]
            if extrapolation != 1 and base_logprobs is not None:
                target = extrapolation * target + (1 - extrapolation) * base_logprobs[i][t]
            advantages[i][t] = weights[i][t] * (target - old_logprobs[i][t])
    return advantages


def in_loss(
    old_logprobs: Table,
    response_mask: Sequence[Sequence[bool]],
    keep: Sequence[bool],
    base_logprobs: Table | None = None,
    extrapolation: float = 1.0,
) -> list[list[int]]:
    """Which tokens of each row are in the loss: of kept rows those that count.

    Not those with a log-probability of -inf under the student, or under the base where it is read: what cannot be
    sampled has no ratio to be compared by. A teacher's -inf has cost the whole row its place.
    """
    needed = [old_logprobs] if extrapolation == 1 or base_logprobs is None else [old_logprobs, base_logprobs]
    return [
        [t for t, live in enumerate(mask) if live and keep[i] and all(table[i][t] != -math.inf for table in needed)]
        for i, mask in enumerate(response_mask)
    ]


def score(teacher_logprobs: Sequence[float], live: Sequence[int]) -> float:
    """The mean log-probability of a row under the teacher, in float32; NaN for a row without a token."""
    if not live:
        return math.nan
    row_mean = total([teacher_logprobs[t] for t in live]) / len(live)
    return float(struct.unpack("f", struct.pack("f", row_mean))[0])


def _mean_of(row: Sequence[float]) -> float:
    """The score of a row from its seven numbers."""
    return float(struct.unpack("f", struct.pack("f", row[1] / row[0]))[0]) if row[0] else math.nan


def keep_rows(scores: Sequence[float], drop: float) -> tuple[list[bool], float, float]:
    """Which scores reach the ``drop``-quantile of those that are numbers; the quantile; the least score that may reach.

    The quantile is exact, in fractions, and rounded once. -inf is never kept: the teacher bans a token of that row,
    and no step makes up for it. NaN is kept, so that it is seen.
    """
    ranked = sorted(s for s in scores if not math.isnan(s))
    if not ranked:
        return [True] * len(scores), math.nan, math.nan
    # The fraction that a float stands for: a fifth, or two thirds.
    rank = Fraction(drop).limit_denominator(10**6) * (len(ranked) - 1)
    low, high = ranked[math.floor(rank)], ranked[math.ceil(rank)]
    least = max(high, LOWEST)
    if low == high or math.isinf(low) or math.isinf(high):
        # Where the quantile is infinite, there is no score between the two.
        return [not s < least for s in scores], low if low == high else low + high, least
    exact = Fraction(low) + (rank - math.floor(rank)) * (Fraction(high) - Fraction(low))
    is_below = [s == -math.inf or math.isfinite(s) and Fraction(s) < exact for s in scores]
    return [not below for below in is_below], float(exact), least


def _entropies(entropy: Table | None, row: int, live: Sequence[int]) -> list[float] | None:
    """Of the tokens that count; below 0 there is rounding only."""
    return None if entropy is None else [h if math.isnan(h) else max(h, 0.0) for h in (entropy[row][t] for t in live)]


def _largest(numbers: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, numbers)) else max(numbers, default=0.0)


def _clip(x: float) -> float:
    return x if math.isnan(x) else min(max(x, 0.0), 1.0)
