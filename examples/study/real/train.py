"""Training with GRPO, LEAF and tree_td from one start. PROTOCOL.md, part 2: a queue that goes on where it was stopped.

    python examples/study/real/train.py --power --work runs/real      # the least difference that can be seen
    python examples/study/real/train.py --work runs/real --minutes 60
    python examples/study/real/train.py --work runs/real --masks      # part 4: top-p 0.9 with and without a mask
    python examples/study/real/train.py --work runs/real --collect    # adds what is not finished

Finished runs go to results/runs.jsonl.gz; WORK/training keeps the others, every ten steps.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from model import Policy, Sampled  # noqa: E402
from runs import Runs  # noqa: E402
from tasks import FAMILIES, SEEDS, Problem, problem  # noqa: E402

import leafkernels  # noqa: E402
from leafkernels.models import tree_logprobs  # noqa: E402

RUNS = Runs(HERE)


class Arm(NamedTuple):
    scheme: Callable[..., Tensor]
    top_p: float = 1.0  # of sampling
    masked: bool = False  # whether the policy's distribution is truncated as the sampler's was


ARMS = {
    "grpo": Arm(leafkernels.grpo),
    "leaf": Arm(leafkernels.span_advantages),
    "tree_td": Arm(leafkernels.tree_td),
    "top_p": Arm(leafkernels.grpo, 0.9),
    "top_p_mask": Arm(leafkernels.grpo, 0.9, True),
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


class Part(NamedTuple):
    """Of the protocol: its name among the results, and the runs that are of it."""

    name: str
    arms: tuple[str, ...]
    settings: Settings
    families: tuple[tuple[str, ...], ...]  # seed by seed within each of these, one after the other


SCHEMES = Part("training", ("grpo", "leaf", "tree_td"), Settings(), (TRAINED,))
MASKS = Part("training with masks", ("top_p", "top_p_mask"), Settings(steps=40), (("sorting",), ("sums",)))


def queue(part: Part) -> Iterator[tuple[Run, int]]:
    """All arms of a seed before the next, in turns as far as to the next evaluation: what stops early is paired."""
    every = part.settings.evaluate_every
    stages = range(every, part.settings.steps + 1, every)
    for families in part.families:
        for seed, family, stage, arm in itertools.product(RUN_SEEDS, families, stages, part.arms):
            yield Run(seed, family, arm), stage


@torch.no_grad()
def greedy_reward(policy: Policy, family: str, count: int) -> float:
    """Mean reward of greedy answers to problems that nothing is trained on."""
    tasks = [problem(family, "evaluated", index) for index in range(count)]
    prompts = [policy.prompt_ids(task.messages) for task in tasks]
    found = models.sample(policy, prompts, 1, FAMILIES[family].limit, temperature=0.0)
    return float(rewards_of(policy, tasks, found).double().mean())


class Rows(NamedTuple):
    """Prompts and answers in one row each, all (N, T)."""

    ids: Tensor
    there: Tensor  # prompts, padded on the left, and answers
    asked: Tensor  # answers


def in_rows(prompts: Sequence[Tensor], found: Sampled) -> Rows:
    width, count = max(map(len, prompts)), len(found.mask) // len(prompts)
    padded = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    there = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts])
    before = [part.repeat_interleave(count, 0) for part in (padded, there)]
    ids, there = torch.cat([before[0], found.token_ids], 1), torch.cat([before[1], found.mask], 1)
    return Rows(ids, there, torch.cat([torch.zeros_like(before[1]), found.mask], 1))


def rewards_of(policy: Policy, tasks: Sequence[Problem], found: Sampled) -> Tensor:
    """(N,) of the answers, those to one task one after the other."""
    count = len(found.mask) // len(tasks)
    texts = [policy.text(ids[mask].tolist()) for ids, mask in zip(found.token_ids, found.mask, strict=True)]
    return torch.tensor([tasks[row // count].score(text) for row, text in enumerate(texts)])


def update(policy: Policy, tasks: list[Problem], arm: Arm, settings: Settings, seed: int) -> float:
    """Sample, credit, and put the gradient of the loss into the adapter; the mean reward."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [policy.prompt_ids(task.messages) for task in tasks]
    limit = FAMILIES[tasks[0].family].limit
    found = models.sample(policy, prompts, settings.rollouts, limit, top_p=arm.top_p, generator=generator)
    rewards, rows = rewards_of(policy, tasks, found), in_rows(prompts, found)
    kept = found.kept.pad(rows.asked) if arm.masked and found.kept is not None else None
    asked = {"response_mask": rows.asked, "sampling_mask": kept, "entropy": False}
    logprobs = tree_logprobs(policy.model, rows.ids, rows.there, **asked).logprobs[:, max(map(len, prompts)) :]
    # A sampler that truncates has another distribution, whose log-probabilities an engine would hand over.
    old = logprobs.detach() if arm.top_p == 1.0 else found.logprobs - found.kept_mass.log()
    credit = arm.scheme(old, found.token_ids, rewards, response_mask=found.mask, group_size=settings.rollouts)
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
    parser.add_argument("--masks", action="store_true", help="the runs of part 4 in place of those of part 2")
    parser.add_argument("--power", action="store_true")
    parser.add_argument("--collect", action="store_true")
    arguments = parser.parse_args()
    part, until = MASKS if arguments.masks else SCHEMES, time.time() + 60 * arguments.minutes
    if arguments.power:
        found = []
        for family in TRAINED:
            records = rollouts.taken(arguments.work, "measured", [family])
            for seeds in (4, 8, 16):
                found.append({"family": family, "seeds": seeds, **least_difference(records, part.settings, seeds)})
        return RUNS.replace("power", found)
    done = [tuple(line["run"]) for line in RUNS.of(part.name)]
    if arguments.collect:
        states = (torch.load(path, weights_only=True) for path in sorted((arguments.work / "training").glob("*.pt")))
        histories = [state["history"] for state in states]
        return RUNS.replace(f"{part.name} so far", [of for of in histories if of["run"][2] in part.arms])
    start.make(arguments.work, start.STEPS)
    policy = models.load(arguments.work / "start")
    for run, stage in queue(part):
        if run in done or run.family not in arguments.families or time.time() > until:
            continue
        history = train(arguments.work, policy, run, part.settings, stage, until)
        if len(history["reward"]) == part.settings.steps:
            RUNS.add(part.name, history)
            (arguments.work / "training" / f"{run.name}.pt").unlink()


if __name__ == "__main__":
    main()
