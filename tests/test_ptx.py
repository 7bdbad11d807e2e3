"""The executor of compiled kernels: what it computes, which faults it sees, and what it says of our kernels."""

import ast
import inspect
import json
import math
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import compiled_kernels
import numpy as np
import ptx_counts
import pytest
import torch
from pages import ROOT
from ptx import Refused, Session, Settings, run_text
from support import cells_of, run_python
from torch import Tensor

HEAD = """.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2,
	.param .u64 .ptr .global .align 1 kernel_param_3
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%h<9>;
	.reg .b32 	%r<40>;
	.reg .b64 	%d<40>;
	mov.u32 	%r0, %tid.x;
	mov.u32 	%r1, %ctaid.x;
	ld.param.b64 	%d0, [kernel_param_0];
	ld.param.b64 	%d1, [kernel_param_1];
	ld.param.b64 	%d2, [kernel_param_2];
	ld.param.b64 	%d3, [kernel_param_3];
	mad.wide.u32 	%d4, %r0, 4, %d0;
	shl.b32 	%r2, %r0, 2;
	mov.b32 	%r3, global_smem;
	add.s32 	%r2, %r2, %r3;
"""


def execute(
    body: str, *tensors: Tensor, threads: int = 64, programs: int = 1, shared: int = 1024, seed: int | None = None
) -> Session:
    """Run PTX with the thread's number in %r0, the program's in %r1, the tensors from %d0 on, and in %d4 and %r2 the
    thread's own words of the first tensor and of shared memory."""
    session = Session(90, Settings(seed=seed))
    text = HEAD.format(threads=threads) + "\n".join(f"\t{line.strip()}" for line in body.splitlines()) + "\n\tret;\n}\n"
    run_text(text, shared, (programs, 1, 1), list(tensors), session)
    return session


def kinds(session: Session) -> set[str]:
    return {finding.kind for finding in session.findings.faults()}


# ---- what instructions compute


BITS = {"f32": (torch.float32, 32), "f64": (torch.float64, 64), "b32": (torch.int32, 32), "b64": (torch.int64, 64)}
BITS |= {"b16": (torch.int16, 16)}


def compute(op: str, result: str, *operands: tuple[str, list[Any]], constants: str = "") -> Any:
    """One instruction, a thread for each value; more threads see the last."""
    threads = -(-len(operands[0][1]) // 32) * 32
    lines, registers = [], []
    tensors = [torch.zeros(threads, dtype=BITS[result][0])]
    for k, (kind, values) in enumerate(operands, 1):
        dtype, bits = BITS[kind]
        padded = [*values, *[values[-1]] * (threads - len(values))]
        tensors.append(torch.from_numpy(np.array(padded).astype(str(dtype).removeprefix("torch."))))
        registers.append(f"%{'h' if bits == 16 else 'r' if bits == 32 else 'd'}{10 + k if bits > 16 else k}")
        lines += [
            f"mad.wide.u32 %d{20 + k}, %r0, {bits // 8}, %d{k};",
            f"ld.global.b{bits} {{ {registers[-1]} }}, [ %d{20 + k} + 0 ];",
        ]
    bits = BITS[result][1]
    to = {16: "%h0", 32: "%r9", 64: "%d9"}[bits]
    lines += [
        f"{op} {to}, {', '.join(registers)}{constants};",
        f"mad.wide.u32 %d8, %r0, {bits // 8}, %d0;",
        f"st.global.b{bits} [ %d8 + 0 ], {{ {to} }};",
    ]
    assert kinds(execute("\n".join(lines), *tensors, threads=threads)) == set()
    return tensors[0][: len(operands[0][1])].numpy()


def nearest(exact: Fraction, kind: Any) -> Any:
    """The number of a numpy type nearest to an exact one; of two, the one whose last bit is 0."""
    near = kind(float(exact))
    around = [np.nextafter(near, kind(-np.inf)), near, np.nextafter(near, kind(np.inf))]
    bits = {np.float32: np.int32, np.float64: np.int64}[kind]
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(bits)) & 1))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fma_is_rounded_once(kind: str) -> None:
    """Also where product and sum cancel, and where the sum of two roundings would round a tie the other way."""
    numpy_type = {"f32": np.float32, "f64": np.float64}[kind]
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal(300).astype(numpy_type) for _ in range(3))
    c[:100] = -a[:100] * b[:100]  # what is left is the rounding of the product
    c[100:200] *= numpy_type(2.0) ** generator.integers(-60, 60, 100).astype(numpy_type)
    step = numpy_type(2.0) ** -(12 if kind == "f32" else 26)
    a[200:220], b[200:220], c[200:220] = 1 + step, 1 + step, generator.standard_normal(20) * step**4
    found = compute(f"fma.rn.{kind}", kind, *((kind, list(x)) for x in (a, b, c)))
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert [float(x) for x in found] == [float(nearest(x, numpy_type)) for x in exact]


WORDS = [0, 1, -1, 7, -8, 2**31 - 1, -(2**31), 0x12345678, -0x12345678, 0x0F0F00FF]
PAIRS = [(a, b) for a in WORDS for b in WORDS]


def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def toward_zero(a: int, b: int) -> int:
    return signed(int(Fraction(a, b))) if b else -1


INTEGERS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "add.s32": ("b32", lambda a, b: signed(a + b)),
    "sub.s32": ("b32", lambda a, b: signed(a - b)),
    "mul.lo.s32": ("b32", lambda a, b: signed(a * b)),
    "mul.hi.s32": ("b32", lambda a, b: signed(a * b >> 32)),
    "mul.wide.s32": ("b64", lambda a, b: a * b),
    "mul.wide.u32": ("b64", lambda a, b: signed((a % 2**32) * (b % 2**32), 64)),
    "min.s32": ("b32", min),
    "max.u32": ("b32", lambda a, b: signed(max(a % 2**32, b % 2**32))),
    "div.s32": ("b32", toward_zero),
    "div.u32": ("b32", lambda a, b: signed((a % 2**32) // (b % 2**32)) if b else -1),
    "rem.s32": ("b32", lambda a, b: signed(a - toward_zero(a, b) * b)),
    "and.b32": ("b32", lambda a, b: a & b),
    "xor.b32": ("b32", lambda a, b: a ^ b),
    "shl.b32": ("b32", lambda a, b: signed(a << b % 2**32) if b % 2**32 < 32 else 0),
    "shr.u32": ("b32", lambda a, b: signed(a % 2**32 >> b % 2**32) if b % 2**32 < 32 else 0),
    "shr.s32": ("b32", lambda a, b: a >> min(b % 2**32, 31)),
}


@pytest.mark.parametrize("op", INTEGERS)
def test_integers(op: str) -> None:
    kind, exact = INTEGERS[op]
    found = compute(op, kind, ("b32", [a for a, _ in PAIRS]), ("b32", [b for _, b in PAIRS]))
    assert found.tolist() == [exact(a, b) for a, b in PAIRS]


def test_fields_and_bytes() -> None:
    fields = [(start, length) for start in (0, 3, 24) for length in (0, 1, 5, 8)]
    values, starts, lengths = [0x9A5B3C7D - 2**32] * 12, [s for s, _ in fields], [n for _, n in fields]
    operands = ("b32", values), ("b32", starts), ("b32", lengths)
    plain = [(0x9A5B3C7D >> start) & ((1 << length) - 1) for start, length in fields]
    assert compute("bfe.u32", "b32", *operands).tolist() == plain
    extended = [signed(x, n) if n else 0 for x, n in zip(plain, lengths, strict=True)]
    assert compute("bfe.s32", "b32", *operands).tolist() == extended
    selectors = [0x3210, 0x7654, 0x5410, 0x0000, 0xFEDC, 0xB30C]
    both = [*(0x83021100).to_bytes(4, "little"), *(0x77E65544).to_bytes(4, "little")]
    expected = [
        [both[s >> 4 * k & 7] if not s >> 4 * k & 8 else 255 * (both[s >> 4 * k & 7] >> 7) for k in range(4)]
        for s in selectors
    ]
    found = compute("prmt.b32", "b32", ("b32", [0x83021100 - 2**32] * 6), ("b32", [0x77E65544] * 6), ("b32", selectors))
    assert [list(struct.pack("<i", x)) for x in found] == expected


SPECIAL = [0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan, 1e-40, 3e38, 0.1]


def test_largest_of_three() -> None:
    a, b, c = ([x, y, z] for x, y, z in ((1.0, 5.0, 3.0), (2.0, math.nan, 9.0), (4.0, 0.0, math.nan)))
    assert compute("max.f32", "f32", ("f32", a), ("f32", b), ("f32", c)).tolist() == [4.0, 5.0, 9.0]
    largest = compute("max.NaN.f32", "f32", ("f32", a), ("f32", b), ("f32", c)).tolist()
    assert largest[0] == 4.0 and all(map(math.isnan, largest[1:]))


def test_floats() -> None:
    pairs = [(a, b) for a in SPECIAL for b in SPECIAL]
    operands = ("f32", [a for a, _ in pairs]), ("f32", [b for _, b in pairs])
    a, b = (torch.tensor(values, dtype=torch.float32) for _, values in operands)
    with np.errstate(all="ignore"):
        for op, expected in {"add.f32": a + b, "mul.f32": a * b, "sub.f32": a - b, "div.full.f32": a / b}.items():
            torch.testing.assert_close(torch.from_numpy(compute(op, "f32", *operands)), expected, equal_nan=True)
    lesser, larger = compute("min.f32", "f32", *operands), compute("max.NaN.f32", "f32", *operands)
    for k, (x, y) in enumerate(pairs):
        known = [z for z in (x, y) if z == z]
        if known:
            assert lesser[k] == np.float32(min(known))
        assert np.isnan(larger[k]) if len(known) < 2 else larger[k] == np.float32(max(known))
        if x == y == 0:
            assert np.signbit(lesser[k]) == (math.copysign(1, x) < 0 or math.copysign(1, y) < 0)
            assert np.signbit(larger[k]) == (math.copysign(1, x) < 0 and math.copysign(1, y) < 0)
    assert compute("mul.ftz.f32", "f32", ("f32", [1e-40, 1e-30]), ("f32", [1.0, 1e-10])).tolist() == [0, 0]
    powers = compute("ex2.approx.ftz.f32", "f32", ("f32", [0.0, 1.5, -200.0, 10.0, -math.inf])).tolist()
    assert powers == [1.0, float(np.float32(2**1.5)), 0.0, 1024.0, 0.0]


def test_conversions() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    values[:3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38])  # two ties, and what rounds to infinity
    found = compute("cvt.rn.bf16.f32", "b16", ("f32", values.tolist()))
    assert torch.equal(torch.from_numpy(found).view(torch.bfloat16), values.bfloat16())
    packed = compute("cvt.rn.bf16x2.f32", "b32", ("f32", values.tolist()), ("f32", (-values).tolist()))
    assert torch.equal(torch.from_numpy(packed).view(torch.bfloat16)[0::2], (-values).bfloat16())
    back = compute("cvt.f32.bf16", "f32", ("b16", values.bfloat16().view(torch.int16).tolist()))
    assert torch.equal(torch.from_numpy(back), values.bfloat16().float())
    cut = compute("cvt.rzi.s32.f64", "b32", ("f64", [1.9, -1.9, 1e20, -1e20, math.nan, 2.0**31 - 1]))
    assert cut.tolist() == [1, -1, 2**31 - 1, -(2**31), 0, 2**31 - 1]
    assert compute("cvt.rmi.f64.f64", "f64", ("f64", [1.9, -1.1])).tolist() == [1, -2]
    assert compute("cvt.s64.s32", "b64", ("b32", [-1])).tolist() == [-1]
    assert compute("cvt.u64.u32", "b64", ("b32", [-1])).tolist() == [2**32 - 1]


def test_comparisons_with_nan() -> None:
    names = {"lt": (1, 0, 0), "ltu": (1, 0, 1), "eq": (0, 1, 0), "equ": (0, 1, 1), "ne": (1, 0, 0), "neu": (1, 0, 1)}
    names |= {"num": (1, 1, 0), "nan": (0, 0, 1), "ge": (0, 1, 0), "geu": (0, 1, 1)}
    for name, expected in names.items():
        op = f"setp.{name}.f32 %p1, %r11, %r12;\nselp.b32 %r9, 1, 0, %p1;\nadd.s32"
        # The instruction under test stands before the one that writes its result.
        source = torch.tensor([1.0, 2.0, math.nan] + [0.0] * 29), torch.full((32,), 2.0)
        result = torch.zeros(32, dtype=torch.int32)
        body = f"""mad.wide.u32 %d5, %r0, 4, %d1;
            mad.wide.u32 %d6, %r0, 4, %d2;
            ld.global.b32 {{ %r11 }}, [ %d5 + 0 ];
            ld.global.b32 {{ %r12 }}, [ %d6 + 0 ];
            {op} %r9, %r9, 0;
            st.global.b32 [ %d4 + 0 ], {{ %r9 }};"""
        execute(body, result, *source, threads=32)
        assert tuple(result[:3].tolist()) == expected, name


def test_threads_of_a_warp() -> None:
    values = list(np.random.default_rng(1).integers(-100, 100, 64))
    warps = np.array(values).reshape(2, 32)
    for name, reduce in {"min": np.min, "max": np.max, "add": np.sum}.items():
        found = compute(f"redux.sync.{name}.s32", "b32", ("b32", values), constants=", -1")
        assert found.tolist() == np.repeat(reduce(warps, axis=1), 32).tolist()
    found = compute("shfl.sync.bfly.b32", "b32", ("b32", values), constants=", 5, 31, -1")
    assert found.tolist() == [values[k ^ 5] for k in range(64)]
    found = compute("shfl.sync.idx.b32", "b32", ("b32", values), ("b32", list(range(1, 65))), constants=", 31, -1")
    assert found.tolist() == [values[k // 32 * 32 + (k + 1) % 32] for k in range(64)]
    found = compute("shfl.sync.up.b32", "b32", ("b32", values), constants=", 4, 0, -1")
    assert found.tolist() == [values[k - 4 if k % 32 >= 4 else k] for k in range(64)]


@pytest.mark.parametrize(("transposed", "number"), [(False, 4), (True, 4), (False, 2), (False, 1)])
def test_matrices(transposed: bool, number: int) -> None:
    """Of 8 x 8 numbers: lane i holds the numbers 2 (i % 4) and 2 (i % 4) + 1 of row i // 4, or of that column."""
    numbers = torch.arange(256, dtype=torch.int16)  # the row of each lane is 8 of them
    result = torch.zeros(32 * number, dtype=torch.int32)
    registers = ", ".join(f"%r{20 + k}" for k in range(number))
    vector = f".v{number}" if number > 1 else ""
    body = f"""mad.wide.u32 %d5, %r0, 16, %d1;
        ld.global.v4.b32 {{ %r10, %r11, %r12, %r13 }}, [ %d5 + 0 ];
        shl.b32 %r4, %r0, 4;
        add.s32 %r4, %r4, %r3;
        st.shared.v4.b32 [%r4], {{%r10, %r11, %r12, %r13}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{number}{".trans" if transposed else ""}.shared.b16 {{{registers}}}, [%r4];
        mad.wide.u32 %d6, %r0, {4 * number}, %d0;
        st.global{vector}.b32 [ %d6 + 0 ], {{ {registers} }};"""
    assert kinds(execute(body, result, numbers, threads=32)) == set()
    matrices = numbers.view(4, 8, 8)[:number]
    expected = (matrices.mT if transposed else matrices).reshape(number, 32, 2)
    assert torch.equal(result.view(torch.int16).view(32, number, 2), expected.transpose(0, 1))
    if not transposed and number == 4:
        stored = torch.zeros(128, dtype=torch.int32)
        body = (
            body.split("mad.wide.u32 %d6")[0].replace("ldmatrix", "bar.sync 0;\nldmatrix")
            + """
            bar.sync 0;
            stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%r20, %r21, %r22, %r23};
            bar.sync 0;
            ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r4];
            mad.wide.u32 %d6, %r0, 16, %d0;
            st.global.v4.b32 [ %d6 + 0 ], { %r10, %r11, %r12, %r13 };"""
        )
        assert kinds(execute(body, stored, numbers, threads=32)) == set()
        assert torch.equal(stored.view(torch.int16), numbers)


def test_what_our_kernels_do_not_use_is_refused_by_name() -> None:
    for line in ("sin.approx.f32 %r9, %r0;", "vote.sync.any.pred %p1, %p2, -1;", "ld.local.b32 %r9, [%r2];"):
        with pytest.raises(Refused, match=line.split()[0].replace(".", r"\.")):
            execute(line)
    with pytest.raises(Refused, match="under a predicate"):
        execute("@%p1 shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;")
    with pytest.raises(Refused, match="barrier 0"):
        execute("bar.sync 1;")
    with pytest.raises(Refused, match=r"%clock"):
        execute("mov.u32 %r9, %clock;")


# ---- faults that are put in, each with what must be seen


def test_each_program_has_the_shared_memory_of_a_device() -> None:
    with pytest.raises(ValueError, match="240000 bytes of shared memory"):
        execute("", shared=240_000)


def words(number: int = 64) -> Tensor:
    return torch.arange(number, dtype=torch.int32)


# A neighbour's word of shared memory, through the thread's number with its bits 0 and 5 turned.
EXCHANGE = """st.shared.b32 [%r2], %r0;
{barrier}
xor.b32 %r4, %r0, {turned};
shl.b32 %r4, %r4, 2;
add.s32 %r4, %r4, %r3;
ld.shared.b32 %r5, [%r4];
st.global.b32 [ %d4 + 0 ], {{ %r5 }};"""
AGAIN = """
{barrier}
st.shared.b32 [%r2], %r5;
{late}
ld.shared.b32 %r6, [%r4];
st.global.b32 [ %d4 + 0 ], {{ %r6 }};"""
HALF = "setp.lt.u32 %p1, %r0, {first};\n"
MANY_WARPS_ASK = """mad.wide.u32 %d5, %r1, 4, %d0;
setp.eq.b32 %p1, %r0, 0;
@%p1 atom.global.gpu.relaxed.add.s32 %r9, [ %d0 + 0 ], 1;
ld.volatile.global.b32 { %r5 }, [ %d0 + 0 ];
"""
FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "no barrier between warps": (EXCHANGE.format(barrier="", turned=33), "race of warps", {}),
    "no barrier in a warp": (EXCHANGE.format(barrier="", turned=1), "race of threads of a warp", {}),
    "a barrier of the warp, for two": (EXCHANGE.format(barrier="bar.warp.sync -1;", turned=33), "race of warps", {}),
    "a stale read of shared memory": (
        (EXCHANGE + AGAIN).format(barrier="bar.sync 0;", turned=33, late=""),
        "race of warps",
        {},
    ),
    "written again before all have read": (
        (EXCHANGE + AGAIN).replace("{barrier}\nst.shared", "st.shared").format(
            barrier="bar.sync 0;", turned=33, late="bar.sync 0;"
        ),
        "race of warps",
        {},
    ),
    "shared memory that nobody wrote": (
        "ld.shared.b32 %r5, [%r2];\nst.global.b32 [ %d4 + 0 ], { %r5 };",
        "read of shared memory that nobody wrote",
        {},
    ),
    "memory that nobody wrote": (
        "ld.global.b32 { %r5 }, [ %d4 + 0 ];",
        "read of memory that nobody wrote",
        {"tensor": torch.full((256,), 0xCB, dtype=torch.uint8).view(torch.int32)},
    ),
    "half of it": (
        "mad.wide.u32 %d5, %r0, 8, %d0;\nld.global.b64 { %d6 }, [ %d5 + 0 ];",
        "read of memory that nobody wrote",
        {"tensor": torch.tensor([[7, 0xCBCBCBCB - 2**32]] * 64, dtype=torch.int32)},
    ),
    "a load behind the end": (
        "ld.global.b32 { %r5 }, [ %d4 + 4 ];",
        "access out of bounds of kernel_param_0",
        {},
    ),
    "a store before the beginning": (
        "st.global.b32 [ %d4 + -4 ], { %r0 };",
        "access out of bounds of kernel_param_0",
        {},
    ),
    "an index of 32 bits that wraps": (
        "mul.wide.s32 %d5, %r0, -2147483648;\nadd.s64 %d5, %d5, %d4;\nld.global.b32 { %r5 }, [ %d5 + 0 ];",
        "access out of bounds of kernel_param_0",
        {},
    ),
    "no tensor": ("ld.global.b32 { %r5 }, [ %d3 + 0 ];", "access out of bounds of all buffers", {}),
    "a vector that is not aligned": (
        "ld.global.v2.b32 { %r5, %r6 }, [ %d4 + 0 ];",
        "misaligned access",
        {"tensor": words(65)},
    ),
    "beyond shared memory": ("st.shared.b32 [%r2+1000], %r0;", "access beyond shared memory", {}),
    "two programs store to one address": ("add.s32 %r5, %r0, %r1;\nst.global.b32 [ %d4 + 0 ], { %r5 };",
                                          "race of programs of writes", {"programs": 2}),
    "a program reads what another writes": (
        "ld.global.b32 { %r5 }, [ %d0 + 4 ];\nst.global.b32 [ %d4 + 0 ], { %r5 };",
        "race of programs",
        {"programs": 2},
    ),
    "threads of a warp store different values to one address": (
        "st.global.b32 [ %d0 + 0 ], { %r0 };",
        "race of threads of a warp of writes",
        {"threads": 32},
    ),
    "an atomic and a plain store": (
        "atom.global.gpu.relaxed.add.s32 %r5, [ %d0 + 0 ], 1;\nst.global.b32 [ %d0 + 0 ], { %r5 };",
        "race of warps of writes",
        {},
    ),
    "warps read each for itself": (
        MANY_WARPS_ASK,
        "warps read each for itself what other programs change",
        {"programs": 2},
    ),
    "a barrier that a warp has left": (
        HALF.format(first=32) + "@%p1 bra $left;\nbar.sync 0;\n$left:",
        "a barrier that some threads have left",
        {},
    ),
    "two barriers that meet": (
        HALF.format(first=32) + "@%p1 bra $other;\nbar.sync 0;\nbra.uni $end;\n$other:\nbar.sync 0;\n$end:",
        "threads meet at different barriers",
        {},
    ),
    "half a warp exchanges": (
        HALF.format(first=16) + "@%p1 bra $left;\nshfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;\n$left:",
        "threads wait for others that never come",
        {"threads": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, seed: int | None) -> None:
    body, kind, options = FAULTS[fault]
    options = dict(options)
    tensor = options.pop("tensor", words()).clone()
    assert kind in kinds(execute(body, tensor, seed=seed, **options))


SOUND = {
    "an exchange": (EXCHANGE.format(barrier="bar.sync 0;", turned=33), {}),
    "an exchange in a warp": (EXCHANGE.format(barrier="bar.warp.sync -1;", turned=1), {}),
    "two exchanges": ((EXCHANGE + AGAIN).format(barrier="bar.sync 0;", turned=33, late="bar.sync 0;"), {}),
    "a program each": ("mad.wide.u32 %d5, %r1, 256, %d4;\nst.global.b32 [ %d5 + 0 ], { %r0 };", {"programs": 4}),
    "one value by all": ("st.global.b32 [ %d0 + 0 ], { 7 };", {"programs": 2}),
    "atomics": ("atom.global.gpu.relaxed.add.s32 %r5, [ %d0 + 0 ], 1;", {"programs": 3}),
    "one thread asks, and tells the others": (
        MANY_WARPS_ASK.split("ld.volatile")[0]
        + "@%p1 st.shared.b32 [%r3], %r9;\nbar.sync 0;\nld.shared.b32 %r5, [%r3];",
        {"programs": 2},
    ),
}


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("case", SOUND)
def test_nothing_is_seen_where_nothing_is_wrong(case: str, seed: int | None) -> None:
    body, options = SOUND[case]
    tensor = words(256)
    assert kinds(execute(body, tensor, seed=seed, **options)) == set()
    if case == "atomics":
        assert tensor[0] == 3 * 64


def test_seeds_interleave() -> None:
    """What the last of several threads leaves depends on the seed, and on nothing else."""
    found = []
    for seed in (*range(8), *range(8)):
        tensor = words()
        execute("mad.lo.s32 %r5, %r1, 64, %r0;\nst.global.b32 [ %d0 + 0 ], { %r5 };", tensor, programs=4, seed=seed)
        found.append(int(tensor[0]))
    assert found[:8] == found[8:]
    assert len(set(found[:8])) > 3


# ---- every kernel of the package


# Cases, and the kernels that they launch; some launch others, too.
PARTS = {
    "prefixes": (
        ["pairs_of_rows", "rows_whose_programs_meet", "ties_of_rows"],
        "compare_pairs represent first_mismatch refine_ties prefix_table",
    ),
    "spans": (
        ["tree_of_rows", "boundaries_of_groups", "credit"],
        "order_rows tree_nodes regular_layout mask_stretches column_maxima select_boundaries prefix_nodes span_values "
        "normalize_spans",
    ),
    "vocabulary": (
        ["vocabulary", "divergence", "kept_ids", "clipped_loss_from_logits"],
        "divergence_sums divergence_gradient "
        "surprisal_states merge_surprisal_states surprisal_entropy_backward policy_loss_from_logits scale_gradient "
        "kept_statistics kept_statistics_backward kept_products add_hidden_gradient add_weight_gradient",
    ),
    "tokens": (
        [
            "spans_and_their_gradient",
            "sums_of_segments",
            "clipped_loss token",
            "clipped_loss sequence",
            "distillation",
            "reward_channel",
        ],
        "scatter_spans gather_spans running_sums policy_loss fire_statistics fire_weights normalize_hidden "
        "channel_state",
    ),
    "losses": (["losses_of_all_kinds"], "policy_loss policy_loss_from_logits"),
}

# One of each kernel, for the other architectures and another order.
FEW = ["rows_whose_programs_meet torch.int32", "tree_of_rows 0", "credit span", "spans_and_their_gradient True"]
FEW += ["vocabulary torch.float32 61 True", "vocabulary torch.bfloat16 4103", "clipped_loss_from_logits torch.float32"]
FEW += [
    "divergence torch.float32 61 True",
    "clipped_loss token torch.bfloat16",
    "distillation torch.float32",
    "reward_channel 48",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Triton's compiler, which assembles nothing in these processes."""
    return tmp_path_factory.mktemp("cache")


def executed(folder: Path, *options: object) -> dict[str, Any]:
    pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.compiler")
    if "constexprs" not in inspect.signature(compiler.ASTSource).parameters:
        pytest.skip("needs the interface to Triton's compiler of version 3.3 or later")
    options = compiled_kernels.__file__, *options
    return json.loads(run_python(*options, timeout=1800, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder)).stdout)


def launched() -> set[str]:
    """Kernels of the package: names that are called with a grid in brackets."""
    return {
        call.func.value.id
        for file in (ROOT / "leafkernels" / "kernels").glob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
    }


def full_names(kernels: str) -> set[str]:
    return {f"_{name}_kernel" for name in kernels.split()}


def test_every_kernel_has_a_case() -> None:
    assert len(launched()) >= 25
    assert set().union(*(full_names(kernels) for _, kernels in PARTS.values())) == launched()
    prefixes = tuple(name for names, _ in PARTS.values() for name in names)
    assert [name for name in compiled_kernels.CASES if not name.startswith(prefixes)] == []


def test_the_page_shows_what_was_executed() -> None:
    """``make ptx`` writes the table, and only if nothing was seen."""
    rows = [row for row in cells_of((ROOT / "docs" / "performance.md").read_text()) if len(row) == 5 and row[4] == "0"]
    names = {f"_{row[0].strip('`')}_kernel" for row in rows}
    assert len(names) >= 25
    assert names <= launched()


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_kernels_in_order_and_interleaved(part: str, cache: Path) -> None:
    """Results are those of the PyTorch backend, and nothing is seen. Threads may write one value together."""
    cases, kernels = PARTS[part]
    # Programs of the two parts tell each other something by memory. Those of the others are alone: a few of them are
    # interleaved below, and all by make ptx.
    seeds = [1, 2, 3] if part in ("prefixes", "spans") else []
    found = executed(cache, "--seeds", *seeds, "--cases", *cases)
    assert found["failed"] == {}
    assert found["seen"] == []
    assert set(found["kernels"]) >= full_names(kernels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "how", "cases", "least"),
    [(80, [], FEW[::2], 20), (90, ["--seeds", 1, "--only-interleaved"], FEW, 20), (100, [], FEW[1::2], 16)],
)
def test_one_of_each_kernel(arch: int, how: list[Any], cases: list[str], least: int, cache: Path) -> None:
    """Interleaved where all ran in order above, and half of them in order on each of the other architectures; ``make
    ptx`` has all on all."""
    found = executed(cache, "--arch", arch, *how, "--cases", *cases)
    assert found["failed"] == {}
    assert found["seen"] == []
    assert len(found["kernels"]) >= least


@pytest.mark.slow
def test_results_agree_with_another_executor(shared: Path, cache: Path) -> None:
    other = shared / "tools" / "ptx"
    if not other.is_dir():
        pytest.skip(f"needs {other}, which is not here")
    ours, theirs = (executed(cache, "--cases", *FEW, *more) for more in ([], ["--other", other]))
    assert ours["seen"] == theirs["seen"] == []
    assert ours["kernels"] == theirs["kernels"]
    for name, results in ours["results"].items():
        for mine, their in zip(results, theirs["results"][name], strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(their), rtol=2e-6, atol=1e-7, equal_nan=True)


# ---- what the kernels execute and move


# Of each kernel with an element a token, a logit or a number: PTX instructions, and bytes moved over bytes asked for. A
# thread of column_maxima and fire_statistics reads 32 bytes by two loads, which each touch every sector: with twice the
# warps the ratios are 1.16 and 1.00, the instructions 35 and 48. The second load should find its sectors in the cache.
COUNTED = {
    "mask_stretches": (5.6, 1.06),
    "column_maxima": (29.1, 1.74),
    "select_boundaries": (173, 1.01),  # 403 with distances of 64 bits
    "compare_pairs": (20.8, 1.09),
    "first_mismatch": (26.8, 1.05),
    "running_sums": (163, 1.02),  # 68,376 with 64 x 64 terms for each 64 entries, and for each short segment
    "scatter_spans": (53.2, 1.25),
    "gather_spans": (21.1, 1.01),
    "surprisal_states": (12.9, 1.04),
    "surprisal_entropy_backward": (18.7, 1.06),
    "divergence_sums": (40.3, 1.02),  # of both logits, in bfloat16
    "divergence_gradient": (29.3, 1.15),
    "policy_loss": (89.7, 1.01),  # 89.4 before there were kinds of losses
    "policy_loss_from_logits": (22.3, 1.02),
    "scale_gradient": (6.8, 1.01),
    "fire_statistics": (37.7, 1.93),
    "fire_weights": (89.0, 1.04),
    "normalize_hidden": (23.5, 1.01),  # 28.6 and 1.97 with the last block of each row one by one
    "channel_state": (4.5, 1.01),
    # Of 32 kept ids a row: a block has room for four times as many.
    "kept_statistics": (270, 1.77),
    "kept_statistics_backward": (198, 1.85),
    "kept_products": (6.3, 1.01),
    "add_hidden_gradient": (9.6, 1.11),
    "add_weight_gradient": (73.7, 1.35),  # four rows an id
}


@pytest.mark.slow
def test_instructions_and_sectors_are_no_more_than_was_counted(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.9."):
        pytest.skip("counted with Triton 3.9")
    options = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    rows = json.loads(run_python(ptx_counts.__file__, "--json", timeout=900, **options).stdout)
    assert {f"_{row['kernel']}_kernel" for row in rows} == launched()
    assert [row for row in rows if row["banks"] > 1] == []
    found = {row["kernel"]: (row["instructions"], row["sectors"]) for row in rows}
    assert {name: found[name] for name, most in COUNTED.items() if any(map(float.__gt__, found[name], most))} == {}


def test_sectors_and_banks_counted_by_hand() -> None:
    lanes, address = np.arange(64), np.arange(64)
    for spread, width, moved in ((4, 4, 256), (8, 4, 512), (32, 4, 2048), (16, 16, 1024), (32, 16, 2048), (0, 4, 64)):
        traffic = ptx_counts.Traffic()
        traffic.add("global", lanes, address * spread, width)
        assert (traffic.requests, traffic.moved) == (2, moved)
        assert traffic.asked == (64 if spread else 2) * width
    # Turns of two warps: of 128 bytes each at best; all lanes on one bank; on one word; 16 bytes each, four turns.
    for spread, width, turns in ((4, 4, 2), (8, 4, 4), (128, 4, 64), (0, 4, 2), (16, 16, 8), (32, 16, 16)):
        traffic = ptx_counts.Traffic()
        traffic.add("shared", lanes, address * spread, width)
        assert traffic.moved == 128 * turns
