"""The program that trains an audio model, with its recipes, on tones and a model of a few thousand weights."""

import io
import itertools
import json
import math
import sys
import tarfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
np = pytest.importorskip("numpy")
pytest.importorskip("trl", minversion="1.14", reason="needs TRL: pip install -e '.[trl]'")
pytest.importorskip("transformers", minversion="5.23")
for package in ("peft", "soundfile", "sacrebleu", "jiwer", "yaml"):
    pytest.importorskip(package)
from support import ROOT

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
try:
    import speech_leaf
    from speech.evaluation import measure
    from speech.rows import read_table
finally:
    sys.path.remove(str(EXAMPLES))

import tiny_audio
import tiny_listeners
from tiny_listeners import tone, wave

RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
ON_CPU = ["--use_cpu", "--bf16", "false", "--dtype", "float32", "--disable_tqdm", "true"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table as CoVoST2 has it: path, sentence, translation."""
    lines = ["path\tsentence\ttranslation"]
    for i in range(8):
        (tmp_path / f"{i}.wav").write_bytes(wave(tone(i, 0.2 + 0.1 * i)))
        lines.append(f'{i}.wav\tsaid "{i}\t{"abcdefgh"[i]} {"hgfedcba"[i]}')
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("method", ["leaf", "grpo"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains(
    recipe: Path, method: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps with a small model in place of the checkpoint, which is then evaluated."""
    pair = tiny_listeners.granite_speech if "granite" in recipe.stem else tiny_listeners.qwen2_audio
    monkeypatch.setattr(speech_leaf, "load", lambda _: pair())
    small = ["--max_steps", "2", "--max_completion_length", "8", "--gradient_accumulation_steps", "1"]
    steps = ["--logging_steps", "1", "--save_steps", "2", "--output_dir", str(tmp_path / "run"), "--instruction", "a b"]
    command = ["--config", str(recipe), "--method", method, "--data", f"tsv:{table}", *small, *steps, *ON_CPU]
    run = speech_leaf.main(command)
    assert type(run) is speech_leaf.METHODS[method]
    assert (run.num_generations, run.beta, run.top_p, run.epsilon_low) == (8, 0.02, 0.9, 0.2)
    assert run.args.use_bias_correction_kl is False
    adapter = run.model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (64, 128, 0.05)
    adapted = {name.rsplit(".lora", 1)[0] for name, weight in run.model.named_parameters() if weight.requires_grad}
    assert len(adapted) == 7 and all("language_model" in name for name in adapted)
    history = [line for line in run.state.log_history if "reward" in line]
    assert len(history) == 2 and all(math.isfinite(line["loss"]) for line in history)
    assert ("leaf/span_credit_share" in history[0]) == (method == "leaf")
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    found = speech_leaf.main([*command, "--eval_data", f"tsv:{table}", "--evaluate", checkpoint])
    assert all(low <= value <= high for value, low, high in found.values())
    kept = json.loads((tmp_path / "run" / "evaluation of checkpoint-2.json").read_text())
    expected = [f"{a} {b}" for a, b in zip("abcdefgh", "hgfedcba", strict=True)]
    assert [pair["reference"] for pair in kept["answers"]] == expected


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """An archive of tones, named like the spoken digits."""
    path = tmp_path / "fsdd.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for voice, digit in itertools.product(("ann", "bob", "cat"), range(10)):
            content = wave(tone(digit, 0.2 + 0.02 * len(voice), 8000), 8000)
            entry = tarfile.TarInfo(f"{digit}_{voice}_0.wav")
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("method", ["leaf", "grpo", "tempo"])
def test_spoken_digits(method: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The small model, from its supervised start to the evaluation; stopped once and gone on."""
    out = tmp_path / "run"
    command = [
        "--data",
        f"fsdd:{digits}",
        "--held_out",
        "cat",
        "--digits",
        "2",
        "--method",
        method,
        "--reward",
        "prefix",
    ]
    command += ["--warm_steps", "2", "--utterances", "8", "--evaluated", "4", "--output_dir", str(out), *ON_CPU]
    command += ["--num_generations", "4", "--per_device_train_batch_size", "8", "--max_completion_length", "8"]
    command += ["--save_steps", "1", "--logging_steps", "1", "--report_to", "none"]
    speech_leaf.main([*command, "--max_steps", "1"])
    run = speech_leaf.main([*command, "--max_steps", "2"])
    assert run.state.global_step == 2 and [line["step"] for line in run.state.log_history if "reward" in line] == [1, 2]
    assert getattr(run.args, "estimator", "") == ("leaf" if method == "grpo" else method)
    assert all(
        {*json.loads((out / f"{when}.json").read_text())} >= {"bleu", "wer", "exact"} for when in ("before", "after")
    )
    assert "after, exact: " in capsys.readouterr().out


def test_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for i in range(16):
        (tmp_path / f"{i}.wav").write_bytes(wave(tone(i, 0.3)))
        lines.append(json.dumps({"audio": f"{i}.wav", "prompt": "a b", "reference": f"c {'abcdefgh'[i % 8]}"}))
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    train, evaluation, reward, _ = speech_leaf.read_data(
        speech_leaf.SpeechArguments(f"manifest:{tmp_path / 'corpus.jsonl'}", utterances=5, evaluated=3), 0, False
    )
    assert (len(train), len(evaluation), reward.__name__) == (5, 3, "sentence_bleu")
    assert train[0]["prompt"][0]["content"][0]["type"] == "audio"
    assert set(evaluation["reference"]) <= {"c h"}


def test_answers_are_the_most_likely_ones(table: Path, tmp_path: Path) -> None:
    """Three rows at a time or one by one: the same answers, which are those of the model's own generate."""
    run = tiny_audio.trainer(speech_leaf.AudioGRPOTrainer, tiny_audio.config(tmp_path, max_completion_length=5))
    rows = tiny_audio.recordings(5)
    expected = []
    for row in rows:
        samples, _ = tiny_listeners.soundfile.read(tiny_listeners.io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        inputs = dict(tiny_listeners.process(run.processing_class, row["prompt"], samples))
        found = run.model.eval().generate(
            **inputs, max_new_tokens=5, do_sample=False, suppress_tokens=[3], pad_token_id=0, eos_token_id=1
        )
        expected.append(run._tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert run.answer(rows, batch_size=3) == run.answer(rows, batch_size=1) == expected
    assert len(set(expected)) > 1


def test_measures_by_hand() -> None:
    found = measure(["The cat sat", "a b", ""], ["the cat sat", "a c", "d"])
    assert found["exact"][0] == pytest.approx(100 / 3)
    assert found["wer"][0] == pytest.approx(100 * 2 / 6)
    assert measure(["The cat sat here"], ["the cat sat here"])["bleu"] == pytest.approx((100.0, 100.0, 100.0))
    from sacrebleu.metrics import BLEU

    answers, references = ["the cat sat on it", "a dog runs over there"], ["the cat sat on him", "the dog runs there"]
    whole = BLEU(lowercase=True).corpus_score(answers, [references]).score
    assert measure(answers, references)["bleu"][0] == pytest.approx(whole)
    value, low, high = measure(["a b"] * 50 + ["x"] * 50, ["a b"] * 100)["exact"]
    # A share of a half of a hundred: 1.96 standard errors of 5 points.
    assert value == 50 and low == pytest.approx(40, abs=2) and high == pytest.approx(60, abs=2)


def test_tables_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a table of audio and references must be a file, got"):
        read_table(tmp_path / "none.tsv", "path", "translation", "")
    (tmp_path / "some.tsv").write_text("path\tsentence\na.wav\tb\n")
    with pytest.raises(ValueError, match="rows with the columns 'path' and 'translation', got path, sentence"):
        read_table(tmp_path / "some.tsv", "path", "translation", "")
    (tmp_path / "some.tsv").write_text("path\ttranslation\na.wav\tb\nc.wav\n")
    with pytest.raises(ValueError, match=r"row 2: must have 'path' and 'translation', got \['c.wav', None\]"):
        read_table(tmp_path / "some.tsv", "path", "translation", "")
    (tmp_path / "some.tsv").write_bytes(b"\xef\xbb\xbfpath\ttranslation\r\na.wav\tb\r\n\r\n")
    (row,) = read_table(tmp_path / "some.tsv", "path", "translation", "")
    assert row["reference"] == "b" and row["audio"]["path"].endswith("a.wav")
    with pytest.raises(SystemExit, match="^the small model knows the letters of drawn data only"):
        (tmp_path / "some.tsv").write_text("path\ttranslation\na.wav\tb\n")
        speech_leaf.main(["--data", f"tsv:{tmp_path / 'some.tsv'}", "--output_dir", str(tmp_path), *ON_CPU])
    with pytest.raises(SystemExit, match="^--method must be one of grpo, leaf, dr_grpo, tempo, tree_td, got 'ppo'"):
        speech_leaf.main(["--data", "espeak", "--method", "ppo", "--output_dir", str(tmp_path), *ON_CPU])
