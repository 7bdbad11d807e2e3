"""What a study found: one file of gzipped lines of JSON, each a result and the part of the study that it is of."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


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


Task = tuple[int, str, float]  # spoken digits, what is rewarded, how often the teacher of the supervised start slips
TASKS: dict[Task, str] = {
    (2, "final", 0.5): "2 digits, right last number",
    (4, "final", 0.5): "4 digits, right last number",
    (4, "prefix", 0.5): "4 digits, right prefix",
    (4, "prefix", 0.9): "4 digits, right prefix, sure and wrong",
}


class Arm(NamedTuple):
    method: str
    boundaries: int
    label: str
    color: str


GRPO = Arm("grpo", 2, "GRPO", "C7")
TEMPO = Arm("tempo", 2, "TEMPO", "C2")


class Round(NamedTuple):
    seeds: range
    arms: dict[str, Arm]
    primary: list[list[tuple[Task, str]]]  # families of comparisons to grpo, each with Holm's correction of its own
    pairs: list[tuple[str, str]]  # other comparisons


_FIRST = {
    "grpo": GRPO,
    "dr_grpo": Arm("dr_grpo", 2, "Dr. GRPO", "C8"),
    "tempo": TEMPO,
    "leaf_b2": Arm("leaf", 2, "LEAF, B = 2", "C0"),
    "leaf_b4": Arm("leaf", 4, "LEAF, B = 4", "C1"),
}
_SECOND = {
    "grpo": GRPO,
    "tempo": TEMPO,
    "tree_td": Arm("tree_td", 2, "tree_td", "C3"),
    "tree_td_1": Arm("tree_td 1, 0.3", 2, "tree_td 1, 0.3", "C4"),
}
_EARLIER, _LAST = list(TASKS)[:3], list(TASKS)[3:]
ROUNDS = {
    "first": Round(
        range(8),
        _FIRST,
        # The last task was added after the others had been seen, and is corrected by itself.
        [[(task, arm) for task in tasks for arm in _FIRST if arm != "grpo"] for tasks in (_EARLIER, _LAST)],
        [],
    ),
    "second": Round(
        range(8, 16),
        _SECOND,
        [[(task, "tree_td") for task in TASKS]],
        [("tree_td", "tempo"), ("tree_td", "tree_td_1")],
    ),
}
