"""README and the pages of docs/: their Python runs, their commands run, and what they show is what comes out."""

import inspect
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from pages import PAGES, ROOT
from support import run_python
from tiny_decoders import build_model, build_tokenizer

import leafkernels
import leafkernels.distributed
import leafkernels.integrations.layouts
import leafkernels.lookahead

README = pages.read("README.md")
SETUP = ["pip install -e . && python -m leafkernels", "pip install -e '.[test]' && pytest"]

# Pages whose Python needs more than an empty scope: sections of their own, several ranks, a tokenizer.
RUN_ELSEWHERE = {"trainers.md": "test_loops.py", "distributed.md": "test_distributed.py", "report.md": "test_html.py"}

# What a command gets in addition, to be quick. None: another test runs it, or it needs what is not here.
EXTRA: dict[str, str | None] = {
    SETUP[0]: None,
    SETUP[1]: None,
    "python examples/grpo_lora.py --advantages leaf": "--warmup-steps 5 --steps 2 --prompts 2",
    "python examples/grpo_lora.py --advantages grpo": "--warmup-steps 5 --steps 2 --prompts 2",
    "pytest bench/": None,
    "python bench/report.py": None,
    "python bench/errors.py": None,
    "python -m bench.bench_growth": None,
    "bench/gpu.sh": None,
}

PUBLIC = {name: getattr(leafkernels, name) for name in leafkernels.__all__}
for module in (leafkernels.distributed, leafkernels.integrations.layouts, leafkernels.lookahead):
    PUBLIC |= {name: getattr(module, name) for name in module.__all__}


def commands(*names: str) -> list[str]:
    found = [block.text for name in names for block in pages.blocks(pages.read(name), "sh")]
    return list(dict.fromkeys(line for line in "".join(found).splitlines() if line))


def names_of_lookahead() -> dict[str, Any]:
    """What README leaves to its reader: a model, its tokenizer, and preferences."""
    pytest.importorskip("transformers")
    preferences = [{"prompt": "ab", "chosen": "c" * length, "rejected": "d"} for length in range(1, 9)]
    return {"model": build_model("llama"), "tokenizer": build_tokenizer(), "preferences": preferences}


COMMANDS = commands("README.md", "performance.md")
# Needs TRL, and the folder of examples.
(DISTILS,) = (block.text for block in pages.blocks(README, "python") if "FireOPDTrainer" in block.text)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RUN_ELSEWHERE])
def test_the_python_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "prefix_tree.md":
        pytest.importorskip("transformers", minversion="5.23")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    pages.run(pages.read(page).replace(DISTILS, ""), names_of_lookahead() if page == "README.md" else {})


def test_ten_lines_bring_a_student_closer_to_its_teacher(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    assert len([line for line in DISTILS.splitlines() if line]) <= 10
    where = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    before = os.times().children_user
    printed = run_python("-c", DISTILS, cwd=tmp_path, PYTHONPATH=where).stdout
    assert os.times().children_user - before < 60
    first, *_, last = (float(gap) for gap in re.findall(r"'fire/teacher_gap': '?(-[\d.]+)", printed))
    said = [float(gap) for gap in re.findall(r" at (-\d\.\d) and at the end (-\d\.\d)", README)[0]]
    assert [first, last] == pytest.approx(said, abs=0.15)  # another platform draws other samples


@pytest.mark.parametrize(("page", "test"), RUN_ELSEWHERE.items())
def test_the_python_of_other_pages_is_run_by_their_tests(page: str, test: str) -> None:
    assert f'"{page}"' in (ROOT / "tests" / test).read_text(encoding="utf-8")


def test_the_first_snippet_has_six_lines_and_the_result_beside_it() -> None:
    snippet = pages.blocks(README, "python")[0].text
    assert len([line for line in snippet.splitlines() if line]) <= 6
    names: dict[str, Any] = {}
    exec(snippet, names)
    grpo = leafkernels.grpo(names["logprobs"], names["token_ids"], names["rewards"])
    rows = re.findall(r"^\| (\d) \| (.+) \|$", README, re.M)
    assert [int(row) for row, _ in rows] == [0, 1, 2, 3]
    for row, cells in rows:
        leaf, flat = names["advantages"][int(row)], grpo[int(row)]
        shown = [f"{float(value):.2f}" for value in (names["rewards"][int(row)], leaf[0], leaf[2], leaf[4], flat[0])]
        assert [f"{float(cell):.2f}" for cell in cells.split(" | ")] == shown
        assert torch.equal(leaf[::2], leaf[1::2]) and bool((flat == flat[0]).all())


def test_the_tree_in_readme_is_what_the_command_prints() -> None:
    shown = [line.rstrip() for line in run_python("-m", "leafkernels", COLUMNS="80").stdout.splitlines()]
    (tree,) = pages.blocks(README, "text")
    assert [line for line in tree.text.splitlines() if line.rstrip() not in shown] == []


def test_exactly_two_commands_set_up_a_machine() -> None:
    assert [line for line in commands("README.md") if "pip install" in line] == SETUP


def test_every_command_is_accounted_for() -> None:
    assert set(EXTRA) <= set(COMMANDS)


@pytest.mark.parametrize("command", [line for line in COMMANDS if EXTRA.get(line, "") is not None])
def test_commands(command: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(f"{command} {EXTRA.get(command, '')}")
    assert program == "python"
    arguments = [str(tmp_path / a) if arguments[i - 1] in ("--out", "--html") else a for i, a in enumerate(arguments)]
    if arguments[0].startswith("examples/"):
        pytest.importorskip("peft")
        pytest.importorskip("transformers")
    assert run_python(*arguments, timeout=240).stdout


def test_every_public_name_and_argument_is_on_a_page() -> None:
    text = "\n".join(pages.read(page) for page in PAGES)
    missing = [name for name in PUBLIC if not re.search(rf"`[^`\n]*\b{name}\b", text)]
    for name, value in PUBLIC.items():
        if inspect.isfunction(value):
            arguments = inspect.signature(value).parameters
            missing += [f"{name}({argument}=)" for argument in arguments if not re.search(rf"\b{argument}\b", text)]
    assert missing == []


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


@pytest.mark.parametrize(("page", "most"), [("README.md", 180), ("CONTRIBUTING.md", 80)])
def test_pages_stay_short(page: str, most: int) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= most
    assert [line for line in lines if len(line) > 120] == []
