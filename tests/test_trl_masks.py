"""Sampling masks in TRL's trainers: every forward pass of the loss is over the ids that could have been sampled."""

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")

import tiny_trl
from datasets import Dataset
from forked import run_ranks
from peft import LoraConfig
from tiny_trl import Recorded, config, picky, trainer
from transformers.generation import logits_process
from trl import GRPOConfig

from leafkernels.integrations._trl_kept import joined
from leafkernels.integrations.trl import LeafGRPOConfig, LeafGRPOTrainer
from leafkernels.integrations.trl_audio import AudioGRPOTrainer, LeafAudioGRPOTrainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PLAIN = {"sampling_mask": True, "top_p": 0.8, "learning_rate": 0.5, "optim": "sgd", "gradient_checkpointing": False}
WARPERS = {"top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper"}


def adapter() -> LoraConfig:
    return LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False)


def kept_by_transformers(logits: torch.Tensor, args: Any) -> torch.Tensor:
    """Which ids (rows, V) the sampler of transformers leaves."""
    logits = logits_process.TemperatureLogitsWarper(args.temperature)(None, logits)
    for name, processor in WARPERS.items():
        value = getattr(args, name)
        if value not in (None, 0, 1.0):
            logits = getattr(logits_process, processor)(value)(None, logits)
    return logits > -math.inf


class Checked(Recorded):
    """Compares every log-probability and entropy that the loss asks for with filled logits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.checked: list[str] = []

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        live = batch["completion_mask"].bool()
        logits = self.raw_logits(self.model, *(self.whole(batch)), live.shape[1])
        is_kept = kept_by_transformers(logits[live], self.args)
        masks = joined(batch["sampling_mask"], live.shape[1], "cpu")
        found = torch.zeros(live.numel(), logits.shape[-1], dtype=torch.bool)
        rows = torch.arange(live.numel()).repeat_interleave(masks.offsets.diff())
        found[rows, masks.token_ids] = True
        assert torch.equal(found.view(logits.shape)[live], is_kept)
        assert self.args.mask_truncated_completions or not found.view(logits.shape)[~live].any()
        mass = (logits[live] / self.args.temperature).softmax(-1).masked_fill(~is_kept, 0).sum(-1)
        # Means over tokens, which this batch has all of.
        log = self._metrics["train" if self.model.training else "eval"]
        assert log["leaf/kept_ids"][-1] == pytest.approx(is_kept.sum(-1).float().mean().item(), rel=1e-6)
        sampled = is_kept.gather(1, batch["completion_ids"][live][:, None])
        assert log["leaf/kept_missing"][-1] == pytest.approx((~sampled).float().mean().item(), abs=1e-9)
        if sampled.all():
            assert log["leaf/kept_mass"][-1] == pytest.approx(mass.mean().item(), rel=1e-5)
        if self.args.estimator == "leaf" and self.args.beta:
            self.check_reference(batch)
        return batch

    def check_reference(self, batch: dict[str, Any]) -> None:
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            found, _ = self.expected(self.model, batch)
        live = batch["completion_mask"].bool()
        torch.testing.assert_close(batch["ref_per_token_logps"][live], found[live], rtol=1e-4, atol=1e-5)
        self.checked.append("reference")

    @staticmethod
    def whole(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))

    def raw_logits(self, model: Any, ids: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            logits = self.accelerator.unwrap_model(model)(input_ids=ids, attention_mask=mask).logits
        model.train(was_training)
        return logits[:, -keep - 1 : -1].float()

    def expected(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """By filling with -inf, from the masks that travelled with the rows."""
        keep = batch["completion_ids"].shape[1]
        logits = self.raw_logits(model, *self.whole(batch), keep) / self.args.temperature
        masks = joined(batch["sampling_mask"], keep, "cpu")
        banned = torch.ones(logits.shape, dtype=torch.bool).flatten(0, 1)
        banned[torch.arange(len(banned)).repeat_interleave(masks.offsets.diff()), masks.token_ids] = False
        banned[masks.offsets.diff() == 0] = False
        banned = banned.view(logits.shape).scatter(2, batch["completion_ids"][..., None], False)
        p = logits.masked_fill(banned, -math.inf).softmax(-1)
        logprobs = p.gather(2, batch["completion_ids"][..., None])[..., 0].log()
        return logprobs, torch.special.entr(p).sum(-1)

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        self.inputs = inputs
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if torch.is_grad_enabled() or not self.model.training:
            logprobs, entropy = self.expected(model, self.inputs)
            live = self.inputs["completion_mask"].bool()
            torch.testing.assert_close(found[0][live].detach(), logprobs[live], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[1][live].detach(), entropy[live], rtol=1e-4, atol=1e-5)
            self.checked.append("policy")
        return found


RUNS: list[dict[str, Any]] = [
    {},
    {"top_p": 1.0, "top_k": 3, "temperature": 0.7},
    {"top_p": 0.9, "min_p": 0.2, "estimator": "grpo", "mask_truncated_completions": True},
    {"generation_kwargs": {"top_p": 0.6}, "top_p": 1.0, "importance_sampling_level": "sequence"},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4},
    {"per_device_train_batch_size": 4, "steps_per_generation": 4, "max_steps": 5},
    {"loss": "leafkernels", "num_iterations": 2, "max_steps": 4},
    {"beta": 0.2, "peft_config": adapter},
]


@pytest.mark.parametrize("changes", RUNS, ids=lambda changes: "-".join(changes) or "plain")
def test_every_pass_of_the_loss_is_over_the_kept_ids(changes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    more = {name: make() for name, make in changes.items() if name == "peft_config"}
    args = config(tmp_path, **{**PLAIN, **{name: value for name, value in changes.items() if name not in more}})
    if args.generation_kwargs:
        args.top_p = args.generation_kwargs["top_p"]  # what the check reads
    run = trainer(Checked, args, picky, **more)
    run.train()
    assert run.checked.count("policy") == len(run.splits) == args.max_steps * args.gradient_accumulation_steps
    assert ("reference" in run.checked) == bool(args.beta)
    log = [line for line in run.state.log_history if "leaf/kept_mass" in line]
    assert all(0 < line["leaf/kept_mass"] < 1 and line["leaf/kept_missing"] == 0 for line in log)
    assert any(line["grad_norm"] > 0 for line in run.state.log_history[:-1])


def test_shared_prefixes_share_the_kept_ids(tmp_path: Path) -> None:
    prompts = Dataset.from_dict({"prompt": ["abcdefgh" * 2 + "a" * n for n in range(4)] * 4})
    torch.manual_seed(4)
    args = config(tmp_path, **PLAIN, share_prefixes=True, num_iterations=2, max_steps=4)
    run = Checked(tiny_trl.model(), picky, args, prompts, processing_class=tiny_trl.tokenizer())
    run.train()
    assert run.checked.count("policy") == 4
    log = run.state.log_history[:-1]
    assert any(line["grad_norm"] > 0 for line in log)
    assert all(line["leaf/shared_share"] == 1 and line["leaf/tokens_per_node"] > 1.2 for line in log)


def test_the_gradient_is_that_of_filled_logits(tmp_path: Path) -> None:
    """Of on-policy samples, whose ratios are 1: the sum of advantages times the gradient of log-probabilities."""
    torch.manual_seed(2)
    run = trainer(Checked, config(tmp_path, **PLAIN, max_steps=1, loss_type="dr_grpo"), picky)
    before = [weight.detach().clone() for weight in run.model.parameters()]
    run.train()
    moved = [old - weight.detach() for old, weight in zip(before, run.model.parameters(), strict=True)]
    (inputs,) = run.splits
    policy = tiny_trl.model()
    keep = inputs["completion_ids"].shape[1]
    ids, mask = run.whole(inputs)
    logits = policy(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1]
    masks = joined(inputs["sampling_mask"], keep, "cpu")
    banned = torch.ones(logits.shape, dtype=torch.bool).flatten(0, 1)
    banned[torch.arange(len(banned)).repeat_interleave(masks.offsets.diff()), masks.token_ids] = False
    banned = banned.view(logits.shape) & inputs["completion_mask"].bool()[..., None]
    logprobs = logits.masked_fill(banned, -math.inf).log_softmax(-1).gather(2, inputs["completion_ids"][..., None])
    live = inputs["completion_mask"].bool()
    total = -(logprobs[..., 0] * inputs["advantages"])[live].sum()
    gradients = torch.autograd.grad(total, list(policy.parameters()), allow_unused=True)
    pairs = [(m, g) for m, g in zip(moved, gradients, strict=True) if g is not None]
    # SGD, up to the one factor that clipping the norm and the loss's mean make.
    factors = torch.cat([m.flatten() for m, _ in pairs]), torch.cat([g.flatten() for _, g in pairs])
    assert float(torch.nn.functional.cosine_similarity(*factors, dim=0)) > 1 - 1e-5


def test_without_truncation_it_is_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    curves = []
    for asked in (True, False):
        torch.manual_seed(3)
        run = trainer(Recorded, config(tmp_path / str(asked), sampling_mask=asked), picky)
        run.train()
        assert not any("sampling_mask" in batch for batch in run.batches)
        names = ("loss", "grad_norm", "entropy")
        curves.append([[line[name] for name in names] for line in run.state.log_history[:-1]])
    assert curves[0] == curves[1]
    assert "truncates" not in caplog.text


def test_truncation_without_a_mask_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(LeafGRPOTrainer, config(tmp_path, top_p=0.9, min_p=0.1), picky)
    run.train()
    told = [line for line in caplog.messages if "truncates what is sampled" in line]
    assert len(told) == 1
    assert told[0].startswith("top_p=0.9, min_p=0.1 truncates") and "sampling_mask=True" in told[0]
    assert not any("leaf/kept_ids" in line for line in run.state.log_history)


def test_evaluation(tmp_path: Path) -> None:
    run = trainer(Checked, config(tmp_path, **PLAIN, max_steps=1, per_device_eval_batch_size=8), picky)
    run.train()
    run.checked.clear()
    found = run.evaluate(run.train_dataset)
    assert run.checked.count("policy") == len(run.train_dataset) * 4 // 8
    assert 0 < found["eval_leaf/kept_mass"] < 1


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    changes |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def steps(folder: Path, resume: str | None) -> tuple[list[Any], list[torch.Tensor]]:
        run = trainer(LeafGRPOTrainer, config(folder, **PLAIN, **changes), picky)
        run.train(resume_from_checkpoint=resume)
        log = [[line[name] for name in ("loss", "grad_norm")] for line in run.state.log_history[:-1]]
        return log, [weight.clone() for weight in run.model.parameters()]

    whole, weights = steps(tmp_path / "whole", None)
    again, resumed = steps(tmp_path / "part", str(tmp_path / "whole" / "checkpoint-2"))
    assert len({tuple(line) for line in whole}) == 4
    assert again == whole
    assert all(torch.equal(a, b) for a, b in zip(resumed, weights, strict=True))


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Scripted rows, most of whose tokens the policy would not sample: they count as kept, and are told."""
    changes = {"top_p": 0.8, "sampling_mask": True}
    run_ranks("tiny_trl.py", tmp_path, "group", json.dumps(changes))
    (whole,) = tiny_trl.one_step(str(tmp_path / "run"), 12, "group", **changes).batches
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=False)[0] for rank in range(2)]
    masks = [row for half in halves for row in half["sampling_mask"]]
    for row, expected in zip(masks, whole["sampling_mask"], strict=True):
        assert torch.equal(row.token_ids, expected.token_ids) and torch.equal(row.offsets, expected.offsets)
    names = ("leaf/kept_ids", "leaf/kept_mass", "leaf/kept_missing")
    for half in halves:
        for name in names:
            assert half["metrics"][name] == pytest.approx(whole["metrics"][name], rel=1e-6)
    assert whole["metrics"]["leaf/kept_missing"] > 0.05


# --- Engines ----------------------------------------------------------------------------------------------------------


class OfEngine(Recorded):
    """As if an engine had sampled, and TRL handed its masks on, under some name."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        completions, _ = super()._generate_single_turn(*args, **kwargs)
        self.handed = [
            SimpleNamespace(token_ids=[i for t in ids for i in (t, 3)], offsets=list(range(0, 2 * len(ids) + 1, 2)))
            for ids in completions
        ]
        return completions, None


def test_masks_of_an_engine_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import GRPOTrainer

    generate = GRPOTrainer._generate

    def handing(self: Any, prompts: Any) -> Any:
        found = list(generate(self, prompts))
        found[5] = {**found[5], "of_the_engine": self.handed}
        return tuple(found)

    monkeypatch.setattr(GRPOTrainer, "_generate", handing)
    run = trainer(OfEngine, config(tmp_path, **PLAIN, max_steps=2), picky)
    run.train()
    for batch in run.batches:
        for mask, ids, live in zip(
            batch["sampling_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
        ):
            tokens = ids[live.bool()].tolist()
            assert mask.token_ids.tolist() == [i for token in tokens for i in (token, 3)]
    assert all("leaf/kept_mass" not in line for line in run.state.log_history)
    assert {line["leaf/kept_ids"] for line in run.state.log_history[:-1]} == {2.0}

    def cut(self: Any, prompts: Any) -> Any:
        found = list(handing(self, prompts))
        found[5]["of_the_engine"][0].offsets.pop()
        return tuple(found)

    monkeypatch.setattr(GRPOTrainer, "_generate", cut)
    with pytest.raises(
        ValueError, match=r"^the kept ids of completion 0 must be those of its \d+ tokens, with \d+ off"
    ):
        trainer(OfEngine, config(tmp_path, **PLAIN, max_steps=1), picky).train()


def test_an_engine_without_masks_is_refused(tmp_path: Path) -> None:
    run = trainer(LeafGRPOTrainer, config(tmp_path, **PLAIN), picky)
    run.use_vllm = True
    with pytest.raises(RuntimeError, match=r"^sampling_mask must be False with use_vllm=True in TRL .* no kept ids: "):
        run._find_masks(([[3]], [[4]]), [[3]], [[4]])
    run.use_vllm, run.rollout_func = False, print
    with pytest.raises(RuntimeError, match=r"^sampling_mask must be False with a rollout_func in TRL "):
        run._find_masks(([[3]], [[4]]), [[3]], [[4]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"generation_kwargs": {"typical_p": 0.5}},
            "generation_kwargs must hold no 'typical_p' with sampling_mask=True",
        ),
        ({"repetition_penalty": 1.1}, "repetition_penalty must be 1 with sampling_mask=True"),
        ({"cast_lm_head_to_fp32": True}, "sampling_mask must be False with cast_lm_head_to_fp32=True"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    policy = tiny_trl.model(tie_word_embeddings=False)
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer(LeafGRPOTrainer, config(tmp_path, **PLAIN, **changes), picky, policy)


# --- Audio ------------------------------------------------------------------------------------------------------------


def test_audio(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The audio token, which is never sampled, is never kept; every pass hears."""
    import tiny_audio

    torch.manual_seed(0)
    args = config(tmp_path, LeafGRPOConfig, **PLAIN, max_steps=2, beta=0.1)
    run = tiny_audio.trainer(LeafAudioGRPOTrainer, args)
    batches = []
    generate = run._generate_and_score_completions
    run._generate_and_score_completions = lambda inputs: (batches.append(generate(inputs)), batches[-1])[1]
    banned = run.generation_kwargs["suppress_tokens"][0]
    run.train()
    for batch in batches:
        assert all(banned not in mask.token_ids.tolist() for mask in batch["sampling_mask"])
        live = batch["completion_mask"].bool()
        assert batch["ref_per_token_logps"][live].isfinite().all()
    log = run.state.log_history[:-1]
    # At the first step the policy is its reference but for the adapter, which is none yet.
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert all(0 < line["leaf/kept_mass"] <= 1 and line["leaf/kept_missing"] == 0 for line in log)
    assert all(line["grad_norm"] >= 0 for line in log)
    with caplog.at_level(logging.WARNING):
        tiny_audio.trainer(AudioGRPOTrainer, config(tmp_path, GRPOConfig, top_p=0.9))
    assert "GRPOConfig has no sampling_mask" in caplog.text
