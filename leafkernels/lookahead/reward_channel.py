"""The reward channel: a thin strip beside a frozen decoder that gives every token a reward (SLA, arXiv 2503.00029)."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import check_count, check_kernel_dtype, check_positive, check_real
from leafkernels._core.operation import operation

# A program takes a token through all layers and reads their narrow weights anew. About as many programs as a large GPU
# has multiprocessors run at a time; of more tokens, layer by layer, each weight is read once for all.
FUSED_TOKENS = 128


class LayerWeights(NamedTuple):
    """Of one layer: the weight of its norm, and the halves of W for the hidden state and for the channel."""

    norm: Tensor
    wide: Tensor
    narrow: Tensor | None


@operation("reward_channel")
def _channel_state(
    hidden: Tensor, norm_wide: Tensor, norm_narrow: Tensor, wide: Tensor, narrow: Tensor, eps: float
) -> Tensor:
    return wide.new_empty((hidden.shape[1], wide.shape[1]))


class RewardChannel(nn.Module):
    """Rewards of tokens from what the layers of a decoder compute anyway.

        u_0 = silu(W_0 norm(h_0))    u_i = silu(W_i norm([h_i; u_{i-1}])) + u_{i-1}    r = head([h_n; u_{n-1}])

    h_0 is the input of the first layer, h_i that of layer i, h_n the output after the final norm; u has ``width``
    numbers; norm is RMSNorm over both parts together. Token by token, without attention.

    The channel computes in the dtype of its own parameters, whatever that of the hidden states. These are packed, so
    that one product serves all layers: W_i is ``wide[i]`` (R, D) beside ``narrow[i - 1]`` (R, R), and the weight of its
    norm ``norm_wide[i]`` (D,) before ``norm_narrow[i - 1]`` (R,). The first layer has the wide ones only.

    Args:
        num_layers: n, layers of the decoder, at least 1.
        hidden_size: D.
        width: R, of the channel.
        head_layers: linear layers of the head, with SiLU between.
        eps: of the norms; the decoder's, in the released code.
        head_width: of the head's inner layers; ``hidden_size`` unless given.
    """

    norm_narrow: Tensor
    narrow: Tensor

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        width: int = 256,
        head_layers: int = 1,
        eps: float = 1e-6,
        head_width: int | None = None,
    ) -> None:
        super().__init__()
        head_width = hidden_size if head_width is None else head_width
        for name, value in {
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "width": width,
            "head_layers": head_layers,
            "head_width": head_width,
        }.items():
            check_count(name, value, 1)
        check_positive("eps", eps)
        self.num_layers, self.hidden_size, self.width = num_layers, hidden_size, width
        self.head_layers, self.eps, self.head_width = head_layers, eps, head_width
        self.norm_wide = nn.Parameter(torch.ones(num_layers, hidden_size))
        self._add_narrow("norm_narrow", torch.ones(num_layers - 1, width))
        self.wide = nn.Parameter(torch.empty(num_layers, width, hidden_size))
        self._add_narrow("narrow", torch.empty(num_layers - 1, width, width))
        with torch.no_grad():  # as nn.Linear begins
            for parts, inputs in (
                (self.wide[:1], hidden_size),
                (self.wide[1:], hidden_size + width),
                (self.narrow, hidden_size + width),
            ):
                parts.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
        head_sizes = [hidden_size + width, *[head_width] * (head_layers - 1), 1]
        self.head = nn.ModuleList(
            nn.Linear(size, out, bias=False) for size, out in zip(head_sizes[:-1], head_sizes[1:], strict=True)
        )
        if head_layers == 1:
            nn.init.normal_(next(self.head.parameters()), std=0.02)

    def _add_narrow(self, name: str, values: Tensor) -> None:
        # With one layer there are none, and DDP stops at a parameter that never gets a gradient.
        if self.num_layers > 1:
            self.register_parameter(name, nn.Parameter(values))
        else:
            self.register_buffer(name, values)

    @property
    def settings(self) -> dict[str, int | float]:
        """The arguments that build a channel of these sizes."""
        names = ("num_layers", "hidden_size", "width", "head_layers", "eps", "head_width")
        return {name: getattr(self, name) for name in names}

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Rewards (B, T) of hidden states h_0 ... h_n, each (B, T, D).

        Few tokens on a GPU go the way of ``fused`` under ``torch.no_grad()`` (``is_fused``); others go layer by layer.
        """
        self._check(hidden_states)
        if self.is_fused(hidden_states[0]):
            return self.fused(hidden_states)
        state = None
        for weights, hidden in zip(self.by_layer(), hidden_states[:-1], strict=True):
            state = self.step(weights, hidden, state)
        assert state is not None
        return self.reward(hidden_states[-1], state)

    @torch.no_grad()
    def fused(self, hidden_states: Sequence[Tensor], backend: str = "auto") -> Tensor:
        """The same, for decoding: six launches whatever the number of layers, equal to rounding; without a gradient.

        One product serves the wide halves of all layers, one launch the narrow ones. It needs memory for one more copy
        of the hidden states, in the dtype of the channel.

        Args:
            hidden_states: as above.
            backend: "auto", "triton", "torch" or "reference". Triton takes no float64, for which "auto" is "torch".
        """
        self._check(hidden_states)
        if backend == "auto" and self.wide.dtype == torch.float64:
            backend = "torch"
        backend = resolve_backend(backend, self.wide.device)
        check_kernel_dtype("the channel", self.wide.dtype, backend)
        hidden = torch.stack(tuple(hidden_states[:-1])).flatten(1, -2)
        if backend == "reference":
            state = self._state_by_reference(hidden)
        else:
            weights = (self.norm_wide, self.norm_narrow, self.wide, self.narrow)
            state = _channel_state(backend, hidden, *weights, float(self.eps))
        return self.reward(hidden_states[-1], state.view(*hidden_states[-1].shape[:-1], self.width))

    def _state_by_reference(self, hidden: Tensor) -> Tensor:
        import python_ref

        layers = self.by_layer()
        weights = [layer.wide if layer.narrow is None else torch.cat([layer.wide, layer.narrow], 1) for layer in layers]
        norms, matrices = [layer.norm.tolist() for layer in layers], [weight.tolist() for weight in weights]
        states = python_ref.channel_states(hidden.tolist(), norms, matrices, self.eps)
        return torch.tensor(states, dtype=self.wide.dtype, device=hidden.device).reshape(-1, self.width)

    def is_fused(self, hidden: Tensor) -> bool:
        """Whether hidden states like this one go the way of ``fused``: few, on a GPU, and without a gradient.

        On a CPU, where a launch costs little, nothing is gained by it.
        """
        return hidden.is_cuda and not torch.is_grad_enabled() and hidden.shape[:-1].numel() <= FUSED_TOKENS

    def by_layer(self) -> list[LayerWeights]:
        """The weights of each layer, for ``step``; to be taken once a forward pass."""
        first, *norms = self.norm_wide.unbind()
        joined = [torch.cat(pair) for pair in zip(norms, self.norm_narrow.unbind(), strict=True)]
        return [*map(LayerWeights, [first, *joined], self.wide.unbind(), [None, *self.narrow.unbind()])]

    def step(self, weights: LayerWeights, hidden: Tensor, state: Tensor | None) -> Tensor:
        """u_i (B, T, R) from ``by_layer()[i]``, the input (B, T, D) of layer i and u_{i-1}; None before the first."""
        norm, wide, narrow = weights
        hidden = self._own(hidden)
        if narrow is None or state is None:
            return silu(linear(rms_norm(hidden, norm.shape, norm, self.eps), wide))
        normal = rms_norm(torch.cat([hidden, state], -1), norm.shape, norm, self.eps)
        normal_hidden, normal_state = normal.split([self.hidden_size, self.width], -1)
        return silu(linear(normal_hidden, wide) + linear(normal_state, narrow)) + state

    def reward(self, hidden: Tensor, state: Tensor) -> Tensor:
        """Rewards (B, T) from the output (B, T, D) after the final norm and u_{n-1}."""
        found = self.head[0](torch.cat([self._own(hidden), state], -1))
        for layer in self.head[1:]:
            found = layer(silu(found))
        return found[..., 0]

    def _check(self, hidden_states: Sequence[Tensor]) -> None:
        if not isinstance(hidden_states, list | tuple | Tensor):
            raise TypeError(f"hidden_states must be a list of tensors, got {type(hidden_states).__name__}")
        if len(hidden_states) != self.num_layers + 1:
            raise ValueError(
                f"hidden_states must hold {self.num_layers + 1} tensors, the inputs of {self.num_layers} layers and "
                f"the output after the final norm, got {len(hidden_states)}"
            )
        for number, hidden in enumerate(hidden_states):
            shape = check_real(f"hidden_states[{number}]", hidden).shape
            if shape[-1:] != (self.hidden_size,):
                raise ValueError(
                    f"hidden_states must have {self.hidden_size} numbers a token, got shape {tuple(shape)}"
                )
            if shape != hidden_states[0].shape:
                raise ValueError(
                    f"hidden_states must be of one shape, {tuple(hidden_states[0].shape)}, got {tuple(shape)} at "
                    f"{number}"
                )

    def _own(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.wide.dtype)

    @classmethod
    def from_released(cls, state_dict: Mapping[str, Tensor], eps: float = 1e-6) -> "RewardChannel":
        """The channel of the authors' checkpoints, by their names of parameters; others are passed over.

        Their heads give several numbers and the first is the reward; the others are left out. ``eps`` is the
        ``rms_norm_eps`` of the decoder. Raises ValueError where the number of a layer or of a part of the head is
        missing among the others.
        """
        norms = _numbered(state_dict, "tt_layers.", ".tt_layernorm.weight")
        layers = _numbered(state_dict, "tt_layers.", ".tt_linear.weight")
        head = _numbered(state_dict, "sr_head", ".weight", step=2)  # with an activation after each but the last
        if not norms or len(norms) != len(layers) or not head:
            raise ValueError(
                "state_dict must hold tt_layers.i.tt_layernorm.weight and tt_layers.i.tt_linear.weight of every layer, "
                f"and sr_head.weight or sr_head.i.weight, got {len(norms)}, {len(layers)} and {len(head)} of these"
            )
        width, hidden_size = layers[0].shape
        channel = cls(len(layers), hidden_size, width, len(head), eps, head[0].shape[0] if len(head) > 1 else None)
        state = {
            "norm_wide": torch.stack([norm[:hidden_size] for norm in norms]),
            "wide": torch.stack([layer[:, :hidden_size] for layer in layers]),
            "norm_narrow": torch.cat([norm[hidden_size:] for norm in norms]).view(-1, width),
            "narrow": torch.cat([layer[:, hidden_size:].flatten() for layer in layers]).view(-1, width, width),
        }
        head[-1] = head[-1][:1]
        channel.load_state_dict(state | {f"head.{i}.weight": tensor for i, tensor in enumerate(head)})
        return channel


def _numbered(state_dict: Mapping[str, Tensor], start: str, end: str, step: int = 1) -> list[Tensor]:
    """The tensors whose names are ``start``, a number or nothing, ``end``, in the order of the numbers 0, step, ..."""
    found = {}
    for name, tensor in state_dict.items():
        # With or without the model's own prefix.
        at = name.rfind(start)
        if at < 0 or not name.endswith(end):
            continue
        number = name[at + len(start) : -len(end)].strip(".")
        if number.isdecimal() or not number:
            found[int(number or 0)] = tensor
    numbers = sorted(found)
    if numbers != list(range(0, step * len(numbers), step)):
        missing = next(number for number in range(0, step * len(numbers), step) if number not in found)
        raise ValueError(f"state_dict must hold {start.rstrip('.')}.{missing}{end}, got the numbers {numbers}")
    return [found[number] for number in numbers]
