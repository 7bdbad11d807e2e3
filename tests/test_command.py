"""``python -m leafkernels``: what it writes, what it shows, what it says when something is wrong."""

import bz2
import errno
import gzip
import importlib.resources
import inspect
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from support import run_python
from torch import Tensor

import leafkernels
import python_ref
from leafkernels import ESTIMATORS
from leafkernels.__main__ import main
from leafkernels.command.credit import credit_prompt
from leafkernels.command.reading import Failure, Prompt, RolloutFile
from leafkernels.command.show import draw_prompt
from leafkernels.command.text import line_of_numbers, line_of_tokens, shorten, visible
from leafkernels.command.tree import lines_of
from leafkernels.command.writing import replacing

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["a", " b", " [red]x", "[/]", "\n", " 数", "é", "\t", "\x1b[31m", "\ud83d", " sum", ":smile:"]


def completion(token_ids: list[int], reward: float | None, logprobs: list[float | None] | None = None) -> Record:
    return {
        "token_ids": token_ids,
        "logprobs": [-0.5] * len(token_ids) if logprobs is None else logprobs,
        "reward": reward,
    }


def random_prompt(rng: random.Random, name: str, rows: int = 6) -> Record:
    """Rows that copy a start of an earlier one, some empty, some without a reward, some logprobs null."""
    completions: list[Record] = []
    for _ in range(rows):
        earlier = rng.choice(completions)["token_ids"] if completions else []
        kept = earlier[: rng.choice([0, 3, 8, 40])]
        ids = kept + [rng.randrange(len(WORDS)) for _ in range(rng.choice([0, 0, 5, 12]))]
        # Multiples of 1/64 are exact in float32, so both sides rank the same numbers.
        logprobs = [None if rng.random() < 0.1 else -rng.randrange(400) / 64 for _ in ids]
        completions.append(completion(ids, rng.choice([0, 1.0, 0.25, None]), logprobs))
        if rng.random() < 0.7:
            completions[-1]["tokens"] = [WORDS[token] for token in ids]
    return {"prompt_id": name, "prompt": "What [b]is[/b]\nthis?", "completions": completions, "kept": {"x": [1, None]}}


def random_prompts(count: int, seed: int = 0) -> list[Record]:
    rng = random.Random(seed)
    return [random_prompt(rng, f"p{index}") for index in range(count)]


def save(path: Path, records: list[Any]) -> Path:
    """JSON lines, strings taken as they are; compressed if the name says so."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def load(path: Path) -> list[Record]:
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.name.endswith(".gz") else data).splitlines()]


def nan(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def expected(record: Record, **options: Any) -> list[list[float]]:
    rows = record["completions"]
    return python_ref.span_advantages(
        [nan(row["logprobs"]) for row in rows],
        [row["token_ids"] for row in rows],
        nan([row["reward"] for row in rows]),
        **options,
    )


def check_written(source: list[Record], written: list[Record], **options: Any) -> None:
    assert len(written) == len(source)
    for record, result in zip(source, written, strict=True):
        found = [row.pop("advantages") for row in result["completions"]]
        assert result == record, "a field got lost"
        for row, reference in zip(found, expected(record, **options), strict=True):
            assert row == pytest.approx(reference, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rewards_near_the_largest_float(tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    equal = [completion([1, 2], 1e308), completion([1, 3], 1e308)]
    opposite = [completion([1], -1e308), completion([1], 1e308)]
    for rows in (equal, opposite, [completion([], None), *opposite]):
        code = main([str(save(tmp_path / "in.jsonl", [{"completions": rows}])), "--backend", backend])
        captured = capsys.readouterr()
        if code == 0:
            assert rows is equal and "1.00e+308" in captured.out
        else:
            assert "the advantages are not finite, because the rewards (or an option) are too large" in captured.err


OPTIONS: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["--num-boundaries", "4", "--min-separation", "1"], {"num_boundaries": 4, "min_separation": 1}),
    (["--num-boundaries", "0", "--normalize", "none"], {"num_boundaries": 0, "normalize": "none"}),
    (["--terms", "global", "--normalize", "reward_std"], {"terms": "global", "normalize": "reward_std"}),
    (["--terms", "local", "--leave-one-out"], {"terms": "local", "leave_one_out": True}),
    (["--multiplicity-power", "-0.5", "--backend", "torch"], {"multiplicity_power": -0.5}),
    (["--multiplicity-power", "-1e-3"], {"multiplicity_power": -1e-3}),
    (["--backend", "reference"], {}),
    # Far beyond what fits an integer of the machine.
    (["--num-boundaries", "9" * 30, "--min-separation", "1"], {"num_boundaries": 200, "min_separation": 1}),
    (["--min-separation", "9" * 30], {"min_separation": 1000}),
]


@pytest.mark.parametrize(("arguments", "options"), OPTIONS, ids=[" ".join(a) or "defaults" for a, _ in OPTIONS])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_writes_the_advantages_of_the_reference(
    tmp_path: Path, arguments: list[str], options: dict[str, Any], suffix: str
) -> None:
    prompts = random_prompts(12)
    source = save(tmp_path / f"in{suffix}", prompts)
    out = tmp_path / f"out{suffix}"
    assert main([str(source), "--out", str(out), "--show", "0", *arguments]) == 0
    check_written(prompts, load(out), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"in{suffix}", f"out{suffix}"]


def test_advantages_of_one_prompt_by_hand(tmp_path: Path) -> None:
    # Boundary 2; V_0 = 0.5, V_1 = 1: the span gets (0.5 + 0.5) / sqrt(2), its tails 0.5 + 0, the others -0.5 - 0.5.
    rows = [
        completion([1, 2, 3], 1, [-1, -1, -9]),
        completion([1, 2, 4], 1),
        completion([5, 6, 7], 0),
        completion([8], 0),
    ]
    source = save(tmp_path / "a.jsonl", [{"prompt_id": 1, "completions": rows}])
    out = tmp_path / "b.jsonl"
    assert main([str(source), "--out", str(out), "--normalize", "none", "--num-boundaries", "1"]) == 0
    found = [row["advantages"] for row in load(out)[0]["completions"]]
    span = 2**-0.5
    assert found == [pytest.approx(row) for row in ([span, span, 0.5], [span, span, 0.5], [-1.0] * 3, [-1.0])]


def test_the_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = importlib.resources.files("leafkernels.command").joinpath("sample_rollouts.jsonl.gz")
    if not sample.is_file():
        pytest.skip("the sample has not been made (examples/study/real/sample.py writes it)")
    out = tmp_path / "out.jsonl"
    assert main(["--out", str(out)]) == 0
    shown = capsys.readouterr().out
    with importlib.resources.as_file(sample) as path:
        source = load(path)
    for record in source:
        for row in record["completions"]:
            row["logprobs"] = torch.tensor(row["logprobs"]).tolist()
    written = load(out)
    for record, result in zip(source, written, strict=True):
        for row, reference in zip(result["completions"], expected(record), strict=True):
            assert row["advantages"] == pytest.approx(reference, rel=1e-9, abs=1e-9)
    assert source[0]["prompt_id"] in shown
    assert "prompts" in shown and "with different rewards" in shown


GOOD = {"prompt_id": "ok", "completions": [completion([1, 2], 1.0), completion([1, 3], 0.0)]}


def broken(**fields: Any) -> str:
    """A line whose second completion is wrong; a field set to ... is missing."""
    row = {**completion([1, 2], 1.0), **fields}
    return json.dumps({"completions": [completion([1], 0.0), {k: v for k, v in row.items() if v is not ...}]})


BAD_LINES: list[tuple[str, str]] = [
    ("{", "not JSON: expecting property name"),
    ("{} {}", "not JSON: extra data at column 4"),
    ('{"completions": [' + "9" * 5000 + "]}", "not JSON that can be read"),
    ("[" * 100_000, "not JSON that can be read"),
    ("[1]", "must be an object with a list 'completions', got a list"),
    ("null", "must be an object with a list 'completions', got null"),
    ('{"prompt_id": "x"}', "the prompt has no 'completions'"),
    ('{"completions": 3}', "completions of the prompt must be a list, got a number"),
    ('{"completions": []}', "completions is empty"),
    ('{"completions": ["x"]}', "completions[0] must be an object, got a string"),
    (broken(token_ids=...), "completions[1] has no 'token_ids'"),
    (broken(logprobs=...), "completions[1] has no 'logprobs'"),
    (broken(reward=...), "completions[1] has no 'reward'"),
    (broken(token_ids=None), "token_ids of completions[1] must be a list, got null"),
    (broken(token_ids=[1, 2.0]), "completions[1].token_ids[1] must be an integer, got 2.0"),
    (broken(token_ids=[True, 2]), "completions[1].token_ids[0] must be an integer, got true"),
    (broken(token_ids=["1", 2]), "completions[1].token_ids[0] must be an integer, got a string"),
    (broken(token_ids=[1, 2**63]), "completions[1].token_ids holds a number that does not fit 64 bits"),
    (broken(token_ids=[-(2**63) - 1, 0]), "completions[1].token_ids holds a number that does not fit 64 bits"),
    (broken(token_ids=[1, 2, 3]), "completions[1] has 3 token_ids and 2 logprobs"),
    (broken(logprobs=[-1.0, "x"]), "completions[1].logprobs[1] must be a number or null, got a string"),
    (broken(logprobs=[-1.0, 10**400]), "completions[1].logprobs holds a number that is too large"),
    (broken(tokens=["a"]), "completions[1] has 2 token_ids and 1 tokens"),
    (broken(tokens=["a", 1]), "completions[1].tokens[1] must be a string, got a number"),
    (broken(tokens="ab"), "tokens of completions[1] must be a list, got a string"),
    (broken(reward="1"), "completions[1].reward must be a number or null, got a string"),
    (broken(reward=True), "completions[1].reward must be a number or null, got true"),
    (broken(reward=-(10**400)), "completions[1].reward holds a number that is too large"),
    (broken(reward=0.25).replace("0.25", "1e400"), "completions[1].reward holds a number that is too large"),
    (
        broken(logprobs=[-0.25, 0]).replace("-0.25", "-1e400"),
        "completions[1].logprobs holds a number that is too large",
    ),
    (broken(reward=math.nan), "not JSON: NaN is none of its numbers (null: "),
    (broken(logprobs=[-math.inf, 0]), "not JSON: -Infinity is none of its numbers"),
    (broken(kept=math.inf), "not JSON: Infinity is none of its numbers"),
    ('{"a\tb": 1}', "not JSON: invalid control character at column 4"),
    ('{"a', "not JSON: unterminated string starting at column 2"),
    (broken(reward=1e308, logprobs=[0, 0]).replace("0.0}", "-1e308}"), "the advantages are not finite"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_a_bad_line_is_named_and_leaves_nothing_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    source = save(tmp_path / "in.jsonl", [GOOD, "", line, GOOD])
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    assert main([str(source), "--out", str(out), "--show", "0"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"leafkernels: {source}, line 3: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert out.read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 2


def test_bytes_that_are_not_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"a": "\xff"}\n')
    assert main([str(source)]) == 2
    assert capsys.readouterr().err == f"leafkernels: {source}, line 1: not UTF-8 text (byte 8 of the line)\n"


def check_fails_with(message: str, arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_fails_with("missing.jsonl: no such file or directory", [tmp_path / "missing.jsonl"], capsys)
    check_fails_with("is a directory", [tmp_path], capsys)
    plain = save(tmp_path / "plain.jsonl", [GOOD]).rename(tmp_path / "plain.jsonl.gz")
    check_fails_with("plain.jsonl.gz is not a gzip file, although its name ends in .gz", [plain], capsys)
    whole = save(tmp_path / "cut.jsonl.gz", random_prompts(300))
    whole.write_bytes(whole.read_bytes()[:-20])
    check_fails_with("the gzip data are damaged or end too early", [whole, "--show", "0"], capsys)
    for name, records in {"none.jsonl": [], "none.jsonl.gz": [], "blank.jsonl": ["", "  \t"]}.items():
        check_fails_with(f"{name} is empty: there is no prompt in it", [save(tmp_path / name, records)], capsys)
    empty = tmp_path / "nothing.jsonl.gz"
    empty.touch()
    check_fails_with("nothing.jsonl.gz is empty", [empty, "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["xz", "bz2", "zst", "lz4", "zip"])
@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.{kind}"])
def test_rollouts_that_are_packed_otherwise(
    kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told by their first bytes, whatever they are called; none is written under such a name."""
    plain = save(tmp_path / "plain.jsonl", [GOOD])
    packed = tmp_path / name.format(kind=kind)
    packed.write_bytes(PACKERS[kind](plain.read_bytes()))
    for words in ([packed], ["compare", packed]):
        check_fails_with(f"{packed} is packed with ", words, capsys)
    check_fails_with("--out must be plain or end in .gz", [plain, "--out", tmp_path / f"out.jsonl.{kind}"], capsys)
    assert not (tmp_path / f"out.jsonl.{kind}").exists()


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("in.jsonl", content)
    return file.getvalue()


# Of Zstandard and LZ4, which Python does not have here, the magic number alone.
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": lambda content: b"\x28\xb5\x2f\xfd" + content,
    "lz4": lambda content: b"\x04\x22\x4d\x18" + content,
    "zip": zipped,
}


@pytest.mark.parametrize("how", ["same", "link", "hard link"])
def test_a_report_never_replaces_what_is_read_or_written(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = (save(tmp_path / name, [GOOD]) for name in ("in.jsonl", "out.jsonl"))
    before = source.read_bytes(), out.read_bytes()
    for number, (path, words) in enumerate(((source, [source]), (out, [source, "--out", out]))):
        page = path if how == "same" else tmp_path / f"page{number}.html"
        if how == "link":
            page.symlink_to(path)
        elif how == "hard link":
            page.hardlink_to(path)
        check_fails_with("--html must be another file than", [*words, "--html", page], capsys)
    assert (source.read_bytes(), out.read_bytes()) == before


def test_numbers_of_any_size(tmp_path: Path) -> None:
    source = save(tmp_path / "in.jsonl", [GOOD, GOOD])
    for option in ("--limit", "--show", "--num-boundaries", "--min-separation"):
        assert main([str(source), "--out", str(tmp_path / "out.jsonl"), option, str(10**30)]) == 0
        assert len(load(tmp_path / "out.jsonl")) == 2


def test_files_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "in.jsonl", [GOOD, GOOD])
    before = source.read_bytes()
    check_fails_with("missing/out: no such file or directory", [source, "--out", tmp_path / "missing" / "out"], capsys)
    check_fails_with("not a regular file", [source, "--out", tmp_path], capsys)
    # Renamed over, the device would be gone for everybody.
    check_fails_with("/dev/null: not a regular file", [source, "--out", "/dev/null"], capsys)
    check_fails_with("--limit would drop the other prompts", [source, "--out", source, "--limit", 1], capsys)
    assert source.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--limit", "0"], ["--show", "-1"], ["--num-boundaries", "x"], ["--min-separation", "0"], ["--terms", "all"]]
    + [["--normalize", "batch"], ["--multiplicity-power", "nan"], ["--backend", "cuda"], ["a", "b"], ["--bogus"]],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton runs here")
def test_a_backend_that_cannot_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leafkernels._core.backend.INTERPRETING", False)
    check_fails_with(
        "--backend triton cannot run here", [save(tmp_path / "a.jsonl", [GOOD]), "--backend", "triton"], capsys
    )


def test_out_may_be_the_input_or_a_link_to_it(tmp_path: Path) -> None:
    prompts = random_prompts(4)
    source = save(tmp_path / "in.jsonl.gz", prompts)
    source.chmod(0o640)
    link = tmp_path / "link.jsonl.gz"
    link.symlink_to(source)
    for out in (source, link):
        assert main([str(source), "--out", str(out), "--show", "0"]) == 0
        assert link.is_symlink() and source.stat().st_mode & 0o777 == 0o640
        check_written(prompts, load(source))
    first = source.read_bytes()
    assert main([str(source), "--out", str(source), "--show", "0"]) == 0
    assert source.read_bytes() == first, "the same rollouts give the same bytes, and old advantages are replaced"


def test_a_number_that_a_float_cannot_hold_is_written_as_null(tmp_path: Path) -> None:
    record = {**GOOD, "kept": [1.5, {"huge": 0.0625}, "Infinity"]}
    source = save(tmp_path / "in.jsonl", [json.dumps(record).replace("0.0625", "-1e400")])
    assert main([str(source), "--out", str(source), "--show", "0"]) == 0
    (written,) = source.read_text().splitlines()
    found = json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["kept"] == [1.5, {"huge": None}, "Infinity"]
    assert len(found["completions"][0]["advantages"]) == 2


@pytest.mark.parametrize(("link", "target"), [("link.jsonl", "x.jsonl.gz"), ("link.jsonl.gz", "x.jsonl")])
def test_the_target_of_a_link_says_whether_to_compress(tmp_path: Path, link: str, target: str) -> None:
    prompts = random_prompts(2)
    (tmp_path / link).symlink_to(target)
    assert main([str(save(tmp_path / "in.jsonl", prompts)), "--out", str(tmp_path / link), "--show", "0"]) == 0
    assert (tmp_path / link).is_symlink()
    check_written(prompts, load(tmp_path / target))


def test_compressed_rollouts_under_any_name(tmp_path: Path) -> None:
    prompts = random_prompts(2)
    save(tmp_path / "in.jsonl.gz", prompts).rename(tmp_path / "in.jsonl")
    assert main([str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--show", "0"]) == 0
    check_written(prompts, load(tmp_path / "out.jsonl"))


def test_a_name_as_long_as_names_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "in.jsonl", random_prompts(1))
    assert main([str(source), "--out", str(tmp_path / ("x" * 255)), "--show", "0"]) == 0
    assert sorted(map(len, os.listdir(tmp_path))) == [8, 255]
    capsys.readouterr()
    for more in ([], ["--limit", 1]):
        check_fails_with("xx: file name too long", [source, "--out", tmp_path / ("x" * 256), *more], capsys)


def test_replacing(tmp_path: Path) -> None:
    """The file is the old one or the new one, never a part, and what is begun goes."""
    path = tmp_path / "report.html"
    old = os.umask(0o027)
    try:
        with replacing(path) as file:
            file.write(b"one")
            assert not path.exists()
    finally:
        os.umask(old)
    assert path.read_bytes() == b"one" and path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    with pytest.raises(Failure, match=r"report\.html: no space left on device$"), replacing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"two")
        raise ZeroDivisionError
    # A process with the same number may have been killed half-way, and another may be at it: names never meet.
    with replacing(path) as file, replacing(path) as other:
        file.write(b"three")
        other.write(b"four")
    assert path.read_bytes() == b"three" and path.stat().st_mode & 0o777 == 0o604
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_replacing_when_a_signal_ends_the_process(tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    signal.signal(number, signal.SIG_DFL)  # whatever this process was started under
    with pytest.raises(SystemExit) as ended, replacing(tmp_path / "a"), replacing(tmp_path / "b"):
        assert len(os.listdir(tmp_path)) == 2
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert os.listdir(tmp_path) == [] and signal.getsignal(number) is signal.SIG_DFL
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with replacing(tmp_path / "a"):
            os.kill(os.getpid(), number)  # as under nohup
    finally:
        signal.signal(number, before)
    assert os.listdir(tmp_path) == ["a"]


def test_limit_show_and_a_byte_order_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = random_prompts(5)
    source = save(tmp_path / "in.jsonl", ["\ufeff" + json.dumps(prompts[0]), "", *prompts[1:], "not JSON"])
    out = tmp_path / "out.jsonl"
    assert main([str(source), "--limit", "4", "--show", "2", "--out", str(out)]) == 0
    check_written(prompts[:4], load(out))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "──" in line] == ["p0", "p1", "summary"]
    assert lines[-1].endswith(f"wrote {out}")


HAND: list[Record] = [
    # Boundary 3, shared by rows 0 and 2, whose rewards are equal.
    {
        "prompt_id": "A",
        "completions": [
            completion([1, 2, 3, 4], 1, [0, -0.1, -0.1, -9]),
            completion([1, 2, 5, 6], 0),
            completion([1, 2, 3, 7], 1),
        ],
    },
    # Boundary 1, shared by two identical rows with different rewards.
    {
        "prompt_id": "B",
        "completions": [
            completion([1, 2, 3], 1, [-1, -5, -1]),
            completion([1, 2, 3], 0),
            completion([], 0),
            completion([9, 9], None, [-8, -8]),
        ],
    },
    # One rollout shares nothing with anybody.
    {"prompt_id": "C", "completions": [completion([4, 5], 1)]},
]


def test_summary_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(save(tmp_path / "in.jsonl", HAND)), "--num-boundaries", "1", "--show", "0"]) == 0
    found = {}
    for line in capsys.readouterr().out.splitlines()[1:12]:
        name, *numbers = line.strip().split("  ", 1)
        found[name.rstrip(" ¹²³")] = numbers[0].split()
    assert found == {
        "prompts": ["3"],
        "with all rewards equal": ["1", "33.3%"],
        "rollouts": ["8"],
        "same tokens as an earlier one": ["1", "12.5%"],
        "without a reward, left out": ["1", "12.5%"],
        "without a token": ["1", "12.5%"],
        "tokens": ["22"],
        "with span credit": ["8", "40.0%"],
        "boundaries selected": ["3"],
        "with a shared prefix": ["2", "66.7%"],
        "with different rewards": ["1", "33.3%"],
    }


def test_trees_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = HAND[0]["completions"] + [completion([7], 0.5), completion([7], 0.5)]
    records = [{**HAND[0], "completions": rows}, *HAND[1:]]
    source = save(tmp_path / "in.jsonl", records)
    assert main([str(source), "--num-boundaries", "1", "--normalize", "none"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    # V_0 = 0.6, V_1 = 1: (0.4 + 0.4) / sqrt(2) = 0.566. Identical rows are one line.
    assert lines[1:10] == [
        "boundary 3",
        "rollouts tokens reward advantage",
        "all 5 0.600",
        "├─ 2: #0 #2 0–3 1.000 +0.566 1 2 3",
        "│ ├─ #0 3–4 1.000 +0.400 4",
        "│ └─ #2 3–4 1.000 +0.400 7",
        "├─ #1 0–4 0.000 -1.200 1 2 5 6",
        "└─ 2× #3 #4 0–1 0.500 -0.141 7",
        "",
    ]
    assert lines[lines.index("boundary 1") + 1 :][:8] == [
        "rollouts tokens reward advantage",
        "all 4 0.333",
        "├─ 2: #0 #1 0–1 0.500 +0.236 1",
        "│ ├─ #0 1–3 1.000 +1.167 2 3",
        "│ └─ #1 1–3 0.000 -0.833 2 3",
        "├─ #2 0–0 0.000 · (no token)",
        "└─ #3 0–2 none · 9 9",
        "",
    ]
    assert "boundary 1 (not shared)" in lines
    assert "all rewards are equal: every advantage is 0" in lines


@pytest.mark.parametrize("name", ["leaf", "treerl", "tree_td"])
def test_the_lines_of_a_tree_are_its_rollouts(name: str, tmp_path: Path) -> None:
    """From the root to a leaf they are a rollout's tokens, once; each rollout has one leaf, with those equal to it."""
    with RolloutFile(save(tmp_path / "in.jsonl", random_prompts(60, seed=3))) as file:
        for prompt in file:
            credit = credit_prompt(prompt, {}, name=name)
            lines = lines_of(prompt, credit)
            leaves = [row for line in lines if line.is_leaf for row in line.rows]
            assert sorted(leaves) == list(range(len(prompt.rewards)))
            for line in lines:
                assert len({(tuple(prompt.token_ids[row][: line.end])) for row in line.rows}) == 1
                values = {value for row in line.rows for value in credit.advantages[row][line.start : line.end]}
                # A span has one advantage; a rollout without a reward, in no node, has 0.
                assert name == "tree_td" or len(values - {0.0}) <= 1
            keys = [(tuple(prompt.token_ids[row]), str(prompt.rewards[row])) for row in range(len(prompt.rewards))]
            assert len(set(keys)) <= sum(line.is_leaf for line in lines)
            for row in range(len(prompt.rewards)):
                own = [line for line in lines if row in line.rows]
                assert [line.start for line in own] == [0, *(line.end for line in own[:-1])]
                assert own[-1].is_leaf and own[-1].end == len(prompt.token_ids[row])
                assert {keys[other] for other in own[-1].rows} == {keys[row]}


def test_trees_deeper_than_the_recursion_limit(tmp_path: Path) -> None:
    rows = [completion([1] * 3000, 1.0), completion([1] * 3000, 0.0)]
    source = save(tmp_path / "in.jsonl", [{"completions": rows}])
    options = {"num_boundaries": 1400, "min_separation": 2}
    with RolloutFile(source) as file:
        prompt = next(iter(file))
    assert prompt.name == "line 1"
    found = lines_of(prompt, credit_prompt(prompt, options))
    assert len(found) == 1400 + 2 and not found[1399].is_leaf and found[-1].rows == [1]


def test_identical_rollouts_are_one_line_and_long_trees_are_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    same = [completion([1, 2, 3], 1.0)] * 30 + [completion([1, 2, 3], 0.0)] * 5
    other = [completion([1, 2, 4 + i, 5], 0.0) for i in range(100)]
    source = save(tmp_path / "in.jsonl", [{"completions": same + other}])

    def lines(*arguments: str) -> list[str]:
        assert main([str(source), "--num-boundaries", "1", *arguments]) == 0
        shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        return shown[: shown.index("")]

    whole = lines("--lines", "all")
    assert [line for line in whole if "30× #0–29" in line] and [line for line in whole if "5× #30–34" in line]
    assert sum(re.search(r"─ #\d+ ", line) is not None for line in whole) == 100
    assert not any("more lines" in line for line in whole)
    (heading, *_), tree = whole[:4], whole[4:]
    for most in (1, 7, len(tree) - 2):
        cut = lines("--lines", str(most))
        assert cut[:-1] == whole[: 4 + most] and heading == cut[0]
        assert cut[-1] == f"… {len(tree) - most} more lines (--lines all shows them)"
    # The line that says so is no shorter than a last line.
    assert lines("--lines", str(len(tree) - 1)) == whole
    default = lines()
    assert len(default) < 70 and default[-1].endswith("more lines (--lines all shows them)")


def test_a_tree_is_no_higher_than_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [completion([i], float(i % 2)) for i in range(200)]
    with RolloutFile(save(tmp_path / "in.jsonl", [{"completions": rows}])) as file:
        prompt = next(iter(file))
    console = Console(force_terminal=True, color_system=None, width=80, height=30)
    draw_prompt(console, prompt, credit_prompt(prompt, {}))
    assert 20 < len(capsys.readouterr().out.splitlines()) <= 30


def test_a_thousand_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    rows = [completion([rng.randrange(3) for _ in range(40)], float(rng.random() < 0.5)) for _ in range(1000)]
    source = save(tmp_path / "in.jsonl", [{"completions": rows}])
    for name in ("leaf", "tree_td"):
        assert main([str(source), "--estimator", name]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) < 100 and any("more lines" in line for line in shown)


def packed(record: Record) -> dict[str, Any]:
    rows = record["completions"]
    lengths = [len(row["token_ids"]) for row in rows]
    return {
        "logprobs": torch.tensor(nan([x for row in rows for x in row["logprobs"]])),
        "token_ids": torch.tensor([x for row in rows for x in row["token_ids"]], dtype=torch.int64),
        "rewards": torch.tensor(nan([row["reward"] for row in rows]), dtype=torch.float64),
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
    }


ESTIMATOR_OPTIONS: list[tuple[str, list[str], dict[str, Any]]] = [
    *((name, [], {}) for name in ESTIMATORS),
    (
        "tree_td",
        ["--shrinkage", "2", "--group-weight", "0.25", "--normalize", "reward_std"],
        {"shrinkage": 2.0, "group_weight": 0.25, "normalize": "reward_std"},
    ),
    ("tree_td", ["--shrinkage", "inf"], {"shrinkage": math.inf}),
    ("treerl", ["--num-boundaries", "4", "--min-separation", "1"], {"num_boundaries": 4, "min_separation": 1}),
]


@pytest.mark.parametrize(("name", "arguments", "options"), ESTIMATOR_OPTIONS)
def test_every_estimator(
    name: str, arguments: list[str], options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = random_prompts(6)
    source, out = save(tmp_path / "in.jsonl", prompts), tmp_path / "out.jsonl"
    assert main([str(source), "--estimator", name, "--out", str(out), *arguments]) == 0
    for record, result in zip(prompts, load(out), strict=True):
        advantages = ESTIMATORS[name](**packed(record), **options)
        lengths = [len(row["token_ids"]) for row in record["completions"]]
        for row, values in zip(result["completions"], advantages.split(lengths), strict=True):
            assert row["advantages"] == pytest.approx(values.tolist(), rel=1e-5, abs=1e-6)
    shown = capsys.readouterr().out
    has_spans = "num_boundaries" in inspect.signature(ESTIMATORS[name]).parameters
    assert ("boundaries selected" in shown) == ("with span credit" in shown) == has_spans


def test_forks_are_shown_where_credit_has_no_boundaries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "in.jsonl", HAND[:1])
    assert main([str(source), "--estimator", "tree_td", "--group-weight", "0"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    # The mean is 2/3; of those with token 3 after 1 2 it is 1, of the other 0.
    assert lines[1:8] == [
        "rollouts tokens reward advantage",
        "all 3 0.667",
        "└─ 3: #0–2 0–2 0.667 +0.000 1 2",
        "├─ 2: #0 #2 2–3 1.000 +0.333 3",
        "│ ├─ #0 3–4 1.000 +0.000 4",
        "│ └─ #2 3–4 1.000 +0.000 7",
        "└─ #1 2–4 0.000 -0.667…+0.000 5 6",
    ]


def test_a_scheme_that_is_added_is_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an option of its own name, by its signature alone."""

    def mine(logprobs: Any, token_ids: Any, rewards: Any, *, group_weight: float = 2.0, **more: Any) -> torch.Tensor:
        """The position, times a weight."""
        shape = token_ids.shape
        return torch.arange(token_ids.numel()).reshape(shape).float() * group_weight + 0.0 * logprobs.nan_to_num()

    monkeypatch.setitem(ESTIMATORS, "mine", mine)
    pytest.importorskip("jinja2")
    source, out, page = save(tmp_path / "in.jsonl", HAND[:1]), tmp_path / "out.jsonl", tmp_path / "page.html"
    words = [str(source), "--estimator", "mine", "--out", str(out), "--html", str(page)]
    assert main([*words, "--group-weight", "0.5"]) == 0
    flat = [value for row in load(out)[0]["completions"] for value in row["advantages"]]
    assert flat == [0.5 * t for t in range(12)]
    text = page.read_text(encoding="utf-8")
    assert 'value="mine"' in text and text.index('value="mine"') < text.index('value="leaf"')
    assert main([str(source), "--html", str(page)]) == 0
    assert 'value="mine"' in page.read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["compare"]) == 0
    assert re.search(r"^ +\*? +mine ", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--estimator", "grpo", "--num-boundaries", "3"], "--num-boundaries is not an option of --estimator grpo"),
        (["--estimator", "tree_td", "--terms", "both"], "(its options: --shrinkage, --group-weight, --normalize)"),
        (["--shrinkage", "1"], "--shrinkage is not an option of --estimator leaf"),
        (["--estimator", "rloo", "--preset", "leaf-paper"], "is not an option of --estimator rloo (its options: none)"),
        (["--estimator", "ppo"], "argument --estimator: invalid choice: 'ppo'"),
        (["--lines", "0"], "argument --lines: must be an integer of at least 1, got '0'"),
        (["--lines", "some"], "argument --lines: must be an integer of at least 1, got 'some'"),
    ],
)
def test_options_that_no_scheme_reads(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_values_that_a_scheme_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "in.jsonl", [GOOD])
    td = [source, "--estimator", "tree_td"]
    check_fails_with("--estimator tree_td: shrinkage must be at least 0, got -1.0", [*td, "--shrinkage", "-1"], capsys)
    check_fails_with("--estimator tree_td: normalize must be one of", [*td, "--normalize", "span"], capsys)


def save_tokenizer(folder: Path, **parts: Any) -> Path:
    """A tokenizer of ten ids in a folder, as transformers saves one."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", "a", "▁a", "b", "▁x", "▁sum", "▁of", "1", "2", "\n"]
    whole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    whole.decoder = decoders.Metaspace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>").save_pretrained(folder)
    return folder


def test_ids_without_text_are_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The space before a word too; the file's own tokens stay."""
    folder = save_tokenizer(tmp_path / "tokenizer")
    rows = [completion([5, 6, 7], 1.0), completion([5, 4, 9], 0.0), {**completion([5, 4], 0.0), "tokens": ["S", "T"]}]
    source = save(tmp_path / "in.jsonl", [{"completions": rows}])
    words = [str(source), "--tokenizer", str(folder), "--num-boundaries", "0"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if "─ #" in line] == ["·sum·of1", "·sum·x↵", "ST"]
    beyond = save(tmp_path / "beyond.jsonl", [GOOD, {"completions": [completion([10], 1.0)]}])
    message = f"{beyond}, line 2: token id 10 is none of the 10 of --tokenizer {folder}"
    check_fails_with(message, [beyond, "--tokenizer", folder], capsys)


def test_tokenizers_that_cannot_be_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "in.jsonl", [GOOD])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = tmp_path / "code"
    code.mkdir()
    (code / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}')
    (code / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')
    (code / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\nclass Config: pass\n")
    (tmp_path / "empty").mkdir()
    pytest.importorskip("transformers")
    for name in (tmp_path / "empty", code, tmp_path / "missing", "not a name"):
        check_fails_with(f"--tokenizer {name} cannot be loaded: ", [source, "--tokenizer", name], capsys)
    assert not (tmp_path / "ran").exists(), "remote code never runs"
    monkeypatch.setitem(sys.modules, "transformers", None)
    check_fails_with("--tokenizer needs transformers", [source, "--tokenizer", "x"], capsys)


@pytest.mark.parametrize("columns", [20, 60, 80, 200])
def test_plain_lines_that_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    prompts = random_prompts(20)
    long = [completion([token] * 5000, 1.0 - token) for token in (0, 1)]
    long[0]["tokens"] = [" [red]数"] * 5000
    prompts += [{"prompt_id": "[bold]" + "z" * 300, "completions": long * 20}, {"completions": [completion([], None)]}]
    assert main([str(save(tmp_path / "in.jsonl", prompts)), "--show", "99", "--num-boundaries", "3"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\r" not in shown and "\ud83d" not in shown
    assert all(cell_len(line) <= columns and line == line.rstrip() for line in shown.splitlines())
    if columns == 200:
        assert "·[red]x" in shown and "[/]" in shown and ":smile:" in shown and "What [b]is[/b]↵this?" in shown
        assert "\\x1b[31m" in shown and "\\ud83d" in shown and "…" in shown


def test_colours_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RolloutFile(save(tmp_path / "in.jsonl", HAND)) as file:
        prompt = next(iter(file))
    console = Console(force_terminal=True, color_system="truecolor", width=100, markup=False, highlight=False)
    draw_prompt(console, prompt, credit_prompt(prompt, {"num_boundaries": 1}))
    by_row = {
        line.split("#")[1][0]: line for line in capsys.readouterr().out.splitlines() if "─ " in line and "#" in line
    }
    assert "48;2;150;24;24m1 2 5 6" in by_row["1"], "the largest advantage has the full colour"
    red, green, blue = map(int, by_row["2"].split("48;2;")[1].split("m")[0].split(";"))
    assert 58 > red >= 16 and 58 < green < 112 and blue <= 58, "a smaller one is paler"


@pytest.mark.parametrize("width", range(1, 30))
def test_shortening(width: int) -> None:
    for text in ("", "abc", "abcdefghijklmnopqrstuvwxyz", "数学数学数学数学数学", "a数" * 20):
        short = shorten(text, width)
        assert cell_len(short) <= width
        assert short == text or cell_len(short) >= width - 2
    for count in (0, 1, 5, 50, 10_000):
        line = line_of_tokens([" ab"] * count, width)
        assert line == shorten("·ab" * count, width)
        numbers = line_of_numbers(range(100, 100 + count), width)
        words = numbers.split(" ")
        if numbers != "…":
            assert len(numbers) <= width
        assert all(word == "…" or 100 <= int(word) < 100 + count for word in words if word)
        assert ("…" in words) == (4 * count - 1 > width)


def test_visible() -> None:
    assert visible(" a\n\t\r") == "·a↵⇥␍" and visible(" a\n", spaces=False) == " a↵"
    assert visible("\x1b\x07\x9b\u202e\u200d\ud83d\u2028") == "\\x1b\\x07\\x9b\\u202e\\u200d\\ud83d\\u2028"
    assert visible("é数[red]🙂") == "é数[red]🙂"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    prompts = [{**prompt, "ballast": "x" * 20_000} for prompt in random_prompts(10)]
    small = save(tmp_path / "small.jsonl", prompts)
    large = save(tmp_path / "large.jsonl.gz", prompts * 25)
    arguments = ["--show", "0", "--out", str(tmp_path / "out.jsonl")]
    main([str(small), *arguments])  # what is imported and cached at first use is not counted below
    peaks = []
    for source in (small, large):
        tracemalloc.start()
        assert main([str(source), *arguments]) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "out.jsonl").stat().st_size > 5_000_000
    assert peaks[1] < peaks[0] + 500_000


@pytest.mark.slow
def test_reading_holds_one_prompt(tmp_path: Path) -> None:
    source = save(tmp_path / "many.jsonl", random_prompts(100) * 30)
    with RolloutFile(source) as file:
        tracemalloc.start()
        positions = [file.position() for _ in file]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(positions) == 3000 and positions[-1] == source.stat().st_size == file.size
    assert positions == sorted(positions) and positions[0] < 100_000
    assert peak < 500_000 < source.stat().st_size


def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "leafkernels", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", env=environment, **options)


@pytest.mark.slow
def test_as_a_process(tmp_path: Path) -> None:
    prompts = random_prompts(40)
    source = save(tmp_path / "in.jsonl", [*prompts, "oops"])
    good = save(tmp_path / "good.jsonl", prompts)
    # Side by side, because each spends its time on importing PyTorch.
    failing = start(source, "--show", "1")
    deaf = start(good, "--show", "40")
    writing = start(good, "--show", "40", "--out", tmp_path / "out.jsonl")
    for process in (deaf, writing):
        assert process.stdout is not None
        process.stdout.close()

    out, err = failing.communicate(timeout=60)
    assert failing.returncode == 2
    assert err == f"leafkernels: {source}, line 41: not JSON: expecting value at column 1\n"
    assert out.startswith("p0 ──") and "\x1b" not in out
    for process, code in ((deaf, 141), (writing, 0)):
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == code
        process.stderr.close()
    check_written(prompts, load(tmp_path / "out.jsonl"))


def run_in_shell(redirection: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = f'"$@" {redirection}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["sh", "-c", command, "sh", sys.executable, "-m", "leafkernels", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.slow
def test_streams_that_are_closed(tmp_path: Path) -> None:
    """The file is written all the same, whatever number its descriptor gets."""
    prompts = random_prompts(3)
    source, out = save(tmp_path / "in.jsonl", prompts), tmp_path / "out.jsonl"
    for redirection in ("2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
        run = run_in_shell(redirection, source, "--out", out)
        assert run.returncode == 0 and run.stderr == "" and ("summary" in run.stdout) == (redirection == "2>&-")
        check_written(prompts, load(out))
        out.unlink()
    run = run_in_shell("2>&-", tmp_path / "missing.jsonl")
    assert run.returncode == 2 and run.stdout == run.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_printed(tmp_path: Path) -> None:
    prompts = random_prompts(3)
    source, out = save(tmp_path / "in.jsonl", prompts), tmp_path / "out.jsonl"
    why = "leafkernels: cannot print: no space left on device"
    assert run_in_shell("> /dev/full", source).stderr == f"{why}\n"
    for show in ("0", "2"):
        run = run_in_shell("> /dev/full", source, "--out", out, "--show", show)
        assert run.returncode == 2 and run.stderr == f"{why} ({out} has been written)\n"
        check_written(prompts, load(out))
        out.unlink()


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [(signal.SIGINT, 130, "leafkernels: interrupted\n"), (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, "")],
)
def test_shows_a_prompt_before_the_next_is_there_and_leaves_nothing_behind_when_interrupted(
    tmp_path: Path, ending: signal.Signals, code: int, said: str
) -> None:
    fifo = tmp_path / "pipe.jsonl"
    os.mkfifo(fifo)
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    # Whatever this process was started under: nohup ignores one of them, a shell's "&" another.
    process = start(fifo, "--out", out, preexec_fn=lambda: signal.signal(ending, signal.SIG_DFL))
    with open(fifo, "w") as feed:
        feed.write(json.dumps(HAND[0]) + "\n")
        feed.flush()
        assert process.stdout is not None
        while "#2" not in (line := process.stdout.readline()):
            assert line, "it ended"
        assert len(list(tmp_path.iterdir())) == 3, "the partial file lies beside the other"
        process.send_signal(ending)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == said
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "pipe.jsonl"]


def test_nothing_is_said_of_a_numpy_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['numpy'] = None\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert run_python("-m", "leafkernels", "--limit", "1", cwd=tmp_path, PYTHONPATH=path).stderr == ""


# --- Rollouts of a training loop --------------------------------------------------------------------------------------


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
        ({"rewards": torch.zeros(3, 4, 9)}, ValueError, "shape (3, 4, 9): those at tokens are step_rewards"),
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
