"""The report: what is in the page, that text in it never runs, and how it looks in a browser."""

import base64
import gzip
import html
import inspect
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, browsing, find_browser
from support import run_python
from test_command import GOOD, check_fails_with, completion, random_prompts, save, start

import leafkernels
from leafkernels.__main__ import main
from leafkernels.command.credit import credit_prompt
from leafkernels.command.profile import Profile
from leafkernels.command.reading import RolloutFile
from leafkernels.command.tree import pieces_of

pytest.importorskip("jinja2", reason="needs jinja2: pip install -e '.[html]'")

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "leafkernels" / "command" / "page"
Record = dict[str, Any]

# Text that ends a tag, an attribute or a comment, that turns lines round, that cannot be seen, or that is no text.
NASTY = [
    "<script>window.ran = 1</script>",
    "</script><script>window.ran = 2</script>",
    "</style><style>body { display: none }",
    '"><img src=x onerror="window.ran = 3">',
    "'; window.ran = 4; '",
    "<!--<script>",
    "-->",
    "]]>",
    "&lt;b&gt;&amp;",
    "{{ 7 * 7 }}{% raw %}",
    "\u202eevil\u202c",
    "a\u200bb\ufeff",
    "\ud83d",
    "\udcff",
    "\x00\x1b[31m",
    "\u2028\u2029",
    "javascript:window.ran=5",
    "\\u003c\\",
    "数学 مرحبا",
]


def nasty_prompt() -> Record:
    rows = []
    for row in range(4):
        ids = list(range(len(NASTY))) if row % 2 else list(range(len(NASTY)))[::-1]
        rows.append({**completion(ids, float(row == 1)), "tokens": [NASTY[token] for token in ids]})
    return {"prompt_id": NASTY[1] + NASTY[3], "prompt": "\n".join(NASTY), "completions": rows}


# Boundary 2 is shared by rows 0 to 2; 0 and 1 part after three tokens; row 3 has a reward of its own alone; 4 has none.
SMALL: Record = {
    "prompt_id": "small",
    "prompt": "What is it?\nSay.",
    "completions": [
        {**completion([1, 2, 3, 4], 1, [-0.5, -0.25, -9, -0.125]), "tokens": ["a", " b", " c", "\n"]},
        {**completion([1, 2, 3, 5], 0, [-0.5, -0.25, -9, -2]), "tokens": ["a", " b", " c", " e"]},
        {**completion([1, 2, 6], 1, [-0.5, -0.25, None]), "tokens": ["a", " b", " f"]},
        {**completion([7], 0.5, [-1]), "tokens": ["g"]},
        {**completion([1, 2], None, [-0.5, -0.25]), "tokens": ["a", " b"]},
        completion([], 0),
    ],
}


def data_of(page: str) -> dict[str, Any]:
    """The data of a page, as a browser finds them."""
    (text,) = re.findall(r'<script type="application/gzip" id="data">(.*?)</script', page, re.S | re.I)
    return json.loads(gzip.decompress(base64.b64decode(text, validate=True)))


def write_report(tmp_path: Path, records: list[Record], *arguments: str) -> Path:
    page = tmp_path / "report.html"
    source = save(tmp_path / "in.jsonl", records)
    assert main([str(source), "--show", "0", "--html", str(page), *arguments]) == 0
    return page


def rollouts_of(data: dict[str, Any], prompt: dict[str, Any]) -> list[list[tuple[Any, Any]]]:
    """Every rollout's (id, text), put together again from the pieces of the tree."""
    parents, lengths, tokens = (prompt[name] for name in ("parents", "lengths", "tokens"))
    starts = [0, *itertools.accumulate(lengths)]
    rows = []
    for at in prompt["at"]:
        chain = []
        while at >= 0:
            chain.append(at)
            at = parents[at]
        rows.append(
            [
                (data["ids"][rank], data["texts"][rank])
                for piece in reversed(chain)
                for rank in tokens[starts[piece] : starts[piece + 1]]
            ]
        )
    return rows


def advantages_of(prompt: dict[str, Any], scheme: str) -> list[list[float]]:
    rows = []
    for index in prompt["credit"][scheme]:
        run, row = prompt["runs"][index], []
        for end, value in zip(run[::2], run[1::2], strict=True):
            row += [value] * (end - len(row))
        rows.append(row)
    return rows


def test_every_rollout_and_every_scheme_is_in_the_page(tmp_path: Path) -> None:
    records = random_prompts(8)
    data = data_of(write_report(tmp_path, records, "--num-boundaries", "3").read_text(encoding="utf-8"))
    for record, prompt in zip(records, data["prompts"], strict=True):
        rows = record["completions"]
        assert [[token for token, _ in row] for row in rollouts_of(data, prompt)] == [row["token_ids"] for row in rows]
        lengths = [len(row["token_ids"]) for row in rows]
        packed: dict[str, Any] = {
            "logprobs": torch.tensor([math.nan if x is None else x for row in rows for x in row["logprobs"]]),
            "token_ids": torch.tensor([x for row in rows for x in row["token_ids"]], dtype=torch.int64),
            "rewards": torch.tensor([math.nan if row["reward"] is None else row["reward"] for row in rows]),
            "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        }
        more = {"leaf": {"num_boundaries": 3}, "treerl": {"num_boundaries": 3}}
        expected = {name: f(**packed, **more.get(name, {})) for name, f in leafkernels.ESTIMATORS.items()}
        assert set(prompt["credit"]) == set(expected)
        for scheme, values in expected.items():
            for found, row in zip(advantages_of(prompt, scheme), values.split(lengths), strict=True):
                # Five digits of a float32.
                torch.testing.assert_close(torch.tensor(found), row, rtol=1e-4, atol=1e-9)


def test_the_tree_by_hand(tmp_path: Path) -> None:
    with RolloutFile(save(tmp_path / "in.jsonl", [SMALL])) as file:
        prompt = next(iter(file))
    found = pieces_of(prompt.token_ids, credit_prompt(prompt, {"num_boundaries": 1}))
    assert [(p.parent, p.start, p.end, p.rows, p.is_node, p.ending) for p in found] == [
        (-1, 0, 0, [0, 1, 2, 3, 4, 5], False, [5]),
        (0, 0, 2, [0, 1, 2, 4], True, [4]),
        (1, 2, 3, [0, 1], False, []),
        (2, 3, 4, [0], False, [0]),
        (2, 3, 4, [1], False, [1]),
        (1, 2, 3, [2], False, [2]),
        (0, 0, 1, [3], False, [3]),
    ]


def test_what_rollouts_share_stands_once(tmp_path: Path) -> None:
    rows = [completion([1] * 200, 1.0)] * 60 + [completion([1] * 150 + [2] * 50, 0.0)] * 40
    (prompt,) = data_of(write_report(tmp_path, [{"completions": rows}]).read_text())["prompts"]
    assert len(prompt["tokens"]) == 250
    assert len(prompt["runs"]) <= 2 * len(leafkernels.ESTIMATORS)


def test_the_charts_by_hand(tmp_path: Path) -> None:
    page = write_report(tmp_path, [SMALL], "--num-boundaries", "1").read_text(encoding="utf-8")
    charts = data_of(page)["charts"]
    # Scored rollouts with a token at 0 to 3: 4, 3, 3, 2; with company there: 3, 3, 2, 0.
    assert charts["width"] == 1 and charts["alive"] == [4, 3, 3, 2]
    assert charts["shared"] == [0.75, 1, pytest.approx(2 / 3, rel=1e-3), 0]
    assert charts["boundaries"] == [0, 0, 1, 0]
    assert [(row["depth"], row["rollouts"], row["mean"]) for row in charts["depths"]["rows"]] == [
        (0, 5, 0.5),
        (1, 3, pytest.approx(2 / 3, rel=1e-3)),
        (-1, 5, 0.5),
    ]
    # GRPO is one number for a rollout, above 0 in rows 0 to 2 and 0 in row 3, whose reward is the mean.
    values = [advantages_of(data_of(page)["prompts"][0], "grpo")[row] for row in range(4)]
    sums = [sum(abs(row[t]) for row in values if t < len(row)) for t in range(4)]
    overall = sum(sums) / (4 + 3 + 3 + 2)
    relative = [total / alive / overall for total, alive in zip(sums, [4, 3, 3, 2], strict=True)]
    assert charts["credit"]["grpo"] == pytest.approx(relative, rel=1e-3)


def test_charts_of_nothing() -> None:
    charts = Profile(["leaf"]).charts()
    assert charts["shared"] == [] and charts["depths"]["rows"] == []


def test_the_page_says_what_it_leaves_out(tmp_path: Path) -> None:
    page = write_report(tmp_path, random_prompts(7), "--html-prompts", "3").read_text(encoding="utf-8")
    assert len(data_of(page)["prompts"]) == 3
    assert "Of all 7 prompts the first 3 have their trees in this page." in page
    assert "have their trees" not in write_report(tmp_path, random_prompts(7)).read_text(encoding="utf-8")


def test_nasty_text_is_data_and_nothing_else(tmp_path: Path) -> None:
    page = write_report(tmp_path, [nasty_prompt()]).read_text(encoding="utf-8")
    assert len(re.findall("<script", page, re.I)) == 2 and len(re.findall("</script", page, re.I)) == 2
    assert len(re.findall("<style", page, re.I)) == 1 and len(re.findall("</style", page, re.I)) == 1
    assert "<!--" not in page and "<img" not in page
    data = data_of(page)
    (prompt,) = data["prompts"]
    shown = "".join(data["texts"]) + prompt["text"] + prompt["name"]
    for char in "\u202e\u202c\u200b\ufeff\ud83d\udcff\x00\x1b\u2028\u2029":
        assert char not in shown
    for escape in ("\\u202e", "\\u200b", "\\ufeff", "\\ud83d", "\\udcff", "\\x00", "\\x1b", "\\u2028"):
        assert escape in shown
    assert "<script>window.ran = 1</script>" in data["texts"] and "数学 مرحبا" in data["texts"]


def test_a_file_name_is_text_too(tmp_path: Path) -> None:
    source = save(tmp_path / "<b>&'\".jsonl", [GOOD])
    page = tmp_path / "page.html"
    assert main([str(source), "--show", "0", "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "<b>&" not in text and "<h1>&lt;b&gt;&amp;" in text


def test_the_script_makes_no_markup_and_the_page_names_no_other_place(tmp_path: Path) -> None:
    script = (PAGE / "report.js").read_text(encoding="utf-8")
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
        "fetch",
        "import(",
    ):
        assert word not in script
    page = write_report(tmp_path, [GOOD]).read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a name of XML, which nobody loads"
    assert re.search('http-equiv="Content-Security-Policy" content="default-src &#39;none&#39;; script-src', page)


def test_the_same_rollouts_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_report(tmp_path, random_prompts(3)).read_bytes()
    assert write_report(tmp_path, random_prompts(3)).read_bytes() == first


@pytest.mark.parametrize("record", [{"completions": [completion([], None)]}, {"completions": [completion([5], 1)]}])
def test_prompts_with_next_to_nothing(tmp_path: Path, record: Record) -> None:
    data = data_of(write_report(tmp_path, [record]).read_text())
    assert [[token for token, _ in row] for row in rollouts_of(data, data["prompts"][0])] == [
        record["completions"][0]["token_ids"]
    ]


def test_numbers_out_of_the_ordinary(tmp_path: Path) -> None:
    rows = [
        {**completion([2**63 - 1, -7], 1, [None, 0.25])},
        {**completion([2**63 - 1, 3], 0, [None, -1234.5])},
    ]
    page = write_report(tmp_path, [{"completions": rows}], "--num-boundaries", "9" * 30, "--min-separation", "9" * 30)
    data = data_of(page.read_text())
    (prompt,) = data["prompts"]
    assert rollouts_of(data, prompt)[0] == [(str(2**63 - 1), None), (-7, None)]
    assert prompt["logprobs"] == [None, 0.25, -1234.5]


@pytest.mark.parametrize("rewards", [(1e39, -1e39), (1e308, 1e308), (-1.7e308, 1.7e308), (1e-300, 0.0)])
def test_rewards_of_any_size(tmp_path: Path, rewards: tuple[float, float]) -> None:
    rows = [completion([1, 2], reward) for reward in rewards] + [completion([1, 3], rewards[1])]
    arguments = ["--normalize", "none", "--terms", "global", "--multiplicity-power", "10"]
    source = save(tmp_path / "in.jsonl", [{"completions": rows}])
    page = tmp_path / "page.html"
    code = main([str(source), "--show", "0", "--html", str(page), *arguments])
    # Where LEAF's own advantages are not finite the command says so; else there is a page.
    assert code == (2 if not page.exists() else 0)
    assert code == 0 or rewards[1] == 1.7e308
    if code == 0:
        assert data_of(page.read_text())["prompts"][0]["rewards"][0] == rewards[0]


def test_trees_deeper_than_the_recursion_limit(tmp_path: Path) -> None:
    rows = [completion([1] * 3000, 1.0), completion([1] * 3000, 0.0)]
    write_report(tmp_path, [{"completions": rows}], "--num-boundaries", "1400", "--min-separation", "2")


def test_files_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "in.jsonl", [GOOD, "not JSON"])
    check_fails_with(
        "missing/x.html: no such file or directory", [source, "--html", tmp_path / "missing" / "x.html"], capsys
    )
    check_fails_with("not a regular file", [source, "--html", tmp_path], capsys)
    check_fails_with("--html must be another file than", [source, "--html", source], capsys)
    out = tmp_path / "out.jsonl"
    check_fails_with("--html must be another file than", [source, "--html", out, "--out", out], capsys)
    page = tmp_path / "page.html"
    page.write_text("precious")
    assert main([str(source), "--html", str(page), "--show", "0"]) == 2
    assert page.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "page.html"]


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.zeros(1, 1)
    page = leafkernels.report(one, one.long(), one[0])
    path = tmp_path / "page.html"
    path.write_text("precious")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"cannot write .*page.html: no space left on device"):
        page.save(path)
    assert path.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_without_jinja2(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    source = save(tmp_path / "in.jsonl", [GOOD])
    check_fails_with("the report needs jinja2", [source, "--html", tmp_path / "x.html"], capsys)
    check_fails_with("pip install 'leafkernels[html]'", [source, "--html", tmp_path / "x.html"], capsys)
    one = torch.zeros(1, 1)
    with pytest.raises(ImportError, match="the report needs jinja2"):
        leafkernels.report(one, one.long(), one[0])


def test_importing_the_package_loads_neither_rich_nor_jinja2() -> None:
    code = "import sys, leafkernels; assert not {'rich', 'jinja2'} & set(sys.modules); assert leafkernels.report"
    run_python("-c", code)


def test_the_page_is_written_where_nobody_reads_the_screen(tmp_path: Path) -> None:
    source = save(tmp_path / "in.jsonl", random_prompts(30))
    page = tmp_path / "page.html"
    process = start(source, "--show", "30", "--html", page)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 0
    process.stderr.close()
    assert len(data_of(page.read_text(encoding="utf-8"))["prompts"]) == 30


def test_the_command_tells_where_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = write_report(tmp_path, [GOOD])
    assert capsys.readouterr().out.rstrip().endswith(f"wrote {page}")


# ---- from tensors


class Letters:
    """A tokenizer of ten letters."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join("abcdefghij"[token_id] for token_id in token_ids)


def tensors(prompts: int = 3, rows: int = 4, tokens: int = 9) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(0, 2, (prompts, rows, tokens))
    ids[:, 1, :5] = ids[:, 0, :5]
    mask = torch.arange(tokens) < torch.randint(4, tokens, (prompts, rows, 1))
    mask[0, 0, 2] = False
    rewards = torch.rand(prompts, rows)
    rewards[-1, 1] = torch.nan
    return {"logprobs": -torch.rand(ids.shape), "token_ids": ids, "rewards": rewards, "response_mask": mask}


def check_tensors(report: Any, given: dict[str, torch.Tensor], **options: Any) -> None:
    """The page has every row's tokens and LEAF advantages, prompt by prompt."""
    expected = leafkernels.span_advantages(**given, **options)
    data = data_of(report.page())
    assert len(data["prompts"]) == len(given["rewards"])
    for number, prompt in enumerate(data["prompts"]):
        mask = given["response_mask"][number]
        for row, (tokens, found) in enumerate(
            zip(rollouts_of(data, prompt), advantages_of(prompt, "leaf"), strict=True)
        ):
            stretch = slice(0, int(mask[row].nonzero().max()) + 1)
            assert [token for token, _ in tokens] == given["token_ids"][number, row, stretch].tolist()
            torch.testing.assert_close(torch.tensor(found), expected[number, row, stretch], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"normalize": "batch"}, {"num_boundaries": 3, "min_separation": 1}])
def test_the_layouts_give_the_same_page(options: dict[str, Any]) -> None:
    given = tensors()
    report = leafkernels.report(**given, tokenizer=Letters(), prompts=["x", "y\nz", "<b>"], **options)
    check_tensors(report, given, **options)
    page = report.page()
    flat = {name: tensor.flatten(0, 1) for name, tensor in given.items()}
    more: dict[str, Any] = {"tokenizer": Letters(), "prompts": ["x", "y\nz", "<b>"], **options}
    assert leafkernels.report(**flat, group_size=4, **more).page() == page
    uids = torch.tensor([5, 5, 5, 5, 6, 6, 6, 6, 9, 9, 9, 9])
    assert leafkernels.report(**flat, groups=uids, **more).page() == page
    packed = {name: flat[name].flatten() for name in ("logprobs", "token_ids", "response_mask")}
    offsets = torch.arange(0, 109, 9, dtype=torch.int32)
    rewards = flat["rewards"]
    assert leafkernels.report(**packed, rewards=rewards, cu_seqlens=offsets, groups=uids, **more).page() == page
    data = data_of(page)
    assert set(data["texts"]) == {"a", "b"} and data["prompts"][0]["text"] == "x"
    assert True in data["prompts"][0]["holes"]


def test_holes_do_not_count_as_tokens_with_credit() -> None:
    """Two columns of a tool in a shared prefix of three, and three columns after it."""
    mask = torch.tensor([[True, False, False, True, True, True]]).expand(4, -1)
    ids = torch.tensor([[1, 2, 3, 4, 5, 5], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5], [1, 2, 3, 4, 6, 6]])
    logprobs = torch.tensor([-0.1, -9.0, -9.0, -5.0, -0.1, -0.1]).expand(4, -1)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    data = data_of(leafkernels.report(logprobs, ids, rewards, response_mask=mask, num_boundaries=1).page())
    assert data["prompts"][0]["boundaries"] == [3] and data["prompts"][0]["share"] == 0.25
    assert data["charts"]["credit"]["grpo"] == [1, 0, 0, 1, 1, 1]


def test_one_prompt_and_scores_of_ones_own() -> None:
    given = tensors(1)
    one = {name: tensor[0] for name, tensor in given.items()}
    scores = torch.rand(one["token_ids"].shape)
    report = leafkernels.report(**one, boundary_scores=scores)
    check_tensors(report, given, boundary_scores=scores[None])
    data = data_of(report.page())
    (prompt,) = data["prompts"]
    assert set(data["texts"]) == {None}
    tree = leafkernels.span_tree(**one, boundary_scores=scores)
    assert prompt["boundaries"] == tree.boundaries[tree.boundaries >= 0].tolist()


@pytest.mark.parametrize("name", leafkernels.ESTIMATORS)
def test_a_report_may_begin_with_any_scheme(name: str) -> None:
    """Its options are that scheme's; the others have their own."""
    given = tensors()
    own = {"tree_td": {"group_weight": 0.1}, "leaf": {"terms": "local"}}.get(name, {})
    report = leafkernels.report(**given, estimator=name, num_boundaries=1, note="<i>a note</i>", **own)
    data = data_of(report.page())
    assert data["schemes"][0]["key"] == name and "&lt;i&gt;a note" in report.page()
    assert {scheme["key"] for scheme in data["schemes"]} == set(leafkernels.ESTIMATORS)
    assert all(scheme["note"] and scheme["name"].isupper() for scheme in data["schemes"])
    for scheme, function in leafkernels.ESTIMATORS.items():
        takes = "num_boundaries" in inspect.signature(function).parameters
        expected = function(**given, **({"num_boundaries": 1} if takes else {}), **(own if scheme == name else {}))
        found = advantages_of(data["prompts"][1], scheme)
        for row, mask, values in zip(found, given["response_mask"][1], expected[1], strict=True):
            torch.testing.assert_close(torch.tensor(row), values[: int(mask.sum())], rtol=1e-4, atol=1e-7)


def test_in_a_notebook(tmp_path: Path) -> None:
    report = leafkernels.report(**tensors(), title="step 3")
    frame = report._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts"') and frame.count("<") == 2
    (source,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(source) == report.page()
    report.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report.page()
    assert repr(report) == "<leafkernels report of 3 prompts, 12 rollouts>"
    assert "step 3" in report.page()


def test_the_snippets_of_the_page_of_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(snippets), names)
    data = data_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "=" in data["texts"] and data["prompts"][0]["text"] == "2+3=?"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": 4}, TypeError, "for prompts of 4 consecutive rows pass group_size=4"),
        ({"group_size": 5}, ValueError, "group_size must divide the number of rows, 12, got 5"),
        ({"group_size": True}, TypeError, "group_size must be an int, got bool"),
        (
            {"group_size": 4, "groups": torch.zeros(12).long()},
            ValueError,
            "group_size must be None where groups names the prompts, got 4",
        ),
        ({"group_size": 4, "prompts": ["x"]}, ValueError, "prompts must have one text for each of 3 prompts, got 1"),
        ({"max_prompts": 0}, ValueError, "max_prompts must be an int of at least 1, got 0"),
        ({"group_size": 4, "terms": "all"}, ValueError, "terms must be one of"),
        ({"rewards": None}, TypeError, "rewards must be a torch.Tensor, got NoneType"),
        ({"estimator": "ppo"}, ValueError, "estimator must be one of 'leaf', 'grpo', "),
        ({"estimator": "grpo", "terms": "local"}, TypeError, "options must be some of boundary_scores, "),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    flat = {name: tensor.flatten(0, 1) for name, tensor in tensors().items()}
    with pytest.raises(error, match=re.escape(message)):
        leafkernels.report(**{**flat, **arguments})


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with browsing(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of the small prompt, the nasty one, and some at random."""
    folder = tmp_path_factory.mktemp("page")
    return write_report(folder, [SMALL, nasty_prompt(), *random_prompts(6)], "--num-boundaries", "1")


@pytest.fixture
def quiet(browser: Browser) -> Iterator[Browser]:
    """The browser, which must not have complained, nor asked for anything but the file, when the test ends."""
    browser.problems.clear()
    browser.requests.clear()
    browser.prefer("light")
    browser.size(1400)
    yield browser
    assert browser.problems == []
    assert all(url.startswith(("file:", "data:")) for url in browser.requests)


def colours(browser: Browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('.t')].map((t) => getComputedStyle(t).backgroundColor)")


def test_the_tree_stands_in_the_page(quiet: Browser, page: Path) -> None:
    quiet.open(page)
    rows = quiet.run("[...document.querySelectorAll('#pieces > li')].map((li) => li.innerText.replace(/\\s+/g, ' '))")
    assert len(rows) == 7
    assert rows[0] == "1 rollout without a token #5 reward 0"
    assert "4 rollouts #0–2 #4 mean reward 0.667 tokens 0–2 node at boundary 2 1 end here: #4" in rows[1]
    assert rows[1].endswith("a b")
    assert "#0 reward 1 tokens 3–4" in rows[3] and rows[3].endswith("↵")
    assert "reward none" not in rows[3]
    assert quiet.run("document.getElementById('name').textContent") == "small"
    assert quiet.run("document.getElementById('text').textContent") == "What is it?\nSay."
    assert quiet.run("document.querySelectorAll('#rows tr').length") == 8
    assert quiet.run("document.querySelectorAll('.plot svg[aria-label]').length") == 3


def test_the_switch_recolours_without_reloading(quiet: Browser, page: Path) -> None:
    quiet.open(page)
    quiet.run("window.here = true")
    seen = set()
    for scheme in ("grpo", "tempo", "tree_td", "treerl", "leaf"):
        quiet.run(f"document.querySelector('input[value={scheme}]').click()")
        seen.add((tuple(colours(quiet)), quiet.run("document.getElementById('most').textContent")))
        assert f"scheme={scheme}" in quiet.run("location.hash")
    assert len(seen) == 5
    assert quiet.run("window.here") is True


def test_colours_are_those_of_the_numbers(quiet: Browser, page: Path) -> None:
    quiet.open(page, "prompt=0&scheme=grpo")
    # Tokens a b | c | newline | e | f | g: the row of reward 0.5 has the mean, so 0.
    classes = quiet.run("[...document.querySelectorAll('.t')].map((t) => t.className.split(' ').pop())")
    assert classes == ["p3", "p3", "z", "p8", "n8", "p8", "z"]
    values = quiet.run("[...document.querySelectorAll('.value')].map((v) => v.textContent)")
    assert values[1].startswith("+") and values[2] == "0.000" and values[4] == "−" + values[3][1:]


def test_one_rollout_alone(quiet: Browser, page: Path) -> None:
    quiet.open(page, "prompt=0&scheme=grpo")
    quiet.run("[...document.querySelectorAll('.chip')].find((chip) => chip.row === 1).click()")
    assert (
        quiet.run("[...document.querySelectorAll('#pieces > li:not([hidden]) .t')].map((t) => t.className)")
        == ["t n8"] * 4
    )
    assert "Rollout #1 alone" in quiet.run("document.getElementById('only').innerText")
    quiet.run("document.getElementById('all').click()")
    assert quiet.run("document.querySelectorAll('#pieces > li[hidden]').length") == 0


def test_tokens_by_keyboard(quiet: Browser, page: Path) -> None:
    quiet.open(page, "prompt=0")
    quiet.run("document.querySelector('.t').focus()")
    tip = "document.getElementById('tip').innerText.replace(/\\s+/g, ' ')"
    assert quiet.run(tip).startswith("“a” Position 0 Token id 1 Surprisal 0.500 nats (p = 0.607) Rollouts 4 LEAF")
    quiet.press("ArrowRight")
    assert quiet.run("document.activeElement.textContent") == " b"
    quiet.press("ArrowRight")
    quiet.press("ArrowDown")
    assert quiet.run(tip).startswith("“↵” Position 3")
    assert quiet.run("document.activeElement.getAttribute('aria-describedby')") == "tip"
    quiet.press("ArrowUp")
    quiet.press("Home")
    assert quiet.run("document.activeElement.textContent") == " c"
    reachable = "[...document.querySelectorAll('.t[tabindex=\"0\"]')].map((t) => t.textContent)"
    assert quiet.run(reachable) == [" c"]
    # Of a rollout alone, too, one token can be reached.
    quiet.run("[...document.querySelectorAll('.chip')].find((chip) => chip.row === 3).click()")
    assert quiet.run(reachable) == ["g"]
    quiet.open(page, "prompt=2")
    assert len(quiet.run(reachable)) == 1


def test_the_table_sorts_and_filters(quiet: Browser, page: Path) -> None:
    quiet.open(page)
    names = "[...document.querySelectorAll('#rows button')].map((button) => button.textContent)"
    in_file = quiet.run(names)
    assert in_file[0] == "small" and in_file[2:] == ["p0", "p1", "p2", "p3", "p4", "p5"]
    share = "[...document.querySelectorAll('#rows tr')].map((row) => data.prompts[row.index].share)"
    quiet.run(f"window.data = {json.dumps(data_of(page.read_text(encoding='utf-8')))}")
    quiet.run("document.querySelector('[data-sort=share]').click()")
    assert quiet.run(share) == sorted(quiet.run(share), reverse=True)
    assert quiet.run("document.querySelector('[data-sort=share]').parentElement.ariaSort") == "descending"
    quiet.run("document.querySelector('[data-sort=share]').click()")
    assert quiet.run(share) == sorted(quiet.run(share))
    quiet.run("document.querySelector('[data-sort=share]').click()")
    assert quiet.run(names) == in_file
    quiet.run("document.getElementById('query').value = 'P3'")
    quiet.run("document.getElementById('query').dispatchEvent(new Event('input'))")
    assert quiet.run(names) == ["p3"]
    quiet.run("document.querySelector('#rows tr').click()")
    assert quiet.run("document.getElementById('name').textContent") == "p3"


def test_nasty_text_is_shown_and_never_run(quiet: Browser, page: Path) -> None:
    quiet.open(page, "prompt=1")
    assert quiet.run("typeof window.ran") == "undefined"
    shown = quiet.run("[...document.querySelectorAll('.t')].map((t) => t.textContent)")
    for text in ("<script>window.ran = 1</script>", "\\u202eevil\\u202c", "\\ud83d", "\\udcff", "{{ 7 * 7 }}{% raw %}"):
        assert text in shown
    assert quiet.run("document.querySelectorAll('script').length") == 2
    assert quiet.run("document.querySelectorAll('img, body > style').length") == 0
    assert quiet.run("getComputedStyle(document.body).display") == "block"
    assert NASTY[3] in quiet.run("document.getElementById('name').textContent")


def test_the_network_is_forbidden(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.problems.clear()
    tried = "fetch('https://example.invalid/').then(() => 'answered', () => 'refused')"
    assert browser.run(tried) == "refused"
    browser.run("document.body.appendChild(document.createElement('script')).textContent = 'window.ran = 9'")
    assert browser.run("typeof window.ran") == "undefined"
    assert any("Content Security Policy" in problem for problem in browser.problems)


def luminance(browser: Browser, expression: str) -> float:
    numbers = re.findall(r"[\d.]+", browser.run(expression))
    channels = [int(n) / 255 for n in numbers[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes_and_contrast(quiet: Browser, page: Path, scheme: str) -> None:
    def ground() -> bool:
        return luminance(quiet, "getComputedStyle(document.body).backgroundColor") < 0.5

    quiet.prefer(scheme)
    quiet.open(page, "prompt=0&scheme=grpo")
    assert ground() == (scheme == "dark")
    # Text on the strongest colours and on the grounds: 4.5 is what the guidelines for accessible pages ask for.
    for element in (".p8", ".n8", ".p3", "#facts", ".eyebrow", "td .sub", ".note"):
        style = f"getComputedStyle(document.querySelector('{element}'))"
        ink = luminance(quiet, f"{style}.color")
        behind = (
            f"(function up(e) {{ const c = getComputedStyle(e).backgroundColor; "
            f"return c === 'rgba(0, 0, 0, 0)' ? up(e.parentElement) : c }})(document.querySelector('{element}'))"
        )
        back = luminance(quiet, behind)
        assert (max(ink, back) + 0.05) / (min(ink, back) + 0.05) >= 4.5, element
    # The reader's choice goes before the system's, either way, and "auto" gives it back.
    opposite = "light" if scheme == "dark" else "dark"
    quiet.open(page, f"theme={opposite}")
    assert ground() == (opposite == "dark")
    while quiet.run("document.getElementById('theme').textContent") != "Theme: auto":
        quiet.run("document.getElementById('theme').click()")
    assert ground() == (scheme == "dark")


@pytest.mark.parametrize("width", [390, 768, 1400])
def test_no_sideways_scrolling(quiet: Browser, page: Path, width: int) -> None:
    quiet.size(width)
    for prompt in range(4):
        quiet.open(page, f"prompt={prompt}&scheme=tempo")
        assert quiet.run("document.documentElement.scrollWidth") <= width
        assert quiet.run("innerWidth") == width


@pytest.mark.parametrize("width", [560, 820, 1000, 1240, 1500])
def test_names_of_schemes_are_not_broken(quiet: Browser, page: Path, width: int) -> None:
    """One line a name, and the sentence about the scheme has room."""
    quiet.size(width)
    quiet.open(page)
    heights = "[...document.querySelectorAll('#schemes span')].map(s => s.getBoundingClientRect().height)"
    assert quiet.run(f"Math.max(...{heights})") < 40
    note = quiet.run("document.getElementById('note').getBoundingClientRect().width")
    assert note == 0 or note > 200


def test_on_paper(quiet: Browser, page: Path) -> None:
    quiet.prefer("dark")
    quiet.open(page)
    quiet.send(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    try:
        assert luminance(quiet, "getComputedStyle(document.body).backgroundColor") > 0.9
        assert quiet.run("getComputedStyle(document.querySelector('.filters')).display") == "none"
    finally:
        quiet.send("Emulation.setEmulatedMedia", media="")


def test_in_a_sandboxed_frame(quiet: Browser, tmp_path: Path) -> None:
    report = leafkernels.report(**tensors(), tokenizer=Letters())
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><meta charset=utf-8>{report._repr_html_()}", encoding="utf-8")
    quiet.frames.clear()
    quiet.open(notebook)
    (frame,) = quiet.frames
    while quiet.run("document.readyState !== 'complete' || !!document.getElementById('unscripted')", frame):
        pass
    assert quiet.run("document.querySelectorAll('.t').length", frame) > 10
    quiet.run("document.querySelector('input[value=tempo]').click()", frame)
    assert quiet.run("document.getElementById('note').textContent", frame).startswith("GRPO plus")
    # Its own address, and so nothing of the page around it.
    assert quiet.run("window.origin", frame) == "null"


def test_a_thousand_rollouts_of_a_prompt(quiet: Browser, tmp_path: Path) -> None:
    """A part of the tree is drawn, the rest when it is asked for; a rollout alone whether it was drawn or not."""
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (1000, 100))
    ids[:, :3] = ids[:, :3] % 2
    ids[500:600] = ids[400]
    rows = [completion(row, float(reward)) for row, reward in zip(ids.tolist(), torch.randint(2, (1000,)), strict=True)]
    page = write_report(tmp_path, [{"completions": rows}])
    assert page.stat().st_size < 2_000_000
    quiet.open(page)
    drawn = "document.querySelectorAll('.t').length"
    first = quiet.run(drawn)
    assert 10_000 < first < 30_000
    more = "document.getElementById('more')"
    assert re.fullmatch(r"Show more of the tree: [\d,]+ lines left", quiet.run(f"{more}.textContent"))
    quiet.run(f"{more}.click()")
    assert first < quiet.run(drawn) < 60_000
    quiet.open(page, "prompt=0&rollout=998")
    assert quiet.run("document.querySelectorAll('#pieces > li:not([hidden]) .t').length") == 100
    quiet.run("document.getElementById('all').click()")
    assert quiet.run(drawn) < 30_000


def test_a_hundred_rollouts_a_prompt_stay_small_and_open_fast(quiet: Browser, tmp_path: Path) -> None:
    torch.manual_seed(0)
    records = []
    for number in range(5):
        rows: list[Record] = []
        for _ in range(100):
            earlier = rows[int(torch.randint(len(rows), ()))]["token_ids"] if rows else []
            kept = earlier[: int(torch.randint(0, 150, ()))]
            ids = kept + torch.randint(0, 30_000, (200 - len(kept),)).tolist()
            rows.append({**completion(ids, float(torch.randint(2, ()))), "tokens": [f" w{token}" for token in ids]})
        records.append({"prompt_id": number, "completions": rows})
    page = write_report(tmp_path, records)
    # Tokens as random as they can be: 65,000 that no two rollouts share, of 30,000 kinds.
    assert page.stat().st_size < 1_200_000
    quiet.open(page)
    assert quiet.run("document.querySelectorAll('.t').length") > 10_000
    milliseconds = quiet.run(
        "(() => { const start = performance.now(); document.querySelector('input[value=grpo]').click(); "
        "document.body.offsetHeight; return performance.now() - start })()"
    )
    assert milliseconds < 2000


def test_step_rewards_are_written_read_and_drawn(tmp_path: Path) -> None:
    """From tensors to a file, to the command and its page, and straight to the page."""
    given = {name: tensor for name, tensor in tensors().items() if name != "response_mask"}
    steps = (given["token_ids"] % 3 == 1).double()
    rewards = {"rewards": None, "step_rewards": steps}
    path, out = tmp_path / "steps.jsonl", tmp_path / "out.jsonl"
    leafkernels.save_rollouts(path, **{**given, **rewards})
    assert main([str(path), "--html", str(tmp_path / "page.html"), "--out", str(out), "--estimator", "tree_td"]) == 0
    expected = leafkernels.tree_td(**{**given, **rewards})
    written = [row["advantages"] for line in out.read_text().splitlines() for row in json.loads(line)["completions"]]
    torch.testing.assert_close(torch.tensor(written).reshape(expected.shape), expected)
    pages = [
        (tmp_path / "page.html").read_text(),
        leafkernels.report(**{**given, **rewards}, estimator="tree_td").page(),
    ]
    for text in pages:
        for number, shown in enumerate(data_of(text)["prompts"]):
            torch.testing.assert_close(torch.tensor(shown["rewards"]).double(), steps[number].sum(-1))
            torch.testing.assert_close(torch.tensor(advantages_of(shown, "step rewards")).double(), steps[number])
            credit = torch.tensor(advantages_of(shown, "tree_td"))
            torch.testing.assert_close(credit, expected[number], rtol=1e-4, atol=1e-5)
