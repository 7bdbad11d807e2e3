"""What ``gather_groups`` costs, beside bringing every row to every rank: ``python -m bench.bench_distributed``.

Bytes are counted at the collectives of 2, 4 and 8 gloo processes on this machine, and by a formula, which
``tests/test_distributed.py`` holds to the counts, up to 4,096 ranks. Times are those of the slowest rank, of both ways
in turns in the same processes, and say nothing of a network.
"""

import contextlib
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import leafkernels
from leafkernels.distributed import gather_groups, gather_section, owners_of_rows

WORLDS = (2, 4, 8)
COUNTED_WORLDS = (2, 8, 64, 512, 4096)
ROWS, TOKENS = 16, 1024
COUNTED_TOKENS = 8192
# Ids int64, log-probabilities float32, a mask.
TOKEN_BYTES = 13
LAYOUTS = ("whole", "neighbours", "all")


def groups_of_ranks(layout: str, world: int, rows: int = ROWS) -> list[list[int]]:
    """The group of each row of each rank: groups of ``rows`` rows on one rank; half on it and half on the next; or a
    row on each of as many ranks as there are rows in a group, or ranks."""
    if layout == "whole":
        return [[rank] * rows for rank in range(world)]
    if layout == "neighbours":
        return [[(rank + (row >= rows // 2)) % world for row in range(rows)] for rank in range(world)]
    ranks = min(world, rows)
    return [[rank // ranks * ranks + row % ranks for row in range(rows)] for rank in range(world)]


def traffic(
    lengths_of_ranks: list[list[int]], group_of_row: list[int], token_bytes: int, result_bytes: int = 4
) -> list[int]:
    """Bytes that each rank receives from others: rows of groups that it owns, and the results of its own rows."""
    owners = iter(owners_of_rows(lengths_of_ranks, group_of_row))
    received = [0] * len(lengths_of_ranks)
    for rank, lengths in enumerate(lengths_of_ranks):
        for length in lengths:
            owner = next(owners)
            if owner != rank:
                received[owner] += length * token_bytes + 8
                received[rank] += length * result_bytes
    return received


@contextlib.contextmanager
def counted(rank: int) -> Iterator[dict[str, int]]:
    """Bytes that this rank receives from others, by collective, as they are called."""
    found = {"headers": 0, "rows": 0, "everyone": 0, "collectives": 0}
    exchange, gather, headers = dist.all_to_all_single, dist.all_gather, dist.all_gather_object

    def exchanged(output: torch.Tensor, own: torch.Tensor, arriving: list[int], leaving: list[int], **more: Any) -> Any:
        found["rows"] += (sum(arriving) - arriving[rank]) * output.element_size()
        found["collectives"] += 1
        return exchange(output, own, arriving, leaving, **more)

    def gathered(outputs: list[torch.Tensor], own: torch.Tensor, **more: Any) -> Any:
        found["everyone"] += own.numel() * own.element_size() * (len(outputs) - 1)
        found["collectives"] += 1
        return gather(outputs, own, **more)

    def told(outputs: list[Any], own: Any, **more: Any) -> Any:
        result = headers(outputs, own, **more)
        sizes = [len(pickle.dumps(header)) for header in outputs]
        found["headers"] += max(sizes) * (len(sizes) - 1)
        return result

    patches = {"all_to_all_single": exchanged, "all_gather": gathered, "all_gather_object": told}
    with mock.patch.multiple(dist, **patches):
        yield found


def everyone(rows: dict[str, torch.Tensor], world: int) -> torch.Tensor:
    """The way before: all rows on all ranks, each of which computes for all. Rows are alike in length."""
    count, tokens = rows["token_ids"].shape
    parts = {name: gather_section(rows[name].reshape(-1), [rows[name].numel()] * world, None) for name in rows}
    for name in ("token_ids", "logprobs", "response_mask"):
        parts[name] = parts[name].view(-1, tokens)
    first = dist.get_rank() * count
    return leafkernels.span_advantages(**parts)[first : first + count]


def owned(rows: dict[str, torch.Tensor], world: int) -> torch.Tensor:
    gathered = gather_groups(**rows)
    return gathered.local(leafkernels.span_advantages(**gathered.inputs))


WAYS = {"owner": owned, "everyone": everyone}


def rank_main(rank: int, world: int, store: str, rounds: int, tokens: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for layout in LAYOUTS:
        generator = torch.Generator().manual_seed(rank)
        rows = {
            "token_ids": torch.randint(0, 2, (ROWS, tokens), generator=generator),
            "logprobs": -torch.rand(ROWS, tokens, generator=generator),
            "rewards": torch.rand(ROWS, generator=generator, dtype=torch.float64),
            "response_mask": torch.ones(ROWS, tokens, dtype=torch.bool),
            "groups": torch.tensor(groups_of_ranks(layout, world)[rank]),
        }
        advantages, best, bytes_of = {}, {}, {}
        for name, way in WAYS.items():
            with counted(rank) as bytes_of[name]:
                advantages[name] = way(rows, world)
        # The gate: no way is timed that gives other bits.
        assert torch.equal(advantages["owner"], advantages["everyone"])
        for _ in range(rounds):
            for name, way in WAYS.items():
                dist.barrier()
                start = time.perf_counter()
                way(rows, world)
                seconds = torch.tensor(time.perf_counter() - start)
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                best[name] = min(best.get(name, seconds.item()), seconds.item())
        results.put((layout, rank, bytes_of, best))
    dist.destroy_process_group()


def measure(world: int, rounds: int, tokens: int) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, f"{folder}/store", rounds, tokens, results)
        multiprocessing.start_processes(rank_main, arguments, nprocs=world, start_method="spawn")
        found = [results.get() for _ in range(world * len(LAYOUTS))]
    for layout in LAYOUTS:
        layout_results = [(counts, best) for name, _, counts, best in found if name == layout]
        owner = max(counts["owner"]["rows"] for counts, _ in layout_results)
        headers = max(counts["owner"]["headers"] for counts, _ in layout_results)
        before = max(counts["everyone"]["everyone"] for counts, _ in layout_results)
        seconds = layout_results[0][1]
        print(
            f"| {world} | {layout} | {owner / 1e6:.3f} | {headers / 1e3:.1f} | {before / 1e6:.3f} | "
            f"{seconds['owner'] * 1e3:.0f} | {seconds['everyone'] * 1e3:.0f} |"
        )


def count(world: int) -> None:
    lengths = [[COUNTED_TOKENS] * ROWS] * world
    for layout in LAYOUTS:
        groups = [group for rank_groups in groups_of_ranks(layout, world) for group in rank_groups]
        received = max(traffic(lengths, groups, TOKEN_BYTES))
        before = (world - 1) * ROWS * (COUNTED_TOKENS * TOKEN_BYTES + 24)
        print(f"| {world:,} | {layout} | {received / 1e6:.1f} | {before / 1e6:,.1f} |")


def main(tiny: bool) -> None:
    tokens = 8 if tiny else TOKENS
    print(
        f"{ROWS} rows of {tokens} tokens a rank; MB and KB received by the rank that receives most; least of rounds\n"
    )
    print("| ranks | groups | rows, MB | headers, KB | everyone, MB | owner, ms | everyone, ms |")
    print("|---|---|---|---|---|---|---|")
    for world in WORLDS[: 1 if tiny else None]:
        measure(world, 1 if tiny else 7, tokens)
    print(f"\nBy the formula, {ROWS} rows of {COUNTED_TOKENS} tokens a rank\n")
    print("| ranks | groups | received, MB | everyone, MB |\n|---|---|---|---|")
    for world in COUNTED_WORLDS[: 2 if tiny else None]:
        count(world)


if __name__ == "__main__":
    main("--tiny" in sys.argv)
