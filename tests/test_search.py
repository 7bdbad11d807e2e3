"""The search against the results of its authors' code, and by laws."""

import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from leafkernels.lookahead import Search, search, search_all

_WORD = (1 << 64) - 1


def _mix(number: int) -> int:
    z = (number + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


class Table:
    """A language model and its rewards by arithmetic on the prefix; every number is exact in float32."""

    def __init__(self, seed: int, vocab: int, M: int, p: int, eos_bias: int = 0, eos_id: int | None = None) -> None:
        self.seed, self.vocab, self.largest, self.power = seed, vocab, M, p
        self.eos_bias, self.eos_id = eos_bias, eos_id
        self.calls: list[int] = []

    def at(self, prefix: list[int]) -> tuple[list[float], float]:
        state = _mix(self.seed)
        for token in prefix:
            state = _mix(state ^ (token + 1))
        logits = [((_mix(state ^ ((2 << 32) + v)) >> 40) % 16384) * 64 + v for v in range(self.vocab)]
        if self.eos_id is not None:
            logits[self.eos_id] += self.eos_bias
        reward = ((_mix(state ^ (1 << 32)) >> 40) % (2 * self.largest + 1)) - self.largest
        return [number / 65536 for number in logits], reward / 2**self.power

    def _all(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(len(self.branches))
        logits, rewards = zip(*map(self.at, self.branches), strict=True)
        return torch.tensor(logits), torch.tensor(rewards)

    def prefill(self, prompt_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.branches = [prompt_ids.tolist()]
        return self._all()

    def extend(self, parents: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = zip(parents.tolist(), token_ids.tolist(), strict=True)
        self.branches = [[*self.branches[parent], token] for parent, token in pairs]
        return self._all()


def test_the_table_by_hand() -> None:
    assert _mix(0) == 0xE220A8397B1DCDAF
    logits, reward = Table(7, 8, 1024, 10).at([3, 5])
    assert [round(number * 65536) for number in logits][:3] == [461824, 513281, 458434]
    assert reward == -0.3154296875


def _golden(shared: Path) -> list[dict[str, Any]]:
    with gzip.open(shared / "golden" / "sla_search.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_the_authors_results(shared: Path) -> None:
    seen = 0
    for case in _golden(shared):
        if "requests" in case:
            continue
        seen += 1
        config = case["config"]
        # Theirs looks one chunk less ahead where a chunk is one token.
        depth = config["d"] if config["k"] > 1 else max(config["d"] - 1, 0)
        limit = config["max_new_tokens"]
        if config["max_model_len"] is not None:
            # Theirs lets prompt and answer have one token more than the limit.
            limit = min(limit, config["max_model_len"] + 1 - len(case["prompt"]))
        table = Table(**case["lm"], eos_id=config["eos_id"])
        ends = [*config["stop_ids"], *([] if config["eos_id"] is None else [config["eos_id"]])]
        streamed: list[list[int]] = []
        found = search(
            table,
            torch.tensor(case["prompt"]),
            width=config["n"],
            chunk=config["k"],
            depth=depth,
            max_new_tokens=limit,
            eos_token_ids=ends,
            on_commit=streamed.append,
        )
        assert found.token_ids == case["final_tokens"], case["id"]
        assert found.score == case["final_score"], case["id"]
        assert found.finish_reason == case["finish_reason"], case["id"]
        assert found.num_forwards == case["forward_steps"], case["id"]
        assert found.peak_branches == case["peak_running"], case["id"]
        assert table.calls == case["batch_sizes"], case["id"]
        assert sum(streamed, []) == case["final_tokens"], case["id"]
        for commit, theirs in zip(found.commits, case["commits"], strict=True):
            assert (commit.forward, commit.token_ids, commit.chosen) == (
                theirs["step"],
                theirs["tokens"],
                theirs["chosen"],
            ), case["id"]
            assert [c._asdict() for c in commit.candidates] == [
                {
                    "token_ids": ours.token_ids,
                    "first_token": c["first_token"],
                    "length": c["length"],
                    "is_finished": c["finished"],
                    "value": c["value"],
                }
                for c, ours in zip(theirs["candidates"], commit.candidates, strict=True)
            ], case["id"]
            assert all(c.token_ids[0] == c.first_token for c in commit.candidates), case["id"]
    assert seen > 90


def test_two_requests_of_the_authors_run_alone(shared: Path) -> None:
    cases = [case for case in _golden(shared) if "requests" in case]
    assert cases
    for case in cases:
        config = case["config"]
        for request in case["requests"]:
            found = search(
                Table(**case["lm"], eos_id=config["eos_id"]),
                torch.tensor(request["prompt"]),
                width=config["n"],
                chunk=config["k"],
                depth=config["d"],
                max_new_tokens=config["max_new_tokens"],
                eos_token_ids=() if config["eos_id"] is None else (config["eos_id"],),
            )
            assert found.token_ids == request["alone_final_tokens"]
            assert found.num_forwards == request["alone_forward_steps"]
            totals = itertools.accumulate(len(commit.token_ids) for commit in found.commits)
            assert request["alone_commits"] == [
                {"step": commit.forward, "total": total} for commit, total in zip(found.commits, totals, strict=True)
            ]


def _run(seed: int, levels: int, **options: Any) -> Search:
    return search(Table(seed, 6, levels, 3, eos_id=0), torch.tensor([1, 2]), eos_token_ids=(0,), **options)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 3), st.integers(1, 12))
def test_one_branch_is_greedy(seed: int, chunk: int, depth: int, limit: int) -> None:
    table, tokens = Table(seed, 6, 5, 3, eos_id=0), [1, 2]
    while len(tokens) < 2 + limit and (len(tokens) == 2 or tokens[-1] != 0):
        logits = table.at(tokens)[0]
        tokens.append(logits.index(max(logits)))
    assert _run(seed, 5, width=1, chunk=chunk, depth=depth, max_new_tokens=limit).token_ids == tokens[2:]


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_of_equal_logits_the_lower_id_comes_first(seed: int, width: int, dtype: torch.dtype) -> None:
    """So that the first candidate of a fork is what greedy decoding takes, and the others do not hang on a kernel."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 3, (4, 200), generator=draw).to(dtype)
    rows[torch.rand(rows.shape, generator=draw) < 0.5] = -math.inf

    class Ties:
        def prefill(self, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rows[:1], torch.zeros(1)

        def extend(self, parents: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rows[1:2].expand(len(parents), -1), torch.zeros(len(parents))

    found = search(Ties(), torch.tensor([1]), width=width, chunk=1, depth=0, max_new_tokens=4)
    best = sorted((i for i in range(200) if rows[1, i] > -math.inf), key=lambda i: (-float(rows[1, i]), i))[:width]
    assert [candidate.first_token for candidate in found.commits[1].candidates] == best
    assert found.token_ids == [int(rows[0].argmax()), *[int(rows[1].argmax())] * 3]


def test_a_fork_has_no_more_branches_than_tokens_are_left() -> None:
    class Few(Table):
        def _all(self) -> tuple[torch.Tensor, torch.Tensor]:
            logits, rewards = super()._all()
            logits[:, :4] = -math.inf
            return logits, rewards

    found = search(Few(0, 6, 5, 3), torch.tensor([1, 2]), width=5, chunk=1, depth=0, max_new_tokens=4)
    assert all({c.first_token for c in commit.candidates} == {4, 5} for commit in found.commits[1:])
    assert all(len(commit.candidates) == 2 for commit in found.commits[1:])


def _every_answer(
    table: Table, prefix: list[int], grown: int, width: int, chunk: int, limit: int, min_p: float
) -> list[list[int]]:
    if grown == limit or (grown and prefix[-1] == 0):
        return [prefix]
    logits = table.at(prefix)[0]
    best = sorted(range(len(logits)), key=lambda token: -logits[token])
    forks = width if grown and grown % chunk == 0 else 1
    likely = [token for token in best[:forks] if math.exp(logits[token] - max(logits)) >= min_p]
    return [
        answer
        for token in likely
        for answer in _every_answer(table, [*prefix, token], grown + 1, width, chunk, limit, min_p)
    ]


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_deep_enough_it_finds_the_best_of_all_leaves(
    seed: int, width: int, chunk: int, limit: int, with_end: bool, min_p: float
) -> None:
    # So deep that no chunk is committed before the end.
    depth = -(-limit // chunk)
    options = {"width": width, "chunk": chunk, "depth": depth, "max_new_tokens": limit, "max_branches": 10**9}
    options |= {"with_end": with_end, "min_p": min_p}
    found, table = _run(seed, 500, **options), Table(seed, 6, 500, 3, eos_id=0)

    def score(answer: list[int]) -> float:
        rewards = [table.at(answer[:end])[1] for end in range(2, len(answer) + with_end)]
        return sum(rewards) / len(rewards)

    answers = _every_answer(table, [1, 2], 0, width, chunk, limit, min_p)
    assert found.score == max(map(score, answers)) == score([1, 2, *found.token_ids])


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(1, 20),
    st.booleans(),
    st.sampled_from([0.0, 0.5]),
)
@example(seed=1, width=2, chunk=1, depth=0, limit=3, with_end=True, min_p=0.0)  # all candidates end at once
def test_commits_come_in_time_and_stay(
    seed: int, width: int, chunk: int, depth: int, limit: int, with_end: bool, min_p: float
) -> None:
    options = {"width": width, "chunk": chunk, "depth": depth, "max_new_tokens": limit}
    options |= {"with_end": with_end, "min_p": min_p}
    found = _run(seed, 2, **options)
    assert [commit.forward for commit in found.commits] == [
        (number + depth) * chunk + 1 for number in range(1, len(found.commits) + 1)
    ]
    streamed = [token for commit in found.commits for token in commit.token_ids]
    assert found.token_ids[: len(streamed)] == streamed
    assert found.peak_branches <= width ** (depth + 1 + with_end)
    assert found.num_tokens >= len(found.token_ids) - (not with_end)
    assert found == _run(seed, 2, **options)
    # Of the answer, the score is the mean over what has run.
    table, answer = Table(seed, 6, 2, 3, eos_id=0), [1, 2, *found.token_ids]
    rewards = [table.at(answer[:end])[1] for end in range(2, len(answer) + with_end)]
    assert found.score == pytest.approx(sum(rewards) / len(rewards))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width must be .*at least 1, got 0"),
        ({"chunk": 1.5}, "chunk must be an int"),
        ({"depth": -1}, "depth must be .*at least 0, got -1"),
        ({"width": 5, "depth": 3}, r"at 256 branches \(max_branches\), got 5 \*\* 4 = 625"),
        ({"width": 3, "depth": 4, "with_end": True}, r"at 256 branches .*, got 3 \*\* 6 = 729"),
        ({"min_p": 1.5}, "min_p must lie between 0 and 1, got 1.5"),
        ({"width": 9, "depth": 0}, "width must be at most the vocabulary, 6 ids, got 9"),
        ({"prompt_ids": torch.zeros(0, dtype=torch.int64)}, r"prompt_ids must have shape .* got shape \(0,\)"),
        ({"prompt_ids": torch.tensor(3)}, r"prompt_ids must have shape .* got shape \(\)"),
        ({"prompt_ids": torch.tensor([1.0])}, "prompt_ids must hold integers, got torch.float32"),
        ({"prompt_ids": [1]}, "prompt_ids must be a torch.Tensor, got list"),
        ({"eos_token_ids": None}, "eos_token_ids must be an int or several of them, got None"),
        ({"eos_token_ids": "ab"}, "eos_token_ids must be an int or several of them, got 'ab'"),
        ({"eos_token_ids": [0.5]}, r"eos_token_ids must be an int or several of them, got \[0.5\]"),
        ({"max_branches": None}, "max_branches must be an int, got NoneType"),
        ({"max_branches": "9"}, "max_branches must be an int, got str"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    options = {"width": 2, "chunk": 2, "depth": 1, "max_new_tokens": 5, "prompt_ids": torch.tensor([1])} | change
    with pytest.raises((TypeError, ValueError), match=message):
        search(Table(0, 6, 5, 3), options.pop("prompt_ids"), **options)


def test_one_end_token_is_an_int() -> None:
    options = {"width": 2, "chunk": 2, "depth": 1, "max_new_tokens": 12}
    for seed in range(5):
        table = Table(seed, 6, 5, 3, eos_bias=5000, eos_id=0)
        found, prompt = [], torch.tensor([1, 2])
        for ends in (0, (0,), torch.tensor([0]), iter([0])):
            found.append(search(table, prompt, eos_token_ids=ends, **options))
            (batched,) = search_all(Several(table), [prompt], eos_token_ids=ends if ends == 0 else [0], **options)
            assert batched == found[0]
        assert found[0].finish_reason == "stop" and all(result == found[0] for result in found)


class Several:
    """One prompt in a list."""

    def __init__(self, stepper: Any) -> None:
        self.stepper, self.extend = stepper, stepper.extend

    def prefill(self, prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = self.stepper.prefill(prompts[0])
        return found


@pytest.mark.parametrize("prompts", [3, "ab", torch.tensor([[1, 2]])])
def test_several_prompts_are_a_list(prompts: Any) -> None:
    with pytest.raises(TypeError, match=f"prompts must be a list of tensors .*, got {type(prompts).__name__}"):
        search_all(Table(0, 6, 5, 3), prompts, width=2, chunk=2, depth=1, max_new_tokens=5)


class Broken(Table):
    """The branch of these numbers gets something else for its logits or its reward, in a forward."""

    def __init__(self, forward: int, branch: int, logits: float | None, reward: float | None) -> None:
        super().__init__(3, 6, 5, 3)
        self.broken = forward, branch, logits, reward

    def _all(self) -> tuple[torch.Tensor, torch.Tensor]:
        logits, rewards = super()._all()
        forward, branch, logit_row, reward = self.broken
        if len(self.calls) == forward:
            if logit_row is not None:
                logits[branch] = logit_row
            if reward is not None:
                rewards[branch] = reward
        return logits, rewards


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("forward", "branch"), [(1, 0), (3, 0), (4, 1)])  # with one token, at the fork, after it
def test_refuses_what_is_not_finite(forward: int, branch: int, number: float) -> None:
    options = {"width": 2, "chunk": 2, "depth": 1, "max_new_tokens": 5}
    message = f"stepper must give finite rewards and a finite best logit, got {number} at forward {forward}"
    for min_p in (0.0, 0.5):
        for broken in ({"logits": number, "reward": None}, {"logits": None, "reward": number}):
            if min_p and branch:
                continue  # where there is no second branch
            with pytest.raises(ValueError, match=message):
                search(Broken(forward, branch, **broken), torch.tensor([1, 2]), min_p=min_p, **options)


@pytest.mark.parametrize("min_p", [0.0, 0.5])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_one_logit_that_is_not_finite_is_the_best_one(number: float, min_p: float) -> None:
    """At a fork its neighbours, which are finite, must not be taken in its place."""

    class One(Table):
        def _all(self) -> tuple[torch.Tensor, torch.Tensor]:
            logits, rewards = super()._all()
            if len(self.calls) == 2:
                logits[0, 3] = number
            return logits, rewards

    with pytest.raises(ValueError, match=f"a finite best logit, got {number} at forward 2"):
        search(One(0, 6, 5, 3), torch.tensor([1, 2]), width=3, chunk=1, depth=1, max_new_tokens=4, min_p=min_p)


def test_banned_ids_and_what_nothing_reads_may_be_infinite() -> None:
    class Banned(Table):
        def _all(self) -> tuple[torch.Tensor, torch.Tensor]:
            logits, rewards = super()._all()
            logits[:, 1:] = -math.inf
            # With the end counted a finished branch runs once more, and its logits are not read.
            logits[[branch[-1] == 0 for branch in self.branches]] = math.nan
            return logits, rewards

    for with_end in (False, True):
        found = search(
            Banned(0, 6, 5, 3),
            torch.tensor([1, 2]),
            width=3,
            chunk=1,
            depth=1,
            max_new_tokens=4,
            eos_token_ids=0,
            with_end=with_end,
        )
        assert found.token_ids == [0] and found.peak_branches == 1
