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
        # A plug whose trainer or engine is missing says so.
        plugs = "leafkernels.integrations.", "leafkernels.lookahead.vllm."
        if not (name.startswith(plugs) and f"{{name}} needs" in str(error)):
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


# ---- the build for the Kernel Hub: it runs beside the installed package and beside a build of another version


# Where CI puts Hugging Face's package `kernels`, of which transformers takes note where it is installed.
KERNELS = os.environ.get("LEAFKERNELS_KERNELS", "")

LOADS = {
    "under its own name": """
def load(folder):
    target = folder / "build" / "torch-universal"
    name = json.loads((target / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, target / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
""",
    "by kernels": """
import kernels
def load(folder):
    return kernels.get_local_kernel(folder)
""",
}

COMPARE = """
import importlib.util, json, sys
from pathlib import Path
import torch
import leafkernels, python_ref
{load}
def run(package, backend):
    torch.manual_seed(0)
    logprobs, ids = -torch.rand(2, 4, 9), torch.randint(0, 2, (2, 4, 9))
    rewards = torch.rand(2, 4, requires_grad=True)
    found = [package.ESTIMATORS[name](logprobs, ids, rewards, backend=backend) for name in sorted(package.ESTIMATORS)]
    logits = torch.randn(3, 40, requires_grad=True)
    scores = package.surprisal_entropy(logits, torch.tensor([1, 5, 39]), backend=backend)
    old = scores.surprisal.detach()[None] * -1.1
    loss = package.policy_loss(-scores.surprisal[None], old, found[0].detach()[0, :1, :3], torch.ones(1, 3)).loss
    (sum(credit.square().sum() for credit in found) + loss).backward()
    return [*found, scores.surprisal, scores.entropy, loss, rewards.grad, logits.grad]

packages = [leafkernels, *(load(Path(folder)) for folder in {folders!r})]
for backend in ("torch", "reference", *{kernels!r}):
    first, *others = [run(package, backend) for package in packages]
    assert all(torch.equal(one, same) for other in others for one, same in zip(first, other, strict=True)), backend
operations = [sys.modules[package.__name__ + "._core.operation"] for package in packages]
assert len({{id(module.OPERATIONS) for module in operations}}) == len(packages)
for package, folder in zip(packages[1:], {folders!r}, strict=True):
    own = {{name: module for name, module in sys.modules.items() if name.split(".")[0] == package.__name__}}
    assert {{name.split(".")[1] for name in own if "." in name}} >= {{"credit", "eager", "losses", "python_ref"}}
    for module in own.values():
        assert module.__file__.startswith(folder)
        sources = {{str(getattr(value, "__module__", "")).split(".")[0] for value in vars(module).values()}}
        assert not sources & {{"leafkernels", "python_ref"}}, module
    assert hasattr(torch.ops, package.__name__)
print([package.__version__ for package in packages])
"""


def build_for_hub(source: Path, folder: Path) -> str:
    subprocess.run([sys.executable, source / ".ci" / "hub.py", folder], check=True, stdout=subprocess.DEVNULL)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("how", LOADS)
def test_two_builds_run_beside_the_installed_package(how: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), *([KERNELS] if KERNELS else [])])
    if how == "by kernels" and not KERNELS and importlib.util.find_spec("kernels") is None:
        pytest.skip("needs Hugging Face's package kernels, or LEAFKERNELS_KERNELS, the folder where it is")
    other = tmp_path / "source"
    for name in ("leafkernels", "python_ref", ".ci"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    init = other / "leafkernels" / "__init__.py"
    init.write_text(init.read_text(encoding="utf-8").replace('__version__ = "', '__version__ = "9.'), encoding="utf-8")
    folders = [build_for_hub(ROOT, tmp_path / "this"), build_for_hub(other, tmp_path / "that")]
    kernels = ("triton",) if importlib.util.find_spec("triton") else ()
    code = COMPARE.format(load=LOADS[how], folders=folders, kernels=kernels)
    printed = run_python("-c", code, cwd=tmp_path, PYTHONPATH=path, TRITON_INTERPRET="1").stdout
    version = leafkernels.__version__
    assert printed.strip() == str([version, version, f"9.{version}"])


def test_the_same_source_gives_the_same_build(tmp_path: Path) -> None:
    names = set()
    for folder in ("one", "two"):
        build_for_hub(ROOT, tmp_path / folder)
        about = json.loads((tmp_path / folder / "build/torch-universal/metadata.json").read_text(encoding="utf-8"))
        names.add(about["id"])
    assert len(names) == 1 and names.pop().isidentifier()
    assert not list((tmp_path / "one").rglob("integrations"))


def test_what_cannot_be_made_relative_is_refused(tmp_path: Path) -> None:
    for name in ("leafkernels", "python_ref", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "leafkernels" / "credit" / "tree.py").open("a", encoding="utf-8") as file:
        file.write("\nimport leafkernels\n")
    refused = subprocess.run(
        [sys.executable, tmp_path / ".ci" / "hub.py", tmp_path / "out"], capture_output=True, text=True
    )
    assert (
        not (tmp_path / "out").exists()
        and refused.returncode == 1
        and refused.stderr.strip().endswith(
            "tree.py must import by from, so that it can be made relative; got import leafkernels"
        )
    )
