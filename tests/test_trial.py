"""What a model reads beside its ids, and which models are taken: as its own ``generate`` has it, or a sentence."""

from typing import Any

import pytest
import tiny_viewers
import torch
from tiny_decoders import SIZES, build_model, build_other

from leafkernels.lookahead import RewardChannel, RewardTransformer

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[lookahead]'")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [3, 5, 8, 9, 7, 9, 3, 2]])
GREEDY = {"width": 1, "chunk": 3, "depth": 1}
AHEAD = {"width": 2, "chunk": 2, "depth": 1, "max_new_tokens": 9}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", tiny_viewers.MODELS)
def test_behind_an_image(name: str, packed: bool) -> None:
    """An image of 4 x 8 patches stands at other positions than its 8 tokens, and so does all that follows."""
    model = tiny_viewers.build_model(name)
    wrapped = RewardTransformer(model)
    prompts = [tiny_viewers.look(4, 8, [10, 11], [20, 21, 22]), tiny_viewers.look(8, 4, [12], [30, 31])]
    custom = {"custom_generate": wrapped.custom_generate, "packed": packed}
    alone = []
    for prompt in [*prompts, tiny_viewers.join(prompts)]:
        expected = model.generate(**prompt, do_sample=False, max_new_tokens=12)
        found = wrapped.generate_all(inputs=prompt, max_new_tokens=12, packed=packed, **GREEDY)
        for result, row in zip(found, expected[:, prompt["input_ids"].shape[1] :].tolist(), strict=True):
            assert row[: len(result.token_ids)] == result.token_ids
        assert torch.equal(model.generate(**prompt, **custom, max_new_tokens=12, **GREEDY), expected)
        alone += wrapped.generate_all(inputs=prompt, packed=packed, **AHEAD)
    # Two prompts, and both in one batch.
    assert [result.token_ids for result in alone[:2]] == [result.token_ids for result in alone[2:]]


def config_of(model: Any, **changes: Any) -> Any:
    return transformers.GenerationConfig(max_length=IDS.shape[1] + 6, eos_token_id=28, pad_token_id=0, **changes)


def test_what_generate_prepares_is_told_by_its_kind() -> None:
    """A cache is one under whatever name, and positions that the model would take by itself say nothing."""
    model = build_model("gpt2")
    wrapped = RewardTransformer(model)
    options = {"generation_config": config_of(model), **GREEDY}
    expected = wrapped.custom_generate(model, IDS, **options)
    positions = torch.arange(IDS.shape[1])[None]
    for prepared in (
        {"past_key_values": transformers.DynamicCache()},
        {"a_name_to_come": transformers.DynamicCache(), "use_cache": True, "logits_to_keep": 1},
        {"position_ids": positions, "use_cache": False, "attention_mask": None},
    ):
        assert torch.equal(wrapped.custom_generate(model, IDS, **options, **prepared), expected)
    # Those that it would not take are the caller's, and go on from the last.
    shifted = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "position_ids": positions + 40}
    greedy = model.generate(**shifted, do_sample=False, max_new_tokens=6, eos_token_id=28, pad_token_id=0)
    assert torch.equal(wrapped.custom_generate(model, IDS, **options, position_ids=positions + 40), greedy)
    filled = model(IDS, use_cache=True)
    cache = next(value for value in filled.values() if isinstance(value, transformers.Cache))
    with pytest.raises(ValueError, match="a_name_to_come must be empty, got a cache of 8 tokens"):
        wrapped.custom_generate(model, IDS, **options, a_name_to_come=cache)


@pytest.mark.parametrize("padding", [None, 17])
def test_answers_are_padded_as_generate_pads_them(padding: int | None) -> None:
    """Without a padding token by the end token, since 0 is a word in most vocabularies."""
    model = build_model("llama")
    model.generation_config.pad_token_id = model.config.pad_token_id = None
    wrapped = RewardTransformer(model)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "pad_token_id": padding}
    free = model.generate(**inputs, do_sample=False, eos_token_id=None)[:, IDS.shape[1] :].tolist()
    # An end token that one of the answers has before the other does.
    end = next(token for token in free[0] if token not in free[1][: free[0].index(token) + 2])
    greedy = model.generate(**inputs, do_sample=False, eos_token_id=[end, 27])
    custom = {"custom_generate": wrapped.custom_generate, "eos_token_id": [end, 27], **GREEDY}
    assert torch.equal(model.generate(**inputs, **custom), greedy)
    assert greedy[0, -1] == (end if padding is None else padding) and greedy[0, -1] != greedy[1, -1]


def test_by_token_beside_padding() -> None:
    """It is carried where the prompts run padded as they came, on the left to the longest."""
    model = build_model("gpt2")
    wrapped = RewardTransformer(model)
    ids = torch.cat([torch.zeros(2, 2, dtype=torch.int64), IDS], 1)
    mask = torch.tensor([[0, 0] + [1] * 8, [1] * 10])
    positions = (mask.cumsum(1) - 1).clamp_min(0) + 30
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    found = wrapped.generate_all(inputs=inputs, eos_token_ids=(), max_new_tokens=6, **GREEDY)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    assert [result.token_ids for result in found] == expected[:, 10:].tolist()
    with pytest.raises(ValueError, match="inputs must hold nothing by token, as position_ids does, where attention_m"):
        wrapped.generate_all(inputs={**inputs, "attention_mask": mask.flip(1)})


BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 29}
GEMMA = {**SIZES, "num_hidden_layers": 5, "num_kv_shared_layers": 1, "vocab_size_per_layer_input": 29}
GEMMA |= {"hidden_size_per_layer_input": 4, "laurel_rank": 2, "activation_sparsity_pattern": [0.0] * 5}
GEMMA |= {"layer_types": ["sliding_attention"] + ["full_attention"] * 4}


@pytest.mark.parametrize(
    ("kind", "head", "sizes", "message"),
    [
        ("Bart", "ForConditionalGeneration", BART, "a decoder alone, .* got Bart.*, an encoder-decoder"),
        (
            "T5",
            "ForConditionalGeneration",
            {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 29},
            "a decoder alone, .* got T5.*, an encoder-decoder",
        ),
        (
            "OPT",
            "ForCausalLM",
            {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 8},
            r"all pass on \(B, T, 16\), got shape \(1, 2, 8\) behind \(1, 2, 16\)",
        ),
        ("Gemma3nText", "ForCausalLM", GEMMA, r"all pass on \(B, T, 16\), got shape \(4, 1, 2, 16\)"),
    ],
)
def test_models_that_have_no_such_layers(kind: str, head: str, sizes: dict[str, Any], message: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind.removesuffix('Text')}{head}")(config)
    with pytest.raises(ValueError, match=f"model must .*{message}"):
        RewardTransformer(model)


def test_a_config_that_leaves_the_norms_constant_open() -> None:
    model = build_other("Cohere2Moe")
    assert model.config.rms_norm_eps is None
    wrapped = RewardTransformer(model)
    expected = model.generate(IDS[:1], do_sample=False, max_new_tokens=6, attention_mask=torch.ones_like(IDS[:1]))
    found = wrapped.generate(IDS[0], max_new_tokens=6, eos_token_ids=(), **GREEDY)
    assert found.token_ids == expected[0, IDS.shape[1] :].tolist()


def test_rows_padded_on_the_left_are_scored_by_their_positions() -> None:
    """Of a model with learnt positions, which the mask does not tell it."""
    torch.manual_seed(1)
    wrapped = RewardTransformer(build_model("gpt2"), RewardChannel(3, 16, width=4))
    mask = torch.tensor([[0, 0, 0] + [1] * 5, [1] * 8])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        found = wrapped(input_ids=IDS, attention_mask=mask, position_ids=positions).rewards[0, 3:]
        alone = wrapped(input_ids=IDS[:1, 3:]).rewards[0]
        right = wrapped(input_ids=IDS.roll(-3, 1), attention_mask=mask.flip(1)).rewards[0, :5]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast", "nan"])
def test_rounding_is_no_difference(kind: str) -> None:
    """Of whatever the model computes in; and a broken model has the sentence of the search."""
    model = build_other("Mixtral")
    if kind == "nan":
        model.lm_head.weight.data[3] = torch.nan
        with pytest.raises(ValueError, match="a finite best logit, got nan at forward 1"):
            RewardTransformer(model).generate(IDS[0])
        return
    if kind != "autocast":
        model.to(getattr(torch, kind))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = RewardTransformer(model).generate_all([IDS[0], IDS[1, :3]], eos_token_ids=(), **AHEAD)
    assert [len(result.token_ids) for result in found] == [9, 9]


def test_a_channel_looks_at_a_few_tokens_and_leaves_no_trace() -> None:
    """Modes, random numbers and gradients are those of before."""
    model = build_model("gpt2").train()
    torch.manual_seed(3)
    channel = RewardChannel(3, 16, width=4)
    state = torch.get_rng_state()
    wrapped = RewardTransformer(model, channel)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(parameter.grad is None for parameter in wrapped.parameters())
