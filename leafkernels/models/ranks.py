"""Where the weights of a model are, and the ranks that run each of its forward passes together."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class Placed(NamedTuple):
    # Where the model takes its ids; None where that cannot be told: its weights are spread, or some are elsewhere.
    device: torch.device | None
    # The process groups whose ranks run each forward pass together; none where the weights are whole.
    in_step: list[Any]


def placed(model: nn.Module) -> Placed:
    """Of a model without its wrappers, by one look at all of its modules."""
    devices, groups = set[torch.device](), dict[int, Any]()
    is_spread = hasattr(model, "hf_device_map") or hasattr(model, "_hf_hook")
    for module in model.modules():
        if isinstance(module, dist.fsdp.FullyShardedDataParallel):
            groups[id(module.process_group)] = module.process_group
        weights: Iterable[Any] = module._parameters.values()
        for weight in weights:
            if weight is None:
                continue
            devices.add(weight.device)
            if hasattr(weight, "device_mesh"):
                groups |= {id(group): group for group in weight.device_mesh.get_all_groups()}
            elif hasattr(weight, "ds_id"):
                groups[id(weight.ds_process_group)] = weight.ds_process_group
            else:
                continue
            is_spread = True
    return Placed(devices.pop() if len(devices) == 1 and not is_spread else None, list(groups.values()))


def sends_buffers(model: Any) -> bool:
    """Whether a wrapper sends buffers to other ranks in each forward pass: then these must be as many on all ranks."""
    while model is not None:
        is_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
        if is_ddp and model.will_sync_module_buffers() and dist.get_world_size(model.process_group) > 1:
            return True
        # A compiled module shows the names of the module inside, so its own comes first.
        model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    return False


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
