"""FireOPDTrainer with a teacher behind an address: a small server in vLLM's format, on a thread of the test."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")

from tiny_distillation import another, run, settings

from leafkernels.integrations import _trl_served
from leafkernels.integrations.trl_distillation import ServedTeacher

PLAIN = {
    "fire_drop": 0.0,
    "fire_alpha": 0.0,
    "fire_beta": 0.0,
    "max_steps": 1,
    "max_grad_norm": 1e9,
    "temperature": 1.0,
}


class Server(http.server.ThreadingHTTPServer):
    """Answers as vLLM's completions do; ``failures`` are what it does before that, one for a request."""

    def __init__(self, model: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.lock = model, threading.Lock()
        self.asked: list[Any] = []
        self.failures: list[Any] = []
        self.most = 20
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def entries(self, ids: list[int], k: int) -> list[Any]:
        with torch.no_grad(), self.lock:
            rows = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found: list[Any] = [None]
        for row, token_id in zip(rows, ids[1:], strict=False):
            order = row.argsort(descending=True).tolist()
            chosen = dict.fromkeys([token_id, *order[:k]])
            # -inf is no JSON, and vLLM writes -9999.
            values = {i: -9999.0 if row[i].isneginf() else row[i].item() for i in chosen}
            named = {"decoded_token": "?"}
            found.append({str(i): {"logprob": of, "rank": order.index(i) + 1} | named for i, of in values.items()})
        return found


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            failure = self.server.failures.pop(0) if self.server.failures else None
            self.server.asked.append((self.path, body, dict(self.headers)))
        if failure == "hang up":
            self.connection.close()
            return
        if failure == "garbage":
            self.answer(200, b"<html>")
            return
        if isinstance(failure, int):
            self.answer(failure, b'{"message": "busy"}')
            return
        if body["prompt_logprobs"] > self.server.most:
            self.answer(400, b'{"message": "Requested prompt logprobs of 21, which is greater than max allowed: 20"}')
            return
        choice: dict[str, Any] = {"index": 0, "text": "a", "prompt_logprobs": None}
        if failure != "no logprobs":
            choice["prompt_logprobs"] = self.server.entries(body["prompt"], body["prompt_logprobs"])
        if failure == "not its own":
            choice["prompt_logprobs"][1:] = [{"10": {"logprob": -0.1, "rank": 1}}] * (len(body["prompt"]) - 1)
        self.answer(200, json.dumps({"choices": [choice]}).encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(_trl_served, "_PAUSE", 0.0)
    with Server(another(1)) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def served(server: Server, **changes: Any) -> ServedTeacher:
    return ServedTeacher(server.url, "teacher", **changes)


def test_a_served_teacher_is_the_model_that_is_served(server: Server, tmp_path: Path) -> None:
    """At alpha 0, with filter and weights of the student: as if the model were here; -inf comes through as well."""

    def ban(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([3]), -torch.inf)

    local = another(1)
    for model in (server.model, local):
        model.lm_head.register_forward_hook(ban)
    changes = {**PLAIN, "fire_drop": 0.3, "fire_beta": 1.0}
    hints = [f"{prompt}g" for prompt in ["ab", "abc", "bcd", "dd", "cab", "h"] * 4]
    found, expected = (
        run(settings(tmp_path, **changes), teacher, teacher_prompt=hints)
        for teacher in (served(server, api_key="k"), local)
    )
    assert 0 < expected.batches[0]["metrics"]["fire/unscored_share"] < 1
    batches = found.batches[0], expected.batches[0]
    torch.testing.assert_close(*(batch["advantages"] for batch in batches), rtol=1e-5, atol=1e-5)
    assert torch.equal(*(batch["tool_mask"] for batch in batches))
    for ours, theirs in zip(found.gradients[0], expected.gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    # What is not known is not logged.
    assert "fire/teacher_entropy" not in found.batches[0]["metrics"]
    (path, body, headers) = server.asked[-1]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer k"
    assert body["prompt_logprobs"] == 0 and not body["add_special_tokens"]
    assert len(server.asked) == 1 + 8  # before anything is sampled, and once for each row


def test_the_most_likely_ids_of_a_server_are_those_of_the_model(server: Server, tmp_path: Path) -> None:
    """forward_kl over the teacher's three most likely ids and the rest, filtered and weighted by the student."""
    changes = {**PLAIN, "fire_drop": 0.3, "fire_beta": 1.0, "fire_loss": "forward_kl"}
    found = run(settings(tmp_path, **changes), served(server, top_k=3))
    expected = run(settings(tmp_path, **changes, fire_top_k=3), another(1))
    for ours, theirs in zip(found.gradients[0], expected.gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert any(gradient.any() for gradient in found.gradients[0])
    assert {body["prompt_logprobs"] for _, body, _ in server.asked} == {3}


def test_ids_that_the_student_has_not_are_with_the_rest(server: Server) -> None:
    batch = {f"{part}_ids": torch.tensor([[3, 4, 5]]) for part in ("prompt", "completion")}
    batch |= {f"{part}_mask": torch.ones((1, 3), dtype=torch.int64) for part in ("prompt", "completion")}
    rows = torch.tensor([0])
    logprobs, entropies, ids, most = served(server, top_k=4).score(batch, rows, top_k=4, num_ids=8)
    with torch.no_grad():
        expected = server.model(input_ids=torch.tensor([[3, 4, 5, 3, 4, 5]])).logits[0, 2:5].log_softmax(-1)
    torch.testing.assert_close(logprobs[0], expected[range(3), [3, 4, 5]])
    top = expected.topk(4)
    is_known = top.indices < 8
    assert not is_known.all() and not entropies.any()
    assert torch.equal(ids[0], torch.where(is_known, top.indices, -1))
    torch.testing.assert_close(most[0], torch.where(is_known, top.values, -torch.inf))
    assert served(server).score(batch, rows, top_k=0, num_ids=5)[0].isnan().all()


def test_an_evaluation_compares_the_ids_that_a_server_gives(server: Server, tmp_path: Path) -> None:
    held_out = {"eval_dataset": Dataset.from_dict({"prompt": ["aabb", "hg"]})}
    found = []
    for teacher in (served(server, top_k=10), another(1), served(server)):
        changes = {**PLAIN, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
        log = run(settings(tmp_path, **changes), teacher, more=held_out).state.log_history
        found.append(next(entry for entry in log if "eval_loss" in entry))
    for name in ("eval_fire/top1_agreement", "eval_fire/top10_overlap"):
        assert found[0][name] == found[1][name] and name not in found[2]


@pytest.mark.parametrize("failure", ["hang up", "garbage", 503, 429])
def test_a_request_that_fails_is_sent_again(server: Server, tmp_path: Path, failure: Any) -> None:
    server.failures = [None, failure, None, failure]
    found = run(settings(tmp_path, **PLAIN), served(server, retries=3))
    assert found.batches[0]["tool_mask"].any(1).all() and len(server.asked) == 1 + 8 + 2


def test_a_server_that_stays_away_is_told(server: Server, tmp_path: Path) -> None:
    server.failures = [503, 503]
    with pytest.raises(
        RuntimeError, match=r"served teacher at .*/v1/completions gave no answer in 2 tries, .* 503: .*busy"
    ):
        run(settings(tmp_path, **PLAIN), served(server, retries=1))
    with pytest.raises(RuntimeError, match="gave no answer in 1 tries, the last time URLError"):
        run(settings(tmp_path, **PLAIN), ServedTeacher("http://127.0.0.1:1", "teacher", retries=0))


@pytest.mark.parametrize(
    ("failure", "changes", "message"),
    [
        ("no logprobs", {}, "must return prompt_logprobs for each id that it is sent, as vLLM does, got none"),
        ("not its own", {}, "must return a logprob for the id 1 itself, as vLLM does, got .*'10'"),
        (404, {}, "refuses 'teacher': status 404: .*busy"),
        (None, {"top_k": 21}, "refuses 'teacher': status 400: .*greater than max allowed: 20"),
    ],
)
def test_a_server_of_another_kind_is_refused_before_anything_is_sampled(
    server: Server, tmp_path: Path, failure: Any, changes: dict[str, Any], message: str
) -> None:
    server.failures = [failure]
    with pytest.raises(ValueError, match=message):
        run(settings(tmp_path, **PLAIN), served(server, **changes))
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"fire_alpha": 1.0}, {}, "fire_alpha must be 0 with a ServedTeacher, which gives no entropies, got 1.0"),
        ({"temperature": 0.8}, {}, "temperature must be 1 with a ServedTeacher, whose log-probabilities .* got 0.8"),
        ({"fire_loss": "reverse_kl"}, {"top_k": 4}, "fire_loss must be 'sampled' or 'forward_kl' with a ServedTeacher"),
        ({"fire_loss": "forward_kl"}, {}, "top_k of a ServedTeacher must be at least 1 with fire_loss='forward_kl'"),
    ],
)
def test_what_a_server_does_not_give_is_not_asked_for(
    server: Server, tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(settings(tmp_path, **{**PLAIN, **changes}), served(server, **options))
    assert not server.asked


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("localhost:8000", "m"), {}, "url must begin with http:// or https://, got 'localhost:8000'"),
        (("http://localhost", ""), {}, "model must be the name that the server has for it, got ''"),
        (("http://localhost", "m"), {"top_k": -1}, "top_k must be at least 0, got -1"),
        (("http://localhost", "m"), {"timeout": 0}, "timeout must be positive, got 0"),
        (("http://localhost", "m"), {"retries": 1.5}, "retries must be an int, got float"),
    ],
)
def test_arguments(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ServedTeacher(*arguments, **options)
