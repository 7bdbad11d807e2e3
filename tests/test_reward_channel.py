"""The channel against the results of its authors' code, its reference, and by laws."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import DEVICE
from support import examples
from torch.utils._python_dispatch import TorchDispatchMode

import python_ref
from leafkernels.lookahead import RewardChannel, reward_channel

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BACKENDS = ["torch", "triton", "reference"]


def _golden(shared: Path) -> list[dict[str, Any]]:
    with gzip.open(shared / "golden" / "sla_channel.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def _channel_of(case: dict[str, Any]) -> RewardChannel:
    weights = {name: torch.tensor(values) for name, values in case["weights"].items()}
    return RewardChannel.from_released(weights, eps=case["rms_norm_eps"])


def _random(layers: int, size: int, width: int, tokens: int, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """A channel whose norms weigh too, and hidden states (1, T, D)."""
    torch.manual_seed(seed)
    channel = RewardChannel(layers, size, width, **options)
    with torch.no_grad():
        for parameter in channel.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    hidden = [torch.randn(1, tokens, size) * (1 + 3 * layer) for layer in range(layers + 1)]
    return channel.to(DEVICE), [part.to(DEVICE) for part in hidden]


def _check_rewards(found: torch.Tensor, case: dict[str, Any]) -> None:
    """Against the authors' float32: sums of as many products as a state is wide, in whatever order a library takes."""
    theirs = torch.tensor(case["reward"])
    atol = case["hidden_size"] * torch.finfo(torch.float32).eps * max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(found.cpu(), theirs, rtol=0, atol=atol)


def test_the_authors_rewards_and_gradients(shared: Path) -> None:
    with_gradients = 0
    for case in _golden(shared):
        channel = _channel_of(case)
        assert channel.settings["num_layers"] == case["num_layers"]
        assert channel.settings["head_layers"] == case["head_layers"]
        found = channel([torch.tensor(hidden) for hidden in case["hidden"]])
        _check_rewards(found, case)
        if "grads" not in case:
            continue
        with_gradients += 1
        (found * torch.tensor(case["grad_out"])).sum().backward()
        norms, weights = [list(part.grad) for part in (channel.norm_wide, channel.wide)]
        for layer in range(1, channel.num_layers):
            norms[layer] = torch.cat([norms[layer], channel.norm_narrow.grad[layer - 1]])
            weights[layer] = torch.cat([weights[layer], channel.narrow.grad[layer - 1]], 1)
        ours = {
            **{f"tt_layers.{i}.tt_layernorm.weight": norm for i, norm in enumerate(norms)},
            **{f"tt_layers.{i}.tt_linear.weight": weight for i, weight in enumerate(weights)},
        }
        head_grads = [layer.weight.grad for layer in channel.head]
        names = (
            ["sr_head.weight"] if len(head_grads) == 1 else [f"sr_head.{2 * i}.weight" for i in range(len(head_grads))]
        )
        ours |= dict(zip(names, head_grads, strict=True))
        assert ours.keys() == case["grads"].keys()
        for name, gradient in ours.items():
            # Of the head's several outputs only the first is the reward.
            theirs = torch.tensor(case["grads"][name])[: len(gradient)]
            torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert with_gradients


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_authors_rewards_in_one_go(backend: str, shared: Path) -> None:
    cases = _golden(shared)
    for case in cases:
        hidden = [torch.tensor(hidden, device=DEVICE) for hidden in case["hidden"]]
        found = _channel_of(case).to(DEVICE).fused(hidden, backend=backend)
        _check_rewards(found, case)
    assert len(cases) > 20


def _by_reference(channel: RewardChannel, hidden: list[torch.Tensor]) -> torch.Tensor:
    layers = channel.by_layer()
    norms = [layer.norm for layer in layers]
    weights = [layer.wide if layer.narrow is None else torch.cat([*layer[1:]], 1) for layer in layers]
    rewards = python_ref.reward_channel(
        [part[0].tolist() for part in hidden],
        [norm.tolist() for norm in norms],
        [weight.tolist() for weight in weights],
        [layer.weight.tolist() for layer in channel.head],
        channel.eps,
    )
    return torch.tensor(rewards, dtype=torch.float64, device=DEVICE)[None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(backend: str, small_blocks: None) -> None:
    """Sizes that blocks and pieces of the kernels do not divide; one layer has no narrow half."""
    sizes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 7), st.integers(1, 3))

    @examples(backend, torch=60, triton=10, reference=20)
    @given(sizes, st.integers(1, 3), st.integers(0, 10**6))
    def check(sizes: tuple[int, int, int, int], head_layers: int, seed: int) -> None:
        channel, hidden = _random(*sizes, seed=seed, head_layers=head_layers, eps=1e-3)
        expected = _by_reference(channel, hidden)
        # Float32 sums of up to 16 terms in up to 7 layers, and what a root of few numbers makes of them.
        bound = {"rtol": 1e-4, "atol": 1e-5 * float(1 + expected.abs().max())}
        torch.testing.assert_close(channel.fused(hidden, backend=backend).double(), expected, **bound)
        torch.testing.assert_close(channel(hidden).detach().double(), expected, **bound)

    check()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_less_exact_than_layer_by_layer(dtype: torch.dtype, backend: str) -> None:
    """Errors against float64 of many tokens; one in each way of rounding may be luck, the mean is not."""
    channel, hidden = _random(6, 64, 16, 24 if backend == "triton" and DEVICE == "cpu" else 500)
    channel, hidden = channel.to(dtype), [part.to(dtype) for part in hidden]
    rewards = {"fused": channel.fused(hidden, backend=backend), "by layer": channel(hidden).detach()}
    truth = channel.double()([part.double() for part in hidden]).detach()
    errors = {name: (found.double() - truth).abs().mean().item() for name, found in rewards.items()}
    assert errors["fused"] <= 1.5 * errors["by layer"] + torch.finfo(dtype).eps * truth.abs().mean().item()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_half_precision_does_not_overflow(backend: str) -> None:
    """Hidden states of large models reach thousands; they are divided by their root before they are multiplied."""
    channel, hidden = _random(3, 64, 4, 2)
    hidden = [part * 2000 for part in hidden[:-1]] + hidden[-1:]
    exact = channel(hidden).detach()
    found = channel.half().fused([part.half() for part in hidden], backend=backend)
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_one_go_tokens_do_not_see_each_other_and_runs_repeat(backend: str) -> None:
    channel, hidden = _random(3, 8, 4, 5)
    found = channel.fused(hidden, backend=backend)
    assert torch.equal(channel.fused(hidden, backend=backend), found)
    if backend != "reference":  # lists refuse no NaN, but sum exactly
        for part in hidden:
            part[:, 3:] = torch.nan
        changed = channel.fused(hidden, backend=backend)
        torch.testing.assert_close(changed[:, :3], found[:, :3])
        assert changed[:, 3:].isnan().all()
    assert channel.fused([part[:, :0] for part in hidden], backend=backend).shape == (1, 0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_channel_keeps_its_precision_beside_hidden_states_of_another(backend: str) -> None:
    channel, hidden = _random(3, 8, 4, 5)
    short = [part.bfloat16() for part in hidden]
    found = channel.fused(short, backend=backend)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, channel.fused([part.float() for part in short], backend=backend))


def test_few_tokens_without_a_gradient_go_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU."""
    channel, hidden = _random(3, 8, 4, 5)
    called = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def ways() -> list[bool]:
        found = []
        for most in (5, 4):
            monkeypatch.setattr(reward_channel, "FUSED_TOKENS", most)
            called.clear()
            with Seen():
                channel(hidden)
            found.append("channel_state" in called)
        return found

    assert ways() == [False, False]
    with torch.no_grad():
        assert ways() == [DEVICE == "cuda", False]
        monkeypatch.setattr(RewardChannel, "is_fused", lambda *_: True)
        assert ways() == [True, True]


def test_begins_as_linear_layers_do() -> None:
    torch.manual_seed(0)
    channel = RewardChannel(40, 12, width=20)
    for parts, inputs in ((channel.wide[:1], 12), (channel.wide[1:], 32), (channel.narrow, 32)):
        bound = inputs**-0.5
        assert 0.95 * bound < parts.abs().max() <= bound
        assert parts.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert torch.equal(channel.norm_wide, torch.ones(40, 12)) and torch.equal(channel.norm_narrow, torch.ones(39, 20))


def test_tokens_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    channel = RewardChannel(3, 8, width=4)
    hidden = [torch.randn(2, 5, 8) for _ in range(4)]
    changed = [part.clone() for part in hidden]
    for part in changed:
        part[:, 3:] = torch.nan
    torch.testing.assert_close(channel(hidden)[:, :3], channel(changed)[:, :3])


@pytest.mark.parametrize("layers", [1, 2])
def test_every_parameter_gets_a_gradient_and_the_state_keeps_its_names(layers: int) -> None:
    """A channel of one layer has no narrow weights; its state, which folders hold, has them with no number in them."""
    channel, hidden = _random(layers, 8, 4, 5)
    channel(hidden).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in channel.parameters())
    assert {*channel.state_dict()} == {"norm_wide", "norm_narrow", "wide", "narrow", "head.0.weight"}
    other = RewardChannel(layers, 8, 4).to(DEVICE)
    other.load_state_dict(channel.state_dict())
    assert torch.equal(other(hidden), channel(hidden)) and torch.equal(other.fused(hidden), channel.fused(hidden))


def test_by_hand() -> None:
    channel = RewardChannel(1, 2, width=1, eps=1e-30)
    with torch.no_grad():
        channel.wide[0] = torch.tensor([[2.0, 0.0]])
        channel.head[0].weight.copy_(torch.tensor([[10.0, 100.0, 1.0]]))
    # norm([3, 4]) = [3, 4] / sqrt(12.5)
    narrow = torch.nn.functional.silu(torch.tensor(2 * 3 / 12.5**0.5))
    found = channel([torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, 2.0]]])])
    torch.testing.assert_close(found, (210.0 + narrow)[None, None])


def test_the_reference_by_hand() -> None:
    """Two layers of one number each: norm(3) = 1, and norm([3, u]) = [3, u] / sqrt((9 + u^2) / 2)."""
    first = python_ref.reward_channel([[[3.0]], [[0.0]]], [[1.0]], [[[0.0]]], [[[1.0, 1.0]]], 1e-30)
    assert first == [0.0]
    u = 0.7310585786300049  # silu(1)
    (found,) = python_ref.reward_channel(
        [[[3.0]], [[3.0]], [[10.0]]], [[1.0], [0.0, 2.0]], [[[1.0]], [[5.0, 1.0]]], [[[2.0, 1.0]]], 1e-30
    )
    x = 2 * u / ((9 + u * u) / 2) ** 0.5
    assert found == pytest.approx(20 + x / (1 + 2.718281828459045**-x) + u, rel=1e-12)


def test_refuses() -> None:
    channel = RewardChannel(2, 4, width=2)
    with pytest.raises(ValueError, match="hidden_states must hold 3 tensors, .* got 2"):
        channel([torch.zeros(1, 1, 4)] * 2)
    whole = torch.zeros(1, 3, 4)
    for call in (channel, channel.fused):
        with pytest.raises(ValueError, match=r"hidden_states must have 4 numbers a token, got shape \(1, 1, 5\)"):
            call([torch.zeros(1, 1, 5)] * 3)
        with pytest.raises(ValueError, match=r"hidden_states must have 4 numbers a token, got shape \(\)"):
            call([torch.tensor(1.0)] * 3)
        for number in (1, 2):
            hidden = [whole] * number + [whole[:, :2]] + [whole] * (2 - number)
            with pytest.raises(ValueError, match=rf"one shape, \(1, 3, 4\), got \(1, 2, 4\) at {number}"):
                call(hidden)
        with pytest.raises(TypeError, match="hidden_states must be a list of tensors, got NoneType"):
            call(None)
        with pytest.raises(TypeError, match=r"hidden_states\[1\] must be a torch.Tensor, got list"):
            call([whole, [[0.0] * 4], whole])
    with pytest.raises(TypeError, match="the channel must be float32, .* with backend='triton', got torch.float64"):
        channel.double().fused([torch.zeros(1, 1, 4)] * 3, backend="triton")
    with pytest.raises(ValueError, match="state_dict must hold .* got 0, 0 and 0 of these"):
        RewardChannel.from_released({"lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        RewardChannel(2, 4, width=0)


def _released(layers: int, size: int, width: int, head_layers: int) -> dict[str, torch.Tensor]:
    """Random weights by the authors' names."""
    torch.manual_seed(0)
    state = {}
    for layer in range(layers):
        inputs = size + width if layer else size
        state[f"model.tt_layers.{layer}.tt_layernorm.weight"] = torch.rand(inputs) + 0.5
        state[f"model.tt_layers.{layer}.tt_linear.weight"] = torch.randn(width, inputs)
    sizes = [size + width, *[2 * size] * (head_layers - 1), 3]
    for part in range(head_layers):
        name = "sr_head.weight" if head_layers == 1 else f"sr_head.{2 * part}.weight"
        state[name] = torch.randn(sizes[part + 1], sizes[part])
    return state


@pytest.mark.parametrize("head_layers", [1, 2, 3])
def test_released_weights_by_their_names(head_layers: int) -> None:
    """Twelve layers: 10 comes after 9. The reference takes them as they are."""
    state = _released(12, 4, 2, head_layers)
    hidden = [torch.randn(1, 3, 4) for _ in range(13)]
    norms, weights = (
        [state[f"model.tt_layers.{i}.{part}.weight"].tolist() for i in range(12)]
        for part in ("tt_layernorm", "tt_linear")
    )
    head = [tensor.tolist() for name, tensor in state.items() if name.startswith("sr_head")]
    head[-1] = head[-1][:1]
    expected = python_ref.reward_channel([part[0].tolist() for part in hidden], norms, weights, head, 1e-5)
    found = RewardChannel.from_released(state | {"lm_head.weight": torch.zeros(2, 2)}, eps=1e-5)(hidden)
    torch.testing.assert_close(found.double(), torch.tensor([expected], dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("tt_layers.1.", r"must hold tt_layers.1.tt_layernorm.weight, got the numbers \[0, 2\]"),
        ("tt_layers.1.tt_linear", r"must hold tt_layers.1.tt_linear.weight, got the numbers \[0, 2\]"),
        ("tt_layers.2.tt_linear", "of every layer, .* got 3, 2 and 3 of these"),
        ("sr_head.0", r"must hold sr_head.0.weight, got the numbers \[2, 4\]"),
        ("sr_head.2", r"must hold sr_head.2.weight, got the numbers \[0, 4\]"),
    ],
)
def test_refuses_released_weights_with_a_gap(left_out: str, message: str) -> None:
    state = {name: tensor for name, tensor in _released(3, 4, 2, 3).items() if left_out not in name}
    with pytest.raises(ValueError, match=message):
        RewardChannel.from_released(state)
