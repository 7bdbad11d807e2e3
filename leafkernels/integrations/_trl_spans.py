"""LEAF's credit with what the logs say of its tree: ``leaf/span_credit_share`` and its neighbours."""

from typing import Any

import torch
from torch import Tensor

from leafkernels import scatter_spans, span_tree

RATES = ("span_credit_share", "fork_fire_rate", "nodes_per_group")


def credit_and_counts(
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    response_mask: Tensor,
    group_size: int,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The credit of each token, float32, and six counts, which add up over calls: see ``rates_of``.

    Rows are padded, (N, T), or packed. ``options`` are those of ``span_tree``.
    """
    where: dict[str, Any] = {"response_mask": response_mask, "cu_seqlens": cu_seqlens}
    tree = span_tree(logprobs, token_ids, rewards, group_size=group_size, **where, **options)
    ends = tree.spans.span_ends

    def spread(values: Tensor) -> Tensor:
        return scatter_spans(values, ends, token_ids.shape[-1], **where)

    # The span before boundary k belongs to the row's node there; the tail belongs to none.
    is_shared = tree.nodes >= 0
    credited = spread(torch.nn.functional.pad(is_shared.double(), (0, 1)))
    scored = ~rewards.isnan()
    scored = scored[:, None] if cu_seqlens is None else scored.repeat_interleave(cu_seqlens.diff())
    boundaries = (tree.boundaries >= 0).repeat_interleave(group_size, 0) & (tree.lengths > 0)[:, None]
    # A node is counted at the row it is named after.
    rank = torch.arange(len(rewards), device=rewards.device) % group_size
    counts = (
        credited,
        response_mask & scored,
        is_shared,
        boundaries,
        tree.nodes == rank[:, None],
        torch.ones_like(rank),
    )
    return spread(tree.spans.values).float(), torch.stack([count.sum() for count in counts])


def rates_of(counts: Tensor, group_size: int) -> dict[str, float]:
    """By the names of the logs, from the sums of all counts."""
    shared, tokens, fired, pairs, nodes, rows = counts.tolist()
    found = shared / max(tokens, 1), fired / max(pairs, 1), nodes * group_size / max(rows, 1)
    return dict(zip(RATES, found, strict=True))
