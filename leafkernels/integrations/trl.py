"""Credit for each token in TRL's ``GRPOTrainer``: ``LeafGRPOTrainer`` and ``LeafGRPOConfig``.

TRL takes advantages of shape (rows, tokens) in its loss since 0.26.0. The plug runs after TRL has sampled and scored a
batch: the rows of a group that straddles ranks are brought together on one of them, their tokens are credited, and the
credit of this rank's rows takes the place of TRL's advantages. Sampling, rewards, loss and everything else stay TRL's.
"""

import logging
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from leafkernels import ESTIMATORS, PRESETS
from leafkernels._core.precision import is_rounding
from leafkernels.distributed import GatheredGroups, gather_groups
from leafkernels.models.asking import evaluating

try:
    import trl
    from trl import GRPOTrainer
except (ImportError, RuntimeError) as error:  # the latter from TRL's lazy import, in several lines
    raise ImportError(
        f"leafkernels.integrations.trl needs TRL, which cannot be imported here ({' '.join(str(error).split())}); "
        "pip install 'leafkernels[trl]'"
    ) from error

from leafkernels.integrations._trl_credit import CreditConfig, check_estimator, options_of
from leafkernels.integrations._trl_loss import LossConfig, OwnLoss, check_own_loss
from leafkernels.integrations._trl_masks import SamplingMaskConfig
from leafkernels.integrations._trl_options import check_options
from leafkernels.integrations._trl_report import check_report, write_report
from leafkernels.integrations._trl_sharing import SharedPrefixesConfig
from leafkernels.integrations._trl_spans import credit_and_counts, rates_of
from leafkernels.integrations._trl_steps import StepRewards

_logger = logging.getLogger(__name__)

# What images and the like go by in TRL's batch, and in the function that computes log-probabilities from it.
_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


@dataclass
class LeafGRPOConfig(CreditConfig, LossConfig, SharedPrefixesConfig, SamplingMaskConfig, trl.GRPOConfig):
    """``GRPOConfig`` with the options of ``leafkernels.span_advantages`` and of other schemes, under the same names.

    For a config of your own: ``@dataclass class MyConfig(LeafGRPOConfig, TheConfigOfMyTrainer)``.
    """

    report_every: int | None = field(
        default=None,
        metadata={"help": "Write leafkernels.report of a batch into output_dir every so many steps. None: never."},
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "'leaf-paper': completions of a prompt, boundaries, terms and power of the LEAF paper, for the "
            "options that are left at their defaults."
        },
    )

    def __post_init__(self) -> None:
        # First, because TRL's own checks look at what the preset sets.
        if self.preset is not None:
            if self.preset not in PRESETS:
                raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {self.preset!r}")
            defaults = {option.name: option.default for option in fields(self)}
            for name, value in PRESETS[self.preset].items():
                if getattr(self, name) == defaults[name]:
                    setattr(self, name, value)
        super().__post_init__()


class LeafGRPOTrainer(OwnLoss, StepRewards, GRPOTrainer):
    """``GRPOTrainer`` whose advantages are one for each token: LEAF's, or those of ``estimator``; same arguments.

    Also a mixin for trainers derived from ``GRPOTrainer``, where it comes first:
    ``class Mine(LeafGRPOTrainer, TheirTrainer)``. Override ``token_advantages`` to plug an estimator of your own in.

    - Estimators without a tree of boundaries ("grpo", "dr_grpo", "rloo", "tempo", "tree_td") need no log-probabilities,
      and none are computed for them. Those without ``normalize`` scale as their formula does, whatever
      ``scale_rewards`` says, and a warning tells.
    - TRL's options that are defined for one advantage a row have the meaning of the table in docs/trainers.md.
    - Boundaries are ranked by ``old_per_token_logps`` where TRL has computed them, else by the log-probabilities that
      vLLM sampled with, else (the default on-policy path) by those of one forward pass more, in eval mode, so that
      dropout neither adds noise nor draws random numbers.
    - A reward function may return a list of (end, reward) for a completion: rewards earned at the last of its first
      ``end`` tokens, the ``step_rewards`` of the estimator. TRL's logs have their sum.
    - Rewards are weighted and summed as TRL does. A row that no reward function scored is left out of every mean and
      gets 0; an infinite reward is none, and is counted in ``rewards/NAME/nonfinite``. Tool tokens and truncated
      completions (``mask_truncated_completions``) get 0; a truncated completion's reward counts in the group's mean,
      as in TRL.
    - Beside TRL's metrics it logs for "leaf": ``leaf/span_credit_share``, the share of the scored rows' tokens that lie
      in a span which two or more rows share; ``leaf/fork_fire_rate``, the share of (row, boundary) pairs at which the
      row still shares its prefix with another row, so that the boundary is a fork for it; and
      ``leaf/nodes_per_group``, the mean number of nodes of a prompt. For every estimator, "advantage" in the table of
      completions is the mean over the completion's tokens.

    - With ``share_prefixes=True`` what the rows of a micro-batch share runs through the model once, where that is fewer
      tokens; ``leaf/tokens_per_node`` and ``leaf/shared_share`` tell. It is off by default: dropout draws once for a
      shared token, prompts and not rows are dealt out to micro-batches, and TRL's own function needs no logits.

    Raises:
        RuntimeError: TRL is older than 0.26, which misreads advantages per token, or the Liger loss (up to 1.13) or
            the SAPO loss (up to 0.27) is asked for, which do so too, or an option that the installed TRL cannot be
            made right with.
        TypeError: ``args`` lacks the options, or the trainer's loss takes one advantage a row only.
        ValueError: an option is not what it must be; the message names it.
    """

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **kwargs: Any) -> None:
        args = LeafGRPOConfig() if args is None else args
        _check_trainer(type(self), args)
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        _check_parallelism(self.accelerator)
        if args.scale_rewards != "group" and not _takes(args.estimator, "normalize"):
            _logger.warning(
                "scale_rewards=%r is not used: estimator=%r scales, or does not, as its formula does.",
                args.scale_rewards,
                args.estimator,
            )
        self._gathered: GatheredGroups | None = None
        check_report(self, type(self).token_advantages is LeafGRPOTrainer.token_advantages)
        # Wrong options are told now, not after the first batch has been sampled.
        one = torch.zeros(1, 1)
        ESTIMATORS[args.estimator](one, one.long(), one[0], **self._options())

    def token_advantages(
        self,
        logprobs: Tensor,
        token_ids: Tensor,
        rewards: Tensor,
        response_mask: Tensor,
        group_size: int,
        step_rewards: Tensor | None = None,
    ) -> Tensor:
        """One advantage for every token of (N, T), 0 where the mask is False.

        The rows are those of whole groups: this rank's own, and where a group straddles ranks those of the groups that
        it owns, none too. Every rank calls.

        Args:
            logprobs: (N, T) of the sampled tokens; NaN where vLLM gave none; zeros where the estimator reads none.
            token_ids: (N, T).
            rewards: (N,), NaN for rows that no function scored.
            response_mask: (N, T) bool; False on padding, tool tokens and truncated completions.
            group_size: rows of a prompt; they follow each other.
            step_rewards: (N, T) float64, given where a reward function returned a list for a completion; ``rewards``
                is then what comes beside it.
        """
        more: dict[str, Any] = {} if step_rewards is None else {"step_rewards": step_rewards}
        if self.args.estimator != "leaf":
            estimate = ESTIMATORS[self.args.estimator]
            rows = {"response_mask": response_mask, "group_size": group_size}
            return estimate(logprobs, token_ids, rewards, **rows, **more, **self._options())
        credit, counts = credit_and_counts(
            logprobs,
            token_ids,
            rewards,
            response_mask=response_mask,
            group_size=group_size,
            gathered=self._gathered,
            **more,
            **self._options(),
        )
        for name, rate in rates_of(self.accelerator.reduce(counts, "sum"), group_size).items():
            self._log(name, rate)
        return credit

    def _options(self) -> dict[str, Any]:
        """Those of the config that the estimator takes."""
        args = self.args
        options = options_of(args)
        if args.normalize is None and "normalize" in options:
            # As TRL has it: what is normalised before the sum is scaled over the batch after it.
            scale = "batch" if self._sums_normalized() else args.scale_rewards
            # A scheme that has no scale of a batch refuses that name itself.
            options["normalize"] = ESTIMATORS[args.estimator].normalized if scale == "group" else scale
        return options

    def _sums_normalized(self) -> bool:
        return getattr(self.args, "multi_objective_aggregation", "sum_then_normalize") == "normalize_then_sum"

    def _log(self, name: str, value: float) -> None:
        self._metrics[self._mode][f"leaf/{name}"].append(value)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        # The one place where rewards are seen; the batch that TRL returns has none.
        self._rewards_per_function = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_function

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # Before TRL generates, which in some versions leaves the model in training mode.
        self._mode = "train" if self.model.training else "eval"
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        batch = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"]
        if "tool_mask" in batch:
            mask = mask * batch["tool_mask"]
        mask = mask.bool()
        logprobs, token_ids = self._ranking_logprobs(batch), batch["completion_ids"]
        # Rewards are known of all ranks: TRL gathers them, a number for each row.
        rows = token_ids.shape[0]
        first = self.accelerator.process_index * rows
        all_rewards = self._row_rewards(group_size)
        rewards = all_rewards[first : first + rows]
        call = {"logprobs": logprobs, "token_ids": token_ids, "rewards": rewards, "response_mask": mask}
        call["group_size"] = group_size
        call |= self._earned(call, slice(first, first + rows))
        if self.accelerator.num_processes == 1:
            advantages = self._advantages_of(call)
        else:
            self._gathered = gather_groups(**call)
            call = self._gathered.inputs
            advantages = self._gathered.local(self._packed_advantages(call))
        write_report(self, call, batch, _takes(self.args.estimator, "num_boundaries"), self._options())
        self._replace_logged(self.accelerator.gather(advantages.sum(1) / mask.sum(1).clamp(min=1)))
        batch["advantages"] = advantages.contiguous()
        self._drop_equal(batch, all_rewards, group_size)
        return batch

    def _ranking_logprobs(self, batch: dict[str, Any]) -> Tensor:
        """(rows, tokens) log-probabilities of the sampled tokens, by which boundaries are ranked."""
        if not ESTIMATORS[self.args.estimator].reads_logprobs:
            return torch.zeros_like(batch["completion_ids"], dtype=torch.float32)
        for name in ("old_per_token_logps", "sampling_per_token_logps"):
            if batch.get(name) is not None:
                return batch[name]
        if self._scored is not None:  # where the kept ids were found
            scored = self._scored
            return torch.nn.functional.pad(scored, (0, batch["completion_ids"].shape[1] - scored.shape[1]))
        with evaluating(self.model), torch.no_grad():
            return self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
                batch["completion_ids"].shape[1],
                batch_size=getattr(self.args, f"per_device_{self._mode}_batch_size"),
                **{name: batch[name] for name in _MODEL_INPUTS if name in batch},
            )[0]

    def _packed_advantages(self, inputs: dict[str, Any]) -> Tensor:
        """(total,) what ``token_advantages`` gives for packed rows."""
        lengths = inputs["cu_seqlens"].diff()
        width = int(lengths.max()) if lengths.numel() else 0
        is_token = torch.arange(width, device=lengths.device) < lengths[:, None]

        def padded(tokens: Tensor) -> Tensor:
            return tokens.new_zeros(is_token.shape).masked_scatter(is_token, tokens)

        names = ("logprobs", "token_ids", "response_mask", "step_rewards")
        tokens = {name: padded(inputs[name]) for name in names if name in inputs}
        return self._advantages_of(inputs | tokens)[is_token]

    def _advantages_of(self, call: dict[str, Any]) -> Tensor:
        # By position, and step rewards where there are any: a function of one's own may name its arguments otherwise.
        names = ("logprobs", "token_ids", "rewards", "response_mask", "group_size")
        more = {"step_rewards": call["step_rewards"]} if "step_rewards" in call else {}
        return self.token_advantages(*(call[name] for name in names), **more)

    def _row_rewards(self, group_size: int) -> Tensor:
        """(N,) one reward for every row of all ranks, NaN where no function gave one, or their sum is infinite."""
        rewards = self._rewards_per_function
        if self._sums_normalized():
            rewards = _normalize_functions(rewards.view(-1, group_size, rewards.shape[1])).view_as(rewards)
        unscored = rewards.isnan().all(1)
        summed = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        return summed.masked_fill(unscored | ~summed.isfinite(), torch.nan)

    def _scales(self, group_size: int) -> tuple[Tensor, Tensor]:
        """(N, functions) float64, on the host: what is taken off a function's rewards, and what multiplies the rest."""
        rewards, weights = self._rewards_per_function.cpu().double(), self.reward_weights.cpu().double()
        if not self._sums_normalized():
            return torch.zeros_like(rewards), weights.expand(rewards.shape)
        centred, deviation = _moments(rewards.view(-1, group_size, rewards.shape[1]))
        # Sums that are all equal say nothing, wherever they were earned.
        factors = (1.0 / (deviation + 1e-4)).masked_fill(deviation == 0.0, 0.0) * weights
        means = rewards.view(centred.shape) - centred
        return (
            means.nanmean(1, keepdim=True).expand(centred.shape).reshape(rewards.shape),
            factors.expand(centred.shape).reshape(rewards.shape),
        )

    def _replace_logged(self, advantages: Tensor) -> None:
        """Put ours in place of the advantages that TRL has just noted for its table of completions."""
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())


def _takes(estimator: str, option: str) -> bool:
    return option in ESTIMATORS[estimator].options


def _normalize_functions(rewards: Tensor) -> Tensor:
    """(prompts, rows, functions): each function's rewards z-scored over a prompt, with TRL's 1e-4."""
    centred, deviation = _moments(rewards.double())
    return (centred / (deviation + 1e-4)).to(rewards.dtype)


def _moments(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Of float64 rewards (prompts, rows, functions) each less its function's mean in the prompt, and the deviation."""
    is_scored = ~rewards.isnan()
    least = rewards.masked_fill(~is_scored, torch.inf).amin(1, keepdim=True)
    most = rewards.masked_fill(~is_scored, -torch.inf).amax(1, keepdim=True)
    # From the least reward up, so that rewards that are equal, or differ by rounding alone, give exactly 0.
    rewards = (rewards - least).masked_fill(is_rounding(least, most) & is_scored, 0.0)
    centred = rewards - rewards.nanmean(1, keepdim=True)
    count = is_scored.sum(1, keepdim=True)
    return centred, (centred.square().nansum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def _check_parallelism(accelerator: Any) -> None:
    """Refuse ranks that hold a part of each row: prefixes are compared over whole ones."""
    for name in ("cp_size", "sp_size"):
        size = getattr(getattr(accelerator, "parallelism_config", None), name, None) or 1
        if size > 1:
            raise ValueError(
                f"{name} must be 1 with LeafGRPOTrainer, got {size}: rows whose tokens are split over ranks are not "
                "supported"
            )


def _check_trainer(trainer: type, args: Any) -> None:
    """Refuse what would train on something else than the advantages, in silence."""
    if not isinstance(args, LeafGRPOConfig):
        raise TypeError(
            f"args must be a LeafGRPOConfig, or a dataclass derived from it and your own config, "
            f"got {type(args).__name__}"
        )
    check_estimator(args.estimator)
    options_of(args)
    check_options(args, "LeafGRPOTrainer")
    check_own_loss(args, "LeafGRPOTrainer")
    if any(base.__name__ in ("RLOOTrainer", "GMPOTrainer") for base in trainer.__mro__):
        raise TypeError(
            f"{trainer.__name__} must not derive from RLOOTrainer or GMPOTrainer: their losses take one advantage a row"
        )
