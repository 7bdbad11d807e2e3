"""Where this process stands among the ranks of a process group."""

import torch.distributed as dist


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
