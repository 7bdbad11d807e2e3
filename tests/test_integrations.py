"""What every plug has in common."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["trl", "verl"])
def test_without_its_trainer_a_plug_says_what_to_install(name: str) -> None:
    code = f"import sys; sys.modules['{name}'] = None; import leafkernels.integrations.{name}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: leafkernels.integrations.{name} needs ")
    assert last.endswith(f"pip install 'leafkernels[{name}]'")
