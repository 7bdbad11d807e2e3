"""Look-ahead on vLLM's engines: it needs another transformers, so ``.ci/run`` gives it packages of its own.

``LEAFKERNELS_VLLM`` names the Python that has them. Where this one has them too (``pip install -e '.[vllm]'``), the
tests run here.
"""

import asyncio
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoders import SIZES, build_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[lookahead]'")

from leafkernels.lookahead import RewardChannel, RewardTransformer, Search, TransformersStepper, search_all
from leafkernels.lookahead.vllm import AsyncVLLMStepper, VLLMStepper, engine_arguments, search_async
from leafkernels.lookahead.vllm.asked import Limits

OWN_PYTHON = os.environ.get("LEAFKERNELS_VLLM", "")
HERE = importlib.util.find_spec("vllm") is not None
pytestmark = pytest.mark.slow
on_vllm = pytest.mark.skipif(not HERE, reason="needs vLLM: pip install -e '.[vllm]', or LEAFKERNELS_VLLM")

# One engine of a process at a time, in it, and none of what is compiled or cached for later.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
ENGINE = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 64, "block_size": 32}
FAMILIES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
OPTIONS: dict[str, Any] = {"width": 2, "chunk": 4, "depth": 1, "max_new_tokens": 24, "eos_token_ids": [1]}
PROMPTS = [torch.tensor(prompt) for prompt in ([3, 4, 5, 6], [7, 8, 9], [*range(2, 60)])]


@pytest.mark.skipif(HERE or not OWN_PYTHON, reason="needs LEAFKERNELS_VLLM: a Python that has vLLM")
def test_in_packages_of_its_own() -> None:
    command = [OWN_PYTHON, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed, 1 skipped", done.stdout), done.stdout


def save(folder: Path, family: str) -> tuple[Path, Path]:
    """A tiny model with its tokenizer, and a channel."""
    import transformers

    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 64, "hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
    sizes |= {"max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, FAMILIES[family])(**sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config = transformers.GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder / family)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / family)
    channel = RewardTransformer(model, RewardChannel(3, 64, 16))
    channel.save_pretrained(folder / f"{family}-channel")
    return folder / family, folder / f"{family}-channel"


@pytest.fixture(scope="module", autouse=True)
def settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save(folder, family) for family in FAMILIES}


def same(found: Search, wanted: Search, within: float = 2e-6) -> None:
    """Tokens, commits and counts are equal; scores and values to rounding."""
    assert found.token_ids == wanted.token_ids
    assert found.score == pytest.approx(wanted.score, abs=within)
    assert [commit.token_ids for commit in found.commits] == [commit.token_ids for commit in wanted.commits]
    for mine, theirs in zip(found.commits, wanted.commits, strict=True):
        assert (mine.forward, mine.chosen) == (theirs.forward, theirs.chosen)
        for one, other in zip(mine.candidates, theirs.candidates, strict=True):
            assert one._replace(value=0.0) == other._replace(value=0.0)
            assert one.value == pytest.approx(other.value, abs=within)
    rest = ("finish_reason", "num_forwards", "peak_branches", "num_tokens")
    assert [getattr(found, name) for name in rest] == [getattr(wanted, name) for name in rest]


@on_vllm
@pytest.mark.parametrize("family", FAMILIES)
def test_searches_are_those_on_transformers(family: str, saved: dict[str, tuple[Path, Path]]) -> None:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    model, channel = saved[family]
    stepper = TransformersStepper(RewardTransformer.from_pretrained(channel, str(model)))
    llm = LLM(**engine_arguments(str(model), channel, dtype="float32", **ENGINE))
    changes: list[tuple[int, dict[str, Any]]] = [(4, {}), (9, {"min_p": 0.3, "with_end": True})]
    if family == "qwen2":
        changes += [(1, {"width": 3, "chunk": 1}), (3, {"chunk": 2, "depth": 2}), (8, {"width": 1})]
    for ahead, change in changes:
        options = {**OPTIONS, **change}
        ours = VLLMStepper(llm, ahead=ahead, eos_token_ids=[1])
        both = search_all(ours, PROMPTS, **options), search_all(stepper, PROMPTS, **options)
        for found, wanted in zip(*both, strict=True):
            same(found, wanted)
    # Suppressed ids are taken nowhere, also where they are the best.
    (greedy,) = search_all(stepper, PROMPTS[:1], **{**OPTIONS, "width": 1})
    banned = sorted({*greedy.token_ids} - {1})[:3]
    ours = VLLMStepper(llm, ahead=4, eos_token_ids=[1], suppress_tokens=banned)
    theirs = TransformersStepper(stepper._model, suppress_tokens=banned)
    both = search_all(ours, PROMPTS, **OPTIONS), search_all(theirs, PROMPTS, **OPTIONS)
    for found, wanted in zip(*both, strict=True):
        same(found, wanted)
        assert not {*found.token_ids} & {*banned}
    # What the prompt and its branches share is run once, in whole blocks.
    long = torch.arange(192) % 50 + 2
    before = VLLMStepper(llm, ahead=4, eos_token_ids=[1])
    (found,) = search_all(before, [long], **OPTIONS)
    assert before.num_computed < 192 + before.num_requests * (32 + 4 + 1)
    # One that is cut short by the engine says so.
    with pytest.raises(ValueError, match="prompt and answer must have at most 255 tokens"):
        search_all(VLLMStepper(llm, ahead=4), [long], **{**OPTIONS, "max_new_tokens": 80, "eos_token_ids": []})
    with pytest.raises(ValueError, match="width must be at most 20"):
        search_all(VLLMStepper(llm), [long], **{**OPTIONS, "width": 21, "depth": 0})
    del llm, ours, before
    cleanup_dist_env_and_memory()


@on_vllm
def test_bfloat16_has_the_rewards_of_transformers(saved: dict[str, tuple[Path, Path]]) -> None:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    model, channel = saved["qwen3"]
    theirs = RewardTransformer.from_pretrained(channel, str(model), dtype=torch.bfloat16)
    whole = RewardTransformer.from_pretrained(channel, str(model))
    llm = LLM(**engine_arguments(str(model), channel, dtype="bfloat16", **ENGINE))
    stepper, tokens = VLLMStepper(llm), [*range(2, 34)]
    rewards = [float(stepper.prefill(torch.tensor(tokens[:n]))[1]) for n in (1, 2, 5, 17, 32)]
    with torch.no_grad():
        wanted, exact = (m(input_ids=torch.tensor([tokens])).rewards[0, [0, 1, 4, 16, 31]] for m in (theirs, whole))
    # Each is off the exact ones by the rounding of bfloat16, and by other roundings.
    error = (wanted - exact).abs().max()
    assert error > 0
    assert (torch.tensor(rewards) - exact).abs().max() < 4 * error
    del llm, stepper
    cleanup_dist_env_and_memory()


@on_vllm
def test_what_is_refused(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    import transformers

    from leafkernels.lookahead.vllm.model import reward_class

    model, channel = saved["llama"]
    with pytest.raises(FileNotFoundError, match="folder must be one that RewardTransformer.save_pretrained wrote"):
        engine_arguments(str(model), tmp_path / "none")
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model must be the base of the channel in .* of model_type llama, got"):
        engine_arguments(str(saved["qwen2"][0]), channel)
    said = json.loads((channel / "reward_channel.json").read_text())
    said["base"] |= {"model_type": "gpt2", "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 50257}
    (tmp_path / "reward_channel.json").write_text(json.dumps(said))
    (tmp_path / "reward_channel.safetensors").write_bytes((channel / "reward_channel.safetensors").read_bytes())
    with pytest.raises(ValueError, match="hands out the hidden states of its layers in vLLM .* got GPT2LMHeadModel"):
        engine_arguments(str(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="model must be of an architecture that this vLLM has, got Nonesuch"):
        reward_class("Nonesuch")


@asynccontextmanager
async def serving(engine: Any, limits: Limits, make_stepper: Any = AsyncVLLMStepper) -> AsyncIterator[Any]:
    """A client of a server in this process."""
    import httpx
    import uvicorn

    from leafkernels.lookahead.vllm.server import Server

    config = uvicorn.Config(Server(engine, limits, "secret", make_stepper).app(), port=0, log_level="error")
    socket, server = config.bind_socket(), uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[socket]))
    try:
        address = f"http://127.0.0.1:{socket.getsockname()[1]}"
        limit = httpx.Limits(max_connections=None)
        headers = {"authorization": "Bearer secret"}
        async with httpx.AsyncClient(base_url=address, timeout=600, limits=limit, headers=headers) as client:
            while not server.started:
                await asyncio.sleep(0.02)
            yield client
    finally:
        server.should_exit = True
        await task


async def streamed(client: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    events = []
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                events.append(json.loads(line.removeprefix("data: ")))
    return events


async def settled(engine: Any) -> None:
    """Wait until the engine has no request."""
    for _ in range(200):
        if not engine.output_processor.request_states:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("requests are left in the engine")


@on_vllm
def test_the_server_under_load(saved: dict[str, tuple[Path, Path]]) -> None:
    asyncio.run(_under_load(*saved["qwen2"]))


async def _under_load(model: Path, channel: Path) -> None:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = engine_arguments(str(model), channel, dtype="float32", served_model_name="tiny", **ENGINE)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        # Searches at once, as transformers has them.
        theirs = TransformersStepper(RewardTransformer.from_pretrained(channel, str(model)))
        wanted = search_all(theirs, PROMPTS, **OPTIONS)
        for ahead in (4, 9):
            chunks: list[list[int]] = []
            steppers = [AsyncVLLMStepper(engine, ahead=ahead, eos_token_ids=[1]) for _ in PROMPTS]
            pairs = zip(steppers, PROMPTS, strict=True)
            tasks = [search_async(one, prompt, on_commit=chunks.append, **OPTIONS) for one, prompt in pairs]
            for found, other in zip(await asyncio.gather(*tasks), wanted, strict=True):
                same(found, other)
            assert sum(map(len, chunks)) == sum(len(found.token_ids) for found in wanted)
        # One that is cancelled leaves nothing.
        lone = AsyncVLLMStepper(engine, ahead=200)
        task = asyncio.create_task(search_async(lone, PROMPTS[0], width=2, chunk=100, depth=1, max_new_tokens=200))
        while not engine.output_processor.request_states:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await settled(engine)
        limits = Limits(all_branches=16, max_branches=16, width=2, chunk=4, depth=1)
        async with serving(engine, limits) as client:
            await _answers(client, wanted, engine.get_tokenizer())
            await _load(client, engine)
        async with serving(engine, limits, Broken) as client:
            await _fail(client)
        await settled(engine)
    finally:
        engine.shutdown()


class Broken(AsyncVLLMStepper):
    """An engine that fails once an answer has begun."""

    calls = 0

    async def extend(self, parents: torch.Tensor, token_ids: torch.Tensor) -> Any:
        self.calls += 1
        if self.calls == 9:
            raise RuntimeError("no memory")
        return await super().extend(parents, token_ids)


async def _fail(client: Any) -> None:
    """More often than there is room for, if it were not given back."""
    body = {"prompt": "abc", "max_tokens": 24, "width": 4, "depth": 1, "chunk": 2}
    for _ in range(3):
        failed = await client.post("/v1/completions", json=body)
        assert failed.status_code == 500
        assert failed.json()["error"] | {"param": None, "code": None} == {
            "message": "the search has failed: no memory",
            "type": "server_error",
            "param": None,
            "code": None,
        }
        *begun, last = await streamed(client, "/v1/completions", body)
        assert begun and all("choices" in event for event in begun)
        assert last["error"]["message"] == "the search has failed: no memory"


async def _answers(client: Any, wanted: list[Search], tokenizer: Any) -> None:
    body = {"prompt": [prompt.tolist() for prompt in PROMPTS], "max_tokens": 24}
    response = await client.post("/v1/completions", json=body)
    found = response.json()
    for number, (choice, search) in enumerate(zip(found["choices"], wanted, strict=True)):
        assert (choice["index"], choice["finish_reason"]) == (number, search.finish_reason)
        assert choice["text"] == tokenizer.decode(search.token_ids, skip_special_tokens=True)
        assert choice["lookahead"]["score"] == pytest.approx(search.score, abs=2e-6)
        assert choice["lookahead"]["tokens_run"] == search.num_tokens
    assert found["usage"]["completion_tokens"] == sum(len(search.token_ids) for search in wanted)
    events = await streamed(client, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    texts = ["", "", ""]
    for event in events[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in found["choices"]]
    assert events[-1]["usage"] == found["usage"]
    chat = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 24, "model": "tiny"}
    said = (await client.post("/v1/chat/completions", json=chat)).json()["choices"][0]["message"]
    events = await streamed(client, "/v1/chat/completions", chat)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == said["content"]
    stop = said["content"][2:4]
    cut = (await client.post("/v1/chat/completions", json={**chat, "stop": stop})).json()["choices"][0]
    assert stop not in cut["message"]["content"]
    # Errors as that API has them.
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
    for body, status, param in [
        ({"prompt": "abc", "temperature": 1}, 400, "temperature"),
        ({"prompt": "abc", "model": "gpt"}, 404, "model"),
        ({"prompt": "abc", "stream": True, "width": 5}, 400, "width"),
    ]:
        refused = await client.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)
    assert (
        (await client.post("/v1/completions", content=b"{")).json()["error"]["message"].startswith("the body must be")
    )
    assert (await client.get("/v1/nope")).json()["error"]["type"] == "not_found_error"
    unknown = await client.post("/v1/completions", json={}, headers={"authorization": "Bearer no"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (401, "invalid_api_key")


async def _load(client: Any, engine: Any) -> None:
    """50 requests at once, for four of which there is room, and some of whose clients leave; each as it is alone."""
    bodies = [{"prompt": [2 + (7 * n + i) % 50 for i in range(3 + n)], "max_tokens": 8 + n % 5} for n in range(50)]

    async def ask(number: int) -> str:
        if number % 3:
            answer = (await client.post("/v1/completions", json=bodies[number])).json()
            return str(answer["choices"][0]["text"])
        events = await streamed(client, "/v1/completions", bodies[number])
        return "".join(event["choices"][0]["text"] for event in events)

    tasks = [asyncio.create_task(ask(number)) for number in range(50)]
    leaving = range(2, 50, 7)
    for number in leaving:
        await asyncio.sleep(0.02)
        tasks[number].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    await settled(engine)
    stayed = [number for number in range(50) if number not in leaving]
    assert all(isinstance(found[number], str) for number in stayed)
    for number in stayed:
        assert found[number] == await ask(number)
    # The room of those that have left is free: this search needs all of it.
    everything = {"prompt": "abc", "max_tokens": 8, "width": 4, "depth": 1, "chunk": 2}
    assert (await asyncio.wait_for(client.post("/v1/completions", json=everything), 300)).status_code == 200


LEAF = """
import sys
import time

import datasets, torch, transformers
import vllm.model_executor.layers.linear as linear
from leafkernels.integrations.trl import LeafGRPOConfig, LeafGRPOTrainer

# On a CPU vLLM packs its weights, and TRL could not renew them.
linear.UnquantizedLinearMethod.process_weights_after_loading = lambda self, layer: setattr(
    layer, "cpu_linear", torch.nn.functional.linear
)


class Trainer(LeafGRPOTrainer):
    def _ranking_logprobs(self, batch):
        found = super()._ranking_logprobs(batch)
        assert "old_per_token_logps" not in batch and found is batch["sampling_per_token_logps"]
        return found


args = LeafGRPOConfig(
    sys.argv[2], use_cpu=True, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=64, num_generations=8,
    vllm_importance_sampling_correction=False, temperature=0.2, per_device_train_batch_size=16, max_steps=2,
    max_completion_length=16, learning_rate=1e-3, report_to=[], logging_steps=1, save_strategy="no",
)
rows = datasets.Dataset.from_list([{"prompt": "abc"}, {"prompt": "def"}] * 8)
trainer = Trainer(
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]),
    lambda completions, **_: [float(text.count("e")) for text in completions],
    args,
    rows,
    processing_class=transformers.AutoTokenizer.from_pretrained(sys.argv[1]),
)
before = [parameter.clone() for parameter in trainer.model.parameters()]
trainer.train()
logs = [log for log in trainer.state.log_history if "leaf/nodes_per_group" in log]
assert len(logs) == 2 and any(log["leaf/nodes_per_group"] > 0 for log in logs), logs
assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
# vLLM samples with the weights that were learnt.
(served,) = trainer.vllm_generation.llm.apply_model(lambda model: model.lm_head.weight.detach().float().clone())
wanted = trainer.model.lm_head.weight.detach()
assert (served - wanted).abs().max() < 0.02 * wanted.abs().max()
print("learnt")
"""


@on_vllm
def test_leaf_learns_from_rollouts_of_vllm(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Boundaries are ranked by the log-probabilities that vLLM sampled with."""
    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    environment = {**os.environ, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    command = [sys.executable, "-W", "ignore", "-c", LEAF, str(saved["qwen2"][0]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "learnt" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]


@on_vllm
def test_a_teacher_that_vllm_serves(saved: dict[str, tuple[Path, Path]]) -> None:
    """``ServedTeacher`` has from vLLM's own server what the model gives: prompts it has seen before, padding, holes."""
    import httpx
    import transformers

    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    from leafkernels.integrations.trl_distillation import ServedTeacher

    model, _ = saved["qwen2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--max-logprobs", "4"]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([*command, "--served-model-name", "tiny"], start_new_session=True) as server:
        try:
            served = ServedTeacher(url, "tiny", top_k=4, retries=0)
            with httpx.Client() as client:
                while True:
                    assert server.poll() is None
                    with suppress(httpx.TransportError):
                        client.get(f"{url}/health").raise_for_status()
                        break
                    time.sleep(0.5)
            served.check([3, 4, 5])
            ids = torch.randint(2, 60, (3, 40), generator=torch.Generator().manual_seed(0))
            mask = torch.ones_like(ids)
            mask[0, :8], mask[1, 33:], mask[2, 20:24] = 0, 0, 0
            parts = {"ids": ids, "mask": mask}
            batch = {f"prompt_{name}": part[:, :12] for name, part in parts.items()}
            batch |= {f"completion_{name}": part[:, 12:] for name, part in parts.items()}
            theirs = transformers.AutoModelForCausalLM.from_pretrained(model)
            for _ in range(2):
                logprobs, _, top_ids, top = served.score(batch, torch.arange(3), top_k=4, num_ids=64)
                for row in range(3):
                    live = mask[row].bool()
                    with torch.no_grad():
                        wanted = theirs(input_ids=ids[row, live][None]).logits[0, :-1].log_softmax(-1)
                    wanted = wanted[int(mask[row, :12].sum()) - 1 :]
                    live = live[12:]
                    own = wanted.gather(1, ids[row, 12:][live][:, None])[:, 0]
                    torch.testing.assert_close(logprobs[row, live], own, atol=1e-5, rtol=0)
                    torch.testing.assert_close(top[row, live], wanted.topk(4).values, atol=1e-5, rtol=0)
                    assert torch.equal(top_ids[row, live], wanted.topk(4).indices)
            served.check([3] * 63)
            for change, token_ids, message in [
                ({"top_k": 5}, [3, 4], "prompt logprobs of 5, which is greater than max allowed: 4"),
                ({"model": "other"}, [3, 4], "The model `other` does not exist"),
                ({}, [3] * 64, "max_tokens must be at least 1"),  # room for the one that it is asked for
                ({}, [3] * 65, "maximum context length is 64 tokens"),
                ({}, [3, 64], "Token id 64 is out of vocabulary"),
            ]:
                with pytest.raises(ValueError, match=message):
                    ServedTeacher(url, **{"model": "tiny", "retries": 0, **change}).check(token_ids)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


@on_vllm
def test_the_command(saved: dict[str, tuple[Path, Path]]) -> None:
    import httpx

    model, channel = saved["qwen2"]
    command = [sys.executable, "-m", "leafkernels.lookahead", "serve", "--channel", str(channel), "--model", str(model)]
    command += ["--port", "0", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--width", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
        try:
            assert server.stdout is not None
            lines = iter(server.stdout.readline, "")
            (address,) = next(found for line in lines if (found := re.findall(r"http://\S+", line)))
            answer = httpx.post(f"{address}/completions", json={"prompt": "abc", "max_tokens": 12}, timeout=300)
            assert answer.json()["choices"][0]["finish_reason"] in ("length", "stop")
            server.send_signal(signal.SIGINT)
            assert server.wait(300) in (0, 130)
            with pytest.raises(ProcessLookupError):  # the engine's processes have gone with it
                for _ in range(100):
                    os.killpg(server.pid, 0)
                    time.sleep(0.2)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
