"""Surprisal of the sampled id and entropy over the vocabulary, in one pass over the logits; and their gradient.

A set of logits x of one row, at temperature T, is summed up in a state (m, r, t): m is their maximum, one logit at the
maximum counts 1 and is left out, and over the others

    r = sum e^((x - m) / T)                     t = sum (x - m) e^((x - m) / T), in logits

so that, of the whole row,

    surprisal = log1p(r) - (x_id - m) / T       entropy = log1p(r) - t / (T (1 + r))

All terms of the entropy are >= 0, so nothing cancels, however peaked or shifted the row; what is left beside a top that
leads by far stands in r, where no 1 rounds it away.

**The one rule of merging.** Let states i be of disjoint sets of one row, and m the largest m_i. Set i counts 1 + r_i
from its own top. Counted from m, each of its terms is e^(f_i) times as large with f_i = (m_i - m) / T, and each of its
logits m_i - m lower:

    r = k - 1 + sum over the k sets with m_i = m of r_i + sum over the others of e^(f_i) (1 + r_i)
    t = sum of e^(f_i) (t_i + (m_i - m) (1 + r_i))

of the k ones at the top, one is left out. Where k = 1, as in a peaked row, no 1 is added to r and taken away again. The
rule is associative; threads, programs that share a row, and ranks that share a vocabulary merge by it. A set without
any logit above -inf is (the least finite number, -1, 0): its 1 + r is 0.

The loop keeps a state for each thread and, of r, only the plain sum s = 1 + r. That loses r in one place: in the thread
that holds the row's top, if nothing else there comes near. Therefore the program looks at that thread's logits a second
time, a few hundred of them, and sums them without the top. All others have r = s - 1: what that loses is small beside
their own top, which counts.

    d surprisal / d x_j = (p_j - [j = id]) / T               d entropy / d x_j = -p_j (log p_j + entropy) / T

which are p_j (a + b (x_j - m)) with numbers a and b of the row, but for the sampled id: it is written afterwards, with
e^-surprisal - 1 for p - 1, which is exact where p is 1 to within rounding.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import (
    FP_FUSION,
    LOG2_E,
    aligned_row,
    expm1,
    log1p,
    num_splits,
    rounded_product,
    store_block,
    whole_blocks,
)

if TYPE_CHECKING:
    from leafkernels.vocabulary.inputs import RowStatistics, SampledTokens

BLOCK = 4096  # ids at a time; tests shrink it to cross blocks with small vocabularies
THREADS = 256  # that share a block; bench/tune.py tries others
MAX_SPLITS = 64  # programs that share a row at most; as many states are merged at once
ROWS = 4  # rows whose states one program merges

# Where tops begin. The least finite number itself is a logit: what masks write who do without -inf.
LEAST = tl.constexpr(-3.4028234663852886e38)

# e^-10,000 is 0 in every dtype. What lies further below the top is brought there: it adds 0 and not -inf * 0. Such are
# banned ids, -inf, or the least finite number, which a temperature below 1 takes to -inf.
FLOOR = tl.constexpr(-1e4)

# Threads of a warp, at most. A block of fewer ids has several threads read each, and none may write a gradient over a
# logit before all have read it.
WARP = tl.constexpr(64)


@triton.jit
def merge(m, r, t, top, inv_temperature, axis: tl.constexpr):
    """r and t of all states along an axis, of which ``top`` is the largest m."""
    # m, r, t: (THREADS,) with a scalar top, or (ROWS, SPLITS) with a top (ROWS, 1).
    is_top = m == top
    drop = tl.maximum(m - top, FLOOR / inv_temperature, propagate_nan=tl.PropagateNan.ALL)
    fade = tl.exp2(drop * (inv_temperature * LOG2_E))
    ones = tl.sum(tl.where(is_top, 1.0, 0.0), axis=axis)
    r_of_all = ones - 1.0 + tl.sum(tl.where(is_top, r, rounded_product(fade, 1.0 + r)), axis=axis)
    return r_of_all, tl.sum(rounded_product(fade, t + drop * (1.0 + r)), axis=axis)


@triton.jit
def blocks_of(logits_ptr, base, vocab_size, split, split_blocks, BLOCK: tl.constexpr):
    """Blocks [first, last) of a row that fall to a program, counted from the word in which the row begins."""
    _, before = aligned_row(logits_ptr, base)
    first = split * split_blocks
    return first, tl.minimum(first + split_blocks, tl.cdiv(before + vocab_size, BLOCK))


@triton.jit
def _fold(m, s, t, x, floor, log2_scale, THREADS: tl.constexpr, WORD: tl.constexpr):
    """Take a block into the states of the threads, each of which has whole words of it."""
    # (BLOCK,) -> (words of a thread, THREADS, WORD): as a wide load hands the block to the threads, so nothing moves.
    x = tl.reshape(x.to(tl.float32), [x.shape[0] // (THREADS * WORD), THREADS, WORD])
    top = tl.maximum(m, tl.max(tl.max(x, axis=2), axis=0))
    drop = tl.maximum(m - top, floor)
    fade = tl.exp2(drop * log2_scale)
    d = tl.maximum(x - top[None, :, None], floor, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(d * log2_scale)
    # Words first, which a thread holds alone: ids of a word lie in several where rows begin anywhere.
    products = d * e if x.shape[0] > 1 else rounded_product(d, e)
    t = fade * (t + drop * s) + tl.sum(tl.sum(products, axis=0), axis=1)
    s = fade * s + tl.sum(tl.sum(e, axis=0), axis=1)
    return top, s, t


@triton.jit
def row_state(logits_ptr, base, length, first, last, inv_temperature, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """The state m, r, t of a row's blocks [first, last), counted from the word in which the row begins."""
    WORD: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    floor = FLOOR / inv_temperature
    log2_scale = inv_temperature * LOG2_E
    row_ptr, before = aligned_row(logits_ptr, base)
    low, high = whole_blocks(first, last, before, length, BLOCK)
    # m, s, t: (THREADS,). s begins at 0, the sum of no logit.
    m = tl.full([THREADS], LEAST, tl.float32)
    s = tl.zeros([THREADS], tl.float32)
    t = tl.zeros([THREADS], tl.float32)
    for block in range(low, high):
        x = tl.load(row_ptr + block * BLOCK + tl.arange(0, BLOCK))
        m, s, t = _fold(m, s, t, x, floor, log2_scale, THREADS, WORD)
    # The blocks that are not whole, at most two.
    for k in range(first, last - (high - low)):
        offs = tl.where(k < low, k, k + high - low) * BLOCK + tl.arange(0, BLOCK)
        in_row = (offs >= before) & (offs < before + length)
        x = tl.load(row_ptr + offs, mask=in_row, other=float("-inf"))
        m, s, t = _fold(m, s, t, x, floor, log2_scale, THREADS, WORD)

    top, thread = tl.max(m, axis=0, return_indices=True)
    # The logits of that thread once more, a word for each of all threads.
    NEXT: tl.constexpr = THREADS * WORD
    ones = tl.zeros([THREADS, WORD], tl.float32)
    r = tl.zeros([THREADS, WORD], tl.float32)
    for word in range(first * (BLOCK // NEXT), last * (BLOCK // NEXT), THREADS):
        # words: (THREADS,); offs, x, d: (THREADS, WORD).
        words = word + tl.arange(0, THREADS)
        offs = words[:, None] * NEXT + thread * WORD + tl.arange(0, WORD)
        in_row = (words[:, None] < last * (BLOCK // NEXT)) & (offs >= before) & (offs < before + length)
        x = tl.load(row_ptr + offs, mask=in_row, other=float("-inf")).to(tl.float32)
        d = tl.maximum(x - top, floor, propagate_nan=tl.PropagateNan.ALL)
        ones += tl.where(d == 0.0, 1.0, 0.0)
        r += tl.where(d == 0.0, 0.0, tl.exp2(d * log2_scale))
    beside = tl.where(tl.arange(0, THREADS) == thread, tl.sum(ones) - 1.0 + tl.sum(r), s - 1.0)
    r_of_all, t_of_all = merge(m, beside, t, top, inv_temperature, 0)
    return top, r_of_all, t_of_all


@triton.jit
def log_total_entropy(m, r, t, inv_temperature):
    """log sum e^((x - m) / T) and the entropy, of a whole row's state; NaN where there is no distribution."""
    log_total = tl.where((r < 0.0) | (m == float("inf")), float("nan"), log1p(r))
    return log_total, log_total - t * inv_temperature / (1.0 + r)


@triton.jit
def pick(logits_ptr, base, token, vocab_size):
    """The logit of the sampled id; NaN, and nothing read, where it lies outside the row."""
    in_row = (token >= 0) & (token < vocab_size)
    return tl.load(logits_ptr + base + token, mask=in_row, other=float("nan")).to(tl.float32)


@triton.jit
def _gradient(x, top, a, b, log2_total, floor, log2_scale, inv_softcap, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr):
    x = x.to(tl.float32)
    d = tl.maximum(x - top, floor, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(d * log2_scale - log2_total)
    if ENTROPY:
        gradient = p * (a + b * d)
    else:
        gradient = p * a
    if SOFTCAP:
        # Capped logits c tanh(y / c) were given: their own derivative in y.
        capped = x * inv_softcap
        gradient *= 1.0 - capped * capped
    return gradient


@triton.jit
def write_gradient(
    gradients_ptr,
    out,
    logits_ptr,
    base,
    length,
    first,
    last,
    token,
    surprisal,
    entropy,
    top,
    log_total,
    grad_surprisal,
    grad_entropy,
    inv_temperature,
    inv_softcap,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of a row's blocks [first, last) from those of its surprisal and entropy.

    The last block comes first: after a fold it is the likeliest to be in a cache still.
    """
    # An id outside of the vocabulary has no surprisal, and a loss that counts it no gradient.
    grad_surprisal = tl.where((surprisal != surprisal) & (grad_surprisal != 0.0), surprisal, grad_surprisal)
    grad_surprisal *= inv_temperature
    grad_entropy *= inv_temperature
    # The two numbers of the row: its gradient is p (a + b d), d in logits below the top.
    a = grad_surprisal + grad_entropy * (log_total - entropy)
    b = -grad_entropy * inv_temperature
    log2_total = log_total * LOG2_E
    log2_scale = inv_temperature * LOG2_E
    floor = FLOOR / inv_temperature
    row_ptr, before = aligned_row(logits_ptr, base)
    out_ptr, out_before = aligned_row(gradients_ptr, out)
    low, high = whole_blocks(first, last, before, length, BLOCK)
    if before != out_before:
        high = low  # the two rows do not share their words, so that no block is whole in both
    offs = tl.arange(0, BLOCK)
    for done in range(low, high):
        start = (low + high - 1 - done) * BLOCK
        x = tl.load(row_ptr + start + offs)
        gradient = _gradient(x, top, a, b, log2_total, floor, log2_scale, inv_softcap, ENTROPY, SOFTCAP)
        if BLOCK < WARP:
            tl.debug_barrier()
        tl.store(out_ptr + start + offs, gradient.to(gradients_ptr.dtype.element_ty))
    for k in range(first, last - (high - low)):
        at = tl.where(k < low, k, k + high - low) * BLOCK + offs
        in_row = (at >= before) & (at < before + length)
        x = tl.load(row_ptr + at, mask=in_row, other=0.0)
        gradient = _gradient(x, top, a, b, log2_total, floor, log2_scale, inv_softcap, ENTROPY, SOFTCAP)
        if BLOCK < WARP:
            tl.debug_barrier()
        tl.store(gradients_ptr + out - before + at, gradient.to(gradients_ptr.dtype.element_ty), mask=in_row)

    if (token >= 0) & (token < length) & (token + before >= first * BLOCK) & (token + before < last * BLOCK):
        p = tl.exp(-surprisal)
        # p - 1, which the formula of the other ids would round away where p is near 1.
        gradient = grad_surprisal * expm1(-surprisal)
        if ENTROPY:
            gradient += tl.where(p == 0.0, 0.0, grad_entropy * p * (surprisal - entropy))
        if SOFTCAP:
            capped = (top + (log_total - surprisal) / inv_temperature) * inv_softcap
            gradient *= 1.0 - capped * capped
        # After the block that holds it was written, by another thread.
        tl.debug_barrier()
        tl.store(gradients_ptr + out + token, gradient.to(gradients_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["stride_logits_row", "vocab_size", "num_rows", "num_splits", "split_blocks"])
def _surprisal_states_kernel(
    states_ptr,
    picked_ptr,
    logits_ptr,
    token_ids_ptr,
    temperature_ptr,
    mask_ptr,
    stride_logits_row,
    vocab_size,
    num_rows,
    num_splits,
    split_blocks,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    m = tl.full([], LEAST, tl.float32)
    r = tl.full([], -1.0, tl.float32)
    t = tl.full([], 0.0, tl.float32)
    is_live = vocab_size > 0
    if HAS_MASK:
        is_live = tl.load(mask_ptr + row) != 0
    if is_live:
        inv_temperature = 1.0 / tl.load(temperature_ptr + row).to(tl.float32)
        base = row * stride_logits_row
        first, last = blocks_of(logits_ptr, base, vocab_size, split, split_blocks, BLOCK)
        m, r, t = row_state(logits_ptr, base, vocab_size, first, last, inv_temperature, BLOCK, THREADS)
        if split == 0:
            tl.store(picked_ptr + row, pick(logits_ptr, base, tl.load(token_ids_ptr + row).to(tl.int64), vocab_size))
    elif split == 0:
        tl.store(picked_ptr + row, float("nan"))
    plane = num_rows.to(tl.int64) * num_splits
    # states: (3, N, splits), a plane for each of m, r and t.
    state_ptr = states_ptr + row * num_splits + split
    tl.store(state_ptr, m)
    tl.store(state_ptr + plane, r)
    tl.store(state_ptr + 2 * plane, t)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _merge_surprisal_states_kernel(
    surprisal_ptr,
    entropy_ptr,
    tops_ptr,
    log_totals_ptr,
    states_ptr,
    picked_ptr,
    temperature_ptr,
    mask_ptr,
    num_rows,
    num_splits,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    # rows: (ROWS,); splits: (SPLITS,); m, r, t: (ROWS, SPLITS), of which those that are no state count 0.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    splits = tl.arange(0, SPLITS)
    state_ptrs = states_ptr + rows[:, None] * num_splits + splits
    is_state = in_rows[:, None] & (splits < num_splits)
    plane = num_rows.to(tl.int64) * num_splits
    m = tl.load(state_ptrs, mask=is_state, other=LEAST)
    r = tl.load(state_ptrs + plane, mask=is_state, other=-1.0)
    t = tl.load(state_ptrs + 2 * plane, mask=is_state, other=0.0)
    inv_temperature = 1.0 / tl.load(temperature_ptr + rows, mask=in_rows, other=1.0).to(tl.float32)

    top = tl.max(m, axis=1)
    r, t = merge(m, r, t, top[:, None], inv_temperature[:, None], 1)
    log_total, entropy = log_total_entropy(top, r, t, inv_temperature)
    picked = tl.load(picked_ptr + rows, mask=in_rows, other=0.0)
    surprisal = log_total - (picked - top) * inv_temperature
    if HAS_MASK:
        is_live = tl.load(mask_ptr + rows, mask=in_rows, other=0) != 0
        surprisal = tl.where(is_live, surprisal, 0.0)
        entropy = tl.where(is_live, entropy, 0.0)
        top = tl.where(is_live, top, 0.0)
        log_total = tl.where(is_live, log_total, 0.0)
    tl.store(surprisal_ptr + rows, surprisal, mask=in_rows)
    tl.store(entropy_ptr + rows, entropy, mask=in_rows)
    tl.store(tops_ptr + rows, top, mask=in_rows)
    tl.store(log_totals_ptr + rows, log_total, mask=in_rows)


@triton.jit(do_not_specialize=["stride_logits_row", "stride_gradients_row", "vocab_size", "split_blocks"])
def _surprisal_entropy_backward_kernel(
    gradients_ptr,
    surprisal_gradients_ptr,
    entropy_gradients_ptr,
    surprisal_ptr,
    entropy_ptr,
    tops_ptr,
    log_totals_ptr,
    logits_ptr,
    token_ids_ptr,
    temperature_ptr,
    mask_ptr,
    inv_softcap,
    stride_logits_row,
    stride_gradients_row,
    vocab_size,
    split_blocks,
    HAS_ENTROPY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, last = blocks_of(logits_ptr, row * stride_logits_row, vocab_size, tl.program_id(1), split_blocks, BLOCK)
    is_live = vocab_size > 0
    if HAS_MASK:
        is_live = tl.load(mask_ptr + row) != 0
    if is_live:
        grad_entropy = 0.0
        entropy = 0.0
        if HAS_ENTROPY:
            grad_entropy = tl.load(entropy_gradients_ptr + row).to(tl.float32)
            entropy = tl.load(entropy_ptr + row)
        write_gradient(
            gradients_ptr,
            row * stride_gradients_row,
            logits_ptr,
            row * stride_logits_row,
            vocab_size,
            first,
            last,
            tl.load(token_ids_ptr + row).to(tl.int64),
            tl.load(surprisal_ptr + row),
            entropy,
            tl.load(tops_ptr + row),
            tl.load(log_totals_ptr + row),
            tl.load(surprisal_gradients_ptr + row).to(tl.float32),
            grad_entropy,
            1.0 / tl.load(temperature_ptr + row).to(tl.float32),
            inv_softcap,
            HAS_ENTROPY,
            HAS_SOFTCAP,
            BLOCK,
        )
    else:
        for block in range(first, last):
            # Written, not skipped: the memory is uninitialised, or holds the logits.
            zero = tl.zeros([BLOCK], gradients_ptr.dtype.element_ty)
            store_block(gradients_ptr, row * stride_gradients_row, block * BLOCK, vocab_size, zero, BLOCK)


def num_warps() -> int:
    """Warps of a program of ``THREADS`` threads."""
    return max(1, THREADS // 32)


def _splits(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """Programs for each row, several where there are too few rows to fill a device, and blocks for each program."""
    # Blocks are counted from the word in which a row begins, which may be 7 elements before it.
    most = vocab_size + 7
    splits = min(MAX_SPLITS, num_splits(most, BLOCK, num_rows))
    return splits, triton.cdiv(triton.cdiv(most, BLOCK), splits)


def surprisal_states(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Partial states (3, N, splits) m, r, t of each row's stretches, and the logit of its id, (N,); float32."""
    num_rows, vocab_size = logits.shape
    splits, split_blocks = _splits(num_rows, vocab_size)
    states = torch.empty((3, num_rows, splits), dtype=torch.float32, device=logits.device)
    picked = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        _surprisal_states_kernel[(num_rows, splits)](
            states,
            picked,
            logits,
            token_ids,
            temperature,
            mask,
            logits.stride(0),
            vocab_size,
            num_rows,
            splits,
            split_blocks,
            HAS_MASK=mask is not None,
            BLOCK=BLOCK,
            THREADS=THREADS,
            num_warps=num_warps(),
            enable_fp_fusion=FP_FUSION,
        )
    return states, picked


def merge_surprisal_states(
    states: Tensor, picked: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``surprisal_entropy`` gives, from ``states`` (3, N, at most MAX_SPLITS), contiguous."""
    _, num_rows, splits = states.shape
    outputs = tuple(torch.empty(num_rows, dtype=torch.float32, device=states.device) for _ in range(4))
    if num_rows:
        _merge_surprisal_states_kernel[(triton.cdiv(num_rows, ROWS),)](
            *outputs,
            states,
            picked,
            temperature,
            mask,
            num_rows,
            splits,
            HAS_MASK=mask is not None,
            ROWS=ROWS,
            SPLITS=MAX_SPLITS,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )
    return outputs  # type: ignore[return-value]


def surprisal_entropy(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Surprisal, entropy, and what the gradient needs (the top logit and log sum e^(x - top)): float32 (N,) each."""
    states, picked = surprisal_states(logits, token_ids, temperature, mask)
    return merge_surprisal_states(states, picked, temperature, mask)


def write_gradients(
    gradients: Tensor,
    logits: Tensor,
    grad_surprisal: Tensor,
    grad_entropy: Tensor | None,
    statistics: "RowStatistics",
    tokens: "SampledTokens",
    softcap: float | None = None,
) -> None:
    """Write the gradient of the logits, 0 in masked rows, into ``gradients`` (N, V), which may be ``logits``.

    With ``softcap`` the logits were capped, and it is the gradient of what they were before.
    """
    num_rows, vocab_size = logits.shape
    if not logits.numel():
        return
    splits, split_blocks = _splits(num_rows, vocab_size)
    _surprisal_entropy_backward_kernel[(num_rows, splits)](
        gradients,
        grad_surprisal.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
        *statistics,
        logits,
        *tokens,
        1.0 / (softcap or 1.0),
        logits.stride(0),
        gradients.stride(0),
        vocab_size,
        split_blocks,
        HAS_ENTROPY=grad_entropy is not None,
        HAS_MASK=tokens.mask is not None,
        HAS_SOFTCAP=softcap is not None,
        BLOCK=BLOCK,
        num_warps=num_warps(),
        enable_fp_fusion=FP_FUSION,
    )
