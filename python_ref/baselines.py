"""One number a row against other baselines than the mean of its prompt; arguments as ``span_advantages`` takes them."""

import math
from collections.abc import Callable
from itertools import combinations

from python_ref.estimators import Groups, Mask, Rewards, Rows, StepRewards, Table, is_flat, scored_groups
from python_ref.find import full_mask, stretch
from python_ref.returns import returns_to_go
from python_ref.values import deviation, mean

# Of a prompt's returns and lengths: the credit of each row at its start, and of a return what it is divided by.
Formula = Callable[[list[float], list[int]], tuple[list[float], float]]


def _credit(
    token_ids: Rows, rewards: Rewards, response_mask: Mask, groups: Groups, step_rewards: StepRewards, formula: Formula
) -> list[list[float]]:
    masks = full_mask(token_ids, response_mask)
    to_go = returns_to_go(token_ids, rewards, response_mask, step_rewards)
    advantages = [[0.0] * len(mask) for mask in masks]
    for rows in scored_groups([row[0] for row in to_go], groups):
        returns = [to_go[i][0] for i in rows]
        # Equal returns may have been earned at other tokens.
        flat = is_flat(returns)
        least = min(returns)
        values, scale = formula([least if flat else r for r in returns], [sum(masks[i]) for i in rows])
        for i, value in zip(rows, values, strict=True):
            start, end = stretch(masks[i])
            for t in range(start, end):
                if masks[i][t] and len(rows) > 1:
                    earned = to_go[i][0] - to_go[i][t - start]
                    advantages[i][t] = (0.0 if flat else value) - (earned / scale if scale else 0.0)
    return advantages


def opo(
    logprobs: Table,
    token_ids: Rows,
    rewards: Rewards,
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    step_rewards: StepRewards = None,
) -> list[list[float]]:
    """R_t - sum(l r) / sum(l), l the number of unmasked tokens."""

    def formula(returns: list[float], lengths: list[int]) -> tuple[list[float], float]:
        total = max(sum(lengths), 1)
        baseline = math.fsum(length * r for length, r in zip(lengths, returns, strict=True)) / total
        return [r - baseline for r in returns], 1.0

    return _credit(token_ids, rewards, response_mask, groups, step_rewards, formula)


def qae(
    logprobs: Table,
    token_ids: Rows,
    rewards: Rewards,
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    step_rewards: StepRewards = None,
    quantile: float = 0.4,
) -> list[list[float]]:
    """(R_t - quantile) / (std + 1e-6): the least return that a share of ``quantile`` of the rows does not exceed."""

    def formula(returns: list[float], lengths: list[int]) -> tuple[list[float], float]:
        shares = [(sum(other <= r for other in returns) / len(returns), r) for r in returns]
        baseline = min(r for share, r in shares if share >= quantile - 1e-9)
        std = 0.0 if is_flat(returns) else deviation(returns)
        return [(r - baseline) / (std + 1e-6) for r in returns], std + 1e-6 if std else 0.0

    return _credit(token_ids, rewards, response_mask, groups, step_rewards, formula)


def maxrl(
    logprobs: Table,
    token_ids: Rows,
    rewards: Rewards,
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    step_rewards: StepRewards = None,
) -> list[list[float]]:
    """(R_t - mean) / |mean|; 0 where the mean is 0."""

    def formula(returns: list[float], lengths: list[int]) -> tuple[list[float], float]:
        # What rounding leaves of returns that cancel is no mean.
        is_zero = abs(math.fsum(returns)) <= 2.0**-40 * math.fsum(map(abs, returns))
        scale = 0.0 if is_zero else abs(mean(returns))
        return [(r - mean(returns)) / scale if scale else 0.0 for r in returns], scale

    return _credit(token_ids, rewards, response_mask, groups, step_rewards, formula)


def pass_at_k(
    logprobs: Table,
    token_ids: Rows,
    rewards: Rewards,
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    step_rewards: StepRewards = None,
    k: int = 2,
) -> list[list[float]]:
    """The best return of k rows with the row, less that of any k rows, over its deviation + 1e-6: of all sets of k."""

    def formula(returns: list[float], lengths: list[int]) -> tuple[list[float], float]:
        sets = list(combinations(range(len(returns)), min(k, len(returns))))
        bests = [max(returns[i] for i in chosen) for chosen in sets]
        best = mean(bests)
        std = math.sqrt(mean([(b - best) ** 2 for b in bests])) if max(bests) > min(bests) else 0.0
        holding = [mean([b for b, chosen in zip(bests, sets, strict=True) if i in chosen]) for i in range(len(returns))]
        # Returns are credited as a whole: nothing is taken off for what was earned before.
        return [(held - best) / (std + 1e-6) if std else 0.0 for held in holding], 0.0

    return _credit(token_ids, rewards, response_mask, groups, step_rewards, formula)
