"""An instruction -> a function of the threads that execute it. What no rule here matches is refused by name."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ptx import arithmetic as do
from ptx.arithmetic import TYPES, WARP, Array, f4, u2, u4, u8
from ptx.reading import SHARED, Instruction, Kernel, Number, Operand, Place, Refused, Vector

# Of the threads ``t`` at a piece: ``t.registers``, ``t.lanes`` (their numbers), ``t.n``, and ``t.machine``.
Threads = Any
Step = Callable[[Threads], None]
Value = Callable[[Threads], Any]

# Integers and predicates
_PLAIN: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": do.fma}
_PLAIN |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "min": np.minimum, "max": np.maximum}
_SIGN: dict[str, Any] = {"not": np.invert, "neg": np.negative, "abs": np.abs}

# Floats; "u" also where one is NaN.
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}


def _flushed(ftz: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
    return (lambda *values: do.flush(function(*map(do.flush, values)))) if ftz else function


def _wide(sign: str) -> Callable[..., Any]:
    to = TYPES[f"{sign}64"]
    return lambda a, b, *c: sum(c, a.astype(to) * b.astype(to))


def _in_halves(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of two float32 in each 64 bits."""

    def both(*pairs: Array) -> Array:
        halves = [np.ascontiguousarray(pair).reshape(-1).view(f4) for pair in np.broadcast_arrays(*pairs)]
        return np.ascontiguousarray(function(*halves)).view(u8)

    return both


def _narrow_pair(kind: str) -> Callable[..., Any]:
    narrow = do.to_bf16 if kind == "bf16" else lambda x: np.asarray(x).astype(np.float16).view(u2)
    return lambda a, b: (narrow(a).astype(u4) << u4(16)) | narrow(b).astype(u4)


def _convert(rounding: str | None, to: str, of: str) -> Callable[..., Any]:
    if rounding == ".rmi":
        return np.floor
    target = f4 if to == "bf16" else TYPES[to]
    return partial(do.to_integer, kind=target) if to[0] in "us" and of[0] in "fb" else lambda x: x.astype(target)


# Of an operation: the type of its result, those of its operands, and the function of numpy arrays.
Formula = tuple[str, tuple[str, ...], Callable[..., Any]]
FORMULAS: dict[str, Callable[..., Formula]] = {
    r"(add|sub|min|max)\.([us]\d\d)": lambda name, kind: (kind, (kind, kind), _PLAIN[name]),
    r"(and|or|xor)\.(b\d\d|pred)": lambda name, kind: (kind, (kind, kind), _PLAIN[name]),
    r"(not|neg|abs)\.(b\d\d|s\d\d|pred)": lambda name, kind: (kind, (kind,), _SIGN[name]),
    r"mul\.lo\.([us]\d\d)": lambda kind: (kind, (kind, kind), np.multiply),
    r"mul\.hi\.([us]32)": lambda kind: (kind, (kind, kind), do.upper_product),
    r"mad\.lo\.([us]\d\d)": lambda kind: (kind, (kind, kind, kind), lambda a, b, c: a * b + c),
    r"mul\.wide\.([us])32": lambda sign: (f"{sign}64", (f"{sign}32",) * 2, _wide(sign)),
    r"mad\.wide\.([us])32": lambda sign: (f"{sign}64", (f"{sign}32", f"{sign}32", f"{sign}64"), _wide(sign)),
    r"div\.([us]\d\d)": lambda kind: (kind, (kind, kind), do.quotient),
    r"rem\.([us]\d\d)": lambda kind: (kind, (kind, kind), lambda a, b: a - do.quotient(a, b) * b),
    r"(shl|shr)\.([bus]\d\d)": lambda name, kind: (kind, (kind, "u32"), partial(do.shift, name == "shl")),
    r"bfe\.([us]\d\d)": lambda kind: (kind, (kind, "u32", "u32"), do.field),
    r"prmt\.b32": lambda: ("b32", ("b32", "b32", "b32"), do.permute_bytes),
    r"(add|sub|mul)(?:\.rn)?(\.ftz)?\.(f32|f64)": lambda name, ftz, kind: (
        (kind, (kind, kind), _flushed(ftz, _PLAIN[name]))
    ),
    r"fma\.rn(\.ftz)?\.(f32|f64)": lambda ftz, kind: (kind, (kind, kind, kind), _flushed(ftz, do.fma)),
    r"(add|sub)\.rn\.f32\.(bf16|f16)": lambda name, kind: (
        ("f32", (kind, "f32"), lambda a, b: _PLAIN[name](a.astype(f4), b))
    ),
    r"(add|sub|mul)(?:\.rn)?\.f32x2": lambda name: ("b64", ("b64", "b64"), _in_halves(_PLAIN[name])),
    r"fma\.rn\.f32x2": lambda: ("b64", ("b64", "b64", "b64"), _in_halves(do.fma)),
    r"div\.(?:approx|full|rn)(\.ftz)?\.(f32|f64)": lambda ftz, kind: (kind, (kind, kind), _flushed(ftz, do.divide)),
    r"sqrt\.rn\.(f32|f64)": lambda kind: (kind, (kind,), np.sqrt),
    r"ex2\.approx(\.ftz)?\.f32": lambda ftz: ("f32", ("f32",), _flushed(ftz, do.ex2)),
    r"rcp\.approx\.ftz\.f64": lambda: ("f64", ("f64",), do.reciprocal),
    r"(neg|abs)(\.ftz)?\.(f32|f64)": lambda name, ftz, kind: (kind, (kind,), _flushed(ftz, _SIGN[name])),
    r"(min|max)(\.NaN)?\.(f32|f64)": lambda name, nan, kind: (kind, (kind, kind), partial(do.extreme, name, bool(nan))),
    rf"setp\.({'|'.join(_COMPARE)})\.([busf]\d\d|bf16)": lambda how, kind: ("pred", (kind, kind), _COMPARE[how]),
    r"selp\.([busf]\d\d)": lambda kind: (kind, (kind, kind, "pred"), lambda a, b, which: np.where(which, a, b)),
    # Registers are written in place, so no two may be one array.
    r"mov\.(b\d\d|u\d\d|f\d\d|pred)": lambda kind: (kind, (kind,), np.copy),
    r"cvt\.rn\.(bf16|f16)x2\.f32": lambda kind: ("b32", ("f32", "f32"), _narrow_pair(kind)),
    r"cvt(\.rmi)\.(f64|f32)\.(\2)": lambda *what: (what[1], (what[2],), _convert(*what)),
    r"cvt(\.rzi)\.([us]\d+)\.(f\d\d)": lambda *what: (what[1], (what[2],), _convert(*what)),
    r"cvt(\.rn)?\.([us]\d+|f\d\d|bf16)\.([us]\d+|f\d\d|bf16)": lambda *what: (what[1], (what[2],), _convert(*what)),
    r"shfl\.sync\.(bfly|idx|up)\.b32": lambda mode: ("b32", ("b32", "u32", "u32", "u32"), partial(do.shuffle, mode)),
    r"redux\.sync\.(add|min|max)\.(s32|u32|f32)": lambda how, kind: (kind, (kind, "u32"), partial(do.reduce_warp, how)),
}

TOGETHER = ("shfl", "redux", "ldmatrix", "stmatrix")  # by all threads of a warp at once
LEAVING = ("bra", "ret", "exit", "bar")  # the last of a piece
_MATRIX = r"(?:(ld)|st)matrix\.sync\.aligned\.m8n8\.x[124]((?(1)\.trans|(?!)))?\.shared\.b16"
_ACCESS = r"(ld|st)(?:\.(volatile))?\.(global|shared)(?:::cta)?(?:\.v([248]))?\.([bus]\d+)"
_ATOMIC = r"atom\.global\.gpu\.(?:relaxed|acq_rel)\.(add|min|max)\.([us]\d\d)"


class Meaning:
    """The functions of one kernel's instructions."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.accesses: dict[int, tuple[str, int]] = {}  # of instructions: which memory, and the bytes of an element
        self.steps = [self._step(number, instruction) for number, instruction in enumerate(kernel.code)]

    def _step(self, number: int, instruction: Instruction) -> Step | None:
        op, operands = instruction.op, instruction.operands
        if instruction.guard and (
            instruction.name in (*TOGETHER, "bar") or "mov" in op and Vector in map(type, operands)
        ):
            raise Refused(f"{op} under a predicate, at {instruction.where}")
        if op in ("bra", "bra.uni", "ret", "exit", "bar.sync"):
            if op == "bar.sync" and operands != (Number(0),):
                raise Refused(f"{op} {operands}: only barrier 0, of all threads")
            return None
        if op == "bar.warp.sync":
            return lambda t: t.machine.pass_warp_barrier(t)
        name, unless = instruction.guard, instruction.unless
        mask = name and (lambda t: ~t.registers[name] if unless else t.registers[name])
        if found := re.match(_ACCESS + "$", op):
            return self._access(number, operands, mask, found.groups())
        if found := re.match(_MATRIX + "$", op):
            return self._matrix(number, operands, bool(found[1]), bool(found[2]))
        if found := re.match(_ATOMIC + "$", op):
            return self._atomic(number, operands, mask, *found.groups())
        if found := re.match(r"ld\.param\.([bus]\d+)$", op):
            write, place, kind = self._write(operands[0], found[1], mask), operands[1], TYPES[found[1]]
            return lambda t: write(t, t.machine.parameter(place.base, kind))
        if found := re.match(r"mov\.b(\d\d)$", op):
            if isinstance(operands[0], Vector):
                return self._unpack(operands[0], operands[1], int(found[1]))
            if isinstance(operands[1], Vector):
                return self._pack(operands[0], operands[1], int(found[1]))
        for pattern, build in FORMULAS.items():
            if found := re.match(pattern + "$", op):
                kind, kinds, function = build(*found.groups())
                if len(operands) == 4 and op.startswith(("min", "max")):  # of three, on sm_100
                    kinds, function = (kind,) * 3, partial(lambda of_two, a, b, c: of_two(of_two(a, b), c), function)
                if len(operands) != len(kinds) + 1:
                    raise Refused(f"{op} with {len(operands)} operands, at {instruction.where}")
                write = self._write(operands[0], kind, mask)
                values = [self._value(*pair) for pair in zip(operands[1:], kinds, strict=True)]
                return lambda t: write(t, function(*[value(t) for value in values]))
        raise Refused(f"the instruction {op}, at {instruction.where} of {self.kernel.name}")

    def _value(self, operand: Operand, kind: str) -> Value:
        """What an operand holds, as the numpy type of ``kind``."""
        plain = u2 if kind == "bf16" else TYPES[kind]
        if isinstance(operand, Number):
            value = np.array(operand.value & ((1 << 8 * plain().itemsize) - 1), f"u{plain().itemsize}").view(plain)[()]
            constant = bool(value) if kind == "pred" else do.of_bf16(value[None])[0] if kind == "bf16" else value
            return lambda t: constant
        if not isinstance(operand, str):
            raise Refused(f"operand {operand} as {kind}")
        if operand == SHARED:
            return lambda t: plain(0)
        if operand not in self.kernel.bits:
            return lambda t: t.machine.special(operand, t).astype(plain)
        bits, size = self.kernel.bits[operand], 1 if kind == "pred" else 8 * plain().itemsize
        if kind == "bf16":
            return lambda t: do.of_bf16(t.registers[operand])
        if bits == size:
            return lambda t: t.registers[operand].view(plain)
        if bits < size:
            raise Refused(f"a register of {bits} bits as {kind}")
        narrow = TYPES[f"u{size}"]
        return lambda t: t.registers[operand].astype(narrow).view(plain)

    def _write(self, operand: Operand, kind: str, mask: Value | None = None) -> Callable[[Threads, Any], None]:
        """Write values of ``kind`` to a register, extended to its width, where the mask holds."""
        if operand == "_":
            return lambda t, value: None
        bits = self.kernel.bits[operand]
        stored = TYPES["pred" if bits == 1 else f"u{bits}"]
        extended = TYPES[f"{'s' if kind[0] == 's' else 'u'}{bits}"] if bits > 1 else None

        def write(t: Threads, value: Any) -> None:
            value = do.to_bf16(value) if kind == "bf16" else np.asarray(value)
            if value.ndim == 0:
                value = np.full(t.n, value)
            if value.itemsize < stored().itemsize:
                value = value.astype(extended)
            value = value.view(stored)
            t.registers[operand] = value if mask is None else np.where(mask(t), value, t.registers[operand])

        return write

    def _unpack(self, into: Vector, source: Operand, bits: int) -> Step:
        value, part = self._value(source, f"b{bits}"), bits // len(into)
        writes = [self._write(name, f"b{part}") for name in into]
        narrow, wide = TYPES[f"b{part}"], TYPES[f"b{bits}"]

        def step(t: Threads) -> None:
            whole = value(t)
            for k, write in enumerate(writes):
                write(t, (whole >> wide(k * part)).astype(narrow))

        return step

    def _pack(self, into: Operand, sources: Vector, bits: int) -> Step:
        part, wide = bits // len(sources), TYPES[f"b{bits}"]
        values, write = [self._value(name, f"b{part}") for name in sources], self._write(into, f"b{bits}")
        parts = [(value, wide(k * part)) for k, value in enumerate(values)]
        return lambda t: write(t, sum((value(t).astype(wide) << by for value, by in parts), wide(0)))

    def _address(self, place: Operand, space: str) -> Value:
        assert isinstance(place, Place)
        base, distance = self._value(place.base, "u64" if space == "global" else "u32"), place.distance
        return lambda t: np.broadcast_to(base(t), t.n).astype(np.int64) + distance

    def _access(self, number: int, operands: Any, mask: Value | None, words: tuple[Any, ...]) -> Step:
        name, _, space, count, kind = words
        size, unsigned = TYPES[kind]().itemsize, TYPES[f"u{kind[1:]}"]
        self.accesses[number] = space, size
        place, data = operands if name == "st" else operands[::-1]
        names = data if isinstance(data, Vector) else (data,)
        if len(names) != int(count or 1):
            raise Refused(f"{name} of {names}")
        address = self._address(place, space)
        writes = [self._write(register, kind, mask) for register in names] if name == "ld" else []
        values = [self._value(item, f"u{kind[1:]}") for item in names] if name == "st" else []

        def load(t: Threads) -> None:
            found = t.machine.memory.load(space, number, t, address(t), mask and mask(t), size, len(writes))
            for k, write in enumerate(writes):
                write(t, found[:, k])

        def store(t: Threads) -> None:
            items = np.empty((t.n, len(values)), unsigned)
            for k, value in enumerate(values):
                items[:, k] = value(t)
            t.machine.memory.store(space, number, t, address(t), mask and mask(t), items)

        return load if name == "ld" else store

    def _atomic(self, number: int, operands: Any, mask: Value | None, name: str, kind: str) -> Step:
        write, address, value = self._write(operands[0], kind, mask), self._address(operands[1], "global"), operands[2]
        read = self._value(value, kind)
        self.accesses[number] = "global", TYPES[kind]().itemsize

        def step(t: Threads) -> None:
            values = np.broadcast_to(read(t), t.n)
            write(t, t.machine.memory.atomic(number, t, address(t), mask and mask(t), _PLAIN[name], values))

        return step

    def _matrix(self, number: int, operands: Any, is_load: bool, transposed: bool) -> Step:
        """Matrices of 8 x 8 16-bit numbers; lanes 8 i to 8 i + 7 hold the addresses of the rows of matrix i."""
        place, data = operands[::-1] if is_load else operands
        address = self._address(place, "shared")
        lane = np.arange(WARP)
        # Of a lane's word in a matrix the parts: their row, and their place in it.
        spots = [(lane // 4, 4 * (lane % 4))]
        if transposed:  # two neighbours of one column
            spots = [(2 * (lane % 4) + k, 2 * (lane // 4)) for k in range(2)]
        size = 4 // len(spots)
        self.accesses[number] = "shared", size
        ends = [self._write(r, "b32") if is_load else self._value(r, "b32") for r in data]

        def step(t: Threads) -> None:
            rows, memory = address(t).reshape(-1, WARP), t.machine.memory
            for matrix, end in enumerate(ends):
                places = [(rows[:, 8 * matrix + row] + distance).reshape(-1) for row, distance in spots]
                if is_load:
                    parts = [memory.load("shared", number, t, at, None, size, 1)[:, 0].astype(u4) for at in places]
                    end(t, sum((part << u4(16 * k) for k, part in enumerate(parts)), u4(0)))
                else:
                    memory.store("shared", number, t, places[0], None, end(t)[:, None])

        return step
