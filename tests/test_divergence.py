"""divergence: right where two softmaxes written down are not, against float64 on the inputs as rounded."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE

import leafkernels
import python_ref
from leafkernels import TeacherTopK

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FAST = ("torch", "triton")
KINDS = ("reverse_kl", "forward_kl", "jsd")
INF = math.inf

every_kind = pytest.mark.parametrize("kind", KINDS)
every_backend = pytest.mark.parametrize("backend", FAST)


def spare_the_interpreter(backend: str, kind: str, among: object = None, few: object = None) -> None:
    """Skip, of what tells its cases apart outside of the kernels, all but the JSD and one of the others."""
    if backend == "triton" and DEVICE == "cpu" and (kind != "jsd" or among != few):
        pytest.skip("Triton's interpreter takes seconds")


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(scale).to(DEVICE)


def truth(student: torch.Tensor, teacher: Any, grads: Any = None, **options: Any) -> tuple[torch.Tensor, ...]:
    """Results of the reference as float64; with weights on divergence and entropy, also the gradient."""
    rows = student.double().tolist()
    if isinstance(teacher, TeacherTopK):
        options |= {"ids": teacher.ids.tolist(), "logprobs": teacher.logprobs.double().tolist()}
        others = None
    else:
        others = teacher.double().tolist()
    found = python_ref.divergence(rows, others, **options)
    results = [torch.tensor(numbers, dtype=torch.float64) for numbers in found[:3]] + [torch.tensor(found[3])]
    if grads is not None:
        gradient = python_ref.divergence_backward(*(g.tolist() for g in grads), rows, others, **options)
        results.append(torch.tensor(gradient, dtype=torch.float64))
    return tuple(results)


def run(student: torch.Tensor, teacher: Any, grads: Any = None, **options: Any) -> tuple[torch.Tensor, ...]:
    leaf = student.detach().clone().requires_grad_()
    found = leafkernels.divergence(leaf, teacher, **options)
    results = [numbers.detach().cpu() for numbers in found]
    if grads is not None:
        pairs = zip(found[:2], grads, strict=True)
        total = sum((numbers * grad.to(numbers)).sum() for numbers, grad in pairs)
        results.append(torch.autograd.grad(total, leaf)[0].cpu())
    return tuple(results)


def check(student: torch.Tensor, teacher: Any, backend: str, lead: float = 0.0, **options: Any) -> None:
    """Values and gradient against the reference.

    Every term of a sum keeps its rounding, of which e^z has |z| (``lead`` at most) and the rest a few.
    """
    grads = torch.linspace(1, 2, len(student)), torch.linspace(-1, 1, len(student))
    found = run(student, teacher, grads, backend=backend, **options)
    expected = truth(student, teacher, grads, **options)
    unit = torch.finfo(torch.float64 if student.dtype == torch.float64 else torch.float32).eps
    rtol = unit * (16 + 4 * math.log2(max(student.shape[1], 2)) + 2 * lead)
    for actual, want in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(actual.double(), want, rtol=rtol, atol=1e-30, equal_nan=True)
    assert found[3].tolist() == expected[3].tolist()
    # Triton's interpreter cuts digits off where a GPU rounds.
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(student.dtype, 0.0)
    # p (u - KL) is a difference of numbers of the size of the divergence.
    finite = expected[0][expected[0].isfinite()]
    atol = 4 * unit * (1 + float(finite.max() if finite.numel() else 0.0)) / float(options.get("temperature", 1.0))
    torch.testing.assert_close(found[4].double(), expected[4], rtol=4 * rtol + rounding, atol=atol, equal_nan=True)


# ---- against the reference


# The least finite number is what masks write who do without -inf.
LOGITS = (0.0, -0.0, 1.0, -1.5, 3.0, 10.0, -30.0, 60.0, -INF, torch.finfo(torch.float32).min)


@every_kind
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(backend: str, kind: str, small_blocks: None) -> None:
    @settings(max_examples={"torch": 60, "reference": 20}.get(backend, 60 if DEVICE == "cuda" else 6), deadline=None)
    @given(
        st.integers(1, 24).flatmap(
            lambda v: st.tuples(
                *(st.lists(st.lists(st.sampled_from(LOGITS), min_size=v, max_size=v), min_size=2, max_size=2),) * 2
            )
        ),
        st.sampled_from([1.0, 0.5, 3.0]),
        st.sampled_from([0.5, 0.1]),
    )
    def cases(rows: tuple[list[list[float]], list[list[float]]], temperature: float, beta: float) -> None:
        student, teacher = (torch.tensor(model, device=DEVICE) for model in rows)
        check(student, teacher, backend, 90 / temperature, kind=kind, temperature=temperature, beta=beta)

    cases()


@every_kind
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_few_ids_and_the_rest(backend: str, tail: bool, kind: str, small_blocks: None) -> None:
    """Of a teacher whose logits differ, so that its likeliest are known; the student has ties and banned ids."""

    @settings(max_examples={"torch": 40, "reference": 15}.get(backend, 60 if DEVICE == "cuda" else 5), deadline=None)
    @given(
        st.integers(2, 24).flatmap(
            lambda v: st.tuples(
                st.lists(st.lists(st.sampled_from(LOGITS), min_size=v, max_size=v), min_size=2, max_size=2),
                st.lists(st.permutations(range(v)), min_size=2, max_size=2),
            )
        ),
        st.integers(1, 24),
        st.sampled_from([1.0, 0.5, 3.0]),
    )
    def cases(rows: tuple[Any, Any], top_k: int, temperature: float) -> None:
        student, teacher = torch.tensor(rows[0], device=DEVICE), torch.tensor(rows[1], device=DEVICE) * 1.5 - 7
        options = {"kind": kind, "tail": tail, "top_k": top_k, "temperature": temperature}
        check(student, teacher, backend, 90 / temperature, **options)

    cases()


def hard_rows(vocabulary: int) -> dict[str, torch.Tensor]:
    """One distribution to which each is near, or far from, the others: leads, shifts, ties, banned ids, tails."""
    near = random(vocabulary, seed=1)
    rows = {"plain": near, "near": near + 1e-3 * random(vocabulary, seed=2), "shifted": near + 1e4}
    rows["far"], rows["flat"] = random(vocabulary, seed=3, scale=6.0), torch.zeros(vocabulary, device=DEVICE)
    for lead in (30.0, 60.0):
        rows[f"lead {lead:.0f}"] = near.clone()
        rows[f"lead {lead:.0f}"][7] = near.max() + lead
    rows["lead 60 near"] = rows["lead 60"] + 1e-2 * random(vocabulary, seed=4)
    rows["two ids"] = torch.full((vocabulary,), -INF, device=DEVICE)
    rows["two ids"][7], rows["two ids"][9] = 0.0, -23.0
    rows["banned"] = near.clone()
    rows["banned"][::3] = -INF
    return rows


@every_kind
def test_hard_pairs(kind: str) -> None:
    rows = hard_rows(150)
    few = ["plain", "near", "shifted", "lead 60", "lead 60 near", "banned"]
    rows = {name: rows[name] for name in few}
    student = torch.stack([row for row in rows.values() for _ in rows])
    teacher = torch.stack([row for _ in rows for row in rows.values()])
    names = [f"{a} / {b}" for a in rows for b in rows]
    grads = torch.ones(len(names)), torch.zeros(len(names))
    expected = truth(student, teacher, grads, kind=kind)
    for backend in FAST:
        found = run(student, teacher, grads, kind=kind, backend=backend)
        assert (found[0][expected[0] == 0] == 0).all()
        relative = (found[0].double() - expected[0]).abs() / expected[0]
        relative[(found[0] == expected[0]) | (expected[0] == 0)] = 0
        worst = int(relative.argmax())
        # PyTorch computes in float64 from there on. The kernels round z = -70 to 4e-6, and u = 1e-2 by as much, of
        # which the divergence has the square; e^z has 70 roundings.
        bound = {"torch": 1e-6, "triton": 1e-4}[backend]
        assert float(relative[worst]) < bound, (backend, names[worst], float(expected[0][worst]))
        for actual, want in zip(found[1:3], expected[1:3], strict=True):
            torch.testing.assert_close(actual.double(), want, rtol=2e-5, atol=1e-30)
        # p (u - KL) is a difference of numbers of the size of the divergence.
        torch.testing.assert_close(found[4].double(), expected[4], rtol=2e-5, atol=2e-5, equal_nan=True)


@every_kind
def test_the_reference_by_its_definition(kind: str) -> None:
    """sum p log(p / q) with sixty digits."""
    mpmath = pytest.importorskip("mpmath")  # PyTorch brings it
    rows = hard_rows(20)
    beta = mpmath.mpf(0.3)
    with mpmath.workdps(60):

        def softmax(row: torch.Tensor) -> list[Any]:
            numbers = [mpmath.exp(mpmath.mpf(x)) if x > -INF else mpmath.mpf(0) for x in row.double().tolist()]
            return [x / sum(numbers) for x in numbers]

        def kl(p: list[Any], q: list[Any]) -> Any:
            terms = [mpmath.inf if b == 0 else a * mpmath.log(a / b) for a, b in zip(p, q, strict=True) if a > 0]
            return sum(terms)

        for name, student in rows.items():
            for other, teacher in rows.items():
                p, q = softmax(student), softmax(teacher)
                m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
                jsd = beta * kl(q, m) + (1 - beta) * kl(p, m)
                want = float({"reverse_kl": kl(p, q), "forward_kl": kl(q, p), "jsd": jsd}[kind])
                found = truth(student[None], teacher[None], kind=kind, beta=0.3)[0].item()
                assert found == pytest.approx(want, rel=1e-9, abs=1e-40), (name, other)


@pytest.mark.parametrize("vocabulary", [1, 9, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@every_backend
def test_vocabularies_that_cross_blocks(backend: str, dtype: torch.dtype, vocabulary: int, small_blocks: None) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    student, teacher = (random(2, vocabulary, seed=seed).to(dtype) for seed in (5, 6))
    check(student, teacher, backend, 20.0, kind="jsd", beta=0.3)
    # Logits that differ in every dtype, so that the likeliest are known.
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check(student, (order / 4).to(dtype).expand(2, -1), backend, 20.0, kind="reverse_kl", top_k=5)


@every_kind
@every_backend
def test_a_vocabulary_of_a_real_model(backend: str, kind: str) -> None:
    spare_the_interpreter(backend, kind)
    student, teacher = random(1, 151_936, seed=7).to(torch.bfloat16), random(1, 151_936, seed=8)
    check(student, teacher, backend, 30.0, kind=kind)


# ---- laws that need no reference


@every_kind
@every_backend
def test_equal_rows_have_none_and_no_gradient(backend: str, kind: str, small_blocks: None) -> None:
    is_slow = backend == "triton" and DEVICE == "cpu"
    hard = hard_rows(40 if is_slow else 100)
    rows = torch.stack([hard[name] for name in (("lead 60 near", "banned") if is_slow else hard)])
    every: tuple[dict[str, Any], ...] = ({}, {"top_k": 5}, {"top_k": 5, "tail": False}, {"temperature": 0.7})
    for options in every[-1:] if is_slow else every:
        found = run(rows, rows, (torch.ones(len(rows)), torch.zeros(len(rows))), kind=kind, backend=backend, **options)
        assert (found[0] == 0).all(), options
        assert (found[4] == 0).all(), options
        assert found[3].all()
    # As do rows that differ by a number which rounds nothing away.
    whole = torch.randint(-50, 50, (3, 100), device=DEVICE).float()
    found = run(whole, whole - 64, (torch.ones(3), torch.zeros(3)), kind=kind, backend=backend)
    assert (found[0] == 0).all()
    assert (found[4] == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(0, 10**6), st.floats(0.2, 12), st.floats(0.01, 0.99), st.integers(1, 29))
def test_laws(vocabulary: int, seed: int, scale: float, beta: float, top_k: int) -> None:
    student, teacher = (random(4, vocabulary, seed=seed + i, scale=scale) for i in range(2))
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed)).to(DEVICE)

    def of(kind: str, student: torch.Tensor = student, teacher: torch.Tensor = teacher, **options: Any) -> torch.Tensor:
        return leafkernels.divergence(student.double(), teacher.double(), kind=kind, **options).divergence

    reverse, forward = of("reverse_kl"), of("forward_kl")
    torch.testing.assert_close(of("forward_kl", teacher, student), reverse)
    half, jsd = of("jsd"), of("jsd", beta=beta)
    torch.testing.assert_close(of("jsd", teacher, student, beta=1 - beta), jsd)
    torch.testing.assert_close(of("jsd", teacher, student), half, rtol=0, atol=0)
    assert (half <= math.log(2) * (1 + 1e-12)).all()
    for found in (reverse, forward, half, jsd):
        assert (found >= 0).all()
    assert (jsd <= (beta * forward).minimum((1 - beta) * reverse) * (1 + 1e-9)).all()
    # Its ends are the two KLs, to first order in what beta is times the ratio of two probabilities.
    if scale < 2:
        share = 2.0**-40
        torch.testing.assert_close(of("jsd", beta=share) / share, forward, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(of("jsd", beta=1 - share) / share, reverse, rtol=1e-4, atol=1e-6)
    for kind, found in (("reverse_kl", reverse), ("forward_kl", forward), ("jsd", half)):
        torch.testing.assert_close(of(kind, student[:, order], teacher[:, order]), found)
        torch.testing.assert_close(of(kind, student + 3, teacher - 5, top_k=None), found, rtol=1e-5, atol=1e-7)
        # What tells fewer ids apart tells less.
        coarse = of(kind, top_k=top_k)
        assert (coarse <= found * (1 + 1e-9) + 1e-12).all()
        assert (coarse <= of(kind, top_k=top_k + 1) * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("options", [{}, {"kind": "forward_kl"}, {"kind": "jsd", "beta": 0.2}])
@pytest.mark.parametrize("ids", [{}, {"top_k": 3}, {"top_k": 3, "tail": False}, {"num_ids": 7}, {"served": 3}])
def test_gradcheck(ids: dict[str, int], options: dict[str, Any]) -> None:
    student, teacher = (random(3, 9, seed=seed, scale=1.0).double() for seed in (9, 10))
    other: Any = teacher
    if "served" in ids:
        top = teacher.log_softmax(1).topk(3)
        other = TeacherTopK(top.indices, top.values)
    words = {name: value for name, value in ids.items() if name != "served"} | options

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return leafkernels.divergence(x, other, temperature=0.7, backend="torch", **words)[:2]

    assert torch.autograd.gradcheck(both, student.requires_grad_())


# ---- banned ids, bad rows, masks


@every_backend
def test_infinite_divergences(backend: str, small_blocks: None) -> None:
    """Infinite where the first of a KL has what the second bans, and then: NaN, p - q, finite."""
    plain, banned = torch.zeros(1, 40, device=DEVICE), torch.zeros(1, 40, device=DEVICE)
    banned[0, 20:] = -INF
    one = torch.ones(1), torch.zeros(1)
    found = run(plain, banned, one, kind="reverse_kl", backend=backend)
    assert found[0] == INF
    assert found[4].isnan().all()
    # What does not count is 0, not 0 * infinity.
    assert not run(plain, banned, (torch.zeros(1), torch.zeros(1)), kind="reverse_kl", backend=backend)[4].any()
    found = run(banned, plain, one, kind="forward_kl", backend=backend)
    assert found[0] == INF
    torch.testing.assert_close(found[4], (banned.softmax(1) - plain.softmax(1)).cpu())
    for student, teacher in ((plain, banned), (banned, plain)):
        found = run(student, teacher, one, kind="jsd", backend=backend)
        assert found[0].isfinite()
        assert found[4].isfinite().all()
    for kind, student, teacher in (("reverse_kl", banned, plain), ("forward_kl", plain, banned)):
        found = run(student, teacher, one, kind=kind, backend=backend)
        torch.testing.assert_close(found[0], torch.tensor([math.log(2)]))
        assert found[4].isfinite().all()


@every_kind
@pytest.mark.parametrize("ids", [{}, {"top_k": 4}, {"top_k": 4, "tail": False}, {"served": 4}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_rows_and_masked_rows_stay_alone(backend: str, ids: dict[str, int], kind: str, small_blocks: None) -> None:
    spare_the_interpreter(backend, kind, ids, {"top_k": 4})
    student, teacher = random(6, 30, seed=11), random(6, 30, seed=12)
    mask = torch.tensor([True, False, True, False, True, True], device=DEVICE)
    options = {name: value for name, value in ids.items() if name != "served"} | {"kind": kind, "backend": backend}

    def both(student: torch.Tensor, teacher: torch.Tensor, mask: Any) -> tuple[torch.Tensor, ...]:
        other: Any = teacher
        if "served" in ids:
            top = teacher.log_softmax(1).topk(4)
            other = TeacherTopK(top.indices, top.values)
        return run(student, other, (torch.ones(6), torch.ones(6)), response_mask=mask, **options)

    plain = both(student, teacher, None)
    broken, bad = student.clone(), teacher.clone()
    broken[1], bad[1], bad[3] = math.nan, INF, math.nan
    found = both(broken, bad, mask)
    for numbers, want in zip(found, plain, strict=True):
        assert not numbers[[1, 3]].any()
        torch.testing.assert_close(numbers[[0, 2, 4, 5]], want[[0, 2, 4, 5]], rtol=0, atol=0)
    # Without the mask they are NaN, and alone.
    found = both(broken, bad, None)
    assert found[0][[1, 3]].isnan().all()
    assert found[4][1].isnan().any()
    for numbers, want in zip(found, plain, strict=True):
        torch.testing.assert_close(numbers[[0, 2, 4, 5]], want[[0, 2, 4, 5]], rtol=0, atol=0)


@every_kind
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_divergence_has_no_gradient(backend: str, kind: str, small_blocks: None) -> None:
    """Of a teacher without a distribution, nor at ids that the student bans."""
    student = torch.tensor([[0.0, -INF, 1.0]] * 3, device=DEVICE)
    teacher = torch.tensor([[-INF] * 3, [0.0, math.nan, 1.0], [0.0, INF, 0.0]], device=DEVICE)
    for options in ({}, {"top_k": 2}):
        found = run(student, teacher, (torch.ones(3), torch.zeros(3)), kind=kind, backend=backend, **options)
        assert found[0].isnan().all() and found[4].isnan().all()


@every_backend
def test_shapes_strides_and_temperatures(backend: str, small_blocks: None) -> None:
    student, teacher = random(2, 3, 40, seed=13), random(2, 3, 40, seed=14)
    temperature = torch.linspace(0.5, 2, 6, device=DEVICE).view(2, 3)
    for kind in KINDS if backend == "torch" or DEVICE == "cuda" else ("jsd",):
        found = leafkernels.divergence(student, teacher, kind=kind, temperature=temperature, backend=backend)
        scaled = student / temperature[..., None], teacher / temperature[..., None]
        expected = leafkernels.divergence(*scaled, kind=kind, backend=backend)
        for numbers, want in zip(found, expected, strict=True):
            assert numbers.shape == (2, 3)
            torch.testing.assert_close(numbers, want, rtol=1e-5, atol=1e-6)
        # Rows that begin anywhere, columns that do not follow each other, and another dtype.
        for other in (student.transpose(1, 2).contiguous().transpose(1, 2), torch.cat((student, student), 2)[..., :40]):
            again = leafkernels.divergence(other, teacher, kind=kind, temperature=temperature, backend=backend)
            torch.testing.assert_close(again.divergence, found.divergence, rtol=1e-6, atol=1e-7)
        for size in (39, 37):
            narrow = leafkernels.divergence(
                student[..., :size], teacher[..., 1:][..., :size], kind=kind, backend=backend
            )
            rows = student[..., :size].flatten(0, 1), teacher[..., 1:][..., :size].flatten(0, 1)
            want = truth(*rows, kind=kind)[0].view(2, 3)
            torch.testing.assert_close(narrow.divergence.double().cpu(), want, rtol=1e-5, atol=1e-7)
        half = leafkernels.divergence(student, teacher.bfloat16(), kind=kind, backend=backend)
        wide = leafkernels.divergence(student, teacher.bfloat16().float(), kind=kind, backend=backend)
        torch.testing.assert_close(half.divergence, wide.divergence, rtol=1e-6, atol=1e-7)
    empty = leafkernels.divergence(student[:0], teacher[:0], backend=backend)
    assert empty.divergence.shape == (0, 3)


@every_kind
@pytest.mark.parametrize("ids", [{}, {"top_k": 4}, {"top_k": 4, "tail": False}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_in_common(backend: str, ids: dict[str, Any], kind: str, small_blocks: None) -> None:
    """Of padded embeddings: the others are not read, and have no gradient."""
    spare_the_interpreter(backend, kind, ids, {"top_k": 4})
    student, teacher, grads = random(3, 40, seed=15), random(3, 36, seed=16), (torch.ones(3), torch.ones(3))
    student[:, 33:], teacher[:, 33:] = math.nan, INF
    options = {"kind": kind, "backend": backend, **ids}
    found = run(student, teacher, grads, num_ids=33, **options)
    expected = run(student[:, :33], teacher[:, :33], grads, **options)
    for numbers, want in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(numbers, want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[4][:, :33], expected[4], rtol=1e-5, atol=1e-6)
    assert not found[4][:, 33:].any()


@every_backend
def test_more_splits_change_rounding_only(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "torch":
        pytest.skip("PyTorch splits no row")
    from leafkernels.kernels import divergence as kernels

    student, teacher = random(2, 9000, seed=17), random(2, 9000, seed=18)
    found = []
    for splits in (1, 64):
        monkeypatch.setattr(kernels, "MAX_SPLITS", splits)
        found.append(run(student, teacher, (torch.ones(2), torch.ones(2)), kind="jsd", backend=backend))
    for numbers, want in zip(*found, strict=True):
        torch.testing.assert_close(numbers, want, rtol=1e-5, atol=1e-8)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs 18 GB")
def test_more_logits_than_an_int32_counts() -> None:
    num_rows, vocabulary = 14_200, 151_936
    student = torch.zeros(num_rows, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    teacher = student.clone()
    student[-1, -1], teacher[-1, 0] = 20.0, 20.0
    student.requires_grad_()
    found = leafkernels.divergence(student, teacher)
    found.divergence[-1].backward()
    assert student.grad is not None
    want = truth(student[-1:].detach().cpu(), teacher[-1:].cpu(), (torch.ones(1), torch.zeros(1)))
    torch.testing.assert_close(found.divergence[-1:].double().cpu(), want[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(student.grad[-1:].double().cpu(), want[4], rtol=1e-2, atol=1e-6)
    assert not student.grad[0].any()


# ---- teachers that say a few ids


@every_kind
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_served_teacher_is_its_top(backend: str, tail: bool, kind: str, small_blocks: None) -> None:
    """In any order of its ids, and with places that are left empty; the entropy is that of what it says."""
    spare_the_interpreter(backend, kind, tail, True)
    student, teacher = random(4, 50, seed=19), random(4, 50, seed=20)
    grads = torch.ones(4), torch.linspace(-1, 1, 4)
    expected = run(student, teacher, grads, kind=kind, tail=tail, top_k=6, backend=backend)
    top = teacher.log_softmax(1).topk(6)
    ids, logprobs = top.indices.flip(1), top.values.flip(1)
    empty = torch.full((4, 2), -1, device=DEVICE)
    ids = torch.cat((empty, ids, empty[:, :1] + 4), 1)
    logprobs = torch.cat((empty * 0.5, logprobs, torch.full((4, 1), -INF, device=DEVICE)), 1)
    found = run(student, TeacherTopK(ids.int(), logprobs), grads, kind=kind, tail=tail, backend=backend)
    # The rest's mass is 1 - sum here: a rounding of 1 over what it is.
    for numbers, want in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(numbers, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[4], expected[4], rtol=1e-4, atol=1e-6)
    assert found[3].tolist() == expected[3].tolist()
    given = top.values if not tail else torch.cat((top.values, torch.log(1 - top.values.exp().sum(1, True))), 1)
    entropy = torch.distributions.Categorical(logits=given).entropy().cpu()
    torch.testing.assert_close(found[2], entropy, rtol=1e-4, atol=1e-6)


@every_kind
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_served_teacher_who_is_certain(backend: str, kind: str, small_blocks: None) -> None:
    """Its probabilities sum to 1 or, rounded, to more: the rest has a rounding of 1, and no divergence is infinite."""
    spare_the_interpreter(backend, kind)
    student = random(3, 50, seed=21)
    ids = torch.tensor([[3, 8], [3, 8], [-1, -1]], device=DEVICE)
    logprobs = torch.tensor([[0.0, -30.0], [0.002, -4.0], [0.0, 0.0]], device=DEVICE)
    check(student, TeacherTopK(ids, logprobs), backend, 40.0, kind=kind)
    found = run(student, TeacherTopK(ids, logprobs), kind=kind, backend=backend)
    assert found[0].isfinite().all()
    # Who says nothing is no further away than the student is from itself.
    assert found[0][2] == 0
    found = run(student, TeacherTopK(ids, logprobs), kind=kind, tail=False, backend=backend)
    assert found[0][2].isnan()
    assert found[0][:2].isfinite().all()


@every_backend
def test_ids_that_no_student_has(backend: str) -> None:
    student, logprobs = random(2, 20, seed=22), torch.full((2, 2), -1.0, device=DEVICE)
    ids = torch.tensor([[3, 21], [3, 4]], device=DEVICE)
    if DEVICE == "cuda":
        found = run(student, TeacherTopK(ids, logprobs), backend=backend)[0]
        assert found.isnan().tolist() == [True, False]
        return
    with pytest.raises(ValueError, match=r"^ids must lie below num_ids, 20, got 21$"):
        leafkernels.divergence(student, TeacherTopK(ids, logprobs), backend=backend)
    leafkernels.divergence(
        student, TeacherTopK(ids, logprobs), response_mask=torch.tensor([False, True]), backend=backend
    )


def test_errors() -> None:
    logits = torch.zeros(2, 5, device=DEVICE)
    served = TeacherTopK(torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), torch.zeros(2, 1, device=DEVICE))

    def refuses(
        error: type[Exception], message: str, student: Any = logits, teacher: Any = logits, **options: Any
    ) -> None:
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            leafkernels.divergence(student, teacher, **options)

    refuses(TypeError, "student_logits must be a torch.Tensor, got list", [[0.0]])
    refuses(TypeError, "teacher_logits must be a torch.Tensor, got NoneType", teacher=None)
    refuses(ValueError, "student_logits must have shape (..., vocabulary), got a scalar", logits[0, 0])
    message = "teacher_logits must have one row for each of student_logits, (2,), got shape (3, 5)"
    refuses(ValueError, message, teacher=torch.zeros(3, 5, device=DEVICE))
    message = "teacher_logits must be float64 if and only if student_logits is, torch.float32, got torch.float64"
    refuses(TypeError, message, teacher=logits.double())
    refuses(ValueError, "kind must be one of 'reverse_kl', 'forward_kl', 'jsd', got 'kl'", kind="kl")
    for beta in (0.0, 1, -0.5):
        message = f"beta must lie between 0 and 1 (at 0 and 1 take forward_kl and reverse_kl), got {beta}"
        refuses(ValueError, message, kind="jsd", beta=beta)
    refuses(TypeError, "beta must be a number, got str", beta="a")
    refuses(TypeError, "tail must be True or False, got int", tail=1)
    refuses(ValueError, "temperature must be positive, got 0", temperature=0)
    refuses(ValueError, "top_k must be at least 1, got 0", top_k=0)
    refuses(TypeError, "top_k must be an int, got float", top_k=2.0)
    refuses(ValueError, "num_ids must be at most 5, got 6", num_ids=6)
    message = "num_ids must be given where the vocabularies differ in size, at most 4: the student's has 5 ids, "
    message += "the teacher's 4"
    refuses(ValueError, message, teacher=logits[:, :4])
    refuses(ValueError, "response_mask must have the shape of the rows of student_logits, (2,)", response_mask=logits)
    refuses(ValueError, "top_k must be None with a TeacherTopK", teacher=served, top_k=1)
    none = TeacherTopK(served.ids[:, :0], logits)
    refuses(ValueError, "ids must have shape (*(2,), k) with k at least 1, got (2, 0)", teacher=none)
    wide = TeacherTopK(served.ids, logits)
    refuses(ValueError, "logprobs must have the shape of ids, (2, 1), got shape (2, 5)", teacher=wide)
    refuses(TypeError, "ids must hold integers, got torch.float32", teacher=TeacherTopK(logits, logits))
    if DEVICE == "cpu":
        twice = TeacherTopK(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2))
        refuses(ValueError, "ids must hold each id once in a row, got one twice", teacher=twice)
        more = TeacherTopK(served.ids, served.logprobs + 1)
        refuses(ValueError, "logprobs must be log-probabilities, at most 0, got 1.0", teacher=more)
        logits_of_it = TeacherTopK(torch.arange(4).expand(2, 4), torch.full((2, 4), -0.1))
        message = (
            "logprobs must be those of one distribution, whose probabilities add up to at most 1, got a row of 3.62"
        )
        refuses(ValueError, message, teacher=logits_of_it, kind="forward_kl")
    message = "student_logits must be float32, bfloat16 or float16 with backend='triton', got torch.float64"
    refuses(TypeError, message, logits.double(), logits.double(), backend="triton")
