"""The report: one page of HTML that holds all it needs and asks the network for nothing."""

import base64
import hashlib
import html
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

import leafkernels
from leafkernels.command.credit import Credit, bound_options, no_signal, pack_prompt, scored
from leafkernels.command.pieces import pieces_of
from leafkernels.command.profile import Profile
from leafkernels.command.reading import Failure, Prompt
from leafkernels.command.summary import Statistics
from leafkernels.command.text import visible
from leafkernels.command.writing import replacing

if TYPE_CHECKING:
    from jinja2 import Environment

SCHEMES = {
    "leaf": ("LEAF", "one advantage for each span that rollouts share, then one for the rest of a rollout"),
    "grpo": ("GRPO", "one advantage for a whole rollout: its reward against the prompt's mean, over the deviation"),
    "tempo": ("TEMPO", "GRPO, plus what a token changed in the mean reward wherever rollouts part"),
    "treerl": ("TreeRL", "twice the node's value less its parent's, each over the root of its size"),
}

# Numbers are written in base 44, least digit first; the second half of the alphabet says that another digit follows.
# No character of it needs an escape in JSON or in HTML.
_ALPHABET = "".join(chr(code) for code in range(33, 127) if chr(code) not in "\"\\<>&'")
_BASE = len(_ALPHABET) // 2

# A float32 holds no more; what has overflowed is shown as this.
_LARGEST = torch.finfo(torch.float32).max


class Report:
    """The page, filled prompt by prompt: ``save`` writes it, and a notebook shows it."""

    def __init__(self, title: str, options: Mapping[str, object], max_prompts: int) -> None:
        self._environment = _environment()
        self._title = title
        self._options = options
        self._max_prompts = max_prompts
        self._statistics = Statistics()
        self._profile = Profile(list(SCHEMES))
        self._prompts: list[dict[str, Any]] = []
        self._vocabulary: dict[tuple[int, str | None], int] = {}
        self._page: str | None = None

    def add(
        self,
        prompt: Prompt,
        credit: Credit,
        advantages: Mapping[str, Sequence[Tensor]],
        is_trained: Sequence[Sequence[bool]] | None = None,
    ) -> None:
        """Take in one prompt.

        Args:
            advantages: for each scheme and rollout, one value for each of its tokens.
            is_trained: for each rollout, whether each token counts; None: all do.
        """
        self._page = None
        advantages = {
            name: [values.double().nan_to_num(0.0, _LARGEST, -_LARGEST) for values in rows]
            for name, rows in advantages.items()
        }
        self._statistics.add(prompt, credit, is_trained)
        pieces = pieces_of(prompt.token_ids, credit)
        self._profile.add(prompt, credit, pieces, advantages, is_trained)
        if len(self._prompts) == self._max_prompts:
            return
        counts = Statistics()
        counts.add(prompt, credit, is_trained)
        known = scored(prompt.rewards)
        runs: dict[tuple[float, ...], int] = {}
        tokens = [(piece.rows[0], position) for piece in pieces for position in range(piece.start, piece.end)]
        numbers = (_token(prompt, row, position) for row, position in tokens)
        if is_trained is not None and all(map(all, is_trained)):
            is_trained = None
        at = [0] * len(prompt.rewards)
        for number, piece in enumerate(pieces):
            for row in piece.ending:
                at[row] = number
        self._prompts.append(
            {
                "name": visible(prompt.name, spaces=False),
                "text": "\n".join(visible(line, spaces=False) for line in prompt.text.split("\n")),
                "boundaries": credit.boundaries,
                "isShared": [any(row[k] >= 0 for row in credit.nodes) for k in range(len(credit.boundaries))],
                "informing": counts.informing,
                "share": counts.shared_tokens / counts.scored_tokens if counts.scored_tokens else 0.0,
                "distinct": len(prompt.rewards) - counts.repeated,
                "mean": math.fsum(reward / len(known) for reward in known) if known else None,
                "isEqual": no_signal(prompt.rewards),
                "rewards": [None if math.isnan(reward) else reward for reward in prompt.rewards],
                "parents": pack(piece.parent + 1 for piece in pieces),
                "lengths": pack(piece.end - piece.start for piece in pieces),
                "isNode": pack(piece.is_node for piece in pieces),
                "at": pack(at),
                "tokens": [self._vocabulary.setdefault(token, len(self._vocabulary)) for token in numbers],
                "surprisals": pack(_surprisal_code(prompt.logprobs[row][position]) for row, position in tokens),
                "holes": None
                if is_trained is None
                else pack(not is_trained[row][position] for row, position in tokens),
                "credit": {
                    name: pack(runs.setdefault(_runs(values), len(runs)) for values in rows)
                    for name, rows in advantages.items()
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
        counts = Counter(number for prompt in self._prompts for number in prompt["tokens"])
        vocabulary = list(self._vocabulary)
        # Frequent tokens first: small numbers are packed best.
        order = sorted(range(len(vocabulary)), key=lambda number: (-counts[number], number))
        rank = [0] * len(order)
        for place, number in enumerate(order):
            rank[number] = place
        ids = [vocabulary[number][0] for number in order]
        texts = [vocabulary[number][1] for number in order]
        data = {
            "alphabet": _ALPHABET,
            "schemes": [{"key": key, "name": name, "note": note} for key, (name, note) in SCHEMES.items()],
            "charts": self._profile.charts(),
            # JavaScript's numbers are exact up to here.
            "ids": [token_id if abs(token_id) < 2**53 else str(token_id) for token_id in ids],
            "texts": [None if text is None else _shown(text) for text in texts],
            "prompts": [
                {**prompt, "tokens": pack(rank[number] for number in prompt["tokens"])} for prompt in self._prompts
            ],
        }
        style = self._environment.get_template("report.css.j2").render()
        # As it is: braces of JavaScript are no template's.
        script = files("leafkernels.command").joinpath("page", "report.js").read_text(encoding="utf-8")
        return self._environment.get_template("report.html.j2").render(
            title=visible(self._title, spaces=False),
            options=[(name.replace("_", " "), value) for name, value in self._options.items()],
            counts=self._statistics,
            shown=len(self._prompts),
            schemes=SCHEMES,
            data=json_for_html(data),
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


def schemes_of_prompt(prompt: Prompt, credit: Credit, options: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Every scheme's advantages of the prompt's rollouts; ``credit`` has those of LEAF."""
    lengths = [len(row) for row in prompt.token_ids]
    packed = pack_prompt(prompt, torch.device("cpu"))
    boundaries = {name: bound_options(options, lengths)[name] for name in ("num_boundaries", "min_separation")}
    return {
        "leaf": [torch.tensor(row, dtype=torch.float64) for row in credit.advantages(lengths)],
        "grpo": list(leafkernels.grpo(**packed).split(lengths)),
        "tempo": list(leafkernels.tempo(**packed).split(lengths)),
        "treerl": list(leafkernels.treerl(**packed, **boundaries).split(lengths)),
    }


def json_for_html(value: object) -> str:
    """JSON that may stand in a script tag: nothing in it can end the tag or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def pack(numbers: Iterable[int]) -> str:
    """Integers from 0 as text, a character for most of them; the page reads it back."""
    return "".join(map(_packed, numbers))


@lru_cache(maxsize=65536)
def _packed(number: int) -> str:
    text = ""
    while number >= _BASE:
        number, digit = divmod(number, _BASE)
        text += _ALPHABET[_BASE + digit]
    return text + _ALPHABET[number]


def _environment() -> "Environment":
    try:
        from jinja2 import Environment, PackageLoader
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError(
            f"the report needs jinja2, which cannot be imported here ({error}); pip install 'leafkernels[html]'"
        ) from error
    environment = Environment(
        loader=PackageLoader("leafkernels.command", "page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
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


def _surprisal_code(logprob: float) -> int:
    """0: none, 1: infinite, else 2 more than the thousandths of a nat, the even numbers for those from 0."""
    if math.isnan(logprob):
        return 0
    if math.isinf(logprob):
        return 1
    thousandths = round(-1000 * max(min(logprob, 1e9), -1e9))
    return 2 + (2 * thousandths if thousandths >= 0 else -2 * thousandths - 1)


def _runs(values: Tensor) -> tuple[float, ...]:
    """Stretches of equal values as (end, value, end, value, ...)."""
    if not len(values):
        return (0, 0.0)
    ends = ((values[1:] != values[:-1]).nonzero().flatten() + 1).tolist() + [len(values)]
    flat: list[float] = []
    for end in ends:
        flat += [end, float(f"{values[end - 1].item():.5g}") + 0.0]
    return tuple(flat)
