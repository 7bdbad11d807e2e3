"""Rewards at any token in TRL: reward functions that return, for a completion, a list of (end, reward).

``end`` counts tokens of the completion: the reward is earned at the last of its first ``end`` tokens. TRL, whose table
has one number for each completion and function, gets their sum, and its logs are of these.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from leafkernels.integrations._trl_options import TokenCredit

StepsOfRows = dict[tuple[int, int], list[tuple[int, float]]]


class StepRewards(TokenCredit):
    """``TokenCredit`` whose reward functions may return a list of (end, reward) for a completion."""

    reward_funcs: list[Any]  # TRL's
    reward_func_names: list[str]
    _rewards_per_function: Tensor
    """(N, functions), of all ranks."""

    def _scales(self, group_size: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._steps: StepsOfRows = {}
        functions = self.reward_funcs
        names = zip(functions, self.reward_func_names, strict=True)
        self.reward_funcs = [hear(function, name, i, self._steps) for i, (function, name) in enumerate(names)]
        try:
            return super()._calculate_rewards(*args, **kwargs)
        finally:
            self.reward_funcs = functions

    def _earned(self, call: dict[str, Any], own: slice) -> dict[str, Tensor]:
        """``step_rewards``, shaped like the ids of this rank's rows, and what is left of ``rewards`` at their ends;
        nothing where no function of any rank gave a list. ``own`` are this rank's rows.

        A reward at a token that is not trained on is earned there, but within the row: from its first to its last
        unmasked token. A row without one has it at its end. A row's reward is the sum over the functions of factor *
        (what it gave - mean), of ``_scales``.
        """
        is_any = torch.tensor(float(bool(self._steps)), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            is_any = self.accelerator.reduce(is_any, "sum")
        if not is_any:
            return {}
        means, factors = (scale[own] for scale in self._scales(call["group_size"]))
        mask, scale = call["response_mask"].cpu(), factors.tolist()
        ends = self._rewards_per_function[own].detach().cpu().double()
        places = [row.nonzero().flatten().tolist() for row in mask]
        steps = torch.zeros(mask.shape, dtype=torch.float64)
        for (row, function), found in self._steps.items():
            # NaN: infinite, so that the function has not scored this row.
            if places[row] and not ends[row, function].isnan():
                ends[row, function] = 0.0
                for end, reward in found:
                    at = min(max(end - 1, places[row][0]), places[row][-1])
                    steps[row, at] += scale[row][function] * reward
        left = ((ends - means) * factors).nansum(1).to(call["rewards"].device)
        return {"step_rewards": steps.to(left.device), "rewards": left.masked_fill(call["rewards"].isnan(), torch.nan)}


def hear(function: Any, name: str, number: int, found: StepsOfRows) -> Any:
    """The reward function, with lists put into ``found`` and their sums in their place."""

    def summed(output: Any, completion_ids: Sequence[Sequence[int]]) -> list[Any]:
        values = list(output)
        for row, value in enumerate(values[: len(completion_ids)]):
            if isinstance(value, list | tuple):
                pairs = _pairs(value, name, len(completion_ids[row]))
                found[row, number] = pairs
                values[row] = math.fsum(reward for _, reward in pairs)
        return values

    if isinstance(function, torch.nn.Module) or not callable(function):
        return function
    heard: Callable[..., Any]
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

        async def heard(**kwargs: Any) -> Any:
            return summed(await function(**kwargs), kwargs["completion_ids"])

    else:

        def heard(**kwargs: Any) -> Any:
            return summed(function(**kwargs), kwargs["completion_ids"])

    return wraps(function)(heard) if hasattr(function, "__name__") else heard


def _pairs(value: Sequence[Any], name: str, length: int) -> list[tuple[int, float]]:
    for pair in value:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not (is_pair and isinstance(pair[0], int) and isinstance(pair[1], int | float) and 1 <= pair[0] <= length):
            raise ValueError(
                f"reward_funcs must return for a completion a number, None or a list of (end, reward), with an end "
                f"from 1 to its number of tokens, {length}, got {pair!r:.80} from {name!r}"
            )
    if any(math.isnan(reward) or math.isinf(reward) for _, reward in value):
        # One sum of all, which then is no reward at all.
        return [(length, math.nan)] if length else []
    return [(end, float(reward)) for end, reward in value]
