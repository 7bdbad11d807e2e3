"""What a rollout has still to earn at each token, where rewards come at any token."""

import math
from collections.abc import Hashable, Sequence

from python_ref.find import full_mask, stretch
from python_ref.values import deviation, mean, settled, total


def returns_to_go(
    token_ids: Sequence[Sequence[int]],
    rewards: Sequence[float] | None,
    response_mask: Sequence[Sequence[bool]] | None = None,
    step_rewards: Sequence[Sequence[float]] | None = None,
) -> list[list[float]]:
    """Of each row R_t for t from 0 to its length: its reward, and its step rewards from token t on.

    Tokens count from the first unmasked one to the last, holes included: ``step_rewards`` are added where they happen,
    and those outside of that stretch are no row's. ``rewards`` of None are 0.
    """
    found = []
    for i, mask in enumerate(full_mask(token_ids, response_mask)):
        start, end = stretch(mask)
        last = 0.0 if rewards is None else rewards[i]
        steps = [0.0] * (end - start) if step_rewards is None else step_rewards[i][start:end]
        found.append([total([last, *steps[t:]]) for t in range(end - start + 1)])
    return found


def total_returns(
    token_ids: Sequence[Sequence[int]],
    rewards: Sequence[float] | None,
    response_mask: Sequence[Sequence[bool]] | None = None,
    step_rewards: Sequence[Sequence[float]] | None = None,
) -> list[float]:
    """All that each row earns; NaN where a part of it is."""
    return [row[0] for row in returns_to_go(token_ids, rewards, response_mask, step_rewards)]


def weighed_rewards(
    rewards: Sequence[Sequence[float]], weights: Sequence[float], *, groups: Sequence[Hashable] | None = None
) -> list[float]:
    """One reward a row of those of several functions: sum of weight * (r - mean) / (std + 1e-6) over the functions.

    Mean and deviation are a function's over the rows of the prompt for which it is no NaN; a row without one is NaN.
    """
    names = list(groups) if groups is not None else [0] * len(rewards)
    found = []
    for i, row in enumerate(rewards):
        terms = []
        for f, own in enumerate(row):
            known = [
                rewards[j][f] for j, name in enumerate(names) if name == names[i] and not math.isnan(rewards[j][f])
            ]
            if math.isnan(own):
                continue
            # Those that differ by rounding alone say nothing.
            if len(set(settled(known))) < 2:
                terms.append(0.0)
            else:
                terms.append(weights[f] * (own - mean(known)) / (deviation(known) + 1e-6))
        found.append(total(terms) if terms else math.nan)
    return found
