"""The rollouts written again with their advantages: all of them under the name asked for, or nothing."""

import gzip
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

from leafkernels.command.reading import Failure, Prompt


class Writer:
    """Writes a temporary file beside ``path`` and renames it to ``path`` when the block ends without an exception."""

    def __init__(self, path: Path) -> None:
        # The target of a link is replaced, not the link; and renaming over a device such as /dev/null would remove it.
        self._name = path
        self.path = Path(os.path.realpath(path))
        if self.path.exists() and not self.path.is_file():
            raise Failure(f"cannot write {path}: not a regular file")
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            self._raw = open(self._partial, "xb")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise self._failure(error) from error
        self._file: BinaryIO = self._raw
        if path.name.endswith(".gz"):
            # Without name and time the same rollouts always give the same bytes.
            packed = gzip.GzipFile(filename="", mode="wb", fileobj=self._raw, compresslevel=6, mtime=0)
            self._file = cast(BinaryIO, packed)

    def _failure(self, error: OSError) -> Failure:
        return Failure(f"cannot write {self._name}: {(error.strerror or str(error)).lower()}")

    def __enter__(self) -> "Writer":
        return self

    def write(self, prompt: Prompt, advantages: list[list[float]]) -> None:
        """Write the prompt's line as it came, with ``advantages`` added to (or replaced in) every completion."""
        for completion, values in zip(prompt.record["completions"], advantages, strict=True):
            completion["advantages"] = values
        # ASCII with escapes can hold every string, also the lone surrogates that tokens cut within a character have.
        line = json.dumps(prompt.record, separators=(",", ":")).encode("ascii") + b"\n"
        try:
            self._file.write(line)
        except OSError as error:
            raise self._failure(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        except OSError as failed:
            raise self._failure(failed) from failed
        finally:
            # A failed commit may have left data that cannot be flushed; they are not wanted.
            for file in (self._file, self._raw):
                with suppress(OSError):
                    file.close()
            self._partial.unlink(missing_ok=True)

    def _commit(self) -> None:
        self._file.close()
        self._raw.close()
        if self.path.exists():
            shutil.copymode(self.path, self._partial)
        os.replace(self._partial, self.path)
