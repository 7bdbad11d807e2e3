"""FireOPDTrainer on the model of ``tiny_trl``, recorded.

As a script it is one of two ranks: it trains a step on its half of a batch and saves what became of it.
"""

import sys
from pathlib import Path
from typing import Any

import tiny_trl
import torch
from datasets import Dataset
from engines import RANKS, engine_settings, trained_weights
from tiny_trl import config

from leafkernels.integrations.trl_distillation import FireOPDConfig, FireOPDTrainer


def settings(folder: Path | str, **changes: Any) -> FireOPDConfig:
    defaults = {"num_generations": 1, "logging_steps": 1, "temperature": 0.8}
    return config(folder, FireOPDConfig, **{**defaults, **changes})


def another(seed: int, **changes: Any) -> Any:
    model = tiny_trl.model(**changes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


class Recorded(FireOPDTrainer):
    """Keeps every batch with what is logged of it, every part of it that is trained on, and each part's gradient."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Any]] = []
        self.gradients: list[list[torch.Tensor]] = []
        self.splits: list[dict[str, Any]] = []

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        metrics = {name: values[-1] for name, values in self._metrics["train"].items() if name.startswith("fire/")}
        self.batches.append({**batch, "metrics": metrics})
        return batch

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        self.splits.append(dict(inputs))
        return super()._compute_loss(model, inputs)

    def training_step(self, model: Any, *args: Any) -> torch.Tensor:
        loss = super().training_step(model, *args)
        learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.gradients.append([parameter.grad.clone() for parameter in learns if parameter.grad is not None])
        return loss


def run(
    args: FireOPDConfig, teachers: Any, student: Any = None, kind: type = Recorded, more: Any = None, **columns: Any
) -> Any:
    rows = Dataset.from_dict({"prompt": ["ab", "abc", "bcd", "dd", "cab", "h"] * 4, **columns})
    model = tiny_trl.model() if student is None else student
    trained = kind(
        model, teachers, args, train_dataset=rows, **{"processing_class": tiny_trl.tokenizer(), **(more or {})}
    )
    trained.train()
    return trained


def one_step(folder: str, rows: int, first_row: int = 0, scope: str = "batch") -> Recorded:
    """A step on scripted completions, of unequal width on two ranks of six rows."""
    options = {"per_device_train_batch_size": rows, "max_steps": 1, "max_grad_norm": 1e9, "fire_scope": scope}
    student = tiny_trl.script(tiny_trl.model(), 4, first_row)
    return run(settings(folder, **options), another(1), student)


def on_an_engine(rank: int, engine: str, folder: str, case: str = "model", resume: str | None = None) -> dict[str, Any]:
    """Two steps on scripted completions, twelve of them, here or on each of two ranks; ``case`` says whose teacher."""
    rows = 12 // RANKS if engine else 12
    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3, "temperature": 1.0}
    args = settings(folder, per_device_train_batch_size=rows, **steps, **engine_settings(engine))
    student: Any = tiny_trl.model()
    teachers: Any = another(1)
    columns: dict[str, Any] = {}
    if case == "adapter":
        import peft

        teachers = student
        student = peft.get_peft_model(
            student, peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        )
    if case == "names":
        names = [Path(folder).parent / name for name in ("student", "teacher")]
        student, teachers = map(str, names)
    if case == "labels":
        # The first rank has rows of one teacher only.
        teachers = {"math": another(1), "code": another(2)}
        columns = {"teacher": ["math"] * 6 + ["math", "code", "code"] * 6}
    if case.startswith("divergence"):
        args.fire_loss = "jsd"
        if case.endswith("labels"):
            teachers = {"math": another(1), "code": another(2)}
            columns = {"teacher": ["math"] * 6 + ["math", "code", "code"] * 6}
    if case == "padded":
        teachers = another(1, vocab_size=16)
    run_ = Recorded if engine in ("", "ddp") else FireOPDTrainer
    data = Dataset.from_dict({"prompt": ["ab", "abc", "bcd", "dd", "cab", "h"] * 4, **columns})
    trained = run_(student, teachers, args, train_dataset=data, processing_class=tiny_trl.tokenizer())
    tiny_trl.script(trained.accelerator.unwrap_model(trained.model), 4, 6 * rank)
    if resume:
        trained.model.generate(torch.zeros(rows, 1))  # what the step that is skipped drew
    trained.train(resume_from_checkpoint=resume)
    return {"weights": trained_weights(trained), "log": trained.state.log_history}


if __name__ == "__main__":
    torch.set_num_threads(1)
    (rank, out) = (int(sys.argv[1]), sys.argv[2])
    done = one_step(f"{out}.run", 6, 6 * rank)
    torch.save({"batch": done.batches[0], "gradients": done.gradients[0]}, out)
    torch.distributed.destroy_process_group()
