"""What the autograd functions refuse, so that no derivative is 0 in silence, and no gradient is given twice."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def refuse_forward_mode(function: str, *tensors: Tensor | None) -> None:
    """Raise where one of the tensors carries a tangent: an operation computes with its value alone."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{function} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): "
                "use reverse mode, or write it in PyTorch where you need one"
            )


def refuse_second_derivative(function: str) -> None:
    """Raise in a backward pass whose gradient is to be differentiated again: to autograd it would be a constant."""
    # While torch.compile traces a backward pass, gradients are enabled whatever was asked for.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{function} has a first derivative only, and create_graph=True asks for more: "
            "write it in PyTorch where you need one"
        )


def refuse_second_pass(ctx: Any, function: str) -> None:
    """Raise in all backward passes but the first of an autograd function that gives memory away.

    Version counters do not see it under saved-tensor hooks.
    """
    # A compiled graph keeps what it saved.
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "is_given_away", False):
        raise RuntimeError(f"{function} gave its gradient away in a first backward pass: there is no second one")
    ctx.is_given_away = True
