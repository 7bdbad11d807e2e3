"""Triton's interpreter where there is no GPU, and uninitialised memory that cannot pass for a result."""

import gc
import importlib.util
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Tensors of tests are small, and a second thread only waits, for long where another program wants the core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Before anything imports a kernel: Triton looks at it then.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

settings.register_profile(
    "leafkernels",
    deadline=None,
    print_blob=True,
    derandomize=bool(os.environ.get("CI")),
    max_examples=20 if os.environ.get("CI") else 100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("leafkernels")


# Processes, browsers, compilers and trainers of their own.
SLOW_FILES = (
    "test_aot",
    "test_bench",
    "test_command",
    "test_distributed",
    "test_examples",
    "test_html",
    "test_launches",
    "test_prefix_lengths",
    "test_readme",
    "test_speech",
    "test_speech_leaf",
    "test_trl",
    "test_trl_audio",
    "test_trl_distillation",
    "test_trl_engines",
    "test_wheel",
)


# A minute each, in processes of their own: first, or one worker is left with them at the end.
LONG_FILES = ("test_vllm", "test_aot", "test_ptx")


def pytest_configure() -> None:
    patch_the_language_once()


def patch_the_language_once() -> None:
    """Triton's interpreter goes through all names of its language with each call of a device function, a third of the
    time of small kernels; what it puts in their places when a kernel starts holds until that ends."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, scope = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if patch is None or scope is None:  # older versions have other names
        return
    both = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda _: patch(both) if tl.core.is_builtin(tl.load) else scope()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)
    for item in items:
        # Under the interpreter a kernel takes seconds; what is worked by hand is small.
        on_triton = "triton" in item.name and "by_hand" not in item.name
        if on_triton or item.path.stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """What is there stays: the end of every training looks for garbage three times, a second among all of that."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def promised_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip what older versions of torch.compile break a graph at, such as NamedTuple._replace."""

    def skip(*_: Any, **__: Any) -> None:
        pytest.skip("torch.compile(fullgraph=True) is promised from PyTorch 2.11 on")

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        monkeypatch.setattr(torch, "compile", skip)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN (or the largest integer), so that an element that no kernel writes is seen.

    Only in deterministic mode, which also takes other ways through PyTorch than users do: for tests that ask for it.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels cross several blocks, and the PyTorch backend refines, already on small inputs."""
    from leafkernels.eager import boundaries as eager_boundaries
    from leafkernels.eager import distillation as eager_distillation
    from leafkernels.eager import divergence as eager_divergence
    from leafkernels.eager import nodes as eager_nodes
    from leafkernels.eager import prefix_lengths as eager_prefix_lengths
    from leafkernels.eager import prefix_tree as eager_prefix_tree
    from leafkernels.eager import sampling_mask as eager_sampling_mask
    from leafkernels.eager import surprisal as eager_surprisal
    from leafkernels.kernels import (
        boundaries,
        distillation,
        divergence,
        find,
        nodes,
        prefix_lengths,
        prefix_tree,
        reward_channel,
        sampling_mask,
        scatter,
        surprisal,
        values,
    )
    from leafkernels.vocabulary import divergence_ids

    monkeypatch.setattr(boundaries, "BLOCK", 4)
    monkeypatch.setattr(distillation, "BLOCK", 4)
    monkeypatch.setattr(divergence, "BLOCK", 16)
    monkeypatch.setattr(divergence, "THREADS", 2)
    monkeypatch.setattr(prefix_lengths, "FEW_TOKENS", 0)
    for name, size in {"BLOCK": 4, "BLOCK_TOKENS": 2, "BLOCK_ROWS": 2, "BLOCK_TIES": 2, "BLOCK_RANKS": 2}.items():
        monkeypatch.setattr(prefix_lengths, name, size)
    monkeypatch.setattr(prefix_tree, "BLOCK", 4)
    monkeypatch.setattr(prefix_tree, "BLOCK_RANKS", 2)
    monkeypatch.setattr(eager_prefix_tree, "_CHUNK", 4)
    monkeypatch.setattr(scatter, "BLOCK", 4)
    monkeypatch.setattr(find, "BLOCK", 4)
    monkeypatch.setattr(surprisal, "BLOCK", 16)
    monkeypatch.setattr(surprisal, "THREADS", 2)
    monkeypatch.setattr(values, "BLOCK", 2)
    # As an attribute of the package the name is the function's.
    monkeypatch.setattr(importlib.import_module("leafkernels.kernels.policy_loss"), "BLOCK", 4)
    monkeypatch.setattr(nodes, "BLOCK", 2)
    monkeypatch.setattr(reward_channel, "BLOCK", 4)
    monkeypatch.setattr(reward_channel, "MOST_COLUMNS", 2)
    monkeypatch.setattr(eager_boundaries, "_CHUNK", 0)
    monkeypatch.setattr(eager_distillation, "_CHUNK", 4)
    monkeypatch.setattr(eager_divergence, "_CHUNK", 64)
    monkeypatch.setattr(divergence_ids, "_CHUNK_BYTES", 512)
    monkeypatch.setattr(eager_boundaries, "_COLUMNS", 3)
    monkeypatch.setattr(eager_prefix_lengths, "_FEW_TOKENS", 0)
    monkeypatch.setattr(eager_prefix_lengths, "_CHUNK", 4)
    monkeypatch.setattr(eager_nodes, "_CHUNK", 4)
    monkeypatch.setattr(eager_surprisal, "_CHUNK", 64)
    monkeypatch.setattr(eager_sampling_mask, "_CHUNK", 64)
    for name, size in {"BLOCK": 16, "ENTRIES": 8, "COLUMNS": 4}.items():
        monkeypatch.setattr(sampling_mask, name, size)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside a development checkout; tests that need it skip where it is missing."""
    folder = Path(os.environ.get("LEAFKERNELS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the folder of reference data, {folder} (or $LEAFKERNELS_SHARED), which is not here")
    return folder


@pytest.fixture(scope="session")
def engines() -> Iterator[Any]:
    """Two processes on which trainers run under DDP, FSDP2 and ZeRO; they start with the first case."""
    from engines import Engines

    pairs = Engines()
    yield pairs
    pairs.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_as(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``tree_logprobs`` by one kind of plan, of which ``plan`` names some only as a choice of two."""
    module = importlib.import_module("leafkernels.models.tree_logprobs")
    choices = importlib.import_module("leafkernels.models.choose")

    def run(kind: str, *args: Any, **options: Any) -> Any:
        monkeypatch.setitem(choices._KINDS_OF_PLAN, "tree", (kind,))
        return module.tree_logprobs(*args, plan="tree", **options)

    return run
