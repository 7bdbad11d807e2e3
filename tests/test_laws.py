"""Laws of every estimator: against the reference, by hand, and without an oracle. A new one is held to them by its
entry in ``leafkernels.ESTIMATORS`` and its table in ``BY_HAND``."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, Rollouts, assert_rows_close, random_group, rollouts, unequal_prompts, unmasked
from support import (
    compare_with_compiled,
    every_estimator,
    every_estimator_slowly,
    examples,
    expected,
    options_of,
    reference_of,
    takes,
)

import leafkernels
from leafkernels import ESTIMATORS

every_backend = pytest.mark.parametrize("backend", BACKENDS)
LAYOUTS = ("right", "left", "packed")

LATE_BOUNDARY = Rollouts(
    # Rows 0 and 1 are identical and keep a boundary beyond their end, which another row's surprisal put there.
    token_ids=[[0, 1], [0, 1], [1, 1, 0, 1, 1, 0]],
    logprobs=[[-1.0, -0.5], [-1.0, -0.5], [-0.5, -0.5, -0.5, -0.5, -7.0, -0.5]],
    mask=[[True] * 2, [True] * 2, [True] * 6],
    rewards=[1.0, 0.0, 0.5],
    groups=[0, 0, 0],
    options={"num_boundaries": 2},
)
EQUAL_REWARDS = Rollouts(
    token_ids=[[0, 1, 1], [0, 1, 0], [1, 0, 0]] * 2,
    logprobs=[[-1.0, -2.5, -0.5]] * 6,
    mask=[[True] * 3] * 6,
    rewards=[0.30000001192092896] * 6,
    groups=[0] * 6,
)
# One unit of float32's last place at 30 is 2 ** -19: rounding, and no signal.
ROUNDED_REWARDS = unmasked(
    [[0, 1, 1], [0, 1, 0], [1, 0, 0]] * 2, [30.0, 30 + 2**-19, math.nan, 30.0, 30 + 2**-18, 30.0]
)
LARGE_REWARDS = unmasked([[0, 1, 1], [0, 1, 0], [1, 0, 0]] * 2, [100.0, 100 + 2**-17, 0.0, 1e6, 1e6 + 1, 1e6])
LARGE_REWARDS.groups[3:] = [1] * 3
EQUAL_REWARDS_NEAR_BOUNDARIES = unmasked([[0, 1, 1], [0, 1, 0], [1, 0, 0]] * 2, [0.30000001192092896] * 6)
IDENTICAL = unmasked([[0, 1], [0, 1], [0, 1]], [1.0, 0.0, 0.5])
# A row ends where others go on; two of them leave it there together.
PREFIX_OF_OTHERS = unmasked([[0, 1], [0, 1, 1], [0, 1, 0, 0], [0]], [1.0, 0.0, 0.5, -2.0])
EMPTY_ROW = unmasked([[], [0], [0, 1]], [1.0, 0.0, 0.5])
NO_TOKENS = Rollouts([[], [0]], [[], [-1.0]], [[], [False]], [1.0, 0.0], [0, 0])
UNSCORABLE = unmasked([[0, 1], [0, 1], [0, 0]], [math.nan, 1.0, 0.0])
ONLY_UNSCORABLE = Rollouts([[0, 1], [0, 1]], [[-1.0, -1.0]] * 2, [[True] * 2] * 2, [math.nan] * 2, [3, 3])
UNSCORABLE_NEAR_BOUNDARIES = unmasked([[0, 1], [0, 1]], [math.nan, math.nan])


@every_estimator
@every_backend
def test_agrees_with_the_reference(backend: str, name: str, small_blocks: None) -> None:
    # LEAF has most options to cross.
    times = 3 if name == "leaf" else 1

    @examples(backend, torch=150 * times, triton=4 * times, reference=40 * times)
    @example(LATE_BOUNDARY, "right")
    @example(LATE_BOUNDARY, "left")
    @example(LATE_BOUNDARY, "packed")
    @example(EQUAL_REWARDS, "right")
    @example(EQUAL_REWARDS, "left")
    @example(EQUAL_REWARDS, "packed")
    @example(EQUAL_REWARDS_NEAR_BOUNDARIES, "right")
    @example(ROUNDED_REWARDS, "right")
    @example(LARGE_REWARDS, "right")
    @example(IDENTICAL, "packed")
    @example(PREFIX_OF_OTHERS, "packed")
    @example(EMPTY_ROW, "left")
    @example(NO_TOKENS, "right")
    @example(NO_TOKENS, "left")
    @example(NO_TOKENS, "packed")
    @example(UNSCORABLE, "packed")
    @example(ONLY_UNSCORABLE, "right")
    @example(ONLY_UNSCORABLE, "left")
    @example(ONLY_UNSCORABLE, "packed")
    @example(UNSCORABLE_NEAR_BOUNDARIES, "left")
    @given(rollouts(), st.sampled_from(LAYOUTS))
    def check(case: Rollouts, layout: str) -> None:
        inputs = case.packed() if layout == "packed" else case.padded(layout, extra=2)
        advantages = ESTIMATORS[name](**inputs, **options_of(name, case.options), backend=backend)
        assert advantages.dtype == torch.float32
        assert advantages.shape == inputs["token_ids"].shape
        assert_rows_close(case.rows_of(advantages, layout), expected(name, case))
        assert not advantages[~inputs["response_mask"]].any()

    check()


# Tables worked by hand. The mean is 1/4 and the deviation exactly 1/2, which 1e-6 makes a little larger.
ROWS = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8], [1, 2, 9, 9, 9, 9], [1, 2, 9, 9, 8, 8]]
REWARDS = [1.0, 0.0, 0.0, 0.0]
# Surprisal puts the boundaries at 2 and 4.
LOGPROBS = [[-0.1, -0.1, -5.0, -0.1, -3.0, -0.1]] * 4
S = 1 / (0.5 + 1e-6)
THIRD = 1 / 3
ROOT = math.sqrt(0.5)
# Of 6 tokens of right rows and 18 of wrong ones: 3/6 over 1/6 + 1 + 1/2, and 3/18 over 1/18 + 1 + 3/2.
OFTEN, SELDOM = 0.5 / (1 / 6 + 1.5), (1 / 6) / (1 / 18 + 2.5)
# Without the token all are wrong, with it half are right: H(1/4) - 1/2 bits.
GAIN = 0.5 - 0.75 * math.log2(0.75) - 0.5
KEY = math.tanh(
    GAIN * (math.pi / 2 - math.asin(math.sqrt(THIRD)) + OFTEN / (SELDOM + 1e-5) - SELDOM / (OFTEN + 1e-5)) / 4
)
BY_HAND = {
    # Step by step in docs/leaf.md.
    "leaf": [
        [0, 0, ROOT, ROOT, 2.5, 2.5],
        [0, 0, ROOT, ROOT, -1.5, -1.5],
        [0, 0, -ROOT, -ROOT, -0.5, -0.5],
        [0, 0, -ROOT, -ROOT, -0.5, -0.5],
    ],
    "grpo": [[0.75 * S] * 6] + [[-0.25 * S] * 6] * 3,
    "dr_grpo": [[0.75] * 6] + [[-0.25] * 6] * 3,
    "rloo": [[1.0] * 6] + [[-THIRD] * 6] * 3,
    "opo": [[0.75] * 6] + [[-0.25] * 6] * 3,  # all rows are of one length
    "otb": [[0.75] * 6] + [[-0.25] * 6] * 3,  # log-probabilities are the same in all rows
    "qae": [[S] * 6] + [[0.0] * 6] * 3,  # of 0, 0, 0, 1 the second
    "maxrl": [[3.0] * 6] + [[-1.0] * 6] * 3,
    # Half of the six pairs hold row 0; of the three pairs that hold another, one does.
    "pass_at_k": [[0.5 * S] * 6] + [[(THIRD - 0.5) * S] * 6] * 3,
    # Row 0 alone is right. Tokens 1 and 2 are in all rows; 3 and 4 in two, of which one is right: p = 1, and KEY goes
    # with them; those of right rows alone are so often in them that tanh is 1, and those of wrong ones -1.
    "ktae": [
        [0.75 * S] * 2 + [0.75 * S + KEY] * 2 + [0.75 * S + 1] * 2,
        [-0.25 * S] * 2 + [-0.25 * S + KEY] * 2 + [-0.25 * S - 1] * 2,
        [-0.25 * S] * 2 + [-0.25 * S - 1] * 4,
        [-0.25 * S] * 2 + [-0.25 * S - 1] * 4,
    ],
    # V is 1/4 for the first two tokens; then 1/2 for rows 0 and 1, and 0 for the others; then each row's reward.
    "tempo": [
        [0.75 * S, 0.75 * S, 1.0 * S, 0.75 * S, 1.25 * S, 0.75 * S],
        [-0.25 * S, -0.25 * S, 0.0, -0.25 * S, -0.75 * S, -0.25 * S],
        [-0.25 * S, -0.25 * S, -0.5 * S, -0.25 * S, -0.25 * S, -0.25 * S],
        [-0.25 * S, -0.25 * S, -0.5 * S, -0.25 * S, -0.25 * S, -0.25 * S],
    ],
    # V is 1/4; then 1/2 and 0; then 1, 0, and 0 for both others.
    "tree_td": [
        [0.375, 0.375, 0.375 + 0.25, 0.375, 0.375 + 0.5, 0.375],
        [-0.125, -0.125, -0.125 + 0.25, -0.125, -0.125 - 0.5, -0.125],
        [-0.125, -0.125, -0.125 - 0.25, -0.125, -0.125, -0.125],
        [-0.125, -0.125, -0.125 - 0.25, -0.125, -0.125, -0.125],
    ],
    # Centred rewards 1, -1/3, -1/3, -1/3: V = 0 at boundary 2 (n = 4), 1/3 and -1/3 at boundary 4 (n = 2).
    "treerl": [
        [0, 0, 2 * THIRD * ROOT, 2 * THIRD * ROOT] + [2 - THIRD * ROOT] * 2,
        [0, 0, 2 * THIRD * ROOT, 2 * THIRD * ROOT] + [-2 * THIRD - THIRD * ROOT] * 2,
        [0, 0, -2 * THIRD * ROOT, -2 * THIRD * ROOT] + [-2 * THIRD + THIRD * ROOT] * 2,
        [0, 0, -2 * THIRD * ROOT, -2 * THIRD * ROOT] + [-2 * THIRD + THIRD * ROOT] * 2,
    ],
}


@every_estimator
def test_reference_by_hand(name: str) -> None:
    result = torch.tensor(reference_of(name)(LOGPROBS, ROWS, REWARDS), dtype=torch.float64)
    torch.testing.assert_close(result, torch.tensor(BY_HAND[name], dtype=torch.float64), rtol=0, atol=1e-12)


@every_backend
@every_estimator
def test_by_hand(name: str, backend: str) -> None:
    advantages = ESTIMATORS[name](
        torch.tensor(LOGPROBS, device=DEVICE),
        torch.tensor(ROWS, device=DEVICE),
        torch.tensor(REWARDS, device=DEVICE),
        backend=backend,
    )
    assert_rows_close(advantages.tolist(), BY_HAND[name])


# Generated cases, by the names of docs/leaf.md. These laws hold for any backend; the fast one can afford many cases.


@every_estimator_slowly
def test_equivariance(name: str) -> None:
    """Rewards shifted, scaled and flipped."""
    if not ESTIMATORS[name].is_shift_invariant:
        pytest.skip("does not promise it")

    @examples(torch=150 if name == "leaf" else 60)
    @given(rollouts(), st.sampled_from([2.0, 0.25]), st.sampled_from([-5.0, 8.0]))
    def check(case: Rollouts, scale: float, shift: float) -> None:
        inputs, options = case.padded(), options_of(name, case.options)
        rewards = inputs.pop("rewards").double()

        def advantages(r: torch.Tensor) -> torch.Tensor:
            return ESTIMATORS[name](**inputs, rewards=r, **options)

        before = advantages(rewards)
        near: dict[str, Any] = {"rtol": 1e-5 if name == "leaf" else 1e-6, "atol": 1e-6}
        if options.get("normalize") == "reward_std":  # the one mode with an absolute constant beside the deviation
            torch.testing.assert_close(advantages(rewards + shift), before, rtol=1e-6, atol=1e-6)
            return
        torch.testing.assert_close(advantages(rewards + shift), before, **near)
        if ESTIMATORS[name].is_odd:
            torch.testing.assert_close(advantages(-rewards), -before, **near)
        if ESTIMATORS[name].normalization == "reward_std":
            # The deviations of the generated rewards are at least 0.1, to which 1e-6 is added: 1 + 1e-5, times 4.
            torch.testing.assert_close(advantages(rewards * scale), before, rtol=5e-5, atol=1e-6)
        else:
            is_scaled = options.get("normalize", "none") == "none"
            torch.testing.assert_close(advantages(rewards * scale), before * scale if is_scaled else before, **near)

    check()


@every_estimator_slowly
def test_layout_invariance(name: str) -> None:
    """Layout, padding and the names of tokens change nothing."""

    @examples(torch=150 if name == "leaf" else 60)
    @given(rollouts(), st.integers(0, 4), st.randoms(use_true_random=False))
    def check(case: Rollouts, extra: int, rng: Any) -> None:
        options = options_of(name, case.options)

        def rows(inputs: dict[str, torch.Tensor], side: str = "right") -> list[list[float]]:
            return case.rows_of(ESTIMATORS[name](**inputs, **options), side)

        before = rows(case.padded())
        for side in ("right", "left"):
            assert rows(case.padded(side, extra), side) == before
        assert rows(case.packed()) == before
        inputs = case.padded()
        names = dict(enumerate(rng.sample(range(9), 9)))
        renamed = [[names[t] * 10**15 - 3 for t in row] for row in inputs["token_ids"].tolist()]
        inputs["token_ids"] = torch.tensor(renamed, dtype=torch.int64, device=DEVICE).reshape(inputs["token_ids"].shape)
        assert rows(inputs) == before

    check()


@every_estimator_slowly
def test_prompt_independence(name: str) -> None:
    """Other prompts of the call change nothing."""

    @examples(torch=100 if name == "leaf" else 50)
    @given(rollouts())
    def check(case: Rollouts) -> None:
        options = options_of(name, case.options)
        if options.get("normalize") == "batch":  # of the call, by definition
            options["normalize"] = "span"
        together = ESTIMATORS[name](**case.padded(), **options)
        for prompt in set(case.groups):
            inputs = case.padded()
            rows = inputs.pop("groups") == prompt
            alone = ESTIMATORS[name](**{k: v[rows] for k, v in inputs.items()}, **options)
            # As a tensor of groups wider than the prompt: the table of the members is then padded.
            torch.testing.assert_close(alone, together[rows], rtol=0, atol=0)

    check()


@every_estimator
@given(seed=st.integers(0, 10**6), size=st.sampled_from([5, 6]), rng=st.randoms(use_true_random=False))
@examples(torch=40)
def test_row_order_invariance(name: str, seed: int, size: int, rng: Any) -> None:
    """The order of rows changes nothing where scores are distinct."""
    group = random_group(size, 9, seed, vocabulary=2)
    order = rng.sample(range(size), size)
    ordered = ESTIMATORS[name](**group)[order]
    shuffled = ESTIMATORS[name](**{k: v[order] for k, v in group.items()})
    torch.testing.assert_close(shuffled, ordered, rtol=1e-6, atol=1e-8)


# Inputs of every form.


@every_estimator
@every_backend
def test_forms_of_prompts(backend: str, name: str) -> None:
    """One prompt a call, a batch of prompts, runs of rows, prompts named in any order, packed rows: all the same."""
    groups = [random_group(3, 9, seed, vocabulary=2) for seed in range(2)]
    stacked = {key: torch.stack([g[key] for g in groups]) for key in groups[0]}
    alone = torch.stack([ESTIMATORS[name](**g, backend=backend) for g in groups])
    torch.testing.assert_close(ESTIMATORS[name](**stacked, backend=backend), alone, rtol=0, atol=0)
    flat = {key: t.flatten(0, 1) for key, t in stacked.items()}
    runs = ESTIMATORS[name](**flat, group_size=3, backend=backend)
    torch.testing.assert_close(runs, alone.flatten(0, 1), rtol=0, atol=0)
    order = torch.arange(6, device=DEVICE).reshape(2, 3).T.flatten()  # a row of each prompt in turn
    shuffled = {key: t[order] for key, t in flat.items()}
    named = ESTIMATORS[name](**shuffled, groups=7 - order // 3, backend=backend)
    torch.testing.assert_close(named, runs[order], rtol=0, atol=0)
    packed = {key: t.flatten() for key, t in flat.items()}
    bounds = torch.arange(0, 55, 9, dtype=torch.int32, device=DEVICE)
    one_line = ESTIMATORS[name](**packed, cu_seqlens=bounds, group_size=3, backend=backend)
    torch.testing.assert_close(one_line, runs.flatten(), rtol=0, atol=0)


@every_backend
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (2, 3, 0)])
def test_empty_inputs_have_an_answer(backend: str, shape: tuple[int, ...]) -> None:
    tokens = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    call = torch.zeros(shape, device=DEVICE), tokens, torch.zeros(shape[:-1], device=DEVICE)
    for name in ESTIMATORS:
        result = ESTIMATORS[name](*call, backend=backend)
        assert (name, result.shape) == (name, shape)
        assert result.dtype == torch.float32


@every_backend
def test_no_packed_rows_at_all(backend: str) -> None:
    nothing = torch.zeros(0, device=DEVICE)
    bounds = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for name in ESTIMATORS:
        result = ESTIMATORS[name](nothing, nothing.long(), nothing, cu_seqlens=bounds, backend=backend)
        assert (name, result.shape) == (name, (0,))


@every_estimator
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strided_views_are_read_in_place(backend: str, name: str) -> None:
    """Responses cut out of prompt-and-response tensors, transposed batches, and expanded masks."""
    group = random_group(5, 24, seed=3)
    by_reference = ESTIMATORS[name](**group, backend="reference")
    wide_ids = torch.full((5, 40), -1, device=DEVICE)
    wide_ids[:, 9:33] = group["token_ids"]
    wide_logprobs = torch.full((5, 40), -50.0, device=DEVICE)
    wide_logprobs[:, 9:33] = group["logprobs"]
    views = wide_logprobs[:, 9:33], wide_ids[:, 9:33], group["rewards"]
    mask = torch.ones(1, 1, dtype=torch.bool, device=DEVICE).expand(5, 24)
    for response_mask in (None, mask):
        advantages = ESTIMATORS[name](*views, response_mask=response_mask, backend=backend)
        torch.testing.assert_close(advantages, by_reference, rtol=2e-7, atol=1e-8)
    transposed = group["logprobs"].T.contiguous().T, group["token_ids"].T.contiguous().T, group["rewards"]
    advantages = ESTIMATORS[name](*transposed, backend=backend)
    torch.testing.assert_close(advantages, by_reference, rtol=2e-7, atol=1e-8)


@every_estimator
@every_backend
def test_integer_rewards_and_masks(backend: str, name: str) -> None:
    group = random_group(4, 10, seed=5)
    rewards = torch.tensor([1, 0, 0, 1], device=DEVICE)
    mask = torch.ones(4, 10, device=DEVICE)
    mask[2, 6:] = 0
    rows = group["logprobs"], group["token_ids"]
    floats = ESTIMATORS[name](*rows, rewards.float(), response_mask=mask.bool(), backend=backend)
    for dtype in (torch.float32, torch.int64, torch.uint8):
        advantages = ESTIMATORS[name](*rows, rewards, response_mask=mask.to(dtype), backend=backend)
        torch.testing.assert_close(advantages, floats, rtol=0, atol=0)


@every_estimator
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_repeats_bit_for_bit(backend: str, name: str) -> None:
    group = random_group(8, 64, seed=6)
    first = ESTIMATORS[name](**group, backend=backend)
    for _ in range(3):
        assert torch.equal(first, ESTIMATORS[name](**group, backend=backend))


@pytest.mark.parametrize(("dtype", "reward"), [(torch.float32, 0.3), (torch.float64, 0.1)])
@every_estimator
@every_backend
def test_equal_rewards_and_single_rows_give_exactly_zero(
    backend: str, name: str, dtype: torch.dtype, reward: float
) -> None:
    """Six times 0.3 in float32, or 0.1 in float64, have a mean that is another number."""
    flat, mixed = random_group(6, 12, seed=0, vocabulary=2), random_group(6, 12, seed=1, vocabulary=2)
    both = {key: torch.stack([flat[key], mixed[key]]) for key in flat}
    both["rewards"] = both["rewards"].to(dtype)
    both["rewards"][0] = reward
    result = ESTIMATORS[name](**both, backend=backend)
    assert torch.equal(result[0], torch.zeros_like(result[0]))
    assert result[1].any()
    alone = ESTIMATORS[name](**{key: t.flatten(0, 1) for key, t in both.items()}, group_size=1, backend=backend)
    assert torch.equal(alone, torch.zeros_like(alone))


def prompts_of(rewards: list[list[float]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A prompt of six rows for each list of rewards."""
    groups = [random_group(6, 12, seed, vocabulary=2) for seed in range(len(rewards))]
    both = {key: torch.stack([group[key] for group in groups]) for key in groups[0]}
    return both | {"rewards": torch.tensor(rewards, dtype=torch.float64, device=DEVICE).to(dtype)}


def every_normalization(name: str) -> list[dict[str, str]]:
    if not takes(name, "normalize"):
        return [{}]
    return [{"normalize": n} for n in (("span", "batch", "reward_std") if name == "leaf" else ("none", "reward_std"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_estimator
@pytest.mark.parametrize("backend", ["torch", "reference"])  # Triton's has its cases above, and in test_values.py
def test_rewards_that_differ_by_rounding_alone_give_exactly_zero(backend: str, name: str, dtype: torch.dtype) -> None:
    """They are one number, known to float32: (a + b) + c and a + (b + c) are not two rewards."""
    one_unit = [30.0] * 5 + [30 + 2**-19]
    terms = torch.tensor([[1.1, 0.3, 0.7], [1.1, 0.7, 0.3]] * 3)
    summed = [float(row[0] + row[1] + row[2]) for row in terms]
    assert len(set(summed)) == 2
    rounded = [
        one_unit,
        [-r for r in one_unit],
        [100.0, math.nan, 100 + 2**-17] * 2,
        [2.5e8 + 16, *[2.5e8] * 5],
        summed,
    ]
    inputs = prompts_of([*rounded, [1.0, 0.0, 0.5, 0.25, 0.0, 1.0]], dtype)
    for options in every_normalization(name):
        result = ESTIMATORS[name](**inputs, **options, backend=backend)
        assert torch.equal(result[:5], torch.zeros_like(result[:5]))
        assert result[5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_estimator
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rewards_that_differ_by_more_than_rounding_are_a_signal(backend: str, name: str, dtype: torch.dtype) -> None:
    """Beside a large mean, and however small all are."""
    steps = ((1e6, 1.0), (-1e6, 1.0), (1e7, 1.0), (30.0, 2**-15), (0.0, 1e-8), (1e-8, 1e-9), (0.0, 1e-30))
    inputs = prompts_of([[offset + scale, *[offset] * 5] for offset, scale in steps], dtype)
    for options in every_normalization(name):
        result = ESTIMATORS[name](**inputs, **options, backend=backend)
        assert all(prompt.any() for prompt in result)


# Gradients to the rewards.


@every_backend
@every_estimator
def test_gradient_of_the_rewards(name: str, backend: str) -> None:
    """Against differences of the reference, which is float64: their step of 1e-5 leaves an error of about 1e-10."""
    group = random_group(5, 9, seed=3, vocabulary=2)
    logprobs, ids = group["logprobs"].tolist(), group["token_ids"].tolist()
    weights = torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    rewards = [0.5, -1.0, 0.25, 2.0, 0.75]

    def reference(r: list[float]) -> float:
        result = torch.tensor(reference_of(name)(logprobs, ids, r), dtype=torch.float64)
        return float((result * weights).sum())

    leaf = torch.tensor(rewards, dtype=torch.float64, device=DEVICE).requires_grad_()
    result = ESTIMATORS[name](group["logprobs"], group["token_ids"], leaf, backend=backend)
    (result * weights.to(DEVICE)).sum().backward()
    step = 1e-5
    slopes = []
    for i in range(5):
        up, down = ([r + (j == i) * h for j, r in enumerate(rewards)] for h in (step, -step))
        slopes.append((reference(up) - reference(down)) / (2 * step))
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.cpu(), torch.tensor(slopes, dtype=torch.float64), rtol=0, atol=1e-8)


@every_estimator
def test_gradients_are_finite_and_unscorable_rows_have_none(name: str) -> None:
    groups = [random_group(4, 9, seed, vocabulary=2) for seed in range(3)]
    inputs = {key: torch.stack([g[key] for g in groups]) for key in groups[0]}
    rewards = torch.tensor(
        [[0.3, 0.3, 0.3, 0.3], [1.0, math.nan, 0.0, 0.5], [math.nan] * 4], dtype=torch.float64, device=DEVICE
    ).requires_grad_()
    result = ESTIMATORS[name](inputs["logprobs"], inputs["token_ids"], rewards)
    weights = torch.rand(result.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (result * weights).sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.isfinite().all()
    assert not rewards.grad[rewards.isnan()].any()
    assert rewards.grad[1, 0] != 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name"),
    [*(("torch", name) for name in ESTIMATORS), *(("triton", name) for name in ("grpo", "leaf", "tree_td"))],
)
def test_torch_compile(backend: str, name: str) -> None:
    """In one graph, with the gradients of the rewards. A graph has the same operations on either backend."""
    group = random_group(6, 20, seed=4, vocabulary=2)

    def loss(logprobs: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        call = logprobs.detach(), group["token_ids"], rewards
        return (ESTIMATORS[name](*call, group_size=3, backend=backend) * logprobs).sum()

    compare_with_compiled(loss, group["logprobs"], group["rewards"])


BAD_CALLS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "list of token_ids": lambda good: {"token_ids": [[1]]},
    "float token_ids": lambda good: {"token_ids": good["logprobs"]},
    "integer logprobs": lambda good: {"logprobs": good["token_ids"]},
    "shape of logprobs": lambda good: {"logprobs": good["logprobs"][:, :3]},
    "shape of rewards": lambda good: {"rewards": good["rewards"][:3]},
    "bool rewards": lambda good: {"rewards": good["rewards"].bool()},
    "shape of response_mask": lambda good: {"response_mask": good["logprobs"].T},
    "groups": lambda good: {"groups": good["rewards"]},
    "group_size": lambda good: {"group_size": 3},
    "cu_seqlens": lambda good: {"cu_seqlens": torch.tensor([0, 6], device=DEVICE)},
    "backend": lambda good: {"backend": "cuda"},
}
BAD_BOUNDARIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "num_boundaries": lambda good: {"num_boundaries": -1},
    "min_separation": lambda good: {"min_separation": 0},
    "shape of boundary_scores": lambda good: {"boundary_scores": good["logprobs"].flatten()},
    "integer boundary_scores": lambda good: {"boundary_scores": good["token_ids"]},
}


@every_estimator
def test_errors_are_those_of_span_advantages(name: str) -> None:
    """Whose texts tests/test_errors.py has."""
    good = {"logprobs": torch.zeros(4, 6), "token_ids": torch.zeros(4, 6, dtype=torch.int64), "rewards": torch.zeros(4)}
    good = {key: t.to(DEVICE) for key, t in good.items()}
    for bad in [*BAD_CALLS.values(), *(BAD_BOUNDARIES.values() if takes(name, "num_boundaries") else ())]:
        call = {**good, **bad(good)}
        with pytest.raises((TypeError, ValueError)) as theirs:
            leafkernels.span_advantages(**call)
        with pytest.raises(type(theirs.value)) as ours:
            ESTIMATORS[name](**call)
        assert str(ours.value) == str(theirs.value)


# ---- prompts of unequal sizes in one call: no prompt reads another's rewards, forward or backward


IDS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def with_gradient(name: str, inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages, and what their weighted sum, each prompt's on its own scale, gives the rewards."""
    rewards = inputs["rewards"].double().requires_grad_()
    result = ESTIMATORS[name](**{**inputs, "rewards": rewards}, **options)
    weights = torch.linspace(1, 2, result.shape[1], device=DEVICE) * (1 + inputs["token_ids"])
    (gradient,) = torch.autograd.grad((result * weights).sum(), rewards)
    return result.detach(), gradient


@pytest.mark.slow
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
            for found, single in zip(together, alone, strict=True):
                torch.testing.assert_close(found[rows], single, rtol=1e-9, atol=1e-9, equal_nan=True)
                if not inputs["rewards"][rows].isinf().any():
                    assert found[rows].isfinite().all()

    check()


@pytest.mark.slow
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
    if name != "pass_at_k":  # which has one pair there
        assert advantages[[0, 1]].any()  # of two rewards, the scores are constants


@pytest.mark.slow
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


# ---- integers of every dtype: what PyTorch only stores is computed with as well, and compared bit for bit


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
