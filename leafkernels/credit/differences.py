"""Credit from what a token changed: TEMPO, its variant with shrinkage and TreeRL, called as ``span_advantages`` is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.checks import check_choice, check_finite
from leafkernels._core.precision import is_rounding
from leafkernels.credit.advantages import check_credit, credit_spans
from leafkernels.credit.options import CreditOptions
from leafkernels.credit.prefix_lengths import prefix_lengths_of_groups
from leafkernels.credit.scatter import credit_tokens
from leafkernels.rows.layout import as_rows
from leafkernels.rows.returns import Earned
from leafkernels.rows.rollouts import Rollouts, read_rollouts

# Pairs of rows in one chunk; with step rewards triples.
_CHUNK, _CHUNK_OF_STEPS = 1 << 18, 1 << 22


class _Weights(NamedTuple):
    """Weights of ``tree_td``: prior rollouts a node, weight of r - mean, and whether the deviation divides all."""

    shrinkage: float
    group_weight: float
    is_divided: bool


_TEMPO = _Weights(shrinkage=0.0, group_weight=1.0, is_divided=True)


def tempo(
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
    backend: str = "auto",
) -> Tensor:
    """GRPO plus, at every token where rollouts diverge, what the token changed (TEMPO, arXiv 2509.18314).

        A_t = (r - mean + V(s_{t+1}) - V(s_t)) / (std + 1e-6)

    s_t is the prefix of a row's first t tokens and V(s_t) the mean reward of all rows that begin with it, the row
    itself included. The difference is nonzero only where a row with the same prefix diverges or has ended, at most at
    G - 1 tokens; at the last one, V becomes the row's own reward. Over a row the differences sum to r - mean, or, where
    another row is identical or continues it, to V of the whole row minus the mean.

    Arguments, layouts and errors are those of ``span_advantages`` without the options of its tree: no boundary is
    selected, and the values of ``logprobs`` do not matter. Holes of the mask count in a prefix; a difference at a hole
    is credited to no token. A row has up to 2 G spans, G the size of a prompt (of the whole call where ``groups`` is a
    CUDA tensor): their values are float64, their ends int32, beside the prefix lengths.

    With ``step_rewards`` A_t = (R_t - mean + Q_t - V_t) / (std + 1e-6): R_t is the row's reward and what it earns from
    token t on, mean and std are those of the prompt's returns (all equal: 0), Q_t is the mean of R_t over the rows that
    share the first t + 1 tokens, V_t over those that share the first t, where a row that ends there has its reward
    left. The time grows with the square of G a row.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Differentiable in ``rewards``.

    Example:
        >>> token_ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
        >>> leafkernels.tempo(torch.zeros(3, 3), token_ids, torch.tensor([1.0, 0.0, 0.0]))
        tensor([[ 1.1547,  1.4434,  2.0207],
                [-0.5773, -0.2887, -1.4434],
                [-0.5773, -1.1547, -0.5773]])
    """
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    return rollouts.by_reference(tempo) if rollouts.backend == "reference" else _credit_differences(rollouts, _TEMPO)


def tree_td(
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
    shrinkage: float = 0.0,
    group_weight: float = 0.5,
    normalize: str = "none",
    backend: str = "auto",
) -> Tensor:
    """The change in mean reward of the rollouts that share the prefix, at each token, plus a share of GRPO's credit.

        A_t = V(s_{t+1}) - V(s_t) + group_weight * (r - mean)
        V_0 = mean        V_k = (n_k mean_k + shrinkage V_{k-1}) / (n_k + shrinkage)

    V_k is the value of a row's prefixes from the k-th token on at which rows that shared its prefix diverge or have
    ended; n_k rows remain, itself included, and mean_k is their mean reward. A difference of values in a tree is a
    temporal-difference error, hence the name. With ``shrinkage=0``, ``group_weight=1`` and
    ``normalize="reward_std"`` this is ``tempo``; with ``shrinkage=math.inf`` and ``group_weight=1``, ``dr_grpo``.

    The other arguments, layouts, memory and errors are those of ``tempo``; with ``step_rewards`` this is Q_t - V_t +
    group_weight * (R_t - mean), Q_t pulled towards V_t as V_k is towards V_{k-1}.

    Args:
        shrinkage: how many rollouts the parent's value counts as at a node, at least 0. inf: every node has the value
            of its prompt, which leaves ``group_weight * (r - mean)``.
        group_weight: weight of r - mean, which every token of a row gets. 0: a token where no rollout diverges gets 0.
        normalize: "none", or "reward_std" to divide by std + 1e-6 of the prompt's rewards (ddof 1).

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Differentiable in ``rewards``, and linear in them
        with normalize="none".

    Example:
        >>> token_ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
        >>> leafkernels.tree_td(torch.zeros(3, 3), token_ids, torch.tensor([1.0, 0.5, 0.0]))
        tensor([[ 0.2500,  0.5000,  0.5000],
                [ 0.0000,  0.2500, -0.2500],
                [-0.2500, -0.7500, -0.2500]])
    """
    check_shrinkage(shrinkage)
    check_finite("group_weight", group_weight)
    check_choice("normalize", normalize, ("none", "reward_std"))
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    if rollouts.backend == "reference":
        options = {"shrinkage": shrinkage, "group_weight": group_weight, "normalize": normalize}
        return rollouts.by_reference(tree_td, **options)
    return _credit_differences(rollouts, _Weights(float(shrinkage), float(group_weight), normalize == "reward_std"))


def check_shrinkage(value: Any) -> None:
    """Raise unless ``value`` is a number of at least 0; it may be infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"shrinkage must be a number, got {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"shrinkage must be at least 0, got {value}")


def _credit_differences(rollouts: Rollouts, weights: _Weights) -> Tensor:
    if rollouts.rewards.shape[0] == 0:
        return torch.zeros_like(rollouts.token_ids, dtype=torch.float32)
    return credit_tokens(rollouts, *_spans_of_leaving(rollouts, weights))


def _spans_of_leaving(rollouts: Rollouts, weights: _Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Values (N, 2 G) float64 and ends (N, 2 G) int32: for each member of a group the stretch up to the token at which
    it diverges from the row, and that token. Members that diverge together, or never, have empty spans. Then (N,): the
    weight of what a row has earned before a token.

    One number for each pair of rows, and with step rewards one for each three: PyTorch on every backend, without a
    synchronisation.
    """
    shared = prefix_lengths_of_groups(as_rows(rollouts.token_ids), rollouts.rows, None, rollouts.backend)
    num_rows, group = shared.shape
    values = rollouts.rewards.new_empty((num_rows, 2 * group), dtype=torch.float64)
    ends, weight = shared.new_empty((num_rows, 2 * group)), values.new_empty(num_rows)
    # Each row needs its own line of the table alone, so a chunk of lines bounds the memory. A compiler would unroll
    # the loop.
    line = group if rollouts.earned is None else group * group
    chunk = _CHUNK if rollouts.earned is None else _CHUNK_OF_STEPS
    step = num_rows if torch.compiler.is_compiling() else max(1, chunk // line)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        values[rows], ends[rows], weight[rows] = _spans_of_rows(rollouts, shared, rows, weights)
    return values, ends, weight


def _spans_of_rows(rollouts: Rollouts, shared: Tensor, rows: slice, weights: _Weights) -> tuple[Tensor, Tensor, Tensor]:
    layout, is_out, rewards = rollouts.layout, rollouts.rewards.isnan(), rollouts.rewards.to(torch.float64)
    group = shared.shape[1]
    itself = torch.arange(shared.shape[0], device=shared.device)[rows, None]
    members, is_member = layout.members(rows)
    is_other = ~is_member | is_out[members]
    # Places without a scored member hold the row itself: nothing of another prompt is read.
    members = torch.where(is_other, itself, members)
    # Minus the least reward of the prompt, so that equal rewards are exactly 0.
    member_rewards, own = rewards[members], rewards[rows, None]
    constants = member_rewards.detach()
    least = constants.masked_fill(is_other, torch.inf).amin(1, keepdim=True)
    most = constants.masked_fill(is_other, -torch.inf).amax(1, keepdim=True)
    # Minus itself where all differ by rounding alone: exactly 0, and differentiable all the same.
    is_flat = is_rounding(least, most)
    member_rewards = (member_rewards - torch.where(is_flat, constants, least)).masked_fill(is_out[rows, None], 0.0)
    own = (own - torch.where(is_flat, own.detach(), least)).masked_fill(is_out[rows, None], 0.0)

    # Members in the order in which they diverge from the row; places without one come first.
    shared, order = shared[rows].masked_fill(is_other, -1).sort(dim=1, stable=True)
    member_rewards, members = member_rewards.gather(1, order), members.gather(1, order)
    first = is_other.sum(1, keepdim=True).clamp_max(group - 1)

    # Mean of a member and those that diverge no sooner, minus that of those that diverge later (ties diverge together).
    means = _sums_from(member_rewards) / torch.arange(group, 0, -1, device=shared.device)
    later = torch.searchsorted(shared, shared, right=True).clamp_max(group - 1)
    if rollouts.earned is not None:
        means = means + _earned_apart(rollouts.earned, itself, members, shared, later, first)
    node_values = means if weights.shrinkage == 0 else _shrink(means, shared, first, weights.shrinkage)
    difference = node_values.gather(1, later) - node_values

    mean = means.gather(1, first)
    own = ((own - mean) * weights.group_weight).expand_as(difference)
    values = torch.stack([own, own + difference], dim=2).flatten(1)
    weight = torch.full_like(mean, weights.group_weight).masked_fill(first >= group - 1, 0.0)
    if weights.is_divided:
        deviation = _deviation(member_rewards, mean, first)
        values, weight = (x / (deviation + 1e-6) for x in (values, weight))
        if rollouts.earned is not None:
            # Equal returns may have been earned at other tokens.
            values, weight = (x.masked_fill(deviation == 0.0, 0.0) for x in (values, weight))

    lengths = layout.row_lengths[rows, None].to(torch.int32)
    ends = torch.stack([shared, shared + 1], dim=2).flatten(1).clamp_min(0).minimum(lengths)
    return values, ends.cummax(1).values, weight.squeeze(1)


def _earned_apart(
    earned: Earned, rows: Tensor, members: Tensor, shared: Tensor, later: Tensor, first: Tensor
) -> Tensor:
    """(n, G): what is added to the mean return of a node, so that differences are those of returns to go.

    Rows that share a prefix may have earned different rewards on it. At the token where some leave, the mean of what
    remains changes by what those who stay had earned more, or less, than all that were there; that adds up along a row.
    """
    group = shared.shape[1]
    # (n, G, G): what each member had earned before the place at which another leaves, less what the row itself had.
    apart = earned.before(members[:, None, :], shared[:, :, None]) - earned.before(rows, shared)[:, :, None]
    apart = _sums_from(apart)
    place = torch.arange(group, device=shared.device)
    here = apart.diagonal(dim1=1, dim2=2) / (group - place)
    staying = torch.searchsorted(shared, shared, right=True)
    beyond = apart.gather(2, later[:, :, None]).squeeze(2) / (group - staying).clamp_min(1)
    # Members that leave together do so once, and the last ones leave nobody behind.
    is_leaving = (shared != pad(shared[:, :-1], (1, 0), value=-2)) & (place >= first) & (staying < group)
    change = torch.where(is_leaving, here - beyond, 0.0)
    return pad(_sums_from(change.flip(1)).flip(1)[:, :-1], (1, 0))


def _shrink(means: Tensor, shared: Tensor, first: Tensor, shrinkage: float) -> Tensor:
    """(N, G): the value of the node that is left where a member leaves, n the member and those that leave no sooner.

    V_k = w mean_k + (1 - w) V_{k-1} with w = n / (n + shrinkage), a recurrence that is composed in log G steps. Its
    form keeps the corners: exactly the mean where w is 1, and exactly the parent's value where w is 0.
    """
    group = means.shape[1]
    rank = torch.arange(group, device=means.device)
    count = torch.arange(group, 0, -1, device=means.device, dtype=means.dtype)
    # Members that diverge with the one before make no node of their own.
    is_node = shared != pad(shared[:, :-1], (1, 0), value=-2)
    is_root = rank == first
    own = torch.where(is_root, 1.0, torch.where(is_node, count / (count + shrinkage), 0.0))
    kept, values = 1.0 - own, own * means
    step = 1
    while step < group:
        values = values + kept * pad(values[:, :-step], (step, 0))
        kept = kept * pad(kept[:, :-step], (step, 0), value=1.0)
        step *= 2
    return values


def _deviation(member_rewards: Tensor, mean: Tensor, first: Tensor) -> Tensor:
    """(N, 1): of the rewards of each row's prompt, ddof 1."""
    variance = _sums_from((member_rewards - mean).square()).gather(1, first)
    variance = variance / (member_rewards.shape[1] - first - 1).clamp_min(1)
    # The derivative of the root is infinite at 0, and would turn gradients of 0 into NaN.
    is_flat = variance == 0.0
    return variance.masked_fill(is_flat, 1.0).sqrt().masked_fill(is_flat, 0.0)


def _sums_from(entries: Tensor) -> Tensor:
    """(N, ..., G): each entry plus all after it, in an order that entries before it do not change.

    A scan of its own, because torch.cumsum of floats counts as not deterministic on CUDA.
    """
    step = 1
    while step < entries.shape[-1]:
        entries = entries + pad(entries[..., step:], (0, step))
        step *= 2
    return entries


def treerl(
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
    backend: str = "auto",
) -> Tensor:
    """TreeRL's process reward (arXiv 2506.11902) on the prefix tree of ``span_advantages``, without a tree search.

    Rewards are centred leave-one-out, c_i = r_i - mean of the prompt's others. V_k is the mean of c over the n_k rows
    of the row's node at boundary k; V_0, that of the whole prompt, is 0. Each value is divided by the root of its own
    node's size, as in the authors' released code:

        span k <= R   A = V_k / sqrt(n_k) - V_{k-1} / sqrt(n_{k-1}) + V_k / sqrt(n_k)
        tail          the same, its node being the leaf: V = c_i, n = 1, after the last node R that the row retains

    Where no two rows share a boundary prefix this is twice ``rloo``.

    Arguments, layouts and errors are those of ``span_advantages`` without ``terms``, ``multiplicity_power``,
    ``leave_one_out`` and ``normalize``, which the formula settles.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Linear in ``rewards``.

    Example:
        >>> token_ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
        >>> logprobs = torch.tensor([-0.1, -0.1, -3.0]).expand(3, 3)
        >>> leafkernels.treerl(logprobs, token_ids, torch.tensor([1.0, 0.0, 0.0]))
        tensor([[ 0.3536,  0.3536,  1.8232],
                [ 0.3536,  0.3536, -1.1768],
                [-1.0000, -1.0000, -1.0000]])
    """
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, backend, step_rewards, reward_weights)
    options = CreditOptions(num_boundaries, min_separation, "global", 0.5, leave_one_out=True, normalize="none")
    options = check_credit(rollouts, boundary_scores, options)
    if rollouts.backend == "reference":
        forking = {"num_boundaries": num_boundaries, "min_separation": min_separation}
        return rollouts.by_reference(treerl, boundary_scores=boundary_scores, **forking)
    spans = credit_spans(rollouts, boundary_scores, options).spans
    # The global term is G / (G - 1) * (mean of r over the node - mean) / sqrt(n), and that is V / sqrt(n).
    values = 2.0 * spans.values - pad(spans.values[:, :-1], (1, 0))
    return credit_tokens(rollouts, values, spans.span_ends)
