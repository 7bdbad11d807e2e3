"""Surprisal and entropy of one token's logits, by definition, in two passes."""

import math
from collections.abc import Sequence


def surprisal_entropy(
    logits: Sequence[Sequence[float]], token_ids: Sequence[int], *, temperature: float | Sequence[float] = 1.0
) -> tuple[list[float], list[float]]:
    """Surprisal of the sampled id and entropy of the distribution, in nats, for each row of logits.

    With x = logits / temperature and p = softmax(x): surprisal = -log p[id], entropy = -sum p log p, where a banned id
    (-inf) adds nothing. A row with NaN or +inf, or with -inf only, gives NaN; an id outside the row gives a surprisal
    of NaN, a banned one inf.
    """
    temperatures = [temperature] * len(logits) if isinstance(temperature, int | float) else temperature
    surprisals, entropies = [], []
    for row, token, t in zip(logits, token_ids, temperatures, strict=True):
        top = max(row, default=-math.inf)
        if any(math.isnan(x) for x in row) or math.isinf(top):
            surprisals.append(math.nan)
            entropies.append(math.nan)
            continue
        # The ids at the top count 1 each, exactly; what the rest adds may be far below the rounding of 1.
        ties = sum(x == top for x in row)
        rest = math.fsum(math.exp((x - top) / t) for x in row if x != top)
        log_total = math.log(ties) + math.log1p(rest / ties)
        # The least finite number is -inf too, over a temperature below 1.
        below = [(x - top) / t for x in row]
        terms = [math.exp(z) * (log_total - z) for z in below if z > -math.inf]
        entropies.append(math.fsum(terms) / (ties + rest))
        surprisals.append(log_total - (row[token] - top) / t if 0 <= token < len(row) else math.nan)
    return surprisals, entropies


def surprisal_entropy_backward(
    surprisal_gradients: Sequence[float],
    entropy_gradients: Sequence[float],
    logits: Sequence[Sequence[float]],
    token_ids: Sequence[int],
    *,
    temperature: float | Sequence[float] = 1.0,
    of_rows: Sequence[Sequence[float]] | None = None,
) -> list[list[float]]:
    """Gradient of sum(surprisal * surprisal_gradients + entropy * entropy_gradients) with respect to the logits.

    d surprisal / d x_j = p_j - [j = id], d entropy / d x_j = -p_j (log p_j + entropy), each over the temperature. NaN
    where a surprisal counts that is NaN, as that of an id outside of the row. ``of_rows``: surprisal, entropy, top and
    log sum e^(x - top) of the whole rows, where ``logits`` are slices of them.
    """
    temperatures = [temperature] * len(logits) if isinstance(temperature, int | float) else temperature
    if of_rows is None:
        surprisals, entropies = surprisal_entropy(logits, token_ids, temperature=temperatures)
        # The surprisal of an id at the top is log sum e^(x - top).
        tops = [max(range(len(row)), key=row.__getitem__) for row in logits]
        log_totals, _ = surprisal_entropy(logits, tops, temperature=temperatures)
        at_tops = [row[j] for row, j in zip(logits, tops, strict=True)]
        of_rows = list(zip(surprisals, entropies, at_tops, log_totals, strict=True))
    result = []
    for a, b, row, token, t, (surprisal, entropy, top, log_total) in zip(
        surprisal_gradients, entropy_gradients, logits, token_ids, temperatures, of_rows, strict=True
    ):
        of_surprisal = math.nan if a != 0 and math.isnan(surprisal) else a
        gradient = []
        for j, x in enumerate(row):
            log_p = (x - top) / t - log_total
            p = math.exp(log_p)
            of_entropy = -p * (log_p + entropy) if p > 0 or math.isnan(p) else 0.0
            gradient.append((of_surprisal * (math.expm1(log_p) if j == token else p) + b * of_entropy) / t)
        result.append(gradient)
    return result


def surprisal_state(logits: Sequence[float], temperature: float = 1.0) -> tuple[float, float, float]:
    """What a slice of a row knows: its top logit m, and over all ids but one at the top, with z = (x - m) /
    temperature, r = sum e^z and t = sum (x - m) e^z. A banned id (-inf) adds nothing; of them alone, r is -1."""
    if any(math.isnan(x) or x == math.inf for x in logits):
        return math.nan, math.nan, math.nan
    shown = sorted(x for x in logits if x > -math.inf)
    if not shown:
        return -math.inf, -1.0, 0.0
    top = shown.pop()
    weights = {x: math.exp((x - top) / temperature) for x in shown}
    return top, math.fsum(weights[x] for x in shown), math.fsum((x - top) * weights[x] for x in shown if weights[x] > 0)


def merge_surprisal_states(
    states: Sequence[Sequence[float]], picked: float, temperature: float = 1.0
) -> tuple[float, float, float, float]:
    """Surprisal and entropy of a row, its top, and log sum e^((x - top) / temperature), from its slices' states and its
    id's logit.

    A slice whose top lies d below the row's counts e^(-d / temperature) as much, and each of its ids lies d lower.
    """
    top = max((m for m, r, _ in states if r != -1), default=-math.inf)
    if any(math.isnan(number) for state in states for number in state) or math.isinf(top):
        return math.nan, math.nan, top, math.nan
    # One of the slices at the top keeps an id out, as each does; the ids that the others kept out count 1 each.
    beside, moments = [-1.0], []
    for m, r, t in states:
        fade = math.exp((m - top) / temperature)
        if r == -1 or fade == 0:
            continue
        beside += [fade, fade * r]
        moments.append(fade * (t + (m - top) * (1 + r)))
    rest = math.fsum(beside)
    log_total = math.log1p(rest)
    entropy = log_total - math.fsum(moments) / (1 + rest) / temperature
    return log_total - (picked - top) / temperature, entropy, top, log_total
