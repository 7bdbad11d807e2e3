"""Rows of preferences as token ids, and what is wrong with those that cannot be trained on."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object
from torch.utils.data import IterableDataset, Subset
from transformers import ProcessorMixin

from leafkernels.rows.recordings import Heard, PromptReader, added_tokens, text_of

_logger = logging.getLogger(__name__)
SIDES = ("chosen", "rejected")


@dataclass(eq=False)
class Pair:
    """A row: token ids (prompt, answer) of chosen and of rejected, and the inputs of an audio model for the prompt."""

    answers: list[tuple[list[int], list[int]]]
    heard: Heard | None


class PairReader:
    """Reads rows with ``prompt``, ``chosen`` and ``rejected``, and ``audio`` for an audio model.

    Args:
        processing_class: the tokenizer, or the processor of an audio model.
        max_length: tokens of prompt and answer, whose end is cut off; None: all.
        positions: how many tokens the model takes; None: any number.

    Attributes: ``tokenizer``, and ``prompts``, a ``PromptReader`` for an audio model, else None.
    """

    def __init__(self, processing_class: Any, max_length: int | None = None, positions: int | None = None) -> None:
        has_audio = isinstance(processing_class, ProcessorMixin)
        self.prompts = PromptReader(processing_class) if has_audio else None
        self.tokenizer: Any = processing_class.tokenizer if has_audio else processing_class
        if getattr(self.tokenizer, "pad_token_id", None) is None:
            raise ValueError(
                "processing_class must be a tokenizer with a padding token, or the processor around one, got "
                f"{type(processing_class).__name__}"
            )
        self._begin = added_tokens(self.tokenizer)[0]
        self._max_length, self._positions = max_length, positions

    def read(self, row: dict[str, Any]) -> Pair:
        """The tokens of a row; where it cannot be trained on, TypeError or ValueError with its prompt."""
        missing = [name for name in ("prompt", *SIDES) if name not in row]
        if missing:
            raise ValueError(f"the dataset must have the columns prompt, chosen and rejected, got {sorted(row)}")
        try:
            return self._read_columns(row)
        except ImportError:
            raise
        except Exception as error:  # a chat template may raise anything
            text = str(error) if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: {error}"
            named = "" if "with the prompt" in text else f", with the prompt {row['prompt']!r:.80}"
            raise (TypeError if isinstance(error, TypeError) else ValueError)(text + named) from error

    def _read_columns(self, row: dict[str, Any]) -> Pair:
        for name in ("prompt", *SIDES):
            if not isinstance(row[name], str) and not _are_messages(row[name]):
                raise TypeError(f"{name} must be a text or a list of messages, got {row[name]!r:.80}")
        if row["chosen"] == row["rejected"]:
            raise ValueError(f"chosen and rejected must differ, got {row['chosen']!r:.80} twice")
        heard, most, answers = self._read_audio(row), self._max_length, []
        for side in SIDES:
            prompt, answer = self._tokens(row["prompt"], row[side], heard)
            if not prompt:
                raise ValueError(f"prompt must have a token, got {row['prompt']!r:.80}")
            answer = answer[: None if most is None else max(most - len(prompt), 0)]
            if not answer:
                raise ValueError(
                    f"{side} must have a token after its prompt of {len(prompt)} tokens (max_length is {most}), got "
                    f"{row[side]!r:.80}"
                )
            if self._positions is not None and len(prompt) + len(answer) > self._positions:
                raise ValueError(
                    f"prompt and {side} must have at most {self._positions} tokens, for which the model has positions "
                    f"(max_length is {most}), got {len(prompt) + len(answer)}"
                )
            answers.append((prompt, answer))
        if answers[0] == answers[1]:
            raise ValueError(
                f"chosen and rejected must differ in their tokens (max_length is {most}), got {row['chosen']!r:.80} "
                f"and {row['rejected']!r:.80}"
            )
        return Pair(answers, heard)

    def _read_audio(self, row: dict[str, Any]) -> Heard | None:
        """What an audio model reads of the prompt of a row; None for a model without audio."""
        prompt, audio = row["prompt"], row.get("audio")
        if self.prompts is None:
            if audio is not None:
                raise TypeError(
                    "processing_class must be the processor of an audio model where rows have audio, got "
                    f"{type(self.tokenizer).__name__}"
                )
            return None
        if audio is None and not self.prompts.asks(prompt):
            return self.prompts.read_text(prompt)
        return self.prompts.read(prompt, audio)

    def _tokens(self, prompt: Any, answer: Any, heard: Heard | None) -> tuple[list[int], list[int]]:
        tokenizer = self.tokenizer
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if heard is not None or isinstance(prompt, str):
            text = text_of(answer)
            if end is not None and text.rstrip().endswith(tokenizer.eos_token):
                text = text.rstrip()
            after = tokenizer(text, add_special_tokens=False)["input_ids"]
            while after and after[0] == begin != end:
                del after[0]
            while after and after[-1] == end:
                del after[-1]
            after += [] if end is None else [end]
            if heard is not None:
                return heard.token_ids, after
            first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            return first if first[: len(self._begin)] == self._begin else self._begin + first, after
        if isinstance(answer, str):
            raise TypeError(f"chosen and rejected must be messages where prompt is, got {answer!r:.80}")
        options = {"tokenize": True, "return_dict": False}
        first = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template([*prompt, *answer], **options)
        if whole[: len(first)] != first:
            # Some templates open the answer with what they leave out of a finished one, as in "<think>".
            raise ValueError(
                "processing_class must have a chat template whose prompt with the generation prompt begins the whole "
                f"conversation, got {tokenizer.decode(first)!r:.160} and {tokenizer.decode(whole)!r:.160}; prompt, "
                "chosen and rejected may also be texts"
            )
        after = whole[len(first) :]
        # A message that ends with the end token itself, before the template's.
        return first, [token for at, token in enumerate(after) if not (at and token == after[at - 1] == end)]

    def readable(self, dataset: Any, name: str, drop: bool, accelerator: Any) -> Any:
        """The dataset, or each dataset of a dict, without the rows that cannot be trained on.

        Rows of a dataset with a length are read here, by each process its share; rows of a stream as they come.

        Args:
            dataset: one of datasets, of torch, or a list; None is given back.
            name: of the dataset, for messages.
            drop: log what is left out; otherwise a bad row raises what ``read`` raises, with the numbers of all.
            accelerator: accelerate's, of the processes that all call this.
        """
        if isinstance(dataset, dict):
            kept = {key: self.readable(part, f"{name}[{key!r}]", drop, accelerator) for key, part in dataset.items()}
            return type(dataset)(kept)
        if dataset is None:
            return None
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            return self._readable_stream(dataset, name) if drop else dataset
        share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        found = {number: error for number in share if (error := self._fault(dataset[number])) is not None}
        bad = dict(sorted((number, error) for part in gather_object([found]) for number, error in part.items()))
        if not bad:
            return dataset
        first, listed = next(iter(bad)), ", ".join(map(str, list(bad)[:10])) + (", ..." if len(bad) > 10 else "")
        if not drop or len(bad) == len(dataset):
            raise type(bad[first])(
                f"{bad[first]} (row {first} of {name}; of {len(dataset)} rows {len(bad)} cannot be trained on: "
                f"{listed}; bad_rows='drop' leaves them out)"
            )
        _logger.warning(
            "%s: left out %d of %d rows (%s); row %d: %s", name, len(bad), len(dataset), listed, first, bad[first]
        )
        good = [number for number in range(len(dataset)) if number not in bad]
        return dataset.select(good) if hasattr(dataset, "select") else Subset(dataset, good)

    def _readable_stream(self, dataset: Any, name: str) -> Any:
        if not hasattr(dataset, "filter"):
            raise ValueError(
                f"bad_rows must be 'raise' where {name} is neither one of datasets nor has a length, got 'drop' and "
                f"{type(dataset).__name__}"
            )
        dropped = 0

        def keeps(row: dict[str, Any]) -> bool:
            nonlocal dropped
            error = self._fault(row)
            dropped += error is not None
            if error is not None:
                _logger.warning("%s: left out a row, %d by now: %s", name, dropped, error)
            return error is None

        return dataset.filter(keeps)

    def _fault(self, row: dict[str, Any]) -> ValueError | TypeError | None:
        try:
            self.read(row)
        except (TypeError, ValueError) as error:
            return error
        return None


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )
