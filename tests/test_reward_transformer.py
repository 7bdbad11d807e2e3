"""Rewards beside logits, on every kind of decoder."""

import copy
import importlib
import json
import pickle
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file  # noqa: E402 - comes with transformers
from tiny_decoders import MODELS, SIZES, build_model, build_tokenizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from leafkernels.lookahead import RewardChannel, RewardTransformer

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[lookahead]'")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [0, 0, 0, 2, 7, 1, 8, 2]])
MASK = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])


def rewards_by_definition(wrapped: RewardTransformer, **inputs: Any) -> torch.Tensor:
    """From hidden states that are kept. transformers lists h_0 ... h_{n-1} and h_n after the final norm."""
    hidden = wrapped.model(**inputs, output_hidden_states=True).hidden_states
    return wrapped.channel(hidden)


def wrap(name: str, seed: int = 1) -> RewardTransformer:
    model = build_model(name)
    torch.manual_seed(seed)
    return RewardTransformer(model, RewardChannel(3, 16, width=4)).eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_models_to_the_bit_and_rewards_those_of_the_channel(name: str) -> None:
    wrapped = wrap(name)
    for inputs in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": MASK}):
        with torch.no_grad():
            output = wrapped(**inputs)
            torch.testing.assert_close(output.rewards, rewards_by_definition(wrapped, **inputs))
            assert torch.equal(output.logits, build_model(name)(**inputs).logits)
    assert output.rewards.shape == IDS.shape


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_with_a_cache(name: str) -> None:
    wrapped = wrap(name)
    with torch.no_grad():
        whole = wrapped(input_ids=IDS)
        first = wrapped(input_ids=IDS[:, :5], use_cache=True)
        second = wrapped(input_ids=IDS[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.rewards, second.rewards], 1), whole.rewards, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_in_hooks_and_afterwards_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states that are kept until the end are still what each layer read: no layer has written to them."""
    wrapped = wrap(name)
    kept = []
    fused = RewardChannel.fused
    monkeypatch.setattr(RewardChannel, "fused", lambda *args: kept.append(len(args[1])) or fused(*args))
    with torch.no_grad():
        in_hooks = wrapped(input_ids=IDS).rewards
        assert kept == []
        monkeypatch.setattr(RewardChannel, "is_fused", lambda *_: not torch.is_grad_enabled())  # as on a GPU
        afterwards = wrapped(input_ids=IDS).rewards
        assert kept == [4]
    with_gradient = wrapped(input_ids=IDS).rewards
    assert kept == [4]
    torch.testing.assert_close(with_gradient.detach(), in_hooks)
    torch.testing.assert_close(afterwards, in_hooks)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "before"), [("llama", False), ("gpt2", True)])
def test_a_compiled_base(name: str, before: bool) -> None:
    """Compiled in place afterwards, or before it gets its channel: logits, rewards and gradients."""
    torch._dynamo.reset()
    wrapped = wrap(name)
    compiled = wrap(name)
    if before:
        base = torch.compile(build_model(name), backend="aot_eager")
        compiled = RewardTransformer(base, compiled.channel).eval()
    else:
        compiled.model.compile(backend="aot_eager")
    with torch.no_grad():
        expected, found = wrapped(input_ids=IDS), compiled(input_ids=IDS)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.rewards, expected.rewards)
    gradients = []
    for model in (wrapped, compiled):
        model(input_ids=IDS).rewards.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.channel.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected)


def test_a_frozen_model_keeps_no_graph_and_the_channel_learns() -> None:
    wrapped = wrap("llama")
    wrapped.model.requires_grad_(False)
    output = wrapped(input_ids=IDS)
    assert output.logits.grad_fn is None
    output.rewards.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in wrapped.channel.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen2-audio"])
def test_the_output_is_the_models_with_a_field_more(name: str) -> None:
    wrapped, inputs = wrap(name), {"input_ids": IDS, "labels": IDS, "output_hidden_states": True, "use_cache": True}
    with torch.no_grad():
        output, alone = wrapped(**inputs), build_model(name)(**inputs)
    assert isinstance(output, type(alone)) and output["rewards"] is output.rewards
    assert list(output) == [*alone, "rewards"] and len(alone) == 4 and output.attentions is None
    # As DDP and torch.compile take it apart and build it anew, and as a process is sent it.
    leaves, spec = tree_flatten(output)
    for other in (tree_unflatten(leaves, spec), type(output)(**output), pickle.loads(pickle.dumps(output))):
        assert type(other) is type(output) and list(other) == list(output)
        assert torch.equal(other.rewards, output.rewards) and torch.equal(other.logits, output.logits)


@pytest.mark.parametrize("finds", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_under_ddp(layers: int, finds: bool, tmp_path: Path) -> None:
    """It builds the output anew where it looks for unused parameters, and stops at one where it does not."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": layers}))
    wrapped = RewardTransformer(model.requires_grad_(False), RewardChannel(layers, 16, width=4))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(wrapped, find_unused_parameters=finds)
        for _ in range(2):
            parallel.zero_grad()
            output = parallel(input_ids=IDS)
            output.rewards.sum().backward()
    finally:
        dist.destroy_process_group()
    gradients = [parameter.grad for parameter in wrapped.channel.parameters()]
    wrapped.zero_grad()
    wrapped(input_ids=IDS)["rewards"].sum().backward()
    for parameter, gradient in zip(wrapped.channel.parameters(), gradients, strict=True):
        assert gradient.any() and torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    gradients = []
    for checkpoints in (False, True):
        wrapped = wrap(name).train()
        if checkpoints:
            wrapped.model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in wrapped.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        output = wrapped(input_ids=IDS, use_cache=False)
        (output.rewards.square().sum() + output.logits.square().mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in wrapped.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_under_peft() -> None:
    peft = pytest.importorskip("peft")
    model = build_model("llama")
    with_adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    torch.manual_seed(1)
    wrapped = RewardTransformer(with_adapter, RewardChannel(3, 16, width=4))
    output = wrapped(input_ids=IDS)
    torch.testing.assert_close(output.rewards, rewards_by_definition(wrapped, input_ids=IDS))
    output.rewards.sum().backward()
    adapters = [p for name, p in with_adapter.named_parameters() if "lora_B" in name]
    assert adapters and any(parameter.grad.any() for parameter in adapters)


def live_inputs_of_layers(model: Any, run: Any) -> list[bool]:
    """Whether what each layer has read is still in memory at the final norm."""
    read, alive = [], []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        read.append(weakref.ref(args[0] if args else kwargs["hidden_states"]))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    model.model.norm.register_forward_pre_hook(lambda *_: alive.extend(ref() is not None for ref in read))
    with torch.no_grad():
        run(input_ids=IDS)
    return alive


def test_keeps_no_hidden_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model by itself keeps its embeddings alone."""
    wrapped, model = wrap("llama"), build_model("llama")
    assert live_inputs_of_layers(model, model) == [True, False, False]
    assert live_inputs_of_layers(wrapped.model, wrapped) == [True, False, False]
    monkeypatch.setattr(RewardChannel, "is_fused", lambda *_: True)
    wrapped = wrap("llama")
    assert live_inputs_of_layers(wrapped.model, wrapped) == [True, True, True]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bfloat16_beside_a_channel_in_float32(name: str) -> None:
    wrapped = wrap(name)
    wrapped.model.to(torch.bfloat16)
    with torch.no_grad():
        found = wrapped(input_ids=IDS)
        torch.testing.assert_close(found.rewards, rewards_by_definition(wrapped, input_ids=IDS))
    assert found.rewards.dtype == torch.float32 and found.logits.dtype == torch.bfloat16


def test_saves_the_channel_alone(tmp_path: Path) -> None:
    wrapped = wrap("llama")
    wrapped.save_pretrained(tmp_path / "channel")
    assert sum(file.stat().st_size for file in (tmp_path / "channel").iterdir()) < 10_000
    read = RewardTransformer.from_pretrained(tmp_path / "channel", build_model("llama"))
    with torch.no_grad():
        assert torch.equal(read(input_ids=IDS).rewards, wrapped(input_ids=IDS).rewards)
    # And the base by its name.
    build_model("llama").save_pretrained(tmp_path / "base")
    settings = json.loads((tmp_path / "channel" / "reward_channel.json").read_text())
    settings["base"]["name"] = str(tmp_path / "base")
    (tmp_path / "channel" / "reward_channel.json").write_text(json.dumps(settings))
    named = RewardTransformer.from_pretrained(tmp_path / "channel", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(named(input_ids=IDS).rewards, wrapped(input_ids=IDS).rewards)
    with pytest.raises(
        ValueError, match="model must be the base of the channel in .* model_type llama, got model_type q"
    ):
        RewardTransformer.from_pretrained(tmp_path / "channel", build_model("qwen2"))
    larger = transformers.LlamaConfig(**{**SIZES, "vocab_size": 31, "hidden_size": 20, "num_hidden_layers": 2})
    with pytest.raises(
        ValueError,
        match="of num_hidden_layers 3, hidden_size 16, vocab_size 29, got num_hidden_layers 2, hidden_size 20, vocab_s",
    ):
        RewardTransformer.from_pretrained(tmp_path / "channel", transformers.LlamaForCausalLM(larger))


def test_a_base_that_hears_is_loaded_by_its_name(tmp_path: Path) -> None:
    wrapped = wrap("qwen2-audio")
    wrapped.model.save_pretrained(tmp_path / "base")
    wrapped.model.config.name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "channel")
    for name in ((), (str(tmp_path / "base"),)):
        read = RewardTransformer.from_pretrained(tmp_path / "channel", *name, attn_implementation="eager")
        assert type(read.model) is type(wrapped.model)
        with torch.no_grad():
            assert torch.equal(read(input_ids=IDS).rewards, wrapped(input_ids=IDS).rewards)


def test_a_base_with_an_adapter_is_loaded_by_its_folder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    wrapped = wrap("llama")
    wrapped.save_pretrained(tmp_path / "channel")
    wrapped.model.save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    read = RewardTransformer.from_pretrained(
        tmp_path / "channel", str(tmp_path / "adapter"), attn_implementation="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids=IDS).logits, adapted(input_ids=IDS).logits)
        assert not torch.equal(read(input_ids=IDS).logits, wrapped(input_ids=IDS).logits)


def in_threads(calls: list[Any]) -> list[Any]:
    """What the calls return, each in a thread of its own, which all begin together."""
    together = threading.Barrier(len(calls))

    def run(call: Any) -> Any:
        together.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.parametrize("mode", [False, True])
def test_threads_get_what_they_get_one_after_another(mode: bool) -> None:
    """Eight that score inputs of several lengths and generate, by turns; with dropout in training mode."""
    wrapped = wrap("gpt2")
    frozen = wrapped.model.transformer.h[1]
    if mode:
        wrapped.train()
        frozen.eval()
    modes = [module.training for module in wrapped.modules()]
    prompts = [
        torch.randint(29, (1, length), generator=torch.Generator().manual_seed(length)) for length in range(4, 12)
    ]
    options = {"width": 2, "chunk": 2, "depth": 1, "max_new_tokens": 6}

    def generates(prompt: torch.Tensor) -> Any:
        return wrapped.generate(prompt, **options)

    def scores(prompt: torch.Tensor) -> Any:
        with torch.no_grad():
            return [wrapped(input_ids=prompt).rewards for _ in range(3)]

    def both(number: int) -> list[Any]:
        turns = [generates, scores] if number % 2 else [scores, generates]
        # Scores in training mode drop out as chance has it.
        return [turn(prompts[number]) for _ in range(2) for turn in turns if turn is generates or not mode]

    expected = [both(number) for number in range(8)]
    found = in_threads([partial(both, number) for number in range(8)])
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            if isinstance(one, list):
                assert all(torch.equal(mine, alone) for mine, alone in zip(one, other, strict=True))
            else:
                assert one == other
    assert [module.training for module in wrapped.modules()] == modes


def test_the_last_of_two_searches_leaves_the_modes_as_the_first_found_them() -> None:
    """The first ends while the second is in the middle."""
    wrapped = wrap("gpt2").train()
    options = {"width": 2, "chunk": 1, "depth": 1, "max_new_tokens": 8, "eos_token_ids": ()}
    is_amid, may_go_on = threading.Event(), threading.Event()
    seen: list[bool] = []

    class Second(Heard):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.pieces) == 2:
                is_amid.set()
                assert may_go_on.wait(60)
            elif len(self.pieces) > 2:
                seen.extend(module.training for module in wrapped.modules())

    with ThreadPoolExecutor(1) as pool:
        started: list[Any] = []

        class First(Heard):
            def put(self, value: torch.Tensor) -> None:
                super().put(value)
                if len(self.pieces) == 2:
                    started.append(pool.submit(wrapped.generate, IDS[0], streamer=Second(), **options))
                    assert is_amid.wait(60)

        first = wrapped.generate(IDS[0], streamer=First(), **options)
        may_go_on.set()
        assert started[0].result() == first
    assert seen and not any(seen) and all(module.training for module in wrapped.modules())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda wrapped: pickle.loads(pickle.dumps(wrapped))])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_copies(name: str, way: Any) -> None:
    """They score and decode by their own weights, and neither needs the other."""
    wrapped = wrap(name)
    options = {"width": 2, "chunk": 2, "depth": 1, "max_new_tokens": 7}
    with torch.no_grad():
        expected, answer = wrapped(input_ids=IDS).rewards, wrapped.generate(IDS[0], **options)
        other = way(wrapped)
        assert torch.equal(other(input_ids=IDS).rewards, expected)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        changed = other(input_ids=IDS).rewards
        assert not torch.equal(changed, expected) and torch.equal(wrapped(input_ids=IDS).rewards, expected)
        base = wrapped.model
        del wrapped
        assert not hooks_of(base)
        assert torch.equal(other(input_ids=IDS).rewards, changed)
        again = RewardTransformer(base, way(other).channel).eval()
        for parameter in again.channel.parameters():
            parameter.div_(1.5)
        torch.testing.assert_close(again(input_ids=IDS).rewards, expected)
    assert again.generate(IDS[0], **options).token_ids == answer.token_ids


def hooks_of(model: torch.nn.Module) -> list[Any]:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]


def test_the_model_is_left_without_hooks_and_may_have_two_channels() -> None:
    model = build_model("llama")
    torch.manual_seed(2)
    channels = [RewardChannel(3, 16, width=4) for _ in range(2)]
    one, other = (RewardTransformer(model, channel) for channel in channels)
    with torch.no_grad():
        alone = [RewardTransformer(build_model("llama"), channel)(input_ids=IDS).rewards for channel in channels]
        assert torch.equal(one(input_ids=IDS).rewards, alone[0])
        assert torch.equal(other(input_ids=IDS).rewards, alone[1])
        shallow = copy.copy(one)
        del one
        assert torch.equal(shallow(input_ids=IDS).rewards, alone[0])
        del shallow
        assert torch.equal(other(input_ids=IDS).rewards, alone[1])
    del other
    assert not hooks_of(model)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="model must have a decoder with one list of its 3 layers, got BertModel"):
        sizes = {"vocab_size": 29, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
        RewardTransformer(transformers.BertModel(transformers.BertConfig(num_hidden_layers=3, **sizes)))
    with pytest.raises(TypeError, match="channel must be a RewardChannel, got str"):
        RewardTransformer(build_model("llama"), "x")
    with pytest.raises(ValueError, match="model must be a language model of transformers, got Linear"):
        RewardTransformer(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="channel must be of 3 layers and 16 numbers a token.*, got 2 and 16"):
        RewardTransformer(build_model("llama"), RewardChannel(2, 16))


def test_refuses_a_forward_that_leaves_a_layer_out() -> None:
    wrapped = wrap("llama")
    wrapped.model.model.layers[1] = build_model("llama").model.layers[1]
    with pytest.raises(RuntimeError, match="model must run the 3 layers that it had .*, got an output of 2 of them"):
        wrapped(input_ids=IDS)


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.tolist())

    def end(self) -> None:
        self.has_ended = True


class Metaspaces:
    """Tokens as SentencePiece has them: a space belongs to the word behind it, and is dropped at the very beginning."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f" {chr(ord('a') + int(i))}" for i in ids)[1:]


@pytest.mark.parametrize("with_space", [False, True])
def test_a_stop_string_that_is_the_first_token(with_space: bool) -> None:
    wrapped, tokenizer = wrap("llama"), Metaspaces() if with_space else Letters()
    options = {"chunk": 3, "depth": 1, "max_new_tokens": 12, "tokenizer": tokenizer}
    greedy = wrapped.generate(IDS[0], width=1, **options).token_ids
    for count in (1, 2):
        stop = " " * with_space + tokenizer.decode(greedy[:count])
        found = wrapped.generate(IDS[0], width=1, stop_strings=stop, **options)
        assert found.token_ids == greedy[:count] and found.finish_reason == "stop"
    # What the text does not hold is no stop.
    found = wrapped.generate(IDS[0], width=1, stop_strings="  " + tokenizer.decode(greedy[:1]), **options)
    assert found.token_ids == greedy


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint64])
def test_ids_of_every_integer_dtype(dtype: torch.dtype) -> None:
    wrapped = wrap("llama")
    options = {"width": 2, "chunk": 2, "depth": 1, "max_new_tokens": 5}
    expected = wrapped.generate(IDS[0], **options)
    assert wrapped.generate(IDS[0].to(dtype), **options) == expected
    for prompts in (IDS[:1].to(dtype), [IDS[0].to(dtype)]):
        assert wrapped.generate_all(prompts, **options) == [expected]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": IDS[0].bool()}, "input_ids must hold integers, got torch.bool"),
    ({"input_ids": IDS[0, :0]}, r"prompt_ids must have shape \(P,\) with P at least 1, got shape \(0,\)"),
    ({"input_ids": IDS[0] - 2}, "prompt_ids must lie between 0 and 28, got -1"),
    ({"input_ids": IDS[0] + 22}, "prompt_ids must lie between 0 and 28, got 31"),
    ({"width": 0}, "width must be at least 1, got 0"),
    ({"width": 99, "depth": 0}, "width must be at most the vocabulary, 29 ids, got 99"),
    ({"width": 30, "depth": 5}, "width and depth must keep"),
    ({"chunk": 1.5}, "chunk must be an int, got float"),
    ({"min_p": float("nan")}, "min_p must be finite, got nan"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"eos_token_ids": "x"}, "eos_token_ids must be an int or several of them, got 'x'"),
    ({"suppress_tokens": [3, 29]}, "suppress_tokens must lie between 0 and 28, got 29"),
    ({"suppress_tokens": -1}, "suppress_tokens must lie between 0 and 28, got -1"),
    ({"suppress_tokens": [1.5]}, "suppress_tokens must be an int or several of them"),
    ({"stop_strings": "a"}, "tokenizer must be given with stop_strings, got None"),
    ({"stop_strings": [""]}, "stop_strings must be a string or a list of them, none of them empty"),
    ({"inputs": [1]}, "inputs must be what a processor gives"),
    ({"attention_mask": torch.zeros(8)}, "prompt_ids must have shape"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_streamer_gets_nothing_of_a_call_that_is_refused(change: dict[str, Any], message: str) -> None:
    wrapped, streamer = wrap("llama").train(), Heard()
    with pytest.raises((TypeError, ValueError), match=message):
        wrapped.generate(**{"input_ids": IDS[0], "streamer": streamer, **change})
    assert streamer.pieces == [] and streamer.has_ended
    assert all(module.training for module in wrapped.modules())


def test_a_streamer_is_ended_where_the_search_fails() -> None:
    """Another thread would wait for it."""
    from transformers import TextIteratorStreamer

    wrapped = wrap("llama")
    with torch.no_grad():
        wrapped.channel.wide.fill_(torch.nan)
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=60)
    with pytest.raises(ValueError, match="finite rewards .*, got nan at forward 1"):
        wrapped.generate(IDS[0], streamer=streamer)
    assert list(streamer) == [""]
    heard = Heard()
    with pytest.raises(ValueError, match="got nan at forward 1"):
        wrapped.generate(IDS[0], streamer=heard)
    assert heard.pieces == [] and heard.has_ended
    # Once the prompt has run it has been given.
    wrapped = wrap("llama")
    wrapped.channel.reward = lambda hidden, state: hidden.new_full(
        hidden.shape[:2], torch.nan if hidden.shape[1] == 1 else 0
    )
    with pytest.raises(ValueError, match="got nan at forward 2"):
        wrapped.generate(IDS[0], streamer=(heard := Heard()))
    assert heard.pieces == [IDS[0].tolist()] and heard.has_ended

    class Breaks(Heard):
        def put(self, value: torch.Tensor) -> None:
            raise BrokenPipeError("gone")

        end = put

    with pytest.raises(BrokenPipeError, match="gone"):
        wrap("llama").generate(IDS[0], streamer=Breaks())
    with pytest.raises(TypeError, match="streamer must have put and end, as those of transformers, got str"):
        wrap("llama").generate(IDS[0], streamer="x")


def test_ids_of_the_config_that_the_model_does_not_have_are_passed_over() -> None:
    """As transformers does."""
    wrapped = wrap("llama")
    free = wrapped.generate(IDS[0], width=1, max_new_tokens=5, eos_token_ids=()).token_ids
    wrapped.model.generation_config.suppress_tokens = [-1, 29, 500]
    assert wrapped.generate(IDS[0], width=1, max_new_tokens=5, eos_token_ids=()).token_ids == free
    found = own_generate(wrapped, width=1, max_new_tokens=5, eos_token_id=None)
    assert found[0] == free


@pytest.mark.parametrize("name", MODELS)
def test_width_one_is_greedy(name: str) -> None:
    wrapped = wrap(name)
    prompt = IDS[:1, :5]
    greedy = wrapped.model.generate(prompt, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(prompt))
    streamer = Heard()
    found = wrapped.generate(prompt, width=1, chunk=4, depth=1, max_new_tokens=12, streamer=streamer)
    assert found.token_ids == greedy[0, 5:].tolist()
    assert streamer.pieces[0] == prompt[0].tolist() and sum(streamer.pieces[1:], []) == found.token_ids
    assert streamer.has_ended


@pytest.mark.parametrize("name", ["llama", "qwen2 with a window", "gemma2", "gpt2"])
def test_packed_branches_and_rows_give_the_same_answer(name: str) -> None:
    wrapped = wrap(name)
    found = [
        wrapped.generate(IDS[0], width=3, chunk=3, depth=1, max_new_tokens=20, packed=packed)
        for packed in (True, False)
    ]
    assert found[0].token_ids == found[1].token_ids and found[0].commits
    assert found[0].score == pytest.approx(found[1].score, rel=1e-4)


class Letters:
    """A tokenizer for whom a token is a letter."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(ord("a") + int(i)) for i in ids)


def test_streamers_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """One prints the chunks, the other hands them to another thread as they are committed."""
    from transformers import TextIteratorStreamer, TextStreamer

    wrapped, letters = wrap("llama"), Letters()
    options = {"width": 2, "chunk": 2, "depth": 1, "max_new_tokens": 7}
    found = wrapped.generate(IDS[0], streamer=TextStreamer(letters, skip_prompt=True), **options)
    assert capsys.readouterr().out.strip() == letters.decode(found.token_ids)
    streamer = TextIteratorStreamer(letters, skip_prompt=True)
    thread = threading.Thread(target=lambda: wrapped.generate(IDS[0], streamer=streamer, **options))
    thread.start()
    assert "".join(streamer) == letters.decode(found.token_ids)
    thread.join()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "padding"),
    [("llama", "left"), ("llama", "right"), ("mistral with a window", "left"), ("gpt2", "right")],
)
def test_several_prompts_get_the_answers_that_they_get_alone(name: str, padding: str, packed: bool) -> None:
    wrapped = wrap(name)
    options = {"width": 2, "chunk": 2, "depth": 1, "max_new_tokens": 11, "packed": packed, "eos_token_ids": (7, 20)}
    heard: list[list[int]] = [[], []]
    mask = MASK if padding == "left" else MASK.flip(1)
    together = wrapped.generate_all(IDS, mask, on_commit=lambda number, ids: heard[number].extend(ids), **options)
    alone = [wrapped.generate(row[seen.bool()], **options) for row, seen in zip(IDS, mask, strict=True)]
    for one, other, streamed in zip(together, alone, heard, strict=True):
        assert one.token_ids == other.token_ids == streamed and one.num_tokens == other.num_tokens
        assert one.score == pytest.approx(other.score, rel=1e-4)
    assert wrapped.generate_all([], **options) == []
    assert wrapped.generate(IDS[1:], mask[1:], **options).token_ids == alone[1].token_ids
    with pytest.raises(ValueError, match=r"for several prompts there is generate_all, got shape \(2, 8\)"):
        wrapped.generate(IDS)


@pytest.mark.parametrize("start", [8, 9, 10])  # over the border of two chunks of three, and within one
def test_stop_strings(start: int) -> None:
    wrapped, letters = wrap("llama"), Letters()
    options = {"width": 2, "chunk": 3, "depth": 1, "max_new_tokens": 30}
    whole = letters.decode(wrapped.generate(IDS[0], **options | {"width": 1}).token_ids)
    stop = whole[start : start + 3]
    found = wrapped.generate(IDS[0], **options | {"width": 1}, stop_strings=["never", stop], tokenizer=letters)
    text = letters.decode(found.token_ids)
    assert text == whole[: whole.index(stop) + len(stop)] and found.finish_reason == "stop"
    # Of several branches, each that holds it ends there.
    found = wrapped.generate(IDS[0], **options, stop_strings=stop[0], tokenizer=letters)
    text = letters.decode(found.token_ids)
    assert stop[0] not in text[:-1] and (text.endswith(stop[0]) == (found.finish_reason == "stop"))
    with pytest.raises(ValueError, match="tokenizer must be given with stop_strings"):
        wrapped.generate(IDS[0], stop_strings="a")
    for empty in ("", [""], ["a", ""], None, 3):
        with pytest.raises(ValueError, match="stop_strings must be a string or a list of them, none of them empty"):
            wrapped.generate(IDS[0], stop_strings=empty, tokenizer=letters)


def test_a_stop_string_goes_on_over_tokens_that_show_as_nothing() -> None:
    wrapped = wrap("llama")
    options = {"width": 1, "chunk": 3, "depth": 1, "max_new_tokens": 30, "eos_token_ids": ()}
    ids = wrapped.generate(IDS[0], **options).token_ids
    silent = ids[9]

    class Some(Letters):
        def decode(self, ids: Any, **_: Any) -> str:
            return super().decode([i for i in ids if i != silent])

    before, after = (next(i for i in part if i != silent) for part in (ids[8::-1], ids[10:]))
    stop = Letters().decode([before, after])
    found = wrapped.generate(IDS[0], **options, stop_strings=stop, tokenizer=Some())
    assert stop in Some().decode(found.token_ids) and found.finish_reason == "stop"
    assert stop not in Some().decode(found.token_ids[:-1]) and found.token_ids == ids[: len(found.token_ids)]


def own_generate(wrapped: RewardTransformer, model: Any = None, mask: Any = None, **options: Any) -> list[list[int]]:
    """What follows the prompts by the model's own ``generate``."""
    model = wrapped.model if model is None else model
    mask = torch.ones_like(IDS) if mask is None else mask
    options = {"max_new_tokens": 9, "eos_token_id": 20, "pad_token_id": 0, **options}
    found = model.generate(input_ids=IDS, attention_mask=mask, custom_generate=wrapped.custom_generate, **options)
    assert torch.equal(found[:, :8], IDS)
    return found[:, 8:].tolist()


def answers(found: Any) -> list[list[int]]:
    """Padded with 0 to the longest."""
    longest = max(len(result.token_ids) for result in found)
    return [result.token_ids + [0] * (longest - len(result.token_ids)) for result in found]


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(
    "changes", [{}, {"min_p": 1.0}, {"packed": False}, {"with_end": True}, {"suppress_tokens": list(range(9))}]
)
def test_in_the_models_own_generate(mask: torch.Tensor | None, changes: dict[str, Any]) -> None:
    """``custom_generate`` of transformers takes a callable: same answers, behind the prompts."""
    wrapped = wrap("llama")
    options = {"width": 2, "chunk": 1, "depth": 2, **changes}
    expected = answers(wrapped.generate_all(IDS, mask, **options, max_new_tokens=9, eos_token_ids=20))
    assert own_generate(wrapped, mask=mask, **options) == expected
    if changes and "packed" not in changes:
        plain = wrapped.generate_all(IDS, mask, width=2, chunk=1, depth=2, max_new_tokens=9, eos_token_ids=20)
        assert expected != answers(plain), "the option must make a difference here"


def test_in_the_generate_of_another_model() -> None:
    wrapped = wrap("llama")
    with pytest.raises(ValueError, match="called by the model that the channel runs beside"):
        own_generate(wrapped, build_model("llama"))
    with pytest.raises(ValueError, match=r"at 4 branches \(max_branches\), got 2 \*\* 3 = 8"):
        own_generate(wrapped, max_branches=4)


@pytest.mark.parametrize("kind", ["peft", pytest.param("compiled", marks=pytest.mark.slow)])
def test_in_the_generate_of_a_model_around_it(kind: str) -> None:
    """Which hands the model within to ``custom_generate``; greedy is its own greedy decoding."""
    model = build_model("llama")
    if kind == "peft":
        peft = pytest.importorskip("peft")
        sizes = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        outer = peft.get_peft_model(model, peft.LoraConfig(**sizes)).eval()
    else:
        outer = torch.compile(model, backend="eager")
    torch.manual_seed(1)
    wrapped = RewardTransformer(outer, RewardChannel(3, 16, width=4)).eval()
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "eos_token_id": 20, "pad_token_id": 0}
    greedy = outer.generate(**options, max_new_tokens=9, do_sample=False)[:, 8:].tolist()
    assert answers(wrapped.generate_all(IDS, width=1, max_new_tokens=9, eos_token_ids=20)) == greedy
    assert own_generate(wrapped, outer, width=1, chunk=2, depth=1) == greedy


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_keeps_its_mode_and_none_drops_out(fails: bool) -> None:
    """A base in evaluation mode within a module in training mode, and a base in training mode, with dropout."""
    wrapped = wrap("gpt2").train()
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in wrapped.modules())
    seen = []
    wrapped.model.register_forward_pre_hook(lambda *_: seen.extend(module.training for module in wrapped.modules()))
    options = {"width": 2, "chunk": 2, "depth": 1, "max_new_tokens": 7}
    expected = wrap("gpt2").generate(IDS[0], **options)
    for frozen in (wrapped.model, wrapped.model.transformer.h[1]):
        wrapped.train()
        frozen.eval()
        modes = [module.training for module in wrapped.modules()]
        assert any(modes) and not all(modes)
        if fails:
            with pytest.raises(ValueError, match="width must be at most the vocabulary"):
                wrapped.generate(IDS[0], width=99, depth=0)
        else:
            assert wrapped.generate(IDS[0], **options) == expected
        assert [module.training for module in wrapped.modules()] == modes
    assert seen and not any(seen)


def test_of_the_generation_config_only_ids_are_taken() -> None:
    wrapped = wrap("llama")
    options = {"width": 1, "chunk": 2, "depth": 1, "max_new_tokens": 9}
    plain = wrapped.generate(IDS[0], **options).token_ids
    wrapped.model.generation_config.repetition_penalty = 5.0
    greedy = wrapped.model.generate(
        IDS[:1], do_sample=False, max_new_tokens=9, attention_mask=torch.ones_like(IDS[:1]), pad_token_id=0
    )
    assert wrapped.generate(IDS[0], **options).token_ids == plain != greedy[0, 8:].tolist()
    wrapped.model.generation_config.eos_token_id = plain[4]
    assert wrapped.generate(IDS[0], **options).token_ids == plain[: plain.index(plain[4]) + 1]


def test_prompts_as_a_tokenizer_gives_them() -> None:
    wrapped, tokenizer = wrap("llama"), build_tokenizer()
    options = {"width": 2, "chunk": 2, "depth": 1, "max_new_tokens": 7}
    read = tokenizer(["abc", "defgh"], return_tensors="pt", padding=True)
    read.pop("token_type_ids", None)
    alone = [
        wrapped.generate(tokenizer(text, return_tensors="pt")["input_ids"], **options) for text in ("abc", "defgh")
    ]
    found = wrapped.generate_all(inputs=read, **options)
    assert [result.token_ids for result in found] == [result.token_ids for result in alone]
    one = {name: values[:1] for name, values in read.items()}
    assert wrapped.generate(inputs=one, **options).token_ids == alone[0].token_ids
    with pytest.raises(ValueError, match="input_ids must be given once, got it also in inputs"):
        wrapped.generate(IDS[0], inputs=one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": "hello"}, "input_ids must be a torch.Tensor, got str"),
        ({"input_ids": {"input_ids": IDS[0]}}, "input_ids must be a torch.Tensor, got dict"),
        ({"input_ids": [3, 1]}, "input_ids must be a torch.Tensor, got list"),
        ({"input_ids": None}, "input_ids must be a torch.Tensor, got NoneType"),
        ({"input_ids": IDS[0].float()}, "input_ids must hold integers, got torch.float32"),
        (
            {"attention_mask": torch.ones(3)},
            r"attention_mask must have the shape of input_ids, \(8,\), got shape \(3,\)",
        ),
        ({"attention_mask": [1] * 8}, "attention_mask must be a torch.Tensor, got list"),
        ({"attention_mask": torch.zeros(8)}, r"prompt_ids must have shape \(P,\) with P at least 1, got shape \(0,\)"),
        (
            {"inputs": {"kinds": torch.zeros(8)}, "attention_mask": torch.tensor([0] + [1] * 7)},
            "inputs must hold nothing by token, as kinds does, where attention_mask has padding",
        ),
        ({"inputs": [1]}, "inputs must be what a processor gives, tensors by name, got list"),
        ({"eos_token_ids": "ab"}, "eos_token_ids must be an int or several of them, got 'ab'"),
        ({"suppress_tokens": "ab"}, "suppress_tokens must be an int or several of them, got 'ab'"),
    ],
)
def test_generate_refuses(change: dict[str, Any], message: str) -> None:
    wrapped = wrap("llama")
    with pytest.raises((TypeError, ValueError), match=message):
        wrapped.generate(**{"input_ids": IDS[0], "max_new_tokens": 3, **change})
    many = {name: values[None] if isinstance(values, torch.Tensor) else values for name, values in change.items()}
    if isinstance(change.get("inputs"), dict):
        many["inputs"] = {name: values[None] for name, values in change["inputs"].items()}
    if isinstance(change.get("input_ids"), list):
        message = "prompt_ids must be a torch.Tensor, got int"
    with pytest.raises((TypeError, ValueError), match=message.replace("(8,", "(1, 8").replace("(3,", "(1, 3")):
        wrapped.generate_all(**{"input_ids": IDS[:1], "max_new_tokens": 3, **many})


def test_generate_all_refuses() -> None:
    wrapped = wrap("llama")
    with pytest.raises(ValueError, match=r"input_ids must have shape \(B, P\) or be a list .*, got shape \(8,\)"):
        wrapped.generate_all(IDS[0])
    with pytest.raises(ValueError, match="attention_mask must be None where input_ids is a list"):
        wrapped.generate_all([IDS[0]], torch.ones(1, 8))


@pytest.mark.parametrize("packed", [True, False])
def test_suppressed_tokens_are_never_taken(packed: bool) -> None:
    """Greedy agrees with ``generate``, and forks have no branch of them, however few tokens are left."""
    wrapped = wrap("llama")
    options = {"chunk": 2, "depth": 1, "max_new_tokens": 8, "eos_token_ids": (), "packed": packed}
    free = wrapped.generate(IDS[0], width=1, **options).token_ids
    banned = sorted({*free, *range(10)})
    wrapped.model.generation_config.suppress_tokens = banned
    greedy = wrapped.model.generate(
        IDS[:1], do_sample=False, max_new_tokens=8, attention_mask=torch.ones_like(IDS[:1]), pad_token_id=0
    )
    assert wrapped.generate(IDS[0], width=1, **options).token_ids == greedy[0, IDS.shape[1] :].tolist()
    assert wrapped.generate(IDS[0], width=1, suppress_tokens=(), **options).token_ids == free
    vocabulary = wrapped.config.vocab_size
    allowed = [free[0], *(set(range(vocabulary)) - set(free[:1]))][:2]
    found = wrapped.generate(
        IDS[0], width=4, suppress_tokens=[i for i in range(vocabulary) if i not in allowed], **options
    )
    assert {token for commit in found.commits for result in commit.candidates for token in result.token_ids} <= {
        *allowed
    }
    # Two tokens and two chunks.
    assert found.peak_branches == 4
    with pytest.raises(ValueError, match="a finite best logit, got -inf at forward 1"):
        wrapped.generate(IDS[0], suppress_tokens=range(vocabulary), **options)


@pytest.mark.parametrize("packed", [True, False])
def test_an_audio_model_looks_ahead_from_what_it_hears(packed: bool) -> None:
    pytest.importorskip("soundfile", reason="needs soundfile: pip install -e '.[speech]'")
    tiny_listeners = importlib.import_module("tiny_listeners")
    model, processor = tiny_listeners.qwen2_audio()
    scored = RewardTransformer(model.eval())
    numbers = torch.Generator().manual_seed(0)
    said, custom = [], {"custom_generate": scored.custom_generate, "do_sample": False}
    heard = ["<|audio_bos|><|AUDIO|><|audio_eos|>ab", "<|audio_bos|><|AUDIO|><|audio_eos|>hello"]
    for text, seconds in zip(heard, (0.4, 1.1), strict=True):
        clip = torch.randn(int(seconds * tiny_listeners.RATE), generator=numbers).numpy()
        audio = {"audio": [clip], "sampling_rate": tiny_listeners.RATE}
        read = dict(processor(text=[text], return_tensors="pt", **audio))
        ids, mask = read.pop("input_ids"), read.pop("attention_mask")
        greedy = model.generate(input_ids=ids, attention_mask=mask, **read, max_new_tokens=12, do_sample=False)
        found = scored.generate(ids, mask, inputs=read, width=1, chunk=3, depth=1, max_new_tokens=12, packed=packed)
        assert found.token_ids == greedy[0, ids.shape[1] :].tolist()
        whole = {"input_ids": ids, "attention_mask": mask, **read}
        in_its_own = model.generate(**whole, **custom, width=1, chunk=3, depth=1, max_new_tokens=12, packed=packed)
        assert torch.equal(in_its_own, greedy)
        silent = {**read, "input_features": torch.zeros_like(read["input_features"])}
        options = {"width": 2, "chunk": 2, "depth": 2, "max_new_tokens": 8, "packed": packed}
        ahead, other = (scored.generate(ids, inputs=features, **options) for features in (read, silent))
        assert ahead.score != other.score
        assert scored.generate(inputs=whole, **options) == ahead
        in_its_own = model.generate(**whole, **custom, **options)
        assert in_its_own[0, ids.shape[1] :].tolist() == ahead.token_ids
        said.append((ids[0], read, ahead))
    inputs = {name: torch.cat([read[name] for _, read, _ in said]) for name in said[0][1]}
    together = scored.generate_all([ids for ids, *_ in said], inputs=inputs, **options)
    assert [result.token_ids for result in together] == [ahead.token_ids for *_, ahead in said]


# --- The folder of a channel ------------------------------------------------------------------------------------------


def edit_settings(path: Path, **changes: Any) -> None:
    settings = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, inner = name.partition("__")
        within = settings[part] if inner else settings
        if value is None:
            del within[inner or part]
        else:
            within[inner or part] = value
    path.write_text(json.dumps(settings))


def edit_weights(path: Path, change: Any) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


SETTINGS, WEIGHTS = "reward_channel.json", "reward_channel.safetensors"
DAMAGES: dict[str, tuple[Any, str]] = {
    "an empty folder": (lambda folder: [file.unlink() for file in folder.iterdir()], f"which has no {SETTINGS}"),
    "no settings": (lambda folder: (folder / SETTINGS).unlink(), f"which has no {SETTINGS}"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} must be the file of weights .*, got none"),
    "a folder for weights": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
        f"{WEIGHTS} must be the file of weights .*, got none",
    ),
    **{
        f"weights cut to {share}": (
            lambda folder, share=share: (folder / WEIGHTS).write_bytes(
                (data := (folder / WEIGHTS).read_bytes())[: int(len(data) * share)]
            ),
            "must be a file of safetensors, got one that does not read",
        )
        for share in (0, 0.01, 0.5, 0.99)
    },
    "weights of another kind": (
        lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps({"wide": 1})),
        "must be a file of safetensors, got one that does not read",
    ),
    "a weight too few": (
        lambda folder: edit_weights(folder / WEIGHTS, lambda state: state.pop("narrow")),
        r"weights that reward_channel.json says, with narrow \(2, 4, 4\), got narrow absent",
    ),
    "a weight too many": (
        lambda folder: edit_weights(folder / WEIGHTS, lambda state: state.update(bias=torch.ones(3))),
        r"says, with bias absent, got bias \(3,\)",
    ),
    "a weight of another shape": (
        lambda folder: edit_weights(folder / WEIGHTS, lambda state: state.update(wide=torch.ones(3, 5, 16))),
        r"says, with wide \(3, 4, 16\), got wide \(3, 5, 16\)",
    ),
    "integers": (
        lambda folder: edit_weights(folder / WEIGHTS, lambda state: state.update(norm_wide=torch.ones(3, 16).int())),
        "must hold floating point, got norm_wide of torch.int32",
    ),
    "not a number": (
        lambda folder: edit_weights(folder / WEIGHTS, lambda state: state["narrow"][1, 0].fill_(torch.nan)),
        "must hold finite numbers, got narrow with others",
    ),
    "too large for float32": (
        lambda folder: edit_weights(folder / WEIGHTS, lambda s: s.update(wide=s["wide"].double().mul(1e300))),
        "must hold finite numbers, got wide with others",
    ),
    **{
        f"settings {text!r:.20}": (
            lambda folder, text=text: (folder / SETTINGS).write_bytes(text),
            f"{SETTINGS} must be JSON, got what does not read",
        )
        for text in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"channel": 1')
    },
    **{
        f"settings {text}": (
            lambda folder, text=text: (folder / SETTINGS).write_text(text),
            "must hold an object with the objects 'channel' and 'base', got",
        )
        for text in ("[]", "3", "null", '"channel"', "{}", '{"channel": {}}', '{"channel": 1, "base": {}}')
    },
    **{
        f"settings with {changes}": (
            lambda folder, changes=changes: edit_settings(folder / SETTINGS, **changes),
            message,
        )
        for changes, message in [
            (
                {"channel__width": None},
                "the arguments of a RewardChannel by the name 'channel', got .*: they",
            ),
            ({"channel__num_layers": None}, "arguments of a RewardChannel by .*: .*missing"),
            ({"channel__depth": 3}, "arguments of a RewardChannel by .*: .*unexpected"),
            ({"channel__width": "4"}, "arguments of a RewardChannel by .*: width must be an int, got str"),
            ({"channel__width": 4.5}, "arguments of a RewardChannel by .*: width must be an int, got float"),
            ({"channel__width": True}, "arguments of a RewardChannel by .*: width must be an int, got bool"),
            ({"channel__width": 0}, "arguments of a RewardChannel by .*: width must be at least 1, got 0"),
            ({"channel__width": 5}, r"says, with .*narrow \(2, 5, 5\).*, got .*narrow \(2, 4, 4\)"),
            ({"channel__width": 10**9}, r"says, with .*narrow \(2, 1000000000, 1000000000\)"),
            ({"channel__width": 10**30}, "arguments of a RewardChannel by "),
            ({"channel__head_layers": 10**9}, "arguments of a RewardChannel by .*: head_layers is more than the 5"),
            ({"channel__head_layers": [1]}, "arguments of a RewardChannel by "),
            ({"channel__num_layers": 10**9}, "says, with "),
            ({"channel__eps": float("nan")}, "arguments of a RewardChannel by .*: eps must be finite"),
            ({"channel__eps": "0"}, "arguments of a RewardChannel by .*: eps must be a number"),
            ({"base__name": None}, "must say name, model_type, num_hidden_layers, hidden_size, vocab_size of the base"),
            ({"base__name": 3}, "must say name, .* the name as a string, got"),
            ({"base__hidden_size": None}, "must say name, model_type, num_hidden_layers, hidden_size, vocab_size of"),
            ({"base__vocab_size": "29"}, "model must be the base of the channel in .* of vocab_size 29, got"),
            ({"base__model_type": ["llama"]}, "model must be the base of the channel in"),
        ]
    },
}


@pytest.fixture(scope="module")
def a_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "channel"
    RewardTransformer(build_model("llama"), RewardChannel(3, 16, width=4)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_a_sentence(damage: str, a_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(a_folder, tmp_path / "channel"))
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        RewardTransformer.from_pretrained(folder, build_model("llama"))
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_none(a_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder must be one that .*, got .*nowhere, which does not exist"):
        RewardTransformer.from_pretrained(tmp_path / "nowhere", build_model("llama"))
    with pytest.raises(ValueError, match="which is a file"):
        RewardTransformer.from_pretrained(a_folder / WEIGHTS, build_model("llama"))
    # Before a base is loaded.
    with pytest.raises(ValueError, match=f"which has no {SETTINGS}"):
        RewardTransformer.from_pretrained(tmp_path, "no/such model")
    with pytest.raises(ValueError, match="model must be given: the channel in .* beside a model without a name"):
        RewardTransformer.from_pretrained(a_folder)


def test_what_is_no_damage(a_folder: Path, tmp_path: Path) -> None:
    """A byte order mark, notes beside, weights of another precision; a channel of one layer, as it always was."""
    folder, base = Path(shutil.copytree(a_folder, tmp_path / "channel")), build_model("llama")
    expected = RewardTransformer.from_pretrained(a_folder, base).eval()(input_ids=IDS).rewards
    edit_settings(folder / SETTINGS, notes="ours")
    (folder / SETTINGS).write_bytes(b"\xef\xbb\xbf" + (folder / SETTINGS).read_bytes())
    edit_weights(folder / WEIGHTS, lambda s: s.update({name: tensor.double() for name, tensor in s.items()}))
    read = RewardTransformer.from_pretrained(folder, base).eval()
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in read.channel.parameters())
    assert torch.equal(read(input_ids=IDS).rewards, expected)
    read.save_pretrained(folder)  # over the file that it came from
    assert torch.equal(read(input_ids=IDS).rewards, expected)
    one = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1})).eval()
    wrapped = RewardTransformer(one, RewardChannel(1, 16, width=4))
    wrapped.save_pretrained(tmp_path / "one")
    assert load_file(tmp_path / "one" / WEIGHTS)["narrow"].shape == (0, 4, 4)
    read = RewardTransformer.from_pretrained(tmp_path / "one", one)
    assert torch.equal(read(input_ids=IDS).rewards, wrapped(input_ids=IDS).rewards)
