"""What a study found: one file of gzipped lines of JSON, each a result and the part of the study that it is of."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Runs:
    """``results/runs.jsonl.gz`` of a study. Tables and pictures are made from it, and finished runs are not run again.

    Processes may add to one file at a time: a result is one write at its end.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results" / "runs.jsonl.gz"

    def of(self, part: str) -> list[Any]:
        """The results of a part, in the order in which they came."""
        return [line["result"] for line in self._lines() if line["part"] == part]

    def add(self, part: str, result: Any) -> None:
        """Keep one more result, whatever comes after it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write(_packed([{"part": part, "result": result}]))

    def replace(self, part: str, results: Iterable[Any]) -> None:
        """Put these in place of all of a part."""
        others = [line for line in self._lines() if line["part"] != part]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_bytes(_packed([*others, *({"part": part, "result": result} for result in results)]))
        os.replace(partial, self.path)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with gzip.open(self.path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def _packed(lines: list[dict[str, Any]]) -> bytes:
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    # No time of day, so that the same results are the same bytes.
    return gzip.compress(text.encode(), mtime=0)
