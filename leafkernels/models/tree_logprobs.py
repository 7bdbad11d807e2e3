"""Log-probabilities of rows that share prefixes, with each shared prefix run through the model once.

The rollouts of a prompt repeat the prompt, with its audio or images, and often a part of the answer. What rows share
runs once, in one of two ways or both (``leafkernels.models.plan``): as a trunk, with the model's own cache of keys and
values, under autograd, behind which the rest runs; or as nodes of the prefix tree (``leafkernels.prefix_tree``) side
by side, under a mask by which each sees the nodes above it alone. Autograd adds up what the rows of a node send back.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_choice, check_count, check_integer, check_mask
from leafkernels.models.asking import (
    bare_model,
    device_of,
    evaluating,
    is_checkpointed,
    name_of_cache,
    parameters_of,
    plain_ids,
    text_config,
    turns_change,
)
from leafkernels.models.heads import Head, head_of
from leafkernels.models.masks import attention_of, why_no_masks
from leafkernels.models.plan import (
    KINDS,
    ROWS,
    TREE,
    TREE_BELOW,
    TRUNKS,
    Bin,
    Cluster,
    Piece,
    Plan,
    Weights,
    cheapest,
    count_nodes,
    plans,
)
from leafkernels.models.run import Rows, Run, groups_in_step, largest, run_piece, why_alone
from leafkernels.rows.find import find_rows
from leafkernels.rows.layout import as_rows
from leafkernels.rows.prefix_tree import order_of_rows

PLANS = ("auto", "rows", "trunks", "tree")
_INFINITE = math.inf
_KINDS_OF_PLAN = {"auto": KINDS, "rows": (ROWS,), "trunks": (TRUNKS,), "tree": (TREE, TREE_BELOW)}

# Models that have been compared with rows, and what came of it, by what was asked: None, or why not.
_checked: "weakref.WeakKeyDictionary[Any, dict[Any, str | None]]" = weakref.WeakKeyDictionary()
# What models cost, which takes a look at all of their weights.
_known_weights: "weakref.WeakKeyDictionary[Any, Weights]" = weakref.WeakKeyDictionary()


class TreeLogprobs(NamedTuple):
    """Both (N, T), 0 at the first token of a row and where nothing is asked for."""

    logprobs: Tensor
    """Of each token given those before it in its row."""
    entropy: Tensor | None
    """Of the distribution that it was drawn from, in nats; None with ``entropy=False``."""


class TreeStats(NamedTuple):
    """How a batch is run, and why."""

    plan: str
    """"rows", "trunks", "tree" or "tree below trunks"."""
    reason: str
    rows: int
    trunks: int
    tokens_of_rows: int
    """Tokens of a forward of all rows, padding included."""
    tokens_of_trunks: int
    """The same of trunks and tails."""
    tokens: int
    """The same of what is run."""
    nodes: int
    """Different prefixes of the rows: the fewest tokens that there are to run."""
    forwards: int
    """Forward passes of the model."""


class _Batch(NamedTuple):
    rows: Rows
    order: Tensor  # (n,) of the caller's rows, those in ``rows``
    starts: Tensor  # (n,) where each begins in its columns
    prompts: list[int] | None  # where prompts begin, where they were named
    shape: torch.Size  # of the caller's ids


class _Choice(NamedTuple):
    plan: Plan
    reason: str
    pieces: int  # of this rank or another
    head: Head | None


def tree_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = True,
    groups: Tensor | None = None,
    group_size: int | None = None,
    max_tokens: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    plan: str = "auto",
    check: bool = True,
) -> TreeLogprobs:
    """Log-probability and entropy of every token, as a forward pass of all rows gives them, for fewer tokens.

    Differentiable: gradients are those of the ordinary forward, to rounding. Dropout draws once for a token that rows
    share, and the balance loss of a router counts it once. The lengths of the rows and of what they share are read back
    from the device, once a call. No logits are kept where the model's head is one linear layer, which three tokens
    tell. Where weights are spread over ranks (FSDP2, ZeRO-3), every rank calls, one without a row too, and they agree
    on the plan and the number of forward passes; a gradient is then asked of the result on all of them or none.

    Args:
        model: a decoder of transformers, or one in PEFT, torch.compile or DistributedDataParallel, that takes
            ``position_ids``, and a cache of keys and values for each layer or a mask of four dimensions.
        input_ids: (N, T) integers, rows of any prompts in any order.
        attention_mask: (N, T), nonzero on the tokens of a row, which are one stretch: padding left, right, or none.
        response_mask: (N, T), nonzero at tokens whose log-probability is asked for; None: all. What stands before them
            needs no logits.
        temperature: positive; logits are divided by it.
        entropy: whether the entropy is asked for.
        groups, group_size: rows of each prompt, see ``leafkernels.span_advantages``; needed with ``inputs`` only, else
            rows that share a prefix are found.
        max_tokens: of a forward pass, or of two that share a trunk, padding included: more are run in pieces, which
            repeat what leads to them. Without a gradient a piece is forgotten before the next.
        inputs: features of audio or images, as the model's forward takes them, in the order of the prompts, once for
            each; their placeholder tokens are part of the rows, and of what the rows of a prompt share.
        plan: "auto", "rows" (each row alone), "trunks" (what rows begin with once, the rest a row each) or "tree" (each
            node once, in bins of several rows).
        check: compare a plan with rows on a few tokens, the first time that a model is seen.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.
        RuntimeError: a plan is named, or ``inputs`` given, and the model gives other log-probabilities that way, cannot
            run so, or (with ``inputs``) reads a number for each token beside its id, as models that see do; or the
            mask of a tree does not fit into memory.
    """
    check_choice("plan", plan, PLANS)
    features = dict(inputs or {})
    batch = _read(model, input_ids, attention_mask, response_mask, groups, group_size, features)
    in_step = groups_in_step(bare_model(model))
    choice = _choose(model, batch, plan, check, max_tokens, features, in_step)
    run = Run(model, choice.head, temperature, features, in_step=bool(in_step))
    parts = []
    for piece in choice.plan.pieces:
        first, last = piece.bins[0].first, piece.bins[-1].last
        parts.append(run_piece(run, batch.rows.part(first, last), _shifted(piece, first)))
    tie: Any = 0.0
    for _ in range(choice.pieces - len(choice.plan.pieces)):
        rows, piece = _idle(model, choice.plan.kind, input_ids.device)
        tie = tie + sum(part.sum() for part in run_piece(run, rows, piece))
    columns = torch.arange(input_ids.shape[1], device=input_ids.device) - batch.starts[:, None]
    results = []
    for place in range(2 if entropy else 1):
        found = torch.cat([part[place] for part in parts]) if parts else torch.zeros(batch.rows.ids.shape)
        zeros = found.new_zeros(batch.shape, device=input_ids.device)
        if found.numel():
            is_there = (columns >= 0) & (columns < found.shape[1])
            found = torch.where(is_there, found.gather(1, columns.clamp(0, found.shape[1] - 1)), 0.0)
            zeros = zeros.index_copy(0, batch.order, found)
        results.append(zeros + tie)
    return TreeLogprobs(results[0], results[1] if entropy else None)


def tree_stats(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    groups: Tensor | None = None,
    group_size: int | None = None,
    max_tokens: int | None = None,
    plan: str = "auto",
) -> TreeStats:
    """How ``tree_logprobs`` runs a batch, why, and how many tokens that is; the arguments are its own.

    Where weights are spread over ranks, every rank calls.
    """
    check_choice("plan", plan, PLANS)
    batch = _read(model, input_ids, attention_mask, None, groups, group_size, {})
    choice = _choose(model, batch, plan, True, max_tokens, {}, groups_in_step(bare_model(model)))
    rows = batch.rows
    every = plans(rows.shared, rows.lengths, _weights(model), batch.prompts)
    tokens = {kind: every[kind][0].tokens if kind in every else 0 for kind in (ROWS, TRUNKS)}
    trunks = every[TRUNKS][0].trunks if TRUNKS in every else 0
    if choice.plan.kind in (TRUNKS, TREE_BELOW):
        trunks = choice.plan.trunks
    forwards = choice.pieces * (2 if choice.plan.kind in (TRUNKS, TREE_BELOW) else 1)
    nodes = count_nodes(rows.shared, rows.lengths)
    counts = len(rows.lengths), trunks, tokens[ROWS], tokens[TRUNKS], choice.plan.tokens, nodes, forwards
    return TreeStats(choice.plan.kind, choice.reason, *counts)


def _read(
    model: Any,
    input_ids: Tensor,
    attention_mask: Any,
    response_mask: Any,
    groups: Any,
    group_size: Any,
    inputs: dict[str, Any],
) -> _Batch:
    input_ids = check_integer("input_ids", input_ids)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape (rows, tokens), got shape {tuple(input_ids.shape)}")
    if (device := device_of(model)) not in (None, input_ids.device):
        raise ValueError(f"input_ids must be on the device of the model, {device}, got {input_ids.device}")
    if inputs and groups is None and group_size is None:
        raise ValueError(
            "groups or group_size must say which rows are a prompt where inputs has its features, got neither: rows "
            "of equal tokens may belong to different recordings"
        )
    backend = resolve_backend("auto", input_ids.device)
    layout = find_rows("input_ids", input_ids, attention_mask, groups, group_size, None, backend).layout
    ids = as_rows(input_ids)
    order, shared = order_of_rows(ids, layout, backend)
    asked = check_mask(response_mask, "input_ids", input_ids.shape, input_ids.device)
    columns = torch.arange(ids.shape[1], device=ids.device)
    starts, ends = layout.row_starts[:, None], (layout.row_starts + layout.row_lengths)[:, None]
    scored = (columns > starts) & (columns < ends)
    if asked is not None:
        scored &= asked
    firsts = torch.where(scored, columns - starts, ends - starts).amin(1) if ids.shape[1] else layout.row_lengths
    # An empty prompt begins where the next does, or behind the last row.
    begins = torch.nn.functional.pad(torch.zeros_like(order), (0, 1)).index_fill_(0, layout.group_starts[:-1], 1)[:-1]
    # The one look at the device: four numbers a row.
    numbers = torch.stack([layout.row_lengths[order], shared, firsts[order], begins]).tolist()
    kept = [place for place, length in enumerate(numbers[0]) if length]
    lengths, common, first_asked, begin = ([column[place] for place in kept] for column in numbers)
    if len(kept) < len(numbers[0]):
        order = order[torch.tensor(kept, dtype=torch.int64, device=order.device)]
    prompts = [place for place, is_first in enumerate(begin) if is_first or place == 0]
    begins = layout.row_starts[order]
    # Rows from their first token on, so that padding on the left costs nothing.
    places = (begins[:, None] + torch.arange(max(lengths, default=0), device=ids.device)).clamp_max(ids.shape[1] - 1)
    rows = Rows(ids[order].gather(1, places), scored[order].gather(1, places), lengths, common, first_asked)
    sizes = torch.tensor(lengths, device=ids.device)[:, None]
    is_token = torch.arange(rows.ids.shape[1], device=ids.device) < sizes if lengths else rows.scored
    named = prompts if groups is not None or group_size is not None else None
    return _Batch(rows._replace(scored=rows.scored & is_token), order, begins, named, input_ids.shape)


def _choose(
    model: Any,
    batch: _Batch,
    plan: str,
    check: bool,
    max_tokens: int | None,
    inputs: dict[str, Any],
    in_step: list[Any],
) -> _Choice:
    rows, name = batch.rows, type(bare_model(model)).__name__
    if max_tokens is not None:
        check_count("max_tokens", max_tokens, 1)
    if inputs and plan == "rows":
        raise ValueError("plan must be 'auto' or 'trunks' where inputs has features once for each prompt, got 'rows'")
    if not rows.lengths and not in_step:
        return _Choice(Plan(ROWS, []), "there are no rows", 0, None)
    found = plans(rows.shared, rows.lengths, _weights(model), batch.prompts, max_tokens, bool(inputs))
    why = {kind: _why_not(model, kind, inputs, bool(in_step)) for kind in KINDS}
    if in_step and check:
        # Each is a forward pass, on every rank.
        why = {kind: why[kind] or _compared(model, kind, batch, inputs) for kind in KINDS}
    costs = {kind: found[kind][1] if kind in found else _INFINITE for kind in KINDS}
    counts = {kind: len(found[kind][0].pieces) if kind in found else 0 for kind in KINDS}
    if in_step:
        costs, counts = _agreed(rows.ids.device, costs if rows.lengths else dict.fromkeys(KINDS, 0.0), counts, in_step)
    kind = _cheapest_able(costs, why, _KINDS_OF_PLAN[plan])
    while check and not in_step and kind is not None and why[kind] is None:
        why[kind] = _compared(model, kind, batch, inputs) or _why_not_so_long(model, found[kind][0], rows)
        if why[kind] is None:
            break
        kind = _cheapest_able(costs, why, _KINDS_OF_PLAN[plan])
    reason = next((why[kind] for kind in _KINDS_OF_PLAN[plan] if why[kind] is not None), None)
    if inputs:
        if kind is None and reason is not None:
            raise RuntimeError(f"inputs must be None with {name}, run each row with features of its own: {reason}")
        if kind is None or counts[kind] > 1:
            raise ValueError(
                f"max_tokens must hold all rows of all prompts where inputs has features, which are read once, and "
                f"rows of a prompt must begin with the same tokens, got max_tokens={max_tokens} and "
                f"{len(rows.lengths)} rows"
            )
    elif kind is None and reason is not None and plan != "auto":
        raise RuntimeError(f"plan must be 'rows' with {name}: {reason}")
    if kind is None and costs[ROWS] < _INFINITE:
        kind = ROWS  # of which a tree is no other plan
    if kind is None:
        most = max(rows.lengths, default=0)
        raise ValueError(f"max_tokens must be at least the tokens of the longest row, {most}, got {max_tokens}")
    head = None if in_step else head_of(model)
    chosen = found[kind][0] if kind in found else Plan(kind, [])
    if plan != "auto":
        return _Choice(chosen, f"plan={plan!r}", counts[kind], head)
    if kind != ROWS:
        return _Choice(chosen, "fewer tokens", counts[kind], head)
    reason = why[cheapest(costs)]
    return _Choice(chosen, reason or "the rows share too little", counts[kind], head)


def _cheapest_able(costs: dict[str, float], why: dict[str, str | None], wanted: Sequence[str]) -> str | None:
    able = {kind: costs[kind] for kind in wanted if costs[kind] < _INFINITE and why[kind] is None}
    return cheapest(able) if able else None


def _agreed(
    device: torch.device, costs: dict[str, float], counts: dict[str, int], in_step: list[Any]
) -> tuple[dict[str, float], dict[str, int]]:
    """The largest of all ranks: the slowest is waited for, and all run as many pieces as the one with the most."""
    numbers = largest([*costs.values(), *counts.values()], in_step, device)
    of_costs, of_counts = numbers[: len(KINDS)], map(int, numbers[len(KINDS) :])
    return dict(zip(KINDS, of_costs, strict=True)), dict(zip(KINDS, of_counts, strict=True))


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
    if has_masks and (reason := why_no_masks(text_config(model))):
        return reason
    types = sorted(name for name in parameters if name.endswith("token_type_ids"))
    if inputs and types:
        # Qwen2.5-VL runs without them, and then gives other positions behind an image.
        return f"its forward reads {types[0]}, a number for each token, and inputs has what belongs to a prompt"
    if in_step:
        kinds = {getattr(module, "rope_type", "") for module in bare.modules()}
        if has_trunks and any("dynamic" in rope or rope == "longrope" for rope in kinds if isinstance(rope, str)):
            return "its rotary frequencies may change between the length of a shared prefix and that of a row"
        if inputs:
            return "its weights are sharded, and inputs would have to be on every rank"
        return why_alone(bare)
    return None


def _why_not_so_long(model: Any, plan: Plan, rows: Rows) -> str | None:
    """Why trunks cannot stand before rows of these lengths; None: they can."""
    depths = [trunk.depth for piece in plan.pieces for trunk in piece.trunks]
    if not depths or not turns_change(bare_model(model), min(depths), max(rows.lengths)):
        return None
    return "its rotary frequencies change between the length of a shared prefix and that of a row"


def _compared(model: Any, kind: str, batch: _Batch, inputs: dict[str, Any]) -> str | None:
    """What is wrong with a kind of plan, by a few tokens, once for each way that a model may be run; None: nothing."""
    if kind == ROWS:
        return None
    bare = bare_model(model)
    known = _checked.setdefault(bare, {})
    # Each half of a plan by itself: the cache and the mask.
    asked: list[tuple[Any, ...]] = []
    if kind in (TRUNKS, TREE_BELOW):
        asked.append((TRUNKS, *sorted(inputs)))
    if kind in (TREE, TREE_BELOW):
        asked.append((kind, attention_of(text_config(model))))
    for key in asked:
        if key not in known:
            known[key] = _compare(model, key[0], batch, inputs if key[0] == TRUNKS else {})
        if known[key] is not None:
            return known[key]
    return None


def _compare(model: Any, kind: str, batch: _Batch, inputs: dict[str, Any]) -> str | None:
    rows, piece = _longest_rows(batch) if inputs else _few_rows(model, kind, batch.rows.ids.device)
    in_step = bool(groups_in_step(bare_model(model)))
    how = "from the keys and values of a shared prefix" if kind == TRUNKS else "under a mask of four dimensions"
    try:
        with torch.no_grad(), evaluating(model), torch.compiler.set_stance("force_eager"):
            # Positions behind images and recordings are the model's business: its own forward counts them.
            alone = Run(model, None, inputs=inputs, has_positions=not inputs, in_step=in_step)
            count = len(rows.lengths)
            truth, _ = run_piece(alone, rows, Piece([], [Bin(n, n + 1, rows.lengths[n]) for n in range(count)]))
            found, _ = run_piece(alone._replace(has_positions=True), rows, piece)
    except Exception as error:  # whatever a model's code raises says that it cannot run so
        return f"it cannot continue {how} ({type(error).__name__}: {error})"
    most = float((truth - found).abs().max())
    is_exact = next(bare_model(model).parameters()).dtype in (torch.float32, torch.float64)
    if not most < (1e-3 if is_exact and not torch.is_autocast_enabled(rows.ids.device.type) else 0.2):
        return f"log-probabilities of a few tokens differ by {most:.2g} {how}"
    return None


def _few_rows(model: Any, kind: str, device: torch.device) -> tuple[Rows, Piece]:
    """Two trunks of unequal length under five rows and more, of plain tokens.

    Under a mask the trees have so many nodes amid a row that a model shows whether it counts in columns.
    """
    between = [(3, 11)] * (64 if kind != TRUNKS else 0)
    # Of each row: what it has of the row before, and its tokens.
    sizes = [(0, 8), (5, 7), (0, 5), (3, 6), *between, (3, 7)]
    ids = plain_ids(bare_model(model)).tolist()
    # The digits of a row's number, by which all rows differ.
    table = [[ids[(n // 6 ** (c % 3) + c) % 6] for c in range(11)] for n in range(len(sizes))]
    for n, (common, _) in enumerate(sizes):
        table[n][:common] = table[n - 1][:common]
    lengths = [length for _, length in sizes]
    widest = max(lengths)
    made = torch.tensor(table, device=device)[:, :widest]
    columns = torch.arange(widest, device=device)
    scored = (columns >= 1) & (columns < torch.tensor(lengths, device=device)[:, None])
    rows = Rows(made, scored, lengths, [common for common, _ in sizes], [1] * len(sizes))
    trunks = [Cluster(0, 2, 5), Cluster(2, len(sizes), 3)]
    if kind == TRUNKS:
        return rows, Piece(trunks, [Bin(n, n + 1, length - (5 if n < 2 else 3)) for n, length in enumerate(lengths)])
    return rows, _exact_piece(rows, trunks if kind == TREE_BELOW else [])


def _exact_piece(rows: Rows, trunks: list[Cluster]) -> Piece:
    """All rows of each trunk in one bin, its nodes counted on the host."""
    parts = trunks or [Cluster(0, len(rows.lengths), 0)]
    table = rows.ids.tolist()
    bins = []
    for first, last, depth in parts:
        prefixes = {tuple(table[n][:end]) for n in range(first, last) for end in range(depth + 1, rows.lengths[n] + 1)}
        bins.append(Bin(first, last, len(prefixes)))
    return Piece(trunks, bins)


def _longest_rows(batch: _Batch) -> tuple[Rows, Piece]:
    """The longest row of each prompt, whose features then are one for each row, behind its trunk."""
    rows = batch.rows
    starts = [*(batch.prompts or []), len(rows.lengths)]
    parts = [range(first, last) for first, last in zip(starts, starts[1:], strict=False)]
    heads = [max(part, key=lambda row: rows.lengths[row]) for part in parts]
    depths = [min(rows.shared[part.start + 1 : part.stop], default=1) or 1 for part in parts]
    lengths = [rows.lengths[head] for head in heads]
    width, where = max(lengths), torch.tensor(heads, device=rows.ids.device)
    columns = torch.arange(width, device=rows.ids.device)
    ends, begins = (torch.tensor(numbers, device=rows.ids.device)[:, None] for numbers in (lengths, depths))
    ids = rows.ids[where, :width].gather(1, torch.minimum(columns, ends - 1))
    few = Rows(ids, (columns >= begins) & (columns < ends), lengths, [0] * len(heads), depths)
    trunks = [Cluster(n, n + 1, depth) for n, depth in enumerate(depths)]
    return few, Piece(trunks, [Bin(n, n + 1, lengths[n] - depth) for n, depth in enumerate(depths)])


def _shifted(piece: Piece, first: int) -> Piece:
    """A piece by the rows from ``first`` on."""
    trunks = [Cluster(trunk.first - first, trunk.last - first, trunk.depth) for trunk in piece.trunks]
    return Piece(trunks, [Bin(held.first - first, held.last - first, held.nodes) for held in piece.bins])


def _idle(model: Any, kind: str, device: torch.device) -> tuple[Rows, Piece]:
    """What a rank runs where another has a piece more: as many forward passes, of three tokens."""
    ids = plain_ids(bare_model(model))[None, :3].to(device)
    rows = Rows(ids, torch.zeros_like(ids, dtype=torch.bool), [3], [0], [3])
    if kind in (TRUNKS, TREE_BELOW):
        return rows, Piece([Cluster(0, 1, 1)], [Bin(0, 1, 2)])
    return rows, Piece([], [Bin(0, 1, 3)])
