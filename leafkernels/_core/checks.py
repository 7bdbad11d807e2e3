"""Checks of arguments: every message names the argument, what it must be and what came.

Shapes, dtypes and devices are read always; values only of tensors that lie on the CPU.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FLOAT32 = torch.finfo(torch.float32)

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# PyTorch stores these, and computes little with them.
_WIDENED = {torch.uint16: torch.int32, torch.uint32: torch.int64}


def values_readable(tensor: Tensor) -> bool:
    """Whether reading values costs no device synchronisation and no graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_tensor(name: str, value: Any) -> Tensor:
    """Raise TypeError unless ``value`` is a dense tensor, and no DTensor, which is that of several ranks."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name} must be a dense torch.Tensor, got {kind}")
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name} must be a torch.Tensor of this rank, as full_tensor() or to_local() give it, got a "
            f"{type(value).__name__} of global shape {tuple(value.shape)}"
        )
    return value


def check_real(name: str, value: Any) -> Tensor:
    """Raise TypeError unless ``value`` is a floating-point tensor."""
    tensor = check_tensor(name, value)
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point (float32, bfloat16, float16 or float64), got {tensor.dtype}")
    return tensor


def check_integer(name: str, value: Any) -> Tensor:
    """The integers of ``value``, in a dtype to compute with; raise TypeError unless it is a tensor of integers.

    The ids of uint64 above 2 ** 63 become negative: as different as before, and outside of every vocabulary.
    """
    tensor = check_tensor(name, value)
    if tensor.dtype in _WIDENED:
        return tensor.to(_WIDENED[tensor.dtype])
    if tensor.dtype == torch.uint64:
        return tensor.view(torch.int64)
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


def check_count(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise unless ``value`` is an int of at least ``least`` and, where that is given, at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def check_finite(name: str, value: Any) -> None:
    """Raise unless ``value`` is a number that float32 holds, in which kernels take numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value}")
    if abs(value) > FLOAT32.max:
        raise ValueError(f"{name} must be finite in float32, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Raise unless ``value`` is a positive, finite number that float32 holds, as its reciprocal then is."""
    check_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    if value < FLOAT32.tiny:
        raise ValueError(f"{name} must be positive in float32, at least {FLOAT32.tiny:.2g}, got {value}")


def check_kernel_dtype(name: str, dtype: torch.dtype, backend: str) -> None:
    """Raise TypeError where the vocabulary kernels have no precision for a dtype; ``backend`` is a resolved one."""
    if backend == "triton" and dtype == torch.float64:
        raise TypeError(f"{name} must be float32, bfloat16 or float16 with backend='triton', got {dtype}")


def check_mask(
    mask: Any, name: str, shape: torch.Size, device: torch.device, argument: str = "response_mask"
) -> Tensor | None:
    """The mask as bool, or None; nonzero is True for integer and float masks.

    NaN is refused where values can be read for nothing, and False where they cannot: what is not known to count does
    not.
    """
    if mask is None:
        return None
    mask = check_tensor(argument, mask)
    if mask.dtype.is_complex:
        raise TypeError(f"{argument} must be bool, integer or floating point, got {mask.dtype}")
    check_like(argument, mask, name, shape, device)
    if mask.dtype.is_floating_point:
        if values_readable(mask) and bool(mask.isnan().any()):
            raise ValueError(f"{argument} must hold numbers, got NaN")
        return mask.abs() > 0
    return mask if mask.dtype == torch.bool else check_integer(argument, mask) != 0


def check_rewards(
    rewards: Any, name: str, row_shape: tuple[int, ...], device: torch.device, token_shape: tuple[int, ...] = ()
) -> Tensor:
    """The rewards as a floating-point tensor (N,); integers become float64, which holds all up to 2**53.

    ``token_shape``, that of a tensor with one entry for each token, is what people hand over by mistake.
    """
    check_tensor("rewards", rewards)
    if rewards.dtype.is_complex or rewards.dtype == torch.bool:
        raise TypeError(f"rewards must be floating point or integers, got {rewards.dtype}")
    shape = tuple(rewards.shape)
    if shape != row_shape:
        is_per_token = shape == token_shape or (shape[:-1] == row_shape and shape[-1] != 1)
        hint = (
            ": those at tokens are step_rewards, those of several functions take reward_weights" if is_per_token else ""
        )
        raise ValueError(
            f"rewards must have one entry for each row of {name}, shape {row_shape}, got shape {shape}{hint}"
        )
    check_device("rewards", rewards, name, device)
    rewards = rewards.reshape(-1)
    return rewards if rewards.dtype.is_floating_point else rewards.to(torch.float64)


def place(name: str, process_group: "dist.ProcessGroup | None") -> tuple[int, int]:
    """Rank in, and size of, the group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed must be initialised: call torch.distributed.init_process_group on every rank first"
        )
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ValueError(f"{name} must contain the calling rank, got one without rank {dist.get_rank()}")
    return rank, dist.get_world_size(process_group)
