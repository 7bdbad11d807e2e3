"""Credit for each token in TRL's asynchronous trainer: a stub worker, a tiny model, and the formula one by one."""

import asyncio
import copy
import importlib.util
import json
import math
import multiprocessing
import pickle
import queue
import sys
import threading
import warnings
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "on_cpu")]
pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")

import accelerate
import tiny_trl
from datasets import Dataset
from transformers import AttentionInterface, Qwen2ForCausalLM, TrainingArguments

import leafkernels

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's, of what is experimental
        from leafkernels.integrations import trl_async as plug
except ImportError:
    pytest.skip("needs a TRL with AsyncGRPOTrainer", allow_module_level=True)

from leafkernels.integrations.trl_async import (
    LeafAsyncGRPOConfig,
    LeafAsyncGRPOTrainer,
    credit_samples,
)

TRAINER = sys.modules[plug.AsyncGRPOTrainer.__module__]
if not hasattr(TRAINER, "TreeRow"):
    pytest.skip("needs the rows of TRL 1.16", allow_module_level=True)
WORKER: Any = sys.modules[TRAINER.AsyncRolloutWorker.__module__]
LOOP = TRAINER.AsyncRolloutWorker._loop_cls

PROMPT = [3, 4, 5]
# Turns of (tokens, whether they were sampled), row by row: two tools answer otherwise, one conversation is tokenised
# anew, of one nothing is trained, and one is the beginning of another.
SCRIPTS: list[list[list[tuple[list[int], int]]]] = [
    [[([6, 7, 8], 1), ([9, 9], 0), ([3, 1], 1)]],
    [[([6, 7, 8], 1), ([9, 10], 0), ([3, 1], 1), ([4], 0)]],
    [[([6, 4, 1], 1)]],
    [[([6, 7], 1)], [([10], 0), ([5, 1], 1)]],
    [],
    [[([6], 1)]],
]
REWARDS = [[1.0, 0.0, 0.5, 2.0, 0.25, 0.75], [0.0, 3.0, None, 0.5, 1.0, 0.125], [0.5, 0.25, 1.0, 0.0, 2.0, 0.0]]
LR = 0.3
ROWS = 4  # of a batch, so that one has rows of two groups


def conversations(group: int) -> list[list[Any]]:
    """A conversation's rows, as the worker of TRL has them before they are scored."""
    rng = np.random.default_rng(group)
    found = []
    for rows in SCRIPTS:
        found.append([])
        for turns in rows:
            ids, mask = list(PROMPT), [0] * len(PROMPT)
            for tokens, is_sampled in turns:
                ids, mask = ids + tokens, mask + [is_sampled] * len(tokens)
            logprobs = [float(rng.uniform(-3, -1)) if kept else 0.0 for kept in mask]
            found[-1].append(WORKER.TrainingSequence(ids, mask, logprobs, "0"))
    return found


def sampled_of(rows: list[Any]) -> list[int]:
    return [token for row in rows for token, kept in zip(row.input_ids, row.completion_mask, strict=True) if kept]


def by_hand(found: list[list[Any]], rewards: list[float | None]) -> list[list[float]]:
    """tree_td, token by token, of each row: V(after the token) - V(before it) + (r - mean) / 2."""
    whole = [
        ([t for row in rows for t in row.input_ids], [m for row in rows for m in row.completion_mask]) for rows in found
    ]
    streams = [ids[mask.index(1) : len(mask) - mask[::-1].index(1)] if any(mask) else [] for ids, mask in whole]
    scored = [(stream, reward) for stream, reward in zip(streams, rewards, strict=True) if reward is not None]

    def value(prefix: list[int]) -> float:
        return float(np.mean([reward for stream, reward in scored if stream[: len(prefix)] == prefix]))

    credit = []
    for rows, (_, mask), stream, reward in zip(found, whole, streams, rewards, strict=True):
        tokens = [0.0] * len(mask)
        for t in range(len(stream)):
            place = mask.index(1) + t
            if mask[place] and reward is not None:
                tokens[place] = value(stream[: t + 1]) - value(stream[:t]) + 0.5 * (reward - value([]))
        for row in rows:
            credit.append(tokens[: len(row.input_ids)])
            tokens = tokens[len(row.input_ids) :]
    return credit


def scripted(completions: list[Any], reward: list[Any], **_: Any) -> list[Any]:
    return reward


class Worker:
    """Scores scripted groups with TRL's own loop in this process, and puts them on the queue."""

    def __init__(self, loop: Any = LOOP) -> None:
        self._loop_cls = loop
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()

    def loop(self) -> Any:
        accelerate.PartialState(cpu=True)  # without which TRL cannot write its log
        tokenizer = tiny_trl.tokenizer()
        tokenizer.response_template = "any"
        context = multiprocessing.get_context("spawn")
        shared = ("model_version_value", "heartbeat_value", "failed_event", "exception_info_queue")
        return self._loop_cls(
            model_name="tiny",
            dataset=[],
            reward_funcs=[scripted],
            processing_class=tokenizer,
            eos_token_ids=[tiny_trl.EOS],
            rollout_buffer=self.rollout_buffer,
            metrics_queue=self.metrics_queue,
            **dict.fromkeys(shared, context.Value("i", 0)),
        )

    def samples(self, loop: Any, group: int, rewards: Any = None) -> list[Any]:
        found = conversations(group)
        size = len(found)
        fields = {
            "prompts": [[]] * size,
            "reward_kwargs": {"reward": REWARDS[group] if rewards is None else rewards},
            "completions": [[]] * size,
            "completions_ids": [sampled_of(rows) for rows in found],
            "completions_sequences": found,
            "tool_call_counts": [0] * size,
            "tool_failure_counts": [0] * size,
            "model_version": 0,
            "group_id": group,
            "env_rewards": [None] * size,
            "rollout_rewards": [None] * size,
        }
        scored: list[Any] = asyncio.run(loop._score_group(WORKER.RolloutGroup(**fields)))
        return scored

    def start(self) -> None:
        loop = self.loop()
        for group in range(len(REWARDS)):
            for sample in self.samples(loop, group):
                self.rollout_buffer.put(sample)

    def stop(self) -> None: ...
    def update_model_version(self, model_version: int) -> None: ...
    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("no rollouts are left")


class NoTransfer:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def dense(module: Any, query: Any, key: Any, value: Any, _: Any, **tree: Any) -> Any:
    """What TRL's kernel computes: each segment of a row attends to its path, which it ends."""
    heads = query.shape[1] // key.shape[1]
    key, value = (x[0].repeat_interleave(heads, 0) for x in (key, value))
    places = tree["tree_kv_index"]
    queries, keys = tree["tree_cu_seqlens_q"].tolist(), tree["tree_cu_seqlens_k"].tolist()
    out = []
    for i in range(len(queries) - 1):
        mine, path = query[0, :, queries[i] : queries[i + 1]], places[keys[i] : keys[i + 1]]
        scores = mine @ key[:, path].transpose(1, 2) * tree["scaling"]
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(path) - mine.shape[1])
        out.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ value[:, path])
    return torch.cat(out, 1).transpose(0, 1)[None], None


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL asks CUDA for the device's name, to say how much of it is used."""
    monkeypatch.setattr(TRAINER, "get_peak_flops_per_device", lambda *_: None)


def run(folder: Path, worker: Any, **changes: Any) -> Any:
    pytest.importorskip("requests", reason="TRL's client of vLLM needs it")
    tiny_trl.model().save_pretrained(folder / "model")
    settings = {"per_device_train_batch_size": ROWS, "max_steps": 2, "learning_rate": LR, "optim": "sgd"}
    settings |= {"max_grad_norm": 0.0, "token_budget": 0, "estimator": "tree_td", "normalize": "none"}
    args = tiny_trl.config(folder, LeafAsyncGRPOConfig, **{**settings, **changes})
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": "ab"}]] * 4})
    more = {"rollout_worker": worker, "weight_transfer": NoTransfer(), "processing_class": tiny_trl.tokenizer()}
    found = LeafAsyncGRPOTrainer(str(folder / "model"), [], args, data, **more)
    AttentionInterface.register(found.model.config._attn_implementation, dense)
    return found


def learnt(policy: Any, rows: list[Any], credit: list[list[float]]) -> Any:
    """The policy in float64 after a step for each batch of rows: TRL's loss, one token and one row at a time."""
    policy = copy.deepcopy(policy).double()
    for first in range(0, len(rows), ROWS):
        policy.zero_grad()
        batch = list(zip(rows[first : first + ROWS], credit[first : first + ROWS], strict=True))
        tokens = sum(sum(row.completion_mask) for row, _ in batch)
        for row, advantages in batch:
            for p, is_trained in enumerate(row.completion_mask):
                if is_trained:
                    logits = policy(input_ids=torch.tensor([row.input_ids[:p]])).logits[0, -1]
                    ratio = (logits.log_softmax(-1)[row.input_ids[p]] - row.old_log_probs[p]).exp()
                    gain = torch.minimum(ratio * advantages[p], ratio.clamp(0.8, 1.2) * advantages[p])
                    (-gain / tokens).backward()
        with torch.no_grad():
            for weight in policy.parameters():
                weight -= LR * weight.grad
    return torch.cat([weight.detach().flatten() for weight in policy.parameters()])


def test_two_steps_are_those_of_the_formula_token_by_token(tmp_path: Path) -> None:
    trainer = run(tmp_path, Worker())
    policy = Qwen2ForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    trainer.train()
    assert trainer.state.global_step == 2
    rows = [row for group in range(2) for rows in conversations(group) for row in rows][: 2 * ROWS]
    credit = [row for group in range(2) for row in by_hand(conversations(group), REWARDS[group])][: 2 * ROWS]
    weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]).double()
    before = torch.cat([weight.detach().flatten() for weight in policy.parameters()]).double()
    expected = learnt(policy, rows, credit)
    moved = float((expected - before).abs().max())
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5 * moved)
    # One number a row, or each at the token beside, would be seen.
    means = [[sum(row) / max(sum(map(bool, row)), 1)] * len(row) for row in credit]
    for wrong in (means, [row[1:] + row[:1] for row in credit]):
        assert float((learnt(policy, rows, wrong) - weights).abs().max()) > 1e-2 * moved


def rows_of(samples: list[Any], counts: tuple[int, ...]) -> list[Any]:
    """The samples in so many rows, as TRL's planner hands them to its collator."""
    names = ("input_ids", "completion_mask", "old_log_probs", "advantage", "group_id", "metrics")
    left, rows = iter(samples), [TRAINER.TreeRow() for _ in counts]
    for row, count in zip(rows, counts, strict=True):
        for _ in range(count):
            sample = next(left)
            row.add({name: getattr(sample, name) for name in names})
    return rows


@pytest.fixture(scope="module")
def samples() -> list[Any]:
    """Those of a group, credited in the loop of TRL's worker."""
    worker = Worker()
    worker._loop_cls = partial(plug._credited_loop, LOOP, {"estimator": "tree_td"})
    return worker.samples(worker.loop(), 1)


def test_the_worker_credits_rows_that_are_forked_unscored_or_empty(samples: list[Any]) -> None:
    expected = by_hand(conversations(1), REWARDS[1])
    assert len(samples) == len(expected) == 6
    for sample, credit in zip(samples, expected, strict=True):
        np.testing.assert_allclose(sample.advantage, credit, rtol=0, atol=1e-6)
        trained = [value for value, kept in zip(credit, sample.completion_mask, strict=True) if kept]
        # What TRL's table of completions and its traces show; it is sent from process to process.
        sent = pickle.loads(pickle.dumps(sample)).advantage
        assert sent == sample.advantage and float(sent) == pytest.approx(np.mean(trained))
        assert f"{sent:.2f}" == f"{float(sent):.2f}"


def test_the_worker_takes_rewards_at_tokens() -> None:
    """tree_td by its definition, with what each conversation has still to earn; the holes of tools are in between."""
    lists = [[(2, 1.0), (5, 0.5)], 0.25, [(3, 2.0)], [(1, -1.0), (4, 0.5)], 1.0, None]
    worker = Worker()
    worker._loop_cls = partial(plug._credited_loop, LOOP, {"estimator": "tree_td"})
    samples = worker.samples(worker.loop(), 0, lists)
    sums = [1.5, 0.25, 2.0, -0.5, 1.0]
    assert [sample.metrics["reward"] for sample in samples] == pytest.approx(
        [*sums[:3], -0.5, -0.5, math.nan], nan_ok=True
    )
    streams, to_go = [], []
    for rows, given in zip(conversations(0)[:5], lists[:5], strict=True):
        mask = [kept for row in rows for kept in row.completion_mask]
        ids = [token for row in rows for token in row.input_ids]
        start, end = (mask.index(1), len(mask) - mask[::-1].index(1)) if rows else (0, 0)
        places = [t - start for t in range(start, end) if mask[t]]
        earned = [0.0] * (end - start + 1)
        for last, reward in given if isinstance(given, list) else []:
            earned[places[last - 1]] += reward
        earned[-1] += 0.0 if isinstance(given, list) else given
        streams.append((ids[start:end], places))
        to_go.append([sum(earned[t:]) for t in range(end - start + 1)])
    found = iter(samples)
    for i, rows in enumerate(conversations(0)[:5]):
        credit = [value for _ in rows for value in next(found).advantage]
        mask = [kept for row in rows for kept in row.completion_mask]
        ids, places = streams[i]
        trained = [value for value, kept in zip(credit, mask, strict=True) if kept]
        for t, actual in zip(places, trained, strict=True):

            def value(length: int, t: int = t, ids: list[int] = ids) -> float:
                same = [j for j, (other, _) in enumerate(streams) if other[:length] == ids[:length]]
                return float(np.mean([to_go[j][min(t, len(to_go[j]) - 1)] for j in same]))

            whole = float(np.mean([row[0] for row in to_go]))
            assert actual == pytest.approx(value(t + 1) - value(t) + 0.5 * (to_go[i][t] - whole), abs=1e-6)

    with pytest.raises(ValueError, match=r"reward_funcs must return .* a list of \(end, reward\), .* got \(6, 1.0\)"):
        worker.samples(worker.loop(), 0, [[(6, 1.0)], *lists[1:]])
    steps = {(0, 0): [(1, 1.0)]}
    with pytest.raises(ValueError, match="TRL trains other tokens .*: 5 and 6 of conversation 0"):
        plug._at_tokens(conversations(0), [[*range(6)], *[[]] * 5], [1.0] * 6, steps)
    with pytest.raises(ValueError, match="step_rewards must have, for each conversation and each of its samples"):
        credit_samples(conversations(0), [1.0] * 6, step_rewards=[[]] * 6)


def test_the_worker_logs_what_leaf_shares() -> None:
    """Those of the padded rows of one group."""
    worker = Worker()
    worker._loop_cls = partial(plug._credited_loop, LOOP, {"estimator": "leaf"})
    samples = worker.samples(worker.loop(), 2)
    logs = [{k: v for k, v in sample.metrics.items() if k.startswith("leaf/")} for sample in samples]
    assert all(log == logs[0] for log in logs)
    assert set(logs[0]) == {"leaf/span_credit_share", "leaf/fork_fire_rate", "leaf/nodes_per_group"}
    found = conversations(2)
    tree = leafkernels.span_tree(*packed_of(found), torch.tensor(REWARDS[2]).double(), **where_of(found))
    nodes = sum(len({n for n in column if n >= 0}) for column in zip(*tree.nodes.tolist(), strict=True))
    assert logs[0]["leaf/nodes_per_group"] == nodes > 0
    assert 0 < logs[0]["leaf/span_credit_share"] < 1
    assert not any("leaf/" in name for sample in Worker().samples(Worker().loop(), 2) for name in sample.metrics)


def packed_of(found: list[list[Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [row for rows in found for row in rows]
    logprobs = torch.tensor([value for row in rows for value in row.old_log_probs])
    return logprobs, torch.tensor([token for row in rows for token in row.input_ids])


def where_of(found: list[list[Any]]) -> dict[str, Any]:
    lengths = [0, *(sum(len(row.input_ids) for row in rows) for rows in found)]
    mask = torch.tensor([kept for rows in found for row in rows for kept in row.completion_mask]).bool()
    return {"response_mask": mask, "cu_seqlens": torch.tensor(lengths).cumsum(0).int(), "group_size": len(found)}


@pytest.mark.parametrize("counts", [(6,), (2, 4), (1, 3, 2)])
def test_each_rank_has_its_rows_advantages_at_its_tokens(samples: list[Any], counts: tuple[int, ...]) -> None:
    rows = rows_of(samples, counts)
    collator = TRAINER.DataCollatorForRollout(tiny_trl.PAD, len(counts))
    batch = plug._collate(collator.torch_call, [rows])
    seen = [[] for _ in samples]
    firsts = np.cumsum([0, *counts])
    for i in range(len(counts)):
        for place, sample, value in zip(
            *(batch[k][i] for k in ("token_index", "segment_id", "advantages")), strict=True
        ):
            if place >= 0:
                seen[firsts[i] + int(sample)].append(float(value))
    for sample, found in zip(samples, seen, strict=True):
        kept = sample.completion_mask.astype(bool)
        np.testing.assert_array_equal(np.float32(found), np.float32(sample.advantage)[kept])


def test_leaf_is_that_of_the_reference_with_what_an_environment_began(samples: list[Any]) -> None:
    found = conversations(2)
    rewards = [1.0, 0.0, 0.5, math.inf, 0.25, 0.75]
    ours = [list(row) for rows in credit_samples(found, rewards, num_boundaries=3) for row in rows]
    width = max(sum(len(row.input_ids) for row in rows) for rows in found)
    padded = torch.zeros(3, len(found), width)
    for i, rows in enumerate(found):
        for j, name in enumerate(("input_ids", "completion_mask", "old_log_probs")):
            values = [float(value) for row in rows for value in getattr(row, name)]
            padded[j, i, : len(values)] = torch.tensor(values)
    reward = torch.tensor(rewards).masked_fill(torch.tensor(rewards).isinf(), torch.nan)
    more = {"response_mask": padded[1], "num_boundaries": 3, "backend": "reference"}
    credit = leafkernels.span_advantages(padded[2], padded[0].long(), reward, **more)
    expected = [
        value
        for row, rows in zip(credit.tolist(), found, strict=True)
        for value in row[: sum(len(r.input_ids) for r in rows)]
    ]
    np.testing.assert_allclose([value for row in ours for value in row], expected, rtol=0, atol=1e-5)
    # Rows that answer other prompts share no prefix, so that this is dr_grpo's with half a weight.
    for i, rows in enumerate(found):
        for row in rows:
            row.input_ids[0] = 3 + i
    alone = credit_samples(found, REWARDS[0], estimator="tree_td")
    mean = np.mean(REWARDS[0])
    for rows, credit_of, reward_of in zip(found, alone, REWARDS[0], strict=True):
        if rows:
            tokens = [
                v
                for one, row in zip(credit_of, rows, strict=True)
                for v, k in zip(one, row.completion_mask, strict=True)
                if k
            ]
            np.testing.assert_allclose(tokens[0], 1.5 * (reward_of - mean), atol=1e-6)
            np.testing.assert_allclose(tokens[1:], 0.5 * (reward_of - mean), atol=1e-6)


def test_what_cannot_be_credited_is_refused(samples: list[Any], tmp_path: Path) -> None:
    def collated(change: dict[str, Any], collate: Any = None) -> None:
        rows = rows_of(samples, (6,))
        rows[0].samples[0].update(change)
        plug._collate(collate or TRAINER.DataCollatorForRollout(tiny_trl.PAD).torch_call, [rows])

    collated({})
    with pytest.raises(
        ValueError, match="advantage of a sample must be one number for each of its 10 input_ids .* got 0.5"
    ):
        collated({"advantage": 0.5})
    with pytest.raises(ValueError, match="got 9 of them"):
        collated({"advantage": [0.0] * 9})
    with pytest.raises(ValueError, match="must be finite numbers"):
        collated({"advantage": [math.nan] * 10})

    def reversed_tokens(examples: list[Any]) -> dict[str, Any]:
        batch = TRAINER.DataCollatorForRollout(tiny_trl.PAD).torch_call(examples)
        return batch | {"old_log_probs": batch["old_log_probs"].flip(1)}

    with pytest.raises(RuntimeError, match="old_log_probs of a batch must be those of its samples' trained tokens"):
        collated({}, reversed_tokens)
    for rows in (samples, [[samples]]):  # the latter is what TRL 1.14 has
        with pytest.raises(RuntimeError, match="must take one list of rows"):
            plug._collate(reversed_tokens, rows)
    with pytest.raises(ValueError, match="rewards must be one for each of 6 conversations, got 1"):
        credit_samples(conversations(0), [1.0])
    with pytest.raises(ValueError, match="estimator must be one of 'leaf', .* got 'none'"):
        credit_samples([], [], estimator="none")
    with pytest.raises(ValueError, match="estimator must be one that needs no sum_squares .*, got 'otb'"):
        credit_samples([], [], estimator="otb")
    row = SimpleNamespace(input_ids=[1, 2], completion_mask=[0, 1], old_log_probs=[0.0])
    with pytest.raises(ValueError, match="must be of one length, got 2, 2, 1"):
        credit_samples([[row]], [1.0])
    with pytest.raises(ValueError, match="normalize must be .* got 'batch'"):
        run(tmp_path, Worker(), estimator="leaf", normalize="batch")
    with pytest.raises(TypeError, match="args must be a LeafAsyncGRPOConfig, .* got TrainingArguments"):
        LeafAsyncGRPOTrainer("model", args=TrainingArguments(str(tmp_path)))
    with pytest.raises(RuntimeError, match="cannot credit the rollout worker of TRL .* got <class 'object'>"):
        run(tmp_path, Worker(object))


def test_the_trainer_leaves_a_worker_of_ones_own_alone(tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(run(tmp_path, Worker()).rollout_worker._loop_cls)).args[0] is LOOP
    own = Worker()
    del own._loop_cls
    assert not hasattr(run(tmp_path, own).rollout_worker, "_loop_cls")


class Engine(BaseHTTPRequestHandler):
    """Answers as vLLM does, with completions of two tokens of which the first is the same."""

    answers = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Engine.answers += 1
        choice = {"token_ids": [6, 3 + Engine.answers % 2], "logprobs": {"token_logprobs": [-0.5, -1.5]}}
        body = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("aiohttp", "vllm")), reason="TRL's worker needs both"
)
def test_the_process_of_trls_worker_sends_advantages_of_tokens() -> None:
    accelerate.PartialState(cpu=True)
    server = HTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tokenizer = tiny_trl.tokenizer()
    tokenizer.response_template = "any"
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    worker = TRAINER.AsyncRolloutWorker(
        model_name="tiny",
        dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "ab"}]] * 4}),
        reward_funcs=[tiny_trl.count_a],  # of token 3
        processing_class=tokenizer,
        eos_token_ids=[3, 4],
        vllm_server_url=f"http://127.0.0.1:{server.server_port}",
        num_generations=2,
        max_inflight_tasks=2,
    )
    worker._loop_cls = partial(plug._credited_loop, LOOP, {"estimator": "tree_td"})
    worker.start()
    try:
        found = [worker.rollout_buffer.get(timeout=60) for _ in range(2)]
    finally:
        worker.stop()
        server.shutdown()
        server.server_close()
    # V of the first token is the mean; the second is worth the reward less it, and half of that is each token's.
    credit = {int(sample.input_ids[-1]): list(sample.advantage) for sample in found}
    prompt = [0.0] * (len(found[0].input_ids) - 2)
    assert credit == {3: [*prompt, 0.25, 0.75], 4: [*prompt, -0.25, -0.75]}
    assert all(isinstance(sample.advantage, plug.TokenAdvantages) for sample in found)
