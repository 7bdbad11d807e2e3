"""FireOPDTrainer's teachers: whose weights and ids they share, what they ban, and how they are given back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")

import tiny_trl
from engines import ENGINES
from tiny_distillation import another, on_an_engine, run, settings

from leafkernels.integrations.trl_distillation import _MEANS

PLAIN = {"fire_drop": 0.0, "fire_alpha": 0.0, "fire_beta": 0.0, "max_steps": 1, "max_grad_norm": 1e9}
A = tiny_trl.TOKENS.index("a")


def logged(trained: Any, name: str) -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


def logprobs(trained: Any, model: Any, batch: dict[str, Any], num_ids: int | None = None) -> torch.Tensor:
    """(rows, tokens) of the completions' tokens under a model, over its first ids."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -batch["completion_ids"].shape[1] - 1 : -1]
    # An id that is cut off has no log-probability; what stands in its place is not looked at.
    kept = (logits / trained.args.temperature)[..., :num_ids]
    return kept.log_softmax(-1).gather(-1, batch["completion_ids"][..., None].clamp(max=kept.shape[-1] - 1))[..., 0]


def adapter(model: Any, **changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    # Weights of an adapter that has learnt something.
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(**{**options, **changes}))


@pytest.mark.parametrize("by_config", [False, True])
def test_the_base_below_an_adapter_teaches(tmp_path: Path, by_config: bool) -> None:
    """As an independent copy of it does; PEFT puts the adapter into the very model that is the teacher."""
    peft = pytest.importorskip("peft")
    runs = []
    for is_copy in (False, True):
        base = tiny_trl.model()
        teacher = copy.deepcopy(base) if is_copy else base
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        student, more = (base, {"peft_config": config}) if by_config else (adapter(base), {})
        runs.append(run(settings(tmp_path, **PLAIN), teacher, student, more=more))
    ours, expected = runs
    assert torch.equal(ours.batches[0]["completion_ids"], expected.batches[0]["completion_ids"])
    assert expected.batches[0]["advantages"].abs().max() > 0.1
    torch.testing.assert_close(ours.batches[0]["advantages"], expected.batches[0]["advantages"], rtol=1e-5, atol=1e-6)
    for found, want in zip(ours.gradients[0], expected.gradients[0], strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
    assert any(gradient.any() for gradient in ours.gradients[0])
    names = [name for name, parameter in ours.model.named_parameters() if parameter.requires_grad]
    assert names and all("lora" in name for name in names)


def test_an_adapter_that_is_frozen_in_part_stays_so(tmp_path: Path) -> None:
    """PEFT's own way to disable an adapter makes all of it learn afterwards."""
    student = adapter(tiny_trl.model())
    frozen = [parameter for name, parameter in student.named_parameters() if "q_proj.lora_A" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    run(settings(tmp_path, **PLAIN), student.get_base_model(), student)
    assert frozen and not any(parameter.requires_grad for parameter in frozen)


def test_a_teacher_that_would_change_with_the_student_is_refused(tmp_path: Path) -> None:
    student, teacher = tiny_trl.model(), another(1)
    with pytest.raises(ValueError, match="teachers must not be the student itself, from which it has nothing to learn"):
        run(settings(tmp_path, **PLAIN), student, student)
    with pytest.raises(ValueError, match="teachers must not be the student itself"):
        run(settings(tmp_path, **PLAIN), wrapped := adapter(tiny_trl.model()), wrapped)
    message = r"teachers\['math'\] must not change as the student learns, got one that shares model.embed_tokens.weight"
    teacher.model.embed_tokens.weight = student.model.embed_tokens.weight
    with pytest.raises(ValueError, match=message):
        run(settings(tmp_path, **PLAIN), {"math": teacher}, student)
    teacher.model.embed_tokens.weight = torch.nn.Parameter(student.model.embed_tokens.weight.data)
    with pytest.raises(ValueError, match=message):
        run(settings(tmp_path, **PLAIN), {"math": teacher}, student)
    with pytest.raises(ValueError, match="must not change as the student learns, got one that shares .*bias"):
        run(settings(tmp_path, **PLAIN), base := tiny_trl.model(), adapter(base, bias="all"))
    # What the student does not train it may share.
    student.model.embed_tokens.weight.requires_grad_(False)
    trained = run(settings(tmp_path, **PLAIN), teacher, student)
    assert logged(trained, "grad_norm")[0] > 0


def state(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: (type(part), part.training, sorted(vars(part))) for name, part in model.named_modules()
    }
    for name, parameter in model.named_parameters():
        found[f"{name} "] = (parameter.requires_grad, parameter.dtype, parameter.device, parameter.detach().clone())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_is_given_back_as_it_came(tmp_path: Path, dtype: torch.dtype) -> None:
    teacher = another(1).to(dtype)
    teacher.train().model.layers[0].mlp.eval()
    teacher.lm_head.requires_grad_(False)
    before = state(teacher)
    seen = []
    hook = teacher.lm_head.register_forward_hook(lambda *args: seen.append((args[0].training, args[2].dtype)))
    before["lm_head"] = before["lm_head"][:2] + (sorted(vars(teacher.lm_head)),)
    trained = run(settings(tmp_path, **PLAIN, bf16=True, eval_strategy="no"), teacher)
    hook.remove()
    # In evaluation mode, and in its own dtype also where the student runs in bfloat16.
    assert set(seen) == {(False, dtype)}
    after = state(teacher)
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert value[:3] == before[name][:3], name
        assert len(value) == 3 or torch.equal(value[3], before[name][3])
    assert trained.batches[0]["advantages"].any()


def plain_gradient(trained: Any, loss_type: str, student: Any = None, reference: Any = None) -> list[torch.Tensor]:
    """Of all micro-batches: minus advantage times log-probability, in the mean that the loss type has, of kept rows."""
    student = tiny_trl.model() if student is None else student
    total, kept_rows, kept_tokens, kept_parts = torch.zeros(()), 0, 0, 0
    for part in trained.splits:
        mask = (part["completion_mask"] * part["tool_mask"]).bool()
        losses = torch.where(mask, -part["advantages"] * logprobs(trained, student, part), 0.0)
        if reference is not None:
            apart = logprobs(trained, reference, part).detach() - logprobs(trained, student, part)
            losses = losses + torch.where(mask, trained.args.beta * (apart.exp() - apart - 1), 0.0)
        # cispo's constant at the ratio 1 is its upper bound.
        losses = losses * (trained.args.epsilon if loss_type == "cispo" else 1.0)
        if loss_type in ("grpo", "sapo"):
            total = total + (losses.sum(1) / mask.sum(1).clamp(min=1)).sum()
        elif loss_type == "dr_grpo":
            total = total + losses.sum() / tiny_trl.LONGEST
        elif loss_type == "bnpo":
            total = total + losses.sum() / mask.sum().clamp(min=1)
        else:
            total = total + losses.sum()
        kept_rows += int(mask.any(1).sum())
        kept_tokens += int(mask.sum())
        kept_parts += int(mask.any())
    by = {"tokens": kept_tokens, "rows": kept_rows, "micro-batches": kept_parts}[_MEANS[loss_type]]
    return list(torch.autograd.grad(total / by, list(student.parameters())))


@pytest.mark.parametrize(("loss_type", "size"), [*((name, 2) for name in _MEANS), ("grpo", 8), ("bnpo", 1)])
def test_dropped_completions_leave_the_mean(tmp_path: Path, loss_type: str, size: int) -> None:
    parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    options = {**PLAIN, "fire_drop": 0.5, "fire_alpha": 1.0, "loss_type": loss_type}
    trained = run(settings(tmp_path, **options, **parts), another(1))
    assert logged(trained, "fire/keep_share") == [0.5]
    for found, expected in zip(trained.gradients[-1], plain_gradient(trained, loss_type), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_every_loss_type_has_a_mean() -> None:
    from leafkernels.integrations._trl_options import CHOICES

    assert set(_MEANS) == set(CHOICES["loss_type"])


def test_dropped_completions_leave_the_mean_of_the_divergence(tmp_path: Path) -> None:
    """beta's term is in the mean as well, and only that of kept completions."""
    tiny_trl.model().save_pretrained(tmp_path / "reference")
    tiny_trl.tokenizer().save_pretrained(tmp_path / "reference")
    student, before = another(2), another(2)
    options = {**PLAIN, "fire_drop": 0.5, "loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False}
    student.config._name_or_path = str(tmp_path / "reference")  # where TRL loads the reference from
    trained = run(settings(tmp_path, **options), another(1), student)
    assert trained.beta == 0.3
    for found, expected in zip(
        trained.gradients[0], plain_gradient(trained, "grpo", before, tiny_trl.model()), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("level", "threshold"), [("sequence", None), ("sequence", 0.0), ("token", 0.0)])
def test_token_credit_under_options_for_one_advantage_a_row(
    tmp_path: Path, level: str, threshold: float | None
) -> None:
    """On policy every ratio is 1, and no row is off it: the gradient is that of each token's own advantage."""
    options = {**PLAIN, "importance_sampling_level": level, "off_policy_mask_threshold": threshold}
    trained = run(settings(tmp_path, **options), another(1))
    advantages = trained.batches[0]["advantages"]
    assert ((advantages > 0).any(1) & (advantages < 0).any(1)).any(), "the case wants credit that is not flat"
    for found, expected in zip(trained.gradients[0], plain_gradient(trained, "dapo"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def banning(ids: list[int], value: float = -torch.inf) -> Any:
    teacher = another(1)

    def ban(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor(ids), value)

    teacher.lm_head.register_forward_hook(ban)
    return teacher


@pytest.mark.parametrize("scope", ["batch", "row"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_completions_with_a_banned_token_leave_the_loss(tmp_path: Path, scope: str, loss_type: str) -> None:
    options = {**PLAIN, "fire_scope": scope, "fire_beta": 1.0, "loss_type": loss_type}
    trained = run(settings(tmp_path, **options), banning([A]))
    (batch,) = trained.batches
    mask = batch["completion_mask"].bool()
    has_banned = ((batch["completion_ids"] == A) & mask).any(1)
    assert 0 < has_banned.sum() < 8
    assert torch.equal(batch["tool_mask"].bool() & mask, mask & ~has_banned[:, None])
    assert logged(trained, "fire/unscored_share") == [has_banned.float().mean().item()]
    assert all(
        torch.tensor(logged(trained, f"fire/{name}")).isfinite().all() for name in ("teacher_gap", "mean_weight")
    )
    for found, expected in zip(trained.gradients[0], plain_gradient(trained, loss_type), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize("scope", ["batch", "row"])
def test_where_no_completion_has_numbers_nothing_is_learnt(tmp_path: Path, scope: str, value: float) -> None:
    trained = run(settings(tmp_path, **{**PLAIN, "max_steps": 2}, fire_scope=scope), banning(list(range(11)), value))
    assert logged(trained, "loss") == [0.0, 0.0] and logged(trained, "fire/unscored_share") == [1.0, 1.0]
    assert all(
        torch.equal(a, b) for a, b in zip(trained.model.parameters(), tiny_trl.model().parameters(), strict=True)
    )


def test_nan_takes_its_own_row_only(tmp_path: Path) -> None:
    teacher = another(1)

    def spoil(_: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits[:1] * torch.nan, logits[1:]])

    teacher.lm_head.register_forward_hook(spoil)
    trained = run(settings(tmp_path, **PLAIN), teacher)
    assert trained.batches[0]["tool_mask"].any(1).tolist() == [False] + [True] * 7
    for found, expected in zip(trained.gradients[0], plain_gradient(trained, "dapo"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("of_student", "of_teacher"), [(11, 16), (16, 11), (14, 12), (16, 16)])
def test_embeddings_are_compared_on_the_ids_that_both_have(tmp_path: Path, of_student: int, of_teacher: int) -> None:
    """Padding of either is cut off both; a completion with an id that is cut off leaves the loss."""
    teacher = another(1, vocab_size=of_teacher)
    trained = run(settings(tmp_path, **PLAIN), teacher, tiny_trl.model(vocab_size=of_student))
    (batch,) = trained.batches
    num_ids = min(of_student, of_teacher)
    beyond = (batch["completion_ids"] >= num_ids).any(1)
    assert beyond.any() == (of_student > of_teacher)
    known = dict(batch, completion_ids=batch["completion_ids"].clamp(max=num_ids - 1))
    student = tiny_trl.model(vocab_size=of_student)
    gap = logprobs(trained, teacher, known, num_ids) - logprobs(trained, student, known, num_ids)
    mask = batch["completion_mask"].bool() & ~beyond[:, None]
    assert torch.equal(batch["tool_mask"].bool() & batch["completion_mask"].bool(), mask)
    torch.testing.assert_close(batch["advantages"], torch.where(mask, gap, 0.0).detach(), rtol=1e-4, atol=1e-5)


def tokenizer(*added: str, special: bool = True, swapped: bool = False) -> Any:
    found = tiny_trl.tokenizer()
    found.add_tokens(list(added), special_tokens=special)
    if not swapped:
        return found
    import json

    from tokenizers import Tokenizer

    parts = json.loads(found.backend_tokenizer.to_str())
    vocab = parts["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return type(found)(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), pad_token="<pad>", eos_token="<eos>")


def test_tokenizers_of_given_models_are_compared(tmp_path: Path) -> None:
    """By the one that lies where the model was loaded from, or the one that is given; else a warning says it is not."""
    from transformers import AutoModelForCausalLM

    another(1).save_pretrained(tmp_path / "teacher")
    tokenizer(swapped=True).save_pretrained(tmp_path / "teacher")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    refused = "teachers must have the student's tokenizer, got one with another vocabulary: id 3 is 'b', to .* 'a'"
    for teacher in (loaded, str(tmp_path / "teacher")):
        with pytest.raises(ValueError, match=refused):
            run(settings(tmp_path, **PLAIN), teacher)
    given = {"teacher_processing_class": tiny_trl.tokenizer()}
    assert run(settings(tmp_path, **PLAIN), loaded, more=given).batches
    with pytest.warns(UserWarning, match="the tokenizer of teachers is not known .the model has no name."):
        run(settings(tmp_path, **PLAIN), another(1))
    by_label = {"teacher_processing_class": {"code": tokenizer(swapped=True)}}
    with pytest.raises(ValueError, match=r"teachers\['code'\] must have the student's tokenizer"):
        run(settings(tmp_path, **PLAIN), {"math": another(1), "code": another(2)}, more=by_label)
    with pytest.raises(ValueError, match="teacher_processing_class must have the labels of teachers, got 'maths'"):
        run(settings(tmp_path, **PLAIN), {"math": another(1)}, more={"teacher_processing_class": {"maths": given}})
    with pytest.raises(TypeError, match="teacher_processing_class must be a tokenizer, got int"):
        run(settings(tmp_path, **PLAIN), another(1), more={"teacher_processing_class": 3})


def test_tokenizers_may_add_special_tokens(tmp_path: Path) -> None:
    """Ids from the first of them on are cut off both."""
    for ours, theirs in ((tokenizer(), tokenizer("<think>", "</think>")), (tokenizer("<tool>"), tokenizer())):
        student, teacher = tiny_trl.model(vocab_size=16), another(1, vocab_size=16)
        more = {"teacher_processing_class": theirs, "processing_class": ours}
        trained = run(settings(tmp_path, **PLAIN), teacher, student, more=more)
        (batch,) = trained.batches
        mask = batch["completion_mask"].bool() & (batch["completion_ids"] < 11).all(1, keepdim=True)
        assert torch.equal(batch["tool_mask"].bool() & batch["completion_mask"].bool(), mask) and mask.any()
        known = dict(batch, completion_ids=batch["completion_ids"].clamp(max=10))
        gap = logprobs(trained, teacher, known, 11) - logprobs(trained, tiny_trl.model(vocab_size=16), known, 11)
        torch.testing.assert_close(batch["advantages"], torch.where(mask, gap, 0.0).detach(), rtol=1e-4, atol=1e-5)
    for theirs in (tokenizer("z", special=False), tokenizer("<think>", "z", special=False)):
        with pytest.raises(ValueError, match="got one with another vocabulary: id 11 is '(z|<think>)'"):
            run(settings(tmp_path, **PLAIN), another(1, vocab_size=16), more={"teacher_processing_class": theirs})


def test_a_teacher_without_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="teachers must be a causal language model, got Qwen2Model without a head"):
        run(settings(tmp_path, **PLAIN), another(1).model)


def test_logits_are_made_a_row_at_a_time_where_they_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leafkernels.integrations import _trl_teachers

    whole = run(settings(tmp_path, **PLAIN), another(1))
    monkeypatch.setattr(_trl_teachers, "_LOGITS", 3 * tiny_trl.LONGEST * 11)
    shapes = []
    teacher = another(1)
    teacher.lm_head.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
    parts = run(settings(tmp_path, **PLAIN), teacher)
    width = parts.batches[0]["completion_ids"].shape[1]
    # Those of the completions only, and of as many rows as are allowed.
    assert shapes == [(3, width + 1, 11), (3, width + 1, 11), (2, width + 1, 11)]
    torch.testing.assert_close(parts.batches[0]["advantages"], whole.batches[0]["advantages"])


CASES = [("model", engine) for engine in ENGINES] + [
    (case, engine) for case in ("adapter", "names", "labels") for engine in ("fsdp2", "zero3")
]
CASES += [("divergence", "ddp"), ("divergence labels", "fsdp2")]


@pytest.mark.parametrize(("case", "engine"), CASES)
def test_an_engine_is_one_process(case: str, engine: str, engines: Any, tmp_path: Path) -> None:
    """Whatever the teacher is: a model, the base of an adapter, a name, or two of which a rank needs one only."""
    if case == "adapter":
        pytest.importorskip("peft")
    for name, model in (("student", tiny_trl.model()), ("teacher", another(1))):
        model.save_pretrained(tmp_path / name)
        tiny_trl.tokenizer().save_pretrained(tmp_path / name)
    ranks = engines.run(engine, on_an_engine, engine, str(tmp_path / "whole"), case)
    one = on_an_engine(0, "", str(tmp_path / "one"), case)
    for found in ranks:
        assert found["weights"].keys() == one["weights"].keys()
        for name, weight in found["weights"].items():
            # AdamW moves a weight by the learning rate, whatever the size of its gradient: 2e-3 in two steps.
            torch.testing.assert_close(weight, one["weights"][name], rtol=0, atol=2e-5, msg=name)
    for entry, expected in zip(ranks[0]["log"][:2], one["log"][:2], strict=True):
        for name in ("loss", "grad_norm", *(name for name in expected if name.startswith("fire/"))):
            assert entry[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    if case == "model":
        checkpoint = str(tmp_path / "whole" / "checkpoint-1")
        again = engines.run(engine, on_an_engine, engine, str(tmp_path / "again"), case, checkpoint)
        for name, weight in again[0]["weights"].items():
            torch.testing.assert_close(weight, ranks[0]["weights"][name], rtol=0, atol=1e-6, msg=name)
