"""``loss="leafkernels"``: the policy loss of this package in the place of TRL's, with TRL's options and logs.

TRL's own loss is computed beside it, on log-probabilities without a gradient: what it logs, its entropy bonus and the
loss of a model's router are TRL's own, whatever the version. Its policy loss is then taken out and ours put in.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from torch import Tensor

from leafkernels.losses.equal import drop_equal
from leafkernels.losses.kinds import KINDS, check_loss
from leafkernels.losses.policy_loss import policy_loss

LOSSES = ("trl", "leafkernels")

# The kind that TRL's loss_type names; all others are PPO's clipped loss.
_KINDS = {"cispo": "cispo", "sapo": "sapo", "vespo": "vespo"}
# What the sum is divided by; TRL's others have the names of our aggregates.
_AGGREGATES = {"sapo": "grpo", "cispo": "dapo", "vespo": "dapo"}


@dataclass
class LossConfig:
    """Which loss is computed."""

    loss: str = field(
        default="trl", metadata={"help": "'trl', or 'leafkernels': leafkernels.policy_loss in the place of TRL's."}
    )
    kind: str | None = field(
        default=None,
        metadata={
            "help": f"With loss='leafkernels': {', '.join(map(repr, KINDS))}. None: what loss_type says. loss_type "
            "says too how tokens are averaged."
        },
    )
    loss_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "With loss='leafkernels': options of the kind, as policy_loss takes them, over TRL's own."},
    )
    drop_equal: bool = field(
        default=False,
        metadata={"help": "Leave completions out of loss and KL whose prompt's rewards are all equal; either loss."},
    )
    kl_kind: str = field(default="k3", metadata={"help": "With loss='leafkernels': 'k1', 'k2', 'k3', 'abs' or 'k3+'."})


class OwnLoss:
    """A trainer derived from ``GRPOTrainer`` whose policy loss may be that of this package."""

    args: Any
    accelerator: Any
    _metrics: Any  # TRL's

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.args.loss == "trl":
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        name = "_get_per_token_logps_and_entropies"
        forward, found = getattr(self, name), None

        def forward_once(*args: Any, **kwargs: Any) -> Any:
            nonlocal found
            if found is None:
                found = forward(*args, **kwargs)
            return (found[0].detach(), *found[1:])

        def theirs() -> Tensor:
            return super(OwnLoss, self)._compute_loss(model, inputs)  # type: ignore[misc]

        own = vars(self).get(name)
        setattr(self, name, forward_once)
        try:
            loss = theirs()
            extra = self._beside_the_policy(loss, theirs)
        finally:
            delattr(self, name)
            if own is not None:
                setattr(self, name, own)
        if found is None:
            raise RuntimeError(
                f"loss must be 'trl' with {type(self).__name__} in TRL {trl.__version__}: its loss does not call "
                f"{name}, so that no other can be put in its place"
            )
        return self._own_loss(found[0], found[1], inputs) + extra

    def _drop_equal(self, batch: dict[str, Any], rewards: Tensor, group_size: int) -> None:
        """Let no token count of the rows of equal rewards, of ``rewards`` (N,) of all ranks, and log their share."""
        if not (self.args.drop_equal and self.model.training):  # type: ignore[attr-defined]
            return
        mask = batch["completion_mask"]
        found = drop_equal(torch.ones_like(rewards)[:, None], rewards, group_size=group_size)
        first = self.accelerator.process_index * len(mask)
        kept = found.response_mask[first : first + len(mask)].to(mask.device)
        # TRL leaves tokens of tools out of loss, KL and means by this mask.
        batch["tool_mask"] = batch.get("tool_mask", torch.ones_like(mask)) * kept
        counted = (mask * batch["tool_mask"]).sum()
        batch["num_items_in_batch"] = self.accelerator.gather(counted).sum()
        self._metrics["train"]["leaf/equal_rewards"].append(float(found.dropped_rows) / max(len(rewards), 1))

    def _beside_the_policy(self, loss: Tensor, theirs: Any) -> Tensor | float:
        """What TRL adds to its policy loss: the entropy bonus, and the loss of a router."""
        switches = [name for name in ("_entropy_bonus_enabled", "aux_loss_enabled") if getattr(self, name, False)]
        if not switches:
            return 0.0
        metrics, self._metrics = self._metrics, {mode: defaultdict(list) for mode in ("train", "eval")}
        for name in switches:
            setattr(self, name, False)
        try:
            return loss - theirs().detach()
        finally:
            self._metrics = metrics
            for name in switches:
                setattr(self, name, True)

    def _own_loss(self, logprobs: Tensor, entropy: Tensor, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        old = inputs.get("old_per_token_logps")
        old = logprobs.detach() if old is None else old
        advantages = inputs["advantages"]
        advantages = advantages if advantages.dim() == 2 else advantages[:, None]
        kind, options = loss_of(self.args)
        weights = self._weights(kind, logprobs.detach(), old, advantages, entropy.detach(), mask, inputs)
        if kind == "vespo":
            # Its factor is among the weights: TRL's own, which gives a row one sign.
            kind, options = "reinforce", {}
        is_training = self.model.training  # type: ignore[attr-defined]
        parts = self.current_gradient_accumulation_steps if is_training else 1.0  # type: ignore[attr-defined]
        loss_type = self.loss_type  # type: ignore[attr-defined]
        aggregate = _AGGREGATES.get(loss_type, loss_type)
        if aggregate == "dapo":
            # The tokens of the generation batch, of which an accumulation window is a share.
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if is_training:
                tokens = tokens * parts / self.args.steps_per_generation
            options["num_tokens"], parts = tokens, 1.0
        if aggregate == "dr_grpo":
            options["constant"] = float(self.max_completion_length)  # type: ignore[attr-defined]
        beta = float(self.beta)  # type: ignore[attr-defined]
        result = policy_loss(
            logprobs,
            old.to(logprobs.dtype),
            advantages.expand(logprobs.shape).to(logprobs.dtype),
            mask,
            kind=kind,
            importance=self.importance_sampling_level,  # type: ignore[attr-defined]
            ref_logprobs=inputs["ref_per_token_logps"].to(logprobs.dtype) if beta else None,
            kl_coef=beta,
            kl_kind=self.args.kl_kind,
            kl_weighted=bool(getattr(self.args, "use_bias_correction_kl", False)),
            token_weights=weights,
            aggregate=aggregate,
            **options,
        )
        metrics = self._metrics["train" if is_training else "eval"]
        if metrics.get("policy_loss") and getattr(self, "_entropy_bonus_enabled", False):
            metrics["policy_loss"][-1] = self.accelerator.gather(result.loss.detach()).nanmean().item()
        for name in ("clip_fraction", "approx_kl", "mean_ratio"):
            metrics[f"leaf/{name}"].append(self.accelerator.gather(getattr(result, name)).mean().item())
        return result.loss / parts

    def _weights(
        self,
        kind: str,
        logprobs: Tensor,
        old: Tensor,
        advantages: Tensor,
        entropy: Tensor,
        mask: Tensor,
        inputs: dict[str, Any],
    ) -> Tensor | None:
        """What TRL multiplies the losses of tokens by before it adds the KL; None: nothing."""
        trainer: Any = self
        factors = []
        sampled = inputs.get("importance_sampling_ratio") if trainer.use_vllm else None
        if trainer.top_entropy_quantile < 1.0:
            factors.append(trainer.get_high_entropy_mask(entropy, mask, 1 - trainer.top_entropy_quantile))
        if getattr(trainer, "off_policy_mask_threshold", None) is not None:
            factors.append(
                trainer.get_off_policy_mask(
                    advantages=advantages,
                    per_token_logps=logprobs,
                    sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
                    mask=mask,
                    off_policy_threshold=trainer.off_policy_mask_threshold,
                )
            )
        if kind == "vespo":
            names = {"k_pos": "vespo_k_pos", "lambda_pos": "vespo_lambda_pos"}
            names |= {"k_neg": "vespo_k_neg", "lambda_neg": "vespo_lambda_neg"}
            factors.append(
                trainer.get_gamma_weights(
                    advantages=advantages,
                    log_ratio_per_token=logprobs - old,
                    mask=mask,
                    importance_sampling_ratio=sampled,
                    **{name: getattr(self.args, option) for name, option in names.items()},
                )
            )
        elif sampled is not None:
            factors.append(sampled)
        if not factors:
            return None
        weights = torch.ones_like(logprobs)
        for factor in factors:
            weights = weights * factor
        return weights


def loss_of(args: Any) -> tuple[str, dict[str, Any]]:
    """The kind, and its options: TRL's own where it has them, and those of ``loss_options``."""
    kind = args.kind or _KINDS.get(args.loss_type, "clip")
    options: dict[str, Any] = {}
    if kind == "clip":
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        options = {"clip": (args.epsilon, high), "dual_clip": getattr(args, "delta", None)}
    elif kind == "cispo" and args.epsilon_high is not None:
        # TRL's bound is that of the ratio itself.
        options = {"clip": (1.0, args.epsilon_high - 1.0)}
    elif kind == "sapo" and hasattr(args, "sapo_temperature_pos"):
        options = {"tau": (args.sapo_temperature_pos, args.sapo_temperature_neg)}
    elif kind == "vespo":
        shapes = (args.vespo_k_pos, args.vespo_lambda_pos), (args.vespo_k_neg, args.vespo_lambda_neg)
        options = {"shape": shapes[0], "shape_negative": shapes[1]}
    given = args.loss_options
    given = json.loads(given) if isinstance(given, str) else given or {}
    return kind, options | given


def check_own_loss(args: Any, trainer: str) -> None:
    """Refuse what cannot be: options of a loss that is not asked for, or that the kind does not read.

    Raises:
        TypeError, ValueError: the message names the option.
    """
    if args.drop_equal and getattr(args, "top_entropy_quantile", 1.0) < 1:
        raise ValueError(
            f"drop_equal must be False with top_entropy_quantile={args.top_entropy_quantile}, got True: where all "
            "completions are left out, there is no quantile"
        )
    if args.loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {args.loss!r}")
    if args.loss == "trl":
        for name, default in (("kind", None), ("loss_options", None), ("kl_kind", "k3")):
            if getattr(args, name) != default:
                raise ValueError(
                    f"{name} must be left out with loss='trl', got {getattr(args, name)!r}: it is an option of "
                    "loss='leafkernels'"
                )
        return
    kind, options = loss_of(args)
    level = getattr(args, "importance_sampling_level", "token")
    weighted = bool(getattr(args, "use_bias_correction_kl", False))
    check_loss(kind, options, level, None, 0.0, args.kl_kind, weighted, 0.0)
    if getattr(args, "use_liger_kernel", False):
        raise ValueError(
            f"use_liger_kernel must be False with loss='leafkernels', got True: Liger's loss never asks {trainer} for "
            "log-probabilities"
        )
