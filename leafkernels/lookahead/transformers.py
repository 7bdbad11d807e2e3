"""A transformers model that scores its own tokens, and decodes with a look at what follows."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import make_dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leafkernels._core.checks import check_integer, check_mask
from leafkernels.lookahead.folder import check_base, load_base, read_channel, write_channel
from leafkernels.lookahead.reward_channel import LayerWeights, RewardChannel
from leafkernels.lookahead.search import Search, as_ids, search_all
from leafkernels.lookahead.stepper import TransformersStepper
from leafkernels.lookahead.trial import UnfitLayersError, base_of, check_layers
from leafkernels.models.asking import bare_model, evaluating

# What ``Trainer`` and the engines below it ask of a model. Not all that it has: what they do not allow a quantised
# model, as to be trained, a channel beside it may.
_OF_MODEL = {
    "_no_split_modules",
    "activation_checkpointing_disable",
    "activation_checkpointing_enable",
    "enable_input_require_grads",
    "get_input_embeddings",
    "get_output_embeddings",
    "gradient_checkpointing_disable",
    "gradient_checkpointing_enable",
    "main_input_name",
    "tie_weights",
}


class RewardTransformer(nn.Module):
    """A causal language model of transformers with a reward channel beside its decoder (SLA, arXiv 2503.00029).

    Called as the model is, it returns what the model returns, logits equal to the bit, and ``rewards`` (B, T) beside
    them, a field of the output: how good the answer is up to each token. The channel runs in hooks on the decoder's
    layers, along with the model, and no hidden state is kept for it. It runs after them in two cases: where the decoder
    recomputes its layers in the backward pass, whose inputs are kept for that anyway, and in decoding on a GPU
    (``RewardChannel.is_fused``), where ``RewardChannel.fused`` takes all layers of the few tokens at once. The hooks
    leave the model when the ``RewardTransformer`` goes. It may be called in several threads, be copied and pickled.

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
        self._hooks = _Hooks(decoder, layers)
        check_layers(self)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def get_base_model(self) -> Any:
        """The model of transformers, without the channel, and without an adapter, as PEFT's models give it."""
        return bare_model(self.model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name) if name in _OF_MODEL else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's forward, its output with ``rewards`` (B, T).

        Positions are the model's business: one with learnt ones (GPT-2) counts them from the first column, padding
        included, so that rows padded on the left need ``position_ids`` to be scored as they are alone.
        """
        is_frozen = not any(parameter.requires_grad for parameter in self.model.parameters())
        # Layers that the backward pass computes again call their hooks again: then this run is over.
        decoder = self._hooks.decoder
        recomputes = bool(getattr(decoder, "gradient_checkpointing", False)) and decoder.training
        around, run = _HERE.run, _Run(self._hooks.key, self.channel, torch.is_grad_enabled(), recomputes)
        _HERE.run = run
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
                output = self.model(*args, **kwargs, return_dict=True)
        finally:
            _HERE.run = around
        if run.rewards is None:
            raise RuntimeError(
                f"model must run the {self.channel.num_layers} layers that it had when it got its channel, got an "
                f"output of {run.taken} of them"
            )
        return _with_rewards(type(output))(**{**output, "rewards": run.rewards})

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
        packed: bool | None = None,
        max_branches: int = 256,
    ) -> Search:
        """Look ahead from one prompt as ``search`` does; ``width=1`` is greedy.

        Of the model's generation config its end tokens and its suppressed ones are taken, and nothing else:
        repetition penalties, ``no_repeat_ngram_size``, ``begin_suppress_tokens`` and other logits processors are not
        applied, so that with them the model's own ``generate(do_sample=False)`` gives other tokens. All modules are in
        evaluation mode meanwhile, in other threads too, and afterwards in the mode that they were in.

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
                ends by "stop". They stay in the answer. A space before the first token is part of the text.
            tokenizer: which decodes the text for them.
            streamer: one of transformers, which is given the prompt when it has run, and each chunk when it is
                committed (``TextStreamer`` prints it). It is ended also where this raises.
            packed: as in ``TransformersStepper``.

        Raises:
            TypeError, ValueError: an argument is not what it must be, a reward is not finite, or no token's logit is.
                ValueError also where the model's own ``generate`` goes on in another way (``TransformersStepper``).
        """
        with _ended_on_error(streamer):
            ids, mask, features = _apart(input_ids, attention_mask, inputs)
            if check_integer("input_ids", ids).dim() not in (1, 2) or ids.shape[:-1].numel() != 1:
                raise ValueError(
                    f"input_ids must have shape (P,) or (1, P), for several prompts there is generate_all, got shape "
                    f"{tuple(ids.shape)}"
                )
            (found,) = self._search(
                _prompts(ids, mask, features),
                features,
                suppress_tokens,
                stop_strings,
                tokenizer,
                packed,
                streamer=streamer,
                width=width,
                chunk=chunk,
                depth=depth,
                max_new_tokens=max_new_tokens,
                eos_token_ids=eos_token_ids,
                with_end=with_end,
                min_p=min_p,
                max_branches=max_branches,
            )
        if streamer is not None:
            streamer.end()
        return found

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
        packed: bool | None = None,
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
        return self._search(
            prompts,
            features,
            suppress_tokens,
            stop_strings,
            tokenizer,
            packed,
            on_commit=on_commit,
            width=width,
            chunk=chunk,
            depth=depth,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            with_end=with_end,
            min_p=min_p,
            max_branches=max_branches,
        )

    @torch.no_grad()
    def _search(
        self,
        prompts: list[Any],
        features: Mapping[str, Tensor],
        suppress_tokens: Any,
        stop_strings: Any,
        tokenizer: Any,
        packed: bool | None,
        *,
        eos_token_ids: Any,
        streamer: Any = None,
        on_commit: Callable[[int, list[int]], None] | None = None,
        **options: Any,
    ) -> list[Search]:
        """``search_all`` of checked arguments; ``streamer`` is told of the only prompt."""
        # A token that stands for an image or a recording may be none of the embedding's.
        embedding = None if features else self.model.get_input_embeddings()
        prompts = [_checked(ids, embedding) for ids in prompts]
        of_model, vocabulary = self.model.generation_config, _count_logits(self.model)
        if suppress_tokens is None:
            suppressed = self._suppressed(of_model)
        else:
            suppressed = as_ids("suppress_tokens", suppress_tokens)
            for token in suppressed:
                if not 0 <= token < vocabulary:
                    raise ValueError(f"suppress_tokens must lie between 0 and {vocabulary - 1}, got {token}")
        ends = _of_config(of_model.eos_token_id) if eos_token_ids is None else eos_token_ids
        is_stop = holds_any(stop_strings, tokenizer)
        with evaluating(self):
            stepper: Any = TransformersStepper(
                self,
                packed=packed,
                inputs=features,
                suppress_tokens=suppressed,
                max_new_tokens=options["max_new_tokens"],
            )
            if streamer is not None:
                stepper = _Streamed(stepper, prompts[0], streamer)
                on_commit = stepper.on_commit
            return search_all(stepper, prompts, eos_token_ids=ends, on_commit=on_commit, is_stop=is_stop, **options)

    def _suppressed(self, config: Any) -> tuple[int, ...]:
        """What a generation config suppresses; transformers too passes over ids that the model does not have."""
        return tuple(token for token in _of_config(config.suppress_tokens) if 0 <= token < _count_logits(self.model))

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
        packed: bool | None = None,
        max_branches: int = 256,
        **inputs: Any,
    ) -> Tensor:
        """For ``model.generate(..., custom_generate=self.custom_generate, width=2, chunk=10, depth=2)``.

        From the generation config come the length, the end tokens, the suppressed ones, ``min_p`` and the padding (the
        end token where there is none); what else the model reads of its prompts, as the features of an audio model, is
        read here too. Nothing is sampled, and logits processors are not asked. transformers hands neither a streamer
        nor a tokenizer over: for a streamer and for stop strings there is ``generate``.

        Returns:
            (B, P + T) prompts and answers, padded on the right.

        Raises:
            ValueError: the model that calls has another decoder, a cache is not empty, or as in ``generate``.
        """
        # Under PEFT and torch.compile it is the model within that calls.
        if model.get_decoder() is not self._hooks.decoder:
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
            suppress_tokens=self._suppressed(generation_config),
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
        write_channel(folder, self.channel.settings, self.channel.state_dict(), self.model)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: Any = None, **kwargs: Any) -> "RewardTransformer":
        """Read a channel; ``model`` is its base, loaded or by name (None: by the name in the folder).

        By name it is loaded with ``kwargs``, by ``AutoModelForCausalLM``, or else as the class that its config names.
        Code that comes with it runs with ``trust_remote_code=True`` only, and nobody is asked.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the folder is damaged, or the model is not of the kind and the sizes of the channel's base.
        """
        channel, base = read_channel(folder)
        if model is None and not base["name"]:
            raise ValueError(f"model must be given: the channel in {folder} was saved beside a model without a name")
        if model is None or isinstance(model, str | PathLike):
            model = load_base(str(model or base["name"]), **kwargs)
        check_base(folder, base, model)
        return cls(model, channel.to(next(model.parameters()).device))

    @staticmethod
    def read_channel(folder: str | Path, model: Any) -> RewardChannel:
        """The channel in a folder, on the CPU; raises as ``from_pretrained`` does."""
        channel, base = read_channel(folder)
        check_base(folder, base, model)
        return channel


_OUTPUTS: dict[type[Any], type[Any]] = {}


@torch.compiler.assume_constant_result
def _with_rewards(kind: type[Any]) -> type[Any]:
    """An output class of transformers with one field more; DDP builds an output anew, by its declared fields."""
    found = _OUTPUTS.get(kind)
    if found is None:

        def reduce(output: Any) -> tuple[Any, ...]:  # no module has the class, to be pickled by its name
            return _rebuild, (kind, dict(output))

        field, own = ("rewards", Any, None), {"__module__": __name__, "__reduce__": reduce}
        found = make_dataclass(f"{kind.__name__}WithRewards", [field], bases=(kind,), namespace=own)
    return _OUTPUTS.setdefault(kind, found)


def _rebuild(kind: type[Any], fields: dict[str, Any]) -> Any:
    return _with_rewards(kind)(**fields)


class _Here(threading.local):
    """The run of the forward pass that this thread is in."""

    run: "_Run | None" = None


_HERE = _Here()


class _Key:
    """What a run and the hooks that are meant for it share: a model may have several channels."""


class _Hooks:
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
    run = _HERE.run
    if run is not None and run.key is key:
        run.take(number, args[0] if args else kwargs["hidden_states"])


def _after_decoder(key: _Key, _: nn.Module, __: Any, output: Any) -> None:
    run = _HERE.run
    if run is not None and run.key is key:
        run.finish(output[0] if isinstance(output, tuple) else output.last_hidden_state)


@contextmanager
def _ended_on_error(streamer: Any) -> Iterator[None]:
    """Another thread may wait for what the streamer gives."""
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(f"streamer must have put and end, as those of transformers, got {type(streamer).__name__}")
    try:
        yield
    except BaseException:
        if streamer is not None:
            with suppress(Exception):  # the streamer may be what failed
                streamer.end()
        raise


class _Streamed:
    """A stepper that gives a streamer the prompt when its forward lies behind: then nothing was wrong with the call."""

    def __init__(self, stepper: TransformersStepper, prompt_ids: Tensor, streamer: Any) -> None:
        self._stepper, self._prompt_ids, self._streamer = stepper, prompt_ids, streamer
        self._has_prompt = False

    def prefill(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self._stepper.prefill(prompts)

    def extend(self, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        self._put_prompt()
        return self._stepper.extend(parents, token_ids)

    def on_commit(self, _: int, token_ids: list[int]) -> None:
        self._put_prompt()
        self._streamer.put(torch.tensor(token_ids))

    def _put_prompt(self) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            self._streamer.put(self._prompt_ids.cpu())


class _Run:
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


def _checked(prompt_ids: Any, embedding: Any) -> Tensor:
    """(P,) int64, of ids that the model has."""
    ids = check_integer("prompt_ids", prompt_ids).long()
    if ids.dim() != 1 or not ids.numel():
        raise ValueError(f"prompt_ids must have shape (P,) with P at least 1, got shape {tuple(ids.shape)}")
    least, most = (int(value) for value in ids.aminmax())
    rows = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else most + 1
    if least < 0 or most >= rows:
        raise ValueError(f"prompt_ids must lie between 0 and {rows - 1}, got {least if least < 0 else most}")
    return ids


def _count_logits(model: Any) -> int:
    head = getattr(model.get_output_embeddings(), "weight", None)
    rows = 0 if head is None else int(head.shape[0])  # 0 also where DeepSpeed keeps it in parts
    return rows or int(model.config.get_text_config().vocab_size)


def holds_any(stop_strings: str | Sequence[str], tokenizer: Any) -> Callable[[Sequence[int]], bool] | None:
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
        tail = list(token_ids[-most:])
        texts = [tokenizer.decode(tail)]
        if len(tail) == len(token_ids):
            # Of the first token too a tokenizer may drop the space; behind another one, here itself, it does not.
            first, twice = tokenizer.decode(tail[:1]), tokenizer.decode(tail[:1] + tail)
            texts += [twice[len(first) :]] if twice.startswith(first) else []
        return any(string in text for string in strings for text in texts)

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
