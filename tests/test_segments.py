"""Running sums within segments: the operation; tests/test_returns.py and test_laws.py have what is made of them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import DEVICE
from support import examples

import python_ref
from leafkernels.rows.segments import running_sums

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FAST = ("torch", "triton")


def places(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each entry the first and the last place of its segment."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    counts = torch.tensor(lengths, dtype=torch.int64)
    starts, lasts = (edge.repeat_interleave(counts).to(DEVICE) for edge in (ends[:-1], ends[1:] - 1))
    return starts, lasts


def sums(entries: torch.Tensor, lengths: list[int], backend: str) -> torch.Tensor:
    return running_sums(entries, *places(lengths), max(lengths, default=0), backend)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from leafkernels.kernels import segments

    monkeypatch.setattr(segments, "STRETCH", 4)
    monkeypatch.setattr(segments, "FIRST", 3)
    monkeypatch.setattr(segments, "TILE", 8)


@pytest.mark.parametrize("backend", FAST)
def test_agrees_with_the_reference(backend: str, small_tiles: None) -> None:
    """Segments of one entry, of a tile and one more, numbers that are none, in one segment alone."""
    numbers = st.sampled_from([0.0, 1.0, -2.5, 0.1, 1e16, -1e16, math.nan, math.inf])

    @examples(backend, torch=100, triton=6)
    @given(st.lists(st.integers(1, 27), max_size=5), st.data())
    def check(lengths: list[int], data: Any) -> None:
        size = sum(lengths)
        entries = data.draw(st.lists(numbers, min_size=size, max_size=size))
        found = sums(torch.tensor(entries, dtype=torch.float64, device=DEVICE), lengths, backend)
        starts, lasts = (edge.tolist() for edge in places(lengths))
        at = 0
        for length in lengths:
            part = entries[at : at + length]
            known = next((i for i, x in enumerate(part) if not math.isfinite(x)), length)
            here = [starts[at : at + known], lasts[at : at + known]]
            want = python_ref.running_sums(part[:known], *([x - at for x in edge] for edge in here))
            size_of_terms = sum(map(abs, part[:known])) if part else 0.0
            for value, exact in zip(found[at : at + known].tolist(), want, strict=True):
                # Each of the sums has at most as many roundings as terms.
                assert abs(value - exact) <= 2.0**-52 * length * size_of_terms
            assert not found[at + known : at + length].isfinite().any()
            at += length

    check()


@pytest.mark.parametrize("backend", FAST)
def test_no_bit_depends_on_where_a_segment_lies_or_what_is_beside_it(backend: str, small_tiles: None) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 1, 40, 9, 8, 17]
    parts = [torch.randn(n, dtype=torch.float64, generator=generator).to(DEVICE) for n in lengths]
    alone = [sums(part, [len(part)], backend) for part in parts]
    for order in (range(6), (5, 2, 0, 4, 1, 3)):
        together = sums(torch.cat([parts[i] for i in order]), [lengths[i] for i in order], backend)
        again = sums(torch.cat([parts[i] for i in order]), [lengths[i] for i in order], backend)
        assert torch.equal(together, again)
        assert torch.equal(together, torch.cat([alone[i] for i in order]))
    # Nor on what follows: rows that share their beginning share its sums.
    assert torch.equal(sums(parts[2][:13], [13], backend), alone[2][:13])


@pytest.mark.parametrize("backend", FAST)
def test_gradients_of_any_order(backend: str, small_tiles: None) -> None:
    lengths = [1, 11, 4]
    entries = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    entries.requires_grad_()
    fast = backend == "triton"  # the interpreter is slow
    assert torch.autograd.gradcheck(lambda x: sums(x, lengths, backend), entries, fast_mode=fast)
    assert torch.autograd.gradgradcheck(lambda x: sums(x, lengths, backend).square(), entries, fast_mode=fast)


@pytest.mark.parametrize("backend", FAST)
def test_no_entry(backend: str) -> None:
    assert sums(torch.zeros(0, dtype=torch.float64, device=DEVICE), [], backend).shape == (0,)
