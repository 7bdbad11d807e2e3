"""The study of PROTOCOL.md: one command runs, analyses and draws all of it; what is already there is kept.

    python examples/study/run.py --data PATH/fsdd.tar.gz --work runs/study

``--work`` takes warm starts and checkpoints (some megabytes, needed only to go on); results and figures go to
``results`` beside this file (``runs.py``). ``--part 0/2`` and ``--part 1/2`` split the seeds between two processes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from runs import (  # noqa: E402
    ROUNDS,
    TASKS,
    Runs,  # noqa: E402
)
from speech.data import SpokenSums, read_fsdd  # noqa: E402
from speech.model import Speaker, build_small  # noqa: E402
from speech.training import PolicyRun, Settings, save, warm_start  # noqa: E402

# Of the five, those that take turns in being unheard; the fifth is always trained on.
VOICES = ("george", "jackson", "nicolas", "theo")
LONGEST = max(digits for digits, _, _ in TASKS)
COMMON = {"steps": 80, "prompts": 16, "rollouts": 8, "learning_rate": 1e-3, "pool": 600, "eval_every": 10}
WARM = Settings(warm_steps=2400, warm_pool=6000)
RUNS = Runs(HERE)


@dataclass(frozen=True)
class Run:
    seed: int
    digits: int
    reward: str
    slip: float
    arm: str

    @property
    def voice(self) -> str:
        """The voice of evaluation, which takes turns over the seeds."""
        return VOICES[self.seed % len(VOICES)]

    @property
    def name(self) -> str:
        return f"{self.digits}-{self.reward}-{self.slip}-{self.arm}-{self.seed}"


def all_runs() -> list[Run]:
    return [Run(seed, *task, arm) for of in ROUNDS.values() for seed in of.seeds for task in TASKS for arm in of.arms]


def warm_speaker(run: Run, clips: Any, work: Path, bar: Progress) -> Speaker:
    """Make the supervised start that knows all voices but one, or read it.

    The model is built for the longest utterances, so that one start serves all lengths.
    """
    source = SpokenSums(clips, [run.voice], LONGEST, run.reward, "", run.slip)
    torch.manual_seed(0)
    speaker = Speaker(*build_small(source.alphabet, source.seconds), small=True)
    path = work / f"warm-{run.voice}-{run.slip}.pt"
    if path.exists():
        speaker.model.load_state_dict(torch.load(path, weights_only=True))
    else:
        task = bar.add_task(f"supervised, without {run.voice}", total=WARM.warm_steps, note="")
        warm_start(source, speaker, WARM, lambda step, note: bar.update(task, completed=step, note=note))
        save(speaker.model.state_dict(), path)
    return speaker


def summary(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Keep the curves, and where boundaries lay, summed over the steps."""
    steps = [line for line in history if "reward" in line]
    means = ("mixed_groups", "length", "entropy", "nodes", "fire_rate", "part_rate")
    length = max(len(line["chosen"]) for line in steps)
    counts = {
        name: [sum(line[name][p] for line in steps if p < len(line[name])) for p in range(length)]
        for name in ("chosen", "fired", "parted")
    }
    evaluated = [line for line in history if "held_out" in line]
    return {
        "steps": {name: [round(line[name], 4) for line in steps] for name in ("reward", "span_share")},
        "means": {name: round(sum(line[name] for line in steps) / len(steps), 5) for name in means},
        "evaluated": {
            "step": [line["step"] for line in evaluated],
            **{name: [line["held_out"][name] for line in evaluated] for name in evaluated[0]["held_out"]},
        },
        "boundaries": counts,
    }


def run_one(run: Run, clips: Any, work: Path, bar: Progress) -> None:
    speaker = warm_speaker(run, clips, work, bar)
    source = SpokenSums(clips, [run.voice], run.digits, run.reward, "")
    (arm,) = (of.arms[run.arm] for of in ROUNDS.values() if run.seed in of.seeds)
    settings = Settings(
        method=arm.method, num_boundaries=arm.boundaries, seed=run.seed, limit=source.answer_length + 2, **COMMON
    )
    out = work / run.name
    out.mkdir(parents=True, exist_ok=True)
    policy = PolicyRun(source, speaker, settings, out)
    policy.run(lambda step, note: None)
    RUNS.add("speech", {"run": asdict(run), "voice": run.voice, **summary(policy.history)})
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the Free Spoken Digit Dataset, a tar archive")
    parser.add_argument("--work", type=Path, required=True, help="folder for warm starts and checkpoints")
    parser.add_argument("--part", default="0/1", help="PART/PARTS of the voices of evaluation; runs alone, no figures")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    args.work.mkdir(parents=True, exist_ok=True)
    clips = read_fsdd(args.data)
    runs = [run for run in all_runs() if VOICES.index(run.voice) % parts == part]
    done = [Run(**found["run"]) for found in RUNS.of("speech")]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console()) as bar:
        task = bar.add_task("runs", total=len(runs), note="")
        for run in runs:
            if run not in done:
                run_one(run, clips, args.work, bar)
            bar.update(task, advance=1)
    if parts == 1:
        import analyse
        import tabular

        tabular.main()
        analyse.main()


if __name__ == "__main__":
    main()
