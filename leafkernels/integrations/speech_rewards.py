"""Rewards for answers to speech, as functions that TRL's trainers and any loop take: a number for each answer.

Each is called as ``reward(completions, reference, **other_columns)``. ``completions`` are texts, or lists of messages
of which the last is the answer. ``reference`` is a text for each, or a list of texts of which the best counts; where it
is None the answer has no reward (None), which TRL takes for "not scored". A judge of your own is a function of the same
form. What a reward needs beside Python is imported when it is first called: ``pip install 'leafkernels[speech]'``.
"""

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["REWARDS", "chrf", "exact_match", "normalize_text", "sentence_bleu", "word_accuracy"]


def sentence_bleu(
    completions: Sequence[Any], reference: Sequence[Any], *, lowercase: bool = False, **_: Any
) -> list[float | None]:
    """Sentence BLEU / 100, from 0 to 1, case-sensitive unless ``lowercase``: LEAF's reward and its evaluation.

    sacrebleu's, with the 13a tokenizer, exponential smoothing, and n-grams only as long as the answer has any
    (``effective_order``): without it an answer of fewer than four words could only get 0.
    """
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True, lowercase=lowercase)
    return _score(lambda text, right: bleu.sentence_score(text, right).score / 100, completions, reference)


def chrf(
    completions: Sequence[Any], reference: Sequence[Any], *, lowercase: bool = False, **_: Any
) -> list[float | None]:
    """Sentence chrF2 / 100, from 0 to 1: F-score of character n-grams up to 6, for languages without clear words."""
    from sacrebleu.metrics import CHRF

    metric = CHRF(lowercase=lowercase)
    return _score(lambda text, right: metric.sentence_score(text, right).score / 100, completions, reference)


def word_accuracy(completions: Sequence[Any], reference: Sequence[Any], **_: Any) -> list[float | None]:
    """1 - word error rate, at least 0, of normalised texts; jiwer's word error rate.

    An empty reference gives 1 to an empty answer and 0 to any other.
    """
    import jiwer

    def accuracy(text: str, right: list[str]) -> float:
        text = normalize_text(text)
        best = 0.0
        for words in map(normalize_text, right):
            best = max(best, 1 - jiwer.wer(words, text) if words else float(not text))
        return best

    return _score(accuracy, completions, reference)


def exact_match(completions: Sequence[Any], reference: Sequence[Any], **_: Any) -> list[float | None]:
    """1.0 where the answer is a reference after ``normalize_text``, else 0.0."""
    return _score(lambda text, right: float(normalize_text(text) in map(normalize_text, right)), completions, reference)


REWARDS: dict[str, Callable[..., list[float | None]]] = {
    function.__name__: function for function in (sentence_bleu, chrf, word_accuracy, exact_match)
}


def normalize_text(text: str) -> str:
    """Lower case, without punctuation (apostrophes within a word stay), words a single blank apart.

    Unicode is composed (NFKC) and its punctuation counts, whatever the language.
    """
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold()
    kept = []
    for i, character in enumerate(text):
        within = 0 < i < len(text) - 1 and text[i - 1].isalnum() and text[i + 1].isalnum()
        is_kept = not unicodedata.category(character).startswith("P") or (character == "'" and within)
        kept.append(character if is_kept else " ")
    return " ".join("".join(kept).split())


def _score(
    score: Callable[[str, list[str]], float], completions: Sequence[Any], reference: Sequence[Any]
) -> list[float | None]:
    if len(completions) != len(reference):
        raise ValueError(
            f"reference must have one entry for each completion, got {len(reference)} for {len(completions)}"
        )
    found: list[float | None] = []
    for completion, right in zip(completions, reference, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        references = [right] if isinstance(right, str) else right
        found.append(None if references is None else float(score(text or "", list(references))))
    return found
