"""The credit of one prompt's rollouts, in plain lists."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from leafkernels import span_tree
from leafkernels._core.precision import is_rounding
from leafkernels.command.reading import Failure, Prompt


@dataclass
class Credit:
    """``span_tree`` of one prompt. Row i has ``depths[i]`` shared spans, one for each node it is in, and then a tail.

    ``ends[i][k]`` is cut at the row's length, so span k is tokens [ends[i][k - 1], ends[i][k]) of the row.
    """

    boundaries: list[int]
    nodes: list[list[int]]
    depths: list[int]
    ends: list[list[int]]
    values: list[list[float]]
    means: list[list[float]]

    def advantages(self, lengths: list[int]) -> list[list[float]]:
        """One value for each token of every row; 0.0 in rows that could not be scored."""
        rows = []
        for length, ends, values in zip(lengths, self.ends, self.values, strict=True):
            row: list[float] = []
            for end, value in zip(ends, values, strict=True):
                row += [value] * (end - len(row))
            rows.append(row + [0.0] * (length - len(row)))
        return rows


def check_backend(backend: str) -> torch.device:
    """The device that ``backend`` runs on here; a Failure where it cannot run.

    Prompts come one by one and are small, so a GPU is used only where Triton, which needs one, is asked for by name.
    """
    device = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    one = torch.zeros((1, 1), device=device)
    try:
        span_tree(one, one.long(), one[0], backend=backend)
    except (ImportError, RuntimeError) as error:
        raise Failure(f"--backend {backend} cannot run here: {error}") from error
    return device


def pack_prompt(prompt: Prompt, device: torch.device) -> dict[str, Any]:
    """The prompt's rollouts as packed rows: arguments of ``span_tree`` and of every estimator."""
    return {
        "logprobs": torch.tensor([x for row in prompt.logprobs for x in row], dtype=torch.float32, device=device),
        "token_ids": torch.tensor([x for row in prompt.token_ids for x in row], dtype=torch.int64, device=device),
        "rewards": torch.tensor(prompt.rewards, dtype=torch.float64, device=device),
        "cu_seqlens": torch.tensor([0, *accumulate(map(len, prompt.token_ids))], dtype=torch.int32, device=device),
    }


def bound_options(options: Mapping[str, Any], lengths: list[int]) -> dict[str, Any]:
    """The options, with no more boundaries than tokens and none farther apart, which changes nothing.

    What a person types may be any number.
    """
    longest = max(1, *lengths)
    separation = options["min_separation"]
    return {
        **options,
        "num_boundaries": min(options["num_boundaries"], longest),
        "min_separation": None if separation is None else min(separation, longest),
    }


def credit_prompt(prompt: Prompt, options: dict[str, Any], device: torch.device) -> Credit:
    """The tree of the prompt's rollouts; ``options`` are keyword arguments of ``span_tree``."""
    lengths = [len(row) for row in prompt.token_ids]
    try:
        tree = span_tree(**pack_prompt(prompt, device), **bound_options(options, lengths))
    except (OverflowError, ValueError) as error:
        # What math.fsum of the reference raises where a sum leaves the range of a float.
        raise _too_large(prompt) from error
    # Adding 0.0 turns -0.0 into 0.0, which nobody wants to see with a sign.
    values: list[list[float]] = (tree.spans.values + 0.0).tolist()
    if not all(math.isfinite(value) for row in values for value in row):
        raise _too_large(prompt)
    nodes: list[list[int]] = tree.nodes.tolist()
    return Credit(
        boundaries=[p for p in tree.boundaries.tolist() if p >= 0],
        nodes=nodes,
        depths=[sum(node >= 0 for node in row) for row in nodes],
        ends=[
            [min(end, length) for end in row]
            for row, length in zip(tree.spans.span_ends.tolist(), lengths, strict=True)
        ],
        values=values,
        means=tree.spans.node_values.tolist(),
    )


def _too_large(prompt: Prompt) -> Failure:
    return Failure(f"{prompt.where}: the advantages are not finite, because the rewards (or an option) are too large")


def scored(rewards: list[float]) -> list[float]:
    """The rewards that are numbers."""
    return [reward for reward in rewards if not math.isnan(reward)]


def no_signal(rewards: list[float]) -> bool:
    """Whether nothing can be learned from a group: its scored rewards are all equal, but for rounding, or there is
    none."""
    known = scored(rewards)
    if not known or max(known) == min(known):
        return True
    ends = torch.tensor([min(known), max(known)], dtype=torch.float64)
    return bool(is_rounding(*ends))
