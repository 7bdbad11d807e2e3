"""Surprisal and entropy over the kept ids of a sampling mask: the operations, on ragged lists of logits."""

import torch
from torch import Tensor

from leafkernels._core.operation import operation
from leafkernels._core.precision import add_by, compute_dtype
from leafkernels.vocabulary.inputs import RowStatistics
from leafkernels.vocabulary.sampling_mask import Kept, count_by_row


@operation("sampling_mask")
def _kept_statistics(values: Tensor, offsets: Tensor, sampled: Tensor, temperature: Tensor) -> RowStatistics:
    return RowStatistics(*(values.new_empty(sampled.shape) for _ in RowStatistics._fields))


@operation("sampling_mask")
def _kept_statistics_backward(
    grad_surprisal: Tensor,
    grad_entropy: Tensor | None,
    statistics: RowStatistics,
    values: Tensor,
    offsets: Tensor,
    sampled: Tensor,
    temperature: Tensor,
) -> Tensor:
    return values.new_empty(values.shape)


@operation("sampling_mask")
def _kept_products(hidden: Tensor, weight: Tensor, kept: Kept) -> Tensor:
    return hidden.new_empty(kept.ids.shape, dtype=compute_dtype(hidden.dtype))


@operation("sampling_mask", mutates=("gradients",))
def _add_hidden_gradient(
    gradients: Tensor, grad_products: Tensor, hidden: Tensor, weight: Tensor, kept: Kept
) -> None: ...


@operation("sampling_mask", mutates=("gradients",))
def _add_weight_gradient(gradients: Tensor, grad_products: Tensor, hidden: Tensor, kept: Kept) -> None: ...


def statistics_of(backend: str, values: Tensor, kept: Kept, temperature: Tensor) -> RowStatistics:
    """Of the rows of ``kept``, whose logits are ``values`` (M,); 0 in all others."""
    return _kept_statistics(backend, values, kept.offsets, kept.sampled, temperature)


def gradient_of(
    backend: str,
    grad_surprisal: Tensor,
    grad_entropy: Tensor | None,
    statistics: RowStatistics,
    values: Tensor,
    kept: Kept,
    temperature: Tensor,
) -> Tensor:
    """The gradient (M,) of the kept logits."""
    numbers = (grad_surprisal, grad_entropy, statistics, values, kept.offsets, kept.sampled, temperature)
    return _kept_statistics_backward(backend, *numbers)


def joined(free: RowStatistics, kept: RowStatistics) -> RowStatistics:
    """Each is 0 in the rows of the other."""
    return RowStatistics(*(a + b for a, b in zip(free, kept, strict=True)))


def states_of(statistics: RowStatistics, values: Tensor, kept: Kept, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """State (3, N, 1) of each row of ``kept``, and the logit of its id, as ``surprisal_states`` gives them.

    Empty where a row has no ids here, or only banned ones. The sums beside the top come from their logarithms, a few
    roundings each.
    """
    is_empty = count_by_row(values != -torch.inf, kept.offsets) == 0
    log_total = statistics.log_total
    t = (log_total - statistics.entropy) * log_total.exp() * temperature.to(values.dtype)
    least = torch.finfo(values.dtype).min
    of_rows = (statistics.top, least), (log_total.expm1(), -1.0), (t, 0.0)
    states = torch.stack([numbers.masked_fill(is_empty, of_none) for numbers, of_none in of_rows])
    picked = values[kept.sampled.clamp_min(0)].masked_fill(kept.sampled < 0, torch.nan)
    return states.unsqueeze(2), picked


def with_states(
    states: Tensor, picked: Tensor, statistics: RowStatistics, values: Tensor, kept: Kept, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Those of the rows of ``kept`` beside (3, N, states) those of the others, each empty where the other is not."""
    more, chosen = states_of(statistics, values, kept, temperature)
    return torch.cat((states, more), 2), torch.where(picked.isnan(), chosen, picked)


def _places(kept: Kept) -> tuple[Tensor, Tensor]:
    """Rows and ids to index with; what stands at the end of the list is there too, and counts 0."""
    return kept.rows.clamp_max(kept.sampled.shape[0] - 1), kept.ids


def kept_logits(logits: Tensor, kept: Kept) -> Tensor:
    """The logits (M,) of the kept ids, from those of whole rows."""
    return logits[_places(kept)].to(compute_dtype(logits.dtype))


def add_logit_gradient(gradients: Tensor, grad_values: Tensor, kept: Kept) -> None:
    """Add the gradient of the kept logits to that of whole rows, which is 0 there."""
    gradients.index_put_(_places(kept), grad_values.to(gradients.dtype), accumulate=True)


def head_logits(
    backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: Kept, softcap: float | None
) -> Tensor:
    """The logits (M,) of the kept ids, from hidden states in the dtype of the products."""
    values = _kept_products(backend, hidden, weight, kept)
    if bias is not None:
        values += bias[kept.ids].to(hidden.dtype)
    return values if softcap is None else values.div_(softcap).tanh_().mul_(softcap)


def add_head_gradients(
    backend: str,
    gradients: tuple[Tensor, Tensor, Tensor],
    grad_values: Tensor,
    values: Tensor,
    hidden: Tensor,
    weight: Tensor,
    kept: Kept,
    softcap: float | None,
    needs: list[bool],
) -> None:
    """Add to the gradients of hidden states, weight and bias those that come from the kept logits."""
    grad_hidden, grad_weight, grad_bias = gradients
    if softcap is not None:
        grad_values = grad_values * (1.0 - (values / softcap).square())
    if needs[0]:
        _add_hidden_gradient(backend, grad_hidden, grad_values, hidden, weight, kept)
    if needs[1]:
        _add_weight_gradient(backend, grad_weight, grad_values, hidden, kept)
    if needs[2]:
        grad_bias += add_by(kept.ids, grad_values, grad_bias.shape[0]).to(grad_bias.dtype)
