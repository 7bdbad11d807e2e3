"""What answers are worth: BLEU, word error rate and exact match over a corpus, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jiwer
import numpy as np
from rich.table import Table
from sacrebleu.metrics import BLEU

from leafkernels.integrations.speech_rewards import exact_match, normalize_text


def measure(answers: Sequence[str], references: Sequence[str], *, draws: int = 1000) -> dict[str, tuple[float, ...]]:
    """Percentages with the ends of their 95% bootstrap intervals over utterances.

    ``bleu`` is case-insensitive corpus BLEU, as in the paper; ``wer`` the word error rate of normalised texts, errors
    of the whole corpus over its words; ``exact`` the share of answers that are right after normalisation.
    """
    rng = np.random.default_rng(0)
    picks = rng.integers(len(answers), size=(draws, len(answers)))
    bleu = BLEU(lowercase=True)
    # What a corpus's BLEU is summed from, so that a draw is a sum of rows.
    statistics = np.array(
        bleu._extract_corpus_statistics(list(answers), [list(references)]), dtype=np.int64
    )  # (utterances, counts)
    errors, words = [], []
    for answer, reference in zip(map(normalize_text, answers), map(normalize_text, references), strict=True):
        found = jiwer.process_words(reference, answer) if reference else None
        errors.append(
            found.substitutions + found.deletions + found.insertions if found is not None else len(answer.split())
        )
        words.append(len(reference.split()))
    exact = np.array(exact_match(answers, references))

    def bleu_score(chosen: Any) -> float:
        return float(bleu._compute_score_from_stats(statistics[chosen].sum(0).tolist()).score)

    def word_error_rate(chosen: Any) -> float:
        return 100 * float(np.array(errors)[chosen].sum() / max(np.array(words)[chosen].sum(), 1))

    def exact_share(chosen: Any) -> float:
        return 100 * float(exact[chosen].mean())

    everyone = np.arange(len(answers))
    found = {}
    for name, score in (("bleu", bleu_score), ("wer", word_error_rate), ("exact", exact_share)):
        low, high = np.quantile([score(pick) for pick in picks], [0.025, 0.975])
        found[name] = (score(everyone), float(low), float(high))
    return found


def table_of(answers: Sequence[str], references: Sequence[str], *, rows: int = 20) -> Table:
    table = Table("answer", "reference")
    for answer, reference in list(zip(answers, references, strict=True))[:rows]:
        table.add_row(answer, reference)
    return table
