"""linear_surprisal_entropy: equal to the composition it replaces, in chunks of any size, reading live tokens only."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE
from tiny_decoders import SIZES

import leafkernels
import python_ref
from leafkernels.vocabulary import chunks, linear_surprisal
from leafkernels.vocabulary.inputs import SampledTokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FAST = ("torch", "triton")


def inputs(seed: int, shape: tuple[int, ...], width: int, vocabulary: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype).to(DEVICE)

    return {
        "hidden": normal(*shape, width),
        "lm_head_weight": normal(vocabulary, width),
        "token_ids": torch.randint(0, vocabulary, shape, generator=generator).to(DEVICE),
        "bias": normal(vocabulary),
        "temperature": (torch.rand(shape, generator=generator) + 0.5).to(DEVICE),
        "response_mask": (torch.rand(shape, generator=generator) < 0.7).to(DEVICE),
    }


def composed(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: Any = 1.0,
    response_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What users write, with a plain softmax, in the dtype of the inputs."""
    logits = torch.nn.functional.linear(hidden, lm_head_weight, bias) * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * (logits / logit_softcap).tanh()
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[..., None].to(logits.dtype)
    logprobs = (logits / temperature).log_softmax(-1)
    results = -logprobs.gather(-1, token_ids[..., None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)
    return results if response_mask is None else tuple(result * response_mask for result in results)  # type: ignore[return-value]


def tolerance(width: int, vocabulary: int, dtype: torch.dtype, largest: float) -> float:
    """Absolute: a logit is a sum of ``width`` products, off by its rounding; a sum over the ids adds its own."""
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return unit * largest * (math.sqrt(width) + 8 + 2 * math.log2(max(vocabulary, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(backend: str, small_blocks: None) -> None:
    @settings(max_examples={"torch": 60, "reference": 15}.get(backend, 12))
    @given(
        st.integers(0, 10**6),
        st.integers(0, 7),
        st.integers(1, 5),
        st.integers(1, 20),
        st.booleans(),
        st.sampled_from([(1.0, None), (0.25, 5.0), (3, None), (1.0, 5.0)]),
        st.integers(1, 4),
    )
    def run(
        seed: int, rows: int, width: int, vocabulary: int, plain: bool, head: tuple[float, float | None], chunk: int
    ) -> None:
        tensors = inputs(seed, (rows,), width, vocabulary, torch.float32)
        if plain:
            tensors.update(bias=None, response_mask=None, temperature=0.7)
        head_options = {"logit_scale": head[0], "logit_softcap": head[1]}
        found = leafkernels.linear_surprisal_entropy(**tensors, **head_options, chunk_tokens=chunk, backend=backend)
        lists = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
        mask = lists.pop("response_mask") or [True] * rows
        expected = python_ref.linear_surprisal_entropy(**lists, **head_options)
        for actual, values in zip(found, expected, strict=True):
            want = torch.tensor(values, dtype=torch.float64) * torch.tensor(mask, dtype=torch.bool)
            atol = tolerance(width, vocabulary, torch.float32, 50.0 * max(1.0, head[0]))
            torch.testing.assert_close(actual.double().cpu(), want, rtol=0, atol=atol)

    run()


GRADIENTS = ("hidden", "lm_head_weight", "bias")


def gradients_of(function: Any, tensors: dict[str, Any], weights: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    leaves = {k: tensors[k].detach().clone().requires_grad_() for k in GRADIENTS}
    surprisal, entropy = function(**{**tensors, **leaves}, **options)
    return list(torch.autograd.grad((weights[0] * surprisal + weights[1] * entropy).sum(), list(leaves.values())))


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, 4.0)])
@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_against_float64(
    backend: str, chunk: int | None, scale: float, softcap: float | None, small_blocks: None
) -> None:
    """float32 gradients of every input, summed over the tokens of all chunks, against autograd in float64."""
    tensors = inputs(1, (2, 4), 6, 20, torch.float32)
    weights = torch.rand(2, 2, 4, device=DEVICE)
    found = gradients_of(
        leafkernels.linear_surprisal_entropy,
        tensors,
        weights,
        logit_scale=scale,
        logit_softcap=softcap,
        chunk_tokens=chunk,
        backend=backend,
    )
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in tensors.items()}
    expected = gradients_of(composed, wide, weights, logit_scale=scale, logit_softcap=softcap)
    for ours, exact in zip(found, expected, strict=True):
        atol = tolerance(8, 20, torch.float32, 4 * float(exact.abs().max()))
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=atol)


# Names in transformers, and what the page says for them.
HEADS = {
    "Cohere": ({"logit_scale": 0.0625}, {"logit_scale": 0.0625}),
    "Granite": ({"logits_scaling": 8.0}, {"logit_scale": 1 / 8.0}),
    "Gemma2": ({"final_logit_softcapping": 0.5}, {"logit_softcap": 0.5}),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_models(name: str) -> None:
    """Surprisals of models whose heads scale or cap are those of their own logits."""
    transformers = pytest.importorskip("transformers")
    config_options, head_options = HEADS[name]
    config = getattr(transformers, f"{name}Config")(**SIZES, **config_options, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        weight.data *= 9  # logits that a scale changes much
    ids = torch.arange(14).view(2, 7) % 29
    with torch.no_grad():
        logits, hidden = model(input_ids=ids).logits, model.base_model(input_ids=ids).last_hidden_state
        expected = leafkernels.surprisal_entropy(logits, ids)
        found = leafkernels.linear_surprisal_entropy(hidden, model.lm_head.weight, ids, **head_options)
        plain = leafkernels.linear_surprisal_entropy(hidden, model.lm_head.weight, ids)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-4, atol=1e-4)
    assert (plain.surprisal - expected.surprisal).abs().max() > 0.5


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked: bool) -> None:
    tensors = inputs(2, (3,), 4, 7, torch.float64)
    tensors["response_mask"] = torch.tensor([True, False, True], device=DEVICE) if masked else None

    def both(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        changed = {**tensors, "hidden": hidden, "lm_head_weight": weight, "bias": bias}
        return tuple(
            leafkernels.linear_surprisal_entropy(**changed, logit_scale=0.4, logit_softcap=3.0, chunk_tokens=2)
        )

    assert torch.autograd.gradcheck(both, [tensors[k].requires_grad_() for k in GRADIENTS])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", FAST)
def test_half_precision_is_no_worse_than_eager(backend: str, dtype: torch.dtype) -> None:
    """Against float64 on the inputs as rounded: outputs and gradients err less than eager PyTorch at the same dtype.

    One rounding of the result to the dtype is allowed beside; the norm of the error is compared, because single
    numbers of either can be right by luck.
    """
    tensors = inputs(3, (64,), 32, 300, dtype)
    tensors["response_mask"] = None
    weights = torch.rand(2, 64, device=DEVICE)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in tensors.items()}
    runs = [
        [*function(**values, **options), *gradients_of(function, values, weights.to(values["hidden"].dtype), **options)]
        for function, values, options in (
            (leafkernels.linear_surprisal_entropy, tensors, {"chunk_tokens": 10, "backend": backend}),
            (composed, tensors, {}),
            (composed, wide, {}),
        )
    ]
    for ours, eager, exact in zip(*runs, strict=True):
        bar = (eager.double() - exact).norm() + torch.finfo(dtype).eps / 2 * exact.norm()
        assert (ours.double() - exact).norm() <= bar


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_are_not_read(backend: str) -> None:
    tensors = inputs(4, (2, 5), 3, 9, torch.float32)
    mask = tensors["response_mask"] = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]], device=DEVICE).bool()
    clean = gradients_of(leafkernels.linear_surprisal_entropy, tensors, torch.ones(2, 2, 5, device=DEVICE))
    tensors["hidden"][~mask] = math.nan
    tensors["token_ids"][~mask] = 1000
    found = leafkernels.linear_surprisal_entropy(**tensors, chunk_tokens=3, backend=backend)
    assert (found.surprisal[~mask] == 0).all()
    assert found.surprisal[mask].isfinite().all()
    gradients = gradients_of(
        leafkernels.linear_surprisal_entropy, tensors, torch.ones(2, 2, 5, device=DEVICE), backend=backend
    )
    for dirty, want in zip(gradients, clean, strict=True):
        torch.testing.assert_close(dirty, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bound", [4, 5, 6, 10])
def test_a_bound_on_the_live_tokens(backend: str, bound: int) -> None:
    """As many, or more than there are, change nothing; where it is too small, what is left out is NaN and not wrong."""
    tensors = inputs(5, (10,), 3, 9, torch.float32)
    mask = tensors["response_mask"] = torch.tensor([0, 1, 1, 0, 1, 0, 1, 0, 1, 0], device=DEVICE).bool()
    tensors["hidden"][~mask] = math.nan
    weights = torch.ones(2, 10, device=DEVICE)
    options = {"chunk_tokens": 2, "backend": backend}
    exact = leafkernels.linear_surprisal_entropy(**tensors, **options)
    found = leafkernels.linear_surprisal_entropy(**tensors, num_live=bound, **options)
    if bound < 5:
        assert found.surprisal.isnan().nonzero().flatten().tolist() == [8]
        return
    gradients = [
        gradients_of(leafkernels.linear_surprisal_entropy, tensors, weights, num_live=num, **options)
        for num in (None, bound)
    ]
    for actual, want in zip((*found, *gradients[1]), (*exact, *gradients[0]), strict=True):
        # A chunk may have more rows, and a product of matrices may then add up in another order.
        atol = tolerance(10, 9, torch.float32, 4 * float(want.abs().max()))
        torch.testing.assert_close(actual, want, rtol=0, atol=atol)


def test_what_needs_no_gradient_costs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a frozen head, as LoRA has it, no product makes the weight's gradient."""
    tensors = inputs(6, (4,), 3, 9, torch.float32)
    monkeypatch.setattr(chunks, "add_product", lambda *_: pytest.fail("the weight's gradient was computed"))
    hidden = tensors["hidden"].requires_grad_()
    surprisal, _ = leafkernels.linear_surprisal_entropy(**tensors)
    surprisal.sum().backward()
    assert hidden.grad is not None


def test_the_logits_of_all_tokens_never_exist() -> None:
    """No tensor larger than the buffer, and the buffer of no more than it may take, at the size of a training step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    tensors = inputs(7, (40,), 3, 1000, torch.float32)
    with Largest() as seen:
        # The dispatcher's own view of what runs inside of an operation needs its body itself.
        linear_surprisal._fold_chunks(
            "torch",
            tensors["hidden"],
            tensors["lm_head_weight"],
            None,
            SampledTokens(tensors["token_ids"], tensors["temperature"], None),
            linear_surprisal.HeadOptions(softcap=None, num_live=40, chunk=2, dtype=torch.float32),
        )
    assert seen.elements <= 8000  # the room of the PyTorch backend for 2 rows; all logits would be 40,000
    for itemsize in (2, 4):
        chunk = chunks.CHUNK_BYTES // (151_936 * itemsize)
        assert chunk * 151_936 * itemsize + chunk * 4096 * itemsize <= 2**30


@pytest.mark.parametrize("backend", FAST)
def test_autocast(backend: str) -> None:
    """The products run in autocast's dtype, float32 parameters get float32 gradients."""
    tensors = inputs(8, (6,), 4, 11, torch.float32)
    rounded = {k: v.bfloat16() if k in GRADIENTS else v for k, v in tensors.items()}
    weights = torch.ones(2, 6, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = leafkernels.linear_surprisal_entropy(**tensors, backend=backend)
        gradients = gradients_of(leafkernels.linear_surprisal_entropy, tensors, weights, backend=backend)
    for actual, want in zip(found, leafkernels.linear_surprisal_entropy(**rounded, backend=backend), strict=True):
        assert actual.dtype == torch.float32
        # Logits in bfloat16 of two products, which may differ by a rounding of that.
        torch.testing.assert_close(actual.bfloat16(), want.bfloat16())
    expected = gradients_of(leafkernels.linear_surprisal_entropy, rounded, weights, backend=backend)
    for actual, want in zip(gradients, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.bfloat16(), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_stays_under_autocast(backend: str) -> None:
    """As in torch.nn.functional.linear; beside float64, autocast's dtype fits no more than there."""
    if backend == "triton":
        pytest.skip("the kernels take no float64")
    tensors = inputs(10, (4,), 3, 9, torch.float64)
    weights = torch.ones(2, 4, device=DEVICE)
    expected = leafkernels.linear_surprisal_entropy(**tensors, backend=backend)
    grad_inputs = gradients_of(leafkernels.linear_surprisal_entropy, tensors, weights, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = leafkernels.linear_surprisal_entropy(**tensors, backend=backend)
        gradients = gradients_of(leafkernels.linear_surprisal_entropy, tensors, weights, backend=backend)
        for changed in ({"hidden": tensors["hidden"].float()}, {"lm_head_weight": tensors["lm_head_weight"].float()}):
            dtypes = [{**tensors, **changed}[name].dtype for name in ("hidden", "lm_head_weight")]
            message = f"lm_head_weight must have the dtype of hidden, {dtypes[0]}, got {dtypes[1]}"
            with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
                leafkernels.linear_surprisal_entropy(**{**tensors, **changed}, backend=backend)
            with pytest.raises(RuntimeError):
                composed(**{**tensors, **changed})
    for actual, want in zip((*found, *gradients), (*expected, *grad_inputs), strict=True):
        assert actual.dtype == torch.float64
        # Of float32 it would be off by 1e-7.
        atol = tolerance(8, 9, torch.float64, 4 * float(want.abs().max()))
        torch.testing.assert_close(actual, want, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_reference_is_exact_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    tensors = inputs(11, (5,), 4, 9, dtype)
    weights = torch.rand(2, 5, device=DEVICE)
    expected = gradients_of(leafkernels.linear_surprisal_entropy, tensors, weights, backend="torch")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = gradients_of(leafkernels.linear_surprisal_entropy, tensors, weights, backend="reference")
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_that_counts(backend: str) -> None:
    """All masked, or none there; a bound on the live tokens may be above their number."""
    tensors = inputs(12, (4,), 3, 9, torch.float32)
    tensors["response_mask"][:] = False
    for rows in (4, 0):
        some = {
            k: v[:rows] if k in ("hidden", "token_ids", "temperature", "response_mask") else v
            for k, v in tensors.items()
        }
        for num_live in (None, 0, 7):
            options = {"num_live": num_live, "backend": backend}
            found = leafkernels.linear_surprisal_entropy(**some, **options)
            assert found.surprisal.tolist() == found.entropy.tolist() == [0.0] * rows
            weights = torch.ones(2, rows, device=DEVICE)
            for gradient in gradients_of(leafkernels.linear_surprisal_entropy, some, weights, **options):
                assert not gradient.any()


def test_the_buffer_is_no_larger_than_the_tokens_need() -> None:
    tensors = inputs(13, (4,), 3, 9, torch.float32)
    options = linear_surprisal.HeadOptions(softcap=None, num_live=10**9, chunk=10**9, dtype=torch.float32)
    head_inputs = tensors["hidden"], tensors["lm_head_weight"], None, tensors["response_mask"]
    head = chunks.ChunkedHead(*head_inputs, options)
    assert head.buffer.shape == (4, 9)
    assert sum(rows.shape[0] for rows in head.chunks()) == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_outside_the_vocabulary_has_a_gradient_of_nan(backend: str) -> None:
    """As its surprisal; where that is not asked for, the entropy's gradient is what it is."""
    tensors = inputs(14, (3,), 4, 9, torch.float32)
    tensors["response_mask"] = None
    tensors["token_ids"][1:] = torch.tensor([9, -1], device=DEVICE)
    hidden = tensors["hidden"].requires_grad_()
    found = leafkernels.linear_surprisal_entropy(**tensors, backend=backend)
    (grad_hidden,) = torch.autograd.grad(found.surprisal.sum(), hidden, retain_graph=True)
    assert grad_hidden.isnan().all(1).tolist() == [False, True, True]
    assert torch.autograd.grad(found.entropy.sum(), hidden)[0].isfinite().all()


def test_errors() -> None:
    tensors = inputs(9, (2, 3), 4, 5, torch.float32)

    def check_refuses(error: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            leafkernels.linear_surprisal_entropy(**{**tensors, **changes})

    check_refuses(
        ValueError,
        "token_ids must have one entry for each row of hidden, shape (2, 3), got shape (3,)",
        token_ids=tensors["token_ids"][0],
    )
    check_refuses(
        ValueError,
        "lm_head_weight must have shape (vocabulary, 4), got shape (4, 5)",
        lm_head_weight=tensors["lm_head_weight"].T,
    )
    check_refuses(
        TypeError,
        "lm_head_weight must have the dtype of hidden, torch.float32, got torch.bfloat16",
        lm_head_weight=tensors["lm_head_weight"].bfloat16(),
    )
    check_refuses(
        TypeError, "bias must have the dtype of hidden, torch.float32, got torch.float64", bias=tensors["bias"].double()
    )
    check_refuses(
        ValueError, "bias must have one entry for each id, shape (5,), got shape (4,)", bias=tensors["bias"][:4]
    )
    check_refuses(ValueError, "logit_softcap must be positive, got 0", logit_softcap=0)
    check_refuses(ValueError, "logit_softcap must be finite, got inf", logit_softcap=math.inf)
    check_refuses(TypeError, "logit_softcap must be a number, got str", logit_softcap="30")
    check_refuses(ValueError, "logit_softcap must be finite in float32, got 1e+39", logit_softcap=1e39)
    check_refuses(ValueError, "logit_scale must be positive, got -0.5", logit_scale=-0.5)
    check_refuses(ValueError, "logit_scale must be positive in float32, at least 1.2e-38, got 1e-45", logit_scale=1e-45)
    message = "temperature / logit_scale must be positive in float32, at least 1.2e-38, got 1e-40"
    check_refuses(ValueError, message, temperature=1e-20, logit_scale=1e20)
    message = "logit_softcap / logit_scale must be finite in float32, got 1e+40"
    check_refuses(ValueError, message, logit_softcap=1e20, logit_scale=1e-20)
    message = "temperature / logit_scale must be positive and finite in float32, got 1e+40"
    check_refuses(ValueError, message, temperature=torch.full((2, 3), 1e20, dtype=torch.float64), logit_scale=1e-20)
    check_refuses(ValueError, "chunk_tokens must be at least 1, got 0", chunk_tokens=0)
    check_refuses(ValueError, "num_live must be at least 0, got -1", num_live=-1)
    wide = {k: v.double() for k, v in tensors.items() if k in GRADIENTS}
    check_refuses(
        TypeError,
        "hidden must be float32, bfloat16 or float16 with backend='triton', got torch.float64",
        **wide,
        backend="triton",
    )
