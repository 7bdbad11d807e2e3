"""The text of token ids, from a tokenizer of transformers or anything that decodes."""

from typing import Any, Protocol

from leafkernels.command.reading import Failure, Prompt


class Tokenizer(Protocol):
    """What is needed of a tokenizer: the text of a list of ids."""

    def decode(self, token_ids: list[int], /) -> str: ...


class Texts:
    """The text of tokens one by one, each asked for once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        # Many tokenizers of transformers drop the space before the first word of a text: a token is decoded after "a".
        is_known = hasattr(tokenizer, "convert_ids_to_tokens") and hasattr(tokenizer, "encode")
        self._options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False} if is_known else {}
        self._first: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:] if is_known else []
        self._head = self._decode(self._first) if self._first else ""

    def of(self, token_ids: list[int]) -> list[str] | None:
        """The texts of a row; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        for token_id in token_ids:
            if token_id not in self._known:
                text = self._decode([*self._first, token_id])
                is_after = text.startswith(self._head)
                self._known[token_id] = text.removeprefix(self._head) if is_after else self._decode([token_id])
        return [self._known[token_id] for token_id in token_ids]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, **self._options))


class NamedTexts:
    """The texts of a file's ids by a tokenizer's name on the Hub or its folder; a Failure where it cannot be loaded."""

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise Failure(
                f"--tokenizer needs transformers, which cannot be imported here ({error}); pip install transformers"
            ) from error
        verbosity = logging.get_verbosity()
        # Its warnings concern models; an error is raised below.
        logging.set_verbosity(logging.CRITICAL)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self._name, self._size, self._texts = name, len(tokenizer), Texts(tokenizer)
        except Exception as error:  # of any kind: what a folder may hold, transformers does not say
            reason = " ".join(str(error).split())
            raise Failure(f"--tokenizer {name} cannot be loaded: {reason[:300] or type(error).__name__}") from error
        finally:
            logging.set_verbosity(verbosity)

    def fill(self, prompt: Prompt) -> None:
        """Give the rollouts of a prompt their texts where the file has none."""
        for row, token_ids in enumerate(prompt.token_ids):
            if prompt.tokens[row] is None:
                for token_id in token_ids:
                    if not 0 <= token_id < self._size:
                        raise Failure(
                            f"{prompt.where}: token id {token_id} is none of the {self._size:,} of --tokenizer "
                            f"{self._name}"
                        )
                prompt.tokens[row] = self._texts.of(token_ids)
