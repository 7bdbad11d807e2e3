"""LEAF: what is special to it, and its laws by the names of docs/leaf.md; tests/test_laws.py has the laws of all."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, Rollouts, assert_rows_close, random_group, rollouts
from support import examples

import leafkernels
import python_ref
from leafkernels import PRESETS
from leafkernels.command.options import CREDIT_OPTIONS, parse_arguments

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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


# The laws that LEAF alone has, by the names of docs/leaf.md. They hold for any backend; the fast one can afford many.


def tree_of(case: Rollouts, **options: object) -> tuple[leafkernels.SpanTree, dict[str, torch.Tensor]]:
    inputs = case.padded()
    return leafkernels.span_tree(**inputs, **{**case.options, **options}), inputs


def spans_of(tree: leafkernels.SpanTree) -> tuple[torch.Tensor, torch.Tensor]:
    """Which slots hold a span, and which of them is the tail (it ends at the row's length, after the last node)."""
    ends = tree.spans.span_ends
    exists = ends > torch.nn.functional.pad(ends[:, :-1], (1, 0))
    is_node = torch.nn.functional.pad(tree.spans.node_sizes[:, 1:] >= 2, (0, 1))
    return exists, exists & ~is_node


@given(rollouts())
@examples(torch=150)
def test_telescoping(case: Rollouts) -> None:
    """The local terms of a row that has a tail sum to r - V_0."""
    tree, inputs = tree_of(case, terms="local", multiplicity_power=0.0, normalize="none", leave_one_out=False)
    _, is_tail = spans_of(tree)
    rows = is_tail.any(1)
    expected = inputs["rewards"].double() - tree.spans.node_values[:, 0]
    torch.testing.assert_close(tree.spans.raw.sum(1)[rows], expected[rows], rtol=0, atol=1e-12)


@given(rollouts())
@examples(torch=150)
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


@given(rollouts())
@examples(torch=100)
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
@examples(torch=150)
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
@examples(torch=100)
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


# ---- named options: explicit ones win over the preset, and the preset over the defaults


OTHER: dict[str, int | float | str] = {
    "num_generations": 4,
    "num_boundaries": 7,
    "terms": "local",
    "multiplicity_power": 0.25,
}


def test_the_preset_is_that_of_the_paper() -> None:
    paper = {"num_generations": 8, "num_boundaries": 2, "terms": "both", "multiplicity_power": 0.5}
    assert {"leaf-paper": paper} == PRESETS


def test_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "leaf-paper", OTHER)
    plain = parse_arguments([])
    assert (plain.num_boundaries, plain.terms, plain.multiplicity_power) == (2, "both", 0.5)
    found = parse_arguments(["--preset", "leaf-paper"])
    assert (found.num_boundaries, found.terms, found.multiplicity_power) == (7, "local", 0.25)
    # Also an option that is given what it would have been anyhow.
    found = parse_arguments(["--num-boundaries", "2", "--preset", "leaf-paper", "--terms", "both"])
    assert (found.num_boundaries, found.terms, found.multiplicity_power) == (2, "both", 0.25)
    assert set(CREDIT_OPTIONS) <= set(vars(found))


def test_of_the_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    from leafkernels.integrations.trl import LeafGRPOConfig

    @dataclass
    class Mine(LeafGRPOConfig):
        num_boundaries: int = 5

    out = str(tmp_path)
    paper = LeafGRPOConfig(out, use_cpu=True, preset="leaf-paper")
    assert (paper.num_generations, paper.num_boundaries, paper.terms, paper.multiplicity_power) == (8, 2, "both", 0.5)
    assert Mine(out, use_cpu=True).num_boundaries == 5
    assert Mine(out, use_cpu=True, preset="leaf-paper").num_boundaries == 2
    assert Mine(out, use_cpu=True, preset="leaf-paper", num_boundaries=3).num_boundaries == 3

    monkeypatch.setitem(PRESETS, "leaf-paper", OTHER)
    found = LeafGRPOConfig(out, use_cpu=True, preset="leaf-paper", terms="global")
    assert (found.num_generations, found.num_boundaries, found.terms, found.multiplicity_power) == (
        4,
        7,
        "global",
        0.25,
    )
    with pytest.raises(ValueError, match="preset must be one of 'leaf-paper', got 'leaf'"):
        LeafGRPOConfig(out, use_cpu=True, preset="leaf")
