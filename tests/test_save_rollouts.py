"""``save_rollouts``: what a training loop holds, in the file that the command reads."""

import gzip
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import leafkernels
from leafkernels.__main__ import main
from leafkernels.command.reading import Prompt, RolloutFile


class Letters:
    """A tokenizer of ten letters."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join("abcdefghij"[token_id] for token_id in token_ids)


def rollouts(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Three prompts of four rollouts: padding on both sides, a hole, an empty one, a reward and a logprob missing."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 10, (3, 4, 9), generator=generator)
    mask = torch.ones(3, 4, 9, dtype=torch.bool)
    mask[0, 0, 6:] = mask[1, 1, :3] = mask[1, 2, 4] = mask[2, 3] = False
    logprobs = -torch.rand(3, 4, 9, generator=generator, dtype=torch.float64).to(dtype)
    logprobs[0, 1, 2] = torch.nan
    logprobs[0, 0, 7] = -torch.inf  # padding may be anything
    rewards = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    rewards[2, 0] = torch.nan
    return {"token_ids": token_ids, "logprobs": logprobs, "rewards": rewards, "response_mask": mask}


def read(path: Path) -> list[Prompt]:
    with RolloutFile(path) as file:
        return list(file)


def check(found: list[Prompt], given: dict[str, Tensor]) -> None:
    """Every token, log-probability and reward of the prompts in (P, G, T)."""
    assert len(found) == len(given["rewards"])
    for p, prompt in enumerate(found):
        assert prompt.rewards == pytest.approx(given["rewards"][p].tolist(), nan_ok=True, rel=0, abs=0)
        for row, mask in enumerate(given["response_mask"][p]):
            live = mask.nonzero().flatten().tolist()
            stretch = slice(live[0], live[-1] + 1) if live else slice(0, 0)
            assert prompt.token_ids[row] == given["token_ids"][p, row, stretch].tolist()
            logprobs = given["logprobs"][p, row, stretch].double().masked_fill(~mask[stretch], torch.nan)
            kept = torch.tensor(prompt.logprobs[row], dtype=given["logprobs"].dtype)
            torch.testing.assert_close(kept, logprobs.to(kept.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_it_comes_back_to_the_bit(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    given = rollouts(dtype)
    leafkernels.save_rollouts(tmp_path / name, **given)
    check(read(tmp_path / name), given)
    assert os.listdir(tmp_path) == [name]
    assert ((tmp_path / name).read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint16, torch.uint64])
def test_ids_of_every_integer_type(dtype: torch.dtype, tmp_path: Path) -> None:
    given = rollouts()
    ids = given["token_ids"].to(dtype)
    leafkernels.save_rollouts(tmp_path / "a.jsonl", **{**given, "token_ids": ids})
    check(read(tmp_path / "a.jsonl"), given)
    if dtype == torch.uint64:  # beyond what the file holds: as everywhere here, another id, and none of a vocabulary
        top = torch.full((1, 2), -1).view(torch.uint64)
        leafkernels.save_rollouts(tmp_path / "b.jsonl", top, torch.zeros(1, 2), torch.zeros(1))
        assert read(tmp_path / "b.jsonl")[0].token_ids == [[-1, -1]]


def test_no_rollout_is_no_line(tmp_path: Path) -> None:
    none = torch.zeros(0, 5)
    leafkernels.save_rollouts(tmp_path / "a.jsonl", none.long(), none, torch.zeros(0))
    assert (tmp_path / "a.jsonl").read_bytes() == b""


def test_every_layout_gives_the_same_file(tmp_path: Path) -> None:
    given = rollouts()
    flat = {name: tensor.flatten(0, 1) for name, tensor in given.items()}
    packed = {name: tensor.flatten() for name, tensor in flat.items()}
    offsets = torch.arange(0, 109, 9)
    uids = torch.tensor([5, 9, 6, 5, 9, 6, 5, 9, 6, 5, 9, 6])
    order = torch.tensor([0, 8, 4, 1, 9, 5, 2, 10, 6, 3, 11, 7])
    calls: list[dict[str, Any]] = [
        given,
        {**flat, "group_size": 4},
        {**{name: tensor[order] for name, tensor in flat.items()}, "groups": uids},
        {**packed, "cu_seqlens": offsets, "group_size": 4},
        {**packed, "cu_seqlens": offsets.int(), "groups": torch.arange(12) // 4},
    ]
    for number, call in enumerate(calls):
        leafkernels.save_rollouts(tmp_path / f"{number}.jsonl", **call)
    files = [(tmp_path / f"{number}.jsonl").read_bytes() for number in range(len(calls))]
    assert files == files[:1] * len(files)
    one = {name: tensor[0] for name, tensor in given.items()}
    leafkernels.save_rollouts(tmp_path / "one.jsonl", **one)
    assert (tmp_path / "one.jsonl").read_bytes() == files[0].splitlines(keepends=True)[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_appending(name: str, tmp_path: Path) -> None:
    given, path = rollouts(), tmp_path / name
    for _ in range(3):
        leafkernels.save_rollouts(path, **given, append=True)
    found = read(path)
    for start in (0, 3, 6):
        check(found[start : start + 3], given)
    # A last line without an end is not run together with the next.
    text = json.dumps({"completions": [{"token_ids": [1], "logprobs": [0], "reward": 1}]}).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    leafkernels.save_rollouts(path, **given, append=True)
    check(read(path)[1:], given)
    data = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    assert all(data.splitlines())


def test_names_texts_and_tokens_are_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    names = {"prompts": ["x", "y\nz", "w"], "prompt_ids": ["p", 7, "\ud83d"]}
    leafkernels.save_rollouts(path, **rollouts(), tokenizer=Letters(), **names)
    for number, prompt in enumerate(read(path)):
        assert (prompt.text, prompt.name) == (names["prompts"][number], str(names["prompt_ids"][number]))
        for ids, tokens in zip(prompt.token_ids, prompt.tokens, strict=True):
            assert tokens == ["abcdefghij"[token] for token in ids]


def test_a_tokenizer_of_transformers_keeps_the_space_before_a_word(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from test_command import save_tokenizer

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(save_tokenizer(tmp_path / "tokenizer"))
    ids = torch.tensor([[5, 6, 7, 4], [1, 2, 0, 9]])
    leafkernels.save_rollouts(tmp_path / "a.jsonl", ids, torch.zeros(2, 4), torch.zeros(2), tokenizer=tokenizer)
    (prompt,) = read(tmp_path / "a.jsonl")
    assert prompt.tokens[0] == [" sum", " of", "1", " x"] and prompt.tokens[1] is not None
    assert prompt.tokens[1][:2] == ["a", " a"] and prompt.tokens[1][3] == "\n"


def test_the_command_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = rollouts()
    path, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    leafkernels.save_rollouts(path, **given)
    assert main([str(path), "--out", str(out), "--show", "0", "--num-boundaries", "3"]) == 0
    expected = leafkernels.span_advantages(**given, num_boundaries=3)
    for p, line in enumerate(out.read_text().splitlines()):
        for row, completion in enumerate(json.loads(line)["completions"]):
            mask = given["response_mask"][p, row]
            found = torch.tensor(completion["advantages"], dtype=torch.float32)
            if p == 1 and row == 2:  # the hole, which the format does not know
                found[4] = 0.0
            live = mask.nonzero().flatten().tolist()
            stretch = slice(live[0], live[-1] + 1) if live else slice(0, 0)
            torch.testing.assert_close(found, expected[p, row, stretch], rtol=1e-5, atol=1e-6)


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    leafkernels.save_rollouts(path, **rollouts())
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        for append in (True, False):
            with pytest.raises(OSError, match=r"cannot write .*a.jsonl: no space left on device"):
                leafkernels.save_rollouts(path, **rollouts(), append=append)
    with pytest.raises(ValueError):
        leafkernels.save_rollouts(path, **{**rollouts(), "rewards": torch.full((3, 4), torch.inf)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.jsonl"]
    damaged = tmp_path / "b.jsonl.gz"
    damaged.write_bytes(gzip.compress(b"x" * 100)[:-9])
    with pytest.raises(OSError, match="damaged or end too early"):
        leafkernels.save_rollouts(damaged, **rollouts(), append=True)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.jsonl.gz"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "a.jsonl.zst"}, ValueError, "path must be plain or end in .gz (.jsonl, .jsonl.gz), got a.jsonl.zst"),
        ({"path": "missing/a.jsonl"}, OSError, "cannot write missing/a.jsonl: no such file or directory"),
        ({"append": 1}, TypeError, "append must be a bool, got int"),
        ({"prompts": ["x"]}, ValueError, "prompts must have one text for each of 3 prompts, got 1"),
        ({"prompt_ids": ["x"]}, ValueError, "prompt_ids must have one name for each of 3 prompts, got 1"),
        ({"rewards": torch.zeros(3, 4, 9)}, ValueError, "rewards for each token are not taken"),
        ({"rewards": torch.full((3, 4), math.inf)}, ValueError, "rewards must be finite, or NaN where it is not known"),
        ({"token_ids": torch.zeros(3, 4, 9)}, TypeError, "token_ids must hold integers, got torch.float32"),
        ({"group_size": 4}, ValueError, "group_size must be None where token_ids is (prompts, rows, tokens)"),
    ],
)
def test_wrong_arguments(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(message)):
        leafkernels.save_rollouts(**{"path": "a.jsonl", **rollouts(), **arguments})
    assert os.listdir(tmp_path) == []
