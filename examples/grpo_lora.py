"""Reinforcement learning of a LoRA adapter, whole in one file, with LEAF span advantages or GRPO's flat ones.

    python examples/grpo_lora.py                        # span advantages
    python examples/grpo_lora.py --advantages grpo      # one number for each response

A tiny model first learns from worked examples to answer sums step by step, until it is right now and then. It is then
frozen, and an adapter learns from the reward alone: sample a group of rollouts for each prompt, score them, turn
rewards into advantages, take clipped policy steps. The two methods differ in that one step alone.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from running_sums import (
    Rollouts,
    build_model,
    draw_prompt,
    greedy_accuracy,
    sample,
    seed_everything,
    token_logprobs,
    warm_up,
)
from torch import Tensor

from leafkernels import policy_loss, span_advantages

CLIP = (0.2, 0.2)
INNER_UPDATES = 2
SPARKS = "▁▂▃▄▅▆▇█"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--advantages", choices=("leaf", "grpo"), default="leaf", help="credit (default: leaf)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, prompts and draws (default: 0)")
    parser.add_argument("--steps", type=int, default=100, help="reinforcement-learning steps (default: 100)")
    parser.add_argument("--num-boundaries", type=int, default=2, help="boundaries per rollout for leaf (default: 2)")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts per prompt (default: 8)")
    parser.add_argument("--prompts", type=int, default=24, help="prompts per step (default: 24)")
    parser.add_argument("--terms", type=int, default=5, help="terms in each sum (default: 5)")
    parser.add_argument("--warmup-steps", type=int, default=500, help="supervised steps before (default: 500)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the adapter (default: 1e-3)")
    parser.add_argument("--share-prefixes", action="store_true", help="run what rollouts share once, where it pays")
    args = parser.parse_args()
    for name in ("steps", "prompts", "warmup_steps", "num_boundaries"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.rollouts < 2:
        parser.error("--rollouts must be at least 2: an advantage compares a rollout with others of its group")
    if not 3 <= args.terms <= 10:
        parser.error("--terms must lie between 3 and 10")
    return args


def leaf_advantages(rollouts: Rollouts, logprobs: Tensor, group_size: int, num_boundaries: int) -> Tensor:
    """Return one advantage per span of a rollout, spread over the span's tokens, (B * G, T)."""
    return span_advantages(
        logprobs,
        rollouts.token_ids,
        rollouts.rewards,
        response_mask=rollouts.response_mask,
        group_size=group_size,
        num_boundaries=num_boundaries,
    )


def grpo_advantages(rollouts: Rollouts, group_size: int) -> Tensor:
    """Return the standardised reward of each rollout on all of its tokens, (B * G, T)."""
    rewards = rollouts.rewards.view(-1, group_size)
    # The small constant decides nothing but a group of equal rewards, whose advantages are zero.
    flat = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-6)
    return flat.view(-1, 1) * rollouts.response_mask


def add_adapter(model: Any) -> Any:
    """Freeze the model and return it with a trainable low-rank adapter on each of its linear layers."""
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def train_step(
    policy: Any, optimizer: torch.optim.Optimizer, rng: random.Random, args: argparse.Namespace
) -> tuple[float, float]:
    """Run one round of sampling and learning; return its mean reward and the share of groups with mixed rewards."""
    prompts = [draw_prompt(rng, args.terms, held_out=False) for _ in range(args.prompts)]
    rollouts = sample(policy, prompts, args.rollouts)
    with torch.no_grad():
        old_logprobs = token_logprobs(policy, rollouts, share_prefixes=args.share_prefixes)
    if args.advantages == "leaf":
        advantages = leaf_advantages(rollouts, old_logprobs, args.rollouts, args.num_boundaries)
    else:
        advantages = grpo_advantages(rollouts, args.rollouts)
    for _ in range(INNER_UPDATES):
        logprobs = token_logprobs(policy, rollouts, share_prefixes=args.share_prefixes)
        optimizer.zero_grad()
        policy_loss(logprobs, old_logprobs, advantages, rollouts.response_mask, clip=CLIP).loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    grouped = rollouts.rewards.view(args.prompts, args.rollouts)
    mixed = (grouped != grouped[:, :1]).any(dim=1).float().mean().item()
    return rollouts.rewards.mean().item(), mixed


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def buckets(values: list[float], count: int) -> list[float]:
    """Average the values over at most ``count`` consecutive stretches of nearly equal length."""
    count = min(count, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    return [mean(values[start:stop]) for start, stop in zip(edges, edges[1:], strict=False)]


def sparkline(values: list[float]) -> str:
    """Draw values between 0 and 1 as one character each."""
    return "".join(SPARKS[min(int(value * len(SPARKS)), len(SPARKS) - 1)] for value in values)


def report(
    args: argparse.Namespace, rewards: list[float], mixed: list[float], before: float, after: float, console: Console
) -> None:
    """Print the reward over the steps, its first and last tenth, and the held-out accuracy on either side."""
    table = Table(title=f"{args.advantages} advantages, seed {args.seed}")
    for column in ("step", "mean reward", "mixed groups"):
        table.add_column(column, justify="right")
    rows = list(zip(buckets(rewards, 10), buckets(mixed, 10), strict=True))
    for index, (reward, share) in enumerate(rows, start=1):
        table.add_row(str(len(rewards) * index // len(rows)), f"{reward:.3f}", f"{share:.2f}")
    console.print(table)
    tenths = [reward for reward, _ in rows]
    console.print(f"reward   {sparkline(buckets(rewards, 60))}")
    console.print(f"mean reward, first tenth {tenths[0]:.3f}, last tenth {tenths[-1]:.3f}")
    console.print(f"greedy held-out accuracy, before {before:.3f}, after {after:.3f}")


def main() -> None:
    args = parse_args()
    console = Console()
    rng = seed_everything(args.seed)
    held_out = [draw_prompt(rng, args.terms, held_out=True) for _ in range(200)]
    start = time.perf_counter()

    model = build_model()
    with Progress(console=console) as progress:
        task = progress.add_task("supervised warm-up", total=args.warmup_steps)
        for _ in warm_up(model, rng, num_terms=[args.terms], steps=args.warmup_steps):
            progress.advance(task)
    before = greedy_accuracy(model, held_out)
    warm = time.perf_counter()

    policy = add_adapter(model)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    console.print(f"adapter: {sum(w.numel() for w in trained):,} of {policy.num_parameters():,} weights are trained")
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    rewards, mixed = [], []
    with Progress(console=console) as progress:
        task = progress.add_task("policy steps", total=args.steps)
        for _ in range(args.steps):
            reward, share = train_step(policy, optimizer, rng, args)
            rewards.append(reward)
            mixed.append(share)
            progress.update(task, advance=1, description=f"policy steps, reward {reward:.2f}")
    after = greedy_accuracy(policy, held_out)
    report(args, rewards, mixed, before, after, console)
    console.print(f"warm-up {warm - start:.0f} s, policy steps {time.perf_counter() - warm:.0f} s")


if __name__ == "__main__":
    main()
