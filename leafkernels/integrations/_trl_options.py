"""What TRL's loss makes of one advantage for each token: ``TokenCredit``, and the options it takes.

The loss of ``GRPOTrainer`` takes advantages of shape (rows, tokens), but some of its options are defined for one
advantage a row. With such an option every token would get the gradient of the row's mean credit, or half of a row
would be dropped. ``TokenCredit`` gives them a meaning for each token, and ``check_options`` refuses what has none. The
table in docs/trainers.md says what each option means; a test holds both to the fields of TRL's config.
``MendedGRPOTrainer`` is what every trainer here derives from.
"""

import logging
from dataclasses import MISSING, fields
from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from leafkernels.integrations._trl_masks import SamplingMasks

_logger = logging.getLogger(__name__)

# Options by whose value the loss, or the advantages, are another formula, and the values that are made right.
CHOICES = {
    "importance_sampling_level": ("token", "sequence"),
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
# The other options of the loss and the advantages; each has its line in docs/trainers.md.
# fmt: off
OF_THE_LOSS = frozenset((
    "beta", "delta", "entropy_coef", "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min", "entropy_target",
    "epsilon", "epsilon_high", "mask_truncated_completions", "max_completion_length", "num_generations",
    "num_generations_eval",
    "num_iterations", "off_policy_mask_threshold", "reward_weights", "router_aux_loss_coef", "sapo_temperature_neg",
    "sapo_temperature_pos", "steps_per_generation", "temperature", "top_entropy_quantile", "use_adaptive_entropy",
    "use_bias_correction_kl", "use_liger_kernel", "vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg",
    "vespo_lambda_pos", "vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min", "vllm_importance_sampling_correction",
)) | set(CHOICES)
# Options that no advantage meets: models, data, sampling, engines, logs.
ELSEWHERE = frozenset((
    "cache_implementation", "cast_lm_head_to_fp32", "chat_template_kwargs", "disable_dropout",
    "ds3_gather_for_generation", "generation_batch_size", "generation_kwargs", "log_completions",
    "log_completions_hub_repo", "log_multimodal", "log_unique_prompts",
    "max_tool_calling_iterations", "min_p", "model_init_kwargs", "num_completions_to_print", "pad_to_multiple_of",
    "ref_model_mixup_alpha", "ref_model_sync_steps", "repetition_penalty", "shuffle_dataset", "sync_ref_model",
    "top_k", "top_p", "transformers_continuous_batching_config", "trust_remote_code",
    "use_transformers_continuous_batching", "use_transformers_paged", "use_vllm", "vllm_enable_sleep_mode",
    "vllm_gpu_memory_utilization", "vllm_group_port", "vllm_max_model_length", "vllm_mode", "vllm_model_impl",
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
    "vllm_structured_outputs_regex", "vllm_tensor_parallel_size",
))
# fmt: on


def check_options(args: Any, name: str) -> None:
    """Refuse, for the trainer ``name``, what TRL's loss would take for one advantage a row, and say what is not known.

    Raises:
        RuntimeError: the installed TRL cannot be made right with an option.
        ValueError: the option has a value of which nothing is known.
    """
    version = Version(trl.__version__).release
    if version < (0, 26):
        raise RuntimeError(
            f"{name} needs TRL 0.26 or newer, got {trl.__version__}, whose loss broadcasts advantages per "
            "token to (rows, rows, tokens); pip install 'trl>=0.26'"
        )
    for option, values in CHOICES.items():
        value = getattr(args, option, values[0])
        if value not in values:
            raise ValueError(
                f"{option} must be one of {', '.join(map(repr, values))} with {name}, got {value!r}, of which it does "
                "not know what it makes of one advantage for each token"
            )
    if args.loss_type == "sapo" and version < (0, 28):
        raise RuntimeError(
            f"loss_type must not be 'sapo' with {name} in TRL {trl.__version__}, whose SAPO loss takes one "
            "advantage a row; choose another, or pip install 'trl>=0.28'"
        )
    if getattr(args, "use_liger_kernel", False) and hasattr(GRPOTrainer, "compute_liger_loss"):
        raise RuntimeError(
            f"use_liger_kernel must be False with {name} in TRL {trl.__version__}, whose Liger loss takes one "
            "advantage a row; set it to False, or pip install 'trl>=1.14'"
        )
    # The two places where a row is weighed by the sign of its advantage; both are overridden below.
    for is_on, option, method in (
        (getattr(args, "off_policy_mask_threshold", None) is not None, "off_policy_mask_threshold", "off_policy_mask"),
        (args.loss_type == "vespo", "loss_type='vespo'", "gamma_weights"),
    ):
        if is_on and not hasattr(GRPOTrainer, f"get_{method}"):
            raise RuntimeError(
                f"{option} must not be set with {name} in TRL {trl.__version__}: it has no "
                f"GRPOTrainer.get_{method}, through which a row is given one sign"
            )
    known = OF_THE_LOSS | ELSEWHERE | {option.name for option in fields(TrainingArguments)}
    unknown = [
        f"{o.name}={getattr(args, o.name)!r}" for o in fields(GRPOConfig) if o.name not in known and _is_set(args, o)
    ]
    if unknown:
        _logger.warning(
            "%s does not know %s of TRL %s: if it concerns the loss or the advantages, it may take one advantage a "
            "row, and here they are one for each token.",
            name,
            ", ".join(unknown),
            trl.__version__,
        )


def _is_set(args: Any, option: Any) -> bool:
    default = option.default if option.default_factory is MISSING else option.default_factory()
    return bool(getattr(args, option.name) != default)


class MendedGRPOTrainer(SamplingMasks):
    """``GRPOTrainer`` that may share prefixes and mask what was not sampled from, with two mends.

    - An infinite reward is none: the function has not scored that completion. TRL would carry it into the means of its
      group, or of the batch. ``rewards/NAME/nonfinite`` counts them, over all ranks, in the generation batches that
      have any; NaN is TRL's own sign of a completion that is not scored.
    - Under FSDP2 an output layer that is sharded alone has the gradient of all ranks. Accelerate shards it so where it
      does not find the norm before it, as in models that hear or see; and TRL's fused head, which reads its weight and
      does not call it, would leave each rank's shard with the gradient of that rank.
    """

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        base = self.accelerator.unwrap_model(model)
        head = base.get_output_embeddings()
        if not isinstance(head, FSDPModule):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        # Within the forward of the root, from which FSDP2 starts.
        hook = base.get_input_embeddings().register_forward_pre_hook(lambda *_: head.unshard())
        try:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        finally:
            hook.remove()
            if not torch.is_grad_enabled():  # else after backward
                head.reshard()

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        # Gathered already, so that all ranks see the same.
        is_infinite = rewards.isinf()
        for name, rows in zip(self.reward_func_names, is_infinite.T.tolist(), strict=True):
            if any(rows):
                self._metrics["train" if self.model.training else "eval"][f"rewards/{name}/nonfinite"].append(sum(rows))
                if self.accelerator.is_main_process:
                    _logger.warning(
                        "The reward function %r gave infinite rewards to %d of %d completions, first to number %d of "
                        "the batch; they count as not scored by it.",
                        name,
                        sum(rows),
                        len(rows),
                        rows.index(True),
                    )
        return rewards.masked_fill(is_infinite, torch.nan)


class TokenCredit(MendedGRPOTrainer):
    """``GRPOTrainer`` whose loss is right with advantages of shape (rows, tokens), under every option it takes.

    - ``importance_sampling_level="sequence"``: every token of a row has the row's ratio s as its value, and
      s exp(logprob - logprob.detach()) as its gradient (GSPO-token, arXiv 2507.18071). TRL's exp(mean log-ratio) gives
      all tokens of a row one gradient, in which their credit cancels.
    - A row that is kept or weighed by the sign of its advantage (``off_policy_mask_threshold``, "vespo") has the sign
      of its tokens' mean advantage.

    Advantages of shape (rows,) give what TRL gives, but for a KL term that TRL multiplies by the ratio of a sequence.
    """

    importance_sampling_level: str  # TRL's

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.importance_sampling_level != "sequence":
            return super()._compute_loss(model, inputs)
        # At the level of tokens, with old log-probabilities from which each token is as far as its row in the mean,
        # TRL's own formulas are GSPO-token's.
        inputs = dict(inputs)
        old_logprobs = inputs.get("old_per_token_logps")
        name = "_get_per_token_logps_and_entropies"
        forward, is_called = getattr(self, name), False

        def forward_first(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_called
            is_called = True
            found = forward(*args, **kwargs)
            if old_logprobs is not None:
                mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
                inputs["old_per_token_logps"] = _shifted(found[0].detach(), old_logprobs, mask)
            return found

        own = vars(self).get(name)
        setattr(self, name, forward_first)
        self.importance_sampling_level = "token"
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.importance_sampling_level = "sequence"
            delattr(self, name)
            if own is not None:
                setattr(self, name, own)
        if not is_called:
            raise RuntimeError(
                f"importance_sampling_level must be 'token' with {type(self).__name__} in TRL {trl.__version__}: its "
                f"loss does not call {name}, so that the ratio of a row cannot be given to each of its tokens"
            )
        return loss

    def get_off_policy_mask(self, advantages: Tensor, **more: Any) -> Tensor:
        """(rows, 1) whether a row is kept; of ``advantages`` the sign of a row's mean counts."""
        return super().get_off_policy_mask(advantages=_of_rows(advantages, more["mask"]), **more)

    def get_gamma_weights(self, advantages: Tensor, **more: Any) -> Tensor:
        """(rows, 1) what a row weighs; of ``advantages`` the sign of a row's mean counts."""
        return super().get_gamma_weights(advantages=_of_rows(advantages, more["mask"]), **more)


def _of_rows(advantages: Tensor, mask: Tensor) -> Tensor:
    """(rows, 1) sums of a row's advantages, which have the sign of their mean."""
    return (advantages * mask).sum(1, keepdim=True)


def _shifted(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """(rows, tokens) old log-probabilities for which the log-ratio of every token is the mean of its row's."""
    # In bfloat16 the mean, which is small, would be lost beside a log-probability.
    logprobs = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    return logprobs - log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
