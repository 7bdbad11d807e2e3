"""Rows for the trainer (prompt, audio, reference): from the sources of the example, or from a table of a corpus."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import soundfile
from datasets import Dataset

from .data import SAMPLING_RATE, Source, Utterance
from .model import AUDIO, AUDIO_BEGIN, AUDIO_END


def question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": text}]}]


def row_of(utterance: Utterance, small: bool) -> dict[str, Any]:
    file = io.BytesIO()
    soundfile.write(file, utterance.audio, SAMPLING_RATE, format="WAV", subtype="FLOAT")
    prompt = AUDIO_BEGIN + AUDIO + AUDIO_END + utterance.prompt if small else question(utterance.prompt)
    return {"prompt": prompt, "audio": {"bytes": file.getvalue()}, "reference": utterance.reference}


def drawn(source: Source, name: str, count: int, small: bool, *, held_out: bool) -> Dataset:
    """``count`` utterances of a source; which ones depends on the name alone."""
    rng = random.Random(name)
    return Dataset.from_list([row_of(source.draw(rng, held_out=held_out), small) for _ in range(count)])


def read_table(path: Path, audio: str, reference: str, instruction: str) -> Dataset:
    """Read a table with a header, tabs between its columns: a file of audio, beside the table or absolute, and a
    reference a line. All columns reach the rewards, the reference under that name."""
    if not path.is_file():
        raise FileNotFoundError(f"a table of audio and references must be a file, got {str(path)!r}, which is none")
    # A byte order mark, which some editors and spreadsheets put first, is no part of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Corpora quote nothing: a lone quotation mark is a part of the text.
        lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    lacking = [name for name in (audio, reference) if lines and name not in lines[0]]
    if not lines or lacking:
        raise ValueError(
            f"{path} must have rows with the columns {audio!r} and {reference!r}, got "
            + (", ".join(lines[0]) if lines else "no row")
        )
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line[audio] or line[reference] is None:
            raise ValueError(f"{path}, row {number}: must have {audio!r} and {reference!r}, got {list(line.values())}")
        others = {name: value for name, value in line.items() if name and name not in (audio, "audio", "prompt")}
        rows.append(
            {
                **others,
                "prompt": question(instruction),
                "audio": {"path": str(path.parent / line[audio])},
                "reference": line[reference],
            }
        )
    return Dataset.from_list(rows)
