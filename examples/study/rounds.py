"""The rounds of speech runs of PROTOCOL.md: which tasks, seeds and arms."""

from __future__ import annotations

from typing import NamedTuple

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
