"""Sampling masks: everything that could not have been sampled is -inf."""

import math
from collections.abc import Sequence


def possible_ids(kept: Sequence[int], token: int, vocab_size: int) -> set[int]:
    """The kept ids and the sampled one; all ids where none that exists was kept."""
    possible = {i for i in kept if 0 <= i < vocab_size}
    if not possible:
        return set(range(vocab_size))
    return possible | {token} if 0 <= token < vocab_size else possible


def mask_logits(
    logits: Sequence[Sequence[float]], token_ids: Sequence[int], sampling_mask: Sequence[Sequence[int]] | None
) -> list[list[float]]:
    """Rows of logits with -inf outside of the ids that each was sampled from; None: no row is truncated."""
    if sampling_mask is None:
        return [list(row) for row in logits]
    result = []
    for row, token, kept in zip(logits, token_ids, sampling_mask, strict=True):
        possible = possible_ids(kept, token, len(row))
        result.append([x if j in possible else -math.inf for j, x in enumerate(row)])
    return result
