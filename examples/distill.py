"""On-policy distillation with TRL: a small student approaches larger teachers; no download, two minutes on a CPU.

    python examples/distill.py                              # FiRe-OPD: filtered and weighted
    python examples/distill.py --method opd                 # plain: every token counts alike
    python examples/distill.py --loss forward_kl            # a divergence over the vocabulary, not the sampled token
    python examples/distill.py --domains sums reversal      # two teachers, each for its own rows

The tasks: sums, answered step by step as in ``grpo_lora.py``, and digits to be written backwards. A larger teacher
learns each from worked answers; the student has seen some of all. Then the student samples, the teacher of a row scores
what it wrote, and no answer is ever judged.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import running_sums
from datasets import Dataset
from running_sums import END_TOKEN, build_model, is_held_out, labelled, sample, seed_everything, supervise
from trl_leaf import build_tokenizer

from leafkernels.integrations.trl_distillation import FireOPDConfig, FireOPDTrainer

METHODS = {"fire": {}, "opd": {"fire_drop": 0.0, "fire_alpha": 0.0, "fire_beta": 0.0}}

LOSSES = ("sampled", "reverse_kl", "forward_kl", "jsd")


class Domain(NamedTuple):
    draw: Callable[[random.Random, bool], str]  # a prompt, of those held out or of the others
    answer: Callable[[str, random.Random], str]
    score: Callable[[str, str], float]
    teacher_steps: int

    def worked(self, rng: random.Random) -> tuple[str, str]:
        prompt = self.draw(rng, False)
        return prompt, self.answer(prompt, rng)

    def accuracy(self, model: Any, prompts: list[str]) -> float:
        """The share of prompts whose most likely answer is right."""
        texts = sample(model, prompts, greedy=True).texts
        return sum(map(self.score, prompts, texts)) / len(prompts)


def draw_sum(rng: random.Random, held_out: bool) -> str:
    return running_sums.draw_prompt(rng, 4, held_out=held_out)


def draw_digits(rng: random.Random, held_out: bool) -> str:
    while True:
        prompt = "".join(rng.choices("0123456789", k=7)) + "="
        if is_held_out(prompt) == held_out:
            return prompt


def backwards(prompt: str, rng: random.Random | None = None) -> str:
    return prompt[-2::-1] + END_TOKEN


DOMAINS = {
    "sums": Domain(draw_sum, running_sums.worked_answer, running_sums.score, 1500),
    "reversal": Domain(draw_digits, backwards, lambda prompt, text: float(text == backwards(prompt)), 250),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=tuple(METHODS), default="fire", help="weights (default: fire)")
    parser.add_argument("--loss", choices=LOSSES, default="sampled", help="what pulls at a token (default: sampled)")
    parser.add_argument("--domains", nargs="+", choices=tuple(DOMAINS), default=["sums"], help="default: sums")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, prompts and draws (default: 0)")
    parser.add_argument("--steps", type=int, default=120, help="steps of distillation (default: 120)")
    parser.add_argument("--teacher-steps", type=int, help="supervised steps of each (default: 1500, reversal 250)")
    parser.add_argument("--student-steps", type=int, default=250, help="those of the student (default: 250)")
    parser.add_argument("--rollouts", type=int, default=1, help="answers to a prompt (default: 1)")
    parser.add_argument("--share-prefixes", action="store_true", help="run what the answers to a prompt share once")
    args = parser.parse_args()
    if min(args.steps, args.student_steps, 1 if args.teacher_steps is None else args.teacher_steps) < 1:
        parser.error("--steps, --teacher-steps and --student-steps must be at least 1")
    return args


def teach(model: Any, domains: list[Domain], rng: random.Random, steps: int) -> None:
    """Supervised steps on worked answers, each batch with as many of every domain."""
    batches = (labelled(domains[row % len(domains)].worked(rng) for row in range(64)) for _ in range(steps))
    for _ in supervise(model, batches):
        pass


def main() -> None:
    args = parse_args()
    rng = seed_everything(args.seed)
    domains = {label: DOMAINS[label] for label in args.domains}
    held_out = {label: [domain.draw(rng, True) for _ in range(200)] for label, domain in domains.items()}
    teachers = {label: build_model(hidden_size=96) for label in domains}
    student = build_model(hidden_size=64)

    def accuracies() -> str:
        found = (f"{label} {domains[label].accuracy(student, held_out[label]):.3f}" for label in domains)
        return "held-out accuracy, " + ", ".join(found)

    for label, teacher in teachers.items():
        steps = args.teacher_steps or domains[label].teacher_steps
        teach(teacher, [domains[label]], rng, steps)
        accuracy = domains[label].accuracy(teacher, held_out[label])
        print(f"teacher, {steps} supervised steps: held-out accuracy, {label} {accuracy:.3f}")
    teach(student, list(domains.values()), rng, args.student_steps)
    print(f"student, {args.student_steps} supervised steps: {accuracies()}")

    labels = [label for _ in range(64 * args.steps) for label in domains][: 64 * args.steps]
    rows = {"prompt": [domains[label].draw(rng, False) for label in labels], "teacher": labels}
    with tempfile.TemporaryDirectory() as folder:
        config = FireOPDConfig(
            output_dir=folder,
            seed=args.seed,
            max_steps=args.steps,
            per_device_train_batch_size=64,
            max_completion_length=32,
            num_generations=args.rollouts,
            share_prefixes=args.share_prefixes,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            fire_loss=args.loss,
            gradient_checkpointing=False,
            **METHODS[args.method],
        )
        trainer = FireOPDTrainer(
            student, teachers, config, train_dataset=Dataset.from_dict(rows), processing_class=build_tokenizer()
        )
        trainer.train()
    history = [line for line in trainer.state.log_history if "fire/teacher_gap" in line]
    first, last = (line["fire/teacher_gap"] for line in (history[0], history[-1]))
    print(f"teacher less student log-probability of a token, first {first:.3f}, last {last:.3f}")
    print(f"student, after {args.steps} steps: {accuracies()}")


if __name__ == "__main__":
    main()
