"""The supervised start: a few dozen steps on worked answers, so that the model knows the formats and is right at times.

python examples/study/real/start.py --work runs/real      # writes runs/real/start
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import model as models
import torch
from model import Policy
from tasks import FAMILIES, problem
from torch import Tensor

PER_FAMILY = 8  # worked answers of each family in a step
RATE = 1e-4
STEPS = 40
IGNORED = -100


def batch(policy: Policy, step: int) -> tuple[Tensor, Tensor]:
    """Ids (N, T), and labels with the prompt and the padding ignored."""
    rows = []
    for family in FAMILIES:
        for index in range(step * PER_FAMILY, (step + 1) * PER_FAMILY):
            one = problem(family, "start", index)
            rows.append((policy.prompt_ids(one.messages), policy.answer_ids(one.worked)))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.full((len(rows), width), policy.end), torch.full((len(rows), width), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.cat([prompt, answer])
        labels[row, len(prompt) : len(prompt) + len(answer)] = answer
    return ids, labels


def train(policy: Policy, steps: int, keep: Path | None = None, say: bool = False) -> list[float]:
    """Full weights, AdamW, bfloat16 products; the losses. Resumes from ``keep``, written every ten steps."""
    weights = list(policy.model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    losses: list[float] = []
    if keep is not None and keep.exists():
        state = torch.load(keep, weights_only=True)
        policy.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    for step in range(len(losses), steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10)
        ids, labels = batch(policy, step)
        with torch.autocast("cpu", torch.bfloat16):
            states = policy.model.model(input_ids=ids).last_hidden_state
            asked = labels[:, 1:] != IGNORED
            logits = policy.model.lm_head(states[:, :-1][asked])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(round(float(loss.detach()), 4))
        if say:
            print(step, losses[-1], flush=True)
        if keep is not None and (step + 1) % 10 == 0:
            state = {"model": policy.model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            partial = keep.with_suffix(".partial")
            torch.save(state, partial)
            os.replace(partial, keep)
    return losses


def make(work: Path, steps: int) -> None:
    """Write the start as a folder, unless it is there."""
    folder = work / "start"
    if (folder / "config.json").exists():
        return
    models.save_model(work / "model")
    policy = models.load(work / "model")
    keep = work / "start.pt"
    train(policy, steps, keep, say=True)
    partial = work / "start.partial"
    policy.model.save_pretrained(partial)
    policy.tokenizer.save_pretrained(partial)
    os.replace(partial, folder)
    keep.unlink()


def pilot(work: Path) -> None:
    """Print the mean reward of six problems of each family, eight answers each, every twenty steps from 40 on."""
    import rollouts

    models.save_model(work / "model")
    policy = models.load(work / "model")
    for steps in (40, 60, 80, 100):
        train(policy, steps, work / "pilot.pt")
        for family in FAMILIES:
            tasks = [problem(family, "pilot", index) for index in range(6)]
            answers = rollouts.draw(policy, tasks, 8, steps)
            print(steps, family, [round(rollouts.mean_reward(rows), 2) for rows in answers], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder outside of the repository")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pilot", action="store_true")
    arguments = parser.parse_args()
    if arguments.pilot:
        return pilot(arguments.work)
    make(arguments.work, arguments.steps)


if __name__ == "__main__":
    main()
