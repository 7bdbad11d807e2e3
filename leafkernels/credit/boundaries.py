"""Boundaries of a group: at most B columns of high surprisal, at least a separation apart."""

import torch
from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_real
from leafkernels._core.operation import operation
from leafkernels.credit.options import CreditOptions
from leafkernels.rows.find import Rows, find_rows, rows_of_groups, to_lists
from leafkernels.rows.layout import Layout, as_rows


@operation("boundaries")
def _select_boundaries(
    scores: Tensor, mask: Tensor | None, layout: Layout, options: CreditOptions, negate: bool
) -> Tensor:
    return scores.new_empty((layout.group_starts.shape[0] - 1, options.num_boundaries), dtype=torch.int32)


def boundaries_of_groups(scores: Tensor, rows: Rows, options: CreditOptions, negate: bool, backend: str) -> Tensor:
    """(P, B) int32, B boundaries of each of P prompts; the arguments have been checked."""
    if backend == "reference":
        return _by_reference(-scores if negate else scores, rows, options)
    return _select_boundaries(backend, scores.detach(), rows.mask, rows.layout, options, negate)


def _by_reference(scores: Tensor, rows: Rows, options: CreditOptions) -> Tensor:
    import python_ref

    score_rows, masks, found = to_lists(scores, rows), to_lists(rows.mask, rows), []
    for members in rows_of_groups(rows.layout):
        boundaries = python_ref.select_boundaries(
            [score_rows[i] for i in members],
            response_mask=None if masks is None else [masks[i] for i in members],
            num_boundaries=options.num_boundaries,
            min_separation=options.min_separation,
        )
        found.append(boundaries + [-1] * (options.num_boundaries - len(boundaries)))
    return torch.tensor(found, dtype=torch.int32, device=scores.device).reshape(len(found), options.num_boundaries)


def select_boundaries(
    scores: Tensor,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    num_boundaries: int = 2,
    min_separation: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Boundaries of each prompt: the positions of the highest scores, at least a separation apart.

    A boundary p means "the prefix is tokens [0, p)": token p is the first of the next span. Candidates are the unmasked
    positions p >= 1 of every row, counted from the row's first unmasked token. They are taken by falling score (ties:
    the smaller row, then the smaller position) while they keep
    D = max(2, shortest non-empty row // (max(num_boundaries, 1) + 1)) from those taken before.
    Source: LEAF, arXiv 2606.07610, as released by its authors.

    Args:
        scores: (G, T), (P, G, T), (N, T) with ``groups``, or (total,) with ``cu_seqlens``; float32, bfloat16, float16
            (float64 is ranked after rounding to float32). Surprisal in nats, entropy, or anything else to rank by.
            NaN never becomes a boundary; infinities rank as such.
        response_mask: shaped like ``scores``, nonzero where a token counts; None: all.
        groups, group_size: rows of each prompt; see ``span_advantages``.
        cu_seqlens: (N + 1,) int32, the offsets of packed rows.
        num_boundaries: how many at most; 0 gives none.
        min_separation: overrides D; at least 1.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        int32, ascending, -1 after the last where fewer were found, B being ``num_boundaries``: (B,) for one prompt,
        (P, B) for a batch or with ``group_size``, (N, B), each row its prompt's, where ``groups`` is a tensor
        (counting its prompts would synchronise a GPU).

    Example:
        >>> leafkernels.select_boundaries(torch.tensor([[0.1, 0.1, 5.0, 0.1, 3.0, 0.1]]))
        tensor([2, 4], dtype=torch.int32)
    """
    check_real("scores", scores)
    options = CreditOptions(num_boundaries, min_separation).checked()
    backend = resolve_backend(backend, scores.device)
    rows = find_rows("scores", scores, response_mask, groups, group_size, cu_seqlens, backend)
    return rows.per_prompt(boundaries_of_groups(as_rows(scores), rows, options, False, backend))
