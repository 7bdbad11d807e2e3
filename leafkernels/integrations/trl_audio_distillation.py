"""Distillation on speech in TRL: ``AudioFireOPDTrainer``, whose student and teachers hear a prompt's recordings."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from trl.trainer.utils import create_model_from_path

from leafkernels.integrations._trl_average import EMATeacher
from leafkernels.integrations._trl_ear import Ear
from leafkernels.integrations._trl_served import ServedTeacher
from leafkernels.integrations._trl_stored import StoredTeacher
from leafkernels.integrations._trl_teachers import Teacher
from leafkernels.integrations.trl_audio import AudioGRPOTrainer
from leafkernels.integrations.trl_distillation import FireOPDTrainer
from leafkernels.models.asking import bare_model

__all__ = ["AudioFireOPDTrainer"]


class AudioFireOPDTrainer(FireOPDTrainer, AudioGRPOTrainer):
    """``FireOPDTrainer`` for models that hear, on a dataset with ``prompt`` and ``audio`` as in ``AudioGRPOTrainer``.

    Teachers are audio models, by label too, or the base of the student's adapter. They are handed the ids and the
    features that the student's processor makes, so they must take these: models of one family. A teacher's encoder, and
    a student's that is frozen, hears a prompt once. Teachers that are given keep the hook by which they hear.

    Raises:
        TypeError: a teacher has no audio encoder.
        ValueError: a teacher that hears nothing (``ServedTeacher``, ``StoredTeacher``), one that would need to read
            another prompt (``EMATeacher``, a column ``teacher_prompt``), ``share_prefixes``, FSDP or ZeRO-3.
    """

    _hears = True

    def _take_teachers(self, teachers: Any, tokenizers: Any) -> None:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            raise ValueError("teachers must be whole on every rank with AudioFireOPDTrainer, got FSDP or ZeRO-3")
        if self.args.share_prefixes:
            raise ValueError("share_prefixes must be False with AudioFireOPDTrainer, whose teachers run rows, got True")
        super()._take_teachers(teachers, tokenizers)

    def _take_teacher(self, label: Any, teacher: Any, tokenizer: Any, student: Any) -> Teacher:
        name = "teachers" if label is None else f"teachers[{label!r}]"
        if isinstance(teacher, ServedTeacher | StoredTeacher | EMATeacher):
            raise ValueError(
                f"{name} must be an audio model or its name with AudioFireOPDTrainer, got {type(teacher).__name__}"
            )
        taken = super()._take_teacher(label, teacher, tokenizer, student)
        if taken.model is not None:
            base = bare_model(taken.model)
            try:
                self._ears[id(base)] = Ear(base, is_trained=False)
            except TypeError as error:
                raise TypeError(f"{name} must be an audio model, as the student is: {error}") from error
        return taken

    def _load_teacher(self, name: str, trusts: bool) -> Any:
        return create_model_from_path(name, dtype="auto", device_map=None, trust_remote_code=trusts)

    def _read_teacher_prompts(self, inputs: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        column = self.args.teacher_prompt_column
        if any(row.get(column) is not None for row in inputs):
            raise ValueError(f"the column {column!r} must be left out with AudioFireOPDTrainer, which cannot read it")

    def _score_all(self, inputs: list[dict[str, Any]], batch: dict[str, Any], *more: Any, **options: Any) -> Any:
        for teacher in self._teachers.values():
            if teacher.home is not None:
                teacher.model.to(self.accelerator.device)
            if teacher.model is not None:
                self._ear(teacher.model).listen(teacher.model, batch["audio"], self._most)
        return super()._score_all(inputs, batch, *more, **options)

    def _hearing(
        self, model: Any, batch: dict[str, Any], rows: Tensor | Sequence[int] | None
    ) -> AbstractContextManager[None]:
        base = bare_model(self.accelerator.unwrap_model(model))
        if id(base) not in self._ears:
            return nullcontext()
        prompts = batch["audio"]
        chosen = prompts if rows is None else [prompts[int(row)] for row in rows]
        return self._ear(model).hearing(chosen)
