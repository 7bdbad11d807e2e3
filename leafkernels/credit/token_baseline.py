"""The optimal token baseline: of each token number one baseline, weighed by how much rows have moved up to there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from leafkernels._core.checks import check_like, check_real
from leafkernels.rows.returns import earned_at_tokens
from leafkernels.rows.rollouts import Rollouts, read_rollouts
from leafkernels.rows.segments import segments_of_names


def otb(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    step_rewards: Tensor | None = None,
    reward_weights: Sequence[float] | Tensor | None = None,
    sum_squares: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """r - sum(W r) / sum(W), over the prompt's rows that have a token of that number (OTB, arXiv 2602.07078).

    W of a row's token is the sum over its unmasked tokens up to it of 1 - 2 p + sum p^2: the squared norm of the
    gradient of log p in the logits, that is of e - p. Beside that of the others this baseline has the least variance;
    it depends on the row itself and on its tokens, so that it is not unbiased. Tokens are numbered by the unmasked ones
    of their row. A row that alone has a token of a number gets 0 there, and so does a prompt whose returns are equal.
    Where no row has moved (all p are 1) the baseline is the mean.

    The sum p^2 is ``surprisal_entropy(..., statistics=["sum_squares"])``. **Without it** W is the sum of (1 - p)^2,
    which is right where one other id has all the rest, and up to a factor of 2 too small beside it elsewhere.

    The formula was checked against verl 0.9.1's ``tir_optimal_token_baseline`` and, where masks have no holes,
    ``optimal_token_baseline``, with ``handle_zero_tail=False``. By default verl gives the end of the longest row, where
    it is alone, its return without a baseline. The paper's text was not at hand but for its abstract.

    The other arguments, layouts and errors are those of ``opo``. With ``step_rewards`` r is R_t, what the row has still
    to earn.

    Args:
        sum_squares: floating point, shaped like ``token_ids``, a constant. A token of which it or the log-probability
            is NaN adds nothing to W.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Linear in ``rewards``.

    Example:
        >>> ids, logprobs = torch.zeros(2, 2, dtype=torch.int64), torch.tensor([[0.5, 0.5], [0.75, 1.0]]).log()
        >>> leafkernels.otb(logprobs, ids, torch.tensor([1.0, 0.0]))
        tensor([[ 0.2000,  0.1111],
                [-0.8000, -0.8889]])
    """
    if sum_squares is not None:
        check_real("sum_squares", sum_squares)
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    if sum_squares is not None:
        check_like("sum_squares", sum_squares, "token_ids", token_ids.shape, token_ids.device)
        sum_squares = sum_squares.detach()
    if rollouts.backend == "reference":
        return rollouts.by_reference(otb, sum_squares=sum_squares)
    shape, layout = token_ids.shape, rollouts.layout
    if not token_ids.numel():
        return rollouts.rewards[:0].sum().to(torch.float32).expand(shape).contiguous()  # with a gradient of 0
    earned = rollouts.earned
    if earned is None:
        nothing = torch.zeros(token_ids.numel(), dtype=torch.float64, device=token_ids.device)
        earned = earned_at_tokens(nothing, rollouts.rows, shape[-1] if cu_seqlens is None else 0, rollouts.backend)
    row, is_token = earned.row_of_token, earned.is_token
    moved = earned.along_rows(_moved(rollouts, sum_squares).masked_fill(~is_token, 0.0))
    number = earned.along_rows(is_token.to(torch.float64)).long()
    # Tokens that do not count are a prompt of their own, after all others.
    prompt = layout.group_of_row[row].masked_fill(~is_token, layout.group_starts.shape[0])
    rows = segments_of_names(number, prompt, backend=rollouts.backend)._replace(longest=layout.max_group)
    to_go = (rollouts.rewards.to(torch.float64)[row] - earned.before_tokens()).masked_fill(~is_token, 0.0)
    found = rows.statistics(to_go, is_token)
    total = rows.totals(moved)
    baseline = rows.totals(moved * found.centred) / total.masked_fill(total == 0.0, 1.0)
    credit = (found.centred - baseline).masked_fill(~is_token | (found.number < 2.0), 0.0)
    return credit.to(torch.float32).reshape(shape)


def _moved(rollouts: Rollouts, sum_squares: Tensor | None) -> Tensor:
    """(M,) float64: 1 - 2 p + sum p^2, as (1 - p)^2 and the squares of the others, which no rounding turns."""
    logprobs = rollouts.logprobs.detach().reshape(-1).to(torch.float64).clamp_max(0.0)
    rest = logprobs.expm1().square()
    if sum_squares is None:
        return rest.nan_to_num(0.0)
    others = sum_squares.reshape(-1).to(torch.float64) - (2.0 * logprobs).exp()
    # Others that share 1 - p have squares of at most its own.
    return (rest + torch.minimum(others.clamp_min(0.0), rest)).nan_to_num(0.0)
