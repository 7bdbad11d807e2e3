"""Rewards at any token and of several functions, in every estimator; tests/test_laws.py has what holds without them."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, Rollouts, assert_rows_close, random_group, rollouts
from support import compare_with_compiled, every_estimator, examples, options_of, reference_of, takes

import leafkernels
import python_ref
from leafkernels import ESTIMATORS
from python_ref.find import stretch

pytestmark = pytest.mark.usefixtures("poisoned_memory")

every_backend = pytest.mark.parametrize("backend", BACKENDS)
LAYOUTS = ("right", "left", "packed")
ROW_SCHEMES = [name for name in ESTIMATORS if takes(name, "steps")]
STEP_REWARDS = (0.0, 0.0, 1.0, -0.5, 0.30000001192092896, 2.0)


@st.composite
def step_rewards(draw: st.DrawFn, case: Rollouts, values: tuple[float, ...] = STEP_REWARDS) -> list[list[float]]:
    """One for each stored token; NaN outside of the rows, where nothing reads them, and seldom within."""
    found = []
    for mask in case.mask:
        start, end = stretch(mask)
        row = [math.nan] * len(mask)
        row[start:end] = draw(st.lists(st.sampled_from(values), min_size=end - start, max_size=end - start))
        if end > start and draw(st.integers(0, 19)) == 0:
            row[draw(st.integers(start, end - 1))] = math.nan
        found.append(row)
    return found


@st.composite
def names(draw: st.DrawFn, case: Rollouts) -> list[list[int]]:
    """A step or a state of each stored token; equal ones come in runs, and come again."""
    return [
        sorted(draw(st.lists(st.integers(0, 2), min_size=len(m), max_size=len(m))))
        if draw(st.booleans())
        else draw(st.lists(st.integers(-1, 1), min_size=len(m), max_size=len(m)))
        for m in case.mask
    ]


class _Case:
    """Rollouts with what is given beside them."""

    def __init__(self, case: Rollouts, given: dict[str, Any]) -> None:
        self.case, self.given = case, given

    def expected(self, name: str, **options: Any) -> list[list[float]]:
        case = self.case
        call = {"rewards": case.rewards, "response_mask": case.mask, "groups": case.groups, **self.given, **options}
        return reference_of(name)(case.logprobs, case.token_ids, **call)

    def tensors(self, layout: str, extra: int = 2) -> dict[str, Any]:
        case = self.case
        call: dict[str, Any] = case.packed() if layout == "packed" else case.padded(layout, extra)
        fills = {"step_rewards": (math.nan, torch.float64), "steps": (0, torch.int64), "states": (0, torch.int32)}
        for key, value in self.given.items():
            if key in fills and value is not None:
                fill, dtype = fills[key]
                value = case.laid_out(value, layout, fill, dtype, extra)
            call[key] = value
        return call


@every_estimator
@every_backend
def test_step_rewards_agree_with_the_reference(backend: str, name: str) -> None:
    @examples(backend, torch=40, triton=1, reference=5)
    @given(st.data(), rollouts(), st.sampled_from(LAYOUTS), st.booleans())
    def check(data: Any, case: Rollouts, layout: str, has_rewards: bool) -> None:
        given = {"step_rewards": data.draw(step_rewards(case))}
        whole = _Case(case, given if has_rewards else {**given, "rewards": None})
        options = options_of(name, case.options)
        inputs = whole.tensors(layout)
        found = ESTIMATORS[name](**inputs, **options, backend=backend)
        assert found.dtype == torch.float32
        assert_rows_close(case.rows_of(found, layout), whole.expected(name, **options))
        assert not found[~inputs["response_mask"]].any()

    check()


@pytest.mark.parametrize("name", ROW_SCHEMES)
@every_backend
def test_steps_and_states_agree_with_the_reference(backend: str, name: str) -> None:
    @examples(backend, torch=40, triton=1, reference=5)
    @given(st.data(), rollouts(), st.sampled_from(LAYOUTS), st.sampled_from(["steps", "states", "both"]), st.booleans())
    def check(data: Any, case: Rollouts, layout: str, keys: str, has_steps: bool) -> None:
        given = {key: data.draw(names(case)) for key in ("steps", "states") if keys in (key, "both")}
        whole = _Case(case, given | ({"step_rewards": data.draw(step_rewards(case))} if has_steps else {}))
        found = ESTIMATORS[name](**whole.tensors(layout), backend=backend)
        assert_rows_close(case.rows_of(found, layout), whole.expected(name))

    check()


@pytest.mark.parametrize("normalize", ["none", "reward_std"])
@given(data=st.data(), case=rollouts(), shrinkage=st.sampled_from([4.0, 0.5, math.inf]))
@examples(torch=25)
def test_tree_td_of_any_shrinkage_with_step_rewards(
    data: Any, case: Rollouts, shrinkage: float, normalize: str
) -> None:
    whole = _Case(case, {"step_rewards": data.draw(step_rewards(case))})
    options: dict[str, Any] = {"shrinkage": shrinkage, "group_weight": -0.7, "normalize": normalize}
    found = leafkernels.tree_td(**whole.tensors("packed"), **options)
    assert_rows_close(case.rows_of(found), whole.expected("tree_td", **options))


@given(data=st.data(), case=rollouts(), weight=st.sampled_from([0.0, 0.5, 1.0]))
@examples(torch=50)
def test_the_reference_of_trees_is_the_formula(data: Any, case: Rollouts, weight: float) -> None:
    """Q_t - V_t + w (R_t - b), each a mean over rows that is written out at every token."""
    steps = data.draw(step_rewards(case))
    to_go = python_ref.returns_to_go(case.token_ids, case.rewards, case.mask, steps)
    rows = [ids[slice(*stretch(mask))] for ids, mask in zip(case.token_ids, case.mask, strict=True)]
    found = _Case(case, {"step_rewards": steps}).expected("tree_td", group_weight=weight)
    for i, row in enumerate(rows):
        prompt = [j for j, name in enumerate(case.groups) if name == case.groups[i] and to_go[j][0] == to_go[j][0]]
        for t in range(len(row)):
            place = stretch(case.mask[i])[0] + t
            if i not in prompt or len(prompt) < 2 or not case.mask[i][place]:
                assert found[i][place] == 0.0
                continue
            before = [j for j in prompt if rows[j][:t] == row[:t]]
            after = [j for j in before if rows[j][: t + 1] == row[: t + 1]]
            q, v = (sum(to_go[j][t] for j in sharing) / len(sharing) for sharing in (after, before))
            baseline = sum(to_go[j][0] for j in prompt) / len(prompt)
            expected = q - v + weight * (to_go[i][t] - baseline)
            # Returns that differ by float64's rounding are equal to the one, and not to the other.
            assert abs(found[i][place] - expected) < 1e-6


# Worked by hand. Rows 0 and 1 share token 1, rows 2 and 3 share token 2; all of 2 is earned at row 0's second token.
ROWS = [[1, 3, 4], [1, 3, 5], [2, 3, 3], [2, 6, 6]]
STEPS = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
TERMINAL = [1.0, 0.0, 0.0, 0.0]
# Returns to go: 2, 1, 1 | 1, 0, 0 | 2, 2, 0 | 0, 0, 0; b = 5/4.
B = 1.25
BY_HAND = {
    "dr_grpo": [[2 - B, 1 - B, 1 - B], [1 - B, -B, -B], [2 - B, 2 - B, -B], [-B] * 3],
    "rloo": [[2 - 1, 0, 0], [1 - 4 / 3, -4 / 3, -4 / 3], [1, 1, -1], [-5 / 3] * 3],
    # Q - V: at token 0, 3/2 - 5/4 and 1 - 5/4; then 2 and 0 against 1; at token 2 of rows 0 and 1, 1 and 0 against 1/2.
    "tree_td": [
        [0.25 + 0.5 * (2 - B), 0.5 * (1 - B), 0.5 + 0.5 * (1 - B)],
        [0.25 + 0.5 * (1 - B), 0.5 * -B, -0.5 + 0.5 * -B],
        [-0.25 + 0.5 * (2 - B), 1 + 0.5 * (2 - B), 0.5 * -B],
        [-0.25 + 0.5 * -B, -1 + 0.5 * -B, 0.5 * -B],
    ],
}


@pytest.mark.parametrize("name", BY_HAND)
@every_backend
def test_step_rewards_by_hand(backend: str, name: str) -> None:
    zeros = [[0.0] * 3] * 4
    by_reference = reference_of(name)(zeros, ROWS, TERMINAL, step_rewards=STEPS)
    assert_rows_close(by_reference, BY_HAND[name], 1e-12)
    ids, steps, rewards = (torch.tensor(x, device=DEVICE) for x in (ROWS, STEPS, TERMINAL))
    found = ESTIMATORS[name](torch.zeros_like(steps), ids, rewards, step_rewards=steps, backend=backend)
    assert_rows_close(found.tolist(), BY_HAND[name])


def test_turns_and_states_by_hand() -> None:
    """Two rows of two turns; the first turn of row 0 earns 1, the second of row 1 earns 3."""
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], device=DEVICE)
    steps = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]], device=DEVICE)
    earned = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]], device=DEVICE)
    call: dict[str, Any] = {"logprobs": torch.zeros(2, 4, device=DEVICE), "token_ids": ids, "step_rewards": earned}
    # To go at turn 0: 1 and 3; at turn 1: 0 and 3.
    found = leafkernels.dr_grpo(**call, steps=steps)
    assert found.tolist() == [[-1.0, -1.0, -1.5, -1.5], [1.0, 1.0, 1.5, 1.5]]
    assert leafkernels.rloo(**call, steps=steps).tolist() == [[-2.0, -2.0, -3.0, -3.0], [2.0, 2.0, 3.0, 3.0]]
    # Row 0 is in state 7 twice, row 1 once: to go 1, 0 and 3 there, with mean 4/3. Nobody else is in state 9.
    states = torch.tensor([[7, 7, 7, 7], [9, 9, 7, 7]], device=DEVICE)
    found = leafkernels.dr_grpo(**call, steps=steps, states=states)
    expected = torch.tensor([[1 - 4 / 3] * 2 + [-4 / 3] * 2, [0.0, 0.0] + [3 - 4 / 3] * 2], device=DEVICE)
    torch.testing.assert_close(found, expected)
    # Without turns a row that stays in a state has visited it once; its reward there comes in the midst of the visit.
    found = leafkernels.dr_grpo(**call, states=states)
    assert found.tolist() == [[-1.0, -1.0, -2.0, -2.0], [0.0, 0.0, 1.0, 1.0]]
    # Of turn 0 the deviation is that of 1 and 3, of turn 1 that of 0 and 3.
    found = leafkernels.grpo(**call, steps=steps)
    expected = torch.tensor([[-1 / 2**0.5] * 4, [1 / 2**0.5] * 4], device=DEVICE)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


# Laws.


@every_estimator
@given(case=rollouts())
@examples(torch=25)
def test_no_step_rewards_and_step_rewards_of_zero(name: str, case: Rollouts) -> None:
    """To the bit; rewards of None count as 0."""
    options = options_of(name, case.options)
    inputs = case.padded()
    today = ESTIMATORS[name](**inputs, **options)
    zeros = torch.zeros(inputs["token_ids"].shape, device=DEVICE)
    assert torch.equal(ESTIMATORS[name](**inputs, **options, step_rewards=zeros), today)


@every_estimator
@given(case=rollouts())
@examples(torch=25)
def test_all_of_it_on_the_last_token(name: str, case: Rollouts) -> None:
    """Of rows that have a token: the result of a reward for each row, to the bit. Where a row ends and another goes on,
    the token schemes see what was earned before, and no more what is left."""
    options = options_of(name, case.options)
    rows = [ids[slice(*stretch(mask))] for ids, mask in zip(case.token_ids, case.mask, strict=True)]
    if ESTIMATORS[name].per == "token":
        assume(not any(0 < len(a) < len(b) and b[: len(a)] == a for a, b in itertools.permutations(rows, 2)))
    case.rewards = [r if any(mask) else 0.0 for r, mask in zip(case.rewards, case.mask, strict=True)]
    steps = [[0.0] * len(mask) for mask in case.mask]
    for row, mask, reward in zip(steps, case.mask, case.rewards, strict=True):
        if any(mask):
            row[stretch(mask)[1] - 1] = reward
    inputs = case.padded("left", 1)
    today = ESTIMATORS[name](**inputs, **options)
    given = case.laid_out(steps, "left", 5.0, torch.float32, 1)
    assert torch.equal(ESTIMATORS[name](**{**inputs, "rewards": None}, **options, step_rewards=given), today)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "pass_at_k"])  # which is not linear
@given(seed=st.integers(0, 10**6))
@examples(torch=20)
def test_rewards_of_the_shared_prefix_change_no_difference_of_siblings(name: str, seed: int) -> None:
    """What is earned at tokens that two rows share, by those tokens alone, is the same for both."""
    group = random_group(6, 12, seed, vocabulary=2)
    ids = group["token_ids"]
    table = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)
    shared = leafkernels.common_prefix_lengths(ids)
    i, j = (int(x) for x in divmod(int(shared.fill_diagonal_(-1).argmax()), 6))
    steps = torch.zeros(6, 12, dtype=torch.float64, device=DEVICE)
    # All rows but these two earn nothing; the two earn before they part.
    steps[[i, j]] = table * (torch.arange(12, device=DEVICE) < shared[i, j])
    for options in ({"normalize": "none"},) if takes(name, "normalize") else ({},):
        with_steps = ESTIMATORS[name](**group, step_rewards=steps, **options).double()
        rewards = group["rewards"].double()
        scale = torch.ones((), dtype=torch.float64)
        if name == "maxrl":
            scale = (rewards + steps.sum(1)).mean() / rewards.mean()
        elif ESTIMATORS[name].normalization == "reward_std":
            scale = ((rewards + steps.sum(1)).std() + 1e-6) / (rewards.std() + 1e-6)
        without = ESTIMATORS[name](**group, **options).double()
        parting = int(shared[i, j])
        if ESTIMATORS[name].per == "span":  # a span may begin before the two part
            parting = 11
        differences = [(a[i] - a[j])[parting:] for a in (with_steps * scale.to(DEVICE), without)]
        torch.testing.assert_close(*differences, rtol=1e-5, atol=1e-6)


@every_estimator
@given(data=st.data(), case=rollouts())
@examples(torch=20)
def test_layouts_give_the_same_bits(name: str, data: Any, case: Rollouts) -> None:
    given: dict[str, Any] = {"step_rewards": data.draw(step_rewards(case))}
    if name in ROW_SCHEMES and data.draw(st.booleans()):
        given["states"] = data.draw(names(case))
    whole, options = _Case(case, given), options_of(name, case.options)
    found = [case.rows_of(ESTIMATORS[name](**whole.tensors(side), **options), side) for side in LAYOUTS]
    assert found[1:] == found[:1] * 2


@every_estimator
@given(data=st.data(), case=rollouts())
@examples(torch=20)
def test_other_prompts_change_nothing(name: str, data: Any, case: Rollouts) -> None:
    options = options_of(name, case.options)
    if options.get("normalize") == "batch":  # of the call, by definition
        options["normalize"] = "span"
    given: dict[str, Any] = {"step_rewards": data.draw(step_rewards(case))}
    if name in ROW_SCHEMES and data.draw(st.booleans()):
        given["steps"] = data.draw(names(case))
    inputs = _Case(case, given).tensors("right")
    groups = inputs.pop("groups")
    together = ESTIMATORS[name](**inputs, groups=groups, **options)
    for prompt in set(case.groups):
        rows = groups == prompt
        alone = ESTIMATORS[name](**{key: tensor[rows] for key, tensor in inputs.items()}, **options)
        assert torch.equal(alone, together[rows])


@every_estimator
@every_backend
def test_gradients_of_rewards_and_step_rewards(backend: str, name: str) -> None:
    """Against differences of the reference, which is float64: their step of 1e-5 leaves an error of about 1e-10."""
    group = random_group(4, 6, seed=3, vocabulary=2)
    logprobs, ids = group["logprobs"].tolist(), group["token_ids"].tolist()
    generator = torch.Generator().manual_seed(2)
    # The advantages, and hence their gradients, are float32.
    weights, steps = torch.randn(2, 4, 6, generator=generator).double()
    rewards = torch.tensor([0.5, -1.0, 0.25, 2.0], dtype=torch.float64)

    def reference(r: torch.Tensor, s: torch.Tensor) -> float:
        result = reference_of(name)(logprobs, ids, r.tolist(), step_rewards=s.tolist())
        return float((torch.tensor(result, dtype=torch.float64) * weights).sum())

    leaves = [x.to(DEVICE).requires_grad_() for x in (rewards, steps)]
    found = ESTIMATORS[name](group["logprobs"], group["token_ids"], leaves[0], step_rewards=leaves[1], backend=backend)
    (found * weights.to(DEVICE)).sum().backward()
    for k, leaf in enumerate(leaves):
        slopes = torch.zeros(leaf.numel(), dtype=torch.float64)
        for at in range(leaf.numel()):
            ends = []
            for h in (1e-5, -1e-5):
                moved = [rewards.clone(), steps.clone()]
                moved[k].view(-1)[at] += h
                ends.append(reference(*moved))
            slopes[at] = (ends[0] - ends[1]) / 2e-5
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.cpu().flatten(), slopes, rtol=0, atol=1e-8)


def test_equal_returns_earned_at_other_tokens() -> None:
    """Their deviation is 0, and what is divided by it is 0; the rest is what is still to come."""
    ids = torch.tensor([[1, 2], [3, 4]], device=DEVICE)
    steps = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=DEVICE)
    call: dict[str, Any] = {"logprobs": torch.zeros(2, 2, device=DEVICE), "token_ids": ids, "step_rewards": steps}
    for name in ESTIMATORS:
        found = ESTIMATORS[name](**call)
        weight = {"dr_grpo": 1.0, "rloo": 1.0, "opo": 1.0, "maxrl": 1.0, "tree_td": 0.5}.get(name, 0.0)
        # OTB compares what rows have still to earn at a token.
        want = [[0.0, -0.5], [0.0, 0.5]] if name == "otb" else [[0.0, -weight], [0.0, 0.0]]
        assert found.tolist() == want
        alone = ESTIMATORS[name](**{key: tensor[:1] for key, tensor in call.items()})
        assert not alone.any()


@pytest.mark.parametrize("form", ["rows", "steps", "states", "global", "local"])
def test_leave_one_out_is_unbiased_in_a_table(form: str) -> None:
    """All triples of rollouts of a policy of three binary decisions, with rewards in the middle: the mean of the
    estimated gradients is the gradient of the expected return."""
    generator = torch.Generator().manual_seed(7)
    contexts = [prefix for length in range(3) for prefix in itertools.product((0, 1), repeat=length)]
    paths = list(itertools.product((0, 1), repeat=3))
    chance, reward, terminal = (torch.rand(2, 2, 2, 3, generator=generator) for _ in range(3))
    # What is earned at token t depends on the tokens up to it, and the chance of token t on those before it.
    probability, earned, scores = [], [], []
    for path in paths:
        ones = [float(chance[(*path[:t], *[0] * (3 - t))][t]) * 0.8 + 0.1 for t in range(3)]
        probability.append(math.prod(p if bit else 1 - p for p, bit in zip(ones, path, strict=True)))
        earned.append([float(reward[(*path[: t + 1], *[0] * (2 - t))][t]) for t in range(3)])
        score = torch.zeros(3, len(contexts), dtype=torch.float64)
        for t in range(3):
            score[t, contexts.index(path[:t])] = path[t] - ones[t]
        scores.append(score)
    chances, last = torch.tensor(probability, dtype=torch.float64), terminal[..., 0].flatten().double()
    table, steps = torch.stack(scores), torch.tensor(earned, dtype=torch.float64)
    exact = (chances * (last + steps.sum(1))) @ table.sum(1)

    triples = torch.tensor(list(itertools.product(range(8), repeat=3)))
    ids = torch.tensor(paths)[triples].to(DEVICE)
    options: dict[str, Any] = {}
    if form == "steps":
        options["steps"] = torch.arange(3, device=DEVICE).expand(ids.shape)
    if form == "states":  # the third decision is in the state of the first
        options["states"] = torch.tensor([7, 9, 7], device=DEVICE).expand(ids.shape)
    if form in ("global", "local"):
        options |= {"leave_one_out": True, "multiplicity_power": 0.0, "normalize": "none", "terms": form}
        options |= {"boundary_scores": torch.tensor([0.0, 1.0, 2.0]).expand(ids.shape).to(DEVICE), "min_separation": 1}
    function: Callable[..., torch.Tensor] = leafkernels.span_advantages if "terms" in options else leafkernels.rloo
    given = {"step_rewards": steps[triples].to(DEVICE), **options}
    credit = function(torch.zeros(ids.shape, device=DEVICE), ids, last[triples].to(DEVICE), **given).cpu().double()
    estimates = (credit[..., None] * table[triples]).sum((1, 2)) / 3
    found = chances[triples].prod(1) @ estimates
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


# Several reward functions.


# Of centred rewards there is no mean.
OF_FUNCTIONS = [name for name in ESTIMATORS if name != "maxrl"]


@pytest.mark.parametrize("name", OF_FUNCTIONS)
@every_backend
def test_several_functions_agree_with_the_reference(backend: str, name: str) -> None:
    @examples(backend, torch=30, triton=1, reference=5)
    @given(st.data(), rollouts(), st.integers(0, 3), st.booleans())
    def check(data: Any, case: Rollouts, functions: int, is_tensor: bool) -> None:
        number = st.sampled_from([0.0, 1.0, 0.25, -3.0, math.nan])
        rewards = [data.draw(st.lists(number, min_size=functions, max_size=functions)) for _ in case.rewards]
        weights = [1.0, 0.5, -2.0][:functions]
        whole, options = _Case(case, {}), options_of(name, case.options)
        inputs = whole.tensors("right") | {
            "rewards": torch.tensor(rewards, dtype=torch.float32, device=DEVICE).reshape(len(rewards), functions),
            "reward_weights": torch.tensor(weights, device=DEVICE) if is_tensor else weights,
        }
        found = ESTIMATORS[name](**inputs, **options, backend=backend)
        combined = python_ref.weighed_rewards(rewards, weights, groups=case.groups)
        assert_rows_close(case.rows_of(found), whole.expected(name, rewards=combined, **options), 1e-6)

    check()


def test_several_functions_by_hand() -> None:
    """Of the rewards 0, 2, 4 the deviation is 2, of 0, 0, 3 it is the root of 3; what is NaN is left out."""
    rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 1.0], [4.0, 3.0, math.nan]], dtype=torch.float64, device=DEVICE)
    ids = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    root = math.sqrt(3.0)
    combined = [-1.0 - 0.5 / root, -0.5 / root, 1.0 + 1.0 / root]
    torch.testing.assert_close(
        torch.tensor(python_ref.weighed_rewards(rewards.tolist(), [1.0, 0.5, 9.0])), torch.tensor(combined)
    )
    found = leafkernels.dr_grpo(torch.zeros(3, 1, device=DEVICE), ids, rewards, reward_weights=[1.0, 0.5, 9.0])
    torch.testing.assert_close(found[:, 0], torch.tensor(combined, device=DEVICE), rtol=1e-5, atol=0)


# What is refused.

IDS = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
REWARDS = torch.zeros(2, device=DEVICE)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"rewards": None}, TypeError, "rewards must be a torch.Tensor, got NoneType"),
        ({"step_rewards": [[1.0]]}, TypeError, "step_rewards must be a torch.Tensor, got list"),
        ({"step_rewards": IDS.bool()}, TypeError, "step_rewards must be floating point or integers, got torch.bool"),
        (
            {"step_rewards": REWARDS},
            ValueError,
            r"step_rewards must have the shape of token_ids, \(2, 3\), got shape \(2,\)",
        ),
        ({"rewards": IDS.float()}, ValueError, "got shape .2, 3.: those at tokens are step_rewards, those of several"),
        (
            {"reward_weights": [1.0]},
            ValueError,
            r"and each function where reward_weights is given, shape \(2, 'functions'\), got shape \(2,\)",
        ),
        (
            {"rewards": IDS.float(), "reward_weights": [1.0]},
            ValueError,
            r"reward_weights must have one number for each function of rewards, shape \(3,\), got shape \(1,\)",
        ),
        (
            {"rewards": IDS.float(), "reward_weights": [1.0, "2", 3.0]},
            TypeError,
            "reward_weights must be a number, got str",
        ),
        (
            {"rewards": IDS.float(), "reward_weights": 1.0},
            TypeError,
            "reward_weights must be a list of numbers, got float",
        ),
        pytest.param(
            {"rewards": IDS.float(), "reward_weights": torch.tensor([1.0, math.nan, 3.0])},
            ValueError,
            r"reward_weights must be finite, got \[1.0, nan, 3.0\]",
            marks=pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on a CPU alone"),
        ),
        ({"rewards": IDS.bool(), "reward_weights": [1.0] * 3}, TypeError, "rewards must be floating point or integers"),
    ],
)
def test_refusals(given: dict[str, Any], kind: type[Exception], text: str) -> None:
    schemes = [ESTIMATORS[name] for name in (OF_FUNCTIONS if "reward_weights" in given else ESTIMATORS)]
    for scheme in (*schemes, leafkernels.span_tree):
        with pytest.raises(kind, match=text):
            scheme(**{"logprobs": torch.zeros(2, 3, device=DEVICE), "token_ids": IDS, "rewards": REWARDS, **given})


def test_refusals_of_options() -> None:
    call: dict[str, Any] = {"logprobs": torch.zeros(2, 3, device=DEVICE), "token_ids": IDS, "rewards": REWARDS}
    for function, options, kind, text in (
        (
            leafkernels.maxrl,
            {"reward_weights": [1.0]},
            ValueError,
            "reward_weights must be None with maxrl, .* got .1.0.",
        ),
        (leafkernels.qae, {"quantile": 1.5}, ValueError, "quantile must lie between 0 and 1, got 1.5"),
        (leafkernels.qae, {"quantile": "half"}, TypeError, "quantile must be a number, got str"),
        (leafkernels.pass_at_k, {"k": 0}, ValueError, "k must be at least 1, got 0"),
        (leafkernels.pass_at_k, {"k": 2.0}, TypeError, "k must be an int, got float"),
    ):
        with pytest.raises(kind, match=text):
            function(**call, **options)


@pytest.mark.parametrize("key", ["steps", "states"])
@pytest.mark.parametrize("name", ROW_SCHEMES)
def test_refusals_of_steps_and_states(name: str, key: str) -> None:
    call: dict[str, Any] = {"logprobs": torch.zeros(2, 3, device=DEVICE), "token_ids": IDS, "rewards": REWARDS}
    with pytest.raises(TypeError, match=f"{key} must hold integers, got torch.float32"):
        ESTIMATORS[name](**call, **{key: IDS.float()})
    with pytest.raises(ValueError, match=rf"{key} must have the shape of token_ids, \(2, 3\), got shape \(2, 2\)"):
        ESTIMATORS[name](**call, **{key: IDS[:, :2]})


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ESTIMATORS, "grpo with states"])
def test_torch_compile(name: str) -> None:
    """In one graph, with the gradients of the step rewards."""
    group = random_group(6, 20, seed=4, vocabulary=2)
    more = {"states": group["token_ids"]} if "states" in name else {}

    def loss(logprobs: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        call = logprobs.detach(), group["token_ids"], group["rewards"]
        credit = ESTIMATORS[name.split()[0]](*call, step_rewards=steps, group_size=3, **more)
        return (credit * logprobs).sum()

    compare_with_compiled(loss, group["logprobs"], torch.rand(6, 20, device=DEVICE))


@pytest.mark.skipif(DEVICE == "cuda", reason="stands in for what a CUDA tensor would do")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_nothing_is_read_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for a device: reading a number, and shapes that depend on values."""
    from test_launches import _Launches

    for module in ("leafkernels.rows.find", "leafkernels._core.checks"):  # as for CUDA tensors
        monkeypatch.setattr(f"{module}.values_readable", lambda _: False)
    group = random_group(6, 12, seed=1, vocabulary=2)
    flat = {key: tensor.flatten() for key, tensor in group.items()}
    more: dict[str, Any] = {"step_rewards": torch.rand(72)}
    if name in OF_FUNCTIONS:
        flat["rewards"], more["reward_weights"] = torch.rand(6, 2), [1.0, 0.5]
    if name in ROW_SCHEMES:
        more["states"] = torch.arange(72) % 3
    bounds = torch.arange(0, 73, 12, dtype=torch.int32)
    with _Launches() as launches:
        ESTIMATORS[name](**flat, **more, cu_seqlens=bounds, groups=torch.arange(6) % 2, backend="torch")
    assert not {"_local_scalar_dense", "nonzero", "_unique2", "masked_select"} & set(launches.names)
