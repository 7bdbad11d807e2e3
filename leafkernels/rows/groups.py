"""Prompts named by anything, as trainers hold them, made into an index."""

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor


def group_index(names: Iterable[Hashable], device: torch.device | str | None = None) -> Tensor:
    """Number the prompts that ``names`` (one for each row: uid strings, ints, tuples) mentions, in order of appearance.

    Returns:
        (N,) int64 on ``device``, for the ``groups`` of ``span_advantages``. Name rows by rollout request, not by prompt
        text: equal texts may go with different audio.
    """
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.int64, device=device)
