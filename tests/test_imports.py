"""Who imports whom: the rooms of the package, read from its source, and what a fresh process loads."""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from support import run_python

import leafkernels
import leafkernels.distributed
import leafkernels.integrations.layouts
import leafkernels.lookahead  # noqa: F401 - for its operations
import leafkernels.models
from leafkernels._core.backend import ROOMS
from leafkernels._core.operation import OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("leafkernels", "python_ref")

# A room imports from lower floors, and from its own floor where that is one of these.
FLOORS = [
    ("_core",),
    ("rows",),
    ("distributed",),
    ("credit", "vocabulary", "losses"),
    ("",),  # the public names
    ("models",),
    ("lookahead", "integrations", "command"),
    ("__main__",),
]
SHARED_FLOOR = 3
# What runs an operation; it is loaded by name, and has rules of its own.
BACKENDS = {
    "kernels": {"leafkernels.kernels", "torch", "triton", "math"},
    "eager": {"leafkernels.eager", "leafkernels.rows.layout", "leafkernels._core.precision", "torch"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def statements(module: str) -> Iterator[ast.AST]:
    """Every node of a module but what only a type checker sees, and what the public names load when asked for it."""
    waiting: list[ast.AST] = [ast.parse(SOURCES[module].read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if module in PACKAGES and isinstance(node, ast.FunctionDef):
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def imports(module: str) -> set[str]:
    """Modules that a module imports, of ours by their full names."""
    found = set()
    for node in statements(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & set(SOURCES)
            found |= modules | ({node.module} if names - modules else set())
    return found


IMPORTS = {module: imports(module) for module in SOURCES}
IMPORTS["leafkernels._core.backend"] |= {f"leafkernels.{name}" for name in ROOMS.values()}


def room(module: str) -> str:
    return (module.split(".") + [""])[1]


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_the_backends_import_what_they_may() -> None:
    """Kernels torch and triton, eager pure descriptions, neither the other: if they agree, they share no trick."""
    for module, imported in IMPORTS.items():
        if room(module) in BACKENDS and is_below(module, "leafkernels"):
            allowed = BACKENDS[room(module)] | {"typing", "math", "collections"}
            for other in imported:
                assert any(is_below(other, name) for name in allowed), f"{module} imports {other}"


def test_the_reference_imports_the_standard_library_only() -> None:
    for module, imported in IMPORTS.items():
        if is_below(module, "python_ref"):
            for other in imported:
                top = other.split(".")[0]
                assert top == "python_ref" or top in sys.stdlib_module_names, f"{module} imports {other}"


def test_imports_point_one_way() -> None:
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    for module, imported in IMPORTS.items():
        if not is_below(module, "leafkernels") or room(module) in BACKENDS:
            continue
        floor = floor_of[room(module)]
        for other in imported:
            if not is_below(other, "leafkernels") or room(other) == room(module):
                continue
            if room(other) in BACKENDS:
                assert module == "leafkernels._core.backend", f"{module} imports {other}: backends are loaded by name"
                continue
            to = floor_of[room(other)]
            assert to < floor or to == floor == SHARED_FLOOR, f"{module} imports {other}"


@pytest.mark.parametrize("package", ["integrations", "lookahead"])
def test_nothing_imports_the_plugs(package: str) -> None:
    plugs = f"leafkernels.{package}"
    for module, imported in IMPORTS.items():
        assert is_below(module, plugs) or not any(is_below(other, plugs) for other in imported), module


def test_no_import_circle() -> None:
    """Also none through what is loaded by name at run time."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(IMPORTS[module] & set(SOURCES)):
                visit(other, (*path, module))
            done.add(module)

    for module in SOURCES:
        visit(module, ())
    assert set(BACKENDS) == set(ROOMS.values())


@pytest.mark.parametrize("package", ["kernels", "eager"])
def test_the_implementations_of_an_operation_have_its_parameters(package: str) -> None:
    # One gradient for research, and what PyTorch does in five cheap steps.
    missing = {"kernels": {"span_values_backward"}, "eager": {"regular_layout"}}[package]
    for name, (stem, declaration) in OPERATIONS.items():
        if stem and name not in missing:
            found = inspect.signature(getattr(importlib.import_module(f"leafkernels.{package}.{stem}"), name))
            expected = list(inspect.signature(declaration).parameters)
            assert list(found.parameters) == expected, f"leafkernels.{package}.{stem}.{name}"


def test_a_fresh_process_loads_little() -> None:
    """No trainer, no command, no backend before it is called for: a training loop pays for what it uses."""
    unwanted = ["python_ref", "rich", "jinja2", "transformers", "trl", "verl", "accelerate", "triton.compiler"]
    unwanted += [f"leafkernels.{name}" for name in (*BACKENDS, "integrations", "command", "lookahead", "models")]
    code = f"import sys, leafkernels; print(sorted(set({unwanted}) & set(sys.modules)))"
    assert run_python("-c", code).stdout.strip() == "[]"


def test_the_core_runs_without_the_rest() -> None:
    """Credit, losses and vocabulary where neither the sub-packages of other uses nor what these need is installed."""
    absent = ["transformers", "trl", "verl", "datasets", "peft", "safetensors", "accelerate", "rich", "jinja2", "numpy"]
    absent += [f"leafkernels.{name}" for name in ("integrations", "command", "lookahead", "models")]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
import torch, leafkernels
ids, logits = torch.tensor([[1, 2], [1, 3]]), torch.zeros(2, 2, 4)
found = leafkernels.surprisal_entropy(logits, ids)
advantages = leafkernels.tree_td(found.logprobs, ids, torch.tensor([1.0, 0.0]))
mask = torch.ones(2, 2)
print(leafkernels.policy_loss(found.logprobs, found.logprobs, advantages, mask).loss.item())
"""
    assert float(run_python("-W", "ignore", "-c", code).stdout) == 0.0


# ---- what every plug has in common


@pytest.mark.parametrize("name", ["trl", "verl"])
def test_without_its_trainer_a_plug_says_what_to_install(name: str) -> None:
    code = f"import sys; sys.modules['{name}'] = None; import leafkernels.integrations.{name}"
    run = run_python("-c", code, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: leafkernels.integrations.{name} needs ")
    assert last.endswith(f"pip install 'leafkernels[{name}]'")


@pytest.mark.parametrize("name", ["trl", "trl_async", "trl_audio", "trl_distillation"])
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


# ---- the API reference is the docstrings: they describe every argument, and their examples print what they show


PUBLIC: dict[str, Any] = {
    name: getattr(module, name)
    for module in (
        leafkernels,
        leafkernels.distributed,
        leafkernels.integrations.layouts,
        leafkernels.lookahead,
        leafkernels.models,
    )
    for name in module.__all__
}
FOLDERS = ("leafkernels.credit.", "leafkernels.vocabulary.", "leafkernels.losses.")
FUNCTIONS = [
    value
    for name, value in vars(leafkernels).items()
    if name in leafkernels.__all__ and inspect.isfunction(value) and value.__module__.startswith(FOLDERS)
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_example_of_a_docstring(function: Callable[..., Any]) -> None:
    names: dict[str, Any] = {"torch": torch, "leafkernels": leafkernels}
    assert pages.check_examples(inspect.getdoc(function) or "", names, function.__name__) >= 1


def described(name: str, seen: tuple[str, ...] = ()) -> set[str]:
    """Arguments that a docstring describes: in its ``Args:``, in its text, or by the name of another function."""
    text = inspect.getdoc(PUBLIC[name]) or ""
    section = re.split(r"^\S", text.partition("\nArgs:\n")[2], maxsplit=1, flags=re.M)[0]
    found = {key for keys in re.findall(r"^    (\w+(?:, \w+)*): ", section, re.M) for key in keys.split(", ")}
    quoted = set(re.findall(r"``(\w+)\b", text))
    for other in quoted & set(PUBLIC) - {name, *seen}:
        found |= described(other, (*seen, name))
    return found | quoted


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isfunction(value)])
def test_every_argument_is_described(name: str) -> None:
    arguments = inspect.signature(PUBLIC[name]).parameters.values()
    named = {argument.name for argument in arguments if argument.kind is not argument.VAR_KEYWORD}
    assert named - described(name) == set()


def test_every_public_name_is_on_one_page_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocstrings_handlers.python", reason="needs mkdocstrings: pip install -e '.[docs]'")
    monkeypatch.syspath_prepend(str(pages.ROOT / "docs"))
    hooks = importlib.import_module("hooks")
    monkeypatch.delitem(sys.modules, "hooks")
    texts = hooks.api_pages()
    on_pages = re.findall(r"^::: ([\w.]+)$", "\n".join(texts.values()), re.M)
    names = []
    for path in on_pages:
        if re.match(r"leafkernels\.integrations\.(trl|speech_rewards|verl)", path):  # plugs of one trainer
            continue
        shown_whole = path in ("leafkernels.distributed", "leafkernels.integrations.layouts")
        names += sys.modules[path].__all__ if shown_whole else [path.rpartition(".")[2]]
    assert sorted(names) == sorted(PUBLIC)
    navigation = (pages.ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"api/{re.sub('[^a-z]+', '_', title.lower())}.md" in navigation for title in texts)
