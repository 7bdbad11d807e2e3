"""Does this model learn more from a better one by FiRe-OPD than by plain distillation? PROTOCOL.md, part 5.

    python examples/study/real/fire.py --work runs/real --minutes 60      # adds to results/runs.jsonl.gz

The teacher is what GRPO makes of the start in the first steps of a run of part 2, and is kept in WORK/fire; students
are fresh adapters on the start. Finished runs are not run again; one that was cut begins anew.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import model as models  # noqa: E402
import start  # noqa: E402
import train  # noqa: E402
from model import Policy  # noqa: E402
from runs import Runs  # noqa: E402
from tasks import FAMILIES, SEEDS, Problem, problem  # noqa: E402

import leafkernels  # noqa: E402
from leafkernels.models import tree_hidden_states  # noqa: E402

RUNS = Runs(HERE)
FAMILY = "sorting"
TEACHER, TEACHER_STEPS = train.Run(0, FAMILY, "grpo"), 40
RUN_SEEDS = range(4)
LOSSES = ("sampled", "reverse KL")
PLAIN: dict[str, float] = {"drop": 0.0, "alpha": 0.0, "beta": 0.0}
WEIGHTS: dict[str, dict[str, float]] = {"plain": PLAIN, "FiRe": {}}


class Settings(NamedTuple):
    tokens: int = 3600  # of which the teacher is asked in a run
    looks: int = 2  # evaluations, at equal shares of these
    prompts: int = 4
    rollouts: int = 4
    rate: float = 5e-4
    evaluated: int = 48  # problems


class Run(NamedTuple):
    seed: int
    loss: str
    weights: str


def queue() -> Iterator[Run]:
    """All arms of a seed before the next."""
    return (Run(seed, loss, weights) for seed, loss, weights in itertools.product(RUN_SEEDS, LOSSES, WEIGHTS))


def taught(work: Path, settings: train.Settings = train.SCHEMES.settings) -> tuple[Policy, dict[str, Any]]:
    """The teacher, its adapter merged, and the history of its training: the first steps of a run of part 2."""
    policy = models.load(work / "start")
    history = train.train(work / "fire", policy, TEACHER, settings, TEACHER_STEPS)
    return merged(policy, work / "fire" / "training" / f"{TEACHER.name}.pt", TEACHER.seed), history


def merged(policy: Policy, path: Path, seed: int) -> Policy:
    """With the adapter that ``train.train`` kept."""
    adapted = models.add_adapter(policy.model, seed=seed)
    weights = (weight for weight in adapted.parameters() if weight.requires_grad)
    for weight, kept in zip(weights, torch.load(path, weights_only=True)["weights"], strict=True):
        weight.data.copy_(kept)
    return policy._replace(model=adapted.merge_and_unload().requires_grad_(False))


class Step(NamedTuple):
    """Means over a step's rollouts."""

    reward: float
    divergence: float  # reverse KL to the teacher a token, over the vocabulary, before the update
    kept: float  # share of rollouts that the filter keeps
    tokens: int


def update(student: Policy, teacher: Policy, tasks: list[Problem], run: Run, settings: Settings, seed: int) -> Step:
    """Sample from the student, ask the teacher about each token, and put the gradient of the loss into the adapter."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [student.prompt_ids(task.messages) for task in tasks]
    limit = FAMILIES[tasks[0].family].limit
    found = models.sample(student, prompts, settings.rollouts, limit, generator=generator)
    rows, before = train.in_rows(prompts, found), max(map(len, prompts))
    ours = tree_hidden_states(student.model, rows.ids, rows.there)[:, before - 1 : -1]
    with torch.no_grad():
        theirs = tree_hidden_states(teacher.model, rows.ids, rows.there)[:, before - 1 : -1]
    head, asked = teacher.model.lm_head.weight, {"response_mask": found.mask}
    apart = leafkernels.linear_divergence(ours, head, theirs, head, **asked)
    entropies = apart.student_entropy.detach(), apart.teacher_entropy
    if run.loss == "sampled":
        logprobs, of_teacher = (
            -leafkernels.linear_surprisal_entropy(states, head, found.token_ids, **asked).surprisal
            for states in (ours, theirs)
        )
        old = logprobs.detach()
        fire = leafkernels.fire_opd(old, of_teacher, *entropies, found.mask, **WEIGHTS[run.weights])
        loss = leafkernels.policy_loss(logprobs, old, fire.advantages, fire.response_mask).loss
    else:
        distance = {"divergence": apart.divergence.detach()}
        fire = leafkernels.fire_opd(None, None, *entropies, found.mask, **distance, **WEIGHTS[run.weights])
        loss = (fire.weights * apart.divergence)[fire.response_mask].sum() / fire.response_mask.sum()
    loss.backward()
    rewards = train.rewards_of(student, tasks, found)
    tokens = int(found.mask.sum())
    means = rewards.mean(), apart.divergence.detach().sum() / tokens, fire.keep.float().mean()
    return Step(*(round(float(mean), 5) for mean in means), tokens)


def distil(policy: Policy, teacher: Policy, run: Run, settings: Settings) -> dict[str, Any]:
    """The history of a run. Every step has new problems, so that what it measures was not trained on."""
    student = policy._replace(model=models.add_adapter(policy.model, seed=run.seed))
    weights = [weight for weight in student.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=settings.rate)
    steps: list[Step] = []
    greedy: list[float] = []
    asked = 0
    while len(greedy) < settings.looks:
        first = 1000 * run.seed + settings.prompts * len(steps)
        tasks = [problem(FAMILY, "distilled", first + place) for place in range(settings.prompts)]
        optimizer.zero_grad()
        steps.append(update(student, teacher, tasks, run, settings, SEEDS["distilled"] + first))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        asked += steps[-1].tokens
        if asked >= settings.tokens * (len(greedy) + 1) / settings.looks:
            greedy.append(round(train.greedy_reward(student, FAMILY, settings.evaluated), 4))
    student.model.unload()
    columns = {name: list(column) for name, column in zip(Step._fields, zip(*steps, strict=True), strict=True)}
    return {"run": list(run), "greedy": greedy, **columns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after these")
    parser.add_argument(
        "--seeds", nargs="+", type=int, choices=RUN_SEEDS, default=list(RUN_SEEDS), help="for two processes"
    )
    arguments = parser.parse_args()
    until, settings = time.time() + 60 * arguments.minutes, Settings()
    start.make(arguments.work, start.STEPS)
    teacher, history = taught(arguments.work)
    if not RUNS.of("teacher"):
        RUNS.add("teacher", history)
    policy = models.load(arguments.work / "start")
    done = [tuple(line["run"]) for line in RUNS.of("distillation")]
    for run in queue():
        if run not in done and run.seed in arguments.seeds and time.time() < until:
            RUNS.add("distillation", distil(policy, teacher, run, settings))


if __name__ == "__main__":
    main()
