"""Processes that stay, joined by gloo, so that an ordinary test can call a function on all of them."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLDS = (2, 4)
# Two that are neither all ranks nor the first ones: their ranks in the group are not their global ones.
PAIR = (1, 3)

_groups: dict[int, Any] = {}


def process_group(size: int) -> Any:
    """On a rank: the group of that size."""
    return _groups[size]


class Ranks:
    """Four processes; ``call`` runs a function with arguments of its own on each of them, or on each of a pair."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = Path(self.folder.name) / "store"
        self.pipes, self.processes = [], []
        for rank in range(WORLDS[-1]):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(store), theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], arguments: Sequence[tuple]) -> list[Any]:
        """What ``function``, of a module's top level, returns (or raises) on each rank: one tuple of arguments each."""
        size = len(arguments)
        pipes = self.pipes if size == WORLDS[-1] else [self.pipes[rank] for rank in PAIR]
        for pipe, rank_arguments in zip(pipes, arguments, strict=True):
            pipe.send_bytes(pickle.dumps((function, rank_arguments)))
        answers = []
        for pipe in pipes:
            if not pipe.poll(100):
                raise TimeoutError(f"{function.__name__} hangs")
            answers.append(pickle.loads(pipe.recv_bytes()))
        for ok, answer in answers:
            if not ok:
                raise RuntimeError(f"on a rank:\n{answer}")
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons memory, as in the tests' own process
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLDS[-1], timeout=timedelta(seconds=60)
    )
    # Short: a rank that the other has left alone fails a test instead of holding it up.
    pair = dist.new_group(list(PAIR), timeout=timedelta(seconds=20))
    _groups.update({WORLDS[0]: pair, WORLDS[-1]: dist.group.WORLD})
    while True:
        function, arguments = pickle.loads(pipe.recv_bytes())
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
