"""Registered operations, torch.compile, no recompilation, no synchronisation, CUDA graphs."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, random_group
from support import compare_with_compiled, every_estimator, examples
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import leafkernels
from leafkernels import ESTIMATORS
from leafkernels._core.operation import OPERATIONS
from leafkernels.lookahead import RewardChannel

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


class Recorded(TorchDispatchMode):
    """The operations that run inside, each with copies of the arguments of its first calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, tuple]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "leafkernels":
            calls = self.calls.setdefault(func.overloadpacket.__name__, [])
            copies = tuple(arg.detach().clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
            if len(calls) < 3:
                calls.append((func, copies))
        return func(*args, **(kwargs or {}))


def call_everything(backend: str) -> None:
    """Every public function with a backend, so that every operation runs, with and without what is optional."""
    group = random_group(4, 10, seed=2, vocabulary=2)
    mask = torch.ones(4, 10, dtype=torch.bool, device=DEVICE)
    mask[1, 7:] = mask[2, 3] = False
    ids, logprobs = group["token_ids"], group["logprobs"]
    packed = {"cu_seqlens": torch.tensor([0, 17, 17, 40], dtype=torch.int32, device=DEVICE)}
    for estimator in ESTIMATORS.values():
        rewards = group["rewards"].clone().requires_grad_()
        call = {"response_mask": mask, "group_size": 2, "backend": backend}
        estimator(logprobs, ids, rewards, **call).sum().backward()
    leafkernels.select_boundaries(-logprobs.flatten(), min_separation=3, **packed, backend=backend)
    start = torch.tensor([0, 1], device=DEVICE)
    shared = leafkernels.common_prefix_lengths(ids, group_size=2, limit=7, start=start, backend=backend)
    lengths = torch.full((2, 2), 7, device=DEVICE)
    at = torch.tensor([[2, 4], [3, -1]], device=DEVICE)
    leafkernels.span_values(shared, at, group["rewards"].view(2, 2), lengths, backend=backend)
    leafkernels.prefix_tree(ids, response_mask=mask, backend=backend)
    # Of what is over a vocabulary half the rows do, for which Triton's interpreter takes long.
    ids, logprobs, mask = ids[:2], logprobs[:2], mask[:2]
    packed = {"cu_seqlens": torch.tensor([0, 7, 7, 20], dtype=torch.int32, device=DEVICE)}
    logits = torch.randn(2, 10, 9, device=DEVICE, requires_grad=True)
    temperature = torch.full((2, 10), 0.5, device=DEVICE)
    for options in ({}, {"response_mask": mask, "temperature": temperature, "inplace_backward": True}):
        found = leafkernels.surprisal_entropy(logits * 1, ids, **options, backend=backend)
        (found.surprisal + 2 * found.entropy).sum().backward()
    hidden, weight, bias = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((2, 10, 5), (9, 5), 9))
    for options in ({}, {"bias": bias, "response_mask": mask, "logit_softcap": 3.0, "chunk_tokens": 16}):
        more = {"statistics": ["sum_squares", "top_ids"], **options}
        result = leafkernels.linear_surprisal_entropy(hidden, weight, ids, **more, backend=backend)
        (result.surprisal + 2 * result.entropy).sum().backward()
    teacher, few = torch.randn(2, 10, 9, device=DEVICE), torch.tensor([0, -1, 5], device=DEVICE).expand(2, 10, 3)
    served = leafkernels.TeacherTopK(few, torch.full((2, 10, 3), -2.0, device=DEVICE))
    for options in ({}, {"kind": "jsd", "top_k": 2, "response_mask": mask, "temperature": temperature}):
        found = leafkernels.divergence(logits, teacher, **options, backend=backend)
        (found.divergence + 2 * found.student_entropy).sum().backward()
    for options in ({}, {"student_bias": bias, "response_mask": mask, "student_logit_softcap": 3.0, "top_k": 2}):
        for other in ((hidden.detach(), weight), (served,))[: 1 if "top_k" in options else 2]:
            found = leafkernels.linear_divergence(hidden, weight, *other, **options, chunk_tokens=16, backend=backend)
            (found.divergence + 2 * found.student_entropy).sum().backward()
    some = leafkernels.SamplingMask.from_lists([[0, 3, 3, 8], [], [9, 7]] * 6 + [[1], [2]], device=DEVICE)
    for options in ({}, {"response_mask": mask, "temperature": temperature, "inplace_backward": True}):
        found = leafkernels.surprisal_entropy(logits * 1, ids, sampling_mask=some, **options, backend=backend)
        (found.surprisal + 2 * found.entropy).sum().backward()
    for options in ({}, {"bias": bias, "response_mask": mask, "logit_softcap": 3.0, "chunk_tokens": 16}):
        found = leafkernels.linear_surprisal_entropy(
            hidden, weight, ids, sampling_mask=some, **options, backend=backend
        )
        found.surprisal.sum().backward()
    policy, entropy, clip = logprobs.clone().requires_grad_(), -logprobs, {"clip": (0.2, 0.3), "dual_clip": 3.0}
    full = {"ref_logprobs": logprobs, "kl_coef": 0.1, "entropy_coef": 0.1, "max_log_ratio": 20.0, **clip}
    for options in ({}, {**full, "entropy": entropy}):
        leafkernels.policy_loss(policy, logprobs - 0.3, logprobs, mask, **options, backend=backend).loss.backward()
    for old, options in ((None, {}), (logprobs, full)):
        loss = leafkernels.policy_loss_from_logits(logits, ids, old, logprobs, mask, **options, backend=backend).loss
        (3 * loss).backward()
    leafkernels.fire_opd(logprobs, logprobs - 1, -logprobs, -logprobs, mask, backend=backend)
    flat = [tensor.flatten() for tensor in (logprobs, logprobs - 1, -logprobs, mask)]
    # With both entropies: of one that is missing the statistics are NaN, which opcheck takes for a difference.
    options = {"base_logprobs": flat[1], "extrapolation": 1.25, "normalize": "trajectory"}
    leafkernels.fire_opd(*flat[:3], flat[2], flat[3], **options, **packed, backend=backend)
    channel = RewardChannel(2, 5, 6).to(DEVICE)
    channel.fused([hidden.detach()] * 3, backend=backend)


def recorded(backend: str) -> dict[str, list[tuple[Any, tuple]]]:
    with Recorded() as seen:
        call_everything(backend)
    return seen.calls


@pytest.fixture(scope="module", params=["torch", "triton"])
def calls(request: pytest.FixtureRequest) -> dict[str, list[tuple[Any, tuple]]]:
    return recorded(request.param)


def test_every_operation_is_called(calls: dict[str, list[tuple[Any, tuple]]]) -> None:
    only_triton = {"regular_layout"}  # PyTorch takes five steps, which cost less than an operation
    assert set(OPERATIONS) - set(calls) <= only_triton
    assert set(calls) <= set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(calls: dict[str, list[tuple[Any, tuple]]], name: str) -> None:
    if name not in calls:
        pytest.skip("PyTorch has no such operation")
    for op, args in calls[name]:
        result = torch.library.opcheck(op, args)
        assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["padded", "groups", "packed"])
def test_torch_compile_of_every_layout(backend: str, layout: str) -> None:
    group = random_group(6, 20, seed=3, vocabulary=2)
    options: dict[str, Any] = {"backend": backend, "response_mask": torch.ones(6, 20, device=DEVICE)}
    if layout == "groups":
        options["groups"] = torch.tensor([1, 0, 1, 1, 0, 0], device=DEVICE)
    if layout == "packed":
        options["cu_seqlens"] = torch.arange(0, 121, 20, dtype=torch.int32, device=DEVICE)
        options["group_size"] = 3
        options["response_mask"] = None
        group["logprobs"], group["token_ids"] = group["logprobs"].flatten(), group["token_ids"].flatten()

    def loss(logprobs: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        advantages = leafkernels.span_advantages(logprobs.detach(), group["token_ids"], rewards, **options)
        return (advantages * logprobs.exp()).sum()

    compare_with_compiled(loss, group["logprobs"], group["rewards"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("function", ["surprisal_entropy", "in place", "linear_surprisal_entropy", "policy_loss"])
def test_vocabulary_functions_compile_with_gradients(function: str, masked: bool, backend: str) -> None:
    if masked and function == "policy_loss":
        pytest.skip("takes no sampling mask")
    ids, weight = torch.tensor([3, 0, 8, 2], device=DEVICE), torch.randn(9, 5, device=DEVICE)
    mask = torch.tensor([1, 1, 0, 1], device=DEVICE)
    options: dict[str, Any] = {"response_mask": mask, "backend": backend}
    if masked:
        options["sampling_mask"] = leafkernels.SamplingMask.from_lists([[3, 4], [], [1], [5]], device=DEVICE)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        if function == "policy_loss":
            logits, row = (hidden @ weight.T)[None], ids[None]
            return leafkernels.policy_loss_from_logits(logits, row, None, row.float(), mask[None], backend=backend).loss
        if function == "linear_surprisal_entropy":
            found = leafkernels.linear_surprisal_entropy(hidden, weight, ids, **options)
        else:
            in_place = function == "in place"
            found = leafkernels.surprisal_entropy(hidden @ weight.T, ids, inplace_backward=in_place, **options)
        return (found.surprisal * found.entropy).sum()

    torch._dynamo.reset()
    start = torch.randn(4, 5, device=DEVICE)
    gradients = []
    for step in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        hidden = start.clone().requires_grad_()
        step(hidden).backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
@on_gpu
@pytest.mark.parametrize("refines", [False, True])
def test_a_new_length_compiles_nothing(refines: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from leafkernels.kernels import (
        boundaries,
        distillation,
        find,
        prefix_lengths,
        prefix_tree,
        reward_channel,
        scatter,
        segments,
        surprisal,
        values,
    )

    channel = RewardChannel(2, 20, width=4).to(DEVICE)
    kernels = [
        reward_channel._normalize_hidden_kernel,
        reward_channel._channel_state_kernel,
        distillation._fire_statistics_kernel,
        distillation._fire_weights_kernel,
        find._regular_layout_kernel,
        surprisal._surprisal_states_kernel,
        surprisal._merge_surprisal_states_kernel,
        boundaries._column_maxima_kernel,
        boundaries._select_boundaries_kernel,
        find._mask_stretches_kernel,
        prefix_lengths._compare_pairs_kernel,
        prefix_lengths._represent_kernel,
        prefix_lengths._first_mismatch_kernel,
        prefix_lengths._refine_ties_kernel,
        prefix_lengths._prefix_table_kernel,
        prefix_tree._order_rows_kernel,
        prefix_tree._tree_nodes_kernel,
        values._span_values_kernel,
        values._normalize_spans_kernel,
        scatter._scatter_spans_kernel,
        segments._running_sums_kernel,
    ]

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def run(rows: int, tokens: int) -> None:
        group = random_group(rows, tokens, seed=1)
        leafkernels.span_advantages(**group)
        leafkernels.prefix_tree(group["token_ids"], max_nodes=rows * tokens)
        leafkernels.surprisal_entropy(group["logprobs"], group["token_ids"][:, 0])  # any floats are logits
        leafkernels.fire_opd(*[group["logprobs"]] * 4, torch.ones_like(group["logprobs"]))
        channel.fused([torch.ones(rows, tokens, 20, device=DEVICE)] * 3)

    if refines:
        monkeypatch.setattr(prefix_lengths, "FEW_TOKENS", 0)
    run(8, 100)
    before = compiled()
    for rows, tokens in [(8, 101), (8, 112), (1, 7), (16, 1), (3, 1025), (32, 64), (3, 9000)]:
        run(rows, tokens)
    assert compiled() == before


def captured_in_graph(step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.CUDAGraph]:
    """What a step gives, what it gives in a graph once that is replayed, and the graph; it must not synchronise."""
    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return expected, captured, graph


@on_gpu
@every_estimator
@pytest.mark.parametrize("layout", ["padded", "groups", "packed"])
@pytest.mark.parametrize("refines", [False, True])
def test_nothing_synchronises_and_a_graph_captures_it(
    layout: str, name: str, refines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refines:
        monkeypatch.setattr("leafkernels.kernels.prefix_lengths.FEW_TOKENS", 0)
    group = random_group(16, 300, seed=5)
    mask = torch.ones(16, 300, dtype=torch.bool, device=DEVICE)
    mask[3, 200:] = False
    options: dict[str, Any] = {"response_mask": mask, "group_size": 8}
    if layout == "groups":
        del options["group_size"]
        options["groups"] = torch.arange(16, device=DEVICE) % 3
    if layout == "packed":
        options = {"cu_seqlens": torch.arange(0, 4801, 300, dtype=torch.int32, device=DEVICE), "group_size": 8}
        group["logprobs"], group["token_ids"] = group["logprobs"].flatten(), group["token_ids"].flatten()

    def step() -> torch.Tensor:
        return ESTIMATORS[name](**group, **options)

    expected, captured, graph = captured_in_graph(step)
    group["rewards"].copy_(group["rewards"].flip(0))
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)
    group["rewards"].copy_(group["rewards"].flip(0))
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


@on_gpu
@pytest.mark.parametrize(
    "function", ["surprisal_entropy", "linear_surprisal_entropy", "policy_loss_from_logits", "policy_loss", "fire_opd"]
)
def test_vocabulary_functions_synchronise_nothing_and_a_graph_captures_them(function: str) -> None:
    generator = torch.Generator(DEVICE).manual_seed(8)
    hidden = torch.randn(2, 50, 64, device=DEVICE, generator=generator, dtype=torch.bfloat16)
    weight = torch.randn(1000, 64, device=DEVICE, generator=generator, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, 1000, (2, 50), device=DEVICE, generator=generator)
    mask = torch.arange(50, device=DEVICE).expand(2, 50) < 40

    def step() -> torch.Tensor:
        if function == "linear_surprisal_entropy":
            found = leafkernels.linear_surprisal_entropy(
                hidden, weight, ids, response_mask=mask, num_live=80, chunk_tokens=30
            )
        elif function == "surprisal_entropy":
            found = leafkernels.surprisal_entropy(hidden @ weight.T, ids, response_mask=mask, inplace_backward=True)
        elif function == "fire_opd":
            tokens = (hidden[..., :4] @ hidden[0, :4, :4]).float().unbind(-1)
            fire = leafkernels.fire_opd(*tokens, mask, normalize="kept")
            return fire.advantages + fire.weights + fire.threshold
        elif function == "policy_loss":
            policy = (hidden @ weight.T)[..., 0]
            loss = leafkernels.policy_loss(policy, policy.detach(), hidden[..., 1], mask, importance="sequence").loss
            return torch.autograd.grad(loss, weight)[0]
        else:
            logits = hidden @ weight.T
            loss = leafkernels.policy_loss_from_logits(logits, ids, None, hidden[..., 0], mask, entropy_coef=0.1).loss
            return torch.autograd.grad(loss, weight)[0]
        return torch.autograd.grad((found.surprisal + found.entropy).sum(), weight)[0]

    expected, captured, graph = captured_in_graph(step)
    graph.replay()
    # Products of matrices: in a graph they have another workspace, and may add up in another order.
    torch.testing.assert_close(captured, expected)


@on_gpu
def test_broken_cu_seqlens_stay_inside_the_tensors() -> None:
    """Values are preconditions on a GPU; breaking them gives meaningless numbers, not an access outside."""
    group = random_group(4, 64, seed=6)
    flat = {"logprobs": group["logprobs"].flatten(), "token_ids": group["token_ids"].flatten()}
    for bounds in ([0, 10**6, 5, -7, 256], [2**31 - 1] * 5, [200, 100, 50, 20, 0], [0, 256, 0, 256, 0]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        advantages = leafkernels.span_advantages(**flat, rewards=group["rewards"], cu_seqlens=cu_seqlens)
        assert advantages.shape == (256,)
        fire = leafkernels.fire_opd(
            *[flat["logprobs"]] * 4, torch.ones_like(flat["logprobs"]), cu_seqlens=cu_seqlens, normalize="trajectory"
        )
        assert fire.keep.shape == (4,)
    torch.cuda.synchronize()


@on_gpu
def test_triton_and_torch_agree_on_a_gpu_at_size() -> None:
    group = random_group(64, 8192, seed=7)
    for options in ({}, {"num_boundaries": 6}, {"group_size": 16, "normalize": "batch"}):
        triton, torch_ = (leafkernels.span_advantages(**group, **options, backend=b) for b in ("triton", "torch"))
        torch.testing.assert_close(triton, torch_, rtol=2e-7, atol=1e-8)


# --- Derivatives that are refused -------------------------------------------------------------------------------------


IDS = torch.tensor([3, 0, 4], device=DEVICE)
WEIGHT = torch.linspace(-1, 1, 20, device=DEVICE).view(5, 4)
ONES = torch.ones(1, 3, device=DEVICE)
GROUP = random_group(4, 6, seed=1, vocabulary=2)
ENDS = torch.tensor([[2, 4]] * 3, device=DEVICE)

# Each function of one floating-point argument, a valid value of it, and the name that a refusal gives.
FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...], str]] = {
    "surprisal_entropy": (
        lambda x: leafkernels.surprisal_entropy(x, IDS).surprisal,
        (3, 5),
        "surprisal_entropy",
    ),
    "linear_surprisal_entropy": (
        lambda x: leafkernels.linear_surprisal_entropy(x, WEIGHT, IDS).entropy,
        (3, 4),
        "linear_surprisal_entropy",
    ),
    "weight": (
        lambda x: leafkernels.linear_surprisal_entropy(WEIGHT[:3], x, IDS).surprisal,
        (5, 4),
        "linear_surprisal_entropy",
    ),
    "divergence": (lambda x: leafkernels.divergence(x, WEIGHT.T[:3]).divergence, (3, 5), "divergence"),
    "divergence over a few ids": (
        lambda x: leafkernels.divergence(x, WEIGHT.T[:3], top_k=2).divergence,
        (3, 5),
        "divergence",
    ),
    "linear_divergence": (
        lambda x: leafkernels.linear_divergence(WEIGHT[:3], x, WEIGHT[1:4], WEIGHT).student_entropy,
        (5, 4),
        "linear_divergence",
    ),
    "policy_loss_from_logits": (
        lambda x: leafkernels.policy_loss_from_logits(x[None], IDS[None], None, ONES, ONES).loss,
        (3, 5),
        "policy_loss_from_logits",
    ),
    "policy_loss": (lambda x: leafkernels.policy_loss(x, -ONES, ONES, ONES).loss, (1, 3), "policy_loss"),
    "entropy": (
        lambda x: leafkernels.policy_loss(-ONES, -ONES, ONES, ONES, entropy=x, entropy_coef=0.1).loss,
        (1, 3),
        "policy_loss",
    ),
    "span_advantages": (
        lambda x: leafkernels.span_advantages(GROUP["logprobs"], GROUP["token_ids"], x),
        (4,),
        "span_values",
    ),
    "grpo": (lambda x: leafkernels.grpo(GROUP["logprobs"], GROUP["token_ids"], x), (4,), "span_values"),
}
REFUSED = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.parametrize("way", ["dual", "jvp"])
@pytest.mark.parametrize("name", [*FUNCTIONS, "scatter_spans"])
def test_forward_mode_is_refused(name: str, way: str) -> None:
    """Also where no gradient is asked for, and the operation would be called as it is."""
    function, shape, refusal = FUNCTIONS.get(
        name, (lambda x: leafkernels.scatter_spans(x, ENDS, 5), (3, 2), "scatter_spans")
    )
    x, tangent = torch.rand(2, *shape, device=DEVICE)
    with pytest.raises(NotImplementedError, match=f"^{refusal} has no forward-mode derivative"):
        if way == "jvp":
            torch.func.jvp(function, (x,), (tangent,))
        else:
            with forward_ad.dual_level():
                function(forward_ad.make_dual(x, tangent))


@REFUSED
def test_second_derivatives_are_refused(name: str) -> None:
    """The sum with another term has a second derivative of its own, which alone would be returned."""
    function, shape, refusal = FUNCTIONS[name]
    message = f"^{refusal} has a first derivative only, and create_graph=True asks for more"
    x = torch.rand(shape, device=DEVICE)

    def total(x: torch.Tensor) -> torch.Tensor:
        return function(x).square().sum() + x.square().sum()

    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.functional.hvp(total, x, torch.ones_like(x))
    leaf = x.requires_grad_()
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(total(leaf), leaf, create_graph=True)
    torch.autograd.grad(total(leaf), leaf)


def test_scattered_spans_have_derivatives_of_every_order() -> None:
    """They are linear; TEMPO, which is not, has its second derivative through them."""
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]] * 3, device=DEVICE)
    values = torch.rand(3, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def scattered(values: torch.Tensor) -> torch.Tensor:
        return leafkernels.scatter_spans(values, ENDS, 6, response_mask=mask)

    assert torch.autograd.gradcheck(scattered, values)
    assert torch.autograd.gradgradcheck(lambda values: scattered(values).pow(3), values)
    hessian = torch.autograd.functional.hessian(lambda values: scattered(values).pow(3).sum(), values)
    # Tokens of each span: [0, 2) and [2, 4) without 2.
    expected = 6 * values.detach() * torch.tensor([2, 1], device=DEVICE)
    torch.testing.assert_close(hessian.reshape(6, 6), expected.flatten().diag())

    def tempo(rewards: torch.Tensor) -> torch.Tensor:
        return leafkernels.tempo(GROUP["logprobs"], GROUP["token_ids"], rewards)

    rewards = torch.tensor([0.0, 1.0, 0.4, 0.9], dtype=torch.float64, device=DEVICE)
    direction = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, device=DEVICE)

    def slope(rewards: torch.Tensor) -> torch.Tensor:
        return torch.autograd.functional.vjp(lambda r: tempo(r).square().sum(), rewards)[1]

    _, found = torch.autograd.functional.hvp(lambda r: tempo(r).square().sum(), rewards, direction)
    step = 1e-3
    differences = (slope(rewards + step * direction) - slope(rewards - step * direction)) / (2 * step)
    # Advantages are float32: their rounding over the step.
    torch.testing.assert_close(found, differences, rtol=1e-2, atol=10 * 2**-24 / step)


def hidden_and_logits() -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.linspace(-1, 1, 12, device=DEVICE).view(3, 4).requires_grad_()
    return hidden, hidden @ WEIGHT.T


def gradient(hidden: torch.Tensor, found: leafkernels.SurprisalEntropy) -> torch.Tensor:
    return torch.autograd.grad((found.surprisal + 2 * found.entropy).sum(), hidden, retain_graph=True)[0]


def refuses(logits: torch.Tensor, message: str, backend: str = "auto") -> None:
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        leafkernels.surprisal_entropy(logits, ids, inplace_backward=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_memory_of_a_leaf_is_not_given(backend: str) -> None:
    class Alias(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x

    parameter = torch.nn.Parameter(torch.randn(4, 5, device=DEVICE))
    before = parameter.detach().clone()
    with torch.no_grad():
        unseen = parameter.view(2, 2, 5)
    must = "logits must be the result of a computation with inplace_backward=True, got"
    for leaf in (parameter, parameter.detach().requires_grad_(), parameter.data.requires_grad_(), unseen):
        refuses(leaf, f"{must} a leaf", backend)
    views = parameter.view(2, 2, 5), parameter[1:], parameter[::2, 1:4], parameter.T, parameter[None].expand(3, 4, 5)
    for view in (*views, parameter.view(2, 2, 5)[0].T, parameter.unbind()[0], Alias.apply(parameter)):
        refuses(view, f"{must} a view of a leaf", backend)
    found = leafkernels.surprisal_entropy(
        parameter * 1, torch.zeros(4, dtype=torch.int64, device=DEVICE), inplace_backward=True, backend=backend
    )
    found.surprisal.sum().backward()
    assert torch.equal(parameter, before)


def test_entries_that_share_memory_are_refused() -> None:
    flat = torch.randn(20, device=DEVICE, requires_grad=True) * 1
    must = "logits must have memory of its own for each entry with inplace_backward=True, got shape"
    refuses(flat[:5].expand(3, 5), f"{must} (3, 5) with strides (0, 1)")
    refuses(flat[:3, None].expand(3, 5), f"{must} (3, 5) with strides (1, 0)")
    refuses(flat.unfold(0, 5, 3), f"{must} (6, 5) with strides (3, 1)")
    refuses(flat.as_strided((3, 4), (2, 3)), f"{must} (3, 4) with strides (2, 3)")


@st.composite
def views(draw: st.DrawFn) -> tuple[int, Callable[[torch.Tensor], torch.Tensor]]:
    """Up to three views one after the other of a tensor (4, 3, 6): any strides, and memory that is shared or not."""
    steps = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 3)), max_size=3))

    def view(tensor: torch.Tensor) -> torch.Tensor:
        for kind, dim, number in steps:
            dim = min(dim, tensor.dim() - 1)
            if kind == 0:
                tensor = tensor.transpose(dim, -1)
            elif kind == 1:
                tensor = tensor[(slice(None),) * dim + (slice(number - 1, None, number),)]
            elif kind == 2 and tensor.shape[dim]:
                tensor = (
                    tensor.select(dim, 0).unsqueeze(dim).expand(*tensor.shape[:dim], number, *tensor.shape[dim + 1 :])
                )
            elif kind == 3 and tensor.shape[dim] >= number:
                tensor = tensor.unfold(dim, number, 1)
        return tensor

    return draw(st.integers(0, 10**6)), view


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_in_place_of_any_view(backend: str, small_blocks: None) -> None:
    """The gradient of the same view not in place, or a refusal, and that where two entries lie at one place only."""

    @examples(backend, torch=100, triton=20, reference=20)
    @given(views())
    def run(case: tuple[int, Callable[[torch.Tensor], torch.Tensor]]) -> None:
        seed, view = case
        start = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        places = view(torch.arange(72, device=DEVICE).view(4, 3, 6)).flatten()
        gradients = []
        for in_place in (False, True):
            leaf = start.clone().requires_grad_()
            logits = view(leaf * 1)
            ids = torch.full(logits.shape[:-1], logits.shape[-1] // 2, device=DEVICE)
            try:
                found = leafkernels.surprisal_entropy(logits, ids, inplace_backward=in_place, backend=backend)
            except ValueError:
                assert in_place
                assert places.unique().shape != places.shape
                return
            gradients += torch.autograd.grad((found.surprisal + 2 * found.entropy).sum(), leaf)
            assert not in_place or places.unique().shape == places.shape
        torch.testing.assert_close(*gradients)

    run()


HOOKS = {
    "save_on_cpu": save_on_cpu,
    "identity": lambda: saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    "detached": lambda: saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor),
}


@pytest.mark.parametrize("hooks", HOOKS)
def test_under_hooks_nobody_loses_what_was_saved(hooks: str) -> None:
    """Autograd checks no version of what a hook returns: others that saved the logits would read the gradient."""
    with HOOKS[hooks]():
        hidden, logits = hidden_and_logits()
        squares = logits.square().sum()
        ours = leafkernels.surprisal_entropy(logits, IDS, inplace_backward=True)
        expected = gradient(hidden, leafkernels.surprisal_entropy(logits, IDS))
    (grad_squares,) = torch.autograd.grad(squares, hidden, retain_graph=True)
    torch.testing.assert_close(gradient(hidden, ours), expected)
    torch.testing.assert_close(torch.autograd.grad(squares, hidden, retain_graph=True)[0], grad_squares)
    with pytest.raises(RuntimeError, match="^surprisal_entropy with inplace_backward=True gave its gradient away"):
        gradient(hidden, ours)


def test_under_a_checkpoint_nobody_loses_what_was_saved() -> None:
    def both(hidden: torch.Tensor, in_place: bool) -> torch.Tensor:
        logits = hidden @ WEIGHT.T
        found = leafkernels.surprisal_entropy(logits, IDS, inplace_backward=in_place)
        return found.surprisal.sum() + logits.square().sum()

    gradients = []
    for in_place in (False, True):
        hidden, _ = hidden_and_logits()
        checkpoint(both, hidden, in_place, use_reentrant=False).backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("hooks", [None, *HOOKS])
def test_a_loss_from_logits_gives_its_gradient_once(hooks: str | None) -> None:
    with HOOKS[hooks]() if hooks else torch.enable_grad():
        hidden, logits = hidden_and_logits()
        loss = 3 * leafkernels.policy_loss_from_logits(logits[None], IDS[None], None, ONES, ONES).loss
    expected = leafkernels.surprisal_entropy(hidden @ WEIGHT.T, IDS).surprisal.sum()
    torch.testing.assert_close(
        torch.autograd.grad(loss, hidden, retain_graph=True), torch.autograd.grad(expected, hidden)
    )
    with pytest.raises(RuntimeError, match="^policy_loss_from_logits gave its gradient away in a first backward pass"):
        loss.backward()


@pytest.mark.parametrize("function", ["in place", "policy_loss_from_logits"])
def test_a_compiled_graph_keeps_what_it_saved(function: str) -> None:
    """A second backward pass of it is possible, and right."""

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ WEIGHT.T
        if function == "in place":
            return leafkernels.surprisal_entropy(logits, IDS, inplace_backward=True).surprisal.square().sum()
        return leafkernels.policy_loss_from_logits(logits[None], IDS[None], None, ONES, ONES).loss

    torch._dynamo.reset()
    hidden, _ = hidden_and_logits()
    expected = torch.autograd.grad(loss(hidden), hidden)
    result = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(result, hidden, retain_graph=True), expected)
