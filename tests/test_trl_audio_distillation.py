"""AudioFireOPDTrainer: student and teachers hear each prompt's recordings, in scoring and in the loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("trl", minversion="1.14", reason="needs TRL: pip install -e '.[trl]'")
pytest.importorskip("soundfile")
pytest.importorskip("peft")

import tiny_listeners
from tiny_audio import lora, recordings
from tiny_distillation import another, settings
from tiny_trl import tokenizer

from leafkernels.integrations.trl_audio_distillation import AudioFireOPDTrainer
from leafkernels.integrations.trl_distillation import EMATeacher, FireOPDTrainer
from leafkernels.rows.recordings import find_encoder

PLAIN = {"fire_drop": 0.0, "fire_alpha": 0.0, "fire_beta": 0.0, "max_steps": 1, "max_grad_norm": 1e9}


class Recorded(AudioFireOPDTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Any]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self.batches.append({**batch, "inputs": inputs})
        return batch

    def training_step(self, model: Any, *args: Any) -> Tensor:
        loss = super().training_step(model, *args)
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return loss


def run(folder: Path, teachers: Any, pair: Any = None, peft: Any = None, data: Any = None, **changes: Any) -> Recorded:
    model, processor = pair or tiny_listeners.qwen2_audio()
    args = settings(folder, **{**PLAIN, "max_completion_length": 6, "temperature": 1.0, **changes})
    rows = recordings() if data is None else data
    trained = Recorded(model, teachers, args, train_dataset=rows, processing_class=processor, peft_config=peft)
    trained.train()
    return trained


def moved(model: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def rows_of(trained: Recorded, model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """(tokens, ids) log-probabilities before each token of each completion, by the model's own forward of one row."""
    found = []
    model.eval()
    for i, row in enumerate(batch["inputs"]):
        samples, _ = tiny_listeners.soundfile.read(tiny_listeners.io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        features = tiny_listeners.process(trained.processing_class, row["prompt"], samples)
        prompt = features.pop("input_ids")[0].tolist()
        features.pop("attention_mask", None)
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **features).logits
        found.append(logits[0, len(prompt) - 1 : -1].log_softmax(-1))
    return found


@pytest.mark.parametrize(
    ("name", "is_frozen"), [("qwen2_audio", True), ("qwen2_audio", False), ("granite_speech", True)]
)
@pytest.mark.parametrize("kind", ["sampled", "reverse_kl"])
def test_student_and_teacher_hear_each_prompts_recordings(
    name: str, is_frozen: bool, kind: str, tmp_path: Path
) -> None:
    """Through shuffled micro-batches of padded prompts, against forward passes of one row."""

    def make() -> Any:
        model, processor = getattr(tiny_listeners, name)()
        if is_frozen:
            find_encoder(model).requires_grad_(False)
        return model, processor

    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "fire_loss": kind}
    trained = run(tmp_path, moved(make()[0]), make(), **changes)
    (batch,) = trained.batches
    assert batch["prompt_mask"].eq(0).any(), "the case wants left padding"
    student = make()[0]
    own = rows_of(trained, student, batch)
    with torch.no_grad():
        said = rows_of(trained, moved(make()[0]), batch)
    losses = []
    for i, (p, q) in enumerate(zip(own, said, strict=True)):
        ids = batch["completion_ids"][i, : len(p)]
        if kind == "sampled":
            gap = (q - p).gather(1, ids[:, None])[:, 0].detach()
            torch.testing.assert_close(batch["advantages"][i, : len(p)], gap, rtol=1e-3, atol=1e-3)
            losses.append(-gap * p.gather(1, ids[:, None])[:, 0])
        else:
            one, other = (p, q) if kind == "reverse_kl" else (q, p)
            losses.append((one.exp() * (one - other)).sum(1))
    expected = {key: weight for key, weight in student.named_parameters() if weight.requires_grad}
    loss = torch.cat(losses).mean()
    gradients = torch.autograd.grad(loss, list(expected.values()), allow_unused=True)
    found = trained.gradients[-1]
    checked = 0
    for key, gradient in zip(expected, gradients, strict=True):
        if gradient is not None and key in found:
            # Float32 sums in another order, padded on the left, over another length of recordings.
            torch.testing.assert_close(found[key], gradient, rtol=2e-3, atol=2e-4, msg=key)
            checked += int(gradient.any())
    assert checked > 10
    # What is heard matters, or nothing above would be tested.
    batch["inputs"] = [
        {**row, "audio": {"bytes": tiny_listeners.wave(tiny_listeners.tone(9, 1.0))}} for row in batch["inputs"]
    ]
    with torch.no_grad():
        assert (
            max((a - b).abs().max() for a, b in zip(said, rows_of(trained, moved(make()[0]), batch), strict=True))
            > 0.01
        )


@pytest.mark.parametrize("kind", ["sampled", "jsd"])
def test_the_base_below_an_adapter_teaches_as_a_copy_of_it(kind: str, tmp_path: Path) -> None:
    found = []
    for is_copy in (False, True):
        model, processor = tiny_listeners.qwen2_audio()
        teacher = tiny_listeners.qwen2_audio()[0] if is_copy else model
        trained = run(tmp_path, teacher, (model, processor), lora(init_lora_weights=False), fire_loss=kind)
        found.append(trained.gradients[0])
    assert found[0].keys() == found[1].keys() and any(gradient.any() for gradient in found[0].values())
    for key, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][key], rtol=1e-4, atol=1e-6, msg=key)


def test_an_evaluation_hears_too(tmp_path: Path) -> None:
    model, processor = tiny_listeners.qwen2_audio()
    changes = {**PLAIN, "max_completion_length": 6, "per_device_eval_batch_size": 4, "fire_loss": "forward_kl"}
    held_out = {"train_dataset": recordings(), "eval_dataset": recordings(4)}
    trainer = AudioFireOPDTrainer(
        model, tiny_listeners.qwen2_audio()[0], settings(tmp_path, **changes), processing_class=processor, **held_out
    )
    found = trainer.evaluate()
    # The teacher is the student's copy: it is level with it only where both hear the same.
    assert (
        found["eval_loss"] == pytest.approx(0, abs=1e-6)
        and trainer.state.log_history[-1]["eval_fire/top1_agreement"] == 1
    )


def test_refuses(tmp_path: Path) -> None:
    def check(message: str, teachers: Any, error: type[Exception] = ValueError, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            run(tmp_path, teachers, **changes)

    teacher = tiny_listeners.qwen2_audio()[0]
    check("teachers must be an audio model or its name with AudioFireOPDTrainer, got EMATeacher", EMATeacher())
    check("share_prefixes must be False with AudioFireOPDTrainer", teacher, share_prefixes=True)
    deaf = another(1, vocab_size=len(tiny_listeners.qwen2_audio()[1].tokenizer))
    check("teachers must be an audio model, as the student is: .* got Qwen2ForCausalLM", deaf, TypeError)
    hints = recordings().map(lambda row: {"teacher_prompt": "a"})
    check("the column 'teacher_prompt' must be left out with AudioFireOPDTrainer", teacher, data=hints)
    with pytest.raises(ValueError, match="train_dataset must have no column 'audio' with FireOPDTrainer, whose models"):
        FireOPDTrainer(
            another(2), another(1), settings(tmp_path), train_dataset=recordings(), processing_class=tokenizer()
        )
