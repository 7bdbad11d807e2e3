"""FireOPDTrainer's teachers that are the student, or read another prompt, and what an evaluation says of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")

import tiny_trl
from tiny_distillation import Recorded, another, run, settings

from leafkernels.integrations.trl_distillation import EMATeacher

PLAIN = {"fire_drop": 0.0, "fire_alpha": 0.0, "fire_beta": 0.0, "max_steps": 1, "max_grad_norm": 1e9}
PROMPTS = ["ab", "abc", "bcd", "dd", "cab", "h"] * 4
HINTS = [f"{prompt}e" for prompt in PROMPTS]


def logged(trained: Any, name: str) -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


def distribution(trained: Any, model: Any, prompt: str, completion: list[int]) -> torch.Tensor:
    """(tokens, ids) log-probabilities before each token of a completion behind a prompt, without padding."""
    before = tiny_trl.tokenizer()(prompt)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + completion])).logits[0, len(before) - 1 : -1]
    return (logits / trained.args.temperature).log_softmax(-1)


def completions(batch: dict[str, Any]) -> list[list[int]]:
    rows = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def prompts(batch: dict[str, Any]) -> list[str]:
    rows = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    return ["".join(tiny_trl.TOKENS[i] for i in ids[mask.bool()]) for ids, mask in rows]


@pytest.mark.parametrize("has_own", [False, True])
def test_a_teacher_reads_its_own_prompt(tmp_path: Path, has_own: bool) -> None:
    """And a row that has none reads the student's."""
    hints = {prompt: prompt + "efg"[: len(prompt)] for prompt in PROMPTS}
    if has_own:
        hints["ab"] = None
    teacher = another(1)
    trained = run(settings(tmp_path, **PLAIN), teacher, teacher_prompt=[hints[prompt] for prompt in PROMPTS])
    (batch,) = trained.batches
    for row, (prompt, completion) in enumerate(zip(prompts(batch), completions(batch), strict=True)):
        ids = torch.tensor(completion)[:, None]
        said = distribution(trained, teacher, hints[prompt] or prompt, completion).gather(1, ids)[:, 0]
        own = distribution(trained, tiny_trl.model(), prompt, completion).gather(1, ids)[:, 0]
        torch.testing.assert_close(batch["advantages"][row, : len(completion)], said - own, rtol=1e-4, atol=1e-5)


def test_a_teacher_prompt_is_of_the_kind_of_the_prompt(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "a"}]] * 24
    with pytest.raises(ValueError, match="the column 'teacher_prompt' must be of the kind of the prompt, .* got list"):
        run(settings(tmp_path, **PLAIN), another(1), teacher_prompt=messages)
    with pytest.raises(ValueError, match="the column 'teacher_prompt' must hold one token at least, got ''"):
        run(settings(tmp_path, **PLAIN), another(1), teacher_prompt=[""] * 24)


def test_the_student_with_a_hint_teaches_itself(tmp_path: Path) -> None:
    """decay=0: the teacher is the student as it is, from which there is nothing to learn without the hint."""
    with pytest.raises(ValueError, match="teachers must differ from the student, got an EMATeacher, which begins as"):
        run(settings(tmp_path, **PLAIN), EMATeacher(0.0))
    hinted = run(settings(tmp_path, **PLAIN), EMATeacher(0.0), teacher_prompt=HINTS)
    copied = run(settings(tmp_path, **PLAIN), tiny_trl.model(), teacher_prompt=HINTS)
    assert copied.batches[0]["advantages"].abs().max() > 0.1
    assert torch.equal(hinted.batches[0]["advantages"], copied.batches[0]["advantages"])
    for found, expected in zip(hinted.gradients[0], copied.gradients[0], strict=True):
        assert torch.equal(found, expected)


class Watched(Recorded):
    """Keeps the weights after each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights = [self.now()]

    def now(self) -> dict[str, torch.Tensor]:
        return {key: weight.detach().clone() for key, weight in self.model.named_parameters() if weight.requires_grad}

    def training_step(self, *args: Any) -> torch.Tensor:
        if self.state.global_step >= len(self.weights):
            self.weights.append(self.now())
        return super().training_step(*args)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_moving_average_is_that_of_the_weights_after_each_step(tmp_path: Path, accumulated: int) -> None:
    teacher = EMATeacher(0.75)
    changes = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
    trained = run(
        settings(tmp_path, **{**PLAIN, **changes, "max_steps": 3}), teacher, kind=Watched, teacher_prompt=HINTS
    )
    weights = [*trained.weights, trained.now()]
    assert len(weights) == 4
    expected = weights[0]
    for later in weights[1:3]:
        expected = {key: 0.75 * expected[key] + 0.25 * later[key] for key in expected}
    # The batch of the third step was scored by the average after the second.
    model = tiny_trl.model()
    (batch, student) = trained.batches[2], tiny_trl.model()
    model.load_state_dict(expected, strict=False)
    student.load_state_dict(weights[2], strict=False)
    for row, (prompt, completion) in enumerate(zip(prompts(batch), completions(batch), strict=True)):
        ids = torch.tensor(completion)[:, None]
        said = distribution(trained, model, f"{prompt}e", completion).gather(1, ids)[:, 0]
        own = distribution(trained, student, prompt, completion).gather(1, ids)[:, 0]
        torch.testing.assert_close(batch["advantages"][row, : len(completion)], said - own, rtol=1e-3, atol=1e-5)
    assert trained.batches[2]["advantages"].any()


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_run_with_a_moving_average_is_resumed(tmp_path: Path, with_adapter: bool) -> None:
    more: dict[str, Any] = {}
    if with_adapter:
        peft = pytest.importorskip("peft")
        more = {"peft_config": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}
    options = {**PLAIN, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(settings(tmp_path / "whole", **options), EMATeacher(0.9), more=more, teacher_prompt=HINTS)
    assert len(set(logged(whole, "fire/teacher_gap"))) == 4
    rows, args = (
        Dataset.from_dict({"prompt": PROMPTS, "teacher_prompt": HINTS}),
        settings(tmp_path / "again", **options),
    )
    teacher = EMATeacher(0.9)
    again = Recorded(tiny_trl.model(), teacher, args, train_dataset=rows, processing_class=tiny_trl.tokenizer(), **more)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again.train(resume_from_checkpoint=str(checkpoint))
    for name in ("loss", "fire/teacher_gap"):
        assert logged(again, name)[-2:] == logged(whole, name)[-2:]
    if with_adapter:
        # Of the adapter alone.
        assert all("lora" in key for key in teacher._average)
        return
    (checkpoint / "ema_teacher_0.safetensors").unlink()
    with pytest.raises(
        ValueError, match="resume_from_checkpoint must be of a run with an EMATeacher, whose average is"
    ):
        again.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("decay", [1, -0.1, 1.5])
def test_a_decay_is_less_than_one(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
        EMATeacher(decay)


def test_an_evaluation_compares_student_and_teacher_on_held_out_prompts(tmp_path: Path) -> None:
    """Rewards, the gap, how often both find one id most likely, and the share of ten ids that both list."""
    held_out = Dataset.from_dict({"prompt": ["aabb", "hg", "cde"]})
    more = {"eval_dataset": held_out, "reward_funcs": tiny_trl.count_a}
    changes = {**PLAIN, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    teacher = another(1)
    trained = run(settings(tmp_path, **changes), teacher, more=more, kind=Keeps)
    (entry,) = [entry for entry in trained.state.log_history if "eval_loss" in entry]
    batches = [batch for batch in trained.batches if "eval" in batch]
    rewards, gaps, same, shared, tokens = [], [], [], [], 0
    student = tiny_trl.model()
    student.load_state_dict(trained.model.state_dict())
    for batch in batches:
        gap, agree, overlap, count = 0.0, 0, 0, 0
        for prompt, completion in zip(prompts(batch), completions(batch), strict=True):
            rows = [distribution(trained, model, prompt, completion) for model in (student, teacher)]
            ids = torch.tensor(completion)[:, None]
            gap += float((rows[1] - rows[0]).gather(1, ids).sum())
            top = [row.topk(10).indices for row in rows]
            agree += int((top[0][:, 0] == top[1][:, 0]).sum())
            overlap += sum(len({*a} & {*b}) for a, b in zip(top[0].tolist(), top[1].tolist(), strict=True))
            count += len(completion)
            rewards.append(float(completion.count(tiny_trl.TOKENS.index("a"))))
        gaps.append(gap / count)
        same.append(agree / count)
        shared.append(overlap / count / 10)
        tokens += count
    assert tokens and len(batches) == 2
    mean = lambda numbers: sum(numbers) / len(numbers)  # noqa: E731
    assert entry["eval_fire/teacher_gap"] == pytest.approx(mean(gaps), rel=1e-4)
    assert entry["eval_fire/top1_agreement"] == pytest.approx(mean(same)) and 0 < mean(same) < 1
    assert entry["eval_fire/top10_overlap"] == pytest.approx(mean(shared)) and 0 < mean(shared) < 1
    assert entry["eval_rewards/count_a/mean"] == pytest.approx(mean([mean(rewards[:2]), rewards[2]]))
    assert not any("agreement" in name for row in trained.state.log_history for name in row if "eval" not in name)


class Keeps(Recorded):
    """Says of which mode a batch is."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        if mode == "eval":
            self._metrics["train"]["fire/none"].append(0.0)
        batch = super()._generate_and_score_completions(inputs)
        self.batches[-1][mode] = True
        return batch
