"""statistics= of surprisal_entropy and its hidden-state form: sum p^2 and the likeliest id, against float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from rollouts import BACKENDS, DEVICE
from support import compare_with_compiled, examples
from test_sampling_mask import families, mask_of
from test_surprisal import tolerance

import leafkernels
import python_ref
from leafkernels.vocabulary.statistics import STATISTICS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FAST = ("torch", "triton")
INF = math.inf


def check(found: leafkernels.TokenStatistics, logits: torch.Tensor, ids: torch.Tensor, **options: Any) -> None:
    """All three against ``python_ref`` on the logits as rounded; rows that do not count are left out by the caller."""
    want = python_ref.token_statistics(logits.double().tolist(), ids.tolist(), **options)
    assert found.sum_squares is not None
    assert found.top_ids is not None
    assert found.top_logprobs is not None
    squares, tops, logprobs = (torch.tensor(numbers, dtype=torch.float64) for numbers in want)
    assert found.top_ids.tolist() == tops.tolist()
    finite = logits[logits > torch.finfo(logits.dtype).min].double()
    lead = float(finite.max() - finite.min()) / options.get("temperature", 1.0) if finite.numel() else 0.0
    # The log of a sum of V terms has the sum's error and rounds at log V; three of them are in sum p^2.
    rtol = 3 * tolerance(logits.dtype, logits.shape[-1], lead)
    torch.testing.assert_close(found.sum_squares.double().cpu(), squares, rtol=rtol, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(found.top_logprobs.double().cpu(), logprobs, rtol=rtol, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """Of 1, 3, 3 and 1 parts of 8: (1 + 9 + 9 + 1) / 64, and the first of the two ids of 3/8."""
    logits = torch.tensor([1.0, 3.0, 3.0, 1.0], device=DEVICE).log().repeat(2, 1).requires_grad_()
    ids, mask = torch.tensor([0, 3], device=DEVICE), torch.tensor([1, 0], device=DEVICE)
    found = leafkernels.surprisal_entropy(logits, ids, response_mask=mask, statistics=STATISTICS, backend=backend)
    assert found.sum_squares is not None
    torch.testing.assert_close(found.sum_squares.tolist(), [20 / 64, 0.0])
    assert found.top_ids is not None
    assert found.top_ids.tolist() == [1, -1]
    assert found.top_logprobs is not None
    torch.testing.assert_close(found.top_logprobs.tolist(), [math.log(3 / 8), 0.0])
    assert [tensor is not None and tensor.requires_grad for tensor in found] == [True, True, False, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_surprisal_and_gradient_are_what_they_are_without(backend: str) -> None:
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ids = torch.arange(6, device=DEVICE).view(2, 3)
    runs = []
    for more in ({}, {"statistics": ["top_logprobs", "sum_squares"]}):
        leaf = logits.clone().requires_grad_()
        found = leafkernels.surprisal_entropy(leaf, ids, backend=backend, **more)
        (found.surprisal + 2 * found.entropy).sum().backward()
        runs.append((*found[:2], leaf.grad))
    for without, given_too in zip(*runs, strict=True):
        torch.testing.assert_close(given_too, without, rtol=0, atol=0)
    assert found.sum_squares.shape == ids.shape
    assert found.top_ids is None


@pytest.mark.parametrize("backend", FAST)
def test_agrees_with_the_reference(backend: str, small_blocks: None) -> None:
    """Banned ids, ties at the top, rows that are no distribution, kept ids, masks."""

    @examples(backend, torch=150, triton=6)
    @given(families())
    def run(family: Any) -> None:
        logits, ids, lists, live, temperature = family
        options = {"temperature": temperature, "statistics": STATISTICS, "response_mask": live, "backend": backend}
        found = leafkernels.surprisal_entropy(logits, ids, sampling_mask=mask_of(lists), **options)
        rows = live.nonzero().flatten().tolist()
        kept = [lists[row] for row in rows]
        of_live = leafkernels.TokenStatistics(*(tensor[rows] for tensor in found if tensor is not None))
        check(of_live, logits[rows], ids[rows], temperature=temperature, sampling_mask=kept)
        rest = [tensor[~live].tolist() for tensor in found if tensor is not None]
        assert rest == [[value] * len(rest[0]) for value in (0.0, 0.0, 0.0, -1, 0.0)]

    run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", FAST)
def test_hard_rows(backend: str, dtype: torch.dtype) -> None:
    """A top that leads by 60, all far from 0, banned ids, two at the top, and a flat row of a real vocabulary."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.rand(6, 5000, generator=generator)
    logits[0, 77] = 61.0
    logits[1] += 1e4
    logits[2, 100:] = -INF
    logits[3, [5, 4000]] = 30.0
    logits[4] = -INF
    logits[5, 3] = math.nan
    ids = torch.tensor([77, 3, 4999, 4000, 1, 2])
    logits = logits.to(dtype)
    found = leafkernels.surprisal_entropy(logits.to(DEVICE), ids.to(DEVICE), statistics=STATISTICS, backend=backend)
    check(found, logits, ids)
    if backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        return
    flat = (torch.randn(1, 151_936, generator=generator) * 0.1).to(dtype)
    call = flat.to(DEVICE), ids[:1].to(DEVICE)
    check(leafkernels.surprisal_entropy(*call, statistics=STATISTICS, backend=backend), flat, ids[:1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_kept", [False, True])
def test_from_hidden_states(with_kept: bool, backend: str, small_blocks: None) -> None:
    """What the logits give, in chunks of any size; weights that are whole numbers make both forms' logits equal."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randint(-2, 3, size, generator=generator).float().to(DEVICE) for size in ((2, 5, 4), (30, 4))
    )
    bias = torch.arange(30.0, device=DEVICE) / 8
    ids = torch.randint(0, 30, (2, 5), generator=generator).to(DEVICE)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]], device=DEVICE)
    options: dict[str, Any] = {"response_mask": mask, "statistics": STATISTICS, "temperature": 2.0}
    if with_kept:
        options["sampling_mask"] = mask_of([[], [1, 2], [3], [], [4, 5, 6], [7], [8, 9], [], list(range(30)), [0]])
    logits = torch.nn.functional.linear(hidden, weight, bias)
    want = leafkernels.surprisal_entropy(logits.double(), ids, **options, backend="torch")
    for chunk in (3, 100):
        call: dict[str, Any] = {"bias": bias, "chunk_tokens": chunk, **options, "backend": backend}
        found = leafkernels.linear_surprisal_entropy(hidden.requires_grad_(), weight, ids, **call)
        for actual, exact in zip(found, want, strict=True):
            torch.testing.assert_close(actual, exact.to(actual.dtype), rtol=1e-5, atol=1e-6)
        assert not found.sum_squares.requires_grad
    capped = leafkernels.linear_surprisal_entropy(hidden, weight, ids, bias=bias, logit_softcap=4.0, **options)
    want = leafkernels.surprisal_entropy(4 * (logits / 4).tanh(), ids, **options)
    torch.testing.assert_close(capped.sum_squares, want.sum_squares, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rows_or_ids(backend: str) -> None:
    for rows, vocabulary in ((0, 5), (2, 0)):
        ids = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        call = torch.zeros(rows, vocabulary, device=DEVICE), ids
        found = leafkernels.surprisal_entropy(*call, statistics=STATISTICS, backend=backend)
        hidden, weight = torch.zeros(rows, 3, device=DEVICE), torch.zeros(vocabulary, 3, device=DEVICE)
        for result in (found, leafkernels.linear_surprisal_entropy(hidden, weight, ids, statistics=STATISTICS)):
            assert result.sum_squares is not None
            assert result.sum_squares.isnan().tolist() == [True] * rows
            assert result.top_ids is not None
            assert result.top_ids.tolist() == [-1] * rows


@pytest.mark.slow
@pytest.mark.parametrize("backend", FAST)
def test_torch_compile(backend: str) -> None:
    ids = torch.arange(4, device=DEVICE)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"statistics": STATISTICS, "backend": backend}
        first = leafkernels.surprisal_entropy(hidden @ weight.T, ids, **options)
        second = leafkernels.linear_surprisal_entropy(hidden, weight, ids, **options)
        return sum((f.surprisal * f.sum_squares * f.top_ids * f.top_logprobs).sum() for f in (first, second))

    generator = torch.Generator().manual_seed(4)
    compare_with_compiled(loss, *(torch.randn(n, 3, generator=generator).to(DEVICE) for n in (4, 9)))


def test_errors() -> None:
    call = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="^statistics must be a list of names, got str$"):
        leafkernels.surprisal_entropy(*call, statistics="sum_squares")
    message = "^statistics must be some of 'sum_squares', 'top_ids', 'top_logprobs', got 'top_id'$"
    with pytest.raises(ValueError, match=message):
        leafkernels.linear_surprisal_entropy(*call[:1], *call, statistics=["top_id"])
