"""What teachers, and the student, say of sampled completions in ``FireOPDTrainer``: each row by its own teacher."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import trl
from torch import Tensor
from trl import GRPOTrainer

from leafkernels import fire_teachers
from leafkernels.integrations._trl_average import EMATeacher
from leafkernels.integrations._trl_served import ServedTeacher
from leafkernels.integrations._trl_stored import StoredTeacher
from leafkernels.integrations._trl_teachers import (
    Teacher,
    check_ranks,
    common_ids,
    is_below_adapter,
    keeps_logits,
    known_tokenizer,
    load_teacher,
    pad_rows,
    rows_at_once,
    score,
    score_teacher,
    spread,
    vocabulary_size,
    without_adapter,
)
from leafkernels.models.asking import evaluating

_OTHERS = "a ServedTeacher, a StoredTeacher or an EMATeacher"
# The most likely ids that evaluation compares.
_COMPARED = 10


class TeacherScores(GRPOTrainer):
    """``GRPOTrainer`` that has teachers, and asks them about the completions of a batch."""

    _has_labels: bool
    _shares: bool  # of SharedPrefixes
    _metrics: Any  # TRL's
    _hears = False

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for column in (self.args.teacher_column, self.args.teacher_prompt_column):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def _take_teachers(self, teachers: Any, tokenizers: Any) -> None:
        """Check and place what was given; ``tokenizers``: one of all, or by label."""
        if not self._hears and "audio" in (getattr(self.train_dataset, "column_names", None) or ()):
            raise ValueError(
                f"train_dataset must have no column 'audio' with {type(self).__name__}, whose models hear nothing: "
                "leafkernels.integrations.trl_audio_distillation has AudioFireOPDTrainer"
            )
        self._has_labels = isinstance(teachers, Mapping)
        by_label = dict(teachers) if self._has_labels else {None: teachers}
        if not by_label:
            raise ValueError("teachers must hold at least one, got none")
        if not isinstance(tokenizers, Mapping):
            tokenizers = dict.fromkeys(by_label, tokenizers)
        for label in tokenizers:
            if label not in by_label:
                raise ValueError(f"teacher_processing_class must have the labels of teachers, got {label!r}")
        state = self.accelerator.state
        self._is_zero3 = state.deepspeed_plugin is not None and state.deepspeed_plugin.zero_stage == 3
        self._is_fsdp = getattr(state, "fsdp_plugin", None) is not None
        student = self.accelerator.unwrap_model(self.model)
        self._student_keeps = keeps_logits(student)
        self._num_ids = vocabulary_size("model", student)
        self._teachers = {
            label: self._take_teacher(label, teacher, tokenizers.get(label), student)
            for label, teacher in by_label.items()
        }
        served = [
            teacher.model.top_k for teacher in self._teachers.values() if isinstance(teacher.model, ServedTeacher)
        ]
        self._has_served = bool(served)
        self._num_compared = min(served, default=_COMPARED)

    def _take_teacher(self, label: Any, teacher: Any, tokenizer: Any, student: Any) -> Teacher:
        name = "teachers" if label is None else f"teachers[{label!r}]"
        is_name, is_served = isinstance(teacher, str), isinstance(teacher, ServedTeacher)
        if is_name and "://" in teacher:
            raise ValueError(
                f"{name} must be a model or its name, got the address {teacher!r}: ServedTeacher(address, name of the "
                "model) asks a server"
            )
        if isinstance(teacher, EMATeacher):
            self._check_whole(name, teacher)
            columns = getattr(self.train_dataset, "column_names", None)
            if label is None and columns is not None and self.args.teacher_prompt_column not in columns:
                raise ValueError(
                    f"{name} must differ from the student, got an EMATeacher, which begins as the student, and a "
                    f"dataset without a column {self.args.teacher_prompt_column!r} in which it reads more: the student "
                    "would learn nothing"
                )
            teacher.begin(name, student)
            return Teacher(None, self._num_ids, borrowed=teacher.in_place_of)
        is_stored = isinstance(teacher, StoredTeacher)
        if is_stored and self._has_labels:
            raise ValueError(f"{name} must not be a StoredTeacher, which is the only one: nothing is sampled with it")
        if not (is_name or is_served or is_stored or isinstance(teacher, torch.nn.Module)):
            raise TypeError(f"{name} must be a model or its name, got {type(teacher).__name__}; or {_OTHERS}")
        if isinstance(teacher, torch.nn.Module) and is_below_adapter(name, teacher, student):
            return Teacher(None, self._num_ids, borrowed=without_adapter)
        trusts = getattr(self.args, "trust_remote_code", False)
        tokenizer = known_tokenizer(name, None if is_served or is_stored else teacher, tokenizer, trusts)
        common = None if tokenizer is None else common_ids(name, tokenizer, self._tokenizer)
        if is_served or is_stored:
            self._check_whole(name, teacher)
            return Teacher(teacher, self._num_ids if common is None else min(common, self._num_ids))
        if is_name:
            teacher = self._load_teacher(teacher, trusts)
        size = vocabulary_size(name, teacher)
        num_ids = min(size, self._num_ids) if common is None else min(size, self._num_ids, common)
        # Of an unknown tokenizer all must be there; of one that is compared, the token that ends a completion.
        needed = len(self._tokenizer) if tokenizer is None else (self._tokenizer.eos_token_id or 0) + 1
        if num_ids < min(needed, self._num_ids):
            raise ValueError(
                f"{name} must have the student's vocabulary, {self._num_ids} ids, got {num_ids} that both have, which "
                f"is less than the {needed} that the student needs"
            )
        if self._is_zero3 and num_ids < self._num_ids:
            raise ValueError(
                f"{name} must know all {self._num_ids} ids of the student under DeepSpeed ZeRO-3, where the student's "
                f"distribution cannot be cut, got {num_ids} that both have"
            )
        check_ranks(name, teacher, self.accelerator)
        keeps = keeps_logits(teacher)
        if self._is_zero3 or self._is_fsdp:
            return Teacher(spread(teacher, self.accelerator), num_ids, keeps=keeps)
        # A model that was put on several devices, or that is quantized, stays where it is.
        is_placed = hasattr(teacher, "hf_device_map") or getattr(teacher, "is_quantized", False)
        home = None if is_placed else next((parameter.device for parameter in teacher.parameters()), None)
        return Teacher(teacher, num_ids, home, keeps)

    def _load_teacher(self, name: str, trusts: bool) -> Any:
        return load_teacher(name, trusts)

    def _hearing(self, model: Any, batch: dict[str, Any], rows: Tensor | None) -> AbstractContextManager[None]:
        """Within, the forward passes of a model are about these rows of a batch (None: all), one after the other."""
        return nullcontext()

    def _check_whole(self, name: str, teacher: Any) -> None:
        if self._is_zero3 or self._is_fsdp:
            raise ValueError(
                f"{name} must be a model or its name where the student is spread over ranks (FSDP, ZeRO-3), got "
                f"{type(teacher).__name__}"
            )

    def _give_back(self) -> None:
        for teacher in self._teachers.values():
            if teacher.home is not None:
                teacher.model.to(teacher.home)

    def _read_teacher_prompts(self, inputs: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        """Put ``teacher_prompt_ids`` and ``teacher_prompt_mask`` into the batch, where rows have such a prompt."""
        column = self.args.teacher_prompt_column
        prompts = [row.get(column) for row in inputs]
        if all(prompt is None for prompt in prompts):
            return
        if getattr(self, "environment_factories", None) is not None:
            raise ValueError(
                f"the column {column!r} must be left out with environments, which write into prompts that a teacher "
                "would then not have"
            )
        if not hasattr(self, "_tokenize_prompts"):
            raise RuntimeError(f"the column {column!r} must be left out in TRL {trl.__version__}, which cannot read it")
        rows: list[list[int]] = []
        for row, prompt in enumerate(prompts):
            if prompt is None:
                rows.append(batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist())
                continue
            if isinstance(prompt, str) != isinstance(inputs[row]["prompt"], str):
                raise ValueError(
                    f"the column {column!r} must be of the kind of the prompt, text or messages, got "
                    f"{type(prompt).__name__} beside {type(inputs[row]['prompt']).__name__}"
                )
            rows.append(list(self._tokenize_prompts([prompt])[0][0]))
            if not rows[-1]:
                raise ValueError(f"the column {column!r} must hold one token at least, got {prompt!r}")
        # Padded as TRL pads prompts: of a row that has its own, its ids lie where they lay.
        width = max(batch["prompt_ids"].shape[1] if None in prompts else 0, *map(len, rows))
        ids = batch["prompt_ids"].new_full((len(rows), width), self._tokenizer.pad_token_id)
        mask = batch["prompt_mask"].new_zeros(ids.shape)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = ids.new_tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        batch["teacher_prompt_ids"], batch["teacher_prompt_mask"] = ids, mask

    def _kept_for_loss(self, inputs: list[dict[str, Any]], top: tuple[Tensor, ...]) -> dict[str, Any]:
        """What a divergence needs of the scoring: whose a row is, and the teacher's most likely ids."""
        kept: dict[str, Any] = {}
        if len(self._teachers) > 1:
            numbers = {label: number for number, label in enumerate(self._teachers)}
            kept["teacher_number"] = [numbers[label] for label in self._labels(inputs)]
        if self._list_size:
            kept["teacher_top_ids"], kept["teacher_top_logprobs"] = top[:2]
        return kept

    def _log_agreement(self, top: tuple[Tensor, ...], live: Tensor) -> None:
        """How often both find the same id most likely, and the share of the teacher's ids that the student lists."""
        teacher_ids, teacher_logprobs, student_ids = top
        is_id = teacher_logprobs > -torch.inf
        is_shared = (student_ids[..., None, :] == teacher_ids[..., None]).any(-1) & is_id
        is_same = is_shared[..., 0] & (student_ids[..., 0] == teacher_ids[..., 0])
        counts = [is_same & live, live, is_shared & live[..., None], is_id & live[..., None]]
        sums = torch.stack([count.sum() for count in counts]).double()
        same, tokens, shared, listed = self.accelerator.reduce(sums, "sum").tolist()
        self._metrics["eval"]["fire/top1_agreement"].append(same / max(tokens, 1))
        self._metrics["eval"][f"fire/top{teacher_ids.shape[-1]}_overlap"].append(shared / max(listed, 1))

    def _labels(self, inputs: list[dict[str, Any]]) -> list[Any]:
        """The label of each row's teacher; an unknown one is told by the scoring."""
        column = self.args.teacher_column
        return [row.get(column) for row in inputs] if self._has_labels else [None] * len(inputs)

    def _score_all(
        self, inputs: list[dict[str, Any]], batch: dict[str, Any], size: int, top_k: int = 0, compares: bool = False
    ) -> tuple[Tensor, ...]:
        """(rows, tokens) log-probabilities of student and teacher and entropies of both, each row by its teacher.

        With ``top_k`` also (rows, tokens, k) the ids that the teacher finds most likely and their log-probabilities,
        and where ``compares`` those of the student, unless ZeRO-3 has its head.
        """
        labels = self._labels(inputs)
        device = batch["completion_ids"].device
        size = rows_at_once(size, self.args.max_completion_length, self._num_ids)
        everything = torch.arange(len(inputs), device=device)
        students = {
            num_ids: self._score_student(batch, everything, size, num_ids, top_k=top_k if compares else 0)
            for num_ids in sorted({teacher.num_ids for teacher in self._teachers.values()})
        }
        heard = batch
        if "teacher_prompt_ids" in batch:
            heard = batch | {f"prompt_{name}": batch[f"teacher_prompt_{name}"] for name in ("ids", "mask")}
        ahead = {}
        if self._is_zero3 or self._is_fsdp:
            # Every rank calls a model that is spread over all of them as often as every other.
            of_labels = [[i for i, name in enumerate(labels) if name == label] for label in self._teachers]
            counts = torch.tensor([[-(-len(rows) // size) for rows in of_labels]], device=device)
            calls = self.accelerator.gather(counts).amax(0).tolist()
            for label, rows, most in zip(self._teachers, of_labels, calls, strict=True):
                ahead[label] = self._score_teacher(label, heard, everything[rows], size, top_k, most)

        def of(label: Any) -> Any:
            def call(rows: Tensor) -> tuple[Tensor, ...]:
                found = ahead[label] if label in ahead else self._score_teacher(label, heard, rows, size, top_k)
                student = [part[rows] for part in students[self._teachers[label].num_ids]]
                return student[0], found[0], student[1], found[1], *found[2:], *student[2:3]

            return call

        try:
            return fire_teachers(labels, {label: of(label) for label in self._teachers}, device=device)
        except ValueError as error:
            if not self._has_labels:
                raise
            column = self.args.teacher_column
            raise ValueError(f"the column {column!r} must name a teacher in every row: {error}") from error

    def _score_teacher(
        self, label: Any, batch: dict[str, Any], rows: Tensor, size: int, top_k: int, calls: int = 0
    ) -> tuple[Tensor, ...]:
        teacher = self._teachers[label]
        if isinstance(teacher.model, StoredTeacher):
            none = torch.zeros_like(batch["completion_ids"][rows], dtype=torch.float32)
            return none, none, batch["stored_ids"][rows], batch["stored_logprobs"][rows]
        if isinstance(teacher.model, ServedTeacher):
            return teacher.model.score(batch, rows, top_k=top_k, num_ids=teacher.num_ids)
        if teacher.borrowed is not None:
            with teacher.borrowed(self.accelerator.unwrap_model(self.model)):
                return self._score_student(batch, rows, size, teacher.num_ids, calls, top_k)
        options = {"temperature": self.temperature, "size": size, "calls": calls, "shares": self._shares}
        with self._hearing(teacher.model, batch, pad_rows(rows, size * calls)):
            return score_teacher(teacher, batch, rows, top_k=top_k, **options)

    def _score_student(
        self, batch: dict[str, Any], rows: Tensor, size: int, num_ids: int, calls: int = 0, top_k: int = 0
    ) -> tuple[Tensor, ...]:
        if not self._is_zero3:
            options = {"num_ids": num_ids, "temperature": self.temperature, "keeps": self._student_keeps}
            options |= {"size": size, "calls": calls, "shares": self._shares, "top_k": top_k}
            with self._hearing(self.model, batch, pad_rows(rows, size * calls)):
                return score(self.model, batch, rows, **options)
        # DeepSpeed learns in which order the modules run, which must be that of TRL's own pass in the loss.
        chosen = pad_rows(rows, size * calls)
        ids, attention = (
            torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1)[chosen] for name in ("ids", "mask")
        )
        width = batch["completion_ids"].shape[1]
        with torch.no_grad(), evaluating(self.model):
            found = self._get_per_token_logps_and_entropies(
                self.model, ids, attention, width, batch_size=size, compute_entropy=True
            )
        return found[0][: len(rows)].float(), found[1][: len(rows)].float()
