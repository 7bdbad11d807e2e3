"""The study of PROTOCOL.md: one command runs all of it, and draws it at the end; what is already there is kept.

    python examples/study/distill/run.py --work runs/distill

``--work`` takes the weights of teachers and first students (a megabyte a seed); results and figures go to the folder
``results`` in ``--out``, by default that beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from rich.progress import track
from transformers import PrinterCallback, TrainerCallback

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parent)]

from running_sums import (  # noqa: E402
    END_ID,
    PAD_TOKEN,
    build_model,
    decode,
    draw_prompt,
    greedy_accuracy,
    is_held_out,
    score,
    seed_everything,
    warm_up,
)
from runs import Runs  # noqa: E402
from trl_leaf import build_tokenizer  # noqa: E402

from leafkernels.integrations.trl_distillation import FireOPDConfig, FireOPDTrainer  # noqa: E402

TERMS = 4
SEEDS = range(8)
ARMS: dict[str, dict[str, Any]] = {
    "opd": {"fire_drop": 0.0, "fire_alpha": 0.0, "fire_beta": 0.0},
    "filter": {"fire_alpha": 0.0, "fire_beta": 0.0},
    "weights": {"fire_drop": 0.0},
    "fire_row": {"fire_scope": "row"},
    "fire_batch": {},
    "fire_trajectory": {"fire_normalize": "trajectory"},
}
BATCH = 64
STEPS = 150
POOL = 300 * BATCH  # prompts that a run draws its own from, in an order of its seed
EVERY = 30  # steps between evaluations
LEARNING_RATE = 5e-5
# The teacher stops at the first look, every 50 steps, with so much greedy accuracy on prompts of training.
TEACHER = {"hidden_size": 96, "most_steps": 2000, "accuracy": 0.8}
STUDENT = {"hidden_size": 64, "steps": 250}
# What a token of an answer is: the result of a step, the operands that it is copied from, or a sign.
KINDS = ("result", "operand", "sign")


def held_out_prompts() -> list[str]:
    """All of them, a tenth of the prompts there are."""
    prompts = ("+".join(terms) + "=" for terms in itertools.product("123456789", repeat=TERMS))
    return [prompt for prompt in prompts if is_held_out(prompt)]


def kinds_of(text: str) -> list[str]:
    """The kind of every character of an answer."""
    found, kind = [], "operand"
    for character in text:
        is_digit = character.isdigit()
        found.append(kind if is_digit else "sign")
        if not is_digit:
            kind = "result" if character == "=" else "operand"
    return found


class Pair:
    """A teacher and a first student, made once a seed and kept."""

    def __init__(self, seed: int, folder: Path, teacher_steps: int, student_steps: int) -> None:
        rng = seed_everything(seed)
        self.teacher = build_model(TEACHER["hidden_size"])
        self.student = build_model(STUDENT["hidden_size"])
        path = folder / f"{seed}.pt"
        if path.exists():
            saved = torch.load(path, weights_only=True)
            self.teacher.load_state_dict(saved["teacher"])
            self.student.load_state_dict(saved["student"])
            self.steps = saved["steps"]
            return
        looked_at = [draw_prompt(rng, TERMS, held_out=False) for _ in range(400)]
        for step, _ in warm_up(self.teacher, rng, num_terms=[TERMS], steps=teacher_steps):
            self.steps = step
            if step % 50 == 0:
                if greedy_accuracy(self.teacher, looked_at) >= TEACHER["accuracy"]:
                    break
                self.teacher.train()
        for _ in warm_up(self.student, rng, num_terms=[TERMS], steps=student_steps):
            pass
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        states = {"teacher": self.teacher.state_dict(), "student": self.student.state_dict(), "steps": self.steps}
        torch.save(states, partial)
        os.replace(partial, path)


class Watched(FireOPDTrainer):
    """Counts what the filter drops and what the weights do, and keeps some rows of the first and the last batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts: Counter[str] = Counter()
        self.shown: dict[str, list[dict[str, Any]]] = {}
        self.sampled: list[float] = []
        self.kept: list[float] = []

    def _fire(self, *rows: torch.Tensor) -> Any:
        self.found = super()._fire(*rows)
        self.gaps = rows[1] - rows[0]
        return self.found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        weights, keep, gaps = self.found.weights.tolist(), self.found.keep.tolist(), self.gaps.tolist()
        rows = []
        for index, (line, ids) in enumerate(zip(inputs, batch["completion_ids"].tolist(), strict=True)):
            # One character a token, whatever an unlearned student says.
            text = decode(ids[: ids.index(END_ID) + 1] if END_ID in ids else ids).replace(PAD_TOKEN, "_")
            is_right, name = score(line["prompt"], text), "kept" if keep[index] else "dropped"
            rows.append(
                {
                    "prompt": line["prompt"],
                    "answer": text,
                    "right": is_right,
                    "keep": keep[index],
                    "weights": [round(weight, 3) for weight in weights[index][: len(text)]],
                    "gaps": [round(gap, 3) for gap in gaps[index][: len(text)]],
                }
            )
            self.counts.update({f"{name}_rows": 1, f"{name}_tokens": len(text), f"{name}_right": is_right})
            for kind, weight, gap in zip(kinds_of(text), weights[index], gaps[index], strict=False):
                self.counts.update({f"{kind}_tokens": 1, f"{kind}_weight": weight, f"{kind}_gap": gap})
        self.sampled.append(sum(row["right"] for row in rows) / len(rows))
        self.kept.append(sum(keep) / len(keep))
        self.shown.setdefault("first", rows[:12])
        self.shown["last"] = rows[:12]
        return batch


class Evaluation(TrainerCallback):
    def __init__(self, model: Any, prompts: Sequence[str], every: int) -> None:
        self.model, self.prompts, self.every = model, prompts, every
        self.step, self.greedy = [0], [greedy_accuracy(model, prompts)]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.step.append(state.global_step)
            self.greedy.append(greedy_accuracy(self.model, self.prompts))
            # TRL takes what it samples next for evaluation otherwise.
            self.model.train()


def trainer_of(kind: type[FireOPDTrainer], pair: Pair, asked: list[str], folder: str, **options: Any) -> Any:
    """A trainer of the pair's student on the prompts ``asked``, which says and saves nothing."""
    config = FireOPDConfig(
        output_dir=folder,
        max_completion_length=8 * TERMS,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **options,
    )
    data = Dataset.from_dict({"prompt": asked})
    trainer = kind(pair.student, pair.teacher, config, train_dataset=data, processing_class=build_tokenizer())
    trainer.remove_callback(PrinterCallback)
    return trainer


def distil(arm: str, seed: int, pair: Pair, prompts: Sequence[str], steps: int, rate: float) -> dict[str, Any]:
    rng = random.Random(seed)
    asked = [draw_prompt(rng, TERMS, held_out=False) for _ in range(POOL)]
    started = time.perf_counter()
    teacher_greedy = greedy_accuracy(pair.teacher, prompts)
    with tempfile.TemporaryDirectory() as folder:
        options = {"seed": seed, "max_steps": steps, "learning_rate": rate, **ARMS[arm]}
        trainer = trainer_of(Watched, pair, asked, folder, per_device_train_batch_size=BATCH, **options)
        evaluation = Evaluation(pair.student, prompts, min(EVERY, steps))
        trainer.add_callback(evaluation)
        trainer.train()
    history = [line for line in trainer.state.log_history if "fire/teacher_gap" in line]
    names = {"gap": "fire/teacher_gap", "norm": "grad_norm", "clipped": "clip_ratio/region_mean"}
    return {
        "arm": arm,
        "seed": seed,
        "teacher": {"steps": pair.steps, "greedy": teacher_greedy},
        "evaluated": {"step": evaluation.step, "greedy": evaluation.greedy},
        "steps": {
            **{name: [round(line[field], 4) for line in history] for name, field in names.items()},
            "sampled": [round(share, 4) for share in trainer.sampled],
            "kept": [round(share, 4) for share in trainer.kept],
        },
        "counts": {name: round(count, 3) for name, count in sorted(trainer.counts.items())},
        # The pictures show one seed.
        **({"shown": trainer.shown} if seed == 0 else {}),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for teachers and first students")
    parser.add_argument("--out", type=Path, default=HERE, help="folder that gets results/runs.jsonl.gz and figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 to 7")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of distillation (default: {STEPS})")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help=f"default: {LEARNING_RATE}")
    parser.add_argument("--teacher-steps", type=int, default=TEACHER["most_steps"], help="its supervised steps at most")
    parser.add_argument("--student-steps", type=int, default=STUDENT["steps"], help="supervised steps of the student")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    prompts = held_out_prompts()
    runs = Runs(args.out)
    done = {(run["seed"], run["arm"]) for run in runs.of("runs")}
    for seed, arm in track(list(itertools.product(args.seeds, args.arms)), description="runs"):
        if (seed, arm) not in done:
            pair = Pair(seed, args.work, args.teacher_steps, args.student_steps)
            runs.add("runs", distil(arm, seed, pair, prompts, args.steps, args.learning_rate))
    if set(args.arms) == set(ARMS) and len(args.seeds) > 1:
        import analyse

        analyse.main(args.out)


if __name__ == "__main__":
    main()
