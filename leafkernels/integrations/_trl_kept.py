"""Sampling masks of the rows of a batch: from lists of ids, from an engine, and side by side."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels.vocabulary.sampling_mask import SamplingMask


def padded(
    prompts: list[list[int]], completions: list[list[int]], fill: int, device: Any
) -> tuple[Tensor, Tensor, int]:
    """Ids and mask as TRL pads them, prompts on the left and completions on the right, and the completions' width."""
    before, keep = max(map(len, prompts)), max(map(len, completions))
    ids = torch.full((len(prompts), before + keep), fill)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        places = slice(before - len(prompt), before + len(completion))
        ids[row, places], mask[row, places] = torch.tensor([*prompt, *completion]), 1
    return ids.to(device), mask.to(device), keep


def of_rows(parts: list[SamplingMask], lengths: list[int], device: Any) -> list[SamplingMask]:
    """A mask for each row of so many tokens, from masks of stretches of them."""
    counts = torch.cat([part.offsets.diff() for part in parts]) if parts else torch.zeros(0, dtype=torch.int64)
    token_ids = torch.cat([part.token_ids for part in parts]) if parts else torch.zeros(0, dtype=torch.int64)
    offsets = pad(counts.cumsum(0), (1, 0)).to(device)
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    bounds = offsets.tolist()
    return [
        SamplingMask(token_ids[bounds[start] : bounds[end]], offsets[start : end + 1] - bounds[start])
        for start, end in zip(ends, ends[1:], strict=False)
    ]


def joined(masks: list[SamplingMask], width: int, device: Any, before: int = 0) -> SamplingMask:
    """One mask of rows that are padded to ``width`` tokens, with ``before`` more on the left; nothing is read back."""
    counts = [pad(row.offsets.diff(), (before, width))[: before + width] for row in masks]
    counts = counts or [torch.zeros(0, dtype=torch.int64, device=device)]
    return SamplingMask(torch.cat([row.token_ids for row in masks]), pad(torch.cat(counts).cumsum(0), (1, 0)))


def of_engine(found: Any, lengths: list[int], device: Any) -> list[SamplingMask] | None:
    """The masks among what ``_generate`` returned: ``token_ids`` and ``offsets`` for each completion, in one list."""
    for value in found:
        values = value.values() if isinstance(value, Mapping) else (value,)
        for rows in values:
            if isinstance(rows, list) and len(rows) == len(lengths) and rows and all(map(_is_mask, rows)):
                masks = [
                    SamplingMask(*(torch.as_tensor(_part(row, name), device=device) for name in SamplingMask._fields))
                    for row in rows
                ]
                for number, (mask, length) in enumerate(zip(masks, lengths, strict=True)):
                    if mask.offsets.shape != (length + 1,):
                        raise ValueError(
                            f"the kept ids of completion {number} must be those of its {length} tokens, with "
                            f"{length + 1} offsets, got {tuple(mask.offsets.shape)}"
                        )
                return [SamplingMask(*(part.to(torch.int64) for part in mask)) for mask in masks]
    return None


def _is_mask(row: Any) -> bool:
    return all(_part(row, name) is not None for name in SamplingMask._fields)


def _part(row: Any, name: str) -> Any:
    return row.get(name) if isinstance(row, Mapping) else getattr(row, name, None)
