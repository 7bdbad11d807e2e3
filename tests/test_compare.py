"""``python -m leafkernels compare``: what it measures, shows, writes and refuses."""

import importlib.util
import io
import json
import math
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_python, without_interpreter

import leafkernels
from leafkernels.__main__ import main
from leafkernels.command.compare import _in_words, _plot
from leafkernels.command.reading import RolloutFile

Record = dict[str, Any]


def prompt(number: int, rows: int = 40, tokens: int = 6) -> Record:
    """The reward hangs on the first token, and on chance."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, (rows, tokens), generator=generator)
    rewards = torch.rand(rows, generator=generator) < 0.2 + 0.6 * (ids[:, 0] == 1)
    completions = [
        {"token_ids": row, "logprobs": [-1.0] * (tokens - 1) + [None], "reward": float(reward)}
        for row, reward in zip(ids.tolist(), rewards.tolist(), strict=True)
    ]
    return {"prompt_id": f"p{number}", "completions": completions}


def save(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Six prompts that can be measured, one of too few rollouts, one of equal rewards, one with rewards missing."""
    flat, missing = prompt(7), prompt(8)
    for row in flat["completions"]:
        row["reward"] = 1.0
    for row in missing["completions"][:17]:
        row["reward"] = None
    return save(
        tmp_path / "in.jsonl", [*map(prompt, range(3)), prompt(6, rows=23), flat, missing, *map(prompt, (3, 4, 5))]
    )


def measured(file: Path, tmp_path: Path, *arguments: str) -> Record:
    out = tmp_path / "out.json"
    assert main(["compare", str(file), "--json", str(out), *arguments]) == 0
    return json.loads(out.read_text())


def test_it_is_what_the_function_measures(file: Path, tmp_path: Path) -> None:
    names = ("treerl", "grpo", "tempo")
    result = measured(
        file, tmp_path, "--schemes", ",".join(names), "--rollouts", "6", "--context", "2", "--splits", "3"
    )
    assert {name: result[name] for name in ("rollouts", "context", "splits")} == {
        "rollouts": 6,
        "context": 2,
        "splits": 3,
    }
    assert (result["prompts"], result["too_few_completions"]) == (9, 0)
    parts = []
    with RolloutFile(file) as source:
        for number, line in enumerate(source):
            call = torch.zeros(len(line.rewards), 6), torch.tensor(line.token_ids), torch.tensor(line.rewards)
            schemes = {name: leafkernels.ESTIMATORS[name] for name in names}
            part = leafkernels.gradient_agreement(schemes, *call, num_rollouts=6, num_splits=3, context=2, seed=number)
            parts.append(part.cosines)
    whole = part._replace(cosines=torch.cat(parts))
    assert result["measured"] == whole.num_measured >= 6
    assert [row["scheme"] for row in result["schemes"]] == sorted(names, key=lambda name: -whole.mean()[name])
    for row in result["schemes"]:
        difference = whole.difference(row["scheme"], "grpo")
        assert row["agreement"] == pytest.approx(whole.mean()[row["scheme"]], abs=1e-9)
        assert (row["to_grpo"], row["to_grpo_low"], row["to_grpo_high"]) == pytest.approx(difference, abs=1e-9)


def test_what_it_prints(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(file, tmp_path)
    captured = capsys.readouterr()
    lines = [" ".join(line.split()) for line in captured.out.splitlines()]
    text = " ".join(lines)
    assert captured.err == ""
    # Always in the order of the gradients, and GRPO is there.
    names = [row["scheme"] for row in result["schemes"]]
    is_default = [name for name, scheme in leafkernels.ESTIMATORS.items() if not scheme.is_scaled_grpo]
    assert sorted(names) == sorted(is_default)
    assert "opo" in names and "rloo" not in names
    agreement = [row["agreement"] for row in result["schemes"]]
    assert agreement == sorted(agreement, reverse=True)
    for row in result["schemes"]:
        mark = "" if row["is_beaten"] else "* "
        assert any(line.startswith(f"{mark}{row['scheme']} {row['agreement']:.3f}") for line in lines)
    assert not result["schemes"][0]["is_beaten"]
    assert " ".join(result["in_words"].split()) in text
    assert result["measured"] == 6
    assert "6 of 9 prompts, 8 splits of each. 2 have fewer than 24 scored rollouts. In 1 nearly all rewards" in text
    assert "It misleads" in text and "an n-gram policy that looks back 4 tokens" in text


def test_a_terminal_sees_how_far_it_is(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["compare", str(file), "--splits", "1", "--schemes", "grpo"]) == 0
    captured = capsys.readouterr()
    # The last that is drawn, before it is wiped out: all of the file, and all of its prompts.
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", captured.err).strip().splitlines()[-1]
    assert "reading" in last and "100%" in last and "9 prompts" in last
    assert "reading" not in captured.out


def test_a_prompt_of_empty_completions_is_counted_apart(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hollow = prompt(9)
    for completion in hollow["completions"]:
        completion["token_ids"], completion["logprobs"] = [], []
    without = measured(file, tmp_path)
    capsys.readouterr()
    file.write_text(file.read_text() + json.dumps(hollow) + "\n")
    result = measured(file, tmp_path)
    changed = {"prompts": 10, "empty": 1}
    assert without["empty"] == 0 and result == without | changed
    text = " ".join(capsys.readouterr().out.split())
    assert "6 of 10 prompts" in text and "In 1 all completions are empty. In 1 nearly all rewards are equal." in text
    alone = save(tmp_path / "alone.jsonl", [hollow])
    assert main(["compare", str(alone)]) == 2
    sentence = f"{alone}: no prompt can be measured: in 1 of 1 all completions are empty"
    assert capsys.readouterr().err == f"leafkernels: {sentence}\n"


def test_it_measures_what_ships(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sample, named or not: an order with intervals, and no refusal."""
    sample = Path(leafkernels.__file__).parent / "command" / "sample_rollouts.jsonl.gz"
    tables = []
    for words in ([], [str(sample)]):
        out = tmp_path / f"{len(words)}.json"
        assert main(["compare", *words, "--json", str(out)]) == 0
        tables.append(capsys.readouterr().out.replace(out.name, ""))
        result = json.loads(out.read_text())
        assert result["prompts"] == 24 and result["measured"] >= 15 and result["too_few_completions"] == 0
        assert all(row["to_grpo_low"] <= row["to_grpo"] <= row["to_grpo_high"] for row in result["schemes"])
        assert result["in_words"].startswith("On these rollouts ")
    assert tables[0] == tables[1]


def test_two_runs_write_the_same_bytes(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = []
    for run in ("a", "b"):
        paths = [tmp_path / f"{run}.json", tmp_path / f"{run}.png"]
        assert main(["compare", str(file), "--json", str(paths[0]), "--plot", str(paths[1])]) == 0
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    assert written[0][1].startswith(b"\x89PNG")


def test_two_runs_draw_the_same_bytes_of_every_kind(file: Path, tmp_path: Path) -> None:
    """At another time of day, and in another process as far as an SVG's names go."""
    pytest.importorskip("matplotlib")
    result = measured(file, tmp_path, "--splits", "1", "--schemes", "leaf,tempo")
    for kind in ("svg", "pdf", "png"):
        pictures = [io.BytesIO(), io.BytesIO()]
        for picture in pictures:
            _plot(result, picture, kind)
        assert pictures[0].getvalue() == pictures[1].getvalue() and len(pictures[0].getvalue()) > 1000


NAMES = ["same", "dotted", "link", "link to a link", "hard link"]


def name_again(path: Path, how: str) -> Path:
    """Another name for the file."""
    if how == "dotted":
        return path.parent / "." / ".." / path.parent.name / path.name
    other = path.parent / f"other {how}"
    if how == "hard link":
        other.hardlink_to(path)
    elif how != "same":
        first = path.parent / "first"
        first.symlink_to(path)
        other.symlink_to(path.name if how == "link" else first.name)
    return path if how == "same" else other


@pytest.mark.parametrize("how", NAMES)
def test_outputs_never_replace_the_rollouts(
    how: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, other = file.read_bytes(), name_again(file, how)
    there = sorted(tmp_path.iterdir())
    for option in ("--json", "--plot") if importlib.util.find_spec("matplotlib") else ("--json",):
        named = other
        if option == "--plot":  # a picture by its name
            named = tmp_path / "a.png"
            named.symlink_to(other)
        for source, out in ((file, named), (named, file)):
            if option == "--plot" and out is file:
                continue
            assert main(["compare", str(source), option, str(out)]) == 2
            assert f"{option} must be another file than {source}, which it would replace" in capsys.readouterr().err
    (tmp_path / "a.png").unlink(missing_ok=True)
    assert file.read_bytes() == before and sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize("how", [*NAMES, "upper case", "there already", "dangling link"])
def test_outputs_never_replace_each_other(
    how: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    before, out = file.read_bytes(), tmp_path / "a.png"
    if how in ("link", "link to a link", "hard link", "there already"):
        out.write_text("precious")
    other = out
    if how == "upper case":
        other = tmp_path / "A.PNG"
    elif how == "dangling link":
        other = tmp_path / "dangling"
        other.symlink_to(out.name)
    elif how != "there already":
        other = name_again(out, how)
    there = {path: path.read_bytes() for path in tmp_path.iterdir() if path.exists()}
    assert main(["compare", str(file), "--json", str(other), "--plot", str(out)]) == 2
    said = capsys.readouterr()
    assert said.err == f"leafkernels: --plot must be another file than {other}, which --json writes\n" and not said.out
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.exists()} == there
    assert file.read_bytes() == before


@pytest.mark.slow
def test_an_output_may_be_standard_output(file: Path, tmp_path: Path) -> None:
    """A pipe, or the file that the shell opened: what is printed and what is written are both there."""
    words = ["-m", "leafkernels", "compare", str(file), "--splits", "1", "--json"]
    printed = run_python(*words, "/dev/stdout").stdout
    with open(tmp_path / "out.txt", "wb") as out:
        command = [sys.executable, *words, "out.txt"]
        subprocess.run(command, cwd=tmp_path, env=without_interpreter(), stdout=out, check=True, timeout=120)
    found = (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert found.replace("out.txt", "/dev/stdout") == printed
    assert '"in_words"' in found and "gradient ¹" in found


def test_schemes_that_differ_by_a_factor_are_not_told_apart(file: Path, tmp_path: Path) -> None:
    """Their cosines differ by the rounding of float32, always to one side on so few prompts."""
    result = measured(file, tmp_path, "--schemes", "grpo,rloo,dr_grpo")
    assert not any(row["is_beaten"] for row in result["schemes"])
    assert "better than" not in result["in_words"] and "Worse" not in result["in_words"]


def test_grpo_is_measured_whatever_is_asked_for(file: Path, tmp_path: Path) -> None:
    result = measured(file, tmp_path, "--schemes", "leaf")
    assert sorted(row["scheme"] for row in result["schemes"]) == ["grpo", "leaf"]


def test_a_file_of_any_length_takes_the_memory_of_a_prompt(tmp_path: Path) -> None:
    """Of each prompt a few numbers stay: a hundred more take less than one prompt's tokens."""
    peaks = []
    for count in (5, 30):
        records = [prompt(number, rows=24, tokens=200) for number in range(count)]
        path = save(tmp_path / "long.jsonl", records)
        del records
        main(["compare", str(path), "--splits", "1", "--schemes", "grpo", "--context", "0"])  # what is loaded once
        tracemalloc.start()
        main(["compare", str(path), "--splits", "1", "--schemes", "grpo", "--context", "0"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A prompt of lists takes 24 * 200 * 2 * 8 bytes at least.
    assert peaks[1] - peaks[0] < 76_800


def row(scheme: str, agreement: float, low: float, high: float, is_beaten: bool) -> Record:
    middle = (low + high) / 2
    return {
        "scheme": scheme,
        "agreement": agreement,
        "to_grpo": middle,
        "to_grpo_low": low,
        "to_grpo_high": high,
        "is_beaten": is_beaten,
    }


GRPO = row("grpo", 0.2, 0.0, 0.0, True)
WORDS = [
    (
        [row("tree_td", 0.23, 0.02, 0.04, False), row("tempo", 0.22, 0.01, 0.03, False), GRPO,
         row("leaf", 0.19, -0.02, -0.01, True)],
        40,
        "On these rollouts tree_td agrees best with what it has not seen (0.230), better than grpo by 0.030 (+0.020 to "
        "+0.040). May be as good: tempo. Worse than grpo: leaf.",
    ),
    (
        [row("tempo", 0.21, -0.01, 0.03, False), {**GRPO, "is_beaten": False}],
        40,
        "On these rollouts tempo agrees best with what it has not seen (0.210), but its difference from grpo may be 0.",
    ),
    (
        [{**GRPO, "is_beaten": False}, row("leaf", 0.19, -0.02, -0.01, True)],
        5,
        "On these rollouts grpo agrees best with what it has not seen (0.200). Worse than grpo: leaf.",
    ),
    ([GRPO], 4, "4 prompts are too few to say which scheme agrees best: 5 are needed."),
    ([GRPO], 1, "1 prompt is too few to say which scheme agrees best: 5 are needed."),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "count", "text"), WORDS)
def test_the_sentence(rows: list[Record], count: int, text: str) -> None:
    assert _in_words({"schemes": rows, "measured": count}) == text


@pytest.mark.parametrize("count", [1, 4])
def test_fewer_than_five_prompts_have_neither_an_order_nor_intervals(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = save(tmp_path / "few.jsonl", [prompt(number) for number in range(count)])
    result = measured(few, tmp_path, "--schemes", "tempo,leaf")
    assert [row["scheme"] for row in result["schemes"]] == ["tempo", "leaf", "grpo"]
    for row in result["schemes"]:
        assert row["to_grpo_low"] is None and row["to_grpo_high"] is None and row["is_beaten"] is False
        assert math.isfinite(row["to_grpo"])
    shown = capsys.readouterr().out
    assert "too few to say which scheme agrees best" in shown
    assert not re.search(r"better|agrees best with|\* (tempo|leaf|grpo)|[+-]0\.\d+ \[", shown)
    if importlib.util.find_spec("matplotlib"):
        picture = tmp_path / "few.png"
        assert main(["compare", str(few), "--plot", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_a_person_can_mend(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = save(tmp_path / "empty.jsonl", [])
    few = save(tmp_path / "few.jsonl", [prompt(0, rows=23), prompt(1, rows=20)])
    flat = prompt(2)
    for completion in flat["completions"]:
        completion["reward"] = 0.5
    mixed = save(tmp_path / "mixed.jsonl", [prompt(0, rows=23), flat])
    huge = prompt(3)
    huge["completions"][0]["reward"] = 1e300
    large = save(tmp_path / "large.jsonl", [prompt(2), huge])
    cases: list[tuple[list[str], str]] = [
        ([str(empty)], f"{empty} is empty: there is no prompt in it"),
        (
            [str(few)],
            f"{few}: no prompt can be measured: 2 of 2 have fewer than 24 scored completions, which --rollouts 8 needs",
        ),
        (
            [str(mixed)],
            f"{mixed}: no prompt can be measured: 1 of 2 have fewer than 24 scored completions, which --rollouts 8 "
            "needs, and in 1 of 2 fewer than 8 rewards differ from the commonest",
        ),
        (
            [str(large)],
            f"{large}, line 2: rewards must be at most 1e+37 in size, or NaN for a rollout without one, got 1e+300",
        ),
        ([str(tmp_path / "none.jsonl")], f"cannot read {tmp_path / 'none.jsonl'}: no such file or directory"),
        ([str(file), "--json", str(tmp_path)], f"cannot write {tmp_path}: not a regular file"),
    ]
    for arguments, sentence in cases:
        before = sorted(tmp_path.iterdir())
        assert main(["compare", *arguments]) == 2
        assert capsys.readouterr().err == f"leafkernels: {sentence}\n"
        assert sorted(tmp_path.iterdir()) == before
    pytest.importorskip("matplotlib")
    assert main(["compare", str(file), "--plot", str(tmp_path / "a.docx")]) == 2
    assert "--plot must name a picture (.png, .svg or .pdf), got" in capsys.readouterr().err
    assert not (tmp_path / "a.docx").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--schemes", "leaf,ppo"], f"must be some of {','.join(leafkernels.ESTIMATORS)}, got 'ppo'"),
        (["--rollouts", "1"], "must be an integer of at least 2, got '1'"),
        (["--splits", str(10**30)], f"must be an integer of at most 10000, got '{10**30}'"),
        (["--splits", "0"], "must be an integer of at least 1, got '0'"),
        (["--context", "-1"], "must be an integer of at least 0, got '-1'"),
    ],
)
def test_options(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", "in.jsonl", *arguments])
    assert ended.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())


def test_a_file_named_compare_can_be_shown(file: Path, tmp_path: Path) -> None:
    (tmp_path / "compare").write_bytes(file.read_bytes())
    assert "summary" in run_python("-m", "leafkernels", "./compare", "--show", "0", cwd=tmp_path).stdout


def test_missing_accuracy_is_null(tmp_path: Path) -> None:
    """Rows that share nothing: no token has a truth, and JSON has no NaN."""
    record = prompt(0)
    for number, completion in enumerate(record["completions"]):
        completion["token_ids"] = [100 * number + t for t in range(6)]
    result = measured(save(tmp_path / "apart.jsonl", [record]), tmp_path)
    assert all(math.isfinite(row["agreement"]) for row in result["schemes"])
    assert all(row["token_accuracy"] in (0.0, None) for row in result["schemes"])


def test_step_rewards_of_the_file(tmp_path: Path) -> None:
    """Added where they happen; a completion may have no reward beside them, and another none of them."""
    records = [prompt(number) for number in range(6)]
    for record in records:
        for completion in record["completions"]:
            earned = float(completion["token_ids"][3] == 0)
            completion["step_rewards"] = [0.0] * 3 + [earned] + [0.0] * 2
        del record["completions"][0]["reward"]
        del record["completions"][1]["step_rewards"]
    result = measured(save(tmp_path / "steps.jsonl", records), tmp_path, "--schemes", "tree_td,grpo,dr_grpo")
    parts = []
    with RolloutFile(tmp_path / "steps.jsonl") as source:
        for number, line in enumerate(source):
            rows = records[number]["completions"]
            ends = torch.tensor([row.get("reward", 0.0) for row in rows], dtype=torch.float64)
            steps = torch.tensor([row.get("step_rewards", [0.0] * 6) for row in rows], dtype=torch.float64)
            assert line.rewards == (ends + steps.sum(1)).tolist()
            call = torch.zeros(len(rows), 6), torch.tensor(line.token_ids), ends
            schemes = {name: leafkernels.ESTIMATORS[name] for name in ("tree_td", "grpo", "dr_grpo")}
            parts.append(leafkernels.gradient_agreement(schemes, *call, step_rewards=steps, seed=number).cosines)
    expected = dict(zip(schemes, torch.cat(parts).nanmean(1).nanmean(0).tolist(), strict=True))
    found = {row["scheme"]: row["agreement"] for row in result["schemes"]}
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([1.0], "has 6 token_ids and 1 step_rewards"),
        (["1"] * 6, r"step_rewards\[0\] must be a number, got a string"),
        ([None] * 6, r"step_rewards\[0\] must be a number, got null"),
        ([1e308] * 6, "sum to a number that is too large"),
        (3, "step_rewards of completions.2. must be a list, got a number"),
    ],
)
def test_step_rewards_that_are_none(steps: Any, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = prompt(0)
    record["completions"][2]["step_rewards"] = steps
    assert main(["compare", str(save(tmp_path / "in.jsonl", [record]))]) == 2
    assert re.search(text, " ".join(capsys.readouterr().err.split()))
