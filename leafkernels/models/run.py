"""A piece of a plan through a model: its trunks, its bins behind them, and numbers for the tokens of its rows."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels.models.asking import bare_model, name_of_cache, parameters_of, text_config
from leafkernels.models.batch import Rows
from leafkernels.models.heads import Head, hidden_states, score
from leafkernels.models.masks import Sees, attention_masks, tree_sees
from leafkernels.models.plan import Bin, Cluster, Piece
from leafkernels.vocabulary.sampling_mask import SamplingMask

# What else is taken of a forward pass, (rows, tokens, ...): from the model's output, and the states that its decoder
# gives, where the decoder runs hooks.
Read = Callable[[Any, Tensor | None], Tensor]


class Run(NamedTuple):
    """How a model is called."""

    model: Any
    head: Head | None = None
    temperature: float = 1.0
    inputs: Mapping[str, Any] = MappingProxyType({})
    # Whether ranks run each forward and backward pass together: then none may be left out.
    in_step: bool = False
    read: Read | None = None
    # The kept ids of the cells of rows.
    mask: SamplingMask | None = None

    def kept(self, cells: Tensor | None) -> SamplingMask | None:
        return None if self.mask is None or cells is None else self.mask.index(cells.flatten())


class Found(NamedTuple):
    """Of the rows of a piece (N, L), 0 where nothing is asked for."""

    logprobs: Tensor
    entropy: Tensor
    # (N, L, ...) of all tokens.
    read: Tensor | None


class _States(NamedTuple):
    """Of a forward pass."""

    kept: Tensor  # (rows, keep, size) of the last columns, or their logits
    read: Tensor | None  # (rows, columns, ...)


def run_piece(run: Run, rows: Rows, piece: Piece) -> Found:
    run_them = _run_nodes if piece.trunks or piece.is_masked else _run_rows
    states, found = run_them(run, rows, piece)
    if run.in_step:
        # Whoever asks for a gradient sends one, if of zeros, through every forward pass.
        tie = sum(part.kept[:, -1].sum() * 0.0 for part in states)
        read = None if found.read is None else found.read + tie
        found = Found(found.logprobs + tie, found.entropy + tie, read)
    return found


def _run_rows(run: Run, rows: Rows, piece: Piece) -> tuple[list[_States], Found]:
    device, width = rows.ids.device, rows.ids.shape[1]
    is_token = torch.arange(width, device=device) < torch.tensor(rows.lengths, device=device)[:, None]
    # Nothing before the first token that is asked for needs logits, but for the last of that.
    skip = max(min(min(rows.firsts), width - 1) - 1, 0)
    # Rows begin in the first column: positions are the model's business, which may count from another than 0.
    states = _forward(run, rows.ids, is_token.long(), None, width - skip, None, run.inputs)
    asked = rows.scored[:, skip + 1 :]
    kept = run.kept(None if rows.cells is None else rows.cells[:, skip + 1 :])
    found = score(run.head, states.kept[:, :-1], rows.ids[:, skip + 1 :], run.temperature, asked, kept)
    read = None if states.read is None else _where(is_token, states.read)
    return [states], Found(pad(found.logprobs, (skip + 1, 0)), pad(found.entropy, (skip + 1, 0)), read)


def _run_nodes(run: Run, rows: Rows, piece: Piece) -> tuple[list[_States], Found]:
    trunks, bins = piece
    device, length = rows.ids.device, rows.ids.shape[1]
    of_bin = _numbers(bins, device)
    of_trunk = torch.tensor(_trunk_of_bin(piece), device=device)
    depths = torch.tensor([trunk.depth for trunk in trunks] or [0], device=device)[of_trunk, None]
    depth, columns = depths[of_bin], torch.arange(length, device=device)

    states, keep, before = list[_States](), 0, None
    if trunks:
        keep = max(1, *(trunk.depth - min(rows.firsts[trunk.first : trunk.last]) + 1 for trunk in trunks))
        of_trunks, before = _run_trunks(run, rows, piece, keep)
        states.append(of_trunks)
        if len(bins) != len(trunks):
            before = before.of(_trunk_of_bin(piece))
    bins_of = _nodes_in_bins if piece.is_masked else _rows_in_bins
    ids, positions, column, mask = bins_of(run, rows, piece, depths, before)
    # The first columns of all bins, after which nothing is asked for.
    asked = [min(rows.firsts[held.first : held.last]) for held in bins]
    skip = min(first - 1 - piece.depth_of(number) for first, number in zip(asked, _trunk_of_bin(piece), strict=True))
    skip = min(max(skip, 0), max(ids.shape[1] - 1, 0))
    kept = ids.shape[1] - skip
    # A last token alone behind a trunk is scored by the trunk.
    if ids.shape[1] > 1 or not trunks or run.in_step or run.read is not None:
        cache = None if before is None else before.cache
        states.append(_forward(run, ids, mask, positions, kept, cache, {} if trunks else run.inputs))

    def places(keep: int, kept: int) -> Tensor:
        """Where each token stands: the last ``keep`` columns of all trunks, and then the last ``kept`` of all bins."""
        behind = len(trunks) * keep + of_bin[:, None] * kept + column - ids.shape[1] + kept
        return torch.where(columns < depth, of_trunk[of_bin, None] * keep + keep - depth + columns, behind)

    read = None
    if run.read is not None:
        flat = torch.cat([part.read.flatten(0, 1) for part in states if part.read is not None])
        is_token = columns < torch.tensor(rows.lengths, device=device)[:, None]
        read = _where(is_token, flat[places(piece.deepest, ids.shape[1]).clamp(0, len(flat) - 1)])
    pairs = _pairs(rows, piece, device)
    if not len(pairs):
        # As where there are some: a loss of them has a gradient, of zeros.
        nothing = torch.zeros(rows.ids.shape, device=device) + states[-1].kept[:, -1].sum() * 0.0
        return states, Found(nothing, nothing, read)

    size = len(trunks) * keep + len(bins) * kept
    place = places(keep, kept).clamp(0, size - 1)
    row, token = pairs.unbind(1)
    target, flat = place[row, token], torch.cat([part.kept.flatten(0, 1) for part in states])
    is_asked = torch.zeros(size + 1, dtype=torch.bool, device=device)
    is_asked[torch.where(rows.scored, place, size)] = True
    before_it, possible = flat[place[row, token - 1]], run.kept(None if rows.cells is None else rows.cells[row, token])
    found = score(run.head, before_it, rows.ids[row, token], run.temperature, is_asked[target], possible)
    number = torch.zeros(size, dtype=torch.int64, device=device)
    number[target] = torch.arange(len(pairs), device=device)
    logprobs, entropy = (torch.where(rows.scored, part[number[place]], 0.0) for part in (found.logprobs, found.entropy))
    return states, Found(logprobs, entropy, read)


def _where(is_token: Tensor, numbers: Tensor) -> Tensor:
    """Numbers (N, L, ...) of tokens, 0 elsewhere."""
    return torch.where(is_token.view(*is_token.shape, *(1,) * (numbers.dim() - 2)), numbers, 0.0)


class _Before(NamedTuple):
    """What stands before each row of a batch: keys and values, the columns that hold a token, and their positions."""

    cache: Any
    is_token: Tensor  # (B, D) bool
    positions: Tensor  # (B, D)

    def of(self, rows: list[int]) -> "_Before":
        """The same before other rows, named by these in ascending order.

        As often each they are an expansion, whose gradient is a sum: an index writes its own one entry by entry.
        """
        from transformers import DynamicCache

        size, device = len(self.is_token), self.is_token.device
        times = len(rows) // size
        index = None if rows == sorted([*range(size)] * times) else torch.tensor(rows, device=device)

        def spread(part: Tensor) -> Tensor:
            if index is not None:
                return part[index]
            return part[:, None].expand(-1, times, *part.shape[1:]).flatten(0, 1)

        cache: Any = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            cache.update(spread(layer.keys), spread(layer.values), number)
        return _Before(cache, spread(self.is_token), spread(self.positions))


def _run_trunks(run: Run, rows: Rows, piece: Piece, keep: int) -> tuple[_States, _Before]:
    """States of the last ``keep`` columns of all trunks, which end in the same one."""
    from transformers import DynamicCache

    device = rows.ids.device
    depths = torch.tensor([trunk.depth for trunk in piece.trunks], device=device)[:, None]
    columns = torch.arange(piece.deepest, device=device) - piece.deepest + depths
    is_token, positions = columns >= 0, columns.clamp_min(0)
    heads, last = _heads(rows, piece.trunks)
    cache: Any = DynamicCache()
    ids = torch.where(is_token, heads.gather(1, positions), last)
    states = _forward(run, ids, is_token.long(), positions, keep, cache, run.inputs)
    return states, _Before(cache, is_token, positions)


def _heads(rows: Rows, parts: Sequence[Cluster | Bin]) -> tuple[Tensor, Tensor]:
    """The first row of each part, and its last token (P, 1), which fills: it stands for no recording or image.

    Models count the tokens that do.
    """
    device = rows.ids.device
    ids = rows.ids[torch.tensor([part.first for part in parts], device=device)]
    ends = torch.tensor([rows.lengths[part.first] - 1 for part in parts], device=device)
    return ids, ids.gather(1, ends[:, None])


# Of bins: ids (B, W), positions (B, W), the column of each token of the rows (N, L), and the mask.
_Bins = tuple[Tensor, Tensor, Tensor, Any]


def _rows_in_bins(run: Run, rows: Rows, piece: Piece, depths: Tensor, before: _Before | None) -> _Bins:
    """Bins of a row each, behind their trunks, with a mask of two dimensions."""
    assert before is not None
    device, length = rows.ids.device, rows.ids.shape[1]
    positions = depths + torch.arange(max(piece.widest, 1), device=device)
    is_token = positions < torch.tensor(rows.lengths, device=device)[:, None]
    heads, last = _heads(rows, piece.bins)
    ids = torch.where(is_token, heads.gather(1, positions.clamp_max(length - 1)), last)
    column = torch.arange(length, device=device) - depths
    return ids, positions, column, torch.cat([before.is_token, is_token], 1).long()


def _nodes_in_bins(run: Run, rows: Rows, piece: Piece, depths: Tensor, before: _Before | None) -> _Bins:
    """Bins of several rows: their nodes in depth-first order, each of which sees those above it.

    Down a column the node of a token is that of the last row that began there, a running maximum; the first later row
    that shares less ends it, a running minimum the other way.
    """
    device, length = rows.ids.device, rows.ids.shape[1]
    spans = _own_tokens(rows, piece)
    firsts = [0, *itertools.accumulate(last - first for _, first, last in spans)]
    forks = [0 if row in {held.first for held in piece.bins} else first for row, first, _ in spans]
    begins = [firsts[held.first] for held in piece.bins]
    numbers = [forks, [first - begun for first, (_, begun, _) in zip(firsts, spans, strict=False)], firsts[1:]]
    fork, base, ended_at = torch.tensor(numbers, device=device).unbind()
    rows_at, columns = torch.arange(len(spans), device=device)[:, None], torch.arange(length, device=device)
    begun = torch.where(fork[:, None] <= columns, rows_at, 0).cummax(0).values
    ends_later = pad(fork[1:], (0, 1), value=-1)[:, None] <= columns
    ended = torch.where(ends_later, rows_at, len(spans) - 1).flip(0).cummin(0).values.flip(0)
    row, token = pad(_tokens(spans, device), (0, 0, 0, 1)).unbind(1)  # one at least
    begin = torch.tensor(begins, device=device)[:, None]
    offsets = torch.arange(max(piece.widest, 1), device=device)
    is_node = offsets < torch.tensor([held.nodes for held in piece.bins], device=device)[:, None]
    at = torch.where(is_node, begin + offsets, 0)
    ids = torch.where(is_node, rows.ids[row, token][at], _heads(rows, piece.bins)[1])
    positions = torch.where(is_node, token[at], 0)
    ends = torch.where(is_node, ended_at[ended[row, token]][at] - begin, offsets + 1)  # what fills sees itself
    is_trunk, keys = ends.new_zeros((len(ends), 0), dtype=torch.bool), positions
    if before is not None:
        is_trunk, keys = before.is_token, torch.cat([before.positions, positions], 1)
    mask = _mask(run, tree_sees(ends, is_trunk), positions, keys)
    return ids, positions, base[begun] + columns - begin[_numbers(piece.bins, device)], mask


def _mask(run: Run, sees: Sees, positions: Tensor, keys: Tensor) -> Any:
    # Not that of any weight, which may be quantised.
    dtype = bare_model(run.model).get_input_embeddings().weight.dtype
    try:
        return attention_masks(text_config(run.model), sees, positions, keys, dtype)
    except RuntimeError as error:  # a GPU's has a name of its own, and a CPU's a text
        if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
            raise
        raise RuntimeError(
            f"max_tokens must be smaller than {positions.numel()}, the nodes of a tree whose attention mask of shape "
            f"{(len(keys), 1, positions.shape[1], keys.shape[1])} does not fit into memory ({error})"
        ) from error


def _numbers(parts: Sequence[Cluster | Bin], device: Any) -> Tensor:
    """(N,) which part holds each row."""
    return torch.tensor([n for n, part in enumerate(parts) for _ in range(part.first, part.last)], device=device)


def _trunk_of_bin(piece: Piece) -> list[int]:
    """Of each bin the number of its trunk, 0 where there is none."""
    of_row = [number for number, trunk in enumerate(piece.trunks) for _ in range(trunk.first, trunk.last)]
    return [of_row[held.first] if of_row else 0 for held in piece.bins]


def _own_tokens(rows: Rows, piece: Piece) -> list[tuple[int, int, int]]:
    """Of each row its number, and the first and the last of the tokens for which its bin has a node of its own."""
    spans = list[tuple[int, int, int]]()
    for held, trunk in zip(piece.bins, _trunk_of_bin(piece), strict=True):
        depth = piece.depth_of(trunk)
        for row in range(held.first, held.last):
            own = depth if row == held.first else max(rows.shared[row], depth)
            spans.append((row, own, rows.lengths[row]))
    return spans


def _pairs(rows: Rows, piece: Piece, device: Any) -> Tensor:
    """(pairs, 2): row and column of each node that may be asked for, in the first row that has it."""
    spans = list[tuple[int, int, int]]()
    for of_all in piece.trunks:
        spans.append((of_all.first, min(rows.firsts[of_all.first : of_all.last]), of_all.depth))
    asked = [min(rows.firsts[held.first : held.last]) for held in piece.bins for _ in range(held.first, held.last)]
    spans += [
        (row, max(own, first), last) for (row, own, last), first in zip(_own_tokens(rows, piece), asked, strict=True)
    ]
    return _tokens([(row, max(first, 1), last) for row, first, last in spans], device)


def _tokens(spans: list[tuple[int, int, int]], device: Any) -> Tensor:
    """(tokens, 2): row and column of all tokens of spans (row, first, last)."""
    table = torch.tensor([span for span in spans if span[1] < span[2]], dtype=torch.int64).reshape(-1, 3)
    counts = table[:, 2] - table[:, 1]
    rows_of = table[:, 0].repeat_interleave(counts)
    begins = (table[:, 1] - counts.cumsum(0) + counts).repeat_interleave(counts)
    return torch.stack([rows_of, begins + torch.arange(len(rows_of))], 1).to(device)


def _forward(
    run: Run, ids: Tensor, mask: Any, positions: Tensor | None, keep: int, cache: Any, inputs: Mapping[str, Any]
) -> _States:
    """Hidden states of the last columns where there is a head, else their logits."""
    names = parameters_of(run.model)
    more: dict[str, Any] = dict(inputs)
    if cache is not None:
        more[name_of_cache(bare_model(run.model))] = cache
    if "use_cache" in names:
        more["use_cache"] = cache is not None
    if "logits_to_keep" in names:
        # A decoder may cut its own states by it, which then has no head here, and is asked for all that are read.
        more["logits_to_keep"] = 1 if run.head else keep if run.read is None else ids.shape[1]
    if "position_ids" in names and positions is not None:
        more["position_ids"] = positions
    hooked: Any = hidden_states(bare_model(run.model)) if run.head or run.read else nullcontext([])
    with hooked as found:
        output = run.model(input_ids=ids, attention_mask=mask, **more)
    if run.head is None and getattr(output, "logits", None) is None:
        raise TypeError(f"model must have a head that gives logits, got {type(bare_model(run.model)).__name__}")
    states = output.logits if run.head is None else found[-1]
    if run.read is None:
        return _States(states[:, -keep:], None)
    numbers = run.read(output, found[-1] if found else None)
    if numbers.shape[:2] != ids.shape:
        raise ValueError(
            f"model must give numbers of each token, {tuple(ids.shape)} in front, got shape {tuple(numbers.shape)}"
        )
    return _States(states[:, -keep:], numbers)
