"""The library in which the operations are registered, how one is registered, and in what precision it computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("leafkernels", "DEF")


def register(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operation and return the callable behind ``torch.ops.leafkernels``.

    A bare definition with the autograd function outside is the cheapest registered boundary PyTorch offers, and
    ``torch.compile`` sees one opaque node with the shapes that ``fake`` gives.
    """

    def below_autograd(first: Tensor, *rest: Any) -> Any:
        # What runs in here is a constant to autograd; that it need not look at every step saves a tenth of the time of
        # small problems. (PyTorch's own custom operations use the same guard.)
        with torch._C._AutoDispatchBelowAutograd():
            if not first.is_cuda:
                return impl(first, *rest)
            # Triton launches on the current device, which need not be that of the tensors.
            with torch.cuda.device(first.device):
                return impl(first, *rest)

    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, below_autograd, "CompositeExplicitAutograd")
    torch.library.register_fake(f"leafkernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.leafkernels, name).default
