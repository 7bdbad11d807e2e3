"""The reference itself, pinned by tables worked by hand: it is what everything else is held to."""

import gzip
import json
import math
import os.path
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from rollouts import BACKENDS, DEVICE, Rollouts, rollouts, token_rows
from support import examples

import leafkernels
import python_ref

ROWS = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8], [1, 2, 9, 9, 9, 9], [1, 2, 9, 9, 8, 8]]
REWARDS = [1.0, 0.0, 0.0, 0.0]
# Surprisal puts the boundaries at 2 and 4.
LOGPROBS = [[-0.1, -0.1, -5.0, -0.1, -3.0, -0.1]] * 4
ROOT2 = math.sqrt(0.5)


def assert_near(actual: object, expected: object) -> None:
    torch.testing.assert_close(
        torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_worked_example() -> None:
    (tree,) = python_ref.span_tree(LOGPROBS, ROWS, REWARDS)
    assert tree.boundaries == [2, 4]
    assert [[span[:2] for span in row] for row in tree.raw] == [[(0, 2), (2, 4), (4, 6)]] * 4
    half = 0.5 * ROOT2
    raw = [[0, half, 1.25], [0, half, -0.75], [0, -half, -0.25], [0, -half, -0.25]]
    assert_near([[a for _, _, a in row] for row in tree.raw], raw)
    # Their sum of squares over the 11 degrees of freedom is 1/4, so that the z-scores are twice the raw values.
    assert_near([[a for _, _, a in row] for row in tree.spans], [[2 * a for a in row] for row in raw])
    advantages = python_ref.span_advantages(LOGPROBS, ROWS, REWARDS)
    assert_near(advantages[1], [0, 0, ROOT2, ROOT2, -1.5, -1.5])


@pytest.mark.parametrize(
    ("options", "row_0"),
    [
        ({"terms": "global"}, [0, 0.25 * ROOT2, 0.75]),
        ({"terms": "local"}, [0, 0.25 * ROOT2, 0.5]),
        ({"multiplicity_power": 0.0}, [0, 0.5, 1.25]),
        ({"multiplicity_power": 1.0}, [0, 0.25, 1.25]),
        # The global term times 4/3; the local one times 4/3 (parent of four), for the tail times 2 (parent of two).
        ({"leave_one_out": True}, [0, (0.25 * 4 / 3 + 0.25 * 4 / 3) * ROOT2, 0.75 * 4 / 3 + 0.5 * 2]),
        ({"num_boundaries": 0}, [1.5]),
        ({"num_boundaries": 1}, [0, 1.5]),
        # One boundary kept at a distance of 3: position 4 is too close to 2.
        ({"min_separation": 3}, [0, 1.5]),
    ],
)
def test_options_by_hand(options: dict, row_0: list[float]) -> None:
    (tree,) = python_ref.span_tree(LOGPROBS, ROWS, REWARDS, normalize="none", **options)
    assert_near([a for _, _, a in tree.spans[0]], row_0)


def test_normalisations_by_hand() -> None:
    """Two prompts that share nothing: raw values are twice the centred rewards."""
    ids = [[0], [1], [2], [3]]
    call = {"logprobs": [[-1.0]] * 4, "token_ids": ids, "rewards": [1.0, 0.0, 3.0, 0.0], "groups": ["a", "a", "b", "b"]}

    def advantages(normalize: str) -> list[float]:
        return [row[0] for row in python_ref.span_advantages(**call, normalize=normalize)]

    assert_near(advantages("none"), [1, -1, 3, -3])
    assert_near(advantages("span"), [ROOT2, -ROOT2, ROOT2, -ROOT2])
    std = math.sqrt((1 + 1 + 9 + 9) / 3)
    assert_near(advantages("batch"), [1 / std, -1 / std, 3 / std, -3 / std])
    a, b = math.sqrt(0.5) + 1e-6, math.sqrt(4.5) + 1e-6
    assert_near(advantages("reward_std"), [1 / a, -1 / a, 3 / b, -3 / b])
    call["rewards"] = [1.0, 1.0, 3.0, 0.0]
    std = math.sqrt(18 / 3)
    assert_near(advantages("batch"), [0, 0, 3 / std, -3 / std])


def test_boundaries_by_hand() -> None:
    def select(scores: list, **options: object) -> list[int]:
        return python_ref.select_boundaries(scores, **options)

    # Falling score, a distance of max(2, 6 // 3) = 2, never position 0.
    assert select([[9, 1, 8, 7, 0, 5]]) == [2, 5]
    # Of equal scores the smaller row, then the smaller position; the shortest row has 3 tokens, so the distance is 2.
    assert select([[0, 0, 4], [0, 4, 0]], num_boundaries=1) == [2]
    assert select([[0, 4, 0, 4]], num_boundaries=1) == [1]
    # A longer row offers positions that a shorter one has not, a mask takes positions away, NaN is no score.
    assert select([[0, 1], [0, 0, 0, 5]], num_boundaries=1) == [3]
    assert select([[0, 5, 4, 3]], response_mask=[[1, 0, 1, 1]], num_boundaries=1) == [2]
    assert select([[0, math.nan, 1, -math.inf]], num_boundaries=3, min_separation=1) == [2, 3]
    # Positions count from the first unmasked token.
    assert select([[9, 9, 0, 1, 5]], response_mask=[[0, 0, 1, 1, 1]], num_boundaries=1) == [2]
    assert select([[], [3]]) == []
    assert select([[0, 1, 2]], num_boundaries=0) == []


def test_nodes_of_identical_and_prefix_rows_by_hand() -> None:
    """Identical rows keep a boundary beyond their end; a strict prefix keeps one at its end, and has no tail then."""
    rows = [[0, 1], [0, 1], [0, 1, 2, 2], [0, 1, 2, 3]]
    (tree,) = python_ref.span_tree(
        [[0.0] * len(row) for row in rows],
        rows,
        [1.0, 0.0, 0.5, 0.5],
        boundary_scores=[[0, 0], [0, 0], [0, 0, 5, 4], [0, 0, 0, 0]],
        min_separation=1,
        normalize="none",
    )
    assert tree.boundaries == [2, 3]
    assert tree.nodes == [[[0, 1, 2, 3]] * 4, [[0, 1], [0, 1], [2, 3], [2, 3]]]
    assert [span[:2] for span in tree.spans[0]] == [(0, 2), (2, 3)]
    assert [span[:2] for span in tree.spans[2]] == [(0, 2), (2, 3), (3, 4)]


def test_scatter_and_its_adjoint_by_hand() -> None:
    mask = [[False, True, True, False, True, True]]
    assert python_ref.scatter_spans([[1.5, -2.0]], [[2, 4]], mask) == [[0, 1.5, 1.5, 0, -2.0, 0]]
    assert python_ref.gather_spans([[1, 2, 4, 8, 16, 32]], [[2, 4]], mask) == [[6, 16]]


@given(token_rows(4, longest=6, vocabulary=2))
@examples(torch=60)
def test_prefix_lengths_equal_commonprefix(rows: list[list[int]]) -> None:
    expected = [[len(os.path.commonprefix([a, b])) for b in rows] for a in rows]
    assert python_ref.common_prefix_lengths(rows) == expected


def test_prefix_lengths_between_start_and_limit() -> None:
    """Rows cut to four tokens; the first two count as equal, though they are not, and the third as it is."""
    rows = [[1, 2, 3, 4, 5], [9, 9, 3, 4, 5], [1, 2, 0, 4], [7]]
    expected = [[4, 4, 2, 1], [4, 4, 2, 1], [2, 2, 4, 1], [1, 1, 1, 1]]
    assert python_ref.common_prefix_lengths(rows, limit=4, start=2) == expected
    assert python_ref.common_prefix_lengths(rows, limit=0, start=2) == [[0] * 4] * 4


@given(rollouts())
@examples(torch=100)
def test_prefix_lengths_and_keys_find_the_same_spans(case: Rollouts) -> None:
    """The step function works from prefix lengths, the whole function from keys: two roads to one result."""
    credit = {k: case.options[k] for k in ("terms", "multiplicity_power", "leave_one_out")}
    trees = python_ref.span_tree(
        case.logprobs, case.token_ids, case.rewards, response_mask=case.mask, groups=case.groups, **case.options
    )
    for tree in trees:
        masks = [[m and not math.isnan(case.rewards[i]) for m in case.mask[i]] for i in tree.rows]
        shared = python_ref.common_prefix_lengths([case.token_ids[i] for i in tree.rows], response_mask=masks)
        lengths = [shared[i][i] for i in range(len(shared))]
        rewards = [case.rewards[i] for i in tree.rows]
        assert python_ref.span_values(shared, tree.boundaries, rewards, lengths, **credit) == tree.raw


# ---- The LEAF authors' own results: boundaries exactly, raw and z-scored span advantages to 1e-5, on every backend


# Under the interpreter a group takes a fifth of a second; every ninth still has all kinds of them.
STRIDE = {"triton": 1 if DEVICE == "cuda" else 9}


def golden_groups(shared: Path, stride: int = 1) -> list[dict[str, Any]]:
    with gzip.open(shared / "golden" / "leaf_spans.jsonl.gz", "rt") as file:
        groups = [json.loads(line) for line in file]
    assert len(groups) == 364
    return groups[::stride]


def check_spans(group: dict[str, Any], boundaries: list[int], spans: list[list[tuple[int, int, float, float]]]) -> None:
    """``spans`` holds start, end, raw and z-scored advantage of every span of every row."""
    assert boundaries == group["boundaries"]
    assert [[span[:2] for span in row] for row in spans] == [[tuple(s[:2]) for s in row] for row in group["spans"]]
    actual = torch.tensor([span[2:] for row in spans for span in row], dtype=torch.float64)
    expected = torch.tensor([span[2:] for row in group["spans"] for span in row], dtype=torch.float64)
    if not boundaries:  # the released code leaves the raw advantage undoubled there
        actual, expected = actual[:, 1], expected[:, 1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("poisoned_memory")
def test_reference_gives_the_authors_results(shared: Path) -> None:
    for group in golden_groups(shared):
        (tree,) = python_ref.span_tree(
            [[-s for s in row] for row in group["surprisal"]],
            group["token_ids"],
            group["rewards"],
            num_boundaries=group["num_boundaries"],
            terms=group["terms"],
        )
        rows = [
            [(start, end, a, z) for (start, end, a), (_, _, z) in zip(raw, spans, strict=True)]
            for raw, spans in zip(tree.raw, tree.spans, strict=True)
        ]
        check_spans(group, tree.boundaries, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned_memory")
def test_backends_give_the_authors_results(shared: Path, backend: str) -> None:
    for group in golden_groups(shared, STRIDE.get(backend, 1)):
        lengths = [len(row) for row in group["token_ids"]]
        tree = leafkernels.span_tree(
            -torch.tensor(sum(group["surprisal"], []), device=DEVICE),
            torch.tensor(sum(group["token_ids"], []), device=DEVICE),
            torch.tensor(group["rewards"], device=DEVICE),
            cu_seqlens=torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32),
            num_boundaries=group["num_boundaries"],
            terms=group["terms"],
            backend=backend,
        )
        ends, raw, values = (t.tolist() for t in (tree.spans.span_ends, tree.spans.raw, tree.spans.values))
        rows = []
        for i in range(len(lengths)):
            starts = [0, *ends[i][:-1]]
            slots = zip(starts, ends[i], raw[i], values[i], strict=True)
            rows.append([(start, end, a, z) for start, end, a, z in slots if end > start])
        check_spans(group, [p for p in tree.boundaries.tolist() if p >= 0], rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned_memory")
def test_padded_batches_give_the_same_tokens(shared: Path, backend: str) -> None:
    """(G, T) with a mask, through the whole function, against the spans of the authors laid over the tokens."""
    for group in golden_groups(shared, 4 * STRIDE.get(backend, 1)):
        width = max(len(row) for row in group["token_ids"])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in group["token_ids"]], device=DEVICE)
        expected = torch.zeros(mask.shape)
        for i, spans in enumerate(group["spans"]):
            for start, end, _, z in spans:
                expected[i, start : min(end, len(group["token_ids"][i]))] = z
        advantages = leafkernels.span_advantages(
            torch.tensor([[-s for s in r] + [0.0] * (width - len(r)) for r in group["surprisal"]], device=DEVICE),
            torch.tensor([r + [0] * (width - len(r)) for r in group["token_ids"]], device=DEVICE),
            torch.tensor(group["rewards"], device=DEVICE),
            response_mask=mask,
            num_boundaries=group["num_boundaries"],
            terms=group["terms"],
            backend=backend,
        )
        torch.testing.assert_close(advantages.cpu(), expected, rtol=0, atol=1e-5)
