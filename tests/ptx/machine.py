"""A launch: its programs in batches, all threads of a batch at once, over straight pieces of the kernel."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx.arithmetic import TYPES, WARP, Array
from ptx.meaning import LEAVING, TOGETHER, Meaning, Step
from ptx.memory import EPOCH, POISON, Memory
from ptx.reading import Instruction, Kernel, Refused


@dataclass
class Settings:
    """How launches are executed."""

    # None: in order. Else warps take turns at random at every access to memory; after an odd seed some run far ahead.
    seed: int | None = None
    threads: int = 16_384  # in flight together, at most
    steps: int = 2_000_000  # after which a launch counts as endless


@dataclass
class Piece:
    """Instructions that a thread executes one after another, and where it goes then."""

    steps: list[Step]
    length: int
    first: int
    last: Instruction
    after: int
    target: int
    together: bool  # whether all threads of a warp have to be there


class Translated:
    """A kernel in pieces; ``fine``: they end before each access to memory that others see."""

    def __init__(self, kernel: Kernel, fine: bool) -> None:
        self.kernel, code = kernel, kernel.code
        meaning = Meaning(kernel)
        steps, self.strong = meaning.steps, [i.name == "atom" or ".volatile" in i.op for i in code]
        self.shared_cell = min((size for space, size in meaning.accesses.values() if space == "shared"), default=4)
        starts = {
            0,
            *kernel.labels.values(),
            *(at + 1 for at, i in enumerate(code) if i.name in LEAVING and not steps[at]),
        }
        if fine:
            starts |= set(meaning.accesses)
        bounds = [*sorted(at for at in starts if at < len(code)), len(code)]
        number = {at: k for k, at in enumerate(bounds)}
        self.pieces = []
        for k, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            part, last = code[begin:end], code[end - 1]
            target = number[kernel.labels[str(last.operands[0])]] if last.name == "bra" else -1
            does = [step for step in steps[begin:end] if step]
            together = any(i.name in TOGETHER for i in part)
            self.pieces.append(Piece(does, end - begin, begin, last, k + 1, target, together))


class Own(dict[str, Array]):
    """Registers of some threads, taken from those of all threads when they are first asked for."""

    def __init__(self, everybodys: dict[str, Array], lanes: Array) -> None:
        self.everybodys, self.lanes, self.taken = everybodys, lanes, dict[str, Array]()

    def __missing__(self, name: str) -> Array:
        self[name] = self.taken[name] = self.everybodys[name][self.lanes]
        return self[name]

    def give_back(self) -> None:
        for name, value in self.items():
            if value is not self.taken.get(name):
                self.everybodys[name][self.lanes] = value


class Threads:
    """The threads that go through a piece together."""

    def __init__(self, machine: "Machine", lanes: Array, registers: dict[str, Array]) -> None:
        self.machine, self.lanes, self.registers, self.n = machine, lanes, registers, len(lanes)
        self.ids, self.when, self.slots = machine.ids[lanes], machine.when[lanes], machine.slots[lanes]


class Machine:
    """One launch; ``memory`` and ``instructions`` tell what came of it."""

    def __init__(self, translated: Translated, grid: tuple[int, ...], values: dict[str, int], memory: Memory) -> None:
        self.translated, self.kernel, self.pieces = translated, translated.kernel, translated.pieces
        self.grid, self.values, self.memory = grid, values, memory
        self.end, self.waiting = len(self.pieces), len(self.pieces) + 1
        self.together = np.array([*(piece.together for piece in self.pieces), False, False])
        self.instructions = 0  # executed, of warps

    def run(self, settings: Settings, shared_bytes: int) -> None:
        self.settings, self.shared_bytes = settings, shared_bytes
        self.rng = self.memory.rng = None if settings.seed is None else np.random.default_rng(settings.seed)
        programs = np.arange(int(np.prod(self.grid)))
        if self.rng is not None:
            self.rng.shuffle(programs)
        at_once = max(1, settings.threads // self.kernel.threads)
        with np.errstate(all="ignore"):
            for begin in range(0, len(programs), at_once):
                self._run_batch(programs[begin : begin + at_once])

    def _run_batch(self, programs: Array) -> None:
        threads, n = self.kernel.threads, len(programs) * self.kernel.threads
        self.ids = (programs[:, None] * threads + np.arange(threads)).reshape(-1)
        self.slots = np.repeat(np.arange(len(programs)), threads)
        self.when = np.zeros(n, np.int64)
        self.at = np.zeros(n, np.int64)  # the piece of each thread; or ``end``, or ``waiting``
        self.resume = np.zeros(n, np.int64)
        self.registers = {
            name: np.ones(n, bool) if bits == 1 else np.full(n * bits // 8, POISON, np.uint8).view(TYPES[f"u{bits}"])
            for name, bits in self.kernel.bits.items()
        }
        self.memory.new_programs(len(programs), self.shared_bytes, self.translated.shared_cell)
        self.everybody = np.arange(n)
        self.urgency, self.running = np.arange(n // WARP, 0, -1), 0
        for _ in range(self.settings.steps):
            chosen = self._in_order() if self.rng is None else self._by_chance()
            if chosen is None:
                if (stuck := self.at != self.end).any():
                    at = int(self.at[stuck].min())
                    where = "a barrier" if at == self.waiting else self.kernel.code[self.pieces[at].first].where
                    self.memory.findings.add("threads wait for others that never come", self.kernel.name, where, 1)
                return
            self._execute(self.pieces[self.at[chosen[0]]], chosen)
        raise RuntimeError(f"{self.kernel.name} does not end")

    def _able(self) -> Array:
        """Threads that can go on: where a warp has to act together, all of it must be there."""
        warps = self.at.reshape(-1, WARP)
        whole = (warps == warps[:, :1]).all(1)
        return ((self.at < self.end).reshape(warps.shape) & (whole[:, None] | ~self.together[warps])).reshape(-1)

    def _in_order(self) -> Array | None:
        """All threads at the first piece that somebody is at: those that are ahead wait for the others."""
        if (self.at == self.at[0]).all() and self.at[0] < self.end:
            return self.everybody
        able = self._able()
        return np.flatnonzero(able & (self.at == self.at[able].min())) if able.any() else None

    def _by_chance(self) -> Array | None:
        at, far_ahead = self.at.reshape(-1, WARP), self.settings.seed % 2
        if far_ahead and self.rng.random() > 0.02:  # who runs goes on until it has to wait, or somebody hurries
            mine = at[self.running]
            if mine[0] < self.end and (mine == mine[0]).all():
                return np.arange(WARP) + WARP * self.running
        able = self._able().reshape(-1, WARP)
        can = able.any(1)
        if not can.any():
            return None
        if not far_ahead or self.rng.random() < 0.5:
            self.urgency = self.rng.random(len(can))
        warp = self.running = int(np.argmax(np.where(can, self.urgency, -1)))
        here = able & (at == self.rng.choice(at[warp][able[warp]]))
        company = np.zeros(len(can), bool) if far_ahead else self.rng.random(len(can)) < self.rng.random()
        company[warp] = True
        return np.flatnonzero(here & company[:, None])

    def _execute(self, piece: Piece, lanes: Array) -> None:
        own = self.registers if len(lanes) == len(self.at) else Own(self.registers, lanes)
        t = Threads(self, lanes, own)
        for step in piece.steps:
            step(t)
        if isinstance(own, Own):
            own.give_back()
        self.instructions += (np.count_nonzero(np.diff(lanes // WARP)) + 1) * piece.length
        last = piece.last
        guarded = None if last.guard is None or last.name not in LEAVING else own[last.guard] ^ last.unless
        if last.name == "bra":
            self.at[lanes] = piece.target if guarded is None else np.where(guarded, piece.target, piece.after)
        elif last.name in ("ret", "exit"):
            self.at[lanes] = self.end if guarded is None else np.where(guarded, self.end, piece.after)
            self._release()
        elif last.op == "bar.sync":
            self.at[lanes], self.resume[lanes] = self.waiting, piece.after
            self._release()
        else:
            self.at[lanes] = piece.after

    def _release(self) -> None:
        """Programs of which all threads have come to a barrier, or left, go on."""
        at = self.at.reshape(-1, self.kernel.threads)
        for program in np.flatnonzero((at >= self.end).all(1) & (at == self.waiting).any(1)):
            here = slice(program * self.kernel.threads, (program + 1) * self.kernel.threads)
            waits = self.at[here] == self.waiting
            goes_on = self.resume[here][waits]
            where = self.kernel.code[self.pieces[int(goes_on[0]) - 1].first].where
            if not waits.all():
                self.memory.findings.add("a barrier that some threads have left", self.kernel.name, where, 1)
            if (goes_on != goes_on[0]).any():
                self.memory.findings.add("threads meet at different barriers", self.kernel.name, where, 1)
            self.at[here] = np.where(waits, self.resume[here], self.end)
            self.when[here] += EPOCH

    def pass_warp_barrier(self, t: Threads) -> None:
        self.when[t.lanes] += 1
        t.when = self.when[t.lanes]

    def parameter(self, name: str, kind: Any) -> Any:
        size = kind().itemsize
        return np.frombuffer((self.values[name] & ((1 << 8 * size) - 1)).to_bytes(size, "little"), kind)[0]

    def special(self, name: str, t: Threads) -> Any:
        """A register that the device sets."""
        thread, program, (x, y, _) = t.ids % self.kernel.threads, t.ids // self.kernel.threads, self.grid
        known = {"%tid.x": thread, "%ctaid.x": program % x, "%ctaid.y": program // x % y, "%ctaid.z": program // x // y}
        known |= {f"%nctaid.{axis}": np.full(t.n, many) for axis, many in zip("xyz", self.grid, strict=True)}
        if name not in known:
            raise Refused(f"the register {name} of {self.kernel.name}")
        return known[name].astype(np.uint32)
