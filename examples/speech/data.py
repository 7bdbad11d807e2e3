"""Where utterances come from. A source gives utterances of voices to train on, and of others to evaluate on.

``Source`` is the whole interface; ``make_source`` reads the ``--data`` option of the example.
"""

from __future__ import annotations

import io
import json
import math
import random
import shutil
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile

from leafkernels.rows.recordings import resample

SAMPLING_RATE = 16_000
# Of the running sums of spoken digits, and what an answer with them can be rewarded for.
ALPHABET = "0123456789+= "
REWARDS = ("final", "prefix", "fraction")
INSTRUCTION = "Write the running sums of the digits that you hear, for instance 3+5=8 8+9=17, and nothing else."
# Of the recordings and voices that espeak-ng always has; those with a + are variants of one speaker.
ESPEAK_VOICES = ("en-gb", "en-us", "en-gb+f2", "en-us+m3", "en-gb+f4", "en-us+m7")


@dataclass(frozen=True)
class Utterance:
    audio: np.ndarray  # (samples,) float32 at SAMPLING_RATE
    prompt: str  # what is asked about the audio
    reference: str  # the right answer
    voice: str
    taught: str  # the answer that supervised learning is shown


class Source(Protocol):
    alphabet: str  # characters that prompts and answers may have: the vocabulary of the small model
    seconds: int  # no utterance is longer
    answer_length: int  # characters of the longest reference
    reward: str  # which of the scores is the reward

    def draw(self, rng: random.Random, *, held_out: bool, level: float = 1.0) -> Utterance:
        """Draw an utterance; ``level`` below 1 asks for an easier one, where the source knows any."""

    def scores(self, utterance: Utterance, text: str) -> dict[str, float]:
        """Score an answer, from 0 to 1, in each way that the source knows."""


def play_faster(audio: np.ndarray, speed: float) -> np.ndarray:
    """Play the audio at another speed, pitch and all."""
    return np.interp(np.arange(0, len(audio) - 1, speed), np.arange(len(audio)), audio).astype(np.float32)


def read_audio(file: Path | io.BytesIO) -> np.ndarray:
    """Read a sound file as mono at SAMPLING_RATE; of several channels, their mean."""
    audio, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return resample(audio.mean(axis=1), rate, SAMPLING_RATE)


class SpokenSums:
    """Recorded digits, strung together with short pauses; all digits of an utterance are of one voice.

    The teacher of the supervised part makes a sum one too large at ``slip_rate``: the model then hears well, but has
    the right sums still to learn, and only the reward can teach them. What the frozen encoder mishears, an adapter of
    the language model could not repair.
    """

    alphabet = ALPHABET
    CLIP_SECONDS = 0.6
    PAUSE_SECONDS = 0.08
    # Clips of training voices are played up to a third faster or a quarter slower, which also shifts their pitch: the
    # few voices of the data would otherwise be learnt by heart, and a new one not understood.
    SPEED = 0.3

    def __init__(
        self,
        clips: dict[str, dict[int, list[np.ndarray]]],
        held_out: Sequence[str],
        digits: int,
        reward: str,
        instruction: str,
        slip_rate: float = 0.5,
    ) -> None:
        if reward not in REWARDS:
            raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {reward!r}")
        unknown = [voice for voice in held_out if voice not in clips]
        if unknown or not held_out or len(set(held_out)) == len(clips):
            raise ValueError(
                f"held-out voices must be some, but not all, of {', '.join(sorted(clips))}, got "
                f"{', '.join(held_out) or 'none'}"
            )
        missing = sorted({d for digits in clips.values() for d in range(10) if not digits.get(d)})
        if missing:
            raise ValueError(f"every voice must have a recording of each digit, missing {missing}")
        if digits < 2:
            raise ValueError(f"digits must be at least 2, got {digits}")
        self.clips = clips
        self.held_out = sorted(set(held_out))
        self.trained = sorted(set(clips) - set(held_out))
        self.digits, self.reward, self.instruction, self.slip_rate = digits, reward, instruction, slip_rate
        self.seconds = -(-round(100 * digits * (self.CLIP_SECONDS + self.PAUSE_SECONDS)) // 100)
        self.answer_length = len(worked_answer([9] * digits))

    def draw(self, rng: random.Random, *, held_out: bool, level: float = 1.0) -> Utterance:
        voice = rng.choice(self.held_out if held_out else self.trained)
        count = self.digits if level >= 1 else rng.randint(1, max(1, round(level * self.digits)))
        digits = [rng.randrange(10) for _ in range(count)]
        parts = []
        for digit in digits:
            parts.append(np.zeros(int(rng.random() * self.PAUSE_SECONDS * SAMPLING_RATE), dtype=np.float32))
            clip = rng.choice(self.clips[voice][digit])
            if not held_out:
                clip = play_faster(clip, math.exp(rng.uniform(-self.SPEED, self.SPEED)))
            parts.append(clip[: int(self.CLIP_SECONDS * SAMPLING_RATE)])
        return Utterance(
            audio=np.concatenate(parts),
            prompt=self.instruction,
            reference=worked_answer(digits),
            voice=voice,
            taught=worked_answer(digits, rng, self.slip_rate),
        )

    def scores(self, utterance: Utterance, text: str) -> dict[str, float]:
        return scores(utterance.reference, text)


def read_fsdd(path: Path) -> dict[str, dict[int, list[np.ndarray]]]:
    """Read the Free Spoken Digit Dataset, a tar archive of ``{digit}_{speaker}_{index}.wav``."""
    if not path.is_file():
        raise FileNotFoundError(
            f"--data fsdd:PATH must name a tar archive of the Free Spoken Digit Dataset, got {str(path)!r}, "
            f"which is no file"
        )
    clips: dict[str, dict[int, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            name = Path(member.name)
            if name.suffix != ".wav" or member.isdir():
                continue
            digit, speaker, _ = name.stem.split("_")
            clips[speaker][int(digit)].append(read_audio(io.BytesIO(archive.extractfile(member).read())))
    return {voice: dict(digits) for voice, digits in clips.items()}


def speak_digits(voices: Sequence[str] = ESPEAK_VOICES) -> dict[str, dict[int, list[np.ndarray]]]:
    """Let espeak-ng say each digit in each voice at several speeds and pitches."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise FileNotFoundError(
            "--data espeak needs the program espeak-ng, which was not found on the PATH; on Debian, "
            "'apt-get install espeak-ng' brings it"
        )
    clips: dict[str, dict[int, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for voice in voices:
        for digit in range(10):
            for speed in (150, 175, 200):
                for pitch in (35, 50, 65):
                    command = [program, "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", str(digit)]
                    said = subprocess.run(command, capture_output=True, check=True).stdout
                    clips[voice][digit].append(read_audio(io.BytesIO(said)))
    return {voice: dict(digits) for voice, digits in clips.items()}


class Manifest:
    """A JSON-lines file, an utterance a line: ``audio`` (a path, beside the file or absolute), ``prompt``,
    ``reference`` and, if known, ``voice``. Without voices, every eighth line is held out. The reward is sentence BLEU.
    """

    reward = "bleu"

    def __init__(self, path: Path, held_out: Sequence[str]) -> None:
        from sacrebleu.metrics import BLEU

        if not path.is_file():
            raise FileNotFoundError(
                f"--data manifest:FILE must name a JSON-lines file, got {str(path)!r}, which is no file"
            )
        # A byte order mark may come first, and text may hold what is a line end to str.splitlines, and to no file.
        with path.open(encoding="utf-8-sig") as file:
            lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
        self.rows = {False: [], True: []}
        for count, (number, line) in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: must be JSON, got {line[:80]!r} ({error})") from None
            lacking = [name for name in ("audio", "prompt", "reference") if not isinstance(row.get(name), str)]
            if lacking:
                raise ValueError(f"{path}, line {number}: must have {', '.join(lacking)} as text, got {line[:80]}")
            is_held_out = row["voice"] in held_out if "voice" in row else count % 8 == 0
            self.rows[is_held_out].append(
                Utterance(
                    audio=read_audio(path.parent / row["audio"]),
                    prompt=row["prompt"],
                    reference=row["reference"],
                    voice=row.get("voice", ""),
                    taught=row["reference"],
                )
            )
        if not self.rows[False] or not self.rows[True]:
            raise ValueError(
                f"{path}: some utterances must be held out and some not, got {len(self.rows[True])} and "
                f"{len(self.rows[False])} with --held-out {','.join(held_out)}"
            )
        utterances = self.rows[False] + self.rows[True]
        self.alphabet = "".join(sorted({c for u in utterances for c in u.prompt + u.reference}))
        self.seconds = -(-max(len(u.audio) for u in utterances) // SAMPLING_RATE)
        self.answer_length = max(len(u.reference) for u in utterances)
        # effective_order: without it, an answer of fewer than four words could only score 0.
        self.bleu = BLEU(effective_order=True)

    def draw(self, rng: random.Random, *, held_out: bool, level: float = 1.0) -> Utterance:
        return rng.choice(self.rows[held_out])

    def scores(self, utterance: Utterance, text: str) -> dict[str, float]:
        return {"bleu": self.bleu.sentence_score(text, [utterance.reference]).score / 100}


def make_source(data: str, held_out: Sequence[str], digits: int, reward: str, *, ask: bool) -> Source:
    """Make the source that ``--data`` names; ``ask``: with an instruction in words, for a model that reads them."""
    kind, _, path = data.partition(":")
    instruction = INSTRUCTION if ask else ""
    if kind == "fsdd" and path:
        return SpokenSums(read_fsdd(Path(path)), held_out or ["theo"], digits, reward, instruction)
    if data == "espeak":
        return SpokenSums(speak_digits(), held_out or ["en-us+m3", "en-gb+f4"], digits, reward, instruction)
    if kind == "manifest" and path:
        return Manifest(Path(path), held_out)
    raise ValueError(f"--data must be fsdd:PATH, espeak or manifest:FILE.jsonl, got {data!r}")


# ---- the task: write down spoken digits and their running sums; ``3 5 9`` is answered by ``3+5=8 8+9=17``


def worked_answer(digits: Sequence[int], rng: random.Random | None = None, slip_rate: float = 0.0) -> str:
    """Write the sums one after the other; a single digit is answered by itself.

    With ``slip_rate``, a sum comes out one too large that often, and the next goes on from there.
    """
    if len(digits) == 1:
        return str(digits[0])
    steps, total = [], digits[0]
    for digit in digits[1:]:
        result = total + digit + (rng is not None and rng.random() < slip_rate)
        steps.append(f"{total}+{digit}={result}")
        total = result
    return " ".join(steps)


def scores(reference: str, text: str) -> dict[str, float]:
    """Score an answer in three ways, from 0 to 1.

    ``final``: 1 if what stands behind the last equals sign is the sum, and nothing before it counts. ``prefix``: the
    share of the reference's characters before the first wrong one. ``fraction``: the share of its characters that the
    answer has in the same place.
    """
    right = [a == b for a, b in zip(text, reference, strict=False)]
    return {
        "final": float(text.rpartition("=")[2] == reference.rpartition("=")[2]),
        "prefix": (right.index(False) if False in right else len(right)) / len(reference),
        "fraction": sum(right) / len(reference),
    }
