"""A transformers model that scores its own tokens, and decodes with a look at what follows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leafkernels._core.checks import check_integer
from leafkernels.lookahead.folder import check_base, load_base, read_channel, write_channel
from leafkernels.lookahead.hooks import HERE, Hooks, Run, find_decoder, with_rewards
from leafkernels.lookahead.inputs import (
    Streamed,
    check_prompt,
    ended_on_error,
    holds_any,
    ids_and_features,
    ids_of_config,
    without_padding,
)
from leafkernels.lookahead.reward_channel import RewardChannel
from leafkernels.lookahead.search import Search, as_ids, search_all
from leafkernels.lookahead.stepper import TransformersStepper
from leafkernels.lookahead.trial import base_of, check_layers
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
        decoder, layers = find_decoder(model)
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
        self._hooks = Hooks(decoder, layers)
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
        around, run = HERE.run, Run(self._hooks.key, self.channel, torch.is_grad_enabled(), recomputes)
        HERE.run = run
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
                output = self.model(*args, **kwargs, return_dict=True)
        finally:
            HERE.run = around
        if run.rewards is None:
            raise RuntimeError(
                f"model must run the {self.channel.num_layers} layers that it had when it got its channel, got an "
                f"output of {run.taken} of them"
            )
        return with_rewards(type(output))(**{**output, "rewards": run.rewards})

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
        with ended_on_error(streamer):
            ids, mask, features = ids_and_features(input_ids, attention_mask, inputs)
            if check_integer("input_ids", ids).dim() not in (1, 2) or ids.shape[:-1].numel() != 1:
                raise ValueError(
                    f"input_ids must have shape (P,) or (1, P), for several prompts there is generate_all, got shape "
                    f"{tuple(ids.shape)}"
                )
            (found,) = self._search(
                without_padding(ids, mask, features),
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
        ids, mask, features = ids_and_features(input_ids, attention_mask, inputs)
        if isinstance(ids, list | tuple):
            if mask is not None:
                raise ValueError("attention_mask must be None where input_ids is a list, whose prompts have no padding")
            prompts = list(ids)
        else:
            if check_integer("input_ids", ids).dim() != 2:
                raise ValueError(
                    f"input_ids must have shape (B, P) or be a list of tensors (P,), got shape {tuple(ids.shape)}"
                )
            prompts = without_padding(ids, mask, features)
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
        prompts = [check_prompt(ids, embedding) for ids in prompts]
        of_model, vocabulary = self.model.generation_config, _count_logits(self.model)
        if suppress_tokens is None:
            suppressed = self._suppressed(of_model)
        else:
            suppressed = as_ids("suppress_tokens", suppress_tokens)
            for token in suppressed:
                if not 0 <= token < vocabulary:
                    raise ValueError(f"suppress_tokens must lie between 0 and {vocabulary - 1}, got {token}")
        ends = ids_of_config(of_model.eos_token_id) if eos_token_ids is None else eos_token_ids
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
                stepper = Streamed(stepper, prompts[0], streamer)
                on_commit = stepper.on_commit
            return search_all(stepper, prompts, eos_token_ids=ends, on_commit=on_commit, is_stop=is_stop, **options)

    def _suppressed(self, config: Any) -> tuple[int, ...]:
        """What a generation config suppresses; transformers too passes over ids that the model does not have."""
        return tuple(token for token in ids_of_config(config.suppress_tokens) if 0 <= token < _count_logits(self.model))

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
            eos_token_ids=ids_of_config(generation_config.eos_token_id),
            suppress_tokens=self._suppressed(generation_config),
            with_end=with_end,
            min_p=generation_config.min_p or 0.0,
            packed=packed,
            max_branches=max_branches,
        )
        answers = [torch.tensor(of_one.token_ids, device=input_ids.device) for of_one in found]
        # As transformers pads; without an end token no answer is shorter than another.
        padding = ids_of_config(generation_config.pad_token_id) or ids_of_config(generation_config.eos_token_id) or (0,)
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


def _count_logits(model: Any) -> int:
    head = getattr(model.get_output_embeddings(), "weight", None)
    rows = 0 if head is None else int(head.shape[0])  # 0 also where DeepSpeed keeps it in parts
    return rows or int(model.config.get_text_config().vocab_size)
