"""Rows of several ranks: each is sent to the rank that computes its group, and the result is sent back."""

import contextlib
import zlib
from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from leafkernels._core.checks import (
    check_integer,
    check_like,
    check_mask,
    check_real,
    check_rewards,
    check_tensor,
    place,
)
from leafkernels.rows.find import build_layout, check_cu_seqlens, check_named_groups, check_one_grouping
from leafkernels.rows.groups import read_names
from leafkernels.rows.layout import as_rows
from leafkernels.rows.returns import check_functions, check_step_rewards

__all__ = ["GatheredGroups", "gather_groups"]

# Bytes of a digest. Two names of a million collide once in 10^20 calls.
_DIGEST = 16


class Routes(NamedTuple):
    """How many tokens this rank sends to each rank, and how many it gets from each."""

    sent: list[int]
    received: list[int]

    @property
    def back(self) -> "Routes":
        return Routes(self.received, self.sent)


class GatheredGroups(NamedTuple):
    """The rows of the groups that this rank computes, as one packed batch, and the routes that send results back."""

    inputs: dict[str, Any]
    """Arguments for ``span_advantages`` or any function with its signature: ``logprobs``, ``token_ids``, ``rewards``,
    ``response_mask``, ``groups``, ``group_size``, ``cu_seqlens``, and of ``step_rewards``, ``reward_weights``,
    ``steps``, ``states`` and ``sum_squares`` those that were given. All rows of the groups that this rank computes,
    also those of other ranks, in the order of the ranks and without padding; constants to autograd. No row where this
    rank computes no group."""
    shape: torch.Size
    """Shape of this rank's own ``token_ids``."""
    positions: Tensor | None
    """(tokens,) int64: positions of this rank's own tokens, in the order in which they are sent, in its flattened
    ``token_ids``; None: all tokens, in order."""
    routes: Routes | None
    """None: every group lies on one rank, and nothing is sent."""
    owners: list[int]
    """The rank that computes its group, for every row of all ranks; the same on every rank."""
    process_group: "dist.ProcessGroup | None"

    @property
    def num_rows(self) -> int:
        """Rows of ``inputs``."""
        rewards = self.inputs["rewards"]
        return self.inputs["cu_seqlens"].shape[0] - 1 if rewards is None else rewards.shape[0]

    def local(self, tokens: Tensor) -> Tensor:
        """This rank's rows of a result for each token of ``inputs``, (total,), in the shape of its own ``token_ids``.

        0 where the rank's ``response_mask`` ends a row; a constant to autograd. Where a group straddles ranks every
        rank calls, with one dtype, because the results are sent: then the host waits for the device. Where one rank's
        argument is refused, all ranks raise.
        """
        routes, total = self.routes, self.inputs["token_ids"]
        failure: Exception | None = None
        try:
            check_like("tokens", check_tensor("tokens", tokens), "the gathered token_ids", total.shape, total.device)
        except (TypeError, ValueError) as error:
            if routes is None:
                raise
            failure = error
        if routes is None:
            own = tokens.detach()
        else:
            _check_results(None if failure else tokens.dtype, total.device, self.process_group)
            if failure:
                raise failure
            own = _exchange("results of GatheredGroups.local", tokens.detach(), routes.back, self.process_group)
        if self.positions is None:
            return own.reshape(self.shape).clone()
        return own.new_zeros(self.shape.numel()).index_copy(0, self.positions, own).reshape(self.shape)

    def all_rows(self, of_rows: Tensor) -> Tensor:
        """(rows of all ranks,) in the order of the ranks, the same on every rank, from one number (rows,) for each row
        of ``inputs``. Every rank calls.
        """
        check_like("of_rows", of_rows, "the gathered rows", torch.Size([self.num_rows]), of_rows.device)
        _, world_size = place("process_group", self.process_group)
        counts = [0] * world_size
        for owner in self.owners:
            counts[owner] += 1
        gathered = gather_section(of_rows.detach(), counts, self.process_group)
        order = sorted(range(len(self.owners)), key=self.owners.__getitem__)
        return torch.empty_like(gathered).index_copy(0, torch.tensor(order, device=gathered.device).long(), gathered)


class _Header(NamedTuple):
    """What each rank sends to the others before any tensor."""

    refusal: str | None
    """Why this rank's arguments cannot be used."""
    alike: dict[str, str]
    """What must be the same on every rank, by the name of the argument."""
    lengths: bytes
    """Lengths of this rank's rows, int64."""
    names: bytes
    """Names of their prompts, a few bytes each; empty where no argument names prompts."""


class _Local(NamedTuple):
    header: _Header
    rewards: Tensor | None
    """(N,), or (N, F) of F reward functions."""
    tokens: dict[str, Tensor]
    """Flat: what is sent of each token."""
    row_starts: Tensor
    """In the flat tokens."""
    row_lengths: Tensor
    lengths: list[int]


def gather_groups(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | Iterable[Hashable] | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    step_rewards: Tensor | None = None,
    reward_weights: Sequence[float] | Tensor | None = None,
    steps: Tensor | None = None,
    states: Tensor | None = None,
    sum_squares: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> GatheredGroups:
    """Bring the rows of groups that straddle ranks together, each group on one rank, to compute their advantages there.

        gathered = gather_groups(logprobs, token_ids, rewards, response_mask=response_mask, groups=uids)
        advantages = gathered.local(span_advantages(**gathered.inputs))

    The result is, bit for bit, what one process computes that holds the rows of all ranks in the order of the ranks.
    Ranks may have different numbers of rows, none too, and of tokens, padded on either side or packed. Every rank of
    ``process_group`` must call, ``local`` too.

    Every rank gets the name and the length of every row, 24 bytes (16 where a tensor names prompts, 8 where none does),
    and from these computes which rank computes which group: a group that lies whole on one rank stays there; one that
    straddles ranks goes, among those that hold rows of it, to the rank that will have received least, the lowest of
    several. Rows are sent there, each from its first to its last unmasked token: id, log-probability and mask, in the
    dtypes that come (int64, float32 and bool: 13 bytes a token; int32 and bfloat16: 7), and 8 bytes for the reward.
    Where no group straddles ranks, nothing more is sent.

    ``normalize="batch"`` needs the statistics of all ranks, so pass ``gathered`` to it, on every rank:
    ``span_advantages(**gathered.inputs, normalize="batch", gathered=gathered)``. Three numbers a row are sent.

    To rank boundaries by something else, pass its negative as ``logprobs``: ``span_advantages`` uses them for nothing
    else. Sizes differ between ranks and must be known to allocate, so this synchronises the host with the device, and
    is not for CUDA graphs or ``torch.compile``.

    Args:
        logprobs: (N, T), or (total,) with ``cu_seqlens``; float32, bfloat16, float16 or float64, the same dtype on
            all ranks. Rows are whole: tokens of one row on several ranks (sequence parallelism) are gathered before.
        token_ids: the same shape; any integer dtype, the same on all ranks.
        rewards: (N,); gathered as float64.
        response_mask: the same shape as ``token_ids``, nonzero where a token counts; on every rank or on none.
        groups: a tensor (N,) of integers that mean the same prompt on every rank, or as many names, as in
            ``group_index``: strings, bytes, ints, floats, None and tuples of them are compared by digests of 16 bytes,
            other objects are sent whole.
        group_size: consecutive runs of that many rows are a prompt, counted through all ranks. None, with ``groups``
            None too: the rows of all ranks are one prompt.
        cu_seqlens: (N + 1,) int32, offsets of packed rows.
        step_rewards: the same shape as ``token_ids``, on every rank or on none; sent as float64. Then ``rewards`` may
            be None, on every rank.
        reward_weights: F numbers, the same on every rank, where ``rewards`` is (N, F); see ``span_advantages``.
        steps, states: integers shaped like ``token_ids``, on every rank or on none; see ``grpo``.
        sum_squares: shaped like ``token_ids``, on every rank or on none; sent as float64; see ``otb``.
        process_group: the ranks among which rows travel (those of data parallelism), gloo or NCCL; None: all.

    Raises:
        TypeError, ValueError: an argument is not what it must be, or not the same on every rank; the message says.
        RuntimeError: ``torch.distributed`` is not initialised, another rank's arguments were refused (every rank
            raises, none waits), or an exchange failed, as it does by the process group's timeout where a rank has died.
    """
    rank, world_size = place("process_group", process_group)
    failure: Exception | None = None
    try:
        more = {"step_rewards": step_rewards, "steps": steps, "states": states, "sum_squares": sum_squares}
        call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
        local = _local_rows(*call, reward_weights, more)
        header = local.header
    except Exception as error:
        # The other ranks are about to wait for this one, so the refusal is sent before it raises, whatever it is.
        failure, header = error, _Header(_text_of(error), {}, b"", b"")
    headers: list[_Header] = _gather_objects("headers of gather_groups", header, world_size, process_group)
    if failure is not None:
        raise failure
    _check_refusals([h.refusal for h in headers])
    _check_alike(headers)
    lengths_of_ranks = [array("q", h.lengths).tolist() for h in headers]
    num_rows = sum(map(len, lengths_of_ranks))
    if group_size is not None and num_rows % group_size:
        raise ValueError(f"group_size must divide the number of rows of all ranks, {num_rows}, got {group_size}")
    if groups is not None:
        group_of_row = _number_names(headers, lengths_of_ranks)
    else:
        group_of_row = [row // (group_size or num_rows) for row in range(num_rows)]
    owners = owners_of_rows(lengths_of_ranks, group_of_row)

    # From here on, what each rank does follows from what all ranks have received.
    device = token_ids.device
    owned, row_routes, token_routes = _plan(rank, lengths_of_ranks, owners)
    travels = owners != _ranks_of_rows(lengths_of_ranks)
    order = None
    if travels:
        first = sum(map(len, lengths_of_ranks[:rank]))
        by_owner = sorted(range(len(local.lengths)), key=lambda row: owners[first + row])
        order = torch.tensor(by_owner, dtype=torch.int64, device=device)
    positions = _positions(local, order)
    parts = {k: t if positions is None else t[positions] for k, t in local.tokens.items()}
    if local.rewards is not None:
        parts["rewards"] = local.rewards if order is None else local.rewards[order]
    if travels:
        parts = {
            name: _exchange(
                f"{name} of gather_groups", part, row_routes if name == "rewards" else token_routes, process_group
            )
            for name, part in parts.items()
        }
    if groups is not None:
        parts["groups"] = torch.tensor([group_of_row[row] for row in owned], dtype=torch.int64, device=device)
    lengths = [length for rank_lengths in lengths_of_ranks for length in rank_lengths]
    ends = accumulate((lengths[row] for row in owned), initial=0)
    parts["cu_seqlens"] = torch.tensor(list(ends), dtype=torch.int64, device=device)
    weights = {} if reward_weights is None else {"reward_weights": reward_weights}
    return GatheredGroups(
        inputs={"rewards": None, "response_mask": None, "groups": None, "group_size": group_size, **parts, **weights},
        shape=token_ids.shape,
        positions=positions,
        routes=token_routes if travels else None,
        owners=owners,
        process_group=process_group,
    )


def owners_of_rows(lengths_of_ranks: list[list[int]], group_of_row: list[int]) -> list[int]:
    """The rank that computes its group, for every row of all ranks.

    A group that straddles ranks goes, among those that hold rows of it, to the one that will have received least: for
    the first groups that is the rank that holds most, and groups that are split alike over ranks are shared out.
    """
    held: dict[int, dict[int, int]] = {}
    ranks = _ranks_of_rows(lengths_of_ranks)
    lengths = [length for rank_lengths in lengths_of_ranks for length in rank_lengths]
    for rank, length, group in zip(ranks, lengths, group_of_row, strict=True):
        tokens_per_rank = held.setdefault(group, {})
        tokens_per_rank[rank] = tokens_per_rank.get(rank, 0) + length
    received = [0] * len(lengths_of_ranks)
    owner_of_group = {}
    for group, tokens_per_rank in held.items():
        total = sum(tokens_per_rank.values())
        owner = min(tokens_per_rank, key=lambda rank: (received[rank] + total - tokens_per_rank[rank], rank))
        received[owner] += total - tokens_per_rank[owner]
        owner_of_group[group] = owner
    return [owner_of_group[group] for group in group_of_row]


def gather_section(section: Tensor, counts: list[int], process_group: "dist.ProcessGroup | None") -> Tensor:
    """The sections (n,) of all ranks one after the other, given the ``n`` of each."""
    # Collectives take equal sizes, and not every dtype on every backend; bytes they all do.
    longest = max(counts)
    own = section.new_zeros(longest)
    own[: section.shape[0]] = section
    own = own.view(torch.uint8)
    gathered = [torch.empty_like(own) for _ in counts]
    if longest:
        with _named("a number for each row"):
            dist.all_gather(gathered, own, group=process_group)
    parts = (part.view(section.dtype)[:count] for part, count in zip(gathered, counts, strict=True))
    return torch.cat(tuple(parts))


def _ranks_of_rows(lengths_of_ranks: list[list[int]]) -> list[int]:
    return [rank for rank, lengths in enumerate(lengths_of_ranks) for _ in lengths]


def _plan(rank: int, lengths_of_ranks: list[list[int]], owners: list[int]) -> tuple[list[int], Routes, Routes]:
    """The rows of the groups that this rank computes, in the order of the ranks; the routes of rows and of tokens."""
    world_size = len(lengths_of_ranks)
    rows, tokens = (Routes([0] * world_size, [0] * world_size) for _ in range(2))
    owned = []
    lengths = [length for rank_lengths in lengths_of_ranks for length in rank_lengths]
    for row, (source, length, owner) in enumerate(zip(_ranks_of_rows(lengths_of_ranks), lengths, owners, strict=True)):
        if source == rank:
            rows.sent[owner] += 1
            tokens.sent[owner] += length
        if owner == rank:
            rows.received[source] += 1
            tokens.received[source] += length
            owned.append(row)
    return owned, rows, tokens


def _exchange(what: str, section: Tensor, routes: Routes, process_group: "dist.ProcessGroup | None") -> Tensor:
    """What all ranks send to this one, in their order; an entry may have several numbers."""
    entry = section.shape[1:]
    size = section.element_size() * entry.numel()
    # A copy, because a tensor of one element may keep the stride of the table that it is a column of.
    own = section.new_empty(section.numel()).copy_(section.reshape(-1)).view(torch.uint8)
    arrived = section.new_empty(sum(routes.received) * entry.numel())
    received, sent = ([size * count for count in counts] for counts in routes.back)
    with _named(what):
        dist.all_to_all_single(arrived.view(torch.uint8), own, received, sent, group=process_group)
    return arrived.reshape(sum(routes.received), *entry)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Name the exchange that failed: where a rank has died, the backends name a socket."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"the exchange of {what} with other ranks failed: a rank has died or has not called ({error})"
        ) from error


def _gather_objects(what: str, own: Any, world_size: int, process_group: "dist.ProcessGroup | None") -> list[Any]:
    gathered: list[Any] = [None] * world_size
    with _named(what):
        dist.all_gather_object(gathered, own, group=process_group)
    return gathered


def _text_of(error: Exception) -> str:
    return str(error) or type(error).__name__


def _check_refusals(refusals: list[str | None]) -> None:
    for rank, refusal in enumerate(refusals):
        if refusal is not None:
            raise RuntimeError(f"gather_groups was refused on rank {rank} of the group: {refusal}")


def _check_alike(headers: list[_Header]) -> None:
    """Raise, on every rank with the same text, where the ranks do not fit together."""
    for rank, header in enumerate(headers):
        for name, first in headers[0].alike.items():
            if header.alike[name] != first:
                raise ValueError(
                    f"{name} must be alike on every rank, got {first} on rank 0 and {header.alike[name]} on rank {rank}"
                )


def _check_results(dtype: torch.dtype | None, device: torch.device, process_group: "dist.ProcessGroup | None") -> None:
    """Raise on every rank unless all have results, of one dtype; None: this rank has none."""
    rank, _ = place("process_group", process_group)
    code = zlib.crc32(str(dtype).encode())
    status = torch.tensor([rank + 1 if dtype is None else 0, code, -code], device=device)
    with _named("the state of GatheredGroups.local"):
        dist.all_reduce(status, dist.ReduceOp.MAX, group=process_group)
    refused, most, minus_least = status.tolist()
    if refused and dtype is not None:
        raise RuntimeError(f"GatheredGroups.local was refused on rank {refused - 1} of the group")
    if not refused and most != -minus_least:
        raise ValueError(f"tokens must have one dtype on every rank, got {dtype} on rank {rank} and another elsewhere")


def _local_rows(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor | None,
    response_mask: Tensor | None,
    groups: Any,
    group_size: int | None,
    cu_seqlens: Tensor | None,
    reward_weights: Any,
    more: dict[str, Tensor | None],
) -> _Local:
    """This rank's rows, and where each lies from its first to its last unmasked token."""
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
    given = None
    if reward_weights is not None:
        given, reward_weights = check_functions(rewards, reward_weights, "token_ids", (num_rows,), device)
    elif rewards is not None or more["step_rewards"] is None:
        given = check_rewards(rewards, "token_ids", (num_rows,), device, tuple(token_ids.shape)).to(torch.float64)
    kind, names = "None", b""
    check_one_grouping(groups, group_size)
    if isinstance(groups, Tensor):
        values = check_named_groups(groups, num_rows, "token_ids", device).tolist()
        kind, names = "a tensor", array("q", values).tobytes()
    elif groups is not None:
        kind, names = "names", _digests(groups, num_rows)

    tokens = {"token_ids": token_ids, "logprobs": logprobs.detach()}
    if mask is not None:
        tokens["response_mask"] = mask
    steps = check_step_rewards(more["step_rewards"], token_ids)
    if steps is not None:
        tokens["step_rewards"] = steps.detach().reshape(token_ids.shape)
    squares = more["sum_squares"]
    if squares is not None:
        check_like("sum_squares", check_real("sum_squares", squares), "token_ids", token_ids.shape, device)
        tokens["sum_squares"] = squares.detach().to(torch.float64)
    for name in ("steps", "states"):
        names_of_tokens = more[name]
        if names_of_tokens is not None:
            checked = check_integer(name, names_of_tokens)
            check_like(name, checked, "token_ids", token_ids.shape, device)
            tokens[name] = checked.to(torch.int64)
    tokens = {name: as_rows(tensor).reshape(-1) for name, tensor in tokens.items()}
    layout = build_layout(tokens["token_ids"], tokens.get("response_mask"), 1, bounds)
    lengths = layout.row_lengths.tolist()
    alike = {
        "token_ids": f"{token_ids.dtype} on {device.type}",
        "logprobs": str(logprobs.dtype),
        "response_mask": "None" if mask is None else "a mask",
        "rewards": "None" if given is None else f"shape {('rows', *given.shape[1:])}",
        "reward_weights": "a tensor" if isinstance(reward_weights, Tensor) else str(reward_weights),
        **{name: "None" if value is None else "a tensor" for name, value in more.items()},
        "groups": kind,
        "group_size": str(group_size),
    }
    header = _Header(None, alike, array("q", lengths).tobytes(), names)
    return _Local(
        header, None if given is None else given.detach(), tokens, layout.row_starts, layout.row_lengths, lengths
    )


def _positions(local: _Local, order: Tensor | None) -> Tensor | None:
    """Where the tokens of the rows lie, row after row in that order (None: their own); None: they are all there is."""
    if order is None and "response_mask" not in local.tokens:
        return None
    starts, lengths = local.row_starts, local.row_lengths
    if order is not None:
        starts, lengths = starts[order], lengths[order]
    # An arange that jumps where a row begins.
    positions = (starts - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
    return positions.add_(torch.arange(positions.shape[0], device=positions.device))


def _digests(groups: Any, num_rows: int) -> bytes:
    """Digests of the names of the prompts, one for each row."""
    if isinstance(groups, str | bytes) or not isinstance(groups, Iterable):
        raise TypeError(
            f"groups must be an integer tensor or a list of names for the rows, got {type(groups).__name__}"
        )
    names = read_names("groups", groups)
    if len(names) != num_rows:
        raise ValueError(f"groups must name one prompt for each of {num_rows} rows, got {len(names)} names")
    digests = [_digest(name) for name in names]
    for row, digest in enumerate(digests):
        if digest is None:
            raise TypeError(
                f"groups must hold names that are equal on every rank (strings, numbers, tuples of them), got "
                f"{names[row]!r:.80} for row {row}"
            )
    return b"".join(digest for digest in digests if digest is not None)


def _digest(name: Any) -> bytes | None:
    """The same for names that are equal, in every process; None for objects of which that is not known."""
    if name is None:
        text = b"none"
    elif isinstance(name, str):
        text = b"s" + str.encode(name, "utf-8", "surrogatepass")
    elif isinstance(name, bytes):
        text = b"b" + name
    elif isinstance(name, int | float):
        text = b"n" + (name.hex() if isinstance(name, float) and not name.is_integer() else hex(int(name))).encode()
    elif isinstance(name, tuple):
        parts = [_digest(part) for part in name]
        if None in parts:
            return None
        text = b"t" + b"".join(part for part in parts if part is not None)
    else:
        return None
    return blake2b(text, digest_size=_DIGEST).digest()


def _number_names(headers: list[_Header], lengths_of_ranks: list[list[int]]) -> list[int]:
    """A number for the prompt of every row of all ranks, in order of appearance."""
    keys: list[bytes] = []
    for header, lengths in zip(headers, lengths_of_ranks, strict=True):
        width = len(header.names) // max(len(lengths), 1)
        keys += [header.names[width * row : width * (row + 1)] for row in range(len(lengths))]
    numbers: dict[bytes, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]
