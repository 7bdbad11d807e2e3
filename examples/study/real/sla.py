"""Does this model answer better when it looks ahead with a reward of its own? PROTOCOL.md, part 5.

    python examples/study/real/sla.py --work runs/real --minutes 60      # adds to results/runs.jsonl.gz

Answers and channels are kept in WORK/sla; what is there, and what has been answered, is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import model as models  # noqa: E402
import rollouts  # noqa: E402
import start  # noqa: E402
from model import Policy  # noqa: E402
from runs import Runs  # noqa: E402
from tasks import FAMILIES, SEEDS, Problem, problem  # noqa: E402

from leafkernels.lookahead import RewardChannel, RewardTransformer, token_reward_loss  # noqa: E402

RUNS = Runs(HERE)
PREFERRED, ANSWERS = 32, 8  # problems of each family that preferences come from, and answers to each
ANSWERED, SAMPLES = 48, 4  # problems of each family that are answered, and samples of each for best of n
STEPS, PAIRS, RATE, WIDTH = 100, 16, 1e-3, 64  # of the channel
NOTHING = "nothing learnt"
GREEDY: dict[str, Any] = {"width": 1, "chunk": 1, "depth": 0}
MAIN: dict[str, Any] = {"width": 2, "chunk": 1, "depth": 3, "min_p": 0.25}
PAPER: dict[str, Any] = {"width": 2, "chunk": 10, "depth": 2}
Record = dict[str, Any]


class Unit(NamedTuple):
    """One family answered in one way."""

    family: str
    system: str  # "greedy", "samples", "look ahead" or "paper's forks"
    channel: str = ""  # "known": of all families; "held out": of the others; or one that has learnt nothing

    @property
    def learnt_from(self) -> tuple[str, ...]:
        return tuple(name for name in FAMILIES if self.channel == "known" or name != self.family)


def queue() -> Iterator[Unit]:
    """What decides first."""
    for family in FAMILIES:
        yield Unit(family, "greedy")
        yield Unit(family, "look ahead", "known")
        yield Unit(family, "look ahead", "held out")
        yield Unit(family, "samples")
        yield Unit(family, "look ahead", NOTHING)
    for family in FAMILIES:
        yield Unit(family, "paper's forks", "known")


def drawn(work: Path, policy: Policy, family: str, use: str, problems: int, answers: int) -> list[Record]:
    """Answers to the first problems of a use, at temperature 1; kept in WORK, a problem a line."""
    path = work / "sla" / f"{use}-{family}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = list(rollouts.read(path))
    size = rollouts.TRIES
    with path.open("a", encoding="utf-8") as file:
        for first in range(len(lines) // size * size, problems, size):
            tasks = [problem(family, use, index) for index in range(first, min(first + size, problems))]
            found = rollouts.draw(policy, tasks, answers, SEEDS[use] + first)
            for index, rows in enumerate(found, first):
                if index >= len(lines):
                    lines.append({"family": family, "use": use, "index": index, "completions": rows})
                    file.write(json.dumps(lines[-1], separators=(",", ":")) + "\n")
                    file.flush()
    return lines[:problems]


@torch.no_grad()
def hidden_states(policy: Policy, prompt: Tensor, answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """What the decoder has at the tokens of answers to one prompt, one answer after the other, (tokens, D) by layer."""
    width = max(map(len, answers))
    ids = torch.tensor([[*answer, *[policy.end] * (width - len(answer))] for answer in answers])
    live = torch.tensor([[place < len(answer) for place in range(width)] for answer in answers])
    cache = DynamicCache()
    policy.model.model(input_ids=prompt[None], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(answers))
    call = {"past_key_values": cache, "use_cache": True, "output_hidden_states": True}
    return [states[live] for states in policy.model.model(input_ids=ids, **call).hidden_states]


def distinct(record: Record) -> tuple[list[list[int]], list[float]]:
    """The different answers of a record and their rewards."""
    found = {tuple(row["token_ids"]): row["reward"] for row in record["completions"]}
    return [list(ids) for ids in found], list(found.values())


class Preferences:
    """Answers of which some are better than others of the same prompt, and what the model has at their tokens."""

    def __init__(self, policy: Policy, records: Sequence[Record]) -> None:
        self.pairs: list[list[tuple[int, int]]] = []  # of each prompt that has any: better and worse answer
        self.families: list[str] = []
        states, lengths = [], []
        for record in records:
            answers, rewards = distinct(record)
            first, places = len(lengths), range(len(answers))
            pairs = [(first + a, first + b) for a in places for b in places if rewards[a] > rewards[b]]
            if not pairs:
                continue
            self.pairs.append(pairs)
            self.families.append(record["family"])
            prompt = policy.prompt_ids(problem(record["family"], record["use"], record["index"]).messages)
            states.append([layer.bfloat16() for layer in hidden_states(policy, prompt, answers)])
            lengths += map(len, answers)
        self._layers = [torch.cat(layer) for layer in zip(*states, strict=True)]
        self._ends = torch.tensor(lengths).cumsum(0).tolist()

    def rewards(self, channel: RewardChannel, answers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(tokens,) of some answers, one after the other, and their offsets, int32."""
        spans = [torch.arange(self._ends[one - 1] if one else 0, self._ends[one]) for one in answers]
        offsets = torch.tensor([0, *map(len, spans)]).cumsum(0).to(torch.int32)
        tokens = torch.cat(spans)
        return channel([layer[tokens].float()[None] for layer in self._layers])[0], offsets


def learn(of: Preferences, families: Sequence[str], channel: RewardChannel, seed: int = 0) -> list[float]:
    """Teach a channel which answers are better, prompts of the families drawn alike; the losses."""
    prompts = [pairs for pairs, family in zip(of.pairs, of.families, strict=True) if family in families]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(channel.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses = []
    for _ in range(STEPS):
        which = torch.randint(len(prompts), (PAIRS,), generator=generator).tolist()
        chances = torch.rand(PAIRS, generator=generator).tolist()
        pairs = [prompts[at][int(chance * len(prompts[at]))] for at, chance in zip(which, chances, strict=True)]
        sides = [of.rewards(channel, side) for side in zip(*pairs, strict=True)]
        rewards, offsets = ([side[part] for side in sides] for part in (0, 1))
        masks = [torch.ones_like(side) for side in rewards]
        packed = {"chosen_cu_seqlens": offsets[0], "rejected_cu_seqlens": offsets[1]}
        loss = token_reward_loss(*rewards, *masks, **packed)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(channel.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(round(float(loss.detach()), 4))
    return losses


class Channels:
    """Those of a model by the families that they have learnt from; learnt where WORK has none."""

    def __init__(self, work: Path, policy: Policy) -> None:
        self._work, self._policy = work, policy
        self._preferences: Preferences | None = None

    def new(self) -> RewardChannel:
        torch.manual_seed(0)
        config = self._policy.model.config
        return RewardChannel(config.num_hidden_layers, config.hidden_size, WIDTH, eps=config.rms_norm_eps)

    def of(self, unit: Unit) -> RewardChannel:
        channel = self.new()
        if unit.channel == NOTHING:
            return channel.eval()
        path = self._work / "sla" / f"{'-'.join(unit.learnt_from)}.pt"
        if path.exists():
            channel.load_state_dict(torch.load(path, weights_only=True))
            return channel.eval()
        if self._preferences is None:
            self._preferences = Preferences(self._policy, self._records())
        prompts = sum(family in unit.learnt_from for family in self._preferences.families)
        losses = learn(self._preferences, unit.learnt_from, channel)
        line = {"families": list(unit.learnt_from), "prompts": prompts, "losses": losses}
        RUNS.add("channels", line)
        partial = path.with_suffix(".partial")
        torch.save(channel.state_dict(), partial)
        os.replace(partial, path)
        return channel.eval()

    def _records(self) -> list[Record]:
        """The rollouts of part 1's measured prompts, and answers to problems that were not chosen."""
        records = rollouts.taken(self._work, "measured")
        for family in FAMILIES:
            records += drawn(self._work, self._policy, family, "preferred", PREFERRED, ANSWERS)
        return records


def looked_ahead(
    policy: Policy, channel: RewardChannel, tasks: Sequence[Problem], options: dict[str, Any]
) -> dict[str, Any]:
    """Answers to problems of one family, judged, with the tokens that were run for each, the prompt's not counted."""
    wrapped = RewardTransformer(policy.model, channel)
    prompts = [policy.prompt_ids(task.messages) for task in tasks]
    limit = FAMILIES[tasks[0].family].limit
    found = wrapped.generate_all(prompts, max_new_tokens=limit, eos_token_ids=policy.end, **options)
    texts = [policy.text(one.token_ids) for one in found]
    return {
        "answers": texts,
        "rewards": [round(task.score(text), 4) for task, text in zip(tasks, texts, strict=True)],
        "tokens": [one.num_tokens for one in found],
        "forwards": [one.num_forwards for one in found],
    }


@torch.no_grad()
def sampled(policy: Policy, channels: dict[str, RewardChannel], records: Sequence[Record]) -> dict[str, Any]:
    """The samples of some problems, judged by the task and by the mean reward of each channel; lists of SAMPLES."""
    line: dict[str, Any] = {name: [] for name in ("answers", "rewards", "tokens")}
    line["scores"] = {name: [] for name in channels}
    for record in records:
        rows = record["completions"]
        line["answers"].append([policy.text(row["token_ids"]) for row in rows])
        line["rewards"].append([round(row["reward"], 4) for row in rows])
        line["tokens"].append([len(row["token_ids"]) for row in rows])
        answers, _ = distinct(record)
        prompt = policy.prompt_ids(problem(record["family"], record["use"], record["index"]).messages)
        states = [layer[None] for layer in hidden_states(policy, prompt, answers)]
        for name, channel in channels.items():
            parts = channel(states)[0].split([len(ids) for ids in answers])
            means = {tuple(ids): float(part.mean()) for ids, part in zip(answers, parts, strict=True)}
            line["scores"][name].append([round(means[tuple(row["token_ids"])], 5) for row in rows])
    return line


def answer(work: Path, policy: Policy, channels: Channels, unit: Unit) -> dict[str, Any]:
    """The line of a unit."""
    if unit.system == "samples":
        judges = {name: channels.of(unit._replace(channel=name)) for name in ("known", "held out")}
        began = time.process_time()
        line = sampled(policy, judges, drawn(work, policy, unit.family, "answered", ANSWERED, SAMPLES))
    else:
        tasks = [problem(unit.family, "answered", index) for index in range(ANSWERED)]
        options = {"greedy": GREEDY, "look ahead": MAIN, "paper's forks": PAPER}[unit.system]
        channel = channels.of(unit) if unit.channel else channels.new()
        began = time.process_time()
        line = looked_ahead(policy, channel, tasks, options)
    return {"unit": list(unit), **line, "cpu": round(time.process_time() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after these")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="for two processes")
    arguments = parser.parse_args()
    until = time.time() + 60 * arguments.minutes
    start.make(arguments.work, start.STEPS)
    policy = models.load(arguments.work / "start")
    policy.model.requires_grad_(False)
    channels = Channels(arguments.work, policy)
    done = [tuple(line["unit"]) for line in RUNS.of("look ahead")]
    for unit in queue():
        if unit not in done and unit.family in arguments.families and time.time() < until:
            RUNS.add("look ahead", answer(arguments.work, policy, channels, unit))


if __name__ == "__main__":
    main()
