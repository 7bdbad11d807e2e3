"""TRL's trainer on audio: models that hear, of a few thousand random weights, with the real processor classes."""

import io
from typing import Any

import numpy as np
import soundfile
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

RATE = 16_000
LORA = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
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


def tokenizer(*specials: str, **names: str) -> PreTrainedTokenizerFast:
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


MODELS = {"qwen2_audio": qwen2_audio}


def tone(number: int, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * (200 + 90 * number) * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def wave(samples: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": text}]}]


def recordings(count: int = 12) -> Dataset:
    """Questions about tones of four lengths, as files in memory, with a column for the reward."""
    rows = [
        {
            "prompt": asked("ab?"[i % 2 :]),
            "audio": {"bytes": wave(tone(i, 0.2 + 0.4 * (i % 4)))},
            "wanted": "abcdefgh"[i % 8],
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def count_wanted(completions: list[Any], wanted: list[str], **_: Any) -> list[float]:
    """Letters up to the one that is wanted: most short answers get some."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(sum("a" <= c <= letter for c in text)) for text, letter in zip(texts, wanted, strict=True)]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": LORA, **changes})


def trainer(kind: type, args: Any, pair: tuple[Any, Any] | None = None, **changes: Any) -> Any:
    model, processor = pair or qwen2_audio()
    options = {"train_dataset": recordings(), "processing_class": processor, "peft_config": lora()}
    return kind(model, count_wanted, args, **{**options, **changes})


def process(processor: Any, prompt: Any, samples: np.ndarray) -> Any:
    """The processor's own way from messages and samples to inputs, written out."""
    text = processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], audio=[samples], return_tensors="pt", audio_kwargs={"sampling_rate": RATE})
