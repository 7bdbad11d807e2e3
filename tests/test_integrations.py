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


@pytest.mark.parametrize("name", ["trl", "trl_audio", "trl_distillation"])
def test_a_trl_whose_lazy_import_fails_is_told_of_as_well(name: str) -> None:
    """TRL loads its modules when they are asked for, and raises a RuntimeError of several lines where one fails."""
    code = f"""
import sys, types
class Lazy(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError("Failed to import trl.trainer:\\nNo module named 'requests'")
sys.modules["trl"] = Lazy("trl")
import leafkernels.integrations.{name}
"""
    last = run_python("-c", code, check=False).stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: leafkernels.integrations.{name} needs TRL"), last
    assert last.endswith("(Failed to import trl.trainer: No module named 'requests'); pip install 'leafkernels[trl]'")
