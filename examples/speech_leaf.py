"""Train an audio model by the reward of its answers, in TRL: one process or many, LEAF or GRPO.

    python examples/speech_leaf.py --data fsdd:PATH/fsdd.tar.gz --output_dir runs/small --use_cpu --bf16 false
    accelerate launch examples/speech_leaf.py --config examples/recipes/leaf_qwen2_audio.yaml \\
        --data tsv:corpus/train.tsv --eval_data tsv:corpus/dev.tsv
    python examples/speech_leaf.py --config examples/recipes/leaf_qwen2_audio.yaml --data tsv:corpus/train.tsv \\
        --eval_data tsv:corpus/test.tsv --evaluate runs/leaf_qwen2_audio/checkpoint-500

All options of TRL's GRPOConfig, of LeafGRPOConfig and of TRL's ModelConfig are taken, from the command line or a YAML
file. ``--data`` is fsdd:PATH (the Free Spoken Digit Dataset, github.com/Jakobovski/free-spoken-digit-dataset: ``tar czf
fsdd.tar.gz -C recordings .`` makes the archive), espeak (synthetic voices), manifest:FILE.jsonl, or tsv:FILE.

Without ``--model_name_or_path`` the model is a Qwen2-Audio of random weights and 0.2 M parameters. It hears a few
digits and writes them down with their running sums, ``3+5=8 8+9=17`` for 3 5 9; first it learns from a teacher that
hears well and gets every other sum wrong. Voices of the evaluation are heard in neither part. A stopped run goes on
from its last checkpoint. ``--share_prefixes true --gradient_checkpointing false`` runs a recording once for all
of its answers in a micro-batch. ``docs/speech.md`` is the whole way with a corpus and a large model.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.progress import Progress
from speech.data import REWARDS as SUMS
from speech.data import Source, make_source, scores
from speech.evaluation import measure, table_of
from speech.model import LORA_TARGETS, Speaker
from speech.rows import drawn, read_table
from speech.training import Settings, save, warm_start
from transformers import AutoProcessor
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser, get_peft_config
from trl.trainer.utils import create_model_from_path

from leafkernels.integrations.speech_rewards import REWARDS
from leafkernels.integrations.trl import LeafGRPOConfig
from leafkernels.integrations.trl_audio import AudioGRPOTrainer, LeafAudioGRPOTrainer

# GRPO as TRL has it; all others are credit for tokens.
METHODS = {"grpo": AudioGRPOTrainer, **dict.fromkeys(("leaf", "dr_grpo", "tempo", "tree_td"), LeafAudioGRPOTrainer)}


@dataclass
class SpeechArguments:
    """Data, reward and method."""

    data: str = field(metadata={"help": "fsdd:PATH, espeak, manifest:FILE.jsonl or tsv:FILE"})
    eval_data: str = field(default="", metadata={"help": "tsv:FILE of evaluation; other data hold voices out"})
    method: str = field(default="leaf", metadata={"help": f"credit: {', '.join(METHODS)}"})
    reward: str = field(default="", metadata={"help": f"of {', '.join(REWARDS)}; of spoken digits {', '.join(SUMS)}"})
    instruction: str = field(default="Transcribe the audio.", metadata={"help": "what is asked about a table's audio"})
    audio_column: str = field(default="path", metadata={"help": "of a table"})
    reference_column: str = field(default="translation", metadata={"help": "of a table"})
    held_out: str = field(default="", metadata={"help": "voices of the evaluation, with commas between them"})
    digits: int = field(default=3, metadata={"help": "spoken digits in an utterance"})
    utterances: int = field(default=1000, metadata={"help": "drawn for training, where data are drawn"})
    evaluated: int = field(default=200, metadata={"help": "utterances of the evaluation"})
    warm_steps: int = field(default=1200, metadata={"help": "supervised steps of the small model"})
    evaluate: str = field(default="", metadata={"help": "train nothing, evaluate this checkpoint ('base': the model)"})


def sums_reward(name: str) -> Any:
    def reward(completions: list[Any], reference: list[str], **_: Any) -> list[float]:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        return [scores(right, text)[name] for text, right in zip(texts, reference, strict=True)]

    reward.__name__ = name
    return reward


def load(model_args: ModelConfig) -> tuple[Any, Any]:
    name = model_args.model_name_or_path
    model = create_model_from_path(name, revision=model_args.model_revision, dtype=model_args.dtype)
    return model, AutoProcessor.from_pretrained(name, revision=model_args.model_revision, padding_side="left")


def load_small(source: Source, warm_steps: int, seed: int, out: Path) -> tuple[Any, Any]:
    """The small model after its supervised start, which the first process makes."""
    torch.manual_seed(seed)
    speaker = Speaker.load(None, source.alphabet, source.seconds)
    warm = out / "warm.pt"
    with PartialState().main_process_first():
        if not warm.exists() and warm_steps:
            settings = Settings(seed=seed, warm_steps=warm_steps, warm_pool=min(4000, 8 * warm_steps))
            with Progress(disable=not PartialState().is_main_process) as bar:
                task = bar.add_task("supervised", total=warm_steps)
                warm_start(source, speaker, settings, lambda step, _: bar.update(task, completed=step))
            out.mkdir(parents=True, exist_ok=True)
            save(speaker.model.state_dict(), warm)
    if warm_steps:
        speaker.model.load_state_dict(torch.load(warm, weights_only=True))
    return speaker.model, speaker.processor


def read_data(args: SpeechArguments, seed: int, small: bool) -> tuple[Any, Any, Any, Source | None]:
    """Rows to train on, rows to evaluate on, the reward, and the source of what is drawn."""
    kind, _, path = args.data.partition(":")
    if kind == "tsv":
        columns = (args.audio_column, args.reference_column, args.instruction)
        train = read_table(Path(path), *columns)
        evaluation_path = args.eval_data.partition(":")[2]
        evaluation = read_table(Path(evaluation_path), *columns) if evaluation_path else None
        return train, evaluation, named_reward(args.reward or "sentence_bleu"), None
    held_out = [voice for voice in args.held_out.split(",") if voice]
    spoken = args.reward if args.reward in SUMS else "final"
    source = make_source(args.data, held_out, args.digits, spoken, ask=not small)
    train = drawn(source, f"{seed} training", args.utterances, small, held_out=False)
    evaluation = drawn(source, f"{seed} held out", args.evaluated, small, held_out=True)
    if args.reward in REWARDS or kind == "manifest":
        return train, evaluation, named_reward(args.reward or "sentence_bleu"), source
    return train, evaluation, sums_reward(args.reward or "final"), source


def named_reward(name: str) -> Any:
    if name not in REWARDS:
        raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {name!r}")
    return REWARDS[name]


def evaluate(trainer: Any, rows: Any, name: str, out: Path, console: Console) -> dict[str, tuple[float, ...]]:
    """Answer the rows, and print and keep what the answers are worth."""
    answers: list[str] = []
    size = trainer.args.per_device_eval_batch_size
    with Progress(console=console) as bar:
        for start in bar.track(range(0, len(rows), size), description=name):
            answers += trainer.answer([rows[i] for i in range(start, min(start + size, len(rows)))])
    references = list(rows["reference"])
    found = measure(answers, references)
    console.print(table_of(answers, references))
    for metric, (value, low, high) in found.items():
        console.print(f"{name}, {metric}: {value:.2f} ({low:.2f} to {high:.2f})")
    pairs = [{"answer": a, "reference": r} for a, r in zip(answers, references, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({**found, "answers": pairs}, ensure_ascii=False), encoding="utf-8")
    return found


def main(arguments: list[str] | None = None) -> Any:
    parser = TrlParser((SpeechArguments, LeafGRPOConfig, ModelConfig), description=__doc__)
    args, config, model_args = parser.parse_args_and_config(sys.argv[1:] if arguments is None else arguments)
    if args.method not in METHODS:
        raise SystemExit(f"--method must be one of {', '.join(METHODS)}, got {args.method!r}")
    if args.method != "grpo":
        config.estimator = args.method
    out = Path(config.output_dir)
    small = model_args.model_name_or_path is None
    try:
        train, evaluation, reward, source = read_data(args, config.seed, small)
        if small and source is None:
            raise ValueError("the small model knows the letters of drawn data only: tsv needs --model_name_or_path")
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    model, processor = load_small(source, args.warm_steps, config.seed, out) if small else load(model_args)
    adapter = get_peft_config(model_args)
    if small and adapter is None:
        adapter = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=LORA_TARGETS)
    if args.evaluate and args.evaluate != "base":
        model, adapter = PeftModel.from_pretrained(model, args.evaluate), None
    trainer = METHODS[args.method](
        model, reward, config, train, evaluation, processing_class=processor, peft_config=adapter
    )
    console = Console()
    if args.evaluate:
        rows = train if evaluation is None else evaluation
        return evaluate(trainer, rows, f"evaluation of {Path(args.evaluate).name}", out, console)
    is_first = trainer.accelerator.is_main_process
    if is_first and evaluation is not None:
        evaluate(trainer, evaluation, "before", out, console)
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(config.output_dir) if out.is_dir() else None)
    trainer.save_model()
    if is_first and evaluation is not None:
        evaluate(trainer, evaluation, "after", out, console)
    trainer.accelerator.wait_for_everyone()
    return trainer


if __name__ == "__main__":
    main()
