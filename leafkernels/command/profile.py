"""What the charts of a report show: counts over all prompts by position and by depth, however long the file."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leafkernels.command.credit import Credit, mean, scored
from leafkernels.command.reading import Prompt
from leafkernels.command.tree import Piece

_BINS = 60
_LEAST_SHARE = 0.01
_DEPTHS = 8
_REWARD_BINS = 24


class Profile:
    """Sums over the prompts added; rollouts without a reward are left out."""

    def __init__(self, schemes: Sequence[str]) -> None:
        self._alive = torch.zeros(0, dtype=torch.float64)
        self._shared = torch.zeros(0, dtype=torch.float64)
        self._holes = torch.zeros(0, dtype=torch.float64)
        self._boundaries = torch.zeros(0, dtype=torch.float64)
        self._credit = {name: torch.zeros(0, dtype=torch.float64) for name in schemes}
        self._means: Counter[tuple[int, float]] = Counter()

    def add(
        self,
        prompt: Prompt,
        credit: Credit,
        pieces: Sequence[Piece],
        advantages: Mapping[str, Sequence[Tensor]],
    ) -> None:
        """Count one prompt."""
        self._grow(max(map(len, prompt.token_ids)) + 1)
        is_scored = [not math.isnan(reward) for reward in prompt.rewards]
        for piece in pieces:
            count = sum(is_scored[row] for row in piece.rows)
            self._alive[piece.start : piece.end] += count
            self._shared[piece.start : piece.end] += count if count > 1 else 0
        for row, counts in enumerate(prompt.is_trained or ()):
            if is_scored[row]:
                self._holes[: len(counts)] += ~torch.tensor(counts, dtype=torch.bool)
        for position in credit.boundaries:
            self._boundaries[position] += 1
        for name, rows in advantages.items():
            for row, values in enumerate(rows):
                if is_scored[row]:
                    self._credit[name][: len(values)] += values.abs()
        self._count_means(prompt.rewards, credit)

    def _grow(self, length: int) -> None:
        missing = length - len(self._alive)
        if missing > 0:
            zeros = torch.zeros(missing, dtype=torch.float64)
            self._alive = torch.cat([self._alive, zeros])
            self._shared = torch.cat([self._shared, zeros])
            self._holes = torch.cat([self._holes, zeros])
            self._boundaries = torch.cat([self._boundaries, zeros])
            self._credit = {name: torch.cat([sums, zeros]) for name, sums in self._credit.items()}

    def _count_means(self, rewards: Sequence[float], credit: Credit) -> None:
        """Note the mean reward of the group, of every node, and of every rollout, once for each rollout in it."""
        known = scored(rewards)
        if not known:
            return
        self._means[0, _rounded(mean(known))] += len(known)
        for k in range(min(len(credit.boundaries), _DEPTHS)):
            for members in credit.members(k, rewards):
                self._means[k + 1, _rounded(mean(members))] += len(members)
        for reward in known:
            self._means[-1, _rounded(reward)] += 1

    def charts(self) -> dict[str, Any]:
        """What the page draws, in at most 60 bins of positions and 24 of rewards."""
        # Beyond, a curve would be drawn from a few rollouts.
        least = max(1.0, _LEAST_SHARE * float(self._alive[:1].sum()))
        length = int((self._alive >= least).sum())
        width = max(1, math.ceil(length / _BINS))
        alive = _binned(self._alive[:length], width)
        boundaries = _binned(self._boundaries[:length], width)
        credit, trained = {}, self._alive - self._holes
        for name, sums in self._credit.items():
            overall = sums.sum() / trained.sum().clamp_min(1)
            tokens_per_bin = _binned(trained[:length], width).clamp_min(1)
            relative = _binned(sums[:length], width) / tokens_per_bin / (overall if overall > 0 else 1)
            credit[name] = _short(relative)
        shared = _binned(self._shared[:length], width) / alive
        return {
            "width": width,
            "length": length,
            "alive": _short(alive / width),
            "shared": _short(shared),
            "boundaries": [int(count) for count in boundaries],
            "credit": credit,
            "depths": self._depths(),
        }

    def _depths(self) -> dict[str, Any]:
        if not self._means:
            return {"low": 0, "high": 1, "rows": []}
        low = min(value for _, value in self._means)
        high = max(value for _, value in self._means)
        rows = []
        for depth in sorted({depth for depth, _ in self._means}, key=lambda depth: (depth < 0, depth)):
            bins = [0] * _REWARD_BINS
            total = sum(count for (other, _), count in self._means.items() if other == depth)
            average = 0.0
            for (other, value), count in self._means.items():
                if other == depth:
                    # Halves, because the difference of the largest numbers would be infinite.
                    share = (value / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.5
                    bins[min(int(share * _REWARD_BINS), _REWARD_BINS - 1)] += count
                    average += value * (count / total)
            rows.append({"depth": depth, "rollouts": total, "mean": _rounded(average), "bins": bins})
        return {"low": low, "high": high, "rows": rows}


def _binned(sums: Tensor, width: int) -> Tensor:
    padded = torch.nn.functional.pad(sums, (0, -len(sums) % width))
    return padded.reshape(-1, width).sum(1)


def _short(values: Tensor) -> list[float]:
    return [_rounded(value) for value in values.tolist()]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
