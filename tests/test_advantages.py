"""The whole function: against the reference on generated rollouts, in every layout, and the laws without an oracle."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, Rollouts, assert_rows_close, random_group, rollouts

import leafkernels
import python_ref

# A case takes the interpreter a third of a second.
EXAMPLES = {"torch": 150, "triton": 150 if DEVICE == "cuda" else 15, "reference": 60}

IDENTICAL_WITH_LATE_BOUNDARY = Rollouts(
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
ONLY_UNSCORABLE = Rollouts([[0, 1], [0, 1]], [[-1.0, -1.0]] * 2, [[True] * 2] * 2, [math.nan] * 2, [3, 3])
NO_TOKENS = Rollouts([[], [0]], [[], [-1.0]], [[], [False]], [1.0, 0.0], [0, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_agrees_with_the_reference(backend: str, layout: str, small_blocks: None) -> None:
    @settings(max_examples=EXAMPLES[backend])
    @example(IDENTICAL_WITH_LATE_BOUNDARY)
    @example(EQUAL_REWARDS)
    @example(ONLY_UNSCORABLE)
    @example(NO_TOKENS)
    @given(rollouts())
    def check(case: Rollouts) -> None:
        inputs = case.packed() if layout == "packed" else case.padded(layout, extra=2)
        advantages = leafkernels.span_advantages(**inputs, **case.options, backend=backend)
        assert advantages.dtype == torch.float32
        assert advantages.shape == inputs["token_ids"].shape
        assert_rows_close(case.rows_of(advantages, layout), case.expected())
        if layout != "packed":
            assert not advantages[~inputs["response_mask"]].any()

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_reads_every_dtype_as_it_comes(backend: str, dtype: torch.dtype, ids: torch.dtype) -> None:
    group = random_group(6, 40, seed=1)
    logprobs, tokens = group["logprobs"].to(dtype), group["token_ids"].to(ids)
    expected = python_ref.span_advantages(
        logprobs.tolist(), tokens.tolist(), group["rewards"].tolist(), num_boundaries=3
    )
    advantages = leafkernels.span_advantages(logprobs, tokens, group["rewards"], num_boundaries=3, backend=backend)
    assert_rows_close(advantages.tolist(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_prompts_and_runs_of_rows(backend: str) -> None:
    groups = [random_group(4, 12, seed) for seed in range(3)]
    stacked = {name: torch.stack([g[name] for g in groups]) for name in groups[0]}
    expected = torch.stack([leafkernels.span_advantages(**g, backend=backend) for g in groups])
    torch.testing.assert_close(leafkernels.span_advantages(**stacked, backend=backend), expected, rtol=0, atol=0)
    flat = {name: t.flatten(0, 1) for name, t in stacked.items()}
    runs = leafkernels.span_advantages(**flat, group_size=4, backend=backend)
    torch.testing.assert_close(runs, expected.flatten(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strided_views_are_read_in_place(backend: str) -> None:
    """Responses cut out of prompt-and-response tensors, transposed batches, and expanded masks."""
    group = random_group(5, 24, seed=3)
    expected = leafkernels.span_advantages(**group, backend="reference")
    wide_ids = torch.full((5, 40), -1, device=DEVICE)
    wide_ids[:, 9:33] = group["token_ids"]
    wide_logprobs = torch.full((5, 40), -50.0, device=DEVICE)
    wide_logprobs[:, 9:33] = group["logprobs"]
    views = wide_logprobs[:, 9:33], wide_ids[:, 9:33], group["rewards"]
    mask = torch.ones(1, 1, dtype=torch.bool, device=DEVICE).expand(5, 24)
    for response_mask in (None, mask):
        advantages = leafkernels.span_advantages(*views, response_mask=response_mask, backend=backend)
        torch.testing.assert_close(advantages, expected, rtol=2e-7, atol=1e-8)
    transposed = group["logprobs"].T.contiguous().T, group["token_ids"].T.contiguous().T, group["rewards"]
    advantages = leafkernels.span_advantages(*transposed, backend=backend)
    torch.testing.assert_close(advantages, expected, rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (2, 3, 0)])
def test_empty_inputs_have_an_answer(backend: str, shape: tuple[int, ...]) -> None:
    tokens = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    advantages = leafkernels.span_advantages(
        torch.zeros(shape, device=DEVICE), tokens, torch.zeros(shape[:-1], device=DEVICE), backend=backend
    )
    assert advantages.shape == shape
    assert advantages.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_packed_rows_at_all(backend: str) -> None:
    nothing = torch.zeros(0, device=DEVICE)
    bounds = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    advantages = leafkernels.span_advantages(nothing, nothing.long(), nothing, cu_seqlens=bounds, backend=backend)
    assert advantages.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_rewards_and_masks(backend: str) -> None:
    group = random_group(4, 10, seed=5)
    rewards = torch.tensor([1, 0, 0, 1], device=DEVICE)
    mask = torch.ones(4, 10, device=DEVICE)
    mask[2, 6:] = 0
    expected = leafkernels.span_advantages(
        group["logprobs"], group["token_ids"], rewards.float(), response_mask=mask.bool(), backend=backend
    )
    for dtype in (torch.float32, torch.int64, torch.uint8):
        advantages = leafkernels.span_advantages(
            group["logprobs"], group["token_ids"], rewards, response_mask=mask.to(dtype), backend=backend
        )
        torch.testing.assert_close(advantages, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_repeats_bit_for_bit(backend: str) -> None:
    group = random_group(8, 64, seed=6)
    first = leafkernels.span_advantages(**group, backend=backend)
    for _ in range(3):
        assert torch.equal(first, leafkernels.span_advantages(**group, backend=backend))


# The laws, by the names of docs/leaf.md. They hold for any backend; the fast one can afford many cases.


def tree_of(case: Rollouts, **options: object) -> tuple[leafkernels.SpanTree, dict[str, torch.Tensor]]:
    inputs = case.padded()
    return leafkernels.span_tree(**inputs, **{**case.options, **options}), inputs


def spans_of(tree: leafkernels.SpanTree) -> tuple[torch.Tensor, torch.Tensor]:
    """Which slots hold a span, and which of them is the tail (it ends at the row's length, behind the last node)."""
    ends = tree.spans.span_ends
    exists = ends > torch.nn.functional.pad(ends[:, :-1], (1, 0))
    is_node = torch.nn.functional.pad(tree.spans.node_sizes[:, 1:] >= 2, (0, 1))
    return exists, exists & ~is_node


@given(rollouts())
@settings(max_examples=150)
def test_telescoping(case: Rollouts) -> None:
    """The local terms of a row that has a tail sum to r - V_0."""
    tree, inputs = tree_of(case, terms="local", multiplicity_power=0.0, normalize="none", leave_one_out=False)
    _, is_tail = spans_of(tree)
    rows = is_tail.any(1)
    expected = inputs["rewards"].double() - tree.spans.node_values[:, 0]
    torch.testing.assert_close(tree.spans.raw.sum(1)[rows], expected[rows], rtol=0, atol=1e-12)


@given(rollouts())
@settings(max_examples=150)
def test_conservation(case: Rollouts) -> None:
    """The global terms of a node's rows sum to what r - V_0 sums to over them."""
    tree, inputs = tree_of(case, terms="global", multiplicity_power=0.0, normalize="none", leave_one_out=False)
    centred = inputs["rewards"].double() - tree.spans.node_values[:, 0]
    prompts = inputs["groups"]
    for k in range(tree.nodes.shape[1]):
        for i in range(len(centred)):
            if tree.nodes[i, k] >= 0:
                members = (tree.nodes[:, k] == tree.nodes[i, k]) & (prompts == prompts[i])
                assert int(members.sum()) == int(tree.spans.node_sizes[i, k + 1])
                torch.testing.assert_close(tree.spans.raw[members, k].sum(), centred[members].sum(), rtol=0, atol=1e-12)


@given(st.lists(st.sampled_from([0.0, 1.0, 0.25, -3.0]), min_size=2, max_size=6), st.integers(1, 6), st.integers(0, 3))
def test_reduction(rewards: list[float], tokens: int, num_boundaries: int) -> None:
    """Rows that share nothing get GRPO's advantages; raw, Dr. GRPO's or RLOO's."""
    r = torch.tensor(rewards, device=DEVICE)
    ids = torch.arange(len(rewards) * tokens, device=DEVICE).reshape(len(rewards), tokens)
    logprobs = -torch.rand(ids.shape, device=DEVICE)
    centred = (r - r.mean())[:, None].expand(ids.shape)
    zero = torch.zeros(ids.shape, device=DEVICE)
    is_flat = min(rewards) == max(rewards)

    def advantages(**options: object) -> torch.Tensor:
        return leafkernels.span_advantages(logprobs, ids, r, num_boundaries=num_boundaries, **options)

    grpo = zero if is_flat else centred / r.std()
    torch.testing.assert_close(advantages(), grpo, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(advantages(normalize="none"), 2 * centred, rtol=1e-5, atol=1e-6)
    for terms in ("global", "local"):
        torch.testing.assert_close(advantages(normalize="none", terms=terms), centred, rtol=1e-5, atol=1e-6)
        rloo = centred * len(rewards) / (len(rewards) - 1)
        loo = advantages(normalize="none", terms=terms, leave_one_out=True)
        torch.testing.assert_close(loo, rloo, rtol=1e-5, atol=1e-6)


@given(rollouts(), st.sampled_from([2.0, 0.25]), st.sampled_from([-5.0, 8.0]))
@settings(max_examples=150)
def test_equivariance(case: Rollouts, scale: float, shift: float) -> None:
    """Rewards shifted, scaled and flipped."""
    inputs = case.padded()
    rewards = inputs.pop("rewards").double()

    def advantages(r: torch.Tensor) -> torch.Tensor:
        return leafkernels.span_advantages(**inputs, rewards=r, **case.options)

    before = advantages(rewards)
    if case.options["normalize"] == "reward_std":  # the one mode with an absolute constant beside the deviation
        torch.testing.assert_close(advantages(rewards + shift), before, rtol=1e-6, atol=1e-6)
        return
    torch.testing.assert_close(advantages(rewards + shift), before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(advantages(-rewards), -before, rtol=1e-5, atol=1e-6)
    grown = before * scale if case.options["normalize"] == "none" else before
    torch.testing.assert_close(advantages(rewards * scale), grown, rtol=1e-5, atol=1e-6)


@given(rollouts(), st.integers(0, 4), st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_layout_invariance(case: Rollouts, extra: int, rng: object) -> None:
    """Layout, padding and the names of tokens change nothing."""
    expected = case.rows_of(leafkernels.span_advantages(**case.padded(), **case.options))
    for side in ("right", "left"):
        inputs = case.padded(side, extra)
        assert case.rows_of(leafkernels.span_advantages(**inputs, **case.options), side) == expected
    assert case.rows_of(leafkernels.span_advantages(**case.packed(), **case.options)) == expected
    inputs = case.padded()
    names = {i: n for n, i in enumerate(sorted(range(9), key=lambda _: rng.random()))}  # type: ignore[attr-defined]
    renamed = [[names[t] * 10**15 - 3 for t in row] for row in inputs["token_ids"].tolist()]
    inputs["token_ids"] = torch.tensor(renamed, dtype=torch.int64, device=DEVICE).reshape(inputs["token_ids"].shape)
    assert case.rows_of(leafkernels.span_advantages(**inputs, **case.options)) == expected


@given(rollouts())
@settings(max_examples=100)
def test_prompt_independence(case: Rollouts) -> None:
    """Other prompts of the call change nothing."""
    options = {**case.options}
    if options["normalize"] == "batch":
        options["normalize"] = "span"
    together = leafkernels.span_advantages(**case.padded(), **options)
    for prompt in set(case.groups):
        inputs = case.padded()
        rows = inputs.pop("groups") == prompt
        alone = leafkernels.span_advantages(**{k: v[rows] for k, v in inputs.items()}, **options)
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=0)


@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_row_order_invariance(seed: int, rng: object) -> None:
    """The order of rows changes nothing where scores are distinct."""
    group = random_group(5, 9, seed, vocabulary=2)
    order = sorted(range(5), key=lambda _: rng.random())  # type: ignore[attr-defined]
    expected = leafkernels.span_advantages(**group)[order]
    shuffled = leafkernels.span_advantages(**{k: v[order] for k, v in group.items()})
    torch.testing.assert_close(shuffled, expected, rtol=1e-6, atol=1e-8)


@given(rollouts())
@settings(max_examples=100)
def test_rank_invariance(case: Rollouts) -> None:
    """Strictly increasing maps of the scores change nothing."""
    inputs = case.padded()
    scores = -inputs["logprobs"].double()
    expected = leafkernels.span_advantages(**inputs, **case.options)
    for mapped in (scores * 3 + 1, scores.exp(), scores.atan()):
        inputs["logprobs"] = torch.full_like(inputs["logprobs"], torch.nan)
        advantages = leafkernels.span_advantages(**inputs, **case.options, boundary_scores=mapped)
        assert torch.equal(advantages, expected)


@given(rollouts())
@settings(max_examples=150)
def test_bounds(case: Rollouts) -> None:
    """Raw values and node values stay inside the rewards, and a node's value is the mean over its children."""
    tree, inputs = tree_of(case, terms="both", leave_one_out=False, multiplicity_power=0.5)
    rewards, prompts = inputs["rewards"].double(), inputs["groups"]
    values = tree.spans.node_values
    for prompt in prompts.unique():
        rows = (prompts == prompt) & ~rewards.isnan()
        if not rows.any():
            continue
        low, high = rewards[rows].min(), rewards[rows].max()
        assert (tree.spans.raw[rows].abs() <= 2 * (high - low) + 1e-12).all()
        known = values[rows][~values[rows].isnan()]
        assert (known >= low - 1e-12).all()
        assert (known <= high + 1e-12).all()
        # A node's value is the mean over its members of their child's value, or of their reward where they have none.
        for k in range(1, values.shape[1]):
            for i in rows.nonzero().flatten().tolist():
                members = rows & (tree.nodes[:, k - 1] == tree.nodes[i, k - 1]) if tree.nodes[i, k - 1] >= 0 else None
                if members is None or k + 1 >= values.shape[1]:
                    continue
                child = torch.where(values[members, k + 1].isnan(), rewards[members], values[members, k + 1])
                torch.testing.assert_close(child.mean(), values[i, k], rtol=0, atol=1e-12)


@given(rollouts())
@settings(max_examples=100)
def test_sharing(case: Rollouts) -> None:
    """Rows that share a node share its advantages."""
    tree, inputs = tree_of(case)
    for k in range(tree.nodes.shape[1]):
        for i in range(len(case.groups)):
            members = (tree.nodes[:, k] == tree.nodes[i, k]) & (inputs["groups"] == inputs["groups"][i])
            if tree.nodes[i, k] >= 0:
                same = tree.spans.values[members, : k + 1]
                torch.testing.assert_close(same, same[:1].expand(same.shape), rtol=1e-12, atol=1e-12)


def test_sharing_a_token_is_not_sharing_its_span() -> None:
    """Rows share [0, 5) and the boundary is at 8: they may differ already at token 0."""
    ids = torch.tensor([[1] * 10, [1] * 10, [1] * 5 + [2] * 5, [1] * 5 + [3] * 5], device=DEVICE)
    ids[1, 9] = 4
    scores = torch.zeros(ids.shape, device=DEVICE)
    scores[0, 8] = 9.0
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0], device=DEVICE)
    advantages = leafkernels.span_advantages(-scores, ids, rewards, num_boundaries=1)
    assert advantages[0, 0] == advantages[1, 0]
    assert advantages[0, 0] > advantages[2, 0]


def test_span_weighting() -> None:
    """z-scores weigh spans, not tokens: a first span of raw credit 0 gets another, and tokens do not sum to 0."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6], [1, 2, 7, 7]], device=DEVICE)
    logprobs = torch.tensor([-0.1, -0.1, -5.0, -3.0], device=DEVICE).repeat(4, 1)
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0], device=DEVICE)
    tree = leafkernels.span_tree(logprobs, ids, rewards, min_separation=1)
    assert tree.boundaries.tolist() == [2, 3]
    assert (tree.spans.raw[:, 0] == 0).all()
    assert (tree.spans.values[:, 0].abs() > 1e-3).all()
    advantages = leafkernels.span_advantages(logprobs, ids, rewards, min_separation=1)
    assert abs(float(advantages.sum())) > 0.1


@pytest.mark.parametrize("normalize", ["span", "batch", "reward_std", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rewards_give_exactly_zero(backend: str, normalize: str) -> None:
    """Six times 0.3 in float32 has a mean that is not 0.3, which a z-score would blow up to 0.03."""
    flat, mixed = random_group(6, 12, seed=0, vocabulary=2), random_group(6, 12, seed=1, vocabulary=2)
    both = {name: torch.stack([flat[name], mixed[name]]) for name in flat}
    both["rewards"][0] = 0.3
    advantages = leafkernels.span_advantages(**both, normalize=normalize, backend=backend)
    assert torch.equal(advantages[0], torch.zeros_like(advantages[0]))
    assert advantages[1].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_identical_rows_without_rewards_or_tokens(backend: str) -> None:
    """Two empty rows are identical and still share no node; a NaN reward removes its row from every mean."""
    ids = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6, 9]], device=DEVICE)
    mask = torch.ones(ids.shape, dtype=torch.bool, device=DEVICE)
    logprobs = torch.tensor([[-1.0, -1.0, -5.0]] * 4, device=DEVICE)
    rewards = torch.tensor([1.0, math.nan, 0.0, 0.5], device=DEVICE)
    tree = leafkernels.span_tree(logprobs, ids, rewards, response_mask=mask, num_boundaries=1, backend=backend)
    assert tree.boundaries.tolist() == [2]
    assert tree.spans.node_sizes.tolist() == [[3, 3], [3, 0], [3, 3], [3, 3]]
    assert tree.nodes.tolist() == [[0], [-1], [0], [0]]
    mask[0], mask[2] = False, False
    rewards[1] = 0.25
    tree = leafkernels.span_tree(logprobs, ids, rewards, response_mask=mask, num_boundaries=1, backend=backend)
    assert tree.lengths.tolist() == [0, 3, 0, 3]
    assert tree.spans.node_sizes.tolist() == [[4, 0], [4, 2], [4, 0], [4, 2]]
    advantages = leafkernels.span_advantages(logprobs, ids, rewards, response_mask=mask, backend=backend)
    assert not advantages[0].any() and not advantages[2].any()
