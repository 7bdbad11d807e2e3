"""Rollouts of the model: candidates are tried eight times, and those that it solves now and then are sampled afresh.

    python examples/study/real/rollouts.py --work runs/real --use measured --families sums reversal

adds to WORK/rollouts/USE-FAMILY.jsonl, a prompt a line in the format of ``python -m leafkernels``; what is there is
kept. ``--pack`` puts the prompts that were taken into results/rollouts.jsonl.gz, from which the other parts read them
where WORK has none.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import model as models
import start
import torch
from model import Policy, Sampled
from tasks import FAMILIES, SEEDS, Problem, problem

ROLLOUTS = 64
TRIES = 8  # of a candidate, and candidates at a time
EASIEST, HARDEST = 0.8, 0.2  # mean reward of the tries
COUNTS = {"measured": 10, "held out": 8}  # prompts of each family
PACKED = Path(__file__).resolve().parent / "results" / "rollouts.jsonl.gz"
Record = dict[str, Any]


def completions(policy: Policy, tasks: Sequence[Problem], found: Sampled) -> list[list[Record]]:
    """For each task one for each answer, as the command reads them; the end token is part of each."""
    rows = []
    count = len(found.mask) // len(tasks)
    for number, (ids, mask, logprobs) in enumerate(zip(found.token_ids, found.mask, found.logprobs, strict=True)):
        chosen = ids[mask].tolist()
        rows.append(
            {
                "token_ids": chosen,
                "logprobs": [round(value, 5) for value in logprobs[mask].tolist()],
                "reward": tasks[number // count].score(policy.text(chosen)),
                "tokens": policy.pieces(chosen),
            }
        )
    return [rows[number * count : (number + 1) * count] for number in range(len(tasks))]


def draw(policy: Policy, tasks: Sequence[Problem], count: int, seed: int, **options: Any) -> list[list[Record]]:
    """``count`` answers to each task, all of one family."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [policy.prompt_ids(task.messages) for task in tasks]
    found = models.sample(policy, prompts, count, FAMILIES[tasks[0].family].limit, generator=generator, **options)
    return completions(policy, tasks, found)


def mean_reward(rows: list[Record]) -> float:
    return sum(row["reward"] for row in rows) / len(rows)


def collect(policy: Policy, use: str, family: str, count: int, path: Path, rollouts: int = ROLLOUTS) -> None:
    """Go through the problems of a use in order until ``count`` have been taken; one line for each that was tried."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = list(read(path))
    taken = sum(bool(line["completions"]) for line in lines)
    with path.open("a", encoding="utf-8") as file:
        for first in range(len(lines) // TRIES * TRIES, 4000, TRIES):
            tasks = [problem(family, use, index) for index in range(first, first + TRIES)]
            tried = draw(policy, tasks, TRIES, SEEDS[use] + first)
            for index, task, rows in zip(range(first, first + TRIES), tasks, tried, strict=True):
                if taken == count:
                    return
                if index < len(lines):
                    continue
                record = {"prompt_id": f"{family}-{index}", "prompt": task.question, "family": family, "index": index}
                record |= {"use": use, "tried": mean_reward(rows), "completions": []}
                if HARDEST <= record["tried"] <= EASIEST:
                    (record["completions"],) = draw(policy, [task], rollouts, SEEDS[use] + 50_000 + index)
                    taken += 1
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
                file.flush()


def read(path: Path) -> Iterator[Record]:
    """The finished lines: one that was cut short is no JSON and ends the file."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    for line in whole.splitlines():
        yield json.loads(line)


def taken(work: Path, use: str, families: Sequence[str] | None = None) -> list[Record]:
    """The prompts of a use that were sampled, by family."""
    found = []
    for family in families or FAMILIES:
        path = work / "rollouts" / f"{use}-{family}.jsonl"
        lines = list(read(path)) if path.exists() else [of for of in packed() if of["use"] == use]
        found += [line for line in lines if line["completions"] and line["family"] == family]
    return found


def packed() -> list[Record]:
    if not PACKED.exists():
        return []
    return [json.loads(line) for line in gzip.decompress(PACKED.read_bytes()).splitlines()]


def pack(work: Path) -> None:
    records = [record for use in COUNTS for record in taken(work, use)]
    text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    PACKED.parent.mkdir(exist_ok=True)
    # Without a time of day, so that the same rollouts are the same bytes.
    PACKED.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--use", choices=COUNTS)
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--count", type=int, help="prompts of each family (default: those of the protocol)")
    arguments = parser.parse_args()
    if arguments.pack:
        return pack(arguments.work)
    if arguments.use is None:
        parser.error("name a use: --use, or --pack")
    start.make(arguments.work, start.STEPS)
    policy = models.load(arguments.work / "start")
    for family in arguments.families:
        path = arguments.work / "rollouts" / f"{arguments.use}-{family}.jsonl"
        collect(policy, arguments.use, family, arguments.count or COUNTS[arguments.use], path)


if __name__ == "__main__":
    main()
