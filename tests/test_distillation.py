"""FiRe-OPD: by hand, against the reference, its laws, and the FiRe-OPD authors' own results."""

import gzip
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE
from support import examples
from torch import Tensor

import leafkernels
import python_ref
from leafkernels import FireOPD, FireStatistics, fire_opd, fire_statistics, fire_teachers, policy_loss
from leafkernels.credit.distillation import SCOPES, FireOptions, _read_scope
from python_ref.distillation import _mean_weight, keep_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAN, INF = math.nan, math.inf
FAST = ("torch", "triton")
PLAIN: dict[str, Any] = {"drop": 0.0, "alpha": 0.0, "beta": 0.0}


class Batch(NamedTuple):
    """The arguments of ``fire_opd`` in their order."""

    old_logprobs: Tensor
    teacher_logprobs: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    response_mask: Tensor

    @property
    def statistics_inputs(self) -> tuple[Tensor, ...]:
        return self[1:]

    def rows(self, index: Any) -> "Batch":
        return Batch(*(tensor[index] for tensor in self))

    def lists(self) -> tuple[Any, ...]:
        return tuple(tensor.tolist() for tensor in self)

    def poured(self, fill: float = NAN) -> "Batch":
        """With ``fill`` wherever no token counts."""
        tokens = (tensor.masked_fill(~self.response_mask, fill) for tensor in self[:-1])
        return Batch(*tokens, self.response_mask)

    @property
    def taken(self) -> Tensor:
        """What is packed: the tokens that count, and the first of every other row."""
        taken = self.response_mask.clone()
        taken[1::2, :1] = True
        return taken

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.nn.functional.pad(self.taken.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def batch(seed: int, rows: int, tokens: int, dtype: torch.dtype = torch.float32, live: float = 0.7) -> Batch:
    """Random rows, some of them empty; every third score is the one before."""
    generator = torch.Generator().manual_seed(seed)
    old, teacher = (-3 * torch.rand(rows, tokens, generator=generator) for _ in range(2))
    student_entropy, teacher_entropy = (2 * torch.rand(rows, tokens, generator=generator) for _ in range(2))
    mask = torch.rand(rows, tokens, generator=generator) < live
    for row in range(2, rows, 3):
        teacher[row], mask[row] = teacher[row - 1], mask[row - 1]
    floats = (tensor.to(dtype).to(DEVICE) for tensor in (old, teacher, student_entropy, teacher_entropy))
    return Batch(*floats, mask.to(DEVICE))


seeds, sizes = st.integers(0, 10**6), st.tuples(st.integers(1, 6), st.integers(1, 9))
OPTIONS = st.fixed_dictionaries(
    {
        "drop": st.sampled_from([0.0, 0.2, 0.25, 0.5, 1.0]),
        "alpha": st.sampled_from([0.0, 1.0, 2.5]),
        "beta": st.sampled_from([0.0, 1.0, 0.5]),
        "normalize": st.sampled_from(SCOPES),
        "extrapolation": st.sampled_from([1.0, 1.25]),
    }
)


def assert_same(found: FireOPD, expected: dict[str, list] | FireOPD, tolerance: float = 1e-5) -> None:
    """Which rows are kept exactly, and numbers to a relative and absolute tolerance."""
    fields = expected if isinstance(expected, dict) else expected._asdict()
    for name, tensor in found._asdict().items():
        want = torch.as_tensor(fields[name], dtype=None if isinstance(fields[name], Tensor) else torch.float64)
        want = want.reshape(tensor.shape).to(tensor)
        # Scores and threshold are float32 always, and may round the other way.
        close = max(tolerance, 2e-7) if tolerance and tensor.dtype == torch.float32 else tolerance
        torch.testing.assert_close(tensor, want, rtol=close, atol=close, equal_nan=True, msg=name)


def loss_and_gradient(logprobs: Tensor, old: Tensor, fire: FireOPD, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logprobs.detach().clone().requires_grad_()
    loss = policy_loss(leaf, old, fire.advantages, fire.response_mask, **options).loss
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("backend", [*BACKENDS, "python_ref"])
def test_by_hand(backend: str) -> None:
    """Three rows, scores -1, -2 and -4: at a half, the quantile is -2, and the row that has it stays."""
    ln2 = math.log(2)
    tables: dict[str, Any] = {
        "old_logprobs": [[-1.0, -1.0, NAN], [-2.0, NAN, NAN], [-1.0, -1.0, -1.0]],
        "teacher_logprobs": [[-0.5, -1.5, NAN], [-2.0, NAN, NAN], [-4.0, -4.0, -4.0]],
        "student_entropy": [[0.0, ln2, NAN], [2 * ln2, NAN, NAN], [ln2, 0.0, ln2]],
        "teacher_entropy": [[1.0, 0.0, NAN], [0.0, NAN, NAN], [2.0, 2.0, 0.0]],
        "response_mask": [[True, True, False], [True, False, False], [True, True, True]],
    }
    # Sureness 1/2, 1 | 1 | 0, 0, 1 and doubt 0, 1/2 | 1 | 1/2, 0, 1/2.
    raw = [[1.5, 3.0, 0.0], [4.0, 0.0, 0.0], [1.5, 1.0, 3.0]]
    options: dict[str, Any] = {"drop": 0.5}
    for normalize, means in (("batch", [14 / 6] * 3), ("kept", [8.5 / 3] * 3), ("trajectory", [2.25, 4.0, 5.5 / 3])):
        weights = [[w / mean for w in row] for row, mean in zip(raw, means, strict=True)]
        advantages = [[0.5 * weights[0][0], -0.5 * weights[0][1], 0.0], [0.0] * 3, [0.0] * 3]
        if backend == "python_ref":
            found = python_ref.fire_opd(**tables, **options, normalize=normalize)
            assert found["keep"] == [True, True, False] and found["threshold"] == [-2.0]
            torch.testing.assert_close(torch.tensor(found["weights"]), torch.tensor(weights))
            torch.testing.assert_close(torch.tensor(found["advantages"]), torch.tensor(advantages))
            continue
        tensors = {name: torch.tensor(table, device=DEVICE) for name, table in tables.items()}
        fire = fire_opd(**tensors, **options, normalize=normalize, backend=backend)
        expected = {
            "advantages": advantages,
            "weights": weights,
            "response_mask": [[True, True, False], [True, False, False], [False] * 3],
            "keep": [True, True, False],
            "scores": [-1.0, -2.0, -4.0],
            "threshold": [-2.0],
        }
        assert_same(fire, expected, 1e-6)
        rows = fire_statistics(*list(tensors.values())[1:], backend=backend)
        found_rows = torch.tensor(
            [
                [2.0, -2.0, 1.0, ln2, 1.0, ln2, 0.0],
                [1.0, -2.0, 0.0, 2 * ln2, 0.0, 2 * ln2, 0.0],
                [3.0, -12.0, 2.0, ln2, 4.0, 2 * ln2, 2 * ln2],
            ],
            dtype=torch.float64,
            device=DEVICE,
        )
        torch.testing.assert_close(rows.rows, found_rows, rtol=1e-6, atol=1e-6)
        assert float(rows.teacher_entropy_max) == 2.0
        assert float(rows.student_entropy_max) == pytest.approx(2 * ln2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(backend: str, small_blocks: None) -> None:
    """Padded, with NaN in the padding, and packed; sums of at most 54 numbers of order 1."""
    dtype, tolerance = (torch.float64, 1e-12) if backend == "torch" else (torch.float32, 2e-6)

    @examples(backend, triton=12)
    @given(seeds, sizes, OPTIONS)
    @example(0, (1, 1), {"drop": 1.0, "alpha": 1.0, "beta": 1.0, "normalize": "kept", "extrapolation": 1.0})
    def run(seed: int, size: tuple[int, int], options: dict[str, Any]) -> None:
        case = batch(seed, *size, dtype).poured()
        base = case.old_logprobs.flip(0).nan_to_num() - 0.1
        expected = python_ref.fire_opd(*case.lists(), **options, base_logprobs=base.tolist())
        found = fire_opd(*case, **options, base_logprobs=base, backend=backend)
        assert found.advantages.dtype == found.weights.dtype == dtype
        assert_same(found, expected, tolerance)
        packed = fire_opd(
            *case.rows(case.taken),
            **options,
            base_logprobs=base[case.taken],
            cu_seqlens=case.cu_seqlens,
            backend=backend,
        )
        for name in ("advantages", "response_mask", "weights"):
            want = getattr(found, name)[case.taken]
            torch.testing.assert_close(getattr(packed, name), want, rtol=tolerance, atol=tolerance)
        assert torch.equal(packed.keep, found.keep)

    run()


def test_what_rows_say_together() -> None:
    """The quantile, the least score that reaches it, the maxima and the mean, of scores near, far, equal, infinite."""
    scores = st.sampled_from([-1.0, -1.0000001, -2.5, -300.0, 0.0, -0.0, 1e-30, -INF, NAN])

    @examples(torch=200)
    @given(st.lists(scores, max_size=7), st.sampled_from([0.0, 0.2, 0.3, 0.29, 0.5, 2 / 3, 1.0]), st.booleans(), seeds)
    @example([-3.0 - i for i in range(101)], 0.29, True, 0)
    @example([-3.0 - i for i in range(31)], 0.1, False, 0)
    def run(drawn: list[float], drop: float, only_kept: bool, seed: int) -> None:
        scores = torch.tensor(drawn, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.rand(len(drawn), 7, generator=generator, dtype=torch.float64)
        rows[:, 0] = torch.where(scores.isnan(), 0.0, 1.0)
        rows[scores.isnan()] = 0.0
        rows[:, 1] = torch.where(scores.isnan(), 0.0, scores.double())
        check_scope(rows, drop, 1.0, 0.5, only_kept)

    run()


@pytest.mark.parametrize("only_kept", [False, True])
def test_scopes_of_many_rows(only_kept: bool) -> None:
    scores = fire_statistics(*batch(3, 2500, 3).statistics_inputs).scores.cpu()
    rows = torch.rand(2500, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows[:, 0], rows[:, 1] = 1.0, scores.double()
    check_scope(torch.where(scores.isnan()[:, None], 0.0, rows), 0.2, 1.0, 2.0, only_kept)


def check_scope(rows: torch.Tensor, drop: float, alpha: float, beta: float, only_kept: bool) -> None:
    """What the rows say together, against the reference."""
    statistics = FireStatistics(rows.to(DEVICE))
    found = _read_scope(statistics, drop, FireOptions(alpha, beta, 1.0), only_kept)
    keep, threshold, least = keep_rows(statistics.scores.tolist(), drop)
    counting = [row for row, kept in zip(rows.tolist(), keep, strict=True) if kept or not only_kept]
    maxima = [max([0.0, *column]) for column in rows[:, 2:4].T.tolist()]
    maxima = [max(largest, 1e-6) for largest in maxima]
    mean = _mean_weight(counting, *maxima, alpha, beta)
    assert float(found.least) == least or math.isnan(least)
    numbers = torch.stack([found.threshold, *found.maxima, found.mean]).cpu()
    expected = torch.tensor([threshold, *maxima, mean], dtype=torch.float64)
    torch.testing.assert_close(numbers, expected, rtol=1e-6, atol=1e-12, equal_nan=True)


# --- Laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FAST)
def test_nothing_asked_for_is_plain_distillation(backend: str) -> None:
    @examples(backend)
    @given(seeds, sizes, st.sampled_from(SCOPES))
    def run(seed: int, size: tuple[int, int], normalize: str) -> None:
        case = batch(seed, *size).poured()
        difference = torch.where(case.response_mask, case.teacher_logprobs - case.old_logprobs, 0.0)
        plain = fire_opd(*case[:2], None, None, case.response_mask, **PLAIN, normalize=normalize, backend=backend)
        assert torch.equal(plain.advantages, difference)
        assert torch.equal(plain.response_mask, case.response_mask)
        assert torch.equal(plain.weights, case.response_mask.float())
        # Filter alone, and weights alone.
        filtered = fire_opd(*case, **{**PLAIN, "drop": 0.5}, normalize=normalize, backend=backend)
        both = fire_opd(*case, drop=0.5, normalize=normalize, backend=backend)
        assert torch.equal(filtered.keep, both.keep)
        assert torch.equal(filtered.advantages, torch.where(both.response_mask, difference, 0.0))
        weighted = fire_opd(*case, drop=0.0, normalize=normalize, backend=backend)
        assert torch.equal(weighted.keep, case.response_mask.any(1))
        torch.testing.assert_close(weighted.advantages, weighted.weights * difference)

    run()


@pytest.mark.parametrize("backend", FAST)
def test_weights_have_mean_one_over_what_is_asked_for(backend: str) -> None:
    @examples(backend)
    @given(seeds, sizes, OPTIONS)
    def run(seed: int, size: tuple[int, int], options: dict[str, Any]) -> None:
        case = batch(seed, *size)
        options = {**options, "extrapolation": 1.0}
        fire, mask = fire_opd(*case, **options, backend=backend), case.response_mask
        sum_per_row, lengths = fire.weights.sum(1), mask.sum(1).float()
        if options["normalize"] == "batch":
            sum_per_row, lengths = sum_per_row.sum(), lengths.sum()
        if options["normalize"] == "kept":
            sum_per_row, lengths = sum_per_row[fire.keep].sum(), lengths[fire.keep].sum()
        torch.testing.assert_close(sum_per_row, lengths, rtol=2e-6, atol=1e-6)
        assert (fire.weights > 0).equal(mask)
        signs = torch.where(fire.response_mask, case.teacher_logprobs - case.old_logprobs, 0.0).sign()
        assert torch.equal(fire.advantages.sign(), signs)

    run()


@pytest.mark.parametrize("backend", FAST)
def test_sure_teachers_and_unsure_students_weigh_more(backend: str) -> None:
    """With the maxima and the mean held fixed, entropy by entropy; a constant one says nothing; units do not matter."""

    @examples(backend, triton=3)
    @given(seeds, sizes)
    def run(seed: int, size: tuple[int, int]) -> None:
        case = batch(seed, *size)
        live = case.response_mask
        statistics = fire_statistics(*case.statistics_inputs, backend=backend)
        fixed: dict[str, Any] = {"drop": 0.0, "statistics": statistics, "backend": backend}
        weights = fire_opd(*case, **fixed).weights
        less_sure = fire_opd(*case._replace(teacher_entropy=case.teacher_entropy + 0.1), **fixed).weights
        below_max = case.teacher_entropy + 0.1 < statistics.teacher_entropy_max
        assert (less_sure <= weights).all()
        assert (less_sure < weights)[live & below_max].all()
        surer = fire_opd(*case._replace(student_entropy=case.student_entropy * 0.9), **fixed).weights
        assert (surer < weights)[live].all()
        same, one = torch.full_like(case.teacher_entropy, 0.7), live.float()
        without_teacher = fire_opd(*case, alpha=0.0, drop=0.0, backend=backend).weights
        found = fire_opd(*case._replace(teacher_entropy=same), drop=0.0, backend=backend).weights
        torch.testing.assert_close(found, without_teacher, rtol=1e-6, atol=1e-6)
        without_student = fire_opd(*case, beta=0.0, drop=0.0, backend=backend).weights
        found = fire_opd(*case._replace(student_entropy=same), drop=0.0, backend=backend).weights
        torch.testing.assert_close(found, without_student, rtol=1e-6, atol=1e-6)
        both = case._replace(student_entropy=same, teacher_entropy=2 * same)
        torch.testing.assert_close(fire_opd(*both, drop=0.0, backend=backend).weights, one, rtol=1e-6, atol=1e-6)
        bits = case._replace(student_entropy=case.student_entropy / math.log(2))
        bits = bits._replace(teacher_entropy=case.teacher_entropy * 8)
        torch.testing.assert_close(fire_opd(*bits, drop=0.0, backend=backend).weights, weights, rtol=1e-5, atol=1e-6)

    run()


@pytest.mark.parametrize("backend", FAST)
def test_the_filter(backend: str) -> None:
    """Monotone in drop, unmoved by an affine change of the scores, and never without the best row."""

    @examples(backend)
    @given(seeds, sizes, st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.9, 1.0]), st.sampled_from([0.5, 1.0, 8.0]))
    def run(seed: int, size: tuple[int, int], drop: float, factor: float) -> None:
        case = batch(seed, *size)
        # Eighths: sums are exact, and scores that are equal stay so.
        case = case._replace(teacher_logprobs=(8 * case.teacher_logprobs).round() / 8)
        fire = fire_opd(*case, drop=drop, backend=backend)
        has_tokens = case.response_mask.any(1)
        assume(bool(has_tokens.any()))
        less = fire_opd(*case, drop=drop / 2, backend=backend)
        assert not (fire.keep & ~less.keep).any()
        moved = case._replace(teacher_logprobs=factor * case.teacher_logprobs - 2.0)
        assert torch.equal(fire_opd(*moved, drop=drop, backend=backend).keep, fire.keep)
        scores = fire.scores[has_tokens]
        assert fire.keep[has_tokens][scores == scores.max()].all()
        assert (fire.keep == (has_tokens & (fire.scores >= fire.threshold))).all() or scores.unique().numel() > 1
        for score in scores.unique():
            assert fire.keep[has_tokens][scores == score].unique().numel() == 1
        if scores.unique().numel() == scores.numel():
            dropped = int((~fire.keep[has_tokens]).sum())
            assert dropped == math.ceil(round(drop * (scores.numel() - 1), 9))

    run()


@pytest.mark.parametrize("backend", FAST)
def test_what_does_not_count_has_no_gradient_and_leaks_nothing(backend: str) -> None:
    @examples(backend, triton=4)
    @given(seeds, sizes, st.sampled_from(SCOPES))
    def run(seed: int, size: tuple[int, int], normalize: str) -> None:
        case = batch(seed, *size)
        logprobs = case.old_logprobs + 0.1
        expected = None
        for fill in (0.0, NAN, INF, -INF):
            dirty = case.poured(fill)
            inputs = [tensor.clone().requires_grad_() for tensor in dirty[:-1]]
            fire = fire_opd(*inputs, case.response_mask, normalize=normalize, backend=backend)
            assert not any(tensor.requires_grad for tensor in fire)
            policy = logprobs.masked_fill(~case.response_mask, fill)
            loss, gradient = loss_and_gradient(policy, dirty.old_logprobs, fire)
            assert not gradient[~fire.response_mask].any()
            found = (*fire, loss, gradient)
            expected = expected or found
            for actual, want in zip(found, expected, strict=True):
                torch.testing.assert_close(actual, want, rtol=0, atol=0, equal_nan=True)

    run()


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_with_the_statistics_of_all_give_the_whole(backend: str) -> None:
    """Bit for bit, rows being what they were; and a permutation of rows permutes, and padding changes nothing."""

    @examples(backend, triton=4)
    @given(seeds, sizes, OPTIONS, st.integers(1, 3))
    def run(seed: int, size: tuple[int, int], options: dict[str, Any], step: int) -> None:
        case = batch(seed, *size)
        call: dict[str, Any] = {**options, "extrapolation": 1.0, "backend": backend}
        whole = fire_opd(*case, **call)
        shards = [case.rows(slice(start, start + step)) for start in range(0, size[0], step)]
        parts = [fire_statistics(*shard.statistics_inputs, backend=backend) for shard in shards]
        statistics = FireStatistics.concatenate(parts)
        found = [fire_opd(*shard, **call, statistics=statistics) for shard in shards]
        for name in ("advantages", "response_mask", "weights", "keep", "scores"):
            joined = torch.cat([getattr(part, name) for part in found])
            torch.testing.assert_close(joined, getattr(whole, name), rtol=0, atol=0, equal_nan=True)
        for part in found:
            torch.testing.assert_close(part.threshold, whole.threshold, rtol=0, atol=0, equal_nan=True)
        order = torch.randperm(size[0], generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        permuted = fire_opd(*case.rows(order), **call)
        assert_same(permuted, {name: t if t.dim() == 0 else t[order] for name, t in whole._asdict().items()}, 2e-6)
        wide = fire_opd(*(torch.nn.functional.pad(tensor, (2, 3)) for tensor in case), **call)
        narrow = {name: t[:, 2:-3] if t.dim() == 2 else t for name, t in wide._asdict().items()}
        assert_same(whole, narrow, 2e-6)

    run()


def test_teachers_that_are_one_and_teachers_that_are_exchanged() -> None:
    case = batch(11, 6, 5)
    labels = ["math", "code", "math", "math", "code", "math"]

    def teacher(shift: float) -> Any:
        return lambda rows: (case.teacher_logprobs[rows] + shift, case.teacher_entropy[rows])

    one = fire_teachers(labels, {"math": teacher(0.0), "code": teacher(0.0)}, device=DEVICE)
    assert torch.equal(one[0], case.teacher_logprobs) and torch.equal(one[1], case.teacher_entropy)
    two = fire_teachers(labels, {"math": teacher(0.0), "code": teacher(-1.0)}, device=DEVICE)
    is_code = torch.tensor([label == "code" for label in labels], device=DEVICE)
    assert torch.equal(two[0], torch.where(is_code[:, None], case.teacher_logprobs - 1.0, case.teacher_logprobs))
    swapped = ["code" if label == "math" else "math" for label in labels]
    exchanged = fire_teachers(swapped, {"code": teacher(0.0), "math": teacher(-1.0)}, device=DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(two, exchanged, strict=True))


def test_the_expectation_is_the_divergence() -> None:
    """Over a vocabulary, each of whose ids is a row: the mean of -A is KL(student || teacher), and so the gradient."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)[:, None]
    ids = torch.arange(5)[:, None]
    found = leafkernels.surprisal_entropy(logits.expand(5, 1, 5), ids)
    old = found.logprobs.detach()
    fire = fire_opd(old, teacher, None, None, torch.ones(5, 1), **PLAIN)
    divergence = (logits.log_softmax(0).exp() * (logits.log_softmax(0) - teacher[:, 0])).sum()
    torch.testing.assert_close(-(old.exp() * fire.advantages).sum(), divergence.detach())
    weighted = fire.advantages * old.exp()
    loss = policy_loss(found.logprobs, old, weighted, fire.response_mask, aggregate="sum").loss
    expected = torch.autograd.grad(divergence, logits)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


# --- Edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_and_no_token(backend: str) -> None:
    for rows, tokens, live in ((0, 3, 0.5), (3, 0, 0.5), (3, 2, -1.0)):
        case = batch(1, rows, tokens, live=live).poured()
        for normalize in SCOPES:
            fire = fire_opd(*case, normalize=normalize, backend=backend)
            assert fire.advantages.shape == (rows, tokens)
            assert not any(tensor.any() for tensor in fire[:4])
            assert fire.scores.isnan().all() and fire.threshold.isnan()
    empty = torch.zeros(0, device=DEVICE)
    offsets = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    packed = fire_opd(empty, empty, empty, empty, empty, cu_seqlens=offsets, backend=backend)
    assert packed.advantages.shape == (0,) and packed.keep.tolist() == [False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference_where_tokens_are_banned(backend: str, small_blocks: None) -> None:
    """-inf of teacher, student and base, anywhere, until no row is left: what stays is finite, in every scope."""
    tolerance = 1e-12 if backend == "torch" else 2e-6
    dtype = torch.float64 if backend == "torch" else torch.float32

    @examples(backend, triton=5)
    @given(seeds, sizes, OPTIONS, st.sampled_from([0.05, 0.3, 1.0]))
    @example(0, (1, 1), {"drop": 0.0, "alpha": 1.0, "beta": 1.0, "normalize": "kept", "extrapolation": 1.0}, 1.0)
    def run(seed: int, size: tuple[int, int], options: dict[str, Any], share: float) -> None:
        case = batch(seed, *size, dtype).poured()
        generator = torch.Generator().manual_seed(seed)
        banned = [(torch.rand(size, generator=generator) < share).to(DEVICE) for _ in range(3)]
        base = case.old_logprobs.flip(0).nan_to_num().masked_fill(banned[2], -INF)
        case = case._replace(
            old_logprobs=case.old_logprobs.masked_fill(banned[0], -INF),
            teacher_logprobs=case.teacher_logprobs.masked_fill(banned[1], -INF),
        )
        expected = python_ref.fire_opd(*case.lists(), **options, base_logprobs=base.tolist())
        found = fire_opd(*case, **options, base_logprobs=base, backend=backend)
        assert_same(found, expected, tolerance)
        live = case.response_mask
        assert torch.equal(found.keep & (banned[1] & live).any(1), torch.zeros_like(found.keep))
        assert found.advantages.isfinite().all() and found.weights.isfinite().all()
        left_out = banned[0] | (banned[2] & (options["extrapolation"] != 1))
        assert torch.equal(found.response_mask, live & ~left_out & found.keep[:, None])
        loss, gradient = loss_and_gradient(case.old_logprobs, case.old_logprobs, found)
        assert loss.isfinite() and gradient.isfinite().all()
        packed = fire_opd(
            *case.rows(case.taken),
            **options,
            base_logprobs=base[case.taken],
            cu_seqlens=case.cu_seqlens,
            backend=backend,
        )
        assert torch.equal(packed.response_mask, found.response_mask[case.taken])
        assert torch.equal(packed.keep, found.keep)

    run()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", SCOPES)
def test_a_banned_row_leaves_every_scope(backend: str, normalize: str) -> None:
    """Where it ties, where nothing is dropped, where it is alone, and where its student bans the token as well."""
    case = batch(2, 4, 3, live=2.0)
    case.teacher_logprobs[:, 1] = -INF
    options: dict[str, Any] = {"normalize": normalize, "backend": backend}
    ties = fire_opd(*case, drop=0.5, **options)
    assert not ties.keep.any() and not ties.response_mask.any() and not ties.advantages.any()
    alone = fire_opd(*case.rows(slice(0, 1)), drop=0.0, **options)
    assert not alone.keep.any() and not alone.advantages.any() and alone.weights.isfinite().all()
    case = batch(2, 4, 3, live=2.0)
    case.teacher_logprobs[3, 1] = case.old_logprobs[3, 1] = -INF
    fire = fire_opd(*case, drop=0.0, **options)
    assert fire.keep.tolist() == [True, True, True, False] and fire.advantages.isfinite().all()
    if normalize == "kept":
        torch.testing.assert_close(fire.weights[:3].mean().item(), 1.0)
    statistics = fire_statistics(*case.statistics_inputs, backend=backend)
    parts = [fire_opd(*case.rows(slice(i, i + 1)), drop=0.0, statistics=statistics, **options) for i in range(4)]
    torch.testing.assert_close(torch.cat([part.advantages for part in parts]), fire.advantages, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_no_number_says_anything_of(backend: str) -> None:
    """A token that a teacher bans drops its row; NaN and +inf where a token counts reach the loss."""
    case = batch(2, 5, 4, live=2.0)
    case.teacher_logprobs[3, 1] = -INF
    fire = fire_opd(*case, drop=0.2, backend=backend)
    assert not fire.keep[3] and fire.keep.sum() == 4
    assert fire.advantages.isfinite().all() and fire.weights.isfinite().all()
    loss, gradient = loss_and_gradient(case.old_logprobs, case.old_logprobs, fire)
    assert loss.isfinite() and gradient.isfinite().all() and not gradient[3].any()
    case.teacher_logprobs[3, 1] = NAN
    fire = fire_opd(*case, drop=0.2, backend=backend)
    assert fire.keep[3] and fire.scores[3].isnan()
    assert loss_and_gradient(case.old_logprobs, case.old_logprobs, fire)[0].isnan()
    case.teacher_logprobs[3, 1] = INF
    assert fire_opd(*case, drop=0.2, backend=backend).advantages[3, 1] == INF
    for name in ("teacher_entropy", "student_entropy"):
        case = batch(2, 5, 4, live=2.0)
        getattr(case, name)[0, 0] = NAN
        assert fire_opd(*case, drop=0.0, backend=backend).weights.isnan().all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, backend: str) -> None:
    case = batch(5, 4, 6, dtype)
    fire = fire_opd(*case, backend=backend)
    assert fire.advantages.dtype == fire.weights.dtype == torch.float32
    assert_same(fire, python_ref.fire_opd(*case.lists()), 2e-6)
    mixed = case._replace(old_logprobs=case.old_logprobs.float())
    assert_same(fire_opd(*mixed, backend=backend), fire, 0.0)


@pytest.mark.parametrize("backend", FAST)
def test_strides_and_masks_of_other_dtypes(backend: str) -> None:
    case = batch(6, 4, 6)
    expected = fire_opd(*case, backend=backend)
    wide = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in case]
    across = [tensor.T.contiguous().T for tensor in case]
    for tensors in (wide, across, [*case[:-1], case.response_mask.to(torch.uint8)], [*case[:-1], 2.0 * case[-1]]):
        assert_same(fire_opd(*tensors, backend=backend), expected, 0.0)


@pytest.mark.parametrize("backend", FAST)
def test_compiles_into_one_graph(backend: str) -> None:
    case = batch(7, 4, 6)
    packed = case.rows(case.taken)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        statistics = fire_statistics(*tensors[1:5], backend=backend)
        whole = fire_opd(*tensors[:5], normalize="kept", statistics=statistics, backend=backend)
        rows = fire_opd(*tensors[5:10], normalize="trajectory", cu_seqlens=tensors[10], backend=backend)
        return (*whole, *rows, statistics.teacher_entropy_max)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    call = (*case, *packed, case.cu_seqlens)
    for found, want in zip(compiled(*call), step(*call), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


def test_extrapolation() -> None:
    """lambda l_T + (1 - lambda) l_0, and at 1 a base that is NaN is not read."""
    case = batch(8, 3, 4)
    base = case.old_logprobs - 0.5
    plain = fire_opd(*case, **PLAIN)
    found = fire_opd(*case, **PLAIN, base_logprobs=base, extrapolation=1.25)
    want = torch.where(case.response_mask, plain.advantages + 0.25 * (case.teacher_logprobs - base), 0.0)
    torch.testing.assert_close(found.advantages, want)
    assert_same(fire_opd(*case, **PLAIN, base_logprobs=base * NAN), plain, 0.0)


# --- Teachers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        [1, 0, 1],
        (1, 0, 1),
        torch.tensor([1, 0, 1]),
        torch.tensor([1, 0, 1]).numpy(),
        [torch.tensor(1), torch.tensor(0), 1],
    ],
)
def test_labels_of_any_kind(labels: Any) -> None:
    seen: list[tuple[str, list[int]]] = []

    def teacher(name: str) -> Any:
        def call(rows: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            seen.append((name, rows.tolist()))
            return rows[:, None] * 10.0

        return call

    found = fire_teachers(labels, {0: teacher("zero"), 1: teacher("one"), 2: teacher("idle")})
    assert found.tolist() == [[0.0], [10.0], [20.0]]
    assert seen == [("zero", [1]), ("one", [0, 2])]


def test_teachers_take_named_results() -> None:
    logits = torch.randn(3, 4, 7, requires_grad=True)
    ids = torch.randint(0, 7, (3, 4))

    def teacher(rows: Tensor) -> Any:
        return leafkernels.surprisal_entropy(logits[rows], ids[rows])

    surprisal, entropy = fire_teachers(["a", "b", "a"], {"a": teacher, "b": teacher})
    expected = leafkernels.surprisal_entropy(logits, ids)
    assert torch.equal(surprisal, expected.surprisal) and torch.equal(entropy, expected.entropy)
    assert not surprisal.requires_grad


def test_teachers_that_change_their_indices() -> None:
    def teacher(rows: Tensor) -> Tensor:
        found = 10.0 * rows
        rows.zero_()
        return found

    assert fire_teachers(["a", "b", "a"], {"a": teacher, "b": teacher}).tolist() == [0.0, 10.0, 20.0]


def test_errors_of_teachers() -> None:
    def fine(rows: Tensor) -> Tensor:
        return torch.zeros(rows.shape[0], 3)

    def check_refuses(error: type[Exception], message: str, labels: Any, **changes: Any) -> None:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            fire_teachers(labels, {"math": fine, "code": fine, **changes})

    known = "labels must name a teacher of 'math', 'code' for each row, got"
    check_refuses(ValueError, f"{known} 'maths' for row 1", ["math", "maths"])
    check_refuses(ValueError, f"{known} None for row 0", [None, "math"])
    check_refuses(ValueError, "labels must name the teacher of at least one row, got none", [])
    check_refuses(TypeError, "labels must be a list or a tensor of names for the rows, got str", "math")
    returns = "what teacher 'code' returns must"
    check_refuses(TypeError, f"{returns} be a torch.Tensor, got float", ["code"], code=lambda rows: [1.0])
    check_refuses(ValueError, f"{returns} have 1 rows, got shape (2, 3)", ["code"], code=lambda rows: torch.zeros(2, 3))
    check_refuses(
        ValueError,
        "teachers must return tensors of one shape, dtype and device for a row, got (2,) torch.float64 on cpu from "
        "'code' and (3,) torch.float32 on cpu from 'math'",
        ["math", "code"],
        code=lambda rows: torch.zeros(1, 2, dtype=torch.float64),
    )
    with pytest.raises(TypeError, match=re.escape("teachers must be a mapping from labels to functions, not empty")):
        fire_teachers(["math"], {})


def test_errors() -> None:
    case = batch(9, 3, 5)._asdict()

    def check_refuses(error: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            fire_opd(**{**case, **changes})

    shape = "(rows, tokens), or (total,) together with cu_seqlens, got shape (15,)"
    check_refuses(ValueError, f"old_logprobs must have shape {shape}", old_logprobs=case["old_logprobs"].flatten())
    like = "must have the shape of old_logprobs, (3, 5), got shape (3,)"
    for name in ("teacher_logprobs", "student_entropy", "teacher_entropy"):
        check_refuses(ValueError, f"{name} {like}", **{name: case[name][:, 0]})
    check_refuses(ValueError, f"response_mask {like}", response_mask=case["response_mask"][:, 0])
    floats = "must be floating point (float32, bfloat16, float16 or float64), got torch.int64"
    check_refuses(TypeError, f"teacher_logprobs {floats}", teacher_logprobs=torch.zeros(3, 5, dtype=torch.int64))
    check_refuses(TypeError, "teacher_logprobs must be a torch.Tensor, got NoneType", teacher_logprobs=None)
    check_refuses(TypeError, "response_mask must be a torch.Tensor, got NoneType", response_mask=None)
    given = "must be given where"
    check_refuses(ValueError, f"teacher_entropy {given} alpha is not 0, got alpha=1.0", teacher_entropy=None)
    check_refuses(ValueError, f"student_entropy {given} beta is not 0, got beta=0.5", student_entropy=None, beta=0.5)
    base = f"base_logprobs {given} extrapolation is not 1, got extrapolation=1.25"
    check_refuses(ValueError, base, extrapolation=1.25)
    for value in (-0.1, 1.5):
        check_refuses(ValueError, f"drop must be in [0, 1], got {value}", drop=value)
    check_refuses(ValueError, "drop must be finite, got nan", drop=NAN)
    check_refuses(TypeError, "drop must be a number, got str", drop="20%")
    for name in ("alpha", "beta"):
        check_refuses(ValueError, f"{name} must not be negative, got -1", **{name: -1})
        check_refuses(ValueError, f"{name} must be finite, got inf", **{name: INF})
    check_refuses(ValueError, "extrapolation must be finite, got inf", extrapolation=INF)
    scopes = "must be one of 'batch', 'trajectory', 'kept', got"
    check_refuses(ValueError, f"normalize {scopes} 'row'", normalize="row")
    kind = "statistics must be FireStatistics, as from fire_statistics, got Tensor"
    check_refuses(TypeError, kind, statistics=torch.zeros(3, 7))
    narrow = "statistics must hold float64 rows of shape (rows, 7), got shape (3, 6) of torch.float32"
    check_refuses(ValueError, narrow, statistics=FireStatistics(torch.zeros(3, 6)))
    elsewhere = FireStatistics(torch.zeros(3, 7, dtype=torch.float64, device="meta"))
    device = f"statistics must be on the device of old_logprobs, {case['old_logprobs'].device}, got meta"
    check_refuses(ValueError, device, statistics=elsewhere)
    wide = "teacher_logprobs must be float32, bfloat16 or float16 with backend='triton', got torch.float64"
    check_refuses(TypeError, wide, teacher_logprobs=case["teacher_logprobs"].double(), backend="triton")
    backends = "backend must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'"
    check_refuses(ValueError, backends, backend="cuda")
    with pytest.raises(ValueError, match=re.escape(f"teacher_logprobs must have shape {shape}")):
        fire_statistics(*(tensor.flatten() for tensor in list(case.values())[1:]))


@pytest.mark.parametrize("backend", [*BACKENDS, "python_ref"])
def test_a_divergence_in_place_of_logprobs_by_hand(backend: str) -> None:
    """Scores are minus the mean divergence, weights as ever; an infinite one drops its row, padding says nothing."""
    divergence = [[0.5, 1.5, NAN], [2.0, NAN, NAN], [4.0, INF, 4.0]]
    sure = [[0.0, 1.0, NAN], [1.0, NAN, NAN], [0.0, 0.0, 1.0]]
    mask = [[True, True, False], [True, False, False], [True, True, True]]
    # c_T = 1, 0 | 0 | 1, 1, 0 and c_S the rest: every token weighs 2.
    expected: dict[str, Any] = {
        "advantages": [[-0.5, -1.5, 0.0], [-2.0, 0.0, 0.0], [0.0] * 3],
        "weights": [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]],
        "response_mask": [[True, True, False], [True, False, False], [False] * 3],
        "keep": [True, True, False],
        "scores": [-1.0, -2.0, -INF],
        "threshold": [-INF],
    }
    if backend == "python_ref":
        found = python_ref.fire_opd(None, None, sure, sure, mask, divergence=divergence, drop=0.1)
        assert {name: found[name] for name in ("keep", "scores")} == {
            name: expected[name] for name in ("keep", "scores")
        }
        torch.testing.assert_close(torch.tensor(found["advantages"]), torch.tensor(expected["advantages"]))
        return
    tokens, entropy, live = (torch.tensor(table, device=DEVICE) for table in (divergence, sure, mask))
    fire = fire_opd(None, None, entropy, entropy, live, divergence=tokens, drop=0.1, backend=backend)
    assert_same(fire, expected, 1e-6)
    rows = fire_statistics(None, entropy, entropy, live, divergence=tokens, backend=backend)
    assert rows.scores.tolist() == expected["scores"]
    again = fire_opd(None, None, entropy, entropy, live, divergence=tokens, drop=0.1, statistics=rows, backend=backend)
    assert_same(again, fire, 0)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_the_weighted_divergence_has_the_gradient_of_its_tokens(kind: str) -> None:
    torch.manual_seed(1)
    student, teacher, mask = torch.randn(4, 5, 9), torch.randn(4, 5, 9), torch.ones(4, 5, dtype=torch.bool)
    mask[1, 3:] = False
    leaf = student.clone().requires_grad_()
    found = leafkernels.divergence(leaf, teacher, kind=kind, response_mask=mask)
    fire = fire_opd(None, None, *found[1:3], mask, divergence=found.divergence, drop=0.5)
    assert not fire.weights.requires_grad
    loss = (fire.weights * found.divergence)[fire.response_mask].sum() / fire.response_mask.sum()
    torch.testing.assert_close(loss.detach(), -fire.advantages.sum() / fire.response_mask.sum())
    loss.backward()
    assert leaf.grad is not None
    # Dropped rows and masked tokens have none; a token's is its weight's share of its own.
    assert torch.equal(leaf.grad.any(2), fire.response_mask)
    own = student.clone().requires_grad_()
    leafkernels.divergence(own, teacher, kind=kind).divergence.sum().backward()
    assert own.grad is not None
    share = torch.where(fire.response_mask, fire.weights, 0.0) / fire.response_mask.sum()
    torch.testing.assert_close(leaf.grad, own.grad * share[..., None])


def test_errors_of_divergences() -> None:
    case = batch(9, 3, 5)._asdict()
    logprobs, mask = case["old_logprobs"], case["response_mask"]
    entropies = case["student_entropy"], case["teacher_entropy"]
    for both, name in (((logprobs, None), "old_logprobs"), ((None, logprobs), "teacher_logprobs")):
        with pytest.raises(ValueError, match=f"^{name} must be None with divergence, which takes their place$"):
            fire_opd(*both, *entropies, mask, divergence=-logprobs)
    with pytest.raises(ValueError, match=r"^extrapolation must be 1 with divergence, got 1\.25$"):
        fire_opd(None, None, *entropies, mask, divergence=-logprobs, extrapolation=1.25)
    with pytest.raises(TypeError, match=r"^divergence must be a torch\.Tensor, got float$"):
        fire_opd(None, None, *entropies, mask, divergence=0.5)
    with pytest.raises(ValueError, match=r"^student_entropy must have the shape of divergence, \(3, 4\), got"):
        fire_opd(None, None, *entropies, mask, divergence=-logprobs[:, :4])


def test_gathering_needs_ranks() -> None:
    with pytest.raises(RuntimeError, match="^torch.distributed must be initialised"):
        fire_statistics(*batch(1, 2, 3).statistics_inputs).gather()


# --- The authors' own results -----------------------------------------------------------------------------------------

# Under the interpreter a case takes a fifth of a second.
STRIDE = {"triton": 1 if DEVICE == "cuda" else 6}


def golden(shared: Path, name: str, count: int, stride: int = 1) -> list[dict[str, Any]]:
    with gzip.open(shared / "golden" / f"{name}.jsonl.gz", "rt") as file:
        cases = [json.loads(line) for line in file]
    assert len(cases) == count
    return cases[::stride]


def to_tensor(values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers, of which JSON has some as strings; float32 is what the authors' code had."""

    def numbers(value: Any) -> Any:
        return [numbers(v) for v in value] if isinstance(value, list) else float(value)

    return torch.tensor(numbers(values), dtype=torch.float32, device=DEVICE).to(dtype)


def batch_of(inputs: dict[str, Any], old: str = "old_logprobs") -> Batch:
    names = (old, "teacher_logprobs", "student_entropy", "teacher_entropy")
    tokens = (to_tensor(inputs[name] or inputs[old]) for name in names)
    return Batch(*tokens, torch.tensor(inputs["response_mask"], device=DEVICE).bool())


def options_of(config: dict[str, Any]) -> dict[str, Any]:
    return {"drop": config["percentile"] / 100, "alpha": config["alpha"], "beta": config["beta"]}


def check_loss(case: dict[str, Any], fire: FireOPD, clip: tuple[float, float], **options: Any) -> None:
    """Loss and gradient of the authors' clipped loss, NaN in the padding of what goes in."""
    inputs, outputs = case["inputs"], case["outputs"]
    tokens = batch_of(inputs).poured()
    student = to_tensor(inputs["student_logprobs"]).masked_fill(~tokens.response_mask, NAN)
    aggregates: dict[str, dict[str, Any]] = {
        "token-mean": {"aggregate": "token_mean"},
        "seq-mean-token-mean": {"aggregate": "sequence_mean"},
        "seq-mean-token-sum": {"aggregate": "constant", "constant": max(int(fire.response_mask.any(1).sum()), 1)},
        "seq-mean-token-sum-norm": {"aggregate": "constant", "constant": max(fire.response_mask.shape[1], 1)},
    }
    options |= {"clip": clip, "max_log_ratio": 20.0, **aggregates[case["config"]["loss_agg_mode"]]}
    loss, gradient = loss_and_gradient(student, tokens.old_logprobs, fire, **options)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(loss, to_tensor(outputs["loss"]), **close, msg=case["name"])
    torch.testing.assert_close(gradient, to_tensor(outputs["gradient"]), **close, msg=case["name"])


def at(mask: Tensor, values: Any) -> Tensor:
    """Numbers of the authors', 0 where no token counts: they give some there as well."""
    return torch.where(mask, to_tensor(values), 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gives_the_authors_results(shared: Path, backend: str) -> None:
    close = {"rtol": 1e-5, "atol": 1e-5}
    compared = 0
    for case in golden(shared, "fire_opd", 162, STRIDE.get(backend, 1)):
        config, inputs, outputs = (case[part] for part in ("config", "inputs", "outputs"))
        if config["branch"] != "fire" or config["reference_nonfinite"]:
            continue
        tokens = batch_of(inputs)
        mask, has_tokens = tokens.response_mask, tokens.response_mask.any(1)
        options = options_of(config)
        if not has_tokens.all():
            # To the released code a row without a token has the score 0, the best, which moves the quantile. A token
            # of no weight gives it that here.
            rows = fire_statistics(*tokens.statistics_inputs, backend=backend).rows
            rows[:, 0].clamp_(min=1e-30)
            options["statistics"] = FireStatistics(rows)
        fire = fire_opd(*tokens.poured(), **options, backend=backend)
        torch.testing.assert_close(fire.weights, at(mask, outputs["weights"]), **close, msg=case["name"])
        torch.testing.assert_close(fire.scores[has_tokens], to_tensor(outputs["scores"])[has_tokens], **close)
        compared += 1
        keep = torch.tensor(outputs["keep"], device=DEVICE).bool()
        assert torch.equal(fire.keep, keep & has_tokens), case["name"]
        torch.testing.assert_close(fire.threshold, to_tensor(outputs["threshold"]), **close, msg=case["name"])
        want = at(mask, outputs["advantages"])
        torch.testing.assert_close(fire.advantages, want, **close, msg=case["name"])
        check_loss(case, fire, (config["clip_eps"], config["clip_eps"]))
    assert compared == 127 or backend == "triton" and compared > 15


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_in_padding_does_not_matter(shared: Path, backend: str) -> None:
    """Cases in which the released code drops every row, or gives NaN: here, the result without the padding."""
    compared = 0
    for case in golden(shared, "fire_opd", 162):
        if "nonfinite_in_padding" not in case["config"]["tags"]:
            continue
        tokens, options = batch_of(case["inputs"]), options_of(case["config"])
        assert_same(fire_opd(*tokens, **options, backend=backend), python_ref.fire_opd(*tokens.lists(), **options))
        clean = fire_opd(*tokens.poured(0.0), **options, backend=backend)
        assert_same(fire_opd(*tokens, **options, backend=backend), clean, 0.0)
        assert clean.advantages.isfinite().all() and clean.keep.any()
        compared += 1
    assert compared == 6


@pytest.mark.parametrize("backend", FAST)
def test_gives_the_results_of_the_baselines(shared: Path, backend: str) -> None:
    """Plain distillation and ExOPD, with a dual clip; importance weights go into the advantages, being positive."""
    compared = 0
    for case in golden(shared, "fire_opd", 162, 1 if backend == "torch" else STRIDE["triton"]):
        config, inputs = case["config"], case["inputs"]
        if config["branch"] == "fire":
            continue
        assert not config["reference_nonfinite"]
        tokens = batch_of(inputs).poured()
        options: dict[str, Any] = {}
        if config["branch"] == "exopd":
            base = to_tensor(inputs["base_logprobs"]).masked_fill(~tokens.response_mask, NAN)
            options = {"base_logprobs": base, "extrapolation": config["lambda"]}
        fire = fire_opd(*tokens[:2], None, None, tokens.response_mask, **PLAIN, **options, backend=backend)
        want = at(tokens.response_mask, case["outputs"]["advantages"])
        torch.testing.assert_close(fire.advantages, want, rtol=1e-5, atol=1e-5, msg=case["name"])
        if inputs.get("is_weights"):
            fire = fire._replace(advantages=fire.advantages * at(tokens.response_mask, inputs["is_weights"]))
        check_loss(case, fire, (config["clip_low"], config["clip_high"]), dual_clip=config["dual_clip_c"])
        compared += 1
    assert compared == 28 or backend == "triton" and compared > 0


class Micro(NamedTuple):
    """A micro-batch of the authors' update, and what they found for it."""

    rows: slice
    mini: int
    expected: dict[str, Any]
    scaled_loss: float


def micro_batches(case: dict[str, Any]) -> Iterator[Micro]:
    config, outputs = case["config"], case["outputs"]
    count, size = config["mini_batch_size"], config["micro_batch_size"]
    starts = [m for mini in range(0, config["trajectories"], count) for m in range(mini, mini + count, size)]
    for start, expected, loss in zip(starts, outputs["micro_batches"], outputs["scaled_losses"], strict=True):
        yield Micro(slice(start, start + size), start // count, expected, loss)


def tokens_of_mini_batch(case: dict[str, Any]) -> Batch:
    """With the teacher of each row; on policy, the student's own log-probabilities are the old ones."""
    inputs = case["inputs"]
    old = "student_logprobs" if case["config"]["on_policy_rule"] else "old_logprobs"
    if case["config"]["branch"] == "opd":
        inputs = {**inputs, "student_entropy": inputs["student_entropy"] or inputs[old]}
    tokens = batch_of(inputs, old)
    if not case["config"]["multi_teacher"]:
        return tokens
    code_teacher = [to_tensor(inputs[f"teacher_{name}_code"]) for name in ("logprobs", "entropy")]
    teachers = {
        "math": lambda rows: (tokens.teacher_logprobs[rows], tokens.teacher_entropy[rows]),
        "code": lambda rows: tuple(tensor[rows] for tensor in code_teacher),
    }
    teacher_logprobs, teacher_entropy = fire_teachers(inputs["teacher_labels"], teachers, device=DEVICE)
    return tokens._replace(teacher_logprobs=teacher_logprobs, teacher_entropy=teacher_entropy)


@pytest.mark.parametrize("backend", FAST)
def test_gives_the_results_of_whole_updates(shared: Path, backend: str) -> None:
    """The scope is what is handed over together: a micro-batch, of one row in the released scripts."""
    close = {"rtol": 1e-5, "atol": 1e-5}
    for case in golden(shared, "fire_opd_minibatch", 14, 1 if backend == "torch" else 5):
        config = case["config"]
        is_fire = config["branch"] == "fire"
        tokens = tokens_of_mini_batch(case).poured()
        student = to_tensor(case["inputs"]["student_logprobs"]).masked_fill(~tokens.response_mask, NAN)
        gradients = torch.zeros(len(case["outputs"]["gradient_per_mini_batch"]), *student.shape, device=DEVICE)
        for micro in micro_batches(case):
            part = tokens.rows(micro.rows)
            fire = fire_opd(*part, **(options_of(config) if is_fire else PLAIN), backend=backend)
            options: dict[str, Any] = {} if is_fire else {"dual_clip": config["dual_clip_c"]}
            clip = config["clip_low"], config["clip_high"]
            loss, gradient = loss_and_gradient(
                student[micro.rows], part.old_logprobs, fire, clip=clip, max_log_ratio=20.0, **options
            )
            share = config["micro_batch_size"] / config["mini_batch_size"]
            torch.testing.assert_close(share * loss, to_tensor(micro.scaled_loss), **close, msg=case["name"])
            gradients[micro.mini, micro.rows] += share * gradient
            want = at(part.response_mask, micro.expected["advantages"])
            torch.testing.assert_close(fire.advantages, want, **close, msg=case["name"])
            if is_fire:
                assert fire.keep.tolist() == [bool(keep) for keep in micro.expected["keep"]]
                want = at(part.response_mask, micro.expected["weights"])
                torch.testing.assert_close(fire.weights, want, **close)
        want = to_tensor(case["outputs"]["gradient_per_mini_batch"])
        torch.testing.assert_close(gradients, want, **close, msg=case["name"])


def test_the_released_scripts_are_one_line(shared: Path) -> None:
    """A call for each row, and the mean over rows of the means over tokens: nothing is ever dropped."""
    compared = 0
    for case in golden(shared, "fire_opd_minibatch", 14):
        config = case["config"]
        if config["branch"] != "fire" or config["micro_batch_size"] != 1 or not config["on_policy_rule"]:
            continue
        tokens, options = tokens_of_mini_batch(case), options_of(config)
        assert tokens.response_mask.any(1).all()

        rows = [fire_opd(*(tensor[i : i + 1] for tensor in tokens), **options) for i in range(len(tokens[0]))]

        advantages, mask = (torch.cat([row[field] for row in rows]) for field in (0, 1))
        assert torch.equal(mask, tokens.response_mask)
        leaf = to_tensor(case["inputs"]["student_logprobs"]).requires_grad_()
        loss = policy_loss(leaf, leaf.detach(), advantages, mask, aggregate="sequence_mean").loss
        gradient = torch.autograd.grad(loss, leaf)[0]
        (expected,) = to_tensor(case["outputs"]["gradient_per_mini_batch"])
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
        losses = to_tensor(case["outputs"]["scaled_losses"])
        torch.testing.assert_close(loss.detach(), losses.sum(), rtol=1e-5, atol=1e-5)
        compared += 1
    assert compared >= 4


class FromLogits(NamedTuple):
    """Log-probabilities and entropies of both models from logits, and the student's logits, which get a gradient."""

    tokens: Batch
    logits: Tensor
    logprobs: Tensor


def from_logits(case: dict[str, Any], dtype: torch.dtype, backend: str) -> FromLogits:
    inputs = case["inputs"]
    mask = torch.tensor(inputs["response_mask"], device=DEVICE).bool()
    ids = torch.tensor(inputs["tokens"], device=DEVICE)
    student, teacher = (to_tensor(inputs[f"{name}_logits"], dtype) for name in ("student", "teacher"))
    student.requires_grad_()
    options: dict[str, Any] = {"temperature": case["config"]["temperature"], "backend": backend}
    from_student = leafkernels.surprisal_entropy(student, ids, **options)
    from_teacher = leafkernels.surprisal_entropy(teacher, ids, **options)
    constants = (from_student.logprobs, from_teacher.logprobs, from_student.entropy, from_teacher.entropy)
    return FromLogits(Batch(*(tensor.detach() for tensor in constants), mask), student, from_student.logprobs)


def exact_numbers(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy in float64, 0 log 0 being 0."""
    logprobs = (logits.double() / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).masked_fill(logprobs.isneginf(), 0.0).sum(-1)
    return logprobs.gather(-1, ids[..., None])[..., 0], entropy


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_numbers_from_logits(shared: Path, dtype: torch.dtype, tolerance: float) -> None:
    """Against the authors' functions in float64; where those give NaN for banned ids, against the definition."""
    compared = banned = 0
    for case in golden(shared, "fire_opd_logits", 32):
        found, outputs = from_logits(case, dtype, "torch").tokens, case["outputs"]
        ids = torch.tensor(case["inputs"]["tokens"], device=DEVICE)
        for name, model_results in (
            ("student", (found.old_logprobs, found.student_entropy)),
            ("teacher", (found.teacher_logprobs, found.teacher_entropy)),
        ):
            logits = to_tensor(case["inputs"][f"{name}_logits"])
            exact = exact_numbers(logits, ids, case["config"]["temperature"])
            for field, tensor, want in zip(("logprobs", "entropy"), model_results, exact, strict=True):
                theirs = torch.tensor(
                    [[float(v) for v in row] for row in outputs[f"{name}_{field}_float64"]], dtype=torch.float64
                ).to(DEVICE)
                wrong = theirs.isnan() & ~want.isnan()
                banned += int(wrong.sum())
                compared += int((~wrong).sum())
                torch.testing.assert_close(
                    tensor.double(),
                    torch.where(wrong, want, theirs),
                    rtol=tolerance,
                    atol=tolerance,
                    equal_nan=True,
                    msg=lambda text, case=case: f"{case['name']} {case['config']['kind']}: {text}",
                )
    assert (compared, banned) == (831, 17)


@pytest.mark.parametrize("backend", FAST)
def test_gives_the_gradient_of_the_authors_logits(shared: Path, backend: str) -> None:
    """From their float32 numbers, and straight from the logits, where their own float32 does not decide."""
    close = {"rtol": 1e-5, "atol": 1e-5}
    compared = 0
    for case in golden(shared, "fire_opd_logits", 32, 1 if backend == "torch" else 5):
        config, outputs = case["config"], case["outputs"]
        if any(config["reference_nan"].values()):
            continue
        compared += 1
        found, fire = from_logits(case, torch.float32, backend), outputs["fire"]
        mask = found.tokens.response_mask
        names = ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy")
        given = Batch(*(to_tensor(outputs[name]) for name in names), mask).poured()
        # Float32 entropies of shifted or peaked logits are off by up to 1.5e-4 in theirs, and weights by more.
        is_rough = config["kind"] in ("offset", "huge") or config["kind"] == "peaked" and config["temperature"] == 0.3
        for tokens in (given,) if is_rough else (given, found.tokens):
            result = fire_opd(*tokens, **options_of(config), backend=backend)
            assert result.keep[mask.any(1)].tolist() == [
                bool(keep) for keep, live in zip(fire["keep"], mask.any(1), strict=True) if live
            ]
            torch.testing.assert_close(result.weights, at(mask, fire["weights"]), **close, msg=case["name"])
            torch.testing.assert_close(result.advantages, at(mask, fire["advantages"]), **close, msg=case["name"])
            loss = policy_loss(
                found.logprobs, found.logprobs.detach(), result.advantages, result.response_mask, backend=backend
            ).loss
            torch.testing.assert_close(loss.detach(), to_tensor(fire["loss"]), **close, msg=case["name"])
            gradient = torch.autograd.grad(loss, found.logits, retain_graph=True)[0]
            if config["kind"] != "huge":  # float32's softmax of logits of 400
                want = to_tensor(fire["gradient_student_logits"])
                torch.testing.assert_close(gradient, want, **close, msg=case["name"])
    assert compared == 24 or backend == "triton" and compared > 1


def test_banned_ids_give_the_right_answer(shared: Path) -> None:
    """Logits of -inf, where the released code has NaN in loss and gradient: finite, and those of float64."""
    compared = 0
    for case in golden(shared, "fire_opd_logits", 32):
        config = case["config"]
        if not any(config["reference_nan"].values()) or config["kind"] in ("all_minus_inf", "minus_inf_sampled"):
            continue
        compared += 1
        results = []
        for dtype in (torch.float32, torch.float64):
            found = from_logits(case, dtype, "torch")
            fire = fire_opd(*found.tokens, **options_of(config))
            loss = policy_loss(found.logprobs, found.logprobs.detach(), fire.advantages, fire.response_mask).loss
            results.append((fire.advantages, loss.detach(), torch.autograd.grad(loss, found.logits)[0]))
        for single, double in zip(*results, strict=True):
            assert single.isfinite().all()
            torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5, msg=case["name"])
    assert compared >= 4
