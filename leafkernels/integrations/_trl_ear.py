"""What hands a model the audio of the rows of a batch, and lets a frozen encoder hear each prompt once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from leafkernels.models.asking import evaluating
from leafkernels.rows.recordings import Heard, find_encoder, join, join_features


@dataclass(eq=False)
class HeardPrompt(Heard):
    """What rollouts of a prompt share."""

    encoded: dict[int, Tensor] = field(default_factory=dict)  # by the id of the encoder


class Ear:
    """Hands a model the audio of the rows that its next forwards are about."""

    def __init__(self, base: Any, *, is_trained: bool) -> None:
        self.base, self.encoder = base, find_encoder(base)
        self.is_frozen = not (is_trained and any(weight.requires_grad for weight in self.encoder.parameters()))
        self._rows: Sequence[HeardPrompt] = ()
        self._prompts: Sequence[HeardPrompt] = ()
        self._encoded: Tensor | None = None
        base.base_model.register_forward_pre_hook(self._hand, with_kwargs=True)
        forward = self.encoder.forward

        def answer(*args: Any, **kwargs: Any) -> Any:
            if self._encoded is None:
                return forward(*args, **kwargs)
            return BaseModelOutputWithPooling(last_hidden_state=self._encoded)

        self.encoder.forward = answer

    def listen(self, model: Any, rows: Sequence[HeardPrompt], most: Callable[[int], int]) -> None:
        """Let a frozen encoder hear those of the rows that it has not heard, each alone.

        Args:
            model: what is called, the encoder in it.
            most: how many calls this rank makes, from the number of those it needs.
        """
        if not self.is_frozen or not rows:
            return
        new = [row for row in dict.fromkeys(rows) if id(self.encoder) not in row.encoded]
        for i in range(most(len(new))):
            row = new[i] if i < len(new) else rows[0]
            row.encoded[id(self.encoder)] = self._hear_alone(model, row)

    @contextmanager
    def hearing(self, rows: Sequence[HeardPrompt]) -> Iterator[None]:
        """Within, the forwards of the model, in any number, are about ``rows`` one after the other."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows, self._encoded = (), None

    @contextmanager
    def hearing_once(self, prompts: Sequence[HeardPrompt]) -> Iterator[None]:
        """Within, the forwards of the model that are handed features are about ``prompts``, and have theirs."""
        self._prompts = prompts
        try:
            yield
        finally:
            self._prompts, self._encoded = (), None

    def _hand(self, _module: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self._prompts and self.is_frozen and any(inputs.get(name) is not None for name in self._prompts[0].features):
            self._encoded = join([row.encoded[id(self.encoder)] for row in self._prompts])
        if not self._rows:  # a step of decoding, or a model that is called by others
            return None
        count = len(inputs["input_ids"])
        rows, self._rows = self._rows[:count], self._rows[count:]
        if self.is_frozen:
            self._encoded = join([row.encoded[id(self.encoder)] for row in rows])
        return args, {**inputs, **join_features(rows)}

    @torch.no_grad()
    def _hear_alone(self, model: Any, row: HeardPrompt) -> Tensor:
        """Let the model itself hand the features to its encoder, and stop it there.

        It is called from the top, where an engine that shards its weights brings them together, and returns from there.
        """
        found: list[Tensor] = []

        def stop(_module: Any, _args: Any, output: Any) -> None:
            found.append(output.last_hidden_state)
            raise _Encoded

        def hear(*_args: Any, **inputs: Any) -> BaseModelOutputWithPooling:
            # As a model in its own dtype hears, whatever the forward around it is cast to.
            with suppress(_Encoded), torch.autocast(inputs["input_ids"].device.type, enabled=False):
                self.base.base_model(**inputs)
            return BaseModelOutputWithPooling()

        own = vars(self.base).get("forward")
        hook = self.encoder.register_forward_hook(stop)
        self.base.forward = hear
        token_ids = torch.tensor([row.token_ids], device=next(self.encoder.parameters()).device)
        try:
            # Granite's encoder normalises by the statistics of the batch in training mode.
            with evaluating(self.encoder):
                model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), **row.features)
        finally:
            hook.remove()
            del self.base.forward
            if own is not None:
                self.base.forward = own
        if not found:
            raise TypeError(f"model must hand its audio to its encoder, {type(self.base).__name__} did not call it")
        return found[0]


class _Encoded(Exception):
    """Ends a forward whose encoder has heard what it was to hear."""
