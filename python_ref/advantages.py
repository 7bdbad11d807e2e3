"""LEAF span advantages from the definition: boundaries, groups of equal prefixes, credit, normalisation, scatter."""

from collections.abc import Hashable, Sequence

from python_ref.find import full_mask
from python_ref.scatter import scatter_spans
from python_ref.tree import span_tree


def span_advantages(
    logprobs: Sequence[Sequence[float]],
    token_ids: Sequence[Sequence[int]],
    rewards: Sequence[float] | None,
    *,
    response_mask: Sequence[Sequence[bool]] | None = None,
    groups: Sequence[Hashable] | None = None,
    step_rewards: Sequence[Sequence[float]] | None = None,
    num_boundaries: int = 2,
    min_separation: int | None = None,
    boundary_scores: Sequence[Sequence[float]] | None = None,
    terms: str = "both",
    multiplicity_power: float = 0.5,
    leave_one_out: bool = False,
    normalize: str = "span",
) -> list[list[float]]:
    """One advantage per token, 0 where the mask is False.

    ``groups`` names the prompt of each row (all rows are of one prompt where it is missing); rows may differ in length.
    A row's reward is all that it earns, its ``step_rewards`` included.
    """
    trees = span_tree(
        logprobs,
        token_ids,
        rewards,
        response_mask=response_mask,
        groups=groups,
        step_rewards=step_rewards,
        num_boundaries=num_boundaries,
        min_separation=min_separation,
        boundary_scores=boundary_scores,
        terms=terms,
        multiplicity_power=multiplicity_power,
        leave_one_out=leave_one_out,
        normalize=normalize,
    )
    masks = full_mask(token_ids, response_mask)
    advantages: list[list[float]] = [[] for _ in token_ids]
    for tree in trees:
        for i, spans in zip(tree.rows, tree.spans, strict=True):
            values = [value for _, _, value in spans]
            ends = [end for _, end, _ in spans]
            advantages[i] = scatter_spans([values], [ends], [masks[i]])[0]
    return advantages
