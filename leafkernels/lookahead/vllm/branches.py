"""Which request of an engine holds which branch of a search.

An engine that takes the best token runs a branch on by itself, so a request runs ``ahead`` tokens, as far as the next
fork, and what the search asks for next has mostly run. Where it asks for another token, that is a new request with the
ids of the branch; the engine's prefix cache holds what it shares with others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leafkernels.lookahead.search import Best


class Output(NamedTuple):
    """What an engine says where a branch ends: the token it takes, the reward, the best tokens and their values."""

    token: int
    reward: float
    values: list[float]  # the best first, of equal ones the lower id
    token_ids: list[int]


class Request:
    """A request: the ids that it begins with, how many tokens it runs, and what came so far."""

    def __init__(self, token_ids: Sequence[int], ahead: int) -> None:
        self.token_ids, self.ahead = list(token_ids), ahead
        self.outputs: list[Output] = []
        self.is_done = False


class Branch(NamedTuple):
    """A request's ids and the first ``grown`` tokens that it has run."""

    request: Request
    grown: int

    @property
    def token_ids(self) -> list[int]:
        return [*self.request.token_ids, *(output.token for output in self.request.outputs[: self.grown])]

    @property
    def output(self) -> Output:
        return self.request.outputs[self.grown]

    @property
    def has_run(self) -> bool:
        return len(self.request.outputs) > self.grown

    @property
    def is_lost(self) -> bool:
        """Whether the request has ended before its end."""
        return self.request.is_done and not self.has_run


class Branches:
    """The branches of the last forward of some searches.

    Args:
        ahead: tokens that a request runs: the chunk of the search, for which the first runs one more, or a multiple.
        longest: the most tokens of a prompt and its answer, or 0.
        ends: ids after which no request runs on.
    """

    def __init__(self, ahead: int, longest: int, ends: Sequence[int]) -> None:
        self._ahead, self._longest, self._ends = ahead, longest, frozenset(ends)
        self.live: list[Branch] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Begin anew, with a branch for each prompt."""
        self.live = [Branch(self._request(prompt, self._ahead + 1), 0) for prompt in prompts]

    def grow(self, parents: Sequence[int], token_ids: Sequence[int]) -> None:
        """Replace the branches by those that ``extend`` of a stepper is asked for."""
        grown = []
        for parent, token in zip(parents, token_ids, strict=True):
            branch = self.live[parent]
            if branch.output.token == token and token not in self._ends:
                grown.append(Branch(branch.request, branch.grown + 1))
            else:
                ahead = 1 if token in self._ends else self._ahead
                grown.append(Branch(self._request([*branch.token_ids, token], ahead), 0))
        self.live = grown
        self.replace_lost()

    def replace_lost(self) -> None:
        """Where a request has ended before its branch, begin another."""
        if any(branch.is_lost and not branch.grown for branch in self.live):
            raise RuntimeError("the engine has ended a request without a token")
        self.live = [
            Branch(self._request(branch.token_ids, self._ahead), 0) if branch.is_lost else branch
            for branch in self.live
        ]

    @property
    def requests(self) -> list[Request]:
        """Those of the branches, each once."""
        return list({id(branch.request): branch.request for branch in self.live}.values())

    def results(self) -> tuple[Best, Tensor]:
        """What a stepper gives for the branches, all of which have run."""
        outputs = [branch.output for branch in self.live]
        count = min(len(output.values) for output in outputs)
        best = Best(
            torch.tensor([output.values[:count] for output in outputs]),
            torch.tensor([output.token_ids[:count] for output in outputs]),
        )
        return best, torch.tensor([output.reward for output in outputs])

    def _request(self, token_ids: Sequence[int], ahead: int) -> Request:
        if self._longest and len(token_ids) > self._longest:
            raise ValueError(
                f"prompt and answer must have at most {self._longest} tokens, the engine's max_model_len less one, got "
                f"{len(token_ids)}"
            )
        return Request(token_ids, max(1, min(ahead, self._longest + 1 - len(token_ids))) if self._longest else ahead)
