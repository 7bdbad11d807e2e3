"""Divergence of a student's distribution from a teacher's, by definition, over all ids or over a few and the rest."""

import math
from collections.abc import Sequence
from typing import Any

Row = Sequence[float]

# What lies this far below the top is banned, as -inf is: no dtype holds the probability.
_BANNED = -1e4


def divergence(
    student_logits: Sequence[Row],
    teacher_logits: Sequence[Row] | None,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | None = None,
    tail: bool = True,
    ids: Sequence[Sequence[int]] | None = None,
    logprobs: Sequence[Row] | None = None,
    least_rest: float = 2.0**-23,
) -> tuple[list[float], list[float], list[float], list[bool]]:
    """Divergence, the student's and the teacher's entropy in nats, and whether the likeliest ids agree, for each row.

    With p of the student and q of the teacher, softmax of the logits over the temperature:

        reverse_kl  sum p log(p / q)
        forward_kl  sum q log(q / p)
        jsd         beta sum q log(q / m) + (1 - beta) sum p log(p / m), m = beta q + (1 - beta) p

    An id that neither has adds 0; one that only the first has in a KL makes that infinite. ``top_k``: both are brought
    to the teacher's likeliest ids and the rest as one class, or without ``tail`` renormalised over those ids; entropies
    stay those of the whole. Instead of the teacher's logits, ``ids`` and their ``logprobs``: entries that are negative
    or -inf are missing, the rest has what is left of 1, ``least_rest`` at least; the entropy is that of the classes.
    """
    found: tuple[list[Any], ...] = ([], [], [], [])
    for pair in _pairs(student_logits, teacher_logits, temperature, top_k, tail, ids, logprobs, least_rest):
        p, q, whole, teacher_whole, *_ = pair
        found[0].append(_divergence(p, q, kind, beta)[0])
        found[1].append(_entropy(whole))
        found[2].append(_entropy(teacher_whole))
        found[3].append(pair[-1] and not math.isnan(found[0][-1]))
    return found[0], found[1], found[2], found[3]


def divergence_backward(
    divergence_gradients: Sequence[float],
    entropy_gradients: Sequence[float],
    student_logits: Sequence[Row],
    teacher_logits: Sequence[Row] | None,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | None = None,
    tail: bool = True,
    ids: Sequence[Sequence[int]] | None = None,
    logprobs: Sequence[Row] | None = None,
    least_rest: float = 2.0**-23,
) -> list[list[float]]:
    """Gradient of sum(divergence * divergence_gradients + entropy * entropy_gradients) for the student's logits.

    Over the temperature, and by the class's logit: p (log(p / q) - KL) of reverse_kl, p - q of forward_kl, and
    (1 - beta) p (log(p / m) - sum p log(p / m)) of jsd. An id among the rest has its share of that class's gradient.
    NaN where a reverse KL that counts is infinite, and at all ids that count where there is no divergence.
    """
    temperatures = _each(temperature, len(student_logits))
    pairs = _pairs(student_logits, teacher_logits, temperature, top_k, tail, ids, logprobs, least_rest)
    result = []
    for a, b, t, pair in zip(divergence_gradients, entropy_gradients, temperatures, pairs, strict=True):
        p, q, whole, _, told, _ = pair
        found, slopes = _divergence(p, q, kind, beta)
        if kind == "reverse_kl" and math.isinf(found):
            slopes = [math.nan if a != 0 else 0.0] * len(p)
        entropy = _entropy(whole)
        gradient = []
        for j, log_p in enumerate(whole):
            if math.isnan(found) and (told is None or tail or j in told):
                slope = math.nan
            elif told is None:
                slope = slopes[j]
            elif j in told:
                slope = slopes[told[j]]
            elif tail:
                slope = 0.0 if log_p == -math.inf else slopes[-1] * math.exp(log_p - p[-1])
            else:
                slope = 0.0
            of_entropy = 0.0 if log_p == -math.inf else -math.exp(log_p) * (log_p + entropy)
            gradient.append((a * slope + b * of_entropy) / t)
        result.append(gradient)
    return result


def _each(temperature: float | Sequence[float], count: int) -> Sequence[float]:
    return [temperature] * count if isinstance(temperature, int | float) else temperature


def _pairs(
    student_logits: Sequence[Row],
    teacher_logits: Sequence[Row] | None,
    temperature: float | Sequence[float],
    top_k: int | None,
    tail: bool,
    ids: Sequence[Sequence[int]] | None,
    logprobs: Sequence[Row] | None,
    least_rest: float,
) -> list[Any]:
    """Of each row: log-probabilities of both over the classes, of both over everything, the class of each id that is
    told apart (None: all are), and whether the tops agree."""
    pairs: list[Any] = []
    temperatures = _each(temperature, len(student_logits))
    for i, (row, t) in enumerate(zip(student_logits, temperatures, strict=True)):
        student = _log_softmax(row, t)
        if teacher_logits is not None:
            teacher = _log_softmax(teacher_logits[i], t)
            top, teacher_top = max(row, default=-math.inf), max(teacher_logits[i], default=-math.inf)
            agrees = any(x == top and y == teacher_top for x, y in zip(row, teacher_logits[i], strict=True))
            if top_k is None or top_k >= len(row):
                pairs.append((student, teacher, student, teacher, None, agrees))
                continue
            told = sorted(range(len(row)), key=[-y for y in teacher_logits[i]].__getitem__)[:top_k]
            p, q = _classes(student, told, tail), _classes(teacher, told, tail)
            pairs.append((p, q, student, teacher, {j: c for c, j in enumerate(told)}, agrees))
            continue
        assert ids is not None and logprobs is not None
        given = [(j, y) for j, y in zip(ids[i], logprobs[i], strict=True) if j >= 0 and y != -math.inf]
        told, q = [j for j, _ in given], [y for _, y in given]
        rest = 1.0 - math.fsum(math.exp(y) for y in q)
        q = _normalized([*q, math.log(max(rest, least_rest))] if tail else q)
        top, teacher_top = max(row, default=-math.inf), max((y for _, y in given), default=-math.inf)
        agrees = any(row[j] == top and y == teacher_top for j, y in given if j < len(row))
        pairs.append((_classes(student, told, tail), q, student, q, {j: c for c, j in enumerate(told)}, agrees))
    return pairs


def _log_softmax(row: Row, t: float) -> list[float]:
    top = max(row, default=-math.inf)
    if any(math.isnan(x) for x in row) or math.isinf(top):
        return [math.nan] * len(row)
    below = [(x - top) / t for x in row]
    below = [z if z > _BANNED else -math.inf for z in below]
    # The ids at the top count 1 each, exactly; what the rest adds may be far below the rounding of 1.
    ties = sum(z == 0 for z in below)
    total = math.log(ties) + math.log1p(math.fsum(math.exp(z) for z in below if z != 0) / ties)
    return [z - total for z in below]


def _classes(log_p: Row, told: Sequence[int], tail: bool) -> list[float]:
    given = [log_p[j] for j in told]
    if not tail:
        return _normalized(given)
    return [*given, _log_sum([x for j, x in enumerate(log_p) if j not in told])]


def _log_sum(numbers: Row) -> float:
    top = max(numbers, default=-math.inf)
    if math.isnan(math.fsum(numbers)) and any(math.isnan(x) for x in numbers):
        return math.nan
    return top + math.log(math.fsum(math.exp(x - top) for x in numbers)) if top > -math.inf else -math.inf


def _normalized(numbers: Row) -> list[float]:
    """Log-probabilities, of which what stands beside the top may be far below the rounding of 1."""
    return _log_softmax(numbers, 1.0)


def _entropy(log_p: Row) -> float:
    return math.fsum(-math.exp(x) * x for x in log_p if x != -math.inf)


def _excess(log_p: float, log_m: float) -> float:
    """p log(p / m) - p + m, whose sum is that of p log(p / m), and each of whose terms is at least 0."""
    p, m = math.exp(log_p), math.exp(log_m)
    if math.isnan(p) or math.isnan(m):
        return math.nan
    if log_p == -math.inf:
        return m
    if log_m == -math.inf:
        return math.inf
    y = log_m - log_p
    return p * (math.expm1(y) - y) if abs(y) < 1 else m - p - p * y


def _divergence(p: Row, q: Row, kind: str, beta: float) -> tuple[float, list[float]]:
    """The divergence of two rows of log-probabilities, and its slope in the student's logits p."""
    pairs = list(zip(p, q, strict=True))
    if not pairs:
        return math.nan, []
    if kind == "reverse_kl":
        found = _sum(_excess(x, y) for x, y in pairs)
        return found, [0.0 if x == -math.inf else math.exp(x) * (x - y - found) for x, y in pairs]
    if kind == "forward_kl":
        return _sum(_excess(y, x) for x, y in pairs), [
            -math.exp(x) * math.expm1(y - x) if abs(y - x) < 1 else math.exp(x) - math.exp(y) for x, y in pairs
        ]
    mixture = [_log_mixture(x, y, beta) for x, y in pairs]
    part = _sum(_excess(x, m) for x, m in zip(p, mixture, strict=True))
    other = _sum(_excess(y, m) for y, m in zip(q, mixture, strict=True))
    slopes = [
        0.0 if x == -math.inf else (1 - beta) * math.exp(x) * (x - m - part) for x, m in zip(p, mixture, strict=True)
    ]
    return (1 - beta) * part + beta * other, slopes


def _log_mixture(x: float, y: float, beta: float) -> float:
    """log(beta e^y + (1 - beta) e^x), from the larger."""
    if x == -math.inf or y == -math.inf:
        return max(x + math.log1p(-beta), y + math.log(beta))
    if x >= y:
        return x + math.log1p(beta * math.expm1(y - x))
    return y + math.log1p((1 - beta) * math.expm1(x - y))


def _sum(terms: Any) -> float:
    numbers = list(terms)
    if any(math.isnan(x) for x in numbers):
        return math.nan
    return math.inf if math.inf in numbers else math.fsum(numbers)
