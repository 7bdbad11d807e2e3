"""``python -m leafkernels.lookahead``: an answer that is streamed while a model looks ahead."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from leafkernels._core.interrupt import unwatch
from leafkernels.lookahead.search import Search, check_options
from leafkernels.lookahead.transformers import RewardTransformer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; whatever a person can mend is one sentence on standard error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["serve"]:
            from leafkernels.lookahead.vllm import serve

            return serve.main(argv[1:])
        return _answer(_parse(argv))
    except (OSError, ValueError, ImportError) as error:
        print(f"leafkernels.lookahead: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("leafkernels.lookahead: interrupted", file=sys.stderr)
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m leafkernels.lookahead", description=__doc__, epilog="serve --help: a server on vLLM."
    )
    parser.add_argument("prompt", help="what to answer; '-' reads it from standard input")
    parser.add_argument("--model", help="folder or name of the model (default: the one the channel names)")
    parser.add_argument("--channel", required=True, help="folder that RewardTransformer.save_pretrained wrote")
    parser.add_argument("--width", type=int, default=2, help="best tokens that a branch forks into (default: 2)")
    parser.add_argument("--chunk", type=int, default=10, help="tokens from fork to fork (default: 10)")
    parser.add_argument("--depth", type=int, default=2, help="chunks to look ahead (default: 2)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of the longest answer (default: 256)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="an answer ends where it holds this"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="least share of the best token's probability to fork into"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with the model (default: refuse it)"
    )
    parser.add_argument("--plain", action="store_true", help="leave the tokenizer's chat template alone")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--explain", action="store_true", help="show the candidates of each chunk with their values")
    parser.add_argument("--compare", action="store_true", help="show the greedy answer beside")
    return parser.parse_args(argv)


def _answer(arguments: argparse.Namespace) -> int:
    from transformers import AutoTokenizer, TextStreamer

    # Before the model is loaded, which takes its time.
    shared = {"chunk": arguments.chunk, "depth": arguments.depth, "max_new_tokens": arguments.max_new_tokens}
    shared |= {"min_p": arguments.min_p, "max_branches": 256}
    check_options(width=arguments.width, with_end=False, **shared)
    _check_device(arguments.device)
    # So that nothing else reads what is piped in.
    prompt = _read_input() if arguments.prompt == "-" else arguments.prompt
    trust = {"trust_remote_code": arguments.trust_remote_code}
    try:
        model = RewardTransformer.from_pretrained(arguments.channel, arguments.model, **trust)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model or model.config.name_or_path, **trust)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError("the model comes with code of its own, which --trust-remote-code lets run") from error
        raise
    model.to(arguments.device)
    unwatch()  # what loads the model imports more
    input_ids = _prompt_ids(tokenizer, prompt, arguments.plain).to(arguments.device)
    streamer = _Timed(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    options = {**shared, "stop_strings": arguments.stop, "tokenizer": tokenizer}
    found = model.generate(input_ids, width=arguments.width, streamer=streamer, **options)
    console = Console(highlight=False, emoji=False)
    if arguments.explain:
        console.print(_candidates(found, tokenizer))
    if arguments.compare:
        beside = _Timed(None)
        greedy = model.generate(input_ids, width=1, streamer=beside, **options)
        console.print(_comparison({"look ahead": (found, streamer), "greedy": (greedy, beside)}, tokenizer))
    return 0


def _read_input() -> str:
    if sys.stdin is None:
        raise ValueError("prompt must come from standard input, which is closed")
    return sys.stdin.read().removeprefix("\ufeff")


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device must be a device that PyTorch has here, got {name!r}") from error


def _prompt_ids(tokenizer: Any, prompt: str, plain: bool) -> Tensor:
    if plain or not tokenizer.chat_template:
        ids, bare = (tokenizer(prompt, add_special_tokens=adds)["input_ids"] for adds in (True, False))
        # A begin or an end token that the prompt has already is not added to it.
        for token, step in ((tokenizer.bos_token_id, 1), (tokenizer.eos_token_id, -1)):
            had, has = (_count_first(row[::step], token) for row in (bare, ids))
            if had:
                ids = ids[::step][max(has - had, 0) :][::step]
    else:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return torch.tensor(ids, dtype=torch.int64)


def _count_first(ids: list[int], token: int | None) -> int:
    """How many of the first ids are that one."""
    return next((number for number, other in enumerate(ids) if other != token), len(ids))


class _Timed:
    """A streamer that notes when it was made, when each chunk came and when the end, before another."""

    def __init__(self, streamer: Any) -> None:
        self._streamer, self._has_prompt = streamer, False
        self.times = [time.perf_counter()]

    def put(self, token_ids: Tensor) -> None:
        if self._has_prompt:
            self.times.append(time.perf_counter())
        self._has_prompt = True
        if self._streamer is not None:
            self._streamer.put(token_ids)

    def end(self) -> None:
        self.times.append(time.perf_counter())
        if self._streamer is not None:
            self._streamer.end()


def _shown(tokenizer: Any, token_ids: list[int]) -> Text:
    """Text as it is, control characters as escapes; rich's markup is left alone."""
    text = tokenizer.decode(token_ids)
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def _candidates(found: Search, tokenizer: Any) -> Table:
    table = Table(title="candidates of each chunk; the mean reward of the best answer found below each")
    for column in ("chunk", "forward", "value", "", "candidate, the model's best first"):
        table.add_column(column, justify="left" if column.startswith("candidate") else "right")
    for number, commit in enumerate(found.commits, 1):
        for index, candidate in enumerate(commit.candidates):
            first = index == 0
            table.add_row(
                str(number) if first else "",
                str(commit.forward) if first else "",
                f"{candidate.value:.3f}",
                "*" if index == commit.chosen else "",
                _shown(tokenizer, candidate.token_ids),
                style="bold" if index == commit.chosen else "",
                end_section=index == len(commit.candidates) - 1,
            )
    rest = found.token_ids[sum(len(commit.token_ids) for commit in found.commits) :]
    if rest:
        table.add_row("rest", str(found.num_forwards), f"{found.score:.3f}", "*", _shown(tokenizer, rest), style="bold")
    return table


def _comparison(answers: dict[str, tuple[Search, _Timed]], tokenizer: Any) -> Table:
    table = Table(title="beside greedy decoding")
    table.add_column("")
    for name in answers:
        table.add_column(name, overflow="fold")
    columns: list[dict[str, Any]] = []
    for found, timed in answers.values():
        seconds = timed.times[-1] - timed.times[0]
        columns.append(
            {
                "answer": _shown(tokenizer, found.token_ids),
                "mean reward": f"{found.score:.3f}",
                "tokens, and why it ended": f"{len(found.token_ids)}, {found.finish_reason}",
                "forwards, tokens run in them": f"{found.num_forwards}, {found.num_tokens}",
                "seconds to the first chunk": f"{timed.times[1] - timed.times[0]:.3f}",
                "tokens a second": f"{len(found.token_ids) / seconds:.1f}",
            }
        )
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    return table


if __name__ == "__main__":
    sys.exit(main())
