"""Rollouts from a file of JSON lines, one prompt at a time, so that the file may be larger than memory."""

import gzip
import importlib.resources
import json
import math
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast


class Failure(Exception):
    """What went wrong, as one sentence for the person at the terminal."""


@dataclass
class Prompt:
    """One line of the file, checked, with null read as NaN. ``record`` is the line as it came, to be written again.

    ``rewards`` are all that each rollout earns; of this ``step_rewards`` come at its tokens (None: nothing does) and
    ``last`` at its end. ``is_trained``: for each rollout, whether each token counts; None: all do.
    """

    where: str
    record: dict[str, Any]
    name: str
    text: str
    token_ids: list[list[int]]
    logprobs: list[list[float]]
    rewards: list[float]
    tokens: list[list[str] | None]
    is_trained: list[list[bool]] | None = None
    step_rewards: list[list[float]] | None = None
    last: list[float] = field(default_factory=list)

    def earn(self, last: list[float], step_rewards: list[list[float]] | None) -> None:
        """Set what the rollouts earn, at their ends and at their tokens."""
        self.last, self.step_rewards = last, step_rewards
        steps = step_rewards or [[] for _ in last]
        self.rewards = [math.fsum([reward, *row]) for reward, row in zip(last, steps, strict=True)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each rollout."""
        return [len(row) for row in self.token_ids]


@contextmanager
def sample() -> Iterator[Path]:
    """The rollouts that come with the package."""
    resource = importlib.resources.files(__package__).joinpath(_SAMPLE)
    if not resource.is_file():
        raise Failure(f"the sample {_SAMPLE} is missing from this installation: name a file of rollouts")
    with importlib.resources.as_file(resource) as path:
        yield path


_SAMPLE = "sample_rollouts.jsonl.gz"
# Other packings, by the first bytes of a file.
_PACKED = {
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    b"PK\x03\x04": ("zip", "unzip"),
}


class RolloutFile:
    """The prompts of a .jsonl or .jsonl.gz file; iterating reads a line when it is asked for, and never looks ahead."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._raw = open(path, "rb")  # noqa: SIM115 - closed by __exit__
            # A link may have any name.
            begin = self._raw.peek(5)[:5]
        except OSError as error:
            raise Failure(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
        for magic, (kind, unpack) in _PACKED.items():
            if begin.startswith(magic):
                self._raw.close()
                raise Failure(f"{path} is packed with {kind}, and only gzip is read here: {unpack} it first")
        is_gzip = path.name.endswith(".gz") or begin[:2] == b"\x1f\x8b"
        status = os.fstat(self._raw.fileno())
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
        self._lines = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw)) if is_gzip else self._raw

    def __enter__(self) -> "RolloutFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    def position(self) -> int:
        """Bytes of the file read so far, compressed ones where it is compressed; 0 for a pipe."""
        return 0 if self.size is None else self._raw.tell()

    def __iter__(self) -> Iterator[Prompt]:
        number = 0
        try:
            for number, line in enumerate(self._lines, 1):
                if line.strip():
                    yield _parse(line, number, f"{self.path}, line {number}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            if isinstance(error, gzip.BadGzipFile) and not number:
                raise Failure(f"{self.path} is not a gzip file, although its name ends in .gz") from error
            raise Failure(f"{self.path}, after line {number}: the gzip data are damaged or end too early") from error
        except OSError as error:
            raise Failure(f"cannot read {self.path}: {(error.strerror or str(error)).lower()}") from error
        except _Malformed as error:
            raise Failure(f"{self.path}, line {number}: {error}") from error


class _Malformed(Exception):
    """What is wrong with a line; the reader adds where it is."""


def _parse(line: bytes, number: int, where: str) -> Prompt:
    """The prompt on a line of the file, or a _Malformed that says what is wrong with it."""
    try:
        # A byte order mark is legal at the start of the file only, where some editors put it.
        decoded = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        record = json.loads(decoded, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _Malformed(f"not UTF-8 text (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        # Some of the messages end in "at" themselves.
        raise _Malformed(f"not JSON: {error.msg.lower().removesuffix(' at')} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise _Malformed("not JSON that can be read: a number is too long, or the nesting too deep") from error
    if not isinstance(record, dict):
        raise _Malformed(f"must be an object with a list 'completions', got {_kind(record)}")
    completions = _list(record, "completions", "the prompt")
    if not completions:
        raise _Malformed("completions is empty, a prompt needs one at least")

    name, text = record.get("prompt_id"), record.get("prompt")
    prompt = Prompt(
        where=where,
        record=record,
        name=f"line {number}" if name is None else str(name),
        text=text if isinstance(text, str) else "",
        token_ids=[],
        logprobs=[],
        rewards=[],
        tokens=[],
    )
    steps: list[list[float] | None] = []
    for index, completion in enumerate(completions):
        steps.append(_add_completion(prompt, completion, f"completions[{index}]"))
    filled = [row if row is not None else [0.0] * n for row, n in zip(steps, prompt.lengths, strict=True)]
    try:
        prompt.earn(prompt.rewards, None if all(row is None for row in steps) else filled)
    except OverflowError as error:
        raise _Malformed("the step_rewards of a completion sum to a number that is too large") from error
    return prompt


def _refuse_constant(name: str) -> None:
    raise _Malformed(f"not JSON: {name} is none of its numbers (null: a logprob or a reward that is not known)")


def _add_completion(prompt: Prompt, completion: object, where: str) -> list[float] | None:
    """Its step rewards, where it has any."""
    if not isinstance(completion, dict):
        raise _Malformed(f"{where} must be an object, got {_kind(completion)}")
    token_ids = _list(completion, "token_ids", where)
    _check_types(token_ids, {int}, f"{where}.token_ids", "an integer")
    if token_ids and not -(2**63) <= min(token_ids) <= max(token_ids) < 2**63:
        raise _Malformed(f"{where}.token_ids holds a number that does not fit 64 bits")

    logprobs = _list(completion, "logprobs", where)
    _check_types(logprobs, {int, float, type(None)}, f"{where}.logprobs", "a number or null")
    tokens = None
    if completion.get("tokens") is not None:
        tokens = _list(completion, "tokens", where)
        _check_types(tokens, {str}, f"{where}.tokens", "a string")
    steps = None
    if completion.get("step_rewards") is not None:
        steps = _list(completion, "step_rewards", where)
        _check_types(steps, {int, float}, f"{where}.step_rewards", "a number")
    for key, values in (("logprobs", logprobs), ("tokens", tokens), ("step_rewards", steps)):
        if values is not None and len(values) != len(token_ids):
            raise _Malformed(f"{where} has {len(token_ids)} token_ids and {len(values)} {key}")

    if "reward" not in completion and steps is None:
        raise _Malformed(f"{where} has no 'reward' (null: cannot be scored)")
    reward = completion.get("reward", 0.0)
    if type(reward) not in (int, float, type(None)):
        raise _Malformed(f"{where}.reward must be a number or null, got {_kind(reward)}")
    prompt.token_ids.append(token_ids)
    prompt.logprobs.append(_numbers(logprobs, f"{where}.logprobs"))
    prompt.rewards += _numbers([reward], f"{where}.reward")
    prompt.tokens.append(tokens)
    return None if steps is None else _numbers(steps, f"{where}.step_rewards")


def _list(record: dict[str, Any], key: str, where: str) -> list[Any]:
    if key not in record:
        raise _Malformed(f"{where} has no {key!r}")
    if not isinstance(record[key], list):
        raise _Malformed(f"{key} of {where} must be a list, got {_kind(record[key])}")
    return record[key]


def _check_types(values: list[Any], types: set[type], where: str, what: str) -> None:
    # Sets of types are compared without a Python loop over what may be many thousand tokens. A bool is no int here.
    if not set(map(type, values)) <= types:
        index = next(i for i, value in enumerate(values) if type(value) not in types)
        raise _Malformed(f"{where}[{index}] must be {what}, got {_kind(values[index])}")


def _numbers(values: list[float | None], where: str) -> list[float]:
    """Floats, NaN for null."""
    try:
        numbers = [math.nan if value is None else float(value) for value in values]
    except OverflowError:
        numbers = [math.inf]
    if math.inf in numbers or -math.inf in numbers:
        raise _Malformed(f"{where} holds a number that is too large")
    return numbers


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, bool | float):
        return json.dumps(value)
    words: dict[type, str] = {dict: "an object", list: "a list", str: "a string", int: "a number"}
    return words.get(type(value), "null")
