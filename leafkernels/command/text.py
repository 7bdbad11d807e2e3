"""Text that may hold anything, made fit for one line of a terminal."""

import unicodedata
from collections.abc import Sequence

from rich.cells import cell_len

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
