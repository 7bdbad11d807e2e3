"""What the compiled kernels execute and move, counted instruction by instruction on a CPU; ``aot.py`` runs this.

    TRITON_INTERPRET=0 python tests/ptx_counts.py [--json] [--sites] [NAME ...]

For each element: PTX instructions of its threads; bytes that warps ask of global memory, each place once, and those of
the sectors (32 bytes) that hold them; of shared memory the turns that its 32 banks take over the least that
would do. They are counts of PTX on sm_90: ptxas merges and removes instructions, and caches keep sectors.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from compiled_kernels import random, sizes
from torch import Tensor

WARP = 32


@dataclass
class Traffic:
    """Of an instruction in all its executions; bytes of shared memory are 128 for each turn of its banks."""

    requests: int = 0  # of warps
    asked: int = 0
    moved: int = 0

    def add(self, space: str, lanes: Any, address: Any, width: int) -> None:
        warps = lanes // WARP
        self.requests += len(np.unique(warps))
        own = np.unique(np.stack([warps, address]), axis=1)
        if space == "global":
            self.asked += own.shape[1] * width
            self.moved += 32 * np.unique(np.stack([warps, address // 32]), axis=1).shape[1]
            return
        # Of 8 or 16 bytes a thread, half a warp or a quarter of one is served at a time.
        words, turn = max(1, width // 4), (lanes * width // 128 if width > 4 else warps)
        of_turn = np.stack([np.repeat(turn, words), (address[:, None] // 4 + np.arange(words)).reshape(-1)])
        turns, word = np.unique(of_turn, axis=1)
        self.asked += 128 * len(np.unique(turns))
        bank, load = np.unique(turns * WARP + word % WARP, return_counts=True)
        first_of_turn = np.unique(bank // WARP, return_index=True)[1]
        self.moved += 128 * int(np.maximum.reduceat(load, first_of_turn).sum())


CASES: dict[str, tuple[Callable[[], Any], dict[str, tuple[int, str]]]] = {}


def case(**elements: tuple[int, str]) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Add a call; of each kernel that it is counted for, how many elements it goes through, and what they are."""

    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        CASES[function.__name__] = function, elements
        return function

    return add


ROWS, TOKENS, VOCABULARY = 8, 8192, 32_768
ALL = (ROWS * TOKENS, "token")


def ids_that_part_late() -> Tensor:
    ids = (torch.arange(TOKENS) % 97).repeat(ROWS, 1)
    for row in range(1, ROWS):
        ids[row, TOKENS - 100 + 5 * (row // 2) :] += row
    return ids


@case(
    regular_layout=(ROWS, "row"),
    mask_stretches=ALL,
    column_maxima=ALL,
    select_boundaries=(TOKENS, "column"),
    prefix_nodes=(ROWS * 4, "row and boundary"),
    span_values=(ROWS * 5, "span"),
    normalize_spans=(ROWS * 5, "span"),
    scatter_spans=ALL,
    compare_pairs=(ROWS * (ROWS - 1) // 2 * TOKENS, "token of a pair"),
)
def spans() -> None:
    import leafkernels

    leafkernels.span_advantages(
        -random(ROWS, TOKENS),
        ids_that_part_late(),
        random(ROWS, seed=1),
        response_mask=torch.ones(ROWS, TOKENS, dtype=torch.bool),
        group_size=ROWS,
        num_boundaries=4,
        backend="triton",
    )


@case(
    represent=(ROWS, "row"),
    first_mismatch=((ROWS - 1) * TOKENS, "token of a row"),
    refine_ties=(ROWS * 100, "token behind the first mismatch"),
    prefix_table=(ROWS * ROWS, "pair"),
)
def refined_prefixes() -> None:
    import leafkernels

    with sizes("prefix_lengths", FEW_TOKENS=0):
        leafkernels.common_prefix_lengths(ids_that_part_late(), backend="triton")


@case(order_rows=(ROWS, "row"), tree_nodes=(ROWS * 512, "token"))
def tree() -> None:
    import leafkernels

    ids = ids_that_part_late()[:, -512:].contiguous()
    leafkernels.prefix_tree(ids, group_size=ROWS, max_nodes=ROWS * 512, backend="triton")


@case(running_sums=(ROWS * 2048, "token"))
def sums_of_segments() -> None:
    from leafkernels.rows.segments import running_sums

    # Padded rows: each of the places behind them is a segment of its own.
    places, length = torch.arange(2048), 1536
    in_row = places.repeat(ROWS, 1), torch.arange(ROWS)[:, None] * 2048
    starts, lasts = ((torch.where(places < length, edge, in_row[0]) + in_row[1]).flatten() for edge in (0, length - 1))
    running_sums(random(ROWS * 2048).double(), starts, lasts, length, "triton")


@case(gather_spans=ALL)
def gradient_of_spans() -> None:
    import leafkernels

    values, ends = torch.zeros(ROWS, 4).double().requires_grad_(), torch.tensor([[100, 4000, 5000, TOKENS]] * ROWS)
    leafkernels.scatter_spans(values, ends.int(), TOKENS, backend="triton").sum().backward()


@case(
    surprisal_states=(4 * VOCABULARY, "logit"),
    merge_surprisal_states=(4, "row"),
    surprisal_entropy_backward=(4 * VOCABULARY, "logit"),
)
def vocabulary() -> None:
    import leafkernels

    logits = (random(4, VOCABULARY) * 9).requires_grad_()
    with sizes("surprisal", MAX_SPLITS=1):  # as where rows are many
        found = leafkernels.surprisal_entropy(logits, torch.arange(4), backend="triton")
    (found.surprisal.sum() - 0.3 * found.entropy.sum()).backward()


@case(divergence_sums=(4 * VOCABULARY, "logit of both"), divergence_gradient=(4 * VOCABULARY, "logit of both"))
def divergence() -> None:
    import leafkernels

    student, teacher = ((random(4, VOCABULARY, seed=seed) * 9).bfloat16() for seed in range(2))
    with sizes("divergence", MAX_SPLITS=1):
        found = leafkernels.divergence(student.requires_grad_(), teacher, backend="triton")
        (found.divergence.sum() - 0.3 * found.student_entropy.sum()).backward()


KEPT, WIDTH = 32, 1024


@case(
    kept_products=(64 * KEPT * WIDTH, "product"),
    kept_statistics=(64 * KEPT, "kept id"),
    kept_statistics_backward=(64 * KEPT, "kept id"),
    add_hidden_gradient=(64 * KEPT * WIDTH, "product"),
    add_weight_gradient=(64 * KEPT * WIDTH, "product"),
)
def kept_ids() -> None:
    import leafkernels

    hidden, weight = random(64, WIDTH).requires_grad_(), random(512, WIDTH, seed=1).requires_grad_()
    ids = torch.stack([torch.arange(KEPT) * 16 + row % 16 for row in range(64)])
    mask = leafkernels.SamplingMask(ids.flatten(), KEPT * torch.arange(65))
    found = leafkernels.linear_surprisal_entropy(hidden, weight, ids[:, 0], sampling_mask=mask, backend="triton")
    (found.surprisal.sum() - 0.3 * found.entropy.sum()).backward()


@case(policy_loss=ALL)
def loss() -> None:
    import leafkernels

    new, old, credit = (random(ROWS, TOKENS, seed=seed) - 1 for seed in range(3))
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    leafkernels.policy_loss(new.requires_grad_(), old, credit, mask, backend="triton").loss.backward()


@case(policy_loss_from_logits=(4 * VOCABULARY, "logit"), scale_gradient=(4 * VOCABULARY, "logit"))
def loss_from_logits() -> None:
    import leafkernels

    logits = (random(1, 4, VOCABULARY) * 9).requires_grad_()
    rows = -random(1, 4), random(1, 4), torch.ones(1, 4, dtype=torch.bool)
    found = leafkernels.policy_loss_from_logits(logits, torch.arange(4)[None], *rows, backend="triton")
    (found.loss * 3).backward()


@case(fire_statistics=ALL, fire_weights=ALL)
def distillation() -> None:
    import leafkernels

    tokens = [random(ROWS, TOKENS, seed=seed) for seed in range(4)]
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    leafkernels.fire_opd(-tokens[0], -tokens[1], tokens[2], tokens[3], mask, backend="triton")


HIDDEN, LAYERS = 3584, 4


@case(normalize_hidden=(LAYERS * 8 * HIDDEN, "number"), channel_state=((LAYERS - 1) * 8 * 256 * 256, "product"))
def channel() -> None:
    from leafkernels.lookahead import RewardChannel

    hidden = [torch.randn(1, 8, HIDDEN) for _ in range(LAYERS + 1)]
    RewardChannel(LAYERS, HIDDEN, 256).fused(hidden, backend="triton")


def count(names: list[str], sites: bool) -> list[dict[str, Any]]:
    import ptx

    session = ptx.install(90)
    from leafkernels._core import backend

    backend.INTERPRETING = True
    rows = []
    for function, elements in CASES.values():
        if names and not any(kernel.startswith(tuple(names)) for kernel in elements):
            continue
        traffic: dict[Any, Traffic] = defaultdict(Traffic)

        def watch(kernel: Any, site: int, space: str, lanes: Any, address: Any, width: int, to: Any = traffic) -> None:
            instruction = kernel.code[site]
            to[kernel.name, space, f"{instruction.where} {instruction.op}"].add(space, lanes, address, width)

        session.watch, before = watch, session.instructions.copy()
        function()
        for kernel, (number, unit) in elements.items():
            name = f"_{kernel}_kernel"
            sums = {space: Traffic() for space in ("global", "shared")}
            for (of, space, where), part in traffic.items():
                if of == name:
                    sums[space].asked += part.asked
                    sums[space].moved += part.moved
                    if sites:
                        ratio = part.moved / part.asked
                        print(f"    {kernel} {space} {where}: {part.requests} of warps, {part.asked} B, x {ratio:.2f}")
            executed = session.instructions[name] - before[name]
            assert executed, f"{function.__name__} launched no {name}"
            rows.append(
                {
                    "kernel": kernel,
                    "element": unit,
                    "instructions": round(executed * WARP / number, 1),
                    "asked": round(sums["global"].asked / number, 2),
                    "moved": round(sums["global"].moved / number, 2),
                    "sectors": round(sums["global"].moved / max(1, sums["global"].asked), 3),
                    "banks": round(sums["shared"].moved / max(1, sums["shared"].asked), 3),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sites", action="store_true", help="every access by itself")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    rows = count(options.names, options.sites)
    if options.json:
        sys.stdout.write(json.dumps(rows))
        return
    print(f"{'kernel':28} {'of each':32} instructions  asked B  moved B  sectors  banks")
    for row in rows:
        print(
            f"{row['kernel']:28} {row['element']:32} {row['instructions']:12} {row['asked']:8} {row['moved']:8} "
            f"{row['sectors']:8} {row['banks']:6}"
        )


if __name__ == "__main__":
    main()
