"""FiRe-OPD in TRL: ``FireOPDTrainer`` and ``FireOPDConfig`` (arXiv 2606.02684).

The student samples as ``GRPOTrainer`` does, and its clipped loss takes one advantage for each token. What is put in
place of TRL's advantages is what one or several teachers give each token more than the student does, filtered and
weighted by ``leafkernels.fire_opd``. No reward is needed. Sampling, loss and everything else stay TRL's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leafkernels import FireStatistics, fire_opd, fire_statistics, fire_teachers, surprisal_entropy

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError(
        f"leafkernels.integrations.trl_distillation needs TRL, which cannot be imported here ({error}); "
        "pip install 'leafkernels[trl]'"
    ) from error

SCOPES = ("batch", "row")


class _AtLeastTwo(int):
    """A number that TRL's check takes for two or more. GRPO's group has to have two rows; distillation has none."""

    def __lt__(self, other: int) -> bool:
        return False


@dataclass
class FireOPDConfig(GRPOConfig):
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

    def __post_init__(self) -> None:
        is_one = self.num_generations == 1
        if is_one:
            self.num_generations = _AtLeastTwo(1)
        super().__post_init__()
        if is_one:
            self.num_generations = 1
        if self.fire_scope not in SCOPES:
            raise ValueError(f"fire_scope must be one of {', '.join(map(repr, SCOPES))}, got {self.fire_scope!r}")


class FireOPDTrainer(GRPOTrainer):
    """Distils one or several teachers into a student that samples for itself (FiRe-OPD).

    ``FireOPDTrainer(student, teacher, args, train_dataset=..., processing_class=...)``, as ``GRPOTrainer`` with a
    teacher in place of reward functions. Rewards may be given (``reward_funcs=``) to be logged; nothing learns from
    them.

    - Teachers are scored without gradients, in evaluation mode and in their own dtype, at the temperature of sampling,
      ``per_device_train_batch_size`` rows at a time. A row passes its own teacher only.
    - Dropped completions leave the loss and its average.
    - It logs ``fire/keep_share``, ``fire/threshold``, ``fire/mean_weight``, ``fire/teacher_entropy``,
      ``fire/student_entropy`` and ``fire/teacher_gap``, the mean of teacher less student log-probability: minus an
      estimate of the KL divergence of the student to its teacher.

    Args:
        model: the student, as in ``GRPOTrainer``.
        teachers: a model, or the name of one; or several by label, ``{"math": ..., "code": ...}``, for a dataset whose
            column ``args.teacher_column`` holds a label. They share the student's tokenizer. A served teacher gives no
            entropies, without which FiRe has no weights, and is not taken.
        args: ``FireOPDConfig``.

    Raises:
        TypeError, ValueError: a teacher or an option is not what it must be; the message names it.
    """

    def __init__(self, model: Any, teachers: Any, args: FireOPDConfig | None = None, **kwargs: Any) -> None:
        args = FireOPDConfig() if args is None else args
        if not isinstance(args, FireOPDConfig):
            raise TypeError(f"args must be a FireOPDConfig, got {type(args).__name__}")
        if kwargs.get("reward_funcs") is None:
            kwargs["reward_funcs"] = no_reward
        super().__init__(model, args=args, **kwargs)
        # Wrong options are told now, not after the first batch has been sampled.
        one = torch.zeros(1, 1)
        fire_opd(one, one, one, one, one, **self._options())
        self._has_labels = isinstance(teachers, Mapping)
        by_label = dict(teachers) if self._has_labels else {None: teachers}
        if not by_label:
            raise ValueError("teachers must hold at least one, got none")
        self.teachers = {label: self._load_teacher(label, teacher) for label, teacher in by_label.items()}

    def _load_teacher(self, label: Any, teacher: Any) -> Any:
        name = "teachers" if label is None else f"teachers[{label!r}]"
        if isinstance(teacher, str):
            if "://" in teacher:
                raise ValueError(
                    f"{name} must be a model or its name, got the address {teacher!r}: a served model returns "
                    "log-probabilities of tokens and no entropy over its vocabulary, which the weights need"
                )
            from transformers import AutoModelForCausalLM, AutoTokenizer

            vocabulary = AutoTokenizer.from_pretrained(teacher).get_vocab()
            if vocabulary != self._tokenizer.get_vocab():
                raise ValueError(
                    f"{name} must have the student's tokenizer, got {teacher!r} with another vocabulary: its "
                    "log-probabilities would be those of other tokens"
                )
            teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
        if not isinstance(teacher, torch.nn.Module):
            raise TypeError(f"{name} must be a model or its name, got {type(teacher).__name__}")
        models: list[Any] = [teacher, self.accelerator.unwrap_model(self.model)]
        sizes = [model.get_output_embeddings().weight.shape[0] for model in models]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{name} must have the student's vocabulary, {sizes[1]} ids, got {sizes[0]}")
        return self.accelerator.prepare_model(teacher.requires_grad_(False).eval(), evaluation_mode=True)

    def _options(self) -> dict[str, Any]:
        args = self.args
        return {
            "drop": args.fire_drop,
            "alpha": args.fire_alpha,
            "beta": args.fire_beta,
            "normalize": args.fire_normalize,
        }

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        batch = super()._generate_and_score_completions(inputs)
        if "pixel_values" in batch:
            raise ValueError("FireOPDTrainer takes text only, got a batch with images")
        mask = batch["completion_mask"]
        if "tool_mask" in batch:
            mask = mask * batch["tool_mask"]
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        student = self._score(self.model, batch, size)
        teacher = self._score_teachers(inputs, batch, size)
        rows = (teacher[0], student[1], teacher[1], mask)
        found = self._fire(student[0], *rows)
        batch["advantages"] = found.advantages
        # The loss averages over this mask; what the model attends to is the other one.
        batch["tool_mask"] = found.response_mask.to(batch["completion_mask"].dtype)
        counts = torch.stack([found.response_mask.sum(), found.keep.sum(), (mask.sum(1) > 0).sum(), mask.sum()])
        live = mask.bool()
        sums = [
            torch.where(live, tokens, 0.0).sum(dtype=torch.float64)
            for tokens in (found.weights, teacher[1], student[1], teacher[0] - student[0])
        ]
        totals = self.accelerator.gather(torch.cat([counts.double(), torch.stack(sums)])[None]).sum(0)
        batch["num_items_in_batch"] = totals[0].to(batch["completion_mask"].dtype)
        _, kept, scored, tokens, *means = totals.tolist()
        names = ("mean_weight", "teacher_entropy", "student_entropy", "teacher_gap")
        logged = {name: mean / max(tokens, 1) for name, mean in zip(names, means, strict=True)}
        logged["keep_share"] = kept / max(scored, 1)
        if self.args.fire_scope == "batch":
            logged["threshold"] = float(found.threshold)
        for name, value in logged.items():
            self._metrics[mode][f"fire/{name}"].append(value)
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

    def _score_teachers(self, inputs: list[dict[str, Any]], batch: dict[str, Any], size: int) -> tuple[Tensor, Tensor]:
        if not self._has_labels:
            return self._score(self.teachers[None], batch, size)
        column = self.args.teacher_column
        labels = [row.get(column) for row in inputs]

        def of(model: Any) -> Any:
            return lambda rows: self._score(model, batch, size, rows)

        scorers = {label: of(model) for label, model in self.teachers.items()}
        try:
            return fire_teachers(labels, scorers, device=batch["completion_ids"].device)
        except ValueError as error:
            raise ValueError(f"the column {column!r} must name a teacher in every row: {error}") from error

    @torch.no_grad()
    def _score(self, model: Any, batch: dict[str, Any], size: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(rows, tokens) log-probabilities of the completions' tokens under a model, and entropies of its choices."""
        parts = [batch[name] for name in ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask")]
        if rows is not None:
            parts = [part[rows] for part in parts]
        prompt_ids, completion_ids, prompt_mask, completion_mask = parts
        ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
        width = completion_ids.shape[1]
        was_training = model.training
        model.eval()
        found = []
        try:
            for start in range(0, len(ids), size):
                part = slice(start, start + size)
                logits = model(input_ids=ids[part], attention_mask=mask[part], use_cache=False).logits
                found.append(
                    surprisal_entropy(
                        logits[:, -width - 1 : -1],
                        completion_ids[part],
                        temperature=self.temperature,
                        response_mask=completion_mask[part],
                    )
                )
        finally:
            model.train(was_training)
        return torch.cat([part.logprobs for part in found]), torch.cat([part.entropy for part in found])


def no_reward(completions: list[Any], **_: Any) -> list[float]:
    """TRL wants a reward for every completion; the teacher is what is learnt from."""
    return [0.0] * len(completions)
