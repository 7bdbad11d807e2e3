"""Every layout of a loop gives the advantages of the padded call, bit for bit."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import DEVICE, Rollouts, rollouts

from leafkernels import span_advantages
from leafkernels.integrations.layouts import next_tokens, pack, response_tokens, rolled_tokens, unpack

FILL = 5  # what no mask covers: prompts and padding, which must not matter


@st.composite
def with_prompts(draw: st.DrawFn) -> tuple[Rollouts, list[int]]:
    """Rollouts, and how many prompt tokens stand before each, at least one."""
    case = draw(rollouts())
    return case, [draw(st.integers(1, 3)) for _ in case.groups]


def expected(case: Rollouts) -> list[torch.Tensor]:
    padded = case.padded()
    advantages = span_advantages(**padded, **case.options)
    return [row[: len(ids)] for row, ids in zip(advantages, case.token_ids, strict=True)]


def sequences(case: Rollouts, prompts: list[int]) -> dict[str, torch.Tensor]:
    """(N, S) prompt, response, padding, as a model reads them; logprobs and mask of the token at the same place."""
    width = max(p + len(row) for p, row in zip(prompts, case.token_ids, strict=True)) + 1

    def table(rows: list[list], fill: Any, dtype: torch.dtype) -> torch.Tensor:
        full = [[fill] * p + row for p, row in zip(prompts, rows, strict=True)]
        return torch.tensor([row + [fill] * (width - len(row)) for row in full], dtype=dtype).to(DEVICE)

    return {
        "logprobs": table(case.logprobs, -9.0, torch.float32),
        "token_ids": table(case.token_ids, FILL, torch.int64),
        "response_mask": table(case.mask, False, torch.bool),
    }


def assert_same(case: Rollouts, prompts: list[int], advantages: torch.Tensor, shift: int) -> None:
    """Responses out of (N, S) advantages whose entry t speaks of token t + shift; 0 everywhere else."""
    for row, prompt, ids, of_padded in zip(advantages, prompts, case.token_ids, expected(case), strict=True):
        start = prompt - shift
        assert torch.equal(row[start : start + len(ids)], of_padded)
        assert not row[:start].any() and not row[start + len(ids) :].any()


def common(case: Rollouts) -> dict[str, Any]:
    padded = case.padded()
    return {"rewards": padded["rewards"], "groups": padded["groups"], **case.options}


@given(case=with_prompts())
@settings(max_examples=60)
def test_prompt_included(case: tuple[Rollouts, list[int]]) -> None:
    """NeMo-RL: nothing to do but to pass the mask."""
    rollouts, prompts = case
    assert_same(rollouts, prompts, span_advantages(**sequences(rollouts, prompts), **common(rollouts)), 0)


@given(case=with_prompts())
@settings(max_examples=60)
def test_next_token(case: tuple[Rollouts, list[int]]) -> None:
    """OpenRLHF: the log-probabilities that the logits of each place give to the token behind it."""
    rollouts, prompts = case
    held = sequences(rollouts, prompts)
    advantages = span_advantages(
        held["logprobs"][:, 1:],
        next_tokens(held["token_ids"]),
        response_mask=held["response_mask"][:, 1:],
        **common(rollouts),
    )
    assert_same(rollouts, prompts, advantages, 1)


@given(case=with_prompts())
@settings(max_examples=60)
def test_rolled(case: tuple[Rollouts, list[int]]) -> None:
    """AReaL: log-probabilities and mask rolled by -1."""
    rollouts, prompts = case
    held = sequences(rollouts, prompts)
    advantages = span_advantages(
        held["logprobs"].roll(-1, 1),
        rolled_tokens(held["token_ids"]),
        response_mask=held["response_mask"].roll(-1, 1),
        **common(rollouts),
    )
    assert_same(rollouts, prompts, advantages, 1)


@given(case=with_prompts())
@settings(max_examples=60)
def test_lists_of_responses(case: tuple[Rollouts, list[int]]) -> None:
    """slime: log-probabilities and masks of responses, token ids with the prompt, row by row."""
    rollouts, prompts = case
    logprobs = [torch.tensor(row, dtype=torch.float32, device=DEVICE) for row in rollouts.logprobs]
    masks = [torch.tensor(row, dtype=torch.bool, device=DEVICE) for row in rollouts.mask]
    whole = [torch.tensor([FILL] * p + row, device=DEVICE) for p, row in zip(prompts, rollouts.token_ids, strict=True)]
    token_ids = response_tokens(whole, [len(row) for row in logprobs])
    packed = pack(logprobs, token_ids, masks)
    advantages = span_advantages(*packed[:2], response_mask=packed[2], cu_seqlens=packed[3], **common(rollouts))
    for row, of_padded in zip(unpack(advantages, logprobs), expected(rollouts), strict=True):
        assert torch.equal(row, of_padded)


def test_shapes_and_dtypes() -> None:
    rows = [torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([3])]
    packed, cu_seqlens = pack(rows)
    assert packed.tolist() == [1, 2, 3]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype) == ([0, 2, 2, 3], torch.int32)
    assert [row.tolist() for row in unpack(packed, rows)] == [[1, 2], [], [3]]
    assert [row.tolist() for row in response_tokens(rows, [1, 0, 0])] == [[2], [], []]
    assert next_tokens(torch.arange(6).view(2, 3)).tolist() == [[1, 2], [4, 5]]
    assert rolled_tokens(torch.arange(6).view(2, 3)).tolist() == [[1, 2, 0], [4, 5, 3]]


def test_refusals() -> None:
    def refuses(message: str) -> Any:
        return pytest.raises(ValueError, match=f"^{re.escape(message)}$")

    rows = [torch.zeros(2), torch.zeros(1)]
    with refuses("columns must have rows of the same lengths, got [2, 1] in column 0 and [1, 2] in column 1"):
        pack(rows, rows[::-1])
    with refuses("columns must hold at least one row each, got none"):
        pack([])
    with refuses("response_lengths must lie between 0 and the length of the row, got 3 for row 0 of 2"):
        response_tokens(rows, [3, 1])
