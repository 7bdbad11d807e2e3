"""What the server on vLLM makes of a request, and of its searches' texts; and its model class; all without vLLM."""

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoders import build_tokenizer

from leafkernels.lookahead import RewardChannel
from leafkernels.lookahead.__main__ import main
from leafkernels.lookahead.folder import write_channel
from leafkernels.lookahead.vllm import AsyncVLLMStepper, VLLMStepper, engine_arguments
from leafkernels.lookahead.vllm.asked import Asked, Limits, RefusedError, Text, check_limits, read
from leafkernels.lookahead.vllm.model import _with_rewards, check_config
from leafkernels.lookahead.vllm.room import Room

pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[lookahead]'")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def ask(body: Any, tokenizer: Any, is_chat: bool = False, limits: Limits | None = None) -> Asked:
    return read(
        body,
        is_chat=is_chat,
        models=["tiny", "other name"],
        longest=40,
        vocabulary=29,
        limits=limits or Limits(),
        tokenizer=tokenizer,
    )


def test_a_request_that_says_little(tokenizer: Any) -> None:
    found = ask({"prompt": "abc"}, tokenizer)
    assert found.prompts == [[3, 4, 5]]
    assert found.search == {
        "width": 2,
        "chunk": 10,
        "depth": 2,
        "min_p": 0.0,
        "with_end": False,
        "max_new_tokens": 16,
        "max_branches": 64,
    }
    assert (found.stops, found.is_streamed, found.with_usage, found.branches) == ([], False, False, 8)


def test_a_request_that_says_much(tokenizer: Any) -> None:
    body = {"model": "other name", "prompt": ["ab", [7, 8, 9]], "max_tokens": 5, "stop": "q", "stream": True}
    body |= {"width": 3, "chunk": 1, "depth": 1, "min_p": 0.25, "with_end": True, "temperature": 0, "top_p": 1.0}
    body |= {"stream_options": {"include_usage": True}, "n": 1, "user": "me", "seed": None, "logprobs": None}
    found = ask(body, tokenizer)
    assert found.prompts == [[3, 4], [7, 8, 9]]
    assert (found.stops, found.is_streamed, found.with_usage, found.branches) == (["q"], True, True, 27)
    assert {
        name: found.search[name] for name in ("width", "chunk", "depth", "min_p", "with_end", "max_new_tokens")
    } == {
        "width": 3,
        "chunk": 1,
        "depth": 1,
        "min_p": 0.25,
        "with_end": True,
        "max_new_tokens": 5,
    }


def test_a_chat_has_the_template_and_the_room_that_is_left(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]
    messages = [{"role": "user", "content": "ab"}, {"role": "user", "content": parts}]
    found = ask({"messages": messages}, tokenizer, is_chat=True)
    assert found.prompts == [[3, 4, 5, 6]]
    assert found.search["max_new_tokens"] == 36
    assert ask({"messages": messages, "max_completion_tokens": 7}, tokenizer, True).search["max_new_tokens"] == 7


MESSAGES = [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ([], "the body must be a JSON object, got list", None),
        ({}, "prompt must be a text, or ids from 0 to 28, or several of them, got None", "prompt"),
        ({"prompt": ""}, "prompt must have a token, got ''", "prompt"),
        ({"prompt": []}, "prompt must be a text", "prompt"),
        ({"prompt": [1, 29]}, "prompt must be a text, or ids from 0 to 28", "prompt"),
        ({"prompt": [True]}, "prompt must be a text, or ids from 0 to 28", "prompt"),
        ({"prompt": ["a", 3]}, "prompt must be a text, or ids from 0 to 28", "prompt"),
        ({"prompt": "a" * 40}, "prompt must leave room for an answer in 40 tokens, got 40", "prompt"),
        ({"prompt": "a", "max_tokens": 40}, "max_tokens must be at most 39, what a prompt of 1 tokens", "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1, got 0", "max_tokens"),
        ({"prompt": "a", "max_tokens": 2.5}, "max_tokens must be int, got 2.5", "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens must be int, got True", "max_tokens"),
        ({"prompt": "a", "stream": 1}, "stream must be bool, got 1", "stream"),
        ({"prompt": "a", "stream_options": {"include_usage": "yes"}}, "include_usage must be bool", "include_usage"),
        ({"prompt": "a", "stop": ["b", ""]}, "stop must be a string or up to 16 of them", "stop"),
        ({"prompt": "a", "stop": ["b"] * 17}, "stop must be a string or up to 16 of them", "stop"),
        ({"prompt": "a", "temperature": 0.7}, "temperature must be 0 or absent, .* got 0.7", "temperature"),
        ({"prompt": "a", "temperature": False}, "temperature must be 0 or absent, .* got False", "temperature"),
        ({"prompt": "a", "n": 2}, "n must be 1 or absent", "n"),
        ({"prompt": "a", "logprobs": 0}, "logprobs must be False or absent", "logprobs"),
        ({"prompt": "a", "echo": True}, "echo must be False or absent", "echo"),
        ({"prompt": "a", "messages": MESSAGES}, "messages is not an argument of this endpoint", "messages"),
        ({"prompt": "a", "wide": 2}, "wide is not an argument of this endpoint, got 2", "wide"),
        ({"prompt": "a", "width": 0}, "width must be at least 1, got 0", "width"),
        ({"prompt": "a", "width": 17}, "width must be at most 16, got 17", "width"),
        ({"prompt": "a", "width": 4}, r"width and depth must keep width \*\* \(depth \+ 1\) at 64", None),
        ({"prompt": "a", "width": 5, "depth": 2}, "width and depth must keep", "width"),
        ({"prompt": "a", "width": "2"}, "width must be int, got '2'", "width"),
        ({"prompt": "a", "min_p": 2}, "min_p must lie between 0 and 1, got 2", "min_p"),
        ({"prompt": "a", "min_p": float("nan")}, "min_p must be finite", "min_p"),
        ({"prompt": "a", "depth": 10**9}, "width and depth must keep", "width"),
    ],
)
def test_what_is_refused(body: Any, message: str, param: str | None, tokenizer: Any) -> None:
    if param is None and isinstance(body, dict):  # 4 ** 3 is the most
        assert ask(body, tokenizer).branches == 64
        return
    with pytest.raises(RefusedError, match=message) as refused:
        ask(body, tokenizer)
    error = refused.value.body["error"]
    assert (refused.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages must be a list of objects with role and content, texts, got None"),
        ([], "messages must be a list"),
        (["ab"], "messages must be a list"),
        ([{"role": "user"}], "messages must be a list"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages must be a list"),
        ([{"role": "user", "content": "a" * 41}], "messages must leave room for an answer in 40 tokens, got 41"),
    ],
)
def test_messages_that_are_refused(messages: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(RefusedError, match=message):
        ask({"messages": messages}, tokenizer, is_chat=True)


def test_a_model_without_a_template_and_a_template_that_raises(tokenizer: Any) -> None:
    bare = build_tokenizer()
    with pytest.raises(RefusedError, match="the model has no chat template: ask /v1/completions"):
        ask({"messages": MESSAGES}, bare, is_chat=True)
    bare.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(RefusedError, match="messages must fit the model's chat template: no such role"):
        ask({"messages": MESSAGES}, bare, is_chat=True)


def test_another_model_is_not_found(tokenizer: Any) -> None:
    with pytest.raises(RefusedError, match="model must be tiny or other name, got 'gpt'") as refused:
        ask({"prompt": "a", "model": "gpt"}, tokenizer)
    assert refused.value.status == 404
    assert refused.value.body["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_branches": 300}, "max_branches must be at most all_branches, 256, got 300"),
        ({"all_branches": 0}, "all_branches must be at least 1, got 0"),
        ({"width": 9}, "width and depth must keep"),
        ({"width": 20, "depth": 0}, "width must be at most 16, got 20"),
        ({"max_waiting": -1}, "max_waiting must be at least 0, got -1"),
    ],
)
def test_limits_that_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_limits(Limits(**limits))


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


@settings(max_examples=200)
@given(
    st.text(alphabet="abé€🙂", max_size=12),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=2),
    st.text(alphabet="aé🙂", max_size=3),
    st.randoms(use_true_random=False),
)
def test_streamed_text_is_the_whole_up_to_a_stop(text: str, stops: list[str], before: str, choose: Any) -> None:
    """In chunks that cut characters and stop strings; nothing is handed out that is not in the answer."""
    wanted, found = text, [stop for stop in stops if stop in text]
    if found:
        # The answer ends with the token that completes a stop string.
        text = text[: min(text.index(stop) + len(stop) for stop in found)]
        wanted = text[: min(text.index(stop) for stop in stops if stop in text)]
    ids, out = list(text.encode()), Text(Bytes(), list(before.encode())[1:], stops)
    pieces = []
    while ids:
        size = choose.randint(1, 4)
        pieces.append(out.add(ids[:size]))
        ids = ids[size:]
        assert wanted.startswith("".join(pieces))
    pieces.append(out.add([], is_end=True))
    assert "".join(pieces) == wanted


def test_room_is_given_in_order_and_taken_back() -> None:
    async def run() -> list[int]:
        room, order, running, most = Room(10, 100), [], 0, 0
        choose = random.Random(0)

        async def one(number: int, branches: int) -> None:
            nonlocal running, most
            async with room.hold(branches):
                order.append(number)
                running += branches
                most = max(most, running)
                try:
                    await asyncio.sleep(0.001)
                finally:
                    running -= branches

        tasks = [asyncio.create_task(one(n, choose.randint(1, 10))) for n in range(40)]
        await asyncio.sleep(0)
        for task in tasks[5::7]:  # some leave while they wait, some while they run
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (running, most) == (0, 10)
        await asyncio.wait_for(one(40, 10), 1)
        return order

    order = asyncio.run(run())
    assert order == sorted(order)
    assert set(order) >= {n for n in range(40) if n % 7 != 5}


def test_room_passes_over_one_that_leaves_as_it_is_given() -> None:
    async def run(leaves_late: bool) -> None:
        room, served = Room(1, 9), []

        async def one(number: int) -> None:
            async with room.hold(1):
                served.append(number)

        async with room.hold(1):
            first, second = (asyncio.create_task(one(number)) for number in (1, 2))
            await asyncio.sleep(0)
            if not leaves_late:
                first.cancel()
        if leaves_late:  # it has room, and does not know it yet
            first.cancel()
        await asyncio.wait_for(second, 5)
        await asyncio.gather(first, return_exceptions=True)
        assert served == [2]
        room.check(1)
        assert not room._must_wait(1)

    asyncio.run(run(True))
    asyncio.run(run(False))


def test_too_many_that_wait_are_refused() -> None:
    async def run() -> None:
        room = Room(1, 1)
        async with room.hold(1):
            waiting = asyncio.create_task(room.hold(1).__aenter__())
            await asyncio.sleep(0)
            with pytest.raises(RefusedError, match="1 searches wait already") as refused:
                async with room.hold(1):
                    pass
            assert refused.value.status == 429
        await waiting
        # Where none may wait, those that need not are served.
        room = Room(2, 0)
        async with room.hold(2):
            with pytest.raises(RefusedError, match="0 searches wait already"):
                room.check(1)
        room.check(2)

    asyncio.run(run())


def test_serving_says_what_it_needs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", "--channel", str(tmp_path), "--width", "0"]) == 2
    assert "width must be at least 1, got 0" in capsys.readouterr().err


def test_an_engine_without_rewards_is_refused() -> None:
    config = SimpleNamespace(hf_config=SimpleNamespace(), logprobs_mode="raw_logits", max_model_len=9)
    engine = SimpleNamespace(model_config=config)
    with pytest.raises(
        ValueError, match=r"llm must be an engine of engine_arguments\(model, channel\), got .* without a"
    ):
        AsyncVLLMStepper(engine)
    config.hf_config.reward_channel, config.logprobs_mode = "folder", "raw_logprobs"
    with pytest.raises(ValueError, match="got one with logprobs_mode='raw_logprobs'"):
        VLLMStepper(SimpleNamespace(llm_engine=engine))
    config.logprobs_mode = "raw_logits"
    with pytest.raises(ValueError, match="ahead must be at least 1, got 0"):
        VLLMStepper(SimpleNamespace(llm_engine=engine), ahead=0)
    VLLMStepper(SimpleNamespace(llm_engine=engine))


def test_vllm_must_find_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    point = SimpleNamespace(name="leafkernels", value="leafkernels.lookahead.vllm:register")
    found = [SimpleNamespace(name="other", value="other:register")]
    monkeypatch.setattr("leafkernels.lookahead.vllm.engine.entry_points", lambda group: found)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    with pytest.raises(ValueError, match="leafkernels must be installed .* for vLLM to find its plugin, got none"):
        engine_arguments("model", "channel")
    found.append(point)
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ValueError, match="VLLM_PLUGINS must name leafkernels too, got 'other'"):
        engine_arguments("model", "channel")
    monkeypatch.setenv("VLLM_PLUGINS", "other,leafkernels")
    with pytest.raises(ValueError, match="max_logprobs must be left to the rewards' engine, got 5"):
        engine_arguments("model", "channel", max_logprobs=5)
    with pytest.raises(TypeError, match="hf_overrides must be a dict, got <function"):
        engine_arguments("model", "channel", hf_overrides=lambda config: config)


class Base(torch.nn.Module):
    """What a model of vLLM is to the plugin."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layers = torch.nn.Embedding(29, 16), (1, 2)
        self.embedding.to(vllm_config.dtype)

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        self.layers = layers

    def forward(self, ids: torch.Tensor) -> Any:
        hidden = self.embedding(ids)
        inputs = [hidden * (layer + 1) for layer in self.layers]
        return (hidden, inputs) if inputs else hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.embedding.weight.T

    def load_weights(self, weights: Any) -> set[str]:
        return {name for name, _ in weights}


def config_of(folder: Path | None, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    sizes = {"model_type": "tiny", "num_hidden_layers": 3, "hidden_size": 16, "vocab_size": 29, "name_or_path": "tiny"}
    hf_config = SimpleNamespace(**sizes, reward_channel=None if folder is None else str(folder))
    hf_config.get_text_config = lambda: hf_config
    found = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        speculative_config=None,
        load_config=SimpleNamespace(load_format="auto"),
        device_config=SimpleNamespace(device="cpu"),
        dtype=dtype,
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_carry_the_reward_to_the_bit_and_the_same_probabilities(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    channel = RewardChannel(3, 16, 8)
    model = SimpleNamespace(config=config_of(None).model_config.hf_config)
    write_channel(tmp_path, channel.settings, channel.state_dict(), model)
    served = _with_rewards(Base)(vllm_config=config_of(tmp_path, dtype))
    ids, picked = torch.arange(12), torch.tensor([11, 3, 3, 0])
    hidden = served(ids)
    assert hidden.dtype == dtype
    bare, inputs = Base.forward(served, ids)
    logits = served.compute_logits(hidden[picked])
    with torch.no_grad():
        rewards = channel([*inputs, bare])[picked]
        wanted = Base.compute_logits(served, bare[picked]).float()
    assert torch.equal(logits.amax(-1), rewards)
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
    torch.testing.assert_close(logits.softmax(-1), wanted.softmax(-1), rtol=1e-5, atol=1e-6)
    # Weights come anew, also where they were dropped, and vLLM is told which.
    served.reward_channel.wide.zero_()
    names = served.load_weights([("embedding.weight", None)])
    assert names == {"embedding.weight", *(f"reward_channel.{name}" for name in channel.state_dict())}
    assert torch.equal(served.reward_channel.wide, channel.wide)


def test_a_model_that_hands_out_no_layers_is_refused(tmp_path: Path) -> None:
    channel = RewardChannel(3, 16, 8)
    model = SimpleNamespace(config=config_of(None).model_config.hf_config)
    write_channel(tmp_path, channel.settings, channel.state_dict(), model)
    served = _with_rewards(Base)(vllm_config=config_of(tmp_path))
    served.layers = ()
    with pytest.raises(ValueError, match="model must hand out the inputs of its 3 layers, got none"):
        served(torch.arange(3))
    served.layers = (0, 1)
    with pytest.raises(ValueError, match="model must hand out the inputs of its 3 layers, got 2"):
        served(torch.arange(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "pipeline_parallel_size must be 1, .* got 2"),
        ({"speculative_config": object()}, "speculative_config must be None"),
        ({"load_config": SimpleNamespace(load_format="dummy")}, "load_format must be one that loads weights"),
    ],
)
def test_an_engine_that_would_give_other_rewards_is_refused(changes: Any, message: str, tmp_path: Path) -> None:
    check_config(config_of(tmp_path))
    with pytest.raises(ValueError, match=message):
        check_config(config_of(tmp_path, **changes))
    with pytest.raises(ValueError, match="hf_overrides must name the folder of a channel"):
        check_config(config_of(None))
