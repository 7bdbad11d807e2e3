"""TRL's GRPO trainer with LEAF span advantages, or as it is, on a tiny model; no download, under a minute on a CPU.

    python examples/trl_leaf.py                        # LeafGRPOTrainer
    python examples/trl_leaf.py --advantages grpo      # GRPOTrainer

The task and the model are those of ``grpo_lora.py``: sums, answered step by step. Only the trainer's class differs.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from datasets import Dataset
from running_sums import (
    END_TOKEN,
    PAD_TOKEN,
    TOKEN_TO_ID,
    build_model,
    decode,
    draw_prompt,
    greedy_accuracy,
    score,
    seed_everything,
    warm_up,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from leafkernels.integrations.trl import LeafGRPOConfig, LeafGRPOTrainer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--advantages", choices=("leaf", "grpo"), default="leaf", help="credit (default: leaf)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, prompts and draws (default: 0)")
    parser.add_argument("--steps", type=int, default=60, help="reinforcement-learning steps (default: 60)")
    parser.add_argument("--warmup-steps", type=int, default=400, help="supervised steps before (default: 400)")
    parser.add_argument("--terms", type=int, default=4, help="terms in each sum (default: 4)")
    parser.add_argument("--share-prefixes", action="store_true", help="leaf: run what completions share once")
    args = parser.parse_args()
    if args.steps < 1 or args.warmup_steps < 1:
        parser.error("--steps and --warmup-steps must be at least 1")
    if not 3 <= args.terms <= 10:
        parser.error("--terms must lie between 3 and 10")
    return args


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character of the task."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_TO_ID, unk_token=PAD_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def right_sum(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 if the answer ends in the right number; from the ids, because texts come without the end token."""
    return [score(prompt, decode(ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)]


def main() -> None:
    args = parse_args()
    rng = seed_everything(args.seed)
    held_out = [draw_prompt(rng, args.terms, held_out=True) for _ in range(200)]
    model = build_model()
    for step, loss in warm_up(model, rng, num_terms=[args.terms], steps=args.warmup_steps):
        if step == args.warmup_steps:
            print(f"supervised warm-up: {step} steps, loss {loss:.3f}")
    before = greedy_accuracy(model, held_out)

    is_leaf = args.advantages == "leaf"
    options = {"num_boundaries": 2, "share_prefixes": args.share_prefixes} if is_leaf else {}
    prompts = [draw_prompt(rng, args.terms, held_out=False) for _ in range(8 * args.steps)]
    with tempfile.TemporaryDirectory() as folder:
        config = (LeafGRPOConfig if is_leaf else GRPOConfig)(
            output_dir=folder,
            seed=args.seed,
            max_steps=args.steps,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=8 * args.terms,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **options,
        )
        trainer = (LeafGRPOTrainer if is_leaf else GRPOTrainer)(
            model,
            right_sum,
            config,
            Dataset.from_dict({"prompt": prompts}),
            processing_class=build_tokenizer(),
        )
        trainer.train()

    history = [line for line in trainer.state.log_history if "reward" in line]
    print(
        f"{args.advantages} advantages, mean reward, first {history[0]['reward']:.3f}, last {history[-1]['reward']:.3f}"
    )
    if is_leaf:
        print(f"share of tokens with span credit, last {history[-1]['leaf/span_credit_share']:.3f}")
    print(f"greedy held-out accuracy, before {before:.3f}, after {greedy_accuracy(model, held_out):.3f}")


if __name__ == "__main__":
    main()
