"""The optimal token baseline: one for each token number; arguments as ``span_advantages`` takes them."""

import math

from python_ref.estimators import Groups, Mask, Rewards, Rows, StepRewards, Table, is_flat, scored_groups
from python_ref.find import full_mask, stretch
from python_ref.returns import returns_to_go
from python_ref.values import mean


def otb(
    logprobs: Table,
    token_ids: Rows,
    rewards: Rewards,
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    step_rewards: StepRewards = None,
    sum_squares: Table | None = None,
) -> list[list[float]]:
    """R_t - sum(W R_t) / sum(W) over the rows of the prompt that have a t-th unmasked token, W from there to the first

    the sum of 1 - 2 p + sum p^2; of (1 - p)^2 without ``sum_squares``. A token without numbers adds nothing.
    """
    masks = full_mask(token_ids, response_mask)
    to_go = returns_to_go(token_ids, rewards, response_mask, step_rewards)
    advantages = [[0.0] * len(mask) for mask in masks]
    for rows in scored_groups([row[0] for row in to_go], groups):
        tokens = {i: [t for t, is_live in enumerate(masks[i]) if is_live] for i in rows}
        for number in range(max(len(places) for places in tokens.values())):
            here = [i for i in rows if len(tokens[i]) > number]
            if len(here) < 2:
                continue
            returns = [to_go[i][tokens[i][number] - stretch(masks[i])[0]] for i in here]
            if is_flat(returns):
                continue
            weights = [
                math.fsum(
                    _moved(logprobs[i][t], None if sum_squares is None else sum_squares[i][t])
                    for t in tokens[i][: number + 1]
                )
                for i in here
            ]
            total = math.fsum(weights)
            baseline = (
                math.fsum(w * r for w, r in zip(weights, returns, strict=True)) / total if total else mean(returns)
            )
            for i, r in zip(here, returns, strict=True):
                advantages[i][tokens[i][number]] = r - baseline
    return advantages


def _moved(logprob: float, squares: float | None) -> float:
    """The squared norm of e - p: that of the sampled id's own entry, and of the others, which share 1 - p."""
    if math.isnan(logprob) or (squares is not None and math.isnan(squares)):
        return 0.0
    rest = math.expm1(min(logprob, 0.0)) ** 2
    if squares is None:
        return rest
    return rest + min(max(squares - math.exp(2.0 * min(logprob, 0.0)), 0.0), rest)
