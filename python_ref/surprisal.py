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
        terms = [math.exp((x - top) / t) * (log_total - (x - top) / t) for x in row if x > -math.inf]
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
) -> list[list[float]]:
    """Gradient of sum(surprisal * surprisal_gradients + entropy * entropy_gradients) with respect to the logits.

    d surprisal / d x_j = p_j - [j = id], d entropy / d x_j = -p_j (log p_j + entropy), each over the temperature.
    """
    temperatures = [temperature] * len(logits) if isinstance(temperature, int | float) else temperature
    result = []
    for a, b, row, token, t in zip(
        surprisal_gradients, entropy_gradients, logits, token_ids, temperatures, strict=True
    ):
        (entropy,) = surprisal_entropy([row], [token], temperature=t)[1]
        gradient = []
        for j, x in enumerate(row):
            # Each id's own surprisal is -log p_j.
            (minus_log_p,) = surprisal_entropy([row], [j], temperature=t)[0]
            p = math.exp(-minus_log_p)
            of_entropy = p * (minus_log_p - entropy) if x > -math.inf or math.isnan(entropy) else 0.0
            gradient.append((a * (p - (j == token)) + b * of_entropy) / t)
        result.append(gradient)
    return result
