"""Every layout of a loop gives the advantages of the padded call, bit for bit."""

import re
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import DEVICE, Rollouts, rollouts
from support import examples

import python_ref
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
@examples(torch=60)
def test_prompt_included(case: tuple[Rollouts, list[int]]) -> None:
    """NeMo-RL: nothing to do but to pass the mask."""
    rollouts, prompts = case
    assert_same(rollouts, prompts, span_advantages(**sequences(rollouts, prompts), **common(rollouts)), 0)


@given(case=with_prompts())
@examples(torch=60)
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
@examples(torch=60)
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
@examples(torch=60)
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


PAGE = pages.read("trainers.md")


def of_page(title: str) -> dict[str, Any]:
    """What the sections of the page up to this one define, but for those of other packages."""
    sections = re.split(r"^## ", PAGE, flags=re.M)[1:]
    names = [section.split("\n", 1)[0] for section in sections]
    scope: dict[str, Any] = {"torch": torch}
    for name, section in zip(names, sections, strict=True):
        if name == title or name not in ("TRL", "verl"):
            pages.run(section, scope)
        if name == title:
            return scope
    raise AssertionError(f"no section {title} among {names}")


PROMPTS = [2, 3, 1, 2, 2, 1]


def example() -> Rollouts:
    """Two prompts of three rollouts, in runs; masks with a hole, and distinct rewards."""
    rows = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [7, 8, 9], [7, 8, 1, 1], [7, 2]]
    logprobs = [[-0.1, -0.2, -3.0 - i, -0.5 - i][: len(row)] for i, row in enumerate(rows)]
    mask = [[t != 1 or i != 2 for t in range(len(row))] for i, row in enumerate(rows)]
    return Rollouts(rows, logprobs, mask, [1.0, 0.0, 0.5, 0.0, 2.0, 1.0], [0, 0, 0, 1, 1, 1])


def test_page_openrlhf() -> None:
    case = example()
    held = sequences(case, PROMPTS)

    class Experience:
        def __init__(self, rows: slice) -> None:
            width = [None, -1][rows.start > 0]  # micro-batches differ in width
            self.sequences = held["token_ids"][rows, :width]
            self.action_log_probs = held["logprobs"][rows, 1:width]
            self.action_mask = held["response_mask"][rows, 1:width]
            self.rewards = torch.tensor(case.rewards, device=DEVICE)[rows]
            self.index = list(range(6))[rows]

    experiences = [Experience(slice(0, 2)), Experience(slice(2, 6))]
    of_page("OpenRLHF")["openrlhf"](experiences, 3)
    rows = [row for e in experiences for row in e.advantages]
    assert [e.advantages.shape for e in experiences] == [e.action_log_probs.shape for e in experiences]
    for row, prompt, ids, of_padded in zip(rows, PROMPTS, case.token_ids, expected(case), strict=True):
        assert torch.equal(row[prompt - 1 : prompt - 1 + len(ids)], of_padded)


def test_page_nemo_rl() -> None:
    case = example()
    held = sequences(case, PROMPTS)
    logs = [
        [{"token_ids": torch.tensor([FILL] * p, device=DEVICE)}, {"token_ids": torch.tensor(ids, device=DEVICE)}]
        for p, ids in zip(PROMPTS, case.token_ids, strict=True)
    ]
    advantages = of_page("NeMo-RL")["LeafEstimator"]().compute_advantage(
        prompt_ids=torch.tensor([[group, 0] for group in case.groups]),
        rewards=torch.tensor(case.rewards, device=DEVICE),
        mask=held["response_mask"].float(),
        repeated_batch={"message_log": logs},
        logprobs_policy=held["logprobs"],
        logprobs_reference=None,
    )
    assert_same(case, PROMPTS, advantages, 0)


def test_page_slime() -> None:
    case = example()
    data = {
        "log_probs": [torch.tensor(row, device=DEVICE) for row in case.logprobs],
        "tokens": [
            torch.tensor([FILL] * p + row, device=DEVICE) for p, row in zip(PROMPTS, case.token_ids, strict=True)
        ],
        "response_lengths": [len(row) for row in case.token_ids],
        "loss_masks": [torch.tensor(row, device=DEVICE).int() for row in case.mask],
        "rewards": case.rewards,
        "sample_indices": [6, 7, 8, 3, 4, 5],
    }
    of_page("slime")["slime"](type("Args", (), {"n_samples_per_prompt": 3}), data)
    for row, of_padded in zip(data["advantages"], expected(case), strict=True):
        assert torch.equal(row, of_padded)


def test_page_areal() -> None:
    case = example()
    held = sequences(case, PROMPTS)
    data = {
        "input_ids": held["token_ids"],
        "logprobs": held["logprobs"].roll(-1, 1),
        "loss_mask": held["response_mask"].roll(-1, 1),
        "rewards": torch.tensor(case.rewards, device=DEVICE),
    }
    of_page("AReaL")["areal"](data, 3)
    assert_same(case, PROMPTS, data["advantages"], 1)


@pytest.mark.parametrize(
    "prompt_ids", [["b", "b", "b", "a", "a", "a"], torch.tensor(example().groups), list(torch.tensor(example().groups))]
)
def test_page_ms_swift(prompt_ids: Any) -> None:
    case = example()
    padded = case.padded()
    rows = (padded["logprobs"], padded["token_ids"], padded["response_mask"], padded["rewards"])
    advantages = of_page("ms-swift")["ms_swift"](*rows, prompt_ids)
    for row, ids, of_padded in zip(advantages, case.token_ids, expected(case), strict=True):
        assert torch.equal(row[: len(ids)], of_padded)


def test_page_tinker() -> None:
    case = example()
    shifted = [([FILL] * p + row)[1:] for p, row in zip(PROMPTS, case.token_ids, strict=True)]
    datums = [
        {"target_tokens": ids, "logprobs": [0.0] * (len(ids) - len(row)) + row}
        for ids, row in zip(shifted, case.logprobs, strict=True)
    ]
    masks = [
        torch.tensor([0] * (len(ids) - len(row)) + row, dtype=torch.int32)
        for ids, row in zip(shifted, case.mask, strict=True)
    ]
    empty = {"target_tokens": [], "logprobs": []}
    datums.append(empty)
    masks.append(torch.tensor([]))
    rewards = torch.tensor([*case.rewards, 1.0])
    of_page("Tinker")["tinker"](datums, masks, rewards, ["x"] * 3 + ["y"] * 3 + ["z"])
    assert datums.pop() is empty and empty["advantages"] == []
    for datum, ids, of_padded in zip(datums, case.token_ids, expected(case), strict=True):
        assert datum["advantages"][len(datum["advantages"]) - len(ids) :] == of_padded.tolist()
        assert len(datum["advantages"]) == len(datum["target_tokens"])
        assert not any(datum["advantages"][: -len(ids)])


def test_page_fire_opd() -> None:
    """Rows of unequal length, one of which is dropped, with numbers in the padding that must not matter."""
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(6) < torch.tensor([6, 3, 4, 5])[:, None]).to(DEVICE)
    numbers = [torch.rand(4, 6, generator=generator).to(DEVICE) for _ in range(4)]
    numbers[0], numbers[1] = -numbers[0], -numbers[1]
    names = ("old_log_probs", "ref_log_prob", "entropy", "ref_entropy")
    padded = (tensor.masked_fill(~mask, torch.nan) for tensor in numbers)
    batch = dict(zip(names, padded, strict=True)) | {"response_mask": mask.long()}
    of_page("FiRe-OPD")["fire"](batch, drop=0.3, normalize="trajectory")
    dropped = batch["response_mask"].sum(1) == 0
    assert dropped.sum() == 1
    assert batch["response_mask"].dtype == torch.int64
    lists = (tensor.tolist() for tensor in (*numbers, mask))
    expected = python_ref.fire_opd(*lists, drop=0.3, normalize="trajectory")
    torch.testing.assert_close(batch["advantages"], torch.tensor(expected["advantages"], device=DEVICE))
    assert batch["response_mask"].bool().tolist() == expected["response_mask"]


def test_page_verl() -> None:
    pytest.importorskip("verl.trainer.ppo.v1", reason="needs verl: pip install -e '.[verl]'")
    assert of_page("verl")["LeafTrainer"].__mro__[1].__name__ == "LeafAdvantage"


@pytest.mark.slow
def test_page_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    monkeypatch.chdir(tmp_path)
    trainer = of_page("TRL")["trainer"]
    assert trainer.state.global_step == 3
    assert "leaf/span_credit_share" in trainer.state.log_history[-2]


def test_every_section_of_the_page_is_run() -> None:
    titles = {title.lower().replace("-", "_") for title in re.findall(r"^## (.+)$", PAGE, re.M)}
    assert {f"test_page_{title}" for title in titles} <= set(globals())
