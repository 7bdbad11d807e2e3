"""Every token gets its span's value; the adjoint sums over the tokens of each span.

The storage of a row is cut into what lies before its first token, its spans, and what lies behind them. In storage
order these pieces are repeats of one number each, padded or packed alike.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def _pieces(span_ends: Tensor, slot_starts: Tensor, slot_ends: Tensor, row_starts: Tensor) -> Tensor:
    """(N * (S + 2),) number of tokens before the row, in each span, and behind the last."""
    first, last, row = slot_starts[:, None], slot_ends[:, None], row_starts[:, None]
    cuts = torch.cat([row, (row + span_ends).cummax(1).values, last], dim=1).clamp_(first, last)
    return cuts.diff(dim=1, prepend=first).view(-1)


def scatter_spans(
    values: Tensor,
    span_ends: Tensor,
    mask: Tensor | None,
    slot_starts: Tensor,
    slot_ends: Tensor,
    row_starts: Tensor,
    size: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """One value per token in ``dtype``, shaped ``size``; 0 outside the spans and where the mask is False."""
    pieces = _pieces(span_ends, slot_starts, slot_ends, row_starts)
    table = pad(values.to(dtype), (1, 1)).reshape(-1)
    tokens = table.repeat_interleave(pieces, output_size=math.prod(size)).view(size)
    return tokens if mask is None else tokens.masked_fill_(~mask, 0.0)


def gather_spans(
    gradients: Tensor,
    span_ends: Tensor,
    mask: Tensor | None,
    slot_starts: Tensor,
    slot_ends: Tensor,
    row_starts: Tensor,
) -> Tensor:
    """Adjoint of ``scatter_spans``: (N, S) float64 sums of the token gradients of each span."""
    num_rows, num_spans = span_ends.shape
    pieces = _pieces(span_ends, slot_starts, slot_ends, row_starts)
    piece = torch.arange(pieces.shape[0], device=pieces.device)
    piece = piece.repeat_interleave(pieces, output_size=gradients.numel())
    gradients = gradients if mask is None else gradients.masked_fill(~mask, 0.0)
    sums = gradients.new_zeros(pieces.shape[0], dtype=torch.float64)
    sums.index_add_(0, piece, gradients.reshape(-1).to(torch.float64))
    return sums.view(num_rows, num_spans + 2)[:, 1:-1].contiguous()
