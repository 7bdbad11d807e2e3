"""The arguments of every estimator, checked, and where their rows lie."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_integer, check_like, check_real, check_rewards
from leafkernels._core.reference import from_reference, gradient_by
from leafkernels.rows.find import Rows, find_rows, to_lists, to_tokens
from leafkernels.rows.layout import Layout


class Rollouts(NamedTuple):
    """The rollouts of a call. A row without a reward has no token in ``layout`` and counts nowhere."""

    logprobs: Tensor  # as the caller shaped them
    token_ids: Tensor
    rewards: Tensor  # (N,)
    rows: Rows
    backend: str
    where: dict[str, Any]  # the arguments that say where rows lie and whose they are, as they came

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

        name = estimator.__name__

        def compute(rewards: Tensor) -> Tensor:
            found = getattr(python_ref, name)(rewards=rewards.tolist(), **self.as_lists(**options))
            return to_tokens(found, self.token_ids, torch.float32)

        def twin(rewards: Tensor) -> Tensor:
            rewards = rewards.reshape(self.rows.row_shape)
            return estimator(self.logprobs, self.token_ids, rewards, **self.where, **options, backend="torch")

        return from_reference(name, compute, gradient_by(twin), self.rewards)


def read_rollouts(
    logprobs: Any,
    token_ids: Any,
    rewards: Any,
    response_mask: Any,
    groups: Any,
    group_size: Any,
    cu_seqlens: Any,
    backend: str,
) -> Rollouts:
    """Check the arguments that all estimators take; see ``span_advantages`` for what they must be."""
    token_ids = check_integer("token_ids", token_ids)
    check_real("logprobs", logprobs)
    check_like("logprobs", logprobs, "token_ids", token_ids.shape, token_ids.device)
    backend = resolve_backend(backend, token_ids.device)
    rows = find_rows("token_ids", token_ids, response_mask, groups, group_size, cu_seqlens, backend)
    rewards = check_rewards(rewards, "token_ids", rows.row_shape, token_ids.device, tuple(token_ids.shape))
    rows = rows._replace(layout=rows.layout.without(rewards.isnan()))
    where = {"response_mask": response_mask, "groups": groups, "group_size": group_size, "cu_seqlens": cu_seqlens}
    return Rollouts(logprobs, token_ids, rewards, rows, backend, where)
