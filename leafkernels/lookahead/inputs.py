"""Of a call of ``RewardTransformer.generate``: prompts, what comes beside them, strings to stop at, a streamer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from leafkernels._core.checks import check_integer, check_mask
from leafkernels.lookahead.search import as_ids
from leafkernels.lookahead.stepper import TransformersStepper


def ids_of_config(ids: Any) -> tuple[int, ...]:
    """What a generation config says of an id: none, one, or several."""
    return () if ids is None else as_ids("ids of the generation config", ids)


def ids_and_features(input_ids: Any, attention_mask: Any, inputs: Any) -> tuple[Any, Any, dict[str, Any]]:
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


def without_padding(input_ids: Tensor, attention_mask: Any, features: Mapping[str, Any]) -> list[Tensor]:
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


def check_prompt(prompt_ids: Any, embedding: Any) -> Tensor:
    """(P,) int64, of ids that the model has."""
    ids = check_integer("prompt_ids", prompt_ids).long()
    if ids.dim() != 1 or not ids.numel():
        raise ValueError(f"prompt_ids must have shape (P,) with P at least 1, got shape {tuple(ids.shape)}")
    least, most = (int(value) for value in ids.aminmax())
    rows = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else most + 1
    if least < 0 or most >= rows:
        raise ValueError(f"prompt_ids must lie between 0 and {rows - 1}, got {least if least < 0 else most}")
    return ids


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


@contextmanager
def ended_on_error(streamer: Any) -> Iterator[None]:
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


class Streamed:
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
