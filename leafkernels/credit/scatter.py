"""Spread span values over the tokens; the adjoint sums token gradients per span."""

from typing import Any

import torch
from torch import Tensor

from leafkernels._core.backend import implementation, resolve_backend
from leafkernels._core.checks import check_count, check_device, check_integer, check_real
from leafkernels._core.ops import register
from leafkernels.rows.find import check_layout
from leafkernels.rows.layout import Layout, to_int32
from leafkernels.rows.rollouts import Rollouts

_SPANS = "Tensor span_ends, Tensor? mask, Tensor slot_starts, Tensor slot_ends, Tensor row_starts"


def _scatter_impl(values: Tensor, *args: object) -> Tensor:
    *arguments, backend = args
    return implementation(str(backend)).scatter_spans(values, *arguments)


_scatter_spans = register(
    f"scatter_spans(Tensor values, {_SPANS}, SymInt[] size, ScalarType dtype, str backend) -> Tensor",
    _scatter_impl,
    lambda values, span_ends, mask, slot_starts, slot_ends, row_starts, size, dtype, backend: values.new_empty(
        size, dtype=dtype
    ),
)


def _gather_impl(gradients: Tensor, *args: object) -> Tensor:
    *arguments, backend = args
    return implementation(str(backend)).gather_spans(gradients, *arguments)


_gather_spans = register(
    f"gather_spans(Tensor gradients, {_SPANS}, str backend) -> Tensor",
    _gather_impl,
    lambda gradients, span_ends, *_: gradients.new_empty(span_ends.shape, dtype=torch.float64),
)


class _ScatterSpans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:5])
        ctx.values_dtype, ctx.backend = values.dtype, args[7]
        return _scatter_spans(values, *args)

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor | None, ...]:
        sums = _gather_spans(gradients.contiguous(), *ctx.saved_tensors, ctx.backend)
        return sums.to(ctx.values_dtype), *[None] * 8


def scatter_to_tokens(
    values: Tensor,
    span_ends: Tensor,
    mask: Tensor | None,
    layout: Layout,
    size: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """One value per token, (N, T) or (total,); the arguments have been checked."""
    function = _ScatterSpans.apply if values.requires_grad else _scatter_spans
    return function(
        values,
        span_ends,
        mask,
        layout.slot_starts,
        layout.slot_ends,
        layout.row_starts,
        size,
        dtype,
        backend,
    )


def scatter_spans(
    values: Tensor,
    span_ends: Tensor,
    num_tokens: int,
    *,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Give every token of a span the span's value; 0 where the mask is False and behind the last span.

    Differentiable in ``values``: the adjoint sums the token gradients of each span, in a fixed order.

    Args:
        values: (..., S), float32 or float64; one row of spans for each row of tokens.
        span_ends: (..., S) integers, ascending: span s covers tokens [span_ends[s - 1], span_ends[s]), counted from
            the row's first unmasked token.
        num_tokens: T of the padded rows, or the total of the packed ones.
        response_mask: (..., T), or (total,) with ``cu_seqlens``; nonzero where a token counts; None: all.
        cu_seqlens: (N + 1,) int32, the offsets of packed rows; ``values`` is then (N, S).
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        (..., T), or (total,) with ``cu_seqlens``, in the dtype of ``values``.
    """
    check_real("values", values)
    check_integer("span_ends", span_ends)
    check_count("num_tokens", num_tokens, 0)
    if values.dim() not in (2, 3) or (cu_seqlens is not None and values.dim() != 2):
        raise ValueError(
            f"values must have shape (rows, spans) or (prompts, rows, spans), and (rows, spans) together with "
            f"cu_seqlens, got shape {tuple(values.shape)}"
        )
    if span_ends.shape != values.shape:
        raise ValueError(
            f"span_ends must have the shape of values, {tuple(values.shape)}, got shape {tuple(span_ends.shape)}"
        )
    check_device("span_ends", span_ends, "values", values.device)
    size = (num_tokens,) if cu_seqlens is not None else (*values.shape[:-1], num_tokens)
    # Only the shape and the device of the tokens matter to the layout; an expanded scalar has both and no memory.
    tokens = values.new_empty(()).expand(size)
    backend = resolve_backend(backend, values.device)
    layout, mask, _ = check_layout("tokens", tokens, response_mask, None, cu_seqlens, backend)
    num_rows = layout.row_starts.shape[0]
    if cu_seqlens is not None and values.shape[0] != num_rows:
        raise ValueError(
            f"values must have one row for each of the {num_rows} rows of cu_seqlens, got shape {tuple(values.shape)}"
        )
    tokens_out = scatter_to_tokens(
        values.reshape(num_rows, values.shape[-1]),
        to_int32(span_ends.reshape(num_rows, values.shape[-1])),
        mask,
        layout,
        (num_tokens,) if cu_seqlens is not None else (num_rows, num_tokens),
        values.dtype,
        backend,
    )
    return tokens_out.reshape(size)


def spread(values: Tensor, span_ends: Tensor, rollouts: Rollouts) -> Tensor:
    """Advantages shaped like the token ids, float32, from the spans (N, S) of every row."""
    shape, layout = rollouts.token_ids.shape, rollouts.layout
    size = tuple(shape) if len(shape) < 3 else (layout.row_starts.shape[0], shape[-1])
    tokens = scatter_to_tokens(values, span_ends, rollouts.mask, layout, size, torch.float32, rollouts.backend)
    return tokens.reshape(shape)
