"""Surprisal and entropy of one token's logits, by definition, in two passes."""

import math
from collections.abc import Sequence

from python_ref.sampling_mask import mask_logits, possible_ids


def surprisal_entropy(
    logits: Sequence[Sequence[float]],
    token_ids: Sequence[int],
    *,
    temperature: float | Sequence[float] = 1.0,
    sampling_mask: Sequence[Sequence[int]] | None = None,
) -> tuple[list[float], list[float]]:
    """Surprisal of the sampled id and entropy of the distribution, in nats, for each row of logits.

    With x = logits / temperature and p = softmax(x): surprisal = -log p[id], entropy = -sum p log p, where a banned id
    (-inf) adds nothing. A row with NaN or +inf, or with -inf only, gives NaN; an id outside the row gives a surprisal
    of NaN, a banned one inf. All ids are banned that a row of ``sampling_mask`` has not, beside the sampled one.
    """
    logits = mask_logits(logits, token_ids, sampling_mask)
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


def token_statistics(
    logits: Sequence[Sequence[float]],
    token_ids: Sequence[int],
    *,
    temperature: float | Sequence[float] = 1.0,
    sampling_mask: Sequence[Sequence[int]] | None = None,
) -> tuple[list[float], list[int], list[float]]:
    """Of each row's distribution p, as above: sum p^2, the likeliest id, of equal ones the least, and its log p.

    NaN, -1 and NaN where there is no distribution.
    """
    banned = mask_logits(logits, token_ids, sampling_mask)
    temperatures = [temperature] * len(banned) if isinstance(temperature, int | float) else temperature
    squares, tops, logprobs = [], [], []
    for row, t in zip(banned, temperatures, strict=True):
        top = max(range(len(row)), key=row.__getitem__, default=-1)
        if top < 0 or any(math.isnan(x) for x in row) or math.isinf(row[top]):
            squares.append(math.nan)
            tops.append(-1)
            logprobs.append(math.nan)
            continue
        weights = [math.exp((x - row[top]) / t) for x in row]
        total = math.fsum(weights)
        squares.append(math.fsum((weight / total) ** 2 for weight in weights))
        tops.append(top)
        logprobs.append(-surprisal_entropy([row], [top], temperature=t)[0][0])
    return squares, tops, logprobs


def surprisal_entropy_backward(
    surprisal_gradients: Sequence[float],
    entropy_gradients: Sequence[float],
    logits: Sequence[Sequence[float]],
    token_ids: Sequence[int],
    *,
    temperature: float | Sequence[float] = 1.0,
    sampling_mask: Sequence[Sequence[int]] | None = None,
) -> list[list[float]]:
    """Gradient of sum(surprisal * surprisal_gradients + entropy * entropy_gradients) with respect to the logits.

    d surprisal / d x_j = p_j - [j = id], d entropy / d x_j = -p_j (log p_j + entropy), each over the temperature. NaN
    where a surprisal counts that is NaN, as that of an id outside of the row. 0 where ``sampling_mask`` bans an id.
    """
    logits = mask_logits(logits, token_ids, sampling_mask)
    temperatures = [temperature] * len(logits) if isinstance(temperature, int | float) else temperature
    surprisals, entropies = surprisal_entropy(logits, token_ids, temperature=temperatures)
    # The surprisal of an id at the top is log sum e^(x - top).
    tops = [max(range(len(row)), key=row.__getitem__, default=0) for row in logits]
    log_totals, _ = surprisal_entropy(logits, tops, temperature=temperatures)
    result = []
    for i, (a, b, row, token, t) in enumerate(
        zip(surprisal_gradients, entropy_gradients, logits, token_ids, temperatures, strict=True)
    ):
        surprisal, entropy, log_total = surprisals[i], entropies[i], log_totals[i]
        grad_surprisal = math.nan if a != 0 and math.isnan(surprisal) else a
        gradient = []
        for j, x in enumerate(row):
            log_p = (x - row[tops[i]]) / t - log_total
            p = math.exp(log_p)
            entropy_slope = -p * (log_p + entropy) if p > 0 or math.isnan(p) else 0.0
            gradient.append((grad_surprisal * (math.expm1(log_p) if j == token else p) + b * entropy_slope) / t)
        if sampling_mask is not None:
            possible = possible_ids(sampling_mask[i], token, len(row))
            gradient = [g if j in possible else 0.0 for j, g in enumerate(gradient)]
        result.append(gradient)
    return result
