"""The report: one page of HTML that holds all it needs and asks the network for nothing."""

import base64
import gzip
import hashlib
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from leafkernels import ESTIMATORS
from leafkernels.command.credit import (
    DEFAULT,
    Credit,
    advantages_of,
    bounded,
    mean,
    no_signal,
    note_of,
    options_of,
    pack_prompt,
    scored,
)
from leafkernels.command.profile import Profile
from leafkernels.command.reading import Failure, Prompt
from leafkernels.command.summary import Statistics
from leafkernels.command.text import visible
from leafkernels.command.tree import pieces_of
from leafkernels.command.writing import replacing

if TYPE_CHECKING:
    from jinja2 import Environment

# The largest float32; overflowed numbers are shown as this.
_LARGEST = torch.finfo(torch.float32).max


class Report:
    """The page, filled prompt by prompt: ``save`` writes it, and a notebook shows it.

    It has the credit of all ``ESTIMATORS``; ``options`` are those of ``estimator``, which it shows first.
    """

    def __init__(
        self, title: str, options: Mapping[str, Any], max_prompts: int, estimator: str = DEFAULT, note: str = ""
    ) -> None:
        self._environment = _environment()
        self._title, self._note = title, note
        named = {"estimator": estimator, **options_of(estimator), **options}
        is_shown = (str, int, float)
        self._options = {
            name: value for name, value in named.items() if isinstance(value, is_shown) and value is not False
        }
        self._max_prompts = max_prompts
        self.schemes = sorted(ESTIMATORS, key=lambda name: name != estimator)
        self._statistics = Statistics()
        self._profile = Profile(self.schemes)
        self._prompts: list[dict[str, Any]] = []
        self._vocabulary: dict[tuple[int, str | None], int] = {}
        self._page: str | None = None

    def add(self, prompt: Prompt, credit: Credit, advantages: Mapping[str, Sequence[Tensor]]) -> None:
        """Take in one prompt; ``advantages``: for each scheme and rollout, one value for each of its tokens."""
        self._page = None
        advantages = {
            name: [values.double().nan_to_num(0.0, _LARGEST, -_LARGEST) for values in rows]
            for name, rows in advantages.items()
        }
        self._statistics.add(prompt, credit)
        pieces = pieces_of(prompt.token_ids, credit)
        self._profile.add(prompt, credit, pieces, advantages)
        if len(self._prompts) == self._max_prompts:
            return
        counts = Statistics()
        counts.add(prompt, credit)
        known = scored(prompt.rewards)
        runs: dict[tuple[float, ...], int] = {}
        tokens = [(piece.rows[0], position) for piece in pieces for position in range(piece.start, piece.end)]
        trained = prompt.is_trained
        if trained is not None and all(map(all, trained)):
            trained = None
        at = [0] * len(prompt.rewards)
        for number, piece in enumerate(pieces):
            for row in piece.ending:
                at[row] = number
        self._prompts.append(
            {
                "name": visible(prompt.name, spaces=False),
                "text": "\n".join(visible(line, spaces=False) for line in prompt.text.split("\n")),
                "boundaries": credit.boundaries,
                "isShared": [bool(credit.members(k, prompt.rewards)) for k in range(len(credit.boundaries))],
                "mixed": counts.mixed,
                "share": counts.shared_tokens / counts.scored_tokens if counts.scored_tokens else 0.0,
                "distinct": len(prompt.rewards) - counts.repeated,
                "mean": mean(known) if known else None,
                "isEqual": no_signal(prompt.rewards),
                "rewards": [None if math.isnan(reward) else reward for reward in prompt.rewards],
                "parents": [piece.parent for piece in pieces],
                "lengths": [piece.end - piece.start for piece in pieces],
                "isNode": [piece.is_node for piece in pieces],
                "at": at,
                "tokens": [
                    self._vocabulary.setdefault(_token(prompt, *token), len(self._vocabulary)) for token in tokens
                ],
                "logprobs": [_logprob(prompt.logprobs[row][position]) for row, position in tokens],
                "holes": None if trained is None else [not trained[row][position] for row, position in tokens],
                "credit": {
                    name: [runs.setdefault(_runs(values), len(runs)) for values in rows]
                    for name, rows in (advantages | _earned(prompt)).items()
                },
                "runs": list(runs),
            }
        )

    def page(self) -> str:
        """The page as text, ASCII but for the names in its heading."""
        if self._page is None:
            self._page = self._render()
        return self._page

    def _render(self) -> str:
        names = {name: name.upper().replace("_", " ") for name in self.schemes}
        data = {
            "schemes": [{"key": key, "name": name, "note": note_of(key)} for key, name in names.items()],
            "charts": self._profile.charts(),
            # JavaScript's numbers are exact up to here.
            "ids": [token_id if abs(token_id) < 2**53 else str(token_id) for token_id, _ in self._vocabulary],
            "texts": [None if text is None else _shown(text) for _, text in self._vocabulary],
            "prompts": self._prompts,
        }
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
        style = self._environment.get_template("report.css.j2").render()
        # As it is: braces of JavaScript are no template's.
        script = files(__package__).joinpath("page", "report.js").read_text(encoding="utf-8")
        return self._environment.get_template("report.html.j2").render(
            title=visible(self._title, spaces=False),
            note=self._note,
            options=[(name.replace("_", " "), value) for name, value in self._options.items()],
            counts=self._statistics,
            shown=len(self._prompts),
            schemes=names,
            # Without a time the same rollouts give the same bytes. Base64 has no character that HTML could misread.
            data=base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii"),
            style=style,
            script=script,
            policy=(
                f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
                "base-uri 'none'; form-action 'none'"
            ),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to ``path``, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        try:
            with replacing(Path(path)) as file:
                self.write(file)
        except Failure as failure:
            raise OSError(str(failure)) from failure

    def write(self, file: BinaryIO) -> None:
        """Write the page into an open file."""
        file.write(self.page().encode())

    def _repr_html_(self) -> str:
        # In a frame of its own neither side's style reaches the other, and its script reaches nothing outside.
        return (
            '<iframe sandbox="allow-scripts" title="leafkernels report" '
            'style="width:100%;height:820px;border:1px solid #8884;border-radius:8px" '
            f'srcdoc="{html.escape(self.page(), quote=True)}"></iframe>'
        )

    def __repr__(self) -> str:
        return f"<leafkernels report of {self._statistics.prompts} prompts, {self._statistics.rollouts} rollouts>"


def advantages_of_prompt(
    prompt: Prompt, credit: Credit, schemes: Sequence[str], chosen: str, options: Mapping[str, Any]
) -> dict[str, list[Tensor]]:
    """The advantages of every scheme for each rollout of a prompt; ``credit`` has those of the scheme ``chosen``."""
    others = [name for name in schemes if name != chosen]
    flat = advantages_of(pack_prompt(prompt), others, chosen, bounded(options, max(prompt.lengths)))
    own = [torch.tensor(row, dtype=torch.float64) for row in credit.advantages]
    return {chosen: own} | {name: list(values.split(prompt.lengths)) for name, values in flat.items()}


def _environment() -> "Environment":
    try:
        from jinja2 import Environment, PackageLoader
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError(
            f"the report needs jinja2, which cannot be imported here ({error}); pip install 'leafkernels[html]'"
        ) from error
    environment = Environment(
        loader=PackageLoader(__package__, "page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["verbatim"] = Markup
    return environment


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _token(prompt: Prompt, row: int, position: int) -> tuple[int, str | None]:
    texts = prompt.tokens[row]
    return prompt.token_ids[row][position], None if texts is None else texts[position]


def _shown(text: str) -> str:
    """The text with escapes for what could not be seen; the page shows line breaks and white space itself."""
    return "".join(char if char in "\n\t " else visible(char) for char in text)


def _logprob(value: float) -> float | str | None:
    """To a thousandth; null where it is not known, and JavaScript's word where it is infinite."""
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return None if math.isnan(value) else round(value, 3)


def _earned(prompt: Prompt) -> dict[str, list[Tensor]]:
    """What is earned at tokens, as the page has the credit of a scheme."""
    if prompt.step_rewards is None:
        return {}
    return {"step rewards": [torch.tensor(row, dtype=torch.float64).nan_to_num(0.0) for row in prompt.step_rewards]}


def _runs(values: Tensor) -> tuple[float, ...]:
    """Stretches of equal values as (end, value, end, value, ...)."""
    if not len(values):
        return (0, 0.0)
    ends = ((values[1:] != values[:-1]).nonzero().flatten() + 1).tolist() + [len(values)]
    flat: list[float] = []
    for end in ends:
        flat += [end, float(f"{values[end - 1].item():.5g}") + 0.0]
    return tuple(flat)
