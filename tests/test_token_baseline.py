"""OTB: what is special to it; tests/test_laws.py has the laws of all, without sums of squares."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, Rollouts, assert_rows_close, rollouts
from support import examples

import leafkernels
import python_ref

pytestmark = pytest.mark.usefixtures("poisoned_memory")

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_backend
def test_by_hand(backend: str) -> None:
    """Of p 1/2 and 1/4 with sums of squares 3/8 and 5/8: 1 - 1 + 3/8 = 3/8 and 1 - 1/2 + 5/8 = 9/8; then 0 for p of 1.

    Token 1 is in both rows, with (3/8 * 1 + 9/8 * 0) / (12/8) = 1/4; so is token 2, where W has not grown. Token 3 is
    in row 1 alone.
    """
    p = torch.tensor([[0.5, 1.0, 1.0], [0.25, 1.0, 0.5]], device=DEVICE)
    squares = torch.tensor([[0.375, 1.0, 0.0], [0.625, 1.0, 0.5]], device=DEVICE)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], device=DEVICE)
    call = p.log(), torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), torch.tensor([1.0, 0.0], device=DEVICE)
    found = leafkernels.otb(*call, response_mask=mask, sum_squares=squares, backend=backend)
    torch.testing.assert_close(found.tolist(), [[0.75, 0.75, 0.0], [-0.25, -0.25, 0.0]])
    # Without: 1/4 and 9/16, and a baseline of 4/13.
    found = leafkernels.otb(*call, response_mask=mask, backend=backend)
    torch.testing.assert_close(found.tolist(), [[9 / 13] * 2 + [0.0], [-4 / 13] * 2 + [0.0]])


@every_backend
def test_agrees_with_the_reference(backend: str) -> None:
    @examples(backend, torch=80, triton=2, reference=10)
    @given(st.data(), rollouts(), st.sampled_from(("right", "left", "packed")))
    def check(data: Any, case: Rollouts, layout: str) -> None:
        numbers = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.0 + 2**-20, math.nan])
        squares = [data.draw(st.lists(numbers, min_size=len(m), max_size=len(m))) for m in case.mask]
        inputs = case.packed() if layout == "packed" else case.padded(layout, extra=2)
        laid_out = case.laid_out(squares, layout, math.nan, torch.float32, 2)
        found = leafkernels.otb(**inputs, sum_squares=laid_out, backend=backend)
        call = {"response_mask": case.mask, "groups": case.groups, "sum_squares": squares}
        assert_rows_close(
            case.rows_of(found, layout), python_ref.otb(case.logprobs, case.token_ids, case.rewards, **call)
        )

    check()


def pattern(factor: int) -> torch.Tensor:
    """Tenths from 1 to 7."""
    return ((torch.arange(25, dtype=torch.float64) * factor) % 7 + 1).view(5, 5) / 10


# What verl 0.9.1's functions give for these tensors, float64, with handle_zero_tail=False and an epsilon of 0.
OF_VERL = {
    "optimal_token_baseline": (
        [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]],
        [
            [0.837638376384, 0.802533222591, 1.066510401406, 0.991678224688, 0.0],
            [0.087638376384, 0.052533222591, 0.0, 0.0, 0.0],
            [-1.412361623616, -1.447466777409, -0.933489598594, -1.008321775312, 0.0],
            [0.901775804661, 1.267987486966, 1.162881245944, 0.0, 0.0],
            [-1.598224195339, -0.732012513034, -0.837118754056, 0.0, 0.0],
        ],
    ),
    "tir_optimal_token_baseline": (
        [[1, 1, 0, 1, 0], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [1, 1, 1, 0, 0]],
        [
            [0.837638376384, 0.805596249634, 0.0, 0.93935483871, 0.0],
            [0.087638376384, 0.0, 0.0, 0.0, 0.055596249634],
            [-1.412361623616, -1.444403750366, -1.06064516129, 0.0, 0.0],
            [0.901775804661, 0.0, 1.021848739496, 0.0, 0.0],
            [-1.598224195339, -0.978151260504, 0.0, 0.0, 0.0],
        ],
    ),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", OF_VERL)
def test_verl_gives_the_same(name: str, backend: str) -> None:
    lists, want = OF_VERL[name]
    p = pattern(3)
    squares = p.square() + (1 - p).square() * pattern(5)
    steps = torch.zeros(5, 5, dtype=torch.float64)
    earned = {(0, 3): 1.0, (0, 1): 0.25, (1, 1): 0.5, (2, 4): -1.0, (3, 2): 2.0, (4, 0): -0.5}
    if name.startswith("tir"):
        earned[1, 4] = earned.pop((1, 1))
    for place, value in earned.items():
        steps[place] = value
    found = leafkernels.otb(
        p.log().to(DEVICE),
        torch.zeros(5, 5, dtype=torch.int64, device=DEVICE),
        None,
        response_mask=torch.tensor(lists, device=DEVICE),
        groups=torch.tensor([0, 0, 0, 1, 1], device=DEVICE),
        step_rewards=steps.to(DEVICE),
        sum_squares=squares.to(DEVICE),
        backend=backend,
    )
    # Credit is float32.
    torch.testing.assert_close(found.cpu().double(), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lead", [0.0, 5.0, 12.0, 40.0])
def test_sure_tokens_weigh_what_their_score_does(lead: float) -> None:
    """1 - 2 p + sum p^2 is 1e-10 and less here, and its float32 terms are 1: rounding turns no weight, nor its sign."""
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1))
    logits[..., 7] = lead + logits.amax()
    ids = torch.full((2, 3), 7)
    found = leafkernels.surprisal_entropy(logits, ids, statistics=["sum_squares"])
    score = torch.nn.functional.one_hot(ids, 50) - logits.double().softmax(-1)
    moved = score.square().sum(-1).cumsum(1)
    rewards = torch.tensor([1.0, 0.0])
    credit = leafkernels.otb(found.logprobs, ids, rewards, sum_squares=found.sum_squares)
    exact = rewards[:, None] - (moved * rewards[:, None]).sum(0) / moved.sum(0)
    assert ((credit[0] >= 0) & (credit[1] <= 0)).all()
    # What float32 keeps of the other ids' share of the norm is between nothing and all of it.
    low, high = (moved[0] / (moved[0] + factor * moved[1]) for factor in (2.0, 0.5))
    assert ((1 - credit[0] >= low - 1e-6) & (1 - credit[0] <= high + 1e-6)).all()
    if lead <= 5.0:
        torch.testing.assert_close(credit.double(), exact, rtol=1e-3, atol=1e-4)


def test_the_baseline_has_the_least_variance_and_its_own_row_in_it() -> None:
    """Enumerated over all pairs of rows of one token: the expected gradient is not that of the rewards, scaled."""
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    scores = torch.eye(3, dtype=torch.float64) - p
    exact = (p * rewards) @ scores
    expected = torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        ids = torch.tensor(pair)[:, None]
        squares = p.square().sum().expand(2, 1)
        credit = leafkernels.otb(p[ids].log(), ids, rewards[list(pair)], sum_squares=squares)[:, 0].double()
        norms = scores[list(pair)].square().sum(1)
        assert abs(float((norms * credit).sum())) < 1e-6  # where a weighted square is least, its slope is 0
        expected += p[list(pair)].prod() * (credit[:, None] * scores[list(pair)]).sum(0)
    cosine = torch.nn.functional.cosine_similarity(expected, exact, dim=0)
    assert 0 < cosine < 0.9999


def test_errors() -> None:
    call = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2)
    with pytest.raises(TypeError, match=r"^sum_squares must be floating point .* got torch\.int64$"):
        leafkernels.otb(*call, sum_squares=call[1])
    with pytest.raises(ValueError, match="^sum_squares must have the shape of token_ids"):
        leafkernels.otb(*call, sum_squares=torch.zeros(2, 2))
