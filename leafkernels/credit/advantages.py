"""LEAF span advantages: boundaries, shared prefixes, span values, scatter, in one call."""

from typing import NamedTuple

from torch import Tensor

from leafkernels._core.checks import check_like, check_real
from leafkernels.credit.boundaries import boundaries_of_groups, check_boundary_options
from leafkernels.credit.nodes import nodes_of_groups
from leafkernels.credit.scatter import spread
from leafkernels.credit.values import SpanValues, check_value_options, values_of_groups
from leafkernels.rows.layout import as_rows
from leafkernels.rows.rollouts import Rollouts, read_rollouts


class Credit(NamedTuple):
    """Spans of the rows of a call, and what they were made from."""

    rollouts: Rollouts
    boundaries: Tensor
    nodes: Tensor
    spans: SpanValues


def credit_spans(
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
) -> Credit:
    """Boundaries, shared prefixes and span values; arguments as ``span_advantages``."""
    rollouts = read_rollouts(logprobs, token_ids, rewards, response_mask, groups, cu_seqlens, backend)
    if boundary_scores is not None:
        check_real("boundary_scores", boundary_scores)
        check_like("boundary_scores", boundary_scores, "token_ids", token_ids.shape, token_ids.device)
    check_boundary_options(num_boundaries, min_separation)
    check_value_options(terms, multiplicity_power, leave_one_out, normalize)

    layout, backend = rollouts.layout, rollouts.backend
    scores = logprobs if boundary_scores is None else boundary_scores
    boundaries = boundaries_of_groups(
        as_rows(scores), rollouts.mask, layout, num_boundaries, min_separation, boundary_scores is None, backend
    )
    nodes = nodes_of_groups(as_rows(token_ids), layout, boundaries, backend)
    spans = values_of_groups(
        rollouts.rewards,
        nodes,
        boundaries,
        layout,
        terms,
        multiplicity_power,
        leave_one_out,
        normalize,
        backend,
    )
    return Credit(rollouts, boundaries, nodes, spans)


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
        rewards: one for each row: (G,), (B, G) or (N,); finite floating point, or integers, which are taken as float64.
            NaN (unscorable) leaves the row out of every mean and gives it 0.
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
    credit = credit_spans(
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
    return spread(credit.spans.values, credit.spans.span_ends, credit.rollouts)
