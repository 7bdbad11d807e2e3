"""``backend="reference"``: what ``python_ref`` finds from lists, as tensors that have a gradient where there is one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from leafkernels._core.derivatives import refuse_forward_mode, refuse_second_pass


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., Any],
        gradient: Callable[..., Any],
        constants: Sequence[int],
        once: str,
        *tensors: Tensor | None,
    ) -> Any:
        ctx.gradient, ctx.once = gradient, once
        ctx.save_for_backward(*tensors)
        found = compute(*tensors)
        if constants:
            ctx.mark_non_differentiable(*(found[i] for i in constants))
        return found

    @staticmethod
    def backward(ctx: Any, *grad_results: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.once:
            refuse_second_pass(ctx, ctx.once)
        tensors = ctx.saved_tensors
        found = ctx.gradient(*grad_results, *tensors)
        gradients = (None if g is None else g.to(x) for g, x in zip(found, tensors, strict=True))
        return None, None, None, None, *gradients


def from_reference(
    name: str,
    compute: Callable[..., Any],
    gradient: Callable[..., Sequence[Tensor | None]],
    *tensors: Tensor | None,
    constants: Sequence[int] = (),
    once: str = "",
) -> Any:
    """``compute(*tensors)``, which goes by way of lists.

    In the backward pass ``gradient`` gets the gradients of its results and then the tensors, and returns one for each.
    Results by the numbers ``constants`` have none. ``name`` is that of the function in messages, and ``once``, where
    only one backward pass is allowed, its name in the message to a second.
    """
    refuse_forward_mode(name, *tensors)
    return _Reference.apply(compute, gradient, constants, once, *tensors)


def gradient_by(function: Callable[..., Any], arguments: int = 1) -> Callable[..., Sequence[Tensor | None]]:
    """The gradient of a function of tensors as PyTorch finds it, where ``python_ref`` has none of its own.

    ``arguments`` is how many there are; those that are None, or hold integers, have none.
    """

    def gradient(*everything: Tensor | None) -> list[Tensor | None]:
        grad_results, tensors = everything[:-arguments], everything[-arguments:]
        with torch.enable_grad():
            tensors = tuple(
                t.detach().requires_grad_() if t is not None and t.dtype.is_floating_point else t for t in tensors
            )
            found = function(*tensors)
            results = found if isinstance(found, tuple) else (found,)
            pairs = [(r, g) for r, g in zip(results, grad_results, strict=True) if r.requires_grad]
            outputs, weights = zip(*pairs, strict=True)
            leaves = [t for t in tensors if t is not None and t.requires_grad]
            gradients = iter(torch.autograd.grad(outputs, leaves, weights))
        return [next(gradients) if t is not None and t.requires_grad else None for t in tensors]

    return gradient
