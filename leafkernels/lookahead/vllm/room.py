"""How many branches of a server's searches run at once; others wait in the order in which they came."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from leafkernels.lookahead.vllm.asked import RefusedError


class Room:
    """Room for ``most`` branches of all searches, and for ``waiting`` searches that have none yet."""

    def __init__(self, most: int, waiting: int) -> None:
        self._free, self._most_waiting = most, waiting
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    def check(self, branches: int) -> None:
        """Raise RefusedError (429) where so many branches would wait, and too many wait already."""
        if self._must_wait(branches) and len(self._queue) >= self._most_waiting:
            raise RefusedError(f"{len(self._queue)} searches wait already: try again later", None, 429)

    @asynccontextmanager
    async def hold(self, branches: int) -> AsyncIterator[None]:
        """Wait for room for so many branches, and keep it; raises as ``check`` does."""
        self.check(branches)
        if self._must_wait(branches):
            await self._wait(branches)
        else:
            self._free -= branches
        try:
            yield
        finally:
            self._give(branches)

    def _must_wait(self, branches: int) -> bool:
        return bool(self._queue) or branches > self._free

    async def _wait(self, branches: int) -> None:
        entry = branches, asyncio.get_running_loop().create_future()
        self._queue.append(entry)
        try:
            await entry[1]
        except asyncio.CancelledError:
            if not entry[1].cancelled():  # room was given as it left
                self._give(branches)
            elif entry in self._queue:
                self._queue.remove(entry)
                self._give(0)  # what waits behind it may fit
            raise

    def _give(self, branches: int) -> None:
        self._free += branches
        while self._queue and (self._queue[0][1].cancelled() or self._queue[0][0] <= self._free):
            wanted, future = self._queue.popleft()
            if not future.cancelled():
                self._free -= wanted
                future.set_result(None)
