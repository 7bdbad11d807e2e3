"""Every snippet of README runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SETUP = ["pip install -e . && python -m leafkernels", "pip install -e '.[test]' && pytest"]

# What a command of README gets in addition, to be quick. None: another test runs it, or this very run is it.
EXTRA: dict[str, str | None] = {
    SETUP[0]: None,
    SETUP[1]: None,
    "python examples/grpo_lora.py --advantages leaf": "--warmup-steps 5 --steps 2 --prompts 2",
    "python examples/grpo_lora.py --advantages grpo": "--warmup-steps 5 --steps 2 --prompts 2",
    "pytest bench/": None,
    "python bench/report.py": None,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line]


def of_trl(snippet: str) -> bool:
    return "integrations.trl" in snippet


def test_python_snippets() -> None:
    snippets = [snippet for snippet in blocks("python") if not of_trl(snippet)]
    assert len(snippets) >= 3
    names: dict[str, object] = {}
    exec("\n".join(snippets), names)
    advantages = names["advantages"]
    assert advantages.shape == names["token_ids"].shape  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("snippet", [snippet for snippet in blocks("python") if of_trl(snippet)])
def test_trl_snippet(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(snippet, names)
    trainer = names["trainer"]
    assert "leaf/span_credit_share" in trainer.state.log_history[-2]  # type: ignore[attr-defined]


def test_the_first_snippet_has_six_lines() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line]) <= 6


def test_exactly_two_commands_set_up_a_machine() -> None:
    assert [line for line in commands() if "pip install" in line] == SETUP


def test_every_command_is_accounted_for() -> None:
    assert set(EXTRA) <= set(commands())


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if EXTRA.get(c, "") is not None])
def test_commands(command: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(f"{command} {EXTRA.get(command, '')}")
    assert program == "python"
    arguments = [str(tmp_path / a) if arguments[i - 1] == "--out" else a for i, a in enumerate(arguments)]
    if arguments[0].startswith("examples/"):
        pytest.importorskip("peft")
        pytest.importorskip("transformers")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_the_tree_in_readme_is_what_the_command_prints() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "leafkernels"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
    )
    shown = [line.rstrip() for line in run.stdout.splitlines()]
    (tree,) = blocks("text")
    missing = [line for line in tree.splitlines() if line.rstrip() not in shown]
    assert missing == []
