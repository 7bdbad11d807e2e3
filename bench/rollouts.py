"""What is timed: named shapes, each with its reason, and seeded rollouts that branch as sampled responses do."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

VOCABULARY = 150_000  # ids of today's models, which trainers hold as int64


@dataclass(frozen=True)
class Shape:
    """Prompts x rollouts of each x tokens of each, and the kinds of input it is timed with."""

    name: str
    prompts: int
    group: int
    tokens: int
    num_boundaries: int
    inputs: tuple[str, ...]
    reason: str

    @property
    def num_tokens(self) -> int:
        return self.prompts * self.group * self.tokens

    @property
    def bytes_of_batch(self) -> int:
        """int64 ids and float32 log-probabilities."""
        return self.num_tokens * 12

    def batches(self, inputs: str, device: str, count: int) -> "tuple[Batch, ...]":
        """Different batches, the same ones in every session on a kind of device."""
        return _batches(self, inputs, device, count)


SHAPES = (
    Shape("8x200", 1, 8, 200, 2, ("sampled",), "the paper's setting, and the least work: all overhead"),
    Shape("64x8x200", 64, 8, 200, 2, ("sampled", "ragged"), "a step's batch of prompts in the paper's setting"),
    Shape("64x8192", 1, 64, 8192, 4, ("sampled", "identical", "comb"), "one prompt, many long rollouts: most pairs"),
    Shape(
        "64x16x8k",
        64,
        16,
        8192,
        2,
        ("sampled", "ragged", "identical", "comb"),
        "a step of a reasoning run, 8.4 million tokens: memory traffic, not launches, decides",
    ),
    Shape(
        "64x64x32k",
        64,
        64,
        32768,
        2,
        ("sampled", "identical", "comb"),
        "the largest batch a single GPU is given: 134 million tokens, where comparing all pairs hurts",
    ),
)

TINY = (
    Shape("tiny-4x24", 1, 4, 24, 2, ("sampled", "identical", "comb"), "one group, for a run that only proves it runs"),
    Shape("tiny-3x5x40", 3, 5, 40, 3, ("sampled", "ragged"), "several groups, likewise"),
)

# Literal Python takes about a microsecond a token: half a second here, minutes for the whole suite on larger shapes.
LITERAL_TOKENS = 1 << 20
# Tokens that the correctness gate of a large shape hands to literal Python, in whole prompts.
SAMPLE_TOKENS = 1 << 18
# A CPU needs tens of seconds, and several times the memory of the tokens.
CPU_TOKENS = 1 << 24


@dataclass(frozen=True)
class Lists:
    """A batch as the literal Python takes it: rows of all prompts, one after another."""

    logprobs: list[list[float]]
    surprisal: list[list[float]]
    token_ids: list[list[int]]
    rewards: list[float]
    mask: list[list[bool]]
    groups: list[int]

    def prompts(self, rows: list, group: int) -> list[list]:
        """Cut one entry per row into one list per prompt."""
        return [rows[i : i + group] for i in range(0, len(rows), group)]


@dataclass(frozen=True)
class Batch:
    """Rollouts of several prompts: (prompts, group, tokens), and (prompts, group) rewards."""

    shape: Shape
    token_ids: Tensor
    logprobs: Tensor
    rewards: Tensor
    mask: Tensor | None

    @cached_property
    def surprisal(self) -> Tensor:
        return -self.logprobs

    @cached_property
    def lists(self) -> Lists:
        logprobs, token_ids = self.logprobs.flatten(0, 1).tolist(), self.token_ids.flatten(0, 1).tolist()
        mask = torch.ones_like(self.token_ids, dtype=torch.bool) if self.mask is None else self.mask
        return Lists(
            logprobs,
            [[-x for x in row] for row in logprobs],
            token_ids,
            self.rewards.flatten().tolist(),
            mask.flatten(0, 1).tolist(),
            [prompt for prompt in range(self.rewards.shape[0]) for _ in range(self.rewards.shape[1])],
        )

    @cached_property
    def sample(self) -> "Batch":
        """The first prompts, as many as literal Python checks in a moment; at least one."""
        prompts = max(1, SAMPLE_TOKENS // (self.shape.group * self.shape.tokens))
        if prompts >= self.shape.prompts:
            return self
        mask = None if self.mask is None else self.mask[:prompts]
        return Batch(self.shape, self.token_ids[:prompts], self.logprobs[:prompts], self.rewards[:prompts], mask)


@lru_cache(maxsize=1)  # the cases of one shape follow each other, and the largest fill gigabytes
def _batches(shape: Shape, inputs: str, device: str, count: int) -> tuple[Batch, ...]:
    return tuple(_batch(shape, inputs, device, seed) for seed in range(count))


def _batch(shape: Shape, inputs: str, device: str, seed: int) -> Batch:
    """``inputs``:

    sampled    each row follows an earlier one of its prompt up to a random place and then goes its own way. The place
               is a uniform number to the fourth power: half the rows leave within the first sixteenth, some late.
    ragged     the same, cut to lengths between half and all of the tokens, padded and masked.
    identical  one row, repeated: nothing ends a comparison early.
    comb       row i leaves row 0 at i/group of the way: every row parts from the others at a place of its own.
    last       one row, repeated but for its last token: nothing ends a comparison before it.
    families   two rows, repeated in turns.
    """
    size = (shape.prompts, shape.group, shape.tokens)
    generator = torch.Generator(device).manual_seed(seed)
    token_ids = torch.randint(VOCABULARY, size, generator=generator, device=device)
    logprobs = torch.empty(size, device=device).exponential_(generator=generator).neg_()
    rewards = torch.rand(size[:2], generator=generator, device=device).round(decimals=1)
    position = torch.arange(shape.tokens, device=device)
    prompt = torch.arange(shape.prompts, device=device)
    for i in range(1, shape.group):
        parent = torch.zeros_like(prompt)
        leaves_at = torch.full_like(prompt, shape.tokens)
        if inputs == "comb":
            leaves_at = leaves_at * i // shape.group
        elif inputs == "last":
            leaves_at -= 1
        elif inputs == "families":
            parent += i % 2
            leaves_at = leaves_at * (i > 1)
        elif inputs != "identical":
            parent = torch.randint(i, (shape.prompts,), generator=generator, device=device)
            uniform = torch.rand(shape.prompts, generator=generator, device=device)
            leaves_at = (uniform**4 * shape.tokens).long()
        follows = position < leaves_at[:, None]
        token_ids[:, i] = torch.where(follows, token_ids[prompt, parent], token_ids[:, i])
        logprobs[:, i] = torch.where(follows, logprobs[prompt, parent], logprobs[:, i])
    mask = None
    if inputs == "ragged":
        lengths = torch.randint(shape.tokens // 2, shape.tokens + 1, size[:2], generator=generator, device=device)
        mask = position < lengths[:, :, None]
    return Batch(shape, token_ids, logprobs, rewards, mask)
