"""Memory of a launch: who touched what, and in which order.

A byte that nobody wrote is ``POISON``: a word of memory that is read and holds nothing else was never written.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ptx.arithmetic import WARP, Array
from ptx.reading import Kernel

POISON = 0xCB
_POISONED = {size: int.from_bytes([POISON] * size, "little") for size in (1, 2, 4)}
SPACING = 1 << 44  # between buffers, so that a stray address hits none
EPOCH = 1 << 20  # what a barrier adds to a thread's time; a barrier of a warp adds 1
SAME_VALUE = "the same value"

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
ONE, WARPS_OWN, PROGRAMS_OWN, EVERYBODY = range(4)  # how far the readers of a cell lie apart


class Finding(NamedTuple):
    kind: str
    kernel: str
    where: str


@dataclass
class Findings:
    """What was seen, how often, and an example of each."""

    times: Counter[Finding] = field(default_factory=Counter)
    examples: dict[Finding, str] = field(default_factory=dict)

    def add(self, kind: str, kernel: str, where: str, times: int, example: str = "") -> None:
        self.times[Finding(kind, kernel, where)] += times
        self.examples.setdefault(Finding(kind, kernel, where), example)

    def faults(self) -> list[Finding]:
        """Without the places where threads write one value together, which is harmless."""
        return [finding for finding in self.times if SAME_VALUE not in finding.kind]


class Region:
    """A storage, or the shared memory of all programs in flight; a cell is the least that an access touches."""

    def __init__(self, raw: Array, base: int, cell: int, name: str) -> None:
        self.raw, self.base, self.cell, self.name = raw, base, cell, name
        self.by_size = {size: raw[: len(raw) // size * size].view(kind) for size, kind in UNSIGNED.items()}
        # Reads before the first write: where nobody writes, nobody asks who read.
        self.pending: list[Access] | None = []

    def open_books(self) -> None:
        """Of each cell who last wrote and who last read: the thread, when, and by which instruction."""
        cells = len(self.raw) // self.cell + 1
        last = [("id", np.int64), ("when", np.int64), ("site", np.int32)]
        self.writer, self.reader = np.zeros(cells, last), np.zeros(cells, last)
        self.writer["id"] = self.reader["id"] = -1
        self.spread = np.zeros(cells, np.uint8)  # of the readers


class Access(NamedTuple):
    """Cells that threads touch: an entry for each cell and thread."""

    region: Region
    site: int
    index: Array
    ids: Array
    when: Array

    def of(self, which: Array) -> "Access":
        return self._replace(index=self.index[which], ids=self.ids[which], when=self.when[which])

    def sign(self, last: Array) -> None:
        for name, value in (("id", self.ids), ("when", self.when), ("site", self.site)):
            last[name][self.index] = value


class Memory:
    """What the threads of a launch load and store."""

    def __init__(self, kernel: Kernel, strong: list[bool], regions: list[Region], findings: Findings) -> None:
        self.kernel, self.threads, self.strong, self.findings = kernel, kernel.threads, np.array(strong, bool), findings
        self.watch: Any = None
        self.regions = {region.base // SPACING: region for region in regions}
        self.shared = Region(np.zeros(0, np.uint8), 0, 1, "shared memory")
        self.stride = self.shared_bytes = 0
        # Of places that strong accesses meet: the programs that changed them; the first warp that asked, of a program
        # between two barriers; and the programs of which several did, with the instruction.
        self.changed_by: dict[Any, set[int]] = {}
        self.asked: dict[Any, int] = {}
        self.split: dict[Any, dict[int, int]] = {}
        self.rng: np.random.Generator | None = None

    def new_programs(self, count: int, shared_bytes: int, cell: int) -> None:
        self.shared_bytes, self.stride = shared_bytes, -(-shared_bytes // 16) * 16
        self.shared = Region(np.full(count * self.stride, POISON, np.uint8), 0, cell, "shared memory")

    # ``address`` and ``mask`` have an entry for each thread of ``t``, results too.
    def load(self, space: str, site: int, t: Any, address: Array, mask: Array | None, size: int, count: int) -> Array:
        found = np.full((t.n, count * size), POISON, np.uint8).view(UNSIGNED[size])
        for region, chosen, offset in self._find(space, site, t, address, mask, size * count):
            found[chosen] = values = region.by_size[size][offset[:, None] // size + np.arange(count)]
            unwritten = (values.view(np.uint32) if size > 4 else values) == _POISONED[min(size, 4)]
            if unwritten.any():
                kind = "shared memory" if region is self.shared else "memory"
                example = f"{region.name} + {int(offset[unwritten.any(1)][0])}"
                self._report(f"read of {kind} that nobody wrote", site, int(unwritten.sum()), example)
            self._note_read(*self._cells(region, site, t, chosen, offset, size * count))
        return found

    def store(self, space: str, site: int, t: Any, address: Array, mask: Array | None, items: Array) -> None:
        size, count = items.itemsize, items.shape[1]
        for region, chosen, offset in self._find(space, site, t, address, mask, size * count):
            at, cells, new = offset[:, None] // size + np.arange(count), region.by_size[size], items[chosen]
            same = (cells[at] == new).all(1)
            order = slice(None) if self.rng is None else self.rng.permutation(len(at))
            cells[at[order]] = new[order]
            kept = (cells[at] == new).all(1)
            self._note_write(*self._cells(region, site, t, chosen, offset, size * count, same, kept))

    def atomic(self, site: int, t: Any, address: Array, mask: Array | None, function: Any, values: Array) -> Array:
        found, size = np.zeros(t.n, values.dtype), values.itemsize
        for region, chosen, offset in self._find("global", site, t, address, mask, size):
            cells, mine, old = region.by_size[size].view(values.dtype), values[chosen], found[chosen]
            for i in range(len(offset)) if self.rng is None else self.rng.permutation(len(offset)):
                old[i] = cells[offset[i] // size]
                cells[offset[i] // size] = function(old[i], mine[i])
            found[chosen] = old
            if (old.view(np.uint32) == _POISONED[4]).any():
                self._report("read of memory that nobody wrote", site, 1, region.name)
            unlike = np.zeros(len(offset), bool)
            self._note_write(*self._cells(region, site, t, chosen, offset, size, unlike, unlike))
        return found

    def _report(self, kind: str, site: int, times: int, example: str, other: int | None = None) -> None:
        where = self.kernel.code[site].where + ("" if other is None else f" after {self.kernel.code[other].where}")
        self.findings.add(kind, self.kernel.name, where, times, example)

    def _find(self, space: str, site: int, t: Any, address: Array, mask: Array | None, width: int) -> list[Any]:
        """The buffers that are met, by which threads, and where in each. What is wrong is reported and left out."""
        chosen = np.arange(t.n) if mask is None else np.flatnonzero(mask)
        address = address[chosen]
        if self.watch and len(chosen):
            self.watch(self.kernel, site, space, t.lanes[chosen], address, width)

        def keep(good: Array, what: str, chosen: Array, address: Array) -> tuple[Array, Array]:
            if good.all():
                return chosen, address
            self._report(what, site, int((~good).sum()), f"{width} bytes at {int(address[~good][0]):#x}")
            return chosen[good], address[good]

        chosen, address = keep(address % width == 0, "misaligned access", chosen, address)
        if space == "shared":
            inside = (address >= 0) & (address <= self.shared_bytes - width)
            chosen, address = keep(inside, "access beyond shared memory", chosen, address)
            return [(self.shared, chosen, t.slots[chosen] * self.stride + address)] if len(chosen) else []
        found, number = [], address // SPACING
        for buffer in number[:1] if (number == number[:1]).all() else np.unique(number):
            here = number == buffer
            region = self.regions.get(int(buffer), self.shared)
            offset = address[here] - region.base
            inside = (offset >= 0) & (offset <= (len(region.raw) if region is not self.shared else 0) - width)
            what = f"access out of bounds of {region.name if region is not self.shared else 'all buffers'}"
            found.append((region, *keep(inside, what, chosen[here], offset)))
        return [met for met in found if len(met[1])]

    # Races. A thread's time is in its ``when``: two accesses by threads of a program are in order if a barrier lies
    # between them, by threads of a warp also if one of the warp does.

    def _cells(
        self, region: Region, site: int, t: Any, chosen: Array, offset: Array, width: int, *of_threads: Array
    ) -> tuple[Any, ...]:
        """The access, and what is known of its threads, for each cell of each."""
        many = max(1, width // region.cell)
        index = (offset[:, None] // region.cell + np.arange(many)).reshape(-1)
        ids, when, *more = (np.repeat(x, many) if many > 1 else x for x in (t.ids[chosen], t.when[chosen], *of_threads))
        return Access(region, site, index, ids, when), *more

    def _note_read(self, a: Access) -> None:
        region, index = a.region, a.index
        if region.pending is not None and region is not self.shared:
            region.pending.append(a)
            return
        self._open(region)
        self._race("", a, region.writer[index])
        last, spread = region.reader[index], region.spread[index]
        apart = self._apart(last["id"], a.ids)
        # Who read before a barrier is in order with who reads behind it.
        settled = (apart < EVERYBODY) & (spread < EVERYBODY) & (last["when"] // EPOCH != a.when // EPOCH)
        settled |= (apart < PROGRAMS_OWN) & (spread < PROGRAMS_OWN) & (last["when"] != a.when)
        region.spread[index] = np.where((last["id"] < 0) | settled, ONE, np.maximum(spread, apart))
        a.sign(region.reader)
        distance = self._apart(region.reader["id"][index], a.ids)  # from the last of several that read at once
        for step in (WARPS_OWN, PROGRAMS_OWN, EVERYBODY):
            at = index[distance == step]
            region.spread[at] = np.maximum(region.spread[at], step)
        if self.strong[a.site]:
            self._note_strong(a, is_write=False)

    def _note_strong(self, a: Access, is_write: bool) -> None:
        """Warps of a program that load, each for itself, what another program changes may find different values."""
        warps = set(zip(a.index.tolist(), (a.ids // WARP).tolist(), (a.when // EPOCH).tolist(), strict=True))
        for cell, warp, epoch in warps:
            place, program = (a.region.name, cell), warp * WARP // self.threads
            if is_write:
                self.changed_by.setdefault(place, set()).add(program)
            elif self.asked.setdefault((place, program, epoch), warp) != warp:
                self.split.setdefault(place, {})[program] = a.site
            for reader, site in self.split.get(place, {}).items():
                if self.changed_by.get(place, set()) - {reader}:
                    self._report("warps read each for itself what other programs change", site, 1, a.region.name)

    def _note_write(self, a: Access, same: Array, kept: Array) -> None:
        region, index = a.region, a.index
        self._open(region)
        self._race_of_writes(a, same)
        self._race("", a, region.reader[index], region.spread[index])
        a.sign(region.writer)
        region.reader["id"][index], region.spread[index] = -1, ONE
        self._race_of_writes(a, kept)  # with the last of several that write at once
        if self.strong[a.site]:
            self._note_strong(a, is_write=True)

    def _open(self, region: Region) -> None:
        if region.pending is not None:
            reads, region.pending = region.pending, None
            region.open_books()
            for read in reads:
                self._note_read(read)

    def _race_of_writes(self, a: Access, alike: Array) -> None:
        last = a.region.writer[a.index]
        for kind, which in ((" of writes", ~alike), (f" of writes, {SAME_VALUE}", alike)):
            self._race(kind, a.of(which), last[which])

    def _apart(self, a: Array, b: Array) -> Array:
        """How far two threads lie apart."""
        in_program = np.where(a // WARP == b // WARP, np.where(a == b, ONE, WARPS_OWN), PROGRAMS_OWN)
        return np.where(a // self.threads == b // self.threads, in_program, EVERYBODY).astype(np.uint8)

    def _race(self, kind: str, a: Access, last: Array, spread: Array | int = ONE) -> None:
        """Report those of the accesses that nothing keeps in order with the last before them (id -1: there is none)."""
        apart = np.maximum(self._apart(last["id"], a.ids), spread)
        met = (last["id"] >= 0) & (apart > ONE) & ~(self.strong[last["site"]] & self.strong[a.site])
        met &= (apart == EVERYBODY) | (last["when"] // EPOCH == a.when // EPOCH)
        met &= (apart != WARPS_OWN) | (last["when"] == a.when)
        if not met.any():
            return
        for step, name in ((EVERYBODY, "programs"), (PROGRAMS_OWN, "warps"), (WARPS_OWN, "threads of a warp")):
            found = met & (apart == step)
            for other in np.unique(last["site"][found]):
                at = np.flatnonzero(found & (last["site"] == other))
                threads = [divmod(int(ids[at[0]]), self.threads) for ids in (a.ids, last["id"])]
                example = f"{a.region.name} + {int(a.index[at[0]]) * a.region.cell}, program and thread: {threads}"
                self._report(f"race of {name}{kind}", a.site, len(at), example, int(other))
