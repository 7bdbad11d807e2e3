"""Every token of a span gets the span's value; the adjoint sums token gradients per span."""

from collections.abc import Sequence

from python_ref.find import stretch


def scatter_spans(
    values: Sequence[Sequence[float]], span_ends: Sequence[Sequence[int]], response_mask: Sequence[Sequence[bool]]
) -> list[list[float]]:
    """One value per token; 0 where the mask is False and after the last span.

    Row i's spans are [0, span_ends[i][0]), [span_ends[i][0], span_ends[i][1]), ..., counted from its first True.
    """
    result = []
    for row_values, ends, mask in zip(values, span_ends, response_mask, strict=True):
        start, _ = stretch(mask)
        row = [0.0] * len(mask)
        previous = 0
        for value, end in zip(row_values, ends, strict=True):
            for t in range(start + previous, min(start + end, len(mask))):
                if mask[t]:
                    row[t] = value
            previous = max(previous, end)
        result.append(row)
    return result


def gather_spans(
    gradients: Sequence[Sequence[float]], span_ends: Sequence[Sequence[int]], response_mask: Sequence[Sequence[bool]]
) -> list[list[float]]:
    """Adjoint of ``scatter_spans``: the sum of the token gradients of each span, masked tokens left out."""
    result = []
    for row, ends, mask in zip(gradients, span_ends, response_mask, strict=True):
        start, _ = stretch(mask)
        sums = []
        previous = 0
        for end in ends:
            total = 0.0
            for t in range(start + previous, min(start + end, len(mask))):
                if mask[t]:
                    total += row[t]
            sums.append(total)
            previous = max(previous, end)
        result.append(sums)
    return result
