"""Several teachers, each of which scores its own rows."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from leafkernels._core.checks import check_tensor
from leafkernels.rows.groups import read_names


def fire_teachers(
    labels: Iterable[Hashable] | Tensor,
    teachers: Mapping[Hashable, Callable[[Tensor], Any]],
    *,
    device: torch.device | str | None = None,
) -> Any:
    """The results of each row's own teacher, in the order of the rows; no other teacher scores the row.

        models = {"math": math_model, "code": code_model}
        teachers = {label: lambda rows, model=model: score(model, ids[rows]) for label, model in models.items()}
        teacher_logprobs, teacher_entropy = fire_teachers(labels, teachers)

    Teachers are called without gradients, in the order of the mapping; one whose label no row has is not called (with
    models sharded over ranks, see to it that every rank calls).

    Example:
        >>> teachers = {"math": lambda rows: rows * 10.0, "code": lambda rows: -rows * 1.0}
        >>> leafkernels.fire_teachers(["math", "code", "math"], teachers)
        tensor([ 0., -1., 20.])

    Args:
        labels: one for each row: strings, ints, tuples, in a list, an array or a tensor; those of tensors are read.
        teachers: by label, what takes the indices (n,) int64 of its rows, ascending, and returns a tensor, or a tuple
            of tensors, whose first dimension is those rows. All return as many, of one shape and dtype.
        device: of the indices; None: the CPU.

    Returns:
        What the teachers return, for all rows: a tensor, or a tuple of tensors.

    Raises:
        TypeError, ValueError: a label is missing (None) or has no teacher, there is no row, or a teacher's result is
            not what it must be; the message names the label.
    """
    if not isinstance(teachers, Mapping) or not teachers:
        raise TypeError(f"teachers must be a mapping from labels to functions, not empty, got {teachers!r:.80}")
    names = read_names("labels", labels)
    rows_of: dict[Hashable, list[int]] = {label: [] for label in teachers}
    for row, name in enumerate(names):
        if name not in rows_of:
            known = ", ".join(map(repr, teachers))
            raise ValueError(f"labels must name a teacher of {known} for each row, got {name!r:.80} for row {row}")
        rows_of[name].append(row)
    if not names:
        raise ValueError("labels must name the teacher of at least one row, got none")
    results: list[Tensor] = []
    is_tensor = True
    first: Hashable = None
    for label, teacher in teachers.items():
        if not rows_of[label]:
            continue
        rows = torch.tensor(rows_of[label], dtype=torch.int64, device=device)
        with torch.no_grad():
            # A copy: what a teacher does to its indices does not move its results.
            found = teacher(rows.clone())
        parts = (found,) if isinstance(found, Tensor) else tuple(found)
        for part in parts:
            _check_part(label, part, rows)
        if not results:
            first, is_tensor = label, isinstance(found, Tensor)
            results = [part.new_empty((len(names), *part.shape[1:])) for part in parts]
        kinds, alike = ([(t.shape[1:], t.dtype, t.device) for t in of] for of in (parts, results))
        if kinds != alike:
            raise ValueError(
                f"teachers must return tensors of one shape, dtype and device for a row, got {_brief(parts)} from "
                f"{label!r:.80} and {_brief(results)} from {first!r:.80}"
            )
        for result, part in zip(results, parts, strict=True):
            result[rows.to(result.device)] = part.detach()
    return results[0] if is_tensor else tuple(results)


def _check_part(label: Hashable, part: Any, rows: Tensor) -> None:
    check_tensor(f"what teacher {label!r:.80} returns", part)
    if part.shape[:1] != rows.shape:
        raise ValueError(
            f"what teacher {label!r:.80} returns must have {rows.shape[0]} rows, got shape {tuple(part.shape)}"
        )


def _brief(parts: Iterable[Tensor]) -> str:
    return ", ".join(f"{tuple(part.shape[1:])} {part.dtype} on {part.device}" for part in parts)
