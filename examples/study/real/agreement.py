"""Which credit agrees with this model's own gradients? PROTOCOL.md, part 1.

    python examples/study/real/agreement.py --work runs/real --use measured   # adds to results/runs.jsonl.gz

A prompt that is there is kept. The gradient is that of a fresh LoRA adapter on the last four blocks, in its B matrices.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
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
from leafkernels.models import tree_logprobs  # noqa: E402

RUNS = Runs(HERE)
SEEN, SPLITS, LAST = 8, 4, 4  # K, splits of a prompt, blocks with an adapter
CONTEXTS = (2, 4, 8)
Scheme = Callable[..., Tensor]
# Those that are GRPO times a number for each prompt have its cosines.
SCHEMES: dict[str, Scheme] = {
    **{name: scheme for name, scheme in leafkernels.ESTIMATORS.items() if not scheme.is_scaled_grpo},
    "leaf_b4": partial(leafkernels.span_advantages, num_boundaries=4),
    "tree_td 1, 0.3": partial(leafkernels.tree_td, shrinkage=1.0, group_weight=0.3),
    "tree_td 4, 0.2": partial(leafkernels.tree_td, shrinkage=4.0, group_weight=0.2),
}
DECIDED = ("tree_td", "tempo", "grpo")


class Case:
    """The rollouts of one prompt as tensors: padded on the right, ids of prompt and answer together."""

    def __init__(self, policy: Policy, record: dict[str, Any]) -> None:
        prompt = policy.prompt_ids(problem(record["family"], record["use"], record["index"]).messages)
        rows = record["completions"]
        self.prompt = len(prompt)
        width = max(len(row["token_ids"]) for row in rows)
        self.token_ids = torch.full((len(rows), width), policy.end)
        self.logprobs = torch.zeros(len(rows), width)
        self.mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for number, row in enumerate(rows):
            length = len(row["token_ids"])
            self.token_ids[number, :length] = torch.tensor(row["token_ids"])
            self.logprobs[number, :length] = torch.tensor(row["logprobs"])
            self.mask[number, :length] = True
        self.rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
        self.ids = torch.cat([prompt.expand(len(rows), -1), self.token_ids], 1)

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of ``gradient_agreement``."""
        shared = {"logprobs": self.logprobs, "token_ids": self.token_ids, "rewards": self.rewards}
        return {**shared, "response_mask": self.mask, "group_size": len(self.rewards)}


def weights_of(adapted: Any) -> list[Tensor]:
    """The B matrices: with B = 0 those of A have no gradient."""
    return [weight for name, weight in adapted.named_parameters() if "lora_B" in name]


class LastBlocks:
    """Exact gradients of sum(advantages * log pi) in the adapter of the last blocks, at the cost of these alone.

    What enters these blocks does not depend on the adapter, nor, as long as B is zero, do the log-probabilities: both
    are computed once for all rows, and so is each log-probability's gradient in what the head reads. A backward pass
    then starts behind the head and ends before the blocks. Answers of the same tokens run once, with the sum of their
    advantages. The forward pass of rows that a scheme sees is kept for the other schemes.
    """

    def __init__(self, adapted: Any, case: Case, last: int = LAST) -> None:
        self.weights, self._prompt, self._kept = weights_of(adapted), case.prompt, dict[tuple[int, ...], Tensor]()
        ids, self._answer = case.ids.unique(dim=0, return_inverse=True)
        causal = adapted.get_base_model()
        self._body = causal.model
        self._first = len(self._body.layers) - last
        inputs, call = [], []

        def keep(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs.append(arguments[0] if arguments else named["hidden_states"])
            call.append(named)

        hook = self._body.layers[self._first].register_forward_pre_hook(keep, with_kwargs=True)
        with torch.no_grad():
            states = self._body(input_ids=ids, use_cache=False).last_hidden_state
            head = causal.lm_head.weight
            heads = []
            # The state before a token gives its log-probability.
            for row_states, row_ids in zip(states[:, case.prompt - 1 : -1], ids[:, case.prompt :], strict=True):
                chances = (row_states @ head.T).softmax(-1)
                heads.append(head[row_ids] - chances @ head)
        hook.remove()
        self._inputs, self._heads = inputs[0], torch.stack(heads)
        # Rows begin at their first column and padding comes last, so no mask but the causal one is needed.
        self._named = {
            name: value for name, value in call[0].items() if name in ("position_embeddings", "position_ids")
        }

    def __call__(self, advantages: Tensor, rows: Tensor) -> Tensor:
        answers, places = self._answer[rows].unique(return_inverse=True)
        key = tuple(answers.tolist())
        keeps = len(rows) <= SEEN
        states = self._kept[key] if key in self._kept else self._forward(answers)
        if keeps:
            self._kept[key] = states
        credit = torch.zeros(len(answers), advantages.shape[1]).index_add_(0, places, advantages[rows])
        sent = torch.zeros_like(states)
        sent[:, self._prompt - 1 : -1] = credit[..., None] * self._heads[answers]
        found = torch.autograd.grad(states, self.weights, sent, retain_graph=keeps)
        return torch.cat([part.flatten() for part in found])

    def _forward(self, rows: Tensor) -> Tensor:
        states = self._inputs[rows]
        for block in self._body.layers[self._first :]:
            found = block(states, attention_mask=None, use_cache=False, **self._named)
            states = found[0] if isinstance(found, tuple) else found
        return self._body.norm(states)


def whole_model(adapted: Any, case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """The same of an adapter on any blocks, by autograd through the whole model over the prefix tree."""
    weights = weights_of(adapted)
    asked = torch.zeros_like(case.ids, dtype=torch.bool)
    asked[:, case.prompt :] = case.mask
    there = asked.clone()
    there[:, : case.prompt] = True

    def gradients(advantages: Tensor, rows: Tensor) -> Tensor:
        logprobs = tree_logprobs(
            adapted, case.ids[rows], there[rows], response_mask=asked[rows], entropy=False
        ).logprobs[:, case.prompt :]
        found = torch.autograd.grad((advantages[rows] * logprobs).sum(), weights)
        return torch.cat([part.flatten() for part in found])

    return gradients


def measure(policy: Policy, adapted: Any, record: dict[str, Any], last: int = LAST) -> dict[str, Any]:
    """Cosines (splits, schemes) of one prompt: the model's own gradients, and the n-gram policy's by context."""
    case = Case(policy, record)
    options = {**case.call, "num_rollouts": SEEN, "num_splits": SPLITS, "seed": SEEDS[record["use"]] + record["index"]}
    found = {"model": leafkernels.gradient_agreement(SCHEMES, **options, gradients=LastBlocks(adapted, case, last))}
    for context in CONTEXTS:
        found[f"context {context}"] = leafkernels.gradient_agreement(SCHEMES, **options, context=context)
    line: dict[str, Any] = {"prompt_id": record["prompt_id"], "family": record["family"], "use": record["use"]}
    line |= {"reward": round(float(case.rewards.mean()), 4), "tokens": int(case.mask.sum()), "schemes": list(SCHEMES)}
    line["differing"] = rounded(found["model"].differing)
    return line | {name: rounded(one.cosines) for name, one in found.items()}


def check(policy: Policy, everywhere: Any, record: dict[str, Any], splits: int = 1) -> dict[str, Any]:
    """The same of an adapter on all blocks, over the prefix tree, for the schemes that are decided between and LEAF."""
    case, schemes = Case(policy, record), {name: SCHEMES[name] for name in (*DECIDED, "leaf")}
    options = {**case.call, "num_rollouts": SEEN, "num_splits": splits, "seed": SEEDS[record["use"]] + record["index"]}
    found = leafkernels.gradient_agreement(schemes, **options, gradients=whole_model(everywhere, case))
    return {"prompt_id": record["prompt_id"], "schemes": list(schemes), "all blocks": rounded(found.cosines)}


def rounded(values: Tensor) -> list[list[float | None]]:
    return [[None if x != x else round(x, 6) for x in row] for row in values[0].tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--use", choices=rollouts.COUNTS, default="measured")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--check", type=int, default=0, help="prompts of each family measured on all blocks instead")
    arguments = parser.parse_args()
    policy = models.load(arguments.work / "start")
    records = rollouts.taken(arguments.work, arguments.use, arguments.families)
    if arguments.check:
        everywhere = models.add_adapter(policy.model)
        done = {line["prompt_id"] for line in RUNS.of("all blocks")}
        for family in arguments.families:
            of_family = [record for record in records if record["family"] == family]
            for record in of_family[: arguments.check]:
                if record["prompt_id"] not in done:
                    RUNS.add("all blocks", check(policy, everywhere, record))
        return
    adapted = models.add_adapter(policy.model, LAST)
    done = {(line["use"], line["prompt_id"]) for line in RUNS.of("agreement")}
    for record in records:
        if (record["use"], record["prompt_id"]) not in done:
            RUNS.add("agreement", measure(policy, adapted, record))


if __name__ == "__main__":
    main()
