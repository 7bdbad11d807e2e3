"""GRPO, Dr. GRPO and RLOO: what is special to schemes of whole rollouts; tests/test_laws.py has the laws of all."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import DEVICE, Rollouts, random_group, rollouts
from support import examples

import leafkernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_neither_logprobs_nor_tokens_matter_to_estimators_of_whole_rollouts(name: str) -> None:
    first, second = random_group(5, 8, seed=1), random_group(5, 8, seed=2)
    result = getattr(leafkernels, name)(**first)
    assert torch.equal(result, getattr(leafkernels, name)(second["logprobs"], second["token_ids"], first["rewards"]))
    assert torch.equal(result, result[:, :1].expand(result.shape))


@given(rollouts())
@examples(torch=100)
def test_estimators_of_whole_rollouts_are_multiples_of_each_other(case: Rollouts) -> None:
    inputs = case.padded()
    grpo, dr_grpo, rloo = (getattr(leafkernels, name)(**inputs) for name in ("grpo", "dr_grpo", "rloo"))
    for prompt in set(case.groups):
        rows = inputs["groups"] == prompt
        scored = inputs["rewards"][rows]
        scored = scored[~scored.isnan()].double()
        if len(scored) > 1:
            ratio = len(scored) / (len(scored) - 1)
            torch.testing.assert_close(rloo[rows], dr_grpo[rows] * ratio, rtol=1e-6, atol=0)
            scale = (scored.std() + 1e-6).float()
            torch.testing.assert_close(grpo[rows] * scale, dr_grpo[rows], rtol=1e-6, atol=0)


@given(st.lists(st.sampled_from([0.0, 1.0, 0.25, -3.0]), min_size=2, max_size=6), st.integers(1, 6), st.integers(0, 3))
@examples(torch=60)
def test_rows_that_share_no_boundary_prefix(rewards: list[float], tokens: int, num_boundaries: int) -> None:
    """Law 3 of the spans: twice Dr. GRPO with both terms, RLOO with one and leave_one_out; TreeRL is twice RLOO."""
    r = torch.tensor(rewards, device=DEVICE)
    ids = torch.arange(len(rewards) * tokens, device=DEVICE).reshape(len(rewards), tokens)
    call = -torch.rand(ids.shape, device=DEVICE), ids, r

    def spans(**options: Any) -> torch.Tensor:
        return leafkernels.span_advantages(*call, num_boundaries=num_boundaries, normalize="none", **options)

    near: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(spans(), 2 * leafkernels.dr_grpo(*call), **near)
    for terms in ("global", "local"):
        torch.testing.assert_close(spans(terms=terms), leafkernels.dr_grpo(*call), **near)
        torch.testing.assert_close(spans(terms=terms, leave_one_out=True), leafkernels.rloo(*call), **near)
    torch.testing.assert_close(
        leafkernels.treerl(*call, num_boundaries=num_boundaries), 2 * leafkernels.rloo(*call), **near
    )
    # For TEMPO all rows part at token 0, where GRPO's advantage counts twice.
    tempo = leafkernels.grpo(*call)
    tempo[:, 0] *= 2
    torch.testing.assert_close(leafkernels.tempo(*call), tempo, **near)


@given(seed=st.integers(0, 10**6), num_boundaries=st.integers(1, 4))
@examples(torch=40)
def test_dr_grpo_has_the_policy_gradient_of_global_spans(seed: int, num_boundaries: int) -> None:
    """Corollary of law 2: tokens that share their whole prefix have one log-probability, and equal sums of credit."""
    group = random_group(6, 12, seed, vocabulary=2)
    options: dict[str, Any] = {"num_boundaries": num_boundaries, "multiplicity_power": 0.0, "normalize": "none"}
    spans = leafkernels.span_advantages(**group, terms="global", **options)
    flat = leafkernels.dr_grpo(**group)
    ids = group["token_ids"]
    for t in range(ids.shape[1]):
        for i in range(ids.shape[0]):
            same = (ids[:, : t + 1] == ids[i, : t + 1]).all(1)
            torch.testing.assert_close(spans[same, t].sum(), flat[same, t].sum(), rtol=1e-5, atol=1e-5)
