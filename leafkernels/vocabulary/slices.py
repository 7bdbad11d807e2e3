"""A vocabulary that is split over ranks: three collectives of a few numbers for each row in the forward pass."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from leafkernels._core.backend import implementation
from leafkernels._core.checks import place, values_readable
from leafkernels.vocabulary.inputs import RowStatistics


class Slice(NamedTuple):
    """Where this rank's slice of the vocabulary begins, and how many ids all have; on the device."""

    first: Tensor
    total: Tensor


def find_slice(token_ids: Tensor, vocab_size: int, vocab_group: "dist.ProcessGroup") -> Slice:
    """The slice of this rank, of ``vocab_size`` ids.

    Collective: the ranks exchange the sizes of their slices, which stay on the device.
    """
    rank, world_size = place("vocab_group", vocab_group)
    # Filled in two steps: a tensor made from a list would be copied to the device, and waited for.
    own = torch.full((2,), vocab_size, dtype=torch.int64, device=token_ids.device)
    own[0] = token_ids.shape[0]
    gathered = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(gathered, own, group=vocab_group)
    num_rows, sizes = torch.stack(gathered).unbind(1)
    if values_readable(num_rows) and bool((num_rows != num_rows[0]).any()):
        raise ValueError(
            f"token_ids must be the same on every rank of vocab_group, got {num_rows.tolist()} rows by rank"
        )
    return Slice(sizes[:rank].sum(), sizes.sum())


def check_same_rows(name: str, num_rows: int, device: torch.device, vocab_group: "dist.ProcessGroup") -> None:
    """Raise unless every rank has as many rows, where that can be read for nothing; collective."""
    own = torch.full((1,), num_rows, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(own) for _ in range(place("vocab_group", vocab_group)[1])]
    dist.all_gather(gathered, own, group=vocab_group)
    if values_readable(own) and len(counts := [int(count) for count in gathered]) != counts.count(num_rows):
        raise ValueError(f"{name} must have the same rows on every rank of vocab_group, got {counts} rows by rank")


def join_states(states: Tensor, temperature: Tensor) -> Tensor:
    """One state (3, N, 1) of each row from its partial states (3, N, any number), by the same rule as below."""
    tops = states[0].amax(1)
    ones, r, t = implementation("torch", "surprisal").surprisal_sums(states, tops, temperature)
    return torch.stack((tops, ones - 1.0 + r, t)).unsqueeze(2)


def merge_slices(
    states: Tensor,
    picked: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    backend: str,
    vocab_group: "dist.ProcessGroup",
) -> RowStatistics:
    """What ``surprisal_entropy`` gives for whole rows, on every rank, from the states of this rank's slice.

    Collective: the maximum of the tops, and then the sum of all that is counted from there; 24 bytes a row in float32.
    By the rule of ``leafkernels.kernels.surprisal``: at the top every rank leaves one logit out, and all but one of
    these are put back.
    """
    # Whether a maximum keeps a NaN depends on the backend; the sums do.
    tops = states[0].amax(1)
    dist.all_reduce(tops, dist.ReduceOp.MAX, group=vocab_group)
    is_here = ~picked.isnan()
    sums = torch.cat(
        (
            implementation("torch", "surprisal").surprisal_sums(states, tops, temperature),
            torch.stack((picked.nan_to_num(0.0, torch.inf, -torch.inf), is_here.to(picked.dtype))),
        )
    )
    dist.all_reduce(sums, dist.ReduceOp.SUM, group=vocab_group)
    ones, r, t, picked, num_found = sums
    whole = torch.stack((tops, ones - 1.0 + r, t)).unsqueeze(2)
    # 0 / 0 where no rank has the id.
    merge = implementation(backend, "surprisal").merge_surprisal_states
    return RowStatistics(*merge(whole, picked / num_found, temperature, mask))


def whole_vocabulary(tensor: Tensor, dim: int, vocab_group: "dist.ProcessGroup | None") -> tuple[Tensor, slice]:
    """The slices of all ranks side by side along ``dim``, and which slice is this rank's; for the reference.

    Collective, and by way of the host.
    """
    if vocab_group is None:
        return tensor, slice(None)
    rank, world_size = place("vocab_group", vocab_group)
    slices: list[Tensor] = [tensor] * world_size
    dist.all_gather_object(slices, tensor.detach().cpu(), group=vocab_group)
    start = sum(part.shape[dim] for part in slices[:rank])
    whole = torch.cat([part.to(tensor.device) for part in slices], dim)
    return whole, slice(start, start + tensor.shape[dim])
