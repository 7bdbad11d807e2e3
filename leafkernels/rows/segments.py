"""Sums over segments of the entries of a call, such as the rows of a prompt.

In an order of their own, in which no entry of another segment changes a bit.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.operation import operation
from leafkernels._core.precision import is_rounding
from leafkernels.rows.layout import Layout


@operation("segments")
def _running_sums(entries: Tensor, starts: Tensor, lasts: Tensor, longest: int) -> Tensor:
    return torch.empty_like(entries)


class _RunningSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entries: Tensor, starts: Tensor, lasts: Tensor, longest: int, backend: str) -> Tensor:
        ctx.save_for_backward(starts, lasts)
        ctx.options = longest, backend
        return _running_sums(backend, entries, starts, lasts, longest)

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor | None, ...]:
        starts, lasts = ctx.saved_tensors
        # An entry is in all sums from its own to the last of its segment: the same, counted from the end.
        end = starts.shape[0] - 1
        turned = ((end - lasts).flip(0), (end - starts).flip(0))
        return _RunningSums.apply(gradients.flip(0), *turned, *ctx.options).flip(0), None, None, None, None


def running_sums(entries: Tensor, starts: Tensor, lasts: Tensor, longest: int, backend: str) -> Tensor:
    """(E,): each of the float64 entries plus all before it in its segment.

    ``starts`` and ``lasts`` (E,) int64 are the places of the first and the last entry of each entry's segment, which
    has at most ``longest``.
    """
    call = entries.contiguous(), starts, lasts, longest
    # What is compared with the reference is computed by PyTorch.
    backend = "torch" if backend == "reference" else backend
    return _RunningSums.apply(*call, backend) if entries.requires_grad else _running_sums(backend, *call)


class Statistics(NamedTuple):
    """Of each entry (E,), in the caller's order, what is known of its segment; float64."""

    centred: Tensor
    """The entry minus the mean of its segment; 0 where all of that differ by rounding alone."""
    number: Tensor
    """How many entries count."""
    std: Tensor
    """ddof 1; exactly 0 where they differ by rounding alone."""
    is_out: Tensor
    """Whether the entry does not count."""

    @property
    def divisor(self) -> Tensor:
        """std + 1e-6; 0 where the entries are equal."""
        return torch.where(self.std == 0.0, 0.0, self.std + 1e-6)

    def over_std(self, values: Tensor) -> Tensor:
        """``values`` / (std + 1e-6); 0 where the entries are equal."""
        return (values / (self.std + 1e-6)).masked_fill(self.std == 0.0, 0.0)


class Segments(NamedTuple):
    """The order in which each segment is one run of entries. All are int64 (E,)."""

    order: Tensor
    starts: Tensor
    """Of each entry in that order, the place at which its segment begins."""
    lasts: Tensor
    """And that of its last entry."""
    longest: int
    backend: str

    def totals(self, entries: Tensor) -> Tensor:
        """(E,): of each entry, in the caller's order, the sum over its segment."""
        sums = self.totals_in_order(entries[self.order])
        return torch.empty_like(sums).index_copy(0, self.order, sums)

    def totals_in_order(self, entries: Tensor) -> Tensor:
        """The same of entries in the order of the segments."""
        return self.running_sums(entries)[self.lasts]

    def running_sums(self, entries: Tensor) -> Tensor:
        """Of entries in the order of the segments each plus all before it in its segment."""
        return running_sums(entries, self.starts, self.lasts, self.longest, self.backend)

    def statistics(self, values: Tensor, is_in: Tensor) -> Statistics:
        """Of the float64 values (E,) of the entries that count. Counted from the least, so that equal ones are 0."""
        constants = values.detach()[self.order]
        is_out = ~is_in[self.order]
        least, most = (
            constants.new_full(constants.shape, end).scatter_reduce(
                0, self.starts, constants.masked_fill(is_out, end), kind
            )[self.starts]
            for end, kind in ((torch.inf, "amin"), (-torch.inf, "amax"))
        )
        is_flat = is_rounding(least, most)
        shift = torch.empty_like(least).index_copy(0, self.order, torch.where(is_flat, constants, least))
        centred = (values - shift).masked_fill(~is_in, 0.0)
        number = self.totals(is_in.to(torch.float64))
        centred = (centred - self.totals(centred) / number.clamp_min(1.0)).masked_fill(~is_in, 0.0)
        variance = self.totals(centred.square()) / (number - 1.0).clamp_min(1.0)
        # The derivative of the root is infinite at 0, and would turn gradients of 0 into NaN.
        is_zero = variance == 0.0
        std = variance.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)
        return Statistics(centred, number, std, ~is_in)


def segments_of_groups(layout: Layout, backend: str) -> Segments:
    """The rows of a layout by their group."""
    order = layout.rows_by_group
    groups = layout.group_of_row[order]
    starts, lasts = layout.group_starts[groups], layout.group_starts[groups + 1] - 1
    return Segments(order, starts, lasts, layout.max_group, backend)


def segments_of_names(*names: Tensor, backend: str) -> Segments:
    """Entries that have all names (E,), integers, in common."""
    size = names[0].shape[0]
    order = torch.arange(size, device=names[0].device)
    for name in names:
        order = order[torch.argsort(name[order], stable=True)]
    is_new = torch.zeros_like(order, dtype=torch.bool)
    is_new[:1] = True
    for name in names:
        ordered = name[order]
        is_new[1:] |= ordered[1:] != ordered[:-1]
    places = torch.arange(size, device=order.device)
    starts = torch.where(is_new, places, 0).cummax(0).values
    is_last = torch.ones_like(is_new)
    is_last[:-1] = is_new[1:]
    lasts = torch.where(is_last, places, size).flip(0).cummin(0).values.flip(0)
    return Segments(order, starts, lasts, size, backend)
