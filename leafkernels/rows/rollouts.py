"""What every estimator of advantages begins with: its arguments, checked, and where their rows lie."""

from typing import Any, NamedTuple

from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_integer, check_like, check_real, check_rewards
from leafkernels.rows.find import Rows, find_rows
from leafkernels.rows.layout import Layout


class Rollouts(NamedTuple):
    """The rollouts of a call. A row without a reward has no token in ``layout``: it takes no part in anything."""

    token_ids: Tensor  # as the caller shaped them
    rewards: Tensor  # (N,)
    rows: Rows
    backend: str

    @property
    def layout(self) -> Layout:
        return self.rows.layout


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
    return Rollouts(token_ids, rewards, rows._replace(layout=rows.layout.without(rewards.isnan())), backend)
