"""Which credit agrees with a speech model's own gradients? PROTOCOL.md, last section, says what is run.

    python examples/study/agreement/speech_model.py --data PATH/fsdd.tar.gz --work runs/agreement

adds to results/runs.jsonl.gz, a task at a time; a task that is there is kept. ``--report`` prints the tables.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from scipy.stats import spearmanr
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from run import RUNS as STUDY  # noqa: E402
from run import Run, warm_speaker  # noqa: E402
from runs import (  # noqa: E402
    ROUNDS,
    TASKS,
    Runs,  # noqa: E402
    Task,
)
from speech.data import SpokenSums, read_fsdd  # noqa: E402
from speech.model import Answers, Prompts  # noqa: E402
from speech.training import add_adapter, draw_pool  # noqa: E402

import leafkernels  # noqa: E402

RUNS = Runs(HERE)
VOICE_SEED = 3  # theo, of the study's voices
ROLLOUTS = 100
SCHEMES = {
    "grpo": leafkernels.grpo,
    "leaf_b2": leafkernels.span_advantages,
    "leaf_b4": partial(leafkernels.span_advantages, num_boundaries=4),
    "tempo": leafkernels.tempo,
    "treerl": leafkernels.treerl,
    "tree_td": leafkernels.tree_td,
    "tree_td 1, 0.3": partial(leafkernels.tree_td, shrinkage=1.0, group_weight=0.3),
    "tree_td 4, 0.2": partial(leafkernels.tree_td, shrinkage=4.0, group_weight=0.2),
}


def measure(task: Task, clips: Any, work: Path, bar: Progress, num_prompts: int, num_splits: int) -> dict[str, Any]:
    digits, reward, slip = task
    run = Run(VOICE_SEED, digits, reward, slip, "grpo")
    speaker = warm_speaker(run, clips, work, bar)
    source = SpokenSums(clips, [run.voice], digits, reward, "")
    torch.manual_seed(0)
    speaker.model = add_adapter(speaker.model, 8)
    speaker.model.eval()
    weights = [weight for weight in speaker.model.parameters() if weight.requires_grad]
    pool = draw_pool(source, speaker, "agreement", num_prompts)
    with torch.no_grad():
        embedded = [speaker.embed([features]) for features in pool.features]
    answers, rewards, logprobs = [], [], []
    for prompt, utterance in zip(embedded, pool.utterances, strict=True):
        found = speaker.sample(prompt.repeat(ROLLOUTS), source.answer_length + 2)
        answers.append(found)
        rewards += [source.scores(utterance, text)[reward] for text in found.texts]
        with torch.no_grad():
            logprobs.append(speaker.score(prompt.repeat(ROLLOUTS), found)[0])

    def stacked(parts: list[Tensor]) -> Tensor:
        width = max(part.shape[1] for part in parts)
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

    token_ids, mask = stacked([one.token_ids for one in answers]), stacked([one.mask for one in answers])
    measuring = bar.add_task(f"{digits} {reward} {slip}", total=None)

    def gradients(advantages: Tensor, rows: Tensor) -> Tensor:
        own = embedded[int(rows[0]) // ROLLOUTS]
        width = int(mask[rows].sum(1).max())
        taken = Answers(token_ids[rows][:, :width], mask[rows][:, :width], [])
        scored, _ = speaker.score(Prompts(own.embeddings, own.mask).repeat(len(rows)), taken)
        found = torch.autograd.grad((advantages[rows][:, :width] * scored).sum(), weights)
        bar.advance(measuring)
        return torch.cat([part.flatten() for part in found])

    case = (stacked(logprobs), token_ids, torch.tensor(rewards))
    options = {"response_mask": mask, "group_size": ROLLOUTS, "num_rollouts": 8, "num_splits": num_splits}
    found = {
        "adapter": leafkernels.gradient_agreement(SCHEMES, *case, **options, gradients=gradients),
        "context 4": leafkernels.gradient_agreement(SCHEMES, *case, **options, context=4),
    }
    lines: dict[str, Any] = {"task": list(task), "reward": sum(rewards) / len(rewards)}
    lines["prompts"] = found["adapter"].num_measured
    for name, agreement in found.items():
        lines[name] = {
            scheme: [round(mean, 4), *(round(x, 4) for x in agreement.difference(scheme, "grpo")[:3])]
            for scheme, mean in agreement.mean().items()
        }
    return lines


def trained(name: str) -> dict[tuple[str, str], float]:
    """Mean sampled reward less GRPO's in a round of the study, by task and scheme."""
    of, gains = ROUNDS[name], {}
    found = {Run(**run["run"]): run for run in STUDY.of("speech")}
    for task in TASKS:
        rewards = {}
        for arm in of.arms:
            runs = [found[Run(seed, *task, arm)] for seed in of.seeds]
            rewards[arm] = sum(sum(run["steps"]["reward"]) / len(run["steps"]["reward"]) for run in runs) / len(runs)
        for arm, (method, *_) in of.arms.items():
            scheme = arm if arm in SCHEMES else method
            if scheme in SCHEMES and arm != "grpo":
                gains[str(list(task)), scheme] = rewards[arm] - rewards["grpo"]
    return gains


def report() -> None:
    tasks = RUNS.of("speech")
    for whose in ("adapter", "context 4"):
        names = (f"{task['task'][0]} {task['task'][1]} {task['task'][2]}" for task in tasks)
        print(f"\n| {whose} | " + " | ".join(names) + " |\n|---|" + "---|" * len(tasks))
        for scheme in SCHEMES:
            cells = []
            for task in tasks:
                agreement, mean, low, high = task[whose][scheme]
                cells.append(f"{agreement:.3f}" if scheme == "grpo" else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            print(f"| {scheme} | " + " | ".join(cells) + " |")
        print()
        measured = {(str(task["task"]), scheme): task[whose][scheme][1] for task in tasks for scheme in SCHEMES}
        for name in ROUNDS:
            gains = trained(name)
            rank = spearmanr([measured[pair] for pair in gains], list(gains.values())).statistic
            print(f"- Spearman with training, {name} round, {len(gains)} pairs: {rank:+.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the Free Spoken Digit Dataset, a tar archive")
    parser.add_argument("--work", type=Path, help="folder for the supervised starts")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if arguments.report:
        return report()
    if arguments.data is None or arguments.work is None:
        parser.error("name the recordings and a folder: --data, --work")
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    clips = read_fsdd(arguments.data)
    with Progress() as bar:
        for task in list(TASKS)[len(RUNS.of("speech")) :]:
            RUNS.add("speech", measure(task, clips, arguments.work, bar, arguments.prompts, arguments.splits))


if __name__ == "__main__":
    main()
