"""Integers of every dtype: what PyTorch only stores is computed with as well, and compared bit for bit."""

from typing import Any

import pytest
import torch
from rollouts import BACKENDS, DEVICE, random_group

import leafkernels

UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
DTYPES = [torch.int8, torch.int16, torch.int32, torch.uint8, *UNSIGNED]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_functions_of_a_vocabulary(backend: str, dtype: torch.dtype) -> None:
    logits, hidden = torch.randn(1, 4, 20, device=DEVICE), torch.randn(1, 4, 3, device=DEVICE)
    weight, ones = torch.randn(20, 3, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    ids = torch.tensor([[3, 19, 0, 7]], device=DEVICE)
    mask = torch.tensor([[1, 0, 2, 1]], device=DEVICE)
    calls: list[tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = [
        (leafkernels.surprisal_entropy, (logits,), ()),
        (leafkernels.linear_surprisal_entropy, (hidden, weight), ()),
        (leafkernels.policy_loss_from_logits, (logits,), (None, ones)),
    ]
    for function, first, last in calls:
        options = {"response_mask": mask, "backend": backend}
        expected = function(*first, ids, *last, **options)
        options["response_mask"] = mask.to(dtype)
        found = function(*first, ids.to(dtype), *last, **options)
        for actual, want in zip(found, expected, strict=True):
            assert torch.equal(actual, want)


@pytest.mark.parametrize("dtype", UNSIGNED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_beyond_the_signed_range_lie_outside_of_a_vocabulary(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(1, 40_000, device=DEVICE)
    high = torch.tensor([torch.iinfo(dtype).max], dtype=dtype, device=DEVICE)
    assert leafkernels.surprisal_entropy(logits, high, backend=backend).surprisal.isnan()
    middle = torch.tensor([39_999], dtype=dtype, device=DEVICE)
    found = leafkernels.surprisal_entropy(logits, middle, backend=backend)
    torch.testing.assert_close(found.surprisal, -logits.log_softmax(1)[:, -1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_credit(backend: str, dtype: torch.dtype) -> None:
    group = random_group(6, 8, seed=1, vocabulary=2)
    mask = torch.ones(6, 8, dtype=torch.int64, device=DEVICE)
    mask[1, 5:] = 0
    groups = torch.tensor([7, 3, 7, 7, 3, 3], device=DEVICE)
    limit = torch.tensor([6, 4, 6, 6, 4, 4], device=DEVICE)
    group["rewards"] = torch.tensor([0, 1, 3, 0, 2, 1], device=DEVICE)

    def run(cast: Any) -> list[torch.Tensor]:
        call = {"response_mask": cast(mask), "groups": cast(groups), "backend": backend}
        rollouts = group["logprobs"], cast(group["token_ids"]), cast(group["rewards"])
        tree = leafkernels.span_tree(*rollouts, **call)
        return [
            *(f(*rollouts, **call) for f in (leafkernels.span_advantages, leafkernels.tempo, leafkernels.grpo)),
            tree.boundaries,
            tree.nodes,
            *tree.spans,
            leafkernels.common_prefix_lengths(cast(group["token_ids"]), limit=cast(limit), **call),
        ]

    for found, want in zip(run(lambda tensor: tensor.to(dtype)), run(lambda tensor: tensor), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps(dtype: torch.dtype) -> None:
    shared = torch.tensor([[4, 2, 0], [2, 3, 0], [0, 0, 4]], device=DEVICE)
    boundaries, lengths = torch.tensor([2], device=DEVICE), torch.tensor([4, 3, 4], device=DEVICE)
    rewards = torch.tensor([0.0, 1.0, 3.0], device=DEVICE)
    expected = leafkernels.span_values(shared, boundaries, rewards, lengths)
    found = leafkernels.span_values(shared.to(dtype), boundaries.to(dtype), rewards, lengths.to(dtype))
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=0, atol=0, equal_nan=True)
    tokens = leafkernels.scatter_spans(expected.values, expected.span_ends.to(dtype), 4)
    assert torch.equal(tokens, leafkernels.scatter_spans(expected.values, expected.span_ends, 4))


@pytest.mark.parametrize("dtype", UNSIGNED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_high_ids_are_compared_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    top = torch.iinfo(dtype).max
    half = top // 2
    rows = [[top, half, 0], [top, half + 1, 0], [top, half, 1], [top - 1, half, 0]]
    ids = torch.tensor(rows, dtype=dtype, device=DEVICE)
    found = leafkernels.common_prefix_lengths(ids, backend=backend)
    assert found.tolist() == [[3, 1, 2, 0], [1, 3, 1, 0], [2, 1, 3, 0], [0, 0, 0, 3]]
    names = torch.tensor([top, half + 1, top, half], dtype=dtype, device=DEVICE)
    found = leafkernels.common_prefix_lengths(ids, groups=names, backend=backend)
    assert found.tolist() == [[3, -1, 2, -1], [-1, 3, -1, -1], [2, -1, 3, -1], [-1, -1, -1, 3]]


def test_they_compile() -> None:
    group = random_group(6, 20, seed=3, vocabulary=2)
    ids = group["token_ids"].to(torch.uint32)

    def step(logprobs: torch.Tensor, ids: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        return leafkernels.span_advantages(logprobs, ids, rewards, group_size=3)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    call = group["logprobs"], ids, group["rewards"]
    torch.testing.assert_close(compiled(*call), step(group["logprobs"], group["token_ids"], group["rewards"]))
