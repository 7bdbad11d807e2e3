"""The other estimators: against the reference on generated rollouts, by hand, and the laws without an oracle."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, Rollouts, assert_rows_close, random_group, rollouts

import leafkernels
import python_ref
from leafkernels.credit.differences import _tempo_spans
from leafkernels.rows.rollouts import read_rollouts

NAMES = ("grpo", "dr_grpo", "rloo", "tempo", "treerl")
BOUNDARY_OPTIONS = ("num_boundaries", "min_separation")
# A case of all five takes the interpreter half a second.
EXAMPLES = {"torch": 150, "triton": 150 if DEVICE == "cuda" else 8, "reference": 40}


def options_of(name: str, case: Rollouts) -> dict[str, Any]:
    return {k: case.options[k] for k in BOUNDARY_OPTIONS if k in case.options} if name == "treerl" else {}


def advantages(name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    return getattr(leafkernels, name)(*args, **kwargs)


def expected(name: str, case: Rollouts) -> list[list[float]]:
    return getattr(python_ref, name)(
        case.logprobs,
        case.token_ids,
        case.rewards,
        response_mask=case.mask,
        groups=case.groups,
        **options_of(name, case),
    )


def unmasked(rows: list[list[int]], rewards: list[float]) -> Rollouts:
    """One prompt without padding or holes."""
    return Rollouts(
        rows,
        [[-0.5 * (t % 3) for t in range(len(row))] for row in rows],
        [[True] * len(row) for row in rows],
        rewards,
        [0] * len(rows),
        {"num_boundaries": 2, "min_separation": 1},
    )


EQUAL_REWARDS = unmasked([[0, 1, 1], [0, 1, 0], [1, 0, 0]] * 2, [0.30000001192092896] * 6)
IDENTICAL = unmasked([[0, 1], [0, 1], [0, 1]], [1.0, 0.0, 0.5])
# A row ends where others go on; two of them leave it there together.
PREFIX_OF_OTHERS = unmasked([[0, 1], [0, 1, 1], [0, 1, 0, 0], [0]], [1.0, 0.0, 0.5, -2.0])
EMPTY_ROW = unmasked([[], [0], [0, 1]], [1.0, 0.0, 0.5])
NO_TOKENS = Rollouts([[], [0]], [[], [-1.0]], [[], [False]], [1.0, 0.0], [0, 0])
UNSCORABLE = unmasked([[0, 1], [0, 1], [0, 0]], [math.nan, 1.0, 0.0])
ONLY_UNSCORABLE = unmasked([[0, 1], [0, 1]], [math.nan, math.nan])


@pytest.mark.parametrize("backend", BACKENDS)
def test_agree_with_the_reference(backend: str, small_blocks: None) -> None:
    @settings(max_examples=EXAMPLES[backend])
    @example(EQUAL_REWARDS, "right")
    @example(IDENTICAL, "packed")
    @example(PREFIX_OF_OTHERS, "packed")
    @example(EMPTY_ROW, "left")
    @example(NO_TOKENS, "right")
    @example(UNSCORABLE, "packed")
    @example(ONLY_UNSCORABLE, "left")
    @given(rollouts(), st.sampled_from(["right", "left", "packed"]))
    def check(case: Rollouts, layout: str) -> None:
        inputs = case.packed() if layout == "packed" else case.padded(layout, extra=2)
        for name in NAMES:
            tokens = advantages(name, **inputs, **options_of(name, case), backend=backend)
            assert tokens.dtype == torch.float32
            assert tokens.shape == inputs["token_ids"].shape
            assert_rows_close(case.rows_of(tokens, layout), expected(name, case))
            assert not tokens[~inputs["response_mask"]].any()

    check()


# Tables worked by hand. The mean is 1/4 and the deviation exactly 1/2, which 1e-6 makes a little larger.
ROWS = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8], [1, 2, 9, 9, 9, 9], [1, 2, 9, 9, 8, 8]]
REWARDS = [1.0, 0.0, 0.0, 0.0]
# Surprisal puts the boundaries at 2 and 4.
LOGPROBS = [[-0.1, -0.1, -5.0, -0.1, -3.0, -0.1]] * 4
S = 1 / (0.5 + 1e-6)
THIRD = 1 / 3
ROOT = math.sqrt(0.5)
BY_HAND = {
    "grpo": [[0.75 * S] * 6] + [[-0.25 * S] * 6] * 3,
    "dr_grpo": [[0.75] * 6] + [[-0.25] * 6] * 3,
    "rloo": [[1.0] * 6] + [[-THIRD] * 6] * 3,
    # V is 1/4 for the first two tokens; then 1/2 for rows 0 and 1, and 0 for the others; then each row's reward.
    "tempo": [
        [0.75 * S, 0.75 * S, 1.0 * S, 0.75 * S, 1.25 * S, 0.75 * S],
        [-0.25 * S, -0.25 * S, 0.0, -0.25 * S, -0.75 * S, -0.25 * S],
        [-0.25 * S, -0.25 * S, -0.5 * S, -0.25 * S, -0.25 * S, -0.25 * S],
        [-0.25 * S, -0.25 * S, -0.5 * S, -0.25 * S, -0.25 * S, -0.25 * S],
    ],
    # Centred rewards 1, -1/3, -1/3, -1/3: V = 0 at boundary 2 (n = 4), 1/3 and -1/3 at boundary 4 (n = 2).
    "treerl": [
        [0, 0, 2 * THIRD * ROOT, 2 * THIRD * ROOT] + [2 - THIRD * ROOT] * 2,
        [0, 0, 2 * THIRD * ROOT, 2 * THIRD * ROOT] + [-2 * THIRD - THIRD * ROOT] * 2,
        [0, 0, -2 * THIRD * ROOT, -2 * THIRD * ROOT] + [-2 * THIRD + THIRD * ROOT] * 2,
        [0, 0, -2 * THIRD * ROOT, -2 * THIRD * ROOT] + [-2 * THIRD + THIRD * ROOT] * 2,
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_reference_by_hand(name: str) -> None:
    result = torch.tensor(getattr(python_ref, name)(LOGPROBS, ROWS, REWARDS), dtype=torch.float64)
    torch.testing.assert_close(result, torch.tensor(BY_HAND[name], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_by_hand(name: str, backend: str) -> None:
    tokens = advantages(
        name,
        torch.tensor(LOGPROBS, device=DEVICE),
        torch.tensor(ROWS, device=DEVICE),
        torch.tensor(REWARDS, device=DEVICE),
        backend=backend,
    )
    assert_rows_close(tokens.tolist(), BY_HAND[name])


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


def test_tempo_leaves_what_differs_at_a_hole_to_no_token() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 4, 3]], device=DEVICE)
    mask = torch.tensor([[True, False, True]] * 2, device=DEVICE)
    rewards = torch.tensor([1.0, 0.0], device=DEVICE)
    logprobs = torch.zeros(2, 3, device=DEVICE)
    with_hole = leafkernels.tempo(logprobs, ids, rewards, response_mask=mask)
    torch.testing.assert_close(with_hole, leafkernels.grpo(logprobs, ids, rewards, response_mask=mask))
    assert leafkernels.tempo(logprobs, ids, rewards)[0, 1] > with_hole[0, 0]


@given(rollouts())
@settings(max_examples=50)
def test_spans_of_tempo_are_what_the_scatter_takes(case: Rollouts) -> None:
    """Ascending, also where rows leave together, and up to the last token of each row that has a reward."""
    inputs = case.padded()
    mask, groups = inputs["response_mask"], inputs["groups"]
    call = inputs["logprobs"], inputs["token_ids"], inputs["rewards"], mask, groups, None, None, "torch"
    rollouts = read_rollouts(*call)
    values, ends = _tempo_spans(rollouts)
    assert values.shape == ends.shape
    assert (ends.diff(dim=1) >= 0).all()
    assert (ends >= 0).all()
    assert torch.equal(ends[:, -1].long(), rollouts.layout.row_lengths)


# The laws. They hold for any backend; the fast one can afford many cases.


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_shifting_scaling_and_flipping_rewards(name: str) -> None:
    @given(rollouts(), st.sampled_from([2.0, 0.25]), st.sampled_from([-5.0, 8.0]))
    @settings(max_examples=60)
    def check(case: Rollouts, scale: float, shift: float) -> None:
        inputs = case.padded()
        rewards = inputs.pop("rewards").double()

        def of(r: torch.Tensor) -> torch.Tensor:
            return advantages(name, **inputs, rewards=r, **options_of(name, case))

        before = of(rewards)
        torch.testing.assert_close(of(rewards + shift), before, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(of(-rewards), -before, rtol=1e-6, atol=1e-6)
        if name in ("grpo", "tempo"):
            # The deviations of the generated rewards are at least 0.1, to which 1e-6 is added: 1 + 1e-5, times 4.
            torch.testing.assert_close(of(rewards * scale), before, rtol=5e-5, atol=1e-6)
        else:
            torch.testing.assert_close(of(rewards * scale), before * scale, rtol=1e-6, atol=1e-6)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_layout_padding_and_names_of_tokens_change_nothing(name: str) -> None:
    @given(rollouts(), st.integers(0, 4), st.randoms(use_true_random=False))
    @settings(max_examples=60)
    def check(case: Rollouts, extra: int, rng: Any) -> None:
        of = options_of(name, case)
        expected = case.rows_of(advantages(name, **case.padded(), **of))
        for side in ("right", "left"):
            assert case.rows_of(advantages(name, **case.padded(side, extra), **of), side) == expected
        assert case.rows_of(advantages(name, **case.packed(), **of)) == expected
        inputs = case.padded()
        names = dict(enumerate(rng.sample(range(9), 9)))
        renamed = [[names[t] * 10**15 - 3 for t in row] for row in inputs["token_ids"].tolist()]
        inputs["token_ids"] = torch.tensor(renamed, dtype=torch.int64, device=DEVICE).reshape(inputs["token_ids"].shape)
        assert case.rows_of(advantages(name, **inputs, **of)) == expected

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_other_prompts_change_nothing(name: str) -> None:
    @given(rollouts())
    @settings(max_examples=50)
    def check(case: Rollouts) -> None:
        together = advantages(name, **case.padded(), **options_of(name, case))
        for prompt in set(case.groups):
            inputs = case.padded()
            rows = inputs.pop("groups") == prompt
            alone = advantages(name, **{k: v[rows] for k, v in inputs.items()}, **options_of(name, case))
            # As a tensor of groups wider than the prompt: the table of the members is then padded.
            torch.testing.assert_close(alone, together[rows], rtol=0, atol=0)

    check()


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), rng=st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_row_order_changes_nothing(name: str, seed: int, rng: Any) -> None:
    group = random_group(6, 9, seed, vocabulary=2)
    order = rng.sample(range(6), 6)
    expected = advantages(name, **group)[order]
    shuffled = advantages(name, **{k: v[order] for k, v in group.items()})
    torch.testing.assert_close(shuffled, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_prompts_and_runs_of_rows(backend: str, name: str) -> None:
    groups = [random_group(4, 12, seed, vocabulary=2) for seed in range(3)]
    stacked = {key: torch.stack([g[key] for g in groups]) for key in groups[0]}
    expected = torch.stack([advantages(name, **g, backend=backend) for g in groups])
    torch.testing.assert_close(advantages(name, **stacked, backend=backend), expected, rtol=0, atol=0)
    flat = {key: t.flatten(0, 1) for key, t in stacked.items()}
    torch.testing.assert_close(
        advantages(name, **flat, group_size=4, backend=backend), expected.flatten(0, 1), rtol=0, atol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (2, 3, 0)])
def test_empty_inputs_have_an_answer(backend: str, shape: tuple[int, ...]) -> None:
    tokens = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    for name in NAMES:
        result = advantages(
            name, torch.zeros(shape, device=DEVICE), tokens, torch.zeros(shape[:-1], device=DEVICE), backend=backend
        )
        assert result.shape == shape
        assert result.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "reward"), [(torch.float32, 0.3), (torch.float64, 0.1)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rewards_and_single_rows_give_exactly_zero(
    backend: str, name: str, dtype: torch.dtype, reward: float
) -> None:
    """Six times 0.3 in float32, or 0.1 in float64, have a mean that is another number."""
    flat, mixed = random_group(6, 12, seed=0, vocabulary=2), random_group(6, 12, seed=1, vocabulary=2)
    both = {key: torch.stack([flat[key], mixed[key]]) for key in flat}
    both["rewards"] = both["rewards"].to(dtype)
    both["rewards"][0] = reward
    result = advantages(name, **both, backend=backend)
    assert torch.equal(result[0], torch.zeros_like(result[0]))
    assert result[1].any()
    alone = advantages(name, **{key: t.flatten(0, 1) for key, t in both.items()}, group_size=1, backend=backend)
    assert torch.equal(alone, torch.zeros_like(alone))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_neither_logprobs_nor_tokens_matter_to_estimators_of_whole_rollouts(name: str) -> None:
    first, second = random_group(5, 8, seed=1), random_group(5, 8, seed=2)
    result = advantages(name, **first)
    assert torch.equal(result, advantages(name, second["logprobs"], second["token_ids"], first["rewards"]))
    assert torch.equal(result, result[:, :1].expand(result.shape))
    garbage = torch.full_like(first["logprobs"], math.nan)
    assert torch.equal(leafkernels.tempo(**first), leafkernels.tempo(garbage, first["token_ids"], first["rewards"]))


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


@given(rollouts())
@settings(max_examples=100)
def test_estimators_of_whole_rollouts_are_multiples_of_each_other(case: Rollouts) -> None:
    inputs = case.padded()
    grpo, dr_grpo, rloo = (advantages(name, **inputs) for name in ("grpo", "dr_grpo", "rloo"))
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
@settings(max_examples=60)
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


@given(rollouts())
@settings(max_examples=150)
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
@settings(max_examples=100)
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


@given(seed=st.integers(0, 10**6), num_boundaries=st.integers(1, 4))
@settings(max_examples=40)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_rewards(name: str, backend: str) -> None:
    """Against differences of the reference, which is float64: their step of 1e-5 leaves an error of about 1e-10."""
    group = random_group(5, 9, seed=3, vocabulary=2)
    logprobs, ids = group["logprobs"].tolist(), group["token_ids"].tolist()
    weights = torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    rewards = [0.5, -1.0, 0.25, 2.0, 0.75]

    def reference(r: list[float]) -> float:
        result = torch.tensor(getattr(python_ref, name)(logprobs, ids, r), dtype=torch.float64)
        return float((result * weights).sum())

    leaf = torch.tensor(rewards, dtype=torch.float64, device=DEVICE).requires_grad_()
    result = advantages(name, group["logprobs"], group["token_ids"], leaf, backend=backend)
    (result * weights.to(DEVICE)).sum().backward()
    step = 1e-5
    slopes = []
    for i in range(5):
        up, down = ([r + (j == i) * h for j, r in enumerate(rewards)] for h in (step, -step))
        slopes.append((reference(up) - reference(down)) / (2 * step))
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.cpu(), torch.tensor(slopes, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_and_unscorable_rows_have_none(name: str) -> None:
    groups = [random_group(4, 9, seed, vocabulary=2) for seed in range(3)]
    inputs = {key: torch.stack([g[key] for g in groups]) for key in groups[0]}
    rewards = torch.tensor(
        [[0.3, 0.3, 0.3, 0.3], [1.0, math.nan, 0.0, 0.5], [math.nan] * 4], dtype=torch.float64, device=DEVICE
    ).requires_grad_()
    result = advantages(name, inputs["logprobs"], inputs["token_ids"], rewards)
    weights = torch.rand(result.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (result * weights).sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.isfinite().all()
    assert not rewards.grad[rewards.isnan()].any()
    assert rewards.grad[1, 0] != 0


def test_tempo_and_grpo_have_one_gradient_behind_the_parting() -> None:
    """Also where all rewards are equal, and the slope of their deviation is taken as 0."""
    ids = torch.tensor([[1, 5], [2, 5], [3, 5]], device=DEVICE)
    weights = torch.tensor([[0.0, 0.5], [0.0, -1.0], [0.0, 2.0]], device=DEVICE)
    for rewards in ([0.5, 0.5, 0.5], [1.0, 0.0, 0.25]):
        gradients = []
        for name in ("tempo", "grpo"):
            leaf = torch.tensor(rewards, dtype=torch.float64, device=DEVICE).requires_grad_()
            (advantages(name, torch.zeros(3, 2, device=DEVICE), ids, leaf) * weights).sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_span_advantages(name: str) -> None:
    """Whose texts tests/test_errors.py has."""
    good = {"logprobs": torch.zeros(4, 6), "token_ids": torch.zeros(4, 6, dtype=torch.int64), "rewards": torch.zeros(4)}
    good = {key: t.to(DEVICE) for key, t in good.items()}
    for bad in [*BAD_CALLS.values(), *(BAD_BOUNDARIES.values() if name == "treerl" else ())]:
        call = {**good, **bad(good)}
        with pytest.raises((TypeError, ValueError)) as theirs:
            leafkernels.span_advantages(**call)
        with pytest.raises(type(theirs.value)) as ours:
            advantages(name, **call)
        assert str(ours.value) == str(theirs.value)
