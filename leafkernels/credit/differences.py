"""Credit from what a token changed: TEMPO and TreeRL, called as ``span_advantages`` is."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels.credit.advantages import credit_spans
from leafkernels.credit.options import CreditOptions
from leafkernels.credit.prefix_lengths import prefix_lengths_of_groups
from leafkernels.credit.scatter import scatter_to_tokens
from leafkernels.rows.layout import Layout, as_rows, group_members
from leafkernels.rows.rollouts import Rollouts, read_rollouts

# Pairs of rows whose lines are worked on together.
_CHUNK = 1 << 18


def tempo(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """GRPO plus, at every token where rollouts part, what the token changed (TEMPO, arXiv 2509.18314).

        A_t = (r - mean + V(s_{t+1}) - V(s_t)) / (std + 1e-6)

    s_t is the prefix of a row's first t tokens and V(s_t) the mean reward of all rows that begin with it, the row
    itself included. The difference is 0 but at the tokens where a row with the same prefix goes another way or has
    ended, at most G - 1 of them; at the last one, V becomes the row's own reward. Over a row the differences sum to
    r - mean, unless another row is identical or goes on where it ends: then to V of the whole row, less the mean.

    The values of ``logprobs`` do not matter. The arguments are those of ``span_advantages`` but for the options of its
    tree (rollouts part where they part, and no boundary is selected), and so are layouts and errors; holes of the mask
    count in a prefix, and what differs at a hole is credited to no token. A row has up to 2 G spans, G the size of a
    prompt (of the whole call where ``groups`` is a CUDA tensor): beside its prefix lengths, values and ends of that
    size are float64 and int32.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Differentiable in ``rewards``.

    Example:
        >>> token_ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
        >>> leafkernels.tempo(torch.zeros(3, 3), token_ids, torch.tensor([1.0, 0.0, 0.0]))
        tensor([[ 1.1547,  1.4434,  2.0207],
                [-0.5773, -0.2887, -1.4434],
                [-0.5773, -1.1547, -0.5773]])
    """
    rollouts = read_rollouts(logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens, backend)
    if rollouts.rewards.shape[0] == 0:
        return torch.zeros_like(token_ids, dtype=torch.float32)
    return scatter_to_tokens(*_tempo_spans(rollouts), rollouts.rows, token_ids.shape, torch.float32, rollouts.backend)


def _tempo_spans(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Values (N, 2 G) float64 and ends (N, 2 G) int32: for each member of a group the stretch up to the token at which
    it leaves the row, and that token. Members that leave together, or not at all, have empty spans.

    One number for each pair of rows, and so PyTorch on every backend, without a synchronisation.
    """
    layout, is_out = rollouts.layout, rollouts.rewards.isnan()
    shared = prefix_lengths_of_groups(as_rows(rollouts.token_ids), layout, None, rollouts.backend)
    num_rows, group = shared.shape
    values = rollouts.rewards.new_empty((num_rows, 2 * group), dtype=torch.float64)
    ends = shared.new_empty((num_rows, 2 * group))
    # A row needs the table's line of no other, so that what is made of a line need not lie there for all. A compiler
    # would unroll the loop.
    step = num_rows if torch.compiler.is_compiling() else max(1, _CHUNK // group)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        values[rows], ends[rows] = _spans_of_rows(rollouts.rewards.to(torch.float64), is_out, shared, layout, rows)
    return values, ends


def _spans_of_rows(
    rewards: Tensor, is_out: Tensor, shared: Tensor, layout: Layout, rows: slice
) -> tuple[Tensor, Tensor]:
    group = shared.shape[1]
    itself = torch.arange(shared.shape[0], device=shared.device)[rows, None]
    members, is_member = group_members(
        layout.rows_by_group, layout.group_starts, layout.group_of_row[rows], layout.max_group
    )
    is_other = ~is_member | is_out[members]
    # In place of what takes no part stands the row: nothing of another prompt is read.
    members = torch.where(is_other, itself, members)
    # Above the least of the prompt, so that equal rewards are exactly 0.
    of_members = rewards[members]
    least = of_members.detach().masked_fill(is_other, torch.inf).amin(1, keepdim=True)
    of_members = (of_members - least).masked_fill(is_out[rows, None], 0.0)
    own = (rewards[rows, None] - least).masked_fill(is_out[rows, None], 0.0)

    # Members in the order in which they leave the row; what takes no part comes first.
    shared, order = shared[rows].masked_fill(is_other, -1).sort(dim=1, stable=True)
    of_members = of_members.gather(1, order)
    first = is_other.sum(1, keepdim=True).clamp_max(group - 1)

    # Mean of a member and those that leave no sooner, less that of those that leave later (ties leave together).
    means = _sums_from(of_members) / torch.arange(group, 0, -1, device=shared.device)
    later = torch.searchsorted(shared, shared, right=True).clamp_max(group - 1)
    difference = means.gather(1, later) - means

    mean = means.gather(1, first)
    variance = _sums_from((of_members - mean).square()).gather(1, first) / (group - first - 1).clamp_min(1)
    # The slope of the root is infinite at 0, and would make NaN of gradients that are 0.
    is_flat = variance == 0.0
    std = variance.masked_fill(is_flat, 1.0).sqrt().masked_fill(is_flat, 0.0)
    own = (own - mean).expand_as(difference)
    values = torch.stack([own, own + difference], dim=2).flatten(1) / (std + 1e-6)

    lengths = layout.row_lengths[rows, None].to(torch.int32)
    ends = torch.stack([shared, shared + 1], dim=2).flatten(1).clamp_min(0).minimum(lengths)
    return values, ends.cummax(1).values


def _sums_from(entries: Tensor) -> Tensor:
    """(N, G): each entry plus all after it, in an order that entries before it do not change.

    A scan of its own, because torch.cumsum of floats counts as not deterministic on CUDA.
    """
    step = 1
    while step < entries.shape[1]:
        entries = entries + pad(entries[:, step:], (0, step))
        step *= 2
    return entries


def treerl(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    num_boundaries: int = 2,
    min_separation: int | None = None,
    boundary_scores: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """TreeRL's process reward (arXiv 2506.11902) on the tree of ``span_advantages``, in place of a tree search's.

    Rewards are centred leave-one-out, c_i = r_i - mean of the prompt's others. V_k is the mean of c over the n_k rows
    of the row's node at boundary k; V_0, that of the whole prompt, is 0. Each value is divided by the root of its own
    node's size, as in the authors' released code:

        span k <= R   A = V_k / sqrt(n_k) - V_{k-1} / sqrt(n_{k-1}) + V_k / sqrt(n_k)
        tail          the same, its node being the leaf: V = c_i, n = 1, after the last node R that the row retains

    Where no two rows share a boundary prefix this is twice ``rloo``.

    The arguments are those of ``span_advantages`` but for ``terms``, ``multiplicity_power``, ``leave_one_out`` and
    ``normalize``, which the formula settles, and so are layouts and errors.

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
    rollouts = read_rollouts(logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens, backend)
    options = CreditOptions(num_boundaries, min_separation, "global", 0.5, leave_one_out=True, normalize="none")
    spans = credit_spans(rollouts, logprobs, boundary_scores, options).spans
    # The global term is G / (G - 1) * (mean of r over the node - mean) / sqrt(n), and that is V / sqrt(n).
    values = 2.0 * spans.values - pad(spans.values[:, :-1], (1, 0))
    return scatter_to_tokens(values, spans.span_ends, rollouts.rows, token_ids.shape, torch.float32, rollouts.backend)
