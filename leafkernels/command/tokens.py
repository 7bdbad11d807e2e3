"""The text of token ids, from a tokenizer of transformers or anything that decodes."""

from typing import Protocol

from leafkernels.command.reading import Failure, Prompt


class Tokenizer(Protocol):
    """What is needed of a tokenizer: the text of a list of ids."""

    def decode(self, token_ids: list[int], /) -> str: ...


class Texts:
    """The text of tokens one by one, each asked for once."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, token_ids: list[int]) -> list[str] | None:
        """The texts of a row; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        for token_id in token_ids:
            if token_id not in self._known:
                self._known[token_id] = self._tokenizer.decode([token_id])
        return [self._known[token_id] for token_id in token_ids]

    def fill(self, prompt: Prompt) -> None:
        """Give the rollouts of a prompt their texts where the file has none."""
        try:
            prompt.tokens = [
                self.of(row) if texts is None else texts
                for row, texts in zip(prompt.token_ids, prompt.tokens, strict=True)
            ]
        except IndexError as error:
            raise Failure(f"{prompt.where}: {error}") from error


class _Named:
    """A tokenizer of transformers, with the space before a word that many drop at the start of a text."""

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise Failure(
                f"--tokenizer needs transformers, which cannot be imported here ({error}); pip install transformers"
            ) from error
        verbosity = logging.get_verbosity()
        # What it warns of concerns models; an error is raised below.
        logging.set_verbosity(logging.CRITICAL)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self._size = len(self._tokenizer)
            self._first = self._tokenizer.encode("a", add_special_tokens=False)[-1:]
            self._head = self._text(self._first)
        except Exception as error:  # of any kind: what a folder may hold, transformers does not say
            reason = " ".join(str(error).split())
            raise Failure(f"--tokenizer {name} cannot be loaded: {reason[:300] or type(error).__name__}") from error
        finally:
            logging.set_verbosity(verbosity)
        self._name = name

    def _text(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def decode(self, token_ids: list[int], /) -> str:
        for token_id in token_ids:
            if not 0 <= token_id < self._size:
                raise IndexError(f"token id {token_id} is none of the {self._size:,} of --tokenizer {self._name}")
        text = self._text(self._first + token_ids)
        return text.removeprefix(self._head) if text.startswith(self._head) else self._text(token_ids)


def load_tokenizer(name: str | None) -> Texts:
    """The texts by a tokenizer's name on the Hub or its folder; a Failure where it cannot be loaded."""
    return Texts(None if name is None else _Named(name))
