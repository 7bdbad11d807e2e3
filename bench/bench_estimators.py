"""The other estimators: what comparing credit schemes costs.

Those of whole rollouts write a float32 per token and read next to nothing; ``tempo`` and ``tree_td`` also read ids
until the rows have parted, and ``treerl`` is span_advantages with another last step.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import leafkernels
import python_ref
from bench import bench_advantages
from bench.bench_prefix_lengths import ids_needed
from bench.harness import Bench, Call, Prepare, compiled
from bench.rollouts import Batch, Shape
from leafkernels.credit.options import CreditOptions

INPUTS = ("sampled", "ragged")
# LEAF has a bench of its own.
NAMES = [name for name in leafkernels.ESTIMATORS if name != "leaf"]
# Those whose credit changes where rows leave.
LEAVING = ("tempo", "tree_td")


def options(name: str, batch: Batch) -> dict[str, Any]:
    return {"num_boundaries": batch.shape.num_boundaries} if name == "treerl" else {}


def literal(name: str) -> Prepare:
    def prepare(batch: Batch) -> Call:
        lists = batch.lists
        return lambda: getattr(python_ref, name)(
            lists.logprobs,
            lists.token_ids,
            lists.rewards,
            response_mask=None if batch.mask is None else lists.mask,
            groups=lists.groups,
            **options(name, batch),
        )

    return prepare


def backend_of_package(name: str, backend: str) -> Prepare:
    def prepare(batch: Batch) -> Call:
        return lambda: getattr(leafkernels, name)(
            batch.logprobs,
            batch.token_ids,
            batch.rewards,
            response_mask=batch.mask,
            backend=backend,
            **options(name, batch),
        )

    return prepare


def per_rollout(name: str) -> Callable[[Tensor, Tensor | None, int], Tensor]:
    """The lines that trainers have, in float64 as all that is compared with here."""

    def function(rewards: Tensor, mask: Tensor | None, num_tokens: int) -> Tensor:
        centred = rewards.double() - rewards.double().mean(1, keepdim=True)
        if name == "grpo":
            centred = centred / (centred.square().sum(1, keepdim=True) / (rewards.shape[1] - 1)).sqrt().add(1e-6)
        elif name == "rloo":
            centred = centred * (rewards.shape[1] / (rewards.shape[1] - 1))
        tokens = centred.float()[:, :, None].expand(-1, -1, num_tokens)
        return tokens.contiguous() if mask is None else torch.where(mask, tokens, 0.0)

    return function


def dense_values(token_ids: Tensor, rewards: Tensor, mask: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """r - mean and V(after) - V(before) at every position, from every pair of rows at every position; the masks are of
    rows padded on the right."""
    rewards = rewards.double()
    same = (token_ids[:, :, None] == token_ids[:, None]) & mask[:, :, None] & mask[:, None]
    shares = same.long().cumprod(-1).bool()
    other_rewards = torch.where(shares, rewards[:, None, :, None], 0.0)
    mean = rewards.mean(1, keepdim=True)[:, :, None]
    count = shares.sum(2)
    after = other_rewards.sum(2) / count
    if shrinkage:
        leaves = count != pad(count[:, :, :-1], (1, 0), value=rewards.shape[1])
        weight = torch.where(leaves & (count > 0), count / (count + shrinkage), 0.0)
        # The recurrence V = w mean + (1 - w) V, written out: what is left of the earlier ones is a product.
        kept = (1.0 - weight).cumprod(-1)
        after = kept * (mean + (weight * after.nan_to_num(0.0) / kept).cumsum(-1))
    before = torch.cat([mean.expand(-1, after.shape[1], 1), after[:, :, :-1]], dim=2)
    return rewards[:, :, None] - mean, after - before


def dense_tempo(token_ids: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    centred, differences = dense_values(token_ids, rewards, mask, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (rewards.shape[1] - 1)).sqrt()
    return torch.where(mask, (centred + differences) / (std + 1e-6), 0.0).float()


def dense_tree_td(token_ids: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    centred, differences = dense_values(token_ids, rewards, mask, 0.0)
    return torch.where(mask, 0.5 * centred + differences, 0.0).float()


def compiled_peer(name: str) -> Prepare:
    def prepare(batch: Batch) -> Call:
        if name == "treerl":
            return bench_advantages.dense_compiled(
                batch,
                CreditOptions(terms="global", leave_one_out=True, normalize="none"),
                lambda scaled: 2.0 * scaled - pad(scaled[:, :-1], (1, 0)),
            )
        if name in LEAVING:
            mask = torch.ones_like(batch.token_ids, dtype=torch.bool) if batch.mask is None else batch.mask
            prompts = max(1, (1 << 27) // (batch.shape.group**2 * batch.shape.tokens))
            chunks = [t.split(prompts) for t in (batch.token_ids, batch.rewards, mask)]
            dense = compiled({"tempo": dense_tempo, "tree_td": dense_tree_td}[name])
            return lambda: torch.cat([dense(*chunk) for chunk in zip(*chunks, strict=True)])
        function = compiled(per_rollout(name))
        return lambda: function(batch.rewards, batch.mask, batch.shape.tokens)

    return prepare


def prepares(name: str) -> dict[str, Prepare]:
    return {
        "python_ref": literal(name),
        "torch": backend_of_package(name, "torch"),
        "compile": compiled_peer(name),
        "triton": backend_of_package(name, "triton"),
    }


def gate(name: str) -> Callable[[Batch, Any], None]:
    def compare(batch: Batch, result: Any) -> None:
        expected = torch.tensor(literal(name)(batch.sample)())
        result = torch.tensor(result) if isinstance(result, list) else result.flatten(0, 1)
        torch.testing.assert_close(result[: len(expected)].cpu(), expected, rtol=1e-6, atol=1e-7)

    return compare


def bytes_moved(name: str) -> Callable[[Batch], int]:
    """A float32 per token written, a bool read if there is a mask; for tempo and tree_td an int64 id for each token
    needed to part the rows, for treerl what span_advantages needs. What is small beside the tokens is left out."""

    def count(batch: Batch) -> int:
        if name == "treerl":
            return bench_advantages.bytes_moved(batch)
        token_bytes = batch.shape.num_tokens * (4 if batch.mask is None else 5)
        if name not in LEAVING:
            return token_bytes
        lengths = leafkernels.common_prefix_lengths(batch.token_ids, response_mask=batch.mask, backend="torch")
        return token_bytes + int(ids_needed(lengths, batch.shape.tokens).sum()) * 8

    return count


@pytest.mark.parametrize("name", NAMES)
def test_estimators(name: str, shape: Shape, inputs: str, backend: str, bench: Bench) -> None:
    bench(name, shape, inputs, backend, prepares(name), gate(name), bytes_moved(name), tolerance=1e-6)
