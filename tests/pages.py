"""README and the pages of docs/: what stands in their fenced blocks, and how it is run."""

import doctest
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    language: str
    text: str


def read(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page, or of a part of one, in the languages named."""
    found = [Block(*match) for match in _FENCE.findall(text)]
    return [block for block in found if block.language in languages]


def run(text: str, names: dict[str, Any]) -> None:
    """Run the Python of a page: ``python`` blocks, and ``pycon`` blocks, which must print what they show."""
    for block in blocks(text, "python", "pycon"):
        if block.language == "python":
            exec(block.text, names)
        else:
            check_examples(block.text, names)


def check_examples(text: str, names: dict[str, Any], name: str = "example") -> int:
    """Run the lines after ``>>>`` of a text, and return how many examples it has."""
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    test.globs = names  # the parser takes a copy, and later blocks use what earlier ones define
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=failures.append, clear_globs=False)
    assert not failures, "".join(failures)
    return len(test.examples)
