"""The report from tensors, for notebooks and training loops that hold no file."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

import leafkernels
from leafkernels.command.credit import Credit
from leafkernels.command.html import Report
from leafkernels.command.reading import Prompt


class Tokenizer(Protocol):
    """What is needed of a tokenizer: the text of a list of ids."""

    def decode(self, token_ids: list[int], /) -> str: ...


def report(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    prompts: Sequence[str] | None = None,
    title: str = "Rollouts",
    max_prompts: int = 50,
    **options: Any,
) -> Report:
    """The report of ``python -m leafkernels --html``, from what ``span_advantages`` takes.

    In a notebook the result shows itself, in a frame whose style and script reach nothing outside; ``.save(path)``
    writes the page. Tensors are copied to the CPU, so this is not for every step of a training loop. Needs jinja2.

    Args:
        logprobs, token_ids, rewards, response_mask, groups, cu_seqlens: as in ``span_advantages``.
        group_size: consecutive runs of that many rows are a prompt.
        tokenizer: its ``decode`` gives the text of a list of ids; None: the page shows ids.
        prompts: the text of every prompt, in the order of their groups.
        title: the heading of the page.
        max_prompts: prompts whose trees are in the page; the page says how many it leaves out.
        options: those of ``span_tree``: ``num_boundaries``, ``min_separation``, ``boundary_scores``, ``terms``,
            ``multiplicity_power``, ``leave_one_out``, ``normalize``.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.
        ImportError: jinja2 is missing.
    """
    if isinstance(max_prompts, bool) or not isinstance(max_prompts, int) or max_prompts < 1:
        raise ValueError(f"max_prompts must be an int of at least 1, got {max_prompts!r}")
    named: dict[str, Any] = {"boundary_scores": None, **options}
    tensors = {"logprobs": logprobs, "token_ids": token_ids, "rewards": rewards, "response_mask": response_mask}
    tensors |= {"groups": groups, "cu_seqlens": cu_seqlens, "boundary_scores": named.pop("boundary_scores")}
    calls: dict[str, Any] = {
        name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in tensors.items()
    }
    scores = calls.pop("boundary_scores")
    calls["group_size"] = group_size

    tree = leafkernels.span_tree(**calls, **named, boundary_scores=scores)
    forking = {name: named[name] for name in ("num_boundaries", "min_separation") if name in named}
    by_scheme = {
        "leaf": leafkernels.span_advantages(**calls, **named, boundary_scores=scores),
        "grpo": leafkernels.grpo(**calls),
        "tempo": leafkernels.tempo(**calls),
        "treerl": leafkernels.treerl(**calls, **forking, boundary_scores=scores),
    }

    rows = _rows(calls)
    group_of_row = _group_of_row(calls, len(rows))
    names = group_of_row.unique().tolist()
    if prompts is not None and len(prompts) != len(names):
        raise ValueError(f"prompts must have one text for each of {len(names)} prompts, got {len(prompts)}")
    texts = _Texts(tokenizer)
    shown = {name: value for name, value in named.items() if value is not None and value is not False}
    page = Report(title, {"num_boundaries": 2, **shown}, max_prompts)
    boundaries = _boundaries_of_rows(tree.boundaries, group_of_row, len(rows))
    flat = {name: values.reshape(-1) for name, values in by_scheme.items()}
    for number, name in enumerate(names):
        members = (group_of_row == name).nonzero().flatten().tolist()
        places = [rows[row] for row in members]
        ids = [calls["token_ids"].reshape(-1)[place].tolist() for place in places]
        prompt = Prompt(
            where=f"prompt {number}",
            record={},
            name=f"prompt {number}",
            text="" if prompts is None else prompts[number],
            token_ids=ids,
            logprobs=[calls["logprobs"].reshape(-1)[place].double().tolist() for place in places],
            rewards=calls["rewards"].reshape(-1)[members].double().tolist(),
            tokens=[texts.of(row) for row in ids],
        )
        credit = _credit(tree, boundaries[members[0]], members, [len(row) for row in ids])
        mask = calls["response_mask"]
        page.add(
            prompt,
            credit,
            {scheme: [values[place] for place in places] for scheme, values in flat.items()},
            None if mask is None else [(mask.reshape(-1)[place] != 0).tolist() for place in places],
        )
    return page


def _rows(calls: dict[str, Any]) -> list[slice]:
    """Where the tokens of every row lie, from its first to its last unmasked one, in the flattened tensors."""
    token_ids, mask, cu_seqlens = calls["token_ids"], calls["response_mask"], calls["cu_seqlens"]
    if cu_seqlens is None:
        width = token_ids.shape[-1]
        offsets = [row * width for row in range(calls["rewards"].numel() + 1)]
    else:
        offsets = cu_seqlens.tolist()
    rows = []
    for start, end in pairwise(offsets):
        if mask is not None:
            live = mask.reshape(-1)[start:end].nonzero().flatten().tolist()
            start, end = (start + live[0], start + live[-1] + 1) if live else (start, start)
        rows.append(slice(start, end))
    return rows


def _group_of_row(calls: dict[str, Any], num_rows: int) -> Tensor:
    if calls["groups"] is not None:
        return calls["groups"]
    if calls["group_size"] is not None:
        return torch.arange(num_rows) // calls["group_size"]
    if calls["token_ids"].dim() == 3:
        return torch.arange(num_rows) // max(calls["token_ids"].shape[1], 1)
    return torch.zeros(num_rows, dtype=torch.int64)


def _boundaries_of_rows(boundaries: Tensor, group_of_row: Tensor, num_rows: int) -> list[list[int]]:
    """The boundaries of every row's prompt, from one line for each row, for each prompt, or for the only prompt."""
    if boundaries.dim() == 1:
        boundaries = boundaries.expand(num_rows, -1)
    elif len(boundaries) != num_rows:
        boundaries = boundaries[group_of_row]
    return [[position for position in row if position >= 0] for row in boundaries.tolist()]


def _credit(tree: Any, boundaries: list[int], members: list[int], lengths: list[int]) -> Credit:
    """The tree of one prompt's rows, as the command holds it."""

    def of_members(values: Tensor) -> list[Any]:
        return values.reshape(-1, values.shape[-1])[members].tolist()

    nodes = of_members(tree.nodes)
    return Credit(
        boundaries=boundaries,
        nodes=nodes,
        depths=[sum(node >= 0 for node in row) for row in nodes],
        ends=[
            [min(end, length) for end in row]
            for row, length in zip(of_members(tree.spans.span_ends), lengths, strict=True)
        ],
        values=of_members(tree.spans.values),
        means=of_members(tree.spans.node_values),
    )


class _Texts:
    """The text of tokens one by one, each asked for once."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, token_ids: list[int]) -> list[str] | None:
        if self._tokenizer is None:
            return None
        for token_id in token_ids:
            if token_id not in self._known:
                self._known[token_id] = self._tokenizer.decode([token_id])
        return [self._known[token_id] for token_id in token_ids]
