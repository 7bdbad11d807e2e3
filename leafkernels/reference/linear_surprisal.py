"""Tensors to lists, ``python_ref``, and back."""

import torch
from torch import Tensor

import python_ref
from leafkernels._core.precision import compute_dtype
from leafkernels.reference._lists import live_rows


def linear_surprisal_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``python_ref.linear_surprisal_entropy``; the last two results, which its gradient does not need, are 0."""
    live = live_rows(mask, hidden.shape[0])
    results = torch.zeros((4, hidden.shape[0]), dtype=compute_dtype(hidden.dtype))
    found = python_ref.linear_surprisal_entropy(
        hidden[live].tolist(),
        weight.tolist(),
        token_ids[live].tolist(),
        bias=None if bias is None else bias.tolist(),
        temperature=temperature[live].tolist(),
        logit_softcap=softcap,
    )
    results[:2, live] = torch.tensor(found, dtype=results.dtype)
    return tuple(results.to(hidden.device).unbind())  # type: ignore[return-value]


def linear_surprisal_entropy_backward(
    surprisal_gradients: Tensor,
    entropy_gradients: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``python_ref.linear_surprisal_entropy_backward``; gradients that are not needed are empty."""
    live = live_rows(mask, hidden.shape[0])
    of_live, of_weight, of_bias = python_ref.linear_surprisal_entropy_backward(
        surprisal_gradients[live].tolist(),
        [0.0] * len(live) if entropy_gradients is None else entropy_gradients[live].tolist(),
        hidden[live].tolist(),
        weight.tolist(),
        token_ids[live].tolist(),
        bias=None if bias is None else bias.tolist(),
        temperature=temperature[live].tolist(),
        logit_softcap=softcap,
    )
    of_hidden = torch.zeros_like(hidden)
    of_hidden[live] = _like(of_live, hidden[live])
    return (
        of_hidden if needs[0] else hidden.new_empty(0),
        _like(of_weight, weight) if needs[1] else weight.new_empty(0),
        _like(of_bias, bias) if bias is not None and needs[2] else weight.new_empty(0),
    )


def _like(numbers: list, tensor: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).reshape(tensor.shape).to(tensor)
