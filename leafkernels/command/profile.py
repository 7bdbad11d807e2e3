"""What the charts of a report show: counts over all prompts by position and by depth, however long the file."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leafkernels.command.credit import Credit, scored
from leafkernels.command.pieces import Piece
from leafkernels.command.reading import Prompt

_BINS = 60
_LEAST_SHARE = 0.01
_DEPTHS = 8
_REWARD_BINS = 24


class Profile:
    """Sums over the prompts added; rollouts without a reward are left out."""

    def __init__(self, schemes: Sequence[str]) -> None:
        self._alive = torch.zeros(0, dtype=torch.float64)
        self._together = torch.zeros(0, dtype=torch.float64)
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
        is_trained: Sequence[Sequence[bool]] | None = None,
    ) -> None:
        """Count one prompt; ``is_trained``: for each rollout, whether each token counts (None: all do)."""
        self._grow(max(map(len, prompt.token_ids)) + 1)
        is_scored = [not math.isnan(reward) for reward in prompt.rewards]
        for piece in pieces:
            count = sum(is_scored[row] for row in piece.rows)
            self._alive[piece.start : piece.end] += count
            self._together[piece.start : piece.end] += count if count > 1 else 0
        for row, counts in enumerate(is_trained or ()):
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
            self._together = torch.cat([self._together, zeros])
            self._holes = torch.cat([self._holes, zeros])
            self._boundaries = torch.cat([self._boundaries, zeros])
            self._credit = {name: torch.cat([sums, zeros]) for name, sums in self._credit.items()}

    def _count_means(self, rewards: Sequence[float], credit: Credit) -> None:
        """Note the mean reward of the group, of every node, and of every rollout, once for each rollout in it."""
        known = scored(list(rewards))
        if not known:
            return
        self._means[0, _mean(known)] += len(known)
        for k in range(min(len(credit.boundaries), _DEPTHS)):
            nodes: dict[int, list[float]] = {}
            for node, reward in zip((row[k] for row in credit.nodes), rewards, strict=True):
                if node >= 0:
                    nodes.setdefault(node, []).append(reward)
            for members in nodes.values():
                self._means[k + 1, _mean(members)] += len(members)
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
            of_bins = _binned(trained[:length], width).clamp_min(1)
            relative = _binned(sums[:length], width) / of_bins / (overall if overall > 0 else 1)
            credit[name] = _short(relative)
        together = _binned(self._together[:length], width) / alive
        return {
            "width": width,
            "length": length,
            "alive": _short(alive / width),
            "together": _short(together),
            "boundaries": [int(count) for count in boundaries],
            "credit": credit,
            "depths": self._depths(),
        }

    def _depths(self) -> dict[str, Any]:
        if not self._means:
            return {"low": 0, "high": 1, "rows": []}
        low = min(mean for _, mean in self._means)
        high = max(mean for _, mean in self._means)
        rows = []
        for depth in sorted({depth for depth, _ in self._means}, key=lambda depth: (depth < 0, depth)):
            bins = [0] * _REWARD_BINS
            total = sum(count for (other, _), count in self._means.items() if other == depth)
            average = 0.0
            for (other, mean), count in self._means.items():
                if other == depth:
                    # Halves, because the difference of the largest numbers would be infinite.
                    share = (mean / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.5
                    bins[min(int(share * _REWARD_BINS), _REWARD_BINS - 1)] += count
                    average += mean * (count / total)
            rows.append({"depth": depth, "rollouts": total, "mean": _rounded(average), "bins": bins})
        return {"low": low, "high": high, "rows": rows}


def _binned(sums: Tensor, width: int) -> Tensor:
    padded = torch.nn.functional.pad(sums, (0, -len(sums) % width))
    return padded.reshape(-1, width).sum(1)


def _short(values: Tensor) -> list[float]:
    return [_rounded(value) for value in values.tolist()]


def _mean(rewards: Sequence[float]) -> float:
    # Divided first: the sum may be too large for a float.
    return _rounded(math.fsum(reward / len(rewards) for reward in rewards))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
