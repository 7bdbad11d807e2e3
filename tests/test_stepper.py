"""Branches packed in one row are branches run alone."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[lookahead]'")

from leafkernels.lookahead import TransformersStepper

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
}


class WithRewards:
    """A model whose reward is the first number of the hidden state after the final norm."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def __call__(self, **inputs: Any) -> Any:
        output = self.model(**inputs, output_hidden_states=True)
        return SimpleNamespace(logits=output.logits, rewards=output.hidden_states[-1][..., 0])


def build(name: str, attention: str = "eager") -> WithRewards:
    torch.manual_seed(0)
    kind, sizes = MODELS[name]
    config = getattr(transformers, kind)(**sizes, attn_implementation=attention, pad_token_id=0)
    return WithRewards(transformers.AutoModelForCausalLM.from_config(config).eval())


def alone(model: WithRewards, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        output = model(input_ids=torch.tensor([token_ids]), use_cache=False)
    return output.logits[0, -1], output.rewards[0, -1]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, kind) for name in MODELS for kind in ("eager", "sdpa") if (name, kind) != ("gemma2", "sdpa")],
)
def test_branches_are_what_they_are_alone(name: str, attention: str, packed: bool) -> None:
    model = build(name, attention)
    stepper, choose = TransformersStepper(model, packed=packed), random.Random(name)
    branches = [[3, 1, 4, 1, 5]]
    logits, rewards = stepper.prefill(torch.tensor(branches[0]))
    for size in (1, 3, 6, 6, 2, 5, 1, 4, 4):
        for branch, found, reward in zip(branches, logits, rewards, strict=True):
            torch.testing.assert_close(found, alone(model, branch)[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(reward, alone(model, branch)[1], rtol=1e-4, atol=1e-5)
        parents = sorted(choose.randrange(len(branches)) for _ in range(size))
        tokens = [choose.randrange(29) for _ in range(size)]
        branches = [[*branches[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        logits, rewards = stepper.extend(torch.tensor(parents), torch.tensor(tokens))


def test_the_cache_holds_what_live_branches_see() -> None:
    stepper = TransformersStepper(build("llama"))
    stepper.prefill(torch.arange(10))
    stepper.extend(torch.tensor([0, 0, 0]), torch.tensor([1, 2, 3]))
    stepper.extend(torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]))
    assert stepper.cache_columns == 10 + 3 + 3
    # Two branches go; the third forks.
    stepper.extend(torch.tensor([1, 1]), torch.tensor([4, 5]))
    assert stepper.cache_columns == 10 + 2 + 2


def test_half_precision_is_no_worse_than_alone() -> None:
    exact, half = build("llama"), build("llama")
    half.model.to(torch.bfloat16)
    stepper = TransformersStepper(half)
    stepper.prefill(torch.arange(4))
    packed = stepper.extend(torch.zeros(20, dtype=torch.int64), torch.arange(20))[0]
    truth, by_itself = (
        torch.stack([alone(model, [0, 1, 2, 3, token])[0].float() for token in range(20)]) for model in (exact, half)
    )
    # Of the same size, in another order of rounding.
    assert (packed - truth).square().mean() < 1.5 * (by_itself - truth).square().mean()


def test_refuses_what_takes_no_mask() -> None:
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="packed branches need .* 'flash_attention_2' .* packed=False"):
        TransformersStepper(model)


def test_refuses_layers_that_are_no_attention() -> None:
    model = build("llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="attention only, got layers of the kind linear_attention"):
        TransformersStepper(model)
