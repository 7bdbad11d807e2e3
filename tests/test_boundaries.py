"""select_boundaries: exactly the reference's, on every backend and layout."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, Rollouts, rollouts
from support import examples

import leafkernels
import python_ref

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def expected_of_row(case: Rollouts, row: int) -> list[int]:
    """The boundaries of the row's prompt, filled up with -1."""
    rows = [i for i, name in enumerate(case.groups) if name == case.groups[row]]
    count = case.options["num_boundaries"]
    found = python_ref.select_boundaries(
        [case.logprobs[i] for i in rows],
        response_mask=[case.mask[i] for i in rows],
        num_boundaries=count,
        min_separation=case.options["min_separation"],
    )
    return found + [-1] * (count - len(found))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_agrees_with_the_reference(backend: str, layout: str, small_blocks: None) -> None:
    @examples(backend, triton=20)
    @given(rollouts(longest=12))
    def check(case: Rollouts) -> None:
        inputs = case.packed() if layout == "packed" else case.padded(layout, extra=1)
        del inputs["token_ids"], inputs["rewards"]
        found = leafkernels.select_boundaries(
            inputs.pop("logprobs"),
            **inputs,
            num_boundaries=case.options["num_boundaries"],
            min_separation=case.options["min_separation"],
            backend=backend,
        )
        assert found.dtype == torch.int32
        assert found.tolist() == [expected_of_row(case, i) for i in range(len(case.groups))]

    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_keeps_its_place(backend: str, dtype: torch.dtype) -> None:
    """Both signs, subnormals, zeros of both signs (a tie), infinities; NaN nowhere."""
    # Triton's interpreter widens subnormal bfloat16 numbers wrongly (seen with 3.9); a GPU does it exactly.
    interpreted_bfloat16 = backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16
    tiny = torch.finfo(dtype).smallest_normal / (1 if interpreted_bfloat16 else 4)
    scores = [0.0, -math.inf, -3.0, -tiny, -0.0, 0.0, tiny, 2.0, math.inf, math.nan]
    found = leafkernels.select_boundaries(
        torch.tensor([scores], dtype=dtype, device=DEVICE), num_boundaries=9, min_separation=1, backend=backend
    )
    assert found.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, -1]
    for most, kept in [(1, [8]), (2, [7, 8]), (4, [4, 6, 7, 8]), (5, [4, 5, 6, 7, 8]), (6, [3, 4, 5, 6, 7, 8])]:
        found = leafkernels.select_boundaries(
            torch.tensor([scores], dtype=dtype, device=DEVICE), num_boundaries=most, min_separation=1, backend=backend
        )
        assert found.tolist() == kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend: str) -> None:
    scores = torch.rand(6, 9, device=DEVICE)
    call = {"num_boundaries": 2, "backend": backend}
    whole = leafkernels.select_boundaries(scores, **call)
    assert whole.shape == (2,)
    halves = leafkernels.select_boundaries(scores.reshape(2, 3, 9), **call)
    assert torch.equal(halves, leafkernels.select_boundaries(scores, group_size=3, **call))
    names = torch.tensor([5, 5, 5, -1, -1, -1], device=DEVICE)
    assert torch.equal(halves.repeat_interleave(3, 0), leafkernels.select_boundaries(scores, groups=names, **call))
    assert leafkernels.select_boundaries(scores, num_boundaries=0, backend=backend).shape == (0,)
    far = leafkernels.select_boundaries(scores, num_boundaries=2, min_separation=2**63 - 1, backend=backend)
    assert far.tolist() == [int(scores[:, 1:].amax(0).argmax()) + 1, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompts_without_a_row_have_no_boundary(backend: str) -> None:
    for shape in ((0, 5), (2, 0, 5), (0, 3, 5)):
        found = leafkernels.select_boundaries(torch.zeros(shape, device=DEVICE), backend=backend)
        assert found.tolist() == torch.full((*shape[:-2], 2), -1).tolist()
        assert found.dtype == torch.int32
    nothing = torch.zeros(0, 5, device=DEVICE)
    assert leafkernels.select_boundaries(nothing, group_size=4, backend=backend).shape == (0, 2)
    named = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert leafkernels.select_boundaries(nothing, groups=named, backend=backend).shape == (0, 2)
    bounds = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert leafkernels.select_boundaries(nothing[:, 0], cu_seqlens=bounds, backend=backend).tolist() == [-1, -1]


@given(st.integers(1, 3), st.integers(0, 12), st.data())
@examples(torch=100)
@example(1, 0, None)
def test_boundaries_are_apart_and_inside(rows: int, tokens: int, data: st.DataObject | None) -> None:
    """Laws without an oracle: ascending, apart, inside the longest row, and the best position among them."""
    scores = torch.rand(rows, tokens, device=DEVICE)
    most = data.draw(st.integers(1, 4)) if data else 1
    found = [p for p in leafkernels.select_boundaries(scores, num_boundaries=most).tolist() if p >= 0]
    separation = max(2, tokens // (most + 1))
    assert all(b - a >= separation for a, b in zip(found, found[1:], strict=False))
    assert all(1 <= p < tokens for p in found)
    if tokens > 1:
        assert int(scores[:, 1:].amax(0).argmax()) + 1 in found


@pytest.mark.parametrize("groups", [None, torch.tensor([0, 1, 0, 1])])
def test_infinities_beside_excluded_scores(groups: torch.Tensor | None) -> None:
    """Of columns whose best score is -inf, the one of the smaller unmasked row comes first; NaN is no score."""
    scores = torch.full((4, 6), -torch.inf)
    scores[0, 5], scores[3, 2] = torch.nan, torch.inf
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:2, 2:4] = False
    group_ids = [0, 0, 0, 0] if groups is None else groups.tolist()
    found = leafkernels.select_boundaries(
        scores, response_mask=mask, groups=groups, num_boundaries=2, min_separation=1, backend="torch"
    )
    for group in set(group_ids):
        rows = [i for i, name in enumerate(group_ids) if name == group]
        expected = python_ref.select_boundaries(
            scores[rows].tolist(), response_mask=mask[rows].tolist(), num_boundaries=2, min_separation=1
        )
        assert (found if groups is None else found[rows[0]]).tolist() == expected
