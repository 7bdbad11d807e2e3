"""Decoders of random weights, of every kind that transformers has for one that this package names."""

import string
from typing import Any

import torch

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
# With a window, so short that the branches of these tests outgrow it.
WINDOW = {"sliding_window": 6}
AUDIO = {"d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 8, "num_mel_bins": 4}
MODELS = {
    "llama": ("LlamaConfig", SIZES),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen2 with a window": ("Qwen2Config", {**SIZES, **WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", SIZES),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": None}),
    "mistral with a window": ("MistralConfig", {**SIZES, **WINDOW}),
    "gemma": ("GemmaConfig", SIZES),
    "gemma2": ("Gemma2Config", {**SIZES, **WINDOW}),
    "phi": ("PhiConfig", {**SIZES, "num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", {"vocab_size": 29, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 128}),
    "qwen2-audio": (
        "Qwen2AudioConfig",
        {
            "text_config": {**SIZES, "model_type": "qwen2"},
            "audio_config": {**AUDIO, "model_type": "qwen2_audio_encoder"},
        },
    ),
}


def build_model(name: str, attention: str = "eager") -> Any:
    """The model of that name, in evaluation mode; the same weights in every call."""
    import transformers

    torch.manual_seed(0)
    kind, sizes = MODELS[name]
    config = getattr(transformers, kind)(**sizes, attn_implementation=attention, pad_token_id=0)
    if name == "qwen2-audio":
        return transformers.Qwen2AudioForConditionalGeneration(config).eval()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def build_tokenizer() -> Any:
    """A tokenizer for the 29 ids of these models: a letter is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: number for number, token in enumerate(["<pad>", "<eos>", "<unk>", *string.ascii_lowercase])}
    whole = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def add_specials(tokenizer: Any, template: str) -> None:
    """Let a tokenizer put tokens around a text ($A) by itself, as those of Llama and BERT do."""
    from tokenizers.processors import TemplateProcessing

    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in template.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
