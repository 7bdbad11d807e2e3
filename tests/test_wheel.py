"""What is installed is the whole package, and it works away from the checkout."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pages
import pytest
from support import run_python

import leafkernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("leafkernels", "python_ref")


def files_below(folder: Path, ending: str = "") -> set[str]:
    paths = (path for package in PACKAGES for path in (folder / package).rglob(f"*{ending}"))
    return {str(path.relative_to(folder)) for path in paths if path.is_file() and "__pycache__" not in path.parts}


def test_setup_finds_every_package_and_the_version() -> None:
    pytest.importorskip("setuptools")
    code = """
import json, setuptools, distutils.core
found = distutils.core.run_setup("setup.py", stop_after="init")
print(json.dumps([sorted(found.packages), found.get_version(), found.extras_require]))
"""
    packages, version, extras = json.loads(run_python("-c", code, cwd=ROOT, PYTHONPATH="").stdout)
    assert packages == sorted({Path(file).parent.as_posix().replace("/", ".") for file in files_below(ROOT, ".py")})
    assert version == leafkernels.__version__
    # An extra has one line on the page that says what was run with it, and asks for nothing twice.
    described = re.findall(r"^\| `(\w+)` \|", pages.read("versions.md"), re.M)
    assert sorted(described) == sorted(extras)
    assert [extra for extra, needs in extras.items() if len(set(needs)) < len(needs)] == []


def test_a_release_has_the_tag_of_its_version(tmp_path: Path) -> None:
    refused = subprocess.run(["bash", ROOT / ".ci" / "release", "v0", tmp_path], capture_output=True, text=True)
    assert refused.returncode == 1 and not list(tmp_path.iterdir())
    said = f"The tag must be v{leafkernels.__version__}, the version of leafkernels/__init__.py, got v0"
    assert refused.stderr.strip() == said


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as its wheel brings it."""
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs pip and setuptools")
    if int(version("setuptools").split(".")[0]) < 71 and importlib.util.find_spec("wheel") is None:
        pytest.skip("needs setuptools from 71 on, or wheel")
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, so that neither an old build folder of the checkout gets in, nor a new one stays.
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    return target


def run(installed: Path, *arguments: str) -> str:
    return run_python(*arguments, cwd=installed.parent, timeout=240, PYTHONPATH=str(installed)).stdout


@pytest.mark.slow
def test_the_wheel_has_every_file(installed: Path) -> None:
    assert files_below(installed) == files_below(ROOT)


@pytest.mark.slow
def test_every_module_of_the_wheel_is_imported(installed: Path) -> None:
    code = f"""
import importlib, pkgutil, sys
packages = [importlib.import_module(name) for name in {PACKAGES}]
modules = [m.name for p in packages for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
if importlib.util.find_spec("triton") is None:
    modules = [name for name in modules if not name.startswith("leafkernels.kernels")]
for name in modules:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        # A plug whose trainer is missing says so.
        if not (name.startswith("leafkernels.integrations.") and f"{{name}} needs" in str(error)):
            raise
    else:
        assert module.__file__.startswith({str(installed)!r}), module.__file__
print(len(modules))
"""
    count = int(run(installed, "-c", code))
    assert count == len(files_below(ROOT, ".py")) - len(PACKAGES)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--backend", "reference", "--limit", "2"]])
def test_the_command_of_the_wheel(installed: Path, arguments: list[str]) -> None:
    (script,) = installed.glob("bin/leafkernels*")  # what pip makes of the entry point
    words = [sys.executable, str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONIOENCODING": "utf-8"}
    printed = subprocess.run(words, env=environment, capture_output=True, text=True, encoding="utf-8", check=True)
    assert printed.stdout == run(installed, "-m", "leafkernels", *arguments)
    assert "with different rewards" in run(installed, "-m", "leafkernels", *arguments)
