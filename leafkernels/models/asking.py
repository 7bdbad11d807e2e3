"""What is asked of a model of transformers: by its signatures, and in evaluation mode."""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

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


def bare_model(model: Any) -> Any:
    """The model of transformers inside of what wraps it: DistributedDataParallel, torch.compile, PEFT."""
    while True:
        inner = next((getattr(model, name) for name in ("module", "_orig_mod") if hasattr(model, name)), None)
        if inner is None:
            break
        model = inner
    return bare_model(model.get_base_model()) if hasattr(model, "get_base_model") else model


def parameters_of(model: Any) -> Mapping[str, inspect.Parameter]:
    """What the model's forward takes."""
    bare = bare_model(model)
    if "forward" in vars(bare):  # one of its own, as hooks of accelerate set it
        return inspect.signature(bare.forward).parameters
    kind: Any = type(bare)
    return _parameters_of_class(kind)


@cache
def _parameters_of_class(kind: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.forward).parameters


def device_of(model: Any) -> torch.device | None:
    """Where a model takes its ids; None where that cannot be told: its weights are spread, or some are elsewhere."""
    bare = bare_model(model)
    devices = {weight.device for weight in bare.parameters()}
    is_moved = hasattr(bare, "hf_device_map") or hasattr(bare, "_hf_hook")
    is_spread = any(hasattr(weight, name) for weight in bare.parameters() for name in ("device_mesh", "ds_id"))
    return None if is_moved or is_spread or len(devices) != 1 else devices.pop()


def is_checkpointed(bare: Any) -> bool:
    """Whether layers are run again in the backward pass, when the model is in training mode."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the second warns in transformers 5
    name = next((name for name in names if hasattr(type(bare), name)), None)
    return name is not None and bool(getattr(bare, name))


def text_config(model: Any) -> Any:
    """The config of the decoder, which may be a part of the model's."""
    config = bare_model(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def plain_ids(base: Any) -> Tensor:
    """Six ids that no number of the config names, so that they stand for words."""
    config = base.config
    named: set[int] = set()

    def read(value: Any) -> None:
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, list | tuple):
            for part in value:
                read(part)
        elif isinstance(value, int):
            named.add(value)

    read(config.to_dict())
    size = config.get_text_config().vocab_size
    free = [number for number in range(size) if number not in named] or list(range(size))
    return torch.tensor([free[(7 * place + 3) % len(free)] for place in range(6)])
