"""common_prefix_lengths: exactly the reference's, and the laws of prefixes."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, Rollouts, random_group, rollouts, token_rows

import leafkernels
import python_ref

EXAMPLES = {"torch": 150, "triton": 150 if DEVICE == "cuda" else 20, "reference": 40}


def lengths_of(rows: list[list[int]], backend: str = "torch") -> torch.Tensor:
    """Prefix lengths of rows of any lengths, packed."""
    bounds = torch.tensor([0] + [len(row) for row in rows], device=DEVICE).cumsum(0).to(torch.int32)
    ids = torch.tensor(sum(rows, []), dtype=torch.int64, device=DEVICE)
    return leafkernels.common_prefix_lengths(ids, cu_seqlens=bounds, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_agrees_with_the_reference(backend: str, layout: str, small_blocks: None) -> None:
    @settings(max_examples=EXAMPLES[backend])
    @given(rollouts(longest=12))
    def check(case: Rollouts) -> None:
        inputs = case.packed() if layout == "packed" else case.padded(layout, extra=1)
        del inputs["logprobs"], inputs["rewards"]
        found = leafkernels.common_prefix_lengths(inputs.pop("token_ids"), **inputs, backend=backend).tolist()
        everything = python_ref.common_prefix_lengths(case.token_ids, response_mask=case.mask)
        for i, name in enumerate(case.groups):
            for j, other in enumerate(case.groups):
                assert found[i][j] == (everything[i][j] if name == other else -1)

    check()


@pytest.mark.parametrize(("few", "hardly_any"), [(0, 0), (1 << 20, 0), (1 << 20, 1 << 15)])
def test_all_ways_of_the_pytorch_backend(few: int, hardly_any: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refinement, all pairs in two steps, and all pairs in one must not be told apart."""
    from leafkernels.eager import prefix_lengths

    monkeypatch.setattr(prefix_lengths, "_FEW_TOKENS", few)
    monkeypatch.setattr(prefix_lengths, "_HARDLY_ANY_TOKENS", hardly_any)
    monkeypatch.setattr(prefix_lengths, "_HEAD", 3)

    @given(rows=token_rows(6, longest=40, vocabulary=2))
    @settings(max_examples=100)
    def check(rows: list[list[int]]) -> None:
        assert lengths_of(rows).tolist() == python_ref.common_prefix_lengths(rows)

    check()


def hard_inputs(rows: int, tokens: int) -> dict[str, list[list[int]]]:
    """Inputs that punish comparing all pairs, or one block at a time."""
    line = [random.Random(0).randrange(3) for _ in range(tokens)]
    comb = [line[: i * tokens // rows] + [9 + i] * (tokens - i * tokens // rows) for i in range(rows)]
    other = [t + 1 for t in line]
    return {
        "identical": [line] * rows,
        "identical but the last": [line[:-1] + [10 + i] for i in range(rows)],
        "comb": comb,
        "two families": [(line if i % 2 else other)[: tokens - i] for i in range(rows)],
        "nothing shared": [[i] * tokens for i in range(rows)],
        "strict prefixes": [line[: tokens - 7 * i] for i in range(rows)],
    }


@pytest.mark.parametrize("name", hard_inputs(2, 20))
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hard_inputs(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from leafkernels.eager import prefix_lengths

    monkeypatch.setattr(prefix_lengths, "_FEW_TOKENS", 0)
    rows, tokens = (8, 700) if backend == "torch" or DEVICE == "cuda" else (4, 700)
    inputs = hard_inputs(rows, tokens)[name]
    assert lengths_of(inputs, backend).tolist() == python_ref.common_prefix_lengths(inputs)


@given(token_rows(5, longest=20, vocabulary=2), st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_laws(rows: list[list[int]], rng: random.Random) -> None:
    shared = lengths_of(rows)
    count = [len(row) for row in rows]
    assert torch.equal(shared, shared.T)
    assert shared.diagonal().tolist() == count
    for i in range(len(rows)):
        for j in range(len(rows)):
            assert shared[i, j] <= min(count[i], count[j])
            for k in range(len(rows)):  # an ultrametric: the two smallest of three are equal
                a, b, _ = sorted([int(shared[i, j]), int(shared[j, k]), int(shared[i, k])])
                assert a == b or len({i, j, k}) < 3
    order = list(range(len(rows)))
    rng.shuffle(order)
    assert torch.equal(lengths_of([rows[i] for i in order]), shared[order][:, order])
    most = rng.randrange(1 + max(count))
    assert torch.equal(lengths_of([row[:most] for row in rows]), shared.clamp_max(most))
    renamed = [[(5, -(2**63))[t] for t in row] for row in rows]
    assert torch.equal(lengths_of(renamed), shared)


@given(st.integers(2, 40), st.data())
@settings(max_examples=50)
def test_changing_a_shared_token_ends_the_prefix_there(tokens: int, data: st.DataObject) -> None:
    row = data.draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens))
    t = data.draw(st.integers(0, tokens - 1))
    changed = [*row[:t], row[t] + 1, *row[t + 1 :]]
    assert lengths_of([row, changed])[0, 1] == t
    assert lengths_of([row, row])[0, 1] == tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend: str) -> None:
    ids = random_group(6, 9, seed=2, vocabulary=2)["token_ids"]
    assert leafkernels.common_prefix_lengths(ids, backend=backend).shape == (6, 6)
    halves = leafkernels.common_prefix_lengths(ids.reshape(2, 3, 9), backend=backend)
    assert halves.shape == (2, 3, 3)
    assert halves.dtype == torch.int32
    assert torch.equal(leafkernels.common_prefix_lengths(ids, groups=3, backend=backend), halves)
    names = torch.tensor([4, 4, 4, 1, 1, 1], device=DEVICE)
    table = leafkernels.common_prefix_lengths(ids, groups=names, backend=backend)
    assert torch.equal(table[:3, :3], halves[0])
    assert torch.equal(table[3:, 3:], halves[1])
    assert (table[:3, 3:] == -1).all()


@pytest.mark.parametrize("ids", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_reads_every_integer(backend: str, ids: torch.dtype) -> None:
    group = random_group(4, 30, seed=4, vocabulary=200)["token_ids"]
    expected = python_ref.common_prefix_lengths(group.tolist())
    assert leafkernels.common_prefix_lengths(group.to(ids), backend=backend).tolist() == expected


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ids_that_differ_in_their_high_half_only(backend: str) -> None:
    rows = [[1, 2 + (1 << 32), 3], [1, 2, 3], [1, 2 + (1 << 40), 3]]
    assert lengths_of(rows, backend).tolist() == [[3, 1, 1], [1, 3, 1], [1, 1, 3]]
