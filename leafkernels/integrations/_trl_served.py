"""A teacher behind an address: ``ServedTeacher`` asks a server for log-probabilities of the tokens it is sent."""

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

import torch
from torch import Tensor

from leafkernels._core.checks import check_count, check_positive

# What vLLM writes where a log-probability is -inf, which JSON has not.
_BANNED = -9999.0
# Answers after which the same question may have another one.
_AGAIN = (408, 425, 429)
# Seconds before the second try; twice as many before each one after it.
_PAUSE = 1.0


class ServedTeacher:
    """A model that a server of the OpenAI-compatible kind runs, with vLLM's ``prompt_logprobs``, as a teacher.

    It is sent ids, the prompt's and the completion's, and returns of each the log-probability and, with ``top_k``, the
    most likely ids before it. These are at temperature 1 (vLLM's prompt log-probabilities know no other), over all ids
    of the server's model. Entropies it does not give.

    A request that fails, or that has no answer in time, is sent again; the others are not. Rows that have an answer
    are not asked about twice.

    Args:
        url: ``http://host:port``, with or without ``/v1``.
        model: the name that the server has for it.
        top_k: ids asked for at each token, which the server must allow (vLLM's ``--max-logprobs``, 20 by default); 0:
            the log-probability of the token alone.
        timeout: seconds to wait for an answer.
        retries: how often a request is sent again, after 1, 2, 4, ... seconds.
        workers: requests at a time.
        api_key: sent as a bearer token.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        top_k: int = 0,
        timeout: float = 120.0,
        retries: int = 4,
        workers: int = 8,
        api_key: str | None = None,
    ) -> None:
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        if not isinstance(model, str) or not model:
            raise ValueError(f"model must be the name that the server has for it, got {model!r}")
        check_count("top_k", top_k, 0)
        check_positive("timeout", timeout)
        check_count("retries", retries, 0)
        check_count("workers", workers, 1)
        base = url.rstrip("/")
        self.url = (base if base.endswith("/v1") else f"{base}/v1") + "/completions"
        self.model, self.top_k, self.timeout, self.retries = model, top_k, timeout, retries
        self._workers, self._api_key = workers, api_key

    def check(self, token_ids: list[int]) -> None:
        """Ask about a few ids, so that a server that does not do is known before anything is sampled."""
        _read(self._ask(token_ids), token_ids, 1, self.top_k, max(token_ids) + 1, self.url)

    def score(self, batch: dict[str, Tensor], rows: Tensor, *, top_k: int, num_ids: int) -> tuple[Tensor, ...]:
        """Log-probabilities of the completions' tokens, (n, tokens), and 0 for entropies.

        With ``top_k``, at most that of the teacher, also the most likely ids (n, tokens, k) int64 and their
        log-probabilities; the id -1, at -inf, where the server gave fewer or one from ``num_ids`` on.
        NaN for a row with an id from ``num_ids`` on.
        """
        ids, mask = (torch.cat([batch[f"prompt_{of}"], batch[f"completion_{of}"]], 1)[rows] for of in ("ids", "mask"))
        starts = batch["prompt_mask"][rows].sum(1).tolist()
        asked = [row[live.bool()].tolist() for row, live in zip(ids, mask, strict=True)]
        places = batch["completion_mask"][rows].bool().cpu()
        shape = tuple(places.shape)
        logprobs, top_ids = torch.zeros(shape), torch.full((*shape, top_k), -1)
        top = torch.full((*shape, top_k), -torch.inf)
        known = [i for i, row in enumerate(asked) if len(row) > starts[i] and max(row) < num_ids]
        unknown = [i for i, row in enumerate(asked) if row and max(row) >= num_ids]
        logprobs[unknown] = torch.nan
        if known:
            with ThreadPoolExecutor(self._workers) as pool:
                answers = list(pool.map(self._ask, [asked[i] for i in known]))
            for i, answer in zip(known, answers, strict=True):
                found = _read(answer, asked[i], starts[i], top_k, num_ids, self.url)
                live = places[i]
                logprobs[i, live] = torch.tensor(found[0])
                if top_k:
                    top_ids[i, live], top[i, live] = torch.tensor(found[1]), torch.tensor(found[2])
        device = batch["completion_ids"].device
        parts = (logprobs, torch.zeros(shape), *((top_ids, top) if top_k else ()))
        return tuple(part.to(device) for part in parts)

    def _ask(self, token_ids: list[int]) -> Any:
        """What the server answers, after as many tries as may be."""
        body = {"model": self.model, "prompt": token_ids, "max_tokens": 1, "temperature": 0.0}
        body |= {"prompt_logprobs": self.top_k, "add_special_tokens": False}
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        reason = ""
        for tried in range(self.retries + 1):
            if tried:
                time.sleep(_PAUSE * 2 ** (tried - 1))
            try:
                request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                said = error.read().decode("utf-8", "replace")[:500]
                reason = f"status {error.code}: {said}"
                if error.code < 500 and error.code not in _AGAIN:
                    raise ValueError(f"the served teacher at {self.url} refuses {self.model!r}: {reason}") from error
            except (OSError, HTTPException, ValueError) as error:  # none there, none in time, cut off, no JSON
                reason = f"{type(error).__name__}: {error}"
        raise RuntimeError(
            f"the served teacher at {self.url} gave no answer in {self.retries + 1} tries, the last time {reason}; "
            "training goes on from the last checkpoint when it is there again"
        )


def check_served(args: Any, served: list[ServedTeacher], temperature: float) -> None:
    """Refuse what log-probabilities of a few ids, at temperature 1, are not enough for."""
    if args.fire_alpha:
        raise ValueError(f"fire_alpha must be 0 with a ServedTeacher, which gives no entropies, got {args.fire_alpha}")
    if temperature != 1:
        raise ValueError(
            f"temperature must be 1 with a ServedTeacher, whose log-probabilities are at 1, got {temperature}"
        )
    if args.fire_loss == "sampled":
        return
    if args.fire_loss != "forward_kl":
        raise ValueError(
            f"fire_loss must be 'sampled' or 'forward_kl' with a ServedTeacher, got {args.fire_loss!r}: of ids that "
            "the student finds likely and the teacher does not, a server says nothing"
        )
    sizes = {teacher.top_k for teacher in served}
    if len(sizes) > 1 or sizes == {0} or args.fire_top_k not in (None, *sizes):
        raise ValueError(
            f"top_k of a ServedTeacher must be at least 1 with fire_loss='forward_kl', and that of all others and of "
            f"fire_top_k where it is given, got {sorted(sizes)} and fire_top_k={args.fire_top_k}"
        )


def _read(
    answer: Any, token_ids: list[int], start: int, top_k: int, num_ids: int, url: str
) -> tuple[list[float], list[list[int]], list[list[float]]]:
    """From ``start`` on: each id's log-probability, and the ``top_k`` most likely with theirs."""
    try:
        tokens = answer["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        tokens = None
    if not isinstance(tokens, list) or len(tokens) != len(token_ids):
        came = (
            "none" if tokens is None else f"{len(tokens)} of {len(token_ids)}" if isinstance(tokens, list) else tokens
        )
        raise ValueError(
            f"the served teacher at {url} must return prompt_logprobs for each id that it is sent, as vLLM does, got "
            f"{came!s:.80}"
        )
    own, ids, logprobs = [], [], []
    for token_id, entries in list(zip(token_ids, tokens, strict=True))[start:]:
        try:
            by_id = {int(key): (float(of["logprob"]), of.get("rank")) for key, of in entries.items()}
            own.append(_number(by_id[token_id][0]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the served teacher at {url} must return a logprob for the id {token_id} itself, as vLLM does, got "
                f"{entries!r:.200}"
            ) from error
        # The id that was sent comes on top of the most likely ones.
        ranked = sorted(by_id.items(), key=lambda item: (item[1][1] or len(by_id) + 1, -item[1][0]))
        most = [(key, _number(value)) for key, (value, _) in ranked[:top_k] if value > _BANNED]
        if len(most) < top_k and len(by_id) < top_k and num_ids > len(by_id):
            raise ValueError(
                f"the served teacher at {url} must return {top_k} ids at each token, got {len(by_id)}: top_k is more "
                "than the server gives"
            )
        most = [(key, value) if key < num_ids else (-1, float("-inf")) for key, value in most]
        most += [(-1, float("-inf"))] * (top_k - len(most))
        ids.append([key for key, _ in most])
        logprobs.append([value for _, value in most])
    return own, ids, logprobs


def _number(logprob: float) -> float:
    return float("-inf") if logprob <= _BANNED else logprob
