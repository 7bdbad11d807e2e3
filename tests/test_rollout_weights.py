"""rollout_weights and drop_equal: by hand, against verl's numbers, packed, and where an engine gave no number."""

import json
import math
import re
from typing import Any

import pytest
import torch
import verl_losses
from rollouts import DEVICE
from torch import Tensor

import leafkernels
from leafkernels import drop_equal, rollout_weights
from leafkernels.losses.rollout_weights import REJECTIONS

GOLDEN = json.loads(verl_losses.FILE.read_text())


def numbers() -> tuple[Tensor, Tensor, Tensor]:
    """Old log-probabilities, those of the sampler, and the mask."""
    tensors = verl_losses.tensors("tokens")
    return tuple(tensors[name].to(DEVICE) for name in ("old_logprobs", "logprobs", "response_mask"))  # type: ignore


def packed(tensors: tuple[Tensor, ...], lengths: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
    cut = tuple(torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)]) for x in tensors)
    return cut, torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


@pytest.mark.parametrize("at", range(len(verl_losses.WEIGHTS)))
def test_weights_are_those_of_verl(at: int) -> None:
    golden, options = GOLDEN["weights"][at], verl_losses.WEIGHTS[at][0]
    old, sampler, mask = numbers()
    found = rollout_weights(old, sampler, mask, **options)
    torch.testing.assert_close(found.weights, torch.tensor(golden["weights"], dtype=torch.float64, device=DEVICE))
    assert torch.equal(found.mask, mask)
    if "normalize" not in options:
        assert float(found.mean) == pytest.approx(golden["mean"], rel=1e-9)
        # verl adds 1e-8 to the mean by which it divides there.
        assert float(found.effective) == pytest.approx(golden["eff_sample_size"], rel=1e-6)


def test_rejections_are_those_of_verl() -> None:
    assert set(verl_losses.REJECTIONS) == set(REJECTIONS)
    old, sampler, mask = numbers()
    both = torch.ones_like(mask)
    for name, threshold in verl_losses.REJECTIONS.items():
        found = rollout_weights(old, sampler, mask, high=None, reject={name: threshold})
        kept = torch.tensor(GOLDEN["rejections"][name], device=DEVICE) > 0
        assert torch.equal(found.mask, kept), name
        assert kept.any() and (mask & ~kept).any(), name
        assert not found.weights[~kept].any()
        assert float(found.rejected) == pytest.approx(float((mask & ~kept).sum() / mask.sum()))
        both &= kept
    # Several at once: what each keeps.
    assert torch.equal(rollout_weights(old, sampler, mask, reject=verl_losses.REJECTIONS).mask, both)


LEVELS = [{"level": level} for level in ("token", "sequence", "geometric")]
OPTIONS = [{}, {"mode": "mask", "low": 0.5}, {"normalize": True}, {"reject": {"seq_mean_k3": 0.04, "token_k1": 1.2}}]


@pytest.mark.parametrize("options", [{**level, **options} for level in LEVELS for options in OPTIONS])
def test_packed_rows_and_masked_rubbish(options: dict[str, Any]) -> None:
    old, sampler, mask = numbers()
    expected = rollout_weights(old, sampler, mask, **options)
    lengths = [6, 3, 4, 0]
    cut, bounds = packed((old, sampler, mask), lengths)
    found = rollout_weights(*cut, **options, cu_seqlens=bounds)
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        theirs = packed((theirs,), lengths)[0][0] if name in ("weights", "mask") else theirs
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14, msg=name)
    dirty = (x.masked_fill(~mask, math.nan) for x in (old, sampler))
    again = rollout_weights(*dirty, mask, **options)
    assert all(map(torch.equal, again, expected))


def test_a_token_without_a_number_has_the_weight_1_and_is_counted() -> None:
    old = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]], device=DEVICE)
    sampler = torch.tensor([[-1.5, math.nan, -3.0], [math.nan, -math.inf, -1.0]], device=DEVICE)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], device=DEVICE)
    found = rollout_weights(old, sampler, mask, high=3.0)
    torch.testing.assert_close(found.weights.cpu(), torch.tensor([[math.exp(0.5), 1.0, 1.0], [1.0, 3.0, 0.0]]))
    assert int(found.unknown) == 2
    assert float(found.max_difference) == math.inf
    row = rollout_weights(old[:1], sampler[:1], mask[:1], level="geometric")
    assert row.weights[0].tolist() == pytest.approx([math.exp(0.5 / 3)] * 3)
    # A number of the model that is none is no gap of the engine, and a loss refuses it.
    old[0, 0] = math.nan
    assert rollout_weights(old, sampler, mask).weights[0, 0].isnan()


def test_nothing_overflows_and_no_token_at_all() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        old = torch.zeros(2, 3, dtype=dtype, device=DEVICE)
        for options in (*LEVELS, *OPTIONS):
            found = rollout_weights(old, old - 1e4, torch.ones(2, 3, device=DEVICE), **options)
            assert found.weights.dtype == torch.float32
            assert found.weights.isfinite().all()
        for none in (torch.zeros(2, 3), torch.zeros(0, 3), torch.zeros(2, 0)):
            none = none.to(DEVICE)
            found = rollout_weights(none, none, none, level="sequence", normalize=True, reject={"seq_max_k2": 1.0})
            assert not found.weights.any() and not found.mask.any()
            assert [float(x) for x in found[2:]] == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_weights_and_the_loss() -> None:
    """Weights go into a loss; a rejected token that the mask leaves out is in no mean."""
    old, sampler, mask = numbers()
    found = rollout_weights(old, sampler, mask, high=1.2, reject={"token_k2": 0.03})
    options = {"kind": "reinforce", "token_weights": found.weights}
    counted = leafkernels.policy_loss(old, old, old * 0 + 1, mask, **options).loss
    left_out = leafkernels.policy_loss(old, old, old * 0 + 1, found.mask, **options).loss
    torch.testing.assert_close(counted * mask.sum(), left_out * found.mask.sum())


def test_errors() -> None:
    old, sampler, mask = numbers()

    def check_refuses(error: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            rollout_weights(**{"old_logprobs": old, "sampler_logprobs": sampler, "response_mask": mask, **changes})

    check_refuses(
        ValueError,
        "sampler_logprobs must have the shape of old_logprobs, (4, 6), got shape (4, 5)",
        sampler_logprobs=sampler[:, 1:],
    )
    check_refuses(
        ValueError, "old_logprobs must have shape (rows, tokens), got shape (24,)", old_logprobs=old.flatten()
    )
    check_refuses(TypeError, "response_mask must be a torch.Tensor, got NoneType", response_mask=None)
    check_refuses(ValueError, "level must be one of 'token', 'sequence', 'geometric', got 'row'", level="row")
    check_refuses(ValueError, "mode must be one of 'truncate', 'mask', got 'clip'", mode="clip")
    check_refuses(ValueError, "high must be positive, got 0", high=0)
    check_refuses(ValueError, "low must be at most high, 2.0, got 3.0", low=3.0)
    check_refuses(TypeError, "reject must map names to thresholds, got str", reject="token_k1")
    names = ", ".join(map(repr, REJECTIONS))
    check_refuses(ValueError, f"reject must be one of {names}, got 'seq_max_k1'", reject={"seq_max_k1": 1.0})
    check_refuses(ValueError, "reject['token_k2'] must be at least 0, got -1.0", reject={"token_k2": -1.0})
    check_refuses(TypeError, "reject['token_k3'] must be a number, got tuple", reject={"token_k3": (1.0, 2.0)})
    check_refuses(
        ValueError,
        "reject['seq_sum_k1'] must be (low, high) with low <= high, got (2.0, 1.0)",
        reject={"seq_sum_k1": (2.0, 1.0)},
    )
    check_refuses(
        ValueError,
        "cu_seqlens must start at 0, got 1",
        cu_seqlens=torch.tensor([1, 4], device=DEVICE),
        old_logprobs=old.flatten(),
        sampler_logprobs=sampler.flatten(),
        response_mask=mask.flatten(),
    )


def test_equal_rewards_leave_the_loss() -> None:
    """Prompts of two rows: equal, different, one of them not scored, and none."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, math.nan, math.nan, math.nan], device=DEVICE)
    mask = torch.ones(8, 3, device=DEVICE)
    mask[0] = 0
    found = drop_equal(mask, rewards, group_size=2)
    assert found.response_mask.any(1).tolist() == [False, False, True, True, False, False, False, False]
    assert (int(found.dropped_rows), int(found.dropped_prompts)) == (5, 3)
    order = torch.tensor([3, 0, 5, 1, 7, 2, 4, 6], device=DEVICE)
    named = drop_equal(mask[order], rewards[order], groups=order // 2)
    assert torch.equal(named.response_mask, found.response_mask[order])
    assert [int(x) for x in named[1:]] == [5, 3]
    three = drop_equal(mask.view(4, 2, 3), rewards.view(4, 2))
    assert torch.equal(three.response_mask.view(8, 3), found.response_mask)
    (flat,), bounds = packed((mask,), [3, 2, 1, 3, 3, 0, 3, 2])
    rows = drop_equal(flat, rewards, group_size=2, cu_seqlens=bounds)
    assert rows.response_mask.tolist() == packed((found.response_mask,), [3, 2, 1, 3, 3, 0, 3, 2])[0][0].tolist()
    assert [int(x) for x in rows[1:]] == [4, 3]
    integers = drop_equal(mask[:4], torch.tensor([2, 2, 3, 2], device=DEVICE), group_size=2)
    assert integers.response_mask.any(1).tolist() == [False, False, True, True]
    # Neither the loss nor its KL sees them.
    tensors = verl_losses.tensors("tokens")
    old, new, reference = (tensors[name][:2].to(DEVICE) for name in ("old_logprobs", "logprobs", "ref_logprobs"))
    kept = drop_equal(torch.ones(2, 6, device=DEVICE), torch.ones(2, device=DEVICE), group_size=2).response_mask
    assert float(leafkernels.policy_loss(new, old, old, kept, ref_logprobs=reference, kl_coef=1.0).loss) == 0
    empty = drop_equal(mask[:0], rewards[:0], group_size=2)
    assert empty.response_mask.shape == (0, 3) and int(empty.dropped_prompts) == 0


def test_rewards_that_differ_by_rounding_are_equal() -> None:
    """As to the estimators, which give them no credit."""
    rewards = torch.tensor([0.1 + 0.2, 0.3, 1.0, 1.001, 3e7, 3e7 + 100], dtype=torch.float64, device=DEVICE)
    kept = drop_equal(torch.ones(6, 1, device=DEVICE), rewards, group_size=2).response_mask[:, 0]
    assert kept.tolist() == [False, False, True, True, True, True]
    ids = torch.zeros(6, 1, dtype=torch.int64, device=DEVICE)
    assert torch.equal(leafkernels.dr_grpo(ids.double(), ids, rewards, group_size=2)[:, 0] != 0, kept)


def test_equal_rewards_errors() -> None:
    with pytest.raises(ValueError, match=re.escape("group_size must divide the number of rows, 3, got 2")):
        drop_equal(torch.ones(3, 2), torch.ones(3), group_size=2)
    with pytest.raises(ValueError, match="rewards must have one entry for each row of response_mask"):
        drop_equal(torch.ones(4, 2), torch.ones(4, 2), group_size=2)
