"""Rows of several ranks as one batch, for groups whose rows lie on more than one of them."""

import pickle
from collections.abc import Hashable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.checks import (
    check_integer,
    check_like,
    check_mask,
    check_real,
    check_rewards,
)
from leafkernels._core.ranks import place
from leafkernels.rows.find import build_layout, check_cu_seqlens, check_named_groups, check_one_grouping
from leafkernels.rows.groups import group_index, read_names
from leafkernels.rows.layout import as_rows


class GatheredGroups(NamedTuple):
    """The rows of every rank as one packed batch, and the way back."""

    inputs: dict[str, Any]
    """Arguments for ``span_advantages`` or any function with its signature: ``logprobs``, ``token_ids``, ``rewards``,
    ``response_mask``, ``groups``, ``group_size``, ``cu_seqlens``. The same on every rank, in the order of the ranks;
    constants to autograd. What is padding on its rank is not among them."""
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
    names: bytes | None
    """Of the prompts of this rank's rows, pickled."""


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
    groups: Tensor | Iterable[Hashable] | None = None,
    group_size: int | None = None,
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
        groups: a tensor (N,) of integers that mean the same prompt on every rank, or as many names (uid strings, as in
            ``group_index``), sent as they are.
        group_size: consecutive runs of that many rows are a prompt, counted through all ranks. None, with ``groups``
            None too: the rows of all ranks are one prompt.
        cu_seqlens: (N + 1,) int32, offsets of packed rows.
        process_group: the ranks to gather from (those of data parallelism), gloo or NCCL; None: all.

    Raises:
        TypeError, ValueError: an argument is not what it must be, or not the same on every rank; the message says.
        RuntimeError: ``torch.distributed`` is not initialised, or another rank's arguments were refused: every rank
            raises, none waits.
    """
    rank, world_size = place("process_group", process_group)
    failure: Exception | None = None
    try:
        local = _local_rows(logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens)
        header = local.header
    except Exception as error:
        # The others are about to wait for this rank, so it must not leave before it has told them, whatever it is.
        failure, header = error, _Header(str(error) or type(error).__name__, {}, {}, None)
    headers: list[Any] = [None] * world_size
    dist.all_gather_object(headers, header, group=process_group)
    if failure is not None:
        raise failure
    _check_headers(headers, group_size)

    parts = {
        name: gather_section(section, [h.counts[name] for h in headers], process_group)
        for name, section in local.sections.items()
    }
    cu_seqlens = pad(parts.pop("row_lengths").cumsum(0), (1, 0))
    if header.names is not None:
        # Last, because it is the one step that may fail on some ranks only: where a class of names is not known.
        names = chain.from_iterable(pickle.loads(h.names) for h in headers)
        parts["groups"] = group_index(names, device=token_ids.device)
    return GatheredGroups(
        inputs={"response_mask": None, "groups": None, "group_size": group_size, **parts, "cu_seqlens": cu_seqlens},
        shape=token_ids.shape,
        start=sum(h.counts["token_ids"] for h in headers[:rank]),
        num_tokens=header.counts["token_ids"],
        positions=local.positions,
    )


def _local_rows(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    response_mask: Tensor | None,
    groups: Any,
    group_size: int | None,
    cu_seqlens: Tensor | None,
) -> _Local:
    """This rank's rows packed, from each row's first to its last unmasked token."""
    token_ids = check_integer("token_ids", token_ids)
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
    kind, names = "None", None
    check_one_grouping(groups, group_size)
    if isinstance(groups, Tensor):
        sections["groups"] = check_named_groups(groups, num_rows, "token_ids", device).to(torch.int64)
        kind = "a tensor"
    elif groups is not None:
        kind, names = "names", _pickled_names(groups, num_rows)

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
        "group_size": str(group_size),
    }
    header = _Header(None, alike, {name: section.shape[0] for name, section in sections.items()}, names)
    return _Local(header, sections, positions)


def _pickled_names(groups: Any, num_rows: int) -> bytes:
    """The names of the prompts, one for each row, as they are sent."""
    if isinstance(groups, str | bytes) or not isinstance(groups, Iterable):
        raise TypeError(
            f"groups must be an integer tensor or a list of names for the rows, got {type(groups).__name__}"
        )
    names = read_names("groups", groups)
    if len(names) != num_rows:
        raise ValueError(f"groups must name one prompt for each of {num_rows} rows, got {len(names)} names")
    try:
        pickled = pickle.dumps(names)
        arrived = pickle.loads(pickled)
    except Exception as error:
        raise TypeError(f"groups must hold names that can be pickled, to be sent: {error}") from error
    for row, (name, copy) in enumerate(zip(names, arrived, strict=True)):
        # A bare object equals nothing but itself, and so no name of another rank.
        if name != copy:
            raise TypeError(
                f"groups must hold names that are equal on every rank (strings, ints, tuples), got {name!r:.80} for "
                f"row {row}"
            )
    return pickled


def _check_headers(headers: list[_Header], group_size: int | None) -> None:
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
    if group_size is not None and num_rows % group_size:
        raise ValueError(f"group_size must divide the number of rows of all ranks, {num_rows}, got {group_size}")


def gather_section(section: Tensor, counts: list[int], process_group: "dist.ProcessGroup | None") -> Tensor:
    """The sections (n,) of all ranks one after the other, given the ``n`` of each."""
    # Collectives take equal sizes, and not every dtype on every backend; bytes they all do.
    longest = max(counts)
    own = section.new_zeros(longest)
    own[: section.shape[0]] = section
    own = own.view(torch.uint8)
    gathered = [torch.empty_like(own) for _ in counts]
    if longest:
        dist.all_gather(gathered, own, group=process_group)
    parts = (of_rank.view(section.dtype)[:count] for of_rank, count in zip(gathered, counts, strict=True))
    return torch.cat(tuple(parts))
