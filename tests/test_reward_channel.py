"""The channel against the results of its authors' code."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from leafkernels.lookahead import RewardChannel


def _golden(shared: Path) -> list[dict[str, Any]]:
    with gzip.open(shared / "golden" / "sla_channel.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_the_authors_rewards_and_gradients(shared: Path) -> None:
    with_gradients = 0
    for case in _golden(shared):
        weights = {name: torch.tensor(values) for name, values in case["weights"].items()}
        channel = RewardChannel.from_released(weights, eps=case["rms_norm_eps"])
        assert channel.settings["num_layers"] == case["num_layers"]
        assert channel.settings["head_layers"] == case["head_layers"]
        found = channel([torch.tensor(hidden) for hidden in case["hidden"]])
        # An independent float64 evaluation differs from theirs by up to 2e-6, at rewards up to 15.
        torch.testing.assert_close(found, torch.tensor(case["reward"]), rtol=0, atol=4e-6)
        if "grads" not in case:
            continue
        with_gradients += 1
        (found * torch.tensor(case["grad_out"])).sum().backward()
        ours = {
            **{f"tt_layers.{i}.tt_layernorm.weight": norm.weight for i, norm in enumerate(channel.norms)},
            **{f"tt_layers.{i}.tt_linear.weight": layer.weight for i, layer in enumerate(channel.layers)},
        }
        for name, parameter in ours.items():
            theirs = torch.tensor(case["grads"][name])
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert with_gradients


def test_tokens_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    channel = RewardChannel(3, 8, width=4)
    hidden = [torch.randn(2, 5, 8) for _ in range(4)]
    changed = [part.clone() for part in hidden]
    for part in changed:
        part[:, 3:] = torch.nan
    assert torch.equal(channel(hidden)[:, :3], channel(changed)[:, :3])


def test_by_hand() -> None:
    channel = RewardChannel(1, 2, width=1, eps=1e-30)
    with torch.no_grad():
        channel.layers[0].weight.copy_(torch.tensor([[2.0, 0.0]]))
        channel.head[0].weight.copy_(torch.tensor([[10.0, 100.0, 1.0]]))
    # norm([3, 4]) = [3, 4] / sqrt(12.5)
    narrow = torch.nn.functional.silu(torch.tensor(2 * 3 / 12.5**0.5))
    found = channel([torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, 2.0]]])])
    torch.testing.assert_close(found, (210.0 + narrow)[None, None])


def test_refuses() -> None:
    channel = RewardChannel(2, 4, width=2)
    with pytest.raises(ValueError, match="hidden_states must hold 3 tensors, .* got 2"):
        channel([torch.zeros(1, 1, 4)] * 2)
    with pytest.raises(ValueError, match="hidden_states must have 4 numbers a token, got 5"):
        channel([torch.zeros(1, 1, 5)] * 3)
    with pytest.raises(ValueError, match="state_dict must hold .* got 0, 0 and 0 of these"):
        RewardChannel.from_released({"lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        RewardChannel(2, 4, width=0)
