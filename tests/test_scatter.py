"""scatter_spans and its adjoint."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE
from support import examples

import leafkernels
import python_ref
from leafkernels._core.backend import implementation
from leafkernels.rows.find import build_layout

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@st.composite
def spans(draw: st.DrawFn) -> dict[str, Any]:
    """Rows with ascending span ends, some beyond the row, and masks with padding and holes."""
    count, slots = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sizes = [draw(st.integers(0, 9)) for _ in range(count)]
    return {
        "values": [[draw(st.integers(-8, 8)) / 4 for _ in range(slots)] for _ in range(count)],
        "ends": [sorted(draw(st.integers(0, 12)) for _ in range(slots)) for _ in range(count)],
        "mask": [[draw(st.sampled_from([True, True, False])) for _ in range(size)] for size in sizes],
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_agrees_with_the_reference(backend: str, layout: str, small_blocks: None) -> None:
    @examples(backend, triton=30)
    @given(spans())
    def check(case: dict[str, Any]) -> None:
        expected = python_ref.scatter_spans(case["values"], case["ends"], case["mask"])
        sizes = [len(row) for row in case["mask"]]
        values = torch.tensor(case["values"], dtype=torch.float64, device=DEVICE)
        ends = torch.tensor(case["ends"], dtype=torch.int32, device=DEVICE)
        width = max(sizes)
        bounds = torch.tensor([0, *sizes], device=DEVICE).cumsum(0).to(torch.int32)
        if layout == "packed":
            mask = torch.tensor(sum(case["mask"], []), dtype=torch.bool, device=DEVICE)
            tokens = leafkernels.scatter_spans(
                values, ends, sum(sizes), response_mask=mask, cu_seqlens=bounds, backend=backend
            )
            assert tokens.tolist() == sum(expected, [])
        else:
            rows = [row + [False] * (width - len(row)) for row in case["mask"]]
            mask = torch.tensor(rows, dtype=torch.bool, device=DEVICE).reshape(len(sizes), width)
            tokens = leafkernels.scatter_spans(values, ends, width, response_mask=mask, backend=backend)
            assert tokens.tolist() == [row + [0.0] * (width - len(row)) for row in expected]
        assert tokens.dtype == torch.float64

        # The adjoint, on gradients that are exact in binary.
        layout_of_rows = build_layout(mask, mask, 1, bounds if layout == "packed" else None)
        gradients = torch.arange(tokens.numel(), device=DEVICE).reshape(tokens.shape) / 4
        if backend == "reference":
            return
        sums = implementation(backend, "scatter").gather_spans(gradients, ends, mask, layout_of_rows)
        rows_of_gradients = gradients.split(sizes) if layout == "packed" else gradients
        lists = [row.tolist()[: len(m)] for row, m in zip(rows_of_gradients, case["mask"], strict=True)]
        assert sums.tolist() == python_ref.gather_spans(lists, case["ends"], case["mask"])

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    values = torch.randn(3, 4, dtype=torch.float64, device=DEVICE).requires_grad_()
    ends = torch.tensor([[2, 4, 9, 9], [0, 3, 3, 5], [1, 2, 3, 20]], device=DEVICE)
    mask = torch.rand(3, 9, device=DEVICE) < 0.7
    assert torch.autograd.gradcheck(
        lambda v: leafkernels.scatter_spans(v, ends, 9, response_mask=mask, backend=backend), (values,)
    )
    bounds = torch.tensor([0, 9, 9, 20], dtype=torch.int32, device=DEVICE)
    assert torch.autograd.gradcheck(
        lambda v: leafkernels.scatter_spans(v, ends, 20, cu_seqlens=bounds, backend=backend), (values,)
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_adjoint_identity(backend: str) -> None:
    """<scatter(v), g> = <v, gather(g)>, and a row of 5,000 tokens, which crosses the blocks of the kernels."""
    values = torch.randn(2, 3, dtype=torch.float64, device=DEVICE).requires_grad_()
    ends = torch.tensor([[1000, 1024, 4999], [0, 3000, 5000]], device=DEVICE)
    tokens = leafkernels.scatter_spans(values, ends, 5000, backend=backend)
    gradients = torch.randn(tokens.shape, dtype=torch.float64, device=DEVICE)
    (tokens * gradients).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close((values * values.grad).sum(), (tokens * gradients).sum(), rtol=1e-12, atol=1e-10)
    assert torch.equal(tokens[0, :1000], values[0, 0].expand(1000))
    assert tokens[0, 4999] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", [2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1])
def test_ends_beyond_int32(backend: str, far: int) -> None:
    values = torch.tensor([[1.0, 2.0]], device=DEVICE)
    tokens = leafkernels.scatter_spans(values, torch.tensor([[2, far]], device=DEVICE), 4, backend=backend)
    assert tokens.tolist() == [[1.0, 1.0, 2.0, 2.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend: str) -> None:
    values = torch.randn(2, 3, 4, device=DEVICE)
    ends = torch.arange(1, 5, device=DEVICE).expand(2, 3, 4)
    tokens = leafkernels.scatter_spans(values, ends, 6, backend=backend)
    assert tokens.shape == (2, 3, 6)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens[..., :4], values)
    assert not tokens[..., 4:].any()


@pytest.mark.skipif(DEVICE == "cuda", reason="the chunks are those of a CPU")
@pytest.mark.parametrize("layout", ["padded", "mask", "packed", "packed mask"])
def test_chunks_give_the_same(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows written a few at a time are those written at once, and no index is as large as the tokens."""
    values = torch.randn(9, 3)
    ends = torch.randint(1, 14, (9, 3)).sort(1).values
    options: dict[str, Any] = {"backend": "torch"}
    if "packed" in layout:
        options["cu_seqlens"] = torch.tensor([0, 13, 13, 14, 40, 41, 50, 60, 60, 60], dtype=torch.int32)
    num_tokens = 60 if "packed" in layout else 13
    if "mask" in layout:
        options["response_mask"] = torch.rand(60 if "packed" in layout else (9, 13)) < 0.7
    expected = leafkernels.scatter_spans(values, ends, num_tokens, **options)
    repeat, sizes = torch.repeat_interleave, []

    def noted(*args: Any, output_size: int) -> torch.Tensor:
        sizes.append(output_size)
        return repeat(*args, output_size=output_size)

    monkeypatch.setattr(torch, "repeat_interleave", noted)
    monkeypatch.setattr("leafkernels.eager.scatter._CHUNK", 26)
    found = leafkernels.scatter_spans(values, ends, num_tokens, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert sum(sizes) == expected.numel()
    assert len(sizes) > 2


def test_spans_of_the_tree_that_end_after_a_row() -> None:
    """Identical rows share a node at a boundary that lies beyond them: found with masks without holes."""
    mask = torch.zeros(5, 5, dtype=torch.bool)
    for row, length in enumerate([0, 1, 1, 2, 4]):
        mask[row, 1 : 1 + length] = True
    case = torch.zeros(5, 5), torch.zeros(5, 5, dtype=torch.long), torch.tensor([0.0, 0, 0, 0, 1])
    found = leafkernels.span_advantages(*case, response_mask=mask, backend="torch")
    assert not found[~mask].any()
    assert torch.allclose(found, leafkernels.span_advantages(*case, response_mask=mask, backend="reference"))
