"""Teach a speech model by the reward of its answers alone: LoRA, groups of rollouts, and one of four ways of credit.

    python examples/speech_leaf.py --data fsdd:PATH/fsdd.tar.gz --out runs/leaf              # spoken digits
    python examples/speech_leaf.py --data fsdd:PATH/fsdd.tar.gz --out runs/grpo --method grpo
    python examples/speech_leaf.py --data espeak --out runs/espeak                           # synthetic voices
    python examples/speech_leaf.py --data manifest:corpus.jsonl --model Qwen/Qwen2-Audio-7B-Instruct --out runs/mine

The model hears a few digits and writes them down with their running sums, ``3+5=8 8+9=17`` for 3 5 9; by default it is
rewarded if the last number is right. Without ``--model`` it is a Qwen2-Audio of random weights and 0.2 M parameters,
which first learns from a teacher that hears well and gets every other sum wrong. Voices of the evaluation are heard in
neither part. That takes about two minutes on one core.

A run that was stopped goes on when it is started again with the same ``--out``, which holds metrics.jsonl, curves.png,
warm.pt and checkpoint.pt at the end. The Free Spoken Digit Dataset is at
github.com/Jakobovski/free-spoken-digit-dataset; ``tar czf fsdd.tar.gz -C recordings .`` makes the archive.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from speech.credit import METHODS
from speech.data import make_source
from speech.model import Speaker
from speech.plot import draw_curves
from speech.sums import REWARDS
from speech.training import PolicyRun, Settings, save, warm_start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Settings()
    parser.add_argument("--data", required=True, help="fsdd:PATH, espeak or manifest:FILE.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an unfinished run goes on")
    parser.add_argument("--model", help="name or path of a Qwen2-Audio checkpoint (default: a small one, built here)")
    parser.add_argument("--device", default="cpu", help="where the model is (default: cpu)")
    parser.add_argument("--held-out", default="", help="voices of the evaluation, with commas between them")
    parser.add_argument("--digits", type=int, default=3, help="spoken digits in an utterance (default: 3)")
    parser.add_argument("--reward", choices=REWARDS, default="final", help="for spoken digits (default: final)")
    parser.add_argument("--method", choices=METHODS, default=defaults.method, help="way of credit (default: leaf)")
    parser.add_argument("--no-rescale", action="store_true", help="leave advantages as large as the method makes them")
    parser.add_argument("--max-tokens", type=int, help="of an answer (default: the longest reference, and two)")
    numbers = {
        "num_boundaries": "boundaries of a prompt, for leaf",
        "seed": "seed of weights, utterances and samples",
        "steps": "policy steps",
        "prompts": "prompts of a step",
        "rollouts": "rollouts of a prompt",
        "updates": "optimiser steps on one batch of rollouts",
        "learning_rate": "of the adapter",
        "temperature": "of sampling",
        "rank": "of the adapter",
        "pool": "training utterances",
        "evaluated": "utterances of the evaluation",
        "eval_every": "policy steps from one evaluation and checkpoint to the next",
        "warm_steps": "supervised steps before, for the small model",
        "warm_pool": "utterances of the supervised steps",
    }
    for name, meaning in numbers.items():
        value = getattr(defaults, name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(value), default=value, help=f"{meaning} (default: {value})")
    args = parser.parse_args()
    for name in (
        "prompts",
        "updates",
        "rank",
        "pool",
        "evaluated",
        "eval_every",
        "warm_pool",
        "learning_rate",
        "temperature",
    ):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.rollouts < 2:
        parser.error(f"--rollouts must be at least 2, got {args.rollouts}: credit compares rollouts of one prompt")
    return args


def main() -> None:
    args = parse_args()
    console = Console()
    transformers.logging.set_verbosity_error()
    held_out = [voice for voice in args.held_out.split(",") if voice]
    try:
        source = make_source(args.data, held_out, args.digits, args.reward, ask=args.model is not None)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    chosen = {name: getattr(args, name) for name in vars(args) if name in Settings.__dataclass_fields__}
    limit = args.max_tokens or source.answer_length + 2
    task = f"{args.data} without {args.held_out!r}, {args.digits} digits, {args.reward}, {args.model}"
    settings = Settings(task=task, limit=limit, rescale=not args.no_rescale, **chosen)

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    speaker = Speaker.load(args.model, source.alphabet, source.seconds)
    speaker.model.to(args.device)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        warm = args.out / "warm.pt"
        if args.model is None and settings.warm_steps:
            if warm.exists():
                speaker.model.load_state_dict(torch.load(warm, weights_only=True))
            else:
                task = bar.add_task("supervised", total=settings.warm_steps, note="")
                warm_start(source, speaker, settings, lambda step, note: bar.update(task, completed=step, note=note))
                save(speaker.model.state_dict(), warm)
        try:
            run = PolicyRun(source, speaker, settings, args.out)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        policy = bar.add_task("policy", total=settings.steps, completed=run.step, note="")
        run.run(lambda step, note: bar.update(policy, completed=step, note=note))

    evaluated = [line["held_out"] for line in run.history if "held_out" in line]
    for name in evaluated[0]:
        console.print(
            f"unheard voices, greedy, {name}: before {evaluated[0][name]:.3f}, after {evaluated[-1][name]:.3f}"
        )
    draw_curves(run.history, f"{settings.method}, seed {settings.seed}", args.out / "curves.png")


if __name__ == "__main__":
    main()
