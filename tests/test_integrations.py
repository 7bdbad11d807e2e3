"""What every plug has in common."""

import os
from pathlib import Path

import pytest
from pages import ROOT
from support import run_python


@pytest.mark.parametrize("name", ["trl", "verl"])
def test_without_its_trainer_a_plug_says_what_to_install(name: str) -> None:
    code = f"import sys; sys.modules['{name}'] = None; import leafkernels.integrations.{name}"
    run = run_python("-c", code, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: leafkernels.integrations.{name} needs ")
    assert last.endswith(f"pip install 'leafkernels[{name}]'")


@pytest.mark.parametrize("name", ["trl", "trl_audio"])
def test_a_trainer_that_cannot_be_loaded_is_missing_too(name: str, tmp_path: Path) -> None:
    """TRL loads its parts when they are asked for, and what is wrong then is a RuntimeError of several lines."""
    (tmp_path / "trl.py").write_text("def __getattr__(name):\n    raise RuntimeError('Failed:\\nno requests')\n")
    code = f"import leafkernels.integrations.{name}"
    run = run_python("-c", code, check=False, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: leafkernels.integrations.{name} needs TRL")
    assert last.endswith("(Failed: no requests); pip install 'leafkernels[trl]'")
