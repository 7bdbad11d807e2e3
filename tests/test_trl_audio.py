"""AudioGRPOTrainer in TRL itself, on small models of random weights that hear tones."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
np = pytest.importorskip("numpy")
pytest.importorskip("trl", minversion="1.14", reason="needs TRL: pip install -e '.[trl]'")
pytest.importorskip("transformers", minversion="5.23")
for package in ("peft", "soundfile"):
    pytest.importorskip(package)

import tiny_audio
import tiny_listeners
from datasets import Audio, Dataset
from forked import run_ranks
from tiny_audio import lora, recordings, trainer
from tiny_listeners import tone, wave
from tiny_trl import config
from trl import GRPOConfig

from leafkernels.integrations import trl_audio
from leafkernels.integrations.trl import LeafGRPOConfig
from leafkernels.integrations.trl_audio import AudioGRPOTrainer, LeafAudioGRPOTrainer


class Recorded(AudioGRPOTrainer):
    """Keeps the batches, and what the loss is computed from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        self.splits: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self.batches.append({**batch, "inputs": inputs})
        return batch

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        self.found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        return self.found

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        self.splits.append({**inputs, "logprobs": self.found[0].detach(), "training": model.training})
        return loss


def settings(folder: Path, kind: type = GRPOConfig, **changes: Any) -> Any:
    return config(folder, kind, **{"max_completion_length": 6, **changes})


def alone(run: Any, token_ids: list[int], features: dict[str, Any], adapted: bool) -> torch.Tensor:
    """Log-probabilities of a sequence's tokens by the model's own forward, a batch of one without padding."""
    model = run.accelerator.unwrap_model(run.model)
    was_training = model.training
    model.eval()
    ids = torch.tensor([token_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **features}
    with torch.no_grad():
        if adapted:
            logits = model(**inputs).logits
        else:
            with model.disable_adapter():
                logits = model(**inputs).logits
    model.train(was_training)
    return logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def features_of(run: Any, row: dict[str, Any]) -> dict[str, Any]:
    """What the processor makes of a row, called here and not by the trainer."""
    samples, _ = tiny_listeners.soundfile.read(tiny_listeners.io.BytesIO(row["audio"]["bytes"]), dtype="float32")
    inputs = tiny_listeners.process(run.processing_class, row["prompt"], samples)
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


@pytest.mark.parametrize("shares", [False, True], ids=["rows", "shared"])
@pytest.mark.parametrize("name", tiny_listeners.MODELS)
def test_log_probabilities_are_those_of_the_model_alone(name: str, shares: bool, tmp_path: Path) -> None:
    """Policy, old and reference, on prompts of unequal length, each against the model's own forward of one row."""
    changes = {"share_prefixes": shares, "gradient_checkpointing": False, "num_iterations": 2, "max_steps": 2}
    args = settings(tmp_path, LeafGRPOConfig, per_device_train_batch_size=16, beta=0.1, **changes)
    run = trainer(Recorded, args, tiny_listeners.MODELS[name]())
    # An adapter that does something: the policy is then not its reference.
    for weight in run.model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    before = {part: weight.clone() for part, weight in run.model.named_parameters()}
    checked, differs = [], []
    compute = run._compute_loss

    def check(model: Any, inputs: Any) -> torch.Tensor:
        loss = compute(model, inputs)
        if not checked:
            batch = run.batches[0]
            for i, row in enumerate(batch["inputs"]):
                features = features_of(run, row)
                prompt = features.pop("input_ids")[0].tolist()
                assert prompt == batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
                length = int(batch["completion_mask"][i].sum())
                completion = batch["completion_ids"][i, :length].tolist()
                for column, adapted in (("old_per_token_logps", True), ("ref_per_token_logps", False)):
                    expected = alone(run, prompt + completion, features, adapted)[-length:]
                    # Float32 sums in another order, padded on the left.
                    torch.testing.assert_close(batch[column][i, :length], expected, rtol=1e-4, atol=1e-4)
                # What it hears matters, or nothing above would be tested.
                features["input_features"] = features["input_features"] * -2
                other = alone(run, prompt + completion, features, False)[-length:]
                differs.append((other - expected).abs().max() > 1e-3)
            checked.append(1)
        return loss

    run._compute_loss = check
    run.train()
    batch = run.batches[0]
    assert len(run.batches) == 1 and checked and any(differs)
    assert batch["prompt_mask"].eq(0).any(), "the case wants left padding"
    assert not torch.allclose(batch["old_per_token_logps"], batch["ref_per_token_logps"], atol=1e-3)
    # The policy's own forward, of shuffled rows, gives what was noted when they were sampled.
    split = run.splits[0]
    torch.testing.assert_close(split["logprobs"], split["old_per_token_logps"], rtol=1e-4, atol=1e-4)
    # Only the adapter has learnt, all of it in the language model.
    changed = {part for part, weight in run.model.named_parameters() if not torch.equal(weight, before[part])}
    assert changed and all("lora" in part and "language_model" in part for part in changed)
    assert changed == {part for part, weight in run.model.named_parameters() if weight.requires_grad}
    banned = run.processing_class.tokenizer.convert_tokens_to_ids(run.processing_class.audio_token)
    assert not batch["completion_ids"].eq(banned).any()
    assert all(math.isfinite(line["loss"]) for line in run.state.log_history[:-1])
    assert [line.get("leaf/shared_share") for line in run.state.log_history[:-1]] == [1.0 if shares else None] * 2


@pytest.mark.parametrize("name", tiny_listeners.MODELS)
def test_a_prompt_is_read_and_heard_once(name: str, tmp_path: Path) -> None:
    """Four prompts of four rollouts, reference and two updates: four calls of the processor and of the encoder."""
    args = settings(tmp_path, per_device_train_batch_size=8, steps_per_generation=2, num_iterations=2, beta=0.1)
    args.max_steps = 4
    run = trainer(Recorded, args, tiny_listeners.MODELS[name]())
    read, heard = [], []
    process = run._reader._process
    run._reader._process = lambda *given: (read.append(1), process(*given))[1]
    (ear,) = run._ears.values()
    ear.encoder.register_forward_pre_hook(lambda *_: heard.append(ear._encoded is None))
    run.train()
    assert len(run.batches) == 1
    assert len({id(row) for row in run.batches[0]["audio"]}) == 4
    assert len(read) == sum(heard) == 4
    assert len(heard) > 4


def shared_run(folder: Path, shares: bool, kind: str, **changes: Any) -> Any:
    """A run of scripted answers, with ``heard``: recordings that each call of the encoder was about, of the loss."""
    plain = {"optim": "sgd", "learning_rate": 0.5, "gradient_checkpointing": False, "max_steps": 3}
    args = settings(folder, LeafGRPOConfig, share_prefixes=shares, **{**plain, **changes})
    model, processor = tiny_listeners.qwen2_audio()
    if kind == "frozen":
        model.model.audio_tower.requires_grad_(False)
    run = trainer(
        LeafAudioGRPOTrainer, args, (model, processor), **({} if kind == "adapter" else {"peft_config": None})
    )
    tiny_audio.script(run, 0)
    (ear,) = run._ears.values()
    run.heard, run.tokens = [], 0

    def count(_module: Any, inputs: Any, output: Any) -> None:
        run.tokens += inputs[0].numel() * torch.is_grad_enabled()

    def listen(_module: Any, given: Any, _output: Any) -> None:
        if torch.is_grad_enabled() and ear._encoded is None:
            run.heard.append(len(given[0]))

    model.get_input_embeddings().register_forward_hook(count)
    ear.encoder.register_forward_hook(listen)
    run.train()
    return run


@pytest.mark.parametrize("kind", ["adapter", "frozen", "trained"])
@pytest.mark.parametrize("size", [8, 6])
def test_a_recording_is_run_once(kind: str, size: int, tmp_path: Path) -> None:
    """With ``share_prefixes``: the same weights, for fewer tokens; a trained encoder hears a prompt once."""
    changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2}
    found, expected = (shared_run(tmp_path / str(shares), shares, kind, **changes) for shares in (True, False))
    assert found.tokens < 0.6 * expected.tokens
    pairs = zip(found.model.named_parameters(), expected.model.parameters(), strict=True)
    for (name, weight), other in pairs:
        # Sums of float32 in another order, three steps in a row.
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5, msg=name)
    lines = [line for line in found.state.log_history if "loss" in line]
    for line, other in zip(lines, expected.state.log_history, strict=False):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4, abs=1e-6) and line["grad_norm"] > 0
    heard = [sum(run.heard) for run in (found, expected)]
    assert heard == ([0, 0] if kind != "trained" else [heard[0], 3 * 2 * size])
    if kind == "trained" and size == 8:
        assert heard[0] == 3 * 2 * size // 4


def test_a_prompt_with_one_row_and_a_model_that_cannot_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows hear as before, and the reason is told once."""
    run = shared_run(tmp_path, True, "adapter", per_device_train_batch_size=5, gradient_accumulation_steps=4)
    assert caplog.text.count("a prompt has one row in a micro-batch") == 1
    shares = [line["leaf/shared_share"] for line in run.state.log_history if "leaf/shared_share" in line]
    assert all(0 < share < 1 for share in shares)

    def cannot(*_: Any, **__: Any) -> Any:
        raise RuntimeError("inputs must be None with Deaf, run each row with features of its own: it is deaf")

    monkeypatch.setattr(trl_audio, "prepare", cannot)
    rows, alone = (shared_run(tmp_path / str(s), s, "adapter", per_device_train_batch_size=8) for s in (True, False))
    assert caplog.text.count("it is deaf") == 1
    for weight, other in zip(rows.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)  # the rows stand in another order


def test_every_row_keeps_its_own_audio(tmp_path: Path) -> None:
    """Shuffled, split, and with an evaluation in between: the log-probabilities of a row never change."""
    args = settings(tmp_path, per_device_train_batch_size=4, steps_per_generation=4, num_iterations=2)
    args.max_steps, args.learning_rate = 8, 0.0
    run = trainer(Recorded, args, eval_dataset=recordings(4))
    step = run.training_step

    def with_evaluation(*given: Any, **more: Any) -> Any:
        loss = step(*given, **more)
        if run._step == 3:
            run.evaluate()
        return loss

    run.training_step = with_evaluation
    run.train()
    training = [split for split in run.splits if split["training"]]
    assert len(training) == 8 and len(run.splits) > 8
    for split in training:
        mask = split["completion_mask"].bool()
        torch.testing.assert_close(split["logprobs"][mask], split["old_per_token_logps"][mask], rtol=1e-5, atol=1e-5)


def test_leaf_credits_tokens(tmp_path: Path) -> None:
    """The reward rises, the log tells LEAF's shares, and boundaries are ranked by what the model says of the audio."""
    args = settings(tmp_path, LeafGRPOConfig, per_device_train_batch_size=16, max_steps=8)

    class Both(Recorded, LeafAudioGRPOTrainer):
        def _ranking_logprobs(self, batch: dict[str, Any]) -> torch.Tensor:
            self.ranked = super()._ranking_logprobs(batch)
            return self.ranked

    run = trainer(Both, args)
    run.train()
    assert run.batches[0]["advantages"].shape == run.batches[0]["completion_ids"].shape
    history = run.state.log_history[:-1]
    assert all(0 <= line["leaf/span_credit_share"] <= 1 for line in history)
    assert any(line["leaf/span_credit_share"] > 0 for line in history)
    first, last = (sum(line["reward"] for line in part) / 3 for part in (history[:3], history[-3:]))
    assert last > first + 0.5
    split = run.splits[-1]
    mask = split["completion_mask"].bool()
    torch.testing.assert_close(
        split["logprobs"][mask].sum(), run.ranked[run.batches[-1]["completion_mask"].bool()].sum(), rtol=1e-4, atol=1e-4
    )


def test_a_trained_encoder_gets_gradients(tmp_path: Path) -> None:
    """Without an adapter everything is trained, with a reference of its own."""
    run = trainer(AudioGRPOTrainer, settings(tmp_path, max_steps=1, learning_rate=1e-3), peft_config=None)
    before = {part: weight.clone() for part, weight in run.model.named_parameters()}
    (ear,) = run._ears.values()
    assert not ear.is_frozen
    run.train()
    changed = {part for part, weight in run.model.named_parameters() if not torch.equal(weight, before[part])}
    assert any("audio_tower" in part for part in changed) and any("language_model" in part for part in changed)


def test_a_frozen_encoder_under_a_trained_model(tmp_path: Path) -> None:
    """With a reference model of its own: both hear a prompt once, and at first they say the same."""
    model, processor = tiny_listeners.qwen2_audio()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    model.model.audio_tower.requires_grad_(False)
    args = settings(tmp_path / "run", beta=0.1, learning_rate=1e-2, max_steps=3)
    run = trainer(Recorded, args, (model, processor), peft_config=None)
    assert run.ref_model is not None and [ear.is_frozen for ear in run._ears.values()] == [True, True]
    run.train()
    assert {len(row.encoded) for row in run.batches[0]["audio"]} == {2}
    kl = [line["kl"] for line in run.state.log_history[:-1]]
    # Float32 sums of the same numbers; exp(x) - x - 1 of a rounding.
    assert abs(kl[0]) < 1e-6 < kl[2]


def test_bfloat16_and_dropout(tmp_path: Path) -> None:
    """A model in bfloat16, a dropping adapter, activation checkpointing as TRL has it."""
    model, processor = tiny_listeners.qwen2_audio()
    args = settings(tmp_path, max_steps=2, bf16=True, per_device_train_batch_size=8)
    run = trainer(Recorded, args, (model.bfloat16(), processor), peft_config=lora(lora_dropout=0.1))
    run.train()
    assert all(math.isfinite(line["loss"]) for line in run.state.log_history[:-1])
    assert run.batches[0]["audio"][0].encoded.popitem()[1].dtype == torch.bfloat16


class OnCPU(GRPOConfig):
    """TRL's own defaults want a GPU."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, use_cpu=True, bf16=False, max_steps=1, report_to=[])


def test_without_args_and_from_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's defaults, and rows that come one after the other, decoded by the trainer."""

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trl_audio, "GRPOConfig", OnCPU)
    stream = recordings(4).cast_column("audio", Audio()).to_iterable_dataset()
    run = trainer(Recorded, None, train_dataset=stream)
    assert run.args.output_dir.endswith("-GRPO")
    run.generation_config.max_new_tokens = 4
    run.train()
    assert len({id(row) for row in run.batches[0]["audio"]}) == len(run.batches[0]["audio"]) // run.num_generations


# The dataset


def row(audio: Any, prompt: Any) -> dict[str, Any]:
    return {"prompt": prompt, "audio": audio, "wanted": "c"}


def test_recordings_are_decoded_by_the_trainer(tmp_path: Path) -> None:
    coded = recordings(2)
    decoded = Dataset.from_list([{**row, "audio": {**row["audio"], "path": None}} for row in coded])
    decoded = decoded.cast_column("audio", Audio())
    run = trainer(AudioGRPOTrainer, settings(tmp_path), train_dataset=decoded, eval_dataset={"one": decoded})
    assert not run.train_dataset.features["audio"].decode and not run.eval_dataset["one"].features["audio"].decode
    for found, expected in zip(run.train_dataset, coded, strict=True):
        heard, same = (run._read(row["prompt"], row["audio"]) for row in (found, expected))
        assert heard.token_ids == same.token_ids
        assert torch.equal(heard.features["input_features"], same.features["input_features"])


def test_text_prompts_train(tmp_path: Path) -> None:
    rows = [row({"bytes": wave(tone(i, 0.2 + 0.2 * i))}, "<|audio_bos|><|AUDIO|><|audio_eos|>ab") for i in range(4)]
    run = trainer(LeafAudioGRPOTrainer, settings(tmp_path, LeafGRPOConfig), train_dataset=Dataset.from_list(rows))
    run.train()
    assert len({line["grad_norm"] for line in run.state.log_history[:-1]}) > 1


def test_a_row_without_a_recording(tmp_path: Path) -> None:
    rows = [{**row, "audio": None} for row in recordings(4)]
    run = trainer(AudioGRPOTrainer, settings(tmp_path), train_dataset=Dataset.from_list(rows))
    with pytest.raises(ValueError, match="^audio must be a recording in every row, got None, with the prompt"):
        run.train()


def check_refuses(error: type[Exception], message: str, folder: Path, pair: Any = None, **changes: Any) -> None:
    options = {name: changes.pop(name) for name in ("train_dataset", "rollout_func", "tools") if name in changes}
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        trainer(AudioGRPOTrainer, settings(folder, **changes), pair, **options)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny_trl

    model, processor = tiny_listeners.qwen2_audio()
    check_refuses(
        TypeError, "model must have an audio encoder, got Qwen2ForCausalLM", tmp_path, (tiny_trl.model(), processor)
    )
    check_refuses(
        TypeError,
        "processing_class must be a processor with a feature extractor for audio and an audio token, got "
        f"{type(processor.tokenizer).__name__}",
        tmp_path,
        (model, processor.tokenizer),
    )
    check_refuses(
        ValueError,
        "train_dataset must have a column 'audio' with the recording of each prompt, got prompt, wanted",
        tmp_path,
        train_dataset=recordings().remove_columns("audio"),
    )
    check_refuses(
        ValueError,
        "rollout_func must be None with AudioGRPOTrainer, whose prompts are one turn of audio and text",
        tmp_path,
        rollout_func=print,
    )
    args = settings(tmp_path)
    args.use_vllm = True
    with pytest.raises(ValueError, match="^use_vllm must be False with AudioGRPOTrainer: vLLM is handed token ids"):
        trainer(AudioGRPOTrainer, args)
    args.use_vllm, args.use_transformers_continuous_batching = False, True
    with pytest.raises(ValueError, match="^use_transformers_continuous_batching must be False with AudioGRPOTrainer"):
        trainer(AudioGRPOTrainer, args)

    monkeypatch.setattr(trl_audio.trl, "__version__", "1.13.0")
    check_refuses(RuntimeError, "AudioGRPOTrainer needs TRL 1.14 or newer, got 1.13.0", tmp_path)


def test_a_checkpoint_is_loaded_by_name(tmp_path: Path) -> None:
    """Model and processor from a path; the trainer's checkpoints hold the processor, and go on from there."""
    model, processor = tiny_listeners.qwen2_audio()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    args = settings(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1, seed=3)
    args.beta = 0.1
    run = trainer(AudioGRPOTrainer, args, (str(tmp_path / "base"), None))
    run.train()
    assert (tmp_path / "run" / "checkpoint-1" / "processor_config.json").exists()
    assert len(run.state.log_history) == 3


@pytest.mark.parametrize("adapter", [lora(), None], ids=["adapter", "all weights"])
def test_a_stopped_run_goes_on(adapter: Any, tmp_path: Path) -> None:
    """Accumulated gradients, several updates a batch, dropout: the same losses and weights to the last digit.

    Qwen2-Audio is saved under other names than its weights have here.
    """
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    changes |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    changes["beta"] = 0.1 if adapter else 0.0

    def steps(folder: Path, resume: str | None) -> tuple[Any, list[Any], list[torch.Tensor]]:
        args = settings(folder, LeafGRPOConfig, **changes)
        run = trainer(LeafAudioGRPOTrainer, args, peft_config=adapter)
        run.train(resume_from_checkpoint=resume)
        names = ("loss", "grad_norm", "kl")
        log = [[line[name] for name in names if name in line] for line in run.state.log_history[:-1]]
        return run, log, [weight.clone() for weight in run.model.parameters()]

    _, whole, weights = steps(tmp_path / "whole", None)
    assert len(whole) == 4 and len({tuple(line) for line in whole}) == 4
    run, again, resumed = steps(tmp_path / "part", str(tmp_path / "whole" / "checkpoint-2"))
    assert again == whole
    assert all(torch.equal(a, b) for a, b in zip(resumed, weights, strict=True))
    if adapter is None:
        with torch.no_grad():
            for weight in run.model.parameters():
                weight.zero_()
        run.state.best_model_checkpoint = str(tmp_path / "part" / "checkpoint-4")
        run._load_best_model()
        assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), weights, strict=True))


def test_an_infinite_reward_is_none(tmp_path: Path) -> None:
    """Also for plain GRPO, where without a scale it would make every weight NaN."""
    rewards = [1.0, math.inf, 0.0, 3.0, -math.inf, 1.0, 0.0, 2.0]
    run = trainer(AudioGRPOTrainer, settings(tmp_path, max_steps=1, scale_rewards="none"))
    run.reward_funcs = [lambda completions, **_: rewards]
    run.train()
    assert run.state.log_history[0]["rewards/count_wanted/nonfinite"] == 2
    assert 0 < run.state.log_history[0]["grad_norm"] < math.inf
    assert all(weight.isfinite().all() for weight in run.model.parameters())


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Twelve rows in groups of four, on one rank and on two, the middle group on both; clips of unequal length."""
    run_ranks("tiny_audio.py", tmp_path)
    whole = tiny_audio.one_step(str(tmp_path / "run"), 12)
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for name in ("completion_ids", "advantages", "encoded"):
        joined = [row for half in halves for row in half[name]]
        assert len(joined) == len(whole[name]) == 12
        assert all(torch.equal(a, b) for a, b in zip(joined, whole[name], strict=True)), name
    assert whole["advantages"].any()
    joined = torch.cat([half["old_per_token_logps"] for half in halves])
    # Float32 matrix products of six rows or of twelve.
    torch.testing.assert_close(joined, whole["old_per_token_logps"], rtol=1e-5, atol=1e-5)
    for mine, theirs, one in zip(*(half["weights"] for half in halves), whole["weights"], strict=True):
        assert torch.equal(mine, theirs)
        # Two steps of AdamW of 1e-3 each, whose sign a rounding turns only where a gradient is next to nothing.
        assert (mine - one).abs().mean() < 1e-5
    assert halves[0]["log"] == halves[1]["log"] or len(halves[0]["log"]) == 2
    for line, expected in zip(halves[0]["log"], whole["log"], strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_adapter_of_a_checkpoint_is_merged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Granite-Speech's own LoRA: the model says what it said, and what is trained comes on top."""
    model, processor = tiny_listeners.granite_speech()
    model.add_adapter(lora(target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.config.has_lora_adapter = True
    model.eval()
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.disable_adapters()
        assert not torch.allclose(model(input_ids=ids).logits, before, atol=1e-2)
        model.enable_adapters()
    run = trainer(AudioGRPOTrainer, settings(tmp_path, max_steps=1, beta=0.1), (model, processor))
    with torch.no_grad():
        torch.testing.assert_close(run.model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    assert "The LoRA adapter of the checkpoint is merged into the weights" in caplog.text
    assert not model.config.has_lora_adapter
    run.train()
    assert run.state.log_history[0]["grad_norm"] > 0
