"""Does a model that scores its own tokens answer better when it looks ahead? See PROTOCOL.md.

python examples/study/lookahead/run.py              # results/runs.jsonl.gz; goes on where it stopped
python examples/study/lookahead/run.py --report     # results/tables.md, results/accuracy.png
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import paired  # noqa: E402
from lookahead import (  # noqa: E402
    Settings,
    draw,
    draw_pairs,
    look_ahead,
    measure,
    name_of,
    slipping_answer,
    systems,
    train_channel,
    win_rate,
)
from running_sums import build_model, draw_prompt, sample, seed_everything, token_logprobs, warm_up  # noqa: E402
from runs import Runs  # noqa: E402

from leafkernels import ESTIMATORS, gradient_agreement, span_advantages, surprisal_entropy, tree_td  # noqa: E402
from leafkernels.lookahead import RewardChannel, RewardTransformer  # noqa: E402

MAIN: Settings = (2, 1, 3, 0.25)
PAPER: Settings = (2, 10, 2, 0.0)
SETTINGS: list[Settings] = [
    PAPER,
    (2, 4, 2, 0.0),
    (2, 1, 3, 0.0),
    *((2, 1, depth, 0.25) for depth in (0, 1)),
    MAIN,
    (2, 1, 6, 0.25),
    (3, 1, 3, 0.25),
    (4, 1, 3, 0.25),
    (2, 2, 3, 0.25),
    (2, 4, 2, 0.25),
    (2, 10, 2, 0.25),
    (2, 1, 3, 0.1),
    (2, 1, 3, 0.5),
]
# Samples and beams that were added to compare at equal tokens; drawn last, so that nothing else draws otherwise.
PEERS = (3, 6, 12, 16)
LOSSES = ("sequence_bt", "token_bt", "token_bce", "sequence_bce")


def run_seed(seed: int, warmup_steps: int, num_problems: int, num_prompts: int) -> dict[str, Any]:
    start = time.perf_counter()
    rng = seed_everything(seed)
    held_out = [draw_prompt(rng, 5, held_out=True) for _ in range(num_problems)]
    model = build_model()
    for _ in warm_up(model, rng, num_terms=[5], steps=warmup_steps, teacher=slipping_answer):
        pass
    pairs = draw_pairs(model, [draw_prompt(rng, 5, held_out=False) for _ in range(num_prompts)])
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for loss in LOSSES:
        torch.manual_seed(seed)
        wrapped = train_channel(model, pairs, kind=loss)
        if loss == "sequence_bt":
            first, tried = wrapped, systems(SETTINGS, (2, 4, 8))
            tried |= {"with end": partial(look_ahead, width=2, chunk=1, depth=3, min_p=0.25, with_end=True)}
        else:
            tried = systems([MAIN, PAPER], (8,))
            tried = {name: system for name, system in tried.items() if "beams" not in name and name != "greedy"}
        results[loss] = {name: measure(system, wrapped, held_out) for name, system in tried.items()}
    untaught = RewardTransformer(model, RewardChannel(2, 64, width=64))
    results["no training"] = {name_of(MAIN): measure(systems([MAIN], ())[name_of(MAIN)], untaught, held_out)}
    agreement = boundaries(first, [draw_prompt(rng, 5, held_out=False) for _ in range(64)])
    peers = {name: system for name, system in systems([], PEERS).items() if name != "greedy"}
    results["sequence_bt"] |= {name: measure(system, first, held_out) for name, system in peers.items()}
    greedy = results["sequence_bt"]["greedy"]["judged"]
    for loss_results in results.values():
        for result in loss_results.values():
            result["wins"] = win_rate(result.pop("judged"), greedy)
    return {
        "seed": seed,
        "pairs": len(pairs.chosen),
        "sampled": pairs.rollouts.rewards.mean().item(),
        "results": results,
        "agreement": agreement,
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def boundaries(wrapped: RewardTransformer, prompts: list[str]) -> dict[str, float]:
    """Agreement of LEAF's gradient by what ranks its boundaries, and that of other schemes."""
    count = 32
    rollouts = sample(wrapped.model, prompts, count)
    length = rollouts.token_ids.shape[1]
    output = wrapped(input_ids=rollouts.sequences)
    rewards = output.rewards[:, -length - 1 :]
    scores = {
        "leaf by the channel's jumps": (rewards[:, 1:] - rewards[:, :-1]).abs(),
        "leaf by entropy": surprisal_entropy(output.logits[:, -length - 1 : -1], rollouts.token_ids).entropy,
        "leaf at random": torch.rand(rollouts.token_ids.shape),
    }
    logprobs = token_logprobs(wrapped.model, rollouts)
    common = {"response_mask": rollouts.response_mask, "group_size": count}
    found: dict[str, float] = {}
    others = {name: ESTIMATORS[name] for name in ("dr_grpo", "tempo")}
    others["tree_td 1, 0.3"] = partial(tree_td, shrinkage=1.0, group_weight=0.3)
    leaf = partial(span_advantages, num_boundaries=2)
    # Of a split a scheme sees log-probabilities, not `boundary_scores`; what else ranks boundaries goes in their place.
    for name, ranked in {"leaf by surprisal": -logprobs, **scores}.items():
        schemes = {"leaf": leaf, **(others if name == "leaf by surprisal" else {})}
        agreement = gradient_agreement(schemes, -ranked, rollouts.token_ids, rollouts.rewards, **common, context=4)
        means = agreement.mean()
        found |= {name if scheme == "leaf" else scheme: value for scheme, value in means.items()}
    return found


def report(folder: Path) -> None:
    lines = Runs(folder).of("sums")
    main_results = [line["results"]["sequence_bt"] for line in lines]

    def over_seeds(key: str, name: str, loss: str = "sequence_bt") -> list[float]:
        return [line["results"][loss][name][key] for line in lines]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def less(values: list[float], base: list[float]) -> str:
        return paired.less(np.array(values), np.array(base))

    tokens = {name: mean(over_seeds("tokens", name)) for name in main_results[0]}

    def less_peer(name: str, belongs: Callable[[str], bool]) -> str:
        """Less the cheapest of the others that runs at least as many tokens."""
        peer = paired.cheapest(tokens[name], {other: cost for other, cost in tokens.items() if belongs(other)})
        if peer is None or not name.startswith(("look", "with end")):
            return ""
        return f"{less(over_seeds('accuracy', name), over_seeds('accuracy', peer))} ({peer})"

    greedy = over_seeds("accuracy", "greedy")
    text = [
        f"{len(lines)} seeds; {mean([line['sampled'] for line in lines]):.3f} of the samples are right, "
        f"{mean([line['pairs'] for line in lines]):.0f} pairs a seed.",
        "",
        "| system (look ahead: width, chunk, depth) | tokens | right | less greedy | wins against greedy "
        "| less best of n | less beams |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in main_results[0]:
        right = over_seeds("accuracy", name)
        text.append(
            f"| {name} | {mean(over_seeds('tokens', name)):.1f} | {mean(right):.3f} | {less(right, greedy)} | "
            f"{mean(over_seeds('wins', name)):.3f} | {less_peer(name, lambda other: other.startswith('best'))} | "
            f"{less_peer(name, lambda other: other.endswith('beams'))} |"
        )
    text += ["", "| loss | " + " | ".join((name_of(MAIN), name_of(PAPER), "best of 8")) + " |", "|---|---|---|---|"]
    for loss in LOSSES:
        cells = [
            f"{mean(over_seeds('accuracy', name, loss)):.3f}" for name in (name_of(MAIN), name_of(PAPER), "best of 8")
        ]
        difference = less(over_seeds("accuracy", name_of(MAIN), loss), over_seeds("accuracy", name_of(MAIN)))
        text.append(f"| {loss} | {cells[0]} ({difference} to sequence_bt) | {cells[1]} | {cells[2]} |")
    untaught = over_seeds("accuracy", name_of(MAIN), "no training")
    text += [
        f"| a channel that has learnt nothing | {mean(untaught):.3f} ({less(untaught, greedy)} to greedy) | | |",
        "",
    ]
    for base in ("greedy", "best of 2"):
        pair = over_seeds("accuracy", name_of(MAIN)), over_seeds("accuracy", base)
        p = paired.compare(*map(np.array, pair))["p"]
        text.append(f"Primary, {name_of(MAIN)} less {base}: {less(*pair)}, sign-flip p = {p:.4f}.")
    text += ["", "| gradient agreement | mean | less LEAF by surprisal |", "|---|---|---|"]
    by_surprisal = [line["agreement"]["leaf by surprisal"] for line in lines]
    for name in lines[0]["agreement"]:
        values = [line["agreement"][name] for line in lines]
        text.append(f"| {name} | {mean(values):.3f} | {less(values, by_surprisal)} |")
    folder /= "results"
    (folder / "tables.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    means = {
        name: {key: mean(over_seeds(key, name)) for key in ("tokens", "accuracy")}
        for name in main_results[0]
        if name != "with end"
    }
    draw(means, folder / "accuracy.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="write tables and picture of what has run")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--warmup-steps", type=int, default=900)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--out", type=Path, default=HERE, help="folder that gets results/runs.jsonl.gz")
    args = parser.parse_args()
    if args.report:
        report(args.out)
        return
    runs = Runs(args.out)
    done = [line["seed"] for line in runs.of("sums")]
    for seed in sorted(set(range(args.seeds)) - set(done)):
        line = run_seed(seed, args.warmup_steps, args.problems, args.prompts)
        runs.add("sums", line)
        print(f"seed {seed}: {line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
