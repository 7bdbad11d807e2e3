"""A teacher that is the moving average of the student's own weights: ``EMATeacher``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from leafkernels._core.checks import check_finite


class EMATeacher:
    """The exponential moving average of a student's weights, to be given as its teacher.

    It begins as the student. After each optimizer step it is ``decay`` times what it was and ``1 - decay`` times the
    student, in float32 and of the weights that are trained; the student runs with it in their place, as itself. With
    ``decay=0`` it is the student as it is: a teacher where its prompt says more than the student's
    (``teacher_prompt``). Checkpoints have it, and a run that is resumed goes on with it.

    Args:
        decay: in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        check_finite("decay", decay)
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay must be in [0, 1), got {decay}; a teacher that never moves is a copy of the student"
            )
        self.decay = float(decay)
        self._average: dict[str, Tensor] = {}

    def begin(self, name: str, student: Any) -> None:
        """Start as the student is now."""
        self._average = {
            key: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for key, weight in student.named_parameters()
            if weight.requires_grad
        }
        if not self._average:
            raise ValueError(f"{name} must have something to follow, got an EMATeacher of a student that is frozen")

    @torch.no_grad()
    def follow(self, student: Any) -> None:
        """Take a step towards the student."""
        for key, weight in self._followed(student):
            average = self._average[key]
            average.lerp_(weight.detach().to(average.dtype), 1 - self.decay)

    @contextmanager
    def in_place_of(self, student: Any) -> Iterator[None]:
        """The student with these weights; nothing that has been computed with its own is touched."""
        followed = self._followed(student)
        own = [(weight, weight.data) for _, weight in followed]
        try:
            for key, weight in followed:
                weight.data = self._average[key].to(weight.dtype)
            yield
        finally:
            for weight, data in own:
                weight.data = data

    def _followed(self, student: Any) -> list[tuple[str, Any]]:
        return [(key, weight) for key, weight in student.named_parameters() if key in self._average]

    def save(self, path: str) -> None:
        save_file({key: average.contiguous().cpu() for key, average in self._average.items()}, path)

    def load(self, path: str) -> None:
        """What ``save`` wrote.

        Raises:
            ValueError: there is no such file, or it is of other weights.
        """
        if not os.path.exists(path):
            raise ValueError(
                f"resume_from_checkpoint must be of a run with an EMATeacher, whose average is missing: no {path}"
            )
        found = load_file(path)
        shapes, expected = ({key: of.shape for key, of in all_.items()} for all_ in (found, self._average))
        if shapes != expected:
            differing = sorted(key for key in {*shapes, *expected} if shapes.get(key) != expected.get(key))
            raise ValueError(
                f"resume_from_checkpoint must be of a student with the same trained weights, got another {differing[0]}"
            )
        for key, average in self._average.items():
            average.copy_(found[key])


class Averages(GRPOTrainer):
    """``GRPOTrainer`` that moves averages after each optimizer step, and keeps them in its checkpoints."""

    _averages: list[EMATeacher]

    def _follow_student(self, averages: list[EMATeacher]) -> None:
        self._averages = averages
        if averages:
            self.add_callback(_Following(averages, self.accelerator.unwrap_model(self.model)))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._averages and self.args.should_save:
            # First, so that no checkpoint that is whole is without them.
            folder = os.path.join(
                self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )
            os.makedirs(folder, exist_ok=True)
            for number, average in enumerate(self._averages):
                average.save(_path(folder, number))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for number, average in enumerate(self._averages):
                average.load(_path(checkpoint, number))


def _path(folder: str, number: int) -> str:
    return os.path.join(folder, f"ema_teacher_{number}.safetensors")


class _Following(TrainerCallback):
    def __init__(self, averages: list[EMATeacher], student: Any) -> None:
        self.averages, self.student = averages, student

    def on_step_end(self, *_: Any, **__: Any) -> None:
        for average in self.averages:
            average.follow(self.student)
