"""What the whole pipeline takes beside its result: launches, and memory for each token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import DEVICE, random_group
from support import run_python
from torch.utils._python_dispatch import TorchDispatchMode

import leafkernels
from leafkernels.kernels import prefix_lengths
from leafkernels.lookahead import RewardChannel

SMALL = ["compare_pairs"]
LARGE = ["represent", *["first_mismatch", "refine_ties"] * 2, "prefix_table"]

# Operations of PyTorch that launch nothing.
_FREE = ("empty", "view", "slice", "select", "expand", "unsqueeze", "reshape", "as_strided", "detach", "alias")


class _Launches(TorchDispatchMode):
    """PyTorch's operations outside of ours, those that only allocate or view left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        if not name.startswith("leafkernels.") and not any(free in name for free in _FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def kernels_launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that Triton's interpreter appends the name of every kernel to."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    launch = GridExecutor.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__.removeprefix("_").removesuffix("_kernel"))
        with torch.utils._python_dispatch._disable_current_modes():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", noted)
    return names


# In each layout the launches of PyTorch, for named groups and packed rows, and NaN rewards; beside them
# a kernel lays out regular rows, and one or more are every box of the picture.
LAYOUTS = {"padded": 2, "mask": 2, "groups": 12, "packed": 6, "packed mask": 5}


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what Triton's interpreter launches")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_large", [False, True])
def test_number_of_launches(is_large: bool, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group: dict[str, Any] = random_group(8, 40, seed=1, vocabulary=2)
    options: dict[str, Any] = {"groups": torch.arange(8) % 3} if layout == "groups" else {"group_size": 4}
    if layout.startswith("packed"):
        group = {name: tensor.flatten() for name, tensor in group.items()}
        options["cu_seqlens"] = torch.arange(0, 321, 40, dtype=torch.int32)
    if "mask" in layout:
        options["response_mask"] = torch.ones_like(group["token_ids"], dtype=torch.bool)
    if is_large:
        monkeypatch.setattr(prefix_lengths, "FEW_TOKENS", 0)
    for module in ("leafkernels.rows.find", "leafkernels._core.checks"):  # as for CUDA tensors
        monkeypatch.setattr(f"{module}.values_readable", lambda _: False)
    kernels = kernels_launched(monkeypatch)
    with _Launches() as launches:
        leafkernels.span_advantages(**group, **options, backend="triton")
    assert kernels == [
        "regular_layout",
        *(["mask_stretches"] if "mask" in layout else []),
        *["column_maxima", "select_boundaries"],
        *(LARGE if is_large else SMALL),
        *["prefix_nodes", "span_values", "normalize_spans", "scatter_spans"],
    ]
    assert len(launches.names) == LAYOUTS[layout], launches.names


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what Triton's interpreter launches")
def test_number_of_launches_of_a_prefix_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel over the rows and one over the tokens after the refinement; in PyTorch what is a number for a row."""
    for module in ("leafkernels.rows.find", "leafkernels._core.checks"):  # as for CUDA tensors
        monkeypatch.setattr(f"{module}.values_readable", lambda _: False)
    token_ids = random_group(8, 40, seed=1)["token_ids"]
    kernels = kernels_launched(monkeypatch)
    with _Launches() as launches:
        leafkernels.prefix_tree(token_ids, backend="triton")
    assert kernels == ["regular_layout", *LARGE[:-1], "order_rows", "tree_nodes"]
    # Lengths in order, what each row adds, their sum, its starts, and the one number that is read back.
    assert len(launches.names) == 6, launches.names


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what Triton's interpreter launches")
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_number_of_launches_of_a_loss(importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel over the tokens forward, and in PyTorch a product of them backward; all else is a number for a row."""
    logprobs = torch.zeros(4, 40, requires_grad=True)
    mask = torch.ones(4, 40, dtype=torch.bool)
    kernels = kernels_launched(monkeypatch)
    with _Launches() as launches:
        loss = leafkernels.policy_loss(
            logprobs, -torch.ones(4, 40), -torch.ones(4, 40), mask, importance=importance, backend="triton"
        ).loss
        torch.autograd.grad(loss, logprobs)
    assert kernels == ["policy_loss"]
    assert len(launches.names) <= 20, launches.names


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what Triton's interpreter launches")
@pytest.mark.parametrize("packed", [False, True])
def test_number_of_launches_of_distillation(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels over the tokens; between them PyTorch reads a few numbers a row, without a synchronisation."""
    tokens = [torch.rand(160 if packed else (4, 40)) for _ in range(4)]
    mask = torch.ones_like(tokens[0], dtype=torch.bool)
    offsets = torch.tensor([0, 40, 80, 160], dtype=torch.int32) if packed else None
    monkeypatch.setattr("leafkernels.rows.find.values_readable", lambda _: False)  # as for CUDA tensors
    kernels = kernels_launched(monkeypatch)
    with _Launches() as launches:
        leafkernels.fire_opd(*tokens, mask, cu_seqlens=offsets, backend="triton")
    assert kernels == ["fire_statistics", "fire_weights"]
    assert len(launches.names) <= 60, launches.names
    assert not {"_local_scalar_dense", "nonzero"} & set(launches.names)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what Triton's interpreter launches")
@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_launches_of_a_reward_channel(
    dtype: torch.dtype, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of layers: a copy, the two kernels and their product, and the head."""
    channel, hidden = RewardChannel(layers, 8, width=4), [torch.ones(2, 1, 8, dtype=dtype)] * (layers + 1)
    kernels = kernels_launched(monkeypatch)
    with _Launches() as launches:
        channel.fused(hidden, backend="triton")
    assert kernels == ["normalize_hidden", "channel_state"]
    # The last hidden state is brought to the dtype of the head.
    cast = [] if dtype == torch.float32 else ["_to_copy"]
    # The batched product stands within the operation.
    assert [name for name in launches.names if name not in ("t", "transpose")] == ["stack", *cast, "cat", "mm"]
    with _Launches() as by_layer, torch.enable_grad():
        channel(hidden)
    assert len(by_layer.names) > 5 * layers


# Of a process of its own: its peak before and after. Memory that is only asked for counts, because it is filled.
# What the kernels compute does not matter here, and under the interpreter would take minutes.
MEMORY = """
import os, re, sys
import torch
backend, kind, layout, *size = sys.argv[1:]
rows, tokens, group, boundaries = map(int, size or (128, 8192, 128, 4))
if backend == "triton":
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.interpreter import GridExecutor
    GridExecutor.__call__ = lambda *args, **kwargs: None
    torch.use_deterministic_algorithms(True, warn_only=True)
import leafkernels
from leafkernels.eager import prefix_lengths
torch.set_num_threads(1)

def peak():
    # Not getrusage: what that says begins with the peak of the process that started this one.
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])

def call(rows, tokens):
    # In place, so that no peak of the inputs hides that of the call.
    ids = torch.empty((rows, tokens), dtype=torch.int64).random_(50_000)
    if kind != "random":
        ids[1:] = ids[0]
    if kind == "comb":
        for i in range(rows):
            ids[i, i * tokens // rows :] = i
    logprobs, rewards = torch.rand(rows, tokens).neg_(), torch.rand(rows)
    options = {"group_size": min(rows, group)}
    if layout == "mask":
        options["response_mask"] = torch.ones(rows, tokens, dtype=torch.uint8)
        options["response_mask"][::2, :5] = 0
    if layout == "groups":
        options = {"groups": torch.arange(rows) % 3}
    if layout == "pairs":
        options["group_size"] = 2
    if layout == "packed":
        ids, logprobs = ids.flatten(), logprobs.flatten()
        options["cu_seqlens"] = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32)
    before = peak()
    leafkernels.span_advantages(logprobs, ids, rewards, num_boundaries=boundaries, **options, backend=backend)
    return (peak() - before) * 1024 / ids.numel()

few, prefix_lengths._FEW_TOKENS = prefix_lengths._FEW_TOKENS, 0
call(4, 64)
prefix_lengths._FEW_TOKENS = few
print(call(rows, tokens))
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="measures the memory of a CPU")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of a process's peak memory")
@pytest.mark.parametrize(
    ("backend", "kind", "layout"),
    [
        ("torch", "random", "padded"),
        ("torch", "identical", "mask"),
        ("torch", "comb", "packed"),
        ("torch", "comb", "groups"),
        ("torch", "random", "pairs"),
        ("triton", "comb", "mask"),
        ("triton", "comb", "packed"),
        ("triton", "comb", "groups"),
        ("triton", "random", "pairs"),
    ],
)
def test_memory_for_each_token(backend: str, kind: str, layout: str) -> None:
    """128 rows of 8,192 tokens: at most 16 bytes for each, beside the result's 4."""
    check_memory(16, backend, kind, layout)


@pytest.mark.skipif(DEVICE == "cuda", reason="measures the memory of a CPU")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of a process's peak memory")
@pytest.mark.parametrize("kind", ["random", "comb"])
@pytest.mark.parametrize(
    ("rows", "tokens", "group", "boundaries"),
    [(4096, 64, 64, 2), (512, 256, 64, 8), (1024, 200, 1024, 2), (4096, 512, 4096, 2)],
)
def test_memory_of_large_groups_of_short_rows(rows: int, tokens: int, group: int, boundaries: int, kind: str) -> None:
    """A few numbers for each row and boundary weigh more there; one for each pair of rows would fill gigabytes."""
    check_memory(24, "torch", kind, "padded", rows, tokens, group, boundaries)


def check_memory(most: int, *arguments: str | int) -> None:
    """The least of up to three processes: where the system puts their memory, and what it keeps of it, differs."""
    tried: list[float] = []
    while len(tried) < 3 and not any(taken < most + 4 for taken in tried):
        tried.append(float(run_python("-c", MEMORY, *arguments, OMP_NUM_THREADS="1").stdout))
    assert 3 < min(tried) < most + 4, f"{tried} bytes a token"


@pytest.mark.parametrize(("rows", "tokens"), [(1024, 200), (3, 131_072)])
def test_large_groups_and_long_rows(rows: int, tokens: int) -> None:
    """Halves of a group share all but their last token, which makes the mean of a half what a span earns."""
    ids = torch.arange(tokens, device=DEVICE).repeat(rows, 1)
    half = torch.arange(rows, device=DEVICE) % 2
    ids[:, 0] = half
    ids[:, -1] = torch.arange(rows, device=DEVICE) + tokens
    logprobs = torch.zeros(rows, tokens, device=DEVICE)
    logprobs[:, tokens // 2] = -1.0
    rewards = torch.arange(float(rows), device=DEVICE)
    found = leafkernels.span_advantages(
        logprobs, ids, rewards, num_boundaries=1, normalize="none", multiplicity_power=0.0
    )
    means = torch.stack([rewards[half == name].double().mean() for name in (0, 1)])
    is_alone = torch.bincount(half, minlength=2)[half] < 2
    half_mean = means[half]
    # Global and local term are the same for the first span; the tail's are against the group and against the half.
    head = torch.where(is_alone, 2 * (rewards - rewards.double().mean()), 2 * (half_mean - rewards.double().mean()))
    tail = torch.where(is_alone, head, 2 * rewards - rewards.double().mean() - half_mean)
    place = torch.arange(tokens, device=DEVICE)
    expected = torch.where(place < tokens // 2, head[:, None], tail[:, None])
    torch.testing.assert_close(found, expected.float(), rtol=2e-7, atol=1e-8)


def _peak(call: Callable[[], torch.Tensor]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    return (torch.cuda.max_memory_allocated() - before) / result.numel()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("layout", ["padded", "mask", "packed"])
def test_memory_for_each_token_on_a_gpu(layout: str) -> None:
    group: dict[str, Any] = random_group(128, 8192, seed=1)
    options: dict[str, Any] = {}
    if layout == "mask":
        options["response_mask"] = torch.ones_like(group["token_ids"])
    if layout == "packed":
        group = {name: tensor.flatten() for name, tensor in group.items()}
        options["cu_seqlens"] = torch.arange(0, (1 << 20) + 1, 8192, dtype=torch.int32, device=DEVICE)
    leafkernels.span_advantages(**group, **options)
    assert _peak(lambda: leafkernels.span_advantages(**group, **options)) <= 16 + 4


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_more_tokens_than_int32_counts_on_a_gpu() -> None:
    """Every kernel behind the 2**31st element of a packed batch gives what it gives to those rows alone."""
    rows, tokens = 66, 1 << 25
    total = rows * tokens
    needed = total * (1 + 4 + 8 + 4) + (4 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free device memory")
    group = random_group(2, 3000, seed=3)
    ids = torch.zeros(total, dtype=torch.uint8, device=DEVICE)
    logprobs = torch.zeros(total, device=DEVICE)
    bounds = torch.arange(rows + 1, device=DEVICE) * tokens
    for i, row in enumerate((rows - 2, rows - 1)):
        at = row * tokens
        ids[at : at + 3000] = (group["token_ids"][i] % 251).to(torch.uint8)
        logprobs[at : at + 3000] = group["logprobs"][i]
    rewards = torch.arange(float(rows), device=DEVICE) % 7
    options: dict[str, Any] = {"num_boundaries": 2, "min_separation": 100}
    found = leafkernels.span_advantages(logprobs, ids, rewards, cu_seqlens=bounds, group_size=2, **options)
    last = slice((rows - 2) * tokens, None)
    alone = leafkernels.span_advantages(
        logprobs[last].view(2, -1), ids[last].view(2, -1), rewards[-2:], **options, backend="triton"
    )
    torch.testing.assert_close(found[last].view(2, -1), alone, rtol=0, atol=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what Triton's interpreter launches")
@pytest.mark.parametrize("trained", [False, True])
def test_kept_ids_take_two_launches_a_pass(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows and ids; one more for the gradient of the head. Nothing of the whole vocabulary is launched."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8, requires_grad=trained)
    mask = leafkernels.SamplingMask.from_lists([[1, 2, 3], [4], [5, 6], [7] * 20, [8, 39]])
    names = kernels_launched(monkeypatch)
    ids = torch.tensor([1, 4, 5, 7, 9])
    found = leafkernels.linear_surprisal_entropy(hidden, weight, ids, sampling_mask=mask, backend="triton")
    assert names == ["kept_products", "kept_statistics"]
    (found.surprisal + found.entropy).sum().backward()
    assert names[2:] == ["kept_statistics_backward", "add_hidden_gradient", *["add_weight_gradient"] * trained]


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what Triton's interpreter launches")
@pytest.mark.parametrize("linear", [False, True])
def test_a_divergence_takes_five_launches_and_one(linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of both, merged; one look at both rows; and one more for the gradient. From states, of each chunk."""
    student, teacher = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    names = kernels_launched(monkeypatch)
    if linear:
        head = torch.randn(40, 8)
        found = leafkernels.linear_divergence(student, head, teacher, head, chunk_tokens=3, backend="triton")
    else:
        found = leafkernels.divergence(student, teacher, backend="triton")
    assert names == ["surprisal_states", "merge_surprisal_states"] * 2 + ["divergence_sums"] + names[5:]
    assert len(names) == 5 * (1 + linear)
    (found.divergence + found.student_entropy).sum().backward()
    assert names[5 * (1 + linear) :] == ["divergence_gradient"] * (1 + linear)


# PyTorch's launches on 8 rows, however long, and our own for the running sums of a list.
WITH_STEPS = {"leaf": (40, 1), "grpo": (130, 4), "tree_td": (180, 1), "otb": (170, 8), "grpo with states": (175, 4)}


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what Triton's interpreter launches")
@pytest.mark.parametrize(("name", "tokens"), [*((name, 40) for name in WITH_STEPS), ("leaf", 160)])
def test_number_of_launches_with_step_rewards(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few kernels more, none that waits, and no more operations of PyTorch for longer rows."""
    group: dict[str, Any] = random_group(8, tokens, seed=1, vocabulary=2) | {"group_size": 4}
    scheme = leafkernels.ESTIMATORS[name.split()[0]]
    for module in ("leafkernels.rows.find", "leafkernels._core.checks"):  # as for CUDA tensors
        monkeypatch.setattr(f"{module}.values_readable", lambda _: False)
    kernels = kernels_launched(monkeypatch)
    scheme(**group, backend="triton")
    today = [kernel for kernel in kernels if kernel != "running_sums"]
    kernels.clear()
    more = {"states": group["token_ids"]} if "states" in name else {}
    steps = torch.rand(8, tokens)
    with _Launches() as launches:
        scheme(**group, step_rewards=steps, **more, backend="triton")
    most, sums = WITH_STEPS[name]
    assert [kernel for kernel in kernels if kernel != "running_sums"] == (["regular_layout"] if more else today)
    assert kernels.count("running_sums") == sums
    assert not {"_local_scalar_dense", "nonzero"} & set(launches.names)
    assert len(launches.names) <= most, len(launches.names)
