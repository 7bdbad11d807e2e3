"""Advantage estimators of verl: ``algorithm.adv_estimator=leaf``, or ``tempo``, ``tree_td`` or ``treerl``.

Importing this module registers them, in the process that imports it: let verl do that with
``VERL_USE_EXTERNAL_MODULES=leafkernels.integrations.verl``. Options of the function go under its name, as in
``+algorithm.leaf.num_boundaries=4`` and ``+algorithm.tree_td.shrinkage=8.0``; for ``leaf`` and ``tree_td``,
``norm_adv_by_std_in_grpo=False`` asks for ``normalize="none"``, unless they say otherwise.

verl (0.9) shows an estimator the rewards, the mask and the uids, but neither token ids nor log-probabilities. A version
that passes ``batch`` to estimators whose signature has it needs no more. For others the batch is brought by
``LeafAdvantage``, a mixin for trainers, or by ``compute_advantage``, for loops that call verl's function themselves.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor

from leafkernels import ESTIMATORS, group_index

try:
    from verl.trainer.ppo.core_algos import register_adv_est
except ImportError as error:
    raise ImportError(
        f"leafkernels.integrations.verl needs verl, which cannot be imported here ({error}); "
        "pip install 'leafkernels[verl]'"
    ) from error

# What verl has no estimator for, and what "normalize" means by verl's switch.
_NAMES = ("leaf", "tempo", "tree_td", "treerl")
_NORMALIZE = {"leaf": "span", "tree_td": "reward_std"}
_TENSORS = ("responses", "old_log_probs", "rollout_log_probs")
_at_hand: ContextVar[Mapping[str, Tensor] | None] = ContextVar("leafkernels_verl_batch", default=None)


def compute_advantage_of(
    name: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    batch: Mapping[str, Tensor] | None = None,
    non_tensor_batch: Mapping[str, Any] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The advantages of ``leafkernels.ESTIMATORS[name]`` by verl's contract for estimators.

    Args:
        name: of the estimator, and of its options in ``config``.
        token_level_rewards: (bs, R), summed over the tokens of a row; NaN: an unscorable row.
        response_mask: (bs, R), 0 on padding, tool tokens and rejected tokens. Responses begin in the first column.
        index: (bs,) uids of prompts, an array of objects.
        config: ``algorithm`` of verl's configuration.
        batch: holds "responses" (bs, R) and "old_log_probs" or, without them, "rollout_log_probs" (bs, R).
        non_tensor_batch: holds "uid" where ``index`` is None.

    Returns:
        advantages and returns, the same (bs, R) float32 tensor.
    """
    index = non_tensor_batch["uid"] if index is None and non_tensor_batch is not None else index
    if index is None:
        raise ValueError(f"index must hold the uid of each row's prompt for the estimator {name!r}, got None")
    token_ids, logprobs = _tokens(name, batch)
    settings = {} if config is None else config
    options: dict[str, Any] = {}
    if name in _NORMALIZE:
        options["normalize"] = _NORMALIZE[name] if settings.get("norm_adv_by_std_in_grpo", True) else "none"
    mask = response_mask.bool()
    # Rows are compared from the first column on, also where the token in it has been rejected.
    stretch = mask.clone()
    stretch[:, :1] |= mask.any(1, keepdim=True)
    advantages = ESTIMATORS[name](
        logprobs,
        token_ids,
        token_level_rewards.sum(-1),
        response_mask=stretch,
        groups=group_index(list(index), token_ids.device),
        **{**options, **(settings.get(name) or {})},
    )
    advantages = advantages * mask
    return advantages, advantages


for _name in _NAMES:
    # A version that passes the batch looks at the signature, which a partial keeps.
    register_adv_est(_name)(partial(compute_advantage_of, _name))


def _tokens(name: str, batch: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Token ids and their log-probabilities, from what verl passes or what has been put at hand."""
    for source in (batch, _at_hand.get()):
        if source is not None and "responses" in source:
            for logprobs in _TENSORS[1:]:
                if logprobs in source:
                    return source["responses"], source[logprobs]
    raise RuntimeError(
        f"the estimator {name!r} needs 'responses' and 'old_log_probs' (or 'rollout_log_probs'), which this verl does "
        "not pass to estimators: put leafkernels.integrations.verl.LeafAdvantage before your trainer class"
    )


@contextmanager
def _put_at_hand(batch: Mapping[str, Tensor]) -> Iterator[None]:
    token = _at_hand.set(batch)
    try:
        yield
    finally:
        _at_hand.reset(token)


def compute_advantage(data: Any, *args: Any, **kwargs: Any) -> Any:
    """verl's own, with the tokens of ``data`` (a ``DataProto``) at hand for our estimators; same arguments."""
    from verl.trainer.ppo import ray_trainer

    with _put_at_hand(data.batch):
        return ray_trainer.compute_advantage(data, *args, **kwargs)


class LeafAdvantage:
    """Mixin for verl's trainers (``trainer.use_v1=True``), first in line before one of them.

    ``@register_trainer("leaf_sync") class LeafTrainer(LeafAdvantage, PPOTrainerSync): pass`` and
    ``trainer.v1.trainer_mode=leaf_sync``.
    """

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        import transfer_queue

        # Nested tensors of the rows' own lengths, which pad to the width of the response mask.
        fields = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=list(_TENSORS)
        )
        with _put_at_hand(fields.to_padded_tensor()):
            return super()._compute_advantage(batch, metrics)  # type: ignore[misc]
