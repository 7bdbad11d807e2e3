"""LEAF span advantages: boundaries, shared prefixes, span values, scatter, in one call."""

from typing import NamedTuple

import torch
from torch import Tensor

from leafkernels._backend import resolve_backend
from leafkernels._checks import check_integer, check_layout, check_like, check_real, check_rewards
from leafkernels._layout import Layout, as_rows, group_members
from leafkernels.boundaries import boundaries_of_groups, check_boundary_options, per_prompt
from leafkernels.prefix_lengths import prefix_lengths_of_groups
from leafkernels.scatter import scatter_to_tokens
from leafkernels.values import SpanValues, check_value_options, finish, values_of_groups


class SpanTree(NamedTuple):
    """The prefix tree behind the advantages, and what ``span_advantages`` scatters; for debugging and display."""

    boundaries: Tensor
    """int32, ascending, -1 where there is none; shaped as by ``select_boundaries``."""
    lengths: Tensor
    """int64, one for each row: tokens from its first to its last unmasked one; 0 for rows whose reward is NaN."""
    nodes: Tensor
    """(..., B) int32: a name for the row's node at each boundary, the smallest of its rows (counted within the prompt,
    or over all rows where ``groups`` is a tensor); -1 where the row retains none."""
    spans: SpanValues
    """Values, ends, members and mean rewards of every row's spans."""


class _Credit(NamedTuple):
    layout: Layout
    mask: Tensor | None
    row_shape: tuple[int, ...]
    boundaries: Tensor
    prefix_lengths: Tensor
    spans: SpanValues
    backend: str


def _credit(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor | None,
    groups: Tensor | int | None,
    cu_seqlens: Tensor | None,
    num_boundaries: int,
    min_separation: int | None,
    boundary_scores: Tensor | None,
    terms: str,
    multiplicity_power: float,
    leave_one_out: bool,
    normalize: str,
    backend: str,
) -> _Credit:
    check_integer("token_ids", token_ids)
    check_real("logprobs", logprobs)
    check_like("logprobs", logprobs, "token_ids", token_ids.shape, token_ids.device)
    if boundary_scores is not None:
        check_real("boundary_scores", boundary_scores)
        check_like("boundary_scores", boundary_scores, "token_ids", token_ids.shape, token_ids.device)
    check_boundary_options(num_boundaries, min_separation)
    check_value_options(terms, multiplicity_power, leave_one_out, normalize)
    backend = resolve_backend(backend, token_ids.device)
    layout, mask, row_shape = check_layout("token_ids", token_ids, response_mask, groups, cu_seqlens, backend)
    rewards = check_rewards(rewards, "token_ids", row_shape, token_ids.device)

    # A row that cannot be scored takes no part in anything, as if it had no token and no reward.
    layout = layout.without(rewards.isnan())
    scores = logprobs if boundary_scores is None else boundary_scores
    boundaries = boundaries_of_groups(
        as_rows(scores), mask, layout, num_boundaries, min_separation, boundary_scores is None, backend
    )
    last = boundaries.amax(1) if num_boundaries else boundaries.new_zeros(boundaries.shape[0])
    prefix_lengths = prefix_lengths_of_groups(as_rows(token_ids), layout, last, backend)
    spans = values_of_groups(
        rewards,
        prefix_lengths,
        boundaries,
        layout.row_lengths,
        layout,
        terms,
        multiplicity_power,
        leave_one_out,
        normalize,
        backend,
    )
    return _Credit(layout, mask, row_shape, boundaries, prefix_lengths, spans, backend)


def span_advantages(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    num_boundaries: int = 2,
    min_separation: int | None = None,
    boundary_scores: Tensor | None = None,
    terms: str = "both",
    multiplicity_power: float = 0.5,
    leave_one_out: bool = False,
    normalize: str = "span",
    backend: str = "auto",
) -> Tensor:
    """One advantage for every token, from the prefix tree that the rollouts of a prompt already form.

    The positions of highest surprisal become boundaries; rollouts that share the exact prefix at a boundary form a
    node; each span between boundaries is credited with the mean reward of its node against the group's and the parent
    node's, and the rest of a rollout with its own reward (LEAF, arXiv 2606.07610). Where no two rollouts share a
    boundary prefix this is GRPO.

    A row is the stretch from a rollout's first to its last unmasked token, so rows padded on either side, or behind
    prompts of different lengths, line up. Prefixes are compared over the whole stretch, holes included; boundaries are
    chosen at, and advantages written to, unmasked positions only. Empty rows count in the group's mean and in nothing
    else; groups of one, and groups whose rewards are all equal, get exactly 0.0.

    On a GPU nothing is read back: the values of ``cu_seqlens`` and ``groups`` are preconditions there. Breaking them
    gives meaningless numbers, never an access outside the tensors.

    Args:
        logprobs: (G, T) rollouts of one prompt, (B, G, T) a batch of prompts, (N, T) with ``groups``, or (total,) with
            ``cu_seqlens``. float32, bfloat16 or float16, nats: log-probabilities of the sampled tokens. Boundaries are
            ranked by their negative; no gradient flows to them. NaN: never a boundary.
        token_ids: the same shape; any integer dtype.
        rewards: one for each row: (G,), (B, G) or (N,); finite floating point or integers. NaN (unscorable) leaves the
            row out of every mean and gives it 0.
        response_mask: the same shape; nonzero where a token counts, with holes and padding anywhere; None: all.
        groups: an int (consecutive runs of that many rows are a prompt) or an integer tensor (N,) that names each
            row's prompt, in any order and with unequal sizes (``group_index`` makes it from uid strings); None: all
            rows are one prompt. A CUDA tensor costs N * N int32 of temporary memory, because counting its groups would
            synchronise; an int costs N * groups.
        cu_seqlens: (N + 1,) int32, offsets of packed rows: 0, ascending, the total.
        num_boundaries: boundaries of a prompt at most (B of the paper).
        min_separation: least distance of two boundaries; default max(2, shortest row // (max(B, 1) + 1)).
        boundary_scores: shaped like ``token_ids``, ranked instead of the surprisal: entropies, or anything else.
        terms: "both", "global" (against the group) or "local" (against the parent node).
        multiplicity_power: spans shared by n rows are scaled by n ** -multiplicity_power.
        leave_one_out: the unbiased variant, see ``span_values``.
        normalize: "span", "batch", "reward_std" or "none", see ``span_values``.
        backend: "auto" (CUDA tensors take Triton, all others PyTorch), "triton", "torch" or "reference".

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Differentiable in ``rewards`` (linear in them
        with normalize="none").

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.
        RuntimeError: the backend asked for cannot run here.
    """
    credit = _credit(
        logprobs,
        token_ids,
        rewards,
        response_mask=response_mask,
        groups=groups,
        cu_seqlens=cu_seqlens,
        num_boundaries=num_boundaries,
        min_separation=min_separation,
        boundary_scores=boundary_scores,
        terms=terms,
        multiplicity_power=multiplicity_power,
        leave_one_out=leave_one_out,
        normalize=normalize,
        backend=backend,
    )
    size = tuple(token_ids.shape) if token_ids.dim() < 3 else (credit.layout.row_starts.shape[0], token_ids.shape[-1])
    advantages = scatter_to_tokens(
        credit.spans.values,
        credit.spans.span_ends,
        credit.mask,
        credit.layout,
        size,
        torch.float32,
        credit.backend,
    )
    return advantages.reshape(token_ids.shape)


def span_tree(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    num_boundaries: int = 2,
    min_separation: int | None = None,
    boundary_scores: Tensor | None = None,
    terms: str = "both",
    multiplicity_power: float = 0.5,
    leave_one_out: bool = False,
    normalize: str = "span",
    backend: str = "auto",
) -> SpanTree:
    """The tree that ``span_advantages`` credits; same arguments. Rows lead every field, in the caller's shape."""
    credit = _credit(
        logprobs,
        token_ids,
        rewards,
        response_mask=response_mask,
        groups=groups,
        cu_seqlens=cu_seqlens,
        num_boundaries=num_boundaries,
        min_separation=min_separation,
        boundary_scores=boundary_scores,
        terms=terms,
        multiplicity_power=multiplicity_power,
        leave_one_out=leave_one_out,
        normalize=normalize,
        backend=backend,
    )
    layout, row_shape = credit.layout, credit.row_shape
    of_rows = credit.boundaries[layout.group_of_row]
    spans = finish(credit.spans, of_rows, row_shape)
    has_node = spans.members.reshape(of_rows.shape[0], -1)[:, 1:] > 0
    nodes = _node_names(credit.prefix_lengths, of_rows, layout).masked_fill_(~has_node, -1)
    if not isinstance(groups, Tensor):
        nodes = torch.where(nodes < 0, nodes, nodes % max(layout.max_group, 1))
    return SpanTree(
        boundaries=per_prompt(credit.boundaries, layout, row_shape, groups),
        lengths=layout.row_lengths.reshape(row_shape),
        nodes=nodes.to(torch.int32).reshape(*row_shape, nodes.shape[-1]),
        spans=spans,
    )


def _node_names(prefix_lengths: Tensor, boundaries_of_rows: Tensor, layout: Layout) -> Tensor:
    """(N, B) the smallest row that shares each row's prefix at each boundary."""
    num_rows = prefix_lengths.shape[0]
    members, is_member = group_members(layout.rows_by_group, layout.group_starts, layout.group_of_row, layout.max_group)
    lengths = layout.row_lengths[:, None]
    identical = (prefix_lengths == lengths) & (layout.row_lengths[members] == lengths)
    names = torch.full_like(boundaries_of_rows, num_rows, dtype=torch.int64)
    for k in range(boundaries_of_rows.shape[1]):
        shares = (identical | (prefix_lengths >= boundaries_of_rows[:, k, None])) & is_member & (lengths > 0)
        names[:, k] = members.masked_fill(~shares, num_rows).amin(1) if num_rows else num_rows
    return names
