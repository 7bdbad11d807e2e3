"""Evaluation mode while anything runs a model, in whichever thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# Of each module that a search runs: in how many of them it is now, and the mode that it was found in.
_MODES: dict[nn.Module, tuple[int, bool]] = {}
_MODES_LOCK = threading.Lock()


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode until the last thread leaves, and then each in its own.

    A frozen model may be in evaluation mode within a module that is in training mode.
    """
    modules = list(root.modules())
    with _MODES_LOCK:
        for module in modules:
            searches, mode = _MODES.get(module, (0, module.training))
            _MODES[module] = searches + 1, mode
        root.eval()
    try:
        yield
    finally:
        with _MODES_LOCK:
            for module in modules:
                searches, mode = _MODES.pop(module)
                if searches > 1:
                    _MODES[module] = searches - 1, mode
                else:
                    module.training = mode
