"""Text that may hold anything, made fit for one line of a terminal, and the texts of tokens."""

import unicodedata
from collections.abc import Sequence
from typing import Any, Protocol

from rich.cells import cell_len

from leafkernels.command.reading import Failure, Prompt

_SYMBOLS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}

# Format characters reorder or hide text, lone surrogates cannot be encoded, control characters drive the terminal.
_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(text: str, spaces: bool = True) -> str:
    """``text`` with symbols for white space and escapes for what would move the cursor; ``spaces=False`` keeps " "."""
    return "".join(_visible(char) if spaces or char != " " else char for char in text)


def _visible(char: str) -> str:
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    if unicodedata.category(char) in _ESCAPED:
        return char.encode("unicode_escape").decode("ascii")
    return char


def shorten(text: str, width: int) -> str:
    """``text`` in at most ``width`` columns, its middle left out where it is longer."""
    return text if cell_len(text) <= width else _ends(text, text, width)


def line_of_tokens(tokens: Sequence[str], width: int) -> str:
    """Tokens as running text in at most ``width`` columns; a million of them cost no more than those that fit."""
    if len(tokens) <= 2 * width:
        return shorten(visible("".join(tokens)), width)
    return _ends(visible("".join(tokens[:width])), visible("".join(tokens[-width:])), width)


def line_of_numbers(numbers: Sequence[int], width: int) -> str:
    """Token ids in at most ``width`` columns, no id cut in two."""
    words = [str(number) for number in (*numbers[:width], *numbers[max(width, len(numbers) - width) :])]
    if len(numbers) <= 2 * width and len(" ".join(words)) <= width:
        return " ".join(words)
    head: list[str] = []
    tail: list[str] = []
    # From both ends in turn, one column kept for the ellipsis.
    while len(head) + len(tail) < len(words):
        if len(head) <= len(tail):
            head.append(words[len(head)])
        else:
            tail.insert(0, words[-1 - len(tail)])
        if len(" ".join([*head, "…", *tail])) > width:
            (head if len(head) > len(tail) else tail).pop(-1 if len(head) > len(tail) else 0)
            break
    return " ".join([*head, "…", *tail])


def _ends(first: str, last: str, width: int) -> str:
    """The start of ``first``, an ellipsis and the end of ``last`` in ``width`` columns."""
    head = _fitting(first, width // 2)
    tail = _fitting(last[::-1], width - 1 - cell_len(head))[::-1]
    return head + "…" + tail


def _fitting(text: str, width: int) -> str:
    """As many leading characters as fit."""
    used = 0
    for index, char in enumerate(text):
        used += cell_len(char)
        if used > width:
            return text[:index]
    return text


class Tokenizer(Protocol):
    """What is needed of a tokenizer: the text of a list of ids."""

    def decode(self, token_ids: list[int], /) -> str: ...


class Texts:
    """The text of tokens one by one, each asked for once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        # Many tokenizers of transformers drop the space before the first word of a text: a token is decoded after "a".
        is_known = hasattr(tokenizer, "convert_ids_to_tokens") and hasattr(tokenizer, "encode")
        self._options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False} if is_known else {}
        self._first: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:] if is_known else []
        self._head = self._decode(self._first) if self._first else ""

    def of(self, token_ids: list[int]) -> list[str] | None:
        """The texts of a row; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        for token_id in token_ids:
            if token_id not in self._known:
                text = self._decode([*self._first, token_id])
                is_after = text.startswith(self._head)
                self._known[token_id] = text.removeprefix(self._head) if is_after else self._decode([token_id])
        return [self._known[token_id] for token_id in token_ids]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, **self._options))


class NamedTexts:
    """The texts of a file's ids by a tokenizer's name on the Hub or its folder; a Failure where it cannot be loaded."""

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise Failure(
                f"--tokenizer needs transformers, which cannot be imported here ({error}); pip install transformers"
            ) from error
        verbosity = logging.get_verbosity()
        # What it warns of concerns models; an error is raised below.
        logging.set_verbosity(logging.CRITICAL)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self._name, self._size, self._texts = name, len(tokenizer), Texts(tokenizer)
        except Exception as error:  # of any kind: what a folder may hold, transformers does not say
            reason = " ".join(str(error).split())
            raise Failure(f"--tokenizer {name} cannot be loaded: {reason[:300] or type(error).__name__}") from error
        finally:
            logging.set_verbosity(verbosity)

    def fill(self, prompt: Prompt) -> None:
        """Give the rollouts of a prompt their texts where the file has none."""
        for row, token_ids in enumerate(prompt.token_ids):
            if prompt.tokens[row] is None:
                for token_id in token_ids:
                    if not 0 <= token_id < self._size:
                        raise Failure(
                            f"{prompt.where}: token id {token_id} is none of the {self._size:,} of --tokenizer "
                            f"{self._name}"
                        )
                prompt.tokens[row] = self._texts.of(token_ids)
