"""Does a speech model that scores its own tokens answer better when it looks ahead? PROTOCOL.md, "Speech".

python examples/study/lookahead/speech_model.py --data PATH/fsdd.tar.gz --work runs/study   # goes on where it stopped
python examples/study/lookahead/speech_model.py --report     # results/speech_tables.md, results/speech.png
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from lookahead import Answers, Settings, learn, name_of, pick_best, plot, preferred, win_rate  # noqa: E402
from paired import cheapest, compare, holm, less  # noqa: E402
from run import Run, warm_speaker  # noqa: E402
from runs import Runs  # noqa: E402
from speech.data import SpokenSums, read_fsdd  # noqa: E402
from speech.model import Answers as Sampled  # noqa: E402
from speech.model import Prompts, Speaker  # noqa: E402
from speech.training import Pool, draw_pool  # noqa: E402

from leafkernels.lookahead import RewardChannel, RewardTransformer  # noqa: E402

DIGITS, AT_ONCE = 4, 50
# What is rewarded and how often the teacher slips; the share of the best token's probability that a fork asks for.
TASKS = {("final", 0.5): 0.25, ("prefix", 0.9): 0.05}
LOSSES = ("sequence_bt", "token_bt", "token_bce", "sequence_bce")
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
BEAMS = (2, 3, 4, 6, 8, 12, 16)
VOICES = ("voices of training", "unheard voice")


def settings_of(min_p: float) -> list[Settings]:
    """The paper's forks, those where the model is in doubt, and the main one first."""
    in_doubt = [(2, 1, 3), (2, 1, 0), (2, 1, 1), (2, 1, 6), (3, 1, 3), (2, 4, 2), (2, 10, 2)]
    return [*((*triple, min_p) for triple in in_doubt), (2, 10, 2, 0.0), (2, 4, 2, 0.0), (2, 1, 3, 0.0)]


class Listener:
    """The frozen model of a task and voice, and the ways to answer with it."""

    def __init__(self, speaker: Speaker, source: SpokenSums) -> None:
        self.speaker, self.source = speaker, source
        self.limit = source.answer_length + 2
        speaker.model.requires_grad_(False).eval()

    def spell(self, token_ids: Sequence[int]) -> str:
        ends = self.speaker.end_ids.tolist()
        return self.speaker.spell([token for token in token_ids if token not in ends])

    @torch.no_grad()
    def sampled(self, pool: Pool, count: int) -> tuple[Sampled, list[Tensor]]:
        """``count`` answers to each utterance, and the hidden states at their tokens, (rows, T, D) of each layer."""
        found: list[tuple[Sampled, list[Tensor]]] = []
        for start in range(0, len(pool), AT_ONCE):
            prompts = self.speaker.embed(pool.features[start : start + AT_ONCE]).repeat(count)
            answers = self.speaker.sample(prompts, self.limit)
            found.append((answers, self._hidden(prompts, answers)))

        def joined(parts: list[Tensor]) -> Tensor:
            gaps = [self.limit - part.shape[1] for part in parts]
            padded = [
                torch.nn.functional.pad(part, (*[0, 0] * (part.dim() - 2), 0, gap))
                for part, gap in zip(parts, gaps, strict=True)
            ]
            return torch.cat(padded)

        answers = Sampled(
            joined([one.token_ids for one, _ in found]),
            joined([one.mask for one, _ in found]),
            [text for one, _ in found for text in one.texts],
        )
        return answers, [
            joined(list(layer_states)) for layer_states in zip(*(states for _, states in found), strict=True)
        ]

    def _hidden(self, prompts: Prompts, answers: Sampled) -> list[Tensor]:
        inner, length = self.speaker.inner, answers.token_ids.shape[1]
        said = inner.get_input_embeddings()(answers.token_ids)
        mask = torch.cat([prompts.mask, answers.mask.to(prompts.mask.dtype)], dim=1)
        output = inner.model.language_model(
            inputs_embeds=torch.cat([prompts.embeddings, said], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            output_hidden_states=True,
        )
        return [states[:, -length:].clone() for states in output.hidden_states]

    def look_ahead(self, wrapped: RewardTransformer, pool: Pool, **options: Any) -> Answers:
        texts, tokens = [], []
        for start in range(0, len(pool), AT_ONCE):
            part = pool.features[start : start + AT_ONCE]
            found = wrapped.generate_all(
                [features["input_ids"] for features in part],
                inputs={
                    name: torch.stack([features[name] for features in part])
                    for name in ("input_features", "feature_attention_mask")
                },
                max_new_tokens=self.limit,
                suppress_tokens=[self.speaker.audio_id],
                **options,
            )
            texts += [self.spell(answer.token_ids) for answer in found]
            tokens += [answer.num_tokens for answer in found]
        return Answers(texts, tokens)

    @torch.no_grad()
    def beams(self, pool: Pool, *, count: int) -> Answers:
        texts, tokens = [], []
        for start in range(0, len(pool), AT_ONCE):
            prompts = self.speaker.embed(pool.features[start : start + AT_ONCE])
            found = self.speaker.inner.generate(
                inputs_embeds=prompts.embeddings,
                attention_mask=prompts.mask,
                max_new_tokens=self.limit,
                suppress_tokens=[self.speaker.audio_id],
                num_beams=count,
                do_sample=False,
            )
            is_end = torch.isin(found, self.speaker.end_ids)
            live = is_end.cumsum(1) - is_end.long() == 0
            texts += [self.spell(row[keep].tolist()) for row, keep in zip(found, live, strict=True)]
            tokens += (count * live.sum(1)).tolist()
        return Answers(texts, tokens)


def judge(source: SpokenSums, pool: Pool, answers: Answers) -> dict[str, Any]:
    """What the task rewards; the right prefix of the answer tells apart two answers with a wrong last number."""
    scores = [source.scores(*pair) for pair in zip(pool.utterances, answers.texts, strict=True)]
    judged = [(score[source.reward], score["prefix"]) for score in scores]
    means = {name: sum(score[name] for score in scores) / len(scores) for name in ("final", "prefix")}
    return {**means, "tokens": sum(answers.tokens) / len(scores), "judged": judged}


def run_one(
    seed: int, task: tuple[str, float], clips: Any, work: Path, bar: Progress, num_problems: int, num_prompts: int
) -> dict[str, Any]:
    start = time.perf_counter()
    reward, slip = task
    run = Run(seed, DIGITS, reward, slip, "grpo")
    speaker = warm_speaker(run, clips, work, bar)
    source = SpokenSums(clips, [run.voice], DIGITS, reward, "")
    listener = Listener(speaker, source)
    torch.manual_seed(seed)
    pool = draw_pool(source, speaker, f"{seed} preferences", num_prompts)
    samples, hidden = listener.sampled(pool, 8)
    rewards = torch.tensor(
        [source.scores(pool.utterances[row // 8], text)[reward] for row, text in enumerate(samples.texts)]
    ).view(-1, 8)
    pairs = preferred(rewards)
    models = {}
    for kind in LOSSES:
        torch.manual_seed(seed)
        channel = learn(hidden, samples.mask, *pairs, kind=kind, steps=300)
        models[kind] = RewardTransformer(speaker.inner, channel)
    del hidden
    torch.manual_seed(seed)
    untaught = RewardTransformer(speaker.inner, RewardChannel(2, 64, width=64))
    main, *others = settings_of(TASKS[task])
    voices = {}
    for held_out, voice in enumerate(VOICES):
        problems = draw_pool(source, speaker, f"{seed} problems", num_problems, held_out=bool(held_out))
        torch.manual_seed(seed)
        drawn, states = listener.sampled(problems, max(COUNTS))
        answers: dict[str, Answers] = {}

        def ahead(model: RewardTransformer, settings: Settings, problems: Pool = problems, **more: Any) -> Answers:
            names = ("width", "chunk", "depth", "min_p")
            return listener.look_ahead(model, problems, **dict(zip(names, settings, strict=True)), **more)

        first = models["sequence_bt"]
        answers["greedy"] = ahead(first, (1, 1, 0, 0.0))
        for kind, model in models.items():
            with torch.no_grad():
                token_rewards = model.channel(states)
            best = partial(pick_best, drawn.texts, token_rewards, drawn.mask, max(COUNTS))
            if kind == "sequence_bt":
                answers |= {"a sample" if count == 1 else f"best of {count}": best(count) for count in COUNTS}
                answers |= {name_of(settings): ahead(model, settings) for settings in (main, *others)}
                answers["main, end counted"] = ahead(model, main, with_end=True)
            else:
                answers[f"main, {kind}"] = ahead(model, main)
                answers[f"best of 8, {kind}"] = best(8)
        answers["main, nothing learnt"] = ahead(untaught, main)
        answers |= {f"{count} beams": listener.beams(problems, count=count) for count in BEAMS}
        results = {name: judge(source, problems, chosen) for name, chosen in answers.items()}
        greedy = results["greedy"]["judged"]
        for result in results.values():
            result["wins"] = win_rate(result.pop("judged"), greedy)
        voices[voice] = results
    return {
        "seed": seed,
        "reward": reward,
        "slip": slip,
        "held out": run.voice,
        "pairs": len(pairs[0]),
        "sampled": float(rewards.double().mean()),
        "voices": voices,
        "seconds": round(time.perf_counter() - start),
    }


class Found:
    """The results of a task and of voices, over the seeds."""

    def __init__(self, lines: list[dict[str, Any]], reward: str, voice: str) -> None:
        self.results_per_seed, self.reward = [line["voices"][voice] for line in lines], reward
        self.names = list(self.results_per_seed[0])

    def values(self, name: str, key: str = "") -> np.ndarray:
        return np.array([results[name][key or self.reward] for results in self.results_per_seed])

    def tokens(self, name: str) -> float:
        return float(self.values(name, "tokens").mean())

    def less(self, name: str, base: str) -> str:
        return less(self.values(name), self.values(base))

    def peer(self, name: str, kind: str) -> str | None:
        """The cheapest best-of-n, or beam search, that runs at least as many tokens."""
        peers = {"best": [peer for peer in self.names if peer in {f"best of {count}" for count in COUNTS}]}
        peers["beams"] = [peer for peer in self.names if peer.endswith("beams")]
        return cheapest(self.tokens(name), {peer: self.tokens(peer) for peer in peers[kind]})


def report(folder: Path) -> None:
    lines = Runs(folder).of("speech")
    text, primary, pictures = [], [], {}
    for task, min_p in TASKS.items():
        reward, slip = task
        chosen = [line for line in lines if (line["reward"], line["slip"]) == task]
        main = name_of(settings_of(min_p)[0])
        for voice in VOICES:
            found = Found(chosen, reward, voice)
            title = f"{DIGITS} {reward} {slip}, {voice}"
            text += [
                f"**{title}**, {len(chosen)} seeds, {np.mean([line['pairs'] for line in chosen]):.0f} pairs a seed",
                "",
                f"| system (look ahead: width, chunk, depth) | tokens | {reward} | less greedy | wins | less best of n "
                "| less beams |",
                "|---|---|---|---|---|---|---|",
            ]
            for name in found.names:
                row = [name, f"{found.tokens(name):.1f}", f"{found.values(name).mean():.3f}"]
                row += [
                    "" if name == "greedy" else found.less(name, "greedy"),
                    f"{found.values(name, 'wins').mean():.3f}",
                ]
                for kind in ("best", "beams"):
                    peer = found.peer(name, kind) if name.startswith(("look", "main")) else None
                    row.append(f"{found.less(name, peer)} ({peer})" if peer else "")
                text.append("| " + " | ".join(row) + " |")
            text.append("")
            for base in ("greedy", found.peer(main, "best")):
                assert base is not None
                test = compare(found.values(main), found.values(base))
                primary.append((f"{title}: {main} less {base}", found.less(main, base), test["p"]))
            pictures[title] = {
                name: {"tokens": found.tokens(name), "accuracy": found.values(name).mean()}
                for name in found.names
                if name.startswith("look") or not (name.startswith("main") or "," in name)
            }
    text += ["| primary | | p | p, Holm |", "|---|---|---|---|"]
    for (name, difference, p), corrected in zip(primary, holm([p for *_, p in primary]), strict=True):
        text.append(f"| {name} | {difference} | {p:.4f} | {corrected:.4f} |")
    (folder / "results" / "speech_tables.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    draw(pictures, folder / "results" / "speech.png")


def draw(pictures: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for axis, (title, results) in zip(axes.flat, pictures.items(), strict=True):
        plot(axis, results)
        axis.set(title=title, ylabel="what the task rewards, mean")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the Free Spoken Digit Dataset, a tar archive")
    parser.add_argument("--work", type=Path, help="folder for the supervised starts")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(8)))
    parser.add_argument("--problems", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--out", type=Path, default=HERE, help="folder that gets results/runs.jsonl.gz")
    parser.add_argument("--report", action="store_true", help="write tables and picture of what has run")
    args = parser.parse_args()
    if args.report:
        return report(args.out)
    if args.data is None or args.work is None:
        parser.error("name the recordings and a folder: --data, --work")
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    clips = read_fsdd(args.data)
    runs = Runs(args.out)
    done = {(line["seed"], line["reward"], line["slip"]) for line in runs.of("speech")}
    with Progress() as bar:
        for seed, task in bar.track([(seed, task) for seed in args.seeds for task in TASKS], description="runs"):
            if (seed, *task) in done:
                continue
            runs.add("speech", run_one(seed, task, clips, args.work, bar, args.problems, args.prompts))


if __name__ == "__main__":
    main()
