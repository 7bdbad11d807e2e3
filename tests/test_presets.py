"""Named options: explicit ones win over the preset, and the preset over the defaults."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from leafkernels import PRESETS
from leafkernels.command.options import CREDIT_OPTIONS, parse_arguments

OTHER: dict[str, int | float | str] = {
    "num_generations": 4,
    "num_boundaries": 7,
    "terms": "local",
    "multiplicity_power": 0.25,
}


def test_the_preset_is_that_of_the_paper() -> None:
    paper = {"num_generations": 8, "num_boundaries": 2, "terms": "both", "multiplicity_power": 0.5}
    assert {"leaf-paper": paper} == PRESETS


def test_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "leaf-paper", OTHER)
    plain = parse_arguments([])
    assert (plain.num_boundaries, plain.terms, plain.multiplicity_power) == (2, "both", 0.5)
    found = parse_arguments(["--preset", "leaf-paper"])
    assert (found.num_boundaries, found.terms, found.multiplicity_power) == (7, "local", 0.25)
    # Also an option that is given what it would have been anyhow.
    found = parse_arguments(["--num-boundaries", "2", "--preset", "leaf-paper", "--terms", "both"])
    assert (found.num_boundaries, found.terms, found.multiplicity_power) == (2, "both", 0.25)
    assert set(CREDIT_OPTIONS) <= set(vars(found))


def test_of_the_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    from leafkernels.integrations.trl import LeafGRPOConfig

    @dataclass
    class Mine(LeafGRPOConfig):
        num_boundaries: int = 5

    out = str(tmp_path)
    paper = LeafGRPOConfig(out, use_cpu=True, preset="leaf-paper")
    assert (paper.num_generations, paper.num_boundaries, paper.terms, paper.multiplicity_power) == (8, 2, "both", 0.5)
    assert Mine(out, use_cpu=True).num_boundaries == 5
    assert Mine(out, use_cpu=True, preset="leaf-paper").num_boundaries == 2
    assert Mine(out, use_cpu=True, preset="leaf-paper", num_boundaries=3).num_boundaries == 3

    monkeypatch.setitem(PRESETS, "leaf-paper", OTHER)
    found = LeafGRPOConfig(out, use_cpu=True, preset="leaf-paper", terms="global")
    assert (found.num_generations, found.num_boundaries, found.terms, found.multiplicity_power) == (
        4,
        7,
        "global",
        0.25,
    )
    with pytest.raises(ValueError, match="preset must be one of 'leaf-paper', got 'leaf'"):
        LeafGRPOConfig(out, use_cpu=True, preset="leaf")
