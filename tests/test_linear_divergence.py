"""linear_divergence: divergence of the logits that hidden states make, which never exist."""

import re
from typing import Any

import pytest
import torch
from rollouts import BACKENDS, DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

import leafkernels
from leafkernels import TeacherTopK

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FAST = ("torch", "triton")
KINDS = ("reverse_kl", "forward_kl", "jsd")

every_kind = pytest.mark.parametrize("kind", KINDS)
every_backend = pytest.mark.parametrize("backend", FAST)
IDS = {"all": {}, "top": {"top_k": 4}, "top alone": {"top_k": 4, "tail": False}, "served": {}}
all_ids = pytest.mark.parametrize("ids", IDS)


def is_slow(backend: str, ids: str, kind: str) -> bool:
    """Of the interpreter, all but one of each: which ids and which kind are told apart by other code."""
    few = (("all", "jsd"), ("top", "reverse_kl"), ("served", "forward_kl"))
    return backend == "triton" and DEVICE == "cpu" and (ids, kind) not in few


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def heads(num_rows: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of a student of width 6 and a teacher of width 9, over 40 ids."""
    shapes = {"student_hidden": (num_rows, 6), "student_weight": (40, 6), "student_bias": (40,)}
    shapes |= {"teacher_hidden": (num_rows, 9), "teacher_weight": (40, 9), "teacher_bias": (40,)}
    return {name: random(*shape, seed=seed, dtype=dtype) for seed, (name, shape) in enumerate(shapes.items())}


SCALES = {"student_logit_scale": 1.5, "student_logit_softcap": 4.0, "teacher_logit_scale": 0.7}


def logits_of(given: dict[str, torch.Tensor], model: str) -> torch.Tensor:
    hidden, weight, bias = (given[f"{model}_{name}"].double() for name in ("hidden", "weight", "bias"))
    logits = SCALES[f"{model}_logit_scale"] * (hidden @ weight.T + bias)
    cap = SCALES.get(f"{model}_logit_softcap")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def both(
    given: dict[str, torch.Tensor], ids: str, linear: bool, rows: int | None = None, **options: Any
) -> list[torch.Tensor]:
    """Results, and gradients for hidden, weight and bias, from states in their dtype or from logits in float64."""
    leaves = {name: given[f"student_{name}"].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    tensors = given | {f"student_{name}": leaf for name, leaf in leaves.items()}
    teacher_logits = logits_of(tensors, "teacher")
    options = {"temperature": 0.8, **IDS[ids], **options}
    served = None
    if ids == "served":
        top = (teacher_logits / 0.8).log_softmax(1).topk(5)
        served = TeacherTopK(top.indices, top.values.float() if linear else top.values)
    if linear:
        other = {"teacher_hidden": served} if served else {}
        words = {name: tensor for name, tensor in tensors.items() if not (served and name.startswith("teacher"))}
        found = leafkernels.linear_divergence(**words, **other, **SCALES, **options)
    else:
        options = {
            name: value for name, value in options.items() if name not in ("chunk_tokens", "num_live", "backend")
        }
        found = leafkernels.divergence(
            logits_of(tensors, "student"), teacher_logits if served is None else served, backend="torch", **options
        )
    weights = torch.linspace(1, 2, len(found[0])).to(found[0]), torch.linspace(-1, 1, len(found[0])).to(found[0])
    total = (weights[0] * found.divergence + weights[1] * found.student_entropy).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return [numbers.detach().double() for numbers in (*found, *gradients)]


@every_kind
@all_ids
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_divergence_of_the_logits(backend: str, ids: str, kind: str, small_blocks: None) -> None:
    if is_slow(backend, ids, kind):
        pytest.skip("the interpreter takes seconds")
    given = heads()
    found = both(given, ids, True, kind=kind, chunk_tokens=3, backend=backend)
    for actual, want in zip(found, both(given, ids, False, kind=kind), strict=True):
        torch.testing.assert_close(actual, want, rtol=2e-5, atol=2e-5)


@every_kind
@all_ids
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_backend
def test_half_precision_rounds_gradients_alone(
    backend: str, dtype: torch.dtype, ids: str, kind: str, small_blocks: None
) -> None:
    """The logits of half-precision states are float32; their gradient has the dtype of the products."""
    if is_slow(backend, ids, kind):
        pytest.skip("the interpreter takes seconds")
    given = heads(dtype=dtype)
    found = both(given, ids, True, kind=kind, chunk_tokens=3, backend=backend)
    expected = both(given, ids, False, kind=kind)
    for actual, want in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(actual, want, rtol=2e-5, atol=2e-5)
    for actual, want in zip(found[4:], expected[4:], strict=True):
        torch.testing.assert_close(actual, want, rtol=3e-2, atol=3e-2)


@every_backend
def test_near_models_in_half_precision_are_near(backend: str) -> None:
    """Logits of 20 rounded to bfloat16 would differ by 1e-3 nats of noise."""
    weight, hidden = random(300, 64, seed=1, dtype=torch.bfloat16), random(5, 64, seed=2, dtype=torch.bfloat16) * 2
    other = weight.clone()
    other[:, 0] += 0.01
    options = {"kind": "reverse_kl", "backend": backend}
    found = leafkernels.linear_divergence(hidden, weight, hidden, other, **options).divergence
    exact = (hidden.double() @ weight.double().T, hidden.double() @ other.double().T)
    want = leafkernels.divergence(*exact, kind="reverse_kl", backend="torch").divergence
    torch.testing.assert_close(found.double(), want, rtol=1e-2, atol=1e-7)
    rounded = (logits.bfloat16() for logits in exact)
    assert (
        (leafkernels.divergence(*rounded, backend="torch").divergence - want).abs() > 10 * (found - want).abs()
    ).all()
    same = leafkernels.linear_divergence(hidden, weight, hidden, weight, **options).divergence
    assert not same.any()


@all_ids
def test_gradcheck(ids: str) -> None:
    given = heads(4, torch.float64)
    served = None
    if ids == "served":
        top = logits_of(given, "teacher").log_softmax(1).topk(3)
        served = TeacherTopK(top.indices, top.values)
    teacher = (given["teacher_hidden"], given["teacher_weight"]) if served is None else (served,)

    def function(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"kind": "jsd", "beta": 0.3, "student_bias": bias, "student_logit_softcap": 5.0, "chunk_tokens": 3}
        return leafkernels.linear_divergence(hidden, weight, *teacher, **options, **IDS[ids])[:2]

    leaves = [given[f"student_{name}"].requires_grad_() for name in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(function, leaves)


@every_kind
@all_ids
@pytest.mark.parametrize("num_live", [None, 6])
@every_backend
def test_masked_tokens_are_not_read(
    backend: str, num_live: int | None, ids: str, kind: str, small_blocks: None
) -> None:
    """Also where more are expected than there are; with a bias that would overflow where there is no row."""
    if is_slow(backend, ids, kind):
        pytest.skip("the interpreter takes seconds")
    given, mask = heads(), torch.tensor([1, 0, 1, 1, 0, 0, 1], device=DEVICE)
    given["student_bias"][3] = 200.0
    options = {"kind": kind, "response_mask": mask, "chunk_tokens": 3, "backend": backend}
    expected = both(given, ids, True, **options)
    live = mask.bool()
    for name in ("student_hidden", "teacher_hidden"):
        given[name] = torch.where(live[:, None], given[name], torch.nan)
    found = both(given, ids, True, num_live=num_live, **options)
    for actual, want in zip(found, expected, strict=True):
        # Chunks of other sizes, whose products round otherwise.
        torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-6)
    assert not any(numbers[~live].any() for numbers in found[:5])
    assert found[0][live].isfinite().all()


def test_fewer_live_than_there_are_gives_nan() -> None:
    given, mask = heads(), torch.tensor([1, 0, 1, 1, 0, 0, 1], device=DEVICE)
    for ids in ("all", "top"):
        found = leafkernels.linear_divergence(**given, **IDS[ids], response_mask=mask, num_live=3)
        assert found.divergence.isnan().tolist() == [False] * 6 + [True]


@every_kind
@all_ids
def test_the_logits_of_all_tokens_never_exist(ids: str, kind: str) -> None:
    given = heads(60)
    limit = 60 * 40

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, (tuple, list)) else (found,):
                if isinstance(tensor, torch.Tensor):
                    assert tensor.numel() < limit, func
            return found

    if ids == "served":
        top = logits_of(given, "teacher").float().log_softmax(1).topk(4)
        given = {name: tensor for name, tensor in given.items() if name.startswith("student")}
        given["teacher_hidden"] = TeacherTopK(top.indices, top.values)  # type: ignore[assignment]
    leaf = given["student_weight"].requires_grad_()
    with Largest():
        found = leafkernels.linear_divergence(**given, **IDS[ids], kind=kind, chunk_tokens=8)
        torch.autograd.grad(found.divergence.sum() + found.student_entropy.sum(), leaf)


@every_backend
def test_ids_in_common(backend: str, small_blocks: None) -> None:
    """Weights of padded vocabularies, of which the rows that count are the first."""
    given = heads()
    wide = {**given, "teacher_weight": random(48, 9, seed=9), "teacher_bias": random(48, seed=10)}
    for name in ("weight", "bias"):
        wide[f"teacher_{name}"][:33] = given[f"teacher_{name}"][:33]
        wide[f"student_{name}"] = given[f"student_{name}"].clone()
        wide[f"student_{name}"][33:] = torch.nan
    narrow = {name: tensor if "hidden" in name else tensor[:33] for name, tensor in given.items()}
    for ids in ("all",) if backend == "triton" and DEVICE == "cpu" else ("all", "top"):
        found = both(wide, ids, True, num_ids=33, backend=backend)
        expected = both(narrow, ids, True, backend=backend)
        for actual, want in zip(found[:5], expected[:5], strict=True):
            torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-6)
        for actual, want in zip(found[5:], expected[5:], strict=True):
            torch.testing.assert_close(actual[:33], want, rtol=1e-5, atol=1e-6)
            assert not actual[33:].any()


@every_backend
def test_shapes_frozen_weights_and_autocast(backend: str) -> None:
    given = heads()
    plain = leafkernels.linear_divergence(**given, backend=backend)
    shaped = {name: tensor.unflatten(0, (1, 7)) if "hidden" in name else tensor for name, tensor in given.items()}
    found = leafkernels.linear_divergence(**shaped, backend=backend)
    assert found.divergence.shape == (1, 7)
    torch.testing.assert_close(found.divergence[0], plain.divergence)
    # A frozen weight, as with LoRA, and a teacher that asks for gradients, which get none.
    leaf = given["student_hidden"].clone().requires_grad_()
    teacher = given["teacher_weight"].clone().requires_grad_()
    found = leafkernels.linear_divergence(
        **{**given, "student_hidden": leaf, "teacher_weight": teacher}, backend=backend
    )
    found.divergence.sum().backward()
    assert leaf.grad is not None
    assert teacher.grad is None
    assert not found.teacher_entropy.requires_grad
    with torch.autocast(DEVICE, torch.bfloat16):
        half = leafkernels.linear_divergence(**given, backend=backend)
    rounded = leafkernels.linear_divergence(**{name: x.bfloat16() for name, x in given.items()}, backend=backend)
    torch.testing.assert_close(half.divergence, rounded.divergence, rtol=1e-5, atol=1e-6)
    empty = {name: tensor[:0] if "hidden" in name else tensor for name, tensor in given.items()}
    for options in ({}, {"top_k": 3}):
        assert leafkernels.linear_divergence(**empty, **options, backend=backend).divergence.shape == (0,)
    masked = leafkernels.linear_divergence(**given, response_mask=torch.zeros(7, device=DEVICE), backend=backend)
    assert not masked.divergence.any()


@pytest.mark.slow
@all_ids
def test_compiles_into_one_graph(ids: str) -> None:
    given, mask = heads(), torch.tensor([1, 0, 1, 1, 0, 0, 1], device=DEVICE)
    top = logits_of(given, "teacher").float().log_softmax(1).topk(4)
    if ids == "served":
        given = {name: tensor for name, tensor in given.items() if name.startswith("student")}
        given["teacher_hidden"] = TeacherTopK(top.indices, top.values)  # type: ignore[assignment]
    hidden = given.pop("student_hidden")

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        options = {"kind": "jsd", "response_mask": mask, **IDS[ids]}
        found = leafkernels.linear_divergence(hidden, **given, **options)
        logits = hidden @ given["student_weight"].T
        other = given["teacher_hidden"] if ids == "served" else logits.detach() * 0.5
        again = leafkernels.divergence(logits, other, **options)
        return (found.divergence + found.student_entropy + again.divergence).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = hidden.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0])


def test_errors() -> None:
    given = heads()
    served = TeacherTopK(torch.zeros(7, 1, dtype=torch.int64, device=DEVICE), torch.zeros(7, 1, device=DEVICE))

    def refuses(error: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            leafkernels.linear_divergence(**{**given, **changes})

    refuses(TypeError, "student_hidden must be a torch.Tensor, got list", student_hidden=[[0.0]])
    refuses(TypeError, "teacher_weight must be a torch.Tensor, got NoneType", teacher_weight=None)
    message = "student_weight must have shape (vocabulary, 6), got shape (40, 9)"
    refuses(ValueError, message, student_weight=given["teacher_weight"])
    message = "teacher_bias must have one entry for each id, shape (40,), got shape (39,)"
    refuses(ValueError, message, teacher_bias=given["teacher_bias"][1:])
    message = "student_weight must have the dtype of student_hidden, torch.float32, got torch.bfloat16"
    refuses(TypeError, message, student_weight=given["student_weight"].bfloat16())
    message = "teacher_hidden must be float64 if and only if student_hidden is, torch.float32, got torch.float64"
    doubles = {name: given[name].double() for name in ("teacher_hidden", "teacher_weight", "teacher_bias")}
    refuses(TypeError, message, **doubles)
    message = "teacher_hidden must have one row for each of student_hidden, (7,), got shape (5, 9)"
    refuses(ValueError, message, teacher_hidden=given["teacher_hidden"][:5])
    message = "num_ids must be given where the vocabularies differ in size, at most 38: the student's has 40 ids, the"
    refuses(ValueError, message, teacher_weight=given["teacher_weight"][:38], teacher_bias=None)
    refuses(ValueError, "teacher_weight and teacher_bias must be None with a TeacherTopK", teacher_hidden=served)
    refuses(ValueError, "student_logit_scale must be positive, got 0", student_logit_scale=0)
    refuses(ValueError, "teacher_logit_softcap must be positive, got -1", teacher_logit_softcap=-1)
    refuses(ValueError, "num_live must be at least 0, got -1", num_live=-1)
    refuses(ValueError, "chunk_tokens must be at least 1, got 0", chunk_tokens=0)
