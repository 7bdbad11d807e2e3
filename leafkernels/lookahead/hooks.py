"""The channel along a model's forward pass: hooks on the layers of a decoder, and the run that they tell.

Hooks belong to a model, runs to a thread.
"""

import threading
from collections.abc import Iterable
from dataclasses import make_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from leafkernels.lookahead.reward_channel import LayerWeights, RewardChannel
from leafkernels.lookahead.trial import UnfitLayersError


def find_decoder(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The module whose output is that of the final norm, and the list of its layers, found by their number."""
    kind = type(model).__name__
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise ValueError(f"model must be a language model of transformers, got {kind}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model must be a decoder alone, which reads prompt and answer, got {kind}, an encoder-decoder"
        )
    decoder = model.get_decoder()
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(found) != 1:
        raise ValueError(
            f"model must have a decoder with one list of its {count} layers, got {kind} whose decoder, "
            f"{type(decoder).__name__}, has {len(found)}"
        )
    return decoder, found[0]


_OUTPUTS: dict[type[Any], type[Any]] = {}


@torch.compiler.assume_constant_result
def with_rewards(kind: type[Any]) -> type[Any]:
    """An output class of transformers with one field more; DDP builds an output anew, by its declared fields."""
    found = _OUTPUTS.get(kind)
    if found is None:

        def reduce(output: Any) -> tuple[Any, ...]:  # no module has the class, to be pickled by its name
            return _rebuild, (kind, dict(output))

        field, own = ("rewards", Any, None), {"__module__": __name__, "__reduce__": reduce}
        found = make_dataclass(f"{kind.__name__}WithRewards", [field], bases=(kind,), namespace=own)
    return _OUTPUTS.setdefault(kind, found)


def _rebuild(kind: type[Any], fields: dict[str, Any]) -> Any:
    return with_rewards(kind)(**fields)


class _Here(threading.local):
    """The run of the forward pass that this thread is in."""

    run: "Run | None" = None


HERE = _Here()


class _Key:
    """What a run and the hooks that are meant for it share: a model may have several channels."""


class Hooks:
    """Hooks that tell the run of their thread what a decoder's layers read; they go when this object goes.

    They hold the key alone, so that they keep nothing alive, and copy and pickle along with the model.
    """

    def __init__(self, decoder: nn.Module, layers: Iterable[nn.Module]) -> None:
        self.decoder, self.key = decoder, _Key()
        self._handles = [
            layer.register_forward_pre_hook(partial(_before_layer, self.key, number), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]
        self._handles.append(decoder.register_forward_hook(partial(_after_decoder, self.key)))

    def __del__(self) -> None:
        for handle in self._handles:
            handle.remove()


def _before_layer(key: _Key, number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    run = HERE.run
    if run is not None and run.key is key:
        run.take(number, args[0] if args else kwargs["hidden_states"])


def _after_decoder(key: _Key, _: nn.Module, __: Any, output: Any) -> None:
    run = HERE.run
    if run is not None and run.key is key:
        run.finish(output[0] if isinstance(output, tuple) else output.last_hidden_state)


class Run:
    """The channel along one forward pass."""

    def __init__(self, key: _Key, channel: RewardChannel, with_grad: bool, afterwards: bool) -> None:
        self.key = key
        self._channel, self._with_grad, self._afterwards = channel, with_grad, afterwards
        self._kept: list[Tensor] | None = None
        self._layers: list[LayerWeights] = []
        self._state: Tensor | None = None
        self._shape: torch.Size | None = None
        self.taken = 0  # layers
        self.rewards: Tensor | None = None

    def take(self, layer: int, hidden: Tensor) -> None:
        self.taken += 1
        self._check(hidden)
        if layer == 0:
            # ZeRO-3 has the weights in one piece only where the channel is called as a whole.
            is_spread = hasattr(self._channel.wide, "ds_id")
            self._kept = [] if self._afterwards or is_spread or self._channel.is_fused(hidden) else None
        if self._kept is not None:
            # As transformers keeps them for output_hidden_states: its layers do not write to what they read.
            self._kept.append(hidden)
            return
        with torch.set_grad_enabled(self._with_grad):
            if layer == 0:
                self._layers = self._channel.by_layer()
            self._state = self._channel.step(self._layers[layer], hidden, self._state)

    def finish(self, hidden: Tensor) -> None:
        if self.taken != self._channel.num_layers:
            return
        self._check(hidden)
        with torch.set_grad_enabled(self._with_grad):
            if self._kept is not None:
                self.rewards = self._channel([*self._kept, hidden])
            else:
                assert self._state is not None
                self.rewards = self._channel.reward(hidden, self._state)

    def _check(self, hidden: Tensor) -> None:
        size = self._channel.hidden_size
        self._shape = hidden.shape if self._shape is None else self._shape
        if hidden.dim() != 3 or hidden.shape[-1] != size or hidden.shape != self._shape:
            raise UnfitLayersError(
                f"model must have a decoder whose layers and final norm all pass on (B, T, {size}), got shape "
                f"{tuple(hidden.shape)}{'' if hidden.shape == self._shape else f' behind {tuple(self._shape)}'}"
            )
