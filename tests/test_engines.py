"""The engines of tests/engines.py are what they are called, and TRL's own trainer trains, saves and resumes there."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import tiny_trl
from engines import ENGINES, RANKS, engine_settings, trained_weights
from trl import GRPOConfig, GRPOTrainer

KINDS = {
    "ddp": ("MULTI_CPU", "DistributedDataParallel"),
    "fsdp2": ("FSDP", "FSDPQwen2ForCausalLM"),
    "zero2": ("DEEPSPEED", "DeepSpeedEngine"),
    "zero3": ("DEEPSPEED", "DeepSpeedEngine"),
}


def train(rank: int, engine: str, folder: str, resume: str | None = None) -> dict[str, Any]:
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
    ranks = engines.run(engine, train, engine, str(tmp_path / "whole"))
    expected = train(0, "", str(tmp_path / "one"))["weights"]
    for found in ranks:
        assert found["kind"] == KINDS[engine]
        assert found["stage"] == (int(engine[-1]) if engine.startswith("zero") else None)
        for name, weight in found["weights"].items():
            # AdamW moves a weight by the learning rate, whatever the size of its gradient: 2e-3 in two steps.
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-5, msg=name)
    again = engines.run(engine, train, engine, str(tmp_path / "again"), str(tmp_path / "whole" / "checkpoint-1"))
    for name, weight in again[0]["weights"].items():
        torch.testing.assert_close(weight, ranks[0]["weights"][name], rtol=0, atol=1e-6, msg=name)
