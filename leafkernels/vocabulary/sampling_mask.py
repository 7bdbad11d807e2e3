"""Which ids a token was sampled from: the kept ids of top-p, top-k or min-p, as ragged lists, one for each row."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.checks import (
    check_count,
    check_device,
    check_finite,
    check_integer,
    check_mask,
    check_positive,
    check_real,
    check_tensor,
    values_readable,
)
from leafkernels.vocabulary.slices import Slice

# Logits that are sorted at a time, float32.
_CHUNK = 1 << 26


class SamplingMask(NamedTuple):
    """The ids that each token could have been, rows one after the other, as engines that sample hand them over.

    A row without any says nothing: its distribution is that over the whole vocabulary. Order and repetitions within a
    row mean nothing, ids outside the vocabulary are ignored, and the sampled id always counts as kept.

    Example:
        >>> mask = leafkernels.SamplingMask.from_lists([[3, 5], [], [7]])
        >>> mask
        SamplingMask(token_ids=tensor([3, 5, 7]), offsets=tensor([0, 2, 2, 3]))
        >>> mask.index(torch.tensor([2, 0])).offsets
        tensor([0, 1, 3])
    """

    token_ids: Tensor
    """(K,) integers of any dtype: the kept ids."""
    offsets: Tensor
    """(N + 1,) int64: row i, of the flattened rows, has ``token_ids[offsets[i] : offsets[i + 1]]``."""

    @classmethod
    def from_lists(
        cls, rows: Sequence[Sequence[int] | None], device: torch.device | str | None = None
    ) -> "SamplingMask":
        """From one list of ids for each row; an empty one, or None, where they are not known."""
        lengths = [len(row or ()) for row in rows]
        token_ids = torch.tensor([i for row in rows for i in row or ()], dtype=torch.int64, device=device)
        return cls(token_ids, torch.tensor([0, *lengths], dtype=torch.int64, device=device).cumsum(0))

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        token_ids: Tensor | None = None,
    ) -> "SamplingMask":
        """What a sampler keeps: the temperature, then top-k, top-p and min-p, as transformers' processors do.

        None, and a top-p of 1, a top-k or a min-p of 0, keep all. Where all three do, no row has ids: nothing is
        truncated. The number of kept ids is read back, which on a GPU waits for the device.

        Args:
            logits: (..., V) floating point; rows are sorted in float32, float64 for float64, some at a time.
            temperature: positive; the logits are divided by it first.
            top_k: ids at least as likely as the k-th.
            top_p: the likeliest ids whose probabilities sum to it, and the one that passes it.
            min_p: ids at least this share as likely as the likeliest.
            token_ids: (...) the sampled ids, which are kept whatever the sampler would have done.
        """
        check_real("logits", logits)
        check_positive("temperature", temperature)
        if top_k is not None:
            check_count("top_k", top_k, 0)
        for name, share in (("top_p", top_p), ("min_p", min_p)):
            if share is not None:
                check_finite(name, share)
                if not 0 <= share <= 1 or (name == "top_p" and share == 0):
                    raise ValueError(f"{name} must be a share of at most 1, got {share}")
        if logits.dim() == 0:
            raise ValueError("logits must have shape (..., vocabulary), got shape ()")
        rows = logits.detach().reshape(-1, logits.shape[-1])
        ids = None
        if token_ids is not None:
            ids = check_integer("token_ids", token_ids)
            if ids.shape != logits.shape[:-1]:
                raise ValueError(
                    f"token_ids must have one entry for each row of logits, shape {tuple(logits.shape[:-1])}, "
                    f"got shape {tuple(ids.shape)}"
                )
            check_device("token_ids", ids, "logits", logits.device)
            ids = ids.reshape(-1).to(torch.int64)
        num_rows, vocab_size = rows.shape
        top_k = None if top_k is None or not 0 < top_k < vocab_size else top_k
        top_p, min_p = None if top_p == 1 else top_p, min_p or None
        lengths = torch.zeros(num_rows + 1, dtype=torch.int64, device=logits.device)
        found = [torch.empty(0, dtype=torch.int64, device=logits.device)]
        if rows.numel() and (top_k, top_p, min_p) != (None, None, None):
            step = max(1, _CHUNK // vocab_size)
            for start in range(0, num_rows, step):
                part = slice(start, start + step)
                kept = _sampled_from(rows[part], temperature, top_k, top_p, min_p)
                if ids is not None:
                    in_row = (ids[part] >= 0) & (ids[part] < vocab_size)
                    at = ids[part].clamp(0, vocab_size - 1)[:, None]
                    kept.scatter_(1, at, kept.gather(1, at) | in_row[:, None])
                lengths[1:][part] = kept.sum(1)
                found.append(kept.nonzero()[:, 1])
        return cls(torch.cat(found), lengths.cumsum(0))

    def pad(self, response_mask: Tensor) -> "SamplingMask":
        """For all rows of ``response_mask``, from a mask of those alone where it is True, in order.

        Engines know completions, trainers pad them: the rows of padding have no ids. Nothing is read back.
        """
        checked = check_sampling_mask(self, None, None)
        live = check_mask(response_mask, "response_mask", response_mask.shape, checked.offsets.device)
        assert live is not None
        live = live.reshape(-1)
        lengths = checked.offsets.diff()
        if values_readable(live) and int(live.sum()) != len(lengths):
            raise ValueError(
                f"response_mask must be True for each of the {len(lengths)} rows of the mask, got {int(live.sum())}"
            )
        placed = torch.zeros(live.shape[0] + 1, dtype=torch.int64, device=live.device)
        placed[1:].masked_scatter_(live, lengths)
        return SamplingMask(self.token_ids, placed.cumsum(0))

    def index(self, rows: Tensor) -> "SamplingMask":  # type: ignore[override]  # not the search of a tuple
        """The rows by their numbers, (R,) integers, in that order; how many ids they have is read back."""
        checked = check_sampling_mask(self, None, None)
        rows = check_integer("rows", rows).to(torch.int64)
        check_device("rows", rows, "sampling_mask", checked.offsets.device)
        num_rows = checked.offsets.shape[0] - 1
        if rows.dim() != 1 or (values_readable(rows) and bool(((rows < 0) | (rows >= num_rows)).any())):
            raise ValueError(
                f"rows must be numbers of rows, (R,), from 0 to {num_rows - 1}, got {rows.tolist()} of shape "
                f"{tuple(rows.shape)}"
            )
        starts, lengths = checked.offsets[rows], checked.offsets.diff()[rows]
        offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        shift = (starts - offsets[:-1]).repeat_interleave(lengths)
        at = torch.arange(shift.shape[0], device=shift.device) + shift
        return SamplingMask(self.token_ids[at], offsets)

    def num_missing(self, token_ids: Tensor, response_mask: Tensor | None = None) -> Tensor:
        """How many sampled ids are not among the kept ids of their row, of rows that have some: (), int64.

        Rounding puts a few outside; many say that the mask is not that of these tokens. Nothing is read back.
        """
        ids = check_integer("token_ids", token_ids)
        live = check_mask(response_mask, "token_ids", ids.shape, ids.device)
        ids = ids.reshape(-1).to(torch.int64)
        checked = check_sampling_mask(self, ids.shape[0], ids.device)
        missing = are_missing(checked, ids)
        return (missing if live is None else missing & live.reshape(-1)).sum()

    @property
    def bytes(self) -> int:
        """What both tensors take in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


class Kept(NamedTuple):
    """The kept ids of the rows that have any, in one form: sorted, each once, the sampled id among them.

    M = K + N is known without a look at the values. What is not needed stands at the end, as id 0 of row N.
    """

    ids: Tensor  # (M,) int64
    rows: Tensor  # (M,) int64
    offsets: Tensor  # (N + 1,) int64; a row that is masked, or has the whole vocabulary, is empty
    sampled: Tensor  # (N,) int64: where the sampled id of a row stands; -1 where it is outside the vocabulary


def check_sampling_mask(mask: Any, num_rows: int | None, device: torch.device | None) -> SamplingMask:
    """The mask, in dtypes to compute with; raise unless it is one of ``num_rows`` rows on ``device``."""
    if not isinstance(mask, SamplingMask):
        raise TypeError(f"sampling_mask must be a leafkernels.SamplingMask, got {type(mask).__name__}")
    ids = check_integer("sampling_mask.token_ids", mask.token_ids)
    offsets = check_integer("sampling_mask.offsets", check_tensor("sampling_mask.offsets", mask.offsets))
    if ids.dim() != 1:
        raise ValueError(f"sampling_mask.token_ids must have shape (kept ids,), got shape {tuple(ids.shape)}")
    rows = "rows" if num_rows is None else num_rows
    if offsets.dim() != 1 or not offsets.shape[0] or (num_rows is not None and offsets.shape[0] != num_rows + 1):
        raise ValueError(
            f"sampling_mask.offsets must have one entry more than there are rows, shape ({rows} + 1,), "
            f"got shape {tuple(offsets.shape)}"
        )
    check_device("sampling_mask.token_ids", ids, "sampling_mask.offsets", offsets.device)
    if device is not None:
        check_device("sampling_mask", ids, "token_ids", device)
    offsets = offsets.to(torch.int64)
    if values_readable(offsets):
        is_rising = bool((offsets.diff() >= 0).all())
        if int(offsets[0]) or not is_rising or int(offsets[-1]) > ids.shape[0]:
            raise ValueError(
                f"sampling_mask.offsets must begin with 0, never fall, and end with at most the {ids.shape[0]} kept "
                f"ids, got {int(offsets[0])} to {int(offsets[-1])}{'' if is_rising else ', falling'}"
            )
    return SamplingMask(ids, offsets)


def kept_ids(
    mask: SamplingMask, token_ids: Tensor, vocab_size: int, live: Tensor | None, part: Slice | None = None
) -> tuple[Kept | None, Tensor]:
    """Of ``check_sampling_mask``'s result the kept ids, and which rows (N,) have the whole vocabulary.

    Two sorts of K + N numbers; nothing is read back. ``token_ids`` (N,) holds at least 1 id. Of a ``part`` of the
    vocabulary of ``vocab_size`` ids the kept ids are those of that part, and they and ``token_ids`` are counted from
    its first; None where it has no ids.
    """
    num_rows, ids = token_ids.shape[0], mask.token_ids.to(torch.int64)
    rows = rows_of(mask)
    first, total = (0, vocab_size) if part is None else part
    has_ids = count_by_row((ids >= 0) & (ids < total), mask.offsets) > 0
    ids = ids - first
    is_id = (ids >= 0) & (ids < vocab_size)
    is_free = ~has_ids
    if live is not None:
        is_free, has_ids = is_free & live, has_ids & live
    if not vocab_size:
        return None, is_free
    every = torch.arange(num_rows + 1, device=ids.device)
    tokens = token_ids.to(torch.int64)
    is_token = (tokens >= 0) & (tokens < vocab_size)
    is_id = torch.cat((is_id & (rows >= 0) & (rows < num_rows), is_token))
    ids, rows = torch.cat((ids, tokens)), torch.cat((rows.clamp(0, num_rows - 1), every[:-1]))
    none = num_rows * vocab_size
    keys = torch.where(is_id & has_ids[rows], rows * vocab_size + ids, none).sort().values
    again = torch.cat((is_id.new_zeros(1), keys[1:] == keys[:-1]))
    keys = keys.masked_fill(again, none).sort().values
    sampled = every[:-1] * vocab_size + tokens
    at = torch.where(is_token & has_ids, torch.searchsorted(keys, sampled), -1)
    return Kept(keys % vocab_size, keys // vocab_size, torch.searchsorted(keys, every * vocab_size), at), is_free


def lists_of(mask: SamplingMask | None, rows: Sequence[int]) -> list[list[int]] | None:
    """The kept ids of each of ``rows``, for the reference."""
    if mask is None:
        return None
    ids, offsets = mask.token_ids.tolist(), mask.offsets.tolist()
    return [ids[offsets[row] : offsets[row + 1]] for row in rows]


def are_missing(mask: SamplingMask, token_ids: Tensor) -> Tensor:
    """(N,) whether the sampled id (N,) int64 is not among the kept ids of its row, which has some."""
    if not token_ids.shape[0]:
        return torch.zeros_like(token_ids, dtype=torch.bool)
    is_sampled = mask.token_ids == token_ids[rows_of(mask).clamp(0, token_ids.shape[0] - 1)]
    return (mask.offsets.diff() > 0) & (count_by_row(is_sampled, mask.offsets) == 0)


def rows_of(mask: SamplingMask) -> Tensor:
    """The row (K,) of each kept id; N for those behind the last row."""
    places = torch.arange(mask.token_ids.shape[0], device=mask.offsets.device)
    return torch.searchsorted(mask.offsets, places, right=True) - 1


def count_by_row(chosen: Tensor, offsets: Tensor) -> Tensor:
    """How many of ``chosen`` (K,) are True in each row, by where they begin and end in it."""
    counts = torch.cat((offsets.new_zeros(1), chosen.cumsum(0)))
    return counts[offsets.clamp(0, chosen.shape[0])].diff()


def _sampled_from(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> Tensor:
    """Which ids (n, V) are kept; those of probability 0 are not."""
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32) / temperature
    if top_k is not None:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        # From the least likely up, as transformers sums: what is left out has at most 1 - top_p together.
        ascending, order = x.sort(dim=1)
        is_out = ascending.softmax(1).cumsum(1) <= 1 - top_p
        is_out[:, -1] = False
        x = x.masked_fill(is_out.scatter(1, order, is_out), -torch.inf)
    if min_p is not None:
        p = x.softmax(1)
        x = x.masked_fill(p < min_p * p.amax(1, keepdim=True), -torch.inf)
    return x > -torch.inf
