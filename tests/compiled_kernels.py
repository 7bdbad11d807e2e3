"""Every kernel as it is compiled for a GPU, executed thread by thread on a CPU; test_ptx.py runs this as a program.

    TRITON_INTERPRET=0 python tests/compiled_kernels.py [--arch 90] [--seeds 1 2 3] [--cases NAME ...]

Prints a JSON object. Each case is executed in order, then with warps and programs interleaved by each seed; an odd seed
lets some run far ahead. ``make ptx`` runs more seeds on all architectures, and writes the table of docs/performance.md.
"""

import argparse
import contextlib
import datetime
import functools
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[str], Any]
CASES: dict[str, tuple[Run, float]] = {}


def case(tolerance: float = 0.0, **parameters: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function of the backend, with these arguments, whose results must not differ by more than that."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        name = " ".join([function.__name__, *map(str, parameters.values())])
        CASES[name] = functools.partial(function, **parameters), tolerance
        return function

    return add


def random(*shape: int, seed: int = 0) -> Tensor:
    """The same numbers on every device: that of the context."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(shape, generator=generator, device="cpu").to(torch.get_default_device())


@contextlib.contextmanager
def sizes(module: str, **values: int) -> Iterator[None]:
    """Other constants of a module of kernels for a while."""
    kernels = importlib.import_module(f"leafkernels.kernels.{module}")
    before = {name: getattr(kernels, name) for name in values}
    for name, value in values.items():
        setattr(kernels, name, value)
    yield
    for name, value in before.items():
        setattr(kernels, name, value)


def holes(rows: int, tokens: int) -> Tensor:
    """Padding on the right, a hole in each row, and one row that is empty."""
    at = torch.arange(tokens)
    mask = (at < torch.arange(tokens, tokens - 5 * rows, -5)[:, None]) & (at != 7)
    mask[rows // 2] = False
    return mask


@case()
def pairs_of_rows(backend: str) -> Any:
    import leafkernels

    ids = (random(6, 700) * 1.002).long()
    return leafkernels.common_prefix_lengths(ids, response_mask=holes(6, 700), group_size=3, backend=backend)


@case(dtype=torch.int64)
@case(dtype=torch.int32)
def rows_whose_programs_meet(backend: str, dtype: torch.dtype) -> Any:
    """Several programs look for the place where a row leaves another, and tell each other by memory."""
    import leafkernels

    ids = (torch.arange(3500) % 7).repeat(4, 1).to(dtype)
    ids[1, 1100], ids[2, 2200], ids[3, 3300] = 100, 101, 102
    with sizes("prefix_lengths", FEW_TOKENS=0):
        return leafkernels.common_prefix_lengths(ids, backend=backend)


@case(rounds=0)
@case(rounds=2)
def ties_of_rows(backend: str, rounds: int) -> Any:
    import leafkernels

    row, at = torch.arange(9)[:, None], torch.arange(12)
    ids = torch.where(at < row, at % 3, 50 + row // 2 + at)
    with sizes("prefix_lengths", FEW_TOKENS=0, ROUNDS=rounds):
        return leafkernels.common_prefix_lengths(ids, backend=backend)


@case(tile=0)
@case(tile=32)
def tree_of_rows(backend: str, tile: int) -> Any:
    """Rows that leave each other at several places, some of them the same; blocks as they are, and several a row."""
    import leafkernels

    ids = (random(6, 70) * 1.1).long()
    options = {"response_mask": holes(6, 70), "group_size": 3, "max_nodes": 420, "backend": backend}
    with sizes("prefix_tree", **({"BLOCK": tile, "BLOCK_RANKS": 2} if tile else {})):
        return leafkernels.prefix_tree(ids, **options)


@case()
def boundaries_of_groups(backend: str) -> Any:
    import leafkernels

    scores = -random(4, 1100)
    return leafkernels.select_boundaries(scores, group_size=2, num_boundaries=2, backend=backend)


@case(2e-6, normalize="span")
@case(2e-6, normalize="batch")
@case(2e-6, normalize="reward_std")
def credit(backend: str, normalize: str) -> Any:
    import leafkernels

    logprobs, rewards, ids = -random(6, 40), random(6, seed=1), (random(6, 40, seed=2) * 1.2).long()
    options = {"response_mask": holes(6, 40), "group_size": 3, "num_boundaries": 2}
    return leafkernels.span_advantages(logprobs, ids, rewards, normalize=normalize, backend=backend, **options)


@case(1e-12)
def sums_of_segments(backend: str) -> Any:
    """Of one entry, of a block, of a tile and more, beside each other."""
    from leafkernels.rows.segments import running_sums

    lengths = torch.tensor([1, 5, 16, 17, 1, 70])
    ends = lengths.cumsum(0)
    starts, lasts = (ends - lengths).repeat_interleave(lengths), (ends - 1).repeat_interleave(lengths)
    with sizes("segments", STRETCH=32, FIRST=4, TILE=32):
        return running_sums(random(110).double(), starts, lasts, 70, backend)


@case(1e-6, masked=False)
@case(1e-6, masked=True)
def spans_and_their_gradient(backend: str, masked: bool) -> Any:
    import leafkernels

    values, ends = random(2, 2).double().requires_grad_(), torch.tensor([[3, 1090], [50, 1100]], dtype=torch.int32)
    mask = holes(2, 1100) if masked else None
    tokens = leafkernels.scatter_spans(values, ends, 1100, response_mask=mask, backend=backend)
    return tokens, *torch.autograd.grad((tokens * torch.arange(1100)).sum(), values)


def rows_of_logits(dtype: torch.dtype, vocabulary: int, unaligned: bool) -> Tensor:
    """With a top that leads, a tie, and banned ids; unaligned: rows begin between two words of memory."""
    logits = (random(3, vocabulary + 3) * 9).to(dtype)
    logits[0, 30], logits[1, 8:10], logits[2, 40:45] = 30.0, 12.0, -torch.inf
    return logits[:, 1 : vocabulary + 1] if unaligned else logits[:, :vocabulary].clone()


@case(2e-5, dtype=torch.float32, vocabulary=4103, unaligned=True)
@case(1e-2, dtype=torch.bfloat16, vocabulary=4103, unaligned=False)
@case(2e-5, dtype=torch.float32, vocabulary=600, unaligned=False, block=512, threads=64)
@case(1e-2, dtype=torch.bfloat16, vocabulary=1100, unaligned=True, block=1024, threads=64)
@case(2e-5, dtype=torch.float32, vocabulary=61, unaligned=False, block=16, threads=2)
@case(2e-5, dtype=torch.float32, vocabulary=61, unaligned=True, block=16, threads=2)
@case(1e-2, dtype=torch.bfloat16, vocabulary=61, unaligned=True, block=16, threads=2)
def vocabulary(backend: str, block: int = 4096, threads: int = 256, **logits: Any) -> Any:
    """Both passes, the second once into new memory and once over the logits."""
    import leafkernels

    ids, mask, temperature = torch.tensor([30, 8, 3]), torch.tensor([True, True, True]), torch.tensor([0.7, 1.0, 2.5])
    found: list[Tensor] = []
    with sizes("surprisal", BLOCK=block, THREADS=threads):
        for in_place in (False, True):
            leaf = rows_of_logits(**logits).requires_grad_()
            given = leaf * 1.0 if in_place else leaf
            if in_place and logits["unaligned"]:
                given = torch.cat((leaf[:, :1], leaf), 1)[:, 1:]
            options = {"response_mask": mask, "temperature": temperature, "inplace_backward": in_place}
            rows = leafkernels.surprisal_entropy(given, ids, backend=backend, **options)
            loss = (rows.surprisal - 0.3 * rows.entropy).sum()
            found += [*rows, *torch.autograd.grad(loss, leaf)]
    return found


@case(4e-5, dtype=torch.float32, vocabulary=4103, unaligned=True)
@case(1e-2, dtype=torch.bfloat16, vocabulary=4112, unaligned=False)
@case(4e-5, dtype=torch.float32, vocabulary=61, unaligned=True, block=16, threads=2)
@case(1e-2, dtype=torch.bfloat16, vocabulary=608, unaligned=False, block=512, threads=64)
def divergence(backend: str, block: int = 2048, threads: int = 256, **logits: Any) -> Any:
    """Both passes of each kind, of two models of other dtypes, with a masked row, and over a few ids and the rest."""
    import leafkernels

    mask, temperature = torch.tensor([True, False, True]), torch.tensor([0.7, 1.0, 2.5])
    teacher = (random(3, logits["vocabulary"], seed=5) * 9).float()
    found: list[Tensor] = []
    with sizes("divergence", BLOCK=block, THREADS=threads):
        for kind in ("reverse_kl", "forward_kl", "jsd"):
            for top_k in (None, 4) if kind == "jsd" else (None,):
                leaf = rows_of_logits(**logits).requires_grad_()
                options = {"kind": kind, "beta": 0.3, "top_k": top_k, "response_mask": mask, "temperature": temperature}
                rows = leafkernels.divergence(leaf, teacher, backend=backend, **options)
                loss = (rows.divergence - 0.3 * rows.student_entropy).sum()
                # The forward KL is infinite where the student bans an id, and its gradient not.
                found += [rows.divergence.nan_to_num(posinf=99.0), *rows[1:], *torch.autograd.grad(loss, leaf)]
    return found


@case(2e-5, dtype=torch.float32, unaligned=True)
@case(1e-2, dtype=torch.bfloat16, unaligned=False)
def clipped_loss_from_logits(backend: str, dtype: torch.dtype, unaligned: bool) -> Any:
    import leafkernels

    leaf = rows_of_logits(dtype, 4103, unaligned)[None].requires_grad_()
    old, credit, mask = torch.tensor([[-0.1, -2.0, -7.0]]), torch.tensor([[1.0, -0.5, 2.0]]), torch.ones(1, 3) > 0
    options = {"ref_logprobs": old - 0.1, "kl_coef": 0.1, "entropy_coef": 0.02, "dual_clip": 3.0, "backend": backend}
    found = leafkernels.policy_loss_from_logits(leaf, torch.tensor([[30, 8, 3]]), old, credit, mask, **options)
    return *found, *torch.autograd.grad(found.loss * 3, leaf)


@case(2e-5, dtype=torch.float32, width=160, block=128, entries=16)
@case(2e-5, dtype=torch.float32, width=150, block=32, entries=4)
@case(2e-2, dtype=torch.bfloat16, width=160, block=128, entries=16)
def kept_ids(backend: str, dtype: torch.dtype, width: int, block: int, entries: int) -> Any:
    """Lists that blocks cut, ids that rows share, a sampled id outside, none that are kept; from both, both passes."""
    import leafkernels

    hidden, weight, bias = ((random(*size) - 0.5).to(dtype) for size in ((5, width), (90, width), (90,)))
    lists = [list(range(0, 90, 2)), [3, 3, 99, -1], [], list(range(40)), [7]]
    ids, mask = torch.tensor([30, 5, 2, 39, 7]), leafkernels.SamplingMask.from_lists(lists)
    options = {"temperature": torch.tensor([0.7, 1.0, 2.5, 1.0, 0.3]), "sampling_mask": mask, "backend": backend}
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    logits = (random(5, 90, seed=3) * 9).to(dtype).requires_grad_()
    with sizes("sampling_mask", BLOCK=block, ENTRIES=entries):
        rows = leafkernels.surprisal_entropy(logits, ids, **options)
        head = leafkernels.linear_surprisal_entropy(hidden, weight, ids, bias=bias, **options)
        loss = (rows.surprisal - 0.3 * rows.entropy + head.surprisal - 0.3 * head.entropy).sum()
        # The entropy's gradient alone is left out where nobody asks for it.
        return (
            *rows,
            *head,
            *torch.autograd.grad(loss, [logits, *leaves]),
            *torch.autograd.grad(leafkernels.surprisal_entropy(logits, ids, **options).surprisal.sum(), logits),
        )


@case(1e-5, importance="token", dtype=torch.float32)
@case(1e-5, importance="sequence", dtype=torch.float32)
@case(1e-5, importance="token", dtype=torch.bfloat16)
def clipped_loss(backend: str, importance: str, dtype: torch.dtype) -> Any:
    import leafkernels

    new, old, reference, entropy = ((-random(3, 1100, seed=seed)).to(dtype) for seed in range(4))
    new.requires_grad_()
    options = {"ref_logprobs": reference, "kl_coef": 0.1, "entropy": -entropy, "entropy_coef": 0.01, "clip": (0.2, 0.3)}
    credit, mask = random(3, 1100, seed=5) - 0.5, holes(3, 1100)
    found = leafkernels.policy_loss(new, old, credit, mask, importance=importance, backend=backend, **options)
    return *found, *torch.autograd.grad(found.loss, new)


def kinds() -> list[tuple[str, dict[str, Any]]]:
    """Every formula, with every statistic of a row, kind of KL and option of the kernel among them."""
    return [
        ("cispo", {"clip": (0.1, 0.2), "kl_kind": "k1"}),
        ("sapo", {"kl_kind": "k2", "kl_weighted": True, "max_log_ratio": 0.3}),
        ("sapo", {"importance": "sequence", "kl_kind": "abs"}),
        ("vespo", {"kl_kind": "k3+", "kl_weighted": True}),
        ("gmpo", {"clip": (0.1, 0.2), "kl_weighted": True}),
        ("dppo_tv", {"clip": (0.02, 0.03), "max_ratio": 1.2}),
        ("dppo_kl", {"clip": (0.01, 0.02)}),
        ("dro", {"beta": 0.3}),
        ("reinforce", {}),
        ("kl_cov", {"share": 0.3}),
        ("fipo", {"half_life": 3.0, "future_clip": (0.5, 0.5)}),
    ]


@case(2e-5, at=slice(0, 6), packed=False)
@case(2e-5, at=slice(6, None), packed=False)
@case(2e-5, at=slice(0, 6), packed=True)
@case(2e-5, at=slice(6, None), packed=True)
def losses_of_all_kinds(backend: str, at: slice, packed: bool) -> Any:
    import leafkernels

    new, reference = (-random(3, 1100, seed=seed) - 0.05 for seed in range(2))
    old, credit, mask = new + 0.3 * random(3, 1100, seed=2) - 0.15, random(3, 1100, seed=3) - 0.5, holes(3, 1100)
    tensors = [new, old, credit, mask, reference, random(3, 1100, seed=4)]
    layout = {}
    if packed:
        tensors = [tensor.flatten() for tensor in tensors]
        layout = {"cu_seqlens": torch.tensor([0, 1029, 1029, 3300], dtype=torch.int32)}
    new, old, credit, mask, reference, weights = tensors
    found: list[Tensor] = []
    for kind, options in kinds()[at]:
        leaf = new.clone().requires_grad_()
        options = {**options, **layout, "ref_logprobs": reference, "kl_coef": 0.1, "token_weights": weights}
        loss = leafkernels.policy_loss(leaf, old, credit, mask, kind=kind, aggregate="sum", backend=backend, **options)
        # Sums of 3,300 numbers of order 1.
        found += [*(x / 3300 if name == "loss" else x for name, x in loss._asdict().items())]
        found += torch.autograd.grad(loss.loss, leaf)
    return found


@case(2e-5, dtype=torch.float32)
def losses_of_all_kinds_from_logits(backend: str, dtype: torch.dtype) -> Any:
    import leafkernels

    old, credit, mask = torch.tensor([[-0.1, -2.0, -7.0]]), torch.tensor([[1.0, -0.5, 2.0]]), torch.ones(1, 3) > 0
    found: list[Tensor] = []
    for kind, options in kinds()[:9]:
        if kind in ("vespo", "gmpo") or "importance" in options:
            continue
        leaf = rows_of_logits(dtype, 4103, False)[None].requires_grad_()
        options = {**options, "ref_logprobs": old - 0.1, "kl_coef": 0.1, "token_weights": credit.abs()}
        ids = torch.tensor([[30, 8, 3]])
        loss = leafkernels.policy_loss_from_logits(leaf, ids, old, credit, mask, kind=kind, backend=backend, **options)
        found += [*loss, *torch.autograd.grad(loss.loss, leaf)]
    return found


@case(1e-5, dtype=torch.float32)
@case(1e-5, dtype=torch.bfloat16)
def distillation(backend: str, dtype: torch.dtype) -> Any:
    import leafkernels

    old, teacher, base, student_entropy, teacher_entropy = (random(5, 1100, seed=seed).to(dtype) for seed in range(5))
    tokens = -old, -teacher, student_entropy, teacher_entropy, holes(5, 1100)
    return leafkernels.fire_opd(*tokens, base_logprobs=-base, extrapolation=1.5, drop=0.3, backend=backend)


@case(2e-5, width=48, dtype=torch.float32)
@case(2e-5, width=256, dtype=torch.float32)
@case(4e-2, width=48, dtype=torch.bfloat16)
def reward_channel(backend: str, width: int, dtype: torch.dtype) -> Any:
    from leafkernels.lookahead import RewardChannel

    torch.manual_seed(0)
    channel = RewardChannel(3, 40, width).to(dtype)
    return channel.fused([torch.randn(1, 2, 40).to(dtype) for _ in range(4)], backend=backend)


def tensors_of(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [item for part in found or () for item in tensors_of(part)]


def run(arch: int, seeds: list[int | None], cases: list[str], shared: str | None = None) -> dict[str, Any]:
    """Cases that failed, what was seen, the kernels that ran with their variants and programs, and results in order.

    ``cases``: those whose names begin so, or all. ``shared``: a folder with another executor, ``ptx.py``.
    """
    results: dict[str, list[Any]] = {}
    failed, seen = {}, []
    if shared:
        sys.path.insert(0, shared)
    import ptx

    session: Any = ptx.install(arch)
    findings = ptx.FINDINGS if shared else session.findings.times
    examples = ptx.EXAMPLES if shared else session.findings.examples
    settings = ptx.SETTINGS if shared else session.settings
    from leafkernels._core import backend

    backend.INTERPRETING = True
    for name, (case, tolerance) in CASES.items():
        if cases and not name.startswith(tuple(cases)):
            continue
        expected = tensors_of(case("torch"))
        for seed in seeds:
            settings.seed = seed
            before = set(findings)
            try:
                found = tensors_of(case("triton"))
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
            except Exception as error:  # what a test may show
                failed[f"{name}, seed {seed}"] = f"{type(error).__name__}: {error}"
                continue
            if seed is None:
                results[name] = [tensor.double().flatten().tolist() for tensor in found]
            new = (finding for finding in findings if finding not in before and "same value" not in finding.kind)
            seen += [(name, seed, *finding, examples[finding]) for finding in new]
    launches, programs, variants = (
        (ptx.KERNELS, ptx.PROGRAMS, ptx.VARIANTS) if shared else (session.launches, session.programs, session.variants)
    )
    kernels = {name: [len(variants[name]), launches[name], programs[name]] for name in sorted(launches)}
    return {"failed": failed, "seen": seen, "kernels": kernels, "results": results}


PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
MARKS = "<!-- compiled kernels: make ptx -->\n", "<!-- end -->\n"
ARCHITECTURES = (80, 90, 100)


def write_table(seeds: list[int]) -> None:
    """Execute everything on all architectures, each in a process of its own, and write what came of it to the page."""
    kernels: dict[str, list[Any]] = {}
    for arch in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "TRITON_CACHE_DIR": cache}
            command = [sys.executable, __file__, "--arch", str(arch), "--seeds", *map(str, seeds)]
            found = json.loads(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)
        if found["failed"] or found["seen"]:
            sys.exit(f"sm_{arch}: {json.dumps([found['failed'], found['seen']], indent=1)}")
        for name, numbers in found["kernels"].items():
            total = kernels.setdefault(name, [0, 0, 0])
            kernels[name] = [a + b for a, b in zip(total, numbers, strict=True)]
    lines = ["| kernel | variants | launches | programs | findings |", "|---|---|---|---|---|"]
    for name, numbers in sorted(kernels.items()):
        stem = name.removeprefix("_").removesuffix("_kernel")
        lines.append(f"| `{stem}` | {' | '.join(f'{number:,}' for number in numbers)} | 0 |")
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    about = (
        f"\n{len(CASES)} cases on sm_{', sm_'.join(map(str, ARCHITECTURES))}, in order and by {len(seeds)} seeds, "
        f"{datetime.date.today()}, Triton {importlib.metadata.version('triton')}.\n\n"
    )
    PAGE.write_text(before + MARKS[0] + about + "\n".join(lines) + "\n\n" + MARKS[1] + rest.partition(MARKS[1])[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--only-interleaved", action="store_true", help="by the seeds, not in order before")
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--other", help="a folder with another executor, to compare with")
    parser.add_argument("--write", action="store_true", help="all cases and architectures, and the table of the page")
    options = parser.parse_args()
    if options.write:
        write_table(options.seeds)
        return
    seeds = options.seeds if options.only_interleaved else [None, *options.seeds]
    sys.stdout.write(json.dumps(run(options.arch, seeds, options.cases, options.other)))


if __name__ == "__main__":
    main()
