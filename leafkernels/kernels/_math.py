"""Functions that Triton has not, exact where the formula as written down would cancel."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


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
