"""One declaration makes an operation: its signature, its fake results, and where its implementations are."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Concatenate, Optional, ParamSpec, TypeVar, cast, get_args, get_type_hints

import torch

from leafkernels._core.backend import implementation

_P = ParamSpec("_P")
_R = TypeVar("_R")

# The name of the package, so that a copy of it under another name has operations of its own.
_NAMESPACE = __name__.split(".")[0]
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")

OPERATIONS: dict[str, tuple[str, Callable[..., Any]]] = {}
"""Of each operation the stem of its implementations, and its declaration."""


def operation(
    stem: str = "", *, mutates: tuple[str, ...] = (), run: Callable[..., Any] | None = None
) -> Callable[[Callable[_P, _R]], Callable[Concatenate[str, _P], _R]]:
    """Register the decorated function as ``torch.ops.leafkernels.NAME``, NAME its own without the underscore before it.

    Its signature is that of the operation; its body is the fake: results of the right shapes, dtypes and device. The
    implementations are the functions NAME of ``leafkernels/kernels/STEM.py`` and ``leafkernels/eager/STEM.py``, which
    have the same parameters, or ``run``, which takes the backend before them. A ``NamedTuple`` is one argument or the
    result; PyTorch, which knows none, sees its fields. The first argument is a tensor, or begins with one.

    The result is called with a resolved backend and the arguments, by position:

        @operation("scatter")
        def _gather_spans(gradients: Tensor, span_ends: Tensor, layout: Layout) -> Tensor:
            return gradients.new_empty(span_ends.shape)

        sums = _gather_spans("torch", gradients, span_ends, layout)

    A bare definition with the autograd function outside is the cheapest registered boundary PyTorch offers, and
    ``torch.compile`` sees one opaque node.
    """

    def declare(fake: Callable[_P, _R]) -> Callable[Concatenate[str, _P], _R]:
        name = fake.__name__.removeprefix("_")
        OPERATIONS[name] = stem, fake
        kinds = get_type_hints(fake)
        returned = kinds.pop("return")
        is_bundled = [hasattr(kind, "_fields") for kind in kinds.values()]
        # Of each bundle its type, where it stands among the parameters, and where its fields end once they are there.
        bundles: list[tuple[Any, int, int]] = []
        for at, kind in enumerate(kinds.values()):
            if is_bundled[at]:
                bundles.append((kind._make, at, at + len(kind._fields)))

        def bundled(values: list[Any]) -> list[Any]:
            for make, start, end in bundles:
                values[start:end] = (make(values[start:end]),)
            return values

        # What runs in here is a constant to autograd; that it need not look at every step saves a tenth of the time of
        # small problems, and that views and writes of temporary tensors are not tracked another. (PyTorch's own custom
        # operations use such a guard.) A write to an argument has to be seen.
        below = torch._C._AutoDispatchBelowAutograd if mutates else torch._C._AutoDispatchBelowADInplaceOrView

        def implement(*flat: Any) -> Any:
            *values, backend = flat
            function = getattr(implementation(backend, stem), name) if run is None else partial(run, backend)
            with below():
                if not flat[0].is_cuda:
                    return function(*bundled(values))
                # Triton launches on the current device, which need not be that of the tensors.
                with torch.cuda.device(flat[0].device):
                    return function(*bundled(values))

        _LIBRARY.define(name + _schema(kinds, returned, mutates))
        _LIBRARY.impl(name, implement, "CompositeExplicitAutograd")
        shapes: Callable[..., Any] = fake
        torch.library.register_fake(f"{_NAMESPACE}::{name}", lambda *flat: shapes(*bundled([*flat[:-1]])), lib=_LIBRARY)
        registered = getattr(getattr(torch.ops, _NAMESPACE), name).default
        result = returned if hasattr(returned, "_fields") else None

        def call(backend: str, /, *arguments: Any) -> Any:
            flat: list[Any] = []
            for argument, is_bundle in zip(arguments, is_bundled, strict=True):
                flat += argument if is_bundle else (argument,)
            found = registered(*flat, backend)
            return found if result is None else result(*found)

        return cast("Callable[Concatenate[str, _P], _R]", call)

    return declare


def _schema(kinds: dict[str, Any], returned: Any, mutates: tuple[str, ...]) -> str:
    """What ``torch.library`` calls a schema, from the types of parameters and result; last, the name of a backend."""
    flat: dict[str, Any] = {}
    for parameter, kind in kinds.items():
        if hasattr(kind, "_fields"):
            flat |= {f"{parameter}_{field}": field_kind for field, field_kind in get_type_hints(kind).items()}
        else:
            flat[parameter] = kind
    parameters = [
        inspect.Parameter(parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=_plain(kind))
        for parameter, kind in (flat | {"backend": str}).items()
    ]
    if returned is type(None):
        returned = None
    elif hasattr(returned, "_fields"):
        returned = tuple[tuple(get_type_hints(returned).values())]  # type: ignore[misc]

    def prototype() -> None: ...

    prototype.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=mutates)


def _plain(kind: Any) -> Any:
    """``X | None`` as the ``Optional[X]`` that PyTorch looks for."""
    arguments = get_args(kind)
    return Optional[arguments[0]] if len(arguments) == 2 and arguments[1] is type(None) else kind  # noqa: UP045
