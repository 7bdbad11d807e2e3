"""The API reference is the docstrings: they describe every argument, and their examples print what they show."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import pages
import pytest
import torch

import leafkernels
import leafkernels.distributed
import leafkernels.integrations.layouts
import leafkernels.lookahead
import leafkernels.models

PUBLIC: dict[str, Any] = {
    name: getattr(module, name)
    for module in (
        leafkernels,
        leafkernels.distributed,
        leafkernels.integrations.layouts,
        leafkernels.lookahead,
        leafkernels.models,
    )
    for name in module.__all__
}
FOLDERS = ("leafkernels.credit.", "leafkernels.vocabulary.", "leafkernels.losses.")
FUNCTIONS = [
    value
    for name, value in vars(leafkernels).items()
    if name in leafkernels.__all__ and inspect.isfunction(value) and value.__module__.startswith(FOLDERS)
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_example_of_a_docstring(function: Callable[..., Any]) -> None:
    names: dict[str, Any] = {"torch": torch, "leafkernels": leafkernels}
    assert pages.check_examples(inspect.getdoc(function) or "", names, function.__name__) >= 1


def described(name: str, seen: tuple[str, ...] = ()) -> set[str]:
    """Arguments that a docstring describes: in its ``Args:``, in its text, or by the name of another function."""
    text = inspect.getdoc(PUBLIC[name]) or ""
    section = re.split(r"^\S", text.partition("\nArgs:\n")[2], maxsplit=1, flags=re.M)[0]
    found = {key for keys in re.findall(r"^    (\w+(?:, \w+)*): ", section, re.M) for key in keys.split(", ")}
    quoted = set(re.findall(r"``(\w+)\b", text))
    for other in quoted & set(PUBLIC) - {name, *seen}:
        found |= described(other, (*seen, name))
    return found | quoted


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isfunction(value)])
def test_every_argument_is_described(name: str) -> None:
    arguments = inspect.signature(PUBLIC[name]).parameters.values()
    named = {argument.name for argument in arguments if argument.kind is not argument.VAR_KEYWORD}
    assert named - described(name) == set()


def test_the_first_lines_of_span_advantages_say_what_is_one_prompt() -> None:
    """Who passes (N, T) of several prompts without a grouping gets numbers and no error."""
    first_lines = " ".join((inspect.getdoc(leafkernels.span_advantages) or "").splitlines()[:4])
    assert re.search(r"2-D tensors without ``groups`` or ``group_size`` are the rollouts of one prompt", first_lines)


def test_every_public_name_is_on_one_page_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocstrings_handlers.python", reason="needs mkdocstrings: pip install -e '.[docs]'")
    monkeypatch.syspath_prepend(str(pages.ROOT / "docs"))
    hooks = importlib.import_module("hooks")
    monkeypatch.delitem(sys.modules, "hooks")
    texts = hooks.api_pages()
    on_pages = re.findall(r"^::: ([\w.]+)$", "\n".join(texts.values()), re.M)
    names = [path.rpartition(".")[2] for path in on_pages]
    plugs = {"trl", "trl_audio", "trl_distillation", "speech_rewards", "verl"}  # shown as whole modules
    assert sorted(set(names) - plugs) == sorted(PUBLIC) and len(names) == len(set(names))
    navigation = (pages.ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"api/{re.sub('[^a-z]+', '_', title.lower())}.md" in navigation for title in texts)
