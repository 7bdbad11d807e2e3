"""Span values of one group: mean reward of the rows that share a prefix, against the group's and the parent node's."""

import math
from collections.abc import Sequence

Span = tuple[int, int, float]  # start, end (half-open), value

# Relative to a prompt's largest reward: rewards that lie this near to each other count as equal. Four units of
# float32's last place at 1, which is the rounding of a sum of a few terms.
ROUNDING = 2.0**-21
# Up to here float32 holds every whole number.
EXACT = 2.0**24


def settled(rewards: Sequence[float]) -> list[float]:
    """The rewards of a prompt, all set to the least where they differ by rounding alone; NaN stays."""
    scored = [r for r in rewards if not math.isnan(r)]
    if not scored:
        return list(rewards)
    least, most = min(scored), max(scored)
    spread, size = most - least, max(abs(least), abs(most))
    are_whole = float(least).is_integer() and float(most).is_integer()
    # Of whole numbers float32 makes no sum that is rounded up to 2 ** 24, and beyond it holds none that lie so near.
    is_exact = are_whole and (size <= EXACT or spread * EXACT < size)
    if spread < math.inf and spread <= ROUNDING * size and not is_exact:
        return [r if math.isnan(r) else least for r in rewards]
    return list(rewards)


def total(numbers: Sequence[float]) -> float:
    """The sum with one rounding; NaN of infinities of both signs."""
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean with one rounding in the sum; 0 for an empty list."""
    return total(values) / len(values) if values else 0.0


def deviation(values: Sequence[float]) -> float:
    """Standard deviation with ddof = 1; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    m = mean(values)
    return math.sqrt(total([(v - m) ** 2 for v in values]) / (len(values) - 1))


def nodes_from_prefix_lengths(
    prefix_lengths: Sequence[Sequence[int]], lengths: Sequence[int], boundary: int, taking_part: Sequence[bool]
) -> list[list[int]]:
    """For each row the rows (itself included) that share its first ``boundary`` tokens.

    Identical rows share every boundary, also one beyond their end.
    """
    nodes = []
    for i in range(len(lengths)):
        members = []
        for j in range(len(lengths)):
            shared = prefix_lengths[i][j]
            identical = shared == lengths[i] == lengths[j]
            if taking_part[i] and taking_part[j] and (identical or shared >= boundary):
                members.append(j)
        nodes.append(members)
    return nodes


def span_values(
    prefix_lengths: Sequence[Sequence[int]],
    boundaries: Sequence[int],
    rewards: Sequence[float],
    lengths: Sequence[int],
    *,
    terms: str = "both",
    multiplicity_power: float = 0.5,
    leave_one_out: bool = False,
) -> list[list[Span]]:
    """Raw spans of every row of one group, from the prefix lengths of its rows."""
    taking_part = [length > 0 and not math.isnan(r) for length, r in zip(lengths, rewards, strict=True)]
    nodes = [nodes_from_prefix_lengths(prefix_lengths, lengths, p, taking_part) for p in boundaries]
    return credit(
        nodes,
        boundaries,
        rewards,
        lengths,
        terms=terms,
        multiplicity_power=multiplicity_power,
        leave_one_out=leave_one_out,
    )


def credit(
    nodes: Sequence[Sequence[Sequence[int]]],
    boundaries: Sequence[int],
    rewards: Sequence[float],
    lengths: Sequence[int],
    *,
    terms: str,
    multiplicity_power: float,
    leave_one_out: bool,
) -> list[list[Span]]:
    """Raw spans of every row, given ``nodes[k][i]``: the members of row i's node at ``boundaries[k]``."""
    rewards = settled(rewards)
    scored = [r for r in rewards if not math.isnan(r)]
    group_value = mean(scored)
    all_equal = not scored or max(scored) == min(scored)
    use_global = terms in ("both", "global")
    use_local = terms in ("both", "local")

    rows = []
    for i, length in enumerate(lengths):
        spans: list[Span] = []
        start = 0
        parent_value, parent_size = group_value, len(scored)

        def advantage(value: float, parent_value: float, parent_size: int) -> float:
            if all_equal:
                return 0.0
            term_global, term_local = value - group_value, value - parent_value
            if leave_one_out:
                term_global *= len(scored) / (len(scored) - 1)
                term_local *= parent_size / (parent_size - 1)
            return (term_global if use_global else 0.0) + (term_local if use_local else 0.0)

        if length > 0 and not math.isnan(rewards[i]):
            for k, boundary in enumerate(boundaries):
                members = nodes[k][i]
                if len(members) < 2:
                    break
                value = mean([rewards[j] for j in members])
                weight = len(members) ** -multiplicity_power
                spans.append((start, boundary, advantage(value, parent_value, parent_size) * weight))
                start, parent_value, parent_size = boundary, value, len(members)
            if start < length:
                spans.append((start, length, advantage(rewards[i], parent_value, parent_size)))
        rows.append(spans)
    return rows


def normalize_spans(
    groups: Sequence[Sequence[Sequence[Span]]], rewards: Sequence[Sequence[float]], normalize: str = "span"
) -> list[list[list[Span]]]:
    """Normalised spans of several groups; ``groups[g][i]`` are the raw spans of row i, ``rewards[g][i]`` its reward.

    "span" z-scores over the spans of a group, "batch" over the spans of all groups, each span once whatever its
    length; "reward_std" divides by the deviation of the group's rewards; "none" changes nothing. A group whose rewards
    are all equal, but for rounding, gives 0 in every mode (its spans still count among those of a "batch").
    """
    call_values = [value for rows in groups for spans in rows for _, _, value in spans]
    result = []
    for rows, group_rewards in zip(groups, rewards, strict=True):
        scored = [r for r in settled(group_rewards) if not math.isnan(r)]
        if not scored or max(scored) == min(scored):
            shift, scale = 0.0, math.inf
        elif normalize == "span":
            group_values = [value for spans in rows for _, _, value in spans]
            shift, scale = mean(group_values), max(deviation(group_values), 1e-6)
        elif normalize == "batch":
            shift, scale = mean(call_values), max(deviation(call_values), 1e-6)
        elif normalize == "reward_std":
            shift, scale = 0.0, deviation(scored) + 1e-6
        else:
            shift, scale = 0.0, 1.0
        result.append([[(start, end, (value - shift) / scale) for start, end, value in spans] for spans in rows])
    return result
