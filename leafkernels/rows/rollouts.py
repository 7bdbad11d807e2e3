"""What every estimator of advantages begins and ends with: its arguments, checked, and one number for each token."""

from typing import Any, NamedTuple

from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_integer, check_like, check_real, check_rewards
from leafkernels.rows.find import check_layout
from leafkernels.rows.layout import Layout


class Rollouts(NamedTuple):
    """The rollouts of a call. A row without a reward has no token in ``layout``: it takes no part in anything."""

    token_ids: Tensor  # as the caller shaped them
    rewards: Tensor  # (N,)
    mask: Tensor | None  # as rows
    layout: Layout
    row_shape: tuple[int, ...]
    backend: str


def read_rollouts(
    logprobs: Any,
    token_ids: Any,
    rewards: Any,
    response_mask: Any,
    groups: Any,
    cu_seqlens: Any,
    backend: str,
) -> Rollouts:
    """Check the arguments that all estimators take; see ``span_advantages`` for what they must be."""
    token_ids = check_integer("token_ids", token_ids)
    check_real("logprobs", logprobs)
    check_like("logprobs", logprobs, "token_ids", token_ids.shape, token_ids.device)
    backend = resolve_backend(backend, token_ids.device)
    layout, mask, row_shape = check_layout("token_ids", token_ids, response_mask, groups, cu_seqlens, backend)
    rewards = check_rewards(rewards, "token_ids", row_shape, token_ids.device)
    return Rollouts(token_ids, rewards, mask, layout.without(rewards.isnan()), row_shape, backend)
