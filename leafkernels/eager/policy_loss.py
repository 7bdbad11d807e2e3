"""The policy losses and their gradients, all tokens at a time; see ``leafkernels.kernels.policy_loss``."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.precision import compute_dtype

if TYPE_CHECKING:
    from leafkernels.losses.kinds import LossOptions
    from leafkernels.losses.tokens import LossInputs

_LEAST_LOG_WEIGHT, _MOST_LOG_WEIGHT = math.log(1e-8), 20.0


def token_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    ref_logprob: Tensor | None,
    entropy: Tensor | None,
    weight: Tensor | None,
    row: Tensor | None,
    options: "LossOptions",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each token: its loss, the derivative in its log-probability, the ratio, whether it is clipped, and its KL.

    ``row`` is the statistic of the token's row that the kind reads, as ``row_statistic`` gives it.
    """
    is_beyond = log_ratio.abs() > options.max_log_ratio
    ratio = log_ratio.clamp(-options.max_log_ratio, options.max_log_ratio).exp()
    at = _Tokens(logprob, old_logprob, log_ratio, ratio, advantage, is_beyond, row)
    loss, slope, is_clipped = _FORMULAS[options.formula](at, options)
    if options.formula == "vespo":
        weight = _gamma_weight(row, advantage, options)
    if weight is not None:
        loss, slope = _times(loss, weight), _times(slope, weight)
    kl = torch.zeros_like(loss)
    if ref_logprob is not None:
        kl, kl_slope = _divergence(ref_logprob - logprob, options.kl_kind)
        if options.kl_weighted:
            kl, kl_slope = _times(ratio, kl), _times(ratio, kl_slope)
            if options.kl_kind != "k3+":
                kl_slope = kl_slope + kl.masked_fill(is_beyond, 0.0)
        if options.kl_coef:
            loss = loss + options.kl_coef * kl
            slope = slope + options.kl_coef * kl_slope
    if entropy is not None and options.entropy_coef:
        loss = loss - options.entropy_coef * entropy
    return loss, slope, ratio, is_clipped, kl


class _Tokens(NamedTuple):
    logprob: Tensor
    old_logprob: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantage: Tensor
    is_beyond: Tensor  # whether the log-ratio was bounded before it became the ratio
    row: Tensor | None


Surrogate = tuple[Tensor, Tensor, Tensor]
"""Of each token: its loss, the derivative of that in its log-probability, and whether a bound decides."""


def _clip(at: _Tokens, options: "LossOptions") -> Surrogate:
    low, high, dual_clip, _ = options.numbers
    # An advantage of 0 contributes 0, also where the ratio has overflowed.
    gain = (at.ratio * at.advantage).masked_fill((at.advantage == 0.0) & at.ratio.isinf(), 0.0)
    bounded = at.ratio.clamp(1 - low, 1 + high) * at.advantage
    is_bounded = bounded < gain
    is_dual = (at.advantage < 0.0) & (gain < dual_clip * at.advantage)
    is_clipped = is_bounded | is_dual
    loss = -torch.where(is_bounded, bounded, torch.where(is_dual, dual_clip * at.advantage, gain))
    return loss, -gain.masked_fill(is_clipped | at.is_beyond, 0.0), is_clipped


def _cispo(at: _Tokens, options: "LossOptions") -> Surrogate:
    low, high, _, _ = options.numbers
    bounded = at.ratio.clamp(1 - low, 1 + high)
    gain = _times(bounded, at.advantage)
    return -_times(at.logprob, gain), -gain, (bounded < at.ratio) | (bounded > at.ratio)


def _sapo(at: _Tokens, options: "LossOptions") -> Surrogate:
    positive, negative, _, _ = options.numbers
    tau = _either(at.advantage > 0, positive, negative, at.ratio)
    rise, fall = (tau * (at.ratio - 1)).sigmoid(), (-tau * (at.ratio - 1)).sigmoid()
    slope = -4 * _times(at.ratio, rise * fall) * at.advantage
    return -4 / tau * rise * at.advantage, slope.masked_fill(at.is_beyond, 0.0), torch.zeros_like(at.is_beyond)


def _dppo(at: _Tokens, options: "LossOptions") -> Surrogate:
    low, high, most, _ = options.numbers
    p, q = at.logprob.exp(), at.old_logprob.exp()
    bound = _either(at.advantage > 0, high, low, p)
    if options.formula == "dppo_tv":
        is_far = torch.where(at.advantage > 0, p - q, q - p) > bound
    else:
        # Of the two events "this token" and "another one"; what rounding left above 0 is 0.
        new, old = at.logprob.clamp_max(0.0), at.old_logprob.clamp_max(0.0)
        other = -old.expm1()
        others = ((other.log() - (-new.expm1()).log()) * other).masked_fill(old == 0, 0.0)
        distance = _times(old - new, old.exp()) + others
        is_far = (distance > bound) & torch.where(at.advantage > 0, p > q, p < q)
    gain = _times(at.ratio.clamp(max=most), at.advantage)
    return (-_times(at.logprob, gain)).masked_fill(is_far, 0.0), -gain.masked_fill(is_far, 0.0), is_far


def _dro(at: _Tokens, options: "LossOptions") -> Surrogate:
    beta = options.numbers[0]
    loss = -_times(at.logprob, at.advantage) + beta / 2 * at.log_ratio.square()
    return loss, -at.advantage + beta * at.log_ratio, torch.zeros_like(at.is_beyond)


def _reinforce(at: _Tokens, options: "LossOptions") -> Surrogate:
    return -_times(at.logprob, at.advantage), -at.advantage, torch.zeros_like(at.is_beyond)


def _gmpo(at: _Tokens, options: "LossOptions") -> Surrogate:
    assert at.row is not None
    bounded = _on_the_side(at.log_ratio, at.advantage, options)
    is_clipped = (at.advantage != 0) & ((bounded < at.log_ratio) | (bounded > at.log_ratio))
    gain = _times(at.row.exp(), at.advantage)
    return -gain, -gain.masked_fill(is_clipped, 0.0), is_clipped


# To add a loss: its formula here, in the kernel, in the reference, and its options in ``losses/kinds.py``.
_FORMULAS = {
    "clip": _clip,
    "cispo": _cispo,
    "sapo": _sapo,
    "vespo": _reinforce,
    "gmpo": _gmpo,
    "dppo_tv": _dppo,
    "dppo_kl": _dppo,
    "dro": _dro,
    "reinforce": _reinforce,
}


def row_term(log_ratio: Tensor, advantage: Tensor, weight: Tensor | None, options: "LossOptions") -> Tensor:
    """What of each token goes into the statistic of its row."""
    if options.row_statistic == "sides":
        return _on_the_side(log_ratio, advantage, options)
    if options.row_statistic == "product":
        term = log_ratio.clamp(-20.0, 20.0)
        return term if weight is None else term + weight.log().clamp(_LEAST_LOG_WEIGHT, _MOST_LOG_WEIGHT)
    return log_ratio


def row_statistic(total: Tensor, count: Tensor, options: "LossOptions") -> Tensor:
    """Of each row, from the sum of its terms: their mean, or for a product of ratios its bounded logarithm."""
    if options.row_statistic == "product":
        return total.clamp(_LEAST_LOG_WEIGHT, _MOST_LOG_WEIGHT)
    return total / count.clamp_min(1)


def _gamma_weight(log_weight: Tensor | None, advantage: Tensor, options: "LossOptions") -> Tensor:
    """e^(l + k log w - l w), with k and l by the sign of the advantage."""
    assert log_weight is not None
    k, scale, k_negative, scale_negative = options.numbers
    is_negative = advantage < 0
    k_of = _either(is_negative, k_negative, k, advantage)
    scale_of = _either(is_negative, scale_negative, scale, advantage)
    return (scale_of + k_of * log_weight - scale_of * log_weight.exp()).exp()


def _on_the_side(log_ratio: Tensor, advantage: Tensor, options: "LossOptions") -> Tensor:
    """No further than the bounds to the side to which the advantage pulls; 0 where it pulls to none."""
    low, high, _, _ = options.numbers
    bounded = torch.where(advantage > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
    return bounded.masked_fill((advantage == 0) & ~log_ratio.isnan(), 0.0)


def _divergence(distance: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """An estimate of KL(policy || ref) from ref - logprob, and its derivative in the log-probability."""
    if kind == "k1":
        return -distance, torch.ones_like(distance)
    if kind == "k2":
        return distance.square() / 2, -distance
    if kind == "abs":
        return distance.abs(), -distance.sign()
    value = distance.expm1() - distance
    return value, -distance.expm1() if kind == "k3" else -distance


def _either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Of two numbers, in the dtype of ``like``, where PyTorch would make float32 of them."""
    return torch.where(condition, yes, torch.full_like(like, no))


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x weight; a weight of 0 makes 0 of an infinity too."""
    return (x * weight).masked_fill((weight == 0) & ~x.isnan(), 0.0)


def policy_loss(
    logprobs: Tensor,
    inputs: "LossInputs",
    entropy: Tensor | None,
    options: "LossOptions",
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Sums (7, N) over each row's unmasked tokens, in the order of ``PolicyLoss``, the last their number.

    And the derivative of each token's loss in its log-probability, shaped like ``logprobs``; empty if unwanted.
    """
    dtype, mask, cu_seqlens = compute_dtype(logprobs.dtype), inputs.mask, inputs.cu_seqlens

    def live(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor.to(dtype), 0.0)

    def known(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else live(tensor)

    if cu_seqlens is not None:
        total = logprobs.shape[0]
        bounds = cu_seqlens.to(torch.int64).clamp(0, total).cummax(0).values
        places = torch.arange(total, device=logprobs.device)
        row_of = torch.searchsorted(bounds[1:], places, right=True).clamp_max(max(bounds.shape[0] - 2, 0))
        # What no row holds, where offsets that nobody has read break their rules, counts nowhere.
        mask = mask & (places < bounds[-1])

    def sum_rows(term: Tensor) -> Tensor:
        if cu_seqlens is None:
            return term.sum(1).to(dtype)
        return torch.segment_reduce(term.double(), "sum", offsets=bounds, initial=0).to(dtype)

    def spread(numbers: Tensor) -> Tensor:
        return numbers[:, None].expand_as(policy) if cu_seqlens is None else numbers[row_of]

    policy, old, advantages, weights = live(logprobs), live(inputs.old_logprobs), live(inputs.advantages), None
    if inputs.token_weights is not None:
        weights = torch.where(mask, inputs.token_weights.to(dtype), 1.0)
    token_log_ratio = log_ratio = policy - old
    counts, row = sum_rows(mask), None
    if options.row_statistic:
        terms = row_term(log_ratio, advantages, weights, options)
        row = spread(row_statistic(sum_rows(terms), counts, options))
        if options.row_statistic == "mean":
            log_ratio = row
    bonus = known(entropy)
    loss, slope, ratio, is_clipped, kl = token_loss(
        policy, old, log_ratio, advantages, known(inputs.ref_logprobs), bonus, weights, row, options
    )
    if inputs.penalties is not None:
        penalties = live(inputs.penalties)
        loss = loss + _times(log_ratio.abs(), penalties)
        slope = slope + _times(log_ratio.sign(), penalties)
    moved = token_log_ratio.expm1() - token_log_ratio
    bonus = torch.zeros_like(policy) if bonus is None else bonus
    # Inputs are 0 where the mask is False, and so are most results; but some are of a row, whose numbers may be NaN.
    sums = [sum_rows(term) for term in (live(loss), live(is_clipped), moved, live(ratio), live(kl), bonus)]
    return torch.stack((*sums, counts)), live(slope) if with_gradient else policy.new_empty(0)
