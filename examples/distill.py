"""On-policy distillation with TRL: a small student approaches a larger teacher; no download, two minutes on a CPU.

    python examples/distill.py                    # FiRe-OPD: filtered and weighted
    python examples/distill.py --method opd       # plain: every token counts alike

The task is that of ``grpo_lora.py``: sums, answered step by step. The larger teacher learns it from worked answers for
longer than the student; then the student samples, the teacher scores what it wrote, and no answer is ever judged.
"""

from __future__ import annotations

import argparse
import tempfile

from datasets import Dataset
from running_sums import build_model, draw_prompt, greedy_accuracy, seed_everything, warm_up
from trl_leaf import build_tokenizer

from leafkernels.integrations.trl_distillation import FireOPDConfig, FireOPDTrainer

METHODS = {"fire": {}, "opd": {"fire_drop": 0.0, "fire_alpha": 0.0, "fire_beta": 0.0}}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=tuple(METHODS), default="fire", help="weights (default: fire)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, prompts and draws (default: 0)")
    parser.add_argument("--steps", type=int, default=120, help="steps of distillation (default: 120)")
    parser.add_argument("--teacher-steps", type=int, default=1500, help="its supervised steps (default: 1500)")
    parser.add_argument("--student-steps", type=int, default=250, help="those of the student (default: 250)")
    args = parser.parse_args()
    if min(args.steps, args.teacher_steps, args.student_steps) < 1:
        parser.error("--steps, --teacher-steps and --student-steps must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    rng = seed_everything(args.seed)
    held_out = [draw_prompt(rng, 4, held_out=True) for _ in range(200)]
    models = {"teacher": build_model(hidden_size=96), "student": build_model(hidden_size=64)}
    for name, steps in (("teacher", args.teacher_steps), ("student", args.student_steps)):
        for _ in warm_up(models[name], rng, num_terms=[4], steps=steps):
            pass
        print(f"{name}, {steps} supervised steps: held-out accuracy {greedy_accuracy(models[name], held_out):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        config = FireOPDConfig(
            output_dir=folder,
            seed=args.seed,
            max_steps=args.steps,
            per_device_train_batch_size=64,
            max_completion_length=32,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            **METHODS[args.method],
        )
        prompts = [draw_prompt(rng, 4, held_out=False) for _ in range(64 * args.steps)]
        trainer = FireOPDTrainer(
            models["student"],
            models["teacher"],
            config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=build_tokenizer(),
        )
        trainer.train()
    history = [line for line in trainer.state.log_history if "fire/teacher_gap" in line]
    first, last = (line["fire/teacher_gap"] for line in (history[0], history[-1]))
    print(f"teacher less student log-probability of a token, first {first:.3f}, last {last:.3f}")
    print(f"student, after {args.steps} steps: held-out accuracy {greedy_accuracy(models['student'], held_out):.3f}")


if __name__ == "__main__":
    main()
