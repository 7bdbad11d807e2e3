"""Which plan a batch is run by with a model, and why."""

import math
import weakref
from typing import Any, NamedTuple

import torch

from leafkernels._core.checks import check_count
from leafkernels.models.asking import (
    bare_model,
    is_checkpointed,
    name_of_cache,
    parameters_of,
    text_config,
    turns_change,
)
from leafkernels.models.batch import Rows, TreeBatch
from leafkernels.models.comparison import compared, looks_ahead
from leafkernels.models.heads import Head, head_of
from leafkernels.models.masks import why_no_masks, why_no_sharing
from leafkernels.models.plan import KINDS, ROWS, TREE, TREE_BELOW, TRUNKS, Plan, Weights, cheapest, plans
from leafkernels.models.ranks import largest, why_alone

_INFINITE = math.inf
_KINDS_OF_PLAN = {"auto": KINDS, "rows": (ROWS,), "trunks": (TRUNKS,), "tree": (TREE, TREE_BELOW)}
PLANS = tuple(_KINDS_OF_PLAN)

# What models cost, which takes a look at all of their weights.
_known_weights: "weakref.WeakKeyDictionary[Any, Weights]" = weakref.WeakKeyDictionary()


class Choice(NamedTuple):
    plan: Plan
    reason: str
    pieces: int  # of this rank or another
    head: Head | None
    found: dict[str, tuple[Plan, float]]  # of each kind


def choose(
    model: Any,
    batch: TreeBatch,
    plan: str,
    check: bool,
    max_tokens: int | None,
    inputs: dict[str, Any],
    in_step: list[Any],
) -> Choice:
    rows, name = batch.rows, type(bare_model(model)).__name__
    if max_tokens is not None:
        check_count("max_tokens", max_tokens, 1)
    if inputs and plan == "rows":
        raise ValueError("plan must be 'auto' or 'trunks' where inputs has features once for each prompt, got 'rows'")
    if inputs and in_step:  # before ranks wait for each other
        raise RuntimeError(
            f"inputs must be None with {name}, run each row with features of its own: its weights are sharded, and "
            "inputs would have to be on every rank"
        )
    if not rows.lengths and not in_step:
        return Choice(Plan(ROWS, []), "there are no rows", 0, None, {})
    found = plans(rows.shared, rows.lengths, _weights(model), batch.prompts, max_tokens, bool(inputs))
    why: dict[str, str | None] = {}
    if in_step:
        # Each comparison is a forward pass, on every rank.
        for each in KINDS:
            why[each] = _why_not(model, each, inputs, True)
            if check and why[each] is None:
                why[each] = compared(model, each, batch, inputs, True)
    costs = {kind: found[kind][1] if kind in found else _INFINITE for kind in KINDS}
    counts = {kind: len(found[kind][0].pieces) if kind in found else 0 for kind in KINDS}
    if in_step:
        costs, counts = _agreed(rows.ids.device, costs if rows.lengths else dict.fromkeys(KINDS, 0.0), counts, in_step)
    wanted = _KINDS_OF_PLAN[plan]
    kind: str | None = None
    able = {each: costs[each] for each in wanted if costs[each] < _INFINITE}
    while able and kind is None:
        best = cheapest(able)
        if best not in why:
            why[best] = _why_not(model, best, inputs, False)
            if check and why[best] is None:
                why[best] = compared(model, best, batch, inputs, False) or _why_not_so_long(model, found[best][0], rows)
        if why[best] is None:
            kind = best
        del able[best]
    if kind is None:
        reason = next(
            filter(None, (why.get(other) or _why_not(model, other, inputs, bool(in_step)) for other in wanted)), None
        )
        if inputs and reason is not None:
            raise RuntimeError(f"inputs must be None with {name}, run each row with features of its own: {reason}")
        if not inputs and reason is not None and plan != "auto":
            raise RuntimeError(f"plan must be 'rows' with {name}: {reason}")
    if inputs and (kind is None or counts[kind] > 1):
        raise ValueError(
            f"max_tokens must hold all rows of all prompts where inputs has features, which are read once, and "
            f"rows of a prompt must begin with the same tokens, got max_tokens={max_tokens} and "
            f"{len(rows.lengths)} rows"
        )
    if kind is None and costs[ROWS] < _INFINITE:
        kind = ROWS  # of which a tree is no other plan
    if kind is None:
        most = max(rows.lengths, default=0)
        raise ValueError(f"max_tokens must be at least the tokens of the longest row, {most}, got {max_tokens}")
    if check and kind == ROWS and (wrong := looks_ahead(model, rows.ids.device, bool(in_step))):
        raise RuntimeError(f"model must not look ahead, as {name} does: {wrong}")
    head = None if in_step else head_of(model)
    chosen = found[kind][0] if kind in found else Plan(kind, [])
    if plan != "auto":
        reason = f"plan={plan!r}"
    elif kind != ROWS:
        reason = "fewer tokens"
    else:
        reason = why.get(cheapest(costs)) or "the rows share too little"
    return Choice(chosen, reason, counts[kind], head, found)


def _weights(model: Any) -> Weights:
    """Operations of a layer's products for a token, and of its attention for a pair of tokens."""
    bare = bare_model(model)
    if bare not in _known_weights:
        config = text_config(model)
        ends = [part for part in (bare.get_input_embeddings(), bare.get_output_embeddings()) if part is not None]
        embeddings = {id(weight) for part in ends for weight in part.parameters()}
        decoder = bare.get_decoder() if hasattr(bare, "get_decoder") else bare
        weights = sum(
            getattr(weight, "ds_numel", weight.numel())
            for weight in decoder.parameters()
            if id(weight) not in embeddings
        )
        pair = 4.0 * config.hidden_size * config.num_hidden_layers
        # Measured on a CPU: a mask is read beside the states, and a pass reads and writes all weights.
        _known_weights[bare] = Weights(2.0 * weights, pair, 1.15 * pair, 2.0 * weights * 100)
    return _known_weights[bare]


def _why_not(model: Any, kind: str, inputs: dict[str, Any], in_step: bool) -> str | None:
    """Why a kind of plan would be wrong or impossible with this model as it is now, by its structure alone."""
    if kind == ROWS:
        return None
    bare, parameters = bare_model(model), parameters_of(model)
    has_trunks, has_masks = kind in (TRUNKS, TREE_BELOW), kind in (TREE, TREE_BELOW)
    if "position_ids" not in parameters:
        return "its forward takes no position_ids, or no cache of keys and values"
    if has_trunks:
        if name_of_cache(bare) not in parameters:
            return "its forward takes no position_ids, or no cache of keys and values"
        if bare.training and is_checkpointed(bare):
            return "gradient checkpointing switches the cache off"
    config = text_config(model)
    if reason := why_no_sharing(config) or (why_no_masks(config) if has_masks else None):
        return reason
    types = sorted(name for name in parameters if name.endswith("token_type_ids"))
    if inputs and types:
        # Qwen2.5-VL runs without them, and then gives other positions behind an image.
        return f"its forward reads {types[0]}, a number for each token, and inputs has what belongs to a prompt"
    if in_step:
        kinds = {getattr(module, "rope_type", "") for module in bare.modules()}
        if has_trunks and any("dynamic" in rope or rope == "longrope" for rope in kinds if isinstance(rope, str)):
            return "its rotary frequencies may change between the length of a shared prefix and that of a row"
        return why_alone(bare)
    return None


def _why_not_so_long(model: Any, plan: Plan, rows: Rows) -> str | None:
    """Why trunks cannot stand before rows of these lengths; None: they can."""
    depths = [trunk.depth for piece in plan.pieces for trunk in piece.trunks]
    if not depths or not turns_change(bare_model(model), min(depths), max(rows.lengths)):
        return None
    return "its rotary frequencies change between the length of a shared prefix and that of a row"


def _agreed(
    device: torch.device, costs: dict[str, float], counts: dict[str, int], in_step: list[Any]
) -> tuple[dict[str, float], dict[str, int]]:
    """The largest of all ranks: the slowest is waited for, and all run as many pieces as the one with the most."""
    numbers = largest([*costs.values(), *counts.values()], in_step, device)
    of_costs, of_counts = numbers[: len(KINDS)], map(int, numbers[len(KINDS) :])
    return dict(zip(KINDS, of_costs, strict=True)), dict(zip(KINDS, of_counts, strict=True))
