"""The reward channel in decoding: few tokens, every layer's weights read once.

``plain`` goes layer by layer: seven launches in each (cat, norm, two products, their sum, SiLU, sum) and two for the
head; ``compile`` is that, compiled. ``RewardChannel.fused`` launches six whatever the number of layers: a copy of the
hidden states, two kernels and the product between them, and two for the head.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import python_ref
from bench.harness import Bench, Call, Prepare, compiled
from leafkernels.lookahead import RewardChannel
from leafkernels.lookahead.reward_channel import LayerWeights

INPUTS = ("normal",)
OP = "reward_channel"
BACKENDS = ("python_ref", "plain", "torch", "compile", "triton")


@dataclass(frozen=True)
class Decoding:
    """A channel and the hidden states h_0 ... h_n, (M, D) each, of the tokens of one forward."""

    channel: RewardChannel
    hidden: list[Tensor]


@dataclass(frozen=True)
class Decoder:
    """Layers and width of a decoder, width of its channel, and tokens of a forward, one for each branch."""

    name: str
    layers: int
    size: int
    width: int
    branches: int
    dtype: torch.dtype
    reason: str
    inputs: tuple[str, ...] = INPUTS

    @property
    def num_weights(self) -> int:
        wide, narrow = self.layers * (self.width + 1) * self.size, (self.layers - 1) * (self.width + 1) * self.width
        return wide + narrow + self.size + self.width

    @property
    def num_tokens(self) -> int:
        """Products of a number with a weight, in the unit of the limits of the harness."""
        return self.branches * self.num_weights

    @property
    def bytes_of_batch(self) -> int:
        return (self.num_weights + (self.layers + 1) * self.branches * self.size) * self.dtype.itemsize

    def batches(self, inputs: str, device: str, count: int) -> tuple[Decoding, ...]:
        return _batches(self, device, count)


@lru_cache(maxsize=1)
def _batches(shape: Decoder, device: str, count: int) -> tuple[Decoding, ...]:
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        channel = RewardChannel(shape.layers, shape.size, shape.width).requires_grad_(False)
        hidden = [torch.randn(shape.branches, shape.size) for _ in range(shape.layers + 1)]
        found.append(Decoding(channel.to(device, shape.dtype), [part.to(device, shape.dtype) for part in hidden]))
    return tuple(found)


SHAPES = (
    Decoder("4x128x16,8", 4, 128, 16, 8, torch.float32, "small enough for literal Python"),
    Decoder("12x768x64,8", 12, 768, 64, 8, torch.float32, "a small model, on a CPU too"),
    Decoder("12x768x64,24", 12, 768, 64, 24, torch.float32, "the same with more branches"),
    Decoder("32x4096x256,1", 32, 4096, 256, 1, torch.bfloat16, "the paper's channel of 8 billion weights, greedy"),
    Decoder("32x4096x256,8", 32, 4096, 256, 8, torch.bfloat16, "with the paper's 2 ** 3 branches"),
    Decoder("32x4096x256,128", 32, 4096, 256, 128, torch.bfloat16, "as many tokens as are taken in one go"),
)
TINY = (Decoder("tiny-3x8x4,2", 3, 8, 4, 2, torch.float32, "for a run that only proves it runs"),)


def layer_by_layer(channel: RewardChannel, layers: list[LayerWeights], hidden: list[Tensor]) -> Tensor:
    state = None
    for layer, part in zip(layers, hidden[:-1], strict=True):
        state = channel.step(layer, part, state)
    assert state is not None
    return channel.reward(hidden[-1], state)


def literal(batch: Decoding) -> Call:
    layers = batch.channel.by_layer()
    norms = [layer.norm for layer in layers]
    weights = [layer.wide if layer.narrow is None else torch.cat([*layer[1:]], 1) for layer in layers]
    lists = [[part.tolist() for part in parts] for parts in (batch.hidden, norms, weights)]
    head = [layer.weight.tolist() for layer in batch.channel.head]
    return lambda: python_ref.reward_channel(*lists, head, batch.channel.eps)


def plain(batch: Decoding) -> Call:
    layers = batch.channel.by_layer()
    return lambda: layer_by_layer(batch.channel, layers, batch.hidden)


def compiled_call(batch: Decoding) -> Call:
    layers, function = batch.channel.by_layer(), compiled(layer_by_layer)
    return lambda: function(batch.channel, layers, batch.hidden)


def fused(backend: str) -> Prepare:
    return lambda batch: lambda: batch.channel.fused(batch.hidden, backend=backend)


PREPARES = {
    "python_ref": literal,
    "plain": plain,
    "torch": fused("torch"),
    "compile": compiled_call,
    "triton": fused("triton"),
}


def gate(batch: Decoding, result: Any) -> None:
    """Against float64, layer by layer; weights in bfloat16 round every layer's sum."""
    channel = batch.channel
    exact = RewardChannel(**channel.settings).double()  # type: ignore[arg-type]
    exact.load_state_dict({name: part.cpu() for name, part in channel.state_dict().items()})
    truth = exact([part.cpu().double() for part in batch.hidden]).detach()
    bound = 1e-5 if channel.wide.dtype == torch.float32 else 2e-2
    found = torch.as_tensor(result).cpu().double()
    torch.testing.assert_close(found, truth, rtol=bound, atol=bound * float(truth.abs().max()))


def bytes_moved(batch: Decoding) -> int:
    """Every weight and every hidden state, once; a reward for each token."""
    parts = [*batch.channel.parameters(), *batch.hidden, batch.hidden[0][:, 0]]
    return sum(part.numel() * part.element_size() for part in parts)


def test_reward_channel(shape: Decoder, inputs: str, backend: str, bench: Bench) -> None:
    bench(OP, shape, inputs, backend, PREPARES, gate, bytes_moved, tolerance=2e-2)
