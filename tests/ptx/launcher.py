"""``kernel[grid](...)`` on CPU tensors: Triton specialises and compiles as for a GPU, and the machine executes."""

import functools
import struct
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ptx.machine import Machine, Settings, Translated
from ptx.memory import POISON, SPACING, Findings, Memory, Region
from ptx.reading import read


@dataclass
class Session:
    """What was executed since ``install``."""

    arch: int
    settings: Settings = field(default_factory=Settings)
    findings: Findings = field(default_factory=Findings)
    launches: Counter[str] = field(default_factory=Counter)
    programs: Counter[str] = field(default_factory=Counter)
    variants: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    # Is told of every access: of kernel and instruction, the space, the threads' numbers, addresses, and bytes.
    watch: Callable[..., None] | None = None
    instructions: Counter[str] = field(default_factory=Counter)  # executed by warps


MOST_SHARED = 227 * 1024  # on sm_90 and sm_100


@functools.cache
def _translated(text: str, fine: bool) -> Translated:
    return Translated(read(text), fine)


def run_text(text: str, shared: int, grid: tuple[int, int, int], arguments: list[Any], session: Session) -> None:
    """Execute PTX with tensors, integers, or pairs of a ``struct`` format and a number for its parameters."""
    translated = _translated(text, session.settings.seed is not None)
    kernel = translated.kernel
    if shared > MOST_SHARED:
        raise ValueError(f"{kernel.name} needs {shared} bytes of shared memory, and a program gets {MOST_SHARED}")
    values = dict.fromkeys(kernel.parameters, 0)  # behind the arguments stands memory that no kernel here asks for
    regions: dict[int, Region] = {}
    for name, value in zip(kernel.parameters, arguments, strict=False):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if not value.numel():
                continue
            if (start := storage.data_ptr()) not in regions:
                raw = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
                base = (len(regions) + 1) * SPACING + SPACING // 2 + start % 256
                regions[start] = Region(raw, base, value.element_size(), name)
            regions[start].cell = min(regions[start].cell, value.element_size())
            values[name] = regions[start].base + value.data_ptr() - start
        else:
            values[name] = int.from_bytes(struct.pack(*value), "little") if isinstance(value, tuple) else int(value)
    memory = Memory(kernel, translated.strong, list(regions.values()), session.findings)
    memory.watch, machine = session.watch, Machine(translated, grid, values, memory)
    machine.run(session.settings, shared)
    session.launches[kernel.name] += 1
    session.programs[kernel.name] += int(np.prod(grid))
    session.variants[kernel.name].add(text)
    session.instructions[kernel.name] += machine.instructions


_FLOATS = {"fp32": "<f", "fp64": "<d", "fp16": "<e"}


def install(arch: int = 90) -> Session:
    """From now on, in this process, kernels take CPU tensors and are executed as compiled for ``sm_<arch>``.

    Triton's interpreter must be off when kernels are imported, and its cache one that no device uses: nothing is
    assembled. ``torch.empty`` fills what it returns with bytes that count as written by nobody.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction

    session = Session(arch)
    asked = {"target": GPUTarget("cuda", arch, 32), "device": 0, "stream": 0}  # when Triton compiles
    answers = {f"get_current_{name}": lambda *_, value=value: value for name, value in asked.items()}
    triton.runtime.driver.set_active(type("Device", (), answers)())
    CUDABackend.make_cubin = lambda *_: b"not assembled"
    compile_only = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        compiled = compile_only(self, *arguments, grid=grid, warmup=True, **named)
        if warmup:
            return compiled
        known = {name: value for name, value in named.items() if name in self.signature.parameters}
        bound = self.signature.bind(*arguments, **known)
        bound.apply_defaults()
        if callable(grid):
            grid = grid(bound.arguments)
        given = [
            (_FLOATS[kind], bound.arguments[name]) if kind in _FLOATS else bound.arguments[name]
            for name, kind in compiled.src.signature.items()
            if kind != "constexpr"
        ]
        run_text(compiled.asm["ptx"], compiled.metadata.shared, (*grid, 1, 1)[:3], given, session)
        return compiled

    JITFunction.run = run
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, _poisoned(getattr(owner, name)))
    return session


def _poisoned(allocate: Any) -> Any:
    def poisoned(*arguments: Any, **named: Any) -> Any:
        tensor = allocate(*arguments, **named)
        if tensor.device.type == "cpu" and tensor.numel():
            torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(POISON)
        return tensor

    return poisoned
