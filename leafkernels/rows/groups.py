"""Prompts named by anything, as trainers hold them, made into an index."""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor


def group_index(names: Iterable[Hashable] | Tensor, device: torch.device | str | None = None) -> Tensor:
    """An integer for each row that names its prompt: prompts are numbered in order of appearance.

    Args:
        names: one for each row: strings, ints, tuples, in a list, a tensor or an array. Elements of tensors and arrays
            count by their values, which are read: an integer tensor on a GPU goes into ``groups`` as it is.
        device: of the result; None: the CPU.

    Returns:
        (N,) int64 on ``device``, for the ``groups`` of ``span_advantages``. Name rows by rollout request, not by prompt
        text: equal texts may go with different audio.

    Raises:
        TypeError, ValueError: a name cannot be compared with the others (a list, NaN), or ``names`` is no sequence.
    """
    numbers: dict[Hashable, int] = {}
    indices = [numbers.setdefault(name, len(numbers)) for name in read_names("names", names)]
    return torch.tensor(indices, dtype=torch.int64, device=device)


def read_names(argument: str, names: Any) -> list[Hashable]:
    """The names in ``names`` as plain values, each equal to whatever names the same prompt."""
    shape = tuple(getattr(names, "shape", (None,)))
    if len(shape) != 1:
        raise ValueError(f"{argument} must hold one name for each row, shape (rows,), got shape {shape}")
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise TypeError(f"{argument} must be a list or a tensor of names for the rows, got {type(names).__name__}")
    values = [_value(name) for name in (names.tolist() if isinstance(names, Tensor) else names)]
    for row, value in enumerate(values):
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(
                f"{argument} must hold names that can be compared (strings, ints, tuples), got {value!r:.80} for row "
                f"{row}"
            ) from error
        if _is_nan(value):
            raise ValueError(
                f"{argument} must not hold NaN, which equals no other name, got {value!r:.80} for row {row}"
            )
    return values


def _value(name: Any) -> Any:
    """Tensors compare by identity, and arrays not at all: what they hold, in their place."""
    if isinstance(name, tuple):
        return tuple(map(_value, name))
    return name.tolist() if hasattr(name, "tolist") else name


def _is_nan(value: Any) -> bool:
    return any(map(_is_nan, value)) if isinstance(value, tuple) else bool(value != value)
