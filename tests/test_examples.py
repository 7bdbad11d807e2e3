"""The examples run, and the bundled sample is what its script says it is."""

import gzip
import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
from forked import run_forked
from support import ROOT, cells_of, results_of

pytestmark = pytest.mark.slow
pytest.importorskip("transformers")


def run_example(*arguments: str) -> str:
    return run_forked(*arguments, cwd=ROOT / "examples", timeout=280).stdout


def test_grpo_lora_learns() -> None:
    """A third of the default run: the mean reward of the last tenth of the steps is well above that of the first."""
    pytest.importorskip("peft")
    assert run_example("grpo_lora.py", "--advantages", "grpo", "--warmup-steps", "5", "--steps", "2", "--prompts", "2")
    output = run_example("grpo_lora.py", "--advantages", "leaf", "--steps", "40", "--terms", "4")
    first, last = map(float, re.findall(r"first tenth ([\d.]+), last tenth ([\d.]+)", output)[0])
    assert last > first + 0.05, output


@pytest.mark.parametrize("advantages", ["leaf", "grpo"])
def test_trl_leaf_runs(advantages: str) -> None:
    """The whole way, in few steps; tests/test_trl.py sees the trainer learn."""
    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    output = run_example("trl_leaf.py", "--advantages", advantages, "--steps", "2", "--warmup-steps", "5")
    assert f"{advantages} advantages, mean reward, first 0." in output
    assert ("share of tokens with span credit" in output) == (advantages == "leaf")


def test_examples_share_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of rollouts are the same, and what is printed of a few steps too."""
    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import running_sums
    import torch

    rng = running_sums.seed_everything(0)
    model = running_sums.build_model()
    prompts = [running_sums.draw_prompt(rng, 9, held_out=False) for _ in range(2)]
    rollouts = running_sums.sample(model, prompts, 8)
    with torch.no_grad():
        rows, shared = (running_sums.token_logprobs(model, rollouts, share_prefixes=shares) for shares in (False, True))
    torch.testing.assert_close(shared, rows, rtol=1e-4, atol=1e-5)
    steps = ("--steps", "2", "--warmup-steps", "5", "--terms", "9")
    printed = [run_example("trl_leaf.py", *steps, *more) for more in ((), ("--share-prefixes",))]
    lines = [[line for line in text.splitlines() if "accuracy" in line or "mean reward" in line] for text in printed]
    assert lines[0] == lines[1] and lines[0]
    assert "leaf/tokens_per_node" not in printed[0] and "leaf/tokens_per_node" in printed[1]


@pytest.mark.parametrize(("method", "domains"), [("fire", ["sums", "reversal"]), ("opd", ["sums"])])
def test_distill_runs(method: str, domains: list[str]) -> None:
    """The whole way, in few steps; tests/test_trl_distillation.py sees the student approach its teacher."""
    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    steps = ("--steps", "2", "--teacher-steps", "5", "--student-steps", "5")
    more = ("--rollouts", "4", "--share-prefixes") if method == "opd" else ()
    more += ("--loss", "jsd") if method == "fire" else ()
    output = run_example("distill.py", "--method", method, "--domains", *domains, *steps, *more)
    assert ("leaf/tokens_per_node" in output) == (method == "opd")
    assert ("fire/divergence" in output) == (method == "fire")
    assert "teacher less student log-probability of a token, first -" in output
    assert re.findall(r"teacher, 5 supervised steps: held-out accuracy, (\w+) ", output) == domains
    last = output.partition("student, after 2 steps: held-out accuracy, ")[2]
    assert re.findall(r"(\w+) [01]\.\d{3}", last) == domains


def test_the_study_of_distillation_runs(tmp_path: Path) -> None:
    """Two seeds of few steps: what is there is kept, and tables and figures come out."""
    for package in ("trl", "matplotlib", "scipy"):
        pytest.importorskip(package)
    folders = ("--work", str(tmp_path / "work"), "--out", str(tmp_path))
    steps = ("--seeds", "0", "1", "--steps", "2", "--teacher-steps", "2", "--student-steps", "2")
    run_example("study/distill/run.py", *folders, *steps, "--arms", "opd")
    first = results_of(tmp_path, "runs")
    assert [run["seed"] for run in first] == [0, 1]
    run_example("study/distill/run.py", *folders, *steps)
    assert results_of(tmp_path, "runs")[:2] == first
    runs = [run for run in results_of(tmp_path, "runs") if run["seed"] == 1]
    assert len(runs) == 6
    # The first batch is the same for all arms, which differ from there on.
    assert len({run["steps"]["gap"][0] for run in runs}) == 1 and len({run["steps"]["gap"][1] for run in runs}) > 1
    assert {run["arm"] for run in runs if run["steps"]["kept"][0] < 1} == {"filter", "fire_batch", "fire_trajectory"}
    made = {path.name for path in (tmp_path / "results").iterdir()}
    assert made == {"runs.jsonl.gz", "tables.md", "curves.png", "weights.png"}


def test_the_study_of_losses_runs(tmp_path: Path) -> None:
    """Two seeds of few tokens, one of which is there; the tables come out."""
    for package in ("trl", "matplotlib", "scipy"):
        pytest.importorskip(package)
    (tmp_path / "results").mkdir()
    losses = {"sampled": "sampled", "reverse_kl": "reverse KL", "forward_kl": "forward KL", "jsd": "JSD"}
    arms = [(loss, weights) for loss in losses for weights in ("plain", "fire")]
    same = {"seed": 0, "teacher": 0.5, "first": 0.1, "tokens": [1, 2, 3], "greedy": [0.1, 0.2, 0.3]}
    kept = [{"loss": a, "weights": b, **same, "gap": [-1.0, -0.9, -0.8], "seconds": 1.0} for a, b in arms]
    lines = "".join(json.dumps({"part": "losses", "result": run}) + "\n" for run in kept)
    (tmp_path / "results" / "runs.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    folders = ("--work", str(tmp_path / "work"), "--out", str(tmp_path))
    steps = ("--seeds", "0", "1", "--tokens", "900", "--teacher-steps", "2", "--student-steps", "2")
    run_example("study/distill/losses.py", *folders, *steps, "--held-out", "10")
    found = results_of(tmp_path, "losses")
    assert found[:8] == kept and [(run["loss"], run["weights"], run["seed"]) for run in found[8:]] == [
        (*arm, 1) for arm in arms
    ]
    for run in found[8:]:
        # Equal tokens, to a step; the first batch is that of all arms.
        assert len(run["greedy"]) == 3 and 900 <= run["tokens"][-1] < 900 + 32 * 32
        assert run["gap"][0] == found[8]["gap"][0]
    rows = cells_of((tmp_path / "results" / "losses_tables.md").read_text(encoding="utf-8"))
    assert [row[0] for row in rows[1:9]] == [f"{losses[loss]}, {weights}" for loss, weights in arms]


def test_the_tables_of_the_study_of_losses_are_those_of_its_runs() -> None:
    for package in ("trl", "matplotlib", "scipy"):
        pytest.importorskip(package)
    folder = ROOT / "examples" / "study" / "distill"
    code = "import losses, sys; sys.stdout.write(losses.Study(losses.HERE).tables())"
    made = cells_of(run_forked("-c", code, cwd=folder).stdout)
    shown = cells_of((folder / "LOSSES.md").read_text(encoding="utf-8"))
    assert shown == made


def test_the_tables_of_the_study_of_distillation_are_those_of_its_runs() -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    folder = ROOT / "examples" / "study" / "distill"
    code = "import analyse, sys; sys.stdout.write(analyse.Study(analyse.HERE).tables())"
    made = cells_of(run_forked("-c", code, cwd=folder).stdout)[1:7]
    shown = cells_of((folder / "README.md").read_text(encoding="utf-8"))[1:7]
    for row, found in zip(shown, made, strict=True):
        # Greedy during, at the end, and the divergence; the page has no p of the last two and no sampled rewards.
        assert row[:3] + row[4:] == [*found[:3], *found[4:6], *found[10:12]]
        assert row[3] == (f"{found[3]} ({found[13]})" if found[3] else "")


def test_lookahead_runs(tmp_path: Path) -> None:
    """The whole way, in few steps; what a channel that has learnt is worth is in examples/study/lookahead."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[study]'")
    picture, channel = tmp_path / "picture.png", tmp_path / "channel"
    steps = ("--warmup-steps", "150", "--prompts", "60", "--channel-steps", "5", "--problems", "4")
    output = run_example("lookahead.py", *steps, "--picture", str(picture), "--save", str(channel))
    assert picture.stat().st_size > 1000 and (channel / "reward_channel.safetensors").exists()
    for name in ("greedy", "best of 8", "4 beams", "look ahead 2, 10, 2", "look ahead 2, 1, 3, min_p 0.25"):
        assert name in output


def test_tables_of_the_lookahead_study_are_those_of_its_results(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="needs scipy: pip install -e '.[speech]'")
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[study]'")
    study = ROOT / "examples" / "study" / "lookahead"
    shutil.copytree(study / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))
    run_example("study/lookahead/run.py", "--report", "--out", str(tmp_path))
    assert (tmp_path / "results" / "accuracy.png").stat().st_size > 1000
    readme = (study / "README.md").read_text(encoding="utf-8").partition("## A speech model")[0]
    rows = [line for line in readme.splitlines() if line.startswith("| ") or line.startswith("Primary")]
    assert len(rows) > 20 and set(rows) <= set((tmp_path / "results" / "tables.md").read_text().splitlines())


def test_tables_of_lookahead_on_speech_are_those_of_their_results(tmp_path: Path) -> None:
    for package in ("soundfile", "scipy", "matplotlib", "peft"):
        pytest.importorskip(package, reason="needs the extra speech")
    study = ROOT / "examples" / "study" / "lookahead"
    shutil.copytree(study / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))
    run_example("study/lookahead/speech_model.py", "--report", "--out", str(tmp_path))
    tables = (tmp_path / "results" / "speech_tables.md").read_text()
    readme = (study / "README.md").read_text(encoding="utf-8").partition("## A speech model")[2]
    rows = [line for line in readme.splitlines() if line.startswith("| ")]
    assert len(rows) > 60 and set(rows) <= set(tables.splitlines())


def test_the_teacher_of_lookahead_slips_where_it_misremembers() -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import lookahead
    finally:
        sys.path.pop(0)
    assert lookahead.right_steps("1+2=3,3+4=8,8+9=17.") == pytest.approx(2 / 3)
    assert lookahead.right_steps("1+=3,4.") == 0
    rng, steps, slips = random.Random(0), 0, 0
    for _ in range(500):
        prompt = lookahead.draw_prompt(rng, 5, held_out=False)
        for step in lookahead.slipping_answer(prompt, rng).rstrip(".").split(","):
            terms, result = step.split("=")
            total, term = map(int, terms.split("+"))
            slip = int(result) - total - term
            assert slip == 0 or (slip == 1 and lookahead.misremembers(total, term))
            steps, slips = steps + 1, slips + slip
    assert 0.05 < slips / steps < 0.3


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells in order, without Jupyter; none is committed with what it printed."""
    pytest.importorskip("jinja2", reason="needs the extra html")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "first_minutes.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    names: dict[str, object] = {}
    for cell in code:
        exec("".join(cell["source"]), names)
    shown = capsys.readouterr().out
    assert "24 prompts, 40 rollouts of each" in shown and "to GRPO" in shown
    assert "<iframe" in names["page"]._repr_html_()  # type: ignore[attr-defined]
    assert (tmp_path / "rollouts.jsonl.gz").stat().st_size > 10_000


def test_the_bundled_sample() -> None:
    """Lengths fit, log-probabilities are such, and every reward is what the words of the task say."""
    with gzip.open(ROOT / "leafkernels" / "command" / "sample_rollouts.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert len(lines) == 24 and all("Apache-2.0" in line["source"] for line in lines)
    families = set()
    for line in lines:
        assert len(line["completions"]) == 40
        family, _, given = line["prompt"].partition(": ")
        families.add(family)
        for completion in line["completions"]:
            assert len(completion["token_ids"]) == len(completion["logprobs"]) == len(completion["tokens"])
            assert all(logprob <= 0 for logprob in completion["logprobs"])
            text = "".join(completion["tokens"]).removesuffix("<|im_end|>")
            assert completion["reward"] == pytest.approx(REWARDS[family](given, text)), (line["prompt"], text)
    assert families == set(REWARDS)


def of_sorting(given: str, text: str) -> float:
    right = sorted(map(int, given.split(", ")))
    found = list(map(int, re.findall(r"-?\d+", text)))
    same = sum(ours == theirs for ours, theirs in zip(right, found, strict=False))
    return same / len(right) if len(found) <= len(right) else 0.0


def of_reversal(given: str, text: str) -> float:
    return float(text.strip() == ", ".join(given.split(", ")[::-1]))


def of_sums(given: str, text: str) -> float:
    words = given.split()
    total = int(words[0]) + sum(int(sign + term) for sign, term in zip(words[1::2], words[2::2], strict=True))
    found = re.findall(r"-?\d+", text.rpartition("=")[2])
    return float(bool(found) and int(found[0]) == total)


REWARDS = {"Sort": of_sorting, "Reverse": of_reversal, "Work out": of_sums}


def test_the_tables_of_agreement_with_a_speech_model_are_those_of_its_results() -> None:
    pytest.importorskip("soundfile", reason="needs the extra speech")
    pytest.importorskip("scipy", reason="needs the extra speech")
    study = ROOT / "examples" / "study" / "agreement"
    printed = run_forked(str(study / "speech_model.py"), "--report").stdout
    assert printed.count("|") > 100 and printed.strip() in (study / "README.md").read_text(encoding="utf-8")


def test_the_tables_of_agreement_with_the_exact_gradient_are_those_of_its_results() -> None:
    pytest.importorskip("scipy", reason="needs the extra speech")
    study = ROOT / "examples" / "study" / "agreement"
    printed = run_forked(str(study / "run.py"), "--part", "exact").stdout
    assert printed.count("|") > 300 and printed.strip() in (study / "README.md").read_text(encoding="utf-8")
