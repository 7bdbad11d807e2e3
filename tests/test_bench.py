"""The benches run, on tiny shapes, and their report is written: JSON and Markdown."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, run_python

from bench import memory, peers
from bench.harness import Session
from bench.report import markdown
from leafkernels import ESTIMATORS

pytestmark = pytest.mark.slow

# The literal gradient of the entropy takes V passes over V logits, and is not timed; nor is what needs it.
NOT_LITERAL = {
    "surprisal_entropy with gradient",
    "linear_surprisal_entropy with gradient",
    "policy_loss_from_logits with gradient",
    *(f"linear_divergence {kind} with gradient" for kind in ("reverse_kl", "forward_kl", "jsd")),
}
# Beside the whole vocabulary, masked: nobody else computes the kept ids alone.
OF_KEPT = {"linear_surprisal_entropy of kept ids", "linear_surprisal_entropy of kept ids, trained head"}
OPERATIONS = (
    NOT_LITERAL
    | OF_KEPT
    | {
        "select_boundaries",
        "common_prefix_lengths",
        "span_values",
        "scatter_spans",
        "fire_opd",
        "reward_channel",
        "policy_loss with gradient",
        "surprisal_entropy",
        *(estimator.__name__ for estimator in ESTIMATORS.values()),
    }
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one tiny run of the report wrote."""
    folder = tmp_path_factory.mktemp("results")
    run_python(ROOT / "bench" / "report.py", "--tiny", "--out", folder, "-p", "no:cacheprovider")
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
    ours = {(op, backend) for op, backend in timed if backend in ("python_ref", "torch", "triton")}
    assert ours == every - {(op, "python_ref") for op in NOT_LITERAL | OF_KEPT}
    assert {(op, "masked") for op in OF_KEPT} <= timed
    usual = {op for op, backend in timed if backend == "usual"}
    assert usual == NOT_LITERAL | {"surprisal_entropy"}
    assert ("linear_surprisal_entropy with gradient", "products") in timed
    assert ("policy_loss_from_logits with gradient", "composed") in timed
    # Every peer has a time, or a reason.
    for op in usual:
        cases_of_op = {case for case, why in report["skipped"].items() if why} | {f"{o}, {b}" for o, b in timed}
        assert f"{op}, trl" in cases_of_op
    for case in report["cases"]:
        if case["op"] in usual and case["backend"] != "products":
            assert case["errors"]
            if case["op"].startswith("linear_divergence") and case["inputs"] == "hard":
                continue  # models that agree but for what the logits' rounding makes; the gate bounds that
            for name, error in case["errors"].items():
                # float32, on rows that nothing is wrong with; a peer may take products in TF32.
                rtol = 1e-5 if case["backend"] in ("torch", "triton", "usual", "composed") else 2e-2
                assert error["relative"] < rtol, (case["op"], case["backend"], name)
        assert case["min_seconds"] > 0 and case["bytes"] > 0
        assert case["op"] not in OF_KEPT or case["ratio_masked"] > 0
        literal_or_peer = case["backend"] not in ("torch", "triton")
        assert literal_or_peer or case["op"] in NOT_LITERAL | OF_KEPT or case["ratio_python_ref"] > 0
    advantage_promises = [promise["least"] for promise in report["promises"] if promise["op"] == "span_advantages"]
    assert advantage_promises == [1.0, 22.0, 50.0]
    surprisal_promises = [promise["least"] for promise in report["promises"] if promise["op"].startswith("surprisal")]
    assert sorted(surprisal_promises) == [1.0, 1.0, 3.0, 3.0]
    assert all(promise["theirs"] > 0 and promise["ours"] > 0 for promise in report["promises"])


def test_markdown_has_a_table_of_every_operation(results: Path) -> None:
    (path,) = results.glob("*.md")
    text = path.read_text()
    report = json.loads(path.with_suffix(".json").read_text())
    assert text.startswith(f"# {report['machine']['device']}, {report['machine']['date']}\n")
    headings = {line[3:] for line in text.splitlines() if line.startswith("## ")}
    assert headings - {"Not timed"} == OPERATIONS | {"Promises on the CPU"}
    assert "Tiny shapes" in text


def test_markdown_says_what_spoils_its_numbers(results: Path) -> None:
    (path,) = results.glob("*.json")
    found = json.loads(path.read_text())
    busy, failed = "**The machine was busy", "**A bench failed or a promise was broken"
    found["machine"] |= {"cpu_cores": 2, "load_average": [1.9, 9.0, 9.0]}
    assert busy not in markdown(found) and failed not in markdown(found)
    found["machine"]["load_average"][0] = 2.1
    found["all_passed"] = False
    assert busy in markdown(found) and failed in markdown(found)


def test_the_interpreter_is_refused() -> None:
    arguments = "-m", "pytest", ROOT / "bench", "--tiny", "-q", "-p", "no:cacheprovider"
    done = run_python(*arguments, check=False, TRITON_INTERPRET="1")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "unset TRITON_INTERPRET: timing Triton's interpreter means nothing" in done.stderr


def test_errors_are_measured_and_written(tmp_path: Path) -> None:
    """Ours, the usual way, and every peer that is installed and runs here, each within what its formula loses."""
    run_python(ROOT / "bench" / "errors.py", "--tiny", "--out", tmp_path)
    (path,) = tmp_path.glob("*-errors-tiny.json")
    found = json.loads(path.read_text())
    assert {"lead 60", "-inf: all but one", "shifted by 1e4"} <= {result["case"] for result in found["results"]}
    names = {result["of"] for result in found["results"]}
    assert {"ours, PyTorch", "ours, PyTorch, hidden", "PyTorch eager"} <= names
    where = "interpreter" if not torch.cuda.is_available() else "GPU"
    assert {f"ours, Triton ({where})", f"ours, Triton ({where}), hidden"} <= names
    for result in found["results"]:
        name, errors = result["of"], result["errors"]
        if name.startswith("ours"):
            assert set(errors) == {"surprisal", "entropy", "gradient"}
            # The promise of issue and docstring, and one rounding, or cutting off, to bfloat16.
            assert errors["entropy"]["relative"] <= 1e-4 and errors["surprisal"]["relative"] <= 1e-4, result
            assert errors["gradient"]["relative"] <= (2**-7 if result["dtype"] == "bfloat16" else 1e-5), result
        elif result["case"] == "normal":
            # Half-precision outputs, or products in TF32; a wrong adapter is off by far more.
            assert errors and all(error["relative"] is not None for error in errors.values()), result
            assert all(error["relative"] <= 2e-2 for error in errors.values()), result
    text = path.with_suffix(".md").read_text()
    assert all(f"## {what}, {dtype} logits" in text for what in ("entropy", "gradient") for dtype in ("float32",))


def test_peers_say_why_they_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = peers.Peer("a-package-nobody-has", lambda: pytest.fail("must not be loaded"))
    assert absent.why_not("cpu") == "a-package-nobody-has is not installed"

    def broken() -> peers.Function:
        raise ImportError("No module named 'ray'")

    installed = peers.Peer("torch", broken)
    assert installed.why_not("cpu") == f"torch {installed.version} does not import: ImportError: No module named 'ray'"
    for_gpu = peers.Peer("torch", broken, "cuda")
    assert for_gpu.why_not("cpu") == f"torch {for_gpu.version} needs a CUDA device here"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert peers.Peer("torch", broken, "triton").why_not("cpu") == for_gpu.why_not("cpu")


def test_worst_errors() -> None:
    want = {"entropy": torch.tensor([2.0, 0.0, 4.0]), "gradient": torch.tensor([[1e-9, -4.0]])}
    found = torch.tensor([2.5, 0.0]), torch.tensor([[0.0, -3.0]])
    assert peers.worst(found, want) == {
        "entropy": {"absolute": 0.5, "relative": 0.25},
        "gradient": {"absolute": 1.0, "relative": 0.25},
    }
    wrong = peers.worst([torch.tensor([2.0, 1e-7, 4.0]), torch.tensor([[0.0, torch.nan]])], want)
    assert wrong["entropy"]["relative"] is None and wrong["entropy"]["absolute"] == pytest.approx(1e-7)
    assert wrong["gradient"] == {"absolute": None, "relative": None}
    assert peers.worst([None, found[1]], want).keys() == {"gradient"}


def test_branches_packed_in_rows_and_without_a_cache() -> None:
    """It compares logits and counts the cache's columns before it takes a time."""
    pytest.importorskip("transformers")
    output = run_python("-m", "bench.branches", "--tiny").stdout
    # 16 + 4 x 6 columns packed, 4 x (16 + 6) in rows, of 2 x 2 x 32 float32 each.
    for line, numbers in (("packed", (20, 20)), ("rows", (45, 45)), ("no cache", (0, 45))):
        (found,) = [
            row for row in output.splitlines() if line in row and re.search(r"16 .* 4 .*", row) and " 4 │" in row
        ]
        assert tuple(map(int, re.findall(r"(\d+) │", found)[-2:])) == numbers


@pytest.mark.skipif(not memory.MEASURABLE, reason="needs Linux's /proc")
def test_peak_memory_sees_what_a_call_takes() -> None:
    """The usual way holds log-probabilities, probabilities and their product at once: three times the logits."""
    num_rows, vocab_size = 64, 100_000
    peak = memory.peak_bytes("bench.bench_surprisal", "ready", "surprisal_entropy", "usual", num_rows, vocab_size)
    assert 2.5 <= peak / (num_rows * vocab_size * 4) <= 4.5


def test_a_broken_promise_fails() -> None:
    session = Session(tiny=False, seconds=0.0, compile_seconds=0.0, deadline=0.0)
    session.promise("op", "shape", "speed", 2.0, 4.0, 2.0, "s")
    assert session.promises[0]["verdict"] == "kept"
    with pytest.raises(pytest.fail.Exception, match=r"op on shape, speed: 2 s against 3 s is 1.50x, promised 2x"):
        session.promise("op", "shape", "speed", 2.0, 3.0, 2.0, "s")
    assert session.promises[1]["verdict"] == "broken"


def test_tuning_runs_on_a_tiny_shape(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "tune.py"), "--tiny", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = tmp_path.glob("*-tune-tiny.json")
    found = json.loads(path.read_text())
    assert not found["left_out"]
    tried = {(row["kernel"], row["block"]) for row in found["rows"] if row["num_warps"] == 1}
    assert tried >= {(kernel, block) for kernel in ("states", "backward", "loss and gradient") for block in (256, 512)}
    assert all(row["seconds"] > 0 for row in found["rows"])


def test_the_list_of_what_only_a_gpu_can_answer(tmp_path: Path) -> None:
    """Every question has an answer under the interpreter; without a GPU the list itself refuses to run."""
    pytest.importorskip("triton")
    script = str(ROOT / "bench" / "gpu.sh")
    # The script's python3 is that of these tests.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", script, "--tiny"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OUT": str(tmp_path), "PATH": path},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (results,) = tmp_path.glob("*-questions-tiny.json")
    answers = json.loads(results.read_text())["answers"]
    assert [answer["why_not"] for answer in answers] == [None] * 7
    assert answers[0]["question"] == "kernels_are_right"
    assert all(answer["rows"] for answer in answers)
    (page,) = tmp_path.glob("*-questions-tiny.md")
    assert page.read_text().count("\n## ") == 7


def test_the_questions_fit_twelve_minutes() -> None:
    code = "from bench import questions; print(sum(questions.QUESTIONS.values()), questions.LIMIT)"
    asked, limit = map(int, run_python("-c", code, TRITON_INTERPRET="1").stdout.split())
    assert asked <= limit < 12 * 60 - 20
    assert f"--limit {limit}" in (ROOT / "bench" / "gpu.sh").read_text()


def test_what_ranks_send() -> None:
    """Two processes, gated by the same bits both ways, and the formula."""
    printed = run_python("-m", "bench.bench_distributed", "--tiny", GLOO_SOCKET_IFNAME="lo").stdout
    lines = [line for line in printed.splitlines() if line.startswith(("| 2 |", "| 8 |"))]
    assert [line.split("|")[2].strip() for line in lines] == ["whole", "neighbours", "all"] * 3
    assert [line.split("|")[3].strip() for line in lines if "whole" in line] == ["0.000", "0.0", "0.0"]


@pytest.mark.parametrize(
    ("name", "kind", "cases"), [("bench_tree_logprobs", "tree", 4), ("bench_prefix_tree", "finding", 3)]
)
def test_the_benches_of_the_prefix_tree(name: str, kind: str, cases: int, tmp_path: Path) -> None:
    """Gated each, and written as the others are."""
    pytest.importorskip("transformers", minversion="5.23")
    run_python("-m", f"bench.{name}", "--tiny", "--out", tmp_path)
    (path,) = tmp_path.glob(f"*-{kind}-tiny.json")
    found = json.loads(path.read_text())
    assert len(found["cases"]) == cases and found["machine"]["torch"] == torch.__version__
    assert "Tiny" in path.with_suffix(".md").read_text()
