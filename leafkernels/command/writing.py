"""Files that are written whole or not at all, and the rollouts written again with their advantages."""

import gzip
import json
import os
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, TextIO, cast

from leafkernels.command.reading import Failure

# Signals that end a process and let it clean up; Windows has no hang-up.
_ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


# Endings of names of packed files, which are not written here.
PACKED = (".xz", ".zst", ".bz2", ".lz4", ".zip")


def check_outputs(outputs: Mapping[str, Path | None], kept: Sequence[Path]) -> list[Path]:
    """The files to write; a Failure where two options name one file, under whatever name, or one is to be ``kept``."""
    given = {option: path for option, path in outputs.items() if path is not None}
    for option, path in given.items():
        for other in kept:
            if _is_one_file(path, other):
                raise Failure(f"{option} must be another file than {other}, which it would replace")
    for (first, path), (second, other) in combinations(given.items(), 2):
        if _is_one_file(path, other):
            raise Failure(f"{second} must be another file than {path}, which {first} writes")
    return list(given.values())


def _is_one_file(first: Path, second: Path) -> bool:
    if os.path.exists(first) and os.path.exists(second):
        return os.path.samefile(first, second)
    if os.path.exists(first) or os.path.exists(second):
        return False
    # What is not there yet is known by its folder and its name, in which some file systems see neither case nor the
    # form of an accent.
    folders, names = zip(*(os.path.split(os.path.realpath(path)) for path in (first, second)), strict=True)
    return folders[0] == folders[1] and _plain(names[0]) == _plain(names[1])


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing, that takes the place of ``path`` when the block ends without an exception.

    Until then it lies beside the target under a name of its own. After an exception, Ctrl-C, SIGTERM or SIGHUP it is
    removed and ``path`` is what it was. The target of a link is replaced, not the link, and keeps its permissions.
    Where standard output goes to (/dev/stdout) is not replaced: the whole is printed when the block ends.

    Raises:
        Failure: ``path`` cannot be written, or an OSError left the block.
    """
    printed = _standard_output(path)
    if printed is not None:
        with _exit_at_signals(), tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            try:
                printed.flush()
                shutil.copyfileobj(file, printed.buffer)
                printed.flush()
            except OSError as error:
                raise Failure(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error
        return
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


def _standard_output(path: Path) -> TextIO | None:
    """Standard output, if ``path`` is the file or the pipe that it goes to: renamed over, it would go nowhere."""
    try:
        own = os.fstat(sys.stdout.fileno())
        return sys.stdout if os.path.samestat(os.stat(path), own) and not stat.S_ISCHR(own.st_mode) else None
    except (OSError, ValueError):  # not there yet, or no file at all
        return None


@contextmanager
def _exit_at_signals() -> Iterator[None]:
    """Let the signals that would end the process at once raise SystemExit in the block, so that it cleans up."""
    caught: list[signal.Signals] = []

    def leave(number: int, frame: FrameType | None) -> None:
        for other in caught:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    # Only the main thread may; a signal that is ignored (nohup) or has a handler is left alone.
    if threading.current_thread() is threading.main_thread():
        caught = [number for number in _ENDINGS if signal.getsignal(number) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def writing(path: Path, append: bool = False) -> Iterator[BinaryIO]:
    """A file for lines of JSON that takes the place of ``path`` as ``replacing`` does, packed where it ends in .gz.

    ``append``: after the lines that are there.
    """
    # By the name of the target, not of a link to it.
    name = os.path.realpath(path)
    if name.lower().endswith(PACKED):
        raise Failure(f"--out must be plain or end in .gz (.jsonl, .jsonl.gz), got {path}")
    is_gzip = name.endswith(".gz")
    with replacing(path) as file:
        if append and os.path.exists(name):
            with open(name, "rb") as old:
                is_gzip = old.read(2) == b"\x1f\x8b"
                old.seek(0)
                shutil.copyfileobj(old, file)
            if not _ends_a_line(name, is_gzip):
                file.write(gzip.compress(b"\n", mtime=0) if is_gzip else b"\n")
        if not is_gzip:
            yield file
            return
        # Without name and time the same rollouts always give the same bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0) as packed:
            yield cast(BinaryIO, packed)


def _ends_a_line(name: str, is_gzip: bool) -> bool:
    last = b"\n"
    try:
        with gzip.open(name) if is_gzip else open(name, "rb") as old:
            while part := old.read(1 << 20):
                last = part
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Failure(f"{name}: the gzip data are damaged or end too early") from error
    return last.endswith(b"\n")


def line_of(record: dict[str, Any]) -> bytes:
    """A line of the file. ASCII with escapes holds every string, also the lone surrogates of tokens cut in a character.

    A number such as 1e400, which JSON can hold and a float cannot, becomes null, because Infinity is not JSON.
    """
    try:
        text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(record), parse_constant=lambda name: None)
        text = json.dumps(finite, separators=(",", ":"))
    return text.encode("ascii") + b"\n"
