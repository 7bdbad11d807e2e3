"""A transformers model that scores its own tokens, and decodes with a look at what follows."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leafkernels._core.checks import check_integer, check_mask
from leafkernels.lookahead.reward_channel import LayerWeights, RewardChannel
from leafkernels.lookahead.search import Search, as_ids, search_all
from leafkernels.lookahead.stepper import TransformersStepper
from leafkernels.lookahead.trial import UnfitLayersError, base_of, check_layers

_CHANNEL, _SETTINGS = "reward_channel.safetensors", "reward_channel.json"


class RewardTransformer(nn.Module):
    """A causal language model of transformers with a reward channel beside its decoder (SLA, arXiv 2503.00029).

    Called as the model is, it returns what the model returns, logits equal to the bit, and ``rewards`` (B, T) beside
    them: how good the answer is up to each token. The channel runs in hooks on the decoder's layers, along with the
    model, and no hidden state is kept for it. It runs after them in two cases: where the decoder recomputes its layers
    in the backward pass, whose inputs are kept for that anyway, and in decoding on a GPU (``RewardChannel.is_fused``),
    where ``RewardChannel.fused`` takes all layers of the few tokens at once.

    A model none of whose parameters requires a gradient runs without one, and the channel with.

    Two tokens are run through a new one, which tells whether its layers are such as a channel reads.

    Args:
        model: a model with a decoder of layers, as Llama, Qwen, Mistral, Gemma, Phi and GPT-2 have it, or an audio or
            vision model around one; under PEFT too.
        channel: of as many layers and numbers a token as the decoder; None: a new one, 256 wide.

    Raises:
        TypeError: the channel is no ``RewardChannel``.
        ValueError: the model has no such decoder, or an encoder before it (T5, BART); its layers or its final norm pass
            on something else than (B, T, numbers) (Gemma 3n, OPT with a projection); or the channel is of another size.
    """

    def __init__(self, model: Any, channel: RewardChannel | None = None) -> None:
        super().__init__()
        decoder, layers = _find_decoder(model)
        if channel is not None and not isinstance(channel, RewardChannel):
            raise TypeError(f"channel must be a RewardChannel, got {type(channel).__name__}")
        config = model.config.get_text_config()
        if channel is None:
            eps = getattr(config, "rms_norm_eps", None) or 1e-6
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
        check_layers(self)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's forward, its output with ``rewards`` (B, T).

        Positions are the model's business: one with learnt ones (GPT-2) counts them from the first column, padding
        included, so that rows padded on the left need ``position_ids`` to be scored as they are alone.
        """
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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Mapping[str, Tensor] | None = None,
        width: int = 2,
        chunk: int = 10,
        depth: int = 2,
        max_new_tokens: int = 256,
        eos_token_ids: int | Iterable[int] | None = None,
        suppress_tokens: int | Iterable[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        tokenizer: Any = None,
        streamer: Any = None,
        with_end: bool = False,
        min_p: float = 0.0,
        packed: bool = True,
        max_branches: int = 256,
    ) -> Search:
        """Look ahead from one prompt as ``search`` does; ``width=1`` is greedy.

        Of the model's generation config its end tokens and its suppressed ones are taken, and nothing else:
        repetition penalties, ``no_repeat_ngram_size``, ``begin_suppress_tokens`` and other logits processors are not
        applied, so that with them the model's own ``generate(do_sample=False)`` gives other tokens. All modules are in
        evaluation mode meanwhile, and afterwards in the mode that they were in.

        Args:
            input_ids: (P,) or (1, P) integers, of the prompt; None: those in ``inputs``.
            attention_mask: of the same shape, 0 at padding; None: that in ``inputs``, or no padding.
            inputs: what the model reads of the prompt, as its processor gives it: ``input_features`` and
                ``feature_attention_mask`` of a Qwen2-Audio, for instance; ``input_ids`` and ``attention_mask`` too,
                where these are not given by themselves. When inputs of such names first come, two tokens are compared
                with those of the model's ``generate``, which reads the prompt once more.
            width, chunk, depth, max_new_tokens, with_end, min_p, max_branches: as in ``search``; the paper's first
                three are 2, 10, 2.
            eos_token_ids: one id or several; None: those of the model's generation config.
            suppress_tokens: ids that no branch takes; None: those of the model's generation config.
            stop_strings: one string or several, none of them empty; a branch whose text has come to hold one of them
                ends by "stop". They stay in the answer.
            tokenizer: which decodes the text for them.
            streamer: one of transformers, which is given each chunk when it is committed (``TextStreamer`` prints it).
            packed: as in ``TransformersStepper``.

        Raises:
            TypeError, ValueError: an argument is not what it must be, a reward is not finite, or no token's logit is.
                ValueError also where the model's own ``generate`` goes on in another way (``TransformersStepper``).
        """
        ids, mask, features = _apart(input_ids, attention_mask, inputs)
        if check_integer("input_ids", ids).dim() not in (1, 2) or ids.shape[:-1].numel() != 1:
            raise ValueError(
                f"input_ids must have shape (P,) or (1, P), for several prompts there is generate_all, got shape "
                f"{tuple(ids.shape)}"
            )
        (prompt_ids,) = _prompts(ids, mask, features)
        if streamer is not None:
            streamer.put(prompt_ids.cpu())
        (found,) = self.generate_all(
            [prompt_ids],
            inputs=features,
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
        input_ids: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Mapping[str, Tensor] | None = None,
        width: int = 2,
        chunk: int = 10,
        depth: int = 2,
        max_new_tokens: int = 256,
        eos_token_ids: int | Iterable[int] | None = None,
        suppress_tokens: int | Iterable[int] | None = None,
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
            input_ids: (B, P), or a list of B tensors of any length; None: those in ``inputs``.
            attention_mask: (B, P), 0 at padding on the left or on the right, where ``input_ids`` is a tensor.
            inputs: as in ``generate``, with the rows of all prompts in their order.
            on_commit: called with the number of the prompt and each chunk, when it is committed.
            others: as in ``generate``.
        """
        ids, mask, features = _apart(input_ids, attention_mask, inputs)
        if isinstance(ids, list | tuple):
            if mask is not None:
                raise ValueError("attention_mask must be None where input_ids is a list, whose prompts have no padding")
            prompts = list(ids)
        else:
            if check_integer("input_ids", ids).dim() != 2:
                raise ValueError(
                    f"input_ids must have shape (B, P) or be a list of tensors (P,), got shape {tuple(ids.shape)}"
                )
            prompts = _prompts(ids, mask, features)
        of_model = self.model.generation_config
        ends = _of_config(of_model.eos_token_id) if eos_token_ids is None else eos_token_ids
        suppressed = _of_config(of_model.suppress_tokens) if suppress_tokens is None else suppress_tokens
        is_stop = _holds(stop_strings, tokenizer)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return search_all(
                TransformersStepper(
                    self,
                    packed=packed,
                    inputs=features,
                    suppress_tokens=as_ids("suppress_tokens", suppressed),
                    max_new_tokens=max_new_tokens,
                ),
                prompts,
                width=width,
                chunk=chunk,
                depth=depth,
                max_new_tokens=max_new_tokens,
                eos_token_ids=ends,
                on_commit=on_commit,
                is_stop=is_stop,
                with_end=with_end,
                min_p=min_p,
                max_branches=max_branches,
            )
        finally:
            # Each its own: a frozen model may be in evaluation mode within a module that is in training mode.
            for module, was_training in modes:
                module.training = was_training

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
        with_end: bool = False,
        packed: bool = True,
        max_branches: int = 256,
        **inputs: Any,
    ) -> Tensor:
        """For ``model.generate(..., custom_generate=self.custom_generate, width=2, chunk=10, depth=2)``.

        From the generation config come the length, the end tokens, the suppressed ones, ``min_p`` and the padding (the
        end token where there is none); what else the model reads of its prompts, as the features of an audio model, is
        read here too. Nothing is sampled,
        and logits processors are not asked. transformers hands neither a streamer nor a tokenizer over: for a streamer
        and for stop strings there is ``generate``.

        Returns:
            (B, P + T) prompts and answers, padded on the right.

        Raises:
            ValueError: the model that calls has another decoder, a cache is not empty, or as in ``generate``.
        """
        # Under PEFT and torch.compile it is the model within that calls.
        if model.get_decoder() is not self._decoder[0]:
            raise ValueError("custom_generate must be called by the model that the channel runs beside")
        mask = inputs.pop("attention_mask", None)
        found = self.generate_all(
            input_ids,
            mask,
            inputs=self._features(input_ids, mask, inputs),
            width=width,
            chunk=chunk,
            depth=depth,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            eos_token_ids=_of_config(generation_config.eos_token_id),
            suppress_tokens=_of_config(generation_config.suppress_tokens),
            with_end=with_end,
            min_p=generation_config.min_p or 0.0,
            packed=packed,
            max_branches=max_branches,
        )
        answers = [torch.tensor(of_one.token_ids, device=input_ids.device) for of_one in found]
        # As transformers pads; without an end token no answer is shorter than another.
        padding = _of_config(generation_config.pad_token_id) or _of_config(generation_config.eos_token_id) or (0,)
        return torch.cat([input_ids, nn.utils.rnn.pad_sequence(answers, True, float(padding[0]))], dim=1)

    def _features(self, input_ids: Tensor, mask: Tensor | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of what ``generate`` hands over: what the model reads of the prompts; the stepper has a cache of its own."""
        from transformers import Cache

        features = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if isinstance(value, Cache):
                if value.get_seq_length():
                    raise ValueError(f"{name} must be empty, got a cache of {value.get_seq_length()} tokens")
                del features[name]
        positions = features.pop("position_ids", None)
        ask = getattr(base_of(self), "_prepare_position_ids_for_generation", None)
        if positions is not None and ask is not None:
            found = ask(input_ids, {**features, "attention_mask": torch.ones_like(input_ids) if mask is None else mask})
            if found.ndim != positions.ndim or not (found == positions).all():
                features["position_ids"] = positions
        return features

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
        """Read a channel; ``model`` is its base, loaded or by name (None: by the name in the folder).

        By name it is loaded with ``kwargs``, by ``AutoModelForCausalLM``, or else as the class that its config names.

        Raises:
            ValueError: the model is not of the kind and the sizes of the channel's base.
        """
        if model is None or isinstance(model, str):
            base = json.loads((Path(folder) / _SETTINGS).read_text(encoding="utf-8"))["base"]
            model = _load(model or base["name"], **kwargs)
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
        self._shape: torch.Size | None = None
        self.rewards: Tensor | None = None

    def take(self, layer: int, hidden: Tensor) -> None:
        self._check(hidden)
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


def _load(name: str, **kwargs: Any) -> Any:
    """A model by name; those that hear are no models for ``AutoModelForCausalLM``."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = transformers.AutoModelForCausalLM
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(name, **kwargs)
    except OSError:  # a folder that holds an adapter has no config
        config = {}
    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = getattr(transformers, (config.get("architectures") or [""])[0], kind)
    return kind.from_pretrained(name, **kwargs)


def _of_config(ids: Any) -> tuple[int, ...]:
    """What a generation config says of an id: none, one, or several."""
    return () if ids is None else as_ids("ids of the generation config", ids)


def _apart(input_ids: Any, attention_mask: Any, inputs: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Ids and mask, which may come in ``inputs``, and what else is there."""
    if not isinstance(inputs, Mapping | None):
        raise TypeError(f"inputs must be what a processor gives, tensors by name, got {type(inputs).__name__}")
    features = dict(inputs or {})
    found = {"input_ids": input_ids, "attention_mask": attention_mask}
    for name, value in found.items():
        if name in features and value is not None:
            raise ValueError(f"{name} must be given once, got it also in inputs")
        found[name] = features.pop(name, value)
    return found["input_ids"], found["attention_mask"], features


def _prompts(input_ids: Tensor, attention_mask: Any, features: Mapping[str, Any]) -> list[Tensor]:
    """Every row of (B, P), or of (P,) the one, without its padding."""
    mask = check_mask(attention_mask, "input_ids", input_ids.shape, input_ids.device, "attention_mask")
    if mask is None or mask.all():
        return list(torch.atleast_2d(input_ids))
    lengths = torch.atleast_2d(mask).sum(1, keepdim=True)
    is_left = torch.arange(mask.shape[-1], device=mask.device) >= mask.shape[-1] - lengths
    # Padded so, the prompts are run as they came, with what stands beside their tokens.
    if not (lengths.max() == mask.shape[-1] and torch.equal(is_left, torch.atleast_2d(mask))):
        for name, values in features.items():
            if getattr(values, "shape", ())[-mask.dim() :] == mask.shape:
                raise ValueError(f"inputs must hold nothing by token, as {name} does, where attention_mask has padding")
    return [ids[seen] for ids, seen in zip(torch.atleast_2d(input_ids), torch.atleast_2d(mask), strict=True)]


def _holds(stop_strings: str | Sequence[str], tokenizer: Any) -> Callable[[Sequence[int]], bool] | None:
    """Whether the text of a branch has come to hold one of the strings with its last token."""
    strings: list[Any] = list(stop_strings) if isinstance(stop_strings, list | tuple) else [stop_strings]
    if not strings:
        return None
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop_strings must be a string or a list of them, none of them empty, got {stop_strings!r}")
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


def _describe(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config()
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size")
    return {"name": model.config.name_or_path, "model_type": config.model_type} | {
        name: getattr(config, name) for name in sizes
    }
