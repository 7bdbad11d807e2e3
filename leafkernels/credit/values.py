"""Credit of spans: the mean reward of the rows that share a span, against the group's and the parent node's."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_device, check_integer, check_rewards, check_tensor
from leafkernels._core.derivatives import refuse_forward_mode, refuse_second_derivative
from leafkernels._core.operation import operation
from leafkernels._core.precision import is_rounding
from leafkernels._core.reference import from_reference, gradient_by
from leafkernels.credit.nodes import nodes_of_table
from leafkernels.credit.options import CreditOptions
from leafkernels.distributed import GatheredGroups
from leafkernels.rows.find import build_layout, rows_of_groups, with_prompts
from leafkernels.rows.layout import Layout, to_int32

if TYPE_CHECKING:
    import python_ref


class SpanValues(NamedTuple):
    """Spans of every row: span s of a row covers tokens [span_ends[s - 1], span_ends[s]), with span_ends[-1] = 0.

    The leading dimensions are the caller's for rows; S = B + 1. Spans that a row does not have are empty
    (their end is the end before) and hold 0. A row that goes on after its last node ends with its tail.
    """

    values: Tensor
    """(..., S) float64, normalised as asked."""
    raw: Tensor
    """(..., S) float64, before the normalisation."""
    span_ends: Tensor
    """(..., S) int32, ascending, counted from the row's first unmasked token; may exceed the row's length."""
    node_sizes: Tensor
    """(..., S) int32: how many rows the means below are over; column 0 is the group, column s the node at boundary s
    (of 1 to B), 0 where the row retains none."""
    node_values: Tensor
    """(..., S) float64: mean reward of the group, then of the row's node at each boundary; NaN where there is none."""


@operation("values")
def _span_values(
    rewards: Tensor, nodes: Tensor, boundaries: Tensor, layout: Layout, options: CreditOptions
) -> SpanValues:
    shape = rewards.shape[0], boundaries.shape[1] + 1
    dtypes = (torch.float64, torch.float64, torch.int32, torch.int32, torch.float64)
    return SpanValues(*(rewards.new_empty(shape, dtype=dtype) for dtype in dtypes))


# Rewards are constants in training. This gradient serves research, and is PyTorch on every device.
@operation("values")
def _span_values_backward(
    gradients: Tensor,
    raw_gradients: Tensor,
    raw: Tensor,
    rewards: Tensor,
    nodes: Tensor,
    boundaries: Tensor,
    layout: Layout,
    options: CreditOptions,
) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=torch.float64)


class _SpanValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rewards: Tensor,
        nodes: Tensor,
        boundaries: Tensor,
        layout: Layout,
        options: CreditOptions,
        backend: str,
    ) -> tuple[Tensor, ...]:
        spans = _span_values(backend, rewards, nodes, boundaries, layout, options)
        ctx.save_for_backward(spans.raw, rewards, nodes, boundaries)
        ctx.layout, ctx.options = layout, options
        ctx.mark_non_differentiable(*spans[2:])
        return tuple(spans)

    @staticmethod
    def backward(ctx: Any, gradients: Tensor, raw_gradients: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("span_values")
        raw, rewards, nodes, boundaries = ctx.saved_tensors
        grad_rewards = _span_values_backward(
            "torch", gradients, raw_gradients, raw, rewards, nodes, boundaries, ctx.layout, ctx.options
        )
        return grad_rewards.to(rewards.dtype), None, None, None, None, None


def values_of_groups(
    rewards: Tensor,
    nodes: Tensor,
    boundaries: Tensor,
    layout: Layout,
    options: CreditOptions,
    backend: str,
    gathered: GatheredGroups | None = None,
) -> SpanValues:
    """Spans of the N rows of a layout; the arguments have been checked.

    ``nodes`` is (N, B) as by ``nodes_of_groups``, ``boundaries`` (P, B), ``rewards`` (N,). ``gathered``: where the rows
    come from, if "batch" is to be all ranks.
    """
    refuse_forward_mode("span_values", rewards)
    if gathered is not None and options.normalize == "batch":
        return _values_of_all_ranks(rewards.detach(), nodes, boundaries, layout, options, backend, gathered)
    # Rewards are constants in training, and then an autograd function would only cost time.
    if rewards.requires_grad:
        return SpanValues(*_SpanValues.apply(rewards, nodes, boundaries, layout, options, backend))
    return _span_values(backend, rewards, nodes, boundaries, layout, options)


def _values_of_all_ranks(
    rewards: Tensor,
    nodes: Tensor,
    boundaries: Tensor,
    layout: Layout,
    options: CreditOptions,
    backend: str,
    gathered: GatheredGroups,
) -> SpanValues:
    """Z-scored over the spans of the rows of all ranks, from three numbers of each of these rows.

    They are added up in the order of the ranks, as the PyTorch implementation does that holds all of the rows.
    """
    options = options._replace(normalize="none")
    spans = values_of_groups(rewards, nodes, boundaries, layout, options, backend)
    is_missing = spans.span_ends <= pad(spans.span_ends, (1, -1))

    def total(entries: Tensor) -> Tensor:
        return gathered.all_rows(entries.sum(1, dtype=torch.float64)).sum()

    number = total(~is_missing)
    mean = total(spans.raw) / number.clamp_min(1.0)
    spread = total((spans.raw - mean).square().masked_fill(is_missing, 0.0))
    scale = (spread / (number - 1.0).clamp_min(1.0)).sqrt().clamp_min(1e-6)

    # A group whose rewards are all equal gets exactly 0.
    rewards = rewards.to(torch.float64)
    groups, is_out = layout.group_of_row, rewards.isnan()
    least, most = (rewards.new_full((layout.group_starts.shape[0] - 1,), end) for end in (torch.inf, -torch.inf))
    least = least.scatter_reduce(0, groups, rewards.masked_fill(is_out, torch.inf), "amin")
    most = most.scatter_reduce(0, groups, rewards.masked_fill(is_out, -torch.inf), "amax")
    is_zero = is_missing | is_rounding(least, most)[groups][:, None]
    return spans._replace(values=((spans.raw - mean) / scale).masked_fill(is_zero, 0.0))


def finish(spans: SpanValues, boundaries_of_rows: Tensor, row_shape: tuple[int, ...]) -> SpanValues:
    """The public result: cleared where a row retains no node, in the caller's leading dimensions."""
    is_group = torch.ones_like(spans.node_sizes[:, :1], dtype=torch.bool)
    is_node = torch.cat([is_group, (spans.node_sizes[:, 1:] >= 2) & (boundaries_of_rows >= 0)], dim=1)
    node_sizes = spans.node_sizes.masked_fill(~is_node, 0)
    node_values = spans.node_values.masked_fill(node_sizes == 0, torch.nan)
    fields = (spans.values, spans.raw, spans.span_ends, node_sizes, node_values)
    return SpanValues(*(field.reshape(*row_shape, field.shape[-1]) for field in fields))


def span_values(
    prefix_lengths: Tensor,
    boundaries: Tensor,
    rewards: Tensor,
    lengths: Tensor,
    *,
    terms: str = "both",
    multiplicity_power: float = 0.5,
    leave_one_out: bool = False,
    normalize: str = "span",
    backend: str = "auto",
) -> SpanValues:
    """Credit of every span, from the shared prefixes and the rewards of a prompt's rows.

    At boundary p two rows share a node when their longest common prefix is at least p, or when they are identical. A
    node needs two rows; V is the mean reward of its n rows, V_0 that of the group, R the last boundary the row retains:

        span k <= R   A = [(V_k - V_0) + (V_k - V_{k-1})] * n_k ** -multiplicity_power
        tail          A = (r_i - V_0) + (r_i - V_R)

    Source: LEAF, arXiv 2606.07610. Differentiable in ``rewards``, once and in reverse mode. Computed in float64.

    Args:
        prefix_lengths: (G, G) or (P, G, G) int32 from ``common_prefix_lengths``; prefixes longer than the last boundary
            may be cut there.
        boundaries: (B,) or (P, B) int32 from ``select_boundaries``: ascending, -1 after the last.
        rewards: (G,) or (P, G); NaN leaves a row out of every mean, and it has no spans.
        lengths: (G,) or (P, G) integers; rows of length 0 count in V_0 only.
        terms: "both", "global" (the first bracket) or "local" (the second).
        multiplicity_power: 0.5 is the paper's 1/sqrt(n); the tail has no such factor.
        leave_one_out: the global term times G/(G - 1), the local one times n/(n - 1) of the parent node: unbiased for
            fixed boundaries. A group of one gives 0.
        normalize: "span" z-scores over the spans of a prompt (ddof 1, floor 1e-6 under the deviation), "batch" over
            those of the call, "reward_std" divides by the deviation of the prompt's rewards + 1e-6, "none". A prompt
            whose rewards are all equal gives exactly 0.0 in every mode; so does one whose rewards lie within 2 ** -21
            of each other, relative to the largest in size (four units of float32's last place), which is what
            rounding leaves: they count as the least. Whole numbers up to 2 ** 24 are exact, and this rule makes none
            of them equal.
        backend: "auto", "triton", "torch" or "reference".

    Example:
        >>> shared = torch.tensor([[3, 2, 1], [2, 3, 1], [1, 1, 3]])
        >>> rewards, lengths = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([3, 3, 3])
        >>> spans = leafkernels.span_values(shared, torch.tensor([2]), rewards, lengths, normalize="none")
        >>> spans.values[0], spans.span_ends[0]
        (tensor([0.2357, 1.1667], dtype=torch.float64), tensor([2, 3], dtype=torch.int32))
    """
    prefix_lengths = check_integer("prefix_lengths", prefix_lengths)
    boundaries = check_integer("boundaries", boundaries)
    lengths = check_integer("lengths", lengths)
    check_tensor("rewards", rewards)
    options = CreditOptions(
        terms=terms, multiplicity_power=multiplicity_power, leave_one_out=leave_one_out, normalize=normalize
    ).checked()
    device = prefix_lengths.device
    if prefix_lengths.dim() not in (2, 3) or prefix_lengths.shape[-1] != prefix_lengths.shape[-2]:
        raise ValueError(
            f"prefix_lengths must have shape (rows, rows) or (prompts, rows, rows), got {tuple(prefix_lengths.shape)}"
        )
    row_shape = tuple(prefix_lengths.shape[:-1])
    if tuple(lengths.shape) != row_shape:
        raise ValueError(
            f"lengths must have one entry for each row of prefix_lengths, shape {row_shape}, "
            f"got shape {tuple(lengths.shape)}"
        )
    if tuple(boundaries.shape[:-1]) != row_shape[:-1] or boundaries.dim() != len(row_shape):
        raise ValueError(
            f"boundaries must hold one list for each prompt of prefix_lengths, shape {(*row_shape[:-1], 'B')}, "
            f"got shape {tuple(boundaries.shape)}"
        )
    check_device("boundaries", boundaries, "prefix_lengths", device)
    check_device("lengths", lengths, "prefix_lengths", device)
    rewards = check_rewards(rewards, "prefix_lengths", row_shape, device)
    backend = resolve_backend(backend, device)

    group, num_boundaries = row_shape[-1], boundaries.shape[-1]
    table = to_int32(prefix_lengths.reshape(rewards.shape[0], group))
    layout = with_prompts(build_layout(table, None, group, None), row_shape)
    boundaries = to_int32(boundaries.reshape(layout.group_starts.shape[0] - 1, num_boundaries))
    # A row without a reward counts nowhere, as if it were empty.
    layout = layout._replace(row_lengths=lengths.reshape(-1).to(torch.int64)).without(rewards.isnan())

    def credited(rewards: Tensor, backend: str) -> SpanValues:
        nodes = nodes_of_table(table, layout, boundaries, backend)
        spans = values_of_groups(rewards, nodes, boundaries, layout, options, backend)
        return finish(spans, boundaries[layout.group_of_row], row_shape)

    if backend != "reference":
        return credited(rewards, backend)

    def compute(rewards: Tensor) -> SpanValues:
        trees = _trees_of_table(table.tolist(), boundaries.tolist(), rewards.tolist(), layout, options)
        return spans_of_trees(trees, rewards, num_boundaries, row_shape)

    gradient = gradient_by(lambda rewards: credited(rewards, "torch"))
    return SpanValues(*from_reference("span_values", compute, gradient, rewards, constants=(2, 3, 4)))


def _trees_of_table(
    prefix_lengths: list, boundaries: list, rewards: list, layout: Layout, options: CreditOptions
) -> "list[python_ref.SpanTree]":
    """The trees of the prompts of ``span_values``, from the definition."""
    import python_ref
    from python_ref.values import nodes_from_prefix_lengths

    lengths, trees = layout.row_lengths.tolist(), []
    for group, rows in enumerate(rows_of_groups(layout)):
        shared, positions = [prefix_lengths[i] for i in rows], [p for p in boundaries[group] if p >= 0]
        row_lengths = [lengths[i] for i in rows]
        has_tokens = [length > 0 for length in row_lengths]
        nodes = [nodes_from_prefix_lengths(shared, row_lengths, p, has_tokens) for p in positions]
        raw = python_ref.span_values(
            shared,
            positions,
            [rewards[i] for i in rows],
            row_lengths,
            terms=options.terms,
            multiplicity_power=options.multiplicity_power,
            leave_one_out=options.leave_one_out,
        )
        trees.append(python_ref.SpanTree(rows, positions, nodes, raw, raw))
    rewards_per_prompt = [[rewards[i] for i in tree.rows] for tree in trees]
    normalized = python_ref.normalize_spans([tree.raw for tree in trees], rewards_per_prompt, options.normalize)
    return [replace(tree, spans=spans) for tree, spans in zip(trees, normalized, strict=True)]


def spans_of_trees(
    trees: "list[python_ref.SpanTree]", rewards: Tensor, num_boundaries: int, row_shape: tuple[int, ...]
) -> SpanValues:
    """The result of ``python_ref`` for the rows of some prompts, as ``span_values`` returns it."""
    from python_ref.values import mean, settled

    shape, all_rewards = (rewards.shape[0], num_boundaries + 1), rewards.tolist()
    values, raw, node_values = (torch.full(shape, fill, dtype=torch.float64) for fill in (0.0, 0.0, torch.nan))
    ends, sizes = (torch.zeros(shape, dtype=torch.int32) for _ in range(2))
    for tree in trees:
        tree_rewards = settled([all_rewards[i] for i in tree.rows])
        scored = [r for r in tree_rewards if r == r]
        for rank, i in enumerate(tree.rows):
            sizes[i, 0], node_values[i, 0] = len(scored), mean(scored) if scored else torch.nan
            for k, nodes in enumerate(tree.nodes, 1):
                if len(nodes[rank]) >= 2:
                    sizes[i, k], node_values[i, k] = len(nodes[rank]), mean([tree_rewards[j] for j in nodes[rank]])
            for s, ((_, end, value), (_, _, raw_value)) in enumerate(
                zip(tree.spans[rank], tree.raw[rank], strict=True)
            ):
                values[i, s], raw[i, s], ends[i, s:] = value, raw_value, end
    fields = (values, raw, ends, sizes, node_values)
    return SpanValues(*(field.to(rewards.device).reshape(*row_shape, shape[1]) for field in fields))
