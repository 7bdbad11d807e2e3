"""policy_loss: against the reference, against autograd by hand, and where masked tokens hold rubbish."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import DEVICE

import leafkernels
import python_ref

OPTIONS = st.fixed_dictionaries(
    {
        "clip": st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, math.inf)]),
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


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 6), OPTIONS)
@settings(max_examples=150)
def test_agrees_with_the_reference(seed: int, rows: int, tokens: int, options: dict[str, Any]) -> None:
    tensors = inputs(seed, rows, tokens)
    if options["aggregate"] == "constant":
        options = {**options, "constant": 7.0}
    found = leafkernels.policy_loss(**tensors, **options)
    expected = python_ref.policy_loss(**{k: v.tolist() for k, v in tensors.items()}, **options)
    assert found._fields == tuple(expected)
    for name, value in expected.items():
        assert float(getattr(found, name)) == pytest.approx(value, rel=1e-12, abs=1e-12), name


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


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e30])
def test_rubbish_in_masked_tokens_changes_nothing(rubbish: float, importance: str) -> None:
    results = []
    for fill in (0.0, rubbish):
        tensors = inputs(5, dtype=torch.float32)
        tensors["response_mask"][1] = False
        masked = ~tensors["response_mask"]
        for name in ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy"):
            tensors[name] = tensors[name].masked_fill(masked, fill)
        logprobs = tensors["logprobs"].requires_grad_()
        result = leafkernels.policy_loss(**tensors, importance=importance, kl_coef=0.1, entropy_coef=0.1)
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


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize(("log_ratio", "advantage", "above", "lost", "slope"), OVERFLOWS)
def test_ratios_that_overflow(
    log_ratio: float, advantage: float, above: float, lost: float, slope: float, importance: str
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
    result = leafkernels.policy_loss(**{**tensors, "logprobs": logprobs.T}, **options)
    result.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[slope, -2.0]]
    assert float(result.loss.detach()) == pytest.approx(lost - 2.0)
    # The reference has Python's floats, which hold e^90: to them an overflow is e^710.
    rows["old_logprobs"][0][0] = -8 * log_ratio
    assert python_ref.policy_loss(**rows, **options)["loss"] == pytest.approx(lost - 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_terms_without_a_weight_are_statistics(importance: str) -> None:
    """A reference policy that bans a sampled token, or none that is known, and an entropy that is NaN."""
    tensors = inputs(9, dtype=torch.float32)
    tensors["response_mask"][0, :3] = True
    expected = leafkernels.policy_loss(**tensors, importance=importance)
    tensors["ref_logprobs"][0, :2] = torch.tensor([-math.inf, math.nan], device=DEVICE)
    tensors["entropy"][0, 2] = math.nan
    tensors["logprobs"].requires_grad_()
    tensors["entropy"].requires_grad_()
    found = leafkernels.policy_loss(**tensors, importance=importance)
    assert torch.equal(found.loss.detach(), expected.loss)
    found.loss.backward()
    assert tensors["logprobs"].grad is not None
    assert tensors["logprobs"].grad.isfinite().all()
    assert found.mean_kl.isnan()
    assert found.mean_entropy.isnan()
    lists = {k: v.tolist() for k, v in tensors.items()}
    assert python_ref.policy_loss(**lists, importance=importance)["loss"] == pytest.approx(float(found.loss))
    for weights in ({"kl_coef": 0.1}, {"entropy_coef": 0.1}):
        assert leafkernels.policy_loss(**tensors, importance=importance, **weights).loss.isnan()


def test_no_token_at_all() -> None:
    tensors = inputs(6, dtype=torch.float32)
    tensors["response_mask"][:] = False
    for aggregate in ("token_mean", "sequence_mean", "sum"):
        result = leafkernels.policy_loss(**tensors, aggregate=aggregate)
        assert all(float(value) == 0 for value in result)


def test_half_precision_is_computed_in_float32_and_compiles() -> None:
    tensors = inputs(7, dtype=torch.bfloat16)
    result = leafkernels.policy_loss(**tensors)
    assert result.loss.dtype == torch.float32
    torch._dynamo.reset()
    compiled = torch.compile(lambda **t: tuple(leafkernels.policy_loss(**t)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**tensors), tuple(result))


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
    check_refuses(ValueError, "importance must be one of 'token', 'sequence', got 'row'", importance="row")
    check_refuses(
        ValueError,
        "aggregate must be one of 'token_mean', 'sequence_mean', 'sum', 'constant', got 'mean'",
        aggregate="mean",
    )
    check_refuses(TypeError, "clip must be a pair (below, above), got 0.2", clip=0.2)
    check_refuses(
        ValueError,
        "clip must be (below, above) with 0 <= below <= 1 and above >= 0, got (2.0, 0.2)",
        clip=(2.0, 0.2),
    )
