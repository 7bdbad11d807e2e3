"""What the functions of a vocabulary check alike."""

import torch
from torch import Tensor

from leafkernels._core.checks import check_device, check_positive, check_real


def check_temperature(temperature: float | Tensor, token_ids: Tensor) -> Tensor:
    """One temperature for each row, on the device of the tokens."""
    if isinstance(temperature, Tensor):
        check_real("temperature", temperature)
        if temperature.shape != token_ids.shape:
            raise ValueError(
                f"temperature must be a number or have one entry for each row, shape {tuple(token_ids.shape)}, "
                f"got shape {tuple(temperature.shape)}"
            )
        check_device("temperature", temperature, "token_ids", token_ids.device)
        return temperature.detach()
    check_positive("temperature", temperature)
    return torch.full(token_ids.shape, float(temperature), dtype=torch.float64, device=token_ids.device)
