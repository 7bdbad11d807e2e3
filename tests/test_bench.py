"""The benches run, on tiny shapes, and their report is written: JSON and Markdown."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# The literal gradient of the entropy takes V passes over V logits, and is not timed.
NOT_LITERAL = {"surprisal_entropy with gradient"}
OPERATIONS = NOT_LITERAL | {
    "select_boundaries",
    "common_prefix_lengths",
    "span_values",
    "scatter_spans",
    "span_advantages",
    "surprisal_entropy",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one tiny run of the report wrote."""
    folder = tmp_path_factory.mktemp("results")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "report.py"), "--tiny", "--out", str(folder), "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def test_json_holds_every_operation_on_every_backend(results: Path) -> None:
    (path,) = results.glob("*.json")
    report = json.loads(path.read_text())
    assert report["all_passed"] and report["machine"]["tiny"]
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["date"] in path.name
    backends = {"python_ref", "torch"} | ({"triton"} if torch.cuda.is_available() else set())
    timed = {(case["op"], case["backend"]) for case in report["cases"]}
    every = {(op, backend) for op in OPERATIONS for backend in backends}
    assert timed == every - {(op, "python_ref") for op in NOT_LITERAL}
    for case in report["cases"]:
        assert case["min_seconds"] > 0 and case["bytes"] > 0
        assert case["backend"] == "python_ref" or case["op"] in NOT_LITERAL or case["ratio_python_ref"] > 0
    of_advantages = [promise["least"] for promise in report["promises"] if promise["op"] == "span_advantages"]
    assert of_advantages == [1.0, 20.0, 50.0]
    of_surprisal = [promise["least"] for promise in report["promises"] if promise["op"].startswith("surprisal")]
    assert sorted(of_surprisal) == [1.0, 1.0, 3.0, 3.0]
    assert all(promise["theirs"] > 0 and promise["ours"] > 0 for promise in report["promises"])


def test_markdown_has_a_table_of_every_operation(results: Path) -> None:
    (path,) = results.glob("*.md")
    text = path.read_text()
    report = json.loads(path.with_suffix(".json").read_text())
    assert text.startswith(f"# {report['machine']['device']}, {report['machine']['date']}\n")
    headings = {line[3:] for line in text.splitlines() if line.startswith("## ")}
    assert headings - {"Not timed"} == OPERATIONS | {"Promises on the CPU"}
    assert "Tiny shapes" in text


def test_the_interpreter_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(ROOT / "bench"), "--tiny", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "unset TRITON_INTERPRET: timing Triton's interpreter means nothing" in done.stderr
