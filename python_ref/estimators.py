"""Other estimators, token by token from their definitions; arguments as ``span_advantages`` takes them."""

import math
from collections.abc import Callable, Hashable, Sequence

from python_ref.find import full_mask, stretch
from python_ref.returns import returns_to_go
from python_ref.values import deviation, mean, settled

Table = Sequence[Sequence[float]]
Rows = Sequence[Sequence[int]]
Rewards = Sequence[float] | None
Mask = Sequence[Sequence[bool]] | None
Groups = Sequence[Hashable] | None
StepRewards = Table | None
Keys = Rows | None
# Of what a row has still to earn at a token, what all had where they are compared, and what the other rows had.
Advantage = Callable[[float, list[float], list[float]], float]


def scored_groups(rewards: Sequence[float], groups: Groups) -> list[list[int]]:
    """The rows of each prompt that have a reward; all others get 0."""
    names = list(groups) if groups is not None else [0] * len(rewards)
    result = []
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name and not math.isnan(rewards[i])]
        if rows:
            result.append(rows)
    return result


def is_flat(values: Sequence[float]) -> bool:
    """Whether all are equal, but for rounding."""
    return len(set(settled(values))) < 2


def visits(keys: Sequence[Hashable], mask: Sequence[bool]) -> list[tuple[int, int]]:
    """Of a row each run of unmasked tokens with one key: where it begins, and where the next one does."""
    live = [t for t, is_live in enumerate(mask) if is_live]
    starts = [t for k, t in enumerate(live) if k == 0 or keys[live[k - 1]] != keys[t]]
    return list(zip(starts, [*starts[1:], len(mask)], strict=False))


def _for_each_row(
    token_ids: Rows,
    rewards: Rewards,
    response_mask: Mask,
    groups: Groups,
    step_rewards: StepRewards,
    steps: Keys,
    states: Keys,
    advantage: Advantage,
) -> list[list[float]]:
    """``advantage`` at every unmasked token: against the returns of the prompt's rows, or with ``steps`` or ``states``
    against what was still to be earned where each visit of the same step or state began."""
    masks = full_mask(token_ids, response_mask)
    to_go = returns_to_go(token_ids, rewards, response_mask, step_rewards)
    advantages = [[0.0] * len(mask) for mask in masks]
    for rows in scored_groups([row[0] for row in to_go], groups):
        # Every stretch with a baseline: row, first token, end, and what it is compared by.
        stretches: list[tuple[int, int, int, Hashable]] = []
        for i in rows:
            if steps is None and states is None:
                stretches.append((i, *stretch(masks[i]), None))
                continue
            turns, places = ([0] * len(masks[i]) if keys is None else keys[i] for keys in (steps, states))
            names = turns if states is None else places
            stretches += [(i, s, e, names[s]) for s, e in visits(list(zip(turns, places, strict=True)), masks[i])]
        for name in dict.fromkeys(key for _, _, _, key in stretches):
            named = [(i, s, e) for i, s, e, key in stretches if key == name]
            values = [to_go[i][s - stretch(masks[i])[0]] for i, s, _ in named]
            if len(values) < 2:
                continue
            least = min(values)
            centred = [v - least for v in settled(values)]
            for (i, s, e), value, kept in zip(named, values, centred, strict=True):
                others = [other for (j, _, _), other in zip(named, centred, strict=True) if j != i]
                for t in range(s, e):
                    if masks[i][t]:
                        own = kept + (to_go[i][t - stretch(masks[i])[0]] - value)
                        advantages[i][t] = advantage(own, centred, others)
    return advantages


def grpo(
    logprobs: Table,
    token_ids: Rows,
    rewards: Rewards,
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    step_rewards: StepRewards = None,
    steps: Keys = None,
    states: Keys = None,
) -> list[list[float]]:
    """(R_t - mean) / (std + 1e-6); 0 where all that is compared is equal."""

    def advantage(own: float, values: list[float], others: list[float]) -> float:
        std = deviation(values)
        return (own - mean(values)) / (std + 1e-6) if std else 0.0

    return _for_each_row(token_ids, rewards, response_mask, groups, step_rewards, steps, states, advantage)


def dr_grpo(
    logprobs: Table,
    token_ids: Rows,
    rewards: Rewards,
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    step_rewards: StepRewards = None,
    steps: Keys = None,
    states: Keys = None,
) -> list[list[float]]:
    """R_t - mean."""

    def advantage(own: float, values: list[float], others: list[float]) -> float:
        return own - mean(values)

    return _for_each_row(token_ids, rewards, response_mask, groups, step_rewards, steps, states, advantage)


def rloo(
    logprobs: Table,
    token_ids: Rows,
    rewards: Rewards,
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    step_rewards: StepRewards = None,
    steps: Keys = None,
    states: Keys = None,
) -> list[list[float]]:
    """R_t minus the mean of the others."""

    def advantage(own: float, values: list[float], others: list[float]) -> float:
        return own - mean(others) if others else 0.0

    return _for_each_row(token_ids, rewards, response_mask, groups, step_rewards, steps, states, advantage)
