"""The reference behind ``backend="reference"``: tensors to lists, ``python_ref``, and back; slow, on any device."""

import math

import torch
from torch import Tensor

import python_ref
from leafkernels._ops import compute_dtype
from python_ref.rows import stretch
from python_ref.values import nodes_from_prefix_lengths


def _row(tensor: Tensor, row: int, start: int, end: int) -> list:
    of_row = tensor[row] if tensor.dim() == 2 else tensor
    return of_row[start:end].tolist()


def _rows_of_groups(rows_by_group: Tensor, group_starts: Tensor) -> list[list[int]]:
    rows, starts = rows_by_group.tolist(), group_starts.tolist()
    return [rows[starts[g] : starts[g + 1]] for g in range(len(starts) - 1)]


def mask_stretches(mask: Tensor, slot_starts: Tensor, slot_ends: Tensor) -> tuple[Tensor, Tensor]:
    """See ``python_ref.rows.stretch``; arguments and results as the PyTorch implementation."""
    slots, masks = _masks(mask, slot_starts, slot_ends)
    stretches = [stretch(of_row) for of_row in masks]
    starts = [slot[0] + of_row[0] for slot, of_row in zip(slots, stretches, strict=True)]
    lengths = [end - start for start, end in stretches]
    return slot_starts.new_tensor(starts), slot_starts.new_tensor(lengths)


def _live_rows(mask: Tensor | None, num_rows: int) -> list[int]:
    return list(range(num_rows)) if mask is None else mask.nonzero().flatten().tolist()


def select_boundaries(
    scores: Tensor,
    mask: Tensor | None,
    row_starts: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
    max_length: int,
    num_boundaries: int,
    min_separation: int | None,
    negate: bool,
) -> Tensor:
    """See ``python_ref.select_boundaries``; arguments and result as the PyTorch implementation."""
    starts, lengths = row_starts.tolist(), row_lengths.tolist()
    result = []
    for rows in _rows_of_groups(rows_by_group, group_starts):
        group_scores = [_row(scores, i, starts[i], starts[i] + lengths[i]) for i in rows]
        if negate:
            group_scores = [[-x for x in row] for row in group_scores]
        masks = None if mask is None else [_row(mask, i, starts[i], starts[i] + lengths[i]) for i in rows]
        found = python_ref.select_boundaries(
            group_scores, response_mask=masks, num_boundaries=num_boundaries, min_separation=min_separation
        )
        result.append(found + [-1] * (num_boundaries - len(found)))
    return torch.tensor(result, dtype=torch.int32, device=scores.device).reshape(len(result), num_boundaries)


def common_prefix_lengths(
    token_ids: Tensor,
    row_starts: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
    limit: Tensor | None,
    start: Tensor | None,
    max_group: int,
) -> Tensor:
    """See ``python_ref.common_prefix_lengths``; arguments and result as the PyTorch implementation."""
    starts, lengths = row_starts.tolist(), row_lengths.tolist()
    result = torch.zeros((len(starts), max_group), dtype=torch.int32)
    for g, rows in enumerate(_rows_of_groups(rows_by_group, group_starts)):
        shared = python_ref.common_prefix_lengths(
            [_row(token_ids, i, starts[i], starts[i] + lengths[i]) for i in rows],
            limit=None if limit is None else max(int(limit[g]), 0),
            start=0 if start is None else max(int(start[g]), 0),
        )
        for i, row in zip(rows, shared, strict=True):
            result[i, : len(rows)] = torch.tensor(row, dtype=torch.int32)
    return result.to(token_ids.device)


def span_values(
    rewards: Tensor,
    prefix_lengths: Tensor,
    boundaries: Tensor,
    row_lengths: Tensor,
    rows_by_group: Tensor,
    group_starts: Tensor,
    group_of_row: Tensor,
    terms: str,
    multiplicity_power: float,
    leave_one_out: bool,
    normalize: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``python_ref.span_values`` and ``normalize_spans``; arguments and results as the PyTorch implementation."""
    num_rows, num_slots = rewards.shape[0], boundaries.shape[1] + 1
    all_rewards, all_lengths = rewards.tolist(), row_lengths.tolist()
    values = torch.zeros((num_rows, num_slots), dtype=torch.float64)
    raw = torch.zeros_like(values)
    ends = torch.zeros((num_rows, num_slots), dtype=torch.int32)
    sizes = torch.zeros_like(ends)
    node_values = torch.full_like(values, torch.nan)

    groups = _rows_of_groups(rows_by_group, group_starts)
    group_rewards = [[all_rewards[i] for i in rows] for rows in groups]
    raw_spans = []
    for g, rows in enumerate(groups):
        shared = [row[: len(rows)] for row in prefix_lengths[rows].tolist()]
        lengths = [all_lengths[i] for i in rows]
        positions = [p for p in boundaries[g].tolist() if p >= 0]
        raw_spans.append(
            python_ref.span_values(
                shared,
                positions,
                group_rewards[g],
                lengths,
                terms=terms,
                multiplicity_power=multiplicity_power,
                leave_one_out=leave_one_out,
            )
        )
        scored = [r for r in group_rewards[g] if r == r]
        taking_part = [length > 0 and r == r for length, r in zip(lengths, group_rewards[g], strict=True)]
        nodes = [nodes_from_prefix_lengths(shared, lengths, p, taking_part) for p in positions]
        for rank, i in enumerate(rows):
            sizes[i, 0], node_values[i, 0] = len(scored), sum(scored) / max(len(scored), 1)
            for k, members_of_row in enumerate(nodes):
                members = [group_rewards[g][j] for j in members_of_row[rank]]
                sizes[i, k + 1], node_values[i, k + 1] = len(members), sum(members) / max(len(members), 1)

    normalized = python_ref.normalize_spans(raw_spans, group_rewards, normalize)
    for rows, raw_rows, rows_of_spans in zip(groups, raw_spans, normalized, strict=True):
        for i, raw_row, spans in zip(rows, raw_rows, rows_of_spans, strict=True):
            for s, (_, end, value) in enumerate(spans):
                values[i, s], raw[i, s], ends[i, s:] = value, raw_row[s][2], end
    device = rewards.device
    return values.to(device), raw.to(device), ends.to(device), sizes.to(device), node_values.to(device)


def _masks(
    mask: Tensor | None, slot_starts: Tensor, slot_ends: Tensor
) -> tuple[list[tuple[int, int]], list[list[bool]]]:
    slots = list(zip(slot_starts.tolist(), slot_ends.tolist(), strict=True))
    if mask is None:
        return slots, [[True] * (end - start) for start, end in slots]
    return slots, [_row(mask, i, start, end) for i, (start, end) in enumerate(slots)]


def scatter_spans(
    values: Tensor,
    span_ends: Tensor,
    mask: Tensor | None,
    slot_starts: Tensor,
    slot_ends: Tensor,
    row_starts: Tensor,
    size: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """See ``python_ref.scatter_spans``; arguments and result as the PyTorch implementation."""
    slots, masks = _masks(mask, slot_starts, slot_ends)
    tokens = torch.zeros(size, dtype=dtype)
    for i, row in enumerate(python_ref.scatter_spans(values.tolist(), span_ends.tolist(), masks)):
        of_row = tokens[i] if len(size) == 2 else tokens
        of_row[slots[i][0] : slots[i][1]] = torch.tensor(row, dtype=dtype)
    return tokens.to(values.device)


def gather_spans(
    gradients: Tensor,
    span_ends: Tensor,
    mask: Tensor | None,
    slot_starts: Tensor,
    slot_ends: Tensor,
    row_starts: Tensor,
) -> Tensor:
    """See ``python_ref.gather_spans``; arguments and result as the PyTorch implementation."""
    slots, masks = _masks(mask, slot_starts, slot_ends)
    rows = [_row(gradients, i, start, end) for i, (start, end) in enumerate(slots)]
    sums = python_ref.gather_spans(rows, span_ends.tolist(), masks)
    return torch.tensor(sums, dtype=torch.float64, device=gradients.device).reshape(span_ends.shape)


def surprisal_entropy(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``python_ref.surprisal_entropy``; arguments and results as the PyTorch implementation."""
    live = _live_rows(mask, logits.shape[0])
    rows, tokens, temperatures = logits.tolist(), token_ids.tolist(), temperature.tolist()
    surprisals, entropies = python_ref.surprisal_entropy(
        [rows[i] for i in live], [tokens[i] for i in live], temperature=[temperatures[i] for i in live]
    )
    results = torch.zeros((4, logits.shape[0]), dtype=compute_dtype(logits.dtype))
    for i, surprisal, entropy in zip(live, surprisals, entropies, strict=True):
        # The top and log sum e^(x - top), which the gradient starts from, are surprisals as well: of the id at the top.
        top = max(rows[i], default=math.nan)
        at_top = rows[i].index(top) if rows[i] else 0
        log_total = python_ref.surprisal_entropy([rows[i]], [at_top], temperature=temperatures[i])[0][0]
        results[:, i] = torch.tensor([surprisal, entropy, top, log_total], dtype=results.dtype)
    return tuple(results.to(logits.device).unbind())  # type: ignore[return-value]


def surprisal_states(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See ``python_ref.surprisal_state``; arguments and results as the PyTorch implementation."""
    rows, tokens, temperatures = logits.tolist(), token_ids.tolist(), temperature.tolist()
    states = torch.zeros((3, len(rows), 1), dtype=compute_dtype(logits.dtype))
    states[0], states[1] = torch.finfo(states.dtype).min, -1.0
    picked = torch.full((len(rows),), torch.nan, dtype=states.dtype)
    for i in _live_rows(mask, len(rows)):
        states[:, i, 0] = torch.tensor(python_ref.surprisal_state(rows[i], temperatures[i]), dtype=states.dtype)
        if 0 <= tokens[i] < len(rows[i]):
            picked[i] = rows[i][tokens[i]]
    return states.to(logits.device), picked.to(logits.device)


def merge_surprisal_states(
    states: Tensor, picked: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``python_ref.merge_surprisal_states``; arguments and results as the PyTorch implementation."""
    of_rows, ids, temperatures = states.permute(1, 2, 0).tolist(), picked.tolist(), temperature.tolist()
    results = torch.zeros((4, len(ids)), dtype=states.dtype)
    for i in _live_rows(mask, len(ids)):
        merged = python_ref.merge_surprisal_states(of_rows[i], ids[i], temperatures[i])
        results[:, i] = torch.tensor(merged, dtype=states.dtype)
    return tuple(results.to(states.device).unbind())  # type: ignore[return-value]


def surprisal_entropy_backward(
    gradients: Tensor,
    surprisal_gradients: Tensor,
    entropy_gradients: Tensor | None,
    surprisal: Tensor,
    entropy: Tensor,
    tops: Tensor,
    log_totals: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
) -> None:
    """See ``python_ref.surprisal_entropy_backward``; arguments as the PyTorch implementation.

    The rows' entropies, tops and totals are used where only a slice of the vocabulary is at hand.
    """
    rows, tokens, temperatures = logits.tolist(), token_ids.tolist(), temperature.tolist()
    of_surprisal = surprisal_gradients.tolist()
    of_entropy = [0.0] * len(rows) if entropy_gradients is None else entropy_gradients.tolist()
    gradients.zero_()
    for i in _live_rows(mask, len(rows)):
        (gradient,) = python_ref.surprisal_entropy_backward(
            [of_surprisal[i]],
            [of_entropy[i]],
            [rows[i]],
            [tokens[i]],
            temperature=temperatures[i],
            of_rows=[[float(vector[i])] for vector in (surprisal, entropy, tops, log_totals)],
        )
        if softcap is not None:
            gradient = [g * (1 - (x / softcap) ** 2) for g, x in zip(gradient, rows[i], strict=True)]
        gradients[i] = torch.tensor(gradient, dtype=gradients.dtype)


def linear_surprisal_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``python_ref.linear_surprisal_entropy``; the last two results, which its gradient does not need, are 0."""
    live = _live_rows(mask, hidden.shape[0])
    results = torch.zeros((4, hidden.shape[0]), dtype=compute_dtype(hidden.dtype))
    found = python_ref.linear_surprisal_entropy(
        hidden[live].tolist(),
        weight.tolist(),
        token_ids[live].tolist(),
        bias=None if bias is None else bias.tolist(),
        temperature=temperature[live].tolist(),
        logit_softcap=softcap,
    )
    results[:2, live] = torch.tensor(found, dtype=results.dtype)
    return tuple(results.to(hidden.device).unbind())  # type: ignore[return-value]


def linear_surprisal_entropy_backward(
    surprisal_gradients: Tensor,
    entropy_gradients: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``python_ref.linear_surprisal_entropy_backward``; gradients that are not needed are empty."""
    live = _live_rows(mask, hidden.shape[0])
    of_live, of_weight, of_bias = python_ref.linear_surprisal_entropy_backward(
        surprisal_gradients[live].tolist(),
        [0.0] * len(live) if entropy_gradients is None else entropy_gradients[live].tolist(),
        hidden[live].tolist(),
        weight.tolist(),
        token_ids[live].tolist(),
        bias=None if bias is None else bias.tolist(),
        temperature=temperature[live].tolist(),
        logit_softcap=softcap,
    )
    of_hidden = torch.zeros_like(hidden)
    of_hidden[live] = torch.tensor(of_live, dtype=hidden.dtype, device=hidden.device).reshape(len(live), -1)
    return (
        of_hidden if needs[0] else hidden.new_empty(0),
        torch.tensor(of_weight).to(weight) if needs[1] else weight.new_empty(0),
        torch.tensor(of_bias).to(weight if bias is None else bias) if needs[2] else weight.new_empty(0),
    )


def policy_loss(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    mask: Tensor,
    weights: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    entropy_coef: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """See ``python_ref.policy_loss_from_logits``; arguments and results as the PyTorch implementation."""
    terms = torch.zeros((6, logits.shape[0]), dtype=compute_dtype(logits.dtype))
    gradients = torch.zeros(logits.shape if with_gradient else (0,), dtype=logits.dtype)
    for i in _live_rows(mask, logits.shape[0]):
        found, gradient = python_ref.policy_loss_from_logits(
            [[logits[i].tolist()]],
            [[int(token_ids[i])]],
            None if old_logprobs is None else [[float(old_logprobs[i])]],
            [[float(advantages[i])]],
            [[True]],
            temperature=[[float(temperature[i])]],
            clip=(clip_low, clip_high),
            ref_logprobs=None if ref_logprobs is None else [[float(ref_logprobs[i])]],
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
        )
        weight = float(weights[i])
        terms[:, i] = torch.tensor([weight * found["loss"], *list(found.values())[1:]], dtype=terms.dtype)
        if with_gradient:
            gradients[i] = torch.tensor(gradient[0][0], dtype=torch.float64).mul_(weight).to(logits.dtype)
    return terms.to(logits.device), gradients.to(logits.device)


def scale_gradient(gradients: Tensor, factor: Tensor) -> None:
    """Multiply the gradients by one number, in place."""
    gradients.mul_(float(factor))
