"""The trainer of reward channels with ``share_prefixes``: what a run is without it, for fewer tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_settings, trained_weights
from test_token_reward_trainer import (
    ALONG,
    OF_KIND,
    ONE_OUTPUT,
    datasets,
    listening,
    logged,
    low_or_high,
    pairs,
    scored,
    trainer,
)
from tiny_decoders import build_model

from leafkernels.lookahead import RewardTransformer
from leafkernels.losses.preference import KINDS
from leafkernels.rows.recordings import find_encoder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# Steps that are linear in the gradient, so that rounding stays rounding.
PLAIN = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "per_device_train_batch_size": 8}


def long_pairs(count: int = 32, seed: int = 0) -> Any:
    """Prompts that are long beside the answers, and answers of which some begin alike."""
    return pairs(count, seed).map(
        lambda row, n: {"prompt": row["prompt"] + "abcdefgh" * 2, "rejected": row["chosen"][: n % 3] + row["rejected"]},
        with_indices=True,
    )


def run_both(folder: Path, trained: str = "frozen", **changes: Any) -> list[Any]:
    runs = []
    for shares in (True, False):
        options = {**PLAIN, **{**OF_KIND, **ONE_OUTPUT}[trained], **changes}
        run = trainer(folder / str(shares), long_pairs(), scored(trained), share_prefixes=shares, **options)
        seen: list[int] = []
        run.model.get_input_embeddings().register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0].numel())
        )
        run.train()
        run.tokens = seen
        runs.append(run)
    return runs


def check_the_same(found: Any, expected: Any) -> None:
    ratios = [line.pop("tokens_per_node") for line in logged(found)]
    assert min(ratios) > 1.2
    for line, other in zip(logged(found), logged(expected), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    others, moved = dict(expected.model.named_parameters()), 0.0
    start = dict(scored("adapter" if "lora" in str(others.keys()) else "whole").named_parameters())
    for name, weight in found.model.named_parameters():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=1e-5, msg=name)
        moved = max(moved, float((weight - start[name]).abs().max()))
    assert moved > 1e-2


# The losses of the rewards differ in what they make of the same rewards.
RUNS = [(kind, KINDS[0]) for kind in (*OF_KIND, *ONE_OUTPUT)] + [("frozen", loss) for loss in KINDS[1:]]


@pytest.mark.parametrize(("kind", "loss"), RUNS)
def test_a_run_is_the_same(kind: str, loss: str, tmp_path: Path) -> None:
    found, expected = run_both(tmp_path, kind, kind=loss)
    # Of the last two steps: before the first the model is tried on a few tokens.
    assert sum(found.tokens[-2:]) < 0.8 * sum(expected.tokens[-2:])
    check_the_same(found, expected)
    if kind != "logits alone":
        assert found.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"gradient_checkpointing": True},
        {"simpo_kind": "hinge", "simpo_label_smoothing": 0.1, "max_length": 27},
    ],
    ids=str,
)
def test_options(changes: dict[str, Any], tmp_path: Path) -> None:
    check_the_same(*run_both(tmp_path, "whole", **changes))


def test_what_shares_too_little_is_run_by_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "bcdefgh" * 3, "rejected": "cdefghb" * 3}] * 4)
    run = trainer(tmp_path, rows, share_prefixes=True, max_steps=2, per_device_train_batch_size=4)
    run.train()
    assert caplog.text.count("some rows are run one by one: the rows share too little") == 1
    assert all(line["tokens_per_node"] == 1 for line in logged(run))


@pytest.mark.parametrize(("name", "changes"), [("qwen2_audio", ALONG), ("granite_speech", {}), ("qwen2_5_omni", {})])
def test_a_pair_hears_its_recording_once(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Beside a pair that has none."""
    tiny = pytest.importorskip("tiny_listeners", reason="needs the extra speech")
    rows = [*low_or_high(tiny, 7, 0), {"prompt": "hab", "audio": None, "chosen": "a", "rejected": "b"}]
    runs = []
    for shares in (True, False):
        options = {**PLAIN, "max_steps": 2, "share_prefixes": shares, **changes}
        run = listening(tiny, tmp_path / str(shares), rows, tiny.MODELS[name](), **options)
        heard: list[int] = []
        find_encoder(run.model.model).register_forward_hook(lambda _, args, out, heard=heard: heard.append(len(out[0])))
        run.train()
        runs.append((run, heard[-1]))
    (found, ours), (expected, theirs) = runs
    assert 2 * ours == theirs
    assert min(line.pop("tokens_per_node") for line in logged(found)) > 1.2
    for line, other in zip(logged(found), logged(expected), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)
    others = dict(expected.model.named_parameters())
    for part, weight in found.model.named_parameters():
        torch.testing.assert_close(weight, others[part], rtol=1e-4, atol=1e-5, msg=part)


def on_engine(rank: int, engine: str, kind: str, folder: str, shares: bool) -> dict[str, Any]:
    """The answers of the second rank's pairs are long, and share next to nothing."""
    rows = [{"prompt": "abcdefgh" * 2, "chosen": f"{letter}bc", "rejected": f"{letter}fe"} for letter in "abcdefgh"]
    rows += [{"prompt": "a", "chosen": letter + "bcd" * 8, "rejected": "h" + letter * 24} for letter in "abcdefg"] * 2
    rows = [rows[place] for place in (0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)]
    options = {**PLAIN, **{**OF_KIND, **ONE_OUTPUT}[kind], "max_steps": 2, "learning_rate": 0.05}
    options["per_device_train_batch_size"] = 4 if engine else 8
    data = datasets.Dataset.from_list(rows)
    options |= {"train_sampling_strategy": "sequential", **engine_settings(engine)}
    run = trainer(Path(folder), data, scored(kind), share_prefixes=shares, **options)
    run.train()
    return {"weights": trained_weights(run), "lines": [{**line, "epoch": 0.0} for line in logged(run)]}


@pytest.mark.parametrize(
    ("engine", "kind"), [("ddp", "whole"), ("ddp", "rewards alone"), ("fsdp2", "whole"), ("zero3", "adapter")]
)
def test_two_processes_are_one_without_it(engine: str, kind: str, engines: Any, tmp_path: Path) -> None:
    expected = on_engine(0, "", kind, str(tmp_path / "one"), False)
    for found in engines.run(engine, on_engine, engine, kind, str(tmp_path / "two"), True):
        for line, other in zip(found["lines"], expected["lines"], strict=True):
            assert line.pop("tokens_per_node") > 1.05
            assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
        for name, weight in found["weights"].items():
            torch.testing.assert_close(weight, expected["weights"][name], rtol=1e-4, atol=1e-5, msg=name)


class Normalised(type(build_model("llama"))):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm = torch.nn.BatchNorm1d(4)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^ddp_broadcast_buffers must be None or False with share_prefixes=True"):
        trainer(tmp_path, share_prefixes=True, ddp_broadcast_buffers=True)
    model = RewardTransformer(Normalised(build_model("llama").config))
    with pytest.raises(ValueError, match=r"^share_prefixes must be False with a model that .*norm: it would see"):
        trainer(tmp_path, model=model, share_prefixes=True, **ALONG)
