"""Python programs in processes that start with what takes long to import: a fork of one server of this run."""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from pages import ROOT
from support import without_interpreter

# What is not installed is left out.
IMPORTED = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "peft",
    "trl.trainer.grpo_trainer",
    "scipy.stats",
]


class Forked:
    """A program that runs: ``arguments`` are those of ``python``, a script, ``-c`` or ``-m``."""

    def __init__(self, *arguments: object, cwd: Path = ROOT, **environment: str) -> None:
        self.words = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        work = self.words, str(cwd), without_interpreter(**environment), self._folder.name
        self._process = context.Process(target=_run, args=work)
        with mock.patch.dict(os.environ, without_interpreter(), clear=True):  # the server starts with the first program
            self._process.start()

    def wait(self, timeout: float = 300, check: bool = True) -> subprocess.CompletedProcess[str]:
        """What it printed; ``check``: it must not fail."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.words, timeout)
        printed = [(Path(self._folder.name) / name).read_text(encoding="utf-8") for name in ("out", "err")]
        self._folder.cleanup()
        assert self._process.exitcode == 0 or not check, printed[0][-4000:] + printed[1][-4000:]
        return subprocess.CompletedProcess(self.words, self._process.exitcode, *printed)


def run_forked(
    *arguments: object, cwd: Path = ROOT, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """As ``run_python``, of which it takes nothing but the time of imports."""
    return Forked(*arguments, cwd=cwd, **environment).wait(timeout)


def run_ranks(script: str, folder: Path, *more: str) -> None:
    """Run a script of this directory as two ranks on a CPU; its arguments: a rank, where results go, ``more``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
        words = ROOT / "tests" / script, rank, folder / f"{rank}.pt", *more
        ranks.append(Forked(*words, cwd=folder, OMP_NUM_THREADS="1", **numbers, **where))
    done = [rank.wait(240, check=False) for rank in ranks]
    assert [rank.returncode for rank in done] == [0, 0], "\n".join(rank.stderr for rank in done)


def _run(words: Sequence[str], cwd: str, environment: dict[str, str], folder: str) -> None:
    gc.freeze()  # what has been imported stays: every training ends with a look for garbage
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    path, kind = environment.get("PYTHONPATH", "").split(os.pathsep), words[0]
    first = "" if kind in ("-c", "-m") else str(Path(kind).resolve().parent)
    sys.path[:] = [first, *path, *(place for place in sys.path if place != str(ROOT / "tests"))]
    if kind == "-c":
        sys.argv = ["-c", *words[2:]]
        main: Any = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(kind, run_name="__main__")
