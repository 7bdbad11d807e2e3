"""Advantage estimators of verl: ``algorithm.adv_estimator=leaf``, or another name of ``leafkernels.ESTIMATORS``.

Importing this module registers those whose names verl does not have (``grpo``, ``rloo`` and ``opo`` of 0.9 stay its
own, and so does OTB, ``optimal_token_baseline``), in the process that imports it: let verl do that with
``VERL_USE_EXTERNAL_MODULES=leafkernels.integrations.verl``. Options of a function go under its name, as in
``+algorithm.leaf.num_boundaries=4`` and ``+algorithm.qae.quantile=0.5``; for ``leaf`` and ``tree_td``,
``norm_adv_by_std_in_grpo=False`` asks for ``normalize="none"``, unless they say otherwise.

verl (0.9) shows an estimator the rewards, the mask and the uids, but neither token ids nor log-probabilities. A version
that passes ``batch`` to estimators whose signature has it needs no more. For others the batch is brought by
``LeafAdvantage``, a mixin for trainers, or by ``compute_advantage``, for loops that call verl's function themselves.

An agent loop may give several rows for one session (its context was cut, or it has sub-agents). With ``LeafAdvantage``
they are one rollout, whose tokens are those of its rows in their order and whose rewards, those of its last row, count
once, as verl's own GRPO has it. What stood before the later rows differs, so those share no prefix with other sessions.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels import ESTIMATORS, group_index

try:
    from verl.trainer.ppo import core_algos
except (ImportError, RuntimeError) as error:  # the latter from lazy imports of what verl imports, in several lines
    raise ImportError(
        f"leafkernels.integrations.verl needs verl, which cannot be imported here ({' '.join(str(error).split())}); "
        "pip install 'leafkernels[verl]'"
    ) from error

_TENSORS = ("responses", "old_log_probs", "rollout_log_probs")


class _AtHand(NamedTuple):
    batch: Mapping[str, Tensor]
    keys: Sequence[str] | None
    """Of the rows, ``{uid}_{session}_{number of the row in it}``; None: every row is a rollout of its own."""


_at_hand: ContextVar[_AtHand | None] = ContextVar("leafkernels_verl_batch", default=None)


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
        token_level_rewards: (bs, R). NaN: an unscorable row. What is earned before a row's last token that counts is
            earned there, the ``step_rewards`` of a scheme that takes them; all else is the reward of the row.
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
    held, keys = _find(name, batch)
    token_ids = held["responses"]
    if token_ids.shape != response_mask.shape:
        raise ValueError(
            f"response_mask must be shaped like the responses that the estimator {name!r} was given, "
            f"{tuple(token_ids.shape)}, got {tuple(response_mask.shape)}"
        )
    settings = {} if config is None else config
    options: dict[str, Any] = {}
    if ESTIMATORS[name].normalization == "option":
        is_on = settings.get("norm_adv_by_std_in_grpo", True)
        options["normalize"] = ESTIMATORS[name].normalized if is_on else "none"
    mask = response_mask.bool()
    sessions = _sessions(keys, len(mask))
    packed = _pack(sessions, held["logprobs"], token_ids, mask)
    last = [rows[-1] for rows in sessions]
    rewards, earned = _rewards(name, token_level_rewards, mask, _index(last, mask.device))
    if earned is not None:
        options["step_rewards"] = packed.pack(earned, earned.new_zeros(len(earned)))
    advantages = packed.rows_of(
        ESTIMATORS[name](
            packed.logprobs,
            packed.token_ids,
            rewards,
            response_mask=packed.mask,
            groups=group_index([index[row] for row in last], mask.device),
            cu_seqlens=packed.cu_seqlens,
            **{**options, **(settings.get(name) or {})},
        )
    )
    advantages = advantages * mask
    return advantages, advantages


for _name, _scheme in ESTIMATORS.items():
    # Without a registry to ask, verl's own function refuses names that are taken.
    if not _scheme.reads_squares and _name not in getattr(core_algos, "ADV_ESTIMATOR_REGISTRY", ()):
        # A version that passes the batch looks at the signature, which a partial keeps.
        core_algos.register_adv_est(_name)(partial(compute_advantage_of, _name))


def _rewards(name: str, by_token: Tensor, mask: Tensor, last: Tensor) -> tuple[Tensor, Tensor | None]:
    """(sessions,) rewards, and (bs, R) what is earned before them at a token; None where nothing is.

    The rows ``last`` have them. verl computes advantages on a CPU, where asking whether there are any waits for
    nothing.
    """
    total = by_token.sum(-1)[last]
    if "step_rewards" not in inspect.signature(ESTIMATORS[name]).parameters:
        return total, None
    counts = mask.long()
    is_before = counts.flip(1).cumsum(1).flip(1) - counts > 0
    own = by_token.double()[last]
    earned = torch.where(is_before[last] & ~total.isnan()[:, None], own, 0.0)
    if not earned.any():
        return total, None
    return (own - earned).sum(-1), torch.zeros_like(by_token, dtype=torch.float64).index_copy(0, last, earned)


def _find(name: str, batch: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor], Sequence[str] | None]:
    """Token ids and their log-probabilities, from what verl passes or what has been put at hand; keys of the rows."""
    at_hand = _at_hand.get()
    for source in (batch, at_hand and at_hand.batch):
        if source is not None and "responses" in source:
            for logprobs in _TENSORS[1:]:
                if logprobs in source:
                    found = {"responses": source["responses"], "logprobs": source[logprobs]}
                    return found, at_hand and at_hand.keys
    raise RuntimeError(
        f"the estimator {name!r} needs 'responses' and 'old_log_probs' (or 'rollout_log_probs'), which this verl does "
        "not pass to estimators: put leafkernels.integrations.verl.LeafAdvantage before your trainer class"
    )


def _sessions(keys: Sequence[str] | None, rows: int) -> list[list[int]]:
    """The rows of each session, in their order there. A key of another form is that of a session of its own."""
    if keys is None:
        return [[row] for row in range(rows)]
    if len(keys) != rows:
        raise ValueError(f"keys must name each of the {rows} rows, got {len(keys)}")
    sessions: dict[str, list[tuple[int, int]]] = {}
    for row, key in enumerate(keys):
        session, _, number = key.rpartition("_")
        if not (session and number.isdecimal()):
            session, number = key, "0"
        sessions.setdefault(session, []).append((int(number), row))
    return [[row for _, row in sorted(session)] for session in sessions.values()]


def _index(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


class _Packed(NamedTuple):
    """The tokens of each session on end, (total,), and where they came from."""

    logprobs: Tensor
    token_ids: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    places: Tensor
    """(total,) in the flattened rows, each of which has one place more than the responses."""
    shape: torch.Size

    def pack(self, rows: Tensor, separators: Tensor) -> Tensor:
        return _in_places(self.places, rows, separators)

    def rows_of(self, tokens: Tensor) -> Tensor:
        rows, width = self.shape
        return tokens.new_empty(len(tokens)).index_copy(0, self.places, tokens).view(rows, width + 1)[:, :-1]


def _in_places(places: Tensor, rows: Tensor, separators: Tensor) -> Tensor:
    """(total,) of (bs, R), with (bs,) for what stands behind each row."""
    return torch.cat([rows, separators[:, None]], 1).flatten()[places]


def _pack(sessions: list[list[int]], logprobs: Tensor, token_ids: Tensor, mask: Tensor) -> _Packed:
    """Each row with a separator of its session behind it, and what pads a row moved to the end of its session."""
    device = mask.device
    rows, width = mask.shape
    numbers = _index([n for n, session in enumerate(sessions) for _ in session], device)
    order = _index([row for session in sessions for row in session], device)
    ends = _index([0, *(len(session) * (width + 1) for session in sessions)], device).cumsum(0)

    kept = mask.flip(1).cumsum(1).flip(1) > 0  # up to the last token that counts
    separated = torch.cat([kept, kept.new_ones(rows, 1)], 1)[order]
    places = (2 * numbers[:, None] + ~separated).flatten().sort(stable=True).indices
    places = (order[:, None] * (width + 1) + torch.arange(width + 1, device=device)).flatten()[places]

    def pack(tensor: Tensor, separators: Tensor) -> Tensor:
        return _in_places(places, tensor, separators)

    separators = torch.empty_like(order).index_copy(0, order, -1 - numbers)
    # Rollouts are compared from their first place on, also where the token in it has been rejected.
    counts = pack(mask, mask.new_zeros(rows))
    begun = torch.zeros(len(sessions), dtype=torch.int64, device=device).index_add(0, numbers, mask.sum(1)[order]) > 0
    counts[ends[:-1]] |= begun
    return _Packed(
        pack(logprobs, logprobs.new_zeros(rows)),
        pack(token_ids.long(), separators),
        counts,
        ends.int(),
        places,
        mask.shape,
    )


@contextmanager
def _put_at_hand(batch: Mapping[str, Tensor], keys: Sequence[str] | None = None) -> Iterator[None]:
    token = _at_hand.set(_AtHand(batch, keys))
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
        with _put_at_hand(fields.to_padded_tensor(), batch.keys):
            return super()._compute_advantage(batch, metrics)  # type: ignore[misc]
