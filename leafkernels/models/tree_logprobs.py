"""Log-probabilities of rows that share prefixes, with each shared prefix run through the model once.

The rollouts of a prompt repeat the prompt, with its audio or images, and often a part of the answer. What rows share,
their trunk, runs once with the model's own cache of keys and values, under autograd; the tails then run as ordinary
rows with the trunk's keys and values in front. No attention mask is ours, so every attention implementation takes it,
and autograd adds up what the rows of a trunk send back. The trunks are read off the prefix tree
(``leafkernels.prefix_tree``).
"""

import inspect
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_choice, check_integer, check_mask
from leafkernels.models.asking import evaluating, name_of_cache
from leafkernels.models.plan import Cluster, best_clusters, cost_of_rows, cost_of_trunks, shares_trunks
from leafkernels.rows.find import find_rows
from leafkernels.rows.layout import as_rows
from leafkernels.rows.prefix_tree import order_of_rows
from leafkernels.vocabulary.surprisal import surprisal_entropy

PLANS = ("auto", "rows", "trunks")

# Models whose trunks have been compared with rows, and what came of it, by the names of inputs: None, or why not.
_checked: "weakref.WeakKeyDictionary[Any, dict[tuple[str, ...], str | None]]" = weakref.WeakKeyDictionary()
# What models cost, which takes a look at all of their weights.
_known_costs: "weakref.WeakKeyDictionary[Any, tuple[float, float]]" = weakref.WeakKeyDictionary()


class TreeLogprobs(NamedTuple):
    """Both (N, T), 0 at the first token of a row and where nothing is asked for."""

    logprobs: Tensor
    """Of each token given those before it in its row."""
    entropy: Tensor
    """Of the distribution that it was drawn from, in nats."""


class TreeStats(NamedTuple):
    """How a batch is run, and why."""

    plan: str
    """"rows" or "trunks"."""
    reason: str
    rows: int
    trunks: int
    tokens_of_rows: int
    """Tokens of a forward of all rows, padding included."""
    tokens_of_trunks: int
    """The same of trunks and tails."""


class _Batch(NamedTuple):
    """Rows in depth-first order, on the device, and the few numbers of them that Python decides by."""

    order: Tensor  # (N,)
    starts: Tensor  # (N,) where each row begins in its columns
    lengths: list[int]
    shared: list[int]
    firsts: list[int]  # the first column of each row that is asked for, counted from its start; its length if none is
    prompts: list[int] | None  # where prompts begin, where they were named
    ids: Tensor  # (N, T)
    scored: Tensor  # (N, T) bool
    num_rows: int  # of the caller, those without a token included


def tree_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    temperature: float = 1.0,
    groups: Tensor | None = None,
    group_size: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    plan: str = "auto",
    check: bool = True,
) -> TreeLogprobs:
    """Log-probability and entropy of every token, as a forward pass of all rows gives them, for fewer tokens.

    Differentiable: gradients are those of the ordinary forward, to rounding. The lengths of the rows and of what they
    share are read back from the device, once a call.

    Args:
        model: a decoder of transformers, or one in PEFT or DistributedDataParallel, that takes ``position_ids`` and a
            cache of keys and values for each layer.
        input_ids: (N, T) integers, rows of any prompts in any order.
        attention_mask: (N, T), nonzero on the tokens of a row, which are one stretch: padding left, right, or none.
        response_mask: (N, T), nonzero at tokens whose log-probability is asked for; None: all. What stands before them
            needs no logits.
        temperature: positive; logits are divided by it.
        groups, group_size: rows of each prompt, see ``leafkernels.span_advantages``; needed with ``inputs`` only, else
            rows that share a prefix are found.
        inputs: features of audio or images, as the model's forward takes them, in the order of the prompts, once for
            each; their placeholder tokens are part of the rows, and of what the rows of a prompt share.
        plan: "auto", "rows" (each row alone) or "trunks".
        check: compare trunks with rows on a few tokens, the first time that a model is seen.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.
        RuntimeError: ``plan="trunks"``, or ``inputs``, and the model gives other log-probabilities that way, cannot run
            so, or (with ``inputs``) reads a number for each token beside its id, as models that see do.
    """
    check_choice("plan", plan, PLANS)
    batch = _read(input_ids, attention_mask, response_mask, groups, group_size, inputs)
    if not batch.lengths:
        nothing = torch.zeros(input_ids.shape, device=input_ids.device)
        return TreeLogprobs(nothing, nothing)
    clusters = best_clusters(batch.shared, batch.lengths, batch.prompts if inputs else None)
    stats = _choose(model, batch, clusters, plan, check, dict(inputs or {}))
    run = _run_rows if stats.plan == "rows" else _run_trunks
    return run(model, batch, clusters, temperature, dict(inputs or {}))


def tree_stats(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    groups: Tensor | None = None,
    group_size: int | None = None,
) -> TreeStats:
    """How ``tree_logprobs`` runs a batch, why, and how many tokens that is; the arguments are its own."""
    batch = _read(input_ids, attention_mask, None, groups, group_size, None)
    return _choose(model, batch, best_clusters(batch.shared, batch.lengths), "auto", True, {})


def _read(
    input_ids: Tensor, attention_mask: Any, response_mask: Any, groups: Any, group_size: Any, inputs: Any
) -> _Batch:
    input_ids = check_integer("input_ids", input_ids)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape (rows, tokens), got shape {tuple(input_ids.shape)}")
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
    begins = torch.zeros_like(order).index_fill_(0, layout.group_starts[:-1].clamp_max(max(len(order) - 1, 0)), 1)
    # The one look at the device: four numbers a row.
    numbers = torch.stack([layout.row_lengths[order], shared, firsts[order], begins]).tolist()
    kept = [place for place, length in enumerate(numbers[0]) if length]
    lengths, common, first_asked, begin = ([column[place] for place in kept] for column in numbers)
    if len(kept) < len(numbers[0]):
        order = order[torch.tensor(kept, dtype=torch.int64, device=order.device)]
    prompts = [place for place, is_first in enumerate(begin) if is_first or place == 0]
    return _Batch(
        order, layout.row_starts[order], lengths, common, first_asked, prompts, ids[order], scored[order], len(ids)
    )


def _choose(
    model: Any, batch: _Batch, clusters: list[Cluster], plan: str, check: bool, inputs: dict[str, Any]
) -> TreeStats:
    rows, trunks = cost_of_rows(batch.lengths), cost_of_trunks(clusters, batch.lengths)
    counts = len(batch.lengths), len(clusters), rows.tokens, trunks.tokens
    if plan == "rows":
        if inputs:
            raise ValueError(
                "plan must be 'auto' or 'trunks' where inputs has features once for each prompt, got 'rows'"
            )
        return TreeStats("rows", "plan='rows'", *counts)
    reason = _why_not(model, batch if check else None, clusters, inputs)
    if reason is not None:
        name = type(_bare(model)).__name__
        if inputs:
            raise RuntimeError(f"inputs must be None with {name}, run each row with features of its own: {reason}")
        if plan == "trunks":
            raise RuntimeError(f"plan must be 'rows' with {name}: {reason}")
        return TreeStats("rows", reason, *counts)
    if plan == "auto" and not inputs and not shares_trunks(rows, trunks, *_costs(model)):
        return TreeStats("rows", "the rows share too little", *counts)
    return TreeStats("trunks", "fewer tokens" if plan == "auto" else "plan='trunks'", *counts)


def _bare(model: Any) -> Any:
    """The model of transformers inside of what wraps it."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """What the model's forward takes."""
    return inspect.signature(_bare(model).forward).parameters


def _costs(model: Any) -> tuple[float, float]:
    """Operations of a layer's products for a token, and of its attention for a pair of tokens."""
    bare = _bare(model)
    if bare not in _known_costs:
        config = bare.config.get_text_config() if hasattr(bare.config, "get_text_config") else bare.config
        ends = [part for part in (bare.get_input_embeddings(), bare.get_output_embeddings()) if part is not None]
        embeddings = {id(part.weight): part.weight.numel() for part in ends}
        weights = sum(weight.numel() for weight in bare.parameters()) - sum(embeddings.values())
        _known_costs[bare] = 2.0 * weights, 4.0 * config.hidden_size * config.num_hidden_layers
    return _known_costs[bare]


def _why_not(model: Any, batch: _Batch | None, clusters: list[Cluster], inputs: dict[str, Any]) -> str | None:
    """Why trunks would be wrong or impossible with this model as it is now; None: they are right."""
    bare, parameters = _bare(model), _parameters(model)
    if not {name_of_cache(bare), "position_ids"} <= parameters.keys():
        return "its forward takes no position_ids, or no cache of keys and values"
    types = sorted(name for name in parameters if name.endswith("token_type_ids"))
    if inputs and types:
        # Qwen2.5-VL runs without them, and then gives other positions behind an image.
        return f"its forward reads {types[0]}, a number for each token, and inputs has what belongs to a prompt"
    if bare.training and getattr(bare, "is_gradient_checkpointing", False):
        return "gradient checkpointing switches the cache off"
    if any(hasattr(weight, "placements") or hasattr(weight, "ds_id") for weight in bare.parameters()):
        return "its weights are sharded, and the ranks would have to run equally many forwards"
    if batch is None:
        return None
    names = tuple(sorted(inputs))
    found = _checked.setdefault(bare, {})
    if names not in found:
        found[names] = _compare(model, *(_longest_rows(batch, clusters) if inputs else _few_rows(batch)), inputs)
    return found[names]


def _few_rows(batch: _Batch) -> tuple[_Batch, list[Cluster]]:
    """Two trunks of unequal length under five rows, of a few of the batch's last tokens."""
    lengths, clusters = [8, 7, 5, 6, 4], [Cluster(0, 2, 5), Cluster(2, 5, 3)]
    device = batch.ids.device
    ends = batch.starts + torch.tensor(batch.lengths, device=device)
    tokens = batch.ids[0].index_select(0, (ends[:1] - 1 - torch.arange(3, device=device)).clamp_min(batch.starts[0]))
    ids = tokens[(torch.arange(8, device=device) * 2 + torch.arange(5, device=device)[:, None]) % 3]
    for first, last, depth in clusters:
        ids[first:last, :depth] = ids[first, :depth].clone()
    return _small(ids, lengths, [1] * 5), clusters


def _longest_rows(batch: _Batch, clusters: list[Cluster]) -> tuple[_Batch, list[Cluster]]:
    """The longest row of each prompt, whose features then are one for each row."""
    heads = [max(range(c.first, c.last), key=lambda row: batch.lengths[row]) for c in clusters]
    lengths = [batch.lengths[head] for head in heads]
    where = torch.tensor(heads, device=batch.ids.device)
    places = batch.starts[where, None] + torch.arange(max(lengths), device=batch.ids.device)
    ends = (batch.starts[where] + torch.tensor(lengths, device=batch.ids.device))[:, None]
    ids = batch.ids[where].gather(1, torch.minimum(places, ends - 1))
    depths = [cluster.depth for cluster in clusters]
    return _small(ids, lengths, depths), [Cluster(n, n + 1, depth) for n, depth in enumerate(depths)]


def _small(ids: Tensor, lengths: list[int], firsts: list[int]) -> _Batch:
    """Rows that begin in the first column, and are scored from ``firsts`` on."""
    device, count = ids.device, len(lengths)
    columns, every = torch.arange(ids.shape[1], device=device), torch.arange(count, device=device)
    first, last = (torch.tensor(numbers, device=device)[:, None] for numbers in (firsts, lengths))
    scored = (columns >= first) & (columns < last)
    return _Batch(every, torch.zeros_like(every), lengths, [], firsts, None, ids, scored, count)


@torch.no_grad()
def _compare(model: Any, batch: _Batch, clusters: list[Cluster], inputs: dict[str, Any]) -> str | None:
    """What is wrong with trunks, by a forward of the same rows alone; None: nothing."""
    try:
        with evaluating(model):
            # Positions behind images and recordings are the model's business: its own forward counts them.
            alone = _run_rows(model, batch, clusters, 1.0, inputs, has_positions=not inputs).logprobs
            shared = _run_trunks(model, batch, clusters, 1.0, inputs).logprobs
    except Exception as error:  # whatever a model's code raises says that it cannot run so
        return f"it cannot continue from the keys and values of a shared prefix ({type(error).__name__}: {error})"
    most = float((alone - shared).abs().max())
    is_exact = next(_bare(model).parameters()).dtype in (torch.float32, torch.float64)
    if not most < (1e-3 if is_exact and not torch.is_autocast_enabled(batch.ids.device.type) else 0.2):
        return f"log-probabilities of a few tokens differ by {most:.2g} where their rows share a prefix"
    return None


def _run_rows(
    model: Any,
    batch: _Batch,
    clusters: list[Cluster],
    temperature: float,
    inputs: dict[str, Any],
    has_positions: bool = True,
) -> TreeLogprobs:
    """One forward of all rows, left where they stand."""
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    lengths = torch.tensor(batch.lengths, device=batch.ids.device)[:, None]
    positions = columns - batch.starts[:, None]
    is_token = (positions >= 0) & (positions < lengths)
    given = positions.clamp_min(0) if has_positions else None
    logits = _forward(model, batch.ids, is_token, given, len(columns), None, inputs)
    found = surprisal_entropy(
        logits[:, :-1], batch.ids[:, 1:], temperature=temperature, response_mask=batch.scored[:, 1:]
    )
    pad = torch.nn.functional.pad
    return _in_place(batch, pad(found.logprobs, (1, 0)), pad(found.entropy, (1, 0)))


def _run_trunks(
    model: Any, batch: _Batch, clusters: list[Cluster], temperature: float, inputs: dict[str, Any]
) -> TreeLogprobs:
    """One forward of what rows share, and one of what each has after it."""
    device, width = batch.ids.device, batch.ids.shape[1]
    of_row = torch.tensor([n for n, c in enumerate(clusters) for _ in range(c.first, c.last)], device=device)
    depths = torch.tensor([cluster.depth for cluster in clusters], device=device)
    deepest = max(cluster.depth for cluster in clusters)
    # Trunk tokens whose next token is asked for, and the last, after which the first token of a tail is drawn.
    keep = max(1, *(cluster.depth - min(batch.firsts[cluster.first : cluster.last]) + 1 for cluster in clusters))
    heads = torch.tensor([cluster.first for cluster in clusters], device=device)
    columns = torch.arange(deepest, device=device) - deepest + depths[:, None]
    is_trunk = columns >= 0
    lengths = torch.tensor(batch.lengths, device=device)
    # What fills: the last token of a row, which stands for no recording or image. Models count those that do.
    last_ids = batch.ids.gather(1, (batch.starts + lengths - 1)[:, None])
    trunk_ids = batch.ids[heads].gather(1, (batch.starts[heads, None] + columns).clamp(0, width - 1))
    trunk_ids = torch.where(is_trunk, trunk_ids, last_ids[heads])
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    trunk = _forward(model, trunk_ids, is_trunk, columns.clamp_min(0), keep, cache, inputs)

    def score(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        found = surprisal_entropy(logits, ids, temperature=temperature, response_mask=mask)
        return found.logprobs, found.entropy

    own = slice(deepest - keep + 1, None)
    parts = [tuple(part[of_row] for part in score(trunk[:, :-1], trunk_ids[:, own], is_trunk[:, own]))]
    longest = max(n - c.depth for c in clusters for n in batch.lengths[c.first : c.last])
    if longest:
        offsets = torch.arange(longest, device=device)
        begins = depths[of_row][:, None]
        is_tail = begins + offsets < lengths[:, None]
        places = (batch.starts[:, None] + begins + offsets).clamp_max(width - 1)
        tail_ids = torch.where(is_tail, batch.ids.gather(1, places), last_ids)
        mask = is_tail & batch.scored.gather(1, places)
        parts.append(score(trunk[:, -1][of_row][:, None], tail_ids[:, :1], mask[:, :1]))
        if longest > 1:
            of_rows: Any = DynamicCache()
            for number, layer in enumerate(cache.layers):
                of_rows.update(layer.keys[of_row], layer.values[of_row], number)
            is_seen = torch.cat([is_trunk[of_row], is_tail], 1)
            tails = _forward(model, tail_ids, is_seen, begins + offsets, longest, of_rows, {})
            parts.append(score(tails[:, :-1], tail_ids[:, 1:], mask[:, 1:]))
    logprobs, entropy = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))
    # Entry k of a row is about its token depth - keep + 1 + k.
    entry = torch.arange(width, device=device) - batch.starts[:, None] - depths[of_row][:, None] + keep - 1
    is_there = batch.scored & (entry >= 0) & (entry < logprobs.shape[1])
    entry = entry.clamp(0, max(logprobs.shape[1] - 1, 0))
    if not logprobs.shape[1]:
        return _in_place(batch, *(batch.scored.new_zeros(batch.ids.shape, dtype=torch.float32) for _ in range(2)))
    return _in_place(batch, *(torch.where(is_there, part.gather(1, entry), 0.0) for part in (logprobs, entropy)))


def _forward(
    model: Any, ids: Tensor, mask: Tensor, positions: Tensor | None, keep: int, cache: Any, inputs: dict[str, Any]
) -> Tensor:
    """(rows, keep, V) logits of the last columns."""
    names = _parameters(model)
    more: dict[str, Any] = dict(inputs)
    if cache is not None:
        more[name_of_cache(_bare(model))] = cache
    if "logits_to_keep" in names:
        more["logits_to_keep"] = keep
    if "position_ids" in names and positions is not None:
        more["position_ids"] = positions
    output = model(input_ids=ids, attention_mask=mask.long(), use_cache=cache is not None, **more)
    return output.logits[:, -keep:]


def _in_place(batch: _Batch, logprobs: Tensor, entropy: Tensor) -> TreeLogprobs:
    """Rows where the caller has them; those without a token are 0."""
    zeros = logprobs.new_zeros(batch.num_rows, logprobs.shape[1])
    return TreeLogprobs(*(zeros.index_copy(0, batch.order, part) for part in (logprobs, entropy)))
