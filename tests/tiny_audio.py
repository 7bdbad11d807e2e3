"""TRL's trainer on audio, with the models of tests/tiny_listeners.py.

As a script it is one of two ranks: it trains on its half of a batch and saves what became of it.
"""

import random
import sys
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_listeners import asked, qwen2_audio, tone, wave
from tiny_trl import config

from leafkernels.integrations.trl_audio import LeafAudioGRPOTrainer

LORA = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def recordings(count: int = 12) -> Dataset:
    """Questions about tones of four lengths, as files in memory, with a column for the reward."""
    rows = [
        {
            "prompt": asked("ab?"[i % 2 :]),
            "audio": {"bytes": wave(tone(i, 0.2 + 0.4 * (i % 4)))},
            "wanted": "abcdefgh"[i % 8],
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def count_wanted(completions: list[Any], wanted: list[str], **_: Any) -> list[float]:
    """Letters up to the one that is wanted: most short answers get some."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(sum("a" <= c <= letter for c in text)) for text, letter in zip(texts, wanted, strict=True)]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": LORA, **changes})


def trainer(kind: type, args: Any, pair: tuple[Any, Any] | None = None, **changes: Any) -> Any:
    model, processor = pair or qwen2_audio()
    options = {"train_dataset": recordings(), "processing_class": processor, "peft_config": lora()}
    return kind(model, count_wanted, args, **{**options, **changes})


def script(run: Any, first_row: int) -> None:
    """Let the policy say answers that depend on the row among those of all ranks, one of them twice."""

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = []
        for number in range(first_row, first_row + len(input_ids)):
            rng = random.Random(f"{number // 4} {number % 4 % 3}")
            stem = random.Random(number // 4).choices(range(6, 14), k=3)
            answer = [*stem[: rng.choice([1, 2, 3])], *rng.choices(range(6, 14), k=2)]
            rows.append(torch.tensor([*answer, 1] + [0] * (5 - len(answer))))
        return torch.cat([input_ids, torch.stack(rows)], 1)

    run.model.generate = generate


def one_step(folder: str, rows: int, first_row: int = 0) -> dict[str, Any]:
    """A step of groups of four, one of which straddles two ranks of six rows; twice, so that ratios leave 1."""
    args = config(folder, per_device_train_batch_size=rows, max_steps=2, num_iterations=2, beta=0.1)
    args.learning_rate = 1e-3
    run = trainer(LeafAudioGRPOTrainer, args)
    batches = []
    generate = run._generate_and_score_completions
    run._generate_and_score_completions = lambda inputs: (batches.append(generate(inputs)), batches[-1])[1]
    script(run, first_row)
    run.train()
    (batch,) = batches
    found = {name: batch[name] for name in ("completion_ids", "advantages", "old_per_token_logps", "completion_mask")}
    found["encoded"] = [next(iter(prompt.encoded.values())) for prompt in batch["audio"]]
    found["weights"] = [weight.detach() for weight in run.model.parameters() if weight.requires_grad]
    found["log"] = [
        {name: line[name] for name in ("loss", "reward", "kl", "leaf/span_credit_share") if name in line}
        for line in run.state.log_history[:-1]
    ]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, out = int(sys.argv[1]), sys.argv[2]
    torch.save(one_step(f"{out}.run", 6, 6 * rank), out)
    torch.distributed.destroy_process_group()
