"""Weights of tokens for rollouts that another engine sampled than the one that computes old log-probabilities."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from leafkernels._core.checks import (
    check_choice,
    check_finite,
    check_like,
    check_mask,
    check_positive,
    check_real,
    check_tensor,
)
from leafkernels._core.precision import compute_dtype
from leafkernels.losses.tokens import count_tokens, reduce_rows, spread_rows
from leafkernels.rows.find import check_cu_seqlens

LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "mask")
REJECTIONS = (
    *(f"token_k{k}" for k in (1, 2, 3)),
    *(f"seq_{how}_k{k}" for how in ("sum", "mean") for k in (1, 2, 3)),
    *(f"seq_max_k{k}" for k in (2, 3)),
)
"""What may be bounded, by verl's names."""


class RolloutWeights(NamedTuple):
    """Weights, the mask without what is rejected, and statistics over the tokens that count, on the same device."""

    weights: Tensor
    """Shaped like ``old_logprobs``, at least 0; 0 where the mask is False and where a token is rejected."""
    mask: Tensor
    """bool: ``response_mask`` without the rejected tokens, for a loss that is not to count them."""
    mean: Tensor
    """Of the weights within their bounds, before they are normalised; so too the next four."""
    least: Tensor
    most: Tensor
    bounded: Tensor
    """Share of tokens whose weight a bound has changed."""
    effective: Tensor
    """(sum of weights)^2 / (tokens * sum of their squares): the share of the tokens that the weights are worth."""
    rejected: Tensor
    """Share of tokens that are rejected."""
    unknown: Tensor
    """int64: tokens for which the sampler gave no number; they have the log-ratio 0."""
    mean_difference: Tensor
    """Of the absolute log-ratio, over the tokens whose numbers are known; so too the next."""
    max_difference: Tensor


@torch.no_grad()
def rollout_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    response_mask: Tensor,
    *,
    level: str = "token",
    mode: str = "truncate",
    low: float | None = None,
    high: float | None = 2.0,
    reject: Mapping[str, Any] | None = None,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> RolloutWeights:
    """Importance weights exp(old - sampler) within bounds, for ``token_weights=`` of the policy losses.

    An engine that samples computes other log-probabilities than the model that trains. Truncated importance sampling
    is ``level="token", mode="truncate"`` (TIS), IcePop ``mode="mask"`` with ``low`` and ``high``, masked importance
    sampling of sequences ``level="sequence", mode="mask"`` (MIS). Nothing is read back to the host, and nothing has a
    gradient.

    Args:
        old_logprobs: (N, T), or (total,) with ``cu_seqlens``: log-probabilities of the sampled tokens under the model
            that is trained.
        sampler_logprobs: likewise, under the engine that sampled; NaN where it gave none.
        response_mask: likewise, nonzero where a token counts; what stands elsewhere is not read.
        level: of which ratio the weight is: "token", each token's; "sequence", the product of a row's; "geometric", its
            geometric mean.
        mode: "truncate": a weight outside of the bounds is the bound; "mask": it is 0.
        low, high: the bounds, positive; None: none.
        reject: names of ``k1`` = sampler - old, ``k2`` = k1^2 / 2 or ``k3`` = e^-k1 - 1 + k1, of a token
            ("token_k3"), or their sum, mean or largest in a row ("seq_sum_k1", "seq_mean_k3", "seq_max_k2"), and the
            most that each may be; for k1 a pair of ratios (low, high) between whose logarithms it must lie, or ``high``
            alone for (1 / high, high). Rejected are tokens, or whole rows, that are outside of one.
        normalize: divide the weights by their mean over this call: over tokens, or over rows for the other levels.
        cu_seqlens: (N + 1,) int32, the offsets of packed rows.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.

    Example:
        >>> old, sampler = torch.tensor([[-1.0, -2.0, -1.0]]), torch.tensor([[-1.0, -4.0, float("nan")]])
        >>> found = leafkernels.rollout_weights(old, sampler, torch.ones(1, 3))
        >>> found.weights, found.unknown
        (tensor([[1., 2., 1.]]), tensor(1))
    """
    check_real("old_logprobs", old_logprobs)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "old_logprobs", old_logprobs)
    elif old_logprobs.dim() != 2:
        raise ValueError(f"old_logprobs must have shape (rows, tokens), got shape {tuple(old_logprobs.shape)}")
    shape, device = old_logprobs.shape, old_logprobs.device
    check_like("sampler_logprobs", check_real("sampler_logprobs", sampler_logprobs), "old_logprobs", shape, device)
    mask = cast(Tensor, check_mask(check_tensor("response_mask", response_mask), "old_logprobs", shape, device))
    check_choice("level", level, LEVELS)
    check_choice("mode", mode, MODES)
    for name, bound in (("low", low), ("high", high)):
        if bound is not None:
            check_positive(name, bound)
    if low is not None and high is not None and low > high:
        raise ValueError(f"low must be at most high, {high}, got {low}")
    limits = _check_reject(reject)

    dtype = compute_dtype(old_logprobs.dtype)
    is_known = mask & ~sampler_logprobs.isnan()
    log_ratio = torch.where(is_known, old_logprobs.to(dtype) - sampler_logprobs.to(dtype), 0.0)
    # A token that counts but whose old number is NaN stays NaN: that is no gap of the engine.
    log_ratio = torch.where(mask & old_logprobs.isnan(), torch.nan, log_ratio)
    tokens = count_tokens(mask, cu_seqlens)

    def spread(rows: Tensor) -> Tensor:
        return rows[:, None].expand(shape) if cu_seqlens is None else spread_rows(rows, cu_seqlens, shape[0])

    exponent = log_ratio.double()
    if level != "token":
        total = reduce_rows(log_ratio, cu_seqlens, "sum")
        exponent = spread(total / tokens.clamp_min(1) if level == "geometric" else total)
    least, most = -math.inf if low is None else math.log(low), math.inf if high is None else math.log(high)
    is_bounded = mask & ((exponent < least) | (exponent > most))
    weights = exponent.clamp(least, most).exp()
    weights = torch.where(mask, weights.masked_fill(is_bounded, 0.0) if mode == "mask" else weights, 0.0)

    kept = mask
    for name, (bottom, top) in limits.items():
        found = _distance(name, log_ratio, mask, tokens, cu_seqlens)
        found = found if name.startswith("token") else spread(found)
        kept = kept & ~((found < bottom) | (found > top))

    number = mask.sum().clamp_min(1)
    mean = weights.sum() / number
    effective = weights.sum().square() / (number * weights.square().sum()).clamp_min(torch.finfo(torch.float64).tiny)
    is_any = mask.any()
    differences = torch.where(is_known, log_ratio.abs(), 0.0)
    statistics = (
        mean,
        torch.where(is_any, weights.masked_fill(~mask, torch.inf).amin() if mask.numel() else mean, 0.0),
        weights.amax() if mask.numel() else mean,
        is_bounded.sum() / number,
        torch.where(is_any, effective, 1.0),
        (mask & ~kept).sum() / number,
        (mask & sampler_logprobs.isnan()).sum(),
        differences.sum() / is_known.sum().clamp_min(1),
        differences.amax() if mask.numel() else mean,
    )
    if normalize:
        if level != "token":
            # One weight a row, those of rows without a token left out.
            per_row = reduce_rows(weights, cu_seqlens, "sum") / tokens.clamp_min(1)
            mean = per_row.sum() / (tokens > 0).sum().clamp_min(1)
        weights = weights / torch.where(mean > 0, mean, 1.0)
    weights = weights.masked_fill(~kept, 0.0).to(dtype)
    scalars = (number if number.dtype == torch.int64 else number.to(dtype) for number in statistics)
    return RolloutWeights(weights, kept, *scalars)


def _distance(name: str, log_ratio: Tensor, mask: Tensor, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of each token, or of each row."""
    which = name[-2:]
    values = log_ratio.double()
    values = -values if which == "k1" else values.square() / 2 if which == "k2" else values.expm1() - values
    if name.startswith("token"):
        return values
    if "max" in name:
        most = reduce_rows(values.masked_fill(~mask, -torch.inf), cu_seqlens, "max")
        return most.masked_fill(tokens == 0, 0.0)
    total = reduce_rows(values, cu_seqlens, "sum")
    return total / tokens.clamp_min(1) if "mean" in name else total


def _check_reject(reject: Any) -> dict[str, tuple[float, float]]:
    """Of each name the least and the most that it may be."""
    if reject is None:
        return {}
    if not isinstance(reject, Mapping):
        raise TypeError(f"reject must map names to thresholds, got {type(reject).__name__}")
    limits = {}
    for name, bound in reject.items():
        check_choice("reject", name, REJECTIONS)
        argument = f"reject[{name!r}]"
        if not name.endswith("k1"):
            check_finite(argument, bound)
            if bound < 0:
                raise ValueError(f"{argument} must be at least 0, got {bound}")
            limits[name] = (-math.inf, float(bound))
            continue
        if not isinstance(bound, (tuple, list)):
            check_positive(argument, bound)
            bound = (1 / bound, bound)
        if len(bound) != 2:
            raise TypeError(f"{argument} must be a number or a pair (low, high), got {bound!r}")
        for ratio in bound:
            check_positive(argument, ratio)
        if bound[0] > bound[1]:
            raise ValueError(f"{argument} must be (low, high) with low <= high, got {bound!r}")
        limits[name] = (math.log(bound[0]), math.log(bound[1]))
    return limits
