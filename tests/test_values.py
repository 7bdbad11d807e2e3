"""span_values: against the reference from the same prefix lengths, and its gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, options, random_group, token_rows
from support import examples

import leafkernels
import python_ref
from leafkernels.credit.options import NORMALIZE
from python_ref.values import nodes_from_prefix_lengths

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@st.composite
def trees(draw: st.DrawFn) -> dict:
    """Prefix lengths of generated rows, boundaries anywhere, rewards with NaN."""
    rows = draw(token_rows(draw(st.integers(1, 6))))
    # The second kind differs by rounding alone.
    rewards = draw(st.sampled_from([[0.0, 1.0, 0.25, -3.0, math.nan], [30.0, 30 + 2**-19, math.nan]]))
    return {
        "prefix_lengths": python_ref.common_prefix_lengths(rows),
        "boundaries": sorted(draw(st.sets(st.integers(1, 8), max_size=4))),
        "rewards": [draw(st.sampled_from(rewards)) for _ in rows],
        "lengths": [len(row) for row in rows],
        **{k: v for k, v in draw(options()).items() if k not in ("num_boundaries", "min_separation")},
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(backend: str, small_blocks: None) -> None:
    @examples(backend, triton=25)
    @given(trees(), st.integers(0, 2))
    def check(tree: dict, unused_slots: int) -> None:
        shared, positions, rewards, lengths = (tree[k] for k in ("prefix_lengths", "boundaries", "rewards", "lengths"))
        credit = {k: tree[k] for k in ("terms", "multiplicity_power", "leave_one_out")}
        raw = python_ref.span_values(shared, positions, rewards, lengths, **credit)
        (normalized,) = python_ref.normalize_spans([raw], [rewards], tree["normalize"])
        taking_part = [n > 0 and not math.isnan(r) for n, r in zip(lengths, rewards, strict=True)]

        found = leafkernels.span_values(
            torch.tensor(shared, dtype=torch.int32, device=DEVICE).reshape(len(lengths), len(lengths)),
            torch.tensor(positions + [-1] * unused_slots, dtype=torch.int32, device=DEVICE),
            torch.tensor(rewards, dtype=torch.float64, device=DEVICE),
            torch.tensor(lengths, device=DEVICE),
            **credit,
            normalize=tree["normalize"],
            backend=backend,
        )
        settled = python_ref.values.settled(rewards)
        slots = len(positions) + unused_slots + 1
        assert all(field.shape == (len(lengths), slots) for field in found)
        for i in range(len(lengths)):
            start, spans = 0, []
            for s, end in enumerate(found.span_ends[i].tolist()):
                if end > start:
                    spans.append((start, end, float(found.raw[i, s]), float(found.values[i, s])))
                else:
                    assert found.raw[i, s] == found.values[i, s] == 0
                start = max(start, end)
            assert [s[:2] for s in spans] == [s[:2] for s in raw[i]]
            for span, raw_span, normalized_span in zip(spans, raw[i], normalized[i], strict=True):
                assert span[2] == pytest.approx(raw_span[2], rel=1e-12, abs=1e-12)
                assert span[3] == pytest.approx(normalized_span[2], rel=1e-9, abs=1e-9)
            for k, position in enumerate(positions):
                members = nodes_from_prefix_lengths(shared, lengths, position, taking_part)[i]
                members = members if len(members) > 1 else []
                assert int(found.node_sizes[i, k + 1]) == len(members)
                value = float(found.node_values[i, k + 1])
                mean = python_ref.values.mean([settled[j] for j in members]) if members else math.nan
                assert value == pytest.approx(mean, rel=1e-12, abs=1e-12, nan_ok=True)
            scored = [r for r in settled if not math.isnan(r)]
            assert int(found.node_sizes[i, 0]) == len(scored)
            mean = python_ref.values.mean(scored) if scored else math.nan
            assert float(found.node_values[i, 0]) == pytest.approx(mean, rel=1e-12, abs=1e-12, nan_ok=True)

    check()


@pytest.mark.parametrize("normalize", ["span", "batch", "reward_std", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_prompts_without_a_row_have_an_answer(backend: str, shape: tuple[int, ...], normalize: str) -> None:
    rewards = torch.zeros(shape, device=DEVICE)
    spans = leafkernels.span_values(
        torch.zeros((*shape, shape[-1]), dtype=torch.int32, device=DEVICE),
        torch.ones((*shape[:-1], 2), dtype=torch.int32, device=DEVICE),
        rewards,
        rewards.int(),
        normalize=normalize,
        backend=backend,
    )
    assert all(field.shape == (*shape, 3) for field in spans)
    tokens = torch.zeros((*shape, 5), device=DEVICE)
    tree = leafkernels.span_tree(tokens, tokens.int(), rewards, normalize=normalize, backend=backend)
    assert tree.boundaries.tolist() == torch.full((*shape[:-1], 2), -1).tolist()
    assert tree.nodes.shape == (*shape, 2)
    assert tree.spans.values.shape == (*shape, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_beyond_int32(backend: str) -> None:
    """A boundary that far lies after every row, and is shared by identical rows alone."""
    shared = torch.tensor([[3, 3, 1], [3, 3, 1], [1, 1, 3]], device=DEVICE)
    lengths, rewards = torch.tensor([3, 3, 3], device=DEVICE), torch.tensor([1.0, 0.0, 0.5], device=DEVICE)
    for far in (2**31 - 1, 2**31, 2**32 + 2, 2**40):
        boundaries = torch.tensor([1, far], device=DEVICE)
        spans = leafkernels.span_values(shared, boundaries, rewards, lengths, backend=backend)
        nearer = leafkernels.span_values(shared, boundaries.clamp_max(10), rewards, lengths, backend=backend)
        assert torch.equal(spans.node_sizes, nearer.node_sizes)
        assert torch.equal(spans.raw, nearer.raw)


CREDITS = [(terms, leave_one_out) for terms in ("both", "global", "local") for leave_one_out in (False, True)]


@pytest.mark.parametrize(
    ("backend", "terms", "leave_one_out", "normalize"),
    # The gradient has one form on every backend; the interpreter is too slow for all of them.
    [("torch", *credit, normalize) for credit in CREDITS for normalize in NORMALIZE]
    + [("triton", "both", True, "span")],
)
def test_gradcheck(backend: str, terms: str, leave_one_out: bool, normalize: str) -> None:
    groups = [random_group(5, 9, seed, vocabulary=2) for seed in (1, 2)]
    ids = torch.stack([g["token_ids"] for g in groups])
    ids[0, 4] = ids[0, 1]  # an identical pair
    shared = leafkernels.common_prefix_lengths(ids)
    boundaries = torch.tensor([[2, 5], [1, -1]], dtype=torch.int32, device=DEVICE)
    lengths = torch.full((2, 5), 9, device=DEVICE)
    lengths[1, 3] = 0
    shared[1, 3], shared[1, :, 3] = 0, 0
    rewards = torch.tensor(
        [[1.0, 0.0, 0.5, -1.0, 0.25], [2.0, 1.0, 0.0, 0.5, -2.0]], dtype=torch.float64, device=DEVICE
    ).requires_grad_()

    def values(r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spans = leafkernels.span_values(
            shared,
            boundaries,
            r,
            lengths,
            terms=terms,
            leave_one_out=leave_one_out,
            normalize=normalize,
            backend=backend,
        )
        return spans.values, spans.raw

    assert torch.autograd.gradcheck(values, (rewards,))


def test_gradient_is_zero_for_missing_rewards_and_equal_ones() -> None:
    group = random_group(4, 9, seed=1, vocabulary=2)
    shared = leafkernels.common_prefix_lengths(group["token_ids"])
    boundaries = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    lengths = torch.full((4,), 9, device=DEVICE)
    for normalize in ("span", "batch", "reward_std"):
        rewards = torch.tensor([1.0, math.nan, 0.0, 1.0], device=DEVICE, requires_grad=True)
        leafkernels.span_values(shared, boundaries, rewards, lengths, normalize=normalize).values[:, 0].sum().backward()
        assert rewards.grad is not None
        assert rewards.grad.isfinite().all()
        assert rewards.grad[1] == 0
        for rewards in ([0.3] * 4, [30.0, 30 + 2**-19, 30.0, math.nan]):
            equal = torch.tensor(rewards, device=DEVICE, requires_grad=True)
            spans = leafkernels.span_values(shared, boundaries, equal, lengths, normalize=normalize)
            assert not spans.values.any() and not spans.raw.any()
            spans.values.sum().backward()
            assert equal.grad is not None
            assert equal.grad.isfinite().all() and not equal.grad[equal.isnan()].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_advantages_are_linear_in_rewards_end_to_end(backend: str) -> None:
    """normalize="none": the Jacobian applied to the rewards gives the advantages, and logprobs get no gradient."""
    group = random_group(6, 12, seed=8, vocabulary=2)
    rewards = group["rewards"].double().requires_grad_()
    logprobs = group["logprobs"].requires_grad_()

    def advantages(r: torch.Tensor) -> torch.Tensor:
        return leafkernels.span_advantages(logprobs, group["token_ids"], r, normalize="none", backend=backend)

    out = advantages(rewards)
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)
    (out * weights).sum().backward()
    assert rewards.grad is not None
    assert logprobs.grad is None
    torch.testing.assert_close((rewards.grad * rewards).sum().float(), (out * weights).sum(), rtol=1e-5, atol=1e-6)
    step = torch.zeros_like(rewards)
    step[2] = 1.0
    change = ((advantages(rewards + step) - out) * weights).sum()
    torch.testing.assert_close(rewards.grad[2].float(), change.detach(), rtol=1e-4, atol=1e-5)


def test_values_do_not_depend_on_the_other_prompts_of_the_call() -> None:
    """To the bit. PyTorch raises the last few numbers of a tensor to a power by other code than the rest."""
    for group in range(3, 60):
        prompts = torch.full((3, group, group), 4, dtype=torch.int32, device=DEVICE)
        prompts[:, 0, 1:] = prompts[:, 1:, 0] = 0  # all but one share a node
        boundaries = torch.tensor([[2]] * 3, device=DEVICE)
        rewards = torch.arange(3 * group, dtype=torch.float64, device=DEVICE).view(3, -1)
        lengths = torch.full((3, group), 4, device=DEVICE)
        options = {"multiplicity_power": 0.25, "normalize": "none", "backend": "torch"}
        whole = leafkernels.span_values(prompts, boundaries, rewards, lengths, **options)
        for prompt in range(3):
            rows = (prompts[prompt], boundaries[prompt], rewards[prompt], lengths[prompt])
            assert torch.equal(leafkernels.span_values(*rows, **options).values, whole.values[prompt])
