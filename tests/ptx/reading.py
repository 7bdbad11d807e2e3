"""PTX text -> a kernel: parameters, registers, instructions and labels."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Refused(Exception):
    """PTX that is not understood here: it names the line."""


class Number(NamedTuple):
    """An immediate operand: an integer, or the bits of a float."""

    value: int


class Place(NamedTuple):
    """An address: a register, a symbol or a parameter, and a distance in bytes."""

    base: str
    distance: int


class Vector(tuple[Any, ...]):
    """Several operands in braces."""


Operand = str | Number | Place | Vector


@dataclass(frozen=True)
class Instruction:
    op: str
    operands: tuple[Operand, ...]
    guard: str | None  # a predicate; where it does not hold (``unless``: where it holds) the thread does nothing
    unless: bool
    where: str  # line of the source, and of the PTX

    @property
    def name(self) -> str:
        return self.op.split(".")[0]


@dataclass
class Kernel:
    name: str
    threads: int
    parameters: list[str]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # of each the number of the instruction behind it
    bits: dict[str, int] = field(default_factory=dict)  # the width of each register; 1 for predicates


SHARED = "global_smem"  # Triton's name of the memory that the threads of a program share, at address 0


def read(text: str) -> Kernel:
    """The one kernel of a module, as Triton emits it: a statement a line, without functions that are called."""
    if text.count(".entry") != 1 or re.search(r"^\.(visible )?\.?func", text, re.M):
        raise Refused("a module of several kernels, or with functions that are called")
    head, _, body = text.partition(".entry")[2].partition("{")
    first_line = text[: len(text) - len(body)].count("\n") + 1
    threads = re.search(r"\.reqntid\s+(\d+)", head)
    if not threads or int(threads[1]) % 32:
        raise Refused("a kernel without a number of whole warps")
    kernel = Kernel(
        name=re.match(r"\s*([\w$]+)", head)[1],  # type: ignore[index]
        threads=int(threads[1]),
        parameters=re.findall(r"\.param\b[^,\n)]*?([\w$]+)\s*(?=[,\n)])", head),
    )
    files = {number: Path(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    source = "?"
    for number, line in enumerate(body.splitlines(), first_line):
        line = line.partition("//")[0].strip()
        if line == "}":
            break
        if found := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
            source = f"{files.get(found[1], '?')}:{found[2]}"
        elif found := re.match(r"\.reg\s+\.(\w+)\s+(.*);", line):
            _declare(kernel, found[1], found[2])
        elif found := re.match(r"([\w$]+):$", line):
            kernel.labels[found[1]] = len(kernel.code)
        elif line.startswith("{"):  # inline assembly with registers of its own
            _scope(kernel, line, number, f"{source} (PTX {number})")
        elif line and not line.startswith(".pragma"):
            if line.startswith(".") or not line.endswith(";"):
                raise Refused(f"line {number} of {kernel.name}: {line}")
            kernel.code.append(_instruction(line[:-1], f"{source} (PTX {number})"))
    return kernel


def _declare(kernel: Kernel, kind: str, names: str) -> None:
    bits = 1 if kind == "pred" else int(kind[1:])
    for name in names.split(","):
        stem, _, count = name.strip().rstrip(">").partition("<")
        kernel.bits |= {f"{stem}{i}": bits for i in range(int(count))} if count else {stem: bits}


def _scope(kernel: Kernel, line: str, number: int, where: str) -> None:
    if not line.endswith("}"):
        raise Refused(f"line {number} of {kernel.name}: a scope of several lines")
    for kind, name in re.findall(r"\.reg\s+\.(\w+)\s+(\w+);", line):
        _declare(kernel, kind, f"{name}.{number}")
        line = re.sub(rf"\b{name}\b", f"{name}.{number}", line)
    for statement in line[1:-1].split(";"):
        if statement.strip() and ".reg" not in statement:
            kernel.code.append(_instruction(statement.strip(), where))


def _instruction(statement: str, where: str) -> Instruction:
    guard, op, rest = re.match(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", statement).groups()  # type: ignore[union-attr]
    operands = tuple(_operand(text.strip()) for text in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest))
    return Instruction(op, operands, guard and guard.lstrip("!"), bool(guard) and guard[0] == "!", where)


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return Vector(_operand(part.strip()) for part in text[1:-1].split(","))
    if text[0] == "[":
        base, distance = re.match(r"\[\s*([^\s+\-\]]+)\s*(?:\+?\s*(-?\d+))?\s*\]", text).groups()  # type: ignore[union-attr]
        return Place(base, int(distance or 0))
    if re.match(r"0[fFdD][0-9a-fA-F]{8,16}$", text):
        return Number(int(text[2:], 16))
    if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
        return Number(int(text.rstrip("U"), 0))
    return text
