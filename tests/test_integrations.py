"""What every plug has in common."""

import pytest
from support import run_python


@pytest.mark.parametrize("name", ["trl", "verl"])
def test_without_its_trainer_a_plug_says_what_to_install(name: str) -> None:
    code = f"import sys; sys.modules['{name}'] = None; import leafkernels.integrations.{name}"
    run = run_python("-c", code, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: leafkernels.integrations.{name} needs ")
    assert last.endswith(f"pip install 'leafkernels[{name}]'")
