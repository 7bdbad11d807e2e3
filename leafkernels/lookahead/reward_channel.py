"""The reward channel: a thin strip beside a frozen decoder that gives every token a reward (SLA, arXiv 2503.00029)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from leafkernels._core.checks import check_count, check_positive


class RewardChannel(nn.Module):
    """Rewards of tokens from what the layers of a decoder compute anyway.

        u_0 = silu(W_0 norm(h_0))    u_i = silu(W_i norm([h_i; u_{i-1}])) + u_{i-1}    r = head([h_n; u_{n-1}])

    h_0 is the input of the first layer, h_i that of layer i, h_n the output after the final norm; u has ``width``
    numbers; norm is RMSNorm over both parts together. Token by token, without attention.

    The channel computes in the dtype of its own parameters, whatever that of the hidden states.

    Args:
        num_layers: n, layers of the decoder, at least 1.
        hidden_size: D.
        width: R, of the channel.
        head_layers: linear layers of the head, with SiLU between.
        eps: of the norms; the decoder's, in the released code.
        head_width: of the head's inner layers; ``hidden_size`` unless given.
    """

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
        sizes = [hidden_size, *[hidden_size + width] * (num_layers - 1)]
        self.norms = nn.ModuleList(nn.RMSNorm(size, eps) for size in sizes)
        self.layers = nn.ModuleList(nn.Linear(size, width, bias=False) for size in sizes)
        of_head = [hidden_size + width, *[head_width] * (head_layers - 1), 1]
        self.head = nn.ModuleList(
            nn.Linear(size, out, bias=False) for size, out in zip(of_head[:-1], of_head[1:], strict=True)
        )
        if head_layers == 1:
            nn.init.normal_(next(self.head.parameters()), std=0.02)

    @property
    def settings(self) -> dict[str, int | float]:
        """The arguments that build a channel of these sizes."""
        names = ("num_layers", "hidden_size", "width", "head_layers", "eps", "head_width")
        return {name: getattr(self, name) for name in names}

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Rewards (B, T) of hidden states h_0 ... h_n, each (B, T, D)."""
        if len(hidden_states) != self.num_layers + 1:
            raise ValueError(
                f"hidden_states must hold {self.num_layers + 1} tensors, the inputs of {self.num_layers} layers and "
                f"the output after the final norm, got {len(hidden_states)}"
            )
        state = None
        for layer, hidden in enumerate(hidden_states[:-1]):
            state = self.step(layer, hidden, state)
        assert state is not None
        return self.reward(hidden_states[-1], state)

    def step(self, layer: int, hidden: Tensor, state: Tensor | None) -> Tensor:
        """u_i (B, T, R) from the input (B, T, D) of layer i and u_{i-1}; None before the first layer."""
        hidden = self._own(hidden)
        if state is None:
            return silu(self.layers[layer](self.norms[layer](hidden)))
        return silu(self.layers[layer](self.norms[layer](torch.cat([hidden, state], -1)))) + state

    def reward(self, hidden: Tensor, state: Tensor) -> Tensor:
        """Rewards (B, T) from the output (B, T, D) after the final norm and u_{n-1}."""
        found = self.head[0](torch.cat([self._own(hidden), state], -1))
        for layer in self.head[1:]:
            found = layer(silu(found))
        return found[..., 0]

    def _own(self, hidden: Tensor) -> Tensor:
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states must have {self.hidden_size} numbers a token, got {hidden.shape[-1]}")
        return hidden.to(next(self.head.parameters()).dtype)

    @classmethod
    def from_released(cls, state_dict: Mapping[str, Tensor], eps: float = 1e-6) -> "RewardChannel":
        """The channel of the authors' checkpoints, by their names of parameters; others are passed over.

        Their heads give several numbers and the first is the reward; the others are left out. ``eps`` is the
        ``rms_norm_eps`` of the decoder.
        """
        norms = _numbered(state_dict, "tt_layers.", ".tt_layernorm.weight")
        layers = _numbered(state_dict, "tt_layers.", ".tt_linear.weight")
        head = _numbered(state_dict, "sr_head", ".weight")
        if not norms or len(norms) != len(layers) or not head:
            raise ValueError(
                "state_dict must hold tt_layers.i.tt_layernorm.weight and tt_layers.i.tt_linear.weight of every layer, "
                f"and sr_head.weight or sr_head.i.weight, got {len(norms)}, {len(layers)} and {len(head)} of these"
            )
        width, hidden_size = layers[0].shape
        channel = cls(len(layers), hidden_size, width, len(head), eps, head[0].shape[0] if len(head) > 1 else None)
        head[-1] = head[-1][:1]
        channel.load_state_dict(
            {
                f"{part}.{i}.weight": tensor
                for part, of in (("norms", norms), ("layers", layers), ("head", head))
                for i, tensor in enumerate(of)
            }
        )
        return channel


def _numbered(state_dict: Mapping[str, Tensor], start: str, end: str) -> list[Tensor]:
    """The tensors whose names are ``start``, a number or nothing, ``end``, in the order of the numbers."""
    found = {}
    for name, tensor in state_dict.items():
        # With or without the model's own prefix.
        at = name.rfind(start)
        if at < 0 or not name.endswith(end):
            continue
        number = name[at + len(start) : -len(end)].strip(".")
        if number.isdecimal() or not number:
            found[int(number or 0)] = tensor
    return [found[number] for number in sorted(found)]
