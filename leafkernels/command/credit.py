"""The credit of rollouts by the schemes of ``leafkernels.ESTIMATORS``, in plain lists for display and files.

What a scheme takes is read from its signature, so that a scheme added to ``ESTIMATORS`` is everywhere.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from leafkernels import ESTIMATORS, SpanTree, span_tree
from leafkernels._core.precision import is_rounding
from leafkernels.command.reading import Failure, Prompt

DEFAULT = "leaf"
# The report shows the tree of boundaries of these options, whichever scheme is chosen.
BOUNDARY_OPTIONS = ("num_boundaries", "min_separation", "boundary_scores")


@dataclass
class Credit:
    """The boundaries of a prompt, its nodes and the advantages of one scheme.

    ``nodes[i][k]`` names the node of rollout i at boundary k, -1 where it shares its prefix there with no other.
    ``advantages`` has one value for each token. ``has_spans``: the scheme credits the spans between boundaries.
    """

    boundaries: list[int]
    nodes: list[list[int]]
    advantages: list[list[float]]
    has_spans: bool

    def depth(self, row: int) -> int:
        """How many boundaries the rollout has a node at: the first ones."""
        return sum(node >= 0 for node in self.nodes[row])

    def shared_length(self, row: int) -> int:
        """Tokens of the rollout before the last boundary at which it has a node."""
        depth = self.depth(row)
        return min(self.boundaries[depth - 1], len(self.advantages[row])) if depth else 0

    def members(self, boundary: int, values: Sequence[float]) -> list[list[float]]:
        """For each node at a boundary the entries of ``values`` (one for each rollout) of its rollouts."""
        found: dict[int, list[float]] = {}
        for row, value in zip(self.nodes, values, strict=True):
            if row[boundary] >= 0:
                found.setdefault(row[boundary], []).append(value)
        return list(found.values())


def options_of(name: str) -> dict[str, Any]:
    """The options of a scheme with their defaults: what it takes beside the arguments that all schemes take."""
    parameters = inspect.signature(ESTIMATORS[name]).parameters
    return {option: parameters[option].default for option in ESTIMATORS[name].options if option != "gathered"}


def note_of(name: str) -> str:
    """What a scheme does, in the first sentence of its docstring."""
    text = inspect.getdoc(inspect.unwrap(ESTIMATORS[name])) or ""
    return text.partition("\n")[0]


def advantages_of(
    call: Mapping[str, Any], names: Iterable[str], chosen: str, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The advantages of some schemes, shaped like ``token_ids``.

    ``call``: the arguments that all schemes take. ``options`` are those of the scheme ``chosen``; the others get the
    boundaries among them, where they take any.
    """
    found = {}
    for name in names:
        taken = options_of(name)
        given = options if name == chosen else _boundaries(options)
        found[name] = ESTIMATORS[name](**call, **{key: value for key, value in given.items() if key in taken})
    return found


def tree_of(call: Mapping[str, Any], chosen: str, options: Mapping[str, Any]) -> SpanTree:
    """The tree of boundaries of a call, with the credit of LEAF where that is chosen."""
    return span_tree(**call, **(options if chosen == DEFAULT else _boundaries(options)))


def _boundaries(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in BOUNDARY_OPTIONS}


def check_scheme(name: str, options: Mapping[str, Any], backend: str) -> torch.device:
    """The device that ``backend`` runs on here; a Failure where it cannot run, or an option is wrong.

    Prompts come one by one and are small, so a GPU is used only where Triton, which needs one, is asked for by name.
    """
    device = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    one = torch.zeros((1, 1), device=device)
    call: dict[str, Any] = {"logprobs": one, "token_ids": one.long(), "rewards": one[0]}
    try:
        span_tree(**call, backend=backend)
        advantages_of(call, [name], name, bounded(options, 1))
    except (ImportError, RuntimeError) as error:
        raise Failure(f"--backend {backend} cannot run here: {error}") from error
    except (TypeError, ValueError) as error:
        raise Failure(f"--estimator {name}: {error}") from error
    return device


def pack_prompt(prompt: Prompt, device: torch.device | None = None) -> dict[str, Any]:
    """The prompt's rollouts as packed rows: arguments of ``span_tree`` and of every scheme."""
    call = {
        "logprobs": torch.tensor([x for row in prompt.logprobs for x in row], dtype=torch.float32, device=device),
        "token_ids": torch.tensor([x for row in prompt.token_ids for x in row], dtype=torch.int64, device=device),
        "rewards": torch.tensor(prompt.last, dtype=torch.float64, device=device),
        "cu_seqlens": torch.tensor([0, *accumulate(map(len, prompt.token_ids))], dtype=torch.int32, device=device),
    }
    if prompt.step_rewards is not None:
        flat = [x for row in prompt.step_rewards for x in row]
        call["step_rewards"] = torch.tensor(flat, dtype=torch.float64, device=device)
    return call


def bounded(options: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """The options, with no more boundaries than tokens and none farther apart, which changes nothing.

    What a person types may be any number.
    """
    limits = {key: min(options[key], max(longest, 1)) for key in BOUNDARY_OPTIONS[:2] if options.get(key) is not None}
    return {**options, **limits}


def credit_prompt(
    prompt: Prompt,
    options: Mapping[str, Any],
    device: torch.device | None = None,
    name: str = DEFAULT,
    backend: str = "auto",
) -> Credit:
    """The boundaries of a prompt, and the advantages of the scheme ``name`` with its ``options``."""
    lengths = prompt.lengths
    call = pack_prompt(prompt, device) | {"backend": backend}
    options = bounded(options, max(lengths))
    try:
        tree = tree_of(call, name, options)
        # LEAF's in float64, as the tree has them.
        flat = None if name == DEFAULT else advantages_of(call, [name], name, options)[name]
    except (OverflowError, ValueError) as error:
        # math.fsum of the reference raises where a sum leaves the range of a float.
        raise _too_large(prompt) from error
    boundaries = [p for p in tree.boundaries.tolist() if p >= 0]
    if flat is None:
        advantages = [
            _spread(values, ends, length)
            for values, ends, length in zip(
                tree.spans.values.tolist(), tree.spans.span_ends.tolist(), lengths, strict=True
            )
        ]
    else:
        advantages = [row.tolist() for row in flat.double().cpu().split(lengths)]
    if not all(math.isfinite(value) for row in advantages for value in row):
        raise _too_large(prompt)
    # Adding 0.0 turns -0.0 into 0.0, which is shown without a sign.
    advantages = [[value + 0.0 for value in row] for row in advantages]
    return Credit(boundaries, tree.nodes.tolist(), advantages, "num_boundaries" in options_of(name))


def _spread(values: list[float], ends: list[int], length: int) -> list[float]:
    """One value for each of the tokens of a rollout; 0.0 where it could not be scored."""
    row: list[float] = []
    for value, end in zip(values, ends, strict=True):
        row += [value] * (min(end, length) - len(row))
    return row + [0.0] * (length - len(row))


def _too_large(prompt: Prompt) -> Failure:
    return Failure(f"{prompt.where}: the advantages are not finite, because the rewards (or an option) are too large")


def scored(rewards: Iterable[float]) -> list[float]:
    """The rewards that are numbers."""
    return [reward for reward in rewards if not math.isnan(reward)]


def mean(values: Sequence[float]) -> float:
    """Divided first: the sum may be too large for a float. NaN of none."""
    return math.fsum(value / len(values) for value in values) if values else math.nan


def no_signal(rewards: Iterable[float]) -> bool:
    """Whether nothing can be learned from a group: its scored rewards are all equal, but for rounding, or there is
    none."""
    known = scored(rewards)
    if not known or max(known) == min(known):
        return True
    ends = torch.tensor([min(known), max(known)], dtype=torch.float64)
    return bool(is_rounding(*ends))
