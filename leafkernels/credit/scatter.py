"""Spread span values over the tokens; the adjoint sums token gradients per span."""

from typing import Any

import torch
from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_count, check_device, check_integer, check_real
from leafkernels._core.derivatives import refuse_forward_mode
from leafkernels._core.operation import operation
from leafkernels._core.reference import from_reference
from leafkernels.rows.find import Rows, find_rows, to_lists, to_tokens
from leafkernels.rows.layout import Layout, to_int32
from leafkernels.rows.rollouts import Rollouts


@operation("scatter")
def _scatter_spans(
    values: Tensor, span_ends: Tensor, mask: Tensor | None, layout: Layout, size: list[int], dtype: torch.dtype
) -> Tensor:
    return values.new_empty(size, dtype=dtype)


@operation("scatter")
def _gather_spans(gradients: Tensor, span_ends: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    return gradients.new_empty(span_ends.shape, dtype=torch.float64)


class _ScatterSpans(torch.autograd.Function):
    """The adjoint sums the gradients of each span, and its own adjoint spreads again: derivatives of every order."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, span_ends: Tensor, rows: Rows, size: list[int], dtype: torch.dtype, backend: str
    ) -> Tensor:
        ctx.save_for_backward(span_ends)
        ctx.rows, ctx.values_dtype, ctx.options = rows, values.dtype, (size, dtype, backend)
        return _scatter_spans(backend, values, span_ends, rows.mask, rows.layout, size, dtype)

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
        sums = _GatherSpans.apply(grad_tokens.contiguous(), *ctx.saved_tensors, ctx.rows, *ctx.options)
        return sums.to(ctx.values_dtype), None, None, None, None, None


class _GatherSpans(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gradients: Tensor, span_ends: Tensor, rows: Rows, size: list[int], dtype: torch.dtype, backend: str
    ) -> Tensor:
        ctx.save_for_backward(span_ends)
        ctx.rows, ctx.options = rows, (size, dtype, backend)
        return _gather_spans(backend, gradients, span_ends, rows.mask, rows.layout)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        return _ScatterSpans.apply(grad_sums, *ctx.saved_tensors, ctx.rows, *ctx.options), None, None, None, None, None


def scatter_to_tokens(
    values: Tensor, span_ends: Tensor, rows: Rows, shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> Tensor:
    """Give every token its span's value, from the spans (N, S) of every row; the arguments have been checked.

    ``shape`` is the caller's for tokens: (N, T), (P, G, T) or (total,).
    """
    refuse_forward_mode("scatter_spans", values)
    layout = rows.layout
    size = list(shape) if len(shape) < 3 else [layout.row_starts.shape[0], shape[-1]]
    if backend == "reference":
        return _by_reference(values, span_ends.tolist(), rows, size, dtype).reshape(shape)
    if rows.is_cut:
        # A node's span may end after some of its rows.
        span_ends = torch.minimum(span_ends, layout.row_lengths.unsqueeze(1).to(span_ends.dtype))
    if values.requires_grad:
        return _ScatterSpans.apply(values, span_ends, rows, size, dtype, backend).reshape(shape)
    return _scatter_spans(backend, values, span_ends, rows.mask, layout, size, dtype).reshape(shape)


def credit_tokens(
    rollouts: Rollouts,
    values: Tensor,
    span_ends: Tensor,
    earned_weight: Tensor | None = None,
    beside: Tensor | None = None,
) -> Tensor:
    """The credit of tokens, float32 and shaped like their ids: that of their span, (N, S), and where there are step
    rewards, less ``earned_weight`` (N,) times what their row had earned before them; and ``beside`` (M,)."""
    rows, shape, backend = rollouts.rows, rollouts.token_ids.shape, rollouts.backend
    earned = None if earned_weight is None else rollouts.earned
    if earned is None and beside is None:
        return scatter_to_tokens(values, span_ends, rows, shape, torch.float32, backend)
    credit = scatter_to_tokens(values, span_ends, rows, shape, torch.float64, backend).reshape(-1)
    if earned is not None and earned_weight is not None:
        before = earned_weight[earned.row_of_token] * earned.before_tokens()
        credit = credit - before.masked_fill(~earned.is_token, 0.0)
    if beside is not None:
        credit = credit + beside
    return credit.to(torch.float32).reshape(shape)


def _by_reference(values: Tensor, span_ends: list, rows: Rows, size: list[int], dtype: torch.dtype) -> Tensor:
    import python_ref

    like = values.new_empty(()).expand(size)
    masks = to_lists(torch.ones(size, dtype=torch.bool) if rows.mask is None else rows.mask, rows)

    def scatter(values: Tensor) -> Tensor:
        return to_tokens(python_ref.scatter_spans(values.tolist(), span_ends, masks), like, dtype)

    def gather(grad_tokens: Tensor) -> Tensor:
        sums = python_ref.gather_spans(to_lists(grad_tokens, rows), span_ends, masks)
        return torch.tensor(sums, dtype=torch.float64, device=values.device).reshape(values.shape)

    def backward(grad_tokens: Tensor, _: Tensor) -> tuple[Tensor]:
        return (from_reference("scatter_spans", gather, lambda grad, _: (spread(grad),), grad_tokens),)

    def spread(values: Tensor) -> Tensor:
        return from_reference("scatter_spans", scatter, backward, values)

    return spread(values)


def scatter_spans(
    values: Tensor,
    span_ends: Tensor,
    num_tokens: int,
    *,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Per-token values: each token has its span's value; 0 where the mask is False and after the last span.

    Differentiable in ``values``, in reverse mode any number of times: the adjoint sums the token gradients of each
    span, in a fixed order.

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

    Example:
        >>> leafkernels.scatter_spans(torch.tensor([[0.5, 2.0], [1.0, -1.0]]), torch.tensor([[2, 4], [1, 3]]), 4)
        tensor([[ 0.5000,  0.5000,  2.0000,  2.0000],
                [ 1.0000, -1.0000, -1.0000,  0.0000]])
    """
    check_real("values", values)
    span_ends = check_integer("span_ends", span_ends)
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
    rows = find_rows("tokens", tokens, response_mask, None, None, cu_seqlens, backend)
    num_rows = rows.layout.row_starts.shape[0]
    if cu_seqlens is not None and values.shape[0] != num_rows:
        raise ValueError(
            f"values must have one row for each of the {num_rows} rows of cu_seqlens, got shape {tuple(values.shape)}"
        )
    return scatter_to_tokens(
        values.reshape(num_rows, values.shape[-1]),
        to_int32(span_ends.reshape(num_rows, values.shape[-1])),
        rows,
        size,
        values.dtype,
        backend,
    )
