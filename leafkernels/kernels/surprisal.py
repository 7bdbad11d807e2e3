"""Surprisal of the sampled id and entropy over the vocabulary, in one pass over the logits; and their gradient.

With x = logits / temperature, m = max x, n the number of ids at m, and over the others r = sum e^(x - m) and
t = sum (x - m) e^(x - m):

    surprisal = log n + log1p(r / n) - (x_id - m)            entropy = log n + log1p(r / n) - t / (n + r)

All terms of the entropy are >= 0, so nothing cancels, however peaked or shifted the row. When m rises by d, what was at
the old m joins the rest: r becomes (r + n) e^-d, and t becomes (t - d (r + n)) e^-d. Partial states of one row, of
blocks, of programs or of tensor-parallel ranks, merge by the same rule in any order.

    d surprisal / d x_j = p_j - [j = id]                     d entropy / d x_j = -p_j (log p_j + entropy)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._rows import load_block, num_splits, store_block

BLOCK = 4096  # ids at a time; tests shrink it to cross blocks with small vocabularies
NUM_WARPS = 8  # of a program with such a block; bench/tune.py tries others
MAX_SPLITS = 64  # programs that share a row at most; as many states are merged at once
ROWS = 4  # rows whose states one program merges
LOG2_E = tl.constexpr(1.4426950408889634)

# e^-10,000 is 0 in every dtype. What lies further below the top adds nothing, not -inf * 0: banned ids are -inf, or the
# least finite number, which a temperature below 1 takes to -inf.
FLOOR = tl.constexpr(-1e4)


@triton.jit
def fold(m, n, r, t, x, inv_temperature):
    """Take a block of logits into the running state: m a scalar, the others one for each lane."""
    top = tl.maximum(m, tl.max(x, axis=0))
    rises = top > m
    # Of a row that begins with banned ids only, nothing is known yet; -inf - -inf must not be asked for.
    anchor = tl.where(top == float("-inf"), 0.0, top)
    fade, drop = _fade(m, anchor, inv_temperature)
    # What was at the old top is among the rest now.
    t = tl.where(rises, fade * (t + drop * (r + n)), t)
    r = tl.where(rises, fade * (r + n), r)
    n = tl.where(rises, 0.0, n)

    z = (x - anchor) * inv_temperature
    e = tl.exp2(z * LOG2_E)
    is_top = x == anchor
    n += tl.where(is_top, 1.0, 0.0)
    r += tl.where(is_top, 0.0, e)
    t += tl.where(z < FLOOR, 0.0, z * e)
    return top, n, r, t


@triton.jit
def _fade(m, top, inv_temperature):
    """e^(m - top) and m - top, both 0 where the former is: nothing of a state so far below counts."""
    drop = (m - top) * inv_temperature
    is_far = drop < FLOOR
    return tl.where(is_far, 0.0, tl.exp2(drop * LOG2_E)), tl.where(is_far, 0.0, drop)


@triton.jit
def log_total_entropy(m, n, r, t):
    """log sum e^(x - m) and the entropy, of a whole row's sums; NaN where there is no distribution."""
    # log1p, which Triton has not: exact where r / n rounds away beside 1, and where it does not.
    ratio = r / n
    one_plus = 1.0 + ratio
    log1p = tl.where(one_plus == 1.0, ratio, tl.log(one_plus) * (ratio / (one_plus - 1.0)))
    is_bad = (m == float("-inf")) | (m == float("inf"))
    log_total = tl.where(is_bad, float("nan"), tl.log(n) + log1p)
    return log_total, log_total - t / (n + r)


@triton.jit
def logit_gradient(
    x, is_token, top, log_total, entropy, of_surprisal, of_entropy, inv_temperature, ENTROPY: tl.constexpr
):
    """Gradient of a block of logits from those of the row's surprisal and entropy, already over the temperature."""
    log_p = (x - top) * inv_temperature - log_total
    p = tl.exp2(log_p * LOG2_E)
    gradient = of_surprisal * tl.where(is_token, p - 1.0, p)
    if ENTROPY:
        gradient -= of_entropy * tl.where(log_p < FLOOR, 0.0, p * (log_p + entropy))
    return gradient


@triton.jit
def pick(logits_ptr, base, token, vocab_size):
    """The logit of the sampled id; NaN, and nothing read, where it lies outside the row."""
    in_row = (token >= 0) & (token < vocab_size)
    return tl.load(logits_ptr + base + token, mask=in_row, other=float("nan")).to(tl.float32)


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
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    m = tl.full([], float("-inf"), tl.float32)
    n = tl.zeros([BLOCK], tl.float32)
    r = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    is_live = vocab_size > 0
    if HAS_MASK:
        is_live = tl.load(mask_ptr + row) != 0
    if is_live:
        inv_temperature = 1.0 / tl.load(temperature_ptr + row).to(tl.float32)
        base = row * stride_logits_row
        first = split * split_blocks
        last = tl.minimum(first + split_blocks, tl.cdiv(vocab_size, BLOCK))
        for block in range(first, last):
            x = load_block(logits_ptr, base, block * BLOCK, vocab_size, float("-inf"), BLOCK).to(tl.float32)
            m, n, r, t = fold(m, n, r, t, x, inv_temperature)
        if split == 0:
            tl.store(picked_ptr + row, pick(logits_ptr, base, tl.load(token_ids_ptr + row).to(tl.int64), vocab_size))
    elif split == 0:
        tl.store(picked_ptr + row, float("nan"))
    plane = num_rows.to(tl.int64) * num_splits
    state_ptr = states_ptr + row * num_splits + split
    tl.store(state_ptr, m)
    tl.store(state_ptr + plane, tl.sum(n, axis=0))
    tl.store(state_ptr + 2 * plane, tl.sum(r, axis=0))
    tl.store(state_ptr + 3 * plane, tl.sum(t, axis=0))


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
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    splits = tl.arange(0, SPLITS)
    state_ptrs = states_ptr + rows[:, None] * num_splits + splits
    is_state = in_rows[:, None] & (splits < num_splits)
    plane = num_rows.to(tl.int64) * num_splits
    m = tl.load(state_ptrs, mask=is_state, other=float("-inf"))
    n = tl.load(state_ptrs + plane, mask=is_state, other=0.0)
    r = tl.load(state_ptrs + 2 * plane, mask=is_state, other=0.0)
    t = tl.load(state_ptrs + 3 * plane, mask=is_state, other=0.0)
    inv_temperature = 1.0 / tl.load(temperature_ptr + rows, mask=in_rows, other=1.0).to(tl.float32)

    top = tl.max(m, axis=1)
    anchor = tl.where(top == float("-inf"), 0.0, top)[:, None]
    is_top = m == anchor
    fade, drop = _fade(m, anchor, inv_temperature[:, None])
    log_total, entropy = log_total_entropy(
        top,
        tl.sum(tl.where(is_top, n, 0.0), axis=1),
        tl.sum(tl.where(is_top, r, fade * (r + n)), axis=1),
        tl.sum(tl.where(is_top, t, fade * (t + drop * (r + n))), axis=1),
    )
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
    first = tl.program_id(1) * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(vocab_size, BLOCK))
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
        for block in range(first, last):
            start = block * BLOCK
            is_token = start + tl.arange(0, BLOCK) == token
            x = load_block(logits_ptr, base, start, vocab_size, float("-inf"), BLOCK).to(tl.float32)
            gradient = logit_gradient(
                x, is_token, top, log_total, entropy, of_surprisal, of_entropy, inv_temperature, HAS_ENTROPY
            )
            if HAS_SOFTCAP:
                # Capped logits c tanh(y / c) were given: their own derivative in y.
                capped = x * inv_softcap
                gradient *= 1.0 - capped * capped
            store_block(gradients_ptr, out, start, vocab_size, gradient.to(gradients_ptr.dtype.element_ty), BLOCK)
    else:
        for block in range(first, last):
            zero = tl.zeros([BLOCK], gradients_ptr.dtype.element_ty)
            store_block(gradients_ptr, out, block * BLOCK, vocab_size, zero, BLOCK)


def _splits(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """Programs for each row, and blocks for each of them: several where there are too few rows to fill a device."""
    splits = min(MAX_SPLITS, num_splits(vocab_size, BLOCK, num_rows))
    return splits, triton.cdiv(triton.cdiv(vocab_size, BLOCK), splits)


def launch_surprisal_states(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Partial states (4, N, splits) m, n, r, t of each row's stretches, and the logit of its id, (N,); float32."""
    num_rows, vocab_size = logits.shape
    splits, split_blocks = _splits(num_rows, vocab_size)
    states = torch.empty((4, num_rows, splits), dtype=torch.float32, device=logits.device)
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
            num_warps=NUM_WARPS,
        )
    return states, picked


def launch_merge_surprisal_states(
    states: Tensor, picked: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``launch_surprisal_entropy`` gives, from ``states`` (4, N, at most MAX_SPLITS), contiguous."""
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
        )
    return outputs  # type: ignore[return-value]


def launch_surprisal_entropy(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Surprisal, entropy, and what the gradient needs (the top logit and log sum e^(x - top)): float32 (N,) each."""
    states, picked = launch_surprisal_states(logits, token_ids, temperature, mask)
    return launch_merge_surprisal_states(states, picked, temperature, mask)


def launch_surprisal_entropy_backward(
    gradients: Tensor,
    surprisal_gradients: Tensor,
    entropy_gradients: Tensor | None,
    surprisal: Tensor,
    entropy: Tensor,
    tops: Tensor,
    log_totals: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
) -> None:
    """Write the gradient of the logits, 0 in masked rows, into ``gradients`` (N, V), which may be ``logits``."""
    num_rows, vocab_size = logits.shape
    if not logits.numel():
        return
    splits, split_blocks = _splits(num_rows, vocab_size)
    _surprisal_entropy_backward_kernel[(num_rows, splits)](
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
        1.0 / (softcap or 1.0),
        logits.stride(0),
        gradients.stride(0),
        vocab_size,
        split_blocks,
        HAS_ENTROPY=entropy_gradients is not None,
        HAS_MASK=mask is not None,
        HAS_SOFTCAP=softcap is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
