"""What is not computed is refused: forward mode, second derivatives, second passes, memory that belongs to another."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, random_group
from support import examples
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import leafkernels

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
