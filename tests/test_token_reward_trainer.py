"""The trainer of reward channels, on a tiny model whose preferences have a rule."""

import importlib
import itertools
import logging
import random
import re
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from engines import ENGINES, engine_settings, trained_weights
from tiny_decoders import add_specials, build_model, build_tokenizer

from leafkernels.lookahead import RewardChannel, RewardTransformer, TokenRewardConfig, TokenRewardTrainer
from leafkernels.losses.preference import KINDS

datasets = pytest.importorskip("datasets", reason="needs datasets: pip install -e '.[trl]'")

LETTERS = "abcdefgh"


def pairs(count: int, seed: int) -> Any:
    """The better answer is of letters of the first half of the alphabet."""
    rng = random.Random(seed)

    def word(letters: str) -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(1, 5)))

    rows = [{"prompt": word(LETTERS), "chosen": word(LETTERS[:4]), "rejected": word(LETTERS[4:])} for _ in range(count)]
    return datasets.Dataset.from_list(rows)


def trainer(
    folder: Path, rows: Any = None, model: Any = None, processor: Any = None, **changes: Any
) -> TokenRewardTrainer:
    settings = {
        "per_device_train_batch_size": 16,
        "max_steps": 20,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TokenRewardConfig(output_dir=str(folder), **{**settings, **changes})
    if model is None:
        torch.manual_seed(1)
        model = RewardTransformer(build_model("llama"), RewardChannel(3, 16, width=4))
    rows = pairs(320, 0) if rows is None else rows
    processor = processor or build_tokenizer()
    return TokenRewardTrainer(model, args, processing_class=processor, train_dataset=rows, eval_dataset=pairs(32, 1))


def scored(kind: str = "frozen") -> RewardTransformer:
    """A model that stays frozen, or that is trained along with the settings in ``ALONG``, or an adapter on it."""
    base = build_model("llama")
    if kind == "adapter":
        peft = pytest.importorskip("peft")
        torch.manual_seed(2)
        base = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
    torch.manual_seed(1)
    return RewardTransformer(base, RewardChannel(3, 16, width=4))


ALONG = {"train_model": True, "simpo_weight": 0.5, "sft_weight": 0.2}
OF_KIND: dict[str, dict[str, Any]] = {"frozen": {}, "whole": ALONG, "adapter": ALONG}
# Where the loss reads no logits, or no rewards.
ONE_OUTPUT = {
    "rewards alone": {"train_model": True},
    "logits alone": {"train_model": True, "reward_weight": 0.0, "simpo_weight": 1.0},
}


def weights(run: TokenRewardTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in run.model.named_parameters() if weight.requires_grad}


def logged(run: TokenRewardTrainer) -> list[dict[str, float]]:
    return [line for line in run.state.log_history if "loss" in line]


def test_learns_what_is_preferred_and_leaves_the_model_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    before = {name: tensor.clone() for name, tensor in run.model.model.state_dict().items()}
    run.train()
    first, last = (line for line in (run.state.log_history[0], run.state.log_history[-2]))
    assert last["loss"] < 0.3 < first["loss"] and last["diff_value_acc_seq_mean"] == 1.0
    assert run.evaluate()["eval_loss"] < 0.3
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.model.state_dict().items())


def test_stops_and_goes_on(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-3"
    assert sum(file.stat().st_size for file in folder.glob("reward_channel*")) < 10_000
    assert not list(folder.glob("model*.safetensors"))
    again = trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(folder))
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in (whole, again)]
    assert losses[0][-3:] == losses[1][-3:]


def test_the_mask_is_that_of_the_answers(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    batch = run._collate([{"prompt": "ab", "chosen": "c", "rejected": "efg"}])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 1, 0, 0], [3, 4, 7, 8, 9, 1]]
    assert batch["answer_mask"].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]


def test_conversations(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.processing_class.chat_template = (
        "{% for m in messages %}{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}h{% endif %}"
    )
    rows = {
        "prompt": [{"role": "user", "content": "ab"}],
        "chosen": [{"role": "assistant", "content": "hc"}],
        "rejected": [{"role": "assistant", "content": "hef"}],
    }
    batch = run._collate([rows])
    assert batch["input_ids"].tolist() == [[3, 4, 1, 10, 5, 1, 0], [3, 4, 1, 10, 7, 8, 1]]
    assert batch["answer_mask"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, {}, "chosen and rejected must differ, got 'b' twice"),
        (
            {"prompt": "a", "text": "b"},
            {},
            r"must have the columns prompt, chosen and rejected, got \['prompt', 'text'\]",
        ),
        (
            {"prompt": "abc", "chosen": "b", "rejected": "c"},
            {"max_length": 3},
            "chosen must have a token after its prompt",
        ),
        (
            {"prompt": "ab", "chosen": "cd", "rejected": "ce"},
            {"max_length": 3},
            r"chosen and rejected must differ in their tokens \(max_length is 3\), got 'cd' and 'ce'",
        ),
    ],
)
def test_refuses_rows(tmp_path: Path, row: dict[str, str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)._collate([row])


def test_refuses_a_template_whose_prompt_does_not_begin_the_conversation(tmp_path: Path) -> None:
    """The prompt's tokens are told from the answer's by their number: this one opens the answer with a token more."""
    run = trainer(tmp_path)
    run.processing_class.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}hh{% endif %}"
    )
    row = {
        "prompt": [{"role": "user", "content": "ab"}],
        "chosen": [{"role": "assistant", "content": "cde"}],
        "rejected": [{"role": "assistant", "content": "efg"}],
    }
    with pytest.raises(ValueError, match="chat template whose prompt .* got 'a b h h' and 'a b c d e'"):
        run._collate([row])
    with pytest.raises(TypeError, match="chosen and rejected must be messages where prompt is, got 'cde'"):
        run._collate([{**row, "chosen": "cde"}])
    run.processing_class.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ValueError, match="^TemplateError: no such role, with the prompt .*'content': 'ab'"):
        run._collate([row])


@pytest.mark.parametrize("kind", OF_KIND)
def test_the_best_checkpoint_is_what_stays(kind: str, tmp_path: Path) -> None:
    """The first of three here: best is what is highest, and the loss falls."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(tmp_path, model=scored(kind), **options, **best, **OF_KIND[kind])
    run.train()
    first, *_, last = (line["eval_loss"] for line in run.state.log_history if "eval_loss" in line)
    assert first > last + 1e-4 and run.state.best_model_checkpoint.endswith("checkpoint-1")
    assert run.evaluate()["eval_loss"] == first
    again = RewardTransformer.read_channel(tmp_path / "checkpoint-1", run.model.model).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in run.model.channel.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_are_one_batch(kind: str, tmp_path: Path) -> None:
    """Weights, losses and metrics of 8 pairs of many lengths, and of a last step of 5, whole or two by two."""
    rows = pairs(13, 3)
    lengths = [len(row[side]) for row in rows for side in ("chosen", "rejected")]
    assert len(set(lengths)) > 3
    options = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.5, "kind": kind, "max_grad_norm": 0.0, **ALONG}
    runs = []
    for size in (8, 2):
        run = trainer(
            tmp_path,
            rows,
            scored("whole"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            **options,
        )
        run.train()
        runs.append((weights(run), logged(run)))
    (whole, lines), (found, found_lines) = runs
    start = dict(scored("whole").named_parameters())
    assert max((weight - start[name]).abs().max() for name, weight in whole.items()) > 0.01
    for name, weight in whole.items():
        # Float32 sums in another order, in two steps.
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert len(lines) == 2
    for line, other in zip(lines, found_lines, strict=True):
        del line["epoch"], other["epoch"]  # of batches
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("logging", [{"logging_steps": 3}, {"logging_strategy": "epoch"}])
def test_logs_are_means_since_the_last_time(logging: dict[str, Any], tmp_path: Path) -> None:
    """Steps of 4, 4 and 2 pairs: losses are means over the steps, as ``loss`` is, metrics over the pairs."""
    still = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "max_steps": 6, **ALONG}
    every, some = (trainer(tmp_path, pairs(10, 4), scored("whole"), **still, **more) for more in ({}, logging))
    for run in (every, some):
        run.train()
    lines, found = logged(every), logged(some)
    assert len(lines) == 6 and len(found) == 2
    for epoch in range(2):
        part = lines[3 * epoch : 3 * epoch + 3]
        names = part[0].keys() - {"epoch", "step", "learning_rate", "grad_norm"}
        assert {"loss", "sft_loss", "simpo_loss", "reward_loss", "diff_value_acc_50%", "rewards/margins"} <= names
        for name in names:
            steps = [1, 1, 1] if name.endswith("loss") else [4, 4, 2]
            mean = sum(size * line[name] for size, line in zip(steps, part, strict=True)) / sum(steps)
            # The log is rounded to four digits after the point, or six figures.
            assert found[epoch][name] == pytest.approx(mean, rel=1e-4, abs=2e-4), name


def test_nothing_is_carried_over_from_another_training(tmp_path: Path) -> None:
    """A first training whose last steps were not logged."""
    run = trainer(tmp_path, max_steps=3, logging_steps=2, learning_rate=0.0)
    run.train()
    run.args.max_steps = 2
    run.train()
    fresh = trainer(tmp_path, max_steps=2, logging_steps=2, learning_rate=0.0)
    fresh.train()
    assert logged(run) == logged(fresh)


@pytest.mark.parametrize("kind", OF_KIND)
def test_activations_that_are_computed_again(kind: str, tmp_path: Path) -> None:
    runs = []
    for again in (False, True):
        options = {"gradient_checkpointing": again, "max_steps": 2, **OF_KIND[kind]}
        runs.append(trainer(tmp_path, model=scored(kind), **options))
        runs[-1].train()
    decoder = runs[1].model.model.get_decoder()
    assert decoder.gradient_checkpointing and decoder.training == (kind != "frozen")
    expected, found = map(weights, runs)
    for name, weight in expected.items():
        # AdamW moves a weight by the learning rate, 0.02, whatever the size of its gradient.
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"chosen": "hhhf", "rejected": "hhhe"}, {"max_length": 7}, "chosen and rejected must differ in their tokens"),
        ({"prompt": "a" * 40}, {"max_length": 30}, "chosen must have a token after its prompt of 40 tokens"),
        ({"prompt": "a" * 140}, {}, r"prompt and chosen must have at most 128 tokens, for which .* got 14\d"),
        ({"prompt": ""}, {}, "prompt must have a token, got ''"),
        ({"rejected": None}, {}, "rejected must be a text or a list of messages, got None"),
        ({"prompt": []}, {}, r"prompt must be a text or a list of messages, got \[\]"),
        ({"prompt": [{"role": "user"}]}, {}, "prompt must be a text or a list of messages"),
        ({"prompt": [{"role": "user", "content": "a"}]}, {}, "chosen and rejected must be messages where prompt is"),
        ({"audio": "a.wav"}, {}, "processing_class must be the processor of an audio model"),
    ],
)
def test_a_bad_row_is_told_before_training(
    row: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Any] = [{"prompt": "abc", "chosen": "abcd", "rejected": "hhhhh"} for _ in range(9)]
    rows[7] = {"prompt": "hhhh", "chosen": "hhhhe", "rejected": "hhhh", **row}
    run = trainer(tmp_path, rows, max_steps=2, per_device_train_batch_size=1, **changes)
    named = r".* \(row 7 of train_dataset; of 9 rows 1 cannot be trained on: 7; bad_rows='drop' leaves them out\)$"
    with pytest.raises((TypeError, ValueError), match=message + named):
        run.train()
    assert run.state.global_step == 0
    run = trainer(tmp_path, rows, max_steps=9, per_device_train_batch_size=1, bad_rows="drop", **changes)
    with caplog.at_level(logging.WARNING, logger="leafkernels"):
        run.train()
    assert re.search("train_dataset: left out 1 of 9 rows \\(7\\); row 7: " + message, caplog.text)
    assert run.state.global_step == 9 and len(run.train_dataset) == 8


def test_bad_rows_for_evaluation(tmp_path: Path) -> None:
    """Of a dict of datasets too, before training; and of one that is given to ``evaluate``."""
    bad = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c" * (n % 3)} for n in range(7)])
    bad = bad.map(lambda row: {"chosen": row["rejected"] if row["rejected"] == "cc" else "b"})
    message = r"chosen and rejected must differ, got 'cc' twice, .*\(row 2 of eval_dataset{}; of 7 rows 2 .*: 2, 5;"
    for dataset, key in ((bad, ""), ({"one": pairs(4, 0), "other": bad}, r"\['other'\]")):
        run = trainer(tmp_path, max_steps=1)
        run.eval_dataset = dataset
        with pytest.raises(ValueError, match=message.format(key)):
            run.train()
    run = trainer(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=message.format("")):
        run.evaluate(bad)
    run = trainer(tmp_path, max_steps=1, bad_rows="drop")
    assert run.evaluate(bad)["eval_loss"] > 0
    with pytest.raises(ValueError, match="of 2 rows 2 cannot be trained on: 0, 1"):
        run.evaluate(bad.select([2, 5]))


def test_bad_rows_of_a_stream(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are named, or left out, as they come."""
    rows = pairs(24, 0).to_list()
    rows[5]["chosen"] = rows[5]["rejected"]
    rows[18]["prompt"] = ""
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    options = {"max_steps": 5, "per_device_train_batch_size": 4}
    message = f"chosen and rejected must differ, got .* twice, with the prompt {rows[5]['prompt']!r}$"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, stream, **options).train()
    run = trainer(tmp_path, stream, bad_rows="drop", **options)
    with caplog.at_level(logging.WARNING, logger="leafkernels"):
        run.train()
    assert "train_dataset: left out a row, 1 by now: chosen and rejected must differ" in caplog.text
    assert "train_dataset: left out a row, 2 by now: prompt must have a token" in caplog.text

    class Plain(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(rows)

    with pytest.raises(
        ValueError, match="^bad_rows must be 'raise' where train_dataset is neither .* got 'drop' and P"
    ):
        trainer(tmp_path, Plain(), bad_rows="drop", **options).train()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, Plain(), **options).train()


@pytest.mark.parametrize("template", ["$A", "<unk> $A", "<unk> $A <eos>", "$A <eos>"])
def test_begin_and_end_tokens_stand_once(template: str, tmp_path: Path) -> None:
    """Whatever the tokenizer puts around a text by itself, and the text itself has."""
    words = build_tokenizer()
    words.bos_token = "<unk>"
    add_specials(words, template)
    run = trainer(tmp_path, processor=words)
    begin = [2] if template.startswith("<unk>") else []
    for prompt, answer in itertools.product(("ab", "<unk>ab"), ("c", "c<eos>", "c<eos>\n", "<unk>c", "c<eos><eos>")):
        batch = run._collate([{"prompt": prompt, "chosen": answer, "rejected": "e"}])
        first = [2] if "<unk>" in prompt else begin
        assert batch["input_ids"].tolist() == [[*first, 3, 4, 5, 1], [*first, 3, 4, 7, 1]], (prompt, answer)
        assert batch["answer_mask"].sum(1).tolist() == [2, 2]
    batch = run._collate([{"prompt": "a<eos>b", "chosen": "c<eos>c", "rejected": ""}])
    # What stands amid a text is the text's.
    assert batch["input_ids"].tolist() == [[*begin, 3, 1, 4, 5, 1, 5, 1], [*begin, 3, 1, 4, 1, 0, 0, 0]]
    words.chat_template = (
        "<unk>{% for m in messages %}{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}h{% endif %}"
    )
    row = {"prompt": [{"role": "user", "content": "ab"}]}
    row |= {side: [{"role": "assistant", "content": f"h{side[0]}<eos>"}] for side in ("chosen", "rejected")}
    batch = run._collate([row])
    assert batch["input_ids"].tolist() == [[2, 3, 4, 1, 10, 5, 1], [2, 3, 4, 1, 10, 20, 1]]


def test_refuses_what_it_does_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True}
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        args = TokenRewardConfig(**options)
        with pytest.raises(ValueError, match=f"^{name} must be None with TokenRewardTrainer"):
            TokenRewardTrainer(scored(), args, processing_class=build_tokenizer(), **{name: print})
    with pytest.raises(ValueError, match=r"^label_smoothing_factor must be 0 .* got 0\.1"):
        trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="^accelerator_config must have dispatch_batches=False"):
        trainer(tmp_path, accelerator_config={"dispatch_batches": True})
    with pytest.raises(ValueError, match="^bad_rows must be one of 'raise', 'drop', got 'skip'"):
        trainer(tmp_path, bad_rows="skip")
    args = TokenRewardConfig(**options)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="must have a process for each GPU, got one for 2: start it with torchrun"):
        TokenRewardTrainer(scored(), args, processing_class=build_tokenizer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "hinge"}, "kind must be one of .* got 'hinge'"),
        ({"max_length": -1}, "max_length must be at least 2, got -1"),
        ({"max_length": "9"}, "max_length must be an int, got str"),
        ({"reward_weight": None}, "reward_weight must be a number, got NoneType"),
    ],
)
def test_refuses_options(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(tmp_path, **changes)


def test_refuses_who_is_no_tokenizer(tmp_path: Path) -> None:
    args = TokenRewardConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="processing_class must be a tokenizer .* got str"):
        TokenRewardTrainer(build_model("llama"), args, processing_class="gpt2", train_dataset=pairs(2, 0))


@pytest.mark.parametrize("with_adapter", [True, False])
def test_trains_the_model_along(tmp_path: Path, with_adapter: bool) -> None:
    """SimPO and SFT teach the model; a checkpoint holds what has learnt, and training goes on from it to the bit."""

    def start(folder: Path) -> TokenRewardTrainer:
        base = build_model("llama")
        if with_adapter:
            peft = pytest.importorskip("peft")
            torch.manual_seed(2)
            base = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
        torch.manual_seed(1)
        model = RewardTransformer(base, RewardChannel(3, 16, width=4))
        options = {"simpo_weight": 0.5, "sft_weight": 0.2, "train_model": True}
        return trainer(folder, model=model, **options, max_steps=6, save_strategy="steps", save_steps=3)

    whole = start(tmp_path / "whole")
    before = {name: tensor.clone() for name, tensor in whole.model.model.state_dict().items()}
    whole.train()
    logged = [line for line in whole.state.log_history if "loss" in line]
    assert logged[-1]["sft_loss"] < logged[0]["sft_loss"] and logged[-1]["simpo_loss"] < logged[0]["simpo_loss"]
    line = logged[0]
    total = line["reward_loss"] + 0.5 * line["simpo_loss"] + 0.2 * line["sft_loss"]
    assert line["loss"] == pytest.approx(total, rel=1e-4)
    assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-5)
    changed = {name for name, tensor in whole.model.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora" in name for name in changed) == with_adapter
    again = start(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in (whole, again)]
    assert losses[0][-3:] == losses[1][-3:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"simpo_weight": 1.0}, r"must be 0 where the model is frozen \(train_model=False\), got 1.0 and 0.0"),
        ({"sft_weight": -1.0}, "sft_weight must be at least 0, got -1.0"),
        ({"reward_weight": 0.0}, "one of reward_weight, simpo_weight, sft_weight must be positive"),
        ({"simpo_kind": "ipo"}, "kind must be one of 'sigmoid', 'hinge', got 'ipo'"),
    ],
)
def test_refuses_weights(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


# Models that hear


@pytest.fixture
def tiny() -> Any:
    """tests/tiny_listeners.py."""
    pytest.importorskip("transformers", minversion="5.23")
    pytest.importorskip("soundfile", reason="needs soundfile: pip install -e '.[speech]'")
    return importlib.import_module("tiny_listeners")


def listening(tiny: Any, folder: Path, rows: Any, pair: Any = None, **changes: Any) -> TokenRewardTrainer:
    model, processor = pair or tiny.qwen2_audio()
    torch.manual_seed(1)
    channel = RewardChannel(model.config.get_text_config().num_hidden_layers, 16, width=16)
    return trainer(folder, rows, RewardTransformer(model, channel), processor, **changes)


def low_or_high(tiny: Any, count: int, seed: int, decodes: bool = False) -> Any:
    """The same texts in every row: after a low tone a is better than b, after a high one b than a."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        letters = ["a", "b"] if number % 2 else ["b", "a"]
        clip = tiny.tone(rng.uniform(0, 2) if number % 2 else rng.uniform(12, 20), rng.uniform(0.2, 0.8))
        answers = {side: letter for side, letter in zip(("chosen", "rejected"), letters, strict=True)}
        rows.append({"prompt": tiny.asked("ab?"), "audio": {"bytes": tiny.wave(clip), "path": None}, **answers})
    found = datasets.Dataset.from_list(rows)
    return found.cast_column("audio", datasets.Audio()) if decodes else found


def test_learns_what_only_the_recording_tells(tiny: Any, tmp_path: Path) -> None:
    """From datasets' Audio; the channel and the processor come back from a checkpoint, and look ahead by ear."""
    rows = low_or_high(tiny, 96, 0, decodes=True)
    pair = tiny.qwen2_audio(num_hidden_layers=2)
    run = listening(tiny, tmp_path, rows, pair, max_steps=60, save_strategy="steps", save_steps=60)
    assert not run.train_dataset.features["audio"].decode
    run.train()
    assert run.evaluate(low_or_high(tiny, 16, 1))["eval_loss"] < 0.3
    folder = tmp_path / "checkpoint-60"
    assert not list(folder.glob("model*.safetensors"))
    model, _ = tiny.qwen2_audio(num_hidden_layers=2)
    processor = tiny.Qwen2AudioProcessor.from_pretrained(folder)
    again = RewardTransformer.from_pretrained(folder, model).eval()
    scores = []
    for number, better in ((0, 0), (16, 1)):
        read = dict(tiny.process(processor, tiny.asked("ab?"), tiny.tone(number)))
        ids, mask = read.pop("input_ids"), read.pop("attention_mask")
        letters = torch.tensor(processor.tokenizer.convert_tokens_to_ids(["a", "b"]))[:, None]
        with torch.no_grad():
            rewards = [again(input_ids=torch.cat([ids, letter[None]], 1), **read).rewards[0, -1] for letter in letters]
        assert rewards[better] > rewards[1 - better]
        options = {"inputs": read, "width": 2, "chunk": 1, "depth": 1, "max_new_tokens": 4}
        found, expected = (scored.generate(ids, mask, **options) for scored in (again, run.model))
        assert found.token_ids == expected.token_ids and found.score == expected.score
        scores.append(found.score)
    assert scores[0] != scores[1]


@pytest.mark.parametrize("name", ["qwen2_audio", "granite_speech", "voxtral", "qwen2_5_omni"])
def test_a_batch_is_what_the_processor_gives_row_by_row(name: str, tiny: Any, tmp_path: Path) -> None:
    """Prompts and recordings of several lengths, a row without one, padded: rewards are those of a row alone."""
    texts, seconds = ("ab?", "b", "abcdef"), (0.3, 1.2, 0.2)
    rows: list[dict[str, Any]] = [
        {
            "prompt": tiny.asked(text),
            "audio": {"array": tiny.tone(number, length), "sampling_rate": tiny.RATE},
            "chosen": "abc"[:number] + "d",
            "rejected": [{"role": "assistant", "content": "ef"}],
        }
        for number, (text, length) in enumerate(zip(texts, seconds, strict=True))
    ]
    rows.insert(1, {"prompt": "hab", "audio": None, "chosen": "a", "rejected": "b"})
    run = listening(tiny, tmp_path, rows, tiny.MODELS[name]())
    model, processor = run.model.eval(), run.processing_class
    read = []
    process = run._reader._process
    run._reader._process = lambda *given: (read.append(1), process(*given))[1]
    batch = run._collate(rows)
    assert len(read) == len(rows)
    mask = batch.pop("answer_mask")
    found = model(**batch).rewards
    for number, row in enumerate([*rows, *rows]):
        if row["audio"] is None:
            inputs = dict(processor.tokenizer(row["prompt"], return_tensors="pt"))
        else:
            inputs = dict(tiny.process(processor, row["prompt"], row["audio"]["array"]))
        prompt = torch.as_tensor(inputs.pop("input_ids"))
        answer = row["chosen"] if number < len(rows) else row["rejected"]
        text = answer if isinstance(answer, str) else answer[0]["content"]
        letters = [*processor.tokenizer.convert_tokens_to_ids(list(text)), processor.tokenizer.eos_token_id]
        ids = torch.cat([prompt, torch.tensor([letters])], 1)
        length = ids.shape[1]
        assert torch.equal(batch["input_ids"][number, :length], ids[0])
        assert batch["attention_mask"][number].nonzero()[:, 0].tolist() == list(range(length))
        assert mask[number].nonzero()[:, 0].tolist() == list(range(prompt.shape[1], length))
        features = {part: values for part, values in inputs.items() if part.startswith(("input_f", "feature_"))}
        if name == "granite_speech":
            # Its encoder has no mask, and hears the padding a little.
            features = {
                part: torch.nn.functional.pad(
                    values, (0, 0) * (values.dim() - 2) + (0, batch[part].shape[1] - values.shape[1])
                )
                for part, values in features.items()
            }
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), **features).rewards[0]
        # Float32 sums in another order.
        torch.testing.assert_close(found[number, :length], alone, rtol=1e-5, atol=1e-6)
        # What it hears matters, or nothing above would be tested.
        if features:
            features["input_features"] = features["input_features"] * -2
            other = model(input_ids=ids, attention_mask=torch.ones_like(ids), **features).rewards[0]
            assert (other - alone).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["qwen2_audio", "granite_speech", "voxtral", "qwen2_5_omni"])
def test_messages_without_a_recording_among_the_rows(name: str, tiny: Any, tmp_path: Path) -> None:
    """By the template of the processor, where the tokenizer has none, in every form of contents and answers."""
    pair = tiny.MODELS[name]()
    words = pair[1].tokenizer
    heard = {"prompt": tiny.asked("ab"), "audio": tiny.wave(tiny.tone(1)), "chosen": "c", "rejected": "d"}
    run = listening(tiny, tmp_path, [heard], pair)
    batches = []
    for content in ("ab", [{"type": "text", "text": "ab", "audio": None}]):
        for form in (lambda text: text, lambda text: [{"role": "assistant", "content": text}]):
            row = {"prompt": [{"role": "user", "content": content}], "chosen": form("c"), "rejected": form("d")}
            batches.append(run._collate([row, heard]))
    for batch in batches:
        assert batch.keys() == batches[0].keys()
        assert all(torch.equal(values, batches[0][part]) for part, values in batch.items())
    ids = batches[0]["input_ids"][0][batches[0]["attention_mask"][0] == 1].tolist()
    a, b, c = words.convert_tokens_to_ids(list("abc"))
    at = next(i for i in range(len(ids)) if ids[i : i + 2] == [a, b])
    assert ids[-2:] == [c, words.eos_token_id] and at < len(ids) - 3
    assert words.convert_tokens_to_ids(run._reader.audio_token) not in ids
    with torch.no_grad():
        batch = {part: values for part, values in batches[0].items() if part != "answer_mask"}
        assert run.model.eval()(**batch).rewards.isfinite().all()


@pytest.mark.parametrize("with_adapter", [False, True])
def test_what_does_not_learn_runs_in_eval_mode(with_adapter: bool, tiny: Any, tmp_path: Path) -> None:
    """The encoder of Granite-Speech would keep the statistics of each batch, with a gradient or without."""
    model, processor = tiny.granite_speech()
    options: dict[str, Any] = {"max_steps": 2}
    if with_adapter:
        peft = pytest.importorskip("peft")
        targets = r".*language_model.*\.(q_proj|v_proj)"
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
        options |= {"train_model": True, "simpo_weight": 0.5}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any("running_mean" in name for name in before)
    run = trainer(tmp_path, low_or_high(tiny, 32, 0), RewardTransformer(model), processor, **options)
    run.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all("lora" in name for name in changed) and bool(changed) == with_adapter


def test_several_recordings_of_a_prompt(tiny: Any, tmp_path: Path) -> None:
    prompt = "<|AUDIO|>a<|AUDIO|>b"
    clips = [tiny.wave(tiny.tone(number, 0.2 + 0.3 * number)) for number in range(2)]
    run = listening(tiny, tmp_path, [])
    row = {"prompt": prompt, "audio": clips, "chosen": "c", "rejected": "d"}
    batch = run._collate([row, {**row, "audio": clips[::-1]}])
    assert batch["input_features"].shape[0] == 8
    order = [0, 1, 1, 0] * 2
    for place, clip in enumerate(order):
        assert torch.equal(batch["input_features"][place], batch["input_features"][clip])


def test_recordings_of_a_stream_are_whole(tiny: Any, tmp_path: Path) -> None:
    """Three recordings a row: more of them than answers."""
    rows = [
        {
            "prompt": "<|AUDIO|>a" * 3,
            "audio": [{"bytes": tiny.wave(tiny.tone(n + number)), "path": None} for n in range(3)],
            "chosen": "a",
            "rejected": "b",
        }
        for number in range(4)
    ]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    seen = []
    run = listening(tiny, tmp_path, stream, max_steps=2, per_device_train_batch_size=2)
    run.model.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    run.train()
    assert [len(batch["input_features"]) for batch in seen] == [12, 12]
    assert torch.equal(seen[1]["input_features"], run._collate(rows[2:])["input_features"])


def test_bad_recordings_are_told_before_training(tiny: Any, tmp_path: Path) -> None:
    rows = low_or_high(tiny, 6, 0).to_list()
    for clip, message in (
        ({"array": tiny.tone(1, 0.02), "sampling_rate": tiny.RATE}, "audio must be long enough for one audio token"),
        ("a text", "audio must be a file that soundfile reads, got 'a text'"),
        ([], "audio must be a recording in every row, got an empty list"),
    ):
        bad = [*rows[:4], {**rows[4], "audio": clip}, rows[5]]
        with pytest.raises(ValueError, match=f"^{message}.*, with the prompt.* .row 4 of train_dataset; of 6 rows 1"):
            listening(tiny, tmp_path, bad, max_steps=1).train()
        run = listening(tiny, tmp_path, bad, max_steps=1, bad_rows="drop")
        run.eval_dataset = None
        run.train()
        assert len(run.train_dataset) == 5


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"audio": None}, {}, "audio must be a recording in every row, got None, with the prompt '<|AUDIO|>ab'"),
        ({"prompt": "ab"}, {}, "prompt must have the audio token '<|AUDIO|>' once for each recording, got 0 for 1"),
        ({}, {"max_length": 5}, "chosen must have a token after its prompt of 8 tokens (max_length is 5), got 'c'"),
        (
            {"audio": {"array": [0.0] * 800, "sampling_rate": 16000}},
            {},
            "audio must be audible, got 0.05 s of silence, with the prompt",
        ),
    ],
)
def test_refuses_rows_with_audio(
    changes: dict[str, Any], options: dict[str, Any], message: str, tiny: Any, tmp_path: Path
) -> None:
    row = {"prompt": "<|AUDIO|>ab", "audio": tiny.wave(tiny.tone(1)), "chosen": "c", "rejected": "d", **changes}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        listening(tiny, tmp_path, [row], **options)._collate([row])


def test_refuses_who_does_not_hear(tiny: Any, tmp_path: Path) -> None:
    row = {"prompt": "ab", "audio": tiny.wave(tiny.tone(1)), "chosen": "c", "rejected": "d"}
    message = "^processing_class must be the processor of an audio model where rows have audio, got Tok"
    with pytest.raises(TypeError, match=message):
        trainer(tmp_path)._collate([row])
    _, processor = tiny.qwen2_audio()
    with pytest.raises(TypeError, match="^model must have an audio encoder, got LlamaForCausalLM"):
        trainer(tmp_path, processor=processor)
    processor.tokenizer.pad_token = None
    with pytest.raises(
        ValueError, match="^processing_class must be a tokenizer with a padding token, or the processor"
    ):
        trainer(tmp_path, processor=processor)
    processor.feature_extractor = None
    with pytest.raises(TypeError, match="^processing_class must be a processor with a feature extractor for audio and"):
        trainer(tmp_path, processor=processor)


def test_the_page_teaches_a_model_that_hears(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function of docs/lookahead.md, on an audio model."""
    monkeypatch.chdir(tmp_path)
    (block,) = (block.text for block in pages.blocks(pages.read("lookahead.md"), "python") if "audio=" in block.text)
    names: dict[str, Any] = {}
    exec(block, names)
    model, processor = tiny.qwen2_audio()
    answer = names["taught_by_ear"](model, processor, low_or_high(tiny, 8, 0), "<|AUDIO|>ab?", tiny.tone(3))
    assert answer.token_ids
    assert processor.tokenizer.get_vocab() == tiny.Qwen2AudioProcessor.from_pretrained("channel").tokenizer.get_vocab()


# Several processes


def on_engine(rank: int, engine: str, kind: str, folder: str, resume: str | None = None) -> dict[str, Any]:
    """Two steps of 16 pairs in two micro-batches, evaluated after each; the first is best where best is highest."""
    best = {"load_best_model_at_end": resume is None, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(
        Path(folder),
        pairs(32, 0),
        scored(kind),
        max_steps=2,
        per_device_train_batch_size=4 if engine else 8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        **best,
        **{**OF_KIND, **ONE_OUTPUT}[kind],
        **engine_settings(engine),
    )
    run.train(resume_from_checkpoint=resume)
    return {
        "state": type(run.model_wrapped).__name__,
        "weights": trained_weights(run),
        "lines": [{**line, "epoch": 0.0} for line in logged(run)],
        "eval": [line["eval_loss"] for line in run.state.log_history if "eval_loss" in line],
        "best": run.state.best_model_checkpoint,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        *[(engine, "frozen") for engine in ENGINES],
        *[("ddp", kind) for kind in ONE_OUTPUT],
        ("fsdp2", "whole"),
        ("fsdp2", "adapter"),
        ("zero3", "whole"),
        ("zero3", "adapter"),
    ],
)
def test_two_processes_are_one(engine: str, kind: str, engines: Any, tmp_path: Path) -> None:
    """Weights, logs and evaluation; checkpoints hold what was trained, and training goes on from them."""
    expected = on_engine(0, "", kind, str(tmp_path / "one"))
    ranks = engines.run(engine, on_engine, engine, kind, str(tmp_path / "two"))
    again = engines.run(engine, on_engine, engine, kind, str(tmp_path / "again"), str(tmp_path / "two/checkpoint-1"))
    assert expected["best"].endswith("checkpoint-1")
    for found in ranks:
        assert found["best"].endswith("checkpoint-1")
        assert found["eval"] == pytest.approx(expected["eval"], abs=1e-5)
        for line, other in zip(found["lines"], expected["lines"], strict=True):
            assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
        for name, weight in found["weights"].items():
            # AdamW moves a weight by the learning rate, whatever the size of its gradient: 1e-3 in the step that stays.
            torch.testing.assert_close(weight, expected["weights"][name], rtol=0, atol=1e-5, msg=name)
    for found in again:
        assert found["lines"][-1] == pytest.approx(ranks[0]["lines"][-1], rel=1e-4, abs=1e-5)
        assert found["eval"][-1] == pytest.approx(ranks[0]["eval"][-1], abs=1e-6)
    folder = tmp_path / "two" / "checkpoint-1"
    for name, weight in RewardTransformer.read_channel(folder, build_model("llama")).named_parameters():
        assert torch.equal(weight.double(), ranks[0]["weights"].get(f"channel.{name}", weight.double())), name
    if kind == "whole":
        model = dict(type(build_model("llama")).from_pretrained(folder).named_parameters())
        for name, weight in ranks[0]["weights"].items():
            if name.startswith("model."):
                assert torch.equal(model[name.removeprefix("model.")].double(), weight), name


def bad_row_on_engine(rank: int, engine: str, folder: str) -> str:
    rows = [{"prompt": "abc", "chosen": "ab", "rejected": "h"} for _ in range(8)]
    for number in (5, 6):
        rows[number]["rejected"] = "ab"
    with pytest.raises(ValueError) as found:
        trainer(Path(folder), rows, max_steps=1, per_device_train_batch_size=2).train()
    run = trainer(Path(folder), rows, max_steps=1, per_device_train_batch_size=2, bad_rows="drop")
    run.train()
    assert len(run.train_dataset) == 6
    return str(found.value)


@pytest.mark.slow
def test_bad_rows_are_told_on_every_process(engines: Any, tmp_path: Path) -> None:
    for message in engines.run("ddp", bad_row_on_engine, "ddp", str(tmp_path)):
        assert "row 5 of train_dataset; of 8 rows 2 cannot be trained on: 5, 6;" in message


def stream_on_engine(rank: int, engine: str, folder: str) -> dict[str, Any]:
    stream = datasets.Dataset.from_list(pairs(16, 0).to_list()).to_iterable_dataset()
    run = trainer(
        Path(folder), stream, scored("whole"), max_steps=2, per_device_train_batch_size=8 // (1 + bool(engine)), **ALONG
    )
    run.train()
    return {"lines": [{**line, "epoch": 0.0} for line in logged(run)], "weights": trained_weights(run)}


@pytest.mark.slow
def test_a_stream_keeps_its_pairs_on_two_processes(engines: Any, tmp_path: Path) -> None:
    """A dispatcher would cut a batch of all chosen and all rejected answers in two."""
    expected = stream_on_engine(0, "", str(tmp_path))
    for found in engines.run("ddp", stream_on_engine, "ddp", str(tmp_path)):
        for line, other in zip(found["lines"], expected["lines"], strict=True):
            assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
