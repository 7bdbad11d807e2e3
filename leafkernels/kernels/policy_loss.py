"""The policy losses from log-probabilities, and their gradients, in one launch.

    ratio = e^clamp(logprob - old)      loss = weight * surrogate + kl_coef kl(ref - logprob) - entropy_coef H

Each surrogate is of a token alone, or of a token and one number of its row that is a constant to it; so is the
derivative in the token's log-probability. A program takes a row: it sums each term in one fixed order, so that nothing
but a few sums and the gradient is written. Where the surrogate reads a number of the row, it first sums that.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION, exp_tail, expm1, load_block, row_slot, row_stride, store_block

if TYPE_CHECKING:
    from leafkernels.losses.kinds import LossOptions
    from leafkernels.losses.tokens import LossInputs

SUMS = 7  # loss, clipped, e^x - 1 - x of the log-ratio, ratio, KL, entropy, tokens
BLOCK = 1024
NUM_WARPS = 8

_LEAST_LOG_WEIGHT = tl.constexpr(-18.420680743952367)  # log 1e-8
_MOST_LOG_WEIGHT = tl.constexpr(20.0)


@triton.jit
def _times(x, weight):
    """x weight; a weight of 0 makes 0 of an infinity too."""
    return tl.where((weight == 0.0) & (x == x), 0.0, x * weight)


@triton.jit
def _bounded(x, low, high):
    """In [low, high]; comparisons keep NaN, where a minimum may drop it."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _sigmoid(x):
    fade = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, fade, 1.0) / (1.0 + fade)


@triton.jit
def _on_the_side(log_ratio, advantage, below, above):
    """No further than the bounds to the side to which the advantage pulls; 0 where it pulls to none."""
    bounded = tl.where((advantage > 0.0) & (log_ratio > above), above, log_ratio)
    bounded = tl.where((advantage < 0.0) & (log_ratio < -below), -below, bounded)
    return tl.where((advantage == 0.0) & (log_ratio == log_ratio), 0.0, bounded)


# To add a loss: its formula here, in the eager twin, in the reference, and its options in ``losses/kinds.py``.
@triton.jit
def surrogate(
    logprob,
    old_logprob,
    log_ratio,
    advantage,
    row_number,
    first,
    second,
    third,
    fourth,
    max_log_ratio,
    FORMULA: tl.constexpr,
):
    """Of each token: its loss, the derivative of that in its log-probability, the ratio, and if a bound decides."""
    # Comparisons keep NaN, where a minimum may drop it.
    is_beyond = tl.abs(log_ratio) > max_log_ratio
    ratio = tl.exp(tl.where(is_beyond, tl.where(log_ratio < 0.0, -max_log_ratio, max_log_ratio), log_ratio))
    is_clipped = log_ratio < log_ratio  # nowhere
    if FORMULA == "clip":
        # An advantage of 0 gains nothing, also of a ratio that has overflowed.
        gain = tl.where((advantage == 0.0) & (ratio == float("inf")), 0.0, ratio * advantage)
        clipped_gain = tl.minimum(tl.maximum(ratio, 1.0 - first), 1.0 + second) * advantage
        is_dual = (advantage < 0.0) & (gain < third * advantage)
        is_clipped = (clipped_gain < gain) | is_dual
        loss = -tl.where(is_dual, third * advantage, tl.where(is_clipped, clipped_gain, gain))
        slope = tl.where(is_clipped | is_beyond, 0.0, -gain)
    elif FORMULA == "cispo":
        bounded = _bounded(ratio, 1.0 - first, 1.0 + second)
        is_clipped = (bounded < ratio) | (bounded > ratio)
        slope = -_times(bounded, advantage)
        loss = _times(logprob, slope)
    elif FORMULA == "sapo":
        tau = tl.where(advantage > 0.0, first, second)
        z = tau * (ratio - 1.0)
        loss = -4.0 / tau * _sigmoid(z) * advantage
        slope = tl.where(is_beyond, 0.0, -4.0 * _times(ratio, _sigmoid(z) * _sigmoid(-z)) * advantage)
    elif FORMULA == "gmpo":
        bounded = _on_the_side(log_ratio, advantage, first, second)
        is_clipped = (advantage != 0.0) & ((bounded < log_ratio) | (bounded > log_ratio))
        loss = -_times(tl.exp(row_number), advantage)
        slope = tl.where(is_clipped, 0.0, loss)
    elif FORMULA == "dppo_tv" or FORMULA == "dppo_kl":
        p, q = tl.exp(logprob), tl.exp(old_logprob)
        bound = tl.where(advantage > 0.0, second, first)
        if FORMULA == "dppo_tv":
            is_clipped = tl.where(advantage > 0.0, p - q, q - p) > bound
        else:
            # Of the two events "this token" and "another one"; what rounding left above 0 is 0.
            new, old = tl.where(logprob > 0.0, 0.0, logprob), tl.where(old_logprob > 0.0, 0.0, old_logprob)
            other = -expm1(old)
            others = tl.where(old == 0.0, 0.0, (tl.log(other) - tl.log(-expm1(new))) * other)
            distance = _times(old - new, tl.exp(old)) + others
            is_clipped = (distance > bound) & tl.where(advantage > 0.0, p > q, p < q)
        slope = tl.where(is_clipped, 0.0, -_times(tl.where(ratio > third, third, ratio), advantage))
        loss = tl.where(is_clipped, 0.0, _times(logprob, slope))
    else:
        slope = -advantage
        loss = _times(logprob, slope)
        if FORMULA == "dro":
            loss += first / 2.0 * log_ratio * log_ratio
            slope += first * log_ratio
    return loss, slope, ratio, is_clipped, is_beyond


@triton.jit
def row_term(log_ratio, advantage, weight, first, second, STATISTIC: tl.constexpr, HAS_WEIGHTS: tl.constexpr):
    """What of each token goes into the number of its row."""
    term = log_ratio
    if STATISTIC == "sides":
        term = _on_the_side(log_ratio, advantage, first, second)
    elif STATISTIC == "product":
        term = _bounded(log_ratio, -20.0, 20.0)
        if HAS_WEIGHTS:
            term += _bounded(tl.log(weight), _LEAST_LOG_WEIGHT, _MOST_LOG_WEIGHT)
    return term


@triton.jit
def gamma_weight(log_weight, advantage, k, scale, k_negative, scale_negative):
    """e^(l + k log w - l w), with k and l by the sign of the advantage."""
    of_k = tl.where(advantage < 0.0, k_negative, k)
    of_scale = tl.where(advantage < 0.0, scale_negative, scale)
    return tl.exp(of_scale + of_k * log_weight - of_scale * tl.exp(log_weight))


@triton.jit
def divergence(distance, KL: tl.constexpr):
    """An estimate of KL(policy || ref) from ref - logprob, and its derivative in the log-probability."""
    if KL == "k1":
        kl = -distance
        slope = distance * 0.0 + 1.0
    elif KL == "k2":
        kl = distance * distance / 2.0
        slope = -distance
    elif KL == "abs":
        kl = tl.abs(distance)
        slope = tl.where(distance > 0.0, -1.0, tl.where(distance < 0.0, 1.0, distance))
    else:
        kl = exp_tail(distance)
        if KL == "k3":
            slope = -expm1(distance)
        else:
            slope = -distance
    return kl, slope


@triton.jit
def token_loss(
    logprob,
    old_logprob,
    log_ratio,
    advantage,
    ref_logprob,
    entropy,
    weight,
    row_number,
    first,
    second,
    third,
    fourth,
    max_log_ratio,
    kl_coef,
    entropy_coef,
    HAS_REF: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    FORMULA: tl.constexpr,
    KL: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
):
    """Of each token: its loss, the derivative in its log-probability, the ratio, whether it is clipped, and its KL."""
    loss, slope, ratio, is_clipped, is_beyond = surrogate(
        logprob,
        old_logprob,
        log_ratio,
        advantage,
        row_number,
        first,
        second,
        third,
        fourth,
        max_log_ratio,
        FORMULA,
    )
    if FORMULA == "vespo":
        weight = gamma_weight(row_number, advantage, first, second, third, fourth)
    if HAS_WEIGHTS or FORMULA == "vespo":
        loss = _times(loss, weight)
        slope = _times(slope, weight)
    kl = tl.where(is_clipped, 0.0, 0.0)
    # Without a weight both are statistics: 0 * inf would be NaN.
    if HAS_REF:
        kl, kl_slope = divergence(ref_logprob - logprob, KL)
        if KL_WEIGHTED:
            kl = _times(ratio, kl)
            kl_slope = _times(ratio, kl_slope)
            if KL != "k3+":
                kl_slope += tl.where(is_beyond, 0.0, kl)
        loss += tl.where(kl_coef == 0.0, 0.0, kl_coef * kl)
        slope += tl.where(kl_coef == 0.0, 0.0, kl_coef * kl_slope)
    if HAS_ENTROPY:
        loss -= tl.where(entropy_coef == 0.0, 0.0, entropy_coef * entropy)
    return loss, slope, ratio, is_clipped, kl


@triton.jit
def _load(ptr, base, start, size, live, BLOCK: tl.constexpr):
    """In float32, and 0 where a token does not count, whatever stands there."""
    return tl.where(live, load_block(ptr, base, start, size, 0.0, BLOCK).to(tl.float32), 0.0)


@triton.jit(
    do_not_specialize=[
        "stride_logprobs_row",
        "stride_old_row",
        "stride_advantages_row",
        "stride_mask_row",
        "stride_ref_row",
        "stride_weights_row",
        "stride_penalties_row",
        "stride_entropy_row",
        "stride_gradients_row",
        "width",
        "num_rows",
    ]
)
def _policy_loss_kernel(
    sums_ptr,
    gradients_ptr,
    logprobs_ptr,
    old_logprobs_ptr,
    advantages_ptr,
    mask_ptr,
    ref_logprobs_ptr,
    weights_ptr,
    penalties_ptr,
    entropy_ptr,
    cu_seqlens_ptr,
    first,
    second,
    third,
    fourth,
    max_log_ratio,
    kl_coef,
    entropy_coef,
    stride_logprobs_row,
    stride_old_row,
    stride_advantages_row,
    stride_mask_row,
    stride_ref_row,
    stride_weights_row,
    stride_penalties_row,
    stride_entropy_row,
    stride_gradients_row,
    width,
    num_rows,
    HAS_REF: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
    PACKED: tl.constexpr,
    FORMULA: tl.constexpr,
    STATISTIC: tl.constexpr,
    KL: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot, size = row * 0, width
    if PACKED:
        slot, size = row_slot(cu_seqlens_ptr, row, width, PACKED)
    logprobs_row, old_row = row * stride_logprobs_row + slot, row * stride_old_row + slot
    advantages_row, mask_row = row * stride_advantages_row + slot, row * stride_mask_row + slot
    zeros = tl.zeros([BLOCK], tl.float32)
    weight = zeros
    row_number = 0.0
    if STATISTIC != "":
        total, count = zeros, zeros
        for block in range(0, tl.cdiv(size, BLOCK)):
            start = block * BLOCK
            live = load_block(mask_ptr, mask_row, start, size, 0, BLOCK) != 0
            policy = _load(logprobs_ptr, logprobs_row, start, size, live, BLOCK)
            log_ratio = policy - _load(old_logprobs_ptr, old_row, start, size, live, BLOCK)
            advantage = zeros
            if STATISTIC == "sides":
                advantage = _load(advantages_ptr, advantages_row, start, size, live, BLOCK)
            if HAS_WEIGHTS:
                weight = _load(weights_ptr, row * stride_weights_row + slot, start, size, live, BLOCK)
                weight = tl.where(live, weight, 1.0)
            total += row_term(log_ratio, advantage, weight, first, second, STATISTIC, HAS_WEIGHTS)
            count += live.to(tl.float32)
        row_number = tl.sum(total, axis=0)
        if STATISTIC == "product":
            row_number = _bounded(row_number, _LEAST_LOG_WEIGHT, _MOST_LOG_WEIGHT)
        else:
            row_number = row_number / tl.maximum(tl.sum(count, axis=0), 1.0)
        if STATISTIC != "mean":
            row_number = zeros + row_number
    losses, clips, moves, ratios, kls, entropies, tokens = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for block in range(0, tl.cdiv(size, BLOCK)):
        start = block * BLOCK
        live = load_block(mask_ptr, mask_row, start, size, 0, BLOCK) != 0
        policy = _load(logprobs_ptr, logprobs_row, start, size, live, BLOCK)
        old = _load(old_logprobs_ptr, old_row, start, size, live, BLOCK)
        token_log_ratio = policy - old
        advantage = _load(advantages_ptr, advantages_row, start, size, live, BLOCK)
        log_ratio = token_log_ratio
        if STATISTIC == "mean":
            log_ratio = zeros + row_number
        ref_logprob, entropy = zeros, zeros
        if HAS_REF:
            ref_logprob = _load(ref_logprobs_ptr, row * stride_ref_row + slot, start, size, live, BLOCK)
        if HAS_ENTROPY:
            entropy = _load(entropy_ptr, row * stride_entropy_row + slot, start, size, live, BLOCK)
            entropies += entropy
        if HAS_WEIGHTS:
            weight = _load(weights_ptr, row * stride_weights_row + slot, start, size, live, BLOCK)
        loss, slope, ratio, is_clipped, kl = token_loss(
            policy,
            old,
            log_ratio,
            advantage,
            ref_logprob,
            entropy,
            weight,
            row_number,
            first,
            second,
            third,
            fourth,
            max_log_ratio,
            kl_coef,
            entropy_coef,
            HAS_REF,
            HAS_ENTROPY,
            HAS_WEIGHTS,
            FORMULA,
            KL,
            KL_WEIGHTED,
        )
        if HAS_PENALTIES:
            penalty = _load(penalties_ptr, row * stride_penalties_row + slot, start, size, live, BLOCK)
            away, sign = divergence(-log_ratio, "abs")
            loss += _times(away, penalty)
            slope += _times(sign, penalty)
        if KL_WEIGHTED:
            kl = tl.where(live, kl, 0.0)  # the ratio may be that of a row, and NaN
        kls += kl
        losses += tl.where(live, loss, 0.0)
        clips += tl.where(live & is_clipped, 1.0, 0.0)
        moves += exp_tail(token_log_ratio)
        ratios += tl.where(live, ratio, 0.0)
        tokens += live.to(tl.float32)
        if GRADIENT:
            gradient = tl.where(live, slope, 0.0)
            store_block(gradients_ptr, row * stride_gradients_row + slot, start, size, gradient, BLOCK)
    plane = num_rows.to(tl.int64)
    tl.store(sums_ptr + row, tl.sum(losses, axis=0))
    tl.store(sums_ptr + plane + row, tl.sum(clips, axis=0))
    tl.store(sums_ptr + 2 * plane + row, tl.sum(moves, axis=0))
    tl.store(sums_ptr + 3 * plane + row, tl.sum(ratios, axis=0))
    tl.store(sums_ptr + 4 * plane + row, tl.sum(kls, axis=0))
    tl.store(sums_ptr + 5 * plane + row, tl.sum(entropies, axis=0))
    tl.store(sums_ptr + 6 * plane + row, tl.sum(tokens, axis=0))


def policy_loss(
    logprobs: Tensor,
    inputs: "LossInputs",
    entropy: Tensor | None,
    options: "LossOptions",
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Sums (7, N) float32 over each row's unmasked tokens, in the order of ``PolicyLoss``, the last their number.

    And the derivative of each token's loss in its log-probability, shaped like ``logprobs``; empty if unwanted.
    """
    *tensors, cu_seqlens = inputs
    num_rows = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sums = torch.empty((SUMS, num_rows), dtype=torch.float32, device=logprobs.device)
    gradients = torch.empty(logprobs.shape if with_gradient else (0,), dtype=torch.float32, device=logprobs.device)
    tokens = [
        tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
        for tensor in (logprobs, *tensors, entropy)
    ]
    if num_rows:
        _policy_loss_kernel[(num_rows,)](
            sums,
            gradients,
            *tokens,
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            *options.numbers,
            options.max_log_ratio,
            options.kl_coef,
            options.entropy_coef,
            *(0 if tensor is None else row_stride(tensor) for tensor in tokens),
            logprobs.shape[-1] if cu_seqlens is None else 0,
            logprobs.shape[-1],
            num_rows,
            HAS_REF=inputs.ref_logprobs is not None,
            HAS_ENTROPY=entropy is not None,
            HAS_WEIGHTS=inputs.token_weights is not None,
            HAS_PENALTIES=inputs.penalties is not None,
            PACKED=cu_seqlens is not None,
            FORMULA=options.formula,
            STATISTIC=options.row_statistic,
            KL=options.kl_kind,
            KL_WEIGHTED=options.kl_weighted,
            GRADIENT=with_gradient,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return sums, gradients
