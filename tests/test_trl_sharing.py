"""TRL's trainers with ``share_prefixes``: what a run is without it, for fewer tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")

import tiny_distillation
import tiny_trl
from datasets import Dataset
from engines import engine_settings, trained_weights
from peft import LoraConfig
from tiny_trl import Recorded, config, count_a, script
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from leafkernels.integrations import _trl_sharing
from leafkernels.integrations.trl import LeafGRPOTrainer
from leafkernels.integrations.trl_distillation import FireOPDConfig
from leafkernels.models import tree_batch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# Long beside the answers, and of several lengths, so that there is padding on the left.
PROMPTS = ["abcdefgh" * 2 + "a" * n for n in range(4)] * 4
# Steps that are linear in the gradient, so that rounding stays rounding: AdamW makes a learning rate of it.
PLAIN = {"gradient_checkpointing": False, "optim": "sgd", "learning_rate": 0.5}


def trained(
    folder: Path | str, shares: bool, policy: Any = None, kind: type = Recorded, resume: Any = None, **changes: Any
) -> Any:
    """A run, with ``tokens``: how many the policy's layers have read for the loss."""
    more = {name: changes.pop(name) for name in ("peft_config",) if name in changes}
    prompts = changes.pop("prompts", PROMPTS)
    args = config(folder, share_prefixes=shares, shuffle_dataset=False, **{**PLAIN, **changes})
    policy = tiny_trl.model() if policy is None else policy
    if "generate" not in vars(policy):
        script(policy, 4)
    data = Dataset.from_dict({"prompt": prompts})
    run = kind(policy, count_a, args, data, processing_class=tiny_trl.tokenizer(), **more)
    run.tokens = count_tokens(policy)
    if resume:
        policy.generate(torch.zeros(args.per_device_train_batch_size, 1))  # what the step that is skipped drew
    run.train(resume_from_checkpoint=resume)
    return run


def count_tokens(model: Any, of_loss: bool = True) -> list[int]:
    """A number for each forward pass: of the loss, and not the trials and samples before it; or of all."""
    found: list[int] = []

    def count(_: Any, args: Any, __: Any) -> None:
        if torch.is_grad_enabled() or not of_loss:
            found.append(args[0].numel())

    model.get_input_embeddings().register_forward_hook(count)
    return found


def logged(run: Any, *but: str) -> list[dict[str, float]]:
    own = ("time", "runtime", "per_second", "leaf/tokens_per_node", "leaf/shared_share", *but)
    history = run.state.log_history
    return [{name: x for name, x in line.items() if not any(part in name for part in own)} for line in history]


def check_the_same(found: Any, expected: Any, *but: str) -> None:
    """Weights and logs, in a run that learns from credit that differs from token to token, and shares."""
    rows = [set(row) - {0.0} for batch in expected.batches for row in batch["advantages"].tolist()]
    assert any(len(values) > 1 for values in rows)
    assert sum(found.tokens) < 0.8 * sum(expected.tokens)
    assert max(line.get("leaf/tokens_per_node", 0.0) for line in found.state.log_history) > 1.2
    for line, other in zip(logged(found, *but), logged(expected, *but), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)
    before, moved = tiny_trl.model().state_dict(), []
    others = dict(expected.model.named_parameters())
    for name, weight in found.model.named_parameters():
        if weight.requires_grad:
            # Sums of float32 in another order, a few steps in a row.
            torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=1e-5, msg=name)
            moved.append(weight.detach() - before.get(name, 0.0))
    assert max(float(change.abs().max()) for change in moved) > 1e-2


RUNS: list[dict[str, Any]] = [
    {},
    {"num_iterations": 2, "max_steps": 4},
    {"importance_sampling_level": "sequence", "num_iterations": 2, "off_policy_mask_threshold": 1e-4},
    {"top_entropy_quantile": 0.5, "entropy_coef": 0.1},
    {"mask_truncated_completions": True, "temperature": 0.7},
    {"estimator": "tree_td"},
    {"scale_rewards": "batch", "estimator": "leaf", "terms": "local"},
    *(
        {"loss_type": name, "num_iterations": 2}
        for name in ("grpo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")
    ),
]


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_a_run_is_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    found, expected = (trained(tmp_path / str(shares), shares, **changes) for shares in (True, False))
    check_the_same(found, expected)


# Of these TRL logs means over micro-batches, which depend on who is beside whom.
BY_MICRO_BATCH = ("entropy", "clip_ratio", "kl")
PARTS: list[dict[str, Any]] = [
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4},
    {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "loss_type": "grpo"},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
]


@pytest.mark.parametrize("changes", PARTS, ids=str)
def test_micro_batches_hold_the_rows_of_a_prompt(changes: dict[str, Any], tmp_path: Path) -> None:
    found, expected = (trained(tmp_path / str(shares), shares, **changes) for shares in (True, False))
    check_the_same(found, expected, *BY_MICRO_BATCH)
    size, steps = changes["per_device_train_batch_size"], changes["gradient_accumulation_steps"]
    batches = [found.splits[start : start + steps] for start in range(0, len(found.splits), steps)]
    for parts, batch in zip(batches[:: changes.get("num_iterations", 1)], found.batches, strict=True):
        numbers = torch.cat([part["prompt_number"] for part in parts])
        assert len(torch.unique_consecutive(numbers)) == len(numbers.unique()) == size * steps // 4
        # Nothing else about a row is mixed up with another's.
        names = ("prompt_ids", "completion_ids", "advantages")
        dealt = torch.cat([torch.cat([part[name] for name in names], 1) for part in parts])
        assert sorted(dealt.tolist()) == sorted(torch.cat([batch[name] for name in names], 1).tolist())


def test_optimizer_steps_take_turns_on_prompts(tmp_path: Path) -> None:
    """Several steps a generation batch: each is of other prompts, so that curves differ; every row is used once."""
    run = trained(tmp_path, True, per_device_train_batch_size=4, steps_per_generation=4, max_steps=8)
    firsts = []
    for batch, start in zip(run.batches, (0, 4), strict=True):
        parts = run.splits[start : start + 4]
        assert all(len(part["prompt_number"].unique()) == 1 for part in parts)
        assert sorted(int(part["prompt_number"][0]) for part in parts) == [0, 1, 2, 3]
        assert "old_per_token_logps" in batch
        firsts.append([int(part["prompt_number"][0]) for part in parts])
    assert firsts[0] != firsts[1]  # they are shuffled


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_adapter_and_its_reference(beta: float, tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False)
    runs = []
    for shares in (True, False):
        torch.manual_seed(1)
        changes = {"peft_config": adapter, "beta": beta, "num_iterations": 2, "max_steps": 4}
        runs.append(trained(tmp_path / str(shares), shares, **changes))
    check_the_same(*runs)


def test_a_reference_of_its_own(tmp_path: Path) -> None:
    tiny_trl.model().save_pretrained(tmp_path / "model")
    runs = []
    for shares in (True, False):
        policy = type(tiny_trl.model()).from_pretrained(tmp_path / "model")
        runs.append(trained(tmp_path / str(shares), shares, policy, beta=0.2, max_steps=4))
    check_the_same(*runs)
    assert any(line.get("kl", 0.0) > 1e-3 for line in runs[0].state.log_history)


def test_gradient_checkpointing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which switches the trunk's cache off: rows or a mask are left to the loss, and a reason is told."""
    changes = {"gradient_checkpointing": True, "num_iterations": 2, "max_steps": 4}
    found, expected = (trained(tmp_path / str(shares), shares, **changes) for shares in (True, False))
    for weight, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)
    shared = [line["leaf/shared_share"] for line in found.state.log_history if "leaf/shared_share" in line]
    told = [line for line in caplog.messages if "rows are run one by one" in line]
    assert len(told) == len(set(told))
    assert all(shared) or any("gradient checkpointing" in line for line in told)


def test_bfloat16_is_no_further_from_the_truth(tmp_path: Path) -> None:
    """Log-probabilities under autocast, beside those of float32."""
    errors = []
    for shares in (True, False):
        run = trained(tmp_path / str(shares), shares, bf16=True, max_steps=1, learning_rate=0.0)
        batch = run.batches[0]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        with torch.no_grad():
            found = run._get_per_token_logps_and_entropies(run.model, ids, mask, batch["completion_ids"].shape[1])[0]
            logits = tiny_trl.model()(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        truth = logits[:, -found.shape[1] - 1 : -1].gather(-1, batch["completion_ids"][..., None])[..., 0]
        errors.append(((found - truth) * batch["completion_mask"]).square().mean().sqrt())
        assert run.state.log_history[0].get("leaf/shared_share", 0.0) == float(shares)
    # Roundings of other numbers, of one size.
    assert 0 < errors[0] < 1.25 * errors[1]


def test_rows_are_read_once_for_policy_and_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the old policy and the reference of a generation batch, and again for the loss, which has rows of its own."""
    read: list[int] = []

    def counted(ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        read.append(len(ids))
        return tree_batch(ids, *args, **options)

    monkeypatch.setattr(_trl_sharing, "tree_batch", counted)
    tiny_trl.model().save_pretrained(tmp_path / "model")
    policy = type(tiny_trl.model()).from_pretrained(tmp_path / "model")
    run = trained(tmp_path / "run", True, policy, beta=0.2, num_iterations=2, max_steps=4)
    # And the one that compares a model with TRL's function, for policy and reference.
    assert len(run.batches) == 2 and read == [8] * (2 + 2 + 4)


def test_evaluation(tmp_path: Path) -> None:
    found = []
    for shares in (True, False):
        run = trained(tmp_path / str(shares), shares, max_steps=1, per_device_eval_batch_size=8, num_generations_eval=2)
        found.append(run.evaluate(Dataset.from_dict({"prompt": PROMPTS[:4]})))
    assert found[0]["eval_leaf/tokens_per_node"] > 1.2
    for name in ("eval_loss", "eval_entropy", "eval_reward"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_stopped_run_goes_on(parts: int, tmp_path: Path) -> None:
    saved = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": parts}
    saved |= {"per_device_train_batch_size": 16 // parts}
    whole = trained(tmp_path / "whole", True, **saved)
    again = trained(tmp_path / "again", True, resume=str(tmp_path / "whole" / "checkpoint-1"), **saved)
    alone = trained(tmp_path / "alone", False, resume=str(tmp_path / "whole" / "checkpoint-1"), **saved)
    for weight, other, third in zip(*(run.model.parameters() for run in (again, whole, alone)), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-7)
        torch.testing.assert_close(weight, third, rtol=1e-4, atol=1e-5)


def test_what_shares_nothing_is_left_to_trl(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"prompts": ["a", "b", "c", "d"] * 4, "max_completion_length": 24, "learning_rate": 0.05}
    policies = [apart(script(tiny_trl.model(), 4)) for _ in range(2)]
    found, expected = (trained(tmp_path / str(s), s, policies[s], **changes) for s in (True, False))
    lines = [line for line in found.state.log_history if "leaf/shared_share" in line]
    assert lines and not any(line["leaf/shared_share"] for line in lines)
    assert all(line["leaf/tokens_per_node"] == 1 for line in lines)
    assert caplog.text.count("the rows share too little") == 1
    for weight, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)


def distilled(folder: Path, shares: bool, teachers: Any, **changes: Any) -> Any:
    args = config(folder, FireOPDConfig, share_prefixes=shares, num_generations=4, **{**PLAIN, **changes})
    teachers = teachers()
    models = teachers.values() if isinstance(teachers, dict) else [teachers]
    tokens = [count_tokens(model, of_loss=False) for model in models]
    run = tiny_distillation.Recorded(
        script(tiny_trl.model(), 4),
        teachers,
        args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "teacher": ["one", "two"] * 8}),
        processing_class=tiny_trl.tokenizer(),
    )
    run.tokens = count_tokens(run.model)
    generate = run._generate_and_score_completions

    def counted(inputs: Any) -> Any:
        batch = generate(inputs)
        if len(run.batches) == 1:  # in which models were tried on a few tokens
            for found in tokens:
                found.clear()
        return batch

    run._generate_and_score_completions = counted
    run.train()
    run.read = sum(map(sum, tokens))
    return run


@pytest.mark.parametrize("changes", [{}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}], ids=str)
def test_students_and_teachers(changes: dict[str, Any], tmp_path: Path) -> None:
    def two() -> Any:
        return {"one": tiny_distillation.another(1), "two": tiny_distillation.another(2)}

    found, expected = (distilled(tmp_path / str(shares), shares, two, **changes) for shares in (True, False))
    assert found.read < 0.7 * expected.read
    check_the_same(found, expected, *(BY_MICRO_BATCH if changes else ()))


def test_a_teacher_of_a_part_of_the_ids_is_run_by_rows(tmp_path: Path) -> None:
    """Its distribution is over the ids that both know."""

    def padded() -> Any:
        return tiny_distillation.another(1, vocab_size=16)

    found, expected = (distilled(tmp_path / str(shares), shares, padded) for shares in (True, False))
    assert found.read == expected.read
    check_the_same(found, expected)


def test_a_teacher_equal_to_the_student_teaches_nothing(tmp_path: Path) -> None:
    plain = {"fire_drop": 0.0, "fire_alpha": 0.0, "fire_beta": 0.0, "max_steps": 1}
    run = distilled(tmp_path, True, tiny_trl.model, **plain)
    assert not any(gradient.any() for gradient in run.gradients[0])


def apart(policy: Any, first_row: int = 0, kept: int = 0) -> Any:
    """Let the answers of all rows but the first ``kept`` be long, and begin with different tokens."""
    scripted, columns = policy.generate, torch.arange(24)

    def generate(input_ids: torch.Tensor, **more: Any) -> torch.Tensor:
        found = scripted(input_ids, **more)[:, input_ids.shape[1] :]
        found = torch.nn.functional.pad(found, (0, 24 - found.shape[1]), value=tiny_trl.PAD)
        numbers = torch.arange(first_row, first_row + len(found))[:, None]
        others = 3 + (numbers + columns * (1 + numbers % 3)) % 8
        return torch.cat([input_ids, torch.where(numbers < kept, found, others)], 1)

    policy.generate = generate
    return policy


def on_an_engine(rank: int, engine: str, folder: str, shares: bool) -> dict[str, Any]:
    """Two groups of four, one a rank; those of the second rank share next to nothing, and run as rows."""
    rows = 4 if engine else 8
    changes = {"per_device_train_batch_size": rows, "max_steps": 4, "shuffle_dataset": False, "num_iterations": 2}
    changes |= {"max_completion_length": 24, "learning_rate": 0.05}
    args = config(folder, share_prefixes=shares, **{**PLAIN, **changes, **engine_settings(engine)})
    policy = script(tiny_trl.model(), 4, rows * rank)
    apart(policy, rows * rank, 4)
    data = Dataset.from_dict({"prompt": ["abcdefgh" * 2, "h"] * 8})
    run = LeafGRPOTrainer(policy, count_a, args, data, processing_class=tiny_trl.tokenizer())
    run.train()
    lines = [line for line in run.state.log_history if "loss" in line]
    return {"weights": trained_weights(run), "shared": [line.get("leaf/shared_share") for line in lines]}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_ranks_that_choose_differently(engine: str, engines: Any, tmp_path: Path) -> None:
    ranks = engines.run(engine, on_an_engine, engine, str(tmp_path / "two"), True)
    one = on_an_engine(0, "", str(tmp_path / "one"), False)
    for found in ranks:
        for name, weight in found["weights"].items():
            torch.testing.assert_close(weight, one["weights"][name], rtol=1e-4, atol=1e-5, msg=name)
    if engine == "ddp":
        assert [found["shared"] for found in ranks] == [[1.0] * 4, [0.0] * 4]
    if engine in ("fsdp2", "zero3"):  # every forward pass is one of all ranks, and the slowest is waited for
        assert [found["shared"] for found in ranks] == [[1.0] * 4] * 2


def test_a_model_that_trl_counts_other_positions_for_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 11, "initializer_range": 0.3}
    policy = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=1, pad_token_id=0))
    message = r"^share_prefixes must be False with GPT2LMHeadModel: its log-probabilities differ by .* no positions$"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, True, policy, num_iterations=2)


class Normalised(type(tiny_trl.model())):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm = nn.BatchNorm1d(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cast_lm_head_to_fp32": True}, "^share_prefixes must be False with cast_lm_head_to_fp32=True"),
        ({"ddp_broadcast_buffers": True}, "^ddp_broadcast_buffers must be None or False with share_prefixes=True"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, True, **changes)


def test_models_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^share_prefixes must be False with a model that .* got norm: it would see"):
        trained(tmp_path, True, Normalised(tiny_trl.model().config))
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    mixed = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**{**tiny_trl.model().config.to_dict(), **sizes, "model_type": "qwen3_moe"})
    )
    with pytest.raises(ValueError, match=r"^share_prefixes must be False with a router's loss"):
        trained(tmp_path, True, mixed, router_aux_loss_coef=0.1)


class Deaf(LeafGRPOTrainer):
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        ids = args[0]
        logits = model(input_ids=ids, attention_mask=args[1]).logits[:, -args[2] - 1 : -1].log_softmax(-1)
        return logits.gather(-1, ids[:, -args[2] :, None])[..., 0], torch.zeros(ids[:, -args[2] :].shape), None


def test_a_loss_that_does_not_ask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"^share_prefixes must be False with Deaf in TRL .*: its loss does not call"
    ):
        trained(tmp_path, True, kind=Deaf)
