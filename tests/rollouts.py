"""Generated rollouts, in every layout that the package accepts."""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

import python_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton", "reference")

# Few values, so that ties are the rule; all are exact in bfloat16. -0 and 0 tie, NaN is no candidate.
LOGPROBS = (0.0, -0.0, -0.5, -1.0, -2.5, -7.0, -math.inf, math.nan)
REWARDS = (0.0, 1.0, 0.30000001192092896, -2.0, 0.5, math.nan)


@dataclass
class Rollouts:
    """Rows of several prompts in any order; storage of a row may hold masked tokens anywhere."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    mask: list[list[bool]]
    rewards: list[float]
    groups: list[int]
    options: dict[str, Any] = field(default_factory=dict)

    def expected(self, **changes: Any) -> list[list[float]]:
        """Advantages from the reference."""
        return python_ref.span_advantages(
            self.logprobs,
            self.token_ids,
            self.rewards,
            response_mask=self.mask,
            groups=self.groups,
            **{**self.options, **changes},
        )

    def padded(self, side: str = "right", extra: int = 0, ids: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
        """(N, T) tensors; the padding holds tokens and log-probabilities that must not matter."""
        width = max((len(row) for row in self.token_ids), default=0) + extra

        def table(rows: list[list], fill: Any, dtype: torch.dtype) -> torch.Tensor:
            padded = [
                row + [fill] * (width - len(row)) if side == "right" else [fill] * (width - len(row)) + row
                for row in rows
            ]
            return torch.tensor(padded, dtype=dtype).reshape(len(rows), width).to(DEVICE)

        return {
            "logprobs": table(self.logprobs, -9.0, torch.float32),
            "token_ids": table(self.token_ids, 1, ids),
            "rewards": torch.tensor(self.rewards, dtype=torch.float32, device=DEVICE),
            "response_mask": table(self.mask, False, torch.bool),
            "groups": torch.tensor(self.groups, dtype=torch.int64, device=DEVICE),
        }

    def packed(self) -> dict[str, torch.Tensor]:
        """(total,) tensors with cu_seqlens."""
        lengths = torch.tensor([0] + [len(row) for row in self.token_ids])
        return {
            "logprobs": torch.tensor(sum(self.logprobs, []), dtype=torch.float32, device=DEVICE),
            "token_ids": torch.tensor(sum(self.token_ids, []), dtype=torch.int64, device=DEVICE),
            "rewards": torch.tensor(self.rewards, dtype=torch.float32, device=DEVICE),
            "response_mask": torch.tensor(sum(self.mask, []), dtype=torch.bool, device=DEVICE),
            "groups": torch.tensor(self.groups, dtype=torch.int64, device=DEVICE),
            "cu_seqlens": lengths.cumsum(0).to(torch.int32).to(DEVICE),
        }

    def laid_out(
        self, rows: list[list], layout: str, fill: Any = 0, dtype: torch.dtype = torch.float64, extra: int = 0
    ) -> torch.Tensor:
        """A number for each stored token, as "packed", or padded on the "left" or "right" with ``fill``."""
        if layout == "packed":
            return torch.tensor(sum(rows, []), dtype=dtype, device=DEVICE)
        width = max((len(row) for row in rows), default=0) + extra
        padding = [[fill] * (width - len(row)) for row in rows]
        padded = [row + pad if layout == "right" else pad + row for row, pad in zip(rows, padding, strict=True)]
        return torch.tensor(padded, dtype=dtype, device=DEVICE).reshape(len(rows), width)

    def rows_of(self, advantages: torch.Tensor, side: str = "right") -> list[list[float]]:
        """Undo ``padded`` or ``packed``."""
        lengths = [len(row) for row in self.token_ids]
        if advantages.dim() == 1:
            return [part.tolist() for part in advantages.split(lengths)]
        rows = advantages.tolist()
        if side == "right":
            return [row[:n] for row, n in zip(rows, lengths, strict=True)]
        return [row[len(row) - n :] for row, n in zip(rows, lengths, strict=True)]


def unmasked(rows: list[list[int]], rewards: list[float]) -> Rollouts:
    """One prompt without padding or holes."""
    return Rollouts(
        rows,
        [[-0.5 * (t % 3) for t in range(len(row))] for row in rows],
        [[True] * len(row) for row in rows],
        rewards,
        [0] * len(rows),
        {"num_boundaries": 2, "min_separation": 1},
    )


@st.composite
def token_rows(draw: st.DrawFn, count: int, longest: int = 7, vocabulary: int = 2) -> list[list[int]]:
    """Rows that share prefixes: copies, strict prefixes, branches, and fresh ones; some empty."""
    rows: list[list[int]] = []
    tokens = st.integers(0, vocabulary - 1)
    for _ in range(count):
        stem: list[int] = []
        if rows and draw(st.booleans()):
            parent = draw(st.sampled_from(rows))
            stem = parent[: draw(st.integers(0, len(parent)))]
        rows.append(stem + draw(st.lists(tokens, max_size=max(longest - len(stem), 0))))
    return rows


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of the credit."""
    return {
        "num_boundaries": draw(st.integers(0, 4)),
        "min_separation": draw(st.sampled_from([None, None, 1, 3])),
        "terms": draw(st.sampled_from(["both", "global", "local"])),
        "multiplicity_power": draw(st.sampled_from([0.5, 0.0, 1.0, 0.3])),
        "leave_one_out": draw(st.booleans()),
        "normalize": draw(st.sampled_from(["span", "batch", "reward_std", "none"])),
    }


@st.composite
def rollouts(draw: st.DrawFn, longest: int = 7) -> Rollouts:
    """One to three prompts of one to five rows each, shuffled, with masked tokens in, before and after the rows."""
    case = Rollouts([], [], [], [], [], draw(options()))
    for group in draw(st.lists(st.integers(-3, 9), min_size=1, max_size=3, unique=True)):
        for row in draw(token_rows(draw(st.integers(1, 5)), longest)):
            lead, rear = draw(st.sampled_from([(0, 0), (0, 0), (2, 0), (0, 1), (1, 2)]))
            holes = draw(st.sampled_from([(), (), (1,), (0, 2), (2, 3)]))
            size = lead + len(row) + rear
            case.token_ids.append([7] * lead + row + [8] * rear)
            case.logprobs.append(draw(st.lists(st.sampled_from(LOGPROBS), min_size=size, max_size=size)))
            case.mask.append([False] * lead + [t not in holes for t in range(len(row))] + [False] * rear)
            case.rewards.append(draw(st.sampled_from(REWARDS)))
            case.groups.append(group)
    order = draw(st.permutations(range(len(case.groups))))
    for name in ("token_ids", "logprobs", "mask", "rewards", "groups"):
        values = getattr(case, name)
        setattr(case, name, [values[i] for i in order])
    return case


@st.composite
def unequal_prompts(draw: st.DrawFn) -> Rollouts:
    """Two to four prompts of one to seven rows, shuffled. Some are dead: no reward, an infinite one, or no token."""
    case = Rollouts([], [], [], [], [], draw(options()))
    for group in range(draw(st.integers(2, 4))):
        kind = draw(st.sampled_from(["alive", "alive", "no reward", "infinite", "no token"]))
        for row in draw(token_rows(draw(st.integers(1, 7)), 5)):
            case.token_ids.append(row)
            case.logprobs.append(draw(st.lists(st.sampled_from(LOGPROBS), min_size=len(row), max_size=len(row))))
            case.mask.append([kind != "no token"] * len(row))
            case.rewards.append(math.nan if kind == "no reward" else draw(st.sampled_from(REWARDS)))
            case.groups.append(group)
        if kind == "infinite":
            case.rewards[-1] = draw(st.sampled_from([math.inf, -math.inf]))
    order = draw(st.permutations(range(len(case.groups))))
    for name in ("token_ids", "logprobs", "mask", "rewards", "groups"):
        values = getattr(case, name)
        setattr(case, name, [values[i] for i in order])
    return case


def random_group(rows: int, tokens: int, seed: int, vocabulary: int = 50_000) -> dict[str, torch.Tensor]:
    """One prompt's rollouts (rows, tokens) that branch off each other at random places; distinct log-probabilities."""
    rng = random.Random(seed)
    table: list[list[int]] = []
    for _ in range(rows):
        stem = rng.choice(table)[: rng.randrange(tokens)] if table else []
        table.append(stem + [rng.randrange(vocabulary) for _ in range(tokens - len(stem))])
    generator = torch.Generator().manual_seed(seed)
    return {
        "logprobs": -torch.rand(rows, tokens, generator=generator).mul(9).to(DEVICE),
        "token_ids": torch.tensor(table, device=DEVICE),
        "rewards": torch.rand(rows, generator=generator).round(decimals=2).to(DEVICE),
    }


def assert_rows_close(actual: list[list[float]], expected: list[list[float]], tolerance: float = 2e-7) -> None:
    """float32 results of float64 arithmetic: one rounding, and float64 noise of 1e-15 over the floor of 1e-6."""
    assert [len(row) for row in actual] == [len(row) for row in expected]
    torch.testing.assert_close(
        torch.tensor(sum(actual, []), dtype=torch.float64),
        torch.tensor(sum(expected, []), dtype=torch.float64),
        rtol=tolerance,
        atol=1e-8,
    )
