"""The LEAF authors' own results: boundaries exactly, raw and z-scored span advantages to 1e-5, on every backend."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import BACKENDS, DEVICE

import leafkernels
import python_ref

pytestmark = pytest.mark.usefixtures("poisoned_memory")

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
