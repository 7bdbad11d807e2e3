"""The trainer of reward channels, on a tiny model whose preferences have a rule."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoders import build_model, build_tokenizer

from leafkernels.lookahead import RewardChannel, RewardTransformer, TokenRewardConfig, TokenRewardTrainer

datasets = pytest.importorskip("datasets", reason="needs datasets: pip install -e '.[trl]'")

LETTERS = "abcdefgh"


def pairs(count: int, seed: int) -> Any:
    """The better answer is of letters of the first half of the alphabet."""
    rng = random.Random(seed)

    def word(letters: str) -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(1, 5)))

    rows = [{"prompt": word(LETTERS), "chosen": word(LETTERS[:4]), "rejected": word(LETTERS[4:])} for _ in range(count)]
    return datasets.Dataset.from_list(rows)


def trainer(folder: Path, rows: Any = None, model: Any = None, **changes: Any) -> TokenRewardTrainer:
    settings = {
        "per_device_train_batch_size": 16,
        "max_steps": 20,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TokenRewardConfig(output_dir=str(folder), **{**settings, **changes})
    if model is None:
        torch.manual_seed(1)
        model = RewardTransformer(build_model("llama"), RewardChannel(3, 16, width=4))
    rows = pairs(320, 0) if rows is None else rows
    return TokenRewardTrainer(
        model, args, processing_class=build_tokenizer(), train_dataset=rows, eval_dataset=pairs(32, 1)
    )


def test_learns_what_is_preferred_and_leaves_the_model_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    before = {name: tensor.clone() for name, tensor in run.model.model.state_dict().items()}
    run.train()
    first, last = (line for line in (run.state.log_history[0], run.state.log_history[-2]))
    assert last["loss"] < 0.3 < first["loss"] and last["diff_value_acc_seq_mean"] == 1.0
    assert run.evaluate()["eval_loss"] < 0.3
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.model.state_dict().items())


def test_stops_and_goes_on(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-3"
    assert sum(file.stat().st_size for file in folder.glob("reward_channel*")) < 10_000
    assert not list(folder.glob("model*.safetensors"))
    again = trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(folder))
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in (whole, again)]
    assert losses[0][-3:] == losses[1][-3:]


def test_the_mask_is_that_of_the_answers(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    batch = run._collate([{"prompt": "ab", "chosen": "c", "rejected": "efg"}])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 1, 0, 0], [3, 4, 7, 8, 9, 1]]
    assert batch["answer_mask"].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]


def test_conversations(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.processing_class.chat_template = (
        "{% for m in messages %}{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}h{% endif %}"
    )
    rows = {
        "prompt": [{"role": "user", "content": "ab"}],
        "chosen": [{"role": "assistant", "content": "hc"}],
        "rejected": [{"role": "assistant", "content": "hef"}],
    }
    batch = run._collate([rows])
    assert batch["input_ids"].tolist() == [[3, 4, 1, 10, 5, 1, 0], [3, 4, 1, 10, 7, 8, 1]]
    assert batch["answer_mask"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, {}, "chosen and rejected must differ, got 'b' twice"),
        (
            {"prompt": "a", "text": "b"},
            {},
            r"must have the columns prompt, chosen and rejected, got \['prompt', 'text'\]",
        ),
        (
            {"prompt": "abc", "chosen": "b", "rejected": "c"},
            {"max_length": 3},
            "chosen must have a token after its prompt",
        ),
    ],
)
def test_refuses_rows(tmp_path: Path, row: dict[str, str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)._collate([row])


def test_refuses_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind must be one of .* got 'hinge'"):
        trainer(tmp_path, kind="hinge")


@pytest.mark.parametrize("with_adapter", [True, False])
def test_trains_the_model_along(tmp_path: Path, with_adapter: bool) -> None:
    """SimPO and SFT teach the model; a checkpoint holds what has learnt, and training goes on from it to the bit."""

    def start(folder: Path) -> TokenRewardTrainer:
        base = build_model("llama")
        if with_adapter:
            peft = pytest.importorskip("peft")
            torch.manual_seed(2)
            base = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
        torch.manual_seed(1)
        model = RewardTransformer(base, RewardChannel(3, 16, width=4))
        options = {"simpo_weight": 0.5, "sft_weight": 0.2, "train_model": True}
        return trainer(folder, model=model, **options, max_steps=6, save_strategy="steps", save_steps=3)

    whole = start(tmp_path / "whole")
    before = {name: tensor.clone() for name, tensor in whole.model.model.state_dict().items()}
    whole.train()
    logged = [line for line in whole.state.log_history if "loss" in line]
    assert logged[-1]["sft_loss"] < logged[0]["sft_loss"] and logged[-1]["simpo_loss"] < logged[0]["simpo_loss"]
    line = logged[0]
    total = line["reward_loss"] + 0.5 * line["simpo_loss"] + 0.2 * line["sft_loss"]
    assert line["loss"] == pytest.approx(total, rel=1e-4)
    changed = {name for name, tensor in whole.model.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora" in name for name in changed) == with_adapter
    again = start(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in (whole, again)]
    assert losses[0][-3:] == losses[1][-3:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"simpo_weight": 1.0}, r"must be 0 where the model is frozen \(train_model=False\), got 1.0 and 0.0"),
        ({"sft_weight": -1.0}, "sft_weight must be finite and at least 0, got -1.0"),
        ({"reward_weight": 0.0}, "one of reward_weight, simpo_weight, sft_weight must be positive"),
        ({"simpo_kind": "ipo"}, "kind must be one of 'sigmoid', 'hinge', got 'ipo'"),
    ],
)
def test_refuses_weights(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)
