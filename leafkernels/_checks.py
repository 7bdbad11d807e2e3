"""Checks of arguments: every message names the argument, what it must be and what came.

Shapes, dtypes and devices are read always; values only of tensors that lie on the CPU.
"""

from typing import Any

import torch
from torch import Tensor

from leafkernels._layout import Layout, as_rows, build_layout, values_readable

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensor(name: str, value: Any) -> Tensor:
    """Raise TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def check_real(name: str, value: Any) -> Tensor:
    """Raise TypeError unless ``value`` is a floating-point tensor."""
    tensor = check_tensor(name, value)
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point (float32, bfloat16, float16 or float64), got {tensor.dtype}")
    return tensor


def check_integer(name: str, value: Any) -> Tensor:
    """Raise TypeError unless ``value`` is a tensor of integers."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    return tensor


def check_like(name: str, tensor: Tensor, other_name: str, shape: torch.Size, device: torch.device) -> None:
    """Raise ValueError unless ``tensor`` has the shape and the device of the argument ``other_name``."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(shape)}, got shape {tuple(tensor.shape)}")
    check_device(name, tensor, other_name, device)


def check_device(name: str, tensor: Tensor, other_name: str, device: torch.device) -> None:
    """Raise ValueError unless ``tensor`` is on the device of the argument ``other_name``."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {other_name}, {device}, got {tensor.device}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Raise unless ``value`` is a positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def check_kernel_dtype(name: str, dtype: torch.dtype, backend: str) -> None:
    """Raise TypeError where the vocabulary kernels have no precision for a dtype; ``backend`` is a resolved one."""
    if backend == "triton" and dtype == torch.float64:
        raise TypeError(f"{name} must be float32, bfloat16 or float16 with backend='triton', got {dtype}")


def check_named_groups(groups: Tensor, num_rows: int, name: str, device: torch.device) -> None:
    """Raise unless ``groups`` holds an integer for each row of the argument ``name``, on its device."""
    check_integer("groups", groups)
    if groups.shape != (num_rows,):
        raise ValueError(f"groups must name one prompt for each of {num_rows} rows, got shape {tuple(groups.shape)}")
    check_device("groups", groups, name, device)


def check_mask(response_mask: Any, name: str, shape: torch.Size, device: torch.device) -> Tensor | None:
    """The mask as bool, or None; nonzero is True for integer and float masks."""
    if response_mask is None:
        return None
    mask = check_tensor("response_mask", response_mask)
    if mask.dtype.is_complex:
        raise TypeError(f"response_mask must be bool, integer or floating point, got {mask.dtype}")
    check_like("response_mask", mask, name, shape, device)
    return mask if mask.dtype == torch.bool else mask != 0


def check_layout(
    name: str, tensor: Tensor, response_mask: Any, groups: Any, cu_seqlens: Any, backend: str = "torch"
) -> tuple[Layout, Tensor | None, tuple[int, ...]]:
    """Layout, mask as rows, and the shape of "one entry for each row" for the argument ``name``, the per-token tensor.

    ``backend``, a resolved one, looks for the rows in the mask.

    See ``span_advantages`` for the layouts.
    """
    mask = check_mask(response_mask, name, tensor.shape, tensor.device)
    if cu_seqlens is None:
        if tensor.dim() not in (2, 3):
            raise ValueError(
                f"{name} must have shape (rows, tokens) or (prompts, rows, tokens), or (total,) together with "
                f"cu_seqlens, got shape {tuple(tensor.shape)}"
            )
        row_shape = tuple(tensor.shape[:-1])
    else:
        row_shape = (check_cu_seqlens(cu_seqlens, name, tensor),)
    num_rows = row_shape[0] if len(row_shape) == 1 else row_shape[0] * row_shape[1]
    if len(row_shape) == 2 and groups is not None:
        raise ValueError(
            f"groups must be None where {name} is (prompts, rows, tokens), each prompt being a group; "
            f"got {name} of shape {tuple(tensor.shape)} and groups={_brief(groups)}"
        )
    if groups is None:
        groups = row_shape[-1]
    elif isinstance(groups, Tensor):
        check_named_groups(groups, num_rows, name, tensor.device)
    else:
        if isinstance(groups, bool) or not isinstance(groups, int):
            raise TypeError(f"groups must be an int or an integer tensor, got {type(groups).__name__}")
        if groups < 1 or num_rows % groups:
            raise ValueError(f"groups must be a positive divisor of the number of rows, {num_rows}, got {groups}")
    rows = as_rows(tensor)
    mask_rows = None if mask is None else as_rows(mask)
    return build_layout(rows, mask_rows, groups, cu_seqlens, backend), mask_rows, row_shape


def _brief(groups: Any) -> str:
    return f"a tensor of shape {tuple(groups.shape)}" if isinstance(groups, Tensor) else repr(groups)


def check_cu_seqlens(cu_seqlens: Any, name: str, tensor: Tensor) -> int:
    """Number of rows that ``cu_seqlens`` describes."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 (or int64), got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (rows + 1,), got shape {tuple(cu_seqlens.shape)}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must have shape (total,) together with cu_seqlens, got shape {tuple(tensor.shape)}")
    check_device("cu_seqlens", cu_seqlens, name, tensor.device)
    if values_readable(cu_seqlens):
        if int(cu_seqlens[0]) != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {int(cu_seqlens[0])}")
        if int(cu_seqlens[-1]) != tensor.shape[0]:
            raise ValueError(
                f"cu_seqlens must end at the number of tokens, {tensor.shape[0]}, got {int(cu_seqlens[-1])}"
            )
        falls = (cu_seqlens.diff() < 0).nonzero()
        if falls.shape[0]:
            at = int(falls[0])
            raise ValueError(
                f"cu_seqlens must not fall, got {int(cu_seqlens[at])} followed by {int(cu_seqlens[at + 1])} at {at + 1}"
            )
    return cu_seqlens.shape[0] - 1


def check_rewards(rewards: Any, name: str, row_shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The rewards as a floating-point tensor (N,)."""
    check_tensor("rewards", rewards)
    if rewards.dtype.is_complex or rewards.dtype == torch.bool:
        raise TypeError(f"rewards must be floating point or integers, got {rewards.dtype}")
    if tuple(rewards.shape) != row_shape:
        raise ValueError(
            f"rewards must have one entry for each row of {name}, shape {row_shape}, got shape {tuple(rewards.shape)}"
        )
    check_device("rewards", rewards, name, device)
    rewards = rewards.reshape(-1)
    return rewards if rewards.dtype.is_floating_point else rewards.to(torch.float32)
