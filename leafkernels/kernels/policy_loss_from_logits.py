"""The policy losses of tokens alone and their gradients, both in one launch over the logits.

A program folds its row as ``surprisal_entropy`` does, and so knows the token's log-probability and entropy; from them
follow the token's loss and what it loses with each. It then writes the row's gradient from a second look at the row,
last block first: what was read last is the likeliest to be in a cache still. From memory the logits are read once.

    d loss / d logprob = what ``policy_loss`` gives; d loss / d entropy = -entropy_coef
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels import surprisal
from leafkernels.kernels._shared import FP_FUSION, exp_tail, load_block, store_block
from leafkernels.kernels.policy_loss import token_loss
from leafkernels.kernels.surprisal import blocks_of, log_total_entropy, pick, row_state, write_gradient

if TYPE_CHECKING:
    from leafkernels.losses.kinds import LossOptions
    from leafkernels.losses.policy_loss_from_logits import LossConstants

TERMS = 6  # weighted loss, clipped, e^x - 1 - x of the log-ratio, ratio, KL, entropy
SCALE_BLOCK = 8192


@triton.jit(do_not_specialize=["stride_logits_row", "vocab_size", "num_rows"])
def _policy_loss_from_logits_kernel(
    terms_ptr,
    gradients_ptr,
    logits_ptr,
    token_ids_ptr,
    temperature_ptr,
    mask_ptr,
    weights_ptr,
    old_logprobs_ptr,
    advantages_ptr,
    ref_logprobs_ptr,
    token_weights_ptr,
    first_number,
    second_number,
    third_number,
    fourth_number,
    max_log_ratio,
    kl_coef,
    entropy_coef,
    stride_logits_row,
    vocab_size,
    num_rows,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    FORMULA: tl.constexpr,
    KL: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    plane = num_rows.to(tl.int64)
    base = row * stride_logits_row
    out = row * vocab_size
    first, last = blocks_of(logits_ptr, base, vocab_size, 0, tl.cdiv(vocab_size, BLOCK) + 1, BLOCK)
    if tl.load(mask_ptr + row) != 0:
        inv_temperature = 1.0 / tl.load(temperature_ptr + row).to(tl.float32)
        m, r, t = row_state(logits_ptr, base, vocab_size, first, last, inv_temperature, BLOCK, THREADS)
        log_total, entropy = log_total_entropy(m, r, t, inv_temperature)
        token = tl.load(token_ids_ptr + row).to(tl.int64)
        logprob = (pick(logits_ptr, base, token, vocab_size) - m) * inv_temperature - log_total

        weight = tl.load(weights_ptr + row)
        advantage = tl.load(advantages_ptr + row)
        old_logprob = logprob
        log_ratio = logprob * 0.0  # on policy: 0, and NaN where there is no distribution
        if HAS_OLD:
            old_logprob = tl.load(old_logprobs_ptr + row)
            log_ratio = logprob - old_logprob
        ref_logprob = logprob
        if HAS_REF:
            ref_logprob = tl.load(ref_logprobs_ptr + row)
        token_weight = 1.0
        if HAS_WEIGHTS:
            token_weight = tl.load(token_weights_ptr + row)
        loss, slope, ratio, is_clipped, kl = token_loss(
            logprob,
            old_logprob,
            log_ratio,
            advantage,
            ref_logprob,
            entropy,
            token_weight,
            0.0,  # no number of the row
            first_number,
            second_number,
            third_number,
            fourth_number,
            max_log_ratio,
            kl_coef,
            entropy_coef,
            HAS_REF,
            ENTROPY,
            HAS_WEIGHTS,
            FORMULA,
            KL,
            KL_WEIGHTED,
        )
        tl.store(terms_ptr + row, weight * loss)
        tl.store(terms_ptr + plane + row, is_clipped.to(tl.float32))
        tl.store(terms_ptr + 2 * plane + row, exp_tail(log_ratio))
        tl.store(terms_ptr + 3 * plane + row, ratio)
        tl.store(terms_ptr + 4 * plane + row, kl)
        tl.store(terms_ptr + 5 * plane + row, entropy)
        if GRADIENT:
            write_gradient(
                gradients_ptr,
                out,
                logits_ptr,
                base,
                vocab_size,
                first,
                last,
                token,
                -logprob,
                entropy,
                m,
                log_total,
                -slope * weight,
                -entropy_coef * weight,
                inv_temperature,
                1.0,
                ENTROPY,
                False,
                BLOCK,
            )
    else:
        for k in range(0, 6):
            tl.store(terms_ptr + k * plane + row, 0.0)
        if GRADIENT:
            for block in range(first, last):
                zero = tl.zeros([BLOCK], gradients_ptr.dtype.element_ty)
                store_block(gradients_ptr, out, block * BLOCK, vocab_size, zero, BLOCK)


@triton.jit(do_not_specialize=["size"])
def _scale_gradient_kernel(gradients_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    # ``loss.backward()`` passes 1: then nothing is to be done, and only the device knows.
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        block = load_block(gradients_ptr, start * 0, start, size, 0.0, BLOCK)
        store_block(gradients_ptr, start * 0, start, size, (block.to(tl.float32) * factor).to(block.dtype), BLOCK)


def policy_loss_from_logits(
    logits: Tensor, constants: "LossConstants", options: "LossOptions", with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Terms (6, N) float32 of each row, in the order of ``PolicyLoss``, and the gradient (N, V) of the first's sum.

    The gradient is empty if unwanted.
    """
    num_rows, vocab_size = logits.shape
    terms = torch.empty((TERMS, num_rows), dtype=torch.float32, device=logits.device)
    gradients = torch.empty(logits.shape if with_gradient else (0,), dtype=logits.dtype, device=logits.device)
    if num_rows:
        _policy_loss_from_logits_kernel[(num_rows,)](
            terms,
            gradients,
            logits,
            *constants,
            *options.numbers,
            options.max_log_ratio,
            options.kl_coef,
            options.entropy_coef,
            logits.stride(0),
            vocab_size,
            num_rows,
            HAS_OLD=constants.old_logprobs is not None,
            HAS_REF=constants.ref_logprobs is not None,
            HAS_WEIGHTS=constants.token_weights is not None,
            FORMULA=options.formula,
            KL=options.kl_kind,
            KL_WEIGHTED=options.kl_weighted,
            ENTROPY=options.entropy_coef != 0,
            GRADIENT=with_gradient,
            BLOCK=surprisal.BLOCK,
            THREADS=surprisal.THREADS,
            num_warps=surprisal.num_warps(),
            enable_fp_fusion=FP_FUSION,
        )
    return terms, gradients


def scale_gradient(gradients: Tensor, factor: Tensor) -> None:
    """Multiply the gradients by one number, in place; where that is 1, they are neither read nor written."""
    if gradients.numel():
        programs = triton.cdiv(gradients.numel(), SCALE_BLOCK)
        _scale_gradient_kernel[(programs,)](
            gradients, factor, gradients.numel(), BLOCK=SCALE_BLOCK, num_warps=8, enable_fp_fusion=FP_FUSION
        )
