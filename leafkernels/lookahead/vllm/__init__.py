"""Look-ahead on vLLM, without a patch of it: a plugin for its models, steppers on its engines, a server.

vLLM is imported where it is used: this module and ``branches`` need none.
"""

from typing import Any

__all__ = ["AsyncVLLMStepper", "VLLMStepper", "engine_arguments", "register", "search_async"]

_HOMES = {
    "AsyncVLLMStepper": "asynchronous",
    "VLLMStepper": "offline",
    "engine_arguments": "engine",
    "search_async": "asynchronous",
}


def register() -> None:
    """The plugin (``vllm.general_plugins``): beside each architecture of vLLM its name with "Reward" before it.

    Nothing is imported and no architecture of vLLM changes; the class is made when it is asked for.
    """
    from leafkernels.lookahead.vllm.model import register_models

    register_models()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
