"""Surprisal of the sampled id and entropy over the vocabulary, in one pass over the logits; and their gradient.

With x = logits / temperature, m = max x, n the number of ids at m, and over the others r = sum e^(x - m) and
t = sum (x - m) e^(x - m):

    surprisal = log n + log1p(r / n) - (x_id - m)            entropy = log n + log1p(r / n) - t / (n + r)

All terms of the entropy are >= 0, so nothing cancels, however peaked or shifted the row. When a block raises m by d,
what was at the old m joins the rest: r becomes (r + n) e^-d, and t becomes (t - d (r + n)) e^-d.

    d surprisal / d x_j = p_j - [j = id]                     d entropy / d x_j = -p_j (log p_j + entropy)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._rows import load_block, store_block

BLOCK = 4096  # ids at a time; tests shrink it to cross blocks with small vocabularies
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _fold(m, n, r, t, x, inv_temperature):
    """Take a block of logits into the running state: m a scalar, the others one for each lane."""
    top = tl.maximum(m, tl.max(x, axis=0))
    rises = top > m
    # Of a row that begins with banned ids only, nothing is known yet; -inf - -inf must not be asked for.
    anchor = tl.where(top == float("-inf"), 0.0, top)
    drop = tl.where(m == float("-inf"), 0.0, (m - anchor) * inv_temperature)
    fade = tl.where(m == float("-inf"), 0.0, tl.exp2(drop * LOG2_E))
    # What was at the old top is among the rest now.
    t = tl.where(rises, fade * (t + drop * (r + n)), t)
    r = tl.where(rises, fade * (r + n), r)
    n = tl.where(rises, 0.0, n)

    z = (x - anchor) * inv_temperature
    e = tl.exp2(z * LOG2_E)
    is_top = x == anchor
    n += tl.where(is_top, 1.0, 0.0)
    r += tl.where(is_top, 0.0, e)
    # A banned id adds 0, not -inf * 0; what is not a number stays so.
    t += tl.where(x == float("-inf"), 0.0, z * e)
    return top, n, r, t


@triton.jit(do_not_specialize=["stride_logits_row", "vocab_size"])
def _surprisal_entropy_kernel(
    surprisal_ptr,
    entropy_ptr,
    tops_ptr,
    log_totals_ptr,
    logits_ptr,
    token_ids_ptr,
    temperature_ptr,
    mask_ptr,
    stride_logits_row,
    vocab_size,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            tl.store(surprisal_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            tl.store(tops_ptr + row, 0.0)
            tl.store(log_totals_ptr + row, 0.0)
            return
    inv_temperature = 1.0 / tl.load(temperature_ptr + row).to(tl.float32)
    base = row * stride_logits_row
    m = float("-inf")
    n = tl.zeros([BLOCK], tl.float32)
    r = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    for block in range(0, tl.cdiv(vocab_size, BLOCK)):
        x = load_block(logits_ptr, base, block * BLOCK, vocab_size, float("-inf"), BLOCK).to(tl.float32)
        m, n, r, t = _fold(m, n, r, t, x, inv_temperature)

    ties = tl.sum(n, axis=0)
    rest = tl.sum(r, axis=0)
    # log1p, which Triton has not: exact where rest / ties rounds away beside 1, and where it does not.
    ratio = rest / ties
    one_plus = 1.0 + ratio
    log1p = tl.where(one_plus == 1.0, ratio, tl.log(one_plus) * (ratio / (one_plus - 1.0)))
    log_total = tl.log(ties) + log1p
    entropy = log_total - tl.sum(t, axis=0) / (ties + rest)

    token = tl.load(token_ids_ptr + row).to(tl.int64)
    in_row = (token >= 0) & (token < vocab_size)
    x_token = tl.load(logits_ptr + base + token, mask=in_row, other=float("nan")).to(tl.float32)
    is_bad = (m == float("-inf")) | (m == float("inf"))
    surprisal = log_total - (x_token - m) * inv_temperature
    tl.store(surprisal_ptr + row, tl.where(is_bad, float("nan"), surprisal))
    tl.store(entropy_ptr + row, tl.where(is_bad, float("nan"), entropy))
    tl.store(tops_ptr + row, m)
    tl.store(log_totals_ptr + row, tl.where(is_bad, float("nan"), log_total))


@triton.jit(do_not_specialize=["stride_logits_row", "stride_gradients_row", "vocab_size"])
def _surprisal_entropy_backward_kernel(
    gradients_ptr,
    surprisal_gradients_ptr,
    entropy_gradients_ptr,
    entropy_ptr,
    tops_ptr,
    log_totals_ptr,
    logits_ptr,
    token_ids_ptr,
    temperature_ptr,
    mask_ptr,
    stride_logits_row,
    stride_gradients_row,
    vocab_size,
    HAS_ENTROPY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out = row * stride_gradients_row
    is_live = vocab_size > 0
    if HAS_MASK:
        is_live = tl.load(mask_ptr + row) != 0
    if is_live:
        inv_temperature = 1.0 / tl.load(temperature_ptr + row).to(tl.float32)
        base = row * stride_logits_row
        top = tl.load(tops_ptr + row)
        log_total = tl.load(log_totals_ptr + row)
        token = tl.load(token_ids_ptr + row).to(tl.int64)
        of_surprisal = tl.load(surprisal_gradients_ptr + row).to(tl.float32) * inv_temperature
        of_entropy = 0.0
        entropy = 0.0
        if HAS_ENTROPY:
            of_entropy = tl.load(entropy_gradients_ptr + row).to(tl.float32) * inv_temperature
            entropy = tl.load(entropy_ptr + row)
        for block in range(0, tl.cdiv(vocab_size, BLOCK)):
            start = block * BLOCK
            offs = start + tl.arange(0, BLOCK)
            x = load_block(logits_ptr, base, start, vocab_size, float("-inf"), BLOCK).to(tl.float32)
            log_p = (x - top) * inv_temperature - log_total
            p = tl.exp2(log_p * LOG2_E)
            gradient = of_surprisal * tl.where(offs == token, p - 1.0, p)
            if HAS_ENTROPY:
                # p log p is 0 for a banned id, not 0 * -inf.
                gradient -= of_entropy * tl.where(x == float("-inf"), 0.0, p * (log_p + entropy))
            store_block(gradients_ptr, out, start, vocab_size, gradient.to(gradients_ptr.dtype.element_ty), BLOCK)
    else:
        for block in range(0, tl.cdiv(vocab_size, BLOCK)):
            zero = tl.zeros([BLOCK], gradients_ptr.dtype.element_ty)
            store_block(gradients_ptr, out, block * BLOCK, vocab_size, zero, BLOCK)


def launch_surprisal_entropy(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Surprisal, entropy, and what the gradient needs (the top logit and log sum e^(x - top)): float32 (N,) each."""
    num_rows, vocab_size = logits.shape
    outputs = tuple(torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(4))
    if num_rows:
        _surprisal_entropy_kernel[(num_rows,)](
            *outputs,
            logits,
            token_ids,
            temperature,
            mask,
            logits.stride(0),
            vocab_size,
            HAS_MASK=mask is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return outputs  # type: ignore[return-value]


def launch_surprisal_entropy_backward(
    surprisal_gradients: Tensor,
    entropy_gradients: Tensor | None,
    entropy: Tensor,
    tops: Tensor,
    log_totals: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Gradient of the logits (N, V) in their dtype; 0 in masked rows."""
    num_rows, vocab_size = logits.shape
    gradients = torch.empty((num_rows, vocab_size), dtype=logits.dtype, device=logits.device)
    if gradients.numel():
        _surprisal_entropy_backward_kernel[(num_rows,)](
            gradients,
            surprisal_gradients.contiguous(),
            None if entropy_gradients is None else entropy_gradients.contiguous(),
            entropy,
            tops,
            log_totals,
            logits,
            token_ids,
            temperature,
            mask,
            logits.stride(0),
            vocab_size,
            vocab_size,
            HAS_ENTROPY=entropy_gradients is not None,
            HAS_MASK=mask is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return gradients
