"""What the functions of a vocabulary have in common: numbers of a row, and checks."""

from typing import NamedTuple

import torch
from torch import Tensor

from leafkernels._core.checks import FLOAT32, check_device, check_positive, check_real, values_readable


class RowStatistics(NamedTuple):
    """What the gradient of a row of logits needs beside the logits, (N,) each; 0 in masked rows."""

    surprisal: Tensor
    entropy: Tensor
    top: Tensor  # the largest logit
    log_total: Tensor  # log sum e^((x - top) / temperature)


def check_temperature(
    temperature: float | Tensor, token_ids: Tensor, mask: Tensor | None, logit_scale: float = 1.0
) -> Tensor:
    """One temperature for each row, on the device of the tokens; those of masked rows may be anything.

    Logits that are scaled before the temperature divides them are logits at the quotient of the two, which it gives.
    """
    name = "temperature" if logit_scale == 1 else "temperature / logit_scale"
    if isinstance(temperature, Tensor):
        check_real("temperature", temperature)
        if temperature.shape != token_ids.shape:
            raise ValueError(
                f"temperature must be a number or have one entry for each row, shape {tuple(token_ids.shape)}, "
                f"got shape {tuple(temperature.shape)}"
            )
        check_device("temperature", temperature, "token_ids", token_ids.device)
        temperature = temperature.detach()
        if logit_scale != 1:
            temperature = temperature.double() / logit_scale
        if values_readable(temperature):
            live_values = temperature if mask is None else temperature[mask]
            is_bad = ~((live_values >= FLOAT32.tiny) & (live_values <= FLOAT32.max))
            if bool(is_bad.any()):
                found = float(live_values[is_bad][0])
                where = " in float32" if 0 < found < torch.inf else ""
                raise ValueError(f"{name} must be positive and finite{where}, got {found}")
        return temperature
    check_positive("temperature", temperature)
    check_positive(name, temperature / logit_scale)
    return torch.full(token_ids.shape, temperature / logit_scale, dtype=torch.float64, device=token_ids.device)


def check_own_memory(name: str, tensor: Tensor) -> None:
    """Raise unless a gradient may be written over ``tensor``, which requires one: see ``inplace_backward``."""
    for kind, leaf in (("a leaf", tensor), ("a view of a leaf", tensor._base)):
        if leaf is not None and leaf.is_leaf:
            raise ValueError(f"{name} must be the result of a computation with inplace_backward=True, got {kind}")
    # From the finest stride up, each must step over all that the ones before reach.
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach and tensor.numel():
            raise ValueError(
                f"{name} must have memory of its own for each entry with inplace_backward=True, got shape "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        reach += (size - 1) * stride
