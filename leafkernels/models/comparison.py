"""A model on a few tokens: whether it looks ahead, and whether a kind of plan gives what rows give."""

import weakref
from typing import Any

import torch
from torch import Tensor

from leafkernels.models.asking import bare_model, evaluating, plain_ids, text_config
from leafkernels.models.batch import Rows, TreeBatch
from leafkernels.models.masks import attention_of
from leafkernels.models.plan import ROWS, TREE, TREE_BELOW, TRUNKS, Bin, Cluster, Piece, whole_bins
from leafkernels.models.run import Run, run_piece

# Models that have been run on a few tokens, and what came of it, by what was asked: None, or what is wrong.
_checked: "weakref.WeakKeyDictionary[Any, dict[Any, str | None]]" = weakref.WeakKeyDictionary()


def compared(model: Any, kind: str, batch: TreeBatch, inputs: dict[str, Any], in_step: bool) -> str | None:
    """What is wrong with a kind of plan, by a few tokens, once for each way that a model may be run; None: nothing."""
    if kind == ROWS:
        return None
    # Of what wraps a model too: prompt tuning puts tokens before its rows.
    known = _checked.setdefault(model, {})
    # Each half of a plan by itself: the cache and the mask.
    asked: list[tuple[Any, ...]] = []
    if kind in (TRUNKS, TREE_BELOW):
        asked.append((TRUNKS, *sorted(inputs)))
    if kind in (TREE, TREE_BELOW):
        asked.append((kind, attention_of(text_config(model))))
    for key in asked:
        if key not in known:
            known[key] = _compare(model, key[0], batch, inputs if key[0] == TRUNKS else {}, in_step)
        if known[key] is not None:
            return known[key]
    return None


def looks_ahead(model: Any, device: torch.device, in_step: bool) -> str | None:
    """What is wrong with a model of which a token's log-probability depends on those behind it, once; None: nothing.

    Run from a cache such a model shows it; in whole rows nothing else would.
    """
    known = _checked.setdefault(model, {})
    key = (ROWS,)
    if key not in known:
        ids = plain_ids(bare_model(model)).to(device)
        pair = torch.stack([ids, torch.cat([ids[:-1], ids[:1]])])  # they differ in the last token
        scored = torch.ones_like(pair, dtype=torch.bool)
        scored[:, 0] = False
        size = len(ids)
        rows = Rows(pair, scored, [size] * 2, [0, size - 1], [1] * 2)
        try:
            one, other = _on_few(model, rows, in_step)[:, :-1]
            most = _apart(one, other)
        except Exception:  # it does not run on so few tokens alone, and what it does on more is not known
            most = 0.0
        how = f"log-probabilities of a few tokens change by {most:.2g} with the token behind them"
        known[key] = None if most < _tolerance(model, device) else how
    return known[key]


def _on_few(
    model: Any, rows: Rows, in_step: bool, inputs: dict[str, Any] | None = None, piece: Piece | None = None
) -> Tensor:
    """Log-probabilities of few rows in evaluation mode, by a piece of a plan or each row alone."""
    alone = Piece([], [Bin(n, n + 1, length) for n, length in enumerate(rows.lengths)])
    with torch.no_grad(), evaluating(model), torch.compiler.set_stance("force_eager"):
        return run_piece(Run(model, None, inputs=inputs or {}, in_step=in_step), rows, piece or alone).logprobs


def _apart(one: Tensor, other: Tensor) -> float:
    return float(torch.where(one == other, 0.0, (one - other).abs()).max())  # -inf is no further from itself


def _tolerance(model: Any, device: torch.device) -> float:
    is_exact = next(bare_model(model).parameters()).dtype in (torch.float32, torch.float64)
    return 1e-3 if is_exact and not torch.is_autocast_enabled(device.type) else 0.2


def _compare(model: Any, kind: str, batch: TreeBatch, inputs: dict[str, Any], in_step: bool) -> str | None:
    rows, piece = _longest_rows(batch) if inputs else _few_rows(model, kind, batch.rows.ids.device)
    how = "from the keys and values of a shared prefix" if kind == TRUNKS else "under a mask of four dimensions"
    try:
        truth, found = (_on_few(model, rows, in_step, inputs, each) for each in (None, piece))
    except Exception as error:  # whatever a model's code raises says that it cannot run so
        return f"it cannot continue {how} ({type(error).__name__}: {error})"
    most = _apart(truth, found)
    if not most < _tolerance(model, rows.ids.device):
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
    if kind == TREE:
        trunks = []
    return rows, Piece(trunks, whole_bins(trunks or [Cluster(0, len(sizes), 0)], rows.shared, lengths))


def _longest_rows(batch: TreeBatch) -> tuple[Rows, Piece]:
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
