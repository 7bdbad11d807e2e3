"""What kernels share: a stretch of a row in blocks, how many programs to launch, and functions near their zeros."""

import triton
import triton.language as tl

# Said at each launch, because the default depends on the version of Triton: a product and a sum may be one instruction.
FP_FUSION = True

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def aligned_row(ptr, base):
    """Pointer to the 16-byte word in which the row at ``ptr + base`` begins, and the elements before the row in it.

    The division shows the compiler that the pointer is aligned: of a number read from memory it knows nothing.
    """
    WORD: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    return ptr + base // WORD * WORD, (base % WORD).to(tl.int32)


@triton.jit
def whole_blocks(first, last, before, length, BLOCK: tl.constexpr):
    """Blocks [low, high) among [first, last) that lie inside of a row, which are all but its first and last at most.

    Blocks are counted from the word that ``aligned_row`` finds, ``before`` elements before the row.
    """
    low = tl.minimum(tl.maximum(first, tl.cdiv(before, BLOCK)), last)
    return low, tl.maximum(low, tl.minimum(last, (before + length) // BLOCK))


@triton.jit
def load_block(ptr, base, start, length, other, BLOCK: tl.constexpr):
    """Elements [start, start + BLOCK) of the row that begins at ``ptr + base``; ``other`` from ``length`` on.

    ``base`` is int64, ``start`` a multiple of BLOCK. A row may begin and end anywhere, and then its elements are read
    one by one; whole blocks of rows that begin on a multiple of 16, the rule with padded batches, take wide loads. Only
    the division tells the compiler so: it knows nothing of a number that was read from memory.
    """
    offs = start + tl.arange(0, BLOCK)
    if (base % 16 == 0) & (start + BLOCK <= length):
        block = tl.load(ptr + base // 16 * 16 + offs)
    else:
        block = tl.load(ptr + base + offs, mask=offs < length, other=other)
    return block


@triton.jit
def store_block(ptr, base, start, length, block, BLOCK: tl.constexpr):
    """Write elements [start, start + BLOCK) of the row that begins at ``ptr + base``, none from ``length`` on."""
    offs = start + tl.arange(0, BLOCK)
    if (base % 16 == 0) & (start + BLOCK <= length):
        tl.store(ptr + base // 16 * 16 + offs, block)
    else:
        tl.store(ptr + base + offs, block, mask=offs < length)


def num_splits(length: int, block: int, programs: int) -> int:
    """How many programs share a row (or a group) of up to ``length`` tokens, when there are ``programs`` of them.

    Enough to fill a large GPU several times over, never more than there are blocks. The programs stride over the blocks
    that there really are, so the bound costs nothing where rows are shorter than it.
    """
    enough = triton.cdiv(8192, max(programs, 1))
    return max(1, min(triton.cdiv(length, block), enough))


def row_stride(tensor) -> int:
    """Elements from one row to the next; 0 for packed rows, whose starts already count from the first token."""
    return tensor.stride(0) if tensor.dim() == 2 else 0


@triton.jit
def row_slot(cu_seqlens_ptr, row, width, PACKED: tl.constexpr):
    """Where a row begins in its storage, and how many tokens it holds."""
    if PACKED:
        # Offsets that break their rules must still stay inside of the tensors.
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + row).to(tl.int64), 0), width)
        last = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + row + 1).to(tl.int64), first), width)
    else:
        first, last = row * 0, row * 0 + width
    return first, last - first


@triton.jit
def rounded_product(x, y):
    """x y, rounded, for sums over the threads.

    A compiler may fuse a product into the addition that follows. Where two threads add their products to each other's,
    each then leaves its own unrounded, and they hold two sums: what is stored is that of the thread that comes last.
    """
    # Nothing is fused into a fused operation, and + 0 is none that a compiler may drop: it makes 0 of -0.
    return tl.fma(x, y, 0.0)


@triton.jit
def log1p(x):
    """log(1 + x); the quotient makes up for what 1 + x rounds away."""
    one_plus = 1.0 + x
    return tl.where(one_plus == 1.0, x, tl.log(one_plus) * (x / (one_plus - 1.0)))


@triton.jit
def exp_tail(x):
    """e^x - 1 - x, by its series near 0."""
    # Up to x^10 / 10!; at 0.5 the next term is 1e-10 of the sum.
    series = 1.0 + x / 7 * (1.0 + x / 8 * (1.0 + x / 9 * (1.0 + x / 10)))
    series = x * x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * series))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1."""
    return tl.where(tl.abs(x) < 0.5, x + exp_tail(x), tl.exp(x) - 1.0)
