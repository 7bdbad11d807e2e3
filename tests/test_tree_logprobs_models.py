"""Ways to run a model by which shared prefixes stay what rows are: attentions, precision, checkpoints, compilation."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.23", reason="needs transformers: the extra train")

import tiny_decoders
from test_tree_logprobs import KINDS, ROWS, assert_is_rows, build, gradients, padded, row_by_row
from torch import Tensor

from leafkernels.models import tree_logprobs, tree_stats

SIZES = tiny_decoders.SIZES
LLAMA4 = {**SIZES, "intermediate_size_mlp": 24, "num_local_experts": 2, "attention_chunk_size": 4, "pad_token_id": 0}


@pytest.mark.parametrize("name", ["llama", "qwen2 with a window", "mistral with a window", "gemma", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_scaled_dot_products(name: str, kind: str, run_as: Any) -> None:
    model, (ids, mask) = tiny_decoders.build_model(name, "sdpa"), padded(ROWS)
    assert_is_rows(model, ids, mask, run_as(kind, model, ids, mask))


@pytest.mark.parametrize("name", ["llama", "mistral with a window"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_blocks_of_flex_attention(name: str, kind: str, run_as: Any) -> None:
    """Its forward pass: on a CPU PyTorch has no backward of it."""
    model, (ids, mask) = tiny_decoders.build_model(name, "flex_attention"), padded(ROWS)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = run_as(kind, model, ids, mask)
    for ours, theirs in zip(found, row_by_row(tiny_decoders.build_model(name), ids, mask), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_chunks_are_of_positions() -> None:
    """Llama 4: layers that see no further back than the chunk of four positions that a token is in."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**LLAMA4, no_rope_layers=[1, 1, 0], attn_implementation="eager")
    model = transformers.Llama4ForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    ids, mask = padded(ROWS)
    assert_is_rows(model, ids, mask, tree_logprobs(model, ids, mask, plan="tree"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter(kind: str, run_as: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_decoders.build_model("qwen2"), config).eval()
    ids, mask = padded(ROWS)
    assert_is_rows(model, ids, mask, run_as(kind, model, ids, mask))
    names = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert names and all("lora" in name for name in names)


def test_gradient_checkpointing() -> None:
    model = tiny_decoders.build_model("llama").train()
    model.gradient_checkpointing_enable()
    ids, mask = padded(ROWS)
    assert tree_stats(model, ids, mask, plan="tree").plan == "tree"
    assert_is_rows(model, ids, mask, tree_logprobs(model, ids, mask, plan="tree"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe"])
def test_half_precision_is_no_further_from_the_truth(name: str, run_as: Any) -> None:
    """Errors of bfloat16 against float32: no larger than those of the ordinary forward, but for luck.

    Of so few tokens either may be the lucky one, by a fourth or so.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 29, (24, 40), generator=generator)
    rows[:, :10] = rows[0, :10].clone()
    rows[12:, :20] = rows[12, :20].clone()
    mask = torch.ones_like(rows)
    wide = build(name)
    for weight in wide.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2, generator=generator)
    narrow = build(name).to(torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    wide.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        truth = row_by_row(wide, rows, mask)[0]
        logits = narrow(input_ids=rows).logits[:, :-1].float().log_softmax(-1)
        ordinary = torch.nn.functional.pad(logits.gather(-1, rows[:, 1:, None])[..., 0], (1, 0))
        for kind in ("rows", *KINDS):
            found = run_as(kind, narrow, rows, mask).logprobs
            errors = [(each - truth).square().mean().sqrt() for each in (found, ordinary)]
            assert 0 < errors[0] <= 1.25 * errors[1], (kind, errors)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model(in_place: bool) -> None:
    model, (ids, mask) = tiny_decoders.build_model("llama"), padded(ROWS)
    compiled = model
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    found = tree_logprobs(compiled, ids, mask, plan="tree")
    ours = gradients(model, *found)
    model = tiny_decoders.build_model("llama")
    expected = row_by_row(model, ids, mask)
    theirs = gradients(model, *expected)
    torch.testing.assert_close(found.logprobs, expected[0], rtol=1e-5, atol=1e-5)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max() + 1))


class Deaf(torch.nn.Module):
    """A model that takes a mask of four dimensions, and hears nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_decoders.build_model("llama")
        for weight in self.inner.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.3)
        self.config = self.inner.config
        self.get_input_embeddings = self.inner.get_input_embeddings
        self.get_output_embeddings = self.inner.get_output_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Any, position_ids: Tensor, logits_to_keep: int = 0) -> Any:
        mask = None if attention_mask.dim() == 4 else attention_mask
        return self.inner(input_ids=input_ids, attention_mask=mask, position_ids=position_ids,
                          logits_to_keep=logits_to_keep)  # fmt: skip


def test_a_model_that_ignores_the_mask_is_found_out() -> None:
    ids, mask = padded([[1, *range(3, 22), 4 + k, 5 + k, 6] for k in range(5)])
    model = Deaf()
    with pytest.raises(
        RuntimeError, match=r"^plan must be 'rows' with Deaf: log-probabilities of a few tokens differ by"
    ):
        tree_logprobs(model, ids, mask, plan="tree")
    stats = tree_stats(model, ids, mask)
    assert stats.plan == "rows"
    unchecked = tree_logprobs(Deaf(), ids, mask, plan="tree", check=False)
    assert (unchecked.logprobs - tree_logprobs(model, ids, mask).logprobs).abs().max() > 0.1


REFUSED = {
    "Mamba": ({"vocab_size": 29, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, "takes no position_ids"),
    "Bloom": ({"vocab_size": 29, "hidden_size": 16, "n_layer": 2, "n_head": 2}, "takes no position_ids"),
    "GPTNeo": (
        {"vocab_size": 29, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["local"], 2]],
         "window_size": 256, "max_position_embeddings": 1024},
        "log-probabilities of a few tokens differ",
    ),
    "Qwen3Next": (
        {**SIZES, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
         "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
         "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
         "shared_expert_intermediate_size": 8},
        "layers of the kind linear_attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_layers_are_no_attention_by_position(name: str) -> None:
    sizes, reason = REFUSED[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    ids, mask = padded([[1, *range(3, 12), 4 + k, 5 + k, 6] for k in range(5)])
    with pytest.raises(RuntimeError, match=f"^plan must be 'rows' with {name}ForCausalLM: .*{reason}"):
        tree_logprobs(model, ids, mask, plan="tree")
    ids, mask = padded([[1, 5, 6], [1, 5, 7, 8]])
    found = tree_logprobs(model, ids, mask, plan="rows")
    torch.testing.assert_close(found.logprobs, row_by_row(model, ids, mask)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length(rope: str) -> None:
    """A trunk shorter than where they change has other keys than the rows behind it: the mask then, or rows."""
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 100.0, "factor": 4.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16}
    sizes = {**SIZES, "max_position_embeddings": 16, "rope_parameters": parameters}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    ids = torch.tensor([[1, *range(3, 13), *(3 + (k * n) % 7 for n in range(1, 14))] for k in range(1, 5)])
    with pytest.raises(RuntimeError, match="^plan must be 'rows' with LlamaForCausalLM: its rotary frequencies change"):
        tree_logprobs(model, ids, plan="trunks")
    for plan in ("auto", "tree"):
        found = tree_logprobs(model, ids, plan=plan).logprobs
        torch.testing.assert_close(found, row_by_row(model, ids, torch.ones_like(ids))[0], rtol=1e-4, atol=1e-4)
    short = ids[:, :14]  # all on one side
    found = tree_logprobs(model, short, plan="trunks").logprobs
    torch.testing.assert_close(found, row_by_row(model, short, torch.ones_like(short))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["rows", *KINDS])
def test_nothing_asked_for_has_a_gradient_of_zeros(kind: str, run_as: Any) -> None:
    """As of an ordinary forward pass whose tokens are all masked: a trainer's backward pass goes on."""
    model, (ids, mask) = tiny_decoders.build_model("llama"), padded(ROWS)
    found = run_as(kind, model, ids, mask, response_mask=torch.zeros_like(mask))
    assert not found.logprobs.any()
    given = gradients(model, found.logprobs)
    assert given and not any(gradient.any() for gradient in given.values())


def test_what_cannot_be() -> None:
    model, (ids, mask) = tiny_decoders.build_model("llama"), padded(ROWS)
    with pytest.raises(ValueError, match="^max_tokens must be at least the tokens of the longest row, 9, got 8$"):
        tree_logprobs(model, ids, mask, max_tokens=8)
    with pytest.raises(ValueError, match="^max_tokens must be .*got 0$"):
        tree_logprobs(model, ids, mask, max_tokens=0)
    with pytest.raises(ValueError, match="^input_ids must be on the device of the model, meta, got cpu$"):
        tree_logprobs(model.to("meta"), ids, mask)


def test_a_tree_beyond_memory() -> None:
    """A petabyte of mask, which no machine gives."""
    from leafkernels.models import run

    model = tiny_decoders.build_model("llama")
    places = torch.zeros((1, 1), dtype=torch.int64).expand(1, 1 << 24)
    with pytest.raises(RuntimeError, match=r"^max_tokens must be smaller than 16777216, the nodes of a tree whose"):
        run._mask(run.Run(model), lambda b, q, k: torch.ones(1, 1, 1, dtype=torch.bool).expand(1, 1 << 24, 1 << 24),
                  places, places)  # fmt: skip


@pytest.mark.parametrize("kind", ["rows", *KINDS])
def test_pieces_hold_so_many_tokens_and_forget_them(kind: str, run_as: Any) -> None:
    """Each forward pass, or two that share a trunk; without a gradient a piece is forgotten before the next."""
    model = tiny_decoders.build_model("llama")
    rows = [[1, *range(3, 12), 4 + k, 5 + k % 2, 6, 7 + k % 3] for k in range(12)]
    ids, mask = padded(rows)
    seen: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad():
        run_as(kind, model, ids, mask)
        seen.clear()
        found = run_as(kind, model, ids, mask, max_tokens=40)
    hook.remove()
    passes = 2 if "trunks" in kind else 1
    pieces = [sum(seen[n : n + passes]) for n in range(0, len(seen), passes)]
    assert len(pieces) > 1 and max(pieces) <= 40
    assert_is_rows(model, ids, mask, run_as(kind, model, ids, mask, max_tokens=40))
    torch.testing.assert_close(found.logprobs, row_by_row(model, ids, mask)[0], rtol=1e-5, atol=1e-5)
