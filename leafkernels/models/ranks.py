"""Ranks among which a model's weights are spread: every forward pass is a collective, and all must run the same."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def groups_in_step(model: nn.Module) -> list[Any]:
    """The process groups whose ranks run each forward pass together; none where the weights are whole."""
    found: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, dist.fsdp.FullyShardedDataParallel):
            found[id(module.process_group)] = module.process_group
    weights: Iterable[Any] = model.parameters()
    for weight in weights:
        if hasattr(weight, "device_mesh"):
            found |= {id(group): group for group in weight.device_mesh.get_all_groups()}
        elif hasattr(weight, "ds_id"):
            group = weight.ds_process_group
            found[id(group)] = group
    return list(found.values())


def why_alone(model: nn.Module) -> str | None:
    """Why a model whose weights are spread runs rows, in one forward pass a call; None: it may run several."""
    is_fsdp2 = any(isinstance(module, dist.fsdp.FSDPModule) for module in model.modules())
    if any(hasattr(weight, "ds_id") for weight in model.parameters()) or is_fsdp2:
        return None
    return "its weights are sharded in another way than FSDP2 and ZeRO-3 shard them"


def largest(numbers: Sequence[float], groups: Sequence[Any], device: torch.device) -> list[float]:
    """The largest of each number over the ranks of all groups."""
    of_all = torch.tensor(numbers, dtype=torch.float64, device=device)
    for group in groups:
        dist.all_reduce(of_all, op=dist.ReduceOp.MAX, group=group)
    return of_all.tolist()
