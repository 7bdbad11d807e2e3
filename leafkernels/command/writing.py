"""Files that are written whole or not at all, and the rollouts written again with their advantages."""

import gzip
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, cast

from leafkernels.command.reading import Failure, Prompt

# What ends a process from outside and lets it clean up; Windows has no hang-up.
_ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing, that takes the place of ``path`` when the block ends without an exception.

    Until then it lies beside the target under a name of its own. After an exception, Ctrl-C, SIGTERM or SIGHUP it is
    removed and ``path`` is what it was. The target of a link is replaced, not the link, and keeps its permissions.

    Raises:
        Failure: ``path`` cannot be written, or an OSError left the block.
    """
    # Renaming over a device such as /dev/null would remove it for everybody.
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isfile(target):
        raise Failure(f"cannot write {path}: not a regular file")
    # Not made of the target's name, which may be as long as names can be, nor of the process number, which comes again.
    partial = target.with_name(f".leafkernels-{secrets.token_hex(8)}.partial")
    with _exit_at_signals():
        try:
            with open(partial, "xb") as file:
                yield file
            if target.exists():
                shutil.copymode(target, partial)
            os.replace(partial, target)
        except OSError as error:
            raise Failure(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _exit_at_signals() -> Iterator[None]:
    """Let the signals that would end the process at once raise SystemExit in the block, so that it cleans up."""
    caught: list[signal.Signals] = []

    def leave(number: int, frame: FrameType | None) -> None:
        for other in caught:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    # Only the main thread may; and who ignores a signal (nohup), or has a handler, knows why.
    if threading.current_thread() is threading.main_thread():
        caught = [number for number in _ENDINGS if signal.getsignal(number) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


class Writer:
    """Writes rollouts into what replaces ``path`` when the block ends without an exception."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()

    def __enter__(self) -> "Writer":
        self._file = self._stack.enter_context(replacing(self._path))
        # By the name of what is written, which a link may not tell.
        if os.path.realpath(self._path).endswith(".gz"):
            # Without name and time the same rollouts always give the same bytes.
            packed = gzip.GzipFile(filename="", mode="wb", fileobj=self._file, compresslevel=6, mtime=0)
            self._file = cast(BinaryIO, self._stack.enter_context(packed))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, prompt: Prompt, advantages: list[list[float]]) -> None:
        """Write the prompt's line as it came, with ``advantages`` added to (or replaced in) every completion."""
        for completion, values in zip(prompt.record["completions"], advantages, strict=True):
            completion["advantages"] = values
        # ASCII with escapes can hold every string, also the lone surrogates that tokens cut within a character have.
        self._file.write(_json(prompt.record).encode("ascii") + b"\n")


def _json(record: dict[str, Any]) -> str:
    try:
        return json.dumps(record, separators=(",", ":"), allow_nan=False)
    except ValueError:
        # A number such as 1e400, which JSON can hold and a float cannot: null, because Infinity is not JSON.
        finite = json.loads(json.dumps(record), parse_constant=lambda name: None)
        return json.dumps(finite, separators=(",", ":"))
