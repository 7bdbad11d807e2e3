"""What TRL's loss makes of one advantage for each token: its gradient by token, under every option, by hand."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
trl = pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")

import tiny_trl
import transformers
from tiny_trl import Recorded, config, count_a, picky, script, trainer
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from leafkernels.integrations import _trl_options as options
from leafkernels.integrations.trl import LeafGRPOTrainer

LEVELS = options.CHOICES["importance_sampling_level"]
LOSS_TYPES = options.CHOICES["loss_type"]
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
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_token_has_its_own_gradient(run: Any, loss_type: str, level: str, parts: int) -> None:
    actual = check(run, rows(), loss_type, level, parts)
    # On policy nothing is clipped, and a token is pushed where its credit points.
    case = rows()
    case.update(old=case["logprobs"].clone(), on_policy=torch.ones(1))
    actual = check(run, case, loss_type, level, parts)
    assert torch.equal(actual.sign(), -(CREDIT * MASK).sign().double())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
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


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
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
