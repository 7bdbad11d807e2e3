"""README and the pages of docs/: their Python runs, and what they say is what comes out."""

import json
import os
import re
from pathlib import Path

import pages
import pytest
import torch
from forked import run_forked
from pages import PAGES, ROOT
from support import run_python

README = pages.read("README.md")
SETUP = ["pip install -e . && python -m leafkernels", "pip install -e '.[test]' && pytest"]

# Pages whose Python needs more than an empty scope: sections of their own, several ranks, a tokenizer.
RUN_ELSEWHERE = {"trainers.md": "test_loops.py", "distributed.md": "test_distributed.py", "report.md": "test_html.py"}

# Commands of README and of the page of costs; other tests run them, or what they call.
KNOWN_COMMANDS = {
    *SETUP,
    "pytest bench/",
    "python bench/report.py",
    "python bench/errors.py",
    "python -m bench.bench_growth",
    "bench/gpu.sh",
}


def commands(*names: str) -> list[str]:
    found = [block.text for name in names for block in pages.blocks(pages.read(name), "sh")]
    return list(dict.fromkeys(line for line in "".join(found).splitlines() if line))


COMMANDS = commands("README.md", "performance.md")
# The first lines of a page that need another package: which, and what the page says of their size.
FIRST_LINES = {
    "README.md": ("LeafGRPOTrainer", "trl", 9),
    "distillation.md": ("FireOPDTrainer", "trl", 10),
    "lookahead.md": ("TokenRewardTrainer", "transformers", 10),
    "speech.md": ("LeafAudioGRPOTrainer", "soundfile", 11),
}


def first_lines(page: str) -> str:
    """The first block of Python of a page that trains."""
    needle = FIRST_LINES[page][0]
    return next(block.text for block in pages.blocks(pages.read(page), "python") if f"{needle}(" in block.text)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RUN_ELSEWHERE])
def test_the_python_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "prefix_tree.md":
        pytest.importorskip("transformers", minversion="5.23")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = pages.read(page)
    if page in FIRST_LINES:
        text = text.replace(first_lines(page), "")
    pages.run(text, {})


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in FIRST_LINES if page != "distillation.md"])
def test_the_first_lines_of_a_page_train(page: str, tmp_path: Path) -> None:
    """As they stand, in a process of their own, in the folder that the page names."""
    _, package, most = FIRST_LINES[page]
    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    pytest.importorskip(package)
    lines = first_lines(page)
    assert len([line for line in lines.splitlines() if line]) <= most
    where = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    assert "'train_loss': " in run_forked("-c", lines, cwd=tmp_path, PYTHONPATH=where).stdout


def test_ten_lines_bring_a_student_closer_to_its_teacher(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    page, lines = pages.read("distillation.md"), first_lines("distillation.md")
    assert len([line for line in lines.splitlines() if line]) <= FIRST_LINES["distillation.md"][2]
    where = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    before = os.times().children_user
    printed = run_python("-c", lines, cwd=tmp_path, PYTHONPATH=where).stdout
    assert os.times().children_user - before < 60
    first, *_, last = (float(gap) for gap in re.findall(r"'fire/teacher_gap': '?(-[\d.]+)", printed))
    said = [float(gap) for gap in re.findall(r" at (-\d\.\d) and at the end (-\d\.\d)", page)[0]]
    assert [first, last] == pytest.approx(said, abs=0.15)  # another platform draws other samples


@pytest.mark.parametrize(("page", "test"), RUN_ELSEWHERE.items())
def test_the_python_of_other_pages_is_run_by_their_tests(page: str, test: str) -> None:
    assert f'"{page}"' in (ROOT / "tests" / test).read_text(encoding="utf-8")


def test_what_is_said_of_the_picture_is_what_the_command_writes(tmp_path: Path) -> None:
    """The prompt of docs/tree.png: the rollout that failed late, in the credit of GRPO and of LEAF."""
    text = " ".join(README.split())
    (prompt,) = re.findall(r"Forty answers to `(.+?)`", text)
    number, beginning, count = re.findall(r"#(\d+) begins with `(.+?)`, as (\d+) right ones do", text)[0]
    written = tmp_path / "advantages.jsonl"
    run_python("-m", "leafkernels", "--out", str(written))
    lines = map(json.loads, written.read_text(encoding="utf-8").splitlines())
    rollouts = next(line["completions"] for line in lines if line["prompt"] == prompt)
    rewards = torch.tensor([rollout["reward"] for rollout in rollouts])
    flat = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    late = int(number)
    shared = next(n for n in range(99) if "".join(rollouts[late]["tokens"][:n]) == beginning)
    right = [i for i, of in enumerate(rollouts) if "".join(of["tokens"]).startswith(beginning) and rewards[i] == 1]
    assert len(rollouts) == 40 and len(right) == int(count) and rewards[late] == 0
    leaf = rollouts[late]["advantages"]
    said = re.search(r"gives all of its tokens (-[\d.]+)\. LEAF gives it (-[\d.]+) where it went wrong", text)
    assert said is not None and said.groups() == (f"{flat[late]:.3f}", f"{min(leaf):.3f}")
    assert min(leaf[:shared]) > 0 and max(leaf[:shared]) < 0.3
    assert all(rollouts[other]["advantages"][:shared] == leaf[:shared] for other in right)
    assert set(leaf[shared:]) == {min(leaf)}


def test_exactly_two_commands_set_up_a_machine() -> None:
    assert [line for line in commands("README.md") if "pip install" in line] == SETUP


def test_every_command_is_accounted_for() -> None:
    assert set(COMMANDS) == KNOWN_COMMANDS


@pytest.mark.parametrize("page", [*PAGES.values(), ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_what_a_page_points_at_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    for file, name in re.findall(r"`(tests/test_\w+\.py)(?:::(\w+))?`", text):
        source = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).exists() else ""
        if not re.search(rf"^def {name}\b", source, re.M):
            missing.append(f"{file}::{name}")
    assert missing == []


def test_every_law_has_its_test() -> None:
    laws = re.findall(r"^- \*\*([a-z -]+)\*\*: ", pages.read("leaf.md").partition("## Laws")[2], re.M)
    assert len(laws) >= 9
    tests = "".join((ROOT / "tests" / f"test_{of}.py").read_text(encoding="utf-8") for of in ("laws", "advantages"))
    assert [law for law in laws if f"def test_{law.replace(' ', '_')}(" not in tests] == []


@pytest.mark.parametrize(("page", "most"), [("README.md", 96), ("CONTRIBUTING.md", 80)])
def test_pages_stay_short(page: str, most: int) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= most
    assert [line for line in lines if len(line) > 120] == []
