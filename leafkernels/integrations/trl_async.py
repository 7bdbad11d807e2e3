"""Credit for each token in TRL's ``AsyncGRPOTrainer``: ``LeafAsyncGRPOTrainer`` and ``LeafAsyncGRPOConfig``.

That trainer's loss weighs each token by an advantage of its own, but its rollout worker writes one number a sample, and
its collator repeats it. The plug is in these two places. In the worker, which has whole groups, their rewards and the
log-probabilities they were sampled with, ``credit_samples`` gives each sample one advantage a token. Behind the
collator the advantages are put where the collator has put the log-probabilities of the same tokens, which is checked
in every batch. Sampling, rewards, packing, loss and weight transfer stay TRL's.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from leafkernels import ESTIMATORS
from leafkernels.integrations._trl_credit import CreditConfig, check_estimator, options_of
from leafkernels.integrations._trl_spans import credit_and_counts, rates_of

try:
    import trl

    try:
        from trl import AsyncGRPOConfig, AsyncGRPOTrainer
    except ImportError:  # experimental up to TRL 1.17
        from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
except (ImportError, RuntimeError) as error:  # the latter from TRL's lazy import, in several lines
    raise ImportError(
        "leafkernels.integrations.trl_async needs TRL with AsyncGRPOTrainer, which cannot be imported here "
        f"({' '.join(str(error).split())}); pip install 'leafkernels[trl]'"
    ) from error

from leafkernels.integrations._trl_steps import StepsOfRows, hear

# A conversation of which nothing is trained: its reward counts in the group's mean.
_NOTHING = SimpleNamespace(input_ids=[], completion_mask=[], old_log_probs=[])


@dataclass
class LeafAsyncGRPOConfig(CreditConfig, AsyncGRPOConfig):
    """``AsyncGRPOConfig`` with the options of ``leafkernels.span_advantages`` and ``tree_td``, under the same names."""


class TokenAdvantages(list[float]):
    """One advantage for each of a sample's ``input_ids``; 0 where it is not trained.

    TRL's tables and traces show one number a sample: the mean over the tokens that are trained.
    """

    mean: float = 0.0

    def __float__(self) -> float:
        return self.mean

    def __format__(self, spec: str) -> str:
        return format(self.mean, spec)


def credit_samples(
    conversations: Sequence[Sequence[Any]],
    rewards: Sequence[float],
    *,
    estimator: str = "leaf",
    step_rewards: Sequence[Sequence[Any]] | None = None,
    **options: Any,
) -> list[list[TokenAdvantages]]:
    """The advantages of a group's samples, one for each token: what a rollout worker of your own puts on its queue.

    The rows of a conversation, which TRL forks where a turn is tokenised anew, are one rollout: they follow each other,
    their context in the holes of the mask. Conversations whose prompts differ, as an environment may begin them, share
    no prefix; they are one group all the same.

    Args:
        conversations: the samples of each, in their order; none where nothing is trained. A sample has ``input_ids``,
            ``completion_mask`` and ``old_log_probs``, of one length, as TRL's ``RolloutSample`` has.
        rewards: one for each conversation. NaN, or infinite: unscored; left out of every mean, and its credit is 0.
        estimator: a name of ``ESTIMATORS``.
        step_rewards: for each conversation, for each of its samples, what is earned at each of its ``input_ids``;
            ``rewards`` come beside it, at the end.
        options: those of the estimator.

    Returns:
        For each conversation, for each of its samples, ``TokenAdvantages`` for its field ``advantage``.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.
    """
    return _credited(conversations, rewards, estimator, step_rewards, options)[0]


def _credited(
    conversations: Sequence[Sequence[Any]],
    rewards: Sequence[float],
    estimator: str,
    step_rewards: Sequence[Sequence[Any]] | None,
    options: dict[str, Any],
) -> tuple[list[list[TokenAdvantages]], dict[str, float]]:
    """What ``credit_samples`` gives, and what is logged of the group."""
    check_estimator(estimator)
    if len(rewards) != len(conversations):
        raise ValueError(f"rewards must be one for each of {len(conversations)} conversations, got {len(rewards)}")
    samples = [sample for rows in conversations for sample in rows]
    for sample in samples:
        lengths = [len(getattr(sample, name)) for name in ("input_ids", "completion_mask", "old_log_probs")]
        if len(set(lengths)) != 1:
            raise ValueError(
                "input_ids, completion_mask and old_log_probs of a sample must be of one length, got "
                f"{', '.join(map(str, lengths))}"
            )
    prompts: dict[tuple[int, ...], int] = {}
    ids, masks, ends = [], [], [0]
    for rows in conversations:
        tokens = _joined([sample.input_ids for sample in rows], torch.int64)
        mask = _joined([sample.completion_mask for sample in rows], torch.bool)
        prompt = tuple(tokens[: int(mask.int().argmax())].tolist()) if bool(mask.any()) else ()
        # Rows are compared from their first trained token on, so that what precedes it is made part of the token.
        ids.append(torch.stack([tokens, torch.full_like(tokens, prompts.setdefault(prompt, len(prompts)))]))
        masks.append(mask)
        ends.append(ends[-1] + len(tokens))
    earned = _step_rewards(conversations, step_rewards)
    if ends[-1] == 0:
        return [[TokenAdvantages() for _ in rows] for rows in conversations], {}
    token_ids, prompt_of = torch.cat(ids, 1)
    response_mask = torch.cat(masks)
    reward = torch.tensor([float(value) for value in rewards], dtype=torch.float64)
    logprobs = _joined([sample.old_log_probs for sample in samples], torch.float32)
    names = token_ids + prompt_of * (token_ids.max() + 1)
    scored = reward.masked_fill(~reward.isfinite(), torch.nan)
    more: dict[str, Any] = {} if earned is None else {"step_rewards": earned}
    more |= options | {"response_mask": response_mask, "cu_seqlens": torch.tensor(ends, dtype=torch.int32)}
    logs = {}
    if estimator == "leaf":
        credit, totals = credit_and_counts(logprobs, names, scored, group_size=len(rewards), **more)
        logs = {f"leaf/{name}": rate for name, rate in rates_of(totals, len(rewards)).items()}
    else:
        credit = ESTIMATORS[estimator](logprobs, names, scored, **more)
    counts = [len(sample.input_ids) for sample in samples]
    parts = zip(credit.split(counts), response_mask.split(counts), strict=True)
    found = iter([_advantages(*part) for part in parts])
    return [[next(found) for _ in rows] for rows in conversations], logs


def _step_rewards(conversations: Sequence[Sequence[Any]], given: Sequence[Sequence[Any]] | None) -> Tensor | None:
    """(tokens,) of all conversations."""
    if given is None:
        return None
    lengths = [[len(sample.input_ids) for sample in rows] for rows in conversations]
    if [[len(values) for values in rows] for rows in given] != lengths:
        raise ValueError(
            "step_rewards must have, for each conversation and each of its samples, one number for each of its "
            f"input_ids, of which there are {lengths}"
        )
    return _joined([values for rows in given for values in rows], torch.float64)


class LeafAsyncGRPOTrainer(AsyncGRPOTrainer):
    """``AsyncGRPOTrainer`` whose advantages are one for each token: LEAF's, or those of ``estimator``; same arguments.

    - Credit is computed in the process of TRL's rollout worker, group by group, from the log-probabilities that the
      tokens were sampled with. ``normalize`` None is the estimator's own scale.
    - Rewards are summed as TRL does. A conversation that no reward function scored, or whose sum is infinite, is left
      out of every mean and gets 0; one of which nothing is trained counts in the group's mean.
    - The loss clips each token's ratio by the sign of its own credit.
    - A ``rollout_worker`` that derives from TRL's is credited as TRL's is. Any other gives each sample as ``advantage``
      a list, one number for each of its ``input_ids``, as ``credit_samples`` makes them; a float is refused.

    Raises:
        RuntimeError: the worker or the collator of the installed TRL is not built as those of 1.16 are.
        TypeError: ``args`` lacks the options.
        ValueError: an option, or an advantage of a sample, is not what it must be; the message names it.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *more: Any,
        rollout_worker: Any = None,
        **kwargs: Any,
    ) -> None:
        args = LeafAsyncGRPOConfig() if args is None else args
        credit = _credit_options(args)
        super().__init__(model, reward_funcs, args, *more, rollout_worker=rollout_worker, **kwargs)
        if self.rollout_worker is None:  # of another rank
            return
        loop: Any = getattr(self.rollout_worker, "_loop_cls", None)
        if loop is None and rollout_worker is not None:
            return
        score = getattr(loop, "_score_group", None)
        if not inspect.iscoroutinefunction(score) or list(inspect.signature(score).parameters) != ["self", "group"]:
            raise RuntimeError(
                f"LeafAsyncGRPOTrainer cannot credit the rollout worker of TRL {trl.__version__}: it must have a "
                f"_loop_cls with a coroutine _score_group(self, group), got {loop!r}; pass a rollout_worker that gives "
                "credit_samples of each group"
            )
        # The worker calls it in the process that it starts.
        self.rollout_worker._loop_cls = partial(_credited_loop, loop, credit)

    def get_train_dataloader(self) -> Any:
        """TRL's, whose collator then takes one advantage a token."""
        loader = super().get_train_dataloader()
        collator: Any = getattr(loader, "collate_fn", None)
        if not hasattr(collator, "torch_call"):
            raise RuntimeError(
                f"LeafAsyncGRPOTrainer cannot give advantages to the batches of TRL {trl.__version__}: its dataloader "
                f"must have a collate_fn with a torch_call, got {collator!r}"
            )
        collator.torch_call = partial(_collate, collator.torch_call)
        return loader


def _credit_options(args: Any) -> dict[str, Any]:
    """``estimator`` and the options it takes, as ``credit_samples`` has them, tried on a token."""
    if not isinstance(args, LeafAsyncGRPOConfig):
        raise TypeError(
            "args must be a LeafAsyncGRPOConfig, or a dataclass derived from it and your own config, "
            f"got {type(args).__name__}"
        )
    check_estimator(args.estimator)
    if args.normalize == "batch":
        raise ValueError(
            "normalize must be 'span', 'reward_std' or 'none' with LeafAsyncGRPOTrainer, got 'batch': groups are "
            "credited one at a time"
        )
    scheme = ESTIMATORS[args.estimator]
    options = options_of(args)
    if options.get("normalize", "") is None:
        options["normalize"] = scheme.normalized
    one = SimpleNamespace(input_ids=[0], completion_mask=[1], old_log_probs=[0.0])
    credit_samples([[one]], [0.0], estimator=args.estimator, **options)
    return {"estimator": args.estimator, **options}


def _credited_loop(loop_class: Callable[..., Any], credit: dict[str, Any], **kwargs: Any) -> Any:
    """A loop of TRL's worker whose scored groups carry ``credit_samples``."""
    loop = loop_class(**kwargs)
    score = loop._score_group
    options = {name: value for name, value in credit.items() if name != "estimator"}
    estimator = credit["estimator"]
    # Environments that give a reward have their names behind those of the functions.
    named = list(zip(loop.reward_funcs, loop.reward_func_names, strict=False))

    async def score_group(group: Any) -> list[Any]:
        conversations = group.completions_sequences
        steps: StepsOfRows = {}
        loop.reward_funcs = [hear(function, name, i, steps) for i, (function, name) in enumerate(named)]
        # TRL returns the rewards with the samples, and no sample where nothing is trained.
        group.completions_sequences = [rows or [_NOTHING] for rows in conversations]
        samples = await score(group)
        places = [i for i, rows in enumerate(group.completions_sequences) for _ in rows]
        if len(samples) != len(places):
            raise RuntimeError(
                f"LeafAsyncGRPOTrainer cannot credit what TRL {trl.__version__} scores: _score_group must give a "
                f"sample for each of {len(places)} rows, got {len(samples)}"
            )
        by_conversation = {i: sample.metrics["reward"] for i, sample in zip(places, samples, strict=True)}
        rewards, earned = _at_tokens(conversations, group.completions_ids, list(by_conversation.values()), steps)
        found, logs = await asyncio.to_thread(_credited, conversations, rewards, estimator, earned, options)
        kept = [sample for i, sample in zip(places, samples, strict=True) if conversations[i]]
        for sample, advantages in zip(kept, (one for rows in found for one in rows), strict=True):
            sample.advantage = advantages
            sample.metrics.update(logs)
        return kept

    loop._score_group = score_group
    return loop


def _at_tokens(
    conversations: Sequence[Sequence[Any]],
    completion_ids: Sequence[Sequence[int]],
    rewards: Sequence[float],
    steps: StepsOfRows,
) -> tuple[list[float], list[list[list[float]]] | None]:
    """What of the rewards is left for the ends of conversations, and ``step_rewards`` of their samples; None: none.

    A reward function counts the tokens that were sampled, of which TRL may train fewer where it tokenises a turn anew.
    """
    if not steps:
        return list(rewards), None
    left, earned = list(rewards), [[[0.0] * len(sample.input_ids) for sample in rows] for rows in conversations]
    for i, rows in enumerate(conversations):
        found = [pair for (row, _), pairs in steps.items() if row == i for pair in pairs if not math.isnan(pair[1])]
        trained = [(r, t) for r, sample in enumerate(rows) for t, is_one in enumerate(sample.completion_mask) if is_one]
        if not found or not trained:
            continue
        if [int(rows[r].input_ids[t]) for r, t in trained] != list(completion_ids[i]):
            raise ValueError(
                "reward_funcs must return a number, not a list of (end, reward), where TRL trains other tokens of a "
                f"conversation than were sampled: {len(trained)} and {len(completion_ids[i])} of conversation {i}"
            )
        for end, reward in found:
            row, token = trained[end - 1]
            earned[i][row][token] += reward
        rest = math.fsum([rewards[i], *(-reward for _, reward in found)])
        # What rounding leaves of a sum is no reward.
        left[i] = 0.0 if abs(rest) <= 2.0**-40 * math.fsum(abs(reward) for _, reward in found) else rest
    return left, earned


def _collate(collate: Callable[[list[Any]], dict[str, Any]], examples: list[Any]) -> dict[str, Any]:
    """TRL's batch of one micro-batch, with each token's own advantage in the place of its sample's."""
    rows = examples[0] if len(examples) == 1 else None
    if not isinstance(rows, list) or not all(isinstance(getattr(row, "samples", None), list) for row in rows):
        raise RuntimeError(
            f"LeafAsyncGRPOTrainer cannot give advantages to the batches of TRL {trl.__version__}: its collator must "
            "take one list of rows with their samples"
        )
    given = [[_taken(sample) for sample in row.samples] for row in rows]
    batch = collate(examples)
    is_placed = batch["advantages"].shape == batch["old_log_probs"].shape and len(batch["advantages"]) == len(rows)
    for i, row in enumerate(rows if is_placed else []):
        # A token is scored at the one before it, so that the first has no place.
        trained = [_joined([sample["completion_mask"]], torch.bool)[1:] for sample in row.samples]
        sampled = [_joined([sample["old_log_probs"]], torch.float32)[1:] for sample in row.samples]
        logprobs = torch.cat([values[mask] for values, mask in zip(sampled, trained, strict=True)])
        advantages = torch.cat([values[1:][mask] for values, mask in zip(given[i], trained, strict=True)])
        found = batch["old_log_probs"][i, : len(logprobs)]
        # NaN is where the engine gave none.
        is_placed &= found.shape == logprobs.shape and torch.equal(found.nan_to_num(1.0), logprobs.nan_to_num(1.0))
        if is_placed:
            batch["advantages"][i, : len(advantages)] = advantages
    if not is_placed:
        raise RuntimeError(
            f"LeafAsyncGRPOTrainer cannot give advantages to the batches of TRL {trl.__version__}: old_log_probs of a "
            "batch must be those of its samples' trained tokens, row by row, and advantages of the same shape"
        )
    return batch


def _taken(sample: dict[str, Any]) -> Tensor:
    """(tokens,) the advantages of a sample, whose place in it a number takes for TRL's collator."""
    advantages, tokens = sample["advantage"], len(sample["input_ids"])
    if not hasattr(advantages, "__len__") or len(advantages) != tokens:
        what = f"{len(advantages)} of them" if hasattr(advantages, "__len__") else repr(advantages)
        raise ValueError(
            f"advantage of a sample must be one number for each of its {tokens} input_ids with LeafAsyncGRPOTrainer, "
            f"got {what}; credit_samples makes them"
        )
    values = torch.tensor([float(value) for value in advantages])
    if not all(map(math.isfinite, values.tolist())):
        raise ValueError("advantage of a sample must be finite numbers, got NaN or an infinite one")
    sample["advantage"] = float(values.sum())
    return values


def _advantages(values: Tensor, mask: Tensor) -> TokenAdvantages:
    advantages = TokenAdvantages(values.tolist())
    advantages.mean = float(values.sum() / mask.sum().clamp(min=1))
    return advantages


def _joined(values: list[Any], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=dtype), *(torch.as_tensor(value, dtype=dtype) for value in values)])
