"""loss="leafkernels" in TRL: TRL's own losses and logs where it has them, and the kinds that it has not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
trl = pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")

import tiny_trl
from forked import run_ranks
from test_trl import CREDIT, LEVELS, LOSS_TYPES_OF_TRL, MASK, Flat, check, curve, measured, rows
from tiny_trl import LONGEST, config, trainer
from trl import GRPOConfig, GRPOTrainer

import leafkernels
from leafkernels.integrations.trl import LeafGRPOTrainer
from leafkernels.losses.kinds import KINDS

if not hasattr(GRPOTrainer, "get_gamma_weights"):
    pytest.skip("needs a TRL with all its losses", allow_module_level=True)

OWN = {"loss": "leafkernels"}


def with_kind(folder: Path, kind: str, **changes: Any) -> Any:
    """A configuration whose kind is not that of a class."""
    args = config(folder, **changes)
    args.kind = kind
    return args


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trainer(LeafGRPOTrainer, config(tmp_path_factory.mktemp("run"), max_completion_length=LONGEST, **OWN))


def set_loss(run: Any, monkeypatch: pytest.MonkeyPatch, loss_type: str, changes: dict[str, Any]) -> None:
    """What ``measured`` sets on the trainer alone, and TRL on its configuration too."""
    high = changes.get("epsilon_high", 5.0 if loss_type == "cispo" else 0.2)
    settings = {"loss_type": loss_type, "epsilon": changes.get("epsilon_low", 0.2), "epsilon_high": high}
    for name, value in settings.items():
        monkeypatch.setattr(run.args, name, value)


CHANGES: list[dict[str, Any]] = [
    {},
    {"epsilon_low": 0.1, "epsilon_high": 1.5, "delta": 2.6},
    {"quantile": 0.4},
    {"off_policy": 0.3},
    {"beta": 0.3},
    {"beta": 0.3, "corrected": True},
    {"sampled": "token"},
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES_OF_TRL)
def test_gradients_are_those_of_trls_formulas(
    run: Any, loss_type: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token's, of credit for each token, under TRL's options, micro-batches and a row's ratio."""
    if loss_type == "vespo" and level == "sequence":
        with pytest.raises(ValueError, match="^importance must be 'token'"):
            set_loss(run, monkeypatch, loss_type, {})
            measured(run, rows(), loss_type, level, 1)
        return
    for changes in CHANGES:
        set_loss(run, monkeypatch, loss_type, changes)
        if loss_type != "cispo" and "epsilon_high" not in changes:
            changes = {**changes, "epsilon_low": 0.2, "epsilon_high": 0.2}
        elif loss_type == "cispo" and "epsilon_high" not in changes:
            changes = {**changes, "epsilon_low": 0.2, "epsilon_high": 5.0}
        for parts in (1, 2):
            check(run, rows(), loss_type, level, parts, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo", "entropy_coef": 0.05, "num_iterations": 2},
        {"loss_type": "cispo", "epsilon_high": 1.2},
        {"loss_type": "vespo", "mask_truncated_completions": True},
        {
            "loss_type": "sapo",
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
        },
        {"loss_type": "bnpo", "use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.02},
        {"loss_type": "dr_grpo", "top_entropy_quantile": 0.5},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_losses_and_logs_are_those_of_trl(changes: dict[str, Any], tmp_path: Path) -> None:
    """Of three steps; a step hands on its rounding of sums of a hundred float32 numbers of order 1."""
    known = {name: value for name, value in changes.items() if hasattr(GRPOConfig, name) or name == "loss_type"}
    expected = curve(GRPOTrainer, config(tmp_path, GRPOConfig, **known))
    actual = curve(Flat, config(tmp_path, **known, **OWN))
    for ours, theirs in zip(actual, expected, strict=True):
        assert set(theirs) <= set(ours)
        ours = {name: ours[name] for name in theirs}
        assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_trains(kind: str, tmp_path: Path) -> None:
    run = trainer(Flat, with_kind(tmp_path, kind, max_steps=2, num_iterations=2, loss_type="grpo", **OWN))
    before = run.model.get_input_embeddings().weight.detach().clone()
    run.train()
    assert len(run.state.log_history) == 3
    assert all(line["leaf/approx_kl"] >= 0 for line in run.state.log_history[:-1])
    after = run.model.get_input_embeddings().weight
    assert after.isfinite().all() and not torch.equal(before, after)


@pytest.mark.parametrize(
    ("kind", "loss_options"), [("gmpo", {"clip": (0.1, 0.1)}), ("dro", '{"beta": 0.5}'), ("clip", {"clip": [0.3, 0.4]})]
)
def test_the_loss_is_policy_loss(kind: str, loss_options: Any, tmp_path: Path) -> None:
    options = {"loss_options": loss_options, "loss_type": "grpo", "kl_kind": "k2"}
    run = trainer(LeafGRPOTrainer, with_kind(tmp_path, kind, **options, **OWN))
    case = rows()
    found = measured(run, case, "grpo", "token", 1, beta=0.1)
    leaf = case["logprobs"].clone().requires_grad_()
    given = {"gmpo": {"clip": (0.1, 0.1)}, "dro": {"beta": 0.5}, "clip": {"clip": (0.3, 0.4)}}[kind]
    options = {"ref_logprobs": case["ref"], "kl_coef": 0.1, "kl_kind": "k2", "kind": kind, "aggregate": "grpo", **given}
    expected = leafkernels.policy_loss(leaf, case["old"], CREDIT.double(), MASK, **options)
    expected.loss.backward()
    torch.testing.assert_close(found, leaf.grad)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_refuses(message: str, kind: Any = None, **changes: Any) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            trainer(LeafGRPOTrainer, with_kind(tmp_path, kind, **changes))

    check_refuses("loss must be one of 'trl', 'leafkernels', got 'verl'$", loss="verl")
    check_refuses("kind must be left out with loss='trl', got 'gmpo'", kind="gmpo")
    check_refuses("kind must be one of 'clip', ", kind="ppo", **OWN)
    check_refuses(
        "beta must be left out with kind='gmpo', which reads clip", kind="gmpo", loss_options={"beta": 1.0}, **OWN
    )
    check_refuses("kl_kind must be one of 'k3', ", kl_kind="k4", **OWN)
    check_refuses("importance must be 'token' with kind='dro'", kind="dro", importance_sampling_level="sequence", **OWN)
    run = trainer(LeafGRPOTrainer, config(tmp_path, **OWN))
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda *_: torch.zeros(()))
    with pytest.raises(RuntimeError, match="^loss must be 'trl' with LeafGRPOTrainer in TRL"):
        run._compute_loss(run.model, {"completion_mask": MASK, "advantages": CREDIT})


def test_equal_rewards_are_left_out(tmp_path: Path) -> None:
    """Of a prompt whose answers are all worth the same, neither the loss nor the KL sees a token."""

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1.0 if i < 4 else float(i) for i in range(len(completion_ids))]

    run = trainer(Flat, config(tmp_path, drop_equal=True, loss_type="dapo", max_steps=1), reward=rewards)
    batches = []
    original = run._generate_and_score_completions
    run._generate_and_score_completions = lambda inputs: batches.append(original(inputs)) or batches[-1]
    run.train()
    (batch,) = batches
    counted = batch["completion_mask"] * batch["tool_mask"]
    assert not counted[:4].any() and counted[4:].any(1).all()
    assert int(batch["num_items_in_batch"]) == int(counted.sum())
    assert run.state.log_history[0]["leaf/equal_rewards"] == 0.5
    with pytest.raises(ValueError, match="^drop_equal must be False with top_entropy_quantile=0.5, got True"):
        trainer(Flat, config(tmp_path, drop_equal=True, top_entropy_quantile=0.5))


@pytest.mark.parametrize(("loss", "loss_type"), [("leafkernels", "dapo"), ("trl", "grpo")])
def test_two_processes_leave_the_same_rows_out(loss: str, loss_type: str, tmp_path: Path) -> None:
    """Of three prompts two have equal rewards: all that rank 0 has, and half of what rank 1 has."""
    changes = {"loss": loss, "loss_type": loss_type, "drop_equal": True, "reward": "only_of_group_2"}
    changes |= {"estimator": "dr_grpo", "report_every": None}
    run_ranks("tiny_trl.py", tmp_path, "none", json.dumps(changes))
    run = tiny_trl.one_step(str(tmp_path / "run"), 12, "none", **changes)
    (whole,) = run.batches
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=False)[0] for rank in range(2)]
    for half, first in zip(halves, (0, 6), strict=True):
        counted = (half["completion_mask"] * half["tool_mask"]).any(1)
        assert counted.tolist() == [row >= 8 for row in range(first, first + 6)]
        assert int(half["num_items_in_batch"]) == int(whole["num_items_in_batch"]) > 0
        assert half["metrics"]["leaf/equal_rewards"] == whole["metrics"]["leaf/equal_rewards"] == pytest.approx(2 / 3)
    before = list(tiny_trl.model().parameters())
    for rank in range(2):
        weights, logs = torch.load(tmp_path / f"{rank}.pt.after", weights_only=False)
        for found, want, start in zip(weights, run.model.parameters(), before, strict=True):
            # Adam's first step has the sign of a gradient, whose rounding may be all there is of it.
            torch.testing.assert_close(found, want.detach(), rtol=1e-3, atol=1e-3)
            assert start.shape == found.shape
        assert not torch.equal(weights[0], before[0])
        assert all(math.isfinite(value) for value in logs[0].values())
        assert logs[0]["loss"] == pytest.approx(run.state.log_history[0]["loss"], rel=1e-4, abs=1e-6)
