"""Training with GRPO, LEAF and tree_td from one start. PROTOCOL.md, part 2: a queue that goes on where it was stopped.

    python examples/study/real/train.py --power --work runs/real      # the least difference that can be seen
    python examples/study/real/train.py --work runs/real --minutes 60
    python examples/study/real/train.py --work runs/real --collect    # adds what is not finished

Finished runs go to results/runs.jsonl.gz; WORK/training keeps the others, every ten steps.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import model as models  # noqa: E402
import rollouts  # noqa: E402
import start  # noqa: E402
from model import Policy  # noqa: E402
from runs import Runs  # noqa: E402
from tasks import FAMILIES, SEEDS, Problem, problem  # noqa: E402

import leafkernels  # noqa: E402
from leafkernels.models import tree_logprobs  # noqa: E402

RUNS = Runs(HERE)
ARMS: dict[str, Callable[..., Tensor]] = {
    "grpo": leafkernels.grpo,
    "leaf": leafkernels.span_advantages,
    "tree_td": leafkernels.tree_td,
}
TRAINED = ("sums", "sorting")
RUN_SEEDS = range(4)


class Settings(NamedTuple):
    steps: int = 60
    prompts: int = 4
    rollouts: int = 8
    rate: float = 5e-4
    evaluated: int = 48  # problems
    evaluate_every: int = 20
    keep_every: int = 10


class Run(NamedTuple):
    seed: int
    family: str
    arm: str

    @property
    def name(self) -> str:
        return f"{self.family}-{self.arm}-{self.seed}"


def queue(settings: Settings) -> Iterator[tuple[Run, int]]:
    """All arms of a seed before the next, in turns as far as to the next evaluation: what stops early is paired."""
    stages = range(settings.evaluate_every, settings.steps + 1, settings.evaluate_every)
    return (
        (Run(seed, family, arm), stage) for seed in RUN_SEEDS for family in TRAINED for stage in stages for arm in ARMS
    )


@torch.no_grad()
def greedy_reward(policy: Policy, family: str, count: int) -> float:
    """Mean reward of greedy answers to problems that nothing is trained on."""
    tasks = [problem(family, "evaluated", index) for index in range(count)]
    prompts = [policy.prompt_ids(task.messages) for task in tasks]
    found = models.sample(policy, prompts, 1, FAMILIES[family].limit, temperature=0.0)
    rows = zip(tasks, found.token_ids, found.mask, strict=True)
    return sum(task.score(policy.text(ids[mask].tolist())) for task, ids, mask in rows) / count


def update(policy: Policy, tasks: list[Problem], scheme: Callable[..., Tensor], settings: Settings, seed: int) -> float:
    """Sample, credit, and put the gradient of the loss into the adapter; the mean reward."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [policy.prompt_ids(task.messages) for task in tasks]
    found = models.sample(policy, prompts, settings.rollouts, FAMILIES[tasks[0].family].limit, generator=generator)
    texts = [policy.text(ids[mask].tolist()) for ids, mask in zip(found.token_ids, found.mask, strict=True)]
    rewards = torch.tensor([tasks[row // settings.rollouts].score(text) for row, text in enumerate(texts)])
    width = max(map(len, prompts))
    padded = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    there = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts])
    before = [part.repeat_interleave(settings.rollouts, 0) for part in (padded, there)]
    ids, there = torch.cat([before[0], found.token_ids], 1), torch.cat([before[1], found.mask], 1)
    asked = torch.cat([torch.zeros_like(before[1]), found.mask], 1)
    logprobs = tree_logprobs(policy.model, ids, there, response_mask=asked, entropy=False).logprobs[:, width:]
    old = logprobs.detach()
    credit = scheme(old, found.token_ids, rewards, response_mask=found.mask, group_size=settings.rollouts)
    # One root mean square for all arms, so that a step's length is no part of the comparison.
    credit = credit / credit[found.mask].square().mean().sqrt().clamp_min(1e-6)
    leafkernels.policy_loss(logprobs, old, credit, found.mask).loss.backward()
    return float(rewards.mean())


def train(
    work: Path, policy: Policy, run: Run, settings: Settings, last: int | None = None, until: float = float("inf")
) -> dict[str, Any]:
    """The history of a run: of the steps up to ``last`` (all), or of those until the clock says ``until``."""
    last = settings.steps if last is None else last
    adapted = policy._replace(model=models.add_adapter(policy.model, seed=run.seed))
    weights = [weight for weight in adapted.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=settings.rate)
    history: dict[str, Any] = {"run": list(run), "reward": [], "greedy": {}}
    path = work / "training" / f"{run.name}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        for weight, kept in zip(weights, state["weights"], strict=True):
            weight.data.copy_(kept)
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    for step in range(len(history["reward"]), last + 1):
        if step % settings.evaluate_every == 0 and str(step) not in history["greedy"]:
            history["greedy"][str(step)] = round(greedy_reward(adapted, run.family, settings.evaluated), 4)
        stops = step == last or time.time() > until
        if step % settings.keep_every == 0 or stops:
            keep(path, {"weights": weights, "optimizer": optimizer.state_dict(), "history": history})
        if stops:
            break
        first = 1000 * run.seed + settings.prompts * step
        tasks = [problem(run.family, "trained", first + place) for place in range(settings.prompts)]
        optimizer.zero_grad()
        reward = update(adapted, tasks, ARMS[run.arm], settings, SEEDS["trained"] + first)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        history["reward"].append(round(reward, 5))
    adapted.model.unload()
    return history


def keep(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def least_difference(records: list[dict[str, Any]], settings: Settings, seeds: int) -> dict[str, float]:
    """Of mean sampled reward, two arms of one policy: the deviation of a pair, and what a paired t test of the seeds
    finds with power 0.8 (its level 0.05)."""
    rewards = [torch.tensor([row["reward"] for row in record["completions"]]) for record in records]
    within = float(torch.stack([of.var() for of in rewards]).mean())
    deviation = (2 * within / (settings.steps * settings.prompts * settings.rollouts)) ** 0.5
    error, free = deviation / seeds**0.5, seeds - 1
    edge = stats.t.ppf(0.975, free)
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if 1 - stats.nct.cdf(edge, free, middle) > 0.8 else (middle, high)
    return {"deviation": round(deviation, 5), "least difference": round(high * error, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop, and keep what is there, after these")
    parser.add_argument("--families", nargs="+", choices=TRAINED, default=list(TRAINED), help="for two processes")
    parser.add_argument("--power", action="store_true")
    parser.add_argument("--collect", action="store_true")
    arguments = parser.parse_args()
    settings, until = Settings(), time.time() + 60 * arguments.minutes
    if arguments.power:
        found = []
        for family in TRAINED:
            records = rollouts.taken(arguments.work, "measured", [family])
            for seeds in (4, 8, 16):
                found.append({"family": family, "seeds": seeds, **least_difference(records, settings, seeds)})
        return RUNS.replace("power", found)
    done = [tuple(line["run"]) for line in RUNS.of("training")]
    if arguments.collect:
        states = (torch.load(path, weights_only=True) for path in sorted((arguments.work / "training").glob("*.pt")))
        return RUNS.replace("training so far", [state["history"] for state in states])
    start.make(arguments.work, start.STEPS)
    policy = models.load(arguments.work / "start")
    for run, stage in queue(settings):
        if run in done or run.family not in arguments.families or time.time() > until:
            continue
        history = train(arguments.work, policy, run, settings, stage, until)
        if len(history["reward"]) == settings.steps:
            RUNS.add("training", history)
            (arguments.work / "training" / f"{run.name}.pt").unlink()


if __name__ == "__main__":
    main()
