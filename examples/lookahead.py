"""A model that slips learns to score its own tokens, and looks ahead (SLA); no download, minutes on one core.

    python examples/lookahead.py --picture lookahead.png

The task is that of ``running_sums.py``: sums, answered step by step. The teacher misremembers a quarter of all sums,
and is one too high in these two times of three; now and then it notices, and writes the step again. The model that
learns from it slips as it does. Its own samples, right ones preferred to wrong ones, teach a reward channel while the
model is frozen. Then greedy decoding, best-of-n by the channel's score, beam search and look-ahead answer problems that
no training has seen; how many tokens each of them runs for an answer stands beside.
"""

from __future__ import annotations

import argparse
import random
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from running_sums import (
    END_ID,
    END_TOKEN,
    PAD_ID,
    Rollouts,
    build_model,
    decode,
    draw_prompt,
    encode,
    sample,
    score,
    seed_everything,
    warm_up,
)
from torch import Tensor

from leafkernels.lookahead import RewardChannel, RewardTransformer, token_reward_loss

SLIPS, NOTICES = 0.65, 0.3
Heard = Callable[[int, list[int]], None] | None


def misremembers(total: int, term: int) -> bool:
    """Whether the teacher has a sum wrong: a quarter of them, by last digit and term; a checksum keeps them so."""
    return zlib.crc32(f"{total % 10}+{term}".encode()) % 4 == 0


def slipping_answer(prompt: str, rng: random.Random) -> str:
    """Work a prompt term by term, one too high in most of the sums that are misremembered."""
    first, *rest = prompt.rstrip("=").split("+")
    total, steps = int(first), []
    for term in map(int, rest):
        slips = misremembers(total, term) and rng.random() < SLIPS
        steps.append(f"{total}+{term}={total + term + slips}")
        if slips and rng.random() < NOTICES:
            steps.append(f"{total}+{term}={total + term}")
            slips = False
        total += term + slips
    return ",".join(steps) + END_TOKEN


def right_steps(text: str) -> float:
    """The share of an answer's steps that are true sums."""

    def is_right(step: str) -> bool:
        terms, _, result = step.partition("=")
        numbers = [*terms.split("+"), result]
        return all(number.isdigit() for number in numbers) and sum(map(int, numbers[:-1])) == int(result)

    steps = text.rstrip(END_TOKEN).split(",")
    return sum(map(is_right, steps)) / len(steps)


@dataclass
class Pairs:
    """Samples, and which rows of them are preferred to which: a right and a wrong answer to the same prompt."""

    rollouts: Rollouts
    chosen: Tensor  # (pairs,)
    rejected: Tensor


def draw_pairs(model: Any, prompts: Sequence[str], num_rollouts: int = 8) -> Pairs:
    """Sample answers, and pair every right one with every wrong one to the same prompt."""
    rollouts = sample(model, prompts, num_rollouts)
    return Pairs(rollouts, *preferred(rollouts.rewards.view(-1, num_rollouts)))


def preferred(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Of rewards (prompts, answers), which rows are preferred to which: those of one prompt with a higher reward."""
    prompt, better, worse = (rewards[:, :, None] > rewards[:, None]).nonzero(as_tuple=True)
    first = prompt * rewards.shape[1]
    return first + better, first + worse


def learn(
    hidden: Sequence[Tensor], mask: Tensor, chosen: Tensor, rejected: Tensor, *, kind: str, steps: int
) -> RewardChannel:
    """Teach a new channel which rows are better, from what the frozen model has at their tokens, (rows, T, D) each."""
    channel = RewardChannel(len(hidden) - 1, hidden[0].shape[-1], width=64)
    optimizer = torch.optim.Adam(channel.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        drawn = torch.randint(0, len(chosen), (32,))
        rows = torch.cat([chosen[drawn], rejected[drawn]])
        rewards = channel([states[rows] for states in hidden])
        loss = token_reward_loss(*rewards.chunk(2), *mask[rows].chunk(2), kind=kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return channel


def train_channel(model: Any, pairs: Pairs, *, kind: str = "sequence_bt", steps: int = 300) -> RewardTransformer:
    """Teach a new channel beside the frozen model which of its answers are right."""
    model.requires_grad_(False).eval()
    rollouts = pairs.rollouts
    # A frozen model computes the same in every step; RewardTransformer(...)(input_ids=...).rewards would do as well.
    with torch.no_grad():
        whole = model(input_ids=rollouts.sequences, output_hidden_states=True).hidden_states
    hidden = [states[:, -rollouts.token_ids.shape[1] :] for states in whole]
    channel = learn(hidden, rollouts.response_mask, pairs.chosen, pairs.rejected, kind=kind, steps=steps)
    return RewardTransformer(model, channel)


@dataclass
class Answers:
    """What a system answers, and how many tokens the model ran for each answer, the prompt's not counted."""

    texts: list[str]
    tokens: list[int]


def look_ahead(
    wrapped: RewardTransformer, prompts: Sequence[str], heard: Heard = None, *, min_p: float = 0.0, **options: Any
) -> Answers:
    ids = [torch.tensor(encode(prompt)) for prompt in prompts]
    limit = 4 * len(ids[0])
    found = wrapped.generate_all(ids, max_new_tokens=limit, min_p=min_p, on_commit=heard, **options)
    return Answers([decode(answer.token_ids) for answer in found], [answer.num_tokens for answer in found])


def best_of(wrapped: RewardTransformer, prompts: Sequence[str], heard: Heard = None, *, count: int) -> Answers:
    """Of ``count`` samples the one whose tokens have the highest mean reward."""
    rollouts = sample(wrapped.model, prompts, count)
    with torch.no_grad():
        rewards = wrapped(input_ids=rollouts.sequences).rewards[:, -rollouts.token_ids.shape[1] :]
    return pick_best(rollouts.texts, rewards, rollouts.response_mask, count, count)


def pick_best(texts: Sequence[str], rewards: Tensor, mask: Tensor, drawn: int, count: int) -> Answers:
    """Of the first ``count`` of ``drawn`` samples of each prompt the one whose tokens have the highest mean reward."""
    lengths = mask.sum(1)
    means = (torch.where(mask, rewards, 0.0).sum(1) / lengths).view(-1, drawn)[:, :count]
    picked = [texts[prompt * drawn + row] for prompt, row in enumerate(means.argmax(1).tolist())]
    return Answers(picked, lengths.view(-1, drawn)[:, :count].sum(1).tolist())


@torch.no_grad()
def beams(wrapped: RewardTransformer, prompts: Sequence[str], heard: Heard = None, *, count: int) -> Answers:
    """Beam search by the model's own probabilities."""
    ids = torch.tensor([encode(prompt) for prompt in prompts])
    options = {"num_beams": count, "do_sample": False, "max_new_tokens": 4 * ids.shape[1]}
    found = wrapped.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
    ended = (found == END_ID).cumsum(1) - (found == END_ID).long() > 0
    texts = [decode(row[~over & (row != PAD_ID)].tolist()) for row, over in zip(found, ended, strict=True)]
    return Answers(texts, [count * len(text) for text in texts])


System = Callable[..., Answers]
Settings = tuple[int, int, int, float]
PAPER: list[Settings] = [(2, 10, 2, 0.0), (2, 4, 2, 0.0), (2, 1, 3, 0.0)]
SURE: list[Settings] = [(2, 4, 2, 0.25), (2, 2, 3, 0.25), (2, 1, 1, 0.25), (2, 1, 3, 0.25), (3, 1, 3, 0.25)]


def name_of(settings: Settings) -> str:
    width, chunk, depth, min_p = settings
    return f"look ahead {width}, {chunk}, {depth}" + (f", min_p {min_p}" if min_p else "")


def systems(settings: Sequence[Settings], counts: Sequence[int]) -> dict[str, System]:
    """Every way to answer, by name."""
    found: dict[str, System] = {"greedy": partial(look_ahead, width=1, chunk=1, depth=0)}
    found |= {f"best of {count}": partial(best_of, count=count) for count in counts}
    found |= {f"{count} beams": partial(beams, count=count) for count in counts}
    for setting in settings:
        width, chunk, depth, min_p = setting
        found[name_of(setting)] = partial(look_ahead, width=width, chunk=chunk, depth=depth, min_p=min_p)
    return found


def measure(system: System, wrapped: RewardTransformer, prompts: Sequence[str]) -> dict[str, Any]:
    """Answers, judged: the last number right, then the share of right steps, which tells apart two wrong answers."""
    answers = system(wrapped, prompts)
    judged = [(score(prompt, text), right_steps(text)) for prompt, text in zip(prompts, answers.texts, strict=True)]
    accuracy = sum(right for right, _ in judged) / len(judged)
    return {"accuracy": accuracy, "tokens": sum(answers.tokens) / len(prompts), "judged": judged}


def win_rate(judged: Sequence[tuple[float, float]], greedy: Sequence[tuple[float, float]]) -> float:
    """Wins and half of the ties against greedy."""
    return sum((a > b) + (a == b) / 2 for a, b in zip(judged, greedy, strict=True)) / len(judged)


def clock(system: System, wrapped: RewardTransformer, prompts: Sequence[str]) -> tuple[float, float]:
    """One prompt at a time: seconds until something can be shown (median), and tokens of the answer a second."""
    first, seconds, length = [], 0.0, 0
    for prompt in prompts:
        heard: list[float] = []
        start = time.perf_counter()
        answers = system(wrapped, [prompt], lambda *_, heard=heard: heard.append(time.perf_counter()))
        end = time.perf_counter()
        first.append((heard[0] if heard else end) - start)
        seconds, length = seconds + end - start, length + len(answers.texts[0])
    return sorted(first)[len(first) // 2], length / seconds


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="tokens: run for an answer; wins: against greedy")
    table.add_column("look ahead: width, chunk, depth", no_wrap=True)
    for column in ("tokens", "right", "wins", "first chunk, ms", "tokens a second"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        numbers = f"{result['tokens']:.1f}", f"{result['accuracy']:.3f}", f"{result['wins']:.3f}"
        table.add_row(name, *numbers, f"{1000 * result['first']:.0f}", f"{result['speed']:.0f}")
    console.print(table)


def plot(axes: Any, results: dict[str, dict[str, Any]]) -> None:
    """The share of right answers by tokens run for an answer."""
    kinds = {
        "greedy": ("k*", lambda name: name == "greedy"),
        "best of n": ("C0o-", lambda name: name.startswith("best")),
        "beam search": ("C1s-", lambda name: name.endswith("beams")),
        "look ahead": ("C3x", lambda name: name.startswith("look") and "min_p" not in name),
        "look ahead where the model is unsure (min_p)": ("C2D", lambda name: "min_p" in name),
    }
    for label, (style, belongs) in kinds.items():
        found = [(result["tokens"], result["accuracy"], name) for name, result in results.items() if belongs(name)]
        axes.plot([x for x, _, _ in found], [y for _, y, _ in found], style, label=label)
        for x, y, name in found:
            if name.startswith("look"):
                short = name.removeprefix("look ahead ").partition(", min_p")[0]
                axes.annotate(short, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set(xlabel="tokens run for an answer", ylabel="share of right answers", xscale="log", ylim=(0, None))


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """One picture of it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    plot(axes, results)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, prompts and draws (default: 0)")
    parser.add_argument("--terms", type=int, default=5, help="terms in each sum (default: 5)")
    parser.add_argument("--warmup-steps", type=int, default=1500, help="supervised steps (default: 1500)")
    parser.add_argument("--prompts", type=int, default=600, help="prompts that preferences come from (default: 600)")
    parser.add_argument("--channel-steps", type=int, default=300, help="steps of the channel (default: 300)")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems (default: 200)")
    parser.add_argument("--save", type=Path, help="folder for the channel")
    parser.add_argument("--picture", type=Path, help="file for a picture, as in lookahead.png")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console()
    rng = seed_everything(args.seed)
    held_out = [draw_prompt(rng, args.terms, held_out=True) for _ in range(args.problems)]
    start = time.perf_counter()
    model = build_model()
    for _ in warm_up(model, rng, num_terms=[args.terms], steps=args.warmup_steps, teacher=slipping_answer):
        pass
    pairs = draw_pairs(model, [draw_prompt(rng, args.terms, held_out=False) for _ in range(args.prompts)])
    right = pairs.rollouts.rewards.mean().item()
    console.print(f"{len(pairs.rollouts.rewards)} samples, {right:.3f} of them right: {len(pairs.chosen)} pairs")
    if not len(pairs.chosen):
        raise SystemExit("no prompt has a right and a wrong answer: more --warmup-steps or --prompts are needed")
    wrapped = train_channel(model, pairs, steps=args.channel_steps)
    if args.save:
        wrapped.save_pretrained(args.save)
    results = {}
    for name, system in systems([*PAPER, *SURE], (2, 4, 8)).items():
        results[name] = measure(system, wrapped, held_out)
        results[name]["wins"] = win_rate(results[name]["judged"], results["greedy"]["judged"])
        results[name]["first"], results[name]["speed"] = clock(system, wrapped, held_out[:20])
    show(results, console)
    if args.picture:
        draw(results, args.picture)
    console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
