"""The library in which the operations are registered, and how one is registered."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leafkernels._core.backend import implementation

_LIBRARY = torch.library.Library("leafkernels", "DEF")


def register(schema: str, fake: Callable[..., Any], impl: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Define an operation and return its callable in ``torch.ops.leafkernels``.

    Its last argument names a resolved backend; the function of the operation's name in that backend's module gets all
    the others. ``impl``, where an operation is more than that, gets all arguments.

    A bare definition with the autograd function outside is the cheapest registered boundary PyTorch offers, and
    ``torch.compile`` sees one opaque node with the shapes that ``fake`` gives.
    """

    name = schema.split("(", 1)[0]

    def dispatch(*args: Any) -> Any:
        *arguments, backend = args
        return getattr(implementation(backend), name)(*arguments)

    run = dispatch if impl is None else impl
    # What runs in here is a constant to autograd; that it need not look at every step saves a tenth of the time of
    # small problems, and that views and writes of temporary tensors are not tracked another. (PyTorch's own custom
    # operations use such a guard.) A write to an argument has to be seen.
    is_pure = "!" not in schema
    below = torch._C._AutoDispatchBelowADInplaceOrView if is_pure else torch._C._AutoDispatchBelowAutograd

    def below_autograd(first: Tensor, *rest: Any) -> Any:
        with below():
            if not first.is_cuda:
                return run(first, *rest)
            # Triton launches on the current device, which need not be that of the tensors.
            with torch.cuda.device(first.device):
                return run(first, *rest)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, below_autograd, "CompositeExplicitAutograd")
    torch.library.register_fake(f"leafkernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.leafkernels, name).default
