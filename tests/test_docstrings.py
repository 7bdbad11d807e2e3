"""Every public function of credit, vocabulary and losses shows an example, and it prints what it shows."""

import inspect
from collections.abc import Callable
from typing import Any

import pages
import pytest
import torch

import leafkernels

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
