"""What is installed is the whole package, and it works away from the checkout."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support import run_python

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("leafkernels", "python_ref")


def files_below(folder: Path) -> set[str]:
    paths = (path for package in PACKAGES for path in (folder / package).rglob("*"))
    return {str(path.relative_to(folder)) for path in paths if path.is_file() and "__pycache__" not in path.parts}


def test_setup_names_every_package() -> None:
    (named,) = (
        ast.literal_eval(keyword.value)
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "packages"
    )
    found = {str(Path(file).parent).replace(os.sep, ".") for file in files_below(ROOT) if file.endswith(".py")}
    assert sorted(named) == sorted(found)


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
    assert count == len([file for file in files_below(ROOT) if file.endswith(".py")]) - len(PACKAGES)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--backend", "reference", "--limit", "2"]])
def test_the_command_of_the_wheel(installed: Path, arguments: list[str]) -> None:
    (script,) = installed.glob("bin/leafkernels*")  # what pip makes of the entry point
    words = [sys.executable, str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONIOENCODING": "utf-8"}
    printed = subprocess.run(words, env=environment, capture_output=True, text=True, encoding="utf-8", check=True)
    assert printed.stdout == run(installed, "-m", "leafkernels", *arguments)
    assert "with different rewards" in run(installed, "-m", "leafkernels", *arguments)
