"""What instructions compute, over numpy arrays with an entry for each thread.

``fma`` is rounded once, ``rn`` conversions to the nearest even. What PTX lets a device approximate (``ex2.approx``,
``div.approx``, ``div.full``, ``rcp.approx``) is computed in float64 and rounded: a device may be off by two units in
the last place of float32. The bits of a NaN are numpy's.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
WARP = 32

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
s4, s8 = np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
_BITS = (("b", "u"), ("u", "u"), ("s", "i"))
TYPES: dict[str, Any] = {f"{name}{8 * n}": np.dtype(f"{kind}{n}").type for name, kind in _BITS for n in (1, 2, 4, 8)}
TYPES |= {"f16": f2, "f32": f4, "f64": f8, "pred": np.bool_}


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def _to_odd(total: Array, error: Array) -> Array:
    """The sum of both with its last bit set where they lose something: rounding that again rounds the exact sum."""
    bits = total.view(s8)
    toward_error = np.where((error > 0) == (total > 0), 1, -1)
    return np.where((error != 0) & np.isfinite(error) & (bits & 1 == 0), bits + toward_error, bits).view(f8)


def _halves(a: Array) -> tuple[Array, Array]:
    shifted = a * 134217729.0  # 2^27 + 1
    upper = shifted - (shifted - a)
    return upper, a - upper


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once."""
    a, b, c = np.broadcast_arrays(a, b, c)
    wide = [np.asarray(x, f8) for x in (a, b, c)]
    product = wide[0] * wide[1]
    if a.dtype == f4:  # 24 bits times 24 are exact in 53
        return _to_odd(*_two_sum(product, wide[2])).astype(f4)
    (a1, a0), (b1, b0) = _halves(a), _halves(b)
    rest = a0 * b0 - (((product - a1 * b1) - a0 * b1) - a1 * b0)
    upper, lower = _two_sum(c, rest)
    total, error = _two_sum(product, upper)
    exact = total + _to_odd(*_two_sum(lower, error))
    return np.where(np.isfinite(exact), exact, product + c)


def of_bf16(bits: Array) -> Array:
    return (bits.astype(u4) << u4(16)).view(f4)


def to_bf16(x: Array) -> Array:
    bits = np.ascontiguousarray(x, f4).view(u4)
    nearest_even = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), nearest_even).astype(u2)


def flush(x: Array) -> Array:
    """Numbers below the least normal one are 0, as ``ftz`` has it."""
    return np.where(np.abs(x) < np.finfo(f4).tiny, np.copysign(f4(0), x), x)


def extreme(name: str, keep_nan: bool, a: Array, b: Array) -> Array:
    """``min`` or ``max``; -0 is less than 0, and NaN counts only if ``keep_nan``."""
    choose = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[name][keep_nan]
    a, b = np.broadcast_arrays(a, b)
    bits = u4 if a.dtype == f4 else u8
    of_zeros = {"min": np.bitwise_or, "max": np.bitwise_and}[name](
        np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits)
    )
    return np.where(a == b, of_zeros.view(a.dtype), choose(a, b))


def ex2(x: Array) -> Array:
    return np.exp2(np.asarray(x, f8)).astype(f4)


def divide(a: Array, b: Array) -> Array:
    return (np.asarray(a, f8) / np.asarray(b, f8)).astype(f4) if a.dtype == f4 else a / b


def reciprocal(x: Array) -> Array:
    """``rcp.approx.ftz.f64`` reads and writes the upper halves alone."""
    upper = u8(0xFFFFFFFF00000000)
    return ((1 / (x.view(u8) & upper).view(f8)).view(u8) & upper).view(f8)


def to_integer(x: Array, kind: Any) -> Array:
    """Toward 0, into the range of the type; NaN is 0."""
    limits = np.iinfo(kind)
    inside = np.clip(np.nan_to_num(np.trunc(x), nan=0.0), float(limits.min), float(limits.max))
    return np.where(inside >= float(limits.max), limits.max, inside.astype(kind)).astype(kind)


def quotient(a: Array, b: Array) -> Array:
    """Toward 0; all bits are set where the divisor is 0, as devices do."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    found = a // divisor
    if a.dtype.kind == "i":
        found = found + ((found * divisor != a) & ((a < 0) != (divisor < 0)))
    return np.where(b == 0, a.dtype.type(-1 if a.dtype.kind == "i" else np.iinfo(a.dtype).max), found).astype(a.dtype)


def upper_product(a: Array, b: Array) -> Array:
    wide = s8 if a.dtype.kind == "i" else u8
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def shift(left: bool, a: Array, by: Array) -> Array:
    """What is shifted by the width or more is 0, or all sign."""
    width = 8 * a.dtype.itemsize
    near = np.minimum(by, u4(width - 1)).astype(a.dtype)
    if a.dtype.kind == "i" and not left:
        return a >> near
    return np.where(by < width, a << near if left else a >> near, a.dtype.type(0))


def field(a: Array, start: Array, length: Array) -> Array:
    """``bfe``: bits [start, start + length), extended by their sign if the type has one."""
    width = 8 * a.dtype.itemsize
    start, length = np.minimum(start & u4(255), u4(width)), np.minimum(length & u4(255), u4(width))
    if np.any(start + length > width):
        raise ValueError("bfe beyond the last bit")
    unused = u4(width) - length
    found = shift(False, shift(True, a, unused - start), unused)
    return np.where(length == 0, a.dtype.type(0), found)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """``prmt``: of the eight bytes of both the four that the selector names; its fourth bit spreads their sign."""
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    found = np.zeros(np.broadcast(a, b, selector).shape, u4)
    for k in range(4):
        choice = (selector >> u4(4 * k)) & u4(15)
        byte = ((both >> ((choice & u4(7)).astype(u8) * u8(8))) & u8(255)).astype(u4)
        found |= np.where(choice & u4(8), (byte >> u4(7)) * u4(255), byte) << u4(8 * k)
    return found


def shuffle(mode: str, values: Array, by: Array, bounds: Array, members: Array) -> Array:
    """``shfl.sync`` of whole warps over all 32 lanes: what another lane holds; its own where ``up`` finds none."""
    if np.any(np.asarray(bounds) != (0 if mode == "up" else 31)) or np.any(np.asarray(members) != 0xFFFFFFFF):
        raise ValueError("shfl over a part of a warp")
    threads, by = np.arange(len(values)), (np.asarray(by) & u4(31)).astype(np.intp)
    lanes = threads % WARP
    partner = {"bfly": lanes ^ by, "idx": by, "up": np.where(lanes >= by, lanes - by, lanes)}[mode]
    return values[threads - lanes + partner]


def reduce_warp(name: str, values: Array, members: Array) -> Array:
    """``redux.sync`` of whole warps."""
    if np.any(np.asarray(members) != 0xFFFFFFFF):
        raise ValueError("redux over a part of a warp")
    function = {"add": np.add, "min": np.fmin, "max": np.fmax}[name]
    return np.repeat(function.reduce(values.reshape(-1, WARP), axis=1, dtype=values.dtype), WARP)
