"""LeafGRPOTrainer in TRL itself, on a tiny model."""

import dataclasses
import importlib.util
import inspect
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
trl = pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")

import itertools
from collections.abc import Iterator

import pytest
import tiny_trl
import transformers
from forked import run_ranks
from packaging.version import Version
from pages import ROOT
from rollouts import assert_rows_close
from tiny_trl import Recorded, config, count_a, picky, script, trainer
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

import leafkernels
import python_ref
from leafkernels.integrations import _trl_options as options
from leafkernels.integrations import trl as plug
from leafkernels.integrations.trl import LeafGRPOConfig, LeafGRPOTrainer

LOSS = inspect.getsource(GRPOTrainer._compute_loss)
# Every loss type that this version compares with, so that none is forgotten.
LOSS_TYPES = sorted(
    set(re.findall(r'"(\w+)"', " ".join(re.findall(r'self\.loss_type (?:==|in) (\[[^\]]*\]|"\w+")', LOSS))))
    - ({"sapo"} if Version(trl.__version__) < Version("0.28") else set())  # refused
)


class Flat(LeafGRPOTrainer):
    """GRPO's own advantages through the whole of the plug: gathered, per token, sliced."""

    def token_advantages(
        self, logprobs: torch.Tensor, token_ids: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, groups: int
    ) -> torch.Tensor:
        of_trl = torch.tensor(list(self._logs["advantages"])[-len(rewards) :])
        return of_trl[:, None].expand_as(logprobs)


def curve(kind: type, args: Any, **more: Any) -> list[dict[str, float]]:
    """What TRL logs at each step, without times and what GRPO does not know."""
    run = trainer(kind, args, **more)
    run.train()
    own = re.compile("time|runtime|per_second|leaf/")
    history = [{name: x for name, x in line.items() if not own.search(name)} for line in run.state.log_history[:-1]]
    assert len(history) == args.max_steps
    assert len({line["grad_norm"] for line in history}) > 1
    assert any(line.get("reward_std", 0) > 0 for line in history)
    return history


def test_the_loss_types_are_found() -> None:
    assert {"grpo", "bnpo", "dr_grpo", "dapo", "cispo"} <= set(LOSS_TYPES)


@pytest.mark.parametrize(
    "changes",
    [
        *({"loss_type": name} for name in LOSS_TYPES),
        {"num_iterations": 2},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"top_entropy_quantile": 0.5, "mask_truncated_completions": True},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_flat_advantages_reproduce_the_curve_of_trl(changes: dict[str, Any], tmp_path: Path) -> None:
    """Digit for digit, dropout included: the plug draws no random number and changes no batch."""
    curves = [
        curve(kind, config(tmp_path, options, **changes), policy=tiny_trl.model(attention_dropout=0.2))
        for kind, options in ((GRPOTrainer, GRPOConfig), (Flat, LeafGRPOConfig))
    ]
    assert curves[0] == curves[1]


def test_flat_advantages_with_an_adapter(tmp_path: Path) -> None:
    """LoRA with dropout, whose frozen base is the reference of the KL term."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    curves = [
        curve(kind, config(tmp_path, options, beta=0.1), peft_config=adapter)
        for kind, options in ((GRPOTrainer, GRPOConfig), (Flat, LeafGRPOConfig))
    ]
    assert curves[0] == curves[1]
    assert curves[0][-1]["kl"] > 0


def test_flat_advantages_with_sequence_ratios(tmp_path: Path) -> None:
    """One ratio a row, whose gradient is now a sum over tokens: the same up to the rounding of sums of few numbers."""
    settings = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    expected = curve(GRPOTrainer, config(tmp_path, GRPOConfig, **settings))
    actual = curve(Flat, config(tmp_path, **settings))
    for ours, theirs in zip(actual, expected, strict=True):
        # Numbers of the size of 1, of float32 sums of a hundred terms; the first step hands on its error to the next.
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_without_boundaries_it_is_trl(tmp_path: Path) -> None:
    """One term, no scale: reward minus mean. Counts of a over four rows are exact in float32, in any order."""
    settings = {"scale_rewards": "none", "num_generations": 4}
    expected = curve(GRPOTrainer, config(tmp_path, GRPOConfig, **settings))
    assert curve(LeafGRPOTrainer, config(tmp_path, num_boundaries=0, terms="global", **settings)) == expected


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_trains(loss_type: str, tmp_path: Path) -> None:
    """The reward of a task that anyone can learn rises, and so do the odds of its token."""
    run = trainer(LeafGRPOTrainer, config(tmp_path, loss_type=loss_type, max_steps=12))
    run.train()
    history = run.state.log_history[:-1]
    assert all(math.isfinite(line["loss"]) and 0 < line["grad_norm"] < math.inf for line in history[:3])
    first, last = (sum(line["reward"] for line in part) / 4 for part in (history[:4], history[-4:]))
    assert last > first + 1


def check_batches(batches: list[dict[str, Any]], groups: int, **options: Any) -> None:
    """Advantages of one process are those of the reference, computed from the model's own logits."""
    for batch in batches:
        check_batch(batch, groups, **options)
    rows = [set(row) for batch in batches for row in batch["advantages"].tolist()]
    assert any(len(values - {0.0}) > 1 for values in rows), "the case has no span credit to get wrong"


def check_batch(batch: dict[str, Any], groups: int, **options: Any) -> None:
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    rewards = batch["rewards"]
    summed = [sum(r for r in row if not math.isnan(r)) for row in rewards.tolist()]
    summed = [math.nan if all(map(math.isnan, row)) else s for row, s in zip(rewards.tolist(), summed, strict=True)]
    expected = python_ref.span_advantages(
        batch["logprobs"].tolist(),
        batch["completion_ids"].tolist(),
        summed,
        response_mask=mask.bool().tolist(),
        groups=[row // groups for row in range(len(summed))],
        **options,
    )
    assert batch["advantages"].dtype == torch.float32
    assert batch["advantages"].shape == batch["completion_ids"].shape
    assert batch["advantages"].is_contiguous()
    assert_rows_close(batch["advantages"].tolist(), expected)
    whole = leafkernels.span_advantages(
        batch["logprobs"],
        batch["completion_ids"],
        torch.tensor(summed),
        response_mask=mask,
        group_size=groups,
        **options,
    )
    assert torch.equal(batch["advantages"], whole)
    tokens = mask.sum(1).clamp(min=1)
    rows = batch["table"][-len(summed) :]
    torch.testing.assert_close(torch.tensor(rows), batch["advantages"].sum(1) / tokens, rtol=1e-6, atol=1e-6)


OPTIONS = [
    {},
    {"num_boundaries": 4, "min_separation": 1, "terms": "local", "multiplicity_power": 1.0, "leave_one_out": True},
    {"normalize": "reward_std"},
    {"normalize": "none", "num_boundaries": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "truncated rows masked"])
def test_advantages_are_those_of_the_reference(options: dict[str, Any], masked: bool, tmp_path: Path) -> None:
    """Truncated rows, rows without a reward, groups that share; the options of the config arrive."""
    args = config(tmp_path, per_device_train_batch_size=16, mask_truncated_completions=masked, **options)
    run = trainer(Recorded, args, picky, script(tiny_trl.model(), 4))
    run.train()
    assert len(run.batches) == args.max_steps
    rewards = torch.cat([batch["rewards"] for batch in run.batches])
    assert rewards.isnan().any() and not rewards.isnan().all()
    lengths = torch.cat([batch["completion_mask"].sum(1) for batch in run.batches])
    assert (lengths == 0).any() == masked
    check_batches(run.batches, 4, **{"normalize": "span", **options})
    for batch in run.batches:
        unscored = batch["rewards"].isnan().all(1)
        assert batch["advantages"][unscored].eq(0).all()


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"estimator": "tree_td"}, {"normalize": "reward_std"}),
        ({"estimator": "tree_td", "shrinkage": 1.0, "group_weight": 0.5, "scale_rewards": "none"},
         {"shrinkage": 1.0, "group_weight": 0.5}),
        ({"estimator": "tempo", "scale_rewards": "batch"}, {}),
        ({"estimator": "treerl", "num_boundaries": 3}, {"num_boundaries": 3}),
        ({"estimator": "rloo"}, {}),
        ({"estimator": "qae"}, {}),
        ({"estimator": "qae", "quantile": 0.75}, {"quantile": 0.75}),
        ({"estimator": "pass_at_k", "k": 1}, {"k": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_estimators_by_name(changes: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(Recorded, config(tmp_path, max_steps=1, **changes), picky, script(tiny_trl.model(), 4))
    asked: list[bool] = []
    compute = run._get_per_token_logps_and_entropies
    run._get_per_token_logps_and_entropies = lambda *a, **k: (asked.append(torch.is_grad_enabled()), compute(*a, **k))[
        1
    ]
    run.train()
    (batch,) = run.batches
    expected = getattr(python_ref, changes["estimator"])(
        batch["logprobs"].tolist(),
        batch["completion_ids"].tolist(),
        batch["rewards"][:, 0].tolist(),
        response_mask=batch["completion_mask"].bool().tolist(),
        groups=[row // 4 for row in range(len(batch["rewards"]))],
        **options,
    )
    assert_rows_close(batch["advantages"].tolist(), expected)
    assert batch["advantages"].any()
    assert not any(name.startswith("leaf/") for name in batch["metrics"])
    # A forward pass more only for an estimator that ranks boundaries.
    assert asked == [False, True] if changes["estimator"] == "treerl" else asked == [True]


def test_estimators_that_cannot_be(tmp_path: Path) -> None:
    for changes, text in (
        ({"estimator": "ppo"}, "estimator must be one of 'leaf', .*, got 'ppo'"),
        (
            {"estimator": "tree_td", "scale_rewards": "batch"},
            "normalize must be one of 'none', 'reward_std', got 'batch'",
        ),
        ({"estimator": "tree_td", "shrinkage": -1.0}, "shrinkage must be at least 0, got -1"),
        ({"estimator": "otb"}, "estimator must be one that needs no sum_squares .*, got 'otb'"),
        ({"estimator": "qae", "quantile": 1.5}, "quantile must lie between 0 and 1, got 1.5"),
        ({"estimator": "pass_at_k", "k": 0}, "k must be .*, got 0"),
        ({"quantile": 0.4}, "quantile must be None with estimator='leaf', which does not read it, got 0.4"),
        ({"estimator": "qae", "k": 3}, "k must be None with estimator='qae', which does not read it, got 3"),
    ):
        with pytest.raises(ValueError, match=text):
            trainer(LeafGRPOTrainer, config(tmp_path, **changes))


def test_the_config_has_every_option_of_the_schemes() -> None:
    """But for the scores of boundaries, which are a tensor."""
    known = {field.name for field in dataclasses.fields(LeafGRPOConfig)}
    for name, estimator in leafkernels.ESTIMATORS.items():
        assert set(estimator.options) - {"boundary_scores", "gathered", "sum_squares"} <= known, name


@pytest.mark.parametrize(("scale", "normalize"), [("group", "span"), ("batch", "batch"), ("none", "none")])
def test_normalize_follows_scale_rewards(scale: str, normalize: str, tmp_path: Path) -> None:
    run = trainer(Recorded, config(tmp_path, scale_rewards=scale, max_steps=1), picky, script(tiny_trl.model(), 4))
    run.train()
    check_batches(run.batches, 4, normalize=normalize)


def test_several_reward_functions(tmp_path: Path) -> None:
    """Weighted and summed; what one function could not score, the other does."""
    args = config(tmp_path, reward_weights=[1.0, 0.5], max_steps=1)
    run = trainer(Recorded, args, [picky, count_a], script(tiny_trl.model(), 4))
    run.train()
    (batch,) = run.batches
    assert batch["rewards"][:, 0].isnan().any() and not batch["rewards"][:, 1].isnan().any()
    batch["rewards"] = batch["rewards"] * torch.tensor([1.0, 0.5])
    check_batches([batch], 4)


@pytest.mark.skipif("normalize_then_sum" not in LOSS + inspect.getsource(GRPOTrainer), reason="not in this TRL")
def test_rewards_normalized_before_the_sum(tmp_path: Path) -> None:
    """Without boundaries: TRL's own, but for the 1e-4 beside its second deviation."""
    settings = {"multi_objective_aggregation": "normalize_then_sum", "max_steps": 1}
    leaf = {"num_boundaries": 0, "terms": "global", "normalize": "batch"}

    class Both(Recorded):
        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            rewards = super()._calculate_rewards(*args, **kwargs)
            rewards[:4, 0] = 0.3  # all equal: this function says nothing here
            return rewards

        def _replace_logged(self, advantages: torch.Tensor) -> None:
            self.of_trl = torch.tensor(list(self._logs["advantages"])[-len(advantages) :])

    run = trainer(Both, config(tmp_path, **settings, **leaf), [picky, count_a], script(tiny_trl.model(), 4))
    run.train()
    ours = run.batches[0]["advantages"][:, 0]
    assert run.of_trl.abs().max() > 0.5
    # TRL divides by deviation + 1e-4, and the deviation is above 0.5; float32 sums add a few roundings of 1e-7.
    torch.testing.assert_close(ours, run.of_trl, rtol=2e-4 + 1e-6, atol=1e-6)


def test_rewards_normalized_before_the_sum_are_equal_within_rounding() -> None:
    """Of two functions and two prompts: one is equal but for a last place, one differs, one scores no row."""
    rewards = torch.tensor([[3000.0, 1.0], [3000.0, 2.0], [torch.nan, 3.0], [torch.nan] * 2]).repeat(2, 1, 1)
    rewards[0, 1, 0] = torch.nextafter(rewards[0, 0, 0], torch.tensor(torch.inf))
    rewards[1, :, 0] = torch.nan
    found = plug._normalize_functions(rewards)
    assert found[0, :2, 0].tolist() == [0.0, 0.0] and found[0, 2:, 0].isnan().all() and found[1, :, 0].isnan().all()
    assert found[:, :3, 1].tolist() == [pytest.approx([-1.0, 0.0, 1.0], abs=2e-4)] * 2


@pytest.mark.parametrize("iterations", [1, 2])
def test_batches_are_split_with_their_advantages(iterations: int, tmp_path: Path) -> None:
    """One generation, shuffled, in four parts, once or twice: every row keeps its own advantages."""
    args = config(
        tmp_path, per_device_train_batch_size=4, steps_per_generation=4, num_iterations=iterations, max_steps=8
    )
    run = trainer(Recorded, args, picky, script(tiny_trl.model(), 4))
    run.train()
    assert (len(run.batches), len(run.splits)) == (8 // (4 * iterations), 8)
    check_batches(run.batches, 4)
    for number, split in enumerate(run.splits):
        batch = run.batches[number // (4 * iterations)]
        generated = zip(batch["completion_ids"].tolist(), batch["advantages"].tolist(), strict=True)
        known = [(ids, advantages) for ids, advantages in generated]
        assert split["advantages"].shape == split["completion_ids"].shape == (4, batch["completion_ids"].shape[1])
        for pair in zip(split["completion_ids"].tolist(), split["advantages"].tolist(), strict=True):
            assert pair in known


def test_evaluation_has_its_own_number_of_generations(tmp_path: Path) -> None:
    args = config(tmp_path, num_generations=2, num_generations_eval=4, per_device_eval_batch_size=8, max_steps=1)
    run = trainer(Recorded, args, picky, script(tiny_trl.model(attention_dropout=0.2), 4))
    run.evaluate(run.train_dataset.select(range(4)))
    assert len(run.batches) == 2
    check_batches(run.batches, 4)
    assert not run.model.training
    assert 0 < run.state.log_history[-1]["eval_leaf/span_credit_share"] < 1
    run.train()
    assert "leaf/span_credit_share" in run.state.log_history[-2]


def test_log_probabilities_come_from_the_model_in_eval_mode(tmp_path: Path) -> None:
    """Dropout would move boundaries from run to run, and the model comes back as it was."""
    dropped = tiny_trl.model(attention_dropout=0.9)
    dropped.eval()
    run = trainer(Recorded, config(tmp_path, max_steps=1), picky, script(dropped, 4))
    modes = []
    compute = run._get_per_token_logps_and_entropies

    def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
        modes.append((model.training, torch.is_grad_enabled()))
        return compute(model, *args, **kwargs)

    run._get_per_token_logps_and_entropies = watched
    run.train()
    assert modes == [(False, False), (True, True)]


def test_log_probabilities_of_trl_are_used_where_it_has_them(tmp_path: Path) -> None:
    """No second forward when the batch is used twice."""
    run = trainer(Recorded, config(tmp_path, num_iterations=2, max_steps=2), picky, script(tiny_trl.model(), 4))
    calls = []
    compute = run._get_per_token_logps_and_entropies
    run._get_per_token_logps_and_entropies = lambda *a, **k: (calls.append(1), compute(*a, **k))[1]
    run.train()
    assert len(calls) == 1 + 2
    assert "old_per_token_logps" in run.batches[0]
    check_batches(run.batches, 4)


@pytest.mark.skipif("env_mask" not in inspect.getsource(GRPOTrainer), reason="this TRL takes no mask from rollout_func")
def test_tool_tokens_and_missing_log_probabilities(tmp_path: Path) -> None:
    """Rollouts with tool tokens in the middle, and a NaN where the sampler gave no log-probability."""

    def rollout(prompts: list[str], run: Any) -> dict[str, Any]:
        rows = tiny_trl.scripted_rows(0, 0, 4) + tiny_trl.scripted_rows(0, 1, 4)
        logprobs = [[-((7 * t + 3 * token) % 11) / 2 for t, token in enumerate(row)] for row in rows]
        logprobs[0][2] = math.nan
        return {
            "prompt_ids": [[3, 4]] * len(prompts),
            "completion_ids": rows,
            "logprobs": logprobs,
            "env_mask": [[int(t not in (2, 3)) for t in range(len(row))] for row in rows],
        }

    run = trainer(Recorded, config(tmp_path, max_steps=1, num_boundaries=3), picky, rollout_func=rollout)
    run.train()
    (batch,) = run.batches
    assert batch["tool_mask"].eq(0).any()
    assert batch["sampling_per_token_logps"].isnan().any()
    batch["logprobs"] = batch["sampling_per_token_logps"]
    check_batches([batch], 4, num_boundaries=3)
    assert batch["advantages"][batch["tool_mask"] == 0].eq(0).all()


def test_the_logs_count_what_they_say(tmp_path: Path) -> None:
    """Counted again from the tree that the public function shows, row by row."""
    run = trainer(Recorded, config(tmp_path, per_device_train_batch_size=16), picky, script(tiny_trl.model(), 4))
    run.train()
    for batch in run.batches:
        mask = batch["completion_mask"].bool()
        rewards = batch["rewards"][:, 0]
        shared = tokens = fired = pairs = nodes = 0
        for group in range(4):
            rows = slice(4 * group, 4 * group + 4)
            tree = leafkernels.span_tree(
                batch["logprobs"][rows], batch["completion_ids"][rows], rewards[rows], response_mask=mask[rows]
            )
            boundaries = [p for p in tree.boundaries.tolist() if p >= 0]
            for names, length, ends in zip(
                tree.nodes.tolist(), tree.lengths.tolist(), tree.spans.span_ends.tolist(), strict=True
            ):
                kept = [name for name in names if name >= 0]
                shared += min(ends[len(kept) - 1], length) if kept else 0
                tokens += length
                fired += len(kept)
                pairs += len(boundaries) if length else 0
            nodes += sum(
                len({name for name in column if name >= 0}) for column in zip(*tree.nodes.tolist(), strict=True)
            )
        assert batch["metrics"]["leaf/span_credit_share"] == shared / tokens
        assert batch["metrics"]["leaf/fork_fire_rate"] == fired / pairs
        assert batch["metrics"]["leaf/nodes_per_group"] == nodes / 4
        assert 0 < shared < tokens and 0 < fired < pairs


def test_nothing_to_share(tmp_path: Path) -> None:
    """No boundary, no row with a reward: rates of nothing are 0, and the step does nothing."""
    run = trainer(Recorded, config(tmp_path, num_boundaries=0, max_steps=1), lambda completions, **_: [None] * 8)
    run.train()
    (batch,) = run.batches
    assert batch["advantages"].eq(0).all()
    own = {name: value for name, value in batch["metrics"].items() if name.startswith("leaf/")}
    assert own == {"leaf/span_credit_share": 0, "leaf/fork_fire_rate": 0, "leaf/nodes_per_group": 0}


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_two_processes_are_one(scale: str, tmp_path: Path) -> None:
    """Twelve rows in groups of four, on one rank and on two, the middle group on both; rows of unequal width."""
    run_ranks("tiny_trl.py", tmp_path, scale)
    (whole,) = tiny_trl.one_step(str(tmp_path / "run"), 12, scale).batches
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=False)[0] for rank in range(2)]
    assert len({half["completion_ids"].shape[1] for half in halves}) == 2, "the case wants unequal widths"

    def rows(batch: dict[str, Any], name: str) -> list[list[float]]:
        lengths = batch["completion_mask"].sum(1).tolist()
        return [row[:length] for row, length in zip(batch[name].tolist(), lengths, strict=True)]

    for name in ("completion_ids", "advantages"):
        assert rows(halves[0], name) + rows(halves[1], name) == rows(whole, name)
    check_batches([whole], 4, normalize={"group": "span", "batch": "batch"}[scale])
    own = [name for name in whole["metrics"] if name.startswith("leaf/")]
    assert len(own) == 3
    for half in halves:
        assert [half["metrics"][name] for name in own] == [whole["metrics"][name] for name in own]
        assert half["table"] == pytest.approx(whole["table"], rel=1e-6, abs=1e-6)
    if importlib.util.find_spec("jinja2"):
        pages = [list((tmp_path / f"{name}").glob("report-*.html")) for name in ("run", "0.pt.run", "1.pt.run")]
        assert [len(found) for found in pages] == [1, 1, 0], "the main process writes"
        said = ["prompts of rank 0 of 2 ranks" in found[0].read_text(encoding="utf-8") for found in pages[:2]]
        assert said == [False, True]


@pytest.mark.parametrize("estimator", ["leaf", "tree_td"])
def test_reports_from_training(estimator: str, tmp_path: Path) -> None:
    """One page when it is due, with the credit and the rewards of that batch."""
    pytest.importorskip("jinja2")
    from test_html import advantages_of, data_of, rollouts_of

    args = config(tmp_path, max_steps=4, estimator=estimator, report_every=3, group_weight=0.25, num_boundaries=1)
    run = trainer(Recorded, args, picky, script(tiny_trl.model(), 4))
    run.train()
    assert sorted(path.name for path in tmp_path.glob("report-*")) == ["report-0.html", "report-3.html"]
    batch = run.batches[3]
    page = (tmp_path / "report-3.html").read_text(encoding="utf-8")
    data = data_of(page)
    assert "<h1>Step 3</h1>" in page and data["schemes"][0]["key"] == estimator
    assert ("tree_td needs no log-probabilities" in page) == (estimator == "tree_td")
    lengths = batch["completion_mask"].sum(1).tolist()
    rows = [row for prompt in data["prompts"] for row in rollouts_of(data, prompt)]
    credit = [row for prompt in data["prompts"] for row in advantages_of(prompt, estimator)]
    texts = [prompt["text"] for prompt in data["prompts"]]
    assert all(texts) and set("".join(texts)) <= set("abcdefgh ")
    for row, found, length, ids, expected in zip(
        rows, credit, lengths, batch["completion_ids"].tolist(), batch["advantages"], strict=True
    ):
        assert [token for token, _ in row] == ids[:length] and all(text for _, text in row)
        torch.testing.assert_close(torch.tensor(found), expected[:length], rtol=1e-4, atol=1e-7)


def test_reports_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="report_every must be at least 1, got 0"):
        trainer(LeafGRPOTrainer, config(tmp_path, report_every=0))
    with pytest.raises(ValueError, match="report_every must be None where Flat overrides token_advantages"):
        trainer(Flat, config(tmp_path, report_every=1))


def test_it_is_a_mixin(tmp_path: Path) -> None:
    """First in line before a trainer that changes the batch itself."""

    class Theirs(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
            batch["tool_mask"][:, 0] = 0
            return batch

    class Mine(Recorded, Theirs):
        pass

    run = trainer(Mine, config(tmp_path, max_steps=1, num_boundaries=4), picky, script(tiny_trl.model(), 4))
    run.train()
    assert run.batches[0]["advantages"][:, 0].eq(0).all()
    check_batches(run.batches, 4, num_boundaries=4)


def test_without_args_it_takes_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class OnCPU(LeafGRPOConfig):  # TRL's own defaults want a GPU
        use_cpu: bool = True
        bf16: bool = False

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plug, "LeafGRPOConfig", OnCPU)
    run = trainer(LeafGRPOTrainer, None)
    assert type(run.args) is OnCPU
    assert run.args.num_boundaries == 2


def check_refuses(error: type[Exception], message: str, kind: type, args: Any) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        trainer(kind, args)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = config(tmp_path)
    check_refuses(
        TypeError,
        "args must be a LeafGRPOConfig, or a dataclass derived from it and your own config, got GRPOConfig",
        LeafGRPOTrainer,
        config(tmp_path, GRPOConfig),
    )
    check_refuses(
        ValueError,
        "terms must be one of 'both', 'global', 'local', got 'all'",
        LeafGRPOTrainer,
        config(tmp_path, terms="all"),
    )
    gmpo = type("GMPOTrainer", (GRPOTrainer,), {})
    check_refuses(
        TypeError,
        "Mine must not derive from RLOOTrainer or GMPOTrainer: their losses take one advantage a row",
        type("Mine", (LeafGRPOTrainer, gmpo), {}),
        args,
    )
    with pytest.raises(
        ValueError, match=r"^cp_size must be 1 with LeafGRPOTrainer, got 2: rows whose tokens are split"
    ):
        plug._check_parallelism(SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=2, sp_size=1)))
    sapo = config(tmp_path, loss_type="sapo")
    monkeypatch.setattr(plug.trl, "__version__", "0.27.2")
    check_refuses(
        RuntimeError,
        "loss_type must not be 'sapo' with LeafGRPOTrainer in TRL 0.27.2, whose SAPO loss takes one advantage a row; "
        "choose another, or pip install 'trl>=0.28'",
        LeafGRPOTrainer,
        sapo,
    )
    monkeypatch.setattr(plug.trl, "__version__", "0.25.1")
    check_refuses(
        RuntimeError,
        "LeafGRPOTrainer needs TRL 0.26 or newer, got 0.25.1, whose loss broadcasts advantages per token to "
        "(rows, rows, tokens); pip install 'trl>=0.26'",
        LeafGRPOTrainer,
        args,
    )
    monkeypatch.setattr(plug.trl, "__version__", "1.13.0")
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", None, raising=False)
    args.use_liger_kernel = True
    check_refuses(
        RuntimeError,
        "use_liger_kernel must be False with LeafGRPOTrainer in TRL 1.13.0, whose Liger loss takes one advantage a "
        "row; set it to False, or pip install 'trl>=1.14'",
        LeafGRPOTrainer,
        args,
    )


# --- Options of TRL ---------------------------------------------------------------------------------------------------


LEVELS = options.CHOICES["importance_sampling_level"]
LOSS_TYPES_OF_TRL = options.CHOICES["loss_type"]
# Rows of several lengths, the third with a hole, the fourth cut off and masked; no row's credit is flat.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
CREDIT = torch.tensor([[1.0, -1, 1, -1, 1, -1], [1, -1, 1, 0, 0, 0], [-2, 0.5, 0, 0, 0, 0.25], [0, 0, 0, 0, 0, 0]])
# What vLLM's own log-probabilities make of each row, and of each token: 1 on padding.
OF_ROWS = torch.tensor([[1.2], [0.7], [0.0], [1.0]])
SAMPLED = {"sequence": OF_ROWS, "token": torch.where(MASK.bool(), OF_ROWS + 0.1 * torch.arange(1, 7), 1.0)}
BOUNDS = {"delta": None, "epsilon_low": 0.2, "epsilon_high": 0.25, "quantile": 1.0, "off_policy": None, "sampled": None}
LONGEST = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trainer(LeafGRPOTrainer, config(tmp_path_factory.mktemp("run"), max_completion_length=LONGEST))


def rows(seed: int = 0) -> dict[str, torch.Tensor]:
    """Log-probabilities in double precision; ratios lie on either side of every bound, those of rows too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> torch.Tensor:
        return scale * torch.randn(MASK.shape, generator=generator, dtype=torch.float64)

    old = -draw(1).abs() - 0.1
    shift = torch.tensor([[0.35], [-0.6], [0.05], [0.0]], dtype=torch.float64)
    return {"logprobs": old + draw(0.3) + shift, "old": old, "ref": old + draw(0.3), "entropy": draw(1).abs()}


def gradient(
    case: dict[str, torch.Tensor], loss_type: str, level: str, parts: int, **changes: Any
) -> list[list[float]]:
    """d loss / d logprobs of the whole batch, split into ``parts``, token by token from the formulas of the papers."""
    bounds = {**BOUNDS, "beta": 0.0, "corrected": False, **changes}
    names = ("logprobs", "old", "ref", "entropy")
    values = {name: case[name].tolist() for name in names}
    mask, credit = MASK.tolist(), case.get("credit", CREDIT).tolist()
    tokens = [[t for t, is_token in enumerate(row) if is_token] for row in mask]
    size = len(mask) // parts
    found = [[0.0] * len(row) for row in mask]
    for r, t in ((r, t) for r, kept in enumerate(tokens) for t in kept):
        micro = range(r // size * size, r // size * size + size)
        log_ratios = [values["logprobs"][r][i] - values["old"][r][i] for i in tokens[r]]
        mean = math.fsum(log_ratios) / len(tokens[r])
        a, lp = credit[r][t], values["logprobs"][r][t]
        w = math.exp(mean if level == "sequence" else lp - values["old"][r][t])
        sign = math.fsum(credit[r][i] for i in tokens[r])
        low, high = 1 - bounds["epsilon_low"], 1 + bounds["epsilon_high"]
        if loss_type == "cispo":
            slope = -a * min(w, bounds["epsilon_high"])
        elif loss_type == "sapo":
            gate = 1 / (1 + math.exp(-(1.0 if a > 0 else 1.05) * (w - 1)))
            slope = -a * 4 * gate * (1 - gate) * w
        elif loss_type == "vespo":
            k, lam = (2.0, 3.0) if sign >= 0 else (3.0, 2.0)
            whole = math.exp(math.fsum(log_ratios))
            if bounds["sampled"]:
                whole *= math.prod(SAMPLED["token"][r].tolist())
            slope = -a * math.exp(lam + k * math.log(whole) - lam * whole)
        else:
            upper = math.inf if bounds["delta"] is None else bounds["delta"]
            is_free = min(w, upper) * a <= min(max(w, low), high) * a
            slope = -a * w if (w <= upper if is_free else low <= w <= high) else 0.0
        if bounds["off_policy"] is not None and sign < 0 and -mean > bounds["off_policy"]:
            slope = 0.0
        if bounds["quantile"] < 1:
            live = [values["entropy"][i][j] for i in micro for j in tokens[i]]
            line = torch.tensor(live, dtype=torch.float32).quantile(1 - bounds["quantile"])
            slope *= float(torch.tensor(values["entropy"][r][t], dtype=torch.float32) >= line)
        if bounds["sampled"] and loss_type != "vespo":
            slope *= float(SAMPLED[bounds["sampled"]].expand(MASK.shape)[r][t])
        if bounds["beta"]:
            apart = values["ref"][r][t] - lp
            k3, of_k3 = math.exp(apart) - apart - 1, 1 - math.exp(apart)
            slope += bounds["beta"] * (of_k3 * w + k3 * w if bounds["corrected"] else of_k3)
        share = {
            "grpo": 1 / (len(tokens[r]) * len(mask)),
            "sapo": 1 / (len(tokens[r]) * len(mask)),
            "bnpo": 1 / (sum(len(tokens[i]) for i in micro) * parts),
            "dr_grpo": 1 / (len(mask) * LONGEST),
            "luspo": 1 / len(mask),
        }
        found[r][t] = slope * share.get(loss_type, 1 / sum(map(len, tokens)))
    return found


def measured(run: Any, case: dict[str, torch.Tensor], loss_type: str, level: str, parts: int, **changes: Any) -> Any:
    """The same of the trainer: its own loss, with log-probabilities in place of a model's."""
    bounds = {**BOUNDS, "beta": 0.0, "corrected": False, **changes}
    args = {"delta": bounds["delta"], "use_bias_correction_kl": bounds["corrected"], "steps_per_generation": parts}
    own = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "current_gradient_accumulation_steps": parts,
        "epsilon_low": bounds["epsilon_low"],
        "epsilon_high": bounds["epsilon_high"],
        "beta": bounds["beta"],
        "top_entropy_quantile": bounds["quantile"],
        "off_policy_mask_threshold": bounds["off_policy"],
        "use_vllm": bounds["sampled"] is not None,
        "vllm_importance_sampling_correction": bounds["sampled"] is not None,
    }
    logprobs = case["logprobs"].clone().requires_grad_()
    size = len(MASK) // parts
    with pytest.MonkeyPatch.context() as patch:
        for owner, settings in ((run, own), (run.args, args)):
            for name, value in settings.items():
                patch.setattr(owner, name, value, raising=False)
        for start in range(0, len(MASK), size):
            part = slice(start, start + size)
            inputs = {
                "prompt_ids": torch.full((size, 2), 3),
                "prompt_mask": torch.ones(size, 2, dtype=torch.int64),
                "completion_ids": torch.full((size, MASK.shape[1]), 4),
                "completion_mask": MASK[part],
                "advantages": case.get("credit", CREDIT)[part],
                "num_items_in_batch": MASK.sum(),
                "ref_per_token_logps": case["ref"][part],
            }
            if "on_policy" not in case:
                inputs["old_per_token_logps"] = case["old"][part]
            if bounds["sampled"]:
                inputs["importance_sampling_ratio"] = SAMPLED[bounds["sampled"]][part]
            forward = (logprobs[part], case["entropy"][part].float(), None)
            patch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", lambda *_, f=forward, **__: f)
            run._compute_loss(run.model, inputs).backward()
        assert run.importance_sampling_level == level
    return logprobs.grad


def check(run: Any, case: dict[str, torch.Tensor], *setting: Any, **changes: Any) -> torch.Tensor:
    actual = measured(run, case, *setting, **changes)
    expected = torch.tensor(gradient(case, *setting, **changes), dtype=torch.float64)
    # The trainer's inputs are doubles, and its formulas the same; only credit and credit's factors are float32.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-12)
    return actual


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES_OF_TRL)
def test_every_token_has_its_own_gradient(run: Any, loss_type: str, level: str, parts: int) -> None:
    actual = check(run, rows(), loss_type, level, parts)
    # On policy nothing is clipped, and a token is pushed where its credit points.
    case = rows()
    case.update(old=case["logprobs"].clone(), on_policy=torch.ones(1))
    actual = check(run, case, loss_type, level, parts)
    assert torch.equal(actual.sign(), -(CREDIT * MASK).sign().double())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES_OF_TRL)
@pytest.mark.parametrize(
    "changes",
    [
        {"delta": 1.3},
        {"epsilon_low": 0.02, "epsilon_high": 3.0},
        {"quantile": 0.4},
        {"off_policy": 0.3},
        {"off_policy": -10.0},
        {"beta": 0.3},
        {"beta": 0.3, "corrected": True},
        {"sampled": "token"},
        {"sampled": "sequence"},
    ],
    ids=str,
)
def test_options_of_the_loss(run: Any, loss_type: str, level: str, changes: dict[str, Any]) -> None:
    if loss_type == "vespo" and changes.get("sampled") == "sequence":
        pytest.skip("TRL refuses it")
    for seed, parts in itertools.product(range(2), (1, 2)):
        check(run, rows(seed), loss_type, level, parts, **changes)


@pytest.mark.parametrize("level", LEVELS)
def test_an_off_policy_row_is_kept_or_dropped_whole(run: Any, level: str) -> None:
    """Of two rows as far from the policy, the one whose mean credit is negative goes, with what is pushed up in it."""
    case = rows()
    case["old"] = case["logprobs"] + 0.1
    case["credit"] = torch.tensor([[1.0, -1, 1, -1, 1, 1], [1, -1, -1, 0, 0, 0], [0] * 6, [0] * 6])
    actual = check(run, case, "grpo", level, 1, off_policy=0.05)
    assert actual[0].all()
    assert not actual[1].any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES_OF_TRL)
@pytest.mark.parametrize("level", LEVELS)
def test_one_advantage_a_row_gives_the_gradient_of_trl(loss_type: str, level: str, tmp_path: Path) -> None:
    """Tokens' gradients of TRL's own loss, for credit that is flat in a row, in which alone it is defined there."""
    case = rows()
    case["credit"] = torch.tensor([[1.0], [-1], [0.5], [0]])
    settings = {"off_policy": 0.3, "delta": 1.3}
    theirs = trainer(GRPOTrainer, config(tmp_path, GRPOConfig))
    theirs.args.importance_sampling_level = level
    ours = trainer(LeafGRPOTrainer, config(tmp_path, importance_sampling_level=level))
    expected = measured(theirs, case, loss_type, level, 2, **settings)
    case["credit"] = case["credit"] * MASK
    torch.testing.assert_close(measured(ours, case, loss_type, level, 2, **settings), expected, rtol=1e-6, atol=1e-12)


class Steep(LeafGRPOTrainer):
    """Credit that changes its sign within a row, and, of every loss, the gradient that the oracle has for it."""

    def token_advantages(self, logprobs: Any, token_ids: Any, rewards: Any, mask: Any, groups: int) -> torch.Tensor:
        return torch.where(mask, 1.0 - 2.0 * (torch.arange(mask.shape[1]) % 2), 0.0) * (1 + rewards[:, None] % 2)

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        weights = list(model.parameters())
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -inputs["completion_ids"].shape[1] - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
        old = inputs.get("old_per_token_logps", logprobs.detach())
        mask = inputs["completion_mask"].bool()
        log_ratio = torch.where(mask, logprobs.detach() - old, 0.0)
        ratio = (log_ratio.sum(1) / mask.sum(1)).exp()
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)[:, None]
        is_free = ratio[:, None] * inputs["advantages"] <= clipped * inputs["advantages"]
        slopes = torch.where(mask & is_free, -inputs["advantages"] * ratio[:, None], 0.0)
        slopes = slopes / (mask.sum(1, keepdim=True) * len(mask) * self.current_gradient_accumulation_steps)
        expected = torch.autograd.grad((slopes * logprobs).sum(), weights)
        actual = torch.autograd.grad(loss, weights, retain_graph=True)
        self.pairs.append((expected, actual))
        self.ratios.append(ratio)
        return loss


def test_gspo_trains_on_what_the_tokens_are_credited(tmp_path: Path) -> None:
    """Through sampling, shuffling, splitting and the model: gradients of its weights, on policy and off."""
    args = config(
        tmp_path,
        importance_sampling_level="sequence",
        loss_type="grpo",
        num_iterations=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=0.02,
    )
    run = trainer(Steep, args, count_a)
    run.pairs, run.ratios = [], []
    run.train()
    assert len(run.pairs) == 8
    for expected, actual in run.pairs:
        scale = max(float(weight.abs().max()) for weight in expected)
        assert scale > 0
        for theirs, ours in zip(expected, actual, strict=True):
            # Sums of some hundred float32 terms; ratios differ by roundings of log-probabilities of the size of 3.
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale)
    assert any((ratio - 1).abs().max() > 1e-3 for ratio in run.ratios)


def of_docs() -> Iterator[tuple[str, str]]:
    """The options of the table in docs/trainers.md, each with what is said of it."""
    page = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    table = page.split("| option of TRL |")[1].split("\n\n")[0].splitlines()[2:]
    for line in table:
        _, names, meaning, _ = (cell.strip() for cell in line.split("|"))
        for name in re.findall(r"`(\w+)`", names):
            yield name, meaning


def test_the_table_has_every_option_of_trl() -> None:
    """A field that a newer TRL adds is to be read, and goes into the table or among those that meet no advantage."""
    documented = dict(of_docs())
    assert set(documented) == options.OF_THE_LOSS
    assert all(documented.values())
    assert not options.OF_THE_LOSS & options.ELSEWHERE
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    of_trl = {field.name for field in dataclasses.fields(GRPOConfig)} - known
    assert of_trl - options.OF_THE_LOSS - options.ELSEWHERE == set()
    for name, values in options.CHOICES.items():
        assert set(values) <= set(re.findall(r'"(\w+)"', documented[name])), name


@pytest.mark.parametrize("option", options.CHOICES)
def test_values_of_which_nothing_is_known_are_refused(option: str, tmp_path: Path) -> None:
    args = config(tmp_path)
    setattr(args, option, "newest")
    with pytest.raises(ValueError, match=f"^{option} must be one of '.*' with LeafGRPOTrainer, got 'newest', of which"):
        trainer(LeafGRPOTrainer, args)


def test_an_unknown_option_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(options, "ELSEWHERE", options.ELSEWHERE - {"top_k"})
    trainer(LeafGRPOTrainer, config(tmp_path))
    assert "does not know" not in caplog.text
    trainer(LeafGRPOTrainer, config(tmp_path, top_k=3))
    (record,) = [record for record in caplog.records if "does not know" in record.message]
    assert record.message.startswith(f"LeafGRPOTrainer does not know top_k=3 of TRL {trl.__version__}: if it concerns")


def test_a_trl_without_the_hooks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, method in (
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask"),
        ({"loss_type": "vespo"}, "gamma_weights"),
    ):
        args = config(tmp_path, **changes)
        with monkeypatch.context() as patch:
            patch.delattr(GRPOTrainer, f"get_{method}")
            with pytest.raises(
                RuntimeError, match=f"must not be set with LeafGRPOTrainer in TRL .* GRPOTrainer.get_{method}"
            ):
                trainer(LeafGRPOTrainer, args)
    run = trainer(LeafGRPOTrainer, config(tmp_path, importance_sampling_level="sequence"))
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda *_: torch.zeros(()))
    with pytest.raises(RuntimeError, match="importance_sampling_level must be 'token' with LeafGRPOTrainer in TRL"):
        run._compute_loss(run.model, {})
    assert "_get_per_token_logps_and_entropies" not in vars(run)


def odd(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Rewards some of which are infinite, of either sign, too large for float32, or missing."""
    rewards = {0: math.inf, 1: -math.inf, 2: 1e39, 3: None}
    return [rewards.get(sum(ids) % 9, float(sum(ids) % 4)) for ids in completion_ids]


def none_for_odd(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [None if reward is None or abs(reward) > 1e38 else reward for reward in odd(completion_ids)]


@pytest.mark.parametrize("more", [[], [count_a]], ids=["alone", "beside another"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale_rewards": "none"},
        {"scale_rewards": "batch"},
        {"estimator": "tree_td"},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ],
    ids=str,
)
def test_infinite_rewards_are_none(changes: dict[str, Any], more: list[Any], tmp_path: Path) -> None:
    """Credit, loss and weights are those of the same rewards with None in their place, and they are counted."""
    runs = []
    for reward in (odd, none_for_odd):
        args = config(tmp_path, max_steps=2, **changes)
        run = trainer(Recorded, args, [reward, *more], script(tiny_trl.model(), 4))
        run.train()
        runs.append(run)
    ours, expected = runs
    for batch, other in zip(ours.batches, expected.batches, strict=True):
        assert batch["advantages"].isfinite().all() and batch["advantages"].any()
        assert torch.equal(batch["advantages"], other["advantages"])
    for weight, other in zip(ours.model.parameters(), expected.model.parameters(), strict=True):
        assert weight.isfinite().all() and torch.equal(weight, other)
    counts = [line["rewards/odd/nonfinite"] for line in ours.state.log_history[:-1]]
    completions = [batch["completion_ids"] * batch["completion_mask"] for batch in ours.batches]
    assert counts == [int((ids.sum(1) % 9 < 3).sum()) for ids in completions]
    assert not any("nonfinite" in name for line in expected.state.log_history for name in line)


def test_infinite_rewards_are_told(tmp_path: Path, caplog: Any) -> None:
    run = trainer(
        LeafGRPOTrainer, config(tmp_path, max_steps=1), lambda completions, **_: [1.0, 2.0, math.inf, 0.0] * 2
    )
    run.train()
    (record,) = [record for record in caplog.records if "infinite" in record.message]
    assert record.message == (
        "The reward function '<lambda>' gave infinite rewards to 2 of 8 completions, first to number 2 of the batch; "
        "they count as not scored by it."
    )


def test_a_sum_of_rewards_that_overflows_is_none(tmp_path: Path) -> None:
    largest = [3e38, 1.0, 0.0, 2.0] * 2
    args = config(tmp_path, max_steps=1, scale_rewards="none")
    run = trainer(Recorded, args, [lambda completions, **_: largest] * 2, script(tiny_trl.model(), 4))
    run.train()
    assert run.batches[0]["advantages"].abs().max() < 100
    assert not run.batches[0]["advantages"][::4].any()
    assert all(weight.isfinite().all() for weight in run.model.parameters())


def test_rewards_normalized_before_their_sum_are_scaled_over_the_batch(tmp_path: Path) -> None:
    settings = {"multi_objective_aggregation": "normalize_then_sum", "max_steps": 1}
    found = []
    for normalize in (None, "batch"):
        args = config(tmp_path, normalize=normalize, **settings)
        run = trainer(Recorded, args, [picky, count_a], script(tiny_trl.model(), 4))
        run.train()
        found.append(run.batches[0]["advantages"])
    assert torch.equal(*found)


def test_a_scale_that_is_not_used_is_told(tmp_path: Path, caplog: Any) -> None:
    trainer(LeafGRPOTrainer, config(tmp_path, scale_rewards="none"))
    assert "is not used" not in caplog.text
    trainer(LeafGRPOTrainer, config(tmp_path, scale_rewards="none", estimator="tempo"))
    assert "scale_rewards='none' is not used: estimator='tempo' scales, or does not, as its formula does" in caplog.text


@pytest.mark.parametrize("name", ["Cohere", "Granite"])
def test_models_whose_head_scales(name: str, tmp_path: Path) -> None:
    """Boundaries are ranked by what the model itself gives, its scale of the logits (a factor, a divisor) included."""
    scale = {"logit_scale": 0.125} if name == "Cohere" else {"logits_scaling": 8.0}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tiny_trl.TOKENS), "eos_token_id": tiny_trl.EOS, "pad_token_id": tiny_trl.PAD}
    settings = getattr(transformers, f"{name}Config")(
        **sizes, **tokens, bos_token_id=None, initializer_range=0.3, **scale
    )
    policy = getattr(transformers, f"{name}ForCausalLM")(settings)

    class Ranked(Recorded):
        def _ranking_logprobs(self, batch: dict[str, Any]) -> torch.Tensor:
            self.ranked = super()._ranking_logprobs(batch)
            return self.ranked

    run = trainer(Ranked, config(tmp_path, max_steps=1), count_a, policy)
    run.train()
    mask = run.batches[0]["completion_mask"].bool()
    # Float32, in tiles or at once.
    torch.testing.assert_close(run.ranked[mask], run.batches[0]["logprobs"][mask], rtol=1e-5, atol=1e-5)


# ---- reward functions that return a list for a completion


def by_letter(completion_ids: list[list[int]], **_: Any) -> list[Any]:
    """1 at every "a", for every third answer nothing, and for every fifth a number."""
    found: list[Any] = []
    for ids in completion_ids:
        pairs = [(t + 1, 1.0) for t, token in enumerate(ids) if token == tiny_trl.TOKENS.index("a")]
        found.append(None if sum(ids) % 3 == 2 else 2.0 if sum(ids) % 5 == 4 else pairs)
    return found


async def by_letter_later(completion_ids: list[list[int]], **_: Any) -> list[Any]:
    return by_letter(completion_ids)


@pytest.mark.parametrize("estimator", ["leaf", "tree_td", "grpo"])
@pytest.mark.parametrize("function", [by_letter, by_letter_later])
def test_lists_of_rewards(function: Any, estimator: str, tmp_path: Path) -> None:
    """Earned at the token that ends a step, beside a function of one number; the logs have the sums."""
    args = config(tmp_path, estimator=estimator, max_steps=1, reward_weights=[0.5, 2.0], report_every=1)
    run = trainer(Recorded, args, [function, count_a], script(tiny_trl.model(), 4))
    run.train()
    (batch,) = run.batches
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    rows = [row[m].tolist() for row, m in zip(ids, mask, strict=True)]
    lists = by_letter(rows)
    steps, ends = torch.zeros(ids.shape, dtype=torch.float64), torch.zeros(len(rows), dtype=torch.float64)
    for i, value in enumerate(lists):
        ends[i] = 2.0 * count_a([rows[i]])[0] + (0.5 * value if isinstance(value, float) else 0.0)
        for end, reward in value if isinstance(value, list) else []:
            steps[i, end - 1] = 0.5 * reward
    call: dict[str, Any] = {"response_mask": mask, "group_size": 4, "step_rewards": steps}
    if estimator == "tree_td":  # as scale_rewards="group" has it
        call["normalize"] = "reward_std"
    expected = leafkernels.ESTIMATORS[estimator](batch["logprobs"], ids, ends, **call)
    torch.testing.assert_close(batch["advantages"], expected)
    assert any(isinstance(value, list) and value for value in lists)
    sums = [math.nan if v is None else v if isinstance(v, float) else float(len(v)) for v in lists]
    torch.testing.assert_close(batch["rewards"][:, 0].double(), torch.tensor(sums).double(), equal_nan=True)
    assert (tmp_path / "report-0.html").exists()


def test_rewards_at_tokens_that_are_not_trained_on(tmp_path: Path) -> None:
    """A truncated completion has no token: what it earns comes at its end, as a number would."""
    args = config(tmp_path, estimator="dr_grpo", max_steps=1, mask_truncated_completions=True)
    run = trainer(Recorded, args, by_letter, script(tiny_trl.model(), 4))
    run.train()
    (batch,) = run.batches
    mask = batch["completion_mask"].bool()
    assert not mask.any(1).all()
    rewards = batch["rewards"][:, 0].double().reshape(-1, 4)
    first = [row.nonzero()[0].item() if row.any() else None for row in mask]
    centred = (rewards - rewards.nanmean(1, keepdim=True)).flatten().nan_to_num(0.0)
    for i, place in enumerate(first):
        if place is not None:  # nothing is earned before the first token
            assert batch["advantages"][i, place].item() == pytest.approx(centred[i].item(), abs=1e-5)


@pytest.mark.parametrize("value", [[(0, 1.0)], [(99, 1.0)], [1.0], [(1, None)], [("1", 1.0)]])
def test_lists_that_are_none(value: Any, tmp_path: Path) -> None:
    def wrong(completion_ids: list[list[int]], **_: Any) -> list[Any]:
        return [value for _ in completion_ids]

    run = trainer(LeafGRPOTrainer, config(tmp_path, max_steps=1), wrong, script(tiny_trl.model(), 4))
    with pytest.raises(
        ValueError, match=r"reward_funcs must return for a completion a number, None or a list of .*from 'wrong'"
    ):
        run.train()


def at_the_first_or_last(completion_ids: list[list[int]], **_: Any) -> list[Any]:
    """The same sum for all, earned at other tokens."""
    return [[(1 if sum(ids) % 2 else len(ids), 0.3)] for ids in completion_ids]


def test_lists_of_rewards_normalized_before_the_sum(tmp_path: Path) -> None:
    """Each function's steps by the deviation of its sums, beside one of one number, and one whose sums are equal."""
    settings = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [0.5, 2.0, 3.0]}
    args = config(tmp_path, max_steps=1, estimator="dr_grpo", **settings)
    run = trainer(Recorded, args, [by_letter, count_a, at_the_first_or_last], script(tiny_trl.model(), 4))
    run.train()
    (batch,) = run.batches
    mask, weights = batch["completion_mask"].bool(), [0.5, 2.0]
    given = [by_letter(rows := [row[m].tolist() for row, m in zip(batch["completion_ids"], mask, strict=True)])]
    given.append(count_a(rows))
    for first in range(0, len(rows), 4):
        totals, to_go = [0.0] * 4, [[0.0] * len(rows[first + i]) for i in range(4)]
        for weight, values in zip(weights, (column[first : first + 4] for column in given), strict=True):
            sums = [sum(r for _, r in v) if isinstance(v, list) else v for v in values]
            known = [v for v in sums if v is not None]
            mean = sum(known) / max(len(known), 1)
            std = math.sqrt(sum((v - mean) ** 2 for v in known) / max(len(known) - 1, 1))
            for i, (value, total) in enumerate(zip(values, sums, strict=True)):
                if total is None or std == 0.0:
                    continue
                scale = weight / (std + 1e-4)
                totals[i] += scale * (total - mean)
                for t in range(len(to_go[i])):
                    gone = sum(r for end, r in value if end <= t) if isinstance(value, list) else 0.0
                    to_go[i][t] += scale * (total - mean - gone)
        for i in range(4):
            want = [value - sum(totals) / 4 for value in to_go[i]]
            found = batch["advantages"][first + i][: len(want)].tolist()
            # TRL's table of rewards is float32.
            assert found == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert batch["advantages"].isfinite().all()
    assert (batch["advantages"][:, 0] - batch["advantages"][:, 3]).abs().max() > 0.5
