"""What is asked of a model of transformers: by its signatures, and in evaluation mode."""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Of each module that is run so: by how many now, and the mode that it was found in.
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
            users, mode = _MODES.get(module, (0, module.training))
            _MODES[module] = users + 1, mode
        root.eval()
    try:
        yield
    finally:
        with _MODES_LOCK:
            for module in modules:
                users, mode = _MODES.pop(module)
                if users > 1:
                    _MODES[module] = users - 1, mode
                else:
                    module.training = mode


def name_of_cache(base: Any) -> str:
    """Under which name the model reads a cache, or else transformers' ``generate`` hands it one."""
    from transformers import GenerationMixin

    for asked in (base.forward, GenerationMixin.prepare_inputs_for_generation):
        for name, parameter in inspect.signature(asked).parameters.items():
            if "Cache" in str(parameter.annotation):
                return name
    return "past_key_values"
