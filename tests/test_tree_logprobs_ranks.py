"""Weights that are spread over two ranks, which would run their rows in different ways, or have none."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="needs transformers: the extra train")

import tiny_decoders
from engines import deepspeed_settings, whole
from test_tree_logprobs import padded, row_by_row
from torch import Tensor

from leafkernels.models import tree_logprobs, tree_stats

pytestmark = pytest.mark.slow

SHARING = [[1, *range(3, 22), 4 + k, 5 + k, 6] for k in range(5)]
# Rows of the two ranks: those that share much, and those that share nothing.
BATCHES = {
    "one row": (SHARING, [[3, 4, 5, 6]]),
    "no row": (SHARING, []),
    "nothing shared": ([[2, 9, 8, 7], [5, 4, 3]], SHARING),
    "both": (SHARING, SHARING[1:]),
}


def batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids, mask = padded(rows)
    return (ids, mask) if rows else (torch.zeros((0, 4), dtype=torch.int64), torch.zeros((0, 4), dtype=torch.int64))


def spread(engine: str) -> Any:
    model = tiny_decoders.build_model("llama")
    if engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    import deepspeed

    settings = {**deepspeed_settings(3), "train_batch_size": 2, "train_micro_batch_size_per_gpu": 1}
    settings |= {"gradient_accumulation_steps": 1, "gradient_clipping": 0.0, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def step(rank: int, engine: str, cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each case: this rank's numbers, and what one step of SGD did to the weights, or their gradients."""
    results = []
    for name, options in cases:
        model = spread(engine)
        ids, mask = batch(BATCHES[name][rank])
        plan = tree_stats(model, ids, mask, **options)
        found = tree_logprobs(model, ids, mask, **options)
        loss = found.logprobs.sum() + found.entropy.sum()
        gradients = {}
        if engine == "fsdp2":
            loss.backward()
            gradients = {n: whole(w.grad).clone() for n, w in model.named_parameters()}
        else:
            from deepspeed.utils import safe_get_full_grad

            model.backward(loss)
            gradients = {n: safe_get_full_grad(w).clone() for n, w in model.module.named_parameters()}
        results.append({"plan": plan, "logprobs": found.logprobs.detach(), "gradients": gradients})
    return results


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_ranks_agree_on_the_plan(engine: str, engines: Any) -> None:
    cases = [(name, options) for name in BATCHES for options in ({}, {"max_tokens": 30}, {"plan": "tree"})]
    of_ranks = engines.run(engine, step, engine, cases)
    model = tiny_decoders.build_model("llama")
    for case, (name, options) in enumerate(cases):
        found = [results[case] for results in of_ranks]
        assert len({(one["plan"].plan, one["plan"].forwards) for one in found}) == 1, (name, options)
        model.zero_grad()
        total: Any = 0.0
        for rank in range(2):
            ids, mask = batch(BATCHES[name][rank])
            logprobs, entropy = row_by_row(model, ids, mask)
            torch.testing.assert_close(found[rank]["logprobs"], logprobs.detach(), rtol=1e-5, atol=1e-5)
            total = total + logprobs.sum() + entropy.sum()
        (total / 2).backward()  # the ranks' mean
        for weight, gradient in found[0]["gradients"].items():
            expected = dict(model.named_parameters())[weight].grad
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4, msg=f"{name} {options} {weight}")
    assert {one["plan"].plan for one in of_ranks[0]} > {"trunks"}
