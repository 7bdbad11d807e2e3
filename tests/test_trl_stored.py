"""FireOPDTrainer with a teacher whose answers lie in the dataset, beside the completions that they are about."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("trl", minversion="1.14", reason="needs TRL: pip install -e '.[trl]'")

import tiny_trl
from tiny_distillation import another, run, settings

from leafkernels.integrations.trl_distillation import StoredTeacher

PLAIN = {"fire_drop": 0.0, "fire_alpha": 0.0, "fire_beta": 0.0, "max_steps": 1, "max_grad_norm": 1e9}
STORED = {**PLAIN, "fire_loss": "forward_kl"}
PROMPTS = ["ab", "abc", "bcd", "dd", "cab", "h"] * 4


def stored(
    k: int, temperature: float = 0.8, ragged: bool = False, prompts: list[str] = PROMPTS
) -> dict[str, list[Any]]:
    """Columns: random completions, and what another model says of them."""
    rng, teacher, tokenizer = random.Random(0), another(1), tiny_trl.tokenizer()
    rows: dict[str, list[Any]] = {"completion_ids": [], "teacher_ids": [], "teacher_logprobs": []}
    for prompt in prompts:
        completion = [*(rng.randrange(3, 11) for _ in range(rng.randrange(1, 8))), tiny_trl.EOS]
        before = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([before + completion])).logits[0, len(before) - 1 : -1]
        top = (logits / temperature).log_softmax(-1).topk(k)
        lengths = [rng.randrange(1, k + 1) if ragged else k for _ in completion]
        rows["completion_ids"].append(completion)
        rows["teacher_ids"].append([ids[:n] for ids, n in zip(top.indices.tolist(), lengths, strict=True)])
        rows["teacher_logprobs"].append([of[:n] for of, n in zip(top.values.tolist(), lengths, strict=True)])
    return rows


@pytest.mark.parametrize("ragged", [False, True])
def test_the_gradient_is_that_of_a_plain_loop_over_what_is_stored(tmp_path: Path, ragged: bool) -> None:
    """The student's weights (beta) too; shuffled micro-batches are one batch."""
    columns = stored(3, ragged=ragged)
    by_row = {}
    for number, prompt in enumerate(PROMPTS):
        by_row[(prompt, *columns["completion_ids"][number])] = number
    changes = {"fire_beta": 1.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trained = run(settings(tmp_path, **{**STORED, **changes}), StoredTeacher(), **columns)
    student, losses, entropies = tiny_trl.model(), [], []
    for batch in trained.batches:
        parts = zip(
            *(batch[f"{of}_{name}"] for of in ("prompt", "completion") for name in ("ids", "mask")), strict=True
        )
        for prompt_ids, prompt_mask, ids, mask in parts:
            before, completion = prompt_ids[prompt_mask.bool()].tolist(), ids[mask.bool()].tolist()
            prompt = "".join(tiny_trl.TOKENS[i] for i in before)
            number = by_row[(prompt, *completion)]  # the completion is the one that is stored
            logits = student(input_ids=torch.tensor([before + completion])).logits[0, len(before) - 1 : -1]
            logp = (logits / trained.args.temperature).log_softmax(-1)
            entropies += (-(logp.exp() * logp).sum(-1)).detach().tolist()
            for row, top, said in zip(
                logp, columns["teacher_ids"][number], columns["teacher_logprobs"][number], strict=True
            ):
                q = torch.tensor(said).exp()
                others = torch.ones(11, dtype=torch.bool)
                others[top] = False
                rest = (1 - q.sum()).clamp(min=1e-7)
                p_rest = row[others].logsumexp(0)
                losses.append((q * (q.log() - row[top])).sum() + rest * (rest.log() - p_rest))
    weights = 1 + torch.tensor(entropies) / max(entropies)
    loss = (weights / weights.mean() * torch.stack(losses)).mean()
    expected = torch.autograd.grad(loss, list(student.parameters()))
    for found, wanted in zip(trained.gradients[-1], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert not {"fire/teacher_gap", "fire/teacher_entropy", "fire/threshold"} & trained.batches[0]["metrics"].keys()


def test_a_student_learns_what_is_stored(tmp_path: Path) -> None:
    held_out = Dataset.from_dict({"prompt": PROMPTS[:6], **stored(10, prompts=PROMPTS[:6])})
    changes = {"max_steps": 60, "eval_strategy": "steps", "eval_steps": 30, "learning_rate": 0.01}
    changes |= {"per_device_train_batch_size": 24, "per_device_eval_batch_size": 6}
    trained = run(
        settings(tmp_path, **{**STORED, **changes}), StoredTeacher(), more={"eval_dataset": held_out}, **stored(10)
    )
    log = [entry for entry in trained.state.log_history if "eval_loss" in entry]
    first = next(entry["loss"] for entry in trained.state.log_history if "loss" in entry)
    assert log[-1]["eval_loss"] < 0.5 * first
    assert log[-1]["eval_fire/top1_agreement"] > 0.6 and log[-1]["eval_fire/top10_overlap"] > 0.9


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("completion_ids", lambda ids: [], "the column 'completion_ids' must hold a completion of 1 to"),
        ("completion_ids", lambda ids: [*ids, 11], r"ids below 11 in every row, got \[.*11\]"),
        ("completion_ids", lambda ids: ids + [3] * 10, "of 1 to max_completion_length=10 ids"),
        ("teacher_ids", lambda ids: ids[1:], "the column 'teacher_ids' must hold a list for each of the"),
        (
            "teacher_ids",
            lambda ids: [[3, 3], *ids[1:]],
            r"ids, one at least and each once, for each token, got \[3, 3\]",
        ),
        (
            "teacher_logprobs",
            lambda of: [of[0][1:], *of[1:]],
            "must hold a log-probability, at most 0, for each of the 2",
        ),
        ("teacher_logprobs", lambda of: [[0.5, -1.0], *of[1:]], r"at most 0, for each of the 2 ids, got \[0.5, -1.0\]"),
        (
            "teacher_logprobs",
            lambda of: [[-0.1, -0.2], *of[1:]],
            r"must hold log-probabilities of one distribution, .* got \[-0.1, -0.2\] for token 0",
        ),
    ],
)
def test_what_is_stored_is_read_with_care(tmp_path: Path, column: str, change: Any, message: str) -> None:
    columns = stored(2)
    columns[column] = [change(row) for row in columns[column]]
    with pytest.raises(ValueError, match=message):
        run(settings(tmp_path, **STORED), StoredTeacher(), **columns)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"fire_loss": "sampled"}, {}, "fire_loss must be 'forward_kl' with a StoredTeacher, and fire_top_k None"),
        ({"fire_top_k": 2}, {}, "fire_loss must be 'forward_kl' with a StoredTeacher, and fire_top_k None"),
        ({"fire_drop": 0.2}, {}, "fire_alpha and fire_drop must be 0 with a StoredTeacher"),
        ({"num_generations": 2}, {}, "num_generations must be 1 with a StoredTeacher"),
        ({}, {"reward_funcs": tiny_trl.count_a}, "reward_funcs must be None with a StoredTeacher"),
    ],
)
def test_refuses(tmp_path: Path, changes: dict[str, Any], more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(settings(tmp_path, **{**STORED, **changes}), StoredTeacher(), more=more, **stored(2))


def test_a_stored_teacher_is_the_only_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teachers\['a'\] must not be a StoredTeacher, which is the only one"):
        run(settings(tmp_path, **STORED), {"a": StoredTeacher(), "b": another(1)})
