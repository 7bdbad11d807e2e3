"""Compile every kernel for real GPUs, without one, and read what the compiler made of it.

    python tests/aot.py [NAME]     prints the table, of the kernels whose names begin so

Registers, spills, stack, width of the widest access, exponentials, programs that a multiprocessor's registers allow;
what ``ptx_counts.py`` counts when it executes the kernel as compiled for sm_90; and for each hot loop the instructions
and the bytes of one element, and a prediction for four GPUs. A multiprocessor issues at most 128 lane-instructions a
clock, of which three quarters is what to count on, so that beside

    memory time = bytes / copy bandwidth       stands       issue time = slots / (3/4 * 128 * processors * clock)

and the longer of the two decides: "memory" where it is the first, else the share of the copy's rate that is left. It is
a prediction from counts and data sheets, not a measurement: of latency, caches and occupancy it knows nothing.

Triton's interpreter must be off (the kernels of an interpreted process cannot be compiled), so tests run this as a
program.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
    segments,
    surprisal,
    values,
)
from leafkernels.kernels.policy_loss import BLOCK as LOSS_BLOCK
from leafkernels.kernels.policy_loss import NUM_WARPS as LOSS_WARPS
from leafkernels.kernels.policy_loss import _policy_loss_kernel
from leafkernels.kernels.policy_loss_from_logits import (
    SCALE_BLOCK,
    _policy_loss_from_logits_kernel,
    _scale_gradient_kernel,
)

ARCHITECTURES = (80, 90, 100)


class GPU(NamedTuple):
    """Multiprocessors, clock (Hz) and copy bandwidth (bytes a second) that such cards are reported to reach."""

    name: str
    arch: int
    processors: int
    clock: float
    copy: float


GPUS = (
    GPU("A100", 80, 108, 1.41e9, 1.8e12),
    GPU("H100", 90, 132, 1.75e9, 3.0e12),
    GPU("H200", 90, 132, 1.75e9, 4.3e12),
    GPU("B200", 100, 148, 1.85e9, 7.0e12),
)
ISSUED = 0.75  # of the clocks, in a loop that waits for nothing


class Case(NamedTuple):
    """A kernel, the types of its arguments in order (None: compiled away), and its compile-time constants."""

    name: str
    kernel: Any
    types: str
    constants: dict[str, Any]
    contiguous: bool
    """Whether it streams tokens, so that wide loads (or stores) are expected."""


_COLUMNS = "*i64 *i64 {scores} {mask} *i64 *i64 *i64 *i64 i32 i32"
_SCATTER = "*fp32 *fp64 *i32 {mask} *i64 *i64 *i64 i32 i32 i32"
_TILES = {"ENTRIES": sampling_mask.ENTRIES, "COLUMNS": sampling_mask.COLUMNS, "UNIT": 16}

CASES = [
    Case("regular_layout", find._regular_layout_kernel, "*i64 *i64 *i64 *i64 *i64 i32 i32 i32", {"BLOCK": 256}, False),
    Case("mask_stretches", find._mask_stretches_kernel, "*i64 *i64 *i1 *i64 *i64 i32", {"BLOCK": 2048}, True),
    *(
        Case(
            f"column_maxima {scores} {'mask' if mask == '*i1' else 'no mask'}",
            boundaries._column_maxima_kernel,
            _COLUMNS.format(scores=scores, mask=mask),
            {"NEGATE": True, "HAS_MASK": mask == "*i1", "BLOCK": 1024},
            True,
        )
        for scores in ("*fp32", "*bf16", "*fp16")
        for mask in ("*i1", "None")
    ),
    Case(
        "select_boundaries",
        boundaries._select_boundaries_kernel,
        "*i32 *i64 *i64 *i64 *i64 *i64 i32",
        {"NUM_BOUNDARIES": 4, "BLOCK_B": 4, "BLOCK": 1024},
        False,
    ),
    *(
        Case(
            f"compare_pairs {ids}",
            prefix_lengths._compare_pairs_kernel,
            f"*i32 None {ids} *i64 *i64 *i64 *i64 *i64 *i64 *i64 i32 i32",
            {"HAS_LIMIT": True, "HAS_START": True, "COUNT": False, "BLOCK": 512},
            True,
        )
        for ids in ("*i64", "*i32")
    ),
    Case(
        "represent",
        prefix_lengths._represent_kernel,
        "*i32 *i32 *i32 *i64 *i64 *i64 *i64 i32",
        {"HAS_START": True, "BLOCK": 128},
        False,
    ),
    *(
        Case(
            f"first_mismatch {ids}",
            prefix_lengths._first_mismatch_kernel,
            f"*i32 None *i32 *i32 {ids} *i64 *i64 *i64 *i64 i32",
            {"HAS_LIMIT": True, "COUNT": False, "BLOCK": 1024},
            True,
        )
        for ids in ("*i64", "*i32")
    ),
    *(
        Case(
            f"refine_ties {ids}{'' if to_the_end else ' once'}",
            prefix_lengths._refine_ties_kernel,
            f"*i32 *i32 *i32 *i64 None {ids} *i64 *i64 *i64 *i64 *i64 *i64 i32",
            {
                "COMPARE_FIRST": False,
                "TO_THE_END": to_the_end,
                "HAS_LIMIT": True,
                "HAS_START": True,
                "COUNT": False,
                "BLOCK_TOKENS": 128,
                "BLOCK_ROWS": 16,
                "BLOCK_TIES": 64,
                "num_warps": 8,
            },
            False,
        )
        for ids, to_the_end in (("*i64", True), ("*i32", True), ("*i64", False))
    ),
    Case(
        "prefix_table",
        prefix_lengths._prefix_table_kernel,
        "*i32 *i32 *i32 *i64 *i64 *i64 *i64 *i64 i32",
        {"HAS_LIMIT": True, "BLOCK": 128},
        False,
    ),
    Case(
        "order_rows",
        prefix_tree._order_rows_kernel,
        "*i64 *i64 *i32 *i32 *i64 *i64 *i64 *i64 *i64",
        {"BLOCK": 128},
        False,
    ),
    *(
        Case(
            f"tree_nodes {ids}",
            prefix_tree._tree_nodes_kernel,
            f"{ids} *i64 *i64 *i64 *i64 *i64 {ids} *i64 *i64 *i64 *i64 *i64 *i64 i32 i32 i32 i32",
            {"BLOCK": 256},
            False,
        )
        for ids in ("*i64", "*i32")
    ),
    Case(
        "prefix_nodes",
        nodes._prefix_nodes_kernel,
        "*i64 *i32 *i32 *i64 *i64 *i64 *i64 i32",
        {"NUM_BOUNDARIES": 4, "BLOCK_B": 4, "BLOCK": 32, "num_warps": 1},
        False,
    ),
    Case(
        "span_values",
        values._span_values_kernel,
        "*fp64 *i32 *i32 *fp64 *fp64 *fp32 *i64 *i32 *i64 *i64 *i64 *i64",
        {
            "NUM_SLOTS": 5,
            "USE_GLOBAL": True,
            "USE_LOCAL": True,
            "MULTIPLICITY_POWER": 0.5,
            "LEAVE_ONE_OUT": True,
            "BLOCK_S": 8,
            "BLOCK": 32,
            "num_warps": 1,
        },
        False,
    ),
    *(
        Case(
            f"normalize_spans {name}",
            values._normalize_spans_kernel,
            "*fp64 *fp64 *i32 *fp64 *i64 *i64 i32",
            {
                "WHOLE_CALL": name == "batch",
                "BY_REWARD_STD": name == "reward_std",
                "NUM_SLOTS": 5,
                "BLOCK_S": 8,
                "BLOCK": 64,
                "num_warps": 4 if name == "batch" else 1,
            },
            False,
        )
        for name in ("span", "batch", "reward_std")
    ),
    *(
        Case(
            f"scatter_spans {'mask' if mask == '*i1' else 'no mask'}",
            scatter._scatter_spans_kernel,
            _SCATTER.format(mask=mask),
            {"HAS_MASK": mask == "*i1", "BLOCK": 1024},
            True,
        )
        for mask in ("*i1", "None")
    ),
    *(
        Case(
            f"surprisal_states {logits}",
            surprisal._surprisal_states_kernel,
            f"*fp32 *fp32 {logits} *i64 *fp64 *i1 i32 i32 i32 i32 i32",
            {
                "HAS_MASK": True,
                "BLOCK": surprisal.BLOCK,
                "THREADS": surprisal.THREADS,
                "num_warps": surprisal.num_warps(),
            },
            True,
        )
        for logits in ("*fp32", "*bf16", "*fp16")
    ),
    Case(
        "merge_surprisal_states",
        surprisal._merge_surprisal_states_kernel,
        "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp64 *i1 i32 i32",
        {"HAS_MASK": True, "ROWS": surprisal.ROWS, "SPLITS": surprisal.MAX_SPLITS},
        False,
    ),
    *(
        Case(
            f"surprisal_entropy_backward {logits}{'' if with_entropy else ' no entropy'}",
            surprisal._surprisal_entropy_backward_kernel,
            f"{logits} *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 {logits} *i64 *fp64 *i1 fp32 i32 i32 i32 i32",
            {
                "HAS_ENTROPY": with_entropy,
                "HAS_MASK": True,
                "HAS_SOFTCAP": False,
                "BLOCK": surprisal.BLOCK,
                "num_warps": surprisal.num_warps(),
            },
            True,
        )
        for logits in ("*fp32", "*bf16")
        for with_entropy in (True, False)
    ),
    *(
        Case(
            f"divergence_sums {logits} {kind}",
            divergence._divergence_sums_kernel,
            f"*fp32 {logits} {logits} *fp32 *i1 fp32 i32 i32 i32 i32 i32 i32",
            {
                "KIND": number,
                "HAS_MASK": True,
                "BLOCK": divergence.BLOCK,
                "THREADS": divergence.THREADS,
                "num_warps": divergence.THREADS // 32,
            },
            True,
        )
        for logits in ("*fp32", "*bf16")
        for kind, number in divergence.KINDS.items()
    ),
    *(
        Case(
            f"divergence_gradient {gradients} of {logits} {kind}",
            divergence._divergence_gradient_kernel,
            f"{gradients} {logits} {logits} *fp32 *fp32 *fp32 *fp32 *fp32 *i1 fp32 fp32 i32 i32 i32 i32 i32",
            {
                "KIND": number,
                "HAS_ENTROPY": False,
                "HAS_MASK": True,
                "HAS_SOFTCAP": False,
                "BLOCK": divergence.BLOCK,
                "num_warps": divergence.THREADS // 32,
            },
            True,
        )
        for gradients, logits in (("*fp32", "*fp32"), ("*bf16", "*bf16"), ("*bf16", "*fp32"))
        for kind, number in divergence.KINDS.items()
        if logits == "*fp32" or kind == "reverse_kl"
    ),
    *(
        Case(
            f"policy_loss {logprobs} {formula}{f' {statistic}' if statistic else ''}{' packed' if packed else ''}",
            _policy_loss_kernel,
            f"*fp32 *fp32 {logprobs} {logprobs} *fp32 *i1 {logprobs} {'*fp32' if packed else 'None'} None {logprobs} "
            f"{'*i32' if packed else 'None'} {'fp32 ' * 7} {'i32 ' * 11}",
            {
                "HAS_REF": True,
                "HAS_ENTROPY": True,
                "HAS_WEIGHTS": packed,
                "HAS_PENALTIES": False,
                "PACKED": packed,
                "FORMULA": formula,
                "STATISTIC": statistic,
                "KL": "k3",
                "KL_WEIGHTED": formula == "sapo",
                "GRADIENT": True,
                "BLOCK": LOSS_BLOCK,
                "num_warps": LOSS_WARPS,
            },
            True,
        )
        for logprobs, formula, statistic, packed in (
            ("*fp32", "clip", "", False),
            ("*bf16", "clip", "", False),
            ("*fp32", "clip", "mean", False),
            ("*bf16", "clip", "mean", False),
            ("*fp32", "sapo", "", False),
            ("*fp32", "dppo_kl", "", False),
            ("*fp32", "vespo", "product", True),
            ("*fp32", "gmpo", "sides", False),
        )
    ),
    *(
        Case(
            f"fire_statistics {tokens}{' packed' if packed else ''}",
            distillation._fire_statistics_kernel,
            f"*fp64 {tokens} {tokens} {tokens} *i1 {'*i32' if packed else 'None'} {'i32 ' * 5}",
            {
                "HAS_STUDENT": True,
                "HAS_TEACHER": True,
                "PACKED": packed,
                "COLUMNS": distillation.COLUMNS,
                "BLOCK": distillation.BLOCK,
                "num_warps": distillation.STATISTICS_WARPS,
            },
            True,
        )
        for tokens, packed in (("*fp32", False), ("*fp32", True), ("*bf16", False))
    ),
    *(
        Case(
            f"fire_weights {tokens}{' base' if base else ''}{' packed' if packed else ''}",
            distillation._fire_weights_kernel,
            f"*fp32 *fp32 *i1 {tokens} {tokens} {tokens if base else 'None'} {tokens} {tokens} *i1 "
            f"{'*i32' if packed else 'None'} *i1 *fp64 *fp64 fp32 fp32 fp32 {'i32 ' * 8}",
            {
                "HAS_BASE": base,
                "HAS_STUDENT": True,
                "HAS_TEACHER": True,
                "PACKED": packed,
                "BLOCK": distillation.BLOCK,
                "num_warps": distillation.WEIGHTS_WARPS,
            },
            True,
        )
        for tokens, base, packed in (
            ("*fp32", False, False),
            ("*fp32", True, False),
            ("*fp32", False, True),
            ("*bf16", False, False),
        )
    ),
    *(
        Case(
            f"policy_loss_from_logits {logits} {formula}",
            _policy_loss_from_logits_kernel,
            f"*fp32 {logits} {logits} *i64 *fp64 *i1 *fp32 *fp32 *fp32 *fp32 "
            f"{'None' if formula == 'clip' else '*fp32'} {'fp32 ' * 7} i32 i32 i32",
            {
                "HAS_OLD": True,
                "HAS_REF": True,
                "HAS_WEIGHTS": formula != "clip",
                "FORMULA": formula,
                "KL": "k3",
                "KL_WEIGHTED": formula != "clip",
                "ENTROPY": True,
                "GRADIENT": True,
                "BLOCK": surprisal.BLOCK,
                "THREADS": surprisal.THREADS,
                "num_warps": surprisal.num_warps(),
            },
            True,
        )
        for logits, formula in (("*fp32", "clip"), ("*bf16", "clip"), ("*bf16", "sapo"), ("*bf16", "dppo_kl"))
    ),
    Case(
        "scale_gradient",
        _scale_gradient_kernel,
        "*bf16 *fp32 i32",
        {"BLOCK": SCALE_BLOCK, "num_warps": 8},
        True,
    ),
    *(
        Case(
            f"normalize_hidden {hidden} {weights}",
            reward_channel._normalize_hidden_kernel,
            f"{weights} *fp32 {hidden} {weights} fp32 i32 i32",
            {"BLOCK": reward_channel.BLOCK, "num_warps": reward_channel.NUM_WARPS},
            True,
        )
        for hidden, weights in (("*fp32", "*fp32"), ("*bf16", "*fp32"), ("*bf16", "*bf16"))
    ),
    *(
        Case(
            f"channel_state {weights} {width}",
            reward_channel._channel_state_kernel,
            f"{weights} {weights} *fp32 {weights} {weights} fp32 i32 i32 i32",
            {
                "WIDTH": width,
                "BLOCK_R": reward_channel.tile(width)[0],
                "BLOCK_C": reward_channel.tile(width)[1],
                "num_warps": reward_channel.NUM_WARPS,
            },
            False,
        )
        for weights, width in (("*fp32", 256), ("*bf16", 256), ("*fp32", 64), ("*fp32", 1024))
    ),
    Case(
        "kept_statistics",
        sampling_mask._kept_statistics_kernel,
        "*fp32 *fp32 *i64 *i64 *fp64 i32",
        {"BLOCK": sampling_mask.BLOCK, "num_warps": 1},
        False,
    ),
    Case(
        "kept_statistics_backward",
        sampling_mask._kept_statistics_backward_kernel,
        "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *i64 *i64 *fp64",
        {"HAS_ENTROPY": True, "BLOCK": sampling_mask.BLOCK, "num_warps": 1},
        False,
    ),
    *(
        Case(f"{name} {states}", kernel, types.format(x=states), {**_TILES, "num_warps": 4}, False)
        for name, kernel, types in (
            ("kept_products", sampling_mask._kept_products_kernel, "*fp32 {x} {x} *i64 *i64 *i64 i32 i32 i32 i32"),
            (
                "add_hidden_gradient",
                sampling_mask._add_hidden_gradient_kernel,
                "{x} *fp32 {x} {x} *i64 *i64 i32 i32",
            ),
            (
                "add_weight_gradient",
                sampling_mask._add_weight_gradient_kernel,
                "*fp32 *fp32 {x} *i64 *i64 *i64 *i64 i32 i32",
            ),
        )
        for states in ("*fp32", "*bf16")
    ),
    Case(
        "running_sums",
        segments._running_sums_kernel,
        "*fp64 *fp64 *i64 *i64 i32",
        {"STRETCH": segments.STRETCH, "FIRST": segments.FIRST, "TILE": segments.TILE},
        False,
    ),
    Case(
        "gather_spans",
        scatter._gather_spans_kernel,
        "*fp64 *fp32 *i32 *i1 *i64 *i64 *i64 i32 i32 i32",
        {"HAS_MASK": True, "BLOCK": 1024},
        True,
    ),
]


class Compiled(NamedTuple):
    """What the assembler says of one kernel on one architecture."""

    name: str
    arch: int
    registers: int
    programs: int
    """That fit on a multiprocessor at a time, as far as its registers and warps go."""
    spills: int
    stack: int
    widest: int
    """Bytes of the widest access to global memory of one thread."""
    contiguous: bool
    specialised: list[str]
    """Integer arguments whose value may compile the kernel anew."""
    exponentials: float
    """Exponentials for each element, in all hot loops together."""
    waits: int
    """Barriers and exchanges between threads in the hot loops."""
    loops: list[tuple[float, float]]
    """Of each hot loop: issue slots, and bytes of global memory accessed, for each element of a block."""


def hot_loops(sass: str) -> list[list[str]]:
    """The instructions of each loop, along the shortest way from its head back to it: the fast branch where two are."""
    code = [(int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    line_of = {at: i for i, (at, _) in enumerate(code)}
    next_lines: list[list[int]] = []
    for i, (_, text) in enumerate(code):
        # Who is predicated may do nothing; a branch may name its predicate behind the operation too.
        predicate, operation = re.match(r"(@!?U?P\w+ )?(.*)", text).groups()  # type: ignore[union-attr]
        may_pass = bool(predicate) or re.match(r"BRA(\.\w+)* !?U?P\d", operation)
        jump = re.match(r"BR[AX]\b.*?0x([0-9a-f]+)", operation)
        leaves = operation.startswith(("BRA", "BRX", "EXIT", "RET"))
        ways = [line_of[int(jump[1], 16)]] if jump and int(jump[1], 16) in line_of else []
        if (may_pass or not leaves) and i + 1 < len(code):
            ways.append(i + 1)
        next_lines.append(ways)
    found = []
    for end, ways in enumerate(next_lines):
        head = ways[0] if ways else end + 1
        if head > end - 12:  # forward, or waiting for something
            continue
        came_from = {head: head}
        queue = deque([head])
        while queue and end not in came_from:
            at = queue.popleft()
            for line in next_lines[at]:
                if head < line <= end and line not in came_from:
                    came_from[line] = at
                    queue.append(line)
        if end in came_from:
            way = [end]
            while way[-1] != head:
                way.append(came_from[way[-1]])
            found.append([code[i][1] for i in reversed(way)])
    return found


def _accesses(instructions: list[str] | str) -> list[int]:
    """Bytes of each access of a thread to global memory."""
    text = instructions if isinstance(instructions, str) else "\n".join(instructions)
    widths = re.findall(r"\b(?:LDG|STG)\.E(?:\.(?!U8|S8|U16|S16|64|128)\w+)*(?:\.(U8|S8|U16|S16|64|128)\b)?", text)
    return [{"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}.get(width, 4) for width in widths]


def predicted_share(slots: float, bytes_moved: float, gpu: GPU) -> float:
    """Of the copy bandwidth, by issue slots and bytes of an element; 1 where memory is the bound."""
    budget = gpu.processors * 128 * gpu.clock * bytes_moved / gpu.copy
    return min(1.0, ISSUED * budget / slots)


def assemble(case: Case, arch: int) -> tuple[str, str, list[str]]:
    """The assembler's account of a kernel's resources, its machine code, and its specialised integer arguments."""
    constants = dict(case.constants)
    options = {"num_warps": constants.pop("num_warps", 4)}
    names = case.kernel.arg_names
    types = dict(zip(names, case.types.split(), strict=False))
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(names):
        if name in constants or types.get(name) == "None":
            signature[name] = "constexpr"
            constexprs[(index,)] = constants.get(name)
        else:
            signature[name] = types[name]
            if types[name].startswith("*"):
                attributes[(index,)] = [["tt.divisibility", 16]]  # what PyTorch's allocator guarantees
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    is_integer = {name for name, kind in signature.items() if kind in ("i32", "i64")}
    return usage, sass, [p.name for p in case.kernel.params if p.name in is_integer and not p.do_not_specialize]


def compile_case(case: Case, arch: int) -> Compiled:
    """Compile one kernel for ``sm_<arch>`` and read its resources and machine code."""
    usage, sass, specialised = assemble(case, arch)
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    warps = case.constants.get("num_warps", 4)
    # Registers are given to warps, 8 for each thread at a time.
    programs = min(32, 64 // warps, 65_536 // (32 * 8 * -(-registers // 8) * warps))
    # The loops over tokens are those with the widest accesses: what others there are see to ragged ends.
    per_thread = max(1, case.constants.get("BLOCK", 1) // (32 * warps))
    ways = hot_loops(sass) if case.contiguous else []
    widest_of_loops = max((width for way in ways for width in _accesses(way)), default=0)
    ways = [way for way in ways if widest_of_loops in _accesses(way)]
    exponentials = sum(line.split()[0] == "MUFU.EX2" for way in ways for line in way) / per_thread
    return Compiled(
        name=case.name,
        arch=arch,
        registers=registers,
        programs=programs,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        stack=stack,
        widest=max(_accesses(sass)),
        contiguous=case.contiguous,
        specialised=specialised,
        exponentials=exponentials,
        waits=sum(line.split()[0].split(".")[0] in ("BAR", "SHFL", "REDUX") for way in ways for line in way),
        loops=[(round(len(way) / per_thread, 2), sum(_accesses(way)) / per_thread) for way in ways],
    )


def _cuobjdump(flag: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout


def executed(names: tuple[str, ...]) -> dict[str, Any]:
    """What ``ptx_counts.py`` counts of each kernel, in a process and with a cache where nothing is assembled."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, str(Path(__file__).with_name("ptx_counts.py")), "--json", *names]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return {row["kernel"]: row for row in json.loads(run.stdout)}


def main() -> None:
    """Print the table, or one JSON object for each line of it with --json."""
    as_json = "--json" in sys.argv[1:]
    names = tuple(argument for argument in sys.argv[1:] if argument != "--json")
    counts = {} if as_json else executed(names)
    if not as_json:
        print(f"{'kernel':46} {'arch':>6} registers programs spills stack widest access exp2/element")
    for case in CASES:
        if names and not case.name.startswith(names):
            continue
        for arch in ARCHITECTURES:
            row = compile_case(case, arch)
            if as_json:
                print(json.dumps(row._asdict()), flush=True)
                continue
            print(
                f"{row.name:46} sm_{row.arch:<3} {row.registers:9} {row.programs:8} {row.spills:6} {row.stack:5} "
                f"{row.widest:11} B {row.exponentials:12.2f}",
                flush=True,
            )
            if arch == 90 and (count := counts.pop(case.name.split()[0], None)):
                print(
                    f"{'':12}executed: {count['instructions']:g} instructions of PTX each {count['element']}, "
                    f"{count['asked']:g} bytes asked for and {count['moved']:g} moved in sectors"
                )
            for slots, bytes_moved in row.loops:
                print(f"{'':12}loop: {slots:.1f} slots and {bytes_moved:g} bytes an element;", end=" predicted: ")
                shares = ((gpu, predicted_share(slots, bytes_moved, gpu)) for gpu in GPUS if gpu.arch == arch)
                print(
                    *(f"{gpu.name} {'memory' if x == 1 else f'instructions, {x:.0%}'}" for gpu, x in shares), sep="; "
                )


if __name__ == "__main__":
    main()
