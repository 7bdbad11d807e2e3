"""A transformers model that scores its own tokens, and decodes with a look at what follows."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leafkernels.lookahead.reward_channel import LayerWeights, RewardChannel
from leafkernels.lookahead.search import Search, search_all
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

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        inputs: Mapping[str, Tensor] | None = None,
        width: int = 2,
        chunk: int = 10,
        depth: int = 2,
        max_new_tokens: int = 256,
        eos_token_ids: Iterable[int] | None = None,
        suppress_tokens: Iterable[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        tokenizer: Any = None,
        streamer: Any = None,
        with_end: bool = False,
        min_p: float = 0.0,
        packed: bool = True,
        max_branches: int = 256,
    ) -> Search:
        """Look ahead from one prompt as ``search`` does; ``width=1`` is greedy.

        Args:
            input_ids: (P,) or (1, P), of the prompt.
            attention_mask: of the same shape, 0 at padding.
            inputs: what else the model reads of the prompt, as its processor gives it: ``input_features`` and
                ``feature_attention_mask`` of a Qwen2-Audio, for instance.
            width, chunk, depth, max_new_tokens, with_end, min_p, max_branches: as in ``search``; the paper's first
                three are 2, 10, 2.
            eos_token_ids: None: those of the model's generation config.
            suppress_tokens: ids that no branch takes; None: those of the model's generation config.
            stop_strings: a branch whose text has come to hold one of them ends by "stop". They stay in the answer.
            tokenizer: which decodes the text for them.
            streamer: one of transformers, which is given each chunk when it is committed (``TextStreamer`` prints it).
            packed: as in ``TransformersStepper``.
        """
        if input_ids.dim() not in (1, 2) or (input_ids.dim() == 2 and input_ids.shape[0] != 1):
            raise ValueError(
                f"input_ids must have shape (P,) or (1, P), for several prompts there is generate_all, got shape "
                f"{tuple(input_ids.shape)}"
            )
        (prompt_ids,) = _prompts(torch.atleast_2d(input_ids), attention_mask)
        if streamer is not None:
            streamer.put(prompt_ids.cpu())
        (found,) = self.generate_all(
            [prompt_ids],
            inputs=inputs,
            width=width,
            chunk=chunk,
            depth=depth,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            suppress_tokens=suppress_tokens,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            on_commit=None if streamer is None else lambda _, ids: streamer.put(torch.tensor(ids)),
            with_end=with_end,
            min_p=min_p,
            packed=packed,
            max_branches=max_branches,
        )
        if streamer is not None:
            streamer.end()
        return found

    @torch.no_grad()
    def generate_all(
        self,
        input_ids: Tensor | Sequence[Tensor],
        attention_mask: Tensor | None = None,
        *,
        inputs: Mapping[str, Tensor] | None = None,
        width: int = 2,
        chunk: int = 10,
        depth: int = 2,
        max_new_tokens: int = 256,
        eos_token_ids: Iterable[int] | None = None,
        suppress_tokens: Iterable[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        tokenizer: Any = None,
        on_commit: Callable[[int, list[int]], None] | None = None,
        with_end: bool = False,
        min_p: float = 0.0,
        packed: bool = True,
        max_branches: int = 256,
    ) -> list[Search]:
        """``generate`` for several prompts in the same forwards, each with its own tree (``search_all``).

        Args:
            input_ids: (B, P), or B tensors of any length.
            attention_mask: (B, P), 0 at padding on the left or on the right, where ``input_ids`` is a tensor.
            inputs: as in ``generate``, with the rows of all prompts in their order.
            on_commit: called with the number of the prompt and each chunk, when it is committed.
            others: as in ``generate``.
        """
        prompts = _prompts(input_ids, attention_mask) if isinstance(input_ids, Tensor) else list(input_ids)
        if eos_token_ids is None:
            eos_token_ids = _as_ids(self.model.generation_config.eos_token_id)
        if suppress_tokens is None:
            suppress_tokens = _as_ids(self.model.generation_config.suppress_tokens)
        was_training = self.training
        self.eval()
        try:
            return search_all(
                TransformersStepper(self, packed=packed, inputs=inputs, suppress_tokens=tuple(suppress_tokens)),
                prompts,
                width=width,
                chunk=chunk,
                depth=depth,
                max_new_tokens=max_new_tokens,
                eos_token_ids=tuple(eos_token_ids),
                on_commit=on_commit,
                is_stop=_holds(stop_strings, tokenizer),
                with_end=with_end,
                min_p=min_p,
                max_branches=max_branches,
            )
        finally:
            self.train(was_training)

    def custom_generate(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        width: int = 2,
        chunk: int = 10,
        depth: int = 2,
        tokenizer: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """For ``model.generate(..., custom_generate=self.custom_generate, width=2, chunk=10, depth=2)``.

        From the generation config come the length, the end tokens, the suppressed ones, the stop strings and the
        padding. Nothing is sampled, and logits processors are not asked. transformers hands no streamer over:
        ``generate`` has one.

        Returns:
            (B, P + T) prompts and answers, padded on the right.
        """
        if model is not self.model:
            raise ValueError("custom_generate must be called by the model that the channel runs beside")
        found = self.generate_all(
            input_ids,
            inputs.get("attention_mask"),
            width=width,
            chunk=chunk,
            depth=depth,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            eos_token_ids=_as_ids(generation_config.eos_token_id),
            suppress_tokens=_as_ids(generation_config.suppress_tokens),
            stop_strings=generation_config.stop_strings or (),
            tokenizer=tokenizer,
        )
        answers = [torch.tensor(of_one.token_ids, device=input_ids.device) for of_one in found]
        padding = _as_ids(generation_config.pad_token_id) or (0,)
        return torch.cat([input_ids, nn.utils.rnn.pad_sequence(answers, True, float(padding[0]))], dim=1)

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


def _as_ids(of_config: Any) -> tuple[int, ...]:
    """What a generation config says of an id: none, one, or several."""
    if of_config is None:
        return ()
    return tuple(of_config) if isinstance(of_config, list) else (int(of_config),)


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """Every row (B, P) without its padding."""
    if attention_mask is None:
        return list(input_ids)
    return [ids[mask] for ids, mask in zip(input_ids, attention_mask.view(input_ids.shape).bool(), strict=True)]


def _holds(stop_strings: str | Sequence[str], tokenizer: Any) -> Callable[[Sequence[int]], bool] | None:
    """Whether the text of a branch has come to hold one of the strings with its last token."""
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    if not strings:
        return None
    if tokenizer is None:
        raise ValueError("tokenizer must be given with stop_strings, got None")
    # A token has a byte of text at least, but for a few that show as nothing. Where the tail begins amid a character
    # or drops a space, that is before the string.
    most = max(len(string.encode()) for string in strings) + 16

    def holds(token_ids: Sequence[int]) -> bool:
        text = tokenizer.decode(list(token_ids[-most:]))
        return any(string in text for string in strings)

    return holds


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
