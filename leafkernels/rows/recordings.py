"""From a row of a dataset, a prompt about recordings, to what an audio model reads: token ids and features.

Which inputs a model reads is what its processor returns; no model is named. Trainers use it, and the public names do
not load it.
"""

import base64
import importlib
import inspect
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# No microphone array has more channels; a spectrogram has more rows.
_MOST_CHANNELS = 32


@dataclass(eq=False)
class Heard:
    """What a model reads of a prompt, batch of one."""

    token_ids: list[int]
    features: dict[str, Tensor]


class PromptReader:
    """Reads prompts about recordings by the processor of an audio model.

    Attributes: ``rate``, of samples that the processor takes; ``audio_token``, which stands for a recording in a text.

    Args:
        processor: of the model; it has a feature extractor for audio, an audio token and a tokenizer.
        chat_template_kwargs: further arguments of its chat template.

    Raises:
        TypeError: the processor takes no audio.
    """

    def __init__(self, processor: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> None:
        extractor: Any = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
        token = getattr(processor, "audio_token", None)
        if getattr(extractor, "sampling_rate", None) is None or token is None:
            raise TypeError(
                "processing_class must be a processor with a feature extractor for audio and an audio token, got "
                f"{type(processor).__name__}"
            )
        self.rate, self.audio_token = extractor.sampling_rate, str(token)
        self._processor, self._extractor = processor, extractor
        self._end = added_tokens(processor.tokenizer)[1]
        self._chat_template_kwargs = dict(chat_template_kwargs or {})

    def read(self, prompt: Any, audio: Any) -> Heard:
        """Turn a row into what the model reads.

        Args:
            prompt: messages with a ``{"type": "audio"}`` part for each recording (with none, the recordings go before
                the first user message), or text with the audio token in it.
            audio: a recording, or a list of them: datasets' ``Audio`` (undecoded or decoded), the path or the bytes of
                a file that soundfile reads, or ``{"array": ..., "sampling_rate": int}`` with an array (samples,),
                (samples, channels) or (channels, samples), distinguished by their sizes: at most 32 channels.
                Integers are scaled by the range of their dtype, as those of files. Of several channels the mean is
                taken; other rates are resampled.

        Raises:
            ValueError: recordings and audio parts that differ in number; a recording that is silent, empty, not finite,
                too short for one audio token, longer than the encoder takes, or of a sampling rate, a shape or a dtype
                that cannot be.
        """
        try:
            clips = _read_clips(audio, self.rate)
            inputs = self._process_clips(prompt, clips)
            features = {
                name: values
                for name, values in inputs.items()
                if isinstance(values, Tensor) and not name.startswith(("input_ids", "attention_mask"))
            }
            _check_length(features, clips, self._extractor, self.rate)
        except ValueError as error:
            raise ValueError(f"{error}, with the prompt {_shorten(repr(prompt))}") from error
        return Heard(torch.as_tensor(inputs["input_ids"])[0].tolist(), features)

    def _process_clips(self, prompt: Any, clips: list[np.ndarray]) -> Any:
        """The processor's inputs, with at least one audio token for every clip, which else is not read."""
        shortest = min(clips, key=len)
        too_short = (
            f"audio must be long enough for one audio token, got {len(shortest) / self.rate:g} s "
            f"({len(shortest)} samples at {self.rate} Hz)"
        )
        if len(shortest) < (getattr(self._extractor, "hop_length", None) or 1):
            raise ValueError(too_short)
        try:
            inputs = self._process(prompt, clips)
            alone = inputs
            if len(clips) > 1:
                alone = self._process([{"role": "user", "content": [{"type": "audio"}]}], [shortest])
        except (IndexError, RuntimeError) as error:  # of a window that is longer than the clip
            raise ValueError(f"{too_short}, of which the processor says {error}") from error
        token = self._processor.tokenizer.convert_tokens_to_ids(self.audio_token)
        if token not in torch.as_tensor(alone["input_ids"])[0].tolist():
            raise ValueError(too_short)
        return inputs

    def read_text(self, prompt: Any) -> Heard:
        """The same for a prompt without a recording, text or messages; it has no features."""
        return Heard(torch.as_tensor(self._process(prompt, [])["input_ids"])[0].tolist(), {})

    def asks(self, prompt: Any) -> bool:
        """Whether a prompt has a place for a recording."""
        if isinstance(prompt, str):
            return self.audio_token in prompt
        parts = [part for message in _in_parts(prompt) for part in message["content"]]
        return any(part["type"] == "audio" or self.audio_token in part.get("text", "") for part in parts)

    def _process(self, prompt: Any, clips: list[np.ndarray]) -> Any:
        processor = self._processor
        if not isinstance(prompt, str):
            messages = _placed(prompt, len(clips))
            if not _takes_audio(processor):
                return processor.apply_chat_template(
                    [_filled(messages, clips, self.rate)], tokenize=True, return_dict=True, return_tensors="pt"
                )
            prompt = self._render(messages)
        found = prompt.count(self.audio_token)
        if found != len(clips):
            raise ValueError(
                f"prompt must have the audio token {self.audio_token!r} once for each recording, got {found} for "
                f"{len(clips)} recordings"
            )
        bos = processor.tokenizer.bos_token
        begun: dict[str, Any] = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
        if clips:
            begun |= {"audio": clips, "audio_kwargs": {"sampling_rate": self.rate}}
        inputs = (processor if clips else processor.tokenizer)(text=[prompt], return_tensors="pt", **begun)
        if self._end and "add_special_tokens" not in begun:
            inputs["input_ids"] = inputs["input_ids"][:, : -len(self._end)]  # the answer follows
        return inputs

    def _render(self, messages: list[dict[str, Any]]) -> str:
        processor = self._processor
        template = processor if getattr(processor, "chat_template", None) else processor.tokenizer

        def render(messages: list[dict[str, Any]]) -> str:
            return template.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._chat_template_kwargs
            )

        has_audio = any(part["type"] == "audio" for message in messages for part in message["content"])
        try:
            # Whether the template takes parts shows in its output for an audio part.
            text = render(_in_parts(messages if has_audio else _placed(messages, 1)))
            if self.audio_token in text:
                return text if has_audio else render(_in_parts(messages))
        except (TypeError, ValueError):
            pass
        # A template of strings, as Granite-Speech has it.
        return render(
            [
                {
                    **message,
                    "content": "".join(
                        self.audio_token if part["type"] == "audio" else part["text"] for part in message["content"]
                    ),
                }
                for message in messages
            ]
        )


def join_features(rows: Sequence[Heard]) -> dict[str, Tensor]:
    """The features of a batch, in the order of its rows; those without a recording have none."""
    hearing = [row for row in rows if row.features]
    names = hearing[0].features if hearing else ()
    return {name: join([row.features[name] for row in hearing]) for name in names}


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension, the others padded with 0 to the longest."""
    if parts[0].dim() == 2 and parts[0].is_floating_point():
        return torch.cat(list(parts))  # the frames of all clips, one after the other
    sizes = [max(size) for size in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        gaps = [size - own for size, own in zip(sizes, part.shape[1:], strict=True)]
        padded.append(torch.nn.functional.pad(part, [n for gap in reversed(gaps) for n in (0, gap)]))
    return torch.cat(padded)


def undecoded(dataset: Any) -> Any:
    """The dataset, or each dataset of a dict, with its recordings as files, which the reader decodes."""
    if isinstance(dataset, dict):
        return type(dataset)({name: undecoded(part) for name, part in dataset.items()})
    if not hasattr(dataset, "cast_column"):
        return dataset
    from datasets import Audio

    feature = (dataset.features or {}).get("audio")
    if isinstance(feature, Audio) and feature.decode:
        return dataset.cast_column("audio", Audio(sampling_rate=feature.sampling_rate, decode=False))
    return dataset


def find_encoder(model: Any) -> Any:
    """The audio encoder of an audio model; raises TypeError where there is none."""
    for module in model.modules():
        if getattr(module, "input_modalities", None) in ("audio", ("audio",)):
            return module
    raise TypeError(f"model must have an audio encoder, got {type(model).__name__}")


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind a text by itself."""
    whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        end = start + len(plain)
        if whole[start:end] == plain:
            return whole[:start], whole[end:]
    return [], []


def _takes_audio(processor: Any) -> bool:
    """Whether a call takes audio; Voxtral's reads it from the messages only."""
    return "audio" in inspect.signature(type(processor).__call__).parameters


def _read_clips(audio: Any, rate: int) -> list[np.ndarray]:
    if audio is None:
        raise ValueError("audio must be a recording in every row, got None")
    many = isinstance(audio, list | tuple)
    clips = [_read_clip(clip, rate) for clip in (audio if many else [audio])]
    if not clips:
        raise ValueError("audio must be a recording in every row, got an empty list")
    return clips


def _read_clip(clip: Any, rate: int) -> np.ndarray:
    """One recording as (samples,) float32 at ``rate``."""
    if hasattr(clip, "get_all_samples"):  # datasets' decoder
        decoded = clip.get_all_samples()
        samples, own_rate = np.asarray(decoded.data).T, decoded.sample_rate
    elif isinstance(clip, dict) and clip.get("array") is not None:
        samples, own_rate = _read_array(clip["array"]), clip.get("sampling_rate")
    else:
        samples, own_rate = _read_file(clip)
    if isinstance(own_rate, bool) or not isinstance(own_rate, int | np.integer) or own_rate <= 0:
        raise ValueError(f"audio must have a sampling rate that is a positive integer, got {own_rate!r}")
    if samples.size == 0:
        raise ValueError("audio must have samples, got an empty recording")
    if samples.ndim == 2:
        samples = samples.mean(1)
    if not np.isfinite(samples).all():
        raise ValueError("audio must be finite, got NaN or infinity among the samples")
    if not samples.any():
        raise ValueError(f"audio must be audible, got {samples.size / own_rate:.2f} s of silence")
    return resample(samples, int(own_rate), rate)


def _read_array(array: Any) -> np.ndarray:
    """(samples,) or (samples, channels) float32 of an array in either order, integers scaled as those of files are."""
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    try:
        samples = np.asarray(array)
    except ValueError:  # lists of several lengths
        samples = np.asarray(None)
    kind, bits = samples.dtype.kind, 8 * samples.dtype.itemsize
    if samples.ndim not in (1, 2) or kind not in "fiu" or (kind != "f" and bits == 64):
        # Of 64 bits are lists of whole numbers, of any range.
        raise ValueError(
            "audio must be an array (samples,), (samples, channels) or (channels, samples) of floats, or of integers "
            f"of at most 32 bits, got shape {samples.shape} of {samples.dtype}"
        )
    if samples.ndim == 2:
        channels, length = sorted(samples.shape)
        if channels > _MOST_CHANNELS or 1 < length <= _MOST_CHANNELS and channels != 1:
            raise ValueError(
                "audio must be an array whose shape tells samples from channels, of which there are at most "
                f"{_MOST_CHANNELS}, got shape {samples.shape}"
            )
        if samples.shape[0] == channels:
            samples = samples.T
    if kind == "f":
        return samples.astype(np.float32)
    half = 2.0 ** (bits - 1)
    return ((samples - (half if kind == "u" else 0.0)) / half).astype(np.float32)


def _read_file(clip: Any) -> tuple[np.ndarray, int]:
    content = clip.get("bytes") or clip.get("path") if isinstance(clip, dict) else clip
    if not isinstance(content, str | bytes):
        raise ValueError(
            "audio must be a path, bytes, datasets' Audio or {'array', 'sampling_rate'}, got "
            + (f"a dict of {', '.join(clip)}" if isinstance(clip, dict) else type(clip).__name__)
        )
    soundfile = _needed("soundfile", "reading files of audio")
    try:
        return soundfile.read(io.BytesIO(content) if isinstance(content, bytes) else content, dtype="float32")
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(
            f"audio must be a file that soundfile reads, got {_shorten(repr(content))} ({error})"
        ) from None


def resample(samples: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Bring (samples,) from ``rate`` to ``to`` Hz by scipy's polyphase filter; float32, silence around the clip."""
    if rate == to:
        return samples.astype(np.float32)
    common = math.gcd(rate, to)
    signal = _needed("scipy.signal", "resampling audio")
    return signal.resample_poly(samples, to // common, rate // common).astype(np.float32)


def _needed(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {module.split('.')[0]}, which cannot be imported here ({error}); "
            "pip install 'leafkernels[speech]'"
        ) from error


def _check_length(features: dict[str, Tensor], clips: list[np.ndarray], extractor: Any, rate: int) -> None:
    """Refuse a clip of which the extractor has cut off the end; Whisper's does so in silence."""
    hop, frames = getattr(extractor, "hop_length", None), features.get("input_features")
    if hop is None or frames is None:
        return
    taken = frames.shape[-1] * hop * (1 if len(frames) == len(clips) else len(frames))
    longest = max(len(clip) for clip in clips)
    # The last frame may be cut short.
    if longest > taken + hop:
        raise ValueError(
            f"audio must be no longer than the {taken / rate:g} s that the encoder takes, got {longest / rate:.2f} s"
        )


def text_of(answer: str | list[dict[str, Any]]) -> str:
    """The text of an answer, which may be given as messages."""
    if isinstance(answer, str):
        return answer
    return "".join(part.get("text", "") for message in _in_parts(answer) for part in message["content"])


def _in_parts(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are parts without empty keys."""
    messages = []
    for message in prompt:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        messages.append({**message, "content": [{k: v for k, v in part.items() if v is not None} for part in parts]})
    return messages


def _placed(prompt: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Messages of parts; where none is audio, ``count`` of them before the first user text."""
    messages = _in_parts(prompt)
    found = sum(part["type"] == "audio" for message in messages for part in message["content"])
    if not found:
        user = next((message for message in messages if message["role"] == "user"), None)
        if user is None:
            raise ValueError("prompt must have a message of the user, got none")
        user["content"] = [{"type": "audio"}] * count + user["content"]
    elif found != count:
        raise ValueError(f"prompt must have an audio part for each recording, got {found} for {count} recordings")
    return messages


def _filled(messages: list[dict[str, Any]], clips: list[np.ndarray], rate: int) -> list[dict[str, Any]]:
    """The messages with each recording as a WAV file in its part."""
    import soundfile

    remaining = iter(clips)

    def fill(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "audio":
            return part
        file = io.BytesIO()
        soundfile.write(file, next(remaining), rate, format="WAV", subtype="FLOAT")
        return {"type": "audio", "base64": base64.b64encode(file.getvalue()).decode()}

    return [{**message, "content": [fill(part) for part in message["content"]]} for message in messages]


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
