"""What is asked of a model of transformers: by its signatures, in evaluation mode, and by a few tokens."""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leafkernels._core.checks import values_readable

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


def check_model(model: Any) -> Any:
    """The model of transformers inside of what wraps it; raise unless it is a decoder of tokens."""
    bare = bare_model(model) if isinstance(model, nn.Module) else model
    if not isinstance(bare, nn.Module) or not hasattr(bare, "config") or not hasattr(bare, "get_input_embeddings"):
        raise TypeError(f"model must be one of transformers, with a config and an embedding, got {type(bare).__name__}")
    if getattr(bare.config, "is_encoder_decoder", False):
        raise TypeError(f"model must be a decoder alone, got {type(bare).__name__}, an encoder with a decoder")
    return bare


def check_ids(bare: Any, ids: Tensor) -> None:
    """Raise where an id has no row in the model's embedding; on other devices than the CPU nobody looks."""
    weight = getattr(bare.get_input_embeddings(), "weight", None)
    size = 0 if weight is None else getattr(weight, "ds_shape", weight.shape)[0]
    if size and values_readable(ids) and ids.numel():
        least, most = (int(number) for number in ids.aminmax())
        if least < 0 or most >= size:
            raise ValueError(
                f"input_ids must be at least 0 and less than {size}, the rows of the embedding of "
                f"{type(bare).__name__}, got {least if least < 0 else most}"
            )


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


def is_checkpointed(bare: Any) -> bool:
    """Whether layers are run again in the backward pass, when the model is in training mode."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the second warns in transformers 5
    name = next((name for name in names if hasattr(type(bare), name)), None)
    return name is not None and bool(getattr(bare, name))


def normalises_by_batch(model: nn.Module) -> str | None:
    """The name of a trained module whose result for a row depends on the rows beside it; None: there is none."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and any(weight.requires_grad for weight in module.parameters()):
            return name
    return None


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


# --- Rotary frequencies -----------------------------------------------------------------------------------------------


# Of each model: the lengths between which the frequencies are known to be the same.
_same: "WeakKeyDictionary[Any, tuple[float, float]]" = WeakKeyDictionary()


def turns_change(base: Any, shortest: int, longest: int) -> bool:
    """Whether frequencies differ between these lengths, so that keys of one do not fit a query of the other."""
    least, most = _same.get(base, (float("inf"), 0))
    if least <= shortest and longest <= most:
        return False
    if not any("inv_freq" in name for name, _ in base.named_buffers()):
        _same[base] = 0, float("inf")
        return False
    # Twice as far where that makes no difference, so that few lengths are tried.
    for end in (2 * longest, longest):
        if _same_turns(base, shortest, end):
            meets = shortest <= most and least <= end
            _same[base] = (min(least, shortest), max(most, end)) if meets else (shortest, end)
            return False
    return True


def _same_turns(base: Any, shortest: int, longest: int) -> bool:
    device = next(base.parameters()).device
    with _as_it_was(base), evaluating(base), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        turns = []
        for length in (shortest, longest):
            base(
                input_ids=plain_ids(base)[None, :1].to(device),
                attention_mask=torch.ones((1, 1), dtype=torch.int64, device=device),
                position_ids=torch.tensor([[length - 1]], device=device),
            )
            turns.append([buffer.clone() for name, buffer in base.named_buffers() if "inv_freq" in name])
        return all(torch.equal(one, other) for one, other in zip(*turns, strict=True))


@contextmanager
def _as_it_was(base: Any) -> Iterator[None]:
    """Give rotary modules back as they came: some keep the longest length that they have seen."""
    kept = []
    for module in base.modules():
        if any("inv_freq" in name for name in module._buffers):
            values = {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
            kept.append((module, dict(module.__dict__), dict(module._buffers), values))
    try:
        yield
    finally:
        for module, attributes, buffers, values in kept:
            module.__dict__.update(attributes)
            module._buffers.update(buffers)
            for name, value in values.items():
                module._buffers[name].copy_(value)
