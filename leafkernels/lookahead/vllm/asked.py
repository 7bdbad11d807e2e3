"""What a client of the server asks for, as OpenAI's API has it; it needs neither vLLM nor a web framework."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from leafkernels._core.checks import check_count
from leafkernels.lookahead.search import check_options

# Arguments of the API that a search cannot follow: what they may be, since nothing is sampled then.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
}
_BOTH = {"model", "max_tokens", "stream", "stream_options", "stop", "user", "seed", "metadata"}
_SEARCH = {"width", "chunk", "depth", "min_p", "with_end"}
_OWN = {True: {"messages", "max_completion_tokens", "chat_template_kwargs"}, False: {"prompt"}}


class RefusedError(Exception):
    """What is answered with an error of the API: ``{"error": {"message", "type", "param", "code"}}``."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
        kind = kinds.get(status, "server_error" if status > 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Limits(NamedTuple):
    """What the server does at most, and what a request has that does not say."""

    max_width: int = 16
    max_branches: int = 64  # of one search
    all_branches: int = 256  # of all that run; others wait
    max_waiting: int = 1024  # requests; others are answered with 429
    width: int = 2
    chunk: int = 10
    depth: int = 2
    min_p: float = 0.0


def check_limits(limits: Limits) -> None:
    """Raise ValueError unless a server can have these limits, and the search of a request that says nothing them."""
    for name in ("max_width", "max_branches", "all_branches"):
        check_count(name, getattr(limits, name), 1)
    check_count("max_waiting", limits.max_waiting, 0)
    if limits.max_branches > limits.all_branches:
        raise ValueError(f"max_branches must be at most all_branches, {limits.all_branches}, got {limits.max_branches}")
    try:
        _search({}, "max_tokens", 1, limits)
    except RefusedError as error:
        raise ValueError(str(error)) from error


class Asked(NamedTuple):
    """A request."""

    is_chat: bool
    prompts: list[list[int]]
    search: dict[str, Any]  # arguments of the search but for its ends
    stops: list[str]
    is_streamed: bool
    with_usage: bool

    @property
    def branches(self) -> int:
        """The most that a search of it has at once."""
        search = self.search
        return int(search["width"] ** (search["depth"] + 1 + search["with_end"]))


def read(
    body: Any, *, is_chat: bool, models: Sequence[str], longest: int, vocabulary: int, limits: Limits, tokenizer: Any
) -> Asked:
    """What the JSON of a request asks for.

    Args:
        body: the decoded JSON.
        models: names that the request may have as ``model``; the first is that of one without.
        longest: the most tokens of prompt and answer.
        vocabulary: how many ids there are.
        tokenizer: of the model.

    Raises:
        RefusedError: it is not what the API knows, or what a search can do; the message names the argument.
    """
    if not isinstance(body, dict):
        raise RefusedError(f"the body must be a JSON object, got {type(body).__name__}")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in _NEUTRAL:
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in _NEUTRAL[name]):
                (neutral,) = _NEUTRAL[name]
                raise RefusedError(
                    f"{name} must be {neutral!r} or absent, since a search takes no samples, got {value!r:.100}", name
                )
        elif name not in _BOTH | _SEARCH | _OWN[is_chat]:
            raise RefusedError(f"{name} is not an argument of this endpoint, got {value!r:.100}", name)
    model = _typed(given, "model", str, models[0])
    if model not in models:
        raise RefusedError(f"model must be {' or '.join(models)}, got {model!r}", "model", 404, "model_not_found")
    make = _chat_prompt if is_chat else _prompts
    prompts = make(given, tokenizer, vocabulary)
    most = max(map(len, prompts))
    room = longest - most
    if room < 1:
        raise RefusedError(
            f"{'messages' if is_chat else 'prompt'} must leave room for an answer in {longest} tokens, got {most}",
            "messages" if is_chat else "prompt",
            code="context_length_exceeded",
        )
    name = "max_completion_tokens" if is_chat and "max_completion_tokens" in given else "max_tokens"
    tokens = _typed(given, name, int, room if is_chat else min(16, room))
    if tokens > room:
        raise RefusedError(
            f"{name} must be at most {room}, what a prompt of {most} tokens leaves of {longest}, got {tokens}",
            name,
            code="context_length_exceeded",
        )
    stream_options = _typed(given, "stream_options", dict, {})
    return Asked(
        is_chat,
        prompts,
        _search(given, name, tokens, limits),
        _stops(given),
        _typed(given, "stream", bool, False),
        _typed(stream_options, "include_usage", bool, False),
    )


def _search(given: Mapping[str, Any], name: str, tokens: int, limits: Limits) -> dict[str, Any]:
    options: dict[str, Any] = {
        "width": _typed(given, "width", int, limits.width),
        "chunk": _typed(given, "chunk", int, limits.chunk),
        "depth": _typed(given, "depth", int, limits.depth),
        "min_p": _typed(given, "min_p", (int, float), limits.min_p),
        "with_end": _typed(given, "with_end", bool, False),
        "max_new_tokens": tokens,
        "max_branches": limits.max_branches,
    }
    if options["width"] > limits.max_width:
        raise RefusedError(f"width must be at most {limits.max_width}, got {options['width']}", "width")
    try:
        check_options(**options)
    except ValueError as error:
        argument = str(error).split()[0]
        raise RefusedError(
            str(error).replace("max_new_tokens", name), name if argument == "max_new_tokens" else argument
        ) from error
    return options


def _typed(given: Mapping[str, Any], name: str, kind: Any, default: Any) -> Any:
    value = given.get(name, default)
    if value is None:
        return default
    # A bool is an int to Python.
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise RefusedError(f"{name} must be {' or '.join(k.__name__ for k in kinds)}, got {value!r:.100}", name)
    return value


def _stops(given: Mapping[str, Any]) -> list[str]:
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > 16 or not all(isinstance(one, str) and one for one in stops):
        raise RefusedError(f"stop must be a string or up to 16 of them, none of them empty, got {stop!r:.100}", "stop")
    return stops


def _prompts(given: Mapping[str, Any], tokenizer: Any, vocabulary: int) -> list[list[int]]:
    prompt = given.get("prompt")
    # A text, the ids of one, or several of either.
    several = prompt if isinstance(prompt, list) and not all(type(one) is int for one in prompt) else [prompt]
    found = []
    for one in several:
        if isinstance(one, str):
            ids = tokenizer(one)["input_ids"]
        elif isinstance(one, list) and one and all(type(id_) is int and 0 <= id_ < vocabulary for id_ in one):
            ids = one
        else:
            raise RefusedError(
                f"prompt must be a text, or ids from 0 to {vocabulary - 1}, or several of them, got {prompt!r:.100}",
                "prompt",
            )
        if not ids:
            raise RefusedError(f"prompt must have a token, got {one!r}", "prompt")
        found.append(list(ids))
    return found


def _chat_prompt(given: Mapping[str, Any], tokenizer: Any, _: int) -> list[list[int]]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise RefusedError(
            f"messages must be a list of objects with role and content, texts, got {messages!r:.100}", "messages"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise RefusedError("the model has no chat template: ask /v1/completions", "messages")
    said = [
        {**one, "content": one["content"] if isinstance(one["content"], str) else "".join(map(_text, one["content"]))}
        for one in messages
    ]
    more = _typed(given, "chat_template_kwargs", dict, {})
    own = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    if set(more) & set(own):
        raise RefusedError(
            f"chat_template_kwargs must not have {', '.join(own)}, got {more!r:.100}", "chat_template_kwargs"
        )
    try:
        return [list(tokenizer.apply_chat_template(said, **more, **own))]
    except Exception as error:  # of the template: it may raise anything
        raise RefusedError(f"messages must fit the model's chat template: {error}", "messages") from error


def _is_message(one: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("role"), str):
        return False
    content = one.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(_text(part) is not None for part in content))


def _text(part: Any) -> Any:
    is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    return part["text"] if is_text else None


class Text:
    """The text of an answer as its chunks come: what is handed out is never retracted.

    The end of a text waits where a character is not whole yet, or a stop string may begin there. A stop string and what
    follows it are left out.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._stops, self._ids = tokenizer, stops, []  # type: Any, Sequence[str], list[int]
        # Behind other tokens the first one keeps its space.
        self._before = list(prompt_ids[-6:])
        begin = self._decode([])
        self._skipped = len(begin)
        if begin.endswith("\ufffd"):
            self._before, self._skipped = [], 0
        self._sent = 0

    def add(self, token_ids: Sequence[int], is_end: bool = False) -> str:
        """What the chunk adds to the text."""
        self._ids += token_ids
        text = self._decode(self._ids)[self._skipped :]
        ends = [
            place for place in (text.find(stop, max(0, self._sent - len(stop))) for stop in self._stops) if place >= 0
        ]
        if ends:
            text = text[: min(ends)]
        elif not is_end:
            text = text[: len(text) - self._waiting(text)]
        new = text[self._sent :]
        self._sent += len(new)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode([*self._before, *token_ids], skip_special_tokens=True))

    def _waiting(self, text: str) -> int:
        # What is not whole yet shows as these.
        whole = text.rstrip("\ufffd")
        begun = (n for stop in self._stops for n in range(1, len(stop)) if whole.endswith(stop[:n]))
        return len(text) - len(whole) + max(begun, default=0)
