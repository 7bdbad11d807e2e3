"""Rewards for answers to speech: by hand, against the packages, and the laws that all of them keep."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sacrebleu")
pytest.importorskip("jiwer")

from leafkernels.integrations.speech_rewards import (
    REWARDS,
    chrf,
    exact_match,
    normalize_text,
    sentence_bleu,
    word_accuracy,
)

words = st.lists(st.sampled_from(["der", "Hund", "bellt", "laut", "heute", "nicht"]), min_size=1, max_size=9)


def test_by_hand() -> None:
    answers = ["the cat sat", "the dog sat", "", "the the the the the the the"]
    assert word_accuracy(answers, ["the cat sat"] * 4) == pytest.approx([1, 2 / 3, 0, 0])
    assert word_accuracy(["", "a"], ["", ""]) == [1, 0]
    assert exact_match(["The cat sat!", "the cat sits"], ["the cat, sat", "the cat sat"]) == [1, 0]
    # Precisions 2/3 and, of one bigram in two, 1/2; the trigram is smoothed to 1 / (2 * 1); no brevity penalty.
    (bleu,) = sentence_bleu(["the cat sits"], ["the cat sat"])
    assert bleu == pytest.approx((2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3), rel=1e-9)


def test_case_counts_in_training_and_not_in_evaluation() -> None:
    sensitive, insensitive = (sentence_bleu(["The Cat Sat Down"], ["the cat sat down"], lowercase=x) for x in (0, 1))
    assert insensitive == pytest.approx([1.0]) and sensitive[0] < 0.5
    assert chrf(["ABC"], ["abc"]) == [0.0] and chrf(["ABC"], ["abc"], lowercase=True) == pytest.approx([1.0])


@pytest.mark.parametrize("name", REWARDS)
@given(rows=st.lists(st.tuples(words, words), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_laws(name: str, rows: list[tuple[list[str], list[str]]]) -> None:
    """From 0 to 1; 1 for the reference; more references never give less; rows do not know each other."""
    reward = REWARDS[name]
    texts, references = ([" ".join(row[i]) for row in rows] for i in (0, 1))
    found = reward(texts, references, prompts=texts, completion_ids=[[1]] * len(rows))
    assert all(0 <= x <= 1 + 1e-9 for x in found)
    assert reward(references, references) == pytest.approx([1.0] * len(rows))
    assert found == [reward([t], [r])[0] for t, r in zip(texts, references, strict=True)]
    both = reward(texts, [[r, t] for r, t in zip(references, texts, strict=True)])
    assert both == pytest.approx([1.0] * len(rows))
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(messages, references) == found
    assert reward(texts, [None] * len(rows)) == [None] * len(rows)


def test_normalisation() -> None:
    accented = "  Don\u2019t \u201cSTOP\u201d \u2013 l'\u00e9t\u00e9, e\u0301te\u0301! "
    assert normalize_text(accented) == "don't stop l'\u00e9t\u00e9 \u00e9t\u00e9"
    assert normalize_text("'quoted' rock'n'roll'") == "quoted rock'n'roll"
    assert normalize_text("\u4f60\u597d\u3002") == "\u4f60\u597d"


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="^reference must have one entry for each completion, got 1 for 2$"):
        exact_match(["a", "b"], ["a"])
