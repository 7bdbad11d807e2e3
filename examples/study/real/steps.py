"""Time of an update with rows and over the prefix tree, on this model. PROTOCOL.md, part 3.

python examples/study/real/steps.py --work runs/real      # adds to results/runs.jsonl.gz
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import model as models  # noqa: E402
import rollouts  # noqa: E402
from agreement import Case  # noqa: E402
from model import Policy  # noqa: E402
from runs import Runs  # noqa: E402

from leafkernels.models import tree_logprobs, tree_stats  # noqa: E402

RUNS = Runs(HERE)
SIZES, ROUNDS = (4, 8, 16), 3
PLANS = ("rows", "auto")
FAMILY = "sorting"
SYSTEM = " ".join(
    [
        "You are a careful assistant that does small tasks with numbers and with words.",
        "You read the task twice before you answer, and you answer in the form that the task asks for and in no other.",
        "You do not explain what you do, you do not repeat the question, and you add no remarks before or after it.",
        "When you are asked to work something out, write every step on a line of its own, with its numbers,",
        "an equals sign and the result, and begin the next step with the result of the one before.",
        "When you are asked to reverse a list, write its parts in the opposite order, with a comma and a space between",
        "them, exactly as they were written, with the same letters, capitals and marks.",
        "When you are asked to sort a list of numbers, write all of them in ascending order, the smallest first, with",
        "a comma and a space between them; a number that appears twice in the list appears twice in your answer.",
        "Never leave a number out, and never write one that was not in the list.",
        "If a task cannot be done as it is asked, write what you can of it and stop there.",
        "Numbers may be negative: then write the minus sign directly before the first digit, without a space.",
        "Do not use words for numbers, do not use separators for thousands, and do not round.",
        "An answer is short: it has at most a few dozen characters, and it ends as soon as the task is done.",
    ]
)


def batch(policy: Policy, record: dict[str, Any], count: int, system: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and response mask of the first ``count`` answers."""
    case = Case(policy, record)
    asked = torch.zeros_like(case.ids, dtype=torch.bool)
    asked[:, case.prompt :] = case.mask
    there = asked.clone()
    there[:, : case.prompt] = True
    parts = [part[:count] for part in (case.ids, there, asked)]
    if system:
        before = policy.tokenizer(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", add_special_tokens=False)["input_ids"]
        ids = torch.tensor(before).expand(count, -1)
        more = (ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool))
        parts = [torch.cat(pair, 1) for pair in zip(more, parts, strict=True)]
    width = int(parts[1].sum(1).max())
    ids, there, asked = (part[:, :width] for part in parts)
    return ids, there, asked


def step(adapted: Any, rows: tuple[Tensor, Tensor, Tensor], plan: str) -> tuple[float, float, Tensor]:
    """Seconds of the clock and of the CPU, and the log-probabilities, of a forward and backward pass."""
    ids, there, asked = rows
    began, cpu = time.perf_counter(), time.process_time()
    found = tree_logprobs(adapted, ids, there, response_mask=asked, entropy=False, plan=plan).logprobs
    adapted.zero_grad()
    found.sum().backward()
    return time.perf_counter() - began, time.process_time() - cpu, found.detach()


def measure(policy: Policy, adapted: Any, record: dict[str, Any], count: int, system: bool) -> dict[str, Any]:
    rows = batch(policy, record, count, system)
    seconds: dict[str, list[tuple[float, float]]] = {plan: [] for plan in PLANS}
    reference = None
    for _ in range(ROUNDS):
        for plan in PLANS:
            *took, found = step(adapted, rows, plan)
            if reference is None:
                reference = found
            torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)  # float32 through 30 blocks
            seconds[plan].append((took[0], took[1]))
    stats = tree_stats(adapted, rows[0], rows[1])
    line: dict[str, Any] = {"K": count, "prompt": int((rows[1] & ~rows[2])[0].sum()), "system": system}
    line |= {"answer": round(float(rows[2].sum(1).float().mean()), 1), "plan": stats.plan}
    line |= {"tokens": [stats.tokens_of_rows, stats.tokens]}
    for place, name in enumerate(("clock", "cpu")):
        line[name] = {plan: round(median(took[place] for took in seconds[plan]), 3) for plan in PLANS}
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = models.load(arguments.work / "start")
    adapted = models.add_adapter(policy.model)
    record = rollouts.taken(arguments.work, "measured", [FAMILY])[0]
    step(adapted, batch(policy, record, 4, False), "auto")  # tries the model on a few tokens, once
    done = {(line["K"], line["system"]) for line in RUNS.of("steps")}
    for system in (False, True):
        for count in SIZES:
            if (count, system) not in done:
                RUNS.add("steps", measure(policy, adapted, record, count, system))


if __name__ == "__main__":
    main()
