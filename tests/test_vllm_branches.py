"""Branches of a search in requests of an engine: what the engine is asked, and what the search finds, without vLLM."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import Table, _golden

from leafkernels.lookahead import Search, search, search_all
from leafkernels.lookahead.search import Best
from leafkernels.lookahead.vllm import search_async
from leafkernels.lookahead.vllm.branches import Branches, Output, Request


class Engine:
    """An engine that runs requests greedily on a table model, and a stepper on it."""

    def __init__(self, table: Table, ahead: int, ends: Sequence[int] = (), longest: int = 0, best: int = 4) -> None:
        self.table, self.ends, self.best = table, ends, best
        self.branches = Branches(ahead, longest, ends)
        self.asked: list[list[int]] = []
        self.lengths: list[int] = []
        self.calls = 0

    def prefill(self, prompt_ids: Any) -> tuple[Best, torch.Tensor]:
        prompts = [prompt_ids] if isinstance(prompt_ids, torch.Tensor) else prompt_ids
        self.branches.begin([prompt.tolist() for prompt in prompts])
        return self.run()

    def extend(self, parents: torch.Tensor, token_ids: torch.Tensor) -> tuple[Best, torch.Tensor]:
        self.branches.grow(parents.tolist(), token_ids.tolist())
        return self.run()

    def run(self) -> tuple[Best, torch.Tensor]:
        for request in self.branches.requests:
            if not request.is_done:
                self.asked.append(request.token_ids)
                self.finish(request)
                self.lengths.append(len(request.outputs))
        self.calls += 1
        return self.branches.results()

    def finish(self, request: Request) -> None:
        ids = [*request.token_ids]
        while len(request.outputs) < request.ahead and not (request.outputs and ids[-1] in self.ends):
            logits, reward = self.table.at(ids)
            best = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: self.best]
            request.outputs.append(Output(best[0], reward, [logits[token] for token in best], best))
            ids.append(best[0])
        request.is_done = True


def test_the_authors_searches_in_requests(shared: Any) -> None:
    for case in _golden(shared):
        if "requests" in case:
            continue
        config = case["config"]
        ends = [*config["stop_ids"], *([] if config["eos_id"] is None else [config["eos_id"]])]
        options = {"width": config["n"], "chunk": config["k"], "depth": max(config["d"] - (config["k"] == 1), 0)}
        options |= {"max_new_tokens": config["max_new_tokens"], "eos_token_ids": ends}
        table, prompt = Table(**case["lm"], eos_id=config["eos_id"]), torch.tensor(case["prompt"])
        wanted = search(table, prompt, **options)
        for ahead in (config["k"], 2 * config["k"] + 1):
            engine = Engine(Table(**case["lm"], eos_id=config["eos_id"]), ahead, ends, best=config["n"])
            assert search(engine, prompt, **options) == wanted, (case["id"], ahead)


@settings(max_examples=30)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 2),
    st.integers(1, 30),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
)
def test_any_search_in_requests_of_any_length(
    seed: int, width: int, chunk: int, depth: int, limit: int, ahead: int, ends: bool, with_end: bool
) -> None:
    eos = [0] if ends else []
    options: dict[str, Any] = {"width": width, "chunk": chunk, "depth": depth, "max_new_tokens": limit}
    options |= {"eos_token_ids": eos, "with_end": with_end}
    prompts = [torch.tensor([3, 4]), torch.tensor([1]), torch.tensor([2, 2, 2])]
    wanted = [search(Table(seed, 6, 1024, 10), prompt, **options) for prompt in prompts]
    assert search_all(Engine(Table(seed, 6, 1024, 10), ahead, eos), prompts, **options) == wanted


def test_a_search_asks_once_a_fork() -> None:
    """A request a branch and fork, each as long as the chunk; the first one token longer, up to the first fork."""
    engine = Engine(Table(7, 8, 1024, 10), ahead=4)
    found = search(engine, torch.tensor([3, 5]), width=2, chunk=4, depth=1, max_new_tokens=16)
    assert engine.lengths == [5, *[4] * (len(engine.lengths) - 1)]
    # Forks after 4, 8 and 12 tokens: of one branch, and of the two below each chunk that is committed.
    assert len(engine.asked) == 1 + 2 + 4 + 4
    assert found.num_forwards == engine.calls


def test_with_more_ahead_the_best_branch_needs_no_request() -> None:
    long, short = (Engine(Table(7, 8, 1024, 10), ahead) for ahead in (8, 4))
    options: dict[str, Any] = {"width": 2, "chunk": 4, "depth": 1, "max_new_tokens": 16}
    assert search(long, torch.tensor([3, 5]), **options) == search(short, torch.tensor([3, 5]), **options)
    assert len(long.asked) < len(short.asked)


def test_what_branches_share_begins_their_requests() -> None:
    """So that a prefix cache finds it."""
    engine = Engine(Table(11, 8, 1024, 10), ahead=3)
    found = search(engine, torch.tensor([3, 5]), width=2, chunk=3, depth=0, max_new_tokens=12)
    whole = [3, 5, *found.token_ids]
    for ids in engine.asked:
        shared = next((n for n, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), len(ids))
        assert shared >= len(ids) - 1


def test_no_request_is_longer_than_the_engine_allows() -> None:
    engine = Engine(Table(5, 8, 1024, 10), ahead=6, longest=9)
    search(engine, torch.tensor([1, 2, 3]), width=2, chunk=6, depth=0, max_new_tokens=7)
    assert all(len(ids) + n <= 10 for ids, n in zip(engine.asked, engine.lengths, strict=True))
    engine = Engine(Table(5, 8, 1024, 10), ahead=6, longest=9)
    with pytest.raises(ValueError, match="prompt and answer must have at most 9 tokens, .* got 10"):
        search(engine, torch.tensor([1, 2, 3]), width=2, chunk=6, depth=0, max_new_tokens=20)


def test_an_engine_that_ends_a_request_without_a_token_is_said_so() -> None:
    branches = Branches(2, 0, ())
    branches.begin([[1, 2]])
    branches.requests[0].is_done = True
    with pytest.raises(RuntimeError, match="the engine has ended a request without a token"):
        branches.replace_lost()


def test_a_width_beyond_the_best_tokens_is_refused() -> None:
    engine = Engine(Table(5, 8, 1024, 10), ahead=1, best=2)
    with pytest.raises(ValueError, match="width must be at most 2, the best tokens that the stepper gives, got 3"):
        search(engine, torch.tensor([1]), width=3, chunk=1, depth=0, max_new_tokens=2)


class Slow:
    """``Engine`` whose methods are awaited, and which others interrupt."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.is_closed = engine, False

    async def prefill(self, prompt_ids: torch.Tensor) -> Any:
        await asyncio.sleep(0)
        return self.engine.prefill(prompt_ids)

    async def extend(self, parents: torch.Tensor, token_ids: torch.Tensor) -> Any:
        await asyncio.sleep(0)
        return self.engine.extend(parents, token_ids)

    async def close(self) -> None:
        self.is_closed = True


def test_searches_at_once_are_those_alone_and_stream_what_they_commit() -> None:
    options: dict[str, Any] = {"width": 2, "chunk": 3, "depth": 1, "max_new_tokens": 20, "eos_token_ids": [0]}
    choose = random.Random(0)
    prompts = [torch.tensor([choose.randrange(8) for _ in range(choose.randrange(1, 6))]) for _ in range(12)]
    steppers = [Slow(Engine(Table(3, 8, 1024, 10), 3, [0])) for _ in prompts]
    streamed: list[list[int]] = [[] for _ in prompts]

    async def all_at_once() -> list[Search]:
        pairs = zip(steppers, prompts, streamed, strict=True)
        return await asyncio.gather(*(search_async(s, p, on_commit=out.extend, **options) for s, p, out in pairs))

    found = asyncio.run(all_at_once())
    assert found == [search(Table(3, 8, 1024, 10), prompt, **options) for prompt in prompts]
    assert streamed == [one.token_ids for one in found]
    assert all(stepper.is_closed for stepper in steppers)


@pytest.mark.parametrize("options", [{"width": 0}, {"width": 2, "depth": 99}, {"width": 9}])
def test_an_async_search_that_fails_closes_its_stepper(options: dict[str, Any]) -> None:
    stepper = Slow(Engine(Table(3, 8, 1024, 10), 3))
    asked = {"width": 2, "chunk": 3, "depth": 1, "max_new_tokens": 20} | options
    with pytest.raises(ValueError, match="width"):
        asyncio.run(search_async(stepper, torch.tensor([1]), **asked))
    assert stepper.is_closed
