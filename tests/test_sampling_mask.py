"""Sampling masks: the distribution over the kept ids, against everything else filled with -inf in float64."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE
from support import examples

import leafkernels
from leafkernels import SamplingMask
from leafkernels.eager.surprisal import merge_surprisal_states
from leafkernels.vocabulary.kept import add_head_gradients, kept_logits, states_of, statistics_of
from leafkernels.vocabulary.sampling_mask import Kept, check_sampling_mask, kept_ids
from leafkernels.vocabulary.slices import Slice

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FAST = ("torch", "triton")
INF = math.inf
V = 75


def mask_of(lists: list[list[int]]) -> SamplingMask:
    return SamplingMask.from_lists(lists, DEVICE)


def possible(lists: list[list[int]], ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Which ids (N, V) a row has, by the definition."""
    result = torch.zeros(len(lists), vocab_size, dtype=torch.bool)
    for row, (kept, token) in enumerate(zip(lists, ids.tolist(), strict=True)):
        kept = [i for i in kept if 0 <= i < vocab_size]
        result[row, kept] = True
        if not kept:
            result[row] = True
        elif 0 <= token < vocab_size:
            result[row, token] = True
    return result.to(DEVICE)


def filled(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, **options: Any) -> tuple[Any, torch.Tensor]:
    """Both results of whole rows, and the gradient of their weighted sum."""
    leaf = logits.detach().clone().requires_grad_()
    found = leafkernels.surprisal_entropy(leaf, ids, backend="torch", **options)
    (gradient,) = torch.autograd.grad((weights * torch.stack(tuple(found))).sum(), leaf)
    return found, gradient


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """Of 1, 3 and 4 parts the first two are kept: 1/4 and 3/4 instead of 1/8 and 3/8."""
    logits = torch.tensor([[1.0, 3.0, 4.0]], device=DEVICE).log().requires_grad_()
    found = leafkernels.surprisal_entropy(
        logits, torch.tensor([1], device=DEVICE), sampling_mask=mask_of([[1, 0]]), backend=backend
    )
    assert found.surprisal.item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert found.entropy.item() == pytest.approx(math.log(4) - 3 / 4 * math.log(3), rel=1e-6)
    (gradient,) = torch.autograd.grad(found.surprisal.sum(), logits)
    assert gradient[0].tolist() == pytest.approx([1 / 4, -1 / 4, 0.0], rel=1e-6)


HARD: dict[str, list[list[int]]] = {
    "no kept ids": [[], [], []],
    "the sampled id alone": [[5], [74], [0]],
    "the sampled id outside": [[1, 2], [3], [70, 71, 72]],
    "duplicates": [[5, 5, 5, 6, 6], [9, 74, 9, 74], [0, 0]],
    "ids out of range": [[-1, 75, 5], [10**12, -(2**62), 74, 30], [-75, 75]],
    "as many as there are": [list(range(75))] * 3,
    "of every kind": [[], [74, 3, 74, -5, 60], list(range(20, 75))],
}


@pytest.mark.parametrize(("case", "masked"), [*((case, False) for case in HARD), ("of every kind", True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_filling_with_minus_infinity(backend: str, case: str, masked: bool, small_blocks: None) -> None:
    """Values and gradients, from logits, in place, and from hidden states with all that a head may do."""
    lists, ids = HARD[case], torch.tensor([5, 74, 0], device=DEVICE)
    dtype = torch.float32 if backend == "triton" else torch.float64
    # The bar of the issue in float64; sums of 75 terms of order 1 in float32.
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-5}
    torch.manual_seed(3)
    temperature, weights = torch.tensor([0.7, 1.0, 1.9], device=DEVICE), torch.randn(2, 3, device=DEVICE)
    mask = torch.tensor([True, False, True], device=DEVICE) if masked else None
    options: dict[str, Any] = {"temperature": temperature, "response_mask": mask}
    hidden, weight, bias = (torch.randn(size, device=DEVICE, dtype=dtype) for size in ((3, 6), (V, 6), V))
    of_head = 4 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) * 0.8 / 4)
    logits = (torch.randn(3, V, device=DEVICE) * 4).to(dtype)
    is_possible = possible(lists, ids, V)
    options["sampling_mask"] = mask_of(lists)

    want = filled(logits.double().masked_fill(~is_possible, -INF), ids, weights, temperature=temperature,
                  response_mask=mask)  # fmt: skip
    for in_place in (False, True):
        leaf = logits.clone().requires_grad_()
        found = leafkernels.surprisal_entropy(leaf * 1, ids, inplace_backward=in_place, backend=backend, **options)
        (gradient,) = torch.autograd.grad((weights * torch.stack(tuple(found))).sum(), leaf)
        torch.testing.assert_close(torch.stack(tuple(found)).double(), torch.stack(tuple(want[0])), **close)
        torch.testing.assert_close(gradient.double(), want[1], **close)
        assert not gradient[~is_possible].any()

    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    found = leafkernels.linear_surprisal_entropy(
        leaves[0], leaves[1], ids, bias=leaves[2], logit_scale=0.8, logit_softcap=4.0, backend=backend, **options
    )
    gradients = torch.autograd.grad((weights * torch.stack(tuple(found))).sum(), leaves)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    of_head = 4 * torch.tanh((exact[0] @ exact[1].T + exact[2]) * 0.8 / 4)
    results, of_logits = filled(of_head.masked_fill(~is_possible, -INF), ids, weights, temperature=temperature,
                                response_mask=mask)  # fmt: skip
    torch.testing.assert_close(torch.stack(tuple(found)).double(), torch.stack(tuple(results)), **close)
    for gradient, expected in zip(gradients, torch.autograd.grad(of_head, exact, of_logits), strict=True):
        torch.testing.assert_close(gradient.double(), expected, **close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_kept_id_leaves_nothing_to_learn(backend: str) -> None:
    logits = torch.randn(2, 9, device=DEVICE, requires_grad=True)
    ids = torch.tensor([4, 0], device=DEVICE)
    found = leafkernels.surprisal_entropy(logits, ids, sampling_mask=mask_of([[4], [0, 0]]), backend=backend)
    assert found.surprisal.tolist() == found.entropy.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad((found.surprisal + 3 * found.entropy).sum(), logits)
    assert not gradient.any()


LEAST = torch.finfo(torch.float32).min
HARD_ROWS = {
    "peaked by 60": [60.0, 0.5, -0.25, 0.125],
    "peaked by 30, a tie": [30.0, 30.0, 0.0, 1.0],
    "shifted up": [1e4, 1e4 + 1, 1e4 - 2, 1e4],
    "shifted down": [-1e4, -1e4 - 1, -1e4 + 2, -1e4],
    "banned ids": [-INF, 1.0, -INF, 2.0],
    "one id that is not banned": [-INF, -INF, 2.0, -INF],
    "the least finite number": [LEAST, 1.0, LEAST, 0.0],
    "nothing but the least": [LEAST] * 4,
    "nothing but banned ids": [-INF] * 4,
    "not a number": [0.0, math.nan, 1.0, 2.0],
    "infinite": [0.0, INF, 1.0, 2.0],
}


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("sampled", [0, 2])
@pytest.mark.parametrize("backend", FAST)
def test_hard_rows_in_float32(backend: str, sampled: int, temperature: float, small_blocks: None) -> None:
    """Kept logits that a softmax written down loses; all others hold what would spoil a row, and are not read."""
    kept = [1, 8, 40, 74]
    logits = torch.full((len(HARD_ROWS), V), math.nan, device=DEVICE)
    logits[:, kept] = torch.tensor(list(HARD_ROWS.values()), device=DEVICE)
    logits.requires_grad_()
    ids = torch.full((len(HARD_ROWS),), kept[sampled], device=DEVICE)
    options: dict[str, Any] = {"temperature": temperature, "sampling_mask": mask_of([kept] * len(HARD_ROWS))}
    found = leafkernels.surprisal_entropy(logits, ids, backend=backend, **options)
    (gradient,) = torch.autograd.grad((found.surprisal + 2 * found.entropy).sum(), logits)
    exact = logits.detach()[:, kept].double().requires_grad_()
    want = leafkernels.surprisal_entropy(
        exact, torch.full_like(ids, sampled), temperature=temperature, backend="reference"
    )
    (expected,) = torch.autograd.grad((want.surprisal + 2 * want.entropy).sum(), exact)
    # An exponent of 60 / 0.5 in powers of two is rounded once: 120 units of it, and a few of what follows.
    for actual, exactly in zip(found, want, strict=True):
        exactly = exactly.detach()
        exactly[exactly > torch.finfo(torch.float32).max] = INF
        torch.testing.assert_close(actual.detach().double(), exactly, rtol=2e-5, atol=1e-30, equal_nan=True)
    size = expected.abs().amax(1, keepdim=True).nan_to_num()
    near = (gradient[:, kept].double() - expected).abs() <= 2e-5 * (expected.abs() + size) + 1e-30
    assert (near | (gradient[:, kept].isnan() & expected.isnan())).all()
    others = torch.ones(V, dtype=torch.bool)
    others[kept] = False
    assert not gradient[:, others].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sampled_id_outside_the_vocabulary(backend: str) -> None:
    """No surprisal, as without a mask; an entropy, and a gradient of NaN at the kept ids alone."""
    logits = torch.randn(2, 9, device=DEVICE, requires_grad=True)
    found = leafkernels.surprisal_entropy(
        logits, torch.tensor([9, -1], device=DEVICE), sampling_mask=mask_of([[1, 2], [3]]), backend=backend
    )
    assert found.surprisal.isnan().all()
    assert found.entropy.isfinite().all()
    (gradient,) = torch.autograd.grad(found.surprisal.sum(), logits, retain_graph=True)
    assert gradient.isnan().nonzero().tolist() == [[0, 1], [0, 2], [1, 3]]
    assert torch.equal(gradient.nan_to_num(), torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [1, 512])
@pytest.mark.parametrize("backend", FAST)
def test_masks_of_1_and_of_512(backend: str, kept: int, dtype: torch.dtype) -> None:
    torch.manual_seed(kept)
    hidden, weight = (torch.randn(size, device=DEVICE).to(dtype) for size in ((2, 130), (900, 130)))
    lists = [torch.randperm(900)[:kept].tolist() for _ in range(2)]
    ids = torch.tensor([row[0] for row in lists], device=DEVICE)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight)]
    found = leafkernels.linear_surprisal_entropy(*leaves, ids, sampling_mask=mask_of(lists), backend=backend)
    gradients = torch.autograd.grad((found.surprisal - 0.3 * found.entropy).sum(), leaves)
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    logits = (exact[0] @ exact[1].T).masked_fill(~possible(lists, ids, 900), -INF)
    want, of_logits = filled(logits, ids, torch.tensor([[1.0], [-0.3]], device=DEVICE))
    # Logits up to 50 are sums of 130 products in float32: 1e-4 of them at most, which the exponential makes relative.
    for actual, exactly in zip(found, want, strict=True):
        torch.testing.assert_close(actual.double(), exactly.detach(), rtol=1e-3, atol=1e-4)
    for actual, exactly in zip(gradients, torch.autograd.grad(logits, exact, of_logits), strict=True):
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(actual.double(), exactly, rtol=rounding + 1e-3, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_clipped_loss_from_logits(backend: str) -> None:
    """As from filled logits, with every term; ratios to log-probabilities over the same ids."""
    torch.manual_seed(2)
    lists, ids = HARD["of every kind"] * 2, torch.tensor([[5, 74, 0], [1, 2, 20]], device=DEVICE)
    logits = torch.randn(2, 3, V, device=DEVICE)
    old, credit = -torch.rand(2, 2, 3, device=DEVICE)
    live = torch.tensor([[1, 1, 1], [1, 0, 1]], device=DEVICE)
    options: dict[str, Any] = {"temperature": 0.8, "kl_coef": 0.1, "ref_logprobs": old - 0.1, "entropy_coef": 0.02}
    is_possible = possible(lists, ids.flatten(), V).view(2, 3, V)
    results = []
    for rows, more in (
        (logits, {"sampling_mask": mask_of(lists), "backend": backend}),
        (logits.double().masked_fill(~is_possible, -INF), {"backend": "torch"}),
    ):
        leaf = rows.requires_grad_()
        found = leafkernels.policy_loss_from_logits(leaf, ids, old, credit, live, **options, **more)
        results.append((*found, *torch.autograd.grad(3 * found.loss, leaf)))
    for actual, want in zip(*results, strict=True):
        # float32, of logits of order 1.
        torch.testing.assert_close(actual.detach().double(), want.detach(), rtol=1e-5, atol=1e-6)


@st.composite
def families(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[list[int]], torch.Tensor, float]:
    rows, vocab_size = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    logit = st.sampled_from((0.0, 1.0, -1.5, 10.0, -30.0, 60.0, -INF, LEAST))
    logits = draw(st.lists(st.lists(logit, min_size=vocab_size, max_size=vocab_size), min_size=rows, max_size=rows))
    kept = st.lists(st.integers(-2, vocab_size + 1), max_size=12)
    lists = draw(st.lists(kept, min_size=rows, max_size=rows))
    ids = draw(st.lists(st.integers(-1, vocab_size), min_size=rows, max_size=rows))
    live = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    tensors = torch.tensor(logits), torch.tensor(ids), torch.tensor(live)
    return tensors[0].to(DEVICE), tensors[1].to(DEVICE), lists, tensors[2].to(DEVICE), draw(st.sampled_from((0.5, 1.0)))


@pytest.mark.parametrize("backend", FAST)
def test_agrees_with_the_reference(backend: str, small_blocks: None) -> None:
    @examples(backend, torch=300)
    @given(families())
    def run(family: Any) -> None:
        logits, ids, lists, live, temperature = family
        options = {"temperature": temperature, "response_mask": live, "sampling_mask": mask_of(lists)}
        results = []
        for name in (backend, "reference"):
            leaf = logits.clone().requires_grad_()
            found = leafkernels.surprisal_entropy(leaf, ids, backend=name, **options)
            # Of a surprisal of inf or NaN no weighted sum is a number.
            (gradient,) = torch.autograd.grad(
                found.surprisal.nan_to_num(0, 0, 0).sum() + 2 * found.entropy.nan_to_num().sum(), leaf
            )
            results.append((*found, gradient))
        for actual, want in zip(*results, strict=True):
            torch.testing.assert_close(actual, want, rtol=2e-5, atol=1e-6, equal_nan=True)

    run()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches_and_empty_vocabularies(backend: str) -> None:
    for rows, vocab_size in ((0, 5), (2, 0), (0, 0)):
        ids = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        mask = mask_of([[0]] * rows)
        logits = torch.zeros(rows, vocab_size, device=DEVICE, requires_grad=True)
        found = leafkernels.surprisal_entropy(logits, ids, sampling_mask=mask, backend=backend)
        assert found.surprisal.shape == (rows,)
        assert found.entropy.isnan().all()
        found.entropy.sum().backward()
        if vocab_size:
            hidden, weight = (torch.zeros(n, 3, device=DEVICE, requires_grad=True) for n in (rows, vocab_size))
            found = leafkernels.linear_surprisal_entropy(hidden, weight, ids, sampling_mask=mask, backend=backend)
            found.surprisal.sum().backward()
            assert weight.grad is not None
            assert not weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_and_padded_rows(backend: str) -> None:
    """Completions of 3, 1 and 2 tokens beside each other, and padded to 3 on either side with ``pad``."""
    torch.manual_seed(5)
    logits, ids = torch.randn(6, 9, device=DEVICE), torch.randint(0, 9, (6,), device=DEVICE)
    packed = mask_of([[1, 2], [], [4], [5, 6, 7], [0, 8], [3]])
    want = leafkernels.surprisal_entropy(logits, ids, sampling_mask=packed, backend=backend)
    lengths = torch.tensor([3, 1, 2], device=DEVICE)[:, None]
    for live in (torch.arange(3, device=DEVICE) < lengths, torch.arange(3, device=DEVICE) >= 3 - lengths):
        wide, wide_ids = torch.full((3, 3, 9), math.nan, device=DEVICE), torch.zeros_like(live, dtype=torch.int64)
        wide[live], wide_ids[live] = logits, ids
        found = leafkernels.surprisal_entropy(
            wide, wide_ids, response_mask=live, sampling_mask=packed.pad(live), backend=backend
        )
        assert torch.equal(found.surprisal[live], want.surprisal)
        assert torch.equal(found.entropy[live], want.entropy)
        assert not found.surprisal[~live].any()
    rows = torch.tensor([4, 0, 0, 1], device=DEVICE)
    some = leafkernels.surprisal_entropy(logits[rows], ids[rows], sampling_mask=packed.index(rows), backend=backend)
    assert torch.equal(some.surprisal, want.surprisal[rows])


@pytest.mark.parametrize("backend", FAST)
def test_the_gradient_of_a_head_has_the_same_bits_every_time(backend: str, small_blocks: None) -> None:
    """Ids that many rows share, in stretches that chunks and tiles cut."""
    torch.manual_seed(1)
    hidden, weight = (torch.randn(n, 7, device=DEVICE, requires_grad=True) for n in (20, 6))
    ids = torch.randint(0, 6, (20,), device=DEVICE)
    mask = mask_of([[0, int(i), 5] for i in ids])
    found = leafkernels.linear_surprisal_entropy(hidden, weight, ids, sampling_mask=mask, backend=backend)
    loss = (found.surprisal + found.entropy).sum()
    runs = [torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_the_gradient_of_a_bias_has_the_same_bits_every_time() -> None:
    """Of ids that so many rows share that several threads add them."""
    rows, num_threads = 200_000, torch.get_num_threads()
    ids, offsets = torch.arange(5).repeat(rows), 5 * torch.arange(rows + 1)
    kept = Kept(ids, torch.arange(rows).repeat_interleave(5), offsets, offsets[:-1])
    gradients, nothing = torch.randn(5 * rows), torch.empty(0)
    torch.use_deterministic_algorithms(False)  # as users run it, which this file's fixture does not
    torch.set_num_threads(4)
    try:
        runs = [torch.zeros(5) for _ in range(8)]
        for run in runs:
            needs = [False, False, True]
            into = nothing, nothing, run
            add_head_gradients("torch", into, gradients, gradients, nothing, nothing, kept, None, needs)
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("autocast", [False, True])
def test_with_a_frozen_head_nothing_is_as_large_as_the_vocabulary(autocast: bool) -> None:
    """What is allocated at a time, both passes; with rows that have the whole vocabulary something is."""
    vocab_size, rows = 50_000, 8
    hidden, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(vocab_size, 16)
    ids = torch.randint(0, vocab_size, (rows,))

    def largest(mask: SamplingMask) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            with torch.autocast("cpu", enabled=autocast):
                found = leafkernels.linear_surprisal_entropy(hidden, weight, ids, sampling_mask=mask, backend="torch")
            (found.surprisal + found.entropy).sum().backward()
        events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    assert largest(SamplingMask.from_lists([[1, 2, 3]] * rows)) < vocab_size
    assert largest(SamplingMask.from_lists([[1, 2, 3]] * (rows - 1) + [[]])) >= vocab_size


def test_kept_ids_in_one_form() -> None:
    ids = torch.tensor([5, 7, 1, 3], device=DEVICE)
    mask = check_sampling_mask(mask_of([[9, 2, 9, -1, 5], [], [4, 11], [10, 12]]), 4, torch.device(DEVICE))
    live = torch.tensor([True, True, True, True], device=DEVICE)
    kept, is_free = kept_ids(mask, ids, 10, live)
    assert kept is not None
    count = int(kept.offsets[-1])
    assert kept.ids[:count].tolist() == [2, 5, 9, 1, 4]
    assert kept.rows[:count].tolist() == [0, 0, 0, 2, 2]
    assert kept.rows[count:].tolist() == [4] * (9 + 4 - count)
    assert kept.offsets.tolist() == [0, 3, 3, 5, 5]
    assert kept.sampled.tolist() == [1, -1, 3, -1]
    assert is_free.tolist() == [False, True, False, True]
    kept, is_free = kept_ids(mask, ids, 10, ~live)
    assert kept is not None
    assert int(kept.offsets[-1]) == int(is_free.sum()) == 0


@given(families(), st.data())
def test_slices_of_a_vocabulary_make_the_whole(family: Any, data: st.DataObject) -> None:
    """Kept ids of slices are those of the whole, and so are the numbers that come of their states together."""
    logits, ids, lists, live, temperature = family
    vocab_size, device = logits.shape[1], torch.device(DEVICE)
    mask = check_sampling_mask(mask_of(lists), len(ids), device)
    temperatures = torch.full((len(ids),), temperature, device=device)
    whole, is_free = kept_ids(mask, ids, vocab_size, live)
    assert whole is not None
    want = statistics_of("torch", kept_logits(logits.double(), whole), whole, temperatures)
    cuts = sorted({0, vocab_size, *data.draw(st.lists(st.integers(0, vocab_size), max_size=3))})
    states, found, picked = [], set(), torch.full(ids.shape, math.nan, dtype=torch.float64, device=device)
    for first, last in itertools.pairwise(cuts):
        part = Slice(torch.tensor(first, device=device), torch.tensor(vocab_size, device=device))
        kept, is_free_too = kept_ids(mask, ids - first, last - first, live, part)
        assert kept is not None
        assert torch.equal(is_free, is_free_too)
        count = int(kept.offsets[-1])
        pairs = zip(kept.rows[:count].tolist(), (kept.ids[:count] + first).tolist(), strict=True)
        assert not found.intersection(pairs := set(pairs))
        found |= pairs
        values = kept_logits(logits[:, first:last].double(), kept)
        of_slice = statistics_of("torch", values, kept, temperatures)
        state, chosen = states_of(of_slice, values, kept, temperatures)
        states.append(state)
        picked = torch.where(picked.isnan(), chosen, picked)
    count = int(whole.offsets[-1])
    assert found == set(zip(whole.rows[:count].tolist(), whole.ids[:count].tolist(), strict=True))
    merged = merge_surprisal_states(torch.cat(states, 2), picked, temperatures, whole.offsets.diff() > 0)
    for actual, exactly in zip(merged[:2], want[:2], strict=True):
        torch.testing.assert_close(actual, exactly, rtol=1e-12, atol=1e-30, equal_nan=True)


def test_how_many_sampled_ids_are_missing() -> None:
    mask = mask_of([[1, 2], [], [4], [7, 7]])
    ids = torch.tensor([[2, 0], [5, 6]], device=DEVICE)
    assert mask.num_missing(ids).item() == 2
    assert mask.num_missing(ids, torch.tensor([[1, 1], [1, 0]], device=DEVICE)).item() == 1
    assert mask_of([[], [], []]).num_missing(torch.zeros(3, dtype=torch.int64, device=DEVICE)).item() == 0
    assert mask.bytes == (5 + 5) * 8


SAMPLERS = [
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_k": 1},
    {"top_k": 5},
    {"min_p": 0.1},
    {"top_k": 7, "top_p": 0.8, "min_p": 0.2, "temperature": 1.7},
    {"top_p": 1e-6, "temperature": 0.5},
]


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_keeps_what_the_samplers_of_transformers_keep(options: dict[str, Any]) -> None:
    from_transformers = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(0)
    logits = (torch.randn(30, 40) * 3).round(decimals=1).to(DEVICE)  # some of them equal
    scores = logits
    for name, processor in (
        ("temperature", "TemperatureLogitsWarper"),
        ("top_k", "TopKLogitsWarper"),
        ("top_p", "TopPLogitsWarper"),
        ("min_p", "MinPLogitsWarper"),
    ):
        if name in options:
            scores = getattr(from_transformers, processor)(options[name])(None, scores)
    mask = SamplingMask.from_logits(logits.view(5, 6, 40), **options)
    assert mask.token_ids.tolist() == (scores > -INF).nonzero()[:, 1].tolist()
    assert mask.offsets.tolist() == [0, *(scores > -INF).sum(1).cumsum(0).tolist()]
    ids = torch.randint(0, 40, (5, 6), device=DEVICE)
    assert SamplingMask.from_logits(logits.view(5, 6, 40), token_ids=ids, **options).num_missing(ids).item() == 0


def test_no_truncation_keeps_no_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 8, device=DEVICE)
    for options in ({}, {"top_p": 1.0}, {"top_k": 0, "min_p": 0.0}, {"top_k": 8}):
        mask = SamplingMask.from_logits(logits, **options)
        assert mask.token_ids.numel() == 0
        assert mask.offsets.tolist() == [0, 0, 0, 0]
    want = SamplingMask.from_logits(logits, top_p=0.7)
    monkeypatch.setattr("leafkernels.vocabulary.sampling_mask._CHUNK", 8)
    assert all(torch.equal(a, b) for a, b in zip(want, SamplingMask.from_logits(logits, top_p=0.7), strict=True))


def difference_of_gradients(top_p: float) -> tuple[float, float]:
    """How far the expected gradient is from that of the truncated policy's return, with a mask and without, relative.

    A table of logits for each prefix, 4 ids, 3 tokens; every sequence with its probability under the sampler, and one
    random number as its reward. The gradient of a sample is -reward times that of its surprisals.
    """
    torch.manual_seed(7)
    length, vocab_size = 3, 4
    table = {
        prefix: (torch.randn(vocab_size, dtype=torch.float64) * 1.5).requires_grad_()
        for n in range(length)
        for prefix in itertools.product(range(vocab_size), repeat=n)
    }
    rewards = {ids: torch.rand(()).item() for ids in itertools.product(range(vocab_size), repeat=length)}
    leaves = list(table.values())
    kept = {prefix: SamplingMask.from_logits(row[None], top_p=top_p).token_ids for prefix, row in table.items()}
    value = torch.zeros((), dtype=torch.float64)
    estimates = [[torch.zeros_like(leaf) for leaf in leaves] for _ in range(2)]
    for ids, reward in rewards.items():
        prefixes = [ids[:n] for n in range(length)]
        if not all(token in kept[prefix] for prefix, token in zip(prefixes, ids, strict=True)):
            continue
        logits = torch.stack([table[prefix] for prefix in prefixes])
        tokens, lists = torch.tensor(ids), [kept[prefix].tolist() for prefix in prefixes]
        surprisals = [
            leafkernels.surprisal_entropy(logits, tokens, sampling_mask=mask).surprisal.sum()
            for mask in (SamplingMask.from_lists(lists), None)
        ]
        banned = ~possible(lists, tokens, vocab_size).cpu()
        truncated = logits.masked_fill(banned, -INF).log_softmax(1)[range(length), tokens]
        probability = truncated.sum().exp()
        value = value + probability * reward
        for estimate, surprisal in zip(estimates, surprisals, strict=True):
            weight = -reward * probability.detach()
            for total, of_leaf in zip(
                estimate, torch.autograd.grad(weight * surprisal, leaves, allow_unused=True), strict=True
            ):
                total += 0 if of_leaf is None else of_leaf
    exact = torch.cat([
        torch.zeros_like(leaf) if g is None else g
        for g, leaf in zip(torch.autograd.grad(value, leaves, allow_unused=True), leaves, strict=True)
    ])  # fmt: skip
    errors = [float((torch.cat(estimate) - exact).norm() / exact.norm()) for estimate in estimates]
    return errors[0], errors[1]


@pytest.mark.parametrize("top_p", [0.9, 0.7, 0.5])
def test_the_expected_gradient_is_that_of_the_truncated_policy(top_p: float) -> None:
    """With the mask to rounding; without it another policy's. The numbers are those of docs/vocabulary.md."""
    with_mask, without = difference_of_gradients(top_p)
    print(f"top-p {top_p}: off by {with_mask:.1e} with the mask, {without:.3f} without")
    assert with_mask < 1e-12
    assert without > 0.05


def test_errors() -> None:
    logits, ids = torch.zeros(2, 3, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    hidden, weight = torch.zeros(2, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    good = mask_of([[0], [1]])
    wrong = [
        (TypeError, "sampling_mask must be a leafkernels.SamplingMask, got tuple", tuple(good)),
        (
            ValueError,
            "sampling_mask.offsets must have one entry more than there are rows, shape (2 + 1,), got shape (2,)",
            mask_of([[0]]),
        ),
        (
            ValueError,
            "sampling_mask.token_ids must have shape (kept ids,), got shape (1, 2)",
            good._replace(token_ids=good.token_ids[None]),
        ),
        (
            TypeError,
            "sampling_mask.token_ids must hold integers, got torch.float32",
            good._replace(token_ids=good.token_ids.float()),
        ),
    ]
    if DEVICE == "cpu":
        text = "sampling_mask.offsets must begin with 0, never fall, and end with at most the 2 kept ids, got "
        for offsets, came in (([1, 1, 2], "1 to 2"), ([0, 2, 1], "0 to 1, falling"), ([0, 1, 3], "0 to 3")):
            wrong.append((ValueError, text + came, good._replace(offsets=torch.tensor(offsets))))
    for error, message, mask in wrong:
        for function, inputs in (
            (leafkernels.surprisal_entropy, (logits, ids)),
            (leafkernels.linear_surprisal_entropy, (hidden, weight, ids)),
        ):
            with pytest.raises(error, match=f"^{re.escape(message)}$"):
                function(*inputs, sampling_mask=mask)
    for options, message in (
        ({"top_p": 0.0}, "top_p must be a share of at most 1, got 0.0"),
        ({"min_p": 1.5}, "min_p must be a share of at most 1, got 1.5"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        (
            {"token_ids": ids[:1]},
            "token_ids must have one entry for each row of logits, shape (2,), got shape (1,)",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            SamplingMask.from_logits(logits, **options)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="^response_mask must be True for each of the 2 rows of the mask, got 3$"):
            good.pad(torch.ones(3))
        with pytest.raises(ValueError, match=r"^rows must be numbers of rows, \(R,\), from 0 to 1, got \[2\] of"):
            good.index(torch.tensor([2]))
