"""KTAE: GRPO's credit, and beside it how much having a token goes with being right."""

import math

from python_ref.estimators import Groups, Mask, Rewards, Rows, StepRewards, Table, grpo, is_flat, scored_groups
from python_ref.find import full_mask
from python_ref.returns import total_returns


def ktae(
    logprobs: Table,
    token_ids: Rows,
    rewards: Rewards,
    *,
    response_mask: Mask = None,
    groups: Groups = None,
    step_rewards: StepRewards = None,
) -> list[list[float]]:
    """GRPO's credit + tanh((F + IG) D / 4), of the rows of a prompt that have the token; right is a return above 0."""
    masks = full_mask(token_ids, response_mask)
    advantages = grpo(
        logprobs, token_ids, rewards, response_mask=response_mask, groups=groups, step_rewards=step_rewards
    )
    returns = total_returns(token_ids, rewards, response_mask, step_rewards)
    words = [[t for t, m in zip(row, mask, strict=True) if m] for row, mask in zip(token_ids, masks, strict=True)]
    for rows in scored_groups(returns, groups):
        # What rounding leaves of returns that cancel is not above 0.
        least = 2.0**-40 * math.fsum(abs(returns[i]) for i in rows)
        right = [words[i] for i in rows if returns[i] > least]
        wrong = [words[i] for i in rows if not returns[i] > least]
        if is_flat([returns[i] for i in rows]) or not right or not wrong:
            continue
        keys = {token: key_value(token, right, wrong) for i in rows for token in words[i]}
        for i in rows:
            for t, is_live in enumerate(masks[i]):
                if is_live:
                    advantages[i][t] += keys[token_ids[i][t]]
    return advantages


def key_value(token: int, right: list[list[int]], wrong: list[list[int]]) -> float:
    """What goes with the token, from the tokens of each right and each wrong row."""
    a, b = (sum(token in row for row in rows) for rows in (right, wrong))
    often, seldom = (_frequency(token, rows, right + wrong) for rows in (right, wrong))
    direction = math.asin(math.sqrt(a / len(right))) - math.asin(math.sqrt(b / len(wrong)))
    direction += often / (seldom + 1e-5) - seldom / (often + 1e-5)
    return math.tanh((fisher(a, b, len(right), len(wrong)) + information(a, b, len(right), len(wrong))) * direction / 4)


def _frequency(token: int, rows: list[list[int]], every: list[list[int]]) -> float:
    """BM25's saturated frequency with k1 = 2 and b = 1/2, the rows as one document of two."""
    length, average = sum(map(len, rows)), sum(map(len, every)) / 2
    share = sum(row.count(token) for row in rows) / max(length, 1)
    return (2 + 1) * share / (share + 2 * (1 - 0.5 + 0.5 * length / average))


def fisher(a: int, b: int, right: int, wrong: int) -> float:
    """exp(-2 p) of the two-sided exact test, 0 where p is 1."""
    ways = [math.comb(right, k) * math.comb(wrong, a + b - k) for k in range(min(a + b, right) + 1)]
    p = sum(n for n in ways if n <= ways[a]) / sum(ways)
    return 0.0 if p == 1 else math.exp(-2 * p)


def information(a: int, b: int, right: int, wrong: int) -> float:
    """H(right or wrong) less what is left of it where one knows whether a row has the token, in bits."""

    def bits(x: int, y: int) -> float:
        return -math.fsum(z / (x + y) * math.log2(z / (x + y)) for z in (x, y) if z)

    rows = right + wrong
    return bits(right, wrong) - (a + b) / rows * bits(a, b) - (rows - a - b) / rows * bits(right - a, wrong - b)
