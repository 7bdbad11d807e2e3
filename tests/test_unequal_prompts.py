"""Prompts of unequal sizes in one call: no prompt reads another's rewards, forward or backward."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import DEVICE, Rollouts, unequal_prompts
from support import every_estimator, examples, options_of

import leafkernels
from leafkernels import ESTIMATORS

IDS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def with_gradient(name: str, inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages, and what their weighted sum, each prompt's on its own scale, gives the rewards."""
    rewards = inputs["rewards"].double().requires_grad_()
    result = ESTIMATORS[name](**{**inputs, "rewards": rewards}, **options)
    weights = torch.linspace(1, 2, result.shape[1], device=DEVICE) * (1 + inputs["token_ids"])
    (gradient,) = torch.autograd.grad((result * weights).sum(), rewards)
    return result.detach(), gradient


@pytest.mark.parametrize("backend", ["torch", "triton"])
@every_estimator
def test_a_prompt_is_what_it_is_alone(name: str, backend: str) -> None:
    @examples(backend, triton=3)
    @given(unequal_prompts(), st.sampled_from(IDS))
    def check(case: Rollouts, ids: torch.dtype) -> None:
        options: dict[str, Any] = {"backend": backend, **options_of(name, case.options)}
        if options.get("normalize") == "batch":  # of the call, by definition
            options["normalize"] = "span"
        inputs = case.padded(ids=ids)
        groups = inputs.pop("groups")
        together = with_gradient(name, inputs, groups=groups, **options)
        for prompt in set(case.groups):
            rows = groups == prompt
            alone = with_gradient(name, {key: tensor[rows] for key, tensor in inputs.items()}, **options)
            for found, expected in zip(together, alone, strict=True):
                torch.testing.assert_close(found[rows], expected, rtol=1e-9, atol=1e-9, equal_nan=True)
                if not inputs["rewards"][rows].isinf().any():
                    assert found[rows].isfinite().all()

    check()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dead", [math.nan, math.inf])
@every_estimator
def test_a_dead_prompt_between_two(name: str, dead: float, backend: str) -> None:
    inputs = {
        "token_ids": torch.tensor([[1, 2], [1, 3], [1, 2], [1, 2], [1, 3], [1, 4]], device=DEVICE),
        "logprobs": torch.tensor([[-0.5, -1.0]], device=DEVICE).repeat(6, 1),
        "rewards": torch.tensor([1.0, 0.0, dead, 1.0, 0.0, 0.3], device=DEVICE),
    }
    groups = torch.tensor([0, 0, 1, 2, 2, 2], device=DEVICE)
    advantages, gradient = with_gradient(name, inputs, groups=groups, backend=backend)
    for found in (advantages, gradient):
        assert found[[0, 1, 3, 4, 5]].isfinite().all()
        assert found[[3, 4, 5]].any()
    assert advantages[[0, 1]].any()  # of two rewards, the scores are constants


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_whole_rewards_beyond_float32(backend: str) -> None:
    """2**24 and the next whole number are one float32."""
    ids = torch.tensor([[1, 2], [1, 3]], device=DEVICE)
    for dtype in (torch.int32, torch.int64):
        rewards = torch.tensor([1 << 24, (1 << 24) + 1], dtype=dtype, device=DEVICE)
        for name in ("dr_grpo", "span_advantages"):
            options = {"normalize": "none", "terms": "global"} if name == "span_advantages" else {}
            call = torch.zeros(2, 2, device=DEVICE), ids, rewards
            found = getattr(leafkernels, name)(*call, backend=backend, **options)
            assert found[:, -1].tolist() == [-0.5, 0.5]
        shared = torch.tensor([[2, 1], [1, 2]], dtype=torch.int32, device=DEVICE)
        lengths, boundaries = torch.tensor([2, 2], device=DEVICE), torch.tensor([1], device=DEVICE)
        spans = leafkernels.span_values(shared, boundaries, rewards, lengths, backend=backend, normalize="none")
        assert spans.raw.tolist() == [[0.0, -1.0], [0.0, 1.0]]
