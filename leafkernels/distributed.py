"""What takes several ranks: groups whose rows lie on all of them, and vocabularies that are split over them.

``gather_groups`` is for data parallelism. The rest is what ``surprisal_entropy`` does with a ``vocab_group``: three
collectives of a few numbers for each row in the forward pass, and none in the backward pass.
"""

from collections.abc import Hashable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._backend import implementation
from leafkernels._checks import (
    check_count,
    check_cu_seqlens,
    check_integer,
    check_like,
    check_mask,
    check_named_groups,
    check_real,
    check_rewards,
)
from leafkernels._layout import as_rows, build_layout, values_readable
from leafkernels.groups import group_index


class GatheredGroups(NamedTuple):
    """The rows of every rank as one packed batch, and the way back."""

    inputs: dict[str, Any]
    """Arguments for ``span_advantages`` or any function with its signature: ``logprobs``, ``token_ids``, ``rewards``,
    ``response_mask``, ``groups``, ``cu_seqlens``. The same on every rank, in the order of the ranks; constants to
    autograd. What is padding on its rank is not among them."""
    shape: torch.Size
    """Of this rank's ``token_ids``."""
    start: int
    """Where this rank's tokens begin among those gathered."""
    num_tokens: int
    """How many of those gathered are this rank's."""
    positions: Tensor | None
    """(num_tokens,) int64, where they lie in this rank's flattened ``token_ids``; None: they are all of it."""

    def local(self, tokens: Tensor) -> Tensor:
        """This rank's part of a result for each gathered token, (total,), in the shape of its own ``token_ids``.

        0 where the rank's ``response_mask`` ends a row. Differentiable in ``tokens``.
        """
        total = self.inputs["token_ids"].shape
        check_like("tokens", tokens, "the gathered token_ids", total, tokens.device)
        own = tokens[self.start : self.start + self.num_tokens]
        if self.positions is None:
            return own.reshape(self.shape).clone()
        return own.new_zeros(self.shape.numel()).index_copy(0, self.positions, own).reshape(self.shape)


class _Header(NamedTuple):
    """What each rank tells the others before any tensor is sent."""

    refusal: str | None
    """Why this rank's arguments cannot be used."""
    alike: dict[str, str]
    """What must be the same on every rank, by the name of the argument."""
    counts: dict[str, int]
    """Elements of each of this rank's sections."""
    groups: Any
    """What came, unless it is a tensor, which is a section."""


class _Local(NamedTuple):
    header: _Header
    sections: dict[str, Tensor]
    positions: Tensor | None


def gather_groups(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | int | Iterable[Hashable] | None = None,
    cu_seqlens: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> GatheredGroups:
    """Gather the rows of all ranks, so that each can compute the advantages of groups that straddle them.

        gathered = gather_groups(logprobs, token_ids, rewards, response_mask=response_mask, groups=uids)
        advantages = gathered.local(span_advantages(**gathered.inputs))

    The result is, bit for bit, what one process computes that holds the rows of all ranks in the order of the ranks.
    Ranks may have different numbers of rows, none too, and of tokens, padded on either side or packed. Every rank of
    ``process_group`` must call, and each computes for all rows: memory and traffic grow with the rows of all ranks.

    Sent is each row from its first to its last unmasked token: id, log-probability and mask, in the dtypes that come
    (int64, float32 and bool: 13 bytes a token; int32 and bfloat16: 7), and 16 or 24 bytes for a row. To rank boundaries
    by something else, pass its negative as ``logprobs``: nothing else is made of them by ``span_advantages``.

    Sizes differ between ranks and must be known to allocate, so this synchronises the host with the device, and is not
    for CUDA graphs or ``torch.compile``.

    Args:
        logprobs: (N, T), or (total,) with ``cu_seqlens``; float32, bfloat16, float16 or float64, the same dtype on
            all ranks.
        token_ids: the same shape; any integer dtype, the same on all ranks.
        rewards: (N,); gathered as float64.
        response_mask: the same shape as ``token_ids``, nonzero where a token counts; on every rank or on none.
        groups: an int (consecutive runs of that many rows are a prompt, counted through all ranks), a tensor (N,) of
            integers that mean the same prompt on every rank, or as many names (uid strings), sent as they are; None:
            the rows of all ranks are one prompt.
        cu_seqlens: (N + 1,) int32, offsets of packed rows.
        process_group: the ranks to gather from (those of data parallelism), gloo or NCCL; None: all.

    Raises:
        TypeError, ValueError: an argument is not what it must be, or not the same on every rank; the message says.
        RuntimeError: ``torch.distributed`` is not initialised, or another rank's arguments were refused: every rank
            raises, none waits.
    """
    rank, world_size = _place("process_group", process_group)
    failure: Exception | None = None
    try:
        local = _local_rows(logprobs, token_ids, rewards, response_mask, groups, cu_seqlens)
        header = local.header
    except (TypeError, ValueError) as error:
        # The others are about to wait for this rank, so it must not leave before it has told them.
        failure, header = error, _Header(str(error), {}, {}, None)
    headers: list[Any] = [None] * world_size
    dist.all_gather_object(headers, header, group=process_group)
    if failure is not None:
        raise failure
    _check_headers(headers)

    parts = {
        name: _gather(section, [h.counts[name] for h in headers], process_group)
        for name, section in local.sections.items()
    }
    cu_seqlens = pad(parts.pop("row_lengths").cumsum(0), (1, 0))
    if isinstance(header.groups, list):
        parts["groups"] = group_index(chain.from_iterable(h.groups for h in headers), device=token_ids.device)
    return GatheredGroups(
        inputs={"response_mask": None, "groups": header.groups, **parts, "cu_seqlens": cu_seqlens},
        shape=token_ids.shape,
        start=sum(h.counts["token_ids"] for h in headers[:rank]),
        num_tokens=header.counts["token_ids"],
        positions=local.positions,
    )


def _place(name: str, process_group: "dist.ProcessGroup | None") -> tuple[int, int]:
    """Rank in, and size of, the group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed must be initialised: call torch.distributed.init_process_group on every rank first"
        )
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ValueError(f"{name} must contain the calling rank, got one without rank {dist.get_rank()}")
    return rank, dist.get_world_size(process_group)


def _local_rows(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    response_mask: Tensor | None,
    groups: Any,
    cu_seqlens: Tensor | None,
) -> _Local:
    """This rank's rows packed, without what lies before and behind them."""
    check_integer("token_ids", token_ids)
    check_real("logprobs", logprobs)
    check_like("logprobs", logprobs, "token_ids", token_ids.shape, token_ids.device)
    mask = check_mask(response_mask, "token_ids", token_ids.shape, token_ids.device)
    device = token_ids.device
    if cu_seqlens is not None:
        num_rows = check_cu_seqlens(cu_seqlens, "token_ids", token_ids)
        bounds = cu_seqlens
    else:
        if token_ids.dim() != 2:
            raise ValueError(
                "token_ids must have shape (rows, tokens), or (total,) together with cu_seqlens, got shape "
                f"{tuple(token_ids.shape)}"
            )
        num_rows = token_ids.shape[0]
        bounds = torch.arange(num_rows + 1, device=device) * token_ids.shape[1]
    rewards = check_rewards(rewards, "token_ids", (num_rows,), device).detach()
    sections = {"rewards": rewards.to(torch.float64)}
    if isinstance(groups, Tensor):
        check_named_groups(groups, num_rows, "token_ids", device)
        sections["groups"] = groups.to(torch.int64)
        kind, groups = "a tensor", None
    else:
        kind, groups = _check_groups(groups, num_rows)

    tokens = {"token_ids": token_ids, "logprobs": logprobs.detach()}
    if mask is not None:
        tokens["response_mask"] = mask
    tokens = {name: as_rows(tensor).reshape(-1) for name, tensor in tokens.items()}
    layout = build_layout(tokens["token_ids"], tokens.get("response_mask"), 1, bounds)
    positions = None
    if mask is not None:
        # Row after row, its positions: an arange that jumps where a row begins.
        jumps = layout.row_starts - (layout.row_lengths.cumsum(0) - layout.row_lengths)
        positions = jumps.repeat_interleave(layout.row_lengths)
        positions += torch.arange(positions.shape[0], device=device)
        tokens = {name: tensor[positions] for name, tensor in tokens.items()}
    sections |= {"row_lengths": layout.row_lengths, **tokens}
    alike = {
        "token_ids": f"{token_ids.dtype} on {device.type}",
        "logprobs": str(logprobs.dtype),
        "response_mask": "None" if mask is None else "a mask",
        "groups": kind,
    }
    header = _Header(None, alike, {name: section.shape[0] for name, section in sections.items()}, groups)
    return _Local(header, sections, positions)


def _check_groups(groups: Any, num_rows: int) -> tuple[str, Any]:
    """What must be alike on every rank, and what is sent, of groups that are no tensor."""
    if groups is None:
        return "None", None
    if isinstance(groups, int):
        check_count("groups", groups, 1)
        return str(groups), groups
    if isinstance(groups, str) or not isinstance(groups, Iterable):
        raise TypeError(
            f"groups must be an int, an integer tensor or a list of names for the rows, got {type(groups).__name__}"
        )
    names = list(groups)
    if len(names) != num_rows:
        raise ValueError(f"groups must name one prompt for each of {num_rows} rows, got {len(names)} names")
    return "names", names


def _check_headers(headers: list[_Header]) -> None:
    """Raise, on every rank with the same text, where the ranks do not fit together."""
    for rank, header in enumerate(headers):
        if header.refusal is not None:
            raise RuntimeError(f"gather_groups was refused on rank {rank} of the group: {header.refusal}")
    for rank, header in enumerate(headers):
        for name, first in headers[0].alike.items():
            if header.alike[name] != first:
                raise ValueError(
                    f"{name} must be alike on every rank, got {first} on rank 0 and {header.alike[name]} on rank {rank}"
                )
    num_rows = sum(header.counts["rewards"] for header in headers)
    groups = headers[0].groups
    if isinstance(groups, int) and num_rows % groups:
        raise ValueError(f"groups must be a divisor of the number of rows of all ranks, {num_rows}, got {groups}")


def _gather(section: Tensor, counts: list[int], process_group: "dist.ProcessGroup | None") -> Tensor:
    """The sections (n,) of all ranks one behind the other, given the ``n`` of each."""
    # Collectives take equal sizes, and not every dtype on every backend; bytes they all do.
    longest = max(counts)
    own = pad(section.contiguous().view(torch.uint8), (0, (longest - section.shape[0]) * section.element_size()))
    gathered = [torch.empty_like(own) for _ in counts]
    if longest:
        dist.all_gather(gathered, own, group=process_group)
    parts = (of_rank.view(section.dtype)[:count] for of_rank, count in zip(gathered, counts, strict=True))
    return torch.cat(tuple(parts))


def ids_in_slice(token_ids: Tensor, vocab_size: int, vocab_group: "dist.ProcessGroup") -> Tensor:
    """Ids (N,) counted from the first of this rank's slice of the vocabulary, so that all others lie outside of it.

    Collective: the ranks tell each other the sizes of their slices, which stay on the device.
    """
    rank, world_size = _place("vocab_group", vocab_group)
    # Filled in two steps: a tensor made from a list would be copied to the device, and waited for.
    own = torch.full((2,), vocab_size, dtype=torch.int64, device=token_ids.device)
    own[0] = token_ids.shape[0]
    gathered = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(gathered, own, group=vocab_group)
    num_rows, sizes = torch.stack(gathered).unbind(1)
    if values_readable(num_rows) and bool((num_rows != num_rows[0]).any()):
        raise ValueError(
            f"token_ids must be the same on every rank of vocab_group, got {num_rows.tolist()} of them by rank"
        )
    return token_ids.to(torch.int64) - sizes[:rank].sum()


def merge_slices(
    states: Tensor,
    picked: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    backend: str,
    vocab_group: "dist.ProcessGroup",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
            implementation("torch").surprisal_sums(states, tops, temperature),
            torch.stack((picked.nan_to_num(0.0, torch.inf, -torch.inf), is_here.to(picked.dtype))),
        )
    )
    dist.all_reduce(sums, dist.ReduceOp.SUM, group=vocab_group)
    ones, r, t, picked, owners = sums
    whole = torch.stack((tops, ones - 1.0 + r, t)).unsqueeze(2)
    # 0 / 0 where no rank has the id.
    return implementation(backend).merge_surprisal_states(whole, picked / owners, temperature, mask)
