"""Rows that share prefixes, through a model: log-probabilities, entropies and gradients are those of rows alone."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import examples

transformers = pytest.importorskip("transformers", minversion="5.23", reason="needs transformers: the extra train")

import pytest
import tiny_decoders
from engines import deepspeed_settings, whole
from torch import Tensor

from leafkernels.models import choose, tree_batch, tree_hidden_states, tree_logprobs, tree_stats
from leafkernels.models import plan as plans

SIZES = tiny_decoders.SIZES
MORE = {
    "gemma3": ("Gemma3TextConfig", {**SIZES, "sliding_window": 6}),
    "phi3": ("Phi3Config", {**SIZES, "num_key_value_heads": 2}),
    "olmo2": ("Olmo2Config", SIZES),
    "granite": ("GraniteConfig", {**SIZES, "logits_scaling": 4.0}),
    "cohere2": ("Cohere2Config", {**SIZES, "sliding_window": 6}),
    "qwen3-moe": ("Qwen3MoeConfig", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **SIZES,
            "head_dim": 4,
            "num_key_value_heads": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 8,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
}
TEXT = [name for name in tiny_decoders.MODELS if name != "qwen2-audio"]
ROWS = [
    [1, 5, 6, 7, 8, 9, 3],
    [1, 5, 6, 7, 8, 4],
    [1, 5, 6, 7, 8, 9, 10, 11, 12],
    [1, 20, 21, 3],
    [1, 20, 21, 22, 23],
    [2],
    [1, 5, 6, 7, 8, 9, 3],
]


def build(name: str) -> Any:
    if name in MORE:
        torch.manual_seed(0)
        kind, sizes = MORE[name]
        config = getattr(transformers, kind)(**sizes, attn_implementation="eager", pad_token_id=0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()
    return tiny_decoders.build_model(name)


def padded(rows: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    width = max(map(len, rows), default=0)
    fill = [[0] * (width - len(row)) for row in rows]
    pairs = list(zip(rows, fill, strict=True))
    ids = [row + pad if side == "right" else pad + row for row, pad in pairs]
    mask = [[1] * len(row) + pad if side == "right" else pad + [1] * len(row) for row, pad in pairs]
    return torch.tensor(ids, dtype=torch.int64).reshape(len(rows), width), torch.tensor(mask).reshape(len(rows), width)


def row_by_row(model: Any, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Each row in a forward pass of its own, without padding."""
    logprobs, entropy = next(model.parameters()).new_zeros((2, *ids.shape))
    for row, is_token in enumerate(mask.bool()):
        columns = is_token.nonzero().flatten()
        if len(columns) < 2:
            continue
        chances = (model(input_ids=ids[row, columns][None]).logits[0, :-1] / temperature).log_softmax(-1)
        places = torch.full_like(columns[1:], row), columns[1:]
        logprobs = logprobs.index_put(places, chances.gather(1, ids[row, columns[1:], None])[:, 0])
        entropy = entropy.index_put(places, -(chances.exp() * chances).sum(-1))
    return logprobs, entropy


def gradients(model: Any, *results: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    loss = sum((result * torch.randn(result.shape, generator=generator)).sum() for result in results)
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


KINDS = ("trunks", "tree", "tree below trunks")


def assert_is_rows(model: Any, ids: Tensor, mask: Tensor, found: Any, temperature: float = 1.0) -> None:
    """Log-probabilities, entropies and the gradients of all weights are those of rows run one by one."""
    ours = gradients(model, *found)
    expected = row_by_row(model, ids, mask, temperature)
    theirs = gradients(model, *expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for weight, gradient in theirs.items():
        # Float32 sums of some 40 tokens, in another order.
        torch.testing.assert_close(ours[weight], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max() + 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*TEXT, *MORE])
def test_shared_prefixes_are_rows(name: str, kind: str, run_as: Any) -> None:
    model = build(name)
    for side in ("right", "left"):
        ids, mask = padded(ROWS, side)
        assert_is_rows(model, ids, mask, run_as(kind, model, ids, mask, temperature=0.7), 0.7)
        plain = tree_logprobs(model, ids, mask, temperature=0.7, plan="rows")
        for ours, theirs in zip(plain, row_by_row(model, ids, mask, 0.7), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(
    st.lists(st.lists(st.integers(3, 5), max_size=6), min_size=1, max_size=6),
    st.sampled_from(["right", "left"]),
    st.randoms(),
)
@examples(torch=40)
@example([[3, 3], [3, 3], [3, 3]], "right", __import__("random").Random(0))
@example([[], [3], [3, 4, 5], []], "left", __import__("random").Random(0))
def test_any_rows_and_any_mask(rows: list[list[int]], side: str, rng: Any) -> None:
    model = tiny_decoders.build_model("llama")
    ids, mask = padded(rows, side)
    asked = torch.tensor([rng.random() < 0.6 for _ in range(ids.numel())], dtype=torch.bool).reshape(ids.shape)
    expected = row_by_row(model, ids, mask)
    for plan in ("trunks", "tree", "rows"):
        for max_tokens in (None, max(1, *map(len, rows)), 11):
            found = tree_logprobs(model, ids, mask, response_mask=asked, plan=plan, max_tokens=max_tokens)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, torch.where(asked, theirs, 0.0), rtol=1e-5, atol=1e-5)


def test_what_runs_is_what_is_counted() -> None:
    """Five rows of a prompt of twenty tokens: the model sees as many tokens as tree_stats says, and no more."""
    model = tiny_decoders.build_model("llama")
    rows = [[1, *range(3, 22), 4 + k, 5 + k, 6] for k in range(5)]
    ids, mask = padded(rows)
    stats = tree_stats(model, ids, mask)
    # A second forward pass costs more than the few tokens of another plan.
    assert stats == ("tree", "fewer tokens", 5, 1, 5 * 23, 20 + 5 * 3, 35, 35, 1, 0)
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for plan, forwards in (("auto", 1), ("trunks", 2), ("tree", 1), ("rows", 1)):
        stats = tree_stats(model, ids, mask, plan=plan)
        seen.clear()
        tree_logprobs(model, ids, mask, plan=plan)
        assert sum(seen) == stats.tokens and len(seen) == stats.forwards == forwards
    assert tree_stats(model, *padded([[1, 2, 3], [4, 5, 6]])).reason == "the rows share too little"
    assert tree_stats(model, ids[:0], mask[:0])[:3] == ("rows", "there are no rows", 0)


def brute_force(shared: list[int], first: int, last: int) -> int:
    """The most tokens that clusters of neighbouring rows save."""
    if last - first <= 1:
        return 0
    most = (last - first - 1) * min(shared[first + 1 : last])
    for cut in range(first + 1, last):
        most = max(most, brute_force(shared, first, cut) + brute_force(shared, cut, last))
    return most


@given(st.lists(st.integers(0, 6), max_size=9), st.data())
@examples(torch=200)
def test_clusters_save_the_most(shared: list[int], data: st.DataObject) -> None:
    after = [*shared[1:], 0][: len(shared)]
    lengths = [max(pair) + data.draw(st.integers(1, 3)) for pair in zip(shared, after, strict=True)]
    shared[:1] = [0] * len(shared[:1])
    clusters = plans.best_clusters(shared, lengths)
    assert [c.first for c in clusters] + [len(shared)] == [0, *(c.last for c in clusters)] or not shared
    assert all(c.depth <= min(lengths[c.first : c.last]) for c in clusters)
    saved = sum((c.last - c.first - 1) * c.depth for c in clusters)
    assert saved == brute_force(shared, 0, len(shared))


@given(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=6), min_size=1, max_size=8), st.integers(6, 40))
@examples(torch=150)
def test_plans_hold_every_row_and_count_its_nodes(rows: list[list[int]], most: int) -> None:
    rows = sorted(rows)  # an order of depth first
    pairs = [(row, after) for row, after in zip(rows, rows[1:], strict=False)]
    shared = [0, *(next((n for n, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
                   for pair in pairs)]  # fmt: skip
    lengths = [len(row) for row in rows]
    weights = plans.Weights(1.0, 0.1, 0.1, 1.0)
    for max_tokens in (None, most):
        found = plans.plans(shared, lengths, weights, None, max_tokens)
        assert plans.ROWS in found
        for kind, (plan, cost) in found.items():
            assert cost == plans.estimate(plan, weights) > 0 and plan.kind == kind
            bins = [held for piece in plan.pieces for held in piece.bins]
            assert [held.first for held in bins] + [len(rows)] == [0, *(held.last for held in bins)]
            for piece in plan.pieces:
                assert max_tokens is None or piece.tokens <= max_tokens
                trunks = piece.trunks or [plans.Cluster(0, len(rows), 0)]
                for held in piece.bins:
                    (depth,) = {t.depth for t in trunks if t.first <= held.first and held.last <= t.last}
                    prefixes = {tuple(row[:end]) for row in rows[held.first : held.last]
                                for end in range(depth + 1, len(row) + 1)}  # fmt: skip
                    assert held.nodes == len(prefixes)
                    assert len({tuple(row[:depth]) for row in rows[held.first : held.last]}) == 1
    assert plans.count_nodes(shared, lengths) == len({tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)})


def test_many_prompts_cost_as_much_as_each() -> None:
    """Not the square of their sum: however many, their nodes stand in bins of a few prompts."""
    weights = plans.Weights(1e4, 10.0, 11.5, 1e6)

    def cost(prompts: int) -> float:
        shared, lengths = [0, 190, 150, 200] * prompts, [210, 220, 215, 230] * prompts
        found = plans.plans(shared, lengths, weights)
        return min(found[kind][1] for kind in (plans.TREE, plans.TREE_BELOW))

    assert cost(64) < 64 * cost(1)


class Columns(torch.nn.Module):
    """A model whose cache is a decoy: it continues as if nothing stood before."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_decoders.build_model("llama")
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Any = None, past_key_values: Any = None,
                use_cache: bool = False, logits_to_keep: int = 0) -> Any:  # fmt: skip
        width = input_ids.shape[1]
        return self.inner(input_ids=input_ids, attention_mask=attention_mask[:, -width:], position_ids=position_ids,
                          logits_to_keep=logits_to_keep)  # fmt: skip

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()


def test_a_model_that_cannot_is_told() -> None:
    ids, mask = padded([[1, *range(3, 22), 4 + k, 5 + k, 6] for k in range(5)])
    with pytest.raises(RuntimeError, match="^plan must be 'rows' with Columns: "):
        tree_logprobs(Columns(), ids, mask, plan="trunks")
    model = Columns()
    found = tree_logprobs(model, ids, mask)
    torch.testing.assert_close(found, tree_logprobs(model, ids, mask, plan="rows"))
    model = tiny_decoders.build_model("llama").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="^plan must be 'rows' with LlamaForCausalLM: gradient checkpointing switch"):
        tree_logprobs(model, ids, mask, plan="trunks")
    assert tree_stats(model, ids, mask).plan == "tree"
    with pytest.raises(ValueError, match=r"^input_ids must have shape \(rows, tokens\), got shape \(3,\)$"):
        tree_logprobs(model, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="^groups or group_size must say which rows are a prompt where inputs has"):
        tree_logprobs(model, ids, mask, inputs={"input_features": torch.zeros(1)})
    with pytest.raises(ValueError, match="^plan must be one of 'auto', 'rows', 'trunks', 'tree', got 'nodes'$"):
        tree_logprobs(model, ids, mask, plan="nodes")


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = tiny_decoders.build_model("llama").train()
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    ids, mask = padded([[1, *range(3, 22), 4 + k, 5 + k, 6] for k in range(5)])
    state = torch.get_rng_state()
    tree_stats(model, ids, mask)
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_decoders.build_model("qwen2"), config).eval()
    ids, mask = padded(ROWS)
    ours = gradients(model, *tree_logprobs(model, ids, mask, plan="trunks"))
    theirs = gradients(model, *row_by_row(model, ids, mask))
    assert ours.keys() == theirs.keys() and any("lora" in name for name in ours)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=2e-5)


def test_one_reading_serves_every_model() -> None:
    ids, mask = padded([[1, *range(3, 22), 4 + k, 5 + k, 6] for k in range(5)], "left")
    asked = mask * (torch.arange(ids.shape[1]) >= 20)
    read = tree_batch(ids, mask, response_mask=asked)
    for name in ("llama", "gpt2"):
        model = tiny_decoders.build_model(name)
        assert tree_stats(model, read) == tree_stats(model, ids, mask)
        expected = tree_logprobs(model, ids, mask, response_mask=asked)
        for one, other in zip(tree_logprobs(model, read), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    for name, value in {"attention_mask": mask, "response_mask": asked, "group_size": 5}.items():
        with pytest.raises(
            ValueError, match=f"^{name} must be None with a TreeBatch, which has been read with its own"
        ):
            tree_logprobs(tiny_decoders.build_model("llama"), read, **{name: value})


@pytest.mark.parametrize("kind", ["rows", *KINDS])
@pytest.mark.parametrize("side", ["right", "left"])
def test_hidden_states_are_those_of_rows(kind: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all tokens, those of the prompt too, with gradients; in pieces as well."""
    monkeypatch.setitem(choose._KINDS_OF_PLAN, "tree", (kind,))
    model, (ids, mask) = tiny_decoders.build_model("qwen3"), padded([*ROWS, []], side)
    expected = torch.zeros((*ids.shape, SIZES["hidden_size"]))
    for row, is_token in enumerate(mask.bool()):
        if is_token.any():
            alone = model(input_ids=ids[row, is_token][None], output_hidden_states=True).hidden_states[-1][0]
            expected = expected.index_put((torch.tensor(row), is_token.nonzero()[:, 0]), alone)
    theirs = gradients(model, expected)
    for most in (None, 11):
        found = tree_hidden_states(model, ids, mask, plan="tree", max_tokens=most)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not found[~mask.bool()].any()
        ours = gradients(model, found)
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max() + 1))


# --- Attentions, precision, checkpoints, compilation ------------------------------------------------------------------


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
def test_an_adapter_of_every_plan(kind: str, run_as: Any) -> None:
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

    def forward(self, input_ids: Tensor, attention_mask: Any, position_ids: Any = None, logits_to_keep: int = 0) -> Any:
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


# --- Ranks that share weights -----------------------------------------------------------------------------------------


SHARING = [[1, *range(3, 22), 4 + k, 5 + k, 6] for k in range(5)]
# Rows of the two ranks: those that share much, and those that share nothing.
BATCHES = {
    "one row": (SHARING, [[3, 4, 5, 6]]),
    "no row": (SHARING, []),
    "nothing shared": ([[2, 9, 8, 7], [5, 4, 3]], SHARING),
    "both": (SHARING, SHARING[1:]),
}


def batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids, mask = padded(rows)
    return (ids, mask) if rows else (torch.zeros((0, 4), dtype=torch.int64), torch.zeros((0, 4), dtype=torch.int64))


def spread(engine: str) -> Any:
    model = tiny_decoders.build_model("llama")
    if engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    import deepspeed

    settings = {**deepspeed_settings(3), "train_batch_size": 2, "train_micro_batch_size_per_gpu": 1}
    settings |= {"gradient_accumulation_steps": 1, "gradient_clipping": 0.0, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def step(rank: int, engine: str, cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each case: this rank's numbers, and what one step of SGD did to the weights, or their gradients."""
    results = []
    for name, options in cases:
        model = spread(engine)
        ids, mask = batch(BATCHES[name][rank])
        plan = tree_stats(model, ids, mask, **options)
        found = tree_logprobs(model, ids, mask, **options)
        loss = found.logprobs.sum() + found.entropy.sum()
        gradients = {}
        if engine == "fsdp2":
            loss.backward()
            gradients = {n: whole(w.grad).clone() for n, w in model.named_parameters()}
        else:
            from deepspeed.utils import safe_get_full_grad

            model.backward(loss)
            gradients = {n: safe_get_full_grad(w).clone() for n, w in model.module.named_parameters()}
        results.append({"plan": plan, "logprobs": found.logprobs.detach(), "gradients": gradients})
    return results


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_ranks_agree_on_the_plan(engine: str, engines: Any) -> None:
    cases = [(name, options) for name in BATCHES for options in ({}, {"max_tokens": 30}, {"plan": "tree"})]
    of_ranks = engines.run(engine, step, engine, cases)
    model = tiny_decoders.build_model("llama")
    for case, (name, options) in enumerate(cases):
        found = [results[case] for results in of_ranks]
        assert len({(one["plan"].plan, one["plan"].forwards) for one in found}) == 1, (name, options)
        model.zero_grad()
        total: Any = 0.0
        for rank in range(2):
            ids, mask = batch(BATCHES[name][rank])
            logprobs, entropy = row_by_row(model, ids, mask)
            torch.testing.assert_close(found[rank]["logprobs"], logprobs.detach(), rtol=1e-5, atol=1e-5)
            total = total + logprobs.sum() + entropy.sum()
        (total / 2).backward()  # the ranks' mean
        for weight, gradient in found[0]["gradients"].items():
            expected = dict(model.named_parameters())[weight].grad
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4, msg=f"{name} {options} {weight}")
    assert {one["plan"].plan for one in of_ranks[0]} > {"trunks"}


def wrapped_step(rank: int) -> tuple[str, list[str], dict[str, Any]]:
    """What is said of buffers that are sent; the plans, and the gradients, of wrappers that send none."""
    from torch.nn.parallel import DistributedDataParallel

    model, (ids, mask) = tiny_decoders.build_model("llama"), batch(BATCHES["nothing shared"][rank])
    sends = DistributedDataParallel(model)
    for each in (sends, torch.compile(sends)):
        with pytest.raises(ValueError) as refused:
            tree_logprobs(each, ids, mask)
    said = str(refused.value)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    plans = [tree_stats(wrapped, ids, mask).plan]
    tree_logprobs(wrapped, ids, mask).logprobs.sum().backward()
    return said, plans, {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.slow
def test_ranks_of_ddp_run_what_each_finds_cheapest(engines: Any) -> None:
    (said, one, gradients), (_, other, same) = engines.run("ddp", wrapped_step)
    assert said.startswith("model must be in DistributedDataParallel with forward_sync_buffers=False")
    assert one == ["rows"] and other != ["rows"]
    model = tiny_decoders.build_model("llama")
    for rank in range(2):
        (row_by_row(model, *batch(BATCHES["nothing shared"][rank]))[0].sum() / 2).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-4)
        assert torch.equal(gradients[name], same[name])
