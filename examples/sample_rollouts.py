"""Train the tiny running-sums model until it is partly right, sample groups of rollouts, and write them down.

    python examples/sample_rollouts.py --out sample_rollouts.jsonl.gz

Each line of the gzip file is one group: the prompt, and per completion its token ids, the log-probability of every
token under the model that drew it, the tokens as text, and the reward. The end token is part of each completion.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from running_sums import (
    TOKENS,
    build_model,
    draw_prompt,
    greedy_accuracy,
    sample,
    seed_everything,
    token_logprobs,
    warm_up,
)
from transformers import LlamaForCausalLM

NUM_TERMS = (3, 6, 8, 10)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="gzip-compressed JSON-lines file to write")
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts to sample for (default: 24)")
    parser.add_argument("--rollouts", type=int, default=40, help="completions per prompt (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the tasks and the draws (default: 0)")
    parser.add_argument("--target-reward", type=float, default=0.5, help="stop training at this mean (default: 0.5)")
    parser.add_argument("--max-steps", type=int, default=2400, help="stop training here at the latest (default: 2400)")
    args = parser.parse_args()
    for name in ("prompts", "rollouts", "max_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def held_out_prompts(seed: int, count: int) -> list[str]:
    """Draw ``count`` different prompts, going round the lengths in ``NUM_TERMS``."""
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    # Going on to the next length after a repeat too keeps a length that has run out from blocking the others.
    for num_terms in cycle(NUM_TERMS):
        if len(prompts) == count:
            break
        prompts[draw_prompt(rng, num_terms, held_out=True)] = None
    return list(prompts)


def by_length(prompts: list[str]) -> list[list[str]]:
    """Split the prompts into batches of equal length, which is what ``sample`` takes."""
    return [[prompt for prompt in prompts if len(prompt) == length] for length in sorted(set(map(len, prompts)))]


def sampled_reward(model: LlamaForCausalLM, prompts: list[str]) -> float:
    """Return the mean reward of four samples per prompt."""
    rewards = torch.cat([sample(model, batch, 4).rewards for batch in by_length(prompts)])
    return rewards.mean().item()


def train(args: argparse.Namespace, rng: random.Random, console: Console) -> LlamaForCausalLM:
    """Train until sampled answers to held-out prompts, other than those written out, reach the target reward."""
    model = build_model()
    probe = held_out_prompts(args.seed + 1, 64)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=args.target_reward, note="")
        for step, loss in warm_up(model, rng, num_terms=NUM_TERMS, steps=args.max_steps):
            if step % 50:
                continue
            reward = sampled_reward(model, probe)
            model.train()
            progress.update(task, completed=reward, note=f"step {step}, loss {loss:.3f}, mean reward {reward:.2f}")
            if reward >= args.target_reward:
                break
    return model


@torch.no_grad()
def sample_group(model: LlamaForCausalLM, prompt_id: str, prompt: str, num_rollouts: int) -> dict[str, Any]:
    """Sample one group and return its line of the file."""
    rollouts = sample(model, [prompt], num_rollouts)
    logprobs = token_logprobs(model, rollouts)
    completions = []
    for row in range(num_rollouts):
        mask = rollouts.response_mask[row]
        token_ids = rollouts.token_ids[row][mask].tolist()
        completions.append(
            {
                "token_ids": token_ids,
                "logprobs": [round(value, 6) for value in logprobs[row][mask].tolist()],
                "reward": rollouts.rewards[row].item(),
                "tokens": [TOKENS[index] for index in token_ids],
            }
        )
    return {"prompt_id": prompt_id, "prompt": prompt, "completions": completions}


def write_groups(groups: list[dict[str, Any]], out: Path) -> None:
    """Write the groups under a temporary name and rename, so that ``out`` is either whole or untouched."""
    text = "".join(json.dumps(group, separators=(",", ":")) + "\n" for group in groups)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        # Without a time stamp the same groups always give the same bytes.
        partial.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def shared_prefix(rows: list[list[int]]) -> int:
    """Return how many leading tokens all rows have in common."""
    return len(os.path.commonprefix(rows))


def longest_pair_prefix(rows: list[list[int]]) -> int:
    """Return the most leading tokens that two different rows share."""
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[:i] if a != b]
    return max((shared_prefix([a, b]) for a, b in pairs), default=0)


def report(groups: list[dict[str, Any]], console: Console) -> None:
    """Print what a reader should know before trusting the file."""
    completions = [completion for group in groups for completion in group["completions"]]
    logprobs = torch.tensor([value for completion in completions for value in completion["logprobs"]])
    lengths = [len(completion["token_ids"]) for completion in completions]
    kinds: Counter[str] = Counter()
    prefixes, pair_prefixes = [], []
    for group in groups:
        rewards = {completion["reward"] for completion in group["completions"]}
        kinds["mixed" if len(rewards) > 1 else f"all {rewards.pop():g}"] += 1
        rows = [completion["token_ids"] for completion in group["completions"]]
        prefixes.append(shared_prefix(rows))
        pair_prefixes.append(longest_pair_prefix(rows))
    mean_reward = sum(completion["reward"] for completion in completions) / len(completions)
    console.print(f"{len(groups)} groups, {len(completions)} completions of {min(lengths)} to {max(lengths)} tokens")
    console.print(f"mean reward {mean_reward:.3f}; groups by reward: {dict(kinds)}")
    console.print(
        f"logprobs: largest {logprobs.max():.6f}, mean {logprobs.mean():.4f}; "
        f"mean probability {logprobs.exp().mean():.4f}"
    )
    console.print(
        f"tokens shared by a whole group: {sum(prefixes) / len(groups):.1f} on average; "
        f"by the closest two different rollouts: {sum(pair_prefixes) / len(groups):.1f}"
    )


def main() -> None:
    args = parse_args()
    console = Console()
    model = train(args, seed_everything(args.seed), console)
    prompts = held_out_prompts(args.seed, args.prompts)
    accuracy = sum(greedy_accuracy(model, batch) * len(batch) for batch in by_length(prompts)) / len(prompts)
    groups = [sample_group(model, f"p{index:02d}", prompt, args.rollouts) for index, prompt in enumerate(prompts)]
    console.print(f"greedy accuracy on the held-out prompts {accuracy:.3f}")
    report(groups, console)
    write_groups(groups, args.out)
    console.print(f"wrote {args.out}, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
