"""Which implementation runs: Triton kernels, vectorised PyTorch, or the plain-Python reference."""

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "torch", "reference")

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Triton reads the variable when its kernels are imported, so a later change has no effect there either.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

ROOMS = {"triton": "kernels", "torch": "eager"}


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that runs on ``device``: "triton", "torch" or "reference".

    "auto" takes Triton for CUDA tensors and PyTorch for all others. What is chosen runs or raises; nothing falls back.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "torch"
    if backend == "triton":
        if not TRITON_INSTALLED:
            raise RuntimeError(
                f"backend='triton' (the default for cuda tensors, yours are on {device}) needs the package triton, "
                "which is not installed: install it, or pass backend='torch'"
            )
        if device.type == "cpu" and not INTERPRETING:
            raise RuntimeError(
                "backend='triton' runs tensors on cpu only under Triton's interpreter: set TRITON_INTERPRET=1 before "
                "Python starts, or pass backend='torch'"
            )
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"backend='triton' runs on cuda tensors, got tensors on {device}")
    return backend


@cache
def implementation(backend: str, stem: str) -> ModuleType:
    """The module of an operation in a resolved backend, "triton" or "torch"; imported when it is first needed."""
    return importlib.import_module(f"{__name__.split('.')[0]}.{ROOMS[backend]}.{stem}")
