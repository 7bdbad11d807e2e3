"""Models and rows that are not as most are: positions that begin elsewhere, heads behind a layer, ids of any width."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="needs transformers: the extra train")

import tiny_decoders
import transformers
from test_tree_logprobs import assert_is_rows, padded, row_by_row

from leafkernels.models import tree_batch, tree_hidden_states, tree_logprobs, tree_stats

SIZES = tiny_decoders.SIZES
ROWS = [[1, *range(5, 17), 3 + k, 20 + k, 7][: 16 - k % 2] for k in range(5)]
# Positions that begin behind the id of the padding; a layer between decoder and head; a decoder that cuts its states
# where few logits are asked for.
MODELS = {
    "Roberta": {**SIZES, "is_decoder": True, "pad_token_id": 1},
    "RemBert": {**SIZES, "is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 12},
    "Gemma4": {
        **SIZES,
        "num_hidden_layers": 4,
        "sliding_window": 6,
        "vocab_size_per_layer_input": 29,
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


def build(name: str) -> torch.nn.Module:
    config = "Gemma4TextConfig" if name == "Gemma4" else f"{name}Config"
    if not hasattr(transformers, config):
        pytest.skip(f"needs a transformers with {config}")
    sizes = MODELS[name]
    if name == "Gemma4":  # heads have sizes by their layer
        sizes = {key: value for key, value in sizes.items() if key != "head_dim"}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**sizes)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_odd_models_are_rows(name: str) -> None:
    model = build(name).double()  # norms of Gemma 4 make much of a rounding
    for side in ("right", "left"):
        ids, mask = padded(ROWS, side)
        for plan in ("rows", "auto"):
            assert_is_rows(model, ids, mask, tree_logprobs(model, ids, mask, plan=plan))
    states = tree_hidden_states(model, ids, mask, plan="rows")
    assert states.shape == (*ids.shape, SIZES["hidden_size"])


def test_a_model_that_counts_from_elsewhere_runs_rows() -> None:
    """It would be handed other positions than it counts."""
    model, (ids, mask) = build("Roberta"), padded(ROWS)
    with pytest.raises(RuntimeError, match="^plan must be 'rows' with RobertaForCausalLM: log-probabilities of a few"):
        tree_logprobs(model, ids, mask, plan="tree")
    assert tree_stats(model, ids, mask).plan == "rows"


def test_a_window_of_another_kind_runs_rows() -> None:
    """Doge chooses so many keys of all that a token sees: none of the few tokens of a comparison, and later another."""
    if not hasattr(transformers, "DogeConfig"):
        pytest.skip("needs a transformers with Doge")
    torch.manual_seed(0)
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**SIZES, keep_window_size=600)).eval()
    ids, mask = padded(ROWS)
    message = (
        "^plan must be 'rows' with DogeForCausalLM: its config has a window of a kind that is not known, keep_windo"
    )
    for plan in ("trunks", "tree"):
        with pytest.raises(RuntimeError, match=message):
            tree_logprobs(model, ids, mask, plan=plan)
    assert tree_stats(model, ids, mask).plan == "rows"


def test_tokens_that_an_adapter_puts_before_rows_are_found_out() -> None:
    """Also where the model inside has been seen without it."""
    peft = pytest.importorskip("peft")
    model, (ids, mask) = tiny_decoders.build_model("llama"), padded(ROWS)
    assert tree_stats(model, ids, mask).plan == "tree"
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    assert tree_stats(tuned, ids, mask).plan == "rows"
    expected = tuned(input_ids=ids, attention_mask=mask).logits[:, 2:-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    found = tree_logprobs(tuned, ids, mask).logprobs[:, 1:]
    torch.testing.assert_close(found, expected[..., 0] * mask[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", ["rows", "trunks", "tree"])
def test_ids_of_any_width_and_padding_that_is_no_id(plan: str) -> None:
    model, (ids, mask) = tiny_decoders.build_model("llama"), padded(ROWS)
    expected = row_by_row(model, ids, mask)[0]
    for kind in (torch.uint8, torch.int16, torch.int32):
        found = tree_logprobs(model, ids.to(kind), mask, plan=plan).logprobs
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found = tree_logprobs(model, ids.masked_fill(mask == 0, -100), mask, plan=plan).logprobs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_no_model_can_run() -> None:
    model, (ids, mask) = tiny_decoders.build_model("llama"), padded(ROWS)
    hole = mask.clone()
    hole[2, 4:6] = 0
    message = r"^attention_mask must be one stretch of each row, got a hole in row 2: 2 of the 16 entries"
    with pytest.raises(ValueError, match=message):
        tree_batch(ids, hole)
    with pytest.raises(ValueError, match=message):
        tree_logprobs(model, ids, hole, plan="rows")
    for wrong in (29, -100):
        beyond = ids.clone()
        beyond[1, 3] = wrong
        with pytest.raises(ValueError, match=f"^input_ids must be at least 0 and less than 29, .*, got {wrong}$"):
            tree_logprobs(model, beyond, mask)
    with pytest.raises(TypeError, match="^temperature must be a number, got Tensor$"):
        tree_logprobs(model, ids, mask, temperature=torch.ones(ids.shape))
    with pytest.raises(TypeError, match="^model must be one of transformers, with a config and an embedding, got Lin"):
        tree_logprobs(torch.nn.Linear(2, 2), ids, mask)
    with pytest.raises(TypeError, match="^model must have a head that gives logits, got LlamaModel$"):
        tree_logprobs(model.model, ids, mask)
    bart = transformers.BartConfig(**{**tiny_decoders._BART, "vocab_size": 29})
    with pytest.raises(TypeError, match="^model must be a decoder alone, got BartForConditionalGeneration, an encoder"):
        tree_logprobs(transformers.BartForConditionalGeneration(bart), ids, mask)


LOOKING_AHEAD = {
    "CpmAnt": {"vocab_size": 29, "hidden_size": 32, "num_attention_heads": 2, "dim_head": 16, "dim_ff": 64,
               "num_hidden_layers": 2, "prompt_types": 4, "prompt_length": 8, "segment_types": 4},
    "Roberta": {**MODELS["Roberta"], "is_decoder": False},
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKING_AHEAD)
def test_a_model_that_looks_ahead_is_refused(name: str) -> None:
    """Its rows give a number for each token, and it is not the token's probability after those before it."""
    torch.manual_seed(0)
    sizes = LOOKING_AHEAD[name]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    ids, mask = padded(ROWS)
    message = f"^model must not look ahead, as {name}ForCausalLM does: log-probabilities of a few tokens change by"
    for ask in (tree_logprobs, tree_stats, tree_hidden_states):
        for _ in range(2):  # known the second time
            with pytest.raises(RuntimeError, match=message):
                ask(model, ids, mask)
    assert tree_logprobs(model, ids, mask, check=False).logprobs.isfinite().all()


def test_ids_that_a_model_bans_are_no_difference() -> None:
    model = tiny_decoders.build_model("llama")
    model.lm_head.register_forward_hook(
        lambda _, __, logits: torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([9]), 0.0)
    )
    ids, mask = padded(ROWS)
    for plan in ("rows", "trunks", "tree"):
        assert tree_logprobs(model, ids, mask, plan=plan, entropy=False).logprobs.isneginf().any()
