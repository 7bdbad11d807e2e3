"""Branches packed in one row are branches run alone."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoders import ALONE, BOTH, MODELS, NONE, OTHERS, SIZES, build_model, build_other

from leafkernels.lookahead import TransformersStepper, search, search_all

pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[lookahead]'")


class WithRewards:
    """A model whose reward is the first number of the hidden state after the final norm."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def __call__(self, **inputs: Any) -> Any:
        output = self.model(**inputs, output_hidden_states=True)
        return SimpleNamespace(logits=output.logits, rewards=output.hidden_states[-1][..., 0])


def build(name: str, attention: str = "eager") -> WithRewards:
    return WithRewards(build_model(name, attention))


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


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2 with a window", "gemma2", "gpt2"])
def test_branches_of_several_prompts_are_what_they_are_alone(name: str, packed: bool) -> None:
    """Prompts of several lengths, each with other numbers of branches; prompts end one after the other."""
    model = build(name)
    stepper, choose = TransformersStepper(model, packed=packed), random.Random(name)
    branches = [[[3, 1, 4, 1, 5]], [[2, 7]], [[9, 8, 7, 6, 5, 4, 3, 2, 1]]]
    logits, rewards = stepper.prefill([torch.tensor(prompt_branches[0]) for prompt_branches in branches])
    for sizes in ((1, 1, 1), (3, 1, 2), (6, 2, 2), (2, 4, 0), (1, 5, 0), (0, 3, 0), (0, 6, 0)):
        flat = [branch for prompt_branches in branches for branch in prompt_branches]
        for branch, found, reward in zip(flat, logits, rewards, strict=True):
            torch.testing.assert_close(found, alone(model, branch)[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(reward, alone(model, branch)[1], rtol=1e-4, atol=1e-5)
        parents, tokens, grown, first = [], [], [], 0
        for size, prompt_branches in zip(sizes, branches, strict=True):
            chosen = sorted(choose.randrange(len(prompt_branches)) for _ in range(size))
            added = [choose.randrange(29) for _ in chosen]
            grown.append([[*prompt_branches[parent], token] for parent, token in zip(chosen, added, strict=True)])
            parents += [first + parent for parent in chosen]
            tokens += added
            first += len(prompt_branches)
        branches = grown
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


class Bare:
    """No layer but one that keeps a column for each token; any logits, any rewards."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type="bare"))

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any, **_: Any) -> Any:
        column = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
        past_key_values.update(column, column, 0)
        return SimpleNamespace(logits=torch.randn(*input_ids.shape, 29), rewards=torch.randn(input_ids.shape))


@settings(max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 2),
    st.integers(1, 40),
    st.integers(1, 10),
    st.booleans(),
)
def test_the_cache_is_bounded(
    seed: int, width: int, chunk: int, depth: int, limit: int, prompt: int, ends: bool
) -> None:
    """In each forward: prompt, what is committed, and (depth + 1) chunks of the most branches that there may be."""
    torch.manual_seed(seed)
    stepper, columns, committed = TransformersStepper(Bare()), [], [0]
    extend = stepper.extend

    def counted(parents: torch.Tensor, token_ids: torch.Tensor) -> Any:
        found = extend(parents, token_ids)
        columns.append((stepper.cache_columns, committed[-1]))
        return found

    stepper.extend = counted  # type: ignore[method-assign]
    found = search(
        stepper,
        torch.arange(prompt),
        width=width,
        chunk=chunk,
        depth=depth,
        max_new_tokens=limit,
        eos_token_ids=range(9) if ends else (),
        on_commit=lambda ids: committed.append(committed[-1] + len(ids)),
    )
    live = width ** (depth + 1) * (depth + 1) * chunk
    assert all(held <= prompt + settled + live for held, settled in columns)
    assert len(columns) == found.num_forwards - 1
    if not ends and columns:
        # The answer but for its last token, at least, so that it is a count.
        assert columns[-1][0] >= prompt + limit - 1


@pytest.mark.parametrize("name", ["llama", "qwen2-audio"])
def test_half_precision_is_no_worse_than_alone(name: str) -> None:
    exact, half = build(name), build(name)
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
        TransformersStepper(model, packed=True)


def test_refuses_to_pack_layers_that_keep_a_state() -> None:
    with pytest.raises(ValueError, match="keep keys and values alone, .* LinearAttentionLayer .* packed=False"):
        TransformersStepper(WithRewards(build_other("Qwen3Next")), packed=True)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2}),
        ("Bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
        ("Falcon", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True}),
        (
            "GPTNeo",
            {
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 4,
            },
        ),
    ],
)
def test_refuses_to_pack_where_attention_counts_columns(kind: str, sizes: dict[str, Any]) -> None:
    """Rows of their own are right there."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=29, bos_token_id=0, eos_token_id=1, **sizes)
    model = WithRewards(getattr(transformers, f"{kind}ForCausalLM")(config).eval())
    with pytest.raises(ValueError, match=f"attention of '{config.model_type}' counts them .* packed=False"):
        TransformersStepper(model, packed=True)
    stepper, branches = TransformersStepper(model), [[3, 1, 4, 1, 5]]
    logits, _ = stepper.prefill(torch.tensor(branches[0]))
    for parents, tokens in (([0, 0, 0], [2, 7, 1]), ([0, 2], [8, 2]), ([1, 1, 1], [3, 4, 5]), ([0, 1, 2], [6, 7, 8])):
        branches = [[*branches[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        logits, _ = stepper.extend(torch.tensor(parents), torch.tensor(tokens))
        for branch, found in zip(branches, logits, strict=True):
            torch.testing.assert_close(found, alone(model, branch)[0], rtol=1e-4, atol=1e-5)


def test_packs_what_has_alibi_in_its_config_and_not_in_use() -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    TransformersStepper(WithRewards(transformers.FalconForCausalLM(transformers.FalconConfig(vocab_size=29, **sizes))))


PROMPTS = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 8, 7, 6, 5, 4, 3, 2, 11, 12])]


def greedy(model: Any, prompt: torch.Tensor, **options: Any) -> list[int]:
    """By the model's own ``generate``."""
    options = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(prompt[None]), **options}
    found: list[int] = model.generate(prompt[None], **options)[0, len(prompt) :].tolist()
    return found


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_taken_goes_on_as_generate_does(name: str) -> None:
    """Whatever the decoder: greedy decoding is its own, prompts and branches are what they are alone, or it is said."""
    model = WithRewards(build_other(name))
    taken, ahead = OTHERS[name][1], {"width": 2, "chunk": 2, "depth": 1, "max_new_tokens": 7}
    if taken != BOTH:
        match = "must give with a cache, token by token|packed branches need .*packed=False"
        with pytest.raises(ValueError, match=match):
            TransformersStepper(model, packed=True)
    assert taken == NONE or TransformersStepper(model)._packed == (taken == BOTH)
    if taken == NONE:
        with pytest.raises(ValueError, match="model must give with a cache, token by token, what its own generate"):
            TransformersStepper(model)
        return
    found = []
    for packed in (False, True) if taken == BOTH else (False,):
        for prompt in PROMPTS:
            stepper = TransformersStepper(model, packed=packed)
            by_search = search(stepper, prompt, width=1, chunk=3, depth=1, max_new_tokens=8)
            assert by_search.token_ids == greedy(model.model, prompt)
        alone = [search(TransformersStepper(model, packed=packed), prompt, **ahead).token_ids for prompt in PROMPTS]
        found.append(alone)
        if taken == ALONE:
            with pytest.raises(ValueError, match="prompts must have one length, since .* beside padding: logits diff"):
                search_all(TransformersStepper(model, packed=packed), PROMPTS, **ahead)
        else:
            together = search_all(TransformersStepper(model, packed=packed), PROMPTS, **ahead)
            assert [result.token_ids for result in together] == alone
    assert found[0] == found[-1]


def test_a_model_that_swallows_positions() -> None:
    """It has the argument and does not read it: what is found by trying must not be asked of a signature or a name."""
    import transformers

    class Deaf(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    model = WithRewards(Deaf(transformers.LlamaConfig(**SIZES, initializer_range=0.3)).eval())
    with pytest.raises(ValueError, match=r"'llama' counts them in columns .*logits differ by .* packed=False"):
        TransformersStepper(model, packed=True)
    stepper = TransformersStepper(model)
    assert search(stepper, PROMPTS[0], width=1, chunk=3, depth=1, max_new_tokens=8).token_ids == greedy(
        model.model, PROMPTS[0], eos_token_id=None
    )


def test_the_cache_goes_by_the_name_that_the_model_reads() -> None:
    import inspect

    import transformers
    from transformers import Cache

    llama = transformers.LlamaForCausalLM
    name = next(n for n, p in inspect.signature(llama.forward).parameters.items() if "Cache" in str(p.annotation))

    class Renamed(llama):
        def forward(self, input_ids: Any, position_ids: Any = None, kept: Cache | None = None, **kwargs: Any) -> Any:
            if kept is not None:
                kwargs[name] = kept
            return super().forward(input_ids, position_ids=position_ids, **kwargs)

    torch.manual_seed(0)
    model = WithRewards(Renamed(transformers.LlamaConfig(**SIZES, initializer_range=0.3)).eval())
    stepper = TransformersStepper(model)
    assert search(stepper, PROMPTS[0], width=1, chunk=3, depth=1, max_new_tokens=8).token_ids == greedy(
        model.model, PROMPTS[0], eos_token_id=None
    )


def test_what_is_read_with_every_token_is_refused() -> None:
    """``generate`` repeats the last of them; here they would be lost behind the prompt."""
    model = WithRewards(build_model("gpt2"))
    kinds = torch.tensor([[3, 3, 3, 4, 4]])
    stepper = TransformersStepper(model, inputs={"token_type_ids": kinds})
    with pytest.raises(ValueError, match="inputs must be what GPT2LMHeadModel reads .* behind token_type_ids it gives"):
        stepper.prefill(PROMPTS[0])


SWITCH = 16
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH, "factor": 8.0}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.5]}


@pytest.mark.parametrize("kind", ["Phi3", "Llama", "dynamic"])
def test_rotary_frequencies_that_change_with_the_length(kind: str) -> None:
    import transformers

    sizes = {**SIZES, "initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0}
    if kind == "dynamic":
        dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        config = transformers.LlamaConfig(**{**sizes, "max_position_embeddings": SWITCH}, rope_parameters=dynamic)
    else:
        original = {"original_max_position_embeddings": SWITCH} if kind == "Phi3" else {}
        config = getattr(transformers, f"{kind}Config")(**sizes, **original, rope_parameters=LONG)
    torch.manual_seed(0)
    model = WithRewards(transformers.AutoModelForCausalLM.from_config(config).eval())
    ids = torch.randint(3, 29, (24,))

    def frequencies() -> list[torch.Tensor]:
        return [buffer.clone() for name, buffer in model.model.named_buffers() if "inv_freq" in name]

    for length in (3, 8, 9, 16, 17, 24):
        stepper = TransformersStepper(model, max_new_tokens=8)
        if length + 8 <= SWITCH or length > SWITCH and kind != "dynamic":
            found = search(stepper, ids[:length], width=1, chunk=3, depth=1, max_new_tokens=8)
            assert found.token_ids == greedy(model.model, ids[:length])
            continue
        before = frequencies()
        with pytest.raises(ValueError, match=f"rotary frequencies .* got lengths from {length} to {length + 8}, and"):
            stepper.prefill(ids[:length])
        assert all(map(torch.equal, before, frequencies()))
        if length < SWITCH:  # found on the way where the length of the answer was not told
            with pytest.raises(ValueError, match=f"got lengths from {length} to {SWITCH + 1}, and"):
                search(TransformersStepper(model), ids[:length], width=2, chunk=2, depth=1, max_new_tokens=12)
    with pytest.raises(ValueError, match="got lengths from 4 to 20, and they change"):
        TransformersStepper(model).prefill([ids[:4], ids[:20]])
    TransformersStepper(model).prefill([ids[:4], ids[:9]])


def test_a_trial_leaves_the_model_as_it_was() -> None:
    model = WithRewards(build_model("gpt2"))
    model.model.train()
    model.model.transformer.h[0].eval()
    modes = [module.training for module in model.model.modules()]
    config = model.model.generation_config
    config.update(num_beams=3, num_return_sequences=2, repetition_penalty=2.0, stop_strings=["a"], eos_token_id=5)
    before = config.to_dict()
    TransformersStepper(model)
    assert [module.training for module in model.model.modules()] == modes
    assert model.model.generation_config is config and config.to_dict() == before
