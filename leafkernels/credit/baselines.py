"""One number a row against other baselines than the mean of its prompt, called as ``grpo`` is.

PyTorch on every backend, a few numbers a row; then the scatter of the backend.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from leafkernels._core.checks import check_count, check_finite
from leafkernels.credit.scatter import credit_tokens
from leafkernels.rows.layout import to_int32
from leafkernels.rows.rollouts import Rollouts, read_rollouts
from leafkernels.rows.segments import Segments, Statistics, segments_of_groups

# Of the returns of rows what they are credited, and what divides it.
_Formula = Callable[[Rollouts, Segments, Statistics], tuple[Tensor, Tensor]]


def credit_rows(rollouts: Rollouts, formula: _Formula, is_linear: bool = True, beside: Tensor | None = None) -> Tensor:
    """``formula`` gives (N,) numbers and what divides them, which also divides what was earned before a token;
    ``beside`` (M,) is what tokens get beside that."""
    groups, rewards = segments_of_groups(rollouts.layout, rollouts.backend), rollouts.rewards.to(torch.float64)
    found = groups.statistics(rewards, ~rewards.isnan())
    values, divisor = formula(rollouts, groups, found)
    is_zero = (divisor == 0.0) | (found.number < 2.0)
    divisor = divisor.masked_fill(is_zero, 1.0)
    values, weight = ((x / divisor).masked_fill(is_zero, 0.0) for x in (values, torch.ones_like(values)))
    ends = to_int32(rollouts.layout.row_lengths)
    return credit_tokens(rollouts, values[:, None], ends[:, None], weight if is_linear else None, beside)


def _in_order(values: Tensor, groups: Segments, found: Statistics) -> Segments:
    """The order of ``groups`` in which the values of each prompt rise; rows without one come last."""
    ranked = values.detach().masked_fill(found.is_out, torch.inf)[groups.order]
    order = torch.argsort(ranked, stable=True)
    order = order[torch.argsort(groups.starts[order], stable=True)]
    return groups._replace(order=groups.order[order])


def opo(
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
    backend: str = "auto",
) -> Tensor:
    """r - sum(l r) / sum(l) at every token of a rollout, l its number of unmasked tokens (OPO, arXiv 2505.23585).

    The baseline of least variance where every token has a gradient of the same size, orthogonal to all others. Checked
    against verl 0.9.1's function, whose one row of a prompt has its whole reward. Of
    ``logprobs`` and ``token_ids`` only the shape matters. Arguments, layouts and errors are those of ``grpo`` without
    ``steps`` and ``states``; with ``step_rewards`` it is R_t less the same mean of returns.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Linear in ``rewards``.

    Example:
        >>> token_ids, mask = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
        >>> leafkernels.opo(torch.zeros(2, 4), token_ids, torch.tensor([1.0, 0.0]), response_mask=mask)
        tensor([[ 0.2000,  0.2000,  0.2000,  0.2000],
                [-0.8000,  0.0000,  0.0000,  0.0000]])
    """
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    if rollouts.backend == "reference":
        return rollouts.by_reference(opo)

    def formula(rollouts: Rollouts, groups: Segments, found: Statistics) -> tuple[Tensor, Tensor]:
        lengths = live_lengths(rollouts).to(torch.float64)
        baseline = groups.totals(lengths * found.centred) / groups.totals(lengths).clamp_min(1.0)
        return found.centred - baseline, torch.ones_like(baseline)

    return credit_rows(rollouts, formula)


def live_lengths(rollouts: Rollouts) -> Tensor:
    """(N,) int64: unmasked tokens of each row, 0 for those without a return."""
    layout, mask = rollouts.layout, rollouts.rows.mask
    if mask is None:
        return layout.row_lengths
    if mask.dim() == 2:
        counts = mask.sum(1)
    else:
        sums = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        counts = sums[layout.slot_ends] - sums[layout.slot_starts]
    return counts.masked_fill(layout.row_lengths == 0, 0)


def qae(
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
    quantile: float = 0.4,
    backend: str = "auto",
) -> Tensor:
    """(r - quantile) / (std + 1e-6), the quantile that of the prompt's rewards (QAE, arXiv 2509.22611).

    The quantile is the least reward that a share of ``quantile`` of the prompt's rows does not exceed. Of rewards 0 and
    1 it is 0 where at most 1 - ``quantile`` of the rows have 1, and only these are credited then; else it is 1, and
    only the others are.

    That is the gate of the paper's abstract. 0.4, and the division by the deviation, which stays GRPO's, are those of
    its authors' code; there ``torch.quantile`` interpolates, so that it differs where ``quantile`` times the number of
    rows less 1 lies between the places of two unequal rewards. The other arguments, layouts and errors are those of
    ``opo``.

    Args:
        quantile: from 0, the least reward, to 1, the largest.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Differentiable in ``rewards``.

    Example:
        >>> token_ids = torch.zeros(4, 2, dtype=torch.int64)
        >>> leafkernels.qae(torch.zeros(4, 2), token_ids, torch.tensor([1.0, 0.0, 0.0, 0.0]))[:, 0]
        tensor([2.0000, 0.0000, 0.0000, 0.0000])
    """
    check_finite("quantile", quantile)
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must lie between 0 and 1, got {quantile}")
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    if rollouts.backend == "reference":
        return rollouts.by_reference(qae, quantile=quantile)

    def formula(rollouts: Rollouts, groups: Segments, found: Statistics) -> tuple[Tensor, Tensor]:
        ordered = _in_order(found.centred, groups, found)
        # Less a rounding of the product, which must not make 0.7 * 10 more than 7.
        rank = (found.number * quantile - 1e-9).ceil().clamp_min(1.0).long()
        starts = torch.empty_like(groups.starts).index_copy(0, groups.order, groups.starts)
        at = (starts + rank - 1).clamp(0, max(rank.shape[0] - 1, 0))
        baseline = found.centred[ordered.order][at]
        return found.centred - baseline, found.divisor

    return credit_rows(rollouts, formula)


def maxrl(
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
    backend: str = "auto",
) -> Tensor:
    """(r - mean) / |mean| at every token of a rollout, 0 where the mean is 0 (MaxRL, arXiv 2602.02710).

    For rewards 0 and 1 it is the gradient of the log of the chance of success, in as many terms as there are rollouts:
    prompts that seldom succeed weigh more. Checked against public copies of its authors' code, which divides by mean +
    1e-6; the absolute value is ours, for negative rewards. Arguments, layouts and errors are those of ``opo``;
    ``reward_weights`` must be None, because what they weigh is centred and has no mean.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Differentiable in ``rewards``.

    Example:
        >>> token_ids = torch.zeros(4, 2, dtype=torch.int64)
        >>> leafkernels.maxrl(torch.zeros(4, 2), token_ids, torch.tensor([1.0, 0.0, 0.0, 0.0]))[:, 0]
        tensor([ 3., -1., -1., -1.])
    """
    if reward_weights is not None:
        raise ValueError(
            "reward_weights must be None with maxrl, which divides by the mean of rewards: those of several functions "
            f"are centred, got {reward_weights!r:.80}"
        )
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    if rollouts.backend == "reference":
        return rollouts.by_reference(maxrl)

    def formula(rollouts: Rollouts, groups: Segments, found: Statistics) -> tuple[Tensor, Tensor]:
        scored = rollouts.rewards.to(torch.float64).masked_fill(found.is_out, 0.0)
        total, size = groups.totals(scored).abs(), groups.totals(scored.detach().abs())
        # What rounding leaves of rewards that cancel is no mean.
        return found.centred, total.masked_fill(total <= 2.0**-40 * size, 0.0) / found.number.clamp_min(1.0)

    return credit_rows(rollouts, formula)


def pass_at_k(
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
    k: int = 2,
    backend: str = "auto",
) -> Tensor:
    """(best of k with the row - best of k) / (std + 1e-6) over all sets of k rows of a prompt (arXiv 2508.10751).

    Best of k is the largest reward of a set, a mean over all sets, or over those that hold the row; std is its
    deviation over all sets. For rewards 0 and 1 that is the paper's pass@k in closed form, checked against its authors'
    code. Returns are credited as a whole, ``step_rewards`` too, since a best is no sum. The other arguments, layouts
    and errors are those of ``opo``.

    Args:
        k: rows of a set, at least 1; at most those of the prompt, and then all rows get 0.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Differentiable in ``rewards``.

    Example:
        >>> token_ids = torch.zeros(4, 2, dtype=torch.int64)
        >>> leafkernels.pass_at_k(torch.zeros(4, 2), token_ids, torch.tensor([1.0, 0.0, 0.0, 0.0]))[:, 0]
        tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    check_count("k", k, 1, 2**53)
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    if rollouts.backend == "reference":
        return rollouts.by_reference(pass_at_k, k=k)

    def formula(rollouts: Rollouts, groups: Segments, found: Statistics) -> tuple[Tensor, Tensor]:
        ordered = _in_order(found.centred, groups, found)
        values, number = found.centred[ordered.order], found.number[ordered.order]
        size = number.clamp(1.0, float(k))
        # Rows of a prompt that are no better, the row itself left out.
        places = torch.arange(values.shape[0], device=values.device)
        below, is_in = (places - groups.starts).to(torch.float64), ~found.is_out[ordered.order]

        def share(some: Tensor, of: Tensor, chosen: Tensor) -> Tensor:
            """How many of all sets lie within some of the rows: C(some, chosen) / C(of, chosen)."""
            is_some = is_in & (some >= chosen) & (chosen >= 0.0)
            some, of, chosen = (torch.where(is_some, x, 1.0) for x in (some, of, chosen))
            log = (some + 1.0).lgamma() - (some - chosen + 1.0).lgamma()
            return torch.where(is_some, (log - (of + 1.0).lgamma() + (of - chosen + 1.0).lgamma()).exp(), 0.0)

        # The best of a set is this row: k - 1 others are below it, of n - 1 rows, and it is in k of n sets.
        holding = share(below, number - 1.0, size - 1.0)
        best = ordered.totals_in_order(values * holding * size / number.clamp_min(1.0))
        spread = (values - best).square() * holding * size / number.clamp_min(1.0)
        std = ordered.totals_in_order(spread).clamp_min(0.0)
        # Sets whose best are equal have no spread; the rounding of its parts has.
        is_zero = std <= 1e-24 * found.std[ordered.order].square()
        std = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, std).sqrt())
        # Another row is the best of those that hold this one: k - 2 further rows below it, of n - 2.
        others = values * share(below - 1.0, number - 2.0, size - 2.0) * (size - 1.0) / (number - 1.0).clamp_min(1.0)
        above = ordered.totals_in_order(others) - ordered.running_sums(others)
        credit = values * holding + above - best
        back = torch.empty_like(ordered.order).index_copy(0, ordered.order, places)
        divisor = torch.where(std == 0.0, 0.0, std + 1e-6)
        return credit[back], divisor[back]

    return credit_rows(rollouts, formula, is_linear=False)
