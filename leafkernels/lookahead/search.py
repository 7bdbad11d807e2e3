"""Streaming look-ahead: branch into the best tokens, commit the chunk whose best leaf has the highest mean reward.

The search of SLA (arXiv 2503.00029) as its released code computes it. It knows no model: a stepper runs the branches.
"""

import math
import operator
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from leafkernels._core.checks import check_count, check_finite, check_integer


class Best(NamedTuple):
    """In place of the logits of all ids: those of the K best of each of S branches, of equal ones the lower id first.

    ``search`` reads their differences only, so they may be log-probabilities, or logits up to a number for each branch.
    """

    values: Tensor  # (S, K), the best first; -inf where fewer are allowed
    token_ids: Tensor  # (S, K) int64


class Stepper(Protocol):
    """What ``search`` asks of a model. S branches, V ids; a reward says how good the answer is up to a token.

    For ``search_all`` the branches of all prompts are counted through, and ``prefill`` takes a list of B prompts and
    gives (B, V) and (B,).
    """

    def prefill(self, prompt_ids: Tensor) -> tuple[Tensor | Best, Tensor]:
        """Run a prompt (P,) int64: logits (1, V) of the next token, and the reward (1,) of the last prompt token."""

    def extend(self, parents: Tensor, token_ids: Tensor) -> tuple[Tensor | Best, Tensor]:
        """Logits (S, V) and rewards (S,) of new branches: ``parents[s]`` of the call before plus ``token_ids[s]``.

        Both are int64 on the CPU. Branches of the call before that ``parents`` does not name are gone.
        """


class Candidate(NamedTuple):
    """A chunk that could have been committed."""

    first_token: int
    length: int  # tokens of the answer, this chunk included
    is_finished: bool
    value: float  # the best mean reward of a leaf below it
    token_ids: list[int]  # of this chunk


class Commit(NamedTuple):
    """A chunk that was committed, and what it was chosen from."""

    forward: int  # number of the forward after which it was, the prompt's being 1
    token_ids: list[int]
    chosen: int  # index into candidates
    candidates: list[Candidate]  # the model's best first


class Search(NamedTuple):
    """The answer of ``search`` and how it came about."""

    token_ids: list[int]  # with the end token, if there is one
    score: float  # mean reward of the last prompt token and of all tokens but the last
    finish_reason: str  # "stop" or "length"
    commits: list[Commit]
    num_forwards: int
    peak_branches: int  # most branches in a forward
    num_tokens: int  # branches of all forwards but the prompt's: tokens that the model has run


class _Branch(NamedTuple):
    """The ranks of its choices, one for each chunk after the first, and its tokens and their rewards."""

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    total: float
    num_rewards: int
    finish_reason: str | None = None

    @property
    def score(self) -> float:
        return self.total / self.num_rewards


class _Ends(NamedTuple):
    """What ends a branch."""

    max_new_tokens: int
    eos_token_ids: Collection[int]
    is_stop: Callable[[Sequence[int]], bool] | None

    def reason(self, tokens: tuple[int, ...]) -> str | None:
        if self.is_stop is not None and self.is_stop(tokens):
            return "stop"
        if len(tokens) == self.max_new_tokens:
            return "length"
        return "stop" if tokens[-1] in self.eos_token_ids else None


class Options(NamedTuple):
    """What all searches of a call share; the arguments of ``search``."""

    width: int
    chunk: int
    depth: int
    max_new_tokens: int
    eos_token_ids: int | Iterable[int] = ()
    is_stop: Callable[[Sequence[int]], bool] | None = None
    with_end: bool = False
    min_p: float = 0.0
    max_branches: int = 256


def search(
    stepper: Stepper,
    prompt_ids: Tensor,
    *,
    width: int,
    chunk: int,
    depth: int,
    max_new_tokens: int,
    eos_token_ids: int | Iterable[int] = (),
    on_commit: Callable[[list[int]], None] | None = None,
    is_stop: Callable[[Sequence[int]], bool] | None = None,
    with_end: bool = False,
    min_p: float = 0.0,
    max_branches: int = 256,
) -> Search:
    """Decode with a look at what follows: every ``chunk`` tokens each branch forks into its ``width`` best tokens.

    Between forks a branch takes the model's best token; nothing is sampled, and the first chunk does not fork. When the
    branches have completed ``depth`` chunks more than the oldest chunk that is not committed, the candidate for that
    chunk is committed whose best leaf has the highest score, ties to the token that the model prefers; its rivals go
    with all that is below them. The score of a branch is the mean reward of the last prompt token and of its tokens,
    without the last token of a finished branch, which no forward sees. What is committed is never retracted, and is
    greedy decoding where ``width`` is 1. When no branch runs any more, the finished branch of the highest score is the
    answer (ties: one that ended by length, then the one that began earlier, then the model's preference).

    Chunk c is committed at forward (c + depth) chunk + 1; live branches are width ** (depth + 1) at most, and width
    times as many with ``with_end``, where candidates that all end at once fork before one is chosen.

    Args:
        stepper: see ``Stepper``; ``TransformersStepper`` is one.
        prompt_ids: (P,) int64, at least one token.
        width: n, tokens that a branch forks into, at least 1 and at most the vocabulary.
        chunk: k, tokens from a fork to the next, at least 1.
        depth: d, chunks to look ahead, at least 0.
        max_new_tokens: length of the longest answer, at least 1; a branch that reaches it ends by "length", also with
            an end token.
        eos_token_ids: one id or several; a branch that takes such an id ends by "stop". The id stays in the answer.
        on_commit: called with each chunk when it is committed, and at the end with what remains.
        is_stop: called with the tokens of a branch after each; True ends it by "stop", also at ``max_new_tokens``.
        with_end: run the last token of a branch too and count its reward, so that an answer can be worth less for where
            it ends. False is as the authors have it.
        min_p: fork only into tokens that have at least this share of the probability of the model's best one. With 0,
            as the authors have it, every fork has ``width`` branches, also where the model is sure.
        max_branches: what that number of live branches may be at most.

    Returns:
        ``Search``.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came. ValueError also
            where a reward is not finite, or no logit of a branch that goes on is.
    """
    options = Options(width, chunk, depth, max_new_tokens, eos_token_ids, is_stop, with_end, min_p, max_branches)
    run = begin(prompt_ids, on_commit, options)
    logits, rewards = stepper.prefill(prompt_ids)
    while True:
        try:
            parents, token_ids = run.send((logits, rewards.tolist()))
        except StopIteration as end:
            found: Search = end.value
            return found
        logits, rewards = stepper.extend(torch.tensor(parents), torch.tensor(token_ids))


def search_all(
    stepper: Any,
    prompts: Sequence[Tensor],
    *,
    width: int,
    chunk: int,
    depth: int,
    max_new_tokens: int,
    eos_token_ids: int | Iterable[int] = (),
    on_commit: Callable[[int, list[int]], None] | None = None,
    is_stop: Callable[[Sequence[int]], bool] | None = None,
    with_end: bool = False,
    min_p: float = 0.0,
    max_branches: int = 256,
) -> list[Search]:
    """``search`` for several prompts in the same forwards: each has its own tree, and the answer that it has alone.

    Args:
        stepper: one whose ``prefill`` takes several prompts, as ``TransformersStepper``'s.
        prompts: B tensors (P,) int64, which may differ in length.
        on_commit: called with the number of the prompt and the chunk.
        others: as in ``search``; ``max_branches`` is for each prompt.

    Returns:
        A ``Search`` for each prompt; its ``num_forwards`` are those that its own tree took part in.
    """
    if isinstance(prompts, (str, Tensor)) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a list of tensors (P,), one for each prompt, got {type(prompts).__name__}")
    listeners = [None if on_commit is None else partial(on_commit, number) for number in range(len(prompts))]
    # Iterated once, also where it is an iterator.
    eos_token_ids = as_ids("eos_token_ids", eos_token_ids)
    options = Options(width, chunk, depth, max_new_tokens, eos_token_ids, is_stop, with_end, min_p, max_branches)
    runs = [begin(prompt_ids, listener, options) for prompt_ids, listener in zip(prompts, listeners, strict=True)]
    found: list[Search | None] = [None] * len(prompts)
    if prompts:
        logits, rewards = stepper.prefill(prompts)
    counts = dict.fromkeys(range(len(prompts)), 1)  # branches of each prompt in the last forward
    while counts:
        asked, first = {}, 0
        values = rewards.tolist()
        for number, count in counts.items():
            part = slice(first, first + count)
            ours = Best(*(side[part] for side in logits)) if isinstance(logits, Best) else logits[part]
            try:
                parents, token_ids = runs[number].send((ours, values[part]))
            except StopIteration as end:
                found[number] = end.value
            else:
                asked[number] = [first + parent for parent in parents], token_ids
            first += count
        counts = {number: len(token_ids) for number, (_, token_ids) in asked.items()}
        if counts:
            parents, token_ids = ([i for lists in asked.values() for i in lists[side]] for side in (0, 1))
            logits, rewards = stepper.extend(torch.tensor(parents), torch.tensor(token_ids))
    return [result for result in found if result is not None]


def as_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id, or several, as a tuple; raises TypeError where ``value`` is neither."""
    try:
        if not isinstance(value, (str, bytes, bool)):
            return tuple(map(operator.index, value if isinstance(value, Iterable) else [value]))
    except TypeError:
        pass
    raise TypeError(f"{name} must be an int or several of them, got {value!r}")


def check_options(
    *, width: int, chunk: int, depth: int, max_new_tokens: int, with_end: bool, min_p: float, max_branches: int
) -> None:
    """Raise unless a search can have these arguments; the message names the one that is wrong."""
    check_count("width", width, 1)
    check_count("chunk", chunk, 1)
    check_count("depth", depth, 0)
    check_count("max_new_tokens", max_new_tokens, 1)
    check_count("max_branches", max_branches, 1)
    check_finite("min_p", min_p)
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must lie between 0 and 1, got {min_p}")
    # With the end counted, candidates that all end at once fork once more before one is chosen.
    forks = depth + 1 + bool(with_end)
    # A power of two that is too large decides it, without the digits of a huge one.
    is_huge = width > 1 and forks > max_branches.bit_length()
    if is_huge or width**forks > max_branches:
        raise ValueError(
            f"width and depth must keep width ** (depth + {forks - depth}) at {max_branches} branches (max_branches), "
            f"got {width} ** {forks}{'' if is_huge else f' = {width**forks}'}"
        )


Forwards = Generator[tuple[list[int], list[int]], tuple[Tensor | Best, list[float]], Search]


def begin(prompt_ids: Tensor, on_commit: Callable[[list[int]], None] | None, options: Options) -> Forwards:
    """One search, whose arguments are checked, that waits for the forward of its prompt.

    It is sent logits and rewards, and yields the parents and the tokens of the next forward. ``StopIteration`` holds
    the result.
    """
    ends = _Ends(options.max_new_tokens, as_ids("eos_token_ids", options.eos_token_ids), options.is_stop)
    check_options(
        width=options.width,
        chunk=options.chunk,
        depth=options.depth,
        max_new_tokens=options.max_new_tokens,
        with_end=options.with_end,
        min_p=options.min_p,
        max_branches=options.max_branches,
    )
    if check_integer("prompt_ids", prompt_ids).dim() != 1 or prompt_ids.numel() == 0:
        raise ValueError(f"prompt_ids must have shape (P,) with P at least 1, got shape {tuple(prompt_ids.shape)}")
    run = _run(on_commit, options, ends)
    next(run)
    return run


def _run(on_commit: Callable[[list[int]], None] | None, options: Options, ends: _Ends) -> Forwards:
    width, chunk, depth, *_, with_end, min_p, _ = options
    logits, rewards = yield [], []
    if isinstance(logits, Best):
        if width > logits.values.shape[-1]:
            raise ValueError(
                f"width must be at most {logits.values.shape[-1]}, the best tokens that the stepper gives, got {width}"
            )
    elif width > logits.shape[-1]:
        raise ValueError(f"width must be at most the vocabulary, {logits.shape[-1]} ids, got {width}")
    _check_finite(rewards, 1)
    running = [_Branch((), (), rewards[0], 1)]
    finished: list[_Branch] = []
    commits: list[Commit] = []
    forwards = peak = 1
    num_tokens = 0
    while True:
        grown = forwards - 1
        is_fork = grown > 0 and grown % chunk == 0
        finished += [branch for branch in running if branch.finish_reason]  # whose last token has run
        grown_parents, branches = _grow(running, logits, width if is_fork else 1, is_fork, min_p, ends, forwards)
        if not with_end:
            finished += [branch for branch in branches if branch.finish_reason]
        live = [index for index, branch in enumerate(branches) if with_end or not branch.finish_reason]
        goes_on = any(not branch.finish_reason for branch in branches)
        if is_fork and goes_on and grown == (len(commits) + 1 + depth) * chunk:
            commit, chosen = _commit([*finished, *(branches[index] for index in live)], len(commits), chunk, forwards)
            commits.append(commit)
            if on_commit:
                on_commit(commit.token_ids)
            live = [index for index in live if _is_below(branches[index], chosen)]
            finished = [branch for branch in finished if _is_below(branch, chosen)]
        if not live:
            break
        running = [branches[index] for index in live]
        logits, rewards = yield [grown_parents[index] for index in live], [branch.tokens[-1] for branch in running]
        _check_finite(rewards, forwards + 1)
        running = [
            branch._replace(total=branch.total + reward, num_rewards=branch.num_rewards + 1)
            for branch, reward in zip(running, rewards, strict=True)
        ]
        forwards, peak, num_tokens = forwards + 1, max(peak, len(running)), num_tokens + len(running)

    answer = min(finished, key=lambda b: (-b.score, b.finish_reason != "length", len(b.path), b.path))
    rest = list(answer.tokens[len(commits) * chunk :])
    if rest and on_commit:
        on_commit(rest)
    assert answer.finish_reason is not None
    return Search(list(answer.tokens), answer.score, answer.finish_reason, commits, forwards, peak, num_tokens)


def _grow(
    running: list[_Branch], logits: Tensor | Best, width: int, is_fork: bool, min_p: float, ends: _Ends, forward: int
) -> tuple[list[int], list[_Branch]]:
    """Every branch with each of its ``width`` best tokens, and the indices of the branches they come from."""
    values, indices = _best(logits, width)
    first = values[:, :1]
    # A best logit that is NaN or infinite leaves none; it travels with the tokens, so that the host waits once.
    is_taken = ((values - first).float().exp() >= min_p) & (values > float("-inf")) & first.isfinite()
    best = [[token for token in tokens if token >= 0] for tokens in indices.where(is_taken, -1).tolist()]
    parents, branches = [], []
    for index, (branch, tokens) in enumerate(zip(running, best, strict=True)):
        if branch.finish_reason:
            continue
        if not tokens:
            _check_finite([float(values[index, 0])], forward)
        for rank, token in enumerate(tokens):
            path = (*branch.path, rank) if is_fork else branch.path
            grown = (*branch.tokens, token)
            parents.append(index)
            branches.append(branch._replace(path=path, tokens=grown, finish_reason=ends.reason(grown)))
    return parents, branches


def _best(logits: Tensor | Best, width: int) -> tuple[Tensor, Tensor]:
    """Values and ids (S, width) of the best of (S, V), of equal ones the lower id first.

    As transformers' greedy decoding has it, whose token a fork must contain; topk takes any of them. Where fewer are
    left than ``width``, the values of the others are -inf.
    """
    if isinstance(logits, Best):
        return logits.values[:, :width], logits.token_ids[:, :width]
    found = [logits.max(-1, keepdim=True)]
    while len(found) < width:
        logits = logits.scatter(-1, found[-1].indices, float("-inf"))
        found.append(logits.max(-1, keepdim=True))
    return torch.cat([best.values for best in found], -1), torch.cat([best.indices for best in found], -1)


def _check_finite(numbers: Iterable[float], forward: int) -> None:
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(
                f"stepper must give finite rewards and a finite best logit, got {number} at forward {forward}"
            )


def _commit(leaves: list[_Branch], committed: int, chunk: int, forward: int) -> tuple[Commit, tuple[int, ...]]:
    """Choose among the candidates that follow ``committed`` chunks; the path of the chosen one too."""
    below: dict[tuple[int, ...], list[_Branch]] = {}
    for leaf in leaves:
        below.setdefault(leaf.path[:committed], []).append(leaf)
    start, end = committed * chunk, (committed + 1) * chunk
    paths = sorted(below)
    candidates = []
    for path in paths:
        tokens = below[path][0].tokens[:end]
        # A branch that ended in this very chunk is all that there is of its candidate.
        is_finished = len(below[path][0].path) == committed and below[path][0].finish_reason is not None
        value = max(leaf.score for leaf in below[path])
        candidates.append(Candidate(tokens[start], len(tokens), is_finished, value, list(tokens[start:])))
    chosen = max(range(len(candidates)), key=lambda index: candidates[index].value)
    return Commit(forward, candidates[chosen].token_ids, chosen, candidates), paths[chosen]


def _is_below(branch: _Branch, path: tuple[int, ...]) -> bool:
    return branch.path[: len(path)] == path
