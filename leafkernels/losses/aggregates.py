"""How the losses of tokens become one number, under our names, TRL's and verl's."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.checks import check_choice, check_count, check_positive, check_tensor, values_readable


class Aggregate(NamedTuple):
    """What a token's loss is divided by."""

    rows: str = ""
    """"alive": the rows that have a token; "all": every row; or nothing."""
    own_tokens: bool = False
    """The tokens of its row."""
    all_tokens: bool = False
    """The tokens of the batch."""
    constant: str = ""
    """A constant, which is "needed", or else is the "width" of the tensors; or nothing."""


AGGREGATES = {
    "token_mean": Aggregate(all_tokens=True),
    "sequence_mean": Aggregate("alive", own_tokens=True),
    "sequence_sum": Aggregate("alive"),
    "sum": Aggregate(),
    "constant": Aggregate(constant="needed"),
    "grpo": Aggregate("all", own_tokens=True),
    "bnpo": Aggregate(all_tokens=True),
    "dr_grpo": Aggregate("all", constant="needed"),
    "dapo": Aggregate(all_tokens=True),
    "luspo": Aggregate("all"),
    "token-mean": Aggregate(all_tokens=True),
    "token-sum": Aggregate(),
    "seq-mean-token-mean": Aggregate("alive", own_tokens=True),
    "seq-mean-token-sum": Aggregate("alive"),
    "seq-mean-token-sum-norm": Aggregate("alive", constant="width"),
}
"""Ours; TRL's by its ``loss_type``, and verl's by its ``loss_agg_mode``."""


class Counts(NamedTuple):
    """What is counted in a whole step, where a call is a part of it; None: in the call."""

    constant: float | None
    num_tokens: "int | Tensor | None"
    num_rows: "int | Tensor | None"

    def in_words(self) -> dict[str, float | None]:
        """As ``python_ref`` takes them."""
        return {name: None if count is None else float(count) for name, count in self._asdict().items()}


def check_aggregate(aggregate: str, constant: Any, num_tokens: Any, num_rows: Any, width: int | None) -> Counts:
    """The counts of a call, whose tensors are ``width`` wide (None: packed).

    Raises:
        TypeError, ValueError: one is not what it must be, or the aggregate does not divide by it.
    """
    check_choice("aggregate", aggregate, tuple(AGGREGATES))
    entry = AGGREGATES[aggregate]
    if entry.constant == "width" and constant is None:
        if width is None:
            raise ValueError(f"constant must be given with aggregate={aggregate!r} where rows are packed, got None")
        constant = max(width, 1)
    if bool(entry.constant) != (constant is not None):
        having = aggregate if entry.constant else "constant"
        raise ValueError(
            f"constant must be given with aggregate={having!r}, and only then, got constant={constant} and "
            f"aggregate={aggregate!r}"
        )
    if constant is not None:
        check_positive("constant", constant)
    for name, count, is_read in (("num_tokens", num_tokens, entry.all_tokens), ("num_rows", num_rows, entry.rows)):
        if count is None:
            continue
        if not is_read:
            raise ValueError(f"{name} must be None with aggregate={aggregate!r}, which does not divide by it")
        if not isinstance(count, Tensor):
            check_count(name, count, 0)
            continue
        if check_tensor(name, count).numel() != 1 or count.is_complex():
            raise ValueError(f"{name} must be one number, got shape {tuple(count.shape)}")
        if values_readable(count) and not float(count) >= 0:
            raise ValueError(f"{name} must be at least 0, got {float(count)}")
    return Counts(constant, num_tokens, num_rows)


def row_weights(tokens: Tensor, aggregate: str, counts: Counts) -> Tensor:
    """The share that a token's loss has in the whole loss, for each row, from the numbers of tokens that count (N,)."""
    entry = AGGREGATES[aggregate]
    if entry.all_tokens:
        return _given_or("num_tokens", counts.num_tokens, tokens, tokens.sum).reciprocal().expand_as(tokens)
    weights = None
    if entry.rows:
        # The products are those of a mean over rows of means over tokens.
        divisor = torch.ones_like(tokens) if not entry.own_tokens else tokens.clamp_min(1)
        rows = _given_or("num_rows", counts.num_rows, tokens, lambda: _rows(tokens, entry.rows))
        weights = (divisor * rows).reciprocal()
    if entry.constant:
        assert counts.constant is not None
        weights = torch.full_like(tokens, 1.0 / counts.constant) if weights is None else weights / counts.constant
    return torch.ones_like(tokens) if weights is None else weights


def _rows(tokens: Tensor, which: str) -> Tensor:
    return (tokens > 0).sum() if which == "alive" else torch.full((), tokens.shape[0], device=tokens.device)


def _given_or(name: str, given: "int | Tensor | None", tokens: Tensor, count: Any) -> Tensor:
    """A count of the whole step, or that of the call, on the device of ``tokens``; 1 in place of 0, where the
    loss is 0."""
    if given is None:
        return count().clamp_min(1)
    if isinstance(given, Tensor):
        found = given.detach().reshape(()).to(tokens.device, tokens.dtype)
    else:
        found = torch.full((), given, dtype=tokens.dtype, device=tokens.device)
    if values_readable(found) and found == 0 and tokens.any():
        raise ValueError(f"{name} must be positive where tokens count, got 0")
    return torch.where(found == 0, 1.0, found)
