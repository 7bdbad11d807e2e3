"""The arguments of every estimator, checked, and where their rows lie."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_integer, check_like, check_real, check_rewards
from leafkernels._core.reference import from_reference, gradient_by
from leafkernels.rows.find import Rows, find_rows, to_lists, to_tokens
from leafkernels.rows.layout import Layout
from leafkernels.rows.returns import (
    Earned,
    check_functions,
    check_step_rewards,
    earned_at_tokens,
    total_returns,
    weighed_rewards,
)


class Rollouts(NamedTuple):
    """The rollouts of a call. A row without a return has no token in ``layout`` and counts nowhere."""

    logprobs: Tensor  # as the caller shaped them
    token_ids: Tensor
    rewards: Tensor  # (N,): all that each row earns
    rows: Rows
    backend: str
    where: dict[str, Any]  # the arguments that say where rows lie and whose they are, as they came
    given: tuple[Tensor | None, Tensor | None]  # rewards, (N,) or (N, functions), and step rewards, as they came
    reward_weights: Sequence[float] | Tensor | None = None
    earned: Earned | None = None  # where there are step rewards and tokens
    ends: Tensor | None = None  # (N,): of the rewards what comes at the end, where not all does

    @property
    def one_reward(self) -> Tensor:
        """(N,): what each row earns at its end, from all reward functions."""
        return self.rewards if self.ends is None else self.ends

    @property
    def layout(self) -> Layout:
        return self.rows.layout

    def as_lists(self, **others: Any) -> dict[str, Any]:
        """The arguments of a function of ``python_ref``; of ``others``, tensors are shaped like the ids."""
        call = {"logprobs": self.logprobs, "token_ids": self.token_ids, "response_mask": self.rows.mask, **others}
        lists = {k: to_lists(value, self.rows) if isinstance(value, Tensor) else value for k, value in call.items()}
        return {**lists, "groups": self.layout.group_of_row.tolist()}

    def by_reference(self, estimator: Callable[..., Tensor], **options: Any) -> Tensor:
        """What the estimator of this name in ``python_ref`` gives; its gradient is the PyTorch implementation's."""
        import python_ref

        name, weights = estimator.__name__, self.reward_weights

        def compute(rewards: Tensor | None, step_rewards: Tensor | None) -> Tensor:
            call = self.as_lists(step_rewards=step_rewards, **options)
            if weights is not None:
                assert rewards is not None
                numbers = weights.tolist() if isinstance(weights, Tensor) else weights
                call["rewards"] = python_ref.weighed_rewards(rewards.tolist(), numbers, groups=call["groups"])
            else:
                call["rewards"] = None if rewards is None else rewards.tolist()
            return to_tokens(getattr(python_ref, name)(**call), self.token_ids, torch.float32)

        def twin(rewards: Tensor | None, step_rewards: Tensor | None) -> Tensor:
            if rewards is not None:
                rewards = rewards.reshape(*self.rows.row_shape, *rewards.shape[1:])
            more = {"step_rewards": step_rewards, "reward_weights": weights, **options, "backend": "torch"}
            return estimator(self.logprobs, self.token_ids, rewards, **self.where, **more)

        return from_reference(name, compute, gradient_by(twin, 2), *self.given)


def read_rollouts(
    logprobs: Any,
    token_ids: Any,
    rewards: Any,
    response_mask: Any,
    groups: Any,
    group_size: Any,
    cu_seqlens: Any,
    backend: str,
    step_rewards: Any = None,
    reward_weights: Sequence[float] | Tensor | None = None,
) -> Rollouts:
    """Check the arguments that all estimators take; see ``span_advantages`` for what they must be."""
    token_ids = check_integer("token_ids", token_ids)
    check_real("logprobs", logprobs)
    check_like("logprobs", logprobs, "token_ids", token_ids.shape, token_ids.device)
    backend = resolve_backend(backend, token_ids.device)
    rows = find_rows("token_ids", token_ids, response_mask, groups, group_size, cu_seqlens, backend)
    row_shape, shape, device = rows.row_shape, tuple(token_ids.shape), token_ids.device
    flat_steps = check_step_rewards(step_rewards, token_ids)
    given = None
    if reward_weights is not None:
        given, reward_weights = check_functions(rewards, reward_weights, "token_ids", row_shape, device)
        returns = weighed_rewards(given, reward_weights, rows.layout, backend)
    elif rewards is not None or step_rewards is None:
        given = returns = check_rewards(rewards, "token_ids", row_shape, device, shape)
    else:
        returns = logprobs.new_zeros(rows.layout.row_lengths.shape, dtype=torch.float64)
    earned = ends = None
    if flat_steps is not None and flat_steps.numel():
        earned = earned_at_tokens(flat_steps, rows, 0 if cu_seqlens is not None else shape[-1], backend)
        ends = returns
        returns, earned = total_returns(ends, earned, rows.layout)
    rows = rows._replace(layout=rows.layout.without(returns.isnan()))
    where = {"response_mask": response_mask, "groups": groups, "group_size": group_size, "cu_seqlens": cu_seqlens}
    more = (given, step_rewards), reward_weights, earned, ends
    return Rollouts(logprobs, token_ids, returns, rows, backend, where, *more)
