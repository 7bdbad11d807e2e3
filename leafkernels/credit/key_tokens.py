"""KTAE: GRPO's credit, and beside it how much having a token goes with being right."""

from collections.abc import Sequence

import torch
from torch import Tensor

from leafkernels.credit.baselines import credit_rows, live_lengths
from leafkernels.rows.returns import earned_at_tokens
from leafkernels.rows.rollouts import Rollouts, read_rollouts
from leafkernels.rows.segments import Segments, Statistics, segments_of_groups, segments_of_names


def ktae(
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
    """(r - mean) / (std + 1e-6) + tanh((F + IG) D / 4), the second from the prompt's rows that have the token.

    Rows whose reward is above 0 are right, all others wrong. How many of each have a token gives a table of 2 x 2: p is
    its two-sided Fisher's exact test, F = exp(-2 p), 0 where p is 1; IG is the information gain in bits. D, the
    direction, is asin(sqrt(share of the right rows)) - asin(sqrt(share of the wrong rows)) + T / (W + 1e-5) - W / (T +
    1e-5). T and W are 3 f / (f + 1 + l / mean l), f the share of the token among all l tokens of the right, or the
    wrong, rows. That is KTAE (arXiv 2505.16826) as its authors' code computes it, against which formula and constants
    were checked, with all its weights 1, but that no id is exempt, as 151643 is there. Where all rows of a prompt are
    right, or all are wrong, it is GRPO's credit.

    A token that right rows alone have gets next to 1 more than GRPO's, one of wrong rows alone 1 less. Of ``logprobs``
    only the shape matters. Arguments, layouts and errors are those of ``opo``. With ``step_rewards`` the first term is
    GRPO's, and rows are right by their returns; with ``reward_weights`` by the weighted sum of what is centred.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Differentiable in ``rewards``, of which the
        second term is piecewise constant.

    Example:
        >>> token_ids = torch.tensor([[1, 2], [1, 3], [1, 3], [1, 2]])
        >>> leafkernels.ktae(torch.zeros(4, 2), token_ids, torch.tensor([1.0, 0.0, 0.0, 1.0]))
        tensor([[ 0.8660,  1.8660],
                [-0.8660, -1.8660],
                [-0.8660, -1.8660],
                [ 0.8660,  1.8660]])
    """
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    if rollouts.backend == "reference":
        return rollouts.by_reference(ktae)

    def formula(rollouts: Rollouts, groups: Segments, found: Statistics) -> tuple[Tensor, Tensor]:
        return found.centred, found.divisor

    return credit_rows(rollouts, formula, beside=_key_values(rollouts) if rollouts.token_ids.numel() else None)


def _key_values(rollouts: Rollouts) -> Tensor:
    """(M,) float64: the second term of each token, 0 for those that do not count. Counts of rows and tokens are exact,
    so that no order changes a bit."""
    layout, ids = rollouts.layout, rollouts.token_ids.reshape(-1)
    earned = rollouts.earned
    if earned is None:
        nothing = torch.zeros(ids.shape[0], dtype=torch.float64, device=ids.device)
        width = 0 if rollouts.where["cu_seqlens"] is not None else rollouts.token_ids.shape[-1]
        earned = earned_at_tokens(nothing, rollouts.rows, width, rollouts.backend)
    row, is_token = earned.row_of_token, earned.is_token

    groups, returns = segments_of_groups(layout, rollouts.backend), rollouts.rewards.detach().to(torch.float64)
    scored = ~returns.isnan()
    is_flat = groups.statistics(returns, scored).std == 0.0
    size = groups.totals(returns.masked_fill(~scored, 0.0).abs())
    right = scored & (returns > 2.0**-40 * size)  # what rounding leaves of returns that cancel is not above 0
    wrong = scored & ~right

    # Tokens that do not count are a row, and a prompt, of their own.
    prompt = torch.where(is_token, layout.group_of_row[row], layout.group_starts.shape[0])
    in_row = segments_of_names(ids, torch.where(is_token, row, -1), backend=rollouts.backend)
    places = torch.arange(ids.shape[0], device=ids.device)
    is_first = torch.empty_like(is_token).index_copy(0, in_row.order, places == in_row.starts)
    tokens, lengths = segments_of_names(ids, prompt, backend=rollouts.backend), live_lengths(rollouts).to(torch.float64)

    def counts(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each token: the rows of its prompt, those that have it, all their tokens, and those that are it."""
        of_token = rows[row] & is_token
        have, same = (tokens.totals(x.to(torch.float64)) for x in (of_token & is_first, of_token))
        of_prompt = groups.totals(rows.to(torch.float64))[row], groups.totals(lengths * rows)[row]
        return of_prompt[0], have, of_prompt[1], same

    (all_right, a, right_tokens, right_same), (all_wrong, b, wrong_tokens, wrong_same) = counts(right), counts(wrong)
    strength = _fisher(a, b, all_right, all_wrong, layout.max_group) + _information(a, b, all_right, all_wrong)
    share = [(x / y.clamp_min(1.0)).sqrt().asin() for x, y in ((a, all_right), (b, all_wrong))]
    average = ((right_tokens + wrong_tokens) / 2.0).clamp_min(0.5)
    frequency = []
    for same, number in ((right_same, right_tokens), (wrong_same, wrong_tokens)):
        f = same / number.clamp_min(1.0)
        frequency.append(3.0 * f / (f + 1.0 + number / average))
    often, seldom = frequency
    direction = share[0] - share[1] + often / (seldom + 1e-5) - seldom / (often + 1e-5)
    is_none = ~is_token | is_flat[row] | (all_right == 0.0) | (all_wrong == 0.0)
    return (strength * direction / 4.0).tanh().masked_fill(is_none, 0.0)


def _fisher(a: Tensor, b: Tensor, right: Tensor, wrong: Tensor, most: int) -> Tensor:
    """exp(-2 p), 0 where p is 1: of a of ``right`` and b of ``wrong`` rows, which are ``most`` together at most."""
    factorials = torch.arange(1, most + 2, dtype=torch.float64, device=a.device).lgamma()

    def log_ways(k: Tensor) -> Tensor:
        """The log of C(right, k) C(wrong, a + b - k), -inf where there is none."""
        is_some = (k >= 0.0) & (k <= right) & (a + b - k >= 0.0) & (a + b - k <= wrong)
        terms = [(right, 1), (wrong, 1), (k, -1), (right - k, -1), (a + b - k, -1), (wrong - a - b + k, -1)]
        total = torch.zeros_like(a)
        for number, sign in terms:
            total = total + sign * factorials[number.long().clamp(0, most)]
        return total.masked_fill(~is_some, -torch.inf)

    own = log_ways(a)
    likely, unlikely = torch.zeros_like(a), torch.zeros_like(a)
    for number in range(most + 1):
        ways = log_ways(torch.full_like(a, float(number)))
        # Of equal chances neither is less; their logs are off by rounding.
        is_no_likelier = ways <= own + 1e-9
        chance = (ways - own).exp()
        unlikely = unlikely + torch.where(is_no_likelier, chance, 0.0)
        likely = likely + torch.where(is_no_likelier, 0.0, chance)
    p = unlikely / (unlikely + likely)
    return torch.where(likely == 0.0, 0.0, (-2.0 * p).exp())


def _information(a: Tensor, b: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """The bits that having the token tells of being right."""

    def bits(x: Tensor, y: Tensor) -> Tensor:
        """Entropy of two counts, times their sum."""
        total = x + y
        parts = (z * (total.clamp_min(1.0) / z.clamp_min(1.0)).log2() for z in (x, y))
        return sum(parts, torch.zeros_like(total))

    gain = bits(right, wrong) - bits(a, b) - bits(right - a, wrong - b)
    return gain / (right + wrong).clamp_min(1.0)
