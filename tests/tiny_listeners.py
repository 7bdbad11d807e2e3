"""Audio models, of a few thousand random weights, with the real processor classes, and tones for them."""

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

RATE = 16_000
PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
LETTERS = "abcdefgh ?"
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "bos_token_id": None,
}


def tokenizer(*specials: str, **names: Any) -> PreTrainedTokenizerFast:
    tokens = [PAD, END, UNKNOWN, *specials, *LETTERS]
    whole = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    whole.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        additional_special_tokens=list(specials),
        **names,
    )


def qwen2_audio(**changes: Any) -> tuple[Any, Any]:
    """Two seconds at most, 20 ms a frame: 25 audio tokens a second."""
    words = tokenizer("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, hop_length=320, chunk_length=2)
    audio = {"num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    audio |= {"max_source_positions": extractor.nb_max_frames // 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
            audio_config=audio,
            text_config={
                "model_type": "qwen2",
                "vocab_size": len(words),
                "pad_token_id": words.pad_token_id,
                "eos_token_id": words.eos_token_id,
                **TEXT,
                **changes,
            },
            audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
            initializer_range=0.3,
        )
    )
    return model, Qwen2AudioProcessor(extractor, words)


def granite_speech() -> tuple[Any, Any]:
    """Any length, in windows of three frames; the template of the checkpoint is one of strings."""
    from transformers import (
        GraniteSpeechConfig,
        GraniteSpeechFeatureExtractor,
        GraniteSpeechForConditionalGeneration,
        GraniteSpeechProcessor,
    )

    with_torchaudio()
    words = tokenizer("<|audio|>")
    words.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    extractor = GraniteSpeechFeatureExtractor(n_mels=8, projector_window_size=3, projector_downsample_rate=3)
    encoder = {"input_dim": 16, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "dim_head": 8, "output_dim": 6}
    encoder |= {"context_size": 20, "max_pos_emb": 20, "conv_kernel_size": 3}
    projector = {"model_type": "blip_2_qformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    projector |= {"intermediate_size": 32, "encoder_hidden_size": 16, "hidden_dropout_prob": 0.0}
    projector |= {"attention_probs_dropout_prob": 0.0}
    text = {"model_type": "granite", "vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1, **TEXT}
    torch.manual_seed(0)
    model = GraniteSpeechForConditionalGeneration(
        GraniteSpeechConfig(
            encoder_config=encoder,
            projector_config=projector,
            text_config={**text, "embedding_multiplier": 1.0, "attention_multiplier": 0.3},
            audio_token_index=words.convert_tokens_to_ids("<|audio|>"),
            has_lora_adapter=False,
            downsample_rate=3,
            window_size=3,
            tie_word_embeddings=False,
            initializer_range=0.3,
        )
    )
    return model, GraniteSpeechProcessor(extractor, words)


def with_torchaudio() -> None:
    """Where torchaudio is not installed, the one transform that Granite's feature extractor takes from it."""
    from transformers.models.granite_speech import feature_extraction_granite_speech as module

    if hasattr(module, "torchaudio"):
        return

    class MelSpectrogram(torch.nn.Module):
        def __init__(self, sample_rate: int, n_fft: int, win_length: int, hop_length: int, n_mels: int) -> None:
            super().__init__()
            self.sizes = n_fft, hop_length, win_length
            from transformers.audio_utils import mel_filter_bank

            filters = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, sample_rate / 2, sample_rate)
            self.register_buffer("filters", torch.tensor(filters, dtype=torch.float32))
            self.register_buffer("window", torch.hann_window(win_length))

        def forward(self, samples: torch.Tensor) -> torch.Tensor:
            power = torch.stft(samples, *self.sizes, window=self.window, return_complex=True).abs().square()
            return self.filters.T @ power

    module.torchaudio = SimpleNamespace(transforms=SimpleNamespace(MelSpectrogram=MelSpectrogram))
    module.requires_backends = lambda *_: None


def qwen2_5_omni() -> tuple[Any, Any]:
    """The thinker, with the eyes that it has."""
    from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    class EyesShut(Qwen2_5OmniProcessor):
        """Its processors of images and videos need torchvision, and nothing here is seen."""

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if name in ("image_processor", "video_processor"):
                return object
            return super().check_argument_for_proper_class(name, argument)

    names = ("image", "audio", "video", "vision_bos", "vision_eos", "audio_bos", "audio_eos")
    tokens = {f"{name}_token": f"<|{name}|>" for name in names}
    words = tokenizer(*tokens.values(), extra_special_tokens=tokens)
    words.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'audio' %}"
        "<|audio_bos|><|audio|><|audio_eos|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}?"
    )
    extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, hop_length=320, chunk_length=2)
    audio = {"num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    audio |= {"max_source_positions": 50, "n_window": 10, "output_dim": 16, "initializer_range": 0.3}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    torch.manual_seed(0)
    model = Qwen2_5OmniThinkerForConditionalGeneration(
        Qwen2_5OmniThinkerConfig(
            audio_config=audio,
            vision_config={**vision, "fullatt_block_indexes": [0]},
            text_config={
                "vocab_size": len(words),
                "pad_token_id": 0,
                "eos_token_id": 1,
                "rope_parameters": rope,
                **TEXT,
            },
            initializer_range=0.3,
            audio_token_index=words.convert_tokens_to_ids("<|audio|>"),
            image_token_index=words.convert_tokens_to_ids("<|image|>"),
            video_token_index=words.convert_tokens_to_ids("<|video|>"),
            audio_start_token_id=words.convert_tokens_to_ids("<|audio_bos|>"),
            audio_end_token_id=words.convert_tokens_to_ids("<|audio_eos|>"),
            vision_start_token_id=words.convert_tokens_to_ids("<|vision_bos|>"),
        )
    )
    eyes = SimpleNamespace(model_input_names=[])
    return model, EyesShut(eyes, eyes, extractor, words, chat_template=words.chat_template)


class Tekken(PreTrainedTokenizerFast):
    """Reads messages as Mistral's tokenizer does, which needs mistral-common and a file of 20 MB."""

    def apply_chat_template(self, conversations: Any, **_: Any) -> dict[str, Any]:
        (messages,) = conversations
        ids, audio = [], []
        for part in messages[0]["content"]:
            if part["type"] == "audio":
                samples, _ = soundfile.read(io.BytesIO(base64.b64decode(part["base64"])), dtype="float32")
                audio.append(samples)
                # 375 for each piece of 30 seconds, to which the processor pads.
                ids += [self.convert_tokens_to_ids("[AUDIO]")] * 375 * -(-len(samples) // (30 * RATE))
            else:
                ids += self.encode(part["text"], add_special_tokens=False)
        return {"input_ids": [ids], "attention_mask": [[1] * len(ids)], **({"audio": audio} if audio else {})}


def voxtral() -> tuple[Any, Any]:
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration, VoxtralProcessor

    # The processor's audio token is 24, whatever the vocabulary.
    words = tokenizer(*(f"[{i}]" for i in range(3, 24)), "[AUDIO]")
    words = Tekken(tokenizer_object=words._tokenizer, **words.special_tokens_map, padding_side="left")
    extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE)
    audio = {"num_mel_bins": 8, "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = VoxtralForConditionalGeneration(
        VoxtralConfig(
            audio_config={**audio, "num_attention_heads": 2, "initializer_range": 0.3},
            text_config={"model_type": "llama", "vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1, **TEXT},
            audio_token_id=24,
        )
    )
    return model, VoxtralProcessor(extractor, words)


MODELS = {
    "qwen2_audio": qwen2_audio,
    "granite_speech": granite_speech,
    "voxtral": voxtral,
    "qwen2_5_omni": qwen2_5_omni,
}


def tone(number: int, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * (200 + 90 * number) * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def wave(samples: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": text}]}]


def process(processor: Any, prompt: Any, samples: np.ndarray) -> Any:
    """The processor's own way from messages and samples to inputs, written out."""
    if isinstance(processor.tokenizer, Tekken):
        audio, text = prompt[0]["content"]
        coded = base64.b64encode(wave(samples)).decode()
        prompt = [{**prompt[0], "content": [{**audio, "base64": coded}, text]}]
        return processor.apply_chat_template(prompt, tokenize=True, return_dict=True, return_tensors="pt")
    if not processor.chat_template:
        prompt = [{"role": "user", "content": "<|audio|>" + prompt[0]["content"][1]["text"]}]
    template = processor if processor.chat_template else processor.tokenizer
    text = template.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], audio=[samples], return_tensors="pt", audio_kwargs={"sampling_rate": RATE})
