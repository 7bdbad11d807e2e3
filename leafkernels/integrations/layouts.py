"""From the layouts in which loops hold their rollouts to those that ``span_advantages`` takes, and back.

Log-probabilities, token ids and mask must speak of the same token at the same place; then the advantages do too, and go
back as they come. Padding, prompts before the response and holes need nothing but the mask. What is left to do is to
shift token ids to where a loop keeps its log-probabilities, and to pack rows that are kept one by one.

Pure functions of tensors on any device; none reads a value back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["next_tokens", "pack", "response_tokens", "rolled_tokens", "unpack"]


def next_tokens(sequences: Tensor) -> Tensor:
    """Token ids for tensors (..., S - 1) whose entry t speaks of token t + 1 (OpenRLHF, and the logits of a model).

    Args:
        sequences: (..., S) prompts and responses.

    Returns:
        (..., S - 1), a view.
    """
    return sequences[..., 1:]


def rolled_tokens(sequences: Tensor) -> Tensor:
    """Token ids for tensors (..., S) that were rolled by -1, so that entry t speaks of token t + 1 (AReaL).

    The last entry speaks of the first token of the prompt, which a mask rolled in the same way leaves out.

    Args:
        sequences: (..., S) prompts and responses.

    Returns:
        (..., S)
    """
    return sequences.roll(-1, dims=-1)


def response_tokens(sequences: Sequence[Tensor], response_lengths: Sequence[int]) -> list[Tensor]:
    """The last ``response_lengths[i]`` ids of each row of ``sequences`` (slime): views, empty where the length is 0."""
    parts = []
    for i, (row, length) in enumerate(zip(sequences, response_lengths, strict=True)):
        if not 0 <= length <= len(row):
            raise ValueError(
                f"response_lengths must lie between 0 and the length of the row, got {length} for row {i} of {len(row)}"
            )
        parts.append(row[len(row) - length :])
    return parts


def pack(*columns: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Rows kept one by one, (t_i,) each, as the tensors that ``cu_seqlens`` describes (slime, Tinker).

    Args:
        columns: log-probabilities, token ids, masks: lists of equally many rows, of equal length at equal places.

    Returns:
        One (total,) tensor for each column, and ``cu_seqlens`` (rows + 1,) int32 on their device.
    """
    if not columns or not all(columns):
        raise ValueError("columns must hold at least one row each, got none")
    lengths = [len(row) for row in columns[0]]
    for number, column in enumerate(columns[1:], start=1):
        others = [len(row) for row in column]
        if others != lengths:
            raise ValueError(
                f"columns must have rows of the same lengths, got {lengths} in column 0 and {others} in column {number}"
            )
    ends = torch.tensor([0, *lengths]).cumsum(0)
    cu_seqlens = ends.to(device=columns[0][0].device, dtype=torch.int32, non_blocking=True)
    return *(torch.cat(list(column)) for column in columns), cu_seqlens


def unpack(packed: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """Cut ``packed`` (total,) into views as long as ``rows``, those that were packed."""
    return list(packed.split([len(row) for row in rows]))
