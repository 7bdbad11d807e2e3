"""What an audio model reads of a row, by the real processor of a small Qwen2-Audio."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")
np = pytest.importorskip("numpy")
pytest.importorskip("soundfile", reason="needs soundfile: pip install -e '.[speech]'")

from support import run_python
from tiny_decoders import add_specials, build_model
from tiny_listeners import MODELS, RATE, asked, process, qwen2_audio, tone, wave

from leafkernels.rows.recordings import (
    Heard,
    PromptReader,
    _read_clip,
    added_tokens,
    find_encoder,
    join_features,
    resample,
    undecoded,
)


@pytest.fixture(scope="module")
def reader() -> PromptReader:
    return PromptReader(qwen2_audio()[1])


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_what_the_processor_makes_of_it(name: str) -> None:
    model, processor = MODELS[name]()
    samples = tone(1, 0.7)
    heard = PromptReader(processor).read(asked("ab"), {"array": samples, "sampling_rate": RATE})
    expected = dict(process(processor, asked("ab"), samples))
    assert heard.token_ids == torch.as_tensor(expected.pop("input_ids"))[0].tolist()
    del expected["attention_mask"]
    assert heard.features.keys() == expected.keys()
    for feature, values in expected.items():
        assert torch.equal(heard.features[feature], values), feature
    assert find_encoder(model) is not None


def test_recordings_in_every_form(reader: PromptReader, tmp_path: Path) -> None:
    """Path, bytes, array, two channels: the same features to the last bit."""
    samples = tone(1, 0.7)
    path = tmp_path / "clip.wav"
    path.write_bytes(wave(samples))
    forms: list[Any] = [
        str(path),
        {"path": str(path)},
        wave(samples),
        {"bytes": wave(samples)},
        {"array": samples.tolist(), "sampling_rate": RATE},
        {"array": np.stack([samples, samples]).tolist(), "sampling_rate": RATE},
        {"bytes": wave(np.stack([samples, samples], 1))},
    ]
    first, *others = (reader.read(asked("ab"), form) for form in forms)
    for other in others:
        assert other.token_ids == first.token_ids
        for name, values in first.features.items():
            assert torch.equal(other.features[name], values)


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("dtype", ["float64", "float16", "int16", "int32", "uint8", "int8"])
def test_arrays_of_any_order_and_dtype_are_what_files_are(reader: PromptReader, channels: int, dtype: str) -> None:
    """As soundfile gives them, (samples, channels), and as torchaudio does, with a level for each channel."""
    samples = np.stack([tone(number, 0.3) / (number + 1) for number in range(channels)], 1)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        array = samples.astype(kind)
        expected = array.astype(np.float32)
    else:
        half = 2.0 ** (8 * kind.itemsize - 1)
        array = (np.round(samples * (half - 1)) + (half if kind.kind == "u" else 0)).astype(kind)
        expected = ((array - (half if kind.kind == "u" else 0)) / half).astype(np.float32)
    first = reader.read(asked("ab"), wave(expected))
    for form in (array, array.T, torch.from_numpy(array.copy())):
        found = reader.read(asked("ab"), {"array": form, "sampling_rate": RATE})
        assert found.token_ids == first.token_ids
        for name, values in first.features.items():
            assert torch.equal(found.features[name], values)


@pytest.mark.parametrize(("subtype", "dtype"), [("PCM_16", "int16"), ("PCM_32", "int32"), ("PCM_U8", "uint8")])
def test_integers_are_scaled_as_soundfile_scales_those_of_a_file(subtype: str, dtype: str, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(1, 0.1), RATE, subtype=subtype)
    expected, _ = soundfile.read(path, dtype="float32")
    if dtype == "uint8":  # which soundfile does not give
        array = np.round(expected * 128 + 128).astype(np.uint8)
    else:
        array, _ = soundfile.read(path, dtype=dtype)
    np.testing.assert_array_equal(_read_clip({"array": array, "sampling_rate": RATE}, RATE), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_clip_that_is_too_short_is_not_deaf(name: str) -> None:
    """Alone, and among others: with no audio token, or none of its own, a prompt would be trained without it."""
    reader = PromptReader(MODELS[name]()[1])
    whole, short = ({"array": tone(1, seconds), "sampling_rate": RATE} for seconds in (0.5, 0.005))
    message = r"^audio must be long enough for one audio token, got 0\.005 s \(80 samples .*, with the prompt"
    with pytest.raises(ValueError, match=message):
        reader.read(asked("ab"), short)
    two = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "a"}, {"type": "audio"}]}]
    with pytest.raises(ValueError, match=message):
        reader.read(two, [whole, short])
    assert reader.read(two, [whole, whole]).token_ids


@pytest.mark.parametrize("seconds", [0.021, 0.03])
def test_no_audio_token_behind_the_first_frame(reader: PromptReader, seconds: float) -> None:
    """One frame of 20 ms is there, and the encoder makes a token of two."""
    with pytest.raises(ValueError, match="^audio must be long enough for one audio token, got 0.0"):
        reader.read(asked("ab"), {"array": tone(1, seconds), "sampling_rate": RATE})
    assert 3 in reader.read(asked("ab"), {"array": tone(1, 0.041), "sampling_rate": RATE}).token_ids


def test_end_tokens_that_a_tokenizer_adds_do_not_stand_before_the_answer() -> None:
    model, processor = qwen2_audio()
    plain = PromptReader(processor)
    asking = plain.read("<|AUDIO|>ab", wave(tone(1))).token_ids, plain.read_text("ab").token_ids
    add_specials(processor.tokenizer, "<end> $A <unk>")
    reader = PromptReader(processor)
    assert added_tokens(processor.tokenizer) == ([1], [2])
    found = reader.read("<|AUDIO|>ab", wave(tone(1))).token_ids, reader.read_text("ab").token_ids
    assert found == tuple([1, *ids] for ids in asking)


def test_another_rate_is_resampled(reader: PromptReader) -> None:
    low, high = (reader.read(asked("ab"), wave(tone(0, 1.0, rate), rate)) for rate in (8000, RATE))
    assert low.token_ids == high.token_ids
    # A tone far below either rate, away from the clip's ends.
    torch.testing.assert_close(
        low.features["input_features"][..., 5:45], high.features["input_features"][..., 5:45], rtol=0, atol=0.05
    )


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_resampling_keeps_a_tone(rate: int) -> None:
    """Also where the clip is no whole number of samples at the other rate: it must not be stretched to be one."""
    samples = 0.5 * np.sin(2 * np.pi * 3000 * np.arange(2 * rate + 7) / rate)
    found = resample(samples, rate, 16000)
    expected = 0.5 * np.sin(2 * np.pi * 3000 * np.arange(len(found)) / 16000)
    assert found.dtype == np.float32 and abs(len(found) - 16000 * len(samples) / rate) < 1
    # The filter is 60 dB deep; before and after the clip is silence.
    np.testing.assert_allclose(found[400:-400], expected[400:-400], atol=1e-3 if rate != 16000 else 1e-7)


def test_the_end_of_a_clip_does_not_sound_at_its_beginning() -> None:
    clip = np.concatenate([np.zeros(4000), 0.5 * np.ones(1000)])
    assert np.abs(resample(clip, 8000, 16000)[:4000]).max() == 0


def test_prompts_in_every_form(reader: PromptReader) -> None:
    """Without a part for the audio it comes first, as TRL has it for images; text holds the token; two recordings."""
    clip = wave(tone(1))
    first, second = (reader.read(prompt, clip) for prompt in (asked("ab"), [{"role": "user", "content": "ab"}]))
    assert first.token_ids == second.token_ids
    two = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "a"}, {"type": "audio"}]}]
    both = reader.read(two, [clip, wave(tone(2, 1.0))])
    assert len(both.features["input_features"]) == 2
    audio = 3  # of the vocabulary of tests/tiny_listeners.py
    assert both.token_ids.count(audio) > 2 * first.token_ids.count(audio) > 0
    text = reader.read("<|audio_bos|><|AUDIO|><|audio_eos|>ab", clip)
    assert text.token_ids.count(audio) == first.token_ids.count(audio)
    assert text.token_ids[-2:] == [6, 7]


def test_which_prompts_ask_for_a_recording(reader: PromptReader) -> None:
    asking = ["<|AUDIO|>a", asked("ab"), [{"role": "user", "content": "a<|AUDIO|>"}]]
    silent = ["ab", [{"role": "user", "content": "ab"}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}]]
    assert [reader.asks(prompt) for prompt in asking + silent] == [True] * 3 + [False] * 3


def test_features_of_a_batch_are_padded_with_zeros() -> None:
    """Frames and masks to the longest; clips of a prompt stay together; frames one after the other are not padded."""
    rows = [
        Heard(
            [], {"frames": torch.ones(2, 3, 4), "mask": torch.ones(2, 4, dtype=torch.int64), "flat": torch.ones(3, 2)}
        ),
        Heard(
            [], {"frames": torch.ones(1, 3, 6), "mask": torch.ones(1, 6, dtype=torch.int64), "flat": torch.ones(1, 2)}
        ),
    ]
    found = join_features(rows)
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "frames": (3, 3, 6),
        "mask": (3, 6),
        "flat": (4, 2),
    }
    assert found["mask"].tolist() == [[1] * 4 + [0] * 2] * 2 + [[1] * 6]
    assert torch.equal(found["frames"].sum(1), 3.0 * found["mask"])
    assert join_features([]) == {}


def test_datasets_audio_is_left_to_the_reader() -> None:
    datasets = pytest.importorskip("datasets")
    recording = wave(tone(1))  # once: a WAV file of floats holds the second in which it was written
    rows = datasets.Dataset.from_list([{"audio": {"bytes": recording, "path": None}}])
    decoding = rows.cast_column("audio", datasets.Audio())
    found = undecoded({"one": decoding, "other": rows})
    assert not found["one"].features["audio"].decode and found["one"][0]["audio"]["bytes"] == recording
    assert found["other"] is rows
    for other in (None, [{"audio": None}], decoding.to_iterable_dataset().map(lambda row: row)):
        undecoded(other)


@pytest.mark.parametrize(
    ("audio", "prompt", "message"),
    [
        (None, None, "audio must be a recording in every row, got None"),
        ({"array": [0.0] * 800, "sampling_rate": RATE}, None, "audio must be audible, got 0.05 s of silence"),
        ({"array": [0.1, math.nan], "sampling_rate": RATE}, None, "audio must be finite, got NaN or infinity among"),
        ({"array": [0.1] * 9, "sampling_rate": 0}, None, "a sampling rate that is a positive integer, got 0"),
        ({"array": [0.1] * 9}, None, "a sampling rate that is a positive integer, got None"),
        ({"array": [], "sampling_rate": RATE}, None, "audio must have samples, got an empty recording"),
        ({"array": np.zeros((0, 900)), "sampling_rate": RATE}, None, "must have samples, got an empty recording"),
        ({"array": np.ones((2, 2)), "sampling_rate": RATE}, None, r"tells samples from channels.*got shape \(2, 2\)"),
        ({"array": np.ones((9, 30)), "sampling_rate": RATE}, None, r"at most 32, got shape \(9, 30\)"),
        ({"array": np.ones((80, 900)), "sampling_rate": RATE}, None, r"at most 32, got shape \(80, 900\)"),
        ({"array": np.ones((1, 2, 900)), "sampling_rate": RATE}, None, r"got shape \(1, 2, 900\) of float64"),
        ({"array": 0.5, "sampling_rate": RATE}, None, r"of floats, or of integers .*, got shape \(\) of float64"),
        ({"array": [1, 2] * 900, "sampling_rate": RATE}, None, r"at most 32 bits, got shape \(1800,\) of int64"),
        ({"array": [[0.1], [0.1, 0.2]], "sampling_rate": RATE}, None, r"got shape \(\) of object"),
        ({"array": [True] * 900, "sampling_rate": RATE}, None, r"got shape \(900,\) of bool"),
        ({"array": ["a"] * 900, "sampling_rate": RATE}, None, r"got shape \(900,\) of <U1"),
        ({"bytes": wave(tone(1, 3.0))}, None, r"no longer than the 2 s that the encoder takes, got 3\.00 s"),
        ("nowhere.wav", None, "audio must be a file that soundfile reads, got 'nowhere.wav'"),
        ({"bytes": b"text"}, None, "audio must be a file that soundfile reads, got b'text'"),
        ({"url": "x"}, None, "audio must be a path, bytes, .*, got a dict of url"),
        ([], None, "audio must be a recording in every row, got an empty list"),
        ([{"bytes": wave(tone(1))}] * 2, None, "prompt must have an audio part for each recording, got 1 for 2"),
        ({"bytes": wave(tone(1))}, "ab", "the audio token '<|AUDIO|>' once for each recording, got 0 for 1"),
        ({"bytes": wave(tone(1))}, [{"role": "system", "content": "ab"}], "must have a message of the user, got none"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be(audio: Any, prompt: Any, message: str, reader: PromptReader) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|") + ".*with the prompt"):
        reader.read(prompt or asked("ab"), audio)


def test_what_does_not_hear() -> None:
    with pytest.raises(TypeError, match="^processing_class must be a processor with .* got TokenizersBackend"):
        PromptReader(qwen2_audio()[1].tokenizer)
    with pytest.raises(TypeError, match="^model must have an audio encoder, got LlamaForCausalLM"):
        find_encoder(build_model("llama"))


def test_the_public_names_do_not_load_it() -> None:
    code = "import sys, leafkernels; print('leafkernels.rows.recordings' in sys.modules)"
    assert run_python("-c", code).stdout.strip() == "False"
