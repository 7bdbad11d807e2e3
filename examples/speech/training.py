"""The loops: a supervised warm start of a small model, then policy steps on an adapter, with checkpoints.

What a step draws depends on the seed and the number of the step alone, so a run that was stopped goes on as if it had
not been, and runs of different methods with one seed see the same prompts.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from leafkernels import policy_loss

from .credit import Batch, advantages, reach
from .data import Source, Utterance
from .model import Speaker, add_adapter

CLIP = (0.2, 0.2)
EVALUATED_AT_ONCE = 64


@dataclass(frozen=True)
class Settings:
    """All that a run's numbers depend on, beside the data and the model."""

    task: str = ""  # data, reward and model in words: a run goes on with the same ones only
    method: str = "leaf"
    num_boundaries: int = 2
    seed: int = 0
    steps: int = 100
    prompts: int = 16
    rollouts: int = 8
    updates: int = 1
    learning_rate: float = 1e-3
    temperature: float = 1.0
    rescale: bool = True
    rank: int = 8
    limit: int = 32  # tokens of an answer
    pool: int = 1000  # training utterances
    evaluated: int = 200  # utterances of evaluation
    eval_every: int = 20
    warm_steps: int = 1200
    warm_batch: int = 32
    warm_learning_rate: float = 1.5e-3
    warm_pool: int = 4000


class Pool:
    """Utterances and what the model reads of them, made once."""

    def __init__(self, utterances: Iterable[Utterance], speaker: Speaker) -> None:
        self.utterances: list[Utterance] = []
        self.features: list[dict[str, torch.Tensor]] = []
        for utterance in utterances:
            self.features.append(speaker.features(utterance))
            # The features hold all that is needed of the audio, in a tenth of the memory.
            self.utterances.append(replace(utterance, audio=np.zeros(0, np.float32)))

    def __len__(self) -> int:
        return len(self.utterances)

    def pick(self, rng: random.Random, count: int) -> tuple[list[Utterance], list[dict[str, torch.Tensor]]]:
        indices = [rng.randrange(len(self)) for _ in range(count)]
        return [self.utterances[i] for i in indices], [self.features[i] for i in indices]


def draw_pool(
    source: Source, speaker: Speaker, name: str, size: int, *, held_out: bool = False, level: float = 1.0
) -> Pool:
    rng = random.Random(name)
    return Pool((source.draw(rng, held_out=held_out, level=level) for _ in range(size)), speaker)


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint under another name and rename, so that there is never half of one."""
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def warm_start(source: Source, speaker: Speaker, settings: Settings, progress: Callable[[int, str], None]) -> None:
    """Train all weights on right answers; first on single digits, where the source knows easier utterances."""
    name = f"{settings.seed} warm"
    easy = draw_pool(source, speaker, name + " easy", settings.warm_pool // 2, level=0.0)
    # Answers of all lengths: attending to the first digits is learnt on the short ones.
    mixed = draw_pool(source, speaker, name + " mixed", settings.warm_pool, level=0.99)
    rng = random.Random(name)
    optimizer = torch.optim.AdamW(speaker.model.parameters(), lr=settings.warm_learning_rate, weight_decay=0.01)
    speaker.model.train()
    for step in range(settings.warm_steps):
        done = step / settings.warm_steps
        pool = easy if done < 0.2 else mixed
        utterances, features = pool.pick(rng, settings.warm_batch)
        for group in optimizer.param_groups:
            group["lr"] = settings.warm_learning_rate * min(1.0, (step + 1) / 50, 2 * (1 - done))
        answers = speaker.answer_ids([utterance.taught for utterance in utterances])
        logprobs, _ = speaker.score(speaker.embed(features), answers)
        loss = -logprobs.sum() / answers.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(speaker.model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, f"loss {loss.item():.3f}")


@torch.no_grad()
def evaluate(source: Source, speaker: Speaker, pool: Pool, limit: int) -> dict[str, float]:
    """Return the mean scores, and the share of exact answers, of the most likely answers."""
    totals: dict[str, float] = {}
    for start in range(0, len(pool), EVALUATED_AT_ONCE):
        part = slice(start, start + EVALUATED_AT_ONCE)
        answers = speaker.sample(speaker.embed(pool.features[part]), limit, temperature=None)
        for utterance, text in zip(pool.utterances[part], answers.texts, strict=True):
            for name, score in {**source.scores(utterance, text), "exact": float(text == utterance.reference)}.items():
                totals[name] = totals.get(name, 0.0) + score / len(pool)
    return totals


class PolicyRun:
    """Policy steps on an adapter; ``out`` holds checkpoint.pt and metrics.jsonl."""

    def __init__(self, source: Source, speaker: Speaker, settings: Settings, out: Path) -> None:
        self.source, self.speaker, self.settings, self.out = source, speaker, settings, out
        torch.manual_seed(settings.seed)
        speaker.model = add_adapter(speaker.model, settings.rank)
        self.weights = [weight for weight in speaker.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=settings.learning_rate, weight_decay=0.0)
        self.training = draw_pool(source, speaker, f"{settings.seed} training", settings.pool)
        self.held_out = draw_pool(source, speaker, f"{settings.seed} held out", settings.evaluated, held_out=True)
        self.history: list[dict[str, Any]] = []
        self.step = 0
        if self.checkpoint.exists():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def _resume(self) -> None:
        saved = torch.load(self.checkpoint, weights_only=True)
        differing = [
            name
            for name, value in asdict(self.settings).items()
            # A longer run of the same settings may go on where a shorter one ended.
            if name != "steps" and saved["settings"][name] != value
        ]
        if differing:
            raise ValueError(
                f"--out must name a new folder or that of a run with the same settings, got {str(self.out)!r}, whose "
                f"run differs in {', '.join(differing)}"
            )
        set_peft_model_state_dict(self.speaker.model, saved["adapter"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.history = saved["step"], saved["history"]

    def save(self) -> None:
        save(
            {
                "settings": asdict(self.settings),
                "step": self.step,
                "adapter": get_peft_model_state_dict(self.speaker.model),
                "optimizer": self.optimizer.state_dict(),
                "history": self.history,
            },
            self.checkpoint,
        )

    def run(self, progress: Callable[[int, str], None]) -> None:
        """Train to the end, evaluating and saving every ``eval_every`` steps, before the first and after the last."""
        metrics = self.out / "metrics.jsonl"
        # Written anew: lines of steps behind the checkpoint, which are done again, must not stand twice.
        metrics.write_text("".join(json.dumps(line) + "\n" for line in self.history), encoding="utf-8")
        with metrics.open("a", encoding="utf-8") as file:

            def log(line: dict[str, Any]) -> None:
                self.history.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()

            if not self.history:
                log({"step": 0, "held_out": self._evaluate()})
            while self.step < self.settings.steps:
                line = self._train_step()
                self.step += 1
                line = {"step": self.step, **line}
                ends = self.step == self.settings.steps
                if self.step % self.settings.eval_every == 0 or ends:
                    line["held_out"] = self._evaluate()
                log(line)
                if "held_out" in line:
                    self.save()
                progress(self.step, f"reward {line['reward']:.2f}")

    def _evaluate(self) -> dict[str, float]:
        scores = evaluate(self.source, self.speaker, self.held_out, self.settings.limit)
        return {name: round(score, 6) for name, score in scores.items()}

    def _train_step(self) -> dict[str, Any]:
        settings, speaker = self.settings, self.speaker
        seed = f"{settings.seed} step {self.step}"
        rng = random.Random(seed)
        torch.manual_seed(rng.getrandbits(63))
        utterances, features = self.training.pick(rng, settings.prompts)
        with torch.no_grad():
            prompts = speaker.embed(features).repeat(settings.rollouts)
        answers = speaker.sample(prompts, settings.limit, temperature=settings.temperature)
        asked = [utterance for utterance in utterances for _ in range(settings.rollouts)]
        rewards = torch.tensor(
            [
                self.source.scores(utterance, text)[self.source.reward]
                for utterance, text in zip(asked, answers.texts, strict=True)
            ]
        ).to(answers.token_ids.device)
        for update in range(settings.updates):
            logprobs, entropy = speaker.score(prompts, answers, settings.temperature)
            if update == 0:
                # The first update is on policy: its log-probabilities are those of sampling.
                old = logprobs.detach()
                batch = Batch(old, answers.token_ids, answers.mask, rewards, settings.rollouts)
                credit = advantages(batch, settings.method, settings.num_boundaries, rescale=settings.rescale)
            result = policy_loss(logprobs, old, credit, answers.mask, clip=CLIP, entropy=entropy)
            self.optimizer.zero_grad()
            result.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
        tree = reach(batch, settings.num_boundaries)
        groups = rewards.view(-1, settings.rollouts)
        numbers = {
            "reward": rewards.mean(),
            "mixed_groups": (groups != groups[:, :1]).any(1).float().mean(),
            "length": answers.mask.sum(1).float().mean(),
            "entropy": result.mean_entropy,
            "clip_fraction": result.clip_fraction,
            "span_share": tree.span_share,
            "nodes": tree.nodes,
            "fire_rate": tree.fire_rate,
            "part_rate": tree.part_rate,
        }
        line: dict[str, Any] = {name: round(float(value), 6) for name, value in numbers.items()}
        # Steps that no tree can learn from say nothing about where it forks.
        return {**line, "chosen": tree.chosen, "fired": tree.fired, "parted": tree.parted}
