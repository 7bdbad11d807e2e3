"""``python -m leafkernels.lookahead``: what it streams and shows, and what it says when something is wrong."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import ROOT
from support import run_python, without_interpreter
from tiny_decoders import build_model, build_tokenizer

from leafkernels.lookahead import RewardChannel, RewardTransformer
from leafkernels.lookahead.__main__ import _prompt_ids, main

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[lookahead]'")


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """--model and --channel, of a tiny model that begins at random."""
    base = build_model("llama")
    base.generation_config.eos_token_id = base.config.eos_token_id = None  # so that chunks are committed
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    base.config.name_or_path = str(tmp_path / "base")
    torch.manual_seed(1)
    RewardTransformer(base, RewardChannel(3, 16, width=4)).save_pretrained(tmp_path / "channel")
    return ["--model", str(tmp_path / "base"), "--channel", str(tmp_path / "channel")]


OPTIONS = ["--chunk", "2", "--depth", "1", "--max-new-tokens", "9"]


def answer(folders: list[str], width: int, prompt: str = "abc") -> str:
    model = RewardTransformer.from_pretrained(folders[3], folders[1])
    ids = torch.tensor(build_tokenizer()(prompt)["input_ids"])
    found = model.generate(ids, width=width, chunk=2, depth=1, max_new_tokens=9)
    return str(build_tokenizer().decode(found.token_ids, skip_special_tokens=True))


def test_streams_the_answer(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*folders, *OPTIONS, "abc"]) == 0
    assert capsys.readouterr().out.strip() == answer(folders, 2).strip()
    # The channel names its base; greedy by a width of one.
    assert main([*folders[2:], *OPTIONS, "--width", "1", "abc"]) == 0
    assert capsys.readouterr().out.strip() == answer(folders, 1).strip()


def test_reads_the_prompt_from_standard_input(
    folders: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    assert main([*folders, *OPTIONS, "-"]) == 0
    assert capsys.readouterr().out.strip() == answer(folders, 2).strip()


def test_explains_and_compares(
    folders: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main([*folders, *OPTIONS, "--explain", "--compare", "abc"]) == 0
    out = capsys.readouterr().out
    model, ids = RewardTransformer.from_pretrained(folders[3], folders[1]), torch.tensor([3, 4, 5])
    found, greedy = (model.generate(ids, width=width, chunk=2, depth=1, max_new_tokens=9) for width in (2, 1))
    assert len(found.commits) > 1
    for commit in found.commits:
        for candidate in commit.candidates:
            assert f"{candidate.value:.3f}" in out
    assert out.count("*") == len(found.commits) + (sum(len(c.token_ids) for c in found.commits) < len(found.token_ids))
    assert f"{found.score:.3f}" in out and f"{greedy.score:.3f}" in out
    assert f"{found.num_forwards}, {found.num_tokens}" in out and f"{greedy.num_forwards}, {greedy.num_tokens}" in out


def test_stops_at_a_text(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    letter = answer(folders, 1).strip()[-1]
    assert main([*folders, *OPTIONS, "--width", "1", "--stop", letter, "abc"]) == 0
    out = capsys.readouterr().out.strip()
    assert out.endswith(letter) and out.count(letter) == 1


def test_forks_only_where_the_model_is_unsure(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*folders, *OPTIONS, "--min-p", "1", "abc"]) == 0
    sure = capsys.readouterr().out.strip()
    assert sure == answer(folders, 1).strip() != answer(folders, 2).strip()


def test_asks_by_the_chat_template(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "q{{ messages[0]['content'] }}{% if add_generation_prompt %}z{% endif %}"
    tokenizer.save_pretrained(folders[1])
    assert main([*folders, *OPTIONS, "--device", "cpu", "abc"]) == 0
    asked = capsys.readouterr().out.strip()
    assert main([*folders, *OPTIONS, "--plain", "qabcz"]) == 0
    assert capsys.readouterr().out.strip() == asked == answer(folders, 2, "qabcz").strip()
    assert main([*folders, *OPTIONS, "--plain", "abc"]) == 0
    assert capsys.readouterr().out.strip() == answer(folders, 2).strip() != asked


def test_a_model_that_hears(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It answers a text; ``AutoModelForCausalLM`` does not take it."""
    base = build_model("qwen2-audio")
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    wrapped = RewardTransformer(base, RewardChannel(3, 16, width=4))
    wrapped.save_pretrained(tmp_path / "channel")
    folders = ["--model", str(tmp_path / "base"), "--channel", str(tmp_path / "channel")]
    assert main([*folders, *OPTIONS, "abc"]) == 0
    assert capsys.readouterr().out.strip() == answer(folders, 2).strip()


def test_begin_and_end_tokens_are_there_once() -> None:
    """Whether the tokenizer adds them, the prompt has them, or both; those that the prompt has are kept."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<unk>"
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    text = tokenizer("abc")["input_ids"]
    for name, adds in (("bos", False), ("both", True)):
        special = [("<unk>", bos), ("<eos>", eos)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<unk> $A <eos>" if adds else "<unk> $A", special_tokens=special
        )
        end = [eos] * adds
        for prompt, expected in {
            "abc": [bos, *text, *end],
            "<unk>abc": [bos, *text, *end],
            "<unk><unk>abc": [bos, bos, *text, *end],
            "abc<eos>": [bos, *text, eos],
            "<unk>abc<eos>": [bos, *text, eos],
            "<unk>": [bos, *end],
            "": [bos, *end],
        }.items():
            assert _prompt_ids(tokenizer, prompt, plain=True).tolist() == expected, (name, prompt)


def with_code(folders: list[str], trace: Path) -> None:
    """The base gets code of its own, which leaves a trace where it runs."""
    base = Path(folders[1])
    config = json.loads((base / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(trace)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n"
        "    config_class = OwnConfig\n"
    )
    settings = Path(folders[3]) / "reward_channel.json"
    settings.write_text(settings.read_text().replace('"llama"', '"own"'))


@pytest.mark.parametrize("names", ["--model", "the channel's"])
def test_code_of_a_model_runs_when_it_is_told_to_and_nobody_is_asked(
    folders: list[str],
    names: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, trace = answer(folders, 2, "yes"), tmp_path / "it has run"
    with_code(folders, trace)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    options = [*(folders if names == "--model" else folders[2:]), *OPTIONS]
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    monkeypatch.setattr(sys, "stdin", piped := io.StringIO("yes"))
    assert main([*options, "abc"]) == 2
    shown = capsys.readouterr()
    assert shown.err.endswith("the model comes with code of its own, which --trust-remote-code lets run\n")
    assert piped.tell() == 0 and not trace.exists()
    # Neither by the class.
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        RewardTransformer.from_pretrained(folders[3], *(folders[1:2] if names == "--model" else []))
    assert main([*options, "--trust-remote-code", "-"]) == 0
    assert capsys.readouterr().out.strip() == expected.strip() and trace.exists()


def test_reads_standard_input_before_it_loads_anything(
    folders: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", piped := io.StringIO("\ufeffabc"))
    load = RewardTransformer.from_pretrained
    read = []
    monkeypatch.setattr(
        RewardTransformer, "from_pretrained", lambda *a, **k: read.append(piped.read()) or load(*a, **k)
    )
    assert main([*folders, *OPTIONS, "-"]) == 0
    assert read == [""] and capsys.readouterr().out.strip() == answer(folders, 2).strip()
    monkeypatch.setattr(sys, "stdin", None)
    assert main([*folders, *OPTIONS, "-"]) == 2
    assert "prompt must come from standard input, which is closed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--width", "20", "--depth", "2"], "must keep width ** (depth + 1) at 256 branches"),
        (["--chunk", "0"], "chunk must be"),
        (["--channel", "/no/such/folder"], "/no/such/folder"),
        # Before anything is loaded.
        (["--channel", "/no/such/folder", "--width", "0"], "width must be at least 1, got 0"),
        (["--channel", "/no/such/folder", "--min-p", "2"], "min_p must lie between 0 and 1, got 2.0"),
        (
            ["--channel", "/no/such/folder", "--device", "foo"],
            "--device must be a device that PyTorch has here, got 'f",
        ),
        (["--channel", "/no/such/folder", "--device", "cuda:99"], "PyTorch has here, got 'cuda:99'"),
        (["--channel", "/no/such/folder", "--depth", str(10**30)], "width and depth must keep width ** (depth + 1) at"),
        (["--channel", "/no/such/folder", "--width", str(10**30)], "width and depth must keep width ** (depth + 1) at"),
        (["--channel", __file__], "test_lookahead_command.py, which is a file"),
        (["--stop", ""], "stop_strings must be a string or a list of them, none of them empty"),
    ],
)
def test_says_what_is_wrong(
    folders: list[str], change: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*folders, *OPTIONS, *change, "abc"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["leafkernels.lookahead", "leafkernels"])
@pytest.mark.parametrize("module", ["torch", pytest.param("rich", marks=pytest.mark.slow)])
def test_interrupted_while_it_imports(name: str, module: str, tmp_path: Path) -> None:
    """By a module that is interrupted in its import, whose place is before the true one."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", name, "x", "--channel", "y"],
        env=without_interpreter(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stderr) == (130, f"{name}: interrupted\n")


def test_interrupted_while_it_loads_or_answers(
    folders: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for method in ("generate", "from_pretrained"):
        monkeypatch.setattr(RewardTransformer, method, interrupt)
        assert main([*folders, *OPTIONS, "abc"]) == 130
        assert capsys.readouterr().err.endswith("leafkernels.lookahead: interrupted\n")


@pytest.mark.slow
def test_as_a_command(folders: list[str]) -> None:
    run = run_python("-m", "leafkernels.lookahead", *folders, *OPTIONS, "abc")
    assert run.stdout.strip() == answer(folders, 2).strip()
