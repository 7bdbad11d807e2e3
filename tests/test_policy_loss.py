"""policy_loss: against the reference, against autograd by hand, and where masked tokens hold rubbish."""

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
from leafkernels.losses.aggregates import AGGREGATES

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPTIONS = st.fixed_dictionaries(
    {
        "clip": st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, math.inf)]),
        "dual_clip": st.sampled_from([None, 1.1, 3.0]),
        "max_log_ratio": st.sampled_from([None, 0.2, 20.0]),
        "kl_coef": st.sampled_from([0.0, 0.1]),
        "entropy_coef": st.sampled_from([0.0, 0.01]),
        "importance": st.sampled_from(["token", "sequence"]),
        "aggregate": st.sampled_from(["token_mean", "sequence_mean", "sum", "constant"]),
    }
)


def inputs(seed: int, rows: int = 3, tokens: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, tokens, generator=generator) * 3
    return {
        "logprobs": (old + torch.randn(rows, tokens, generator=generator) * 0.3).to(dtype).to(DEVICE),
        "old_logprobs": old.to(dtype).to(DEVICE),
        "advantages": torch.randn(rows, tokens, generator=generator).to(dtype).to(DEVICE),
        "response_mask": (torch.rand(rows, tokens, generator=generator) < 0.7).to(DEVICE),
        "ref_logprobs": (old + torch.randn(rows, tokens, generator=generator) * 0.2).to(dtype).to(DEVICE),
        "entropy": torch.rand(rows, tokens, generator=generator).to(dtype).to(DEVICE),
    }


def loss_and_gradients(**arguments: Any) -> tuple[leafkernels.PolicyLoss, torch.Tensor, torch.Tensor]:
    """The result, and the gradients of the log-probabilities and of the entropy."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in ("logprobs", "entropy")}
    result = leafkernels.policy_loss(**{**arguments, **leaves})
    gradients = torch.autograd.grad(result.loss, tuple(leaves.values()), materialize_grads=True)
    return result, *gradients


def shares(mask: list[list[bool]], aggregate: str) -> list[float]:
    """What a token of each row weighs in the loss; ``constant`` is 7."""
    number, rows = sum(map(sum, mask)), sum(map(any, mask))
    return [
        {
            "token_mean": 1 / max(number, 1),
            "sequence_mean": 1 / max(rows * sum(row), 1),
            "sum": 1.0,
            "constant": 1 / 7,
        }[aggregate]
        for row in mask
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(backend: str, small_blocks: None) -> None:
    """Loss, statistics and both gradients; sums of at most 24 numbers of order 1, float32 but for PyTorch."""
    dtype, tolerance = (torch.float64, 1e-12) if backend == "torch" else (torch.float32, 1e-5)

    @given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 6), OPTIONS)
    @settings(max_examples=25 if backend == "triton" else 150)
    def run(seed: int, rows: int, tokens: int, options: dict[str, Any]) -> None:
        tensors = inputs(seed, rows, tokens, dtype)
        if options["aggregate"] == "constant":
            options = {**options, "constant": 7.0}
        found, grad_logprobs, grad_entropy = loss_and_gradients(**tensors, **options, backend=backend)
        lists = {k: v.tolist() for k, v in tensors.items()}
        expected = python_ref.policy_loss(**lists, **options)
        assert found._fields == tuple(expected)
        for name, value in expected.items():
            assert float(getattr(found, name).detach()) == pytest.approx(value, rel=tolerance, abs=tolerance), name
        lists.pop("entropy", None)
        wanted = python_ref.policy_loss_backward(**lists, **options)
        for found_rows, wanted_rows in zip((grad_logprobs, grad_entropy), wanted, strict=True):
            for found_row, want in zip(found_rows.tolist(), wanted_rows, strict=True):
                assert found_row == pytest.approx(want, rel=tolerance, abs=tolerance)

    run()


def test_by_hand() -> None:
    """Ratios 2 and 0.5 with advantages 1 and -1: both lie beyond the clip range where it decides; 2 and -1 does not."""
    log2 = math.log(2)
    tensors = {
        "logprobs": torch.tensor([[log2, -log2, log2, 9.0]], dtype=torch.float64),
        "old_logprobs": torch.zeros(1, 4, dtype=torch.float64),
        "advantages": torch.tensor([[1.0, -1.0, -1.0, 5.0]], dtype=torch.float64),
        "response_mask": torch.tensor([[True, True, True, False]]),
    }
    result = leafkernels.policy_loss(**tensors)
    assert float(result.loss) == pytest.approx((-1.2 + 0.8 + 2.0) / 3)
    assert float(result.clip_fraction) == pytest.approx(2 / 3)
    assert float(result.mean_ratio) == pytest.approx((2 + 0.5 + 2) / 3)
    sequence = leafkernels.policy_loss(**tensors, importance="sequence", aggregate="sum")
    ratio = 2 ** (1 / 3)
    assert float(sequence.loss) == pytest.approx(-min(ratio, 1.2) + ratio + ratio)


BOUNDS: list[tuple[float, float, float | None, float | None, float, float, float]] = [
    # log-ratio, advantage, dual_clip, max_log_ratio, and the loss, its slope, and whether it is clipped.
    (math.log(4), -1.0, None, None, 4.0, 4.0, 0),
    (math.log(4), -1.0, 3.0, None, 3.0, 0.0, 1),
    (math.log(2), -1.0, 3.0, None, 2.0, 2.0, 0),
    (math.log(4), -0.5, 3.0, None, 1.5, 0.0, 1),
    (math.log(4), 1.0, 3.0, None, -1.2, 0.0, 1),
    (math.log(4), 0.0, 3.0, None, 0.0, 0.0, 0),
    (math.log(0.5), -1.0, 3.0, None, 0.8, 0.0, 1),
    (math.log(4), -1.0, None, math.log(2), 2.0, 0.0, 0),
    (math.log(1.5), -1.0, None, math.log(2), 1.5, 1.5, 0),
    (math.log(0.25), 1.0, None, math.log(2), -0.5, 0.0, 0),
    (math.log(4), -1.0, 1.5, math.log(2), 1.5, 0.0, 1),
    (math.inf, -1.0, 3.0, None, 3.0, 0.0, 1),
    (math.inf, -1.0, None, math.log(2), 2.0, 0.0, 0),
    (-math.inf, 1.0, None, math.log(2), -0.5, 0.0, 0),
]


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_by_hand(backend: str, importance: str) -> None:
    """Rows of one token, so that both ratios are the same."""
    for log_ratio, advantage, dual_clip, max_log_ratio, loss, slope, clipped in BOUNDS:
        rows = {"logprobs": [[0.0]], "old_logprobs": [[-log_ratio]], "advantages": [[advantage]]}
        tensors = {name: torch.tensor(values, device=DEVICE) for name, values in rows.items()}
        tensors["response_mask"] = tensors["entropy"] = torch.ones(1, 1, device=DEVICE)
        bounds = {"dual_clip": dual_clip, "max_log_ratio": max_log_ratio}
        found, gradient, _ = loss_and_gradients(**tensors, **bounds, importance=importance, backend=backend)
        case = (log_ratio, advantage, bounds)
        assert float(found.loss.detach()) == pytest.approx(loss), case
        assert float(gradient) == pytest.approx(slope), case
        assert float(found.clip_fraction) == clipped, case
        most = math.inf if max_log_ratio is None else max_log_ratio
        bounded = torch.tensor(min(max(log_ratio, -most), most))
        assert float(found.mean_ratio) == pytest.approx(float(bounded.exp())), case


def test_the_bound_of_a_sequence_is_on_its_mean() -> None:
    """Log-ratios 3 and -1: their mean 1 is within a bound of 2; with 0.5 the row has the ratio e^0.5, and no slope."""
    tensors = {
        "logprobs": torch.tensor([[3.0, -1.0]], device=DEVICE),
        "old_logprobs": torch.zeros(1, 2, device=DEVICE),
        "advantages": -torch.ones(1, 2, device=DEVICE),
        "response_mask": torch.ones(1, 2, device=DEVICE),
        "entropy": torch.zeros(1, 2, device=DEVICE),
    }
    for bound, lost, slope in ((2.0, math.e, math.e), (0.5, math.exp(0.5), 0.0)):
        found, gradient, _ = loss_and_gradients(
            **tensors, importance="sequence", aggregate="sum", max_log_ratio=bound, backend="torch"
        )
        assert float(found.loss.detach()) == pytest.approx(2 * lost)
        assert gradient.tolist() == [pytest.approx([slope] * 2)]
        assert float(found.approx_kl) == pytest.approx((math.exp(3) - 4 + math.exp(-1)) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_triton_equals_torch(importance: str, dtype: torch.dtype, small_blocks: None) -> None:
    """Views of any stride, inputs of other dtypes, and a mask of integers; only the order of float32 sums differs."""
    wide = inputs(10, 5, 22, torch.float32)
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in wide.items()}
    tensors = {name: tensor.T.contiguous().T[1:, ::2] for name, tensor in tensors.items()}
    tensors["old_logprobs"] = wide["old_logprobs"][1:, 11:]
    tensors["advantages"] = wide["advantages"][1:, :1].double().expand(4, 11)
    tensors["response_mask"] = tensors["response_mask"].int() * 2
    options: dict[str, Any] = {"importance": importance, "kl_coef": 0.1, "entropy_coef": 0.01, "dual_clip": 1.5}
    found, expected = (
        loss_and_gradients(**tensors, **options, max_log_ratio=0.7, backend=backend) for backend in ("triton", "torch")
    )
    assert found[1].dtype == found[2].dtype == dtype
    # 1e-7: the log-ratio's rounding.
    for ours, theirs in zip((*found[0], *found[1:]), (*expected[0], *expected[1:]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)
    again = loss_and_gradients(**tensors, **options, max_log_ratio=0.7, backend="triton")
    assert all(map(torch.equal, (*again[0], *again[1:]), (*found[0], *found[1:])))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_what_is_asked_for_has_a_gradient(backend: str) -> None:
    tensors = inputs(11, dtype=torch.float32)
    assert leafkernels.policy_loss(**tensors, backend=backend).loss.grad_fn is None
    entropy = tensors.pop("entropy").requires_grad_()
    assert leafkernels.policy_loss(**tensors, entropy=entropy, backend=backend).loss.grad_fn is None
    result = leafkernels.policy_loss(**tensors, entropy=entropy, entropy_coef=0.5, aggregate="sum", backend=backend)
    result.loss.backward(retain_graph=True)
    assert torch.equal(entropy.grad, -0.5 * tensors["response_mask"])  # type: ignore[arg-type]
    (result.loss / 2).backward()
    assert torch.equal(entropy.grad, -0.75 * tensors["response_mask"])  # type: ignore[arg-type]
    assert not any(statistic.requires_grad for statistic in result[1:])


@given(st.integers(0, 10**6), OPTIONS)
@settings(max_examples=20)
def test_gradcheck(seed: int, options: dict[str, Any]) -> None:
    """Token ratios: a sequence ratio's gradient is not that of its value, by design."""
    tensors = inputs(seed)
    options = {**options, "importance": "token", "constant": 3.0 if options["aggregate"] == "constant" else None}

    def loss(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return leafkernels.policy_loss(**{**tensors, "logprobs": logprobs, "entropy": entropy}, **options).loss

    arguments = tensors["logprobs"].requires_grad_(), tensors["entropy"].requires_grad_()
    assert torch.autograd.gradcheck(loss, arguments)


def test_sequence_ratios_have_the_gradient_of_gspo() -> None:
    """With one advantage for each row and the mean over rows, GSPO-token is GSPO: the gradient of the row's ratio."""
    tensors = inputs(3)
    row_advantages = tensors["advantages"][:, :1]
    tensors["advantages"] = row_advantages.expand(3, 5)
    ours = tensors["logprobs"].clone().requires_grad_()
    arguments = {**tensors, "logprobs": ours}
    leafkernels.policy_loss(**arguments, importance="sequence", aggregate="sequence_mean").loss.backward()

    exact = tensors["logprobs"].clone().requires_grad_()
    mask = tensors["response_mask"]
    log_ratio = ((exact - tensors["old_logprobs"]) * mask).sum(1) / mask.sum(1)
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * row_advantages[:, 0], ratio.clamp(0.8, 1.2) * row_advantages[:, 0])
    (-gain.mean()).backward()
    torch.testing.assert_close(ours.grad, exact.grad)


def test_on_policy_it_is_the_policy_gradient() -> None:
    """Ratio 1: the gradient of the sum is minus the advantage on every unmasked token, and nothing is clipped."""
    tensors = inputs(4, dtype=torch.float32)
    logprobs = tensors["logprobs"].requires_grad_()
    result = leafkernels.policy_loss(
        logprobs, logprobs.detach(), tensors["advantages"], tensors["response_mask"], aggregate="sum"
    )
    result.loss.backward()
    torch.testing.assert_close(logprobs.grad, -tensors["advantages"] * tensors["response_mask"])
    assert float(result.clip_fraction) == 0
    assert float(result.approx_kl) == 0
    assert float(result.mean_ratio) == 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e30])
def test_rubbish_in_masked_tokens_changes_nothing(rubbish: float, importance: str, backend: str) -> None:
    results = []
    for fill in (0.0, rubbish):
        tensors = inputs(5, dtype=torch.float32)
        tensors["response_mask"][1] = False
        masked = ~tensors["response_mask"]
        for name in ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy"):
            tensors[name] = tensors[name].masked_fill(masked, fill)
        logprobs = tensors["logprobs"].requires_grad_()
        options: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.1, "backend": backend}
        result = leafkernels.policy_loss(**tensors, importance=importance, **options)
        result.loss.backward()
        assert logprobs.grad is not None
        assert not logprobs.grad[masked].any()
        results.append((*result, logprobs.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


INFINITY = math.inf
# log-ratio, advantage, the clip range above, and what the token loses, with its slope in the log-probability.
OVERFLOWS = [
    (90.0, 1.0, 0.2, -1.2, 0.0),
    (INFINITY, 1.0, 0.2, -1.2, 0.0),
    (90.0, 0.0, 0.2, 0.0, 0.0),
    (90.0, 0.0, INFINITY, 0.0, 0.0),
    (INFINITY, 0.0, 0.2, 0.0, 0.0),
    (90.0, -1.0, 0.2, INFINITY, INFINITY),
    (-INFINITY, -1.0, 0.2, 0.8, 0.0),
    (-INFINITY, 1.0, 0.2, 0.0, 0.0),
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize(("log_ratio", "advantage", "above", "lost", "slope"), OVERFLOWS)
def test_ratios_that_overflow(
    log_ratio: float, advantage: float, above: float, lost: float, slope: float, importance: str, backend: str
) -> None:
    """float32 has no e^90; a second token, whose ratio is 1, keeps its gradient."""
    logprobs = torch.tensor([[0.0, -1.0]], device=DEVICE, requires_grad=True)
    rows = {
        "logprobs": [[0.0], [-1.0]],
        "old_logprobs": [[-log_ratio], [-1.0]],
        "advantages": [[advantage], [2.0]],
        "response_mask": [[1], [1]],
    }
    options: dict[str, Any] = {"clip": (0.2, above), "aggregate": "sum", "importance": importance}
    tensors = {name: torch.tensor(values, device=DEVICE) for name, values in rows.items()}
    result = leafkernels.policy_loss(**{**tensors, "logprobs": logprobs.T}, **options, backend=backend)
    result.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[slope, -2.0]]
    assert float(result.loss.detach()) == pytest.approx(lost - 2.0)
    # The reference has Python's floats, which hold e^90: to them an overflow is e^710.
    rows["old_logprobs"][0][0] = -8 * log_ratio
    assert python_ref.policy_loss(**rows, **options)["loss"] == pytest.approx(lost - 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_terms_without_a_weight_are_statistics(importance: str, backend: str) -> None:
    """A reference policy that bans a sampled token, or none that is known, and an entropy that is NaN."""
    tensors = inputs(9, dtype=torch.float32)
    tensors["response_mask"][0, :3] = True
    expected = leafkernels.policy_loss(**tensors, importance=importance, backend=backend)
    tensors["ref_logprobs"][0, :2] = torch.tensor([-math.inf, math.nan], device=DEVICE)
    tensors["entropy"][0, 2] = math.nan
    tensors["logprobs"].requires_grad_()
    tensors["entropy"].requires_grad_()
    found = leafkernels.policy_loss(**tensors, importance=importance, backend=backend)
    assert torch.equal(found.loss.detach(), expected.loss)
    found.loss.backward()
    assert tensors["logprobs"].grad is not None
    assert tensors["logprobs"].grad.isfinite().all()
    assert found.mean_kl.isnan()
    assert found.mean_entropy.isnan()
    lists = {k: v.tolist() for k, v in tensors.items()}
    assert python_ref.policy_loss(**lists, importance=importance)["loss"] == pytest.approx(float(found.loss.detach()))
    weights: dict[str, Any]
    for weights in ({"kl_coef": 0.1}, {"entropy_coef": 0.1}):
        assert leafkernels.policy_loss(**tensors, importance=importance, **weights, backend=backend).loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_at_all(backend: str) -> None:
    tensors = inputs(6, dtype=torch.float32)
    tensors["response_mask"][:] = False
    for aggregate in ("token_mean", "sequence_mean", "sum"):
        result = leafkernels.policy_loss(**tensors, aggregate=aggregate, backend=backend)
        assert all(float(value) == 0 for value in result)
        nothing = {name: tensor[:0] for name, tensor in tensors.items()}
        result = leafkernels.policy_loss(**nothing, aggregate=aggregate, backend=backend)
        assert all(float(value) == 0 for value in result)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_half_precision_is_computed_in_float32_and_compiles(backend: str) -> None:
    tensors = inputs(7, dtype=torch.bfloat16)

    def loss(**arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(leafkernels.policy_loss(**arguments, kl_coef=0.1, dual_clip=1.5, backend=backend))

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = tensors["logprobs"].clone().requires_grad_()
        result = function(**{**tensors, "logprobs": leaf})
        assert result[0].dtype == torch.float32
        results.append((*result, torch.autograd.grad(result[0], leaf)[0]))
    torch.testing.assert_close(*results)
    assert results[0][-1].dtype == torch.bfloat16


def test_errors() -> None:
    tensors = inputs(8, dtype=torch.float32)

    def check_refuses(error: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            leafkernels.policy_loss(**{**tensors, **changes})

    check_refuses(
        ValueError,
        "logprobs must have shape (rows, tokens), got shape (15,)",
        logprobs=tensors["logprobs"].flatten(),
    )
    check_refuses(
        ValueError,
        "advantages must have the shape of logprobs, (3, 5), got shape (3,)",
        advantages=tensors["advantages"][:, 0],
    )
    check_refuses(TypeError, "response_mask must be a torch.Tensor, got NoneType", response_mask=None)
    check_refuses(
        ValueError,
        "ref_logprobs must be given where kl_coef is not 0, got kl_coef=0.1",
        kl_coef=0.1,
        ref_logprobs=None,
    )
    check_refuses(
        ValueError,
        "entropy must be given where entropy_coef is not 0, got entropy_coef=0.1",
        entropy_coef=0.1,
        entropy=None,
    )
    check_refuses(
        ValueError,
        "constant must be given with aggregate='constant', and only then, got constant=None and aggregate='constant'",
        aggregate="constant",
    )
    for value, must in ((0, "positive"), (-2.0, "positive"), (math.inf, "finite"), (math.nan, "finite")):
        check_refuses(ValueError, f"constant must be {must}, got {value}", aggregate="constant", constant=value)
    check_refuses(TypeError, "constant must be a number, got str", aggregate="constant", constant="1")
    check_refuses(ValueError, "kl_coef must be finite, got nan", kl_coef=math.nan)
    check_refuses(ValueError, "entropy_coef must be finite, got inf", entropy_coef=math.inf)
    for name in ("kl_coef", "entropy_coef", "dual_clip", "max_log_ratio"):
        check_refuses(ValueError, f"{name} must be finite in float32, got 1e+39", **{name: 1e39})
    check_refuses(ValueError, "importance must be one of 'token', 'sequence', got 'row'", importance="row")
    check_refuses(
        ValueError,
        f"aggregate must be one of {', '.join(map(repr, AGGREGATES))}, got 'mean'",
        aggregate="mean",
    )
    for value in (1, 0.5, -3.0):
        check_refuses(ValueError, f"dual_clip must be greater than 1, got {value}", dual_clip=value)
    check_refuses(ValueError, "dual_clip must be finite, got inf", dual_clip=math.inf)
    check_refuses(TypeError, "dual_clip must be a number, got str", dual_clip="3")
    check_refuses(ValueError, "max_log_ratio must be positive, got 0", max_log_ratio=0)
    check_refuses(ValueError, "max_log_ratio must be finite, got nan", max_log_ratio=math.nan)
    check_refuses(TypeError, "max_log_ratio must be a number, got bool", max_log_ratio=True)
    check_refuses(
        TypeError,
        "logprobs must be float32, bfloat16 or float16 with backend='triton', got torch.float64",
        logprobs=tensors["logprobs"].double(),
        backend="triton",
    )
    check_refuses(
        ValueError,
        "backend must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'",
        backend="cuda",
    )
    check_refuses(TypeError, "clip must be a pair (below, above), got 0.2", clip=0.2)
    check_refuses(
        ValueError,
        "clip must be (below, above) with 0 <= below <= 1 and above >= 0, got (2.0, 0.2)",
        clip=(2.0, 0.2),
    )


def test_the_gradient_of_k3_on_policy_is_that_of_the_reverse_divergence() -> None:
    """Over all tokens of a distribution: its value is that of KL(policy || ref), its gradient of KL(ref || policy)."""
    logits = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    policy, ref = logits[0].log_softmax(0), logits[1].detach().log_softmax(0)
    chance = policy.detach().exp()
    found = leafkernels.policy_loss(
        policy[:, None],
        policy.detach()[:, None],
        torch.zeros(6, 1, dtype=torch.float64),
        torch.ones(6, 1),
        ref_logprobs=ref[:, None],
        kl_coef=1.0,
        aggregate="sum",
    )
    # Each token as often as it is drawn.
    k3 = (ref - policy).exp() - 1 - (ref - policy)
    torch.testing.assert_close(found.loss, k3.sum())
    (gradient,) = torch.autograd.grad((chance * k3).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad(-(ref.exp() * policy).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits)
    torch.testing.assert_close((chance * k3).sum(), (chance * (policy - ref)).sum())
    torch.testing.assert_close(gradient[0], reverse[0])
    assert (gradient[0] - forward[0]).abs().max() > 0.1


def test_weights_by_hand_and_micro_batches() -> None:
    """As the page has it: a weight goes into the advantage; counts of the whole batch make micro-batches add up."""
    tensors = inputs(3, dtype=torch.float64)
    names = ("logprobs", "old_logprobs", "advantages", "response_mask")
    policy, old, credit, mask = (tensors[name] for name in names)
    weights = torch.linspace(0.0, 2.0, policy.numel(), dtype=policy.dtype, device=policy.device).view(policy.shape)

    def gradient(rows: slice, **options: Any) -> torch.Tensor:
        leaf = policy.clone().requires_grad_()
        parts = leaf[rows], old[rows], (credit * weights)[rows], mask[rows]
        leafkernels.policy_loss(*parts, dual_clip=3.0, **options).loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    rows = len(policy)
    halves = slice(0, rows // 2), slice(rows // 2, rows)
    # A token at a time, so that each weight stands before a loss of its own.
    for row, column in mask.nonzero().tolist():
        one = torch.zeros_like(mask)
        one[row, column] = True
        leaf = policy.clone().requires_grad_()
        leafkernels.policy_loss(leaf, old, credit, one, dual_clip=3.0, aggregate="sum").loss.backward()
        assert leaf.grad is not None
        grad_all = gradient(slice(0, rows), aggregate="sum")[row, column]
        torch.testing.assert_close(grad_all, weights[row, column] * leaf.grad[row, column])
    count = float(mask.sum())
    parts = sum(gradient(half, aggregate="constant", constant=count) for half in halves)
    torch.testing.assert_close(parts, gradient(slice(0, rows), aggregate="token_mean"))
    alive = [float(mask[half].any(1).sum()) for half in halves]
    parts = sum(
        n / sum(alive) * gradient(half, aggregate="sequence_mean") for n, half in zip(alive, halves, strict=True)
    )
    torch.testing.assert_close(parts, gradient(slice(0, rows), aggregate="sequence_mean"))
