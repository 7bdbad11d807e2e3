"""The library in which the operations are registered, and how one is registered."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("leafkernels", "DEF")


def register(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operation and return the callable behind ``torch.ops.leafkernels``.

    A bare definition with the autograd function outside is the cheapest registered boundary PyTorch offers, and
    ``torch.compile`` sees one opaque node with the shapes that ``fake`` gives.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"leafkernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.leafkernels, name).default
