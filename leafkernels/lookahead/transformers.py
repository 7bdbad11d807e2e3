"""A transformers model that scores its own tokens, and decodes with a look at what follows."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leafkernels.lookahead.reward_channel import LayerWeights, RewardChannel
from leafkernels.lookahead.search import Search, search
from leafkernels.lookahead.stepper import TransformersStepper

_CHANNEL, _SETTINGS = "reward_channel.safetensors", "reward_channel.json"


class RewardTransformer(nn.Module):
    """A causal language model of transformers with a reward channel beside its decoder (SLA, arXiv 2503.00029).

    Called as the model is, it returns what the model returns, logits equal to the bit, and ``rewards`` (B, T) beside
    them: how good the answer is up to each token. The channel runs in hooks on the decoder's layers, along with the
    model, and no hidden state is kept for it. It runs after them in two cases: where the decoder recomputes its layers
    in the backward pass, whose inputs are kept for that anyway, and in decoding on a GPU (``RewardChannel.is_fused``),
    where ``RewardChannel.fused`` takes all layers of the few tokens at once.

    A model none of whose parameters requires a gradient runs without one, and the channel with.

    Args:
        model: a model with a decoder of layers, as Llama, Qwen, Mistral, Gemma, Phi and GPT-2 have it, or an audio or
            vision model around one; under PEFT too.
        channel: of as many layers and numbers a token as the decoder; None: a new one, 256 wide.

    Raises:
        ValueError: the model has no such decoder, or the channel is of another size.
    """

    def __init__(self, model: Any, channel: RewardChannel | None = None) -> None:
        super().__init__()
        decoder, layers = _find_decoder(model)
        config = model.config.get_text_config()
        if channel is None:
            eps = getattr(config, "rms_norm_eps", 1e-6)
            channel = RewardChannel(len(layers), config.hidden_size, eps=eps).to(next(decoder.parameters()).device)
        sizes = (channel.num_layers, channel.hidden_size)
        if sizes != (len(layers), config.hidden_size):
            raise ValueError(
                f"channel must be of {len(layers)} layers and {config.hidden_size} numbers a token, as the model is, "
                f"got {sizes[0]} and {sizes[1]}"
            )
        self.model, self.channel = model, channel
        self._decoder = [decoder]  # in a list: it is a module of the model's already
        self._run: _Run | None = None
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._before_layer(number), with_kwargs=True)
        decoder.register_forward_hook(self._after_decoder)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's forward, its output with ``rewards`` (B, T)."""
        is_frozen = not any(parameter.requires_grad for parameter in self.model.parameters())
        with self._running() as run, torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            output = self.model(*args, **kwargs, return_dict=True)
        output["rewards"] = run.rewards
        return output

    @contextmanager
    def _running(self) -> "Iterator[_Run]":
        # Layers that the backward pass computes again call their hooks again: then there is no run.
        decoder = self._decoder[0]
        recomputes = bool(getattr(decoder, "gradient_checkpointing", False)) and decoder.training
        self._run = _Run(self.channel, torch.is_grad_enabled(), recomputes)
        try:
            yield self._run
        finally:
            self._run = None

    def _before_layer(self, number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._run is not None:
                self._run.take(number, args[0] if args else kwargs["hidden_states"])

        return hook

    def _after_decoder(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._run is not None:
            self._run.finish(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        width: int = 2,
        chunk: int = 10,
        depth: int = 2,
        max_new_tokens: int = 256,
        eos_token_ids: Iterable[int] | None = None,
        streamer: Any = None,
        packed: bool = True,
        max_branches: int = 256,
    ) -> Search:
        """Look ahead from one prompt, (P,) or (1, P) without padding, as ``search`` does; ``width=1`` is greedy.

        Args:
            input_ids: of the prompt.
            width, chunk, depth, max_new_tokens, max_branches: as in ``search``; the paper's are 2, 10, 2.
            eos_token_ids: None: those of the model's generation config.
            streamer: one of transformers, which is given each chunk when it is committed (``TextStreamer`` prints it).
            packed: as in ``TransformersStepper``.
        """
        prompt_ids = input_ids[0] if input_ids.dim() == 2 and input_ids.shape[0] == 1 else input_ids
        if eos_token_ids is None:
            of_model = self.model.generation_config.eos_token_id
            eos_token_ids = () if of_model is None else of_model if isinstance(of_model, list) else (of_model,)
        if streamer is not None:
            streamer.put(prompt_ids.cpu())
        was_training = self.training
        self.eval()
        try:
            found = search(
                TransformersStepper(self, packed=packed),
                prompt_ids,
                width=width,
                chunk=chunk,
                depth=depth,
                max_new_tokens=max_new_tokens,
                eos_token_ids=tuple(eos_token_ids),
                on_commit=None if streamer is None else lambda ids: streamer.put(torch.tensor(ids)),
                max_branches=max_branches,
            )
        finally:
            self.train(was_training)
        if streamer is not None:
            streamer.end()
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the channel alone, and which base it belongs to, into a folder."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.channel.state_dict().items()}
        save_file(state, folder / _CHANNEL)
        settings = {"channel": self.channel.settings, "base": _describe(self.model)}
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: Any = None, **kwargs: Any) -> "RewardTransformer":
        """Read a channel; ``model`` is its base, loaded or by name (None: by the name in the folder, with ``kwargs``).

        Raises:
            ValueError: the model is not of the kind and the sizes of the channel's base.
        """
        if model is None or isinstance(model, str):
            from transformers import AutoModelForCausalLM

            base = json.loads((Path(folder) / _SETTINGS).read_text(encoding="utf-8"))["base"]
            model = AutoModelForCausalLM.from_pretrained(model or base["name"], **kwargs)
        return cls(model, cls.read_channel(folder, model).to(next(model.parameters()).device))

    @staticmethod
    def read_channel(folder: str | Path, model: Any) -> RewardChannel:
        """The channel in a folder, on the CPU; raises ValueError where ``model`` is not its base."""
        from safetensors.torch import load_file

        settings = json.loads((Path(folder) / _SETTINGS).read_text(encoding="utf-8"))
        base, found = settings["base"], _describe(model)
        differing = [name for name in base if name != "name" and base[name] != found[name]]
        if differing:
            raise ValueError(
                f"model must be the base of the channel in {folder}, {base['name']!r}, of "
                f"{', '.join(f'{name} {base[name]}' for name in differing)}, got "
                f"{', '.join(f'{name} {found[name]}' for name in differing)}"
            )
        channel = RewardChannel(**settings["channel"])
        channel.load_state_dict(load_file(Path(folder) / _CHANNEL))
        return channel


class _Run:
    """The channel along one forward pass."""

    def __init__(self, channel: RewardChannel, with_grad: bool, afterwards: bool) -> None:
        self._channel, self._with_grad, self._afterwards = channel, with_grad, afterwards
        self._kept: list[Tensor] | None = None
        self._layers: list[LayerWeights] = []
        self._state: Tensor | None = None
        self.rewards: Tensor | None = None

    def take(self, layer: int, hidden: Tensor) -> None:
        if layer == 0:
            self._kept = [] if self._afterwards or self._channel.is_fused(hidden) else None
        if self._kept is not None:
            # As transformers keeps them for output_hidden_states: its layers do not write to what they read.
            self._kept.append(hidden)
            return
        with torch.set_grad_enabled(self._with_grad):
            if layer == 0:
                self._layers = self._channel.by_layer()
            self._state = self._channel.step(self._layers[layer], hidden, self._state)

    def finish(self, hidden: Tensor) -> None:
        with torch.set_grad_enabled(self._with_grad):
            if self._kept is not None:
                self.rewards = self._channel([*self._kept, hidden])
            else:
                assert self._state is not None
                self.rewards = self._channel.reward(hidden, self._state)


def _find_decoder(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The module whose output is that of the final norm, and the list of its layers, found by their number."""
    kind = type(model).__name__
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise ValueError(f"model must be a language model of transformers, got {kind}")
    decoder = model.get_decoder()
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(found) != 1:
        raise ValueError(
            f"model must have a decoder with one list of its {count} layers, got {kind} whose decoder, "
            f"{type(decoder).__name__}, has {len(found)}"
        )
    return decoder, found[0]


def _describe(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config()
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size")
    return {"name": model.config.name_or_path, "model_type": config.model_type} | {
        name: getattr(config, name) for name in sizes
    }
