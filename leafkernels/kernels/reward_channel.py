"""The reward channel of few tokens: all layers' wide halves in one product, their narrow ones in one launch.

    u_0 = silu(W_0 norm(h_0))        u_i = silu(W_i norm([h_i; u_{i-1}])) + u_{i-1}

The norm couples both halves by one number only, |h|^2 + |u|^2. So one kernel divides every layer's h by its own root
and notes |h|^2, one batched product multiplies all of them with their halves of W, and in a second kernel a program
takes a token through the layers: it corrects the root, and adds the R x R half of W for u, which stays in registers.

Source: SLA, arXiv 2503.00029; the released server launches five kernels a layer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leafkernels.kernels._shared import FP_FUSION, rounded_product

BLOCK = 2048  # 16 bytes a thread, of bfloat16
NUM_WARPS = 8
TILE = 8192  # elements of W that are read at a time: 32 registers a thread, and as many for their sums
MOST_COLUMNS = 32  # of them; 128 bytes in float32


@triton.jit
def _load(ptr, base, start, size, BLOCK: tl.constexpr):
    """Numbers [start, start + BLOCK) of the row at ``ptr + base`` in float32, 0 from ``size`` on.

    Sizes are multiples of 16 nearly always: then masks hold for 16 at a time, and the last block is read as wide as the
    others. It is often the only one.
    """
    offs = start + tl.arange(0, BLOCK)
    if (base % 16 == 0) & (size % 16 == 0):
        block = tl.load(ptr + base // 16 * 16 + offs, mask=offs < size // 16 * 16, other=0.0)
    else:
        block = tl.load(ptr + base + offs, mask=offs < size, other=0.0)
    return block.to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "size"])
def _normalize_hidden_kernel(normal_ptr, squares_ptr, hidden_ptr, norm_ptr, eps, num_tokens, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base, norm_base = row * size, row // num_tokens * size
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(0, tl.cdiv(size, BLOCK)):
        hidden = _load(hidden_ptr, base, block * BLOCK, size, BLOCK)
        total += hidden * hidden
    square = tl.sum(total, axis=0)
    tl.store(squares_ptr + row, square)
    scale = 1.0 / tl.sqrt_rn(square / size + eps)
    for block in range(0, tl.cdiv(size, BLOCK)):
        start = block * BLOCK
        hidden = _load(hidden_ptr, base, start, size, BLOCK)
        weight = _load(norm_ptr, norm_base, start, size, BLOCK)
        normal = (hidden * scale * weight).to(normal_ptr.dtype.element_ty)
        offs = start + tl.arange(0, BLOCK)
        if (base % 16 == 0) & (size % 16 == 0):
            tl.store(normal_ptr + base // 16 * 16 + offs, normal, mask=offs < size // 16 * 16)
        else:
            tl.store(normal_ptr + base + offs, normal, mask=offs < size)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["num_layers", "num_tokens", "size"])
def _channel_state_kernel(
    states_ptr,
    projected_ptr,
    squares_ptr,
    norm_ptr,
    narrow_ptr,
    eps,
    num_layers,
    num_tokens,
    size,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    plane = num_tokens.to(tl.int64)
    offs_r, offs_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    pieces = tl.arange(0, BLOCK_R // BLOCK_C)[:, None]
    is_r = offs_r < WIDTH
    rows_ptr = narrow_ptr + offs_r[:, None] * WIDTH
    state = _silu(tl.load(projected_ptr + token * WIDTH + offs_r, mask=is_r, other=0.0).to(tl.float32))
    for layer in range(1, num_layers):
        at = plane * layer + token
        projected = tl.load(projected_ptr + at * WIDTH + offs_r, mask=is_r, other=0.0).to(tl.float32)
        square = tl.load(squares_ptr + at)
        norm = tl.load(norm_ptr + offs_r, mask=is_r, other=0.0).to(tl.float32)
        own_root = tl.sqrt_rn(square / size + eps)
        root = tl.sqrt_rn((square + tl.sum(rounded_product(state, state), axis=0)) / (size + WIDTH) + eps)
        normal = tl.reshape(state * norm / root, [BLOCK_R // BLOCK_C, BLOCK_C])
        sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for piece in range(0, BLOCK_R // BLOCK_C):
            columns = piece * BLOCK_C + offs_c
            inside = is_r[:, None] & (columns < WIDTH)[None, :]
            weights = tl.load(rows_ptr + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            # Registers have no index: the piece is what a sum leaves of all of them.
            numbers = tl.sum(tl.where(pieces == piece, normal, 0.0), axis=0)
            sums += weights * numbers[None, :]
        state += _silu(projected * (own_root / root) + tl.sum(sums, axis=1))
        norm_ptr += WIDTH
        rows_ptr += WIDTH * WIDTH
    tl.store(states_ptr + token * WIDTH + offs_r, state.to(states_ptr.dtype.element_ty), mask=is_r)


def tile(width: int) -> tuple[int, int]:
    """Rows and columns of W that a program reads at a time."""
    rows = max(triton.next_power_of_2(width), 2)
    return rows, max(1, min(rows, MOST_COLUMNS, TILE // rows))


def channel_state(
    hidden: Tensor, norm_wide: Tensor, norm_narrow: Tensor, wide: Tensor, narrow: Tensor, eps: float
) -> Tensor:
    """u_{n-1} (M, R) of M tokens, in the dtype of the weights, from what their n layers read, (n, M, D).

    ``norm_wide`` (n, D) and ``wide`` (n, R, D) belong to the hidden states, ``norm_narrow`` (n - 1, R) and ``narrow``
    (n - 1, R, R) to the channel. All sums but those of the batched product are in float32.
    """
    num_layers, num_tokens, size = hidden.shape
    width = wide.shape[1]
    states = torch.empty((num_tokens, width), dtype=wide.dtype, device=hidden.device)
    if num_tokens == 0:
        return states
    normal = torch.empty(hidden.shape, dtype=wide.dtype, device=hidden.device)
    squares = torch.empty((num_layers, num_tokens), dtype=torch.float32, device=hidden.device)
    _normalize_hidden_kernel[(num_layers * num_tokens,)](
        normal,
        squares,
        hidden.contiguous(),
        norm_wide.contiguous(),
        float(eps),
        num_tokens,
        size,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=FP_FUSION,
    )
    rows, columns = tile(width)
    _channel_state_kernel[(num_tokens,)](
        states,
        torch.bmm(normal, wide.transpose(1, 2)),
        squares,
        norm_narrow.contiguous(),
        narrow.contiguous(),
        float(eps),
        num_layers,
        num_tokens,
        size,
        WIDTH=width,
        BLOCK_R=rows,
        BLOCK_C=columns,
        num_warps=NUM_WARPS,
        enable_fp_fusion=FP_FUSION,
    )
    return states
