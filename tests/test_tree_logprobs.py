"""Rows that share prefixes, through a model: log-probabilities, entropies and gradients are those of rows alone."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import examples

transformers = pytest.importorskip("transformers", minversion="5.23", reason="needs transformers: the extra train")

import tiny_decoders
from torch import Tensor

from leafkernels.models import plan as plans
from leafkernels.models import tree_logprobs, tree_stats

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
    logprobs, entropy = torch.zeros(ids.shape), torch.zeros(ids.shape)
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
    assert stats == ("tree", "fewer tokens", 5, 1, 5 * 23, 20 + 5 * 3, 35, 35, 1)
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

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any = None,
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
