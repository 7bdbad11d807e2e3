"""Losses of pairs of answers against the results of their authors' code, and by laws."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import leafkernels
from leafkernels import simpo_loss, simpo_metrics, surprisal_entropy, token_reward_loss, token_reward_metrics

KINDS = {
    "seqwise_btmodel": "sequence_bt",
    "tokenwise_btmodel": "token_bt",
    "tokenwise_crossentropy": "token_bce",
    "seqwise_crossentropy": "sequence_bce",
}
SIDES = ("chosen", "rejected")


def _golden(shared: Path) -> list[dict[str, Any]]:
    with gzip.open(shared / "golden" / "sla_losses.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def _numbers(values: Any) -> torch.Tensor:
    return torch.tensor([[float(value) for value in row] for row in values], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_authors_losses_and_gradients(shared: Path, dtype: torch.dtype) -> None:
    exact = dtype == torch.float64
    seen = 0
    for case in _golden(shared):
        # An answer without tokens is refused here.
        if case["kind"] != "reward_loss" or case.get("quirk") == "empty_response":
            continue
        seen += 1
        clean = "clean_" if "quirk" in case else ""
        ran_in = getattr(torch, case["dtype"])
        rewards = {side: _numbers(case[f"{side}_reward"]).to(dtype).requires_grad_() for side in SIDES}
        masks = {side: torch.tensor(case[f"{side}_mask"]) for side in SIDES}
        # The scale and the margin are those of the authors' token-wise loss only.
        options = {"scale": case["a"], "margin": case["b"]} if case["loss"] == "tokenwise_btmodel" else {}
        loss = token_reward_loss(*rewards.values(), *masks.values(), kind=KINDS[case["loss"]], **options)
        assert loss.dtype == dtype
        loss.backward()
        # The file has twelve digits. Where theirs ran in float32, also its clean gradients are float64's to 1e-5 only.
        bound = 1e-10 if exact and ran_in == torch.float64 else 1e-5
        torch.testing.assert_close(
            loss.double(), torch.tensor(case[f"{clean}loss_value"], dtype=torch.float64), rtol=bound, atol=bound
        )
        for side in SIDES:
            expected = _numbers(case[f"{clean}grad_{side}"])
            torch.testing.assert_close(rewards[side].grad.double(), expected, rtol=bound, atol=bound)
    assert seen > 60


def test_the_authors_metrics(shared: Path) -> None:
    seen = 0
    for case in _golden(shared):
        if case["kind"] != "reward_loss" or "quirk" in case:
            continue
        found = token_reward_metrics(
            *(_numbers(case[f"{side}_reward"]) for side in SIDES),
            *(torch.tensor(case[f"{side}_mask"]) for side in SIDES),
        )
        theirs = {name: value for name, value in case["metrics"].items() if "_value_" in name}
        assert found.keys() == theirs.keys()
        for name, value in theirs.items():
            # Theirs are float32.
            assert float(found[name]) == pytest.approx(value, rel=1e-6, abs=1e-6), (case["id"], name)
        seen += 1
    assert seen > 50


def test_the_authors_total_loss(shared: Path) -> None:
    """Reward loss, SimPO and SFT by their weights, with the gradients of logits and rewards, from the same parts."""
    seen, ever, compared = 0, set[str](), set[str]()
    for case in _golden(shared):
        # A negative weight, which they take for 1, is refused by the trainer.
        if case["kind"] != "total_loss" or "quirk" in case:
            continue
        seen += 1
        ids, labels = torch.tensor(case["input_ids"]), torch.tensor(case["labels"])
        logits = torch.tensor(case["logits"], dtype=torch.float64, requires_grad=True)
        rewards, mask = _numbers(case["reward"]).requires_grad_(), labels != -100
        options = {"scale": case["a"], "margin": case["b"]} if case["loss"] == "tokenwise_btmodel" else {}
        masks = mask.chunk(2)
        loss = case["ck_loss_weight"] * token_reward_loss(
            *rewards.chunk(2), *masks, kind=KINDS[case["loss"]], **options
        )
        found = surprisal_entropy(logits[:, :-1], ids[:, 1:], response_mask=mask[:, 1:], backend="torch")
        chosen, rejected = found.logprobs.chunk(2)
        simpo = simpo_loss(
            chosen,
            rejected,
            *mask[:, 1:].chunk(2),
            kind=case["simpo_type"],
            beta=case["beta"],
            margin=case["gamma_beta_ratio"],
            label_smoothing=case["label_smoothing"],
        )
        loss = loss + case["simpo_weight"] * simpo - case["sft_weight"] * chosen.sum() / masks[0][:, 1:].sum()
        loss.backward()
        for value, name in ((loss, "loss_value"), (logits.grad, "grad_logits"), (rewards.grad, "grad_reward")):
            expected = torch.tensor(case[name], dtype=torch.float64)
            torch.testing.assert_close(value.detach().double(), expected, rtol=1e-9, atol=1e-9, msg=case["id"])
        metrics = {
            "simpo_loss": simpo * case["simpo_weight"],
            **token_reward_metrics(*rewards.chunk(2), *masks),
            **simpo_metrics(chosen, rejected, *mask[:, 1:].chunk(2), beta=case["beta"]),
        }
        theirs = case["metrics"]
        # Theirs are float32, and those of a term that its weight switches off are not logged.
        ours = {name: metrics[name].item() for name in theirs.keys() & metrics.keys()}
        ever, compared = ever | metrics.keys(), compared | ours.keys()
        assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-5, abs=1e-6), case["id"]
    assert seen > 10 and ever == compared


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    pairs, widths = draw(st.integers(1, 4)), [draw(st.integers(1, 6)) for _ in SIDES]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rewards = [torch.randn(pairs, width, generator=generator, dtype=torch.float64) * 3 for width in widths]
    masks = [torch.rand(pairs, width, generator=generator) < 0.6 for width in widths]
    for mask in masks:
        mask[torch.arange(pairs), torch.randint(mask.shape[1], (pairs,), generator=generator)] = True
    return *rewards, *masks


@pytest.mark.parametrize("kind", KINDS.values())
@settings(max_examples=30)
@given(pairs=_pairs())
def test_padding_and_holes_do_not_exist(kind: str, pairs: tuple[torch.Tensor, ...]) -> None:
    chosen, rejected, chosen_mask, rejected_mask = pairs
    losses = []
    for row in range(len(chosen)):
        bare = [part[row][mask[row]][None] for part, mask in ((chosen, chosen_mask), (rejected, rejected_mask))]
        losses.append(token_reward_loss(*bare, *map(torch.ones_like, bare), kind=kind))
    for value in (torch.nan, torch.inf, -torch.inf, 1e300):
        rewards = [
            part.masked_fill(~mask, value).requires_grad_()
            for part, mask in ((chosen, chosen_mask), (rejected, rejected_mask))
        ]
        loss = token_reward_loss(*rewards, chosen_mask, rejected_mask, kind=kind)
        loss.backward()
        for part, mask in zip(rewards, (chosen_mask, rejected_mask), strict=True):
            assert part.grad.isfinite().all() and (part.grad[~mask] == 0).all()
        if kind != "token_bce":  # the mean of that one is over the tokens of the batch
            torch.testing.assert_close(loss.detach(), torch.stack(losses).mean())


@pytest.mark.parametrize("kind", KINDS.values())
@settings(max_examples=15)
@given(pairs=_pairs())
def test_exchanging_the_answers_changes_the_sign_of_the_rewards(kind: str, pairs: tuple[torch.Tensor, ...]) -> None:
    chosen, rejected, chosen_mask, rejected_mask = pairs
    torch.testing.assert_close(
        token_reward_loss(chosen, rejected, chosen_mask, rejected_mask, kind=kind),
        token_reward_loss(-rejected, -chosen, rejected_mask, chosen_mask, kind=kind),
    )


@pytest.mark.parametrize("kind", KINDS.values())
def test_gradients(kind: str) -> None:
    torch.manual_seed(0)
    rewards = [torch.randn(3, width, dtype=torch.float64, requires_grad=True) for width in (5, 4)]
    masks = [torch.ones_like(part) for part in rewards]
    masks[0][1, 2:] = 0

    def loss(*parts: torch.Tensor) -> torch.Tensor:
        return token_reward_loss(*parts, *masks, kind=kind, scale=1.5 if "bt" in kind else 1.0)

    assert torch.autograd.gradcheck(loss, rewards)


@pytest.mark.parametrize("kind", KINDS.values())
def test_far_from_right_float32_still_learns(kind: str) -> None:
    """Where sigmoid(r) is 0 or 1 in float32 the loss is the distance, and its gradient is whole."""
    rewards = [torch.full((1, 2), value, requires_grad=True) for value in (-200.0, 200.0)]
    loss = token_reward_loss(*rewards, torch.ones(1, 2), torch.ones(1, 2), kind=kind)
    loss.backward()
    assert loss.item() == (400.0 if "bt" in kind else 200.0)
    assert rewards[0].grad.sum().item() == pytest.approx(-1.0 if "bt" in kind else -0.5, rel=200 * 2.0**-23)


def test_a_compiled_loss_is_the_same() -> None:
    torch.manual_seed(0)
    arguments = torch.randn(3, 5), torch.randn(3, 4), torch.ones(3, 5), torch.ones(3, 4)
    compiled = torch.compile(token_reward_loss, backend="eager", fullgraph=True)
    for kind in KINDS.values():
        assert torch.equal(compiled(*arguments, kind=kind), token_reward_loss(*arguments, kind=kind))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hinge"}, "kind must be one of .* got 'hinge'"),
        ({"scale": 0.0}, "scale must be .* got 0"),
        ({"margin": float("nan")}, "margin must be finite, got nan"),
        ({"rejected_rewards": torch.zeros(3, 4)}, "rejected_(rewards|mask) must"),
        (
            {"chosen_mask": torch.tensor([[1, 1], [0, 0]])},
            "chosen_mask must have a token in every row, got none in row 1",
        ),
        ({"chosen_rewards": torch.zeros(2)}, r"chosen_rewards must have shape \(pairs, tokens\), got shape \(2,\)"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    names = [f"{side}_{kind}" for kind in ("rewards", "mask") for side in SIDES]
    options = {name: torch.ones(2, 2) for name in names} | change
    arguments = [options.pop(name) for name in names]
    with pytest.raises((TypeError, ValueError), match=message):
        leafkernels.token_reward_loss(*arguments, **options)


def test_simpo_by_hand() -> None:
    arguments = torch.tensor([[-1.0, -3.0, torch.nan]]), torch.tensor([[-4.0, torch.nan]])
    masks = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0]])
    # x = -2 + 4 - 1 = 1
    assert float(simpo_loss(*arguments, *masks, beta=0.5, margin=1.0)) == pytest.approx(math.log1p(math.exp(-0.5)))
    assert float(simpo_loss(*arguments, *masks, beta=0.5, margin=1.0, kind="hinge")) == 0.5
    smooth = simpo_loss(*arguments, *masks, beta=0.5, margin=1.0, label_smoothing=0.25)
    assert float(smooth) == pytest.approx(math.log1p(math.exp(-0.5)) + 0.25 * 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "ipo"}, "kind must be one of 'sigmoid', 'hinge', got 'ipo'"),
        ({"beta": 0.0}, "beta must be positive, got 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and less than 1, got 1.0"),
        ({"rejected_logprobs": torch.zeros(3, 2), "rejected_mask": torch.ones(3, 2)}, "rows of chosen_logprobs, 2"),
        ({"chosen_logprobs": torch.zeros(2)}, r"chosen_logprobs must have shape \(pairs, tokens\)"),
    ],
)
def test_simpo_refuses(change: dict[str, Any], message: str) -> None:
    names = [f"{side}_{kind}" for kind in ("logprobs", "mask") for side in SIDES]
    options = {name: torch.ones(2, 2) for name in names} | change
    arguments = [options.pop(name) for name in names]
    with pytest.raises((TypeError, ValueError), match=message):
        simpo_loss(*arguments, **options)


@pytest.mark.parametrize("kind", [*KINDS.values(), "simpo"])
def test_packed_answers(kind: str) -> None:
    """The loss and the gradients of the same answers in rows; rubbish where the mask is False."""
    generator = torch.Generator().manual_seed(5)
    lengths = {"chosen": [3, 5, 1], "rejected": [4, 2, 6]}
    padded: dict[str, torch.Tensor] = {}
    packed: dict[str, torch.Tensor] = {}
    what = "logprobs" if kind == "simpo" else "rewards"
    for side, sizes in lengths.items():
        rows = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        mask = torch.arange(6) < torch.tensor(sizes)[:, None]
        mask[1, 0] = False
        rows[1, 0] = math.nan
        for name, tensor in ((f"{side}_{what}", rows), (f"{side}_mask", mask)):
            padded[name] = tensor
            packed[name] = torch.cat([row[:size] for row, size in zip(tensor, sizes, strict=True)])
        packed[f"{side}_cu_seqlens"] = torch.tensor([0, *sizes]).cumsum(0)
    found = []
    for arguments in (padded, packed):
        leaves = {name: arguments[name].clone().requires_grad_() for name in (f"chosen_{what}", f"rejected_{what}")}
        options = {} if kind == "simpo" else {"kind": kind}
        loss = (simpo_loss if kind == "simpo" else token_reward_loss)(**{**arguments, **leaves}, **options)
        found.append((loss, torch.autograd.grad(loss, tuple(leaves.values()))))
    (expected, wanted), (loss, gradients) = found
    torch.testing.assert_close(loss, expected)
    for side, ours, theirs in zip(lengths, gradients, wanted, strict=True):
        rows = [row[:size] for row, size in zip(theirs, lengths[side], strict=True)]
        torch.testing.assert_close(ours, torch.cat(rows))
    with pytest.raises(ValueError, match=f"^chosen_{what} must have shape \\(total,\\) together with cu_seqlens"):
        arguments = {**packed, f"chosen_{what}": padded[f"chosen_{what}"]}
        (simpo_loss if kind == "simpo" else token_reward_loss)(**arguments)
    packed["chosen_cu_seqlens"][1] = 0
    packed["chosen_cu_seqlens"][2] = 8
    with pytest.raises(ValueError, match="^chosen_mask must have a token in every row, got none in row 0$"):
        (simpo_loss if kind == "simpo" else token_reward_loss)(**packed)
