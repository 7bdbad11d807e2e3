"""Further numbers of the distributions that tokens were drawn from, where they are asked for; no gradient."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from leafkernels._core.precision import compute_dtype
from leafkernels.vocabulary.inputs import SampledTokens
from leafkernels.vocabulary.sampling_mask import Kept
from leafkernels.vocabulary.slices import Slice

STATISTICS = ("sum_squares", "top_ids", "top_logprobs")
_NO_ID = 2**62


class TokenStatistics(NamedTuple):
    """What ``surprisal_entropy`` gives with ``statistics=``, each shaped like ``token_ids``; None if not asked for."""

    surprisal: Tensor
    """-log p of the token in nats, float32 (float64 for float64 logits), 0 where the mask is False."""
    entropy: Tensor
    """-sum p log p, likewise."""
    sum_squares: Tensor | None = None
    """sum p^2, likewise: the chance that two draws are equal. A constant to autograd, as all that follows."""
    top_ids: Tensor | None = None
    """The likeliest id, of equally likely ones the least; int64, -1 where the mask is False or the row is NaN."""
    top_logprobs: Tensor | None = None
    """Its log-probability, of the dtype of ``surprisal``, 0 where the mask is False."""

    @property
    def logprobs(self) -> Tensor:
        """Log-probability of the token: minus the surprisal."""
        return -self.surprisal


def check_statistics(statistics: Any) -> tuple[str, ...] | None:
    """The names, or None where nobody asks; raise unless they are some of ``STATISTICS``."""
    if statistics is None:
        return None
    if isinstance(statistics, str) or not isinstance(statistics, Sequence):
        raise TypeError(f"statistics must be a list of names, got {type(statistics).__name__}")
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(f"statistics must be some of {', '.join(map(repr, STATISTICS))}, got {name!r}")
    return tuple(statistics)


def at_half(tokens: SampledTokens) -> SampledTokens:
    """The tokens at half their temperature, where e^(x / T) is squared."""
    return tokens._replace(temperature=tokens.temperature.double() * 0.5)


def sum_of_squares(log_total: Tensor, log_squares: Tensor, live: Tensor | None) -> Tensor:
    """sum p^2 (N,), from the logs of sum e^((x - top) / T) and of the same at half the temperature."""
    squares = (log_squares - 2.0 * log_total).exp()
    return squares if live is None else squares.masked_fill(~live, 0.0)


class Likeliest(NamedTuple):
    """The largest logit of each row and the first id that has it, (N,) each; -inf where there is no id."""

    logits: Tensor
    ids: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "Likeliest":
        """Of whole rows (N, V)."""
        if not logits.shape[1]:
            return cls.none(logits, logits.shape[0])
        return cls(*logits.max(1))

    @classmethod
    def none(cls, like: Tensor, num_rows: int) -> "Likeliest":
        ids = torch.zeros(num_rows, dtype=torch.int64, device=like.device)
        return cls(like.new_full((num_rows,), -torch.inf), ids)

    def with_kept(self, values: Tensor, kept: Kept, is_free: Tensor) -> "Likeliest":
        """Those of the rows (N,) bool, and of all others those of the kept ids, whose logits are ``values`` (M,)."""
        num_rows = self.ids.shape[0]
        rows = kept.rows.clamp_max(num_rows)
        tops = values.new_full((num_rows + 1,), -torch.inf).scatter_reduce(0, rows, values, "amax")
        candidates = torch.where(values == tops[rows], kept.ids, _NO_ID)
        ids = self.ids.new_full((num_rows + 1,), _NO_ID).scatter_reduce(0, rows, candidates, "amin")
        logits = self.logits.to(values.dtype)
        return Likeliest(torch.where(is_free, logits, tops[:-1]), torch.where(is_free, self.ids, ids[:-1]))

    def of_ranks(self, tops: Tensor, own: Slice, vocab_group: "dist.ProcessGroup") -> "Likeliest":
        """Of the whole vocabulary, of which each rank has those of its slice; ``tops`` are the largest of all."""
        candidates = torch.where(self.logits.to(tops.dtype) == tops, self.ids + own.first, _NO_ID)
        dist.all_reduce(candidates, dist.ReduceOp.MIN, group=vocab_group)
        return Likeliest(tops, candidates)


def known_ids(ids: Tensor, log_total: Tensor, live: Tensor | None) -> Tensor:
    """The ids (N,), -1 where there is no distribution and in masked rows."""
    is_none = log_total.isnan() if live is None else log_total.isnan() | ~live
    return ids.masked_fill(is_none, -1)


def from_lists(found: Any, rows: list[int], like: Tensor) -> dict[str, Tensor]:
    """What ``python_ref.token_statistics`` found for some rows, by name, as tensors of all rows of ``like``."""
    dtype = compute_dtype(like.dtype)
    result = {}
    for name, numbers in zip(STATISTICS, found, strict=True):
        kind, rest = (torch.int64, -1) if name == "top_ids" else (dtype, 0)
        result[name] = torch.full(like.shape[:1], rest, dtype=kind, device=like.device)
        result[name][rows] = torch.tensor(numbers, dtype=kind, device=like.device)
    return result
