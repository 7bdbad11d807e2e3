"""policy_loss_from_logits: the loss and the gradient of the composition it replaces, from one pass."""

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

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPTIONS = st.fixed_dictionaries(
    {
        "clip": st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, math.inf)]),
        "dual_clip": st.sampled_from([None, 1.1, 3.0]),
        "max_log_ratio": st.sampled_from([None, 0.2, 20.0]),
        "kl_coef": st.sampled_from([0.0, 0.1]),
        "entropy_coef": st.sampled_from([0.0, 0.01]),
        "aggregate": st.sampled_from(["token_mean", "sequence_mean", "sum", "constant"]),
    }
)


def inputs(seed: int, rows: int, tokens: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Old and reference policies near the one of the logits, as in training: some ratios are clipped, others not."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    logits = (normal(rows, tokens, vocabulary) * 2).to(dtype)
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    logprobs = logits.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    tensors = {
        "logits": logits,
        "token_ids": ids,
        "old_logprobs": logprobs + normal(rows, tokens) * 0.2,
        "advantages": normal(rows, tokens),
        "response_mask": torch.rand(rows, tokens, generator=generator) < 0.7,
        "ref_logprobs": logprobs + normal(rows, tokens) * 0.2,
        "temperature": 0.75 + 0.5 * torch.rand(rows, tokens, generator=generator),
    }
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def composed(logits: torch.Tensor, token_ids: torch.Tensor, **options: Any) -> leafkernels.PolicyLoss:
    found = leafkernels.surprisal_entropy(
        logits, token_ids, temperature=options.pop("temperature"), response_mask=options["response_mask"]
    )
    if options["old_logprobs"] is None:
        options["old_logprobs"] = found.logprobs.detach()
    return leafkernels.policy_loss(found.logprobs, entropy=found.entropy, **options)


def loss_and_gradient(function: Any, logits: torch.Tensor, **options: Any) -> tuple[Any, torch.Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    result = function(leaf, **options)
    result.loss.backward()
    assert leaf.grad is not None
    return result, leaf.grad


def cases(backend: str, most: int) -> Any:
    def decorate(run: Any) -> Any:
        return settings(max_examples=most if backend == "torch" else min(most, 15))(
            given(
                st.integers(0, 10**6), st.integers(1, 3), st.integers(0, 4), st.integers(1, 20), OPTIONS, st.booleans()
            )(run)
        )

    return decorate


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(backend: str, small_blocks: None) -> None:
    """Of numbers of order 1, summed over at most 12 tokens and 20 ids in float32, no rounding leaves 2e-5."""

    @cases(backend, 100)
    def run(seed: int, rows: int, tokens: int, vocabulary: int, options: dict[str, Any], on_policy: bool) -> None:
        tensors = inputs(seed, rows, tokens, vocabulary)
        if on_policy:
            tensors["old_logprobs"] = None
        if options["aggregate"] == "constant":
            options = {**options, "constant": 7.0}
        found, gradient = loss_and_gradient(leafkernels.policy_loss_from_logits, **tensors, **options, backend=backend)
        lists = {k: None if v is None else v.tolist() for k, v in tensors.items()}
        expected, grad_logits = python_ref.policy_loss_from_logits(**lists, **options)
        assert found._fields == tuple(expected)
        for name, value in expected.items():
            assert float(getattr(found, name).detach()) == pytest.approx(value, rel=2e-5, abs=2e-5), name
        want = torch.tensor(grad_logits, dtype=torch.float64).reshape(gradient.shape)
        torch.testing.assert_close(gradient.double().cpu(), want, rtol=2e-5, atol=2e-5)

    run()


def test_equals_the_composition_in_float64(small_blocks: None) -> None:
    """Loss, statistics and gradient of surprisal_entropy and policy_loss, through autograd, to float64's rounding."""

    @cases("torch", 100)
    def run(seed: int, rows: int, tokens: int, vocabulary: int, options: dict[str, Any], on_policy: bool) -> None:
        tensors = inputs(seed, rows, tokens, vocabulary, torch.float64)
        if on_policy:
            tensors["old_logprobs"] = None
        options = {**options, "constant": 7.0 if options["aggregate"] == "constant" else None}
        found, gradient = loss_and_gradient(leafkernels.policy_loss_from_logits, **tensors, **options)
        expected, want = loss_and_gradient(composed, **tensors, **options)
        torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-12)

    run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_equals_the_composed_one(backend: str, dtype: torch.dtype, small_blocks: None) -> None:
    """The same numbers in the same order but for the loss itself: one rounding to the dtype of the logits apart."""
    tensors = inputs(1, 3, 4, 30, dtype)
    options = {"kl_coef": 0.1, "entropy_coef": 0.01, "clip": (0.1, 0.1)}
    found, gradient = loss_and_gradient(leafkernels.policy_loss_from_logits, **tensors, **options, backend=backend)
    expected, want = loss_and_gradient(composed, **tensors, **options)
    assert 0 < float(expected.clip_fraction) < 1
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_factor_from_above_and_one_backward_pass(backend: str, small_blocks: None) -> None:
    tensors = inputs(2, 2, 3, 20)
    _, once = loss_and_gradient(leafkernels.policy_loss_from_logits, **tensors, backend=backend)
    logits = tensors.pop("logits").requires_grad_()
    result = leafkernels.policy_loss_from_logits(logits, **tensors, backend=backend)
    (result.loss / 4).backward(retain_graph=True)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, once / 4)
    assert not any(statistic.requires_grad for statistic in result[1:])
    with pytest.raises(RuntimeError, match="gave its gradient away in a first backward pass"):
        result.loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_are_not_read(backend: str) -> None:
    tensors = inputs(3, 2, 4, 9)
    expected, want = loss_and_gradient(leafkernels.policy_loss_from_logits, **tensors)
    out = ~tensors["response_mask"]
    assert out.any()
    for name in ("logits", "old_logprobs", "advantages", "ref_logprobs"):
        tensors[name][out] = math.nan
    tensors["token_ids"][out] = -100
    found, gradient = loss_and_gradient(leafkernels.policy_loss_from_logits, **tensors, backend=backend)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-6)
    assert not gradient[out].any()
    tensors["response_mask"][:] = False
    found, gradient = loss_and_gradient(leafkernels.policy_loss_from_logits, **tensors, backend=backend)
    assert [float(number.detach()) for number in found] == [0.0] * 6
    assert not gradient.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_banned_ids_and_peaked_rows(backend: str, small_blocks: None) -> None:
    tensors = inputs(4, 2, 3, 20)
    tensors["logits"][0, :, 5:] = -math.inf
    tensors["logits"][1, :, 7] = 60.0
    tensors["token_ids"][0], tensors["token_ids"][1] = 2, 7
    tensors["old_logprobs"] = None
    options = {"entropy_coef": 1.0, "aggregate": "sum"}
    found, gradient = loss_and_gradient(leafkernels.policy_loss_from_logits, **tensors, **options, backend=backend)
    wide = {k: v.double() if k == "logits" else v for k, v in tensors.items()}
    expected, want = loss_and_gradient(composed, **wide, **options)
    assert gradient.isfinite().all()
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_confident_token_is_not_rounded_away(backend: str, small_blocks: None) -> None:
    """1 - p of the sampled id is the sum of all other p, also where p itself is 1 to within rounding."""
    logits = torch.linspace(-1, 0, 40, device=DEVICE).repeat(1, 2, 1)
    logits[..., 30] = 40.0
    others = (logits.double()[0, 0] - 40.0).exp()
    others[30] = 0.0
    ones = torch.ones(1, 2, device=DEVICE)
    ids = torch.full((1, 2), 30, device=DEVICE)
    _, gradient = loss_and_gradient(
        leafkernels.policy_loss_from_logits,
        logits,
        token_ids=ids,
        old_logprobs=None,
        advantages=ones,
        response_mask=ones,
        aggregate="sum",
        backend=backend,
    )
    others[30] = -others.sum()
    torch.testing.assert_close(gradient[0, 0].double(), others, rtol=1e-5, atol=0)
    assert torch.equal(gradient[0, 0], gradient[0, 1])


def test_small_moves_of_the_policy_are_measured() -> None:
    """e^x - 1 - x of a log-ratio of 1e-3 is 5e-7: written down so, float32 gives noise."""
    tensors = inputs(5, 1, 4, 9)
    tensors["response_mask"][:] = True
    exact = leafkernels.surprisal_entropy(tensors["logits"], tensors["token_ids"], temperature=tensors["temperature"])
    tensors["old_logprobs"] = exact.logprobs - 1e-3
    for backend in ("torch", "triton"):
        found = leafkernels.policy_loss_from_logits(**tensors, backend=backend)
        # The log-ratio itself is the difference of two numbers of order 1, each rounded to float32.
        assert float(found.approx_kl) == pytest.approx(5e-7, rel=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ratios_that_overflow_and_terms_without_a_weight(backend: str) -> None:
    """Clipped, an infinite ratio has no gradient; an advantage of 0 gains nothing, a weight of 0 leaves statistics."""
    tensors = inputs(8, 1, 4, 9)
    tensors["response_mask"][:] = True
    expected, _ = loss_and_gradient(leafkernels.policy_loss_from_logits, **tensors, aggregate="sum", backend=backend)
    tensors["old_logprobs"][0, :3] = torch.tensor([-200.0, -200.0, -math.inf], device=DEVICE)
    tensors["advantages"][0, :3] = torch.tensor([1.0, 0.0, 0.0], device=DEVICE)
    tensors["ref_logprobs"][0, :2] = torch.tensor([-math.inf, math.nan], device=DEVICE)
    for above in (0.2, math.inf):
        found, gradient = loss_and_gradient(
            leafkernels.policy_loss_from_logits, **tensors, aggregate="sum", clip=(0.2, above), backend=backend
        )
        assert gradient[0, 1:].isfinite().all()
        assert not gradient[0, 1:3].any()
        assert gradient[0, 3].any()
        if above == 0.2:
            assert not gradient[0, 0].any()
            options = {**tensors, "response_mask": tensors["response_mask"] & (torch.arange(4, device=DEVICE) == 3)}
            last = leafkernels.policy_loss_from_logits(**options, aggregate="sum", backend=backend).loss
            torch.testing.assert_close(found.loss.detach(), last - 1.2)
        assert found.mean_kl.isnan()
    assert not expected.loss.isnan()


def test_without_gradients_none_is_written() -> None:
    tensors = inputs(6, 2, 3, 9)
    kept = leafkernels.policy_loss_from_logits(**tensors)
    assert kept.loss.grad_fn is None
    tensors["logits"].requires_grad_()
    with torch.no_grad():
        assert leafkernels.policy_loss_from_logits(**tensors).loss.grad_fn is None


def test_errors() -> None:
    tensors = inputs(7, 2, 3, 5)

    def check_refuses(error: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            leafkernels.policy_loss_from_logits(**{**tensors, **changes})

    check_refuses(
        ValueError,
        "logits must have shape (rows, tokens, vocabulary), got shape (3, 5)",
        logits=tensors["logits"][0],
    )
    check_refuses(
        ValueError,
        "advantages must have one entry for each row of logits, shape (2, 3), got shape (2,)",
        advantages=tensors["advantages"][:, 0],
    )
    check_refuses(TypeError, "token_ids must hold integers, got torch.float32", token_ids=tensors["advantages"])
    check_refuses(ValueError, "dual_clip must be greater than 1, got 1", dual_clip=1)
    check_refuses(ValueError, "max_log_ratio must be positive, got -20", max_log_ratio=-20)
    check_refuses(ValueError, "constant must be positive, got 0", aggregate="constant", constant=0)
    check_refuses(ValueError, "entropy_coef must be finite, got nan", entropy_coef=math.nan)
    check_refuses(TypeError, "response_mask must be a torch.Tensor, got NoneType", response_mask=None)
    check_refuses(
        ValueError, "ref_logprobs must be given where kl_coef is not 0, got kl_coef=0.1", ref_logprobs=None, kl_coef=0.1
    )
    check_refuses(
        TypeError,
        "logits must be float32, bfloat16 or float16 with backend='triton', got torch.float64",
        logits=tensors["logits"].double(),
        backend="triton",
    )
