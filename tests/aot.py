"""Compile every kernel for real GPUs, without one, and read what the compiler made of it.

    python tests/aot.py            prints the table: registers, spills, stack, width of the widest access, exponentials

Triton's interpreter must be off (the kernels of an interpreted process cannot be compiled), so tests run this as a
program.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leafkernels.kernels import (
    boundaries,
    layout,
    loss_from_logits,
    prefix_lengths,
    scatter,
    stretches,
    surprisal,
    values,
)

ARCHITECTURES = (80, 90, 100)


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

CASES = [
    Case(
        "regular_layout", layout._regular_layout_kernel, "*i64 *i64 *i64 *i64 *i64 i32 i32 i32", {"BLOCK": 256}, False
    ),
    Case("mask_stretches", stretches._mask_stretches_kernel, "*i64 *i64 *i1 *i64 *i64 i32", {"BLOCK": 2048}, True),
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
        "span_values",
        values._span_values_kernel,
        "*fp64 *i32 *i32 *fp64 *fp64 *fp32 *i32 *i32 *i64 *i64 *i64 *i64 i32",
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
            f"policy_loss {logits}",
            loss_from_logits._policy_loss_kernel,
            f"*fp32 {logits} {logits} *i64 *fp64 *i1 *fp32 *fp32 *fp32 *fp32 fp32 fp32 fp32 fp32 i32 i32 i32",
            {
                "HAS_OLD": True,
                "HAS_REF": True,
                "ENTROPY": True,
                "GRADIENT": True,
                "BLOCK": surprisal.BLOCK,
                "THREADS": surprisal.THREADS,
                "num_warps": surprisal.num_warps(),
            },
            True,
        )
        for logits in ("*fp32", "*bf16")
    ),
    Case(
        "scale_gradient",
        loss_from_logits._scale_gradient_kernel,
        "*bf16 *fp32 i32",
        {"BLOCK": loss_from_logits.SCALE_BLOCK, "num_warps": 8},
        True,
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
    spills: int
    stack: int
    widest: int
    """Bytes of the widest access to global memory of one thread."""
    contiguous: bool
    specialised: list[str]
    """Integer arguments whose value may compile the kernel anew."""
    exponentials: float
    """Exponentials for each element of a block; what a row costs once adds one part in elements a thread."""


def compile_case(case: Case, arch: int) -> Compiled:
    """Compile one kernel for ``sm_<arch>`` and read its resources and machine code."""
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
    specialised = [p.name for p in case.kernel.params if p.name in is_integer and not p.do_not_specialize]
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    widths = [int(width or 32) // 8 for width in re.findall(r"\b(?:LDG|STG)\.E(?:\.\w+)*?(?:\.(64|128))?\b", sass)]
    per_thread = max(1, constants.get("BLOCK", 1) // (32 * options["num_warps"]))
    exponentials = len(re.findall(r"\bMUFU\.EX2\b", sass)) / per_thread
    return Compiled(case.name, arch, registers, spills, stack, max(widths), case.contiguous, specialised, exponentials)


def _cuobjdump(flag: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print the table, or one JSON object for each line of it with --json."""
    as_json = "--json" in sys.argv[1:]
    if not as_json:
        print(f"{'kernel':46} {'arch':>6} registers spills stack widest access exp2/element")
    for case in CASES:
        for arch in ARCHITECTURES:
            row = compile_case(case, arch)
            if as_json:
                print(json.dumps(row._asdict()), flush=True)
            else:
                print(
                    f"{row.name:46} sm_{row.arch:<3} {row.registers:9} {row.spills:6} {row.stack:5} {row.widest:11} B "
                    f"{row.exponentials:12.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
