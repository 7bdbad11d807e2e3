"""Sampling masks on the tree of prefixes: rows that share a prefix share the ids that could follow it."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import examples

pytest.importorskip("transformers", minversion="5.23", reason="needs transformers: the extra train")

import pytest
import tiny_decoders
from test_tree_logprobs import KINDS, ROWS, gradients, padded
from torch import Tensor

from leafkernels import SamplingMask
from leafkernels.models import tree_logprobs, tree_stats

Lists = list[list[list[int]]]


def flat(kept: Lists, mask: Tensor) -> SamplingMask:
    """Of (N, T) tokens, from lists of each row's tokens."""
    lists: list[list[int]] = [[] for _ in range(mask.numel())]
    for row, (lines, is_token) in enumerate(zip(kept, mask.bool(), strict=True)):
        for line, column in zip(lines, is_token.nonzero().flatten().tolist(), strict=True):
            lists[row * mask.shape[1] + column] = line
    return SamplingMask.from_lists(lists)


def unions(rows: list[list[int]], kept: Lists) -> tuple[Lists, int]:
    """Of each token what all rows kept behind the prefix before it; and behind how many they kept different ids."""
    of_prefix: dict[tuple[int, ...], list[set[int]]] = {}
    for row, lines in zip(rows, kept, strict=True):
        for place, line in enumerate(lines[1:], start=1):
            if line:
                of_prefix.setdefault(tuple(row[:place]), []).append(set(line))
    together = {prefix: sorted(set().union(*sets)) for prefix, sets in of_prefix.items()}
    joined = [
        [lines[0], *(together.get(tuple(row[:place]), []) for place in range(1, len(row)))] if row else []
        for row, lines in zip(rows, kept, strict=True)
    ]
    return joined, sum(any(one != sets[0] for one in sets) for sets in of_prefix.values())


def row_by_row(model: Any, ids: Tensor, mask: Tensor, kept: Lists, temperature: float) -> tuple[Tensor, Tensor]:
    """Each row in a forward pass of its own, its logits filled with -inf."""
    logprobs, entropy = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for row, is_token in enumerate(mask.bool()):
        columns = is_token.nonzero().flatten()
        if len(columns) < 2:
            continue
        logits = model(input_ids=ids[row, columns][None]).logits[0, :-1] / temperature
        banned = torch.zeros(logits.shape, dtype=torch.bool)
        for place, line in enumerate(kept[row][1:]):
            if line:
                banned[place] = True
                banned[place, [*line, int(ids[row, columns[place + 1]])]] = False
        chances = logits.masked_fill(banned, -torch.inf).log_softmax(-1)
        places = torch.full_like(columns[1:], row), columns[1:]
        logprobs = logprobs.index_put(places, chances.gather(1, ids[row, columns[1:], None])[:, 0])
        entropy = entropy.index_put(places, -(chances.exp() * chances.masked_fill(banned, 0.0)).sum(-1))
    return logprobs, entropy


def draw(rows: list[list[int]], rng: random.Random, vocab_size: int = 29) -> Lists:
    """Lists that all rows of a prefix have; or one of their own, or none."""
    of_prefix: dict[tuple[int, ...], list[int]] = {}

    def one() -> list[int]:
        return rng.choices(range(vocab_size), k=rng.choice([0, 1, 4, 9]))

    return [
        [one() if rng.random() < 0.2 else of_prefix.setdefault(tuple(row[:n]), one()) for n in range(len(row))]
        for row in rows
    ]


@pytest.mark.parametrize("kind", [*KINDS, "rows"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_every_plan_is_rows_over_the_kept_ids(name: str, kind: str, run_as: Any) -> None:
    """Values and gradients, padded on either side, with rows that kept different ids behind a prefix."""
    model = tiny_decoders.build_model(name)
    kept = draw(ROWS, random.Random(f"{name} {kind}"))
    joined, count = unions(ROWS, kept)
    assert count > 1
    for side in ("right", "left"):
        ids, mask = padded(ROWS, side)
        options = {"temperature": 0.7, "sampling_mask": flat(kept, mask)}
        if kind == "rows":
            found = tree_logprobs(model, ids, mask, plan="rows", **options)
        else:
            found = run_as(kind, model, ids, mask, **options)
        ours = gradients(model, *found)
        expected = row_by_row(model, ids, mask, joined, 0.7)
        theirs = gradients(model, *expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        for weight, gradient in theirs.items():
            # Float32 sums of some 40 tokens, in another order.
            torch.testing.assert_close(ours[weight], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max() + 1))
        assert tree_stats(model, ids, mask, sampling_mask=options["sampling_mask"]).unions == count
    assert tree_stats(model, ids, mask).unions == 0


@given(
    st.lists(st.lists(st.integers(3, 5), max_size=6), min_size=1, max_size=6),
    st.sampled_from(["right", "left"]),
    st.integers(0, 99),
)
@examples(torch=30)
def test_any_rows_and_any_mask(rows: list[list[int]], side: str, seed: int) -> None:
    model, rng = tiny_decoders.build_model("llama"), random.Random(seed)
    ids, mask = padded(rows, side)
    kept = draw(rows, rng)
    asked = torch.tensor([rng.random() < 0.6 for _ in range(ids.numel())], dtype=torch.bool).reshape(ids.shape)
    # What is not asked for has no say in what a prefix keeps.
    starts = [int(is_token.argmax()) if any(is_token) else 0 for is_token in mask]
    heard = [
        [line if asked[n, starts[n] + place] else [] for place, line in enumerate(lines)]
        for n, lines in enumerate(kept)
    ]
    joined, _ = unions(rows, heard)
    expected = row_by_row(model, ids, mask, joined, 1.0)
    for plan in ("trunks", "tree", "rows"):
        for max_tokens in (None, 11):
            found = tree_logprobs(
                model, ids, mask, response_mask=asked, plan=plan, max_tokens=max_tokens, sampling_mask=flat(kept, mask)
            )
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, torch.where(asked, theirs, 0.0), rtol=1e-5, atol=1e-5)


def test_prompts_of_equal_tokens_keep_their_own(run_as: Any) -> None:
    """Rows that are named different prompts share no prefix, and no kept ids."""
    model = tiny_decoders.build_model("llama")
    rows = [[5, 6, 7, 8], [5, 6, 7, 8]]
    ids, mask = padded(rows)
    kept = [[[], [6, 9], [7, 3], [8]], [[], [6, 11], [7, 4], [8]]]
    found = tree_logprobs(model, ids, mask, groups=torch.tensor([0, 1]), sampling_mask=flat(kept, mask))
    expected = row_by_row(model, ids, mask, kept, 1.0)
    torch.testing.assert_close(found.logprobs, expected[0], rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    model = tiny_decoders.build_model("llama")
    ids, mask = padded([[5, 6], [7, 8]])
    with pytest.raises(TypeError, match="^sampling_mask must be a leafkernels.SamplingMask, got list$"):
        tree_logprobs(model, ids, mask, sampling_mask=[[1]])
    message = (
        r"^sampling_mask.offsets must have one entry more than there are rows, shape \(4 \+ 1,\), got shape \(2,\)$"
    )
    with pytest.raises(ValueError, match=message):
        tree_logprobs(model, ids, mask, sampling_mask=SamplingMask.from_lists([[1]]))
