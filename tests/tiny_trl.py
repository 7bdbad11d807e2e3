"""TRL's trainer on a model of a few thousand weights, offline, with sampled or scripted completions.

As a script it is one of two ranks: it trains a step on its half of a batch and saves what became of it.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from leafkernels.integrations.trl import LeafGRPOConfig, LeafGRPOTrainer

TOKENS = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]
PAD, EOS = 0, 1
LONGEST = 10


def tokenizer() -> PreTrainedTokenizerFast:
    whole = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=whole, padding_side="left", model_input_names=names, **special)


def model(**changes: Any) -> Qwen2ForCausalLM:
    """Weights large enough that log-probabilities are far apart, so that rounding cannot move a boundary."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    config = {
        "vocab_size": len(TOKENS),
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    return Qwen2ForCausalLM(Qwen2Config(**{**sizes, **special, **config, **changes}))


def count_a(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that rises with what a short answer can do; small integers are exact in every mean."""
    return [float(ids.count(TOKENS.index("a"))) for ids in completion_ids]


def picky(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """A reward that cannot score every fifth answer."""
    return [None if sum(ids) % 5 == 4 else float(sum(ids) % 4) for ids in completion_ids]


def only_of_group_2(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Rewards that are equal for all scripted rows of the first call but those of its third group."""
    rows = scripted_rows(0, 2, 4)
    return [float(rows.index(ids)) if ids in rows else 1.0 for ids in completion_ids]


def config(folder: Path | str, kind: type = LeafGRPOConfig, **changes: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": LONGEST,
        "max_steps": 3,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return kind(output_dir=str(folder), **{**settings, **changes})


def trainer(kind: type, args: Any, reward: Any = count_a, policy: Any = None, **more: Any) -> Any:
    prompts = Dataset.from_dict({"prompt": ["ab", "abc", "bcd", "dd", "cab", "h"] * 4})
    return kind(model() if policy is None else policy, reward, args, prompts, processing_class=tokenizer(), **more)


def scripted_rows(call: int, group: int, size: int) -> list[list[int]]:
    """Completions of two families with a stem each, some cut off at LONGEST, some the same, some short."""
    rng = random.Random(f"{call} {group}")

    def draw(count: int) -> list[int]:
        return [rng.randrange(3, len(TOKENS)) for _ in range(count)]

    stems = [draw(5), draw(5)]
    rows: list[list[int]] = []
    for i in range(size):
        if rows and rng.random() < 0.15:
            rows.append(rng.choice(rows))
            continue
        # All groups but the first are shorter, so that ranks differ in width.
        length = rng.choice([2, 6, 7, 8] if group else [2, 6, 8, LONGEST, LONGEST])
        row = (stems[i % 2][: rng.choice([3, 5, 5])] + draw(LONGEST))[:length]
        rows.append(row if length == LONGEST else [*row, EOS])
    return rows


def script(policy: Any, group: int, first_row: int = 0) -> Any:
    """Let ``policy`` say the scripted rows of groups of size ``group``, from global row ``first_row`` on."""
    calls = 0

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        nonlocal calls
        numbers = range(first_row, first_row + len(input_ids))
        rows = [scripted_rows(calls, i // group, group)[i % group] for i in numbers]
        calls += 1
        width = max(map(len, rows))
        padded = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        return torch.cat([input_ids, padded], 1)

    policy.generate = generate
    return policy


class Recorded(LeafGRPOTrainer):
    """Keeps every batch, with an independent computation of its log-probabilities, and every split of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Any]] = []
        self.splits: list[dict[str, Any]] = []

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        sequences = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        tokens = batch["completion_ids"].shape[1]
        with torch.no_grad():
            raw = self.accelerator.unwrap_model(self.model)
            logits = raw(input_ids=sequences, attention_mask=attention).logits[:, -tokens - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
        mode = "train" if self.model.training else "eval"
        metrics = {name: values[-1] for name, values in self._metrics[mode].items() if values}
        rewards = self._rewards_per_function.clone()
        table = list(self._logs["advantages"])
        self.batches.append({**batch, "logprobs": logprobs, "rewards": rewards, "metrics": metrics, "table": table})
        return batch

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        self.splits.append(dict(inputs))
        return super()._compute_loss(model, inputs)


def one_step(folder: str, rows: int, scale: str, first_row: int = 0, reward: str = "picky", **changes: Any) -> Recorded:
    """A step of groups of four, one of which straddles two ranks of six rows."""
    changes = {
        "per_device_train_batch_size": rows,
        "max_steps": 1,
        "scale_rewards": scale,
        "report_every": 5,
        **changes,
    }
    args = config(folder, **changes)
    run = trainer(Recorded, args, globals()[reward], script(model(), 4, first_row))
    run.train()
    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    (rank, out, scale) = (int(sys.argv[1]), sys.argv[2], sys.argv[3])
    run = one_step(f"{out}.run", 6, scale, 6 * rank, **(json.loads(sys.argv[4]) if sys.argv[4:] else {}))
    torch.save(run.batches, out)
    weights = [weight.detach() for weight in run.accelerator.unwrap_model(run.model).parameters()]
    torch.save((weights, run.state.log_history), f"{out}.after")
    torch.distributed.destroy_process_group()
