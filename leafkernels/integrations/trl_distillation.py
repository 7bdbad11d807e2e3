"""Distillation in TRL: ``FireOPDTrainer`` and ``FireOPDConfig`` (FiRe-OPD, arXiv 2606.02684, and divergences).

The student samples as ``GRPOTrainer`` does, and its clipped loss takes one advantage for each token. What is put in
place of TRL's advantages is what one or several teachers give each token more than the student does, filtered and
weighted by ``leafkernels.fire_opd``; or, with ``fire_loss``, the loss is a divergence of both over the vocabulary, with
the same filter and weights. No reward is needed. Sampling, means and everything else stay TRL's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leafkernels import FireStatistics, fire_opd, fire_statistics

try:
    from trl import GRPOConfig, GRPOTrainer
except (ImportError, RuntimeError) as error:  # the latter from TRL's lazy import, in several lines
    raise ImportError(
        "leafkernels.integrations.trl_distillation needs TRL, which cannot be imported here "
        f"({' '.join(str(error).split())}); pip install 'leafkernels[trl]'"
    ) from error

from leafkernels.integrations._trl_average import Averages, EMATeacher
from leafkernels.integrations._trl_divergence import DivergenceConfig, DivergenceLoss, check_divergence
from leafkernels.integrations._trl_options import TokenCredit, check_options
from leafkernels.integrations._trl_served import ServedTeacher
from leafkernels.integrations._trl_sharing import SharedPrefixesConfig
from leafkernels.integrations._trl_stored import StoredTeacher

__all__ = ["EMATeacher", "FireOPDConfig", "FireOPDTrainer", "ServedTeacher", "StoredTeacher"]

SCOPES = ("batch", "row")
# What TRL's loss types take their mean over: the tokens of a generation batch, which are counted again here; those of
# each micro-batch, and then micro-batches; or rows.
_MEANS = {
    "dapo": "tokens",
    "cispo": "tokens",
    "vespo": "tokens",
    "bnpo": "micro-batches",
    "grpo": "rows",
    "dr_grpo": "rows",
    "sapo": "rows",
    "luspo": "rows",
}


class _AtLeastTwo(int):
    """A number that TRL's check takes for two or more. GRPO's group has to have two rows; distillation has none."""

    def __lt__(self, other: int) -> bool:
        return False


@dataclass
class FireOPDConfig(DivergenceConfig, SharedPrefixesConfig, GRPOConfig):
    """``GRPOConfig`` with the options of ``leafkernels.fire_opd``; ``num_generations`` may be 1, and is by default.

    ``beta`` is TRL's: the weight of the KL divergence to a reference model, 0 by default.
    """

    num_generations: int | None = field(default=1, metadata={"help": "Completions of a prompt, at least 1."})
    fire_drop: float = field(default=0.2, metadata={"help": "Share of completions to drop, in [0, 1]."})
    fire_alpha: float = field(default=1.0, metadata={"help": "How much more a token weighs where the teacher is sure."})
    fire_beta: float = field(default=1.0, metadata={"help": "How much more where the student is unsure."})
    fire_normalize: str = field(
        default="batch", metadata={"help": "Over what the mean weight is 1: 'batch', 'trajectory' or 'kept'."}
    )
    fire_scope: str = field(
        default="batch",
        metadata={
            "help": "What quantile, maxima and mean are taken over: 'batch', all completions of a generation step on "
            "all ranks; or 'row', each completion alone, as in the authors' scripts, where the filter never fires."
        },
    )
    teacher_column: str = field(
        default="teacher", metadata={"help": "With several teachers, the column that holds each prompt's label."}
    )
    teacher_prompt_column: str = field(
        default="teacher_prompt",
        metadata={
            "help": "The column, where a dataset has it, of what the teacher reads in the place of the prompt; a row "
            "with None has its own prompt."
        },
    )

    def __post_init__(self) -> None:
        is_one = self.num_generations == 1
        if is_one:
            self.num_generations = _AtLeastTwo(1)
        super().__post_init__()
        if is_one:
            self.num_generations = 1
        if self.fire_scope not in SCOPES:
            raise ValueError(f"fire_scope must be one of {', '.join(map(repr, SCOPES))}, got {self.fire_scope!r}")
        check_divergence(self)


class FireOPDTrainer(DivergenceLoss, Averages, TokenCredit, GRPOTrainer):
    """Distils one or several teachers into a student that samples for itself (FiRe-OPD).

    ``FireOPDTrainer(student, teacher, args, train_dataset=..., processing_class=...)``, as ``GRPOTrainer`` with a
    teacher in place of reward functions. Rewards may be given (``reward_funcs=``) to be logged; nothing learns from
    them.

    - Teachers are scored without gradients, in evaluation mode and in their own dtype (under ZeRO-3 in the one of
      DeepSpeed's config), at the temperature of sampling, ``per_device_train_batch_size`` rows at a time, or fewer
      where their logits would pass 2 GiB. A row passes its own teacher only. A model that was given is afterwards what
      it was before: frozen or not, in which mode, on which device. FSDP and ZeRO-3 spread it over the ranks for good.
    - The base of a student with an adapter may be its teacher: it is scored as the student is, the adapter disabled.
      So may the moving average of the student itself (``EMATeacher``).
    - A column ``args.teacher_prompt_column`` of the dataset is what the teacher reads in the place of the prompt.
    - Teacher and student are compared on the ids that both have: an embedding may be padded further, and a tokenizer
      may add special tokens.
    - Dropped completions leave the loss and its average, whatever ``loss_type`` takes it over. So do completions with a
      token that the teacher bans (-inf) or does not know, and those with a number that is none (NaN).
    - It logs ``fire/keep_share``, ``fire/unscored_share`` (what the last sentence is of), ``fire/threshold``,
      ``fire/mean_weight``, ``fire/teacher_entropy``, ``fire/student_entropy`` and ``fire/teacher_gap``, the mean of
      teacher less student log-probability: minus an estimate of the KL divergence of the student to its teacher; with
      a divergence also ``fire/divergence``; and in evaluations ``fire/top1_agreement`` and ``fire/top10_overlap`` of
      the ids that both find most likely.

    Args:
        model: the student, as in ``GRPOTrainer``.
        teachers: a model, or the name of one; an ``EMATeacher``, a ``ServedTeacher`` or a ``StoredTeacher``; or several
            by label, ``{"math": ..., "code": ...}``, for a dataset whose column ``args.teacher_column`` holds a label.
            They share the student's tokenizer. docs/distillation.md says what each can give.
        args: ``FireOPDConfig``.
        teacher_processing_class: the teachers' tokenizer, or one by label. None: the one that lies where the teacher
            was loaded from. It is compared with the student's; where none is known, a warning says so.

    Raises:
        TypeError, ValueError: a teacher or an option is not what it must be; the message names it.
    """

    beta: float

    def __init__(
        self,
        model: Any,
        teachers: Any,
        args: FireOPDConfig | None = None,
        *,
        teacher_processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = FireOPDConfig() if args is None else args
        if not isinstance(args, FireOPDConfig):
            raise TypeError(f"args must be a FireOPDConfig, got {type(args).__name__}")
        check_options(args, "FireOPDTrainer")
        if isinstance(teachers, StoredTeacher):
            teachers.check(args, kwargs.get("reward_funcs") is not None)
            self._stored = teachers
        if kwargs.get("reward_funcs") is None:
            kwargs["reward_funcs"] = no_reward
        super().__init__(model, args=args, **kwargs)
        # Wrong options are told now, not after the first batch has been sampled.
        one = torch.zeros(1, 1)
        fire_opd(one, one, one, one, one, **self._options())
        self._take_teachers(teachers, teacher_processing_class)
        self._check_divergence()
        given = list(teachers.values()) if isinstance(teachers, Mapping) else [teachers]
        self._follow_student([teacher for teacher in given if isinstance(teacher, EMATeacher)])

    def _options(self) -> dict[str, Any]:
        args = self.args
        return {
            "drop": args.fire_drop,
            "alpha": args.fire_alpha,
            "beta": args.fire_beta,
            "normalize": args.fire_normalize,
        }

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._give_back()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if not self.is_in_train:
                self._give_back()

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        parts = self._buffered_inputs if self.model.training else [inputs]
        if parts is not before:
            self._scale_loss(parts)
        return inputs

    def _scale_loss(self, parts: list[dict[str, Any]]) -> None:
        """By how much a mean of TRL's over rows, or over micro-batches, grows when what was dropped leaves it."""
        over = _MEANS[self.args.loss_type]
        scale = 1.0
        if over != "tokens":
            counts = []
            for part in parts:
                was_live, is_live = part["fire_rows"], (part["completion_mask"] * part["tool_mask"]).bool().any(1)
                rows = torch.stack([was_live.sum(), is_live.sum()])
                counts.append(rows if over == "rows" else rows.clamp(max=1))
            were, are = self.accelerator.gather(torch.stack(counts)).sum(0).tolist()
            scale = were / max(are, 1)
        for part in parts:
            part["fire_scale"] = scale

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        # Both of its terms that are means over what was kept; entropy bonus and router loss have means of their own.
        scale = inputs.get("fire_scale", 1.0)
        beta, self.beta = self.beta, self.beta * scale
        try:
            return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] * scale})
        finally:
            self.beta = beta

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        batch = super()._generate_and_score_completions(inputs)
        if "pixel_values" in batch:
            raise ValueError("FireOPDTrainer takes text only, got a batch with images")
        mask = batch["completion_mask"]
        if "tool_mask" in batch:
            mask = mask * batch["tool_mask"]
        batch["fire_rows"] = mask.bool().any(1)
        self._read_teacher_prompts(inputs, batch)
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        top_k = self._list_size if mode == "train" else self._list_size or self._num_compared
        if self._stored is not None:
            top_k = batch["stored_ids"].shape[-1]
        scores = self._score_all(inputs, batch, size, top_k, compares=mode == "eval")
        tokens, top = scores[:4], scores[4:]
        old_logprobs, teacher_logprobs, student_entropy, teacher_entropy = tokens
        # Of a row with a number that is none nothing is learnt. What its teacher bans has a place in the filter.
        banned = teacher_logprobs.isneginf()
        is_number = torch.stack([part.isfinite() | (part is teacher_logprobs) & banned for part in tokens]).all(0)
        mask = mask * (is_number | ~mask.bool()).all(1, keepdim=True)
        found = self._fire(old_logprobs, teacher_logprobs, student_entropy, teacher_entropy, mask)
        batch["advantages"] = found.advantages
        if self.args.fire_loss != "sampled":
            batch["advantages"] = torch.where(found.response_mask, found.weights, 0.0)
            batch |= self._kept_for_loss(inputs, top)
        # The loss averages over this mask; what the model attends to is the other one.
        batch["tool_mask"] = found.response_mask.to(batch["completion_mask"].dtype)
        live = mask.bool() & ~(banned & mask.bool()).any(1, keepdim=True)
        counts = torch.stack(
            [found.response_mask.sum(), found.keep.sum(), batch["fire_rows"].sum(), live.any(1).sum(), live.sum()]
        )
        gap = teacher_logprobs - old_logprobs
        sums = [
            torch.where(live, part, 0.0).sum(dtype=torch.float64)
            for part in (found.weights, teacher_entropy, student_entropy, gap)
        ]
        totals = self.accelerator.gather(torch.cat([counts.double(), torch.stack(sums)])[None]).sum(0)
        batch["num_items_in_batch"] = totals[0].to(batch["completion_mask"].dtype)
        _, kept, rows, scored, count, *means = totals.tolist()
        names = ("mean_weight", "teacher_entropy", "student_entropy", "teacher_gap")
        logged = {name: mean / max(count, 1) for name, mean in zip(names, means, strict=True)}
        if self._has_served or self._stored is not None:
            del logged["teacher_entropy"]
        logged["keep_share"] = kept / max(rows, 1)
        logged["unscored_share"] = (rows - scored) / max(rows, 1)
        if self.args.fire_scope == "batch":
            # -inf, where so many are unscored that the filter drops nothing else, is nothing to average.
            logged["threshold"] = float(found.threshold) if found.threshold.isfinite() else float("nan")
        if self._stored is not None:
            for name in ("teacher_gap", "threshold"):
                logged.pop(name, None)
        for name, value in logged.items():
            self._metrics[mode][f"fire/{name}"].append(value)
        if mode == "eval" and len(top) == 3:
            self._log_agreement(top, live)
        return batch

    def _fire(
        self,
        old_logprobs: Tensor,
        teacher_logprobs: Tensor,
        student_entropy: Tensor,
        teacher_entropy: Tensor,
        mask: Tensor,
    ) -> Any:
        rows = (old_logprobs, teacher_logprobs, student_entropy, teacher_entropy, mask)
        if self.args.fire_scope == "row":
            alone = [fire_opd(*(part[i : i + 1] for part in rows), **self._options()) for i in range(len(mask))]
            fields = zip(*alone, strict=True)
            return type(alone[0])(*(torch.cat(of) if of[0].dim() else torch.stack(of) for of in fields))
        statistics = fire_statistics(teacher_logprobs, student_entropy, teacher_entropy, mask)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(statistics.rows)
            statistics = FireStatistics(counts)
        return fire_opd(*rows, statistics=statistics, **self._options())


def no_reward(completions: list[Any], **_: Any) -> list[float]:
    """TRL wants a reward for every completion; the teacher is what is learnt from."""
    return [0.0] * len(completions)
