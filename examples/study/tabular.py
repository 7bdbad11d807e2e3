"""When does credit by spans help? A policy that is a table, so that a run of 128 seeds takes about a second.

    python examples/study/tabular.py            # all settings, into results/runs.jsonl.gz; finished ones are kept

An answer is a row of decisions, each drawn from its own softmax over a few options; one option of each is right. All
seeds of a setting are trained at once, each as a prompt of its own in one call of the estimator. What is measured is
the policy's exact expected reward, averaged over the training steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from runs import Runs
from torch import Tensor

import leafkernels

METHODS = ("grpo", "dr_grpo", "tempo", "leaf")
# What of LEAF does it? Added after the first sweep was seen, and run for the sharpness of the first table alone.
VARIANTS: dict[str, dict[str, Any]] = {
    "leaf": {},
    "leaf, no z-score": {"normalize": "reward_std"},
    "leaf, power 0": {"multiplicity_power": 0.0},
    "leaf, global term": {"terms": "global"},
    "leaf, local term": {"terms": "local"},
    "leaf, power 0, no z-score": {"multiplicity_power": 0.0, "normalize": "reward_std"},
    "leaf, global term, no z-score": {"terms": "global", "normalize": "reward_std"},
    "leaf, global term, power 0": {"terms": "global", "multiplicity_power": 0.0},
    # By a law of the estimator this is Dr. GRPO, up to the common scale: a test of all that is around it.
    "leaf, global term, power 0, no z-score": {
        "terms": "global",
        "multiplicity_power": 0.0,
        "normalize": "reward_std",
    },
    "leaf, local term, power 0, no z-score": {"terms": "local", "multiplicity_power": 0.0, "normalize": "reward_std"},
    "leaf, leave one out": {"leave_one_out": True},
    "leaf, leave one out, no z-score": {"leave_one_out": True, "normalize": "reward_std"},
}
RUNS = Runs(Path(__file__).resolve().parent)


@dataclass(frozen=True)
class Setting:
    reward: str = "prefix"  # prefix, fraction, all, or first_M: whether the first M are right
    decisions: int = 8
    options: int = 4
    rollouts: int = 8
    boundaries: int = 2
    warm: float = 0.0  # what is added to the first logit of each right option: how often the first table is right
    sharpness: float = 1.0  # standard deviation of the first logits: the sharper, the longer are shared prefixes
    temperature: float = 1.0  # of sampling and of the loss; the reward is that at temperature 1
    rescale: bool = True  # advantages of each seed and step to a root mean square of 1
    steps: int = 200
    learning_rate: float = 0.1
    seeds: int = 128


# From an even table, eight right decisions at once are never seen.
BASES = [Setting(reward="prefix"), Setting(reward="fraction"), Setting(reward="all", warm=2.0)]


def settings() -> list[Setting]:
    """Vary one factor at a time, for three rewards, and how many of the first decisions the reward hangs on."""
    found: dict[Setting, None] = {}
    for base in BASES:
        # What an earlier try reported: eight decisions of four options, K = 8, B = 2, Adam; the rest was not told.
        for sharpness in (0.0, 1.0):
            for learning_rate in (0.03, 0.1):
                first = replace(base, warm=0.0, sharpness=sharpness, learning_rate=learning_rate)
                found[replace(first, rescale=False)] = found[first] = None
        factors: dict[str, tuple[float, ...]] = {
            "warm": (0.0, 1.0, 2.0, 3.0),
            "decisions": (4, 8, 16, 32),
            "options": (2, 4, 8),
            "rollouts": (4, 8, 16, 32, 64),
            "boundaries": (1, 2, 4, 7),
            "sharpness": (0.0, 1.0, 2.0, 3.0),
            "temperature": (0.5, 1.0, 1.5, 2.0),
        }
        for name, values in factors.items():
            for value in values:
                found[replace(base, **{name: value})] = None
    for first in (1, 2, 4, 6, 8):
        found[Setting(reward=f"first_{first}", warm=1.0)] = None
    return list(found)


def methods(setting: Setting) -> list[str]:
    """Return the methods to try: those without boundaries once, and the variants for the sharpness."""
    if setting.boundaries != Setting.boundaries:
        return ["leaf"]
    varied = replace(setting, sharpness=Setting.sharpness) in BASES
    return [*METHODS, *(name for name in VARIANTS if varied and name != "leaf")]


def rewards_of(right: Tensor, reward: str) -> Tensor:
    """Reward answers, (..., decisions) bool to (...); probabilities of being right give the expected reward."""
    right = right.double()
    if reward == "prefix":
        return right.cumprod(-1).mean(-1)
    if reward == "fraction":
        return right.mean(-1)
    if reward == "all":
        return right.prod(-1)
    return right[..., : int(reward.removeprefix("first_"))].prod(-1)


def advantages(
    method: str | Callable[..., Tensor], logprobs: Tensor, token_ids: Tensor, rewards: Tensor, setting: Setting
) -> Tensor:
    if not isinstance(method, str):
        whole = torch.ones_like(token_ids, dtype=torch.bool)
        credit = method(logprobs, token_ids, rewards, response_mask=whole)
    elif method in VARIANTS:
        credit = leafkernels.span_advantages(
            logprobs, token_ids, rewards, num_boundaries=setting.boundaries, **VARIANTS[method]
        )
    else:
        credit = getattr(leafkernels, method)(logprobs, token_ids, rewards)
    if setting.rescale:
        size = credit.square().mean((1, 2), keepdim=True).sqrt()
        credit = credit / size.masked_fill(size == 0, 1.0)
    return credit


def sample(logprobs_all: Tensor, rollouts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw answers of tables (n, decisions, options): tokens and log-probabilities, (n, rollouts, decisions) each."""
    noise = torch.rand((len(logprobs_all), rollouts, *logprobs_all.shape[1:]), generator=generator)
    with torch.no_grad():
        token_ids = (logprobs_all[:, None] - (-noise.log()).log()).argmax(-1)
    return token_ids, logprobs_all[:, None].expand_as(noise).gather(-1, token_ids[..., None])[..., 0]


def policies(
    setting: Setting, method: str | Callable[..., Tensor], first_seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits (seeds, decisions, options) before each step and after the last, and the right options.

    Methods see the same first tables, the same right options and the same noise. A step changes the logits in place.
    """
    shape = (setting.seeds, setting.decisions, setting.options)
    generator = torch.Generator().manual_seed(first_seed)
    logits = setting.sharpness * torch.randn(shape, generator=generator)
    target = torch.randint(setting.options, shape[:2], generator=generator)
    logits = logits.scatter_add(-1, target[..., None], torch.full(shape, setting.warm)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=setting.learning_rate)
    for _ in range(setting.steps):
        yield logits.detach(), target
        logprobs_all = (logits / setting.temperature).log_softmax(-1)
        token_ids, logprobs = sample(logprobs_all, setting.rollouts, generator)
        rewards = rewards_of(token_ids == target[:, None], setting.reward)
        credit = advantages(method, logprobs.detach(), token_ids, rewards, setting)
        loss = -(credit * logprobs).mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    yield logits.detach(), target


def expected_rewards(logits: Tensor, target: Tensor, reward: str) -> Tensor:
    """The exact expected reward of each table, (tables,) float64."""
    chance = logits.softmax(-1).gather(-1, target[..., None])[..., 0]
    # Decisions are drawn independently, so every reward here takes its mean through products and sums.
    return rewards_of(chance, reward)


def train(setting: Setting, method: str | Callable[..., Tensor], first_seed: int = 0) -> Tensor:
    """Return the exact expected reward of each seed before each step and after the last, (seeds, steps + 1)."""
    path = policies(setting, method, first_seed)
    return torch.stack([expected_rewards(logits, target, setting.reward) for logits, target in path], 1)


def main() -> None:
    torch.set_num_threads(1)
    done = {(json.dumps(row["setting"], sort_keys=True), row["method"]) for row in RUNS.of("tabular")}
    for setting in track(settings(), description="tabular"):
        for method in methods(setting):
            if (json.dumps(asdict(setting), sort_keys=True), method) in done:
                continue
            curve = train(setting, method)
            mean = [round(float(x), 4) for x in curve[:, :-1].mean(1)]
            RUNS.add("tabular", {"setting": asdict(setting), "method": method, "mean": mean})


if __name__ == "__main__":
    main()
