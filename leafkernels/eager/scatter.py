"""Every token gets its span's value; the adjoint sums over the tokens of each span.

The storage of a row is cut into what lies before its first token, its spans, and what lies after them. In storage
order these pieces are repeats of one number each, padded or packed alike.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.precision import add_by
from leafkernels.rows.layout import Layout

# Tokens written at a time, in whole rows, so that their indices stay in a cache.
_CHUNK = 1 << 16


def _pieces(span_ends: Tensor, layout: Layout, width: int) -> Tensor:
    """(N, S + 2) number of tokens before the row, in each span, and after the last; no row has more than ``width``."""
    first, last, row = (places[:, None] for places in (*layout.slots, layout.row_starts))
    cuts = torch.cat([first, row, (row + span_ends).cummax(1).values, last], dim=1).clamp_(first, last)
    return (cuts[:, 1:] - cuts[:, :-1]).to(torch.int32 if width < 1 << 31 else torch.int64)


def scatter_spans(
    values: Tensor, span_ends: Tensor, mask: Tensor | None, layout: Layout, size: list[int], dtype: torch.dtype
) -> Tensor:
    """One value per token in ``dtype``, shaped ``size``; 0 outside the spans and where the mask is False."""
    pieces = _pieces(span_ends, layout, size[-1])
    table = pad(values.to(dtype), (1, 1))
    tokens = table.new_empty(math.prod(size))
    num_rows, live = pieces.shape[0], None if mask is None else mask.reshape(-1)
    step = num_rows if tokens.is_cuda else max(1, _CHUNK * num_rows // max(tokens.shape[0], 1))
    end = 0
    for row in range(0, num_rows, max(step, 1)):
        rows = slice(row, row + step)
        start, end = end, tokens.shape[0] if row + step >= num_rows else end + int(pieces[rows].sum())
        number = torch.repeat_interleave(pieces[rows].reshape(-1), output_size=end - start)
        if live is not None:
            number.mul_(live[start:end])  # number 0 is a piece before a row, and holds 0
        torch.index_select(table[rows].view(-1), 0, number, out=tokens[start:end])
    return tokens.view(size)


def gather_spans(gradients: Tensor, span_ends: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    """Adjoint of ``scatter_spans``: (N, S) float64 sums of the token gradients of each span."""
    pieces = _pieces(span_ends, layout, gradients.shape[-1])
    piece = torch.repeat_interleave(pieces.view(-1), output_size=gradients.numel())
    gradients = gradients if mask is None else gradients.masked_fill(~mask, 0.0)
    sums = add_by(piece, gradients.reshape(-1).to(torch.float64), pieces.numel())
    return sums.view(pieces.shape)[:, 1:-1].contiguous()
