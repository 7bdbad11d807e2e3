"""TEMPO, tree_td and TreeRL: what is special to differences of values; tests/test_laws.py has the laws of all."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, Rollouts, assert_rows_close, random_group, rollouts, unmasked
from support import examples

import leafkernels
import python_ref
from leafkernels.credit.differences import _TEMPO, _spans_of_leaving
from leafkernels.rows.rollouts import read_rollouts

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_tempo_of_rows_that_end_or_repeat_by_hand() -> None:
    """Rewards 3, 0, 0, 1: mean 1, deviation sqrt(2), to which 1e-6 is added."""
    rows = [[5, 6], [5, 6], [5, 6, 7], []]
    scale = math.sqrt(2) + 1e-6
    # All share the prefix of no token, V = 1. The empty row leaves at token 0 (V = 1); rows 0 to 2 share both tokens.
    # Row 2 alone goes on: V = 0. Rows 0 and 1 stay at V = 1: row 2 begins with all that they are.
    by_hand = [[2 / scale, 2 / scale], [-1 / scale, -1 / scale], [-1 / scale, -1 / scale, -2 / scale], []]
    case = unmasked(rows, [3.0, 0.0, 0.0, 1.0])
    assert_rows_close(python_ref.tempo(case.logprobs, rows, case.rewards), by_hand)
    assert_rows_close(case.rows_of(leafkernels.tempo(**case.packed())), by_hand)
    # With a reward of 5 for the empty row its leaving is worth -1 to the others at token 0, and V is 1 from there on.
    case = unmasked(rows, [3.0, 0.0, 0.0, 5.0])
    scale = math.sqrt(18 / 3) + 1e-6
    by_hand = [[0.0, 1 / scale], [-3 / scale, -2 / scale], [-3 / scale, -2 / scale, -3 / scale], []]
    assert_rows_close(python_ref.tempo(case.logprobs, rows, case.rewards), by_hand)
    assert_rows_close(case.rows_of(leafkernels.tempo(**case.packed())), by_hand)


def test_logprobs_do_not_matter_to_tempo() -> None:
    group = random_group(5, 8, seed=1)
    garbage = torch.full_like(group["logprobs"], math.nan)
    assert torch.equal(leafkernels.tempo(**group), leafkernels.tempo(garbage, group["token_ids"], group["rewards"]))


def test_tempo_leaves_what_differs_at_a_hole_to_no_token() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 4, 3]], device=DEVICE)
    mask = torch.tensor([[True, False, True]] * 2, device=DEVICE)
    rewards = torch.tensor([1.0, 0.0], device=DEVICE)
    logprobs = torch.zeros(2, 3, device=DEVICE)
    with_hole = leafkernels.tempo(logprobs, ids, rewards, response_mask=mask)
    torch.testing.assert_close(with_hole, leafkernels.grpo(logprobs, ids, rewards, response_mask=mask))
    assert leafkernels.tempo(logprobs, ids, rewards)[0, 1] > with_hole[0, 0]


@given(rollouts())
@examples(torch=50)
def test_spans_of_tempo_are_what_the_scatter_takes(case: Rollouts) -> None:
    """Ascending, also where rows leave together, and up to the last token of each row that has a reward."""
    inputs = case.padded()
    mask, groups = inputs["response_mask"], inputs["groups"]
    call = inputs["logprobs"], inputs["token_ids"], inputs["rewards"], mask, groups, None, None, "torch"
    rollouts = read_rollouts(*call)
    values, ends, _ = _spans_of_leaving(rollouts, _TEMPO)
    assert values.shape == ends.shape
    assert (ends.diff(dim=1) >= 0).all()
    assert (ends >= 0).all()
    assert torch.equal(ends[:, -1].long(), rollouts.layout.row_lengths)


@given(rollouts())
@examples(torch=150)
def test_tempo_telescopes(case: Rollouts) -> None:
    """Over a row that no other begins with, V goes from the mean to the row's own reward."""
    inputs = case.padded()
    # Holes would take differences away: each row becomes its stretch.
    for i, mask in enumerate(case.mask):
        live = [t for t, is_live in enumerate(mask) if is_live]
        if live:
            inputs["response_mask"][i, live[0] : live[-1] + 1] = True
    shared = leafkernels.common_prefix_lengths(
        inputs["token_ids"], response_mask=inputs["response_mask"], groups=inputs["groups"]
    )
    grpo, tempo = leafkernels.grpo(**inputs).double(), leafkernels.tempo(**inputs).double()
    difference = (tempo - grpo).sum(1)
    is_scored = ~inputs["rewards"].isnan()
    for i in range(len(case.rewards)):
        length = int(shared[i, i])
        whole = int(((shared[i] >= length) & is_scored).sum())
        if length and is_scored[i] and whole == 1:
            at = int(inputs["response_mask"][i].int().argmax())
            torch.testing.assert_close(difference[i], grpo[i, at], rtol=1e-5, atol=1e-6)


@given(rollouts())
@examples(torch=100)
def test_tempo_differences_of_a_branch_sum_to_zero(case: Rollouts) -> None:
    """Rows that begin with s_t: V(s_{t+1}) - V(s_t) sums to 0 over them where none has ended."""
    inputs = case.padded()
    inputs["response_mask"] = torch.ones_like(inputs["response_mask"])  # one length, so that no row ends
    difference = leafkernels.tempo(**inputs).double() - leafkernels.grpo(**inputs).double()
    ids, groups, rewards = inputs["token_ids"], inputs["groups"], inputs["rewards"]
    for t in range(ids.shape[1]):
        for i in (~rewards.isnan()).nonzero().flatten().tolist():
            branch = (ids[:, :t] == ids[i, :t]).all(1) & (groups == groups[i]) & ~rewards.isnan()
            assert abs(float(difference[branch, t].sum())) < 1e-5


def test_tempo_and_grpo_have_one_gradient_after_the_parting() -> None:
    """Also where all rewards are equal, and the slope of their deviation is taken as 0."""
    ids = torch.tensor([[1, 5], [2, 5], [3, 5]], device=DEVICE)
    weights = torch.tensor([[0.0, 0.5], [0.0, -1.0], [0.0, 2.0]], device=DEVICE)
    for rewards in ([0.5, 0.5, 0.5], [1.0, 0.0, 0.25]):
        gradients = []
        for name in ("tempo", "grpo"):
            leaf = torch.tensor(rewards, dtype=torch.float64, device=DEVICE).requires_grad_()
            (getattr(leafkernels, name)(torch.zeros(3, 2, device=DEVICE), ids, leaf) * weights).sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)


SHRINKAGE = st.sampled_from([4.0, 0.0, 0.5, 1, math.inf])
GROUP_WEIGHT = st.sampled_from([0.2, 0.0, 1.0, -1.5, 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tree_td_of_any_weights_agrees_with_the_reference(backend: str) -> None:
    @examples(backend, torch=200, triton=4, reference=40)
    @given(rollouts(), SHRINKAGE, GROUP_WEIGHT, st.sampled_from(["none", "reward_std"]))
    def check(case: Rollouts, shrinkage: float, group_weight: float, normalize: str) -> None:
        options: dict[str, Any] = {"shrinkage": shrinkage, "group_weight": group_weight, "normalize": normalize}
        expected = python_ref.tree_td(
            case.logprobs, case.token_ids, case.rewards, response_mask=case.mask, groups=case.groups, **options
        )
        assert_rows_close(case.rows_of(leafkernels.tree_td(**case.padded(), **options, backend=backend)), expected)

    check()


@given(rollouts())
@examples(torch=100)
def test_corners_of_tree_td_to_the_bit(case: Rollouts) -> None:
    inputs = case.padded()
    tempo = leafkernels.tree_td(**inputs, shrinkage=0, group_weight=1, normalize="reward_std")
    assert torch.equal(tempo, leafkernels.tempo(**inputs))
    flat = leafkernels.tree_td(**inputs, shrinkage=math.inf, group_weight=1)
    # Another order of the sum of the mean: one rounding of float64, which float32 may show as its own.
    torch.testing.assert_close(flat, leafkernels.dr_grpo(**inputs), rtol=1.2e-7, atol=1e-15)
    # Where no rewards need rounding, nor their mean, nothing is left to differ.
    eighths = inputs["rewards"].mul(8).round().nan_to_num(0.0)
    one = {**inputs, "rewards": eighths, "groups": torch.zeros_like(inputs["groups"])}
    one = {name: tensor[: 1 << (len(tensor).bit_length() - 1)] for name, tensor in one.items()}
    flat = leafkernels.tree_td(**one, shrinkage=math.inf, group_weight=1)
    assert torch.equal(flat, leafkernels.dr_grpo(**one))


@given(rollouts(), SHRINKAGE)
@examples(torch=60)
def test_tree_td_is_affine_in_the_group_weight(case: Rollouts, shrinkage: float) -> None:
    inputs = case.padded()
    without = leafkernels.tree_td(**inputs, shrinkage=shrinkage, group_weight=0.0)
    flat = leafkernels.dr_grpo(**inputs)
    for weight in (0.2, -1.5):
        weighted = leafkernels.tree_td(**inputs, shrinkage=shrinkage, group_weight=weight)
        # Three roundings of float32, of numbers up to 3.
        torch.testing.assert_close(weighted, without + weight * flat, rtol=1e-6, atol=1e-6)


def test_shrinkage_goes_from_the_means_to_the_prompt() -> None:
    """A long chain: row k leaves the last row at token k, so that V has gone through all G - 1 nodes at its end."""
    rows = [[0] * k + [1] * (9 - k) for k in range(8)]
    rewards = [float(k % 3 == 0) for k in range(8)]
    case = unmasked(rows, rewards)
    for shrinkage in (0.5, 3.0):
        value = sum(rewards) / 8
        by_hand = []
        for k in range(9):
            left = rewards[k + 1 :]
            before = value
            if left:
                value = (sum(left) + shrinkage * value) / (len(left) + shrinkage)
            by_hand.append(value - before)
        result = leafkernels.tree_td(**case.packed(), shrinkage=shrinkage, group_weight=0.0)
        assert_rows_close(case.rows_of(result)[-1:], [by_hand])


@pytest.mark.parametrize(
    ("option", "error", "text"),
    [
        ({"shrinkage": -1}, ValueError, "shrinkage must be at least 0, got -1"),
        ({"shrinkage": math.nan}, ValueError, "shrinkage must be at least 0, got nan"),
        ({"shrinkage": True}, TypeError, "shrinkage must be a number, got bool"),
        ({"group_weight": "1"}, TypeError, "group_weight must be a number, got str"),
        ({"group_weight": math.inf}, ValueError, "group_weight must be finite, got inf"),
        ({"normalize": "span"}, ValueError, "normalize must be one of 'none', 'reward_std', got 'span'"),
    ],
)
def test_options_of_tree_td(option: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        leafkernels.tree_td(**random_group(3, 4, seed=0), **option)
    assert str(raised.value) == text


def test_treerl_ranks_boundaries_as_span_advantages_does() -> None:
    group = random_group(6, 30, seed=4, vocabulary=2)
    scores = torch.rand(6, 30, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    options: dict[str, Any] = {"num_boundaries": 3, "min_separation": 2, "boundary_scores": scores}
    reference = python_ref.treerl(
        group["logprobs"].tolist(),
        group["token_ids"].tolist(),
        group["rewards"].tolist(),
        **{**options, "boundary_scores": scores.tolist()},
    )
    result = leafkernels.treerl(**group, **options)
    assert_rows_close(result.tolist(), reference)
    for change in ({"num_boundaries": 1}, {"min_separation": 9}, {"boundary_scores": None}):
        assert not torch.equal(leafkernels.treerl(**group, **{**options, **change}), result)
