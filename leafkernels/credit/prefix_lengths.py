"""How many leading tokens every two rows of a prompt share."""

import torch
from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_count, check_device, check_integer, values_readable
from leafkernels._core.operation import operation
from leafkernels.rows.find import Rows, find_rows, rows_of_groups, to_lists
from leafkernels.rows.layout import Layout, as_rows


@operation("prefix_lengths")
def _common_prefix_lengths(token_ids: Tensor, limit: Tensor | None, start: Tensor | None, layout: Layout) -> Tensor:
    return token_ids.new_empty((layout.row_starts.shape[0], layout.max_group), dtype=torch.int32)


def prefix_lengths_of_groups(
    token_ids: Tensor, rows: Rows, limit: Tensor | None, backend: str, start: Tensor | None = None
) -> Tensor:
    """(N, max_group) int32: row i against the j-th row of its group, 0 after the last.

    ``limit`` (P,) stops the comparison: longer prefixes count as that long. Tokens before ``start`` (P,) count
    as equal. Both are integers. The arguments have been checked.
    """
    if backend == "reference":
        return _by_reference(token_ids, rows, limit, start)
    return _common_prefix_lengths(backend, token_ids, limit, start, rows.layout)


def _by_reference(token_ids: Tensor, rows: Rows, limit: Tensor | None, start: Tensor | None) -> Tensor:
    import python_ref

    ids, masks = to_lists(token_ids, rows), to_lists(rows.mask, rows)
    found = torch.zeros((len(ids), rows.layout.max_group), dtype=torch.int32)
    for group, members in enumerate(rows_of_groups(rows.layout)):
        table = python_ref.common_prefix_lengths(
            [ids[i] for i in members],
            response_mask=None if masks is None else [masks[i] for i in members],
            limit=None if limit is None else max(int(limit[group]), 0),
            start=0 if start is None else max(int(start[group]), 0),
        )
        for i, row_lengths in zip(members, table, strict=True):
            found[i, : len(members)] = torch.tensor(row_lengths, dtype=torch.int32)
    return found.to(token_ids.device)


def common_prefix_lengths(
    token_ids: Tensor,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    limit: Tensor | int | None = None,
    start: Tensor | int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Length of the longest common prefix of every two rows of a prompt, exact; the diagonal holds the row lengths.

    On a GPU and for large problems on a CPU every id is read about twice, however much the rows share: once for its
    own row, once as what others are compared with (docs/design.md).

    Args:
        token_ids: (G, T), (P, G, T), (N, T) with ``groups``, or (total,) with ``cu_seqlens``; any integer dtype, read
            as it is. Tokens inside a row's stretch count also where the mask has a hole.
        response_mask: shaped like ``token_ids``; the row is the stretch from its first to its last nonzero entry.
        groups, group_size: rows of each prompt; see ``span_advantages``.
        cu_seqlens: (N + 1,) int32, the offsets of packed rows.
        limit: how many tokens of a row count, at least 0: the result is that of rows cut there, and no later token
            is compared. An int for all prompts, or integers: () for one prompt, (P,) for a batch or with
            ``group_size``, (N,), the same for all rows of a prompt, with ``groups``. None: all tokens.
        start: number of leading tokens that the rows of a prompt are known to share, at least 0: they are not compared
            and count as equal. A shorter row shares all its tokens. In the same forms as ``limit``; None: 0.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        int32: (G, G) for one prompt; (P, G, G) for a batch or with ``group_size``; (N, N), -1 between rows of different
        prompts, with ``groups``.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came. The values of a
            CUDA tensor are not looked at: a negative one counts as 0.
        RuntimeError: the backend asked for cannot run here.

    Example:
        >>> leafkernels.common_prefix_lengths(torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6]]))
        tensor([[3, 2, 1],
                [2, 3, 1],
                [1, 1, 3]], dtype=torch.int32)
    """
    token_ids = check_integer("token_ids", token_ids)
    backend = resolve_backend(backend, token_ids.device)
    rows = find_rows("token_ids", token_ids, response_mask, groups, group_size, cu_seqlens, backend)
    lengths = prefix_lengths_of_groups(
        as_rows(token_ids), rows, _of_groups("limit", limit, rows), backend, _of_groups("start", start, rows)
    )
    if rows.prompt_shape is None:
        return _between_all_rows(lengths, rows.layout)
    group = rows.row_shape[-1] if group_size is None else group_size
    return lengths.reshape(*rows.prompt_shape, group, group)


def _of_groups(name: str, value: Tensor | int | None, rows: Rows) -> Tensor | None:
    """``limit`` or ``start`` as one integer for each group of the layout."""
    layout = rows.layout
    num_groups = layout.group_starts.shape[0] - 1
    device = layout.group_starts.device
    if value is None:
        return None
    if not isinstance(value, Tensor):
        check_count(name, value, 0)
        return torch.full((num_groups,), min(value, layout.max_length), dtype=torch.int64, device=device)
    value = check_integer(name, value)
    shape, of = (rows.row_shape, "row") if rows.prompt_shape is None else (rows.prompt_shape, "prompt")
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name} must be an int or hold one integer for each {of}, shape {shape}, got shape {tuple(value.shape)}"
        )
    check_device(name, value, "token_ids", device)
    if values_readable(value) and value.numel() and int(value.min()) < 0:
        raise ValueError(f"{name} must be at least 0, got {int(value.min())}")
    value = value.to(torch.int64)
    if not layout.row_starts.shape[0]:
        return value.new_zeros(num_groups)
    if rows.prompt_shape is not None:
        return value.reshape(num_groups)
    # Groups after the last real one are empty, and their entry does not matter.
    value_per_group = value[layout.rows_by_group[layout.group_starts[:-1].clamp_max(value.shape[0] - 1)]]
    if values_readable(value):
        differs = (value != value_per_group[layout.group_of_row]).nonzero()
        if differs.shape[0]:
            row = int(differs[0])
            raise ValueError(
                f"{name} must be the same for all rows of a prompt, got {int(value[row])} for row {row} and "
                f"{int(value_per_group[layout.group_of_row[row]])} for the first row of its prompt"
            )
    return value_per_group


def _between_all_rows(lengths: Tensor, layout: Layout) -> Tensor:
    """(N, N) from the table by rank within the group; -1 between groups."""
    num_rows = lengths.shape[0]
    ranks = torch.empty_like(layout.rows_by_group)
    by_group = layout.group_of_row[layout.rows_by_group]
    every_row = torch.arange(num_rows, device=lengths.device)
    ranks[layout.rows_by_group] = every_row - layout.group_starts[by_group]
    is_other = layout.group_of_row[:, None] != layout.group_of_row
    return lengths.gather(1, ranks.expand(num_rows, num_rows)).masked_fill_(is_other, -1)
