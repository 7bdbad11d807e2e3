"""surprisal_entropy: right where a softmax written down is not, against float64 on the inputs as rounded."""

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
from leafkernels._core.backend import implementation

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FAST = ("torch", "triton")
INF = math.inf


def tolerance(dtype: torch.dtype, reduced: int, lead: float = 0.0) -> float:
    """Relative error of a float32 sum of exponentials e^-z with z up to ``lead``.

    Rounding the exponent z (in powers of two) once moves e^-z by z roundings; the rest of each term by about 4, their
    sum by its depth. Results are float32 whatever the logits were, float64 for float64.
    """
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return unit * (8 + 2 * math.log2(max(reduced, 2)) + lead)


def truth(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    surprisal, entropy = python_ref.surprisal_entropy(
        logits.double().tolist(), token_ids.tolist(), temperature=temperature
    )
    return torch.tensor(surprisal, dtype=torch.float64), torch.tensor(entropy, dtype=torch.float64)


def check_exact(logits: torch.Tensor, token_ids: torch.Tensor, backend: str, temperature: float = 1.0) -> None:
    found = leafkernels.surprisal_entropy(logits, token_ids, temperature=temperature, backend=backend)
    expected = truth(logits, token_ids, temperature)
    finite = logits[logits > torch.finfo(logits.dtype).min].double()
    lead = float(finite.max() - finite.min()) / temperature if finite.numel() else 0.0
    rtol = tolerance(logits.dtype, logits.shape[-1], lead)
    for actual, want in zip(found, expected, strict=True):
        want[want > torch.finfo(actual.dtype).max] = INF
        torch.testing.assert_close(actual.double().cpu(), want, rtol=rtol, atol=1e-30, equal_nan=True)


# The least finite number is what masks write who do without -inf; a temperature below 1 takes it there.
LOGITS = (0.0, -0.0, 1.0, -1.5, 3.0, 10.0, -30.0, 60.0, -INF, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(backend: str, small_blocks: None) -> None:
    @settings(max_examples={"torch": 150, "reference": 40}.get(backend, 150 if DEVICE == "cuda" else 40))
    @given(
        st.integers(1, 40).flatmap(
            lambda v: st.lists(st.lists(st.sampled_from(LOGITS), min_size=v, max_size=v), min_size=1, max_size=3)
        ),
        st.data(),
        st.sampled_from([1.0, 0.5, 3.0]),
    )
    def run(rows: list[list[float]], data: st.DataObject, temperature: float) -> None:
        logits = torch.tensor(rows, device=DEVICE)
        ids = torch.tensor([data.draw(st.integers(0, len(rows[0]) - 1)) for _ in rows], device=DEVICE)
        check_exact(logits, ids, backend, temperature)

    run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 8, 9, 63, 64, 65, 257])
@pytest.mark.parametrize("backend", FAST)
def test_vocabularies_that_cross_blocks(backend: str, vocabulary: int, dtype: torch.dtype, small_blocks: None) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(3, vocabulary, generator=generator) * 4).to(dtype).to(DEVICE)
    ids = torch.randint(0, vocabulary, (3,), generator=generator).to(DEVICE)
    check_exact(logits, ids, backend)


@pytest.mark.parametrize("backend", FAST)
def test_banned_ids(backend: str, small_blocks: None) -> None:
    """-inf anywhere: whole leading blocks, all but one, the sampled id itself, the whole row."""
    logits = torch.linspace(-2, 2, 40, device=DEVICE).repeat(5, 1)
    logits[0, :25] = -INF
    logits[1, torch.arange(40) != 17] = -INF
    logits[2, 30] = -INF
    logits[3] = -INF
    logits[4, 9:] = -INF
    ids = torch.tensor([30, 17, 30, 0, 3], device=DEVICE)
    check_exact(logits, ids, backend)
    logits.requires_grad_()
    surprisal, entropy = leafkernels.surprisal_entropy(logits, ids, backend=backend)
    assert entropy[1] == 0
    assert surprisal[1] == 0
    assert surprisal[2] == INF
    assert entropy[2].isfinite()
    (surprisal + 2 * entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad[[0, 1, 2, 4]].isfinite().all()
    assert not logits.grad[1].any()
    assert logits.grad[3].isnan().all()


@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("backend", FAST)
def test_shifted_rows_lose_nothing(backend: str, shift: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(4, 1000, generator=generator) * 3 + shift).to(DEVICE)
    check_exact(logits, torch.tensor([0, 10, 500, 999], device=DEVICE), backend)


@pytest.mark.parametrize("lead", [10.0, 30.0, 60.0])
@pytest.mark.parametrize("backend", FAST)
def test_peaked_rows_keep_their_entropy(backend: str, lead: float) -> None:
    """Most tokens of a trained policy; lse - E[x] gives 0 or noise here, and 1e-4 is what is promised."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.rand(3, 5000, generator=generator).to(DEVICE)
    logits[:, 77] = lead + 1
    ids = torch.tensor([77, 3, 4999], device=DEVICE)
    _, expected = truth(logits, ids)
    _, entropy = leafkernels.surprisal_entropy(logits, ids, backend=backend)
    assert (expected > 0).all()
    torch.testing.assert_close(entropy.double().cpu(), expected, rtol=1e-4, atol=0)
    check_exact(logits, ids, backend)


@pytest.mark.parametrize("vocabulary", [128_256, 151_936])
@pytest.mark.parametrize("backend", FAST)
def test_vocabularies_of_real_models(backend: str, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(2, vocabulary, generator=generator) * 3).to(dtype).to(DEVICE)
        check_exact(logits, torch.tensor([5, vocabulary - 1], device=DEVICE), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", FAST)
def test_half_precision_is_no_worse_than_eager(backend: str, dtype: torch.dtype) -> None:
    """The error of the same computation in eager PyTorch at the same dtype, plus float32 rounding, is the bar."""
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(4, 3000, generator=generator) * 4).to(dtype).to(DEVICE)
    ids = torch.randint(0, 3000, (4,), generator=generator).to(DEVICE)
    logprobs = logits.log_softmax(-1)
    eager = -logprobs.gather(1, ids[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)
    ours = leafkernels.surprisal_entropy(logits, ids, backend=backend)
    for a, b, want in zip(ours, eager, truth(logits, ids), strict=True):
        error, bar = (a.double().cpu() - want).abs(), (b.double().cpu() - want).abs()
        assert (error <= bar + tolerance(dtype, 3000) * want.abs()).all()


@pytest.mark.parametrize("backend", FAST)
def test_bad_rows_and_masked_rows_stay_alone(backend: str, small_blocks: None) -> None:
    logits = torch.randn(6, 20, device=DEVICE)
    logits[0, 3], logits[1, 19], logits[2] = math.nan, INF, math.nan
    ids = torch.tensor([1, 1, 1, 20, -1, 7], device=DEVICE)
    mask = torch.tensor([1, 1, 0, 1, 1, 1], device=DEVICE)
    logits.requires_grad_()
    surprisal, entropy = leafkernels.surprisal_entropy(logits, ids, response_mask=mask, backend=backend)
    assert surprisal.isnan().tolist() == [True, True, False, True, True, False]
    assert entropy.isnan().tolist() == [True, True, False, False, False, False]
    assert surprisal[2] == entropy[2] == 0
    (surprisal.nan_to_num() + entropy.nan_to_num()).sum().backward()
    assert logits.grad is not None
    assert logits.grad[3:].isfinite().all()
    assert not logits.grad[2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_outside_the_vocabulary_has_a_gradient_of_nan(backend: str) -> None:
    """As its surprisal; where that is not asked for, the entropy's gradient is what it is."""
    logits = torch.randn(3, 20, device=DEVICE, requires_grad=True)
    ids = torch.tensor([3, 20, -1], device=DEVICE)
    found = leafkernels.surprisal_entropy(logits, ids, backend=backend)
    (gradient,) = torch.autograd.grad(found.surprisal.sum(), logits, retain_graph=True)
    assert gradient.isnan().all(1).tolist() == [False, True, True]
    (gradient,) = torch.autograd.grad(found.entropy.sum(), logits)
    assert gradient.isfinite().all()
    call = logits[None], ids[None], None, torch.ones(1, 3, device=DEVICE), torch.ones(1, 3, device=DEVICE)
    loss = leafkernels.policy_loss_from_logits(*call, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isnan().all(1).tolist() == [False, True, True]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_least_float64_is_a_banned_id(backend: str, temperature: float) -> None:
    """Over a temperature below 1 it is -inf, and so is its distance to a top."""
    least = torch.finfo(torch.float64).min
    rows = [[least, 1.0, 0.0], [least, least, 3.0], [least, 1e300, 1e300], [least, least, least]]
    logits = torch.tensor(rows, dtype=torch.float64, device=DEVICE, requires_grad=True)
    ids = torch.tensor([1, 2, 1, 0], device=DEVICE)
    found = leafkernels.surprisal_entropy(logits, ids, temperature=temperature, backend=backend)
    weights = torch.tensor([[1 / temperature, 0.0]], dtype=torch.float64)
    shown = torch.tensor(
        python_ref.surprisal_entropy([[1.0, 0.0], [0.0], [0.0] * 2, [0.0] * 3], [0] * 4, temperature=temperature),
        dtype=torch.float64,
    )
    torch.testing.assert_close(torch.stack(tuple(found)).detach().cpu(), shown)
    (gradient,) = torch.autograd.grad(found.surprisal.sum() + found.entropy.sum(), logits)
    p = (weights.squeeze()).softmax(0)
    grad_first = torch.stack(
        (torch.zeros((), dtype=torch.float64), *(p - torch.tensor([1.0, 0.0]) - p * (p.log() + shown[1, 0])))
    )
    torch.testing.assert_close(gradient[0].cpu(), grad_first / temperature)
    assert not gradient[1].any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_strides_and_temperatures(backend: str) -> None:
    wide = torch.randn(2, 3, 30, device=DEVICE)
    ids = torch.randint(0, 20, (2, 3), device=DEVICE)
    sliced = wide[..., 5:25]
    expected = leafkernels.surprisal_entropy(sliced.contiguous(), ids, backend=backend)
    for view in (sliced, wide.transpose(0, 1).contiguous().transpose(0, 1)[..., 5:25]):
        found = leafkernels.surprisal_entropy(view, ids, backend=backend)
        assert found.surprisal.shape == (2, 3)
        torch.testing.assert_close(found, expected)
    assert torch.equal(expected.logprobs, -expected.surprisal)
    temperatures = torch.tensor([[0.5, 1.0, 2.0], [0.1, 1.0, 7.0]], device=DEVICE)
    found = leafkernels.surprisal_entropy(sliced, ids, temperature=temperatures, backend=backend)
    for i in range(2):
        for j in range(3):
            one = leafkernels.surprisal_entropy(sliced[i, j] / temperatures[i, j], ids[i, j], backend=backend)
            torch.testing.assert_close(found.surprisal[i, j], one.surprisal, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.entropy[i, j], one.entropy, rtol=1e-5, atol=1e-6)
    # Found by a test that gave every row the same id.
    apart = {"token_ids": torch.tensor([3, 4], device=DEVICE)[::2].expand(3), "response_mask": ids[0].bool().expand(3)}
    apart["temperature"] = torch.tensor([0.5], device=DEVICE).expand(3)
    found = leafkernels.surprisal_entropy(sliced[0], **apart, backend=backend)
    together = {name: tensor.contiguous() for name, tensor in apart.items()}
    torch.testing.assert_close(found, leafkernels.surprisal_entropy(sliced[0], **together, backend=backend))
    nothing = leafkernels.surprisal_entropy(wide[:0], ids[:0], backend=backend)
    assert nothing.entropy.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [80, 83])
def test_rows_that_begin_anywhere(stride: int, dtype: torch.dtype, small_blocks: None) -> None:
    """Rows before whose first word others lie, and gradients whose words are not those of the logits."""
    generator = torch.Generator().manual_seed(8)
    wide = (torch.randn(4, stride, generator=generator) * 4).to(dtype).to(DEVICE)
    wide[:, 71:] = math.nan  # behind the rows
    ids = torch.randint(0, 71, (4,), generator=generator).to(DEVICE)
    check_exact(wide[:, :71], ids, "triton")
    gradients = []
    for backend in FAST:
        leaf = wide.clone().requires_grad_()
        # The gradient in place has the rows' stride, a new one that of 71 elements.
        for in_place in (False, True):
            logits = leaf * 1.0
            found = leafkernels.surprisal_entropy(logits[:, :71], ids, inplace_backward=in_place, backend=backend)
            gradients += torch.autograd.grad((found.surprisal + 2 * found.entropy).sum(), leaf)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_vocabulary_has_no_distribution(backend: str) -> None:
    logits, ids = torch.zeros(3, 0, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    mask = torch.tensor([True, False, True], device=DEVICE)
    for result in leafkernels.surprisal_entropy(logits, ids, response_mask=mask, backend=backend):
        assert result.isnan().tolist() == mask.tolist()
        assert result[1] == 0


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked: bool, small_blocks: None) -> None:
    logits = torch.randn(4, 11, dtype=torch.float64, device=DEVICE).requires_grad_()
    ids = torch.randint(0, 11, (4,), device=DEVICE)
    mask = torch.tensor([True, False, True, True], device=DEVICE) if masked else None

    def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(leafkernels.surprisal_entropy(x, ids, temperature=0.7, response_mask=mask, backend="torch"))

    assert torch.autograd.gradcheck(both, (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", ["surprisal", "entropy", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_against_float64(backend: str, outputs: str, dtype: torch.dtype, small_blocks: None) -> None:
    """Autograd through log_softmax in float64, with a banned id and a peaked row; rows of the gradient sum to 0."""
    logits = (torch.randn(5, 40, device=DEVICE) * 3).to(dtype)
    logits[1, :20], logits[2, 4] = -60.0, 30.0
    ids = torch.randint(20, 40, (5,), device=DEVICE)
    weights = torch.rand(2, 5, device=DEVICE)
    if outputs != "both":
        weights[0 if outputs == "entropy" else 1] = 0

    ours = logits.clone().requires_grad_()
    surprisal, entropy = leafkernels.surprisal_entropy(ours, ids, temperature=0.8, backend=backend)
    terms = {"surprisal": (weights[0] * surprisal).sum(), "entropy": (weights[1] * entropy).sum()}
    sum(terms[name] for name in terms if outputs in (name, "both")).backward()  # type: ignore[union-attr]

    exact = logits.double().requires_grad_()
    logprobs = (exact / 0.8).log_softmax(-1)
    (-weights[0] * logprobs.gather(1, ids[:, None]).squeeze(1)).sum().backward(retain_graph=True)
    (-weights[1] * (logprobs.exp() * logprobs).sum(-1)).sum().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    unit = torch.finfo(dtype).eps
    # One rounding to the dtype of the logits, of sums of terms of order 1 in float32.
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=unit, atol=1e-5)
    assert (ours.grad.double().sum(1).abs() <= 40 * unit * ours.grad.double().abs().amax(1) + 1e-6).all()


@pytest.mark.parametrize("lead", [0.0, 10.0, 20.0, 40.0, 60.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_confident_token_is_not_rounded_away(backend: str, lead: float, small_blocks: None) -> None:
    """p - 1 of the sampled id is minus the sum of all other p, also where p itself is 1 to within rounding.

    The entropy's gradient at that id, p (log 1 / p - H), is as small, and each row of gradients sums to 0.
    """
    logits = torch.linspace(-1, 0, 75, device=DEVICE).repeat(2, 1)
    logits[:, 50] = lead
    ids = torch.tensor([50, 3], device=DEVICE)
    x = logits.double()
    others = (x - lead).exp()
    others[:, 50] = 0
    r = others.sum(1, keepdim=True)
    surprisal_slope = torch.cat((others, torch.zeros_like(r)), 1)[:, :75] / (1 + r)
    surprisal_slope[:, 50] = (1 / (1 + r)).squeeze(1)
    surprisal_slope[0, 50] = -(r / (1 + r))[0, 0]
    surprisal_slope[1, 3] -= 1
    log_p = x - lead - r.log1p()
    p = log_p.exp()
    h = r.log1p() - (others * (x - lead)).sum(1, keepdim=True) / (1 + r)
    entropy_slope = -p * (log_p + h)
    leaf = logits.clone().requires_grad_()
    found = leafkernels.surprisal_entropy(leaf, ids, backend=backend)
    for output, want in zip(found, (surprisal_slope, entropy_slope), strict=True):
        (gradient,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True)
        bar = tolerance(torch.float32, 75, lead)
        # p (a + b d) is the difference of two numbers of the size of p (log p + H) each.
        atol = bar * want.abs().amax(1, keepdim=True)
        assert ((gradient.double() - want).abs() <= bar * want.abs() + atol).all()
        assert (gradient.double().sum(1).abs() <= 75 * atol.squeeze(1)).all()
        assert gradient[0, 50] < 0 or lead == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_outside_of_the_vocabulary_has_no_gradient(backend: str, small_blocks: None) -> None:
    """Where its surprisal counts in the loss, all of the row's gradient is NaN; where it does not, none of it is."""
    logits = torch.randn(3, 40, device=DEVICE).requires_grad_()
    ids = torch.tensor([40, -1, 39], device=DEVICE)
    surprisal, entropy = leafkernels.surprisal_entropy(logits, ids, backend=backend)
    assert surprisal.isnan().tolist() == [True, True, False]
    (gradient,) = torch.autograd.grad((surprisal + entropy).sum(), logits, retain_graph=True)
    assert gradient.isnan().all(1).tolist() == [True, True, False]
    assert gradient[2].isfinite().all()
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_finite_differences(backend: str, small_blocks: None) -> None:
    """Central differences of the float32 outputs themselves: right to their rounding over the step, and its square."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 20, generator=generator).to(DEVICE)
    token = torch.tensor([7], device=DEVICE)
    step = 2.0**-6
    for output in (0, 1):
        ours = logits.clone().requires_grad_()
        leafkernels.surprisal_entropy(ours, token, temperature=0.8, backend=backend)[output].sum().backward()
        moved = torch.cat((logits + step * torch.eye(20, device=DEVICE), logits - step * torch.eye(20, device=DEVICE)))
        found = leafkernels.surprisal_entropy(moved, token.expand(40), temperature=0.8, backend=backend)[output]
        differences = (found[:20] - found[20:]) / (2 * step)
        assert ours.grad is not None
        rounding = 8 * torch.finfo(torch.float32).eps * float(found.abs().max()) / step
        torch.testing.assert_close(ours.grad[0], differences, rtol=0, atol=rounding + (step / 0.8) ** 2)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
@given(
    st.lists(st.lists(st.sampled_from(LOGITS[:-1]), min_size=1, max_size=5), min_size=3, max_size=6),
    st.sampled_from([1.0, 0.5, 3.0]),
)
@settings(max_examples=30)
def test_states_of_slices_merge_in_any_order(backend: str, slices: list[list[float]], temperature: float) -> None:
    """All at once, or the rest first: the merge is associative, and gives what the whole row gives."""
    row = [x for part in slices for x in part]
    exact = python_ref.surprisal_entropy([row], [0], temperature=temperature)
    module = implementation(backend, "surprisal")
    token = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    temperatures = torch.full((1,), temperature, dtype=torch.float64, device=DEVICE)
    parts, picked = [], torch.tensor([row[0]], device=DEVICE)
    for part in slices:
        states, first = module.surprisal_states(torch.tensor([part], device=DEVICE), token, temperatures, None)
        assert first == part[0]
        parts.append(states)
    at_once = torch.cat(parts, 2)
    in_turn = torch.cat((parts[0], merged(torch.cat(parts[1:], 2), temperature)), 2)
    lead = (max(row) - min((x for x in row if x > -INF), default=0.0)) / temperature
    for states in (at_once, in_turn):
        surprisal, entropy, *_ = module.merge_surprisal_states(states.contiguous(), picked, temperatures, None)
        for found, (want,) in zip((surprisal, entropy), exact, strict=True):
            expected = torch.tensor([want], dtype=torch.float64)
            rtol = tolerance(torch.float32, len(row), lead if math.isfinite(lead) else 0.0)
            torch.testing.assert_close(found.double().cpu(), expected, rtol=rtol, atol=1e-30, equal_nan=True)


def merged(states: torch.Tensor, temperature: float) -> torch.Tensor:
    """One state of several, two at a time and in float64, by the rule of the kernels' docstring."""
    m, r, t = states[..., 0].double()
    for slice_state in states[..., 1:].double().unbind(2):
        (m, r, t), (low, beside, moment) = ((m, r, t), slice_state) if m >= slice_state[0] else (slice_state, (m, r, t))
        if low == m:
            r, t = r + beside + 1, t + moment
        elif beside > -1:
            fade = ((low - m) / temperature).exp()
            r, t = r + fade * (1 + beside), t + fade * (moment + (low - m) * (1 + beside))
    return torch.stack((m, r, t)).unsqueeze(2).to(states.dtype)


@pytest.mark.parametrize("most", [1, 2, 64])
def test_the_number_of_programs_that_share_a_row_changes_rounding_only(
    most: int, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leafkernels.kernels import surprisal as kernels

    monkeypatch.setattr(kernels, "MAX_SPLITS", most)
    generator = torch.Generator().manual_seed(6)
    logits = (torch.randn(7, 75, generator=generator) * 9).to(DEVICE).requires_grad_()
    with torch.no_grad():
        logits[1, :50], logits[2, 20:] = -INF, -INF
    ids = torch.randint(0, 75, (7,), generator=generator).to(DEVICE)
    ids[1], ids[2] = 60, 3
    check_exact(logits.detach(), ids, "triton")
    gradients = []
    for backend in FAST:
        surprisal, entropy = leafkernels.surprisal_entropy(logits, ids, backend=backend)
        gradients += torch.autograd.grad((surprisal + 2 * entropy).sum(), logits)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_in_place_of_the_logits(backend: str, masked: bool, small_blocks: None) -> None:
    weight = torch.randn(12, 30, device=DEVICE)
    ids = torch.randint(0, 30, (5,), device=DEVICE)
    mask = torch.tensor([1, 0, 1, 1, 1], device=DEVICE) if masked else None
    gradients = []
    for in_place in (False, True):
        hidden = torch.linspace(-1, 1, 60, device=DEVICE).view(5, 12).requires_grad_()
        logits = hidden @ weight
        storage = logits.data_ptr()
        found = leafkernels.surprisal_entropy(
            logits, ids, response_mask=mask, inplace_backward=in_place, backend=backend
        )
        (grad_logits,) = torch.autograd.grad(found.surprisal.sum() + found.entropy.sum(), logits, retain_graph=True)
        assert (grad_logits.data_ptr() == storage) == in_place
        gradients.append(grad_logits)
        if in_place:
            with pytest.raises(RuntimeError, match="gave its gradient away in a first backward pass"):
                found.surprisal.sum().backward()
    assert torch.equal(*gradients)


def test_whoever_else_kept_the_logits_is_told() -> None:
    hidden = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    logits = (hidden * 2).tanh()  # its own gradient needs its result
    surprisal, _ = leafkernels.surprisal_entropy(
        logits, torch.zeros(3, dtype=torch.int64, device=DEVICE), inplace_backward=True
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        surprisal.sum().backward()


@pytest.mark.parametrize("backend", FAST)
def test_autocast_and_no_grad(backend: str) -> None:
    """The logits' dtype decides, inside of autocast as outside; without gradients nothing is kept for them."""
    logits = torch.randn(4, 50, device=DEVICE).bfloat16()
    ids = torch.randint(0, 50, (4,), device=DEVICE)
    expected = leafkernels.surprisal_entropy(logits, ids, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = leafkernels.surprisal_entropy(logits, ids, backend=backend)
        leaf = logits.float().requires_grad_()
        surprisal, entropy = leafkernels.surprisal_entropy(leaf, ids, backend=backend)
        (surprisal.sum() + entropy.sum()).backward()
    for found in (*inside, surprisal, entropy):
        assert found.dtype == torch.float32
    for found, want in zip(inside, expected, strict=True):
        assert torch.equal(found, want)
    # Of wider logits a thread takes fewer at a time, so that its sums are rounded elsewhere.
    torch.testing.assert_close((surprisal.detach(), entropy.detach()), tuple(expected), rtol=1e-6, atol=0)
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float32
    with torch.no_grad():
        surprisal, _ = leafkernels.surprisal_entropy(leaf, ids, backend=backend)
    assert surprisal.grad_fn is None


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device with 14 GB")
def test_more_logits_than_an_int32_counts() -> None:
    num_rows, vocabulary = 14_200, 151_936
    assert num_rows * vocabulary > 2**31
    logits = torch.zeros(num_rows, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, -1] = 3.0
    logits.requires_grad_()
    ids = torch.full((num_rows,), vocabulary - 1, device=DEVICE)
    surprisal, entropy = leafkernels.surprisal_entropy(logits, ids)
    check_exact(logits.detach()[-1:], ids[-1:], "triton")
    torch.testing.assert_close(surprisal[:-1], torch.full_like(surprisal[:-1], math.log(vocabulary)))
    few = leafkernels.surprisal_entropy(logits.detach()[-1:], ids[-1:])
    torch.testing.assert_close((surprisal[-1:], entropy[-1:]), tuple(few), rtol=1e-6, atol=0)
    surprisal.sum().backward()
    assert logits.grad is not None
    assert float(logits.grad[-1, -1]) < -0.9


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12),
    st.floats(-100, 100, width=32),
    st.randoms(use_true_random=False),
)
@settings(max_examples=100)
def test_laws(row: list[float], shift: float, rng: Any) -> None:
    """0 <= H <= log V, surprisal >= 0, E_p[surprisal] = H, and neither a shift nor an order of the ids matters."""
    every = torch.arange(len(row), device=DEVICE)
    logits = torch.tensor(row, device=DEVICE).expand(len(row), -1)
    surprisal, entropy = leafkernels.surprisal_entropy(logits, every)
    assert (surprisal >= 0).all()
    assert (entropy >= 0).all()
    assert (entropy <= math.log(len(row)) * (1 + 1e-6)).all()
    torch.testing.assert_close((surprisal * (-surprisal).exp()).sum(), entropy[0], rtol=1e-5, atol=1e-6)
    order = list(range(len(row)))
    rng.shuffle(order)
    permuted, _ = leafkernels.surprisal_entropy(logits[:, order], every)
    torch.testing.assert_close(permuted, surprisal[order], rtol=1e-5, atol=1e-6)
    moved, _ = leafkernels.surprisal_entropy(logits.double() + shift, every)
    exact, _ = leafkernels.surprisal_entropy(logits.double(), every)
    torch.testing.assert_close(moved, exact, rtol=1e-9, atol=1e-9)


def test_errors() -> None:
    logits, ids = torch.zeros(2, 5, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)

    def check_refuses(error: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            leafkernels.surprisal_entropy(**{"logits": logits, "token_ids": ids, **changes})

    check_refuses(
        ValueError,
        "token_ids must have one entry for each row of logits, shape (2,), got shape (3,)",
        token_ids=torch.zeros(3, dtype=torch.int64, device=DEVICE),
    )
    check_refuses(TypeError, "token_ids must hold integers, got torch.float32", token_ids=logits[:, 0])
    check_refuses(ValueError, "temperature must be positive, got 0.0", temperature=0.0)
    check_refuses(TypeError, "temperature must be a number, got str", temperature="1")
    check_refuses(ValueError, "temperature must be finite in float32, got 1e+39", temperature=1e39)
    message = "temperature must be positive in float32, at least 1.2e-38, got 1e-39"
    check_refuses(ValueError, message, temperature=1e-39)
    for value in (math.inf, math.nan):
        check_refuses(ValueError, f"temperature must be finite, got {value}", temperature=value)
    if DEVICE == "cpu":  # on a GPU nobody looks at the values
        for value in (0.0, -1.0, math.inf, math.nan):
            temperatures = torch.tensor([1.0, value])
            message = f"temperature must be positive and finite, got {value}"
            check_refuses(ValueError, message, temperature=temperatures)
            found = leafkernels.surprisal_entropy(
                logits, ids, temperature=temperatures, response_mask=torch.tensor([True, False])
            )
            assert found.surprisal.isfinite().all()
        for value in (1e39, 1e-39):
            temperatures = torch.tensor([1.0, value], dtype=torch.float64)
            message = f"temperature must be positive and finite in float32, got {value}"
            check_refuses(ValueError, message, temperature=temperatures)
    check_refuses(
        ValueError,
        "temperature must be a number or have one entry for each row, shape (2,), got shape (5,)",
        temperature=torch.ones(5, device=DEVICE),
    )
    check_refuses(
        ValueError, "response_mask must have the shape of token_ids, (2,), got shape (2, 5)", response_mask=logits
    )
    check_refuses(
        TypeError,
        "logits must be float32, bfloat16 or float16 with backend='triton', got torch.float64",
        logits=logits.double(),
        backend="triton",
    )
    check_refuses(
        ValueError,
        "logits must be the result of a computation with inplace_backward=True, got a leaf",
        logits=logits.clone().requires_grad_(),
        inplace_backward=True,
    )
