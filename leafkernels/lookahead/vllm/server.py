"""An HTTP server whose answers look ahead, with OpenAI's API of completions and chat."""

import asyncio
import hmac
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from functools import partial
from typing import Any
from uuid import uuid4

import torch

from leafkernels.lookahead.inputs import holds_any
from leafkernels.lookahead.search import Search
from leafkernels.lookahead.vllm.asked import Asked, Limits, RefusedError, Text, read
from leafkernels.lookahead.vllm.asynchronous import AsyncVLLMStepper, search_async
from leafkernels.lookahead.vllm.room import Room

try:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(f"{__name__} needs starlette, which vLLM brings: pip install -e '.[vllm]'") from error


class Server:
    """The endpoints of one engine.

    Args:
        engine: an ``AsyncLLM`` of ``engine_arguments``.
        limits: what it does at most, and what a request has that does not say.
        key: what clients must send as ``Authorization: Bearer``, if any.
        make_stepper: called with the engine, ``ahead``, ``eos_token_ids`` and ``suppress_tokens`` for each search.
    """

    def __init__(
        self, engine: Any, limits: Limits, key: str | None = None, make_stepper: Callable[..., Any] = AsyncVLLMStepper
    ) -> None:
        self._engine, self._key, self._make_stepper = engine, key, make_stepper
        config = engine.model_config
        served = config.served_model_name
        self._models = [served] if isinstance(served, str) else list(served)
        self._longest, self._vocabulary = config.max_model_len, config.get_vocab_size()
        generation = config.try_get_generation_config()
        self._ends, suppressed = (_ids(generation.get(name)) for name in ("eos_token_id", "suppress_tokens"))
        self._suppressed = tuple(token for token in suppressed if 0 <= token < self._vocabulary)
        if not self._ends:
            self._ends = _ids(getattr(config.hf_config, "eos_token_id", None))
        # One that the engine hands out no tokens for would fail when it forks.
        self._limits = limits._replace(max_width=min(limits.max_width, config.max_logprobs - len(self._suppressed)))
        self._room = Room(limits.all_branches, limits.max_waiting)

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._list_models),
                Route("/health", self._health),
            ],
            exception_handlers={
                RefusedError: _refuse,
                404: _refuse_route,
                405: _refuse_route,
                Exception: _refuse_error,
            },
        )

    async def _health(self, _: Request) -> Response:
        return Response(status_code=503 if self._engine.errored else 200)

    async def _list_models(self, request: Request) -> Response:
        self._check_key(request)
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "leafkernels"} for name in self._models]
        return JSONResponse({"object": "list", "data": data})

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, is_chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, is_chat=True)

    def _check_key(self, request: Request) -> None:
        sent = request.headers.get("authorization", "")
        if self._key and not hmac.compare_digest(sent.encode(), f"Bearer {self._key}".encode()):
            raise RefusedError("Authorization must be the server's key: Bearer KEY", None, 401, "invalid_api_key")

    async def _answer(self, request: Request, is_chat: bool) -> Response:
        self._check_key(request)
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"the body must be JSON, got what does not read: {error}") from error
        asked = read(
            body,
            is_chat=is_chat,
            models=self._models,
            longest=self._longest,
            vocabulary=self._vocabulary,
            limits=self._limits,
            tokenizer=self._engine.get_tokenizer(),
        )
        said = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid4().hex}", "created": int(time.time())}
        said["model"] = body.get("model") or self._models[0]
        self._room.check(asked.branches)
        if asked.is_streamed:
            return StreamingResponse(self._stream(request, asked, said), media_type="text/event-stream")
        return await self._whole(request, asked, said)

    async def _search(self, asked: Asked, number: int, put: Callable[[str, Search | None], None]) -> Search:
        """Answer one prompt: ``put`` is called with each piece of text, the last one with the search."""
        ids, tokenizer = asked.prompts[number], self._engine.get_tokenizer()
        text = Text(tokenizer, ids, asked.stops)
        async with self._room.hold(asked.branches):
            stepper = self._make_stepper(
                self._engine,
                ahead=asked.search["chunk"],
                eos_token_ids=self._ends,
                suppress_tokens=self._suppressed,
            )
            found = await search_async(
                stepper,
                torch.tensor(ids),
                on_commit=lambda chunk: put(text.add(chunk), None),
                eos_token_ids=self._ends,
                is_stop=holds_any(asked.stops, tokenizer),
                **asked.search,
            )
        put(text.add([], is_end=True), found)
        return found

    async def _whole(self, request: Request, asked: Asked, said: dict[str, Any]) -> Response:
        texts: list[list[str]] = [[] for _ in asked.prompts]

        def keep(own: list[str], text: str, _: Search | None) -> None:
            own.append(text)

        work = asyncio.create_task(
            _all(self._search(asked, number, partial(keep, own)) for number, own in enumerate(texts))
        )
        gone = asyncio.create_task(_until_gone(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)  # nobody reads it
            searches = work.result()
        finally:
            await _end(work, gone)
        choices = [
            _choice(asked.is_chat, number, "".join(own), found)
            for number, (own, found) in enumerate(zip(texts, searches, strict=True))
        ]
        kind = "chat.completion" if asked.is_chat else "text_completion"
        return JSONResponse({**said, "object": kind, "choices": choices, "usage": _usage(asked, searches)})

    async def _stream(self, request: Request, asked: Asked, said: dict[str, Any]) -> AsyncIterator[str]:
        pieces: asyncio.Queue[tuple[int, str, Search | None] | None] = asyncio.Queue()
        searches: list[Search] = []
        said["object"] = "chat.completion.chunk" if asked.is_chat else "text_completion"

        def put(number: int, text: str, found: Search | None) -> None:
            pieces.put_nowait((number, text, found))

        async def all_prompts() -> None:
            try:
                await _all(self._search(asked, number, partial(put, number)) for number in range(len(asked.prompts)))
            finally:
                pieces.put_nowait(None)

        async def end_when_gone() -> None:
            await _until_gone(request)
            pieces.put_nowait(None)

        work, gone = asyncio.create_task(all_prompts()), asyncio.create_task(end_when_gone())
        try:
            if asked.is_chat:
                yield _event({**said, "choices": [_delta(True, 0, {"role": "assistant", "content": ""}, None)]})
            while (piece := await pieces.get()) is not None:
                number, text, found = piece
                if text:
                    content = {"content": text} if asked.is_chat else text
                    yield _event({**said, "choices": [_delta(asked.is_chat, number, content, None)]})
                if found is not None:
                    searches.append(found)
                    content = {} if asked.is_chat else ""
                    yield _event({**said, "choices": [_delta(asked.is_chat, number, content, found)]})
            if gone.done():
                return
            work.result()
            if asked.with_usage:
                yield _event({**said, "choices": [], "usage": _usage(asked, searches)})
            yield "data: [DONE]\n\n"
        except RefusedError as error:
            yield _event(error.body)
        except Exception as error:  # the answer has begun, so it is said there
            yield _event(_failed(error).body)
        finally:
            await _end(work, gone)


def _ids(value: Any) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _all(searches: Iterable[Coroutine[Any, Any, Search]]) -> list[Search]:
    """The results; where one fails, the others end."""
    tasks = [asyncio.create_task(search) for search in searches]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(*tasks)


def _about(found: Search) -> dict[str, Any]:
    """Beside what the API has: what the search says of an answer."""
    return {"score": found.score, "chunks": len(found.commits), "tokens_run": found.num_tokens}


def _choice(is_chat: bool, number: int, text: str, found: Search) -> dict[str, Any]:
    content = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    own = {"index": number, "logprobs": None, "finish_reason": found.finish_reason, "lookahead": _about(found)}
    return {**content, **own}


def _delta(is_chat: bool, number: int, content: Any, found: Search | None) -> dict[str, Any]:
    own = {"index": number, ("delta" if is_chat else "text"): content, "logprobs": None, "finish_reason": None}
    return own if found is None else {**own, "finish_reason": found.finish_reason, "lookahead": _about(found)}


def _usage(asked: Asked, searches: list[Search]) -> dict[str, int]:
    prompt, answer = sum(map(len, asked.prompts)), sum(len(found.token_ids) for found in searches)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return JSONResponse(error.body, status_code=error.status)


async def _refuse_route(request: Request, error: Any) -> Response:
    message = f"{request.method} {request.url.path} is no endpoint of this server"
    return await _refuse(request, RefusedError(message, None, error.status_code))


async def _refuse_error(request: Request, error: Exception) -> Response:
    return await _refuse(request, _failed(error))


def _failed(error: Exception) -> RefusedError:
    print(f"leafkernels.lookahead: {type(error).__name__}: {error}", file=sys.stderr)
    return RefusedError(f"the search has failed: {error}", None, 500)
