"""Rewards of several functions, and rewards at any token: what each row earns, and up to each of its tokens."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.checks import (
    check_device,
    check_finite,
    check_like,
    check_rewards,
    check_tensor,
    values_readable,
)
from leafkernels.rows.find import Rows
from leafkernels.rows.layout import Layout
from leafkernels.rows.segments import running_sums, segments_of_groups


class Earned(NamedTuple):
    """Step rewards of a call, added up along each row. M tokens, flattened; N rows."""

    sums: Tensor
    """(M,) float64: what the row has earned up to the token and with it; 0 outside of rows."""
    row_of_token: Tensor
    """(M,) int64"""
    first_of_row: Tensor
    """(N,) int64: where the first token of the row's stretch lies."""
    is_token: Tensor
    """(M,) bool: whether the token counts, in a row that has a return."""
    along: tuple[Tensor, Tensor, int, str]
    """Of each token the first and the last of its row, (M,) int64, and what else ``running_sums`` takes."""

    def along_rows(self, entries: Tensor) -> Tensor:
        """(M,) float64: each entry plus all before it in its row; outside of rows itself."""
        return running_sums(entries, *self.along)

    def before(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """What rows had earned before the token of that number, counted from their first."""
        at = self.first_of_row[rows] + tokens - 1
        return torch.where(tokens > 0, self.sums[at.clamp(0, self.sums.shape[0] - 1)], 0.0)

    def before_tokens(self) -> Tensor:
        """(M,): what its row had earned before each token."""
        before = pad(self.sums[:-1], (1, 0))
        is_first = torch.arange(before.shape[0], device=before.device) <= self.first_of_row[self.row_of_token]
        return before.masked_fill(is_first, 0.0)


def check_step_rewards(step_rewards: Any, token_ids: Tensor) -> Tensor | None:
    """The step rewards as a tensor (M,), flattened; raise unless they are shaped like the ids."""
    if step_rewards is None:
        return None
    check_tensor("step_rewards", step_rewards)
    if step_rewards.dtype.is_complex or step_rewards.dtype == torch.bool:
        raise TypeError(f"step_rewards must be floating point or integers, got {step_rewards.dtype}")
    check_like("step_rewards", step_rewards, "token_ids", token_ids.shape, token_ids.device)
    return step_rewards.to(torch.float64).reshape(-1)


def earned_at_tokens(step_rewards: Tensor, rows: Rows, width: int, backend: str) -> Earned:
    """Of step rewards (M,); ``width`` is that of padded rows, 0 for packed ones. Of tokens there is one at least."""
    layout, device = rows.layout, step_rewards.device
    tokens = torch.arange(step_rewards.shape[0], device=device)
    num_rows = layout.row_starts.shape[0]
    if width:
        row_of_token = tokens // width
    else:
        row_of_token = torch.searchsorted(layout.slot_ends, tokens, right=True).clamp_max(num_rows - 1)
    first_of_row = layout.row_starts + torch.arange(num_rows, device=device) * width
    first = first_of_row[row_of_token]
    is_in = (tokens >= first) & (tokens < first + layout.row_lengths[row_of_token])
    # A token outside of rows is a segment of its own.
    starts = torch.where(is_in, first, tokens)
    lasts = torch.where(is_in, first + layout.row_lengths[row_of_token] - 1, tokens)
    along = starts, lasts, max(layout.max_length, 1), backend
    sums = running_sums(step_rewards.masked_fill(~is_in, 0.0), *along)
    is_token = is_in if rows.mask is None else is_in & rows.mask.reshape(-1)
    return Earned(sums, row_of_token, first_of_row, is_token, along)


def total_returns(rewards: Tensor, earned: Earned, layout: Layout) -> tuple[Tensor, Earned]:
    """(N,) float64, and what is earned without the rows whose return is NaN."""
    rows = torch.arange(layout.row_lengths.shape[0], device=layout.row_lengths.device)
    totals = rewards.to(torch.float64) + earned.before(rows, layout.row_lengths)
    is_out = totals.isnan()[earned.row_of_token]
    return totals, earned._replace(sums=earned.sums.masked_fill(is_out, 0.0), is_token=earned.is_token & ~is_out)


def check_functions(
    rewards: Any, weights: Sequence[float] | Tensor, name: str, row_shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Sequence[float] | Tensor]:
    """The rewards of several functions as (N, F), and their F weights."""
    check_tensor("rewards", rewards)
    shape = tuple(rewards.shape)
    if shape[:-1] != row_shape or not shape[len(row_shape) :]:
        raise ValueError(
            f"rewards must have one entry for each row of {name} and each function where reward_weights is given, "
            f"shape {(*row_shape, 'functions')}, got shape {shape}"
        )
    # One column stands for all: dtype and device are those of the whole.
    check_rewards(rewards[..., 0] if shape[-1] else rewards.sum(-1), name, row_shape, device)
    if isinstance(weights, Tensor):
        check_device("reward_weights", weights, name, device)
        if values_readable(weights) and not bool(weights.isfinite().all()):
            raise ValueError(f"reward_weights must be finite, got {weights.tolist()}")
        size = tuple(weights.shape)
    elif isinstance(weights, Sequence) and not isinstance(weights, str | bytes):
        for weight in weights:
            check_finite("reward_weights", weight)
        size = (len(weights),)
    else:
        raise TypeError(f"reward_weights must be a list of numbers, got {type(weights).__name__}")
    if size != shape[-1:]:
        raise ValueError(
            f"reward_weights must have one number for each function of rewards, shape {shape[-1:]}, got shape {size}"
        )
    return rewards.reshape(math.prod(row_shape), shape[-1]).to(torch.float64), weights


def weighed_rewards(rewards: Tensor, weights: Sequence[float] | Tensor, layout: Layout, backend: str) -> Tensor:
    """(N,) float64: rewards (N, F), each function's divided by its deviation in a prompt, weighed and summed.

    sum_f w_f (r_f - mean_f) / (std_f + 1e-6): GDPO, arXiv 2601.05242. A function that is NaN says nothing of the row;
    a row of which none says anything is NaN.
    """
    is_known, groups = ~rewards.isnan(), segments_of_groups(layout, backend)
    total = rewards.new_zeros(rewards.shape[0])
    for function in range(rewards.shape[1]):
        found = groups.statistics(rewards[:, function], is_known[:, function])
        total = total + weights[function] * found.over_std(found.centred)
    return total.masked_fill(~is_known.any(1), torch.nan)
