"""Sampling masks in TRL's trainers: log-probabilities over the ids that a token could have been.

With top-p, top-k or min-p a token is drawn from the kept ids alone. They are found once, when a batch has been sampled,
by one forward pass of the policy that sampled it and the options of the generation, or are those that an engine hands
over; every forward pass of the loss (old policy, policy, reference) is then over them.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import trl
from torch import Tensor
from torch.nn.functional import pad

from leafkernels.integrations._trl_kept import joined, of_engine, of_rows, padded
from leafkernels.integrations._trl_sharing import SharedPrefixes
from leafkernels.models.asking import evaluating
from leafkernels.models.heads import Head, known_head, score, states_of_head
from leafkernels.models.tree_logprobs import Prepared
from leafkernels.vocabulary.sampling_mask import SamplingMask, are_missing
from leafkernels.vocabulary.surprisal import surprisal_entropy

_logger = logging.getLogger(__name__)

# Logits of the scoring pass that are made at a time.
_CHUNK = 1 << 26
# What of the generation says which ids are kept, and what has no say in it.
_KEEPS = ("temperature", "top_k", "top_p", "min_p")
_NEUTRAL = {"suppress_tokens", "max_new_tokens", "max_tokens", "max_length", "do_sample", "use_cache", "seed", "n"} | {
    "pad_token_id", "bos_token_id", "eos_token_id", "stop", "cache_implementation", "logprobs", "detokenize"
}  # fmt: skip


@dataclass
class SamplingMaskConfig:
    """The option of a trainer's config."""

    sampling_mask: bool = field(
        default=False,
        metadata={
            "help": "Take log-probabilities over the ids that top_p, top_k and min_p kept when a token was sampled, in "
            "every forward pass of the loss; without it they are those of another policy than the one that sampled."
        },
    )


class SamplingMasks(SharedPrefixes):
    """``GRPOTrainer`` whose log-probabilities are over the kept ids, where its config has ``sampling_mask=True``.

    - The kept ids come from one forward pass of the policy, in evaluation mode, as soon as a batch is sampled; from an
      engine, where what TRL's ``_generate`` returns has ``token_ids`` and ``offsets`` for each completion.
    - Entropies are those of the truncated distributions.
    - ``leaf/kept_ids`` and ``leaf/kept_mass`` in the log are means over tokens: of how many ids could have been, and
      of the probability that they had together; ``leaf/kept_missing`` is the share of tokens that were sampled outside
      of them, which count as kept: rounding makes a few.
    - Where sampling truncates and there is no mask, a warning says so.

    Raises:
        RuntimeError: an engine, or a ``rollout_func``, samples and hands over no kept ids.
        ValueError: an option does not go with it; the message names it.
    """

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        self._masks: list[SamplingMask] | None = None  # of the rows of the next forward passes
        self._scored: Tensor | None = None  # (rows, tokens), of the pass that found the kept ids
        self._sampler = _sampler(self.args)
        asked = getattr(self.args, "sampling_mask", False)
        self._takes_masks = bool(asked and self._sampler)
        if asked:
            _check_options(self.args, getattr(self, "aux_loss_enabled", False))
        elif self._sampler and self.accelerator.is_main_process:
            _logger.warning(
                "%s truncates what is sampled, and log-probabilities over the whole vocabulary are those of another "
                "policy: each is too low by the logarithm of the kept mass. %s",
                ", ".join(f"{name}={value}" for name, value in self._sampler.items() if name != "temperature"),
                "sampling_mask=True takes them over the kept ids."
                if hasattr(self.args, "sampling_mask")
                else f"{type(self.args).__name__} has no sampling_mask, by which they would be over the kept ids.",
            )

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self._masks = self._scored = None
        found = super()._generate(*args, **kwargs)
        if self._takes_masks:
            self._find_masks(found, *found[:2])
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self._masks is not None:
            batch["sampling_mask"] = self._masks
            self._log_masks(batch)
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._masks = inputs.get("sampling_mask")
        return super()._compute_loss(model, inputs)

    def _alone(self, rows: slice, compute: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._masks is not None:
            has_aux_loss = "compute_aux_loss" in inspect.signature(compute).parameters
            compute = partial(self._score_kept, self._masks[rows], 3 if has_aux_loss else 2)
        return super()._alone(rows, compute, model, *args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *more: Any, **options: Any
    ) -> Any:
        self._width = logits_to_keep
        if self._masks is not None:
            known_head(model)
        call = (model, input_ids, attention_mask, logits_to_keep)
        return super()._get_per_token_logps_and_entropies(*call, *more, **options)

    def _shared(self, rows: slice, prepared: Prepared) -> tuple[Tensor, Tensor]:
        if self._masks is None:
            return super()._shared(rows, prepared)
        before = prepared.batch.shape[1] - self._width
        kept = joined(self._masks[rows], self._width, prepared.batch.rows.ids.device, before)
        with self.accelerator.autocast():
            return prepared.run(self.temperature, sampling_mask=kept)[:2]

    def _score_kept(
        self,
        masks: list[SamplingMask],
        num_results: int,
        model: Any,
        ids: Tensor,
        mask: Tensor,
        keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> Any:
        """What TRL's function returns, over the kept ids of ``masks``, one for each row."""
        if others:
            raise ValueError(
                f"sampling_mask must be False for rows with {next(iter(others))}, which only TRL's own function hands "
                "to the model"
            )
        size = batch_size or len(ids)
        parts = []
        for start in range(0, len(ids), size):
            rows = slice(start, start + size)
            with self.accelerator.autocast():
                head, states = states_of_head(model, ids[rows], mask[rows], keep)
                kept = joined(masks[rows], keep, ids.device)
                live = mask[rows, -keep:].bool()
                parts.append(score(head, states, ids[rows, -keep:], self.temperature, live, kept))
        logprobs = torch.cat([part.logprobs for part in parts])
        entropy = torch.cat([part.entropy for part in parts]) if compute_entropy else None
        return (logprobs, entropy, None)[:num_results]

    def _find_masks(self, found: tuple[Any, ...], prompts: list[list[int]], completions: list[list[int]]) -> None:
        """Keep the masks of all rows, and their log-probabilities where a pass of the policy makes them."""
        device = self.accelerator.device
        lengths = [len(row) for row in completions]
        masks = of_engine(found, lengths, device)
        if masks is not None:
            self._masks = masks
            return
        if self.use_vllm or getattr(self, "rollout_func", None) is not None:
            name = "use_vllm=True" if self.use_vllm else "a rollout_func"
            raise RuntimeError(
                f"sampling_mask must be False with {name} in TRL {trl.__version__}, which hands over no kept ids: what "
                "is generated must have token_ids and offsets for each completion, as vLLM's sampling masks have"
            )
        ids, mask, keep = padded(prompts, completions, self._tokenizer.pad_token_id, device)
        is_training = self.model.training
        size = getattr(self.args, f"per_device_{'train' if is_training else 'eval'}_batch_size")
        parts = []
        known_head(self.model)
        with evaluating(self.model), torch.no_grad(), self.accelerator.autocast():
            for start in range(0, len(ids), size):
                rows = slice(start, start + size)
                parts.append(self._alone(rows, self._keep, self.model, ids[rows], mask[rows], keep))
        logprobs, mass, missing = (torch.cat(part) for part in list(zip(*parts, strict=True))[1:])
        self._masks = [row for part in parts for row in part[0]]
        self._scored, self._mass, self._missing = logprobs, mass, missing

    def _keep(
        self, model: Any, ids: Tensor, mask: Tensor, keep: int
    ) -> tuple[list[SamplingMask], Tensor, Tensor, Tensor]:
        """Of rows their masks; and (rows, keep) of tokens log-probabilities, the kept mass, and which are missing."""
        head, states = states_of_head(model, ids, mask, keep)
        live = mask[:, -keep:].bool()
        tokens, states = ids[:, -keep:][live], states[live]
        banned = (self.args.generation_kwargs or {}).get("suppress_tokens") or getattr(
            getattr(self, "generation_config", None), "suppress_tokens", None
        )
        parts: list[SamplingMask] = []
        numbers: list[Tensor] = []
        step = max(1, _CHUNK // _vocabulary(head, states))
        for some, sampled in zip(states.split(step), tokens.split(step), strict=True):
            logits = some if head is None else head.logits(some)
            if banned:
                logits = logits.index_fill(1, torch.tensor(banned, device=logits.device), -torch.inf)
            part = SamplingMask.from_logits(logits, **self._sampler)
            options: dict[str, Any] = {"temperature": self.temperature}
            kept = surprisal_entropy(logits, sampled, sampling_mask=part, **options).logprobs
            mass = (surprisal_entropy(logits, sampled, **options).logprobs - kept).exp()
            parts.append(part)
            numbers.append(torch.stack((kept, mass, are_missing(part, sampled).to(kept.dtype))))
        whole = torch.cat(numbers, 1) if numbers else states.new_zeros((3, 0))
        logprobs, mass, missing = (whole.new_zeros(live.shape).masked_scatter(live, row) for row in whole)
        return of_rows(parts, live.sum(1).tolist(), ids.device), logprobs, mass, missing

    def _log_masks(self, batch: dict[str, Any]) -> None:
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        assert self._masks is not None
        counts = [pad(row.offsets.diff(), (0, mask.shape[1] - row.offsets.shape[0] + 1)) for row in self._masks]
        totals = [(torch.stack(counts) * mask).sum(), mask.sum()]
        if self._scored is not None:
            narrow = mask[:, : self._mass.shape[1]]
            totals += [(table * narrow).sum() for table in (self._mass, self._missing)]
        kept, tokens, *more = self.accelerator.reduce(torch.stack([n.double() for n in totals]), "sum").tolist()
        log = self._metrics["train" if self.model.training else "eval"]
        log["leaf/kept_ids"].append(kept / max(tokens, 1))
        for name, number in zip(("leaf/kept_mass", "leaf/kept_missing"), more, strict=False):
            log[name].append(number / max(tokens, 1))
        if more and more[1] > 0.05 * tokens:
            self._tell_missing(more[1] / tokens)

    def _tell_missing(self, share: float) -> None:
        if not getattr(self, "_told_missing", False) and self.accelerator.is_main_process:
            self._told_missing = True
            _logger.warning(
                "sampling_mask=True, and %.0f%% of the tokens were sampled outside of what %s keeps of the policy's "
                "logits: something else takes part in sampling.",
                100 * share,
                self._sampler,
            )


def _sampler(args: Any) -> dict[str, Any]:
    """The options of ``SamplingMask.from_logits`` by which a trainer samples; empty where nothing is truncated."""
    given = {name: getattr(args, name, None) for name in _KEEPS}
    given |= {name: value for name, value in (args.generation_kwargs or {}).items() if name in _KEEPS}
    if given["top_k"] is not None and given["top_k"] <= 0:  # -1 in vLLM
        given["top_k"] = None
    kept = {name: value for name, value in given.items() if value is not None}
    is_truncated = "top_k" in kept or kept.get("top_p", 1.0) < 1 or kept.get("min_p", 0.0) > 0
    return kept if is_truncated else {}


def _check_options(args: Any, has_aux_loss: bool) -> None:
    unknown = sorted(set(args.generation_kwargs or {}) - _NEUTRAL - set(_KEEPS))
    if unknown:
        raise ValueError(
            f"generation_kwargs must hold no {unknown[0]!r} with sampling_mask=True, which does not know what that "
            f"keeps, got {args.generation_kwargs[unknown[0]]!r}"
        )
    if getattr(args, "repetition_penalty", 1.0) not in (None, 1.0):
        raise ValueError(
            "repetition_penalty must be 1 with sampling_mask=True: it changes the distribution of a token by those "
            f"before it, got {args.repetition_penalty}"
        )
    if getattr(args, "cast_lm_head_to_fp32", False):
        raise ValueError(
            "sampling_mask must be False with cast_lm_head_to_fp32=True, whose head TRL feeds in float32 in its own "
            "function alone"
        )
    if has_aux_loss:
        raise ValueError(
            "sampling_mask must be False with a router's loss (router_aux_loss_coef), which TRL's own function alone "
            "returns; or set router_aux_loss_coef to 0"
        )


def _vocabulary(head: Head | None, states: Tensor) -> int:
    return states.shape[-1] if head is None else head.linear.weight.shape[0]
