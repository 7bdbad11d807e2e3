"""Other estimators on the same rollouts, called as ``span_advantages`` is: compare credit schemes by changing a name.

Options of ``span_advantages``'s tree (``num_boundaries`` and the like) are taken by those that have such a tree only:
here ``treerl`` takes ``num_boundaries``, ``min_separation`` and ``boundary_scores``, the others none. ``tree_td`` has
weights of its own.

With r the reward of a row, mean, std (ddof 1) and G, the number of rows, those of its prompt:

    grpo       (r - mean) / (std + 1e-6)
    dr_grpo    r - mean
    rloo       G / (G - 1) * (r - mean)
    tempo      (r - mean + V(s_{t+1}) - V(s_t)) / (std + 1e-6), V the mean reward of the rows that share a prefix
    tree_td    V(s_{t+1}) - V(s_t) + group_weight (r - mean), V of few rows shrunk towards their parent's
    treerl     2 V_k / sqrt(n_k) - V_{k-1} / sqrt(n_{k-1}), on the nodes at the boundaries of ``span_advantages``

With ``step_rewards`` a row earns at any token, and r is all that it earns. ``treerl``, as LEAF, credits that; the
others credit what is still to come: r becomes R_t, the row's reward and its step rewards from token t on, and V before
and after a token the mean of what the rows that share the prefix have still to earn at that token.

As there, a row whose reward is NaN takes no part in anything and gets 0, an empty row counts in mean, std and G, and a
prompt of one row, or one whose rewards are all equal but for rounding, gets exactly 0.0.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.checks import check_integer, check_like
from leafkernels.credit.options import CreditOptions
from leafkernels.credit.scatter import credit_tokens
from leafkernels.credit.values import values_of_groups
from leafkernels.rows.returns import earned_at_tokens
from leafkernels.rows.rollouts import Rollouts, read_rollouts
from leafkernels.rows.segments import segments_of_groups, segments_of_names


def _one_for_each_row(
    estimator: Callable[..., Tensor],
    rollouts: Rollouts,
    leave_one_out: bool,
    normalize: str,
    steps: Tensor | None,
    states: Tensor | None,
) -> Tensor:
    """The credit of a tree without boundaries: it has no nodes, and every row is a tail."""
    token_ids = rollouts.token_ids
    flat_steps, flat_states = _check_names("steps", steps, token_ids), _check_names("states", states, token_ids)
    if rollouts.backend == "reference":
        return rollouts.by_reference(estimator, steps=steps, states=states)
    if flat_steps is not None or flat_states is not None:
        return _against_visits(rollouts, flat_steps, flat_states, leave_one_out, normalize)
    layout = rollouts.layout
    nodes = layout.row_lengths.new_empty((layout.row_lengths.shape[0], 0))
    boundaries = layout.group_starts.new_empty((layout.group_starts.shape[0] - 1, 0), dtype=torch.int32)
    spans = values_of_groups(
        rollouts.rewards,
        nodes,
        boundaries,
        layout,
        CreditOptions(terms="global", multiplicity_power=0.0, leave_one_out=leave_one_out, normalize=normalize),
        rollouts.backend,
    )
    weight = None
    if rollouts.earned is not None:
        rewards = rollouts.rewards.to(torch.float64)
        found = segments_of_groups(layout, rollouts.backend).statistics(rewards, ~rewards.isnan())
        weight = torch.where(found.number > 1.0, 1.0, 0.0)
        if normalize == "reward_std":
            weight = found.over_std(weight)
    return credit_tokens(rollouts, spans.values, spans.span_ends, weight)


def _check_names(name: str, value: Tensor | None, token_ids: Tensor) -> Tensor | None:
    """The steps or states of tokens, flattened; raise unless they are integers shaped like the ids."""
    if value is None:
        return None
    value = check_integer(name, value)
    check_like(name, value, "token_ids", token_ids.shape, token_ids.device)
    return value.reshape(-1)


def _against_visits(
    rollouts: Rollouts, steps: Tensor | None, states: Tensor | None, leave_one_out: bool, normalize: str
) -> Tensor:
    """What a row has still to earn at a token against what all had where their visits of its step, or state, began.

    A visit is a run of unmasked tokens of a row whose step and state are the same. One entry for each token, of which
    those count at which a visit begins: their number is not read.
    """
    shape, layout = rollouts.token_ids.shape, rollouts.layout
    if not rollouts.token_ids.numel():
        return torch.zeros(shape, dtype=torch.float32, device=rollouts.token_ids.device)
    width = shape[-1] if len(shape) > 1 else 0
    earned = rollouts.earned
    if earned is None:
        nothing = torch.zeros(rollouts.token_ids.numel(), dtype=torch.float64, device=rollouts.token_ids.device)
        earned = earned_at_tokens(nothing, rollouts.rows, width, rollouts.backend)
    row, is_token, before = earned.row_of_token, earned.is_token, earned.before_tokens()
    places = torch.arange(row.shape[0], device=row.device)
    last = pad(torch.where(is_token, places, -1).cummax(0).values[:-1], (1, 0), value=-1)
    is_same = last >= earned.first_of_row[row]
    for names in (steps, states):
        if names is not None:
            is_same = is_same & (names == names[last.clamp_min(0)])
    begins = is_token & ~is_same
    begin = torch.where(begins, places, 0).cummax(0).values

    to_go = (rollouts.rewards.to(torch.float64)[row] - before).masked_fill(~begins, 0.0)
    # Tokens that do not count are a prompt of their own, after all others.
    group = layout.group_of_row[row].masked_fill(~is_token, layout.group_starts.shape[0])
    names = steps if states is None else states
    assert names is not None
    found = segments_of_names(names, group, backend=rollouts.backend).statistics(to_go, begins)
    own, number = found.centred, found.number - 1.0
    if leave_one_out:
        # The mean of the visits of other rows: what a row does changes its own later ones.
        visits = segments_of_names(names, torch.where(is_token, row, -1), backend=rollouts.backend)
        sums, number = visits.totals(found.centred), found.number - visits.totals(begins.to(torch.float64))
        own = found.centred + sums / number.clamp_min(1.0)
    credit = own[begin] - (before - before[begin])
    if normalize == "reward_std":
        credit = found.over_std(credit)
    return credit.masked_fill(~is_token | (number < 1.0), 0.0).to(torch.float32).reshape(shape)


def grpo(
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
    steps: Tensor | None = None,
    states: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """(r - mean) / (std + 1e-6) at every token of a rollout, std with ddof 1 (GRPO, arXiv 2402.03300).

    Only the shape of ``logprobs`` and ``token_ids`` matters. Arguments, layouts and errors are those of
    ``span_advantages`` without the options of its tree, and two more.

    With ``step_rewards`` this is (R_t - mean) / (std + 1e-6): R_t is the row's reward and what it earns from token t
    on, mean and std are those of the prompt's returns. Where these are all equal, the prompt gets 0.

    Args:
        steps: integers shaped like ``token_ids``, which turn a token belongs to: mean and std are then those of what
            the prompt's rows have still to earn where their turn of that number begins, over the rows that have it
            (turn-level GRPO). A turn that one row alone has gets 0. Values at masked tokens do not matter.
        states: integers shaped like ``token_ids``, a name for the state in which a token was sampled: mean and std are
            those of what is still to be earned over all visits of the state in the prompt (the step level of GiGPO,
            arXiv 2505.10978; its whole advantage is ``grpo(...) + weight * grpo(..., states=...)``). A visit is a run
            of unmasked tokens of a row with one state, and with one step where ``steps`` are given too.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Differentiable in ``rewards``.

    Example:
        >>> token_ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
        >>> leafkernels.grpo(torch.zeros(3, 3), token_ids, torch.tensor([1.0, 0.0, 0.0]))
        tensor([[ 1.1547,  1.1547,  1.1547],
                [-0.5773, -0.5773, -0.5773],
                [-0.5773, -0.5773, -0.5773]])
    """
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    return _one_for_each_row(grpo, rollouts, False, "reward_std", steps, states)


def dr_grpo(
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
    steps: Tensor | None = None,
    states: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """r - mean at every token of a rollout (Dr. GRPO, arXiv 2503.20783).

    Of ``logprobs`` and ``token_ids`` only the shape matters. Arguments, layouts and errors are those of ``grpo``. With
    ``step_rewards``, ``steps`` and ``states`` it is R_t minus the mean that is meant there.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Linear in ``rewards``.

    Example:
        >>> token_ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
        >>> leafkernels.dr_grpo(torch.zeros(3, 3), token_ids, torch.tensor([1.0, 0.0, 0.0]))
        tensor([[ 0.6667,  0.6667,  0.6667],
                [-0.3333, -0.3333, -0.3333],
                [-0.3333, -0.3333, -0.3333]])
    """
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    return _one_for_each_row(dr_grpo, rollouts, False, "none", steps, states)


def rloo(
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
    steps: Tensor | None = None,
    states: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """r minus the mean of the prompt's other rewards, at every token of a rollout (RLOO, arXiv 2402.14740).

    That is G / (G - 1) * (r - mean). Of ``logprobs`` and ``token_ids`` only the shape matters. Arguments, layouts and
    errors are those of ``grpo``. With ``step_rewards`` it is R_t minus the mean return of the prompt's others; with
    ``steps`` or ``states`` minus the mean of the visits of other rows, and 0 where there is none.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Linear in ``rewards``.

    Example:
        >>> token_ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
        >>> leafkernels.rloo(torch.zeros(3, 3), token_ids, torch.tensor([1.0, 0.0, 0.0]))
        tensor([[ 1.0000,  1.0000,  1.0000],
                [-0.5000, -0.5000, -0.5000],
                [-0.5000, -0.5000, -0.5000]])
    """
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    return _one_for_each_row(rloo, rollouts, True, "none", steps, states)
