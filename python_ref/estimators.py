"""Other estimators, token by token from their definitions; arguments as ``span_advantages`` takes them."""

import math
from collections.abc import Callable, Hashable, Sequence

from python_ref.find import full_mask
from python_ref.values import deviation, mean, settled

Table = Sequence[Sequence[float]]
Rows = Sequence[Sequence[int]]
Mask = Sequence[Sequence[bool]] | None
Groups = Sequence[Hashable] | None


def scored_groups(rewards: Sequence[float], groups: Groups) -> list[list[int]]:
    """The rows of each prompt that have a reward, where these differ by more than rounding; all others get 0."""
    names = list(groups) if groups is not None else [0] * len(rewards)
    result = []
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name and not math.isnan(rewards[i])]
        if len(set(settled([rewards[i] for i in rows]))) > 1:
            result.append(rows)
    return result


def _for_each_row(
    token_ids: Rows,
    rewards: Sequence[float],
    response_mask: Mask,
    groups: Groups,
    advantage: Callable[[float, list[float]], float],
) -> list[list[float]]:
    """``advantage(own reward, rewards of the prompt)`` at every unmasked token."""
    value_per_row = [0.0] * len(rewards)
    for rows in scored_groups(rewards, groups):
        for i in rows:
            value_per_row[i] = advantage(rewards[i], [rewards[j] for j in rows])
    masks = full_mask(token_ids, response_mask)
    return [[value if is_live else 0.0 for is_live in mask] for value, mask in zip(value_per_row, masks, strict=True)]


def grpo(
    logprobs: Table,
    token_ids: Rows,
    rewards: Sequence[float],
    *,
    response_mask: Mask = None,
    groups: Groups = None,
) -> list[list[float]]:
    """(r - mean) / (std + 1e-6)."""

    def advantage(own: float, group_rewards: list[float]) -> float:
        return (own - mean(group_rewards)) / (deviation(group_rewards) + 1e-6)

    return _for_each_row(token_ids, rewards, response_mask, groups, advantage)


def dr_grpo(
    logprobs: Table,
    token_ids: Rows,
    rewards: Sequence[float],
    *,
    response_mask: Mask = None,
    groups: Groups = None,
) -> list[list[float]]:
    """r - mean."""
    return _for_each_row(
        token_ids, rewards, response_mask, groups, lambda own, group_rewards: own - mean(group_rewards)
    )


def mean_of_others(own: float, group_rewards: list[float]) -> float:
    return (math.fsum(group_rewards) - own) / (len(group_rewards) - 1)


def rloo(
    logprobs: Table,
    token_ids: Rows,
    rewards: Sequence[float],
    *,
    response_mask: Mask = None,
    groups: Groups = None,
) -> list[list[float]]:
    """r minus the mean of the other rewards of the prompt."""
    return _for_each_row(
        token_ids, rewards, response_mask, groups, lambda own, group_rewards: own - mean_of_others(own, group_rewards)
    )
