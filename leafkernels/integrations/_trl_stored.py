"""A teacher whose answers lie in the dataset: ``StoredTeacher``, of completions that lie there too."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor
from trl import GRPOTrainer

from leafkernels.vocabulary.divergence import MOST_LOGPROB, MOST_PROBABILITY


class StoredTeacher:
    """What a teacher said of stored completions: for each token its most likely ids, and their log-probabilities.

    The student does not sample: it is trained on the completions of the dataset, with ``fire_loss="forward_kl"`` over
    the stored ids and, as one class, all others. That is off-policy distillation: the student learns what the teacher
    says behind those completions, and not behind its own.

    Args:
        completion: the column of a completion's ids, its end-of-sequence token included, (T,) for each row.
        token_ids: the column of the ids before each of them, (T, k), each once; tokens may have unequally many.
        logprobs: the column of their log-probabilities, (T, k), at the temperature of the config.
    """

    def __init__(
        self,
        completion: str = "completion_ids",
        token_ids: str = "teacher_ids",
        logprobs: str = "teacher_logprobs",
    ) -> None:
        for name, column in (("completion", completion), ("token_ids", token_ids), ("logprobs", logprobs)):
            if not isinstance(column, str) or not column:
                raise ValueError(f"{name} must be the name of a column, got {column!r}")
        self.columns = (completion, token_ids, logprobs)

    def check(self, args: Any, has_rewards: bool) -> None:
        """Refuse options that have no meaning for what is stored."""
        name = "with a StoredTeacher"
        if Version(trl.__version__).release < (1, 14):
            raise RuntimeError(
                f"a StoredTeacher needs TRL 1.14 or newer, got {trl.__version__}; pip install 'trl>=1.14'"
            )
        if args.fire_loss != "forward_kl" or args.fire_top_k is not None:
            raise ValueError(
                f"fire_loss must be 'forward_kl' {name}, and fire_top_k None: ids are those that are stored, and "
                f"completions are not the student's, got {args.fire_loss!r} and {args.fire_top_k}"
            )
        if args.fire_alpha or args.fire_drop:
            raise ValueError(
                f"fire_alpha and fire_drop must be 0 {name}, which has neither entropies nor the log-probability of "
                f"each token, got {args.fire_alpha} and {args.fire_drop}"
            )
        if has_rewards:
            raise ValueError(f"reward_funcs must be None {name}: nothing is sampled that they could be about")
        if args.use_vllm:
            raise ValueError(f"use_vllm must be False {name}: nothing is sampled")
        for option in ("num_generations", "num_generations_eval"):
            if getattr(args, option) not in (None, 1):
                raise ValueError(f"{option} must be 1 {name}: a prompt has one completion, got {getattr(args, option)}")

    def completions(self, rows: Sequence[dict[str, Any]], num_ids: int, most: int) -> list[list[int]]:
        """The stored completions of rows of the dataset.

        Raises:
            ValueError: a row lacks one, or it is none; the message says which.
        """
        name = self.columns[0]
        found = []
        for row in rows:
            ids: Any = row.get(name)
            is_list = isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < num_ids for i in ids)
            if not is_list or len(ids) > most:
                raise ValueError(
                    f"the column {name!r} must hold a completion of 1 to max_completion_length={most} ids below "
                    f"{num_ids} in every row, got {_short(ids)}"
                )
            found.append(list(ids))
        return found

    def lists(self, rows: Sequence[dict[str, Any]], num_ids: int, width: int) -> tuple[Tensor, Tensor]:
        """(rows, width, k) int64 ids, -1 where an entry is missing or from ``num_ids`` on, and log-probabilities."""
        read = [self._lists_of(row, num_ids) for row in rows]
        k = max(len(ids) for row in read for ids, _ in row)
        token_ids = torch.full((len(read), width, k), -1)
        logprobs = torch.full((len(read), width, k), -torch.inf)
        for number, row in enumerate(read):
            for token, (ids, values) in enumerate(row):
                token_ids[number, token, : len(ids)] = torch.tensor(ids)
                logprobs[number, token, : len(ids)] = torch.tensor(values)
        return token_ids, logprobs

    def _lists_of(self, row: dict[str, Any], num_ids: int) -> list[tuple[list[int], list[float]]]:
        completion, ids_of, logprobs_of = self.columns
        parts: tuple[Any, Any] = row.get(ids_of), row.get(logprobs_of)
        length = len(row[completion])
        for column, part in zip((ids_of, logprobs_of), parts, strict=True):
            if not isinstance(part, list) or len(part) != length:
                raise ValueError(
                    f"the column {column!r} must hold a list for each of the {length} ids of {completion!r}, got "
                    f"{_short(part)}"
                )
        found = []
        for token, (ids, values) in enumerate(zip(*parts, strict=True)):
            is_ids = isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)
            if not is_ids or len(set(ids)) != len(ids):
                raise ValueError(
                    f"the column {ids_of!r} must hold ids, one at least and each once, for each token, got "
                    f"{_short(ids)} for token {token}"
                )
            is_numbers = isinstance(values, list) and len(values) == len(ids)
            if not is_numbers or not all(_is_logprob(value) for value in values):
                raise ValueError(
                    f"the column {logprobs_of!r} must hold a log-probability, at most 0, for each of the {len(ids)} "
                    f"ids, got {_short(values)} for token {token}"
                )
            if sum(map(math.exp, values)) > MOST_PROBABILITY:
                raise ValueError(
                    f"the column {logprobs_of!r} must hold log-probabilities of one distribution, whose probabilities "
                    f"add up to at most 1, got {_short(values)} for token {token}"
                )
            kept = [pair for pair in zip(ids, values, strict=True) if pair[0] < num_ids]
            found.append(([i for i, _ in kept] or [-1], [float(value) for _, value in kept] or [-math.inf]))
        return found


def _is_logprob(value: Any) -> bool:
    return isinstance(value, int | float) and value <= MOST_LOGPROB  # NaN is not


def _short(value: Any) -> str:
    return f"{value!r:.80}"


class StoredCompletions(GRPOTrainer):
    """``GRPOTrainer`` that takes its completions from the dataset where its teacher is stored."""

    _stored: StoredTeacher | None = None
    _num_ids: int
    _teachers: dict[Any, Any]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._stored is None:
            return super()._generate_and_score_completions(inputs)
        self._completions = self._stored.completions(inputs, self._num_ids, self.args.max_completion_length)
        batch = super()._generate_and_score_completions(inputs)
        device = batch["completion_ids"].device
        num_ids = self._teachers[None].num_ids
        lists = self._stored.lists(inputs, num_ids, batch["completion_ids"].shape[1])
        batch["stored_ids"], batch["stored_logprobs"] = (part.to(device) for part in lists)
        return batch

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self._stored is None:
            return super()._generate_single_turn(*args, **kwargs)
        return self._completions, None
