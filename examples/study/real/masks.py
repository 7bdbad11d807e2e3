"""Importance ratios of the policy that sampled, by top-p, with the whole softmax and with a sampling mask.

python examples/study/real/masks.py --work runs/real      # PROTOCOL.md, part 4; adds to results/runs.jsonl.gz
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import model as models  # noqa: E402
import rollouts  # noqa: E402
from model import Policy  # noqa: E402
from runs import Runs  # noqa: E402
from tasks import FAMILIES, SEEDS, problem  # noqa: E402

import leafkernels  # noqa: E402

RUNS = Runs(HERE)
TOP_P = (1.0, 0.95, 0.9, 0.8)
PROMPTS, ROLLOUTS = 4, 16


@torch.no_grad()
def ratios(policy: Policy, prompt: Tensor, top_p: float, count: int, limit: int, seed: int) -> dict[str, Any]:
    """Of fresh rollouts: log-ratios token by token by both ways, the answers' lengths, and how many ids were kept."""
    generator = torch.Generator().manual_seed(seed)
    found = models.sample(policy, [prompt], count, limit, top_p=top_p, generator=generator)
    sampler = found.logprobs - found.kept_mass.log()
    ids = torch.cat([prompt.expand(count, -1), found.token_ids], 1)
    logits = policy.model(input_ids=ids).logits[:, len(prompt) - 1 : -1]
    kept = leafkernels.SamplingMask.from_logits(logits, top_p=top_p, token_ids=found.token_ids)
    result: dict[str, Any] = {"kept": kept.offsets.diff().view(found.mask.shape)[found.mask].tolist()}
    for name, mask in (("whole softmax", None), ("sampling mask", kept)):
        surprisal = leafkernels.surprisal_entropy(
            logits, found.token_ids, response_mask=found.mask, sampling_mask=mask
        ).surprisal
        result[name] = [row[live].tolist() for row, live in zip(-surprisal - sampler, found.mask, strict=True)]
    return result


def spread(values: Tensor) -> dict[str, float]:
    low, high = values.quantile(torch.tensor([0.05, 0.95])).tolist()
    found = {"mean": float(values.mean()), "deviation": float(values.std()), "low": low, "high": high}
    return {name: round(value, 5) for name, value in found.items()}


def summary(top_p: float, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the ratios of all prompts: at tokens, and of whole answers (the product over their tokens)."""
    kept = torch.tensor([float(count) for part in parts for count in part["kept"]])
    line: dict[str, Any] = {"top_p": top_p, "answers": sum(len(part["sampling mask"]) for part in parts)}
    line |= {"tokens": len(kept), "kept mean": round(float(kept.mean()), 2), "kept median": float(kept.median())}
    for name in ("whole softmax", "sampling mask"):
        rows = [torch.tensor(row) for part in parts for row in part[name]]
        line[name] = {
            "token": spread(torch.cat(rows).exp()),
            "answer": spread(torch.stack([row.sum() for row in rows]).exp()),
        }
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--top-p", type=float, nargs="+", choices=TOP_P, default=list(TOP_P))
    arguments = parser.parse_args()
    policy = models.load(arguments.work / "start")
    done = [line["top_p"] for line in RUNS.of("masks")]
    for top_p in arguments.top_p:
        if top_p in done:
            continue
        parts = []
        for family, of in FAMILIES.items():
            for record in rollouts.taken(arguments.work, "measured", [family])[:PROMPTS]:
                prompt = policy.prompt_ids(problem(family, "measured", record["index"]).messages)
                seed = SEEDS["measured"] + 80_000 + record["index"]
                parts.append(ratios(policy, prompt, top_p, ROLLOUTS, of.limit, seed))
        RUNS.add("masks", summary(top_p, parts))


if __name__ == "__main__":
    main()
