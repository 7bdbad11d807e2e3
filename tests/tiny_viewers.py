"""Models that see, of a few thousand random weights, whose positions behind an image are not those of the tokens."""

from typing import Any

import torch

IMAGE, START, END = 5, 3, 4
TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 60,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}
EYES = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
EYES |= {"temporal_patch_size": 1, "in_channels": 3}
MODELS = {
    "Qwen2VL": {**EYES, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    "Qwen2_5_VL": {**EYES, "out_hidden_size": 32, "intermediate_size": 16, "window_size": 16},
    "Qwen3VL": {
        **EYES,
        "depth": 2,
        "out_hidden_size": 32,
        "intermediate_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
}


def build_model(name: str) -> Any:
    """The model of that name, in evaluation mode; the same weights in every call."""
    import transformers

    torch.manual_seed(0)
    ids = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": START, "vision_end_token_id": END}
    config = getattr(transformers, f"{name}Config")(text_config=TEXT, vision_config=MODELS[name], **ids)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def look(height: int, width: int, before: list[int], after: list[int]) -> dict[str, torch.Tensor]:
    """A prompt with an image of so many patches between its words, as a processor gives it."""
    ids = torch.tensor([[*before, START, *[IMAGE] * (height * width // 4), END, *after]])
    pixels = torch.randn(height * width, 3 * 4 * 4, generator=torch.Generator().manual_seed(height))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, height, width]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def join(prompts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Prompts in one batch, padded on the left."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    joined = {}
    for name in prompts[0]:
        parts = [prompt[name] for prompt in prompts]
        if parts[0].shape == prompts[0]["input_ids"].shape:
            parts = [torch.nn.functional.pad(part, (longest - part.shape[1], 0)) for part in parts]
        joined[name] = torch.cat(parts)
    return joined
