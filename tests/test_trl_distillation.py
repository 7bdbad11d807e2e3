"""FireOPDTrainer in TRL itself, on tiny models."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")

import tiny_distillation
import tiny_trl
from datasets import Dataset
from forked import run_ranks
from tiny_distillation import another, run, settings

from leafkernels.integrations.trl_distillation import FireOPDTrainer

PLAIN = {"fire_drop": 0.0, "fire_alpha": 0.0, "fire_beta": 0.0}


def logged(trained: Any, name: str) -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


def test_a_teacher_equal_to_the_student_teaches_exactly_nothing(tmp_path: Path) -> None:
    trained = run(settings(tmp_path, max_steps=1, **PLAIN), tiny_trl.model())
    assert logged(trained, "loss") == [0.0]
    assert not any(gradient.any() for gradient in trained.gradients[0])
    assert logged(trained, "fire/teacher_gap") == [0.0] and logged(trained, "fire/keep_share") == [1.0]


def by_a_plain_loop(trained: Any, teacher: Any, drop: float, alpha: float, beta: float) -> list[torch.Tensor]:
    """The gradient of the first step, from the formulas of the paper."""
    batch = trained.batches[0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    student = tiny_trl.model()
    logps, entropies = [], []
    for model in (student, teacher):
        logits = model(input_ids=ids, attention_mask=attention).logits / trained.args.temperature
        logp = logits[:, -batch["completion_ids"].shape[1] - 1 : -1].log_softmax(-1)
        logps.append(logp.gather(-1, batch["completion_ids"][..., None])[..., 0])
        entropies.append(-(logp.exp() * logp).sum(-1).detach())
    mask = batch["completion_mask"].bool()
    scores = torch.stack([row[live].mean() for row, live in zip(logps[1].detach(), mask, strict=True)])
    keep = scores >= scores.quantile(drop)
    sure = 1 - entropies[1] / entropies[1][mask].max()
    unsure = entropies[0] / entropies[0][mask].max()
    weights = (1 + alpha * sure) * (1 + beta * unsure)
    weights = weights / weights[mask].mean()
    live = mask & keep[:, None]
    loss = -(weights * (logps[1] - logps[0]).detach() * logps[0])[live].sum() / live.sum()
    return list(torch.autograd.grad(loss, list(student.parameters())))


@pytest.mark.parametrize("options", [(0.0, 0.0, 0.0), (0.3, 1.0, 1.0)])
def test_a_plain_loop_gives_the_same_gradient(tmp_path: Path, options: tuple[float, float, float]) -> None:
    drop, alpha, beta = options
    changes = {"fire_drop": drop, "fire_alpha": alpha, "fire_beta": beta, "max_grad_norm": 1e9, "max_steps": 1}
    trained = run(settings(tmp_path, **changes), another(1))
    expected = by_a_plain_loop(trained, another(1), drop, alpha, beta)
    for gradient, parameter in zip(trained.gradients[0], expected, strict=True):
        torch.testing.assert_close(gradient, parameter, rtol=1e-4, atol=1e-6)
    assert logged(trained, "fire/keep_share")[0] == (1.0 if drop == 0 else 5 / 8)


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    """Scope is the whole generation batch, however it is cut."""
    whole = run(settings(tmp_path, max_steps=1, max_grad_norm=1e9), another(1))
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    cut = run(settings(tmp_path, max_steps=1, max_grad_norm=1e9, **parts), another(1))
    assert torch.equal(
        whole.batches[0]["completion_ids"].sort(0).values, cut.batches[0]["completion_ids"].sort(0).values
    )
    for one, other in zip(whole.gradients[-1], cut.gradients[-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_row_alone_is_never_dropped(tmp_path: Path) -> None:
    trained = run(settings(tmp_path, fire_scope="row", fire_drop=0.9, max_steps=1), another(1))
    assert logged(trained, "fire/keep_share") == [1.0]
    assert trained.batches[0]["advantages"].any()


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Twelve rows on one rank and on two: threshold, maxima, mean and the loss's average are those of all rows."""
    run_ranks("tiny_distillation.py", tmp_path)
    one = tiny_distillation.one_step(str(tmp_path / "run"), 12)
    (whole,) = one.batches
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    halves = [rank["batch"] for rank in ranks]
    assert len({half["completion_ids"].shape[1] for half in halves}) == 2, "the case wants unequal widths"
    kept = [half["tool_mask"].any(1).sum().item() for half in halves]
    assert sum(kept) == 9 and len(set(kept)) == 2, "the case wants ranks that keep unequally many"

    def rows(batch: dict[str, Any], name: str) -> list[list[float]]:
        lengths = batch["completion_mask"].sum(1).tolist()
        return [row[:length] for row, length in zip(batch[name].tolist(), lengths, strict=True)]

    for name in ("completion_ids", "tool_mask"):
        assert rows(halves[0], name) + rows(halves[1], name) == rows(whole, name)
    advantages = rows(halves[0], "advantages") + rows(halves[1], "advantages")
    for found, expected in zip(advantages, rows(whole, "advantages"), strict=True):
        # Float32 logits of unequal widths of padding: a few roundings, relative to log-probabilities of up to 10.
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for half in halves:
        assert half["metrics"] == pytest.approx(whole["metrics"], rel=1e-5)
    for parts in zip(ranks[0]["gradients"], ranks[1]["gradients"], one.gradients[0], strict=True):
        torch.testing.assert_close(parts[0], parts[1], rtol=0, atol=0)
        torch.testing.assert_close(parts[0], parts[2], rtol=1e-4, atol=1e-5)


def test_an_adapter_learns_and_the_model_below_it_does_not(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = run(settings(tmp_path, max_steps=1, **PLAIN), tiny_trl.model(), more={"peft_config": adapter})
    assert logged(plain, "loss") == [0.0]  # a fresh adapter is the model below it, which is the teacher
    options = {"max_steps": 40, "learning_rate": 0.02, "per_device_train_batch_size": 24}
    trained = run(settings(tmp_path, **options), another(1), more={"peft_config": adapter})
    gaps = logged(trained, "fire/teacher_gap")
    first, last = sum(gaps[:10]) / 10, sum(gaps[-10:]) / 10
    assert first < -1.2 and last > 0.8 * first
    named = dict(tiny_trl.model().named_parameters())
    below = {n: p for n, p in trained.model.get_base_model().named_parameters() if "lora" not in n}
    for name, parameter in below.items():
        assert torch.equal(parameter, named[name.replace(".base_layer", "")])


class Refuses(torch.nn.Module):
    """A teacher that must see no row but those that begin with its own letter."""

    def __init__(self, model: Any, letter: str) -> None:
        super().__init__()
        self.model, self.letter = model, tiny_trl.TOKENS.index(letter)

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: Any) -> Any:
        firsts = input_ids[torch.arange(len(input_ids)), attention_mask.argmax(1)]
        assert (firsts == self.letter).all()
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **more)


def test_each_teacher_sees_its_own_rows(tmp_path: Path) -> None:
    prompts = ["ab", "ba", "aa", "bb"] * 6
    labels = [prompt[0] for prompt in prompts]
    teachers = {letter: Refuses(another(seed), letter) for seed, letter in enumerate("ab")}
    trained = run(settings(tmp_path, max_steps=2), teachers, prompt=prompts, teacher=labels)
    assert len(logged(trained, "loss")) == 2
    with pytest.raises(ValueError, match="column 'teacher' must name a teacher in every row: .* got 'c'"):
        run(settings(tmp_path, max_steps=1), teachers, prompt=prompts, teacher=["c"] * 24)


def test_a_student_approaches_its_teacher(tmp_path: Path) -> None:
    options = {"max_steps": 80, "learning_rate": 0.02, "per_device_train_batch_size": 24}
    gaps = logged(run(settings(tmp_path, **options), another(1), kind=FireOPDTrainer), "fire/teacher_gap")
    first, last = sum(gaps[:10]) / 10, sum(gaps[-10:]) / 10
    assert first < -1.2 and last > 0.75 * first


def test_runs_are_resumed(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(settings(tmp_path / "whole", **options), another(1), kind=FireOPDTrainer)
    rows = Dataset.from_dict({"prompt": ["ab", "abc", "bcd", "dd", "cab", "h"] * 4})
    args = settings(tmp_path / "again", **options)
    again = FireOPDTrainer(
        tiny_trl.model(), another(1), args, train_dataset=rows, processing_class=tiny_trl.tokenizer()
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(again, "loss")[-2:] == logged(whole, "loss")[-2:]


@pytest.mark.parametrize(
    ("teachers", "changes", "message"),
    [
        (lambda: "http://localhost:8000", {}, "teachers must be a model or its name, got the address"),
        (lambda: {"math": 3}, {}, r"teachers\['math'\] must be a model or its name, got int"),
        (dict, {}, "teachers must hold at least one, got none"),
        (lambda: tiny_trl.model(vocab_size=8), {}, "teachers must have the student's vocabulary, 11 ids, got 8 that"),
        (tiny_trl.model, {"fire_drop": 1.5}, "drop must be .* got 1.5"),
        (tiny_trl.model, {"fire_scope": "all"}, "fire_scope must be one of 'batch', 'row', got 'all'"),
    ],
)
def test_refuses(tmp_path: Path, teachers: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        run(settings(tmp_path, **changes), teachers())


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_trl.model().save_pretrained(tmp_path / "teacher")
    tokenizer = tiny_trl.tokenizer()
    tokenizer.add_tokens(["z"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="teachers must have the student's tokenizer, got .* with another vocabulary"):
        run(settings(tmp_path), str(tmp_path / "teacher"))
    tiny_trl.tokenizer().save_pretrained(tmp_path / "teacher")
    assert logged(run(settings(tmp_path, max_steps=1, **PLAIN), str(tmp_path / "teacher")), "loss") == [0.0]
