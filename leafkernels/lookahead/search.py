"""Streaming look-ahead: branch into the best tokens, commit the chunk whose best leaf has the highest mean reward.

The search of SLA (arXiv 2503.00029) as its released code computes it. It knows no model: a stepper runs the branches.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from leafkernels._core.checks import check_count


class Stepper(Protocol):
    """What ``search`` asks of a model. S branches, V ids; a reward says how good the answer is up to a token."""

    def prefill(self, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Run a prompt (P,) int64: logits (1, V) of the next token, and the reward (1,) of the last prompt token."""

    def extend(self, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (S, V) and rewards (S,) of new branches: ``parents[s]`` of the call before plus ``token_ids[s]``.

        Both are int64 on the CPU. Branches of the call before that ``parents`` does not name are gone.
        """


class Candidate(NamedTuple):
    """A chunk that could have been committed."""

    first_token: int
    length: int  # tokens of the answer, this chunk included
    is_finished: bool
    value: float  # the best mean reward of a leaf below it


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


def search(
    stepper: Stepper,
    prompt_ids: Tensor,
    *,
    width: int,
    chunk: int,
    depth: int,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    on_commit: Callable[[list[int]], None] | None = None,
    max_branches: int = 256,
) -> Search:
    """Decode with a look at what follows: every ``chunk`` tokens each branch forks into its ``width`` best tokens.

    Between forks a branch takes the model's best token; nothing is sampled, and the first chunk does not fork. When the
    branches have completed ``depth`` chunks more than the oldest chunk that is not committed, the candidate for that
    chunk is committed whose best leaf has the highest score, ties to the token that the model prefers; its rivals go
    with all that is below them. The score of a branch is the mean reward of the last prompt token and of its tokens,
    less the last token of a finished branch, which no forward sees. What is committed is never retracted, and is greedy
    decoding where ``width`` is 1. When no branch runs any more, the finished branch of the highest score is the answer
    (ties: one that ended by length, then the one that began earlier, then the model's preference).

    Chunk c is committed at forward (c + depth) chunk + 1; live branches are width ** (depth + 1) at most.

    Args:
        stepper: see ``Stepper``; ``TransformersStepper`` is one.
        prompt_ids: (P,) int64, at least one token.
        width: n, tokens that a branch forks into, at least 1 and at most the vocabulary.
        chunk: k, tokens from a fork to the next, at least 1.
        depth: d, chunks to look ahead, at least 0.
        max_new_tokens: length of the longest answer, at least 1; a branch that reaches it ends by "length", also with
            an end token.
        eos_token_ids: a branch that takes one of them ends by "stop". They stay in the answer.
        on_commit: called with each chunk when it is committed, and at the end with what remains.
        max_branches: what ``width ** (depth + 1)`` may be at most.

    Returns:
        ``Search``.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.
    """
    check_count("width", width, 1)
    check_count("chunk", chunk, 1)
    check_count("depth", depth, 0)
    check_count("max_new_tokens", max_new_tokens, 1)
    if width ** (depth + 1) > max_branches:
        raise ValueError(
            f"width and depth must keep width ** (depth + 1) at {max_branches} branches (max_branches), got "
            f"{width} ** {depth + 1} = {width ** (depth + 1)}"
        )
    if not isinstance(prompt_ids, Tensor) or prompt_ids.dim() != 1 or prompt_ids.numel() == 0:
        came = tuple(prompt_ids.shape) if isinstance(prompt_ids, Tensor) else type(prompt_ids).__name__
        raise ValueError(f"prompt_ids must be a tensor of shape (P,) with P at least 1, got {came}")

    logits, rewards = stepper.prefill(prompt_ids)
    if width > logits.shape[-1]:
        raise ValueError(f"width must be at most the vocabulary, {logits.shape[-1]} ids, got {width}")
    running = [_Branch((), (), float(rewards[0]), 1)]
    finished: list[_Branch] = []
    commits: list[Commit] = []
    forwards = peak = 1
    while True:
        grown = forwards - 1
        is_fork = grown > 0 and grown % chunk == 0
        grown_parents, branches = _grow(
            running, logits, width if is_fork else 1, is_fork, max_new_tokens, eos_token_ids
        )
        finished += [branch for branch in branches if branch.finish_reason]
        live = [index for index, branch in enumerate(branches) if not branch.finish_reason]
        if is_fork and live and grown == (len(commits) + 1 + depth) * chunk:
            commit, chosen = _commit([*finished, *(branches[index] for index in live)], len(commits), chunk, forwards)
            commits.append(commit)
            if on_commit:
                on_commit(commit.token_ids)
            live = [index for index in live if _is_below(branches[index], chosen)]
            finished = [branch for branch in finished if _is_below(branch, chosen)]
        if not live:
            break
        running = [branches[index] for index in live]
        parents = torch.tensor([grown_parents[index] for index in live])
        logits, rewards = stepper.extend(parents, torch.tensor([branch.tokens[-1] for branch in running]))
        running = [
            branch._replace(total=branch.total + reward, num_rewards=branch.num_rewards + 1)
            for branch, reward in zip(running, rewards.tolist(), strict=True)
        ]
        forwards, peak = forwards + 1, max(peak, len(running))

    answer = min(finished, key=lambda b: (-b.score, b.finish_reason != "length", len(b.path), b.path))
    rest = list(answer.tokens[len(commits) * chunk :])
    if rest and on_commit:
        on_commit(rest)
    assert answer.finish_reason is not None
    return Search(list(answer.tokens), answer.score, answer.finish_reason, commits, forwards, peak)


def _grow(
    running: list[_Branch],
    logits: Tensor,
    width: int,
    is_fork: bool,
    max_new_tokens: int,
    eos_token_ids: Collection[int],
) -> tuple[list[int], list[_Branch]]:
    """Every branch with each of its ``width`` best tokens, and the indices of the branches they come from."""
    best = logits.argmax(-1, keepdim=True) if width == 1 else logits.topk(width, dim=-1).indices
    parents, branches = [], []
    for index, (branch, tokens) in enumerate(zip(running, best.tolist(), strict=True)):
        for rank, token in enumerate(tokens):
            reason = "stop" if token in eos_token_ids else None
            if len(branch.tokens) + 1 == max_new_tokens:
                reason = "length"
            path = (*branch.path, rank) if is_fork else branch.path
            parents.append(index)
            branches.append(branch._replace(path=path, tokens=(*branch.tokens, token), finish_reason=reason))
    return parents, branches


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
        candidates.append(Candidate(tokens[start], len(tokens), is_finished, value))
    chosen = max(range(len(candidates)), key=lambda index: candidates[index].value)
    token_ids = list(below[paths[chosen]][0].tokens[start:end])
    return Commit(forward, token_ids, chosen, candidates), paths[chosen]


def _is_below(branch: _Branch, path: tuple[int, ...]) -> bool:
    return branch.path[: len(path)] == path
