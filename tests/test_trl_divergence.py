"""FireOPDTrainer with ``fire_loss``: a divergence over the vocabulary, against plain loops over PyTorch's formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")

import tiny_trl
from datasets import Dataset
from tiny_distillation import another, run, settings

from leafkernels.integrations.trl_distillation import FireOPDTrainer

PLAIN = {"fire_drop": 0.0, "fire_alpha": 0.0, "fire_beta": 0.0, "max_steps": 1, "max_grad_norm": 1e9}
FIRE = {"fire_drop": 0.3, "fire_alpha": 1.0, "fire_beta": 1.0, "max_steps": 1, "max_grad_norm": 1e9}
KINDS = ("reverse_kl", "forward_kl", "jsd")
PROMPTS = ["ab", "abc", "bcd", "dd", "cab", "h"] * 4


def logged(trained: Any, name: str) -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


def rows_of(trained: Any, model: Any, batch: dict[str, Any], num_ids: int | None = None) -> Tensor:
    """(rows, tokens, ids) log-probabilities before each token, over the first ids."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -batch["completion_ids"].shape[1] - 1 : -1]
    return (logits[..., :num_ids] / trained.args.temperature).log_softmax(-1)


def at_top(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the teacher's k most likely ids, and of all others together."""
    ids = teacher.topk(k).indices
    rest = torch.ones_like(teacher, dtype=torch.bool).scatter(-1, ids, False)

    def split(logp: Tensor) -> Tensor:
        others = logp.masked_fill(~rest, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logp.gather(-1, ids), others], -1)

    return split(student), split(teacher)


def apart(kind: str, student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1)

    if kind == "reverse_kl":
        return kl(student, teacher)
    if kind == "forward_kl":
        return kl(teacher, student)
    mixed = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)


def weights_of(trained: Any, batch: dict[str, Any], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """FiRe's weights, and which tokens count, by the formulas of the paper."""
    args = trained.args
    mask = batch["completion_mask"].bool()
    entropies = [-(logp.exp() * logp).sum(-1).detach() for logp in (student, teacher)]
    sampled = teacher.gather(-1, batch["completion_ids"][..., None])[..., 0].detach()
    scores = torch.stack([row[live].mean() for row, live in zip(sampled, mask, strict=True)])
    keep = scores >= scores.quantile(args.fire_drop)
    sure, unsure = 1 - entropies[1] / entropies[1][mask].max(), entropies[0] / entropies[0][mask].max()
    weights = (1 + args.fire_alpha * sure) * (1 + args.fire_beta * unsure)
    return weights / weights[mask].mean(), mask & keep[:, None]


def expected_gradient(trained: Any, teacher: Any, student: Any = None, k: int | None = None) -> list[Tensor]:
    """Of the first batch: the mean over tokens that count of weight times divergence."""
    batch, student = trained.batches[0], tiny_trl.model() if student is None else student
    own, said = rows_of(trained, student, batch), rows_of(trained, teacher, batch).detach()
    weights, live = weights_of(trained, batch, own, said)
    pair = (own, said) if k is None else at_top(own, said, k)
    found = apart(trained.args.fire_loss, *pair, trained.args.fire_jsd_beta)
    loss = (weights * found)[live].sum() / live.sum()
    assert logged(trained, "loss")[0] == pytest.approx(loss.item(), rel=1e-3)
    assert logged(trained, "fire/divergence")[0] == pytest.approx(found[live].mean().item(), rel=1e-3)
    return list(torch.autograd.grad(loss, list(student.parameters())))


def assert_gradients(found: list[Tensor], expected: list[Tensor]) -> None:
    assert any(gradient.any() for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("options", "k"), [(PLAIN, None), (FIRE, None), (FIRE, 3)], ids=["plain", "fire", "top"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_loop_gives_the_same_gradient(
    tmp_path: Path, kind: str, options: dict[str, Any], k: int | None
) -> None:
    beta = {"fire_jsd_beta": 0.3} if kind == "jsd" else {}
    trained = run(settings(tmp_path, **options, **beta, fire_loss=kind, fire_top_k=k), another(1))
    assert logged(trained, "fire/keep_share")[0] == (1.0 if options is PLAIN else 5 / 8)
    assert logged(trained, "clip_ratio/region_mean") == [0.0]
    assert_gradients(trained.gradients[0], expected_gradient(trained, another(1), k=k))


def test_the_expectation_of_the_sampled_loss_is_the_reverse_divergence(tmp_path: Path) -> None:
    """Of many samples from one place: the sampled loss's gradient is that of the reverse KL in the mean."""
    sizes = {"per_device_train_batch_size": 1024, "max_completion_length": 1}
    gradients = []
    for kind in ("sampled", "reverse_kl"):
        trained = run(settings(tmp_path, **PLAIN, **sizes, fire_loss=kind), another(1), prompt=["ab"] * 1024)
        gradients.append(torch.cat([gradient.flatten() for gradient in trained.gradients[0]]))
    sampled, whole = gradients
    assert torch.nn.functional.cosine_similarity(sampled, whole, 0) > 0.98
    assert float(sampled.norm() / whole.norm()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_equal_to_the_student_teaches_exactly_nothing(tmp_path: Path, kind: str) -> None:
    trained = run(settings(tmp_path, **PLAIN, fire_loss=kind), tiny_trl.model())
    assert logged(trained, "loss") == [0.0] and not any(gradient.any() for gradient in trained.gradients[0])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
def test_micro_batches_and_dropped_completions_are_averaged_as_trl_has_it(tmp_path: Path, loss_type: str) -> None:
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "loss_type": loss_type}
    options = {**FIRE, "fire_drop": 0.5, **changes, "fire_loss": "forward_kl"}
    trained = run(settings(tmp_path, **options), another(1))
    student, teacher = tiny_trl.model(), another(1)
    total, rows, parts, tokens = torch.zeros(()), 0, 0, 0
    for part in trained.splits:
        live = (part["completion_mask"] * part["tool_mask"]).bool()
        found = apart("forward_kl", rows_of(trained, student, part), rows_of(trained, teacher, part).detach())
        losses = torch.where(live, part["advantages"] * found, 0.0)
        if loss_type == "grpo":
            losses = losses.sum(1) / live.sum(1).clamp(min=1)
        elif loss_type == "dr_grpo":
            losses = losses / tiny_trl.LONGEST
        elif loss_type == "bnpo":
            losses = losses / live.sum().clamp(min=1)
        total = total + losses.sum()
        rows, parts, tokens = rows + int(live.any(1).sum()), parts + int(live.any()), tokens + int(live.sum())
    by = {"dapo": tokens, "bnpo": parts}.get(loss_type, rows)
    assert rows == 4
    assert_gradients(trained.gradients[-1], list(torch.autograd.grad(total / by, list(student.parameters()))))


def test_the_divergence_to_a_reference_is_added_as_trl_has_it(tmp_path: Path) -> None:
    tiny_trl.model().save_pretrained(tmp_path / "reference")
    tiny_trl.tokenizer().save_pretrained(tmp_path / "reference")
    student, before = another(2), another(2)
    student.config._name_or_path = str(tmp_path / "reference")  # where TRL loads the reference from
    trained = run(settings(tmp_path, **PLAIN, fire_loss="jsd", beta=0.3, entropy_coef=0.1), another(1), student)
    batch = trained.batches[0]
    live = batch["completion_mask"].bool()
    own, said, ref = (rows_of(trained, model, batch) for model in (before, another(1), tiny_trl.model()))
    at = batch["completion_ids"][..., None]
    gap = (ref.detach() - own).gather(-1, at)[..., 0]
    entropy = -(own.exp() * own).sum(-1)
    losses = apart("jsd", own, said.detach()) + 0.3 * (gap.exp() - gap - 1) - 0.1 * entropy
    expected = torch.autograd.grad(losses[live].mean(), list(before.parameters()))
    assert_gradients(trained.gradients[0], list(expected))
    assert logged(trained, "kl")[0] > 0 and logged(trained, "entropy")[0] == pytest.approx(
        entropy[live].mean().item(), rel=1e-4
    )


class NoHead(torch.nn.Module):
    """Without ``logits_to_keep``, and a class of its own: nothing tells that a linear head makes the logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Any) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_logits_do_where_a_head_is_not_known(tmp_path: Path) -> None:
    trained = run(settings(tmp_path, **FIRE, fire_loss="reverse_kl"), NoHead(another(1)))
    assert_gradients(trained.gradients[0], expected_gradient(trained, another(1)))


def test_no_logits_of_completions_are_made_where_heads_are_linear(tmp_path: Path) -> None:
    shapes = []
    student, teacher = tiny_trl.model(), another(1)
    trained = run(settings(tmp_path, **PLAIN, fire_loss="jsd"), teacher, student)
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda _, __, logits: shapes.append(logits.shape[1]))
    trained._compute_loss(student, trained.splits[-1])
    # A hook of one's own is another head than the linear one, from which on logits are made.
    width = trained.batches[0]["completion_ids"].shape[1]
    assert shapes == [width + 1, width + 1]
    for model in (student, teacher):
        model.lm_head._forward_hooks.clear()
    shapes.clear()
    inner = student.model.register_forward_hook(lambda *_: shapes.append(0))
    trained._compute_loss(student, trained.splits[-1])
    inner.remove()
    assert shapes == [0]


def test_a_student_in_half_precision_has_a_teacher_in_float32(tmp_path: Path) -> None:
    trained = run(settings(tmp_path, **PLAIN, fire_loss="reverse_kl", bf16=True), another(1))
    batch = trained.batches[0]
    live = batch["completion_mask"].bool()
    found = apart("reverse_kl", rows_of(trained, tiny_trl.model(), batch), rows_of(trained, another(1), batch))
    # bfloat16 has three digits, of logits of up to 20.
    assert logged(trained, "loss")[0] == pytest.approx(found[live].mean().item(), rel=0.03)


@pytest.mark.parametrize(("of_student", "of_teacher"), [(11, 16), (16, 11), (14, 12)])
@pytest.mark.parametrize("k", [None, 3])
def test_padded_embeddings_are_cut(tmp_path: Path, of_student: int, of_teacher: int, k: int | None) -> None:
    student, teacher = tiny_trl.model(vocab_size=of_student), another(1, vocab_size=of_teacher)
    before = tiny_trl.model(vocab_size=of_student)
    trained = run(settings(tmp_path, **PLAIN, fire_loss="reverse_kl", fire_top_k=k), teacher, student)
    (batch,) = trained.batches
    num_ids = min(of_student, of_teacher)
    live = batch["completion_mask"].bool() & ~(batch["completion_ids"] >= num_ids).any(1, keepdim=True)
    known = dict(batch, completion_ids=batch["completion_ids"].clamp(max=num_ids - 1))
    other = another(1, vocab_size=of_teacher)
    pair = rows_of(trained, before, known, num_ids), rows_of(trained, other, known, num_ids).detach()
    pair = pair if k is None else at_top(*pair, k)
    loss = apart("reverse_kl", *pair)[live].mean()
    assert_gradients(trained.gradients[0], list(torch.autograd.grad(loss, list(before.parameters()))))


@pytest.mark.parametrize("k", [None, 3])
def test_each_row_is_compared_with_its_own_teacher(tmp_path: Path, k: int | None) -> None:
    """Through shuffled micro-batches, one of which may lack a teacher."""
    labels = ["one" if prompt[0] in "ah" else "two" for prompt in PROMPTS]
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    teachers = {"one": another(1), "two": another(2)}
    args = settings(tmp_path, **PLAIN, **changes, fire_loss="forward_kl", fire_top_k=k)
    trained = run(args, teachers, teacher=labels)
    student, total, tokens = tiny_trl.model(), torch.zeros(()), 0
    for part in trained.splits:
        live = part["completion_mask"].bool()
        firsts = part["prompt_ids"][torch.arange(2), part["prompt_mask"].argmax(1)]
        own = rows_of(trained, student, part)
        for row, first in enumerate(firsts.tolist()):
            of = teachers["one" if tiny_trl.TOKENS[first] in "ah" else "two"]
            pair = own[row], rows_of(trained, of, part).detach()[row]
            pair = pair if k is None else at_top(*pair, k)
            total = total + apart("forward_kl", *pair)[live[row]].sum()
            tokens += int(live[row].sum())
    assert_gradients(trained.gradients[-1], list(torch.autograd.grad(total / tokens, list(student.parameters()))))


def test_the_base_below_an_adapter_and_a_hint(tmp_path: Path) -> None:
    """The teacher is the student itself, adapter off, and reads another prompt."""
    peft = pytest.importorskip("peft")
    found = []
    for teacher in (None, tiny_trl.model()):
        torch.manual_seed(5)
        base = tiny_trl.model()
        options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
        student = peft.get_peft_model(base, peft.LoraConfig(**options, task_type="CAUSAL_LM"))
        args = settings(tmp_path, **FIRE, fire_loss="jsd")
        hints = [f"{prompt}e" for prompt in PROMPTS]
        found.append(run(args, base if teacher is None else teacher, student, teacher_prompt=hints).gradients[0])
    assert_gradients(*found)


def test_a_moving_average_is_compared_by_its_own_head(tmp_path: Path) -> None:
    """decay near 1: the average stays the first student's, head and all, while the student moves away."""
    from leafkernels.integrations.trl_distillation import EMATeacher

    found = []
    for teacher in (EMATeacher(1 - 1e-9), tiny_trl.model()):
        args = settings(tmp_path, **{**PLAIN, "max_steps": 2}, fire_loss="forward_kl")
        trained = run(args, teacher, teacher_prompt=[f"{prompt}e" for prompt in PROMPTS])
        found.append(trained.gradients[1])
    assert_gradients(*found)


def test_a_teacher_that_bans_ids(tmp_path: Path) -> None:
    """It makes the reverse divergence infinite, which is told, and no other one."""
    teacher = another(1)
    teacher.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([9]), -torch.inf))
    with pytest.raises(ValueError, match="fire_loss must be 'jsd' or 'forward_kl' with a teacher that bans ids"):
        run(settings(tmp_path, **PLAIN, fire_loss="reverse_kl"), teacher)
    trained = run(settings(tmp_path, **PLAIN, fire_loss="forward_kl"), teacher)
    assert all(gradient.isfinite().all() for gradient in trained.gradients[0])
    assert 0 < logged(trained, "loss")[0] < 100


def test_runs_are_resumed(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "fire_loss": "jsd", "fire_top_k": 3}
    whole = run(settings(tmp_path / "whole", **options), another(1), kind=FireOPDTrainer)
    rows = Dataset.from_dict({"prompt": PROMPTS})
    args = settings(tmp_path / "again", **options)
    again = FireOPDTrainer(
        tiny_trl.model(), another(1), args, train_dataset=rows, processing_class=tiny_trl.tokenizer()
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(again, "loss")[-2:] == logged(whole, "loss")[-2:]


def test_an_evaluation_has_the_divergence_of_held_out_prompts(tmp_path: Path) -> None:
    more = {"eval_dataset": Dataset.from_dict({"prompt": ["aabb", "hg"]})}
    changes = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2, "fire_loss": "forward_kl"}
    trained = run(settings(tmp_path, **PLAIN, **changes), another(1), more=more)
    (entry,) = [entry for entry in trained.state.log_history if "eval_loss" in entry]
    # Without weights and filter the loss is the divergence.
    assert entry["eval_loss"] == pytest.approx(entry["eval_fire/divergence"], rel=1e-5) and entry["eval_loss"] > 0
    assert 0 <= entry["eval_fire/top1_agreement"] <= 1 and 0 < entry["eval_fire/top10_overlap"] <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fire_loss": "kl"}, "fire_loss must be one of 'sampled', 'reverse_kl', 'forward_kl', 'jsd', got 'kl'"),
        ({"fire_top_k": 4}, "fire_top_k must be None with fire_loss='sampled', which has one id, got 4"),
        ({"fire_loss": "jsd", "fire_top_k": 0}, "fire_top_k must be None or an int of at least 1, got 0"),
        ({"fire_loss": "jsd", "fire_jsd_beta": 1.0}, r"fire_jsd_beta must be in \(0, 1\), got 1.0"),
        (
            {"fire_loss": "reverse_kl", "fire_jsd_beta": 0.3},
            "fire_jsd_beta must be left out with fire_loss='reverse_kl'",
        ),
        ({"fire_loss": "jsd", "loss_type": "cispo"}, "loss_type must be one of 'grpo', .* got 'cispo'"),
        ({"fire_loss": "jsd", "share_prefixes": True}, "share_prefixes must be False with fire_loss='jsd', got True"),
        ({"fire_loss": "jsd", "top_entropy_quantile": 0.5}, "top_entropy_quantile must be 1.0 with fire_loss='jsd'"),
        ({"fire_loss": "jsd", "delta": 2.0}, "delta must be None with fire_loss='jsd', got 2.0"),
        ({"fire_loss": "jsd", "off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold must be None with"),
        (
            {"fire_loss": "jsd", "importance_sampling_level": "sequence"},
            "importance_sampling_level must be 'token' with fire_loss='jsd', got 'sequence'",
        ),
    ],
)
def test_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        settings(tmp_path, **changes)


def test_models_in_parts_are_refused(tmp_path: Path) -> None:
    trained = run(settings(tmp_path, **PLAIN, fire_loss="jsd"), another(1))
    trained._is_zero3 = True
    with pytest.raises(ValueError, match="fire_loss must be 'sampled' under DeepSpeed ZeRO-3, got 'jsd'"):
        trained._check_divergence()
    trained._is_zero3 = False
    trained._teachers[None].model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(
        ValueError, match="fire_top_k must be given with fire_loss='jsd' and a teacher on several devices"
    ):
        trained._check_divergence()
