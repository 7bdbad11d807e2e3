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

# Of other decoders, weights that make context and positions matter; and where their branches can be run.
BOTH, ROWS, ALONE, NONE = "packed and in rows", "in rows", "in rows, of one prompt", "not"
STATE = "in rows, with a state"
_BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64, "vocab_size": 29}
_BERT = {**SIZES, "is_decoder": True}
_SPECIAL = {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
_EXPERTS = {**SIZES, "num_experts_per_tok": 2}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_LINEAR |= {"layer_types": ["linear_attention", "linear_attention", "full_attention"], "linear_conv_kernel_dim": 3}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_d_conv": 3}
OTHERS = {
    "Roberta": (_BERT, BOTH),  # positions from 2 on where it is not told them
    "OPT": ({**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}, BOTH),
    "GPTJ": ({"vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 64}, BOTH),
    "GPTNeoX": (SIZES, BOTH),
    "Gemma3Text": ({**SIZES, **WINDOW, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}, BOTH),
    "Mixtral": ({**_EXPERTS, "num_local_experts": 3}, BOTH),
    "Cohere2Moe": ({**_EXPERTS, **WINDOW, "num_experts": 3, "layer_types": ["full_attention"] * 3}, BOTH),
    "ModernBertDecoder": ({**SIZES, "local_attention": 12, **_SPECIAL}, BOTH),
    "Bart": (_BART, ALONE),
    "MBart": (_BART, ALONE),
    "Pegasus": (_BART, ALONE),
    "Whisper": ({**_BART, "pad_token_id": 0, "max_target_positions": 64}, ALONE),
    "RoFormer": ({**_BERT, "embedding_size": 16}, ALONE),
    "Moshi": ({**SIZES, "num_codebooks": 2, "sliding_window": 60}, BOTH),
    "Bloom": ({"vocab_size": 29, "hidden_size": 16, "n_layer": 2, "n_head": 2}, ROWS),
    "Mpt": ({"vocab_size": 29, "d_model": 16, "n_layers": 2, "n_heads": 2}, ROWS),
    "OpenAIGPT": ({"vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 2}, NONE),
    "Llama4Text": (
        {**_EXPERTS, "num_local_experts": 2, "attention_chunk_size": 6, "no_rope_layers": [1, 1, 0]}
        | {"layer_types": ["chunked_attention", "chunked_attention", "full_attention"]},
        BOTH,
    ),
    "Qwen3Next": ({**_EXPERTS, **_LINEAR, "num_experts": 3, "moe_intermediate_size": 8}, STATE),
    "Qwen3_5Text": ({**SIZES, **_LINEAR}, STATE),
    "FalconH1": ({**SIZES, **_MAMBA, "mamba_d_ssm": 32, "mamba_chunk_size": 4}, STATE),
    "Lfm2": ({**SIZES, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}, STATE),
    "Mamba": ({"vocab_size": 29, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, ALONE),
    "RecurrentGemma": ({**SIZES, "lru_width": 16}, NONE),  # keeps its state in itself, where it cannot be copied
    "MiniMax": ({**_EXPERTS, "num_local_experts": 2, "block_size": 4}, NONE),  # takes a cache of its own alone
    "Rwkv": ({"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}, NONE),
    "XLNet": ({"vocab_size": 29, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}, NONE),
}


def build_other(name: str) -> Any:
    """One of ``OTHERS``, which generates without an end token."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**OTHERS[name][0])
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


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
