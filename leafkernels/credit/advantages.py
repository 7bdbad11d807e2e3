"""LEAF span advantages: boundaries, nodes, span values, scatter, in one call."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from leafkernels._core.checks import check_like, check_real
from leafkernels.credit.boundaries import boundaries_of_groups
from leafkernels.credit.nodes import nodes_of_groups
from leafkernels.credit.options import CreditOptions
from leafkernels.credit.scatter import credit_tokens
from leafkernels.credit.values import SpanValues, values_of_groups
from leafkernels.distributed import GatheredGroups
from leafkernels.rows.layout import as_rows
from leafkernels.rows.rollouts import Rollouts, read_rollouts


class CreditedSpans(NamedTuple):
    """Spans of the rows of a call, with the boundaries and nodes they follow from."""

    boundaries: Tensor
    nodes: Tensor
    spans: SpanValues


def check_credit(
    rollouts: Rollouts, boundary_scores: Any, options: CreditOptions, gathered: Any = None
) -> CreditOptions:
    """The options, checked like the other arguments of ``span_advantages``."""
    if boundary_scores is not None:
        token_ids = rollouts.token_ids
        check_real("boundary_scores", boundary_scores)
        check_like("boundary_scores", boundary_scores, "token_ids", token_ids.shape, token_ids.device)
    if gathered is not None:
        _check_gathered(gathered, rollouts)
    return options.checked()


def credit_spans(
    rollouts: Rollouts,
    boundary_scores: Tensor | None,
    options: CreditOptions,
    gathered: GatheredGroups | None = None,
) -> CreditedSpans:
    """Boundaries, nodes and span values, by "triton" or "torch"; the arguments have been checked."""
    token_ids, layout, backend = rollouts.token_ids, rollouts.layout, rollouts.backend
    scores = as_rows(rollouts.logprobs if boundary_scores is None else boundary_scores)
    boundaries = boundaries_of_groups(scores, rollouts.rows, options, boundary_scores is None, backend)
    nodes = nodes_of_groups(as_rows(token_ids), layout, boundaries, backend)
    spans = values_of_groups(rollouts.rewards, nodes, boundaries, layout, options, backend, gathered)
    return CreditedSpans(boundaries, nodes, spans)


def refuse_batch_of_ranks(options: CreditOptions, gathered: GatheredGroups | None) -> None:
    """Raise for normalize="batch" over ranks: the reference sees the spans of its own rank only."""
    if gathered is not None and options.normalize == "batch":
        raise NotImplementedError(
            "backend must be 'torch' or 'triton' where gathered is given with normalize='batch', got 'reference'"
        )


def _check_gathered(gathered: Any, rollouts: Rollouts) -> None:
    if not isinstance(gathered, GatheredGroups):
        raise TypeError(f"gathered must be what gather_groups returned, got {type(gathered).__name__}")
    rows, own = gathered.num_rows, rollouts.rewards.shape[0]
    if rows != own:
        raise ValueError(f"gathered must hold the rows of token_ids, {own}, got {rows}")


def span_advantages(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    step_rewards: Tensor | None = None,
    reward_weights: Sequence[float] | Tensor | None = None,
    num_boundaries: int = 2,
    min_separation: int | None = None,
    boundary_scores: Tensor | None = None,
    terms: str = "both",
    multiplicity_power: float = 0.5,
    leave_one_out: bool = False,
    normalize: str = "span",
    gathered: GatheredGroups | None = None,
    backend: str = "auto",
) -> Tensor:
    """One advantage for every token, from the prefix tree that the rollouts of a prompt already form.

    2-D tensors without ``groups`` or ``group_size`` are the rollouts of one prompt; several prompts are (P, G, T), or
    (N, T) with either.

    The positions of highest surprisal become boundaries; rollouts that share the exact prefix at a boundary form a
    node; each span between boundaries is credited with the mean reward of its node against the group's and the parent
    node's, and the rest of a rollout with its own reward (LEAF, arXiv 2606.07610). Where no two rollouts share a
    boundary prefix this is GRPO.

    A row is the stretch from a rollout's first to its last unmasked token, so rows padded on either side, or after
    prompts of different lengths, line up. Prefixes are compared over the whole stretch, holes included; boundaries are
    chosen at, and advantages written to, unmasked positions only. Empty rows count in the group's mean and in nothing
    else; groups of one, and groups whose rewards are all equal (or differ by rounding alone, see ``span_values``), get
    exactly 0.0.

    On a GPU nothing is read back: the values of ``cu_seqlens`` and ``groups`` are preconditions there. Breaking them
    gives meaningless numbers, never an access outside the tensors.

    Args:
        logprobs: (G, T) rollouts of one prompt, (P, G, T) a batch of prompts, (N, T) with ``groups``, or (total,) with
            ``cu_seqlens``. float32, bfloat16 or float16, nats: log-probabilities of the sampled tokens. Boundaries are
            ranked by their negative; no gradient flows to them. NaN: never a boundary.
        token_ids: the same shape; any integer dtype.
        rewards: one for each row: (G,), (P, G) or (N,); finite floating point, or integers, which are taken as float64.
            NaN (unscorable) leaves the row out of every mean and gives it 0. None where there are step rewards: 0.
        response_mask: the same shape; nonzero where a token counts, with holes and padding anywhere; None: all.
        groups: integers (N,) that name each row's prompt, in any order and with unequal sizes (``group_index`` makes
            them from uid strings). Triton takes a temporary int32 table: N * N for a CUDA tensor, because counting its
            groups would synchronise, N * group_size otherwise. PyTorch takes none.
        group_size: consecutive runs of that many rows are a prompt. None, with ``groups`` None too: all rows are one.
        cu_seqlens: (N + 1,) int32, offsets of packed rows: 0, ascending, the total.
        step_rewards: shaped like ``token_ids``: what is earned at each token, holes of the mask included, beside the
            reward of the row; outside of rows it is not read. A row's return is the sum of both, and where a scheme
            says reward, that is meant: LEAF credits returns. NaN in a row makes its return NaN.
        reward_weights: F numbers, where ``rewards`` has one entry for each row and each of F reward functions, (G, F)
            and so on. A row's reward is then the sum of weight * (r - mean) / (std + 1e-6), with mean and std of each
            function over the prompt (GDPO, arXiv 2601.05242). A function that is NaN for a row is left out of its sum;
            where all are, the row is unscorable.
        num_boundaries: boundaries of a prompt at most (B of the paper).
        min_separation: least distance of two boundaries; default max(2, shortest row // (max(B, 1) + 1)).
        boundary_scores: shaped like ``token_ids``, ranked instead of the surprisal: entropies, or anything else.
        terms: "both", "global" (against the group) or "local" (against the parent node).
        multiplicity_power: spans shared by n rows are scaled by n ** -multiplicity_power.
        leave_one_out: the unbiased variant, see ``span_values``.
        normalize: "span", "batch", "reward_std" or "none", see ``span_values``.
        gathered: what ``gather_groups`` returned, where the arguments are its ``inputs``: then "batch" is over the rows
            of all ranks, every rank calls, and rewards are constants. None: "batch" is over those of the call.
        backend: "auto" (CUDA tensors take Triton, all others PyTorch), "triton", "torch" or "reference".

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Differentiable in ``rewards`` (linear in them
        with normalize="none"), once and in reverse mode.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.
        RuntimeError: the backend asked for cannot run here.

    Example:
        >>> token_ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
        >>> logprobs = torch.tensor([-0.1, -0.1, -3.0]).expand(3, 3)
        >>> leafkernels.span_advantages(logprobs, token_ids, torch.tensor([1.0, 0.0, 0.0]))
        tensor([[ 0.2577,  0.2577,  1.4108],
                [ 0.2577,  0.2577, -1.0664],
                [-0.8599, -0.8599, -0.8599]])
    """
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    options = CreditOptions(num_boundaries, min_separation, terms, multiplicity_power, leave_one_out, normalize)
    options = check_credit(rollouts, boundary_scores, options, gathered)
    if rollouts.backend == "reference":
        refuse_batch_of_ranks(options, gathered)
        return rollouts.by_reference(span_advantages, boundary_scores=boundary_scores, **options._asdict())
    spans = credit_spans(rollouts, boundary_scores, options, gathered).spans
    return credit_tokens(rollouts, spans.values, spans.span_ends)
