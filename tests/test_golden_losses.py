"""The policy losses against those of TRL, called here, and of verl, whose numbers are kept in a file."""

import itertools
import json
import re
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pages
import pytest
import torch
import verl_losses
from rollouts import DEVICE
from torch import Tensor

import leafkernels
from leafkernels.losses.aggregates import AGGREGATES
from leafkernels.losses.kinds import KINDS, KL_KINDS

GOLDEN = json.loads(verl_losses.FILE.read_text())


def on_device(given: str) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in verl_losses.tensors(given).items()}


def check(golden: dict[str, Any], atol: float = 1e-13, **arguments: Any) -> None:
    """Value and gradient; sums of 13 numbers of order 1."""
    leaf = arguments["logprobs"].clone().requires_grad_()
    found = leafkernels.policy_loss(**{**arguments, "logprobs": leaf}).loss
    (gradient,) = torch.autograd.grad(found, leaf)
    assert float(found.detach()) == pytest.approx(golden["loss"], rel=1e-12, abs=atol)
    expected = torch.tensor(golden["gradient"], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=atol)


# verl adds 1e-8 to the tokens of a row by which it divides.
OF_ROWS = {"sapo": "seq-mean-token-mean", "geo_mean": "grpo"}


@pytest.mark.parametrize("at", range(len(verl_losses.CASES)), ids=[case[1] for case in verl_losses.CASES])
def test_losses_are_those_of_verl(at: int) -> None:
    options, name, _, given = verl_losses.CASES[at]
    aggregate, atol = OF_ROWS.get(name, "token-mean"), 1e-8 if name in OF_ROWS else 1e-13
    check(GOLDEN["losses"][at], atol, **on_device(given), aggregate=aggregate, **options)


@pytest.mark.parametrize("kl_kind", verl_losses.KL_KINDS)
def test_divergences_are_those_of_verl(kl_kind: str) -> None:
    tensors = on_device("tokens")
    tensors["advantages"] = torch.zeros_like(tensors["advantages"])
    check(GOLDEN["divergences"][kl_kind], **tensors, kl_coef=1.0, kl_kind=kl_kind, aggregate="token-sum")


@pytest.mark.parametrize("aggregate", verl_losses.AGGREGATES)
def test_aggregates_are_those_of_verl(aggregate: str) -> None:
    atol = 1e-8 if aggregate == "seq-mean-token-mean" else 1e-13
    check(GOLDEN["aggregates"][aggregate], atol, **on_device("tokens"), kind="reinforce", aggregate=aggregate)


def test_the_file_is_what_verl_computes() -> None:
    pytest.importorskip("verl", reason="needs verl")
    assert json.loads(json.dumps(verl_losses.all_of_verl())) == GOLDEN


def trl_loss(trl: Any, tensors: dict[str, Tensor], loss_type: str, level: str, beta: float, **given: Any) -> Tensor:
    """What ``GRPOTrainer._compute_loss`` makes of these tensors, with nothing else of a trainer."""
    args = SimpleNamespace(
        delta=given.get("delta"),
        use_bias_correction_kl=given.get("use_bias_correction_kl", False),
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        steps_per_generation=1,
    )
    low, high = (given.get("epsilon_low", 0.2), given.get("epsilon_high", 5.0 if loss_type == "cispo" else 0.2))
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    trainer = SimpleNamespace(
        args=args,
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=low,
        epsilon_high=high,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm="token_weights" in tensors,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=9,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        get_gamma_weights=trl.GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            tensors["logprobs"],
            torch.zeros_like(tensors["old_logprobs"]),
            None,
        ),
    )
    mask = tensors["response_mask"].double()
    batch = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(mask), 1),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": tensors["advantages"],
        "old_per_token_logps": tensors["old_logprobs"],
        "ref_per_token_logps": tensors["ref_logprobs"],
        "num_items_in_batch": mask.sum(),
    }
    if "token_weights" in tensors:
        batch["importance_sampling_ratio"] = tensors["token_weights"]
    return trl.GRPOTrainer._compute_loss(trainer, None, batch)


# TRL makes float32 of its temperatures.
TAU = (1.0, float(torch.tensor(1.05)))
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    # TRL's loss and level, what it is given, and our options.
    ("grpo", "token", {}, {}),
    ("grpo", "token", {"epsilon_low": 0.1, "epsilon_high": 0.3, "delta": 1.4}, {"clip": (0.1, 0.3), "dual_clip": 1.4}),
    ("bnpo", "token", {}, {}),
    ("dr_grpo", "token", {}, {"constant": 9.0}),
    ("dapo", "token", {}, {}),
    ("luspo", "token", {}, {}),
    ("cispo", "token", {"epsilon_high": 1.1}, {"kind": "cispo", "clip": (1.0, 0.1), "aggregate": "dapo"}),
    ("cispo", "token", {}, {"kind": "cispo", "aggregate": "dapo"}),
    ("sapo", "token", {}, {"kind": "sapo", "tau": TAU, "aggregate": "grpo"}),
    ("vespo", "token", {}, {"kind": "vespo", "aggregate": "dapo"}),
    # TRL's own ratio of a row, whose derivative is each token's where a row has one advantage.
    ("grpo", "sequence", {}, {"importance": "sequence"}),
    ("sapo", "sequence", {}, {"kind": "sapo", "tau": TAU, "aggregate": "grpo", "importance": "sequence"}),
]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("given", ["rows", "weights"])
@pytest.mark.parametrize(
    ("loss_type", "level", "theirs", "ours"), CASES, ids=[f"{case[0]} {case[1]} {case[2]}" for case in CASES]
)
def test_losses_are_those_of_trl(
    loss_type: str, level: str, theirs: dict[str, Any], ours: dict[str, Any], given: str, beta: float
) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL")
    if not hasattr(trl.GRPOTrainer, "get_gamma_weights"):
        pytest.skip("needs a TRL with these losses")
    tensors = verl_losses.tensors(given)
    if level == "sequence":
        if beta:
            pytest.skip("TRL has no divergence of tokens there that is one of theirs")
        # One advantage and one weight a row: what TRL's ratio of a row is made for.
        for name in ("advantages", "token_weights"):
            if name in tensors:
                tensors[name] = tensors[name][:, :1].expand(4, 6)
    elif "token_weights" in tensors:
        tensors["token_weights"] = tensors["token_weights"].masked_fill(~tensors["response_mask"], 1.0)
    for weighted in (False, True) if beta else (False,):
        leaf = tensors["logprobs"].clone().requires_grad_()
        expected = trl_loss(
            trl, {**tensors, "logprobs": leaf}, loss_type, level, beta, use_bias_correction_kl=weighted, **theirs
        )
        (want,) = torch.autograd.grad(expected, leaf)
        options = {"aggregate": loss_type, "kl_coef": beta, "kl_weighted": weighted, **ours}
        found = leafkernels.policy_loss(**{**tensors, "logprobs": leaf}, **options)
        (gradient,) = torch.autograd.grad(found.loss, leaf)
        torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-14)


def table(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading."""
    lines = pages.read(page).partition(f"## {heading}\n")[2].splitlines()
    rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines if line.startswith("|")]
    width = len(rows[0])
    return [[cell.strip() for cell in row] for row in itertools.takewhile(lambda row: len(row) == width, rows)][2:]


def test_the_page_has_every_kind_with_its_options() -> None:
    listed = {}
    for kind, value, options, source, *_ in table("losses.md", "The kinds"):
        assert value and source
        listed[kind.strip("`")] = {} if options == "-" else eval(f"dict({options.replace('`', '')})")
    assert listed == {kind: entry.options for kind, entry in KINDS.items()}
    text = pages.read("losses.md")
    of_tokens = re.search(r"From logits, (.*?) and `importance", text, re.S)
    assert of_tokens
    assert set(re.findall(r"`(\w+)`", of_tokens[1])) == {k for k, entry in KINDS.items() if entry.reads != "token"}
    of_rows = re.search(r'`importance="sequence"` gives (.*?) the ratio', text, re.S)
    assert of_rows
    assert set(re.findall(r"`(\w+)`", of_rows[1])) == {kind for kind, entry in KINDS.items() if entry.sequences}


def test_the_page_has_every_divergence_and_aggregate() -> None:
    assert {row[0].strip("`") for row in table("losses.md", "The divergence from a reference")} == set(KL_KINDS)
    names = [name for row in table("losses.md", "How tokens are averaged") for name in re.findall("`([^`]+)`", row[0])]
    assert sorted(names) == sorted(AGGREGATES)
