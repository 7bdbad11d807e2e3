"""The clipped policy loss from log-probabilities, and its gradient, in one launch.

    ratio = e^clamp(logprob - old)      loss = max(-ratio A, -clamp(ratio) A), at most -dual_clip A where A < 0,
                                               + kl_coef k3(ref - logprob) - entropy_coef H
    d loss / d logprob = -ratio A [unless a bound decides] - kl_coef (e^(ref - logprob) - 1)

A program takes a row: it sums each term in one fixed order, so that nothing but a few sums and the gradient is written.
For sequence ratios it first sums the log-ratios.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION, exp_tail, expm1, load_block, store_block

if TYPE_CHECKING:
    from leafkernels.losses.policy_loss import LossOptions

SUMS = 7  # loss, clipped, e^x - 1 - x of the log-ratio, ratio, k3, entropy, tokens
NUMBERS = 6  # of LossOptions the floats: clip_low to entropy_coef
BLOCK = 1024
NUM_WARPS = 8


@triton.jit
def surrogate(log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio):
    """Of each token: what its ratio loses, the derivative of that in the log-ratio, the ratio, and if it is clipped."""
    # Comparisons keep NaN, where a minimum may drop it.
    is_beyond = tl.abs(log_ratio) > max_log_ratio
    ratio = tl.exp(tl.where(is_beyond, tl.where(log_ratio < 0.0, -max_log_ratio, max_log_ratio), log_ratio))
    # An advantage of 0 gains nothing, also of a ratio that has overflowed.
    gain = tl.where((advantage == 0.0) & (ratio == float("inf")), 0.0, ratio * advantage)
    clipped_gain = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high) * advantage
    is_dual = (advantage < 0.0) & (gain < dual_clip * advantage)
    is_clipped = (clipped_gain < gain) | is_dual
    loss = -tl.where(is_dual, dual_clip * advantage, tl.where(is_clipped, clipped_gain, gain))
    return loss, tl.where(is_clipped | is_beyond, 0.0, -gain), ratio, is_clipped


@triton.jit
def token_loss(
    logprob,
    log_ratio,
    advantage,
    ref_logprob,
    entropy,
    clip_low,
    clip_high,
    dual_clip,
    max_log_ratio,
    kl_coef,
    entropy_coef,
    HAS_REF: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """Of each token: its loss, the derivative in its log-probability, the ratio, whether it is clipped, and k3."""
    loss, slope, ratio, is_clipped = surrogate(log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio)
    kl = tl.where(is_clipped, 0.0, 0.0)
    # Without a weight both are statistics: 0 * inf would be NaN.
    if HAS_REF:
        distance = ref_logprob - logprob
        kl = exp_tail(distance)
        loss += tl.where(kl_coef == 0.0, 0.0, kl_coef * kl)
        slope -= tl.where(kl_coef == 0.0, 0.0, kl_coef * expm1(distance))
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
        "stride_entropy_row",
        "size",
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
    entropy_ptr,
    clip_low,
    clip_high,
    dual_clip,
    max_log_ratio,
    kl_coef,
    entropy_coef,
    stride_logprobs_row,
    stride_old_row,
    stride_advantages_row,
    stride_mask_row,
    stride_ref_row,
    stride_entropy_row,
    size,
    num_rows,
    HAS_REF: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logprobs_row, old_row, mask_row = row * stride_logprobs_row, row * stride_old_row, row * stride_mask_row
    zeros = tl.zeros([BLOCK], tl.float32)
    mean_log_ratio = 0.0
    if PER_SEQUENCE:
        total, count = zeros, zeros
        for block in range(0, tl.cdiv(size, BLOCK)):
            start = block * BLOCK
            live = load_block(mask_ptr, mask_row, start, size, 0, BLOCK) != 0
            policy = _load(logprobs_ptr, logprobs_row, start, size, live, BLOCK)
            total += policy - _load(old_logprobs_ptr, old_row, start, size, live, BLOCK)
            count += live.to(tl.float32)
        mean_log_ratio = tl.sum(total, axis=0) / tl.maximum(tl.sum(count, axis=0), 1.0)
    losses, clips, moves, ratios, kls, entropies, tokens = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for block in range(0, tl.cdiv(size, BLOCK)):
        start = block * BLOCK
        live = load_block(mask_ptr, mask_row, start, size, 0, BLOCK) != 0
        policy = _load(logprobs_ptr, logprobs_row, start, size, live, BLOCK)
        token_log_ratio = policy - _load(old_logprobs_ptr, old_row, start, size, live, BLOCK)
        advantage = _load(advantages_ptr, row * stride_advantages_row, start, size, live, BLOCK)
        log_ratio = token_log_ratio
        if PER_SEQUENCE:
            log_ratio = zeros + mean_log_ratio
        ref_logprob, entropy = zeros, zeros
        if HAS_REF:
            ref_logprob = _load(ref_logprobs_ptr, row * stride_ref_row, start, size, live, BLOCK)
        if HAS_ENTROPY:
            entropy = _load(entropy_ptr, row * stride_entropy_row, start, size, live, BLOCK)
            entropies += entropy
        loss, slope, ratio, is_clipped, kl = token_loss(
            policy,
            log_ratio,
            advantage,
            ref_logprob,
            entropy,
            clip_low,
            clip_high,
            dual_clip,
            max_log_ratio,
            kl_coef,
            entropy_coef,
            HAS_REF,
            HAS_ENTROPY,
        )
        kls += kl
        losses += tl.where(live, loss, 0.0)
        clips += tl.where(live & is_clipped, 1.0, 0.0)
        moves += exp_tail(token_log_ratio)
        ratios += tl.where(live, ratio, 0.0)
        tokens += live.to(tl.float32)
        if GRADIENT:
            store_block(gradients_ptr, row * size, start, size, tl.where(live, slope, 0.0), BLOCK)
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
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    options: "LossOptions",
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Sums (7, N) float32 over each row's unmasked tokens, in the order of ``PolicyLoss``, the last their number.

    And the derivative (N, T) of each token's loss in its log-probability; empty if unwanted.
    """
    num_rows, size = logprobs.shape
    sums = torch.empty((SUMS, num_rows), dtype=torch.float32, device=logprobs.device)
    gradients = torch.empty(logprobs.shape if with_gradient else (0,), dtype=torch.float32, device=logprobs.device)
    inputs = [
        tensor if tensor is None or tensor.stride(1) == 1 else tensor.contiguous()
        for tensor in (logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy)
    ]
    if num_rows:
        _policy_loss_kernel[(num_rows,)](
            sums,
            gradients,
            *inputs,
            *options[:NUMBERS],
            *(0 if tensor is None else tensor.stride(0) for tensor in inputs),
            size,
            num_rows,
            HAS_REF=ref_logprobs is not None,
            HAS_ENTROPY=entropy is not None,
            PER_SEQUENCE=options.per_sequence,
            GRADIENT=with_gradient,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return sums, gradients
