"""The speech example and its study, on sines that stand for voices, and a little on real speech."""

import io
import itertools
import json
import math
import random
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cells_of

import leafkernels
from leafkernels.integrations.speech_rewards import (
    REWARDS,
    chrf,
    exact_match,
    normalize_text,
    sentence_bleu,
    word_accuracy,
)

pytestmark = pytest.mark.slow
np = pytest.importorskip("numpy")
# Older versions of Qwen2-Audio keep their parts under other names.
pytest.importorskip("transformers", minversion="5.23")
for package in ("peft", "soundfile", "matplotlib", "sacrebleu", "scipy"):
    pytest.importorskip(package)
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "study"), str(EXAMPLES / "study" / "agreement")]
try:
    import analyse
    import exact
    import paired
    import soundfile
    import tabular
    from speech import data
    from speech.credit import METHODS, Batch, advantages, reach
    from speech.model import AUDIO_BEGIN, Answers, Speaker, add_adapter, build_small
    from speech.training import PolicyRun, Settings, warm_start
except ModuleNotFoundError as error:
    pytest.skip(f"needs {error.name}", allow_module_level=True)
finally:
    del sys.path[:3]

VOICES = ("ann", "bob", "cat")


def tone(digit: int, voice: int, seconds: float = 0.2, rate: int = 8000) -> "np.ndarray":
    return 0.5 * np.sin(2 * np.pi * (200 + 150 * digit) * (1 + 0.1 * voice) * np.arange(int(seconds * rate)) / rate)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive named like the real one, of two clips of each digit in three voices."""
    path = tmp_path_factory.mktemp("speech") / "fsdd.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for voice, digit, index in itertools.product(range(len(VOICES)), range(10), range(2)):
            sound = io.BytesIO()
            soundfile.write(sound, tone(digit, voice, 0.2 + 0.05 * index), 8000, format="WAV")
            entry = tarfile.TarInfo(f"recordings/{digit}_{VOICES[voice]}_{index}.wav")
            entry.size = len(sound.getvalue())
            file.addfile(entry, io.BytesIO(sound.getvalue()))
    return path


@pytest.fixture
def source(archive: Path) -> data.SpokenSums:
    return data.make_source(f"fsdd:{archive}", ["cat"], 2, "final", ask=False)


@pytest.fixture
def speaker(source: data.SpokenSums) -> Speaker:
    torch.manual_seed(0)
    return Speaker(*build_small(source.alphabet, source.seconds, hidden=32), small=True)


def run_loop(out: Path, source: data.Source, **changes) -> list[dict]:
    """The loop of the study on a few utterances; returns the metrics."""
    few = {"warm_steps": 2, "warm_pool": 12, "pool": 12, "evaluated": 8, "eval_every": 2, "prompts": 2, "rollouts": 3}
    settings = Settings(**{"limit": source.answer_length + 2, **few, **changes})
    torch.manual_seed(settings.seed)
    speaker = Speaker.load(None, source.alphabet, source.seconds)
    warm_start(source, speaker, settings, lambda step, note: None)
    out.mkdir(parents=True, exist_ok=True)
    PolicyRun(source, speaker, settings, out).run(lambda step, note: None)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# The task


def test_worked_answers_and_their_scores() -> None:
    assert data.worked_answer([3, 5, 9]) == "3+5=8 8+9=17"
    assert data.worked_answer([7]) == "7"
    slips = data.worked_answer([3, 5, 9], random.Random(0), slip_rate=1.0)
    assert slips == "3+5=9 9+9=19"
    reference = "3+5=8 8+9=17"
    assert data.scores(reference, reference) == {"final": 1, "prefix": 1, "fraction": 1}
    assert data.scores(reference, "3+6=8 8+9=17") == {"final": 1, "prefix": 2 / 12, "fraction": 11 / 12}
    assert data.scores(reference, "3+5=8 8+9=1") == {"final": 0, "prefix": 11 / 12, "fraction": 11 / 12}
    assert data.scores(reference, "") == {"final": 0, "prefix": 0, "fraction": 0}


def test_what_is_read_and_played_keeps_its_tone() -> None:
    at_8k, at_16k = tone(3, 0, 0.5), tone(3, 0, 0.5, 16000)
    file = io.BytesIO()
    soundfile.write(file, np.stack([at_8k, at_8k], 1), 8000, format="WAV", subtype="FLOAT")
    file.seek(0)
    # Before and after the clip is silence, which the filter lets in; it is 60 dB deep.
    np.testing.assert_allclose(data.read_audio(file)[400:-400], at_16k[400:-400], atol=1e-3)
    faster = data.play_faster(at_16k, 2.0)
    np.testing.assert_allclose(faster, at_16k[:-1:2], atol=1e-6)


def test_voices_of_evaluation_are_never_trained_on(source: data.SpokenSums) -> None:
    rng = random.Random(0)
    heard = {source.draw(rng, held_out=False, level=level).voice for level in (0.0, 0.99, 1.0) for _ in range(30)}
    unheard = {source.draw(rng, held_out=True).voice for _ in range(30)}
    assert heard == {"ann", "bob"} and unheard == {"cat"}
    for level, counts in ((0.0, {0}), (1.0, {1})):
        drawn = [source.draw(rng, held_out=False, level=level).reference.count("+") for _ in range(20)]
        assert set(drawn) == counts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fsdd:nowhere.tar", [], 2, "final"), "must name a tar archive .* got 'nowhere.tar', which is no file"),
        (("manifest:nowhere.jsonl", [], 2, "final"), "must name a JSON-lines file, got 'nowhere.jsonl'"),
        (("tape", [], 2, "final"), "--data must be fsdd:PATH, espeak or manifest:FILE.jsonl, got 'tape'"),
        (("fsdd:{archive}", ["dan"], 2, "final"), "some, but not all, of ann, bob, cat, got dan"),
        (("fsdd:{archive}", list(VOICES), 2, "final"), "some, but not all, of ann, bob, cat, got ann, bob, cat"),
        (("fsdd:{archive}", ["cat"], 1, "final"), "digits must be at least 2, got 1"),
        (("fsdd:{archive}", ["cat"], 2, "luck"), "reward must be one of final, prefix, fraction, got 'luck'"),
    ],
)
def test_data_that_cannot_be_had_is_told(archive: Path, arguments: tuple, message: str) -> None:
    kind, *rest = arguments
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.make_source(kind.format(archive=archive), *rest, ask=False)


def test_espeak_is_called_for_every_voice_or_its_absence_told(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="needs the program espeak-ng.*apt-get install espeak-ng"):
        data.make_source("espeak", [], 2, "final", ask=False)
    soundfile.write(tmp_path / "sound.wav", tone(1, 0), 22050)
    program = tmp_path / "espeak-ng"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n/bin/cat {tmp_path}/sound.wav\n')
    program.chmod(0o755)
    clips = data.speak_digits(["en-gb", "en-us"])
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(set(calls)) == 2 * 10 * 9 and "-v en-us -s 150 -p 35 --stdout 7" in calls
    assert {voice: {len(clips[voice][digit]) for digit in range(10)} for voice in clips} == {"en-gb": {9}, "en-us": {9}}


# The model


def test_embedded_prompts_score_as_the_whole_model_does(source: data.SpokenSums, speaker: Speaker) -> None:
    """Embeddings made once and repeated, and prompts of different lengths padded on the left, change nothing."""
    rng = random.Random(1)
    utterances = [source.draw(rng, held_out=False, level=level) for level in (0.0, 1.0)]
    features = [speaker.features(utterance) for utterance in utterances]
    assert len(features[0]["input_ids"]) != len(features[1]["input_ids"])
    answers = speaker.answer_ids(["4", "3+5=8"])
    speaker.model.eval()
    with torch.no_grad():
        found, entropy = speaker.score(speaker.embed(features), answers)
        for row, one in enumerate(features):
            length = int(answers.mask[row].sum())
            token_ids = answers.token_ids[row, :length]
            logits = speaker.model(
                input_ids=torch.cat([one["input_ids"], token_ids])[None],
                input_features=one["input_features"][None],
                feature_attention_mask=one["feature_attention_mask"][None],
                attention_mask=torch.ones(1, len(one["input_ids"]) + length, dtype=torch.int64),
            ).logits[0, -length - 1 : -1]
            logits[:, speaker.audio_id] = -math.inf
            expected = logits.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]
            # The same float32 sums in another order, over some dozens of terms of size one.
            torch.testing.assert_close(found[row, :length], expected, rtol=1e-4, atol=1e-4)
    assert (found[~answers.mask] == 0).all() and (entropy[~answers.mask] == 0).all()
    assert speaker.spell(answers.token_ids[1, :5].tolist()) == "3+5=8"


def test_sampling_follows_the_scores_and_never_says_the_audio_token(source, speaker: Speaker) -> None:
    """The most likely answer is the most likely one under ``score``; the audio token, made likely, is not drawn."""
    rng = random.Random(2)
    features = [speaker.features(source.draw(rng, held_out=False)) for _ in range(2)]
    with torch.no_grad():
        speaker.model.lm_head.weight[speaker.audio_id] = 3 * speaker.model.lm_head.weight[7]
    prompts = speaker.embed(features).repeat(3)
    drawn = speaker.sample(prompts, 6)
    assert drawn.token_ids.shape[0] == 6 and not (drawn.token_ids == speaker.audio_id).any()
    greedy = speaker.sample(prompts, 4, temperature=None)
    vocabulary = speaker.model.config.text_config.vocab_size
    with torch.no_grad():
        best, _ = speaker.score(prompts, greedy)
        for position in range(greedy.token_ids.shape[1]):
            others = greedy.token_ids.clone()
            for token in range(vocabulary):
                others[:, position] = token
                logprobs, _ = speaker.score(prompts, Answers(others, greedy.mask, []))
                live = greedy.mask[:, position]
                assert (logprobs[live, position] <= best[live, position] + 1e-5).all()


def test_only_the_language_model_is_adapted(speaker: Speaker) -> None:
    model = add_adapter(speaker.model)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained and all("language_model" in name and "lora" in name for name in trained)


# Credit


def batch_of(rows: list[list[int]], rewards: list[float], rollouts: int) -> Batch:
    token_ids = torch.tensor(rows)
    logprobs = torch.tensor([[-0.1, -0.1, -5.0, -0.1, -3.0, -0.1]]).repeat(len(rows), 1)
    return Batch(logprobs, token_ids, torch.ones_like(token_ids, dtype=torch.bool), torch.tensor(rewards), rollouts)


SPECIFIED = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8], [1, 2, 9, 9, 9, 9], [1, 2, 9, 9, 8, 8]]


@pytest.mark.parametrize("method", METHODS)
def test_advantages_of_every_method_have_one_size(method: str) -> None:
    batch = batch_of(SPECIFIED + SPECIFIED, [1.0, 0, 0, 0, 1.0, 1.0, 0, 0], 4)
    plain, scaled = (advantages(batch, method, 2, rescale=rescale) for rescale in (False, True))
    torch.testing.assert_close(scaled.square().mean().sqrt(), torch.tensor(1.0))
    torch.testing.assert_close(scaled * plain.square().mean().sqrt(), plain)
    if method == "leaf":
        expected = leafkernels.span_advantages(
            batch.logprobs, batch.token_ids, batch.rewards, group_size=4, num_boundaries=2
        )
        torch.testing.assert_close(plain, expected, rtol=0, atol=0)
    level = batch_of(SPECIFIED, [0.3] * 4, 4)
    assert (advantages(level, method, 2, rescale=True) == 0).all()


def test_unknown_method_is_told() -> None:
    with pytest.raises(ValueError, match="method must be one of leaf, grpo, dr_grpo, tempo, .*, got 'ppo'"):
        advantages(batch_of(SPECIFIED, [1.0, 0, 0, 0], 4), "ppo", 2, rescale=False)


def test_reach_of_a_tree_worked_by_hand() -> None:
    """Boundaries 2 and 4: one node of four and two of two, all of which part; then a prompt that shares nothing."""
    alone = [[9, 1, 1, 1, 1, 1], [8, 1, 1, 1, 1, 1], [7, 1, 1, 1, 1, 1], [6, 1, 1, 1, 1, 1]]
    # Alike up to 3: both boundaries lie where no rollout parts, or where none is shared any more.
    late = [[1, 2, 3, 4, 1, 1], [1, 2, 3, 5, 1, 1], [1, 2, 3, 6, 1, 1], [1, 2, 3, 7, 1, 1]]
    found = reach(batch_of(SPECIFIED + alone + late, [1.0, 0, 0, 0] * 3, 4), 2)
    assert found.chosen == [0, 0, 3, 0, 3, 0]
    assert found.fired == [0, 0, 2, 0, 1, 0]
    assert found.parted == [0, 0, 1, 0, 1, 0]
    assert found.fire_rate == 3 / 6 and found.part_rate == 2 / 6 and found.nodes == pytest.approx(4 / 3)
    assert found.span_share == pytest.approx((4 * 4 + 0 + 4 * 2) / 72)


# The loop


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_runs_with_every_method(tmp_path: Path, archive: Path, method: str) -> None:
    source = data.make_source(f"fsdd:{archive}", ["cat"], 2, "prefix", ask=False)
    metrics = run_loop(tmp_path, source, method=method, steps=3, updates=2)
    assert [line["step"] for line in metrics] == [0, 1, 2, 3]
    assert [line["step"] for line in metrics if "held_out" in line] == [0, 2, 3]
    assert set(metrics[0]["held_out"]) == {"final", "prefix", "fraction", "exact"}
    assert all(0 <= line["span_share"] <= 1 for line in metrics[1:])
    assert not list(tmp_path.glob("*.partial"))


def test_stopped_loop_goes_on_as_if_it_had_not_been(tmp_path: Path, archive: Path) -> None:
    source = data.make_source(f"fsdd:{archive}", ["cat"], 2, "fraction", ask=False)
    whole = run_loop(tmp_path / "whole", source, steps=4)
    run_loop(tmp_path / "parts", source, steps=2)
    # A run that was killed has written lines behind its last checkpoint.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": 0.')
    parts = run_loop(tmp_path / "parts", source, steps=4)
    assert parts == whole
    assert whole[1]["reward"] != whole[2]["reward"]
    with pytest.raises(ValueError, match="a run with the same settings.*differs in method, seed"):
        run_loop(tmp_path / "parts", source, steps=4, method="grpo", seed=1)
    with pytest.raises(ValueError, match="differs in task"):
        run_loop(tmp_path / "parts", source, steps=4, task="prefix")


def write_manifest(folder: Path, with_voices: bool) -> Path:
    lines = []
    for index in range(16):
        soundfile.write(folder / f"{index}.wav", np.stack([tone(index % 10, 0)] * 2, 1), 8000)
        line = {"audio": f"{index}.wav", "prompt": "translate", "reference": f"das ist Nummer {index}"}
        lines.append({**line, "voice": VOICES[index % 3]} if with_voices else line)
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_manifest_is_rewarded_by_bleu(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, with_voices=True)
    source = data.make_source(f"manifest:{path}", ["bob"], 2, "final", ask=False)
    assert {u.voice for u in source.rows[True]} == {"bob"} and {u.voice for u in source.rows[False]} == {"ann", "cat"}
    utterance = source.rows[True][0]
    assert source.scores(utterance, utterance.reference)["bleu"] == pytest.approx(1.0)
    assert 0 < source.scores(utterance, "das ist eine Nummer")["bleu"] < 1
    metrics = run_loop(tmp_path / "out", source, steps=1)
    assert set(metrics[0]["held_out"]) == {"bleu", "exact"}
    path = write_manifest(tmp_path, False)
    assert len(data.make_source(f"manifest:{path}", [], 2, "", ask=False).rows[True]) == 2
    # As an editor may write it: with a byte order mark, blank lines, ends of two characters, any character in a text.
    odd = path.read_text().replace("das ist", "das\u2028ist").replace("\n", "\r\n\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + odd.encode())
    rows = data.make_source(f"manifest:{path}", [], 2, "", ask=False).rows
    assert len(rows[True]) == 2 and rows[True][0].reference == "das\u2028ist Nummer 7"


@pytest.mark.parametrize(
    ("text", "held_out", "message"),
    [
        ('{"audio": "0.wav", "reference": "a"}', [], "line 1: must have prompt as text"),
        ('\n{"audio": "0.wav"', [], "line 2: must be JSON, got "),
        (
            '{"audio": "0.wav", "prompt": "", "reference": "a", "voice": "ann"}',
            ["bob"],
            "some utterances must be held out and some not, got 0 and 1 with --held-out bob",
        ),
    ],
)
def test_bad_manifest_is_told(tmp_path: Path, text: str, held_out: list[str], message: str) -> None:
    soundfile.write(tmp_path / "0.wav", tone(0, 0), 8000)
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.make_source(f"manifest:{tmp_path / 'bad.jsonl'}", held_out, 2, "final", ask=False)


def test_real_checkpoint_is_asked_in_words(tmp_path: Path, source: data.SpokenSums, speaker: Speaker) -> None:
    """A model saved and loaded by path goes through its processor's chat template, and answers."""
    speaker.model.save_pretrained(tmp_path)
    speaker.processor.save_pretrained(tmp_path)
    loaded = Speaker.load(str(tmp_path), source.alphabet, source.seconds)
    assert not loaded.small and loaded.audio_id == speaker.audio_id
    utterance = source.draw(random.Random(0), held_out=True)
    features = loaded.features(utterance)
    begin = loaded.processor.tokenizer.convert_tokens_to_ids(AUDIO_BEGIN)
    assert (features["input_ids"] == begin).sum() == 1 and (features["input_ids"] == loaded.audio_id).sum() > 1
    answers = loaded.sample(loaded.embed([features]).repeat(2), 3)
    logprobs, _ = loaded.score(loaded.embed([features]).repeat(2), answers)
    assert torch.isfinite(logprobs).all()


def test_small_model_learns_real_digits(shared: Path) -> None:
    """Real speech, five voices: ninety supervised steps on single digits bring the loss well below chance."""
    from speech.training import draw_pool

    source = data.make_source(f"fsdd:{shared / 'speech' / 'fsdd.tar.gz'}", ["theo"], 2, "final", ask=False)
    assert sorted(source.clips) == ["george", "jackson", "nicolas", "theo", "yweweler"]
    assert all(len(clips) == 50 for digits in source.clips.values() for clips in digits.values())
    torch.manual_seed(0)
    speaker = Speaker(*build_small(source.alphabet, source.seconds), small=True)
    pool = draw_pool(source, speaker, "test", 200, level=0.0)
    optimizer = torch.optim.AdamW(speaker.model.parameters(), lr=1.5e-3)
    rng = random.Random(0)
    losses = []
    for _ in range(90):
        utterances, features = pool.pick(rng, 32)
        logprobs, _ = speaker.score(speaker.embed(features), speaker.answer_ids([u.taught for u in utterances]))
        # Of the digit alone; the end token is learnt in no time.
        losses.append(-logprobs[:, 0].mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    # Who hears nothing can at best give each digit a tenth: log(10) nats.
    assert sum(losses[-10:]) / 10 < 0.75 * math.log(10)


# The study


def test_comparison_of_pairs_worked_by_hand() -> None:
    found = paired.compare(np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 0.0]))
    # Of the eight ways to set signs, all plus and all minus reach the sum of 6; t(2) = 4.3027, s = 1.
    assert (
        found["p"] == 2 / 8
        and found["difference"] == 2.0
        and found["half"] == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    )
    assert paired.compare(np.zeros(5), np.zeros(5))["p"] == 1.0
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize("reward", ["prefix", "fraction", "all", "first_2"])
def test_expected_reward_is_the_mean_over_all_answers(reward: str) -> None:
    chance = torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64)
    mean = 0.0
    for right in itertools.product([False, True], repeat=3):
        outcome = torch.tensor(right)
        mean += torch.where(outcome, chance, 1 - chance).prod() * tabular.rewards_of(outcome, reward)
    torch.testing.assert_close(tabular.rewards_of(chance, reward), mean)


def test_tabular_policies_learn_and_start_alike() -> None:
    setting = tabular.Setting(decisions=4, seeds=6, steps=60)
    curves = {method: tabular.train(setting, method) for method in tabular.METHODS}
    for curve in curves.values():
        torch.testing.assert_close(curve[:, 0], curves["grpo"][:, 0], rtol=0, atol=0)
        assert curve[:, -1].mean() > 2 * curve[:, 0].mean()
    assert not torch.equal(curves["leaf"], curves["grpo"])
    torch.testing.assert_close(tabular.train(setting, "leaf"), curves["leaf"], rtol=0, atol=0)


@pytest.mark.parametrize("reward", ["prefix", "fraction", "all", "first_2"])
def test_exact_gradient_is_that_of_all_answers_and_of_differences(reward: str) -> None:
    logits = torch.randn((2, 3, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[0, 2, 1], [1, 1, 0]])
    found = exact.exact_gradient(logits, target, reward)
    # Every answer once, its credit the reward times its probability.
    answers = torch.tensor(list(itertools.product(range(3), repeat=3))).expand(2, 27, 3)
    chances = logits.log_softmax(-1)[:, None].expand(2, 27, 3, 3).gather(-1, answers[..., None])[..., 0].sum(-1).exp()
    credit = chances * tabular.rewards_of(answers == target[:, None], reward)
    grad_answers = exact.policy_gradient(credit[..., None].expand(2, 27, 3), answers, logits.softmax(-1))
    torch.testing.assert_close(found, grad_answers)
    at = (0, 1, 2)  # an error of the order of the square of the step
    ends = []
    for step in (1e-4, -1e-4):
        moved = logits.clone()
        moved[at] += step
        ends.append(tabular.expected_rewards(moved, target, reward))
    torch.testing.assert_close(
        (ends[0] - ends[1]) / 2e-4, torch.stack([found[at], found.new_zeros(())]), atol=1e-8, rtol=0
    )


def test_the_mean_of_rloos_gradients_is_the_exact_one() -> None:
    """In length too; what a scheme leaves out is seen as bias, and the cosine of one batch as noise."""
    setting = tabular.Setting(reward="fraction", decisions=3, options=3, rollouts=4, rescale=False)
    logits = torch.randn((3, 3, 3), generator=torch.Generator().manual_seed(1))
    target = torch.tensor([[0, 2, 1], [1, 1, 0], [2, 0, 2]])
    logits[2, 0, 2] += 8.0  # a decision that hardly a batch tells anything of
    repeats = 4096
    token_ids, logprobs = tabular.sample(
        logits.log_softmax(-1).repeat(repeats, 1, 1), 4, torch.Generator().manual_seed(2)
    )
    rewards = tabular.rewards_of(token_ids == target.repeat(repeats, 1)[:, None], setting.reward)
    credit = leafkernels.rloo(logprobs, token_ids, rewards)
    chances = logits.double().softmax(-1).repeat(repeats, 1, 1)
    draws = exact.policy_gradient(credit / 4, token_ids, chances).reshape(repeats, 3, 3, 3)
    off = draws.mean(0) - exact.exact_gradient(logits, target, setting.reward)
    # 27 numbers, each within 4.5 of its standard errors: by chance outside once in 5,000 draws.
    assert (off.abs() < 4.5 * draws.std(0) / repeats**0.5).all()

    def first_alone(logprobs: torch.Tensor, token_ids: torch.Tensor, rewards: torch.Tensor, **_) -> torch.Tensor:
        credit = leafkernels.rloo(logprobs, token_ids, rewards)
        return credit * (torch.arange(3) == 0)

    schemes = {"dr_grpo": "dr_grpo", "rloo": "rloo", "first": first_alone}
    found, mixed = exact.hold_against_exact(logits, target, setting, schemes, seed=3, batches=2048)
    assert 0.5 < mixed < 1 and not any(of.isnan().any() for of in found.values())
    truth = exact.exact_gradient(logits, target, setting.reward)
    first_share = truth[:, 0].flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    expected = torch.stack([torch.ones_like(first_share), torch.ones_like(first_share), first_share])
    torch.testing.assert_close(found["bias"], expected, atol=0.03, rtol=0)
    for name in ("one", "eight", "decision"):
        torch.testing.assert_close(found[name][0], found[name][1])
    assert (found["decision"][2] <= 1 / 3).all() and (found["decision"][0] > found["decision"][2]).all()
    assert (found["one"][0] + 0.1 < found["eight"][0]).all() and (found["eight"][0] < 0.99).all()


@pytest.mark.parametrize(
    ("name", "section", "arms"),
    [
        ("first", "## Speech", ("dr_grpo", "tempo", "leaf_b2", "leaf_b4")),
        ("second", "## Second round", ("tempo", "tree_td", "tree_td_1", "tree_td less tempo")),
    ],
)
def test_the_tables_of_the_study_are_those_of_its_runs(name: str, section: str, arms: tuple[str, ...]) -> None:
    """Every difference of README.md, with what is bold; half a digit of the last place for rounding."""
    found = analyse.Speech(name).tables()[1]
    page = (EXAMPLES / "study" / "README.md").read_text().split(f"{section}\n" if name == "first" else section)[1]
    rows = cells_of(page.split("\n\n![")[0])[1:]
    keys = [f"{' '.join(map(str, task))} {{}} {outcome}" for task in analyse.TASKS for outcome in ("during", "reward")]
    assert len(rows) == len(keys)
    for row, key in zip(rows, keys, strict=True):
        for cell, arm in zip(row[-4:], arms, strict=True):
            comparison = found[key.format(arm)]
            difference, half = map(float, cell.strip("*").split(" ± "))
            assert difference == pytest.approx(comparison["difference"], abs=0.0005001), (key, arm)
            assert half == pytest.approx(comparison["half"], abs=0.0005001), (key, arm)
            assert cell.startswith("**") == (comparison["p"] < 0.05), (key, arm)


def test_the_study_of_the_tabular_policy_has_tables() -> None:
    """Settings of the page, from the runs; the picture is made from the same."""
    rows = {row[1]: row for row in cells_of(analyse.Tabular().tables()) if row[0] == analyse.REWARDS["prefix"]}
    assert rows["sharpness 3"][3] == "+0.054 ± 0.020" and rows["temperature 0.5"][3] == "+0.027 ± 0.018"


# --- Rewards ----------------------------------------------------------------------------------------------------------


pytest.importorskip("sacrebleu")
pytest.importorskip("jiwer")


words = st.lists(st.sampled_from(["der", "Hund", "bellt", "laut", "heute", "nicht"]), min_size=1, max_size=9)


def test_by_hand() -> None:
    answers = ["the cat sat", "the dog sat", "", "the the the the the the the"]
    assert word_accuracy(answers, ["the cat sat"] * 4) == pytest.approx([1, 2 / 3, 0, 0])
    assert word_accuracy(["", "a"], ["", ""]) == [1, 0]
    assert exact_match(["The cat sat!", "the cat sits"], ["the cat, sat", "the cat sat"]) == [1, 0]
    # Precisions 2/3 and, of one bigram in two, 1/2; the trigram is smoothed to 1 / (2 * 1); no brevity penalty.
    (bleu,) = sentence_bleu(["the cat sits"], ["the cat sat"])
    assert bleu == pytest.approx((2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3), rel=1e-9)


def test_case_counts_in_training_and_not_in_evaluation() -> None:
    sensitive, insensitive = (sentence_bleu(["The Cat Sat Down"], ["the cat sat down"], lowercase=x) for x in (0, 1))
    assert insensitive == pytest.approx([1.0]) and sensitive[0] < 0.5
    assert chrf(["ABC"], ["abc"]) == [0.0] and chrf(["ABC"], ["abc"], lowercase=True) == pytest.approx([1.0])


@pytest.mark.parametrize("name", REWARDS)
@given(rows=st.lists(st.tuples(words, words), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_laws(name: str, rows: list[tuple[list[str], list[str]]]) -> None:
    """From 0 to 1; 1 for the reference; more references never give less; rows do not know each other."""
    reward = REWARDS[name]
    texts, references = ([" ".join(row[i]) for row in rows] for i in (0, 1))
    found = reward(texts, references, prompts=texts, completion_ids=[[1]] * len(rows))
    assert all(0 <= x <= 1 + 1e-9 for x in found)
    assert reward(references, references) == pytest.approx([1.0] * len(rows))
    assert found == [reward([t], [r])[0] for t, r in zip(texts, references, strict=True)]
    both = reward(texts, [[r, t] for r, t in zip(references, texts, strict=True)])
    assert both == pytest.approx([1.0] * len(rows))
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(messages, references) == found
    assert reward(texts, [None] * len(rows)) == [None] * len(rows)


def test_normalisation() -> None:
    accented = "  Don\u2019t \u201cSTOP\u201d \u2013 l'\u00e9t\u00e9, e\u0301te\u0301! "
    assert normalize_text(accented) == "don't stop l'\u00e9t\u00e9 \u00e9t\u00e9"
    assert normalize_text("'quoted' rock'n'roll'") == "quoted rock'n'roll"
    assert normalize_text("\u4f60\u597d\u3002") == "\u4f60\u597d"


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="^reference must have one entry for each completion, got 1 for 2$"):
        exact_match(["a", "b"], ["a"])
