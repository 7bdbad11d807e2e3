"""What the losses of tokens read, and what they take from other tokens of a row or batch; packed rows."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.checks import values_readable
from leafkernels._core.precision import compute_dtype


class LossInputs(NamedTuple):
    """What the losses of tokens (N, T), or (total,) with ``cu_seqlens``, need beside their log-probabilities."""

    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logprobs: Tensor | None
    token_weights: Tensor | None
    penalties: Tensor | None  # of the absolute log-ratio
    cu_seqlens: Tensor | None


def check_token_weights(token_weights: Tensor | None, mask: Tensor) -> None:
    """Raise where a weight that counts is negative, or no number, and that costs no host synchronisation."""
    if token_weights is not None and values_readable(token_weights):
        weights = token_weights.detach()[mask]
        wrong = weights[~(weights >= 0)]
        if wrong.numel():
            raise ValueError(f"token_weights must be at least 0 where the mask is True, got {float(wrong[0])}")


def drawn_numbers(logprobs: Tensor) -> Tensor:
    """A number in [0, 1) for each token, by which "clip_cov" chooses; from PyTorch's generator."""
    return torch.rand(logprobs.shape, dtype=torch.float32, device=logprobs.device)


def batch_weights(
    kind: str, logprobs: Tensor, inputs: LossInputs, drawn: Tensor | None, options: dict[str, Any]
) -> LossInputs:
    """The inputs, with what the kind takes from other tokens in ``token_weights`` and ``penalties``."""
    if kind == "fipo":
        low, high = options["future_clip"]
        future = _discounted_future(logprobs, inputs, options["half_life"])
        return inputs._replace(token_weights=_product(inputs, future.exp().clamp(1 - low, 1 + high)))
    if kind == "clip_cov":
        return inputs._replace(token_weights=_product(inputs, (~_marked(logprobs, inputs, drawn, options)).float()))
    if kind == "kl_cov":
        # Not by a product, in which a bool makes float32 of the number.
        zeros = torch.zeros(logprobs.shape, dtype=compute_dtype(logprobs.dtype), device=logprobs.device)
        penalties = zeros.masked_fill(_marked(logprobs, inputs, None, options), options["penalty"])
        return inputs._replace(penalties=_product(inputs, penalties))
    return inputs


def _product(inputs: LossInputs, factors: Tensor) -> Tensor:
    return factors if inputs.token_weights is None else factors * inputs.token_weights


def _marked(logprobs: Tensor, inputs: LossInputs, drawn: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Bool: the share of tokens with the highest covariance, or of those ``drawn`` among those with a high one."""
    mask = inputs.mask
    policy, old, advantages = (
        torch.where(mask, tensor.double(), 0.0) for tensor in (logprobs, inputs.old_logprobs, inputs.advantages)
    )
    number = mask.sum().double()
    mean_advantage, mean_logprob = advantages.sum() / number, policy.sum() / number
    covariance = (advantages - mean_advantage) * (policy - mean_logprob)
    if drawn is None:
        is_candidate, keys = mask, -covariance
    else:
        low, high = options["covariance"]
        ratio, (below, above) = (policy - old).exp(), options["clip"]
        is_clipped = ratio.clamp(1 - below, 1 + above) * advantages < ratio * advantages
        is_candidate, keys = mask & (covariance > low) & (covariance < high) & ~is_clipped, drawn.double()
    order = keys.masked_fill(~is_candidate, torch.inf).flatten().argsort(stable=True)
    count = (options["share"] * number).floor().clamp_min(1)
    is_first = torch.arange(order.shape[0], device=order.device) < count
    return torch.zeros_like(is_first).scatter(0, order, is_first).view(mask.shape) & is_candidate


def _discounted_future(logprobs: Tensor, inputs: LossInputs, half_life: float) -> Tensor:
    """Of each token the sum of its row's log-ratios from it on, each counting half as much ``half_life`` tokens on."""
    dtype = compute_dtype(logprobs.dtype)
    sums = torch.where(inputs.mask, logprobs.to(dtype) - inputs.old_logprobs.to(dtype), 0.0)
    rows = None if inputs.cu_seqlens is None else row_of_token(inputs.cu_seqlens, sums.shape[-1])
    # Sums over twice as many tokens each time: a power of the discount for each token would underflow.
    step, discount = 1, 0.5 ** (1 / half_life)
    while step < sums.shape[-1] and discount > torch.finfo(torch.float64).tiny:
        later = discount * sums[..., step:]
        if rows is not None:
            later = torch.where(rows[step:] == rows[:-step], later, 0.0)
        sums = torch.cat((sums[..., :-step] + later, sums[..., -step:]), -1)
        step, discount = 2 * step, discount * discount
    return sums


def row_of_token(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) the row of each token of packed rows."""
    places = torch.arange(total, device=cu_seqlens.device)
    bounds = cu_seqlens[1:].to(torch.int64)
    return torch.searchsorted(bounds, places, right=True).clamp_max(max(bounds.shape[0] - 1, 0))


def count_tokens(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(N,) int64: how many tokens of each row count."""
    if cu_seqlens is None:
        return mask.sum(1)
    counted = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return counted[cu_seqlens.to(torch.int64).clamp(0, mask.shape[0]).cummax(0).values].diff()


def spread_rows(numbers: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) the number of its row for each token of packed rows."""
    return numbers[row_of_token(cu_seqlens, total)]


def reduce_rows(tokens: Tensor, cu_seqlens: Tensor | None, how: str) -> Tensor:
    """(N,) the "sum" or the "max" of each row, float64; of no token 0 and -inf."""
    tokens = tokens.double()
    if cu_seqlens is None:
        if how == "sum":
            return tokens.sum(1)
        return tokens.amax(1) if tokens.shape[1] else tokens.new_full((tokens.shape[0],), -torch.inf)
    bounds = cu_seqlens.to(torch.int64).clamp(0, tokens.shape[0]).cummax(0).values
    return torch.segment_reduce(tokens, how, offsets=bounds, initial=0 if how == "sum" else -torch.inf)


def unpacked(tokens: Tensor, mask: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed tokens and their mask as rows (N, T), T the longest row where lengths can be read for nothing."""
    total = tokens.shape[0]
    bounds = cu_seqlens.to(torch.int64).clamp(0, total).cummax(0).values
    lengths = bounds.diff()
    width = int(lengths.max()) if lengths.shape[0] and values_readable(lengths) else total
    index = bounds[:-1, None] + torch.arange(width, device=tokens.device)
    is_inside = index < bounds[1:, None]
    index = index.clamp_max(max(total - 1, 0))
    return tokens[index], mask[index] & is_inside


def row_lists(tensor: Tensor, cu_seqlens: Tensor | None) -> list[list[Any]]:
    """A list for each row."""
    if cu_seqlens is None:
        return tensor.tolist()
    bounds = cu_seqlens.tolist()
    return [tensor[start:end].tolist() for start, end in zip(bounds, bounds[1:], strict=False)]
