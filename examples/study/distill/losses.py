"""The study of PROTOCOL_LOSSES.md: one command runs all of it, and writes its tables; what is already there is kept.

    python examples/study/distill/losses.py --work runs/distill

``--work`` takes the weights of teachers and first students; results go to the part "losses" of results/runs.jsonl.gz in
``--out``, by default beside this file, and tables to results/losses_tables.md.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.progress import track
from transformers import TrainerCallback

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parent)]

from paired import compare, holm, interval, table  # noqa: E402
from run import TERMS, Pair, held_out_prompts, trainer_of  # noqa: E402
from running_sums import draw_prompt, greedy_accuracy  # noqa: E402
from runs import Runs  # noqa: E402

from leafkernels.integrations.trl_distillation import FireOPDTrainer  # noqa: E402

SEEDS = range(8)
LOSSES = {"sampled": "sampled", "reverse_kl": "reverse KL", "forward_kl": "forward KL", "jsd": "JSD"}
WEIGHTS: dict[str, dict[str, float]] = {
    "plain": {"fire_drop": 0.0, "fire_alpha": 0.0, "fire_beta": 0.0},
    "fire": {},
}
ARMS = [(loss, weights) for loss in LOSSES for weights in WEIGHTS]
BASE = ("sampled", "plain")
BATCH = 32
TOKENS = 24_000  # of which a teacher may be asked in a run
LOOKS = 3  # evaluations, at equal shares of these tokens
LEARNING_RATE = 5e-5
OUTCOMES = {
    "during": "greedy, mean of all evaluations",
    "end": "greedy, at the end",
    "divergence": "l_S - l_T a token, last third of the steps",
}


class Counted(FireOPDTrainer):
    """Counts the sampled tokens, each of which its teacher is asked about."""

    tokens = 0

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self.tokens += int(batch["completion_mask"].sum())
        return batch


class Budget(TrainerCallback):
    """Looks at the held-out prompts at equal shares of the tokens, and ends the run with the last look."""

    def __init__(self, trainer: Counted, prompts: Sequence[str], tokens: int) -> None:
        self.trainer, self.prompts, self.tokens = trainer, prompts, tokens
        self.seen: list[int] = []
        self.greedy: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.tokens >= self.tokens * (len(self.seen) + 1) / LOOKS:
            self.seen.append(self.trainer.tokens)
            self.greedy.append(greedy_accuracy(self.trainer.model, self.prompts))
            # TRL takes what it samples next for evaluation otherwise.
            self.trainer.model.train()
        control.should_training_stop = len(self.seen) == LOOKS


def distil(arm: tuple[str, str], seed: int, pair: Pair, prompts: Sequence[str], tokens: int, rate: float) -> Any:
    loss, weights = arm
    rng = random.Random(seed)
    most = tokens // (2 * BATCH)  # an answer has two tokens at least
    asked = [draw_prompt(rng, TERMS, held_out=False) for _ in range(most * BATCH)]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = {"seed": seed, "max_steps": most, "learning_rate": rate, "fire_loss": loss, **WEIGHTS[weights]}
        options |= {"per_device_train_batch_size": BATCH, "gradient_checkpointing": False}
        trainer = trainer_of(Counted, pair, asked, folder, **options)
        budget = Budget(trainer, prompts, tokens)
        trainer.add_callback(budget)
        first = greedy_accuracy(pair.student, prompts)
        pair.student.train()
        trainer.train()
    gaps = [line["fire/teacher_gap"] for line in trainer.state.log_history if "fire/teacher_gap" in line]
    return {
        "loss": loss,
        "weights": weights,
        "seed": seed,
        "teacher": greedy_accuracy(pair.teacher, prompts),
        "first": first,
        "tokens": budget.seen,
        "greedy": budget.greedy,
        "gap": [round(gap, 4) for gap in gaps],
        "seconds": round(time.perf_counter() - started, 1),
    }


class Study:
    """The runs of each arm, ordered by seed; a seed counts where all arms of it have run."""

    def __init__(self, folder: Path) -> None:
        found = {(run["loss"], run["weights"], run["seed"]): run for run in Runs(folder).of("losses")}
        seeds = sorted({seed for _, _, seed in found})
        self.seeds = [seed for seed in seeds if all((*arm, seed) in found for arm in ARMS)]
        self.runs = {arm: [found[(*arm, seed)] for seed in self.seeds] for arm in ARMS}

    def outcome(self, arm: tuple[str, str], name: str) -> np.ndarray:
        runs = self.runs[arm]
        if name == "during":
            return np.array([np.mean(run["greedy"]) for run in runs])
        if name == "end":
            return np.array([run["greedy"][-1] for run in runs])
        return np.array([-np.mean(run["gap"][-max(1, len(run["gap"]) // 3) :]) for run in runs])

    def tables(self) -> str:
        others = [arm for arm in ARMS if arm != BASE]
        found = {(arm, of): compare(self.outcome(arm, of), self.outcome(BASE, of)) for arm in others for of in OUTCOMES}
        corrected = dict(zip(others, holm([found[arm, "during"]["p"] for arm in others]), strict=True))
        firsts, teachers = (interval(np.array([run[of] for run in self.runs[BASE]])) for of in ("first", "teacher"))
        text = f"{len(self.seeds)} seeds. Greedy held-out accuracy of teachers {teachers[0]:.3f} ± {teachers[1]:.3f}, "
        text += f"of students before the first step {firsts[0]:.3f} ± {firsts[1]:.3f}\n\n"
        rows = []
        for arm in ARMS:
            row = [f"{LOSSES[arm[0]]}, {arm[1]}"]
            for name in OUTCOMES:
                mean, half = interval(self.outcome(arm, name))
                row.append(f"{mean:.3f} ± {half:.3f}")
                row += ["", ""] if arm == BASE else [signed(found[arm, name]), f"{found[arm, name]['p']:.3f}"]
            rows.append([*row, "" if arm == BASE else f"{corrected[arm]:.3f}"])
        head = ["arm", *(name for label in OUTCOMES.values() for name in (label, "less sampled, plain", "p"))]
        text += table([*head, "p, first column, Holm"], rows)
        text += "\nFiRe less plain, of one loss\n\n"
        rows = []
        for loss, label in LOSSES.items():
            pairs = [compare(*(self.outcome((loss, of), name) for of in ("fire", "plain"))) for name in OUTCOMES]
            rows.append([label, *(cell for pair in pairs for cell in (signed(pair), f"{pair['p']:.3f}"))])
        return text + table(["loss", *(name for label in OUTCOMES.values() for name in (label, "p"))], rows)


def signed(found: dict[str, float]) -> str:
    return "{difference:+.3f} ± {half:.3f}".format(**found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for teachers and first students")
    parser.add_argument("--out", type=Path, default=HERE, help="folder that gets results/runs.jsonl.gz and tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 to 7")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"that a teacher is asked about (default: {TOKENS})")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help=f"default: {LEARNING_RATE}")
    parser.add_argument("--teacher-steps", type=int, default=2000, help="its supervised steps at most (default: 2000)")
    parser.add_argument("--student-steps", type=int, default=250, help="those of the student (default: 250)")
    parser.add_argument("--held-out", type=int, help="prompts of an evaluation (default: all 653)")
    parser.add_argument("--losses", nargs="+", choices=tuple(LOSSES), default=list(LOSSES), help="default: all")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    prompts = held_out_prompts()[: args.held_out]
    runs = Runs(args.out)
    done = {(run["loss"], run["weights"], run["seed"]) for run in runs.of("losses")}
    arms = [arm for arm in ARMS if arm[0] in args.losses]
    for seed, arm in track(list(itertools.product(args.seeds, arms)), description="runs"):
        if (*arm, seed) not in done:
            pair = Pair(seed, args.work, args.teacher_steps, args.student_steps)
            runs.add("losses", distil(arm, seed, pair, prompts, args.tokens, args.learning_rate))
    study = Study(args.out)
    if len(study.seeds) > 1:
        (args.out / "results" / "losses_tables.md").write_text(study.tables(), encoding="utf-8")


if __name__ == "__main__":
    main()
