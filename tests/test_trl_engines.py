"""LeafGRPOTrainer and LeafAudioGRPOTrainer on two processes, on every engine: as one process, saved and resumed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import tiny_audio
import tiny_listeners
import tiny_trl
from engines import ENGINES, RANKS, engine_settings, trained_weights
from trl import GRPOConfig, GRPOTrainer

from leafkernels.integrations.trl import LeafGRPOTrainer
from leafkernels.integrations.trl_audio import LeafAudioGRPOTrainer

# Two batches, each used twice, so that the second time ratios have left 1.
STEPS = {"max_steps": 4, "num_iterations": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
LOGGED = ("reward", "leaf/span_credit_share", "rewards/odd/nonfinite")


def odd(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Rewards that are infinite or missing for some."""
    return [{0: math.inf, 1: None}.get(sum(ids) % 7, float(sum(ids) % 4)) for ids in completion_ids]


def train(rank: int, engine: str, folder: str, resume: str | None = None) -> dict[str, Any]:
    """Twelve rows in groups of four; on two ranks the middle group lies on both. A ratio a row."""
    rows = 12 // RANKS if engine else 12
    options = {**STEPS, "importance_sampling_level": "sequence", "loss_type": "grpo", "off_policy_mask_threshold": 1e-4}
    options |= {"per_device_train_batch_size": rows, **engine_settings(engine)}
    policy = tiny_trl.script(tiny_trl.model(), 4, rows * rank)
    run = tiny_trl.trainer(LeafGRPOTrainer, tiny_trl.config(folder, **options), odd, policy)
    if resume:
        policy.generate(torch.zeros(rows, 1))  # what the steps that are skipped drew
    run.train(resume_from_checkpoint=resume)
    log = [{name: line[name] for name in LOGGED if name in line} for line in run.state.log_history[:-1]]
    return {"weights": trained_weights(run), "log": log}


def check_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert set(found) == set(expected)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(engine: str, engines: Any, tmp_path: Path) -> None:
    ranks = engines.run(engine, train, engine, str(tmp_path / "whole"))
    one = train(0, "", str(tmp_path / "one"))
    assert any("rewards/odd/nonfinite" in line for line in one["log"])
    for found in ranks:
        for line, expected in zip(found["log"], one["log"], strict=True):
            assert line == pytest.approx(expected)
        # AdamW moves a weight by the learning rate, whatever the size of its gradient: 4e-3 in four steps.
        check_weights(found["weights"], one["weights"], 2e-5)
    again = engines.run(engine, train, engine, str(tmp_path / "again"), str(tmp_path / "whole" / "checkpoint-2"))
    check_weights(again[0]["weights"], ranks[0]["weights"], 1e-6)


def train_audio(rank: int, engine: str, folder: str, kind: str, resume: str | None = None) -> dict[str, Any]:
    """As ``train``, on recordings; the encoder is frozen (under an adapter, or beside trained weights), or trained."""
    rows = 12 // RANKS if engine else 12
    options = {**STEPS, "per_device_train_batch_size": rows, "max_completion_length": 6, **engine_settings(engine)}
    model, processor = tiny_listeners.qwen2_audio()
    if kind == "frozen":
        model.model.audio_tower.requires_grad_(False)
    # One prompt twice, so that the first rank hears fewer than the second.
    dataset = tiny_audio.recordings().select([0, 0, 1, 2, 2, 3])
    changes = {"train_dataset": dataset, **({"peft_config": None} if kind != "adapter" else {})}
    args = tiny_trl.config(folder, beta=0.1 if kind == "adapter" else 0.0, shuffle_dataset=False, **options)
    run = tiny_audio.trainer(LeafAudioGRPOTrainer, args, (model, processor), **changes)
    tiny_audio.script(run, rows * rank)
    run.train(resume_from_checkpoint=resume)
    return {"weights": trained_weights(run)}


# What differs by engine: whether forwards are made together, who saves, and how the head's weight is read.
CASES = [
    "ddp-frozen",
    "fsdp2-adapter",
    "fsdp2-frozen",
    "fsdp2-trained",
    "zero2-frozen",
    "zero3-adapter",
    "zero3-frozen",
]


@pytest.mark.parametrize("case", CASES)
def test_listeners_train_as_one(case: str, engines: Any, tmp_path: Path) -> None:
    engine, kind = case.split("-")
    ranks = engines.run(engine, train_audio, engine, str(tmp_path / "whole"), kind)
    one = train_audio(0, "", str(tmp_path / "one"), kind)
    for found in ranks:
        check_weights(found["weights"], one["weights"], 2e-5)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    again = engines.run(engine, train_audio, engine, str(tmp_path / "again"), kind, checkpoint)
    check_weights(again[0]["weights"], ranks[0]["weights"], 1e-6)


# ---- the engines of tests/engines.py are what they are called, and TRL's own trainer trains, saves and resumes there


KINDS = {
    "ddp": ("MULTI_CPU", "DistributedDataParallel"),
    "fsdp2": ("FSDP", "FSDPQwen2ForCausalLM"),
    "zero2": ("DEEPSPEED", "DeepSpeedEngine"),
    "zero3": ("DEEPSPEED", "DeepSpeedEngine"),
}


def train_by_trl(rank: int, engine: str, folder: str, resume: str | None = None) -> dict[str, Any]:
    rows = {"per_device_train_batch_size": 12 // RANKS if engine else 12}
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3, **rows}
    args = tiny_trl.config(folder, GRPOConfig, **options, **engine_settings(engine))
    policy = tiny_trl.script(tiny_trl.model(), 4, 6 * rank)
    run = tiny_trl.trainer(GRPOTrainer, args, tiny_trl.count_a, policy)
    if resume:
        policy.generate(torch.zeros(6, 1))  # what the step that is skipped drew
    run.train(resume_from_checkpoint=resume)
    found = trained_weights(run)
    stage = getattr(run.accelerator.state, "deepspeed_plugin", None)
    return {
        "kind": (run.accelerator.distributed_type.value, type(run.model_wrapped).__name__),
        "stage": stage.zero_stage if stage else None,
        "weights": found,
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_one_process(engine: str, engines: Any, tmp_path: Path) -> None:
    ranks = engines.run(engine, train_by_trl, engine, str(tmp_path / "whole"))
    expected = train_by_trl(0, "", str(tmp_path / "one"))["weights"]
    for found in ranks:
        assert found["kind"] == KINDS[engine]
        assert found["stage"] == (int(engine[-1]) if engine.startswith("zero") else None)
        for name, weight in found["weights"].items():
            # AdamW moves a weight by the learning rate, whatever the size of its gradient: 2e-3 in two steps.
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-5, msg=name)
    again = engines.run(engine, train_by_trl, engine, str(tmp_path / "again"), str(tmp_path / "whole" / "checkpoint-1"))
    for name, weight in again[0]["weights"].items():
        torch.testing.assert_close(weight, ranks[0]["weights"][name], rtol=0, atol=1e-6, msg=name)
