"""Other estimators on the same rollouts, called as ``span_advantages`` is: compare credit schemes by changing a name.

Options of ``span_advantages``'s tree (``num_boundaries`` and the like) are taken by those that have such a tree only:
here ``treerl`` takes ``num_boundaries``, ``min_separation`` and ``boundary_scores``, the others none. ``tree_td`` has
weights of its own.

With r the reward of a row, mean, std (ddof 1) and G, the number of rows, those of its prompt:

    grpo       (r - mean) / (std + 1e-6)
    dr_grpo    r - mean
    rloo       G / (G - 1) * (r - mean)
    tempo      (r - mean + V(s_{t+1}) - V(s_t)) / (std + 1e-6), V the mean reward of the rows that share a prefix
    tree_td    V(s_{t+1}) - V(s_t) + group_weight (r - mean), V of few rows shrunk towards their parent's
    treerl     2 V_k / sqrt(n_k) - V_{k-1} / sqrt(n_{k-1}), on the nodes at the boundaries of ``span_advantages``

As there, a row whose reward is NaN takes no part in anything and gets 0, an empty row counts in mean, std and G, and a
prompt of one row, or one whose rewards are all equal but for rounding, gets exactly 0.0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from leafkernels.credit.options import CreditOptions
from leafkernels.credit.scatter import scatter_to_tokens
from leafkernels.credit.values import values_of_groups
from leafkernels.rows.rollouts import Rollouts, read_rollouts


def _one_for_each_row(
    estimator: Callable[..., Tensor], rollouts: Rollouts, leave_one_out: bool, normalize: str
) -> Tensor:
    """The credit of a tree without boundaries: it has no nodes, and every row is a tail."""
    if rollouts.backend == "reference":
        return rollouts.by_reference(estimator)
    layout = rollouts.layout
    nodes = layout.row_lengths.new_empty((layout.row_lengths.shape[0], 0))
    boundaries = layout.group_starts.new_empty((layout.group_starts.shape[0] - 1, 0), dtype=torch.int32)
    spans = values_of_groups(
        rollouts.rewards,
        nodes,
        boundaries,
        layout,
        CreditOptions(terms="global", multiplicity_power=0.0, leave_one_out=leave_one_out, normalize=normalize),
        rollouts.backend,
    )
    return scatter_to_tokens(
        spans.values, spans.span_ends, rollouts.rows, rollouts.token_ids.shape, torch.float32, rollouts.backend
    )


def grpo(
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
    """(r - mean) / (std + 1e-6) at every token of a rollout, std with ddof 1 (GRPO, arXiv 2402.03300).

    Only the shape of ``logprobs`` and ``token_ids`` matters. Arguments, layouts and errors are those of
    ``span_advantages`` without the options of its tree.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Differentiable in ``rewards``.

    Example:
        >>> token_ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
        >>> leafkernels.grpo(torch.zeros(3, 3), token_ids, torch.tensor([1.0, 0.0, 0.0]))
        tensor([[ 1.1547,  1.1547,  1.1547],
                [-0.5773, -0.5773, -0.5773],
                [-0.5773, -0.5773, -0.5773]])
    """
    rollouts = read_rollouts(logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens, backend)
    return _one_for_each_row(grpo, rollouts, False, "reward_std")


def dr_grpo(
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
    """r - mean at every token of a rollout (Dr. GRPO, arXiv 2503.20783).

    Of ``logprobs`` and ``token_ids`` only the shape matters. The arguments are those of ``span_advantages`` but for the
    options of its tree, and so are layouts and errors.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Linear in ``rewards``.

    Example:
        >>> token_ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
        >>> leafkernels.dr_grpo(torch.zeros(3, 3), token_ids, torch.tensor([1.0, 0.0, 0.0]))
        tensor([[ 0.6667,  0.6667,  0.6667],
                [-0.3333, -0.3333, -0.3333],
                [-0.3333, -0.3333, -0.3333]])
    """
    rollouts = read_rollouts(logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens, backend)
    return _one_for_each_row(dr_grpo, rollouts, False, "none")


def rloo(
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
    """r minus the mean of the prompt's other rewards, at every token of a rollout (RLOO, arXiv 2402.14740).

    That is G / (G - 1) * (r - mean). Of ``logprobs`` and ``token_ids`` only the shape matters. The arguments
    are those of ``span_advantages`` but for the options of its tree, and so are layouts and errors.

    Returns:
        float32, shaped like ``token_ids``, 0 where the mask is False. Linear in ``rewards``.

    Example:
        >>> token_ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
        >>> leafkernels.rloo(torch.zeros(3, 3), token_ids, torch.tensor([1.0, 0.0, 0.0]))
        tensor([[ 1.0000,  1.0000,  1.0000],
                [-0.5000, -0.5000, -0.5000],
                [-0.5000, -0.5000, -0.5000]])
    """
    rollouts = read_rollouts(logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens, backend)
    return _one_for_each_row(rloo, rollouts, True, "none")
