"""common_prefix_lengths: exactly the reference's, and the laws of prefixes."""

import mmap
import os
import random
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE, Rollouts, random_group, rollouts, token_rows
from support import examples

import leafkernels
import python_ref
from leafkernels.eager import prefix_lengths as eager
from leafkernels.kernels import prefix_lengths as kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPLEMENTATIONS = {"torch": eager, "triton": kernels}
# Of tests that call an operation many times for each of them, and whose laws a refinement hardly breaks by halves.
fewer_examples = partial(examples, torch=60, triton=6)


def lengths_of(rows: list[list[int]], backend: str = "torch", **options: Any) -> torch.Tensor:
    """Prefix lengths of rows of any lengths, packed."""
    bounds = torch.tensor([0] + [len(row) for row in rows], device=DEVICE).cumsum(0).to(torch.int32)
    ids = torch.tensor(sum(rows, []), dtype=torch.int64, device=DEVICE)
    return leafkernels.common_prefix_lengths(ids, cu_seqlens=bounds, **options, backend=backend)


def refine_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the problem is."""
    monkeypatch.setattr(eager, "_FEW_TOKENS", 0)
    monkeypatch.setattr(kernels, "FEW_TOKENS", 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_agrees_with_the_reference(backend: str, layout: str, small_blocks: None) -> None:
    @examples(backend, triton=12)
    @given(rollouts(longest=12))
    def check(case: Rollouts) -> None:
        inputs = case.packed() if layout == "packed" else case.padded(layout, extra=1)
        del inputs["logprobs"], inputs["rewards"]
        found = leafkernels.common_prefix_lengths(inputs.pop("token_ids"), **inputs, backend=backend).tolist()
        everything = python_ref.common_prefix_lengths(case.token_ids, response_mask=case.mask)
        for i, name in enumerate(case.groups):
            for j, other in enumerate(case.groups):
                assert found[i][j] == (everything[i][j] if name == other else -1)

    check()


@pytest.mark.parametrize(("few", "hardly_any"), [(0, 0), (1 << 20, 0), (1 << 20, 1 << 15)])
def test_all_ways_of_the_pytorch_backend(few: int, hardly_any: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refinement, all pairs in two steps, and all pairs in one must not be told apart."""
    monkeypatch.setattr(eager, "_FEW_TOKENS", few)
    monkeypatch.setattr(eager, "_HARDLY_ANY_TOKENS", hardly_any)
    monkeypatch.setattr(eager, "_HEAD", 3)

    @given(rows=token_rows(6, longest=40, vocabulary=2))
    @examples(torch=100)
    def check(rows: list[list[int]]) -> None:
        assert lengths_of(rows).tolist() == python_ref.common_prefix_lengths(rows)

    check()


def hard_inputs(rows: int, tokens: int) -> dict[str, list[list[int]]]:
    """Inputs that punish comparing all pairs, or one block at a time."""
    line = [random.Random(0).randrange(3) for _ in range(tokens)]
    comb = [line] + [line[: i * tokens // rows] + [9 + i] * (tokens - i * tokens // rows) for i in range(1, rows)]
    other = [t + 1 for t in line]
    return {
        "identical": [line] * rows,
        "identical but the last": [line[:-1] + [10 + i] for i in range(rows)],
        "comb": comb,
        "chain": comb[1:] + comb[:1],  # each representative is the first to leave all others
        "two families": [line if i % 2 else other for i in range(rows)],
        "two families of many lengths": [(line if i % 2 else other)[: tokens - i] for i in range(rows)],
        "nothing shared": [[i] * tokens for i in range(rows)],
        "strict prefixes": [line[: tokens - 7 * i] for i in range(rows)],
    }


@pytest.mark.parametrize("name", hard_inputs(2, 20))
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hard_inputs(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refine_always(monkeypatch)
    rows, tokens = (8, 700) if backend == "torch" or DEVICE == "cuda" else (4, 700)
    inputs = hard_inputs(rows, tokens)[name]
    assert lengths_of(inputs, backend).tolist() == python_ref.common_prefix_lengths(inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_limit_and_start(backend: str, small_blocks: None) -> None:
    """As if rows were cut at the limit, and equal before the start, whether they are or not."""

    @given(
        rows=token_rows(6, longest=20, vocabulary=2),
        limit=st.one_of(st.none(), st.integers(0, 24)),
        start=st.one_of(st.none(), st.integers(0, 24)),
    )
    # The representative ends before the start, and the others go on with the same token.
    @example(rows=[[1, 0, 0], [1, 0, 0, 1, 0, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1]], limit=None, start=5)
    @examples(backend, triton=12)
    def check(rows: list[list[int]], limit: int | None, start: int | None) -> None:
        found = lengths_of(rows, backend, limit=limit, start=start)
        assert found.tolist() == python_ref.common_prefix_lengths(rows, limit=limit, start=start or 0)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_limit_and_start_of_every_prompt(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refine_always(monkeypatch)
    ids = random_group(6, 9, seed=2, vocabulary=2)["token_ids"]
    ids[0], ids[3] = ids[2], ids[4]
    prompts = [
        python_ref.common_prefix_lengths(ids[:3].tolist(), limit=4, start=0),
        python_ref.common_prefix_lengths(ids[3:].tolist(), limit=100, start=2),
    ]
    limit, start = (torch.tensor(values, device=DEVICE) for values in ([4, 100], [0, 2]))
    options: dict[str, Any] = {"limit": limit, "start": start.to(torch.int32), "backend": backend}
    assert leafkernels.common_prefix_lengths(ids.reshape(2, 3, 9), **options).tolist() == prompts
    assert leafkernels.common_prefix_lengths(ids, group_size=3, **options).tolist() == prompts
    one = leafkernels.common_prefix_lengths(ids[3:], limit=limit[1], start=start[1], backend=backend)
    assert one.tolist() == prompts[1]
    order = torch.tensor([4, 0, 3, 1, 5, 2], device=DEVICE)
    group_ids = order // 3
    options = {"limit": limit[group_ids], "start": start[group_ids], "groups": 5 - group_ids, "backend": backend}
    table = leafkernels.common_prefix_lengths(ids[order], **options)
    for i, row in enumerate(order.tolist()):
        for j, other in enumerate(order.tolist()):
            same = row // 3 == other // 3
            assert table[i, j] == (prompts[row // 3][row % 3][other % 3] if same else -1)


def test_the_number_of_turns_changes_nothing(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole GPU, before every group goes on by itself."""

    @given(rows=token_rows(7, longest=16, vocabulary=2), start=st.sampled_from([None, 2]))
    @fewer_examples("triton")
    def check(rows: list[list[int]], start: int | None) -> None:
        expected = python_ref.common_prefix_lengths(rows, start=start or 0)
        for rounds in (0, 1, 2, 3):
            monkeypatch.setattr(kernels, "ROUNDS", rounds)
            assert lengths_of(rows, "triton", start=start).tolist() == expected

    check()


def ids_read(module: ModuleType, monkeypatch: pytest.MonkeyPatch, call: Any) -> tuple[int, int]:
    """Ids that a call reads, and how often it compares a row with a representative."""
    counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    monkeypatch.setattr(module, "counts", counts)
    call()
    monkeypatch.setattr(module, "counts", None)
    return tuple(counts.tolist())


def assert_reads_little(
    rows: list[list[int]], backend: str, block: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    """At most 2.1 x G x T ids, G x G, and one block for each row and round that compares it."""
    found = []
    read, comparisons = ids_read(
        IMPLEMENTATIONS[backend], monkeypatch, lambda: found.append(lengths_of(rows, backend, **options))
    )
    assert torch.equal(found[0], lengths_of(rows, **options))
    size, longest = len(rows), min(max(map(len, rows)), options.get("limit", 1 << 30))
    assert comparisons <= size * size
    assert read <= 2.1 * size * longest + size * size + comparisons * block
    # Rows that are one row long are read, once for themselves and once as a representative.
    needed = int((found[0] - torch.diag(found[0].diagonal())).amax(1)[1:].sum()) if size > 1 else 0
    assert read >= needed


def set_blocks(backend: str, monkeypatch: pytest.MonkeyPatch, size: int) -> int:
    """Few tokens at a time, so that a bound on the blocks says much; what one block is, of a row and of another's."""
    refine_always(monkeypatch)
    monkeypatch.setattr(eager, "_BLOCK", 2 * size)
    for name in ("BLOCK", "BLOCK_TOKENS"):
        monkeypatch.setattr(kernels, name, size)
    # In the first block of a row come up to 15 ids before those it goes on from, for the sake of whole words.
    return 2 * size if backend == "torch" else 2 * (size + 15)


@pytest.mark.parametrize("name", hard_inputs(2, 20))
@pytest.mark.parametrize(("backend", "rounds"), [("torch", 2), ("triton", 0), ("triton", 2)])
def test_ids_are_read_about_twice(backend: str, rounds: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = set_blocks(backend, monkeypatch, 64)
    monkeypatch.setattr(kernels, "ROUNDS", rounds)
    # The interpreter takes a millisecond and more for each program.
    size, tokens = (10, 520) if backend == "triton" and DEVICE == "cpu" else (64, 2048)
    rows = hard_inputs(size, tokens)[name]
    assert_reads_little(rows, backend, block, monkeypatch)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ids_of_any_tree_are_read_about_twice(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = set_blocks(backend, monkeypatch, 8)

    @given(rows=token_rows(9, longest=100, vocabulary=2), limit=st.integers(0, 120))
    @fewer_examples(backend)
    def check(rows: list[list[int]], limit: int) -> None:
        if rows:
            assert_reads_little(rows, backend, block, monkeypatch, limit=limit)

    check()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_pipeline_reads_no_id_behind_the_last_boundary(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refine_always(monkeypatch)
    size, tokens, last = 6, 2000, 40
    ids = torch.arange(tokens, device=DEVICE).repeat(size, 1)
    logprobs = torch.zeros(size, tokens, device=DEVICE)
    logprobs[2, 7], logprobs[4, last] = -3.0, -5.0
    rewards = torch.arange(float(size), device=DEVICE)

    def call() -> None:
        options: dict[str, Any] = {"num_boundaries": 2, "min_separation": 5, "backend": backend}
        tree = leafkernels.span_tree(logprobs, ids, rewards, **options)
        assert tree.boundaries.tolist() == [7, last]

    read, comparisons = ids_read(IMPLEMENTATIONS[backend], monkeypatch, call)
    assert comparisons == size - 1
    # Of each row but the first, and each time of the first, exactly these; and the token looked for behind them.
    assert 2 * last * comparisons <= read <= (2 * last + 1) * comparisons


@pytest.mark.parametrize(("size", "tokens"), [(1024, 64), (2, 131_072), (1024, 2048)])
def test_large_groups_and_long_rows(size: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comb whose teeth come in any order, so that the answer is known; int16 keeps it small."""
    refine_always(monkeypatch)
    cuts = torch.randperm(size, generator=torch.Generator().manual_seed(0)) * (tokens - 1) // max(size - 1, 1)
    place = torch.arange(tokens)
    ids = torch.where(place < cuts[:, None], place % 77, 100 + torch.arange(size)[:, None]).to(torch.int16)
    expected = torch.minimum(cuts, cuts[:, None]).fill_diagonal_(tokens)
    found = leafkernels.common_prefix_lengths(ids.to(DEVICE))
    assert torch.equal(found.cpu().long(), expected)


def test_a_large_group_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a block has, with the sizes that a GPU is given."""
    refine_always(monkeypatch)
    monkeypatch.setattr(kernels, "BLOCK_RANKS", 64)
    ids = random_group(66, 12, seed=8, vocabulary=2)["token_ids"]
    expected = python_ref.common_prefix_lengths(ids.tolist())
    for rounds in (0, 1):
        monkeypatch.setattr(kernels, "ROUNDS", rounds)
        assert leafkernels.common_prefix_lengths(ids, backend="triton").tolist() == expected


@pytest.mark.skipif(DEVICE != "cpu", reason="memory that is never touched takes none on a CPU only")
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("refines", [False, True])
def test_more_elements_than_int32_counts(
    backend: str, layout: str, refines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refines:
        refine_always(monkeypatch)
    else:
        monkeypatch.setattr(kernels, "FEW_TOKENS", 1 << 60)
    monkeypatch.setattr(kernels, "num_splits", lambda *_: 1)  # 8,192 programs take the interpreter a minute
    width = 1 << 30
    with_nothing = mmap.mmap(-1, 4 * width)
    ids = torch.frombuffer(with_nothing, dtype=torch.uint8)
    rows = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 5, 0, 0, 0, 1], [1, 2, 3, 5, 0, 0, 0, 1]]
    for i, row in enumerate(rows):
        ids[i * width : i * width + len(row)] = torch.tensor(row, dtype=torch.uint8)
    expected = python_ref.common_prefix_lengths([row + [0] * (9 - len(row)) for row in rows])
    inputs: dict[str, Any] = {"token_ids": ids.view(4, width)}
    if layout == "packed":
        inputs = {"token_ids": ids, "cu_seqlens": torch.arange(5, dtype=torch.int64) * width}
    assert leafkernels.common_prefix_lengths(**inputs, limit=9, backend=backend).tolist() == expected


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_laws(backend: str, small_blocks: None) -> None:
    @given(token_rows(5, longest=20, vocabulary=2), st.randoms(use_true_random=False))
    @fewer_examples(backend)
    def check(rows: list[list[int]], rng: random.Random) -> None:
        check_laws(rows, rng, backend)

    check()


def check_laws(rows: list[list[int]], rng: random.Random, backend: str) -> None:
    def of(rows: list[list[int]], **options: Any) -> torch.Tensor:
        return lengths_of(rows, backend, **options)

    shared = of(rows)
    count = [len(row) for row in rows]
    assert torch.equal(shared, shared.T)
    assert shared.diagonal().tolist() == count
    for i in range(len(rows)):
        for j in range(len(rows)):
            assert shared[i, j] <= min(count[i], count[j])
            for k in range(len(rows)):  # an ultrametric: the two smallest of three are equal
                a, b, _ = sorted([int(shared[i, j]), int(shared[j, k]), int(shared[i, k])])
                assert a == b or len({i, j, k}) < 3
    order = list(range(len(rows)))
    rng.shuffle(order)
    assert torch.equal(of([rows[i] for i in order]), shared[order][:, order])
    most = rng.randrange(1 + max(count))
    assert torch.equal(of([row[:most] for row in rows]), shared.clamp_max(most))
    assert torch.equal(of(rows, limit=most), shared.clamp_max(most))
    renamed = [[(5, -(2**63))[t] for t in row] for row in rows]
    assert torch.equal(of(renamed), shared)
    assert torch.equal(of(rows, start=int(shared.min())), shared)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            assert shared[i, j] == len(os.path.commonprefix([a, b]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_changing_a_shared_token_ends_the_prefix_there(backend: str, small_blocks: None) -> None:
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
    @examples(backend, triton=12)
    def check(row: list[int], data: st.DataObject) -> None:
        t = data.draw(st.integers(0, len(row) - 1))
        changed = [*row[:t], row[t] + 1, *row[t + 1 :]]
        size = len(row)
        assert lengths_of([row, changed, row], backend).tolist() == [[size, t, size], [t, size, t], [size, t, size]]

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend: str) -> None:
    ids = random_group(6, 9, seed=2, vocabulary=2)["token_ids"]
    assert leafkernels.common_prefix_lengths(ids, backend=backend).shape == (6, 6)
    halves = leafkernels.common_prefix_lengths(ids.reshape(2, 3, 9), backend=backend)
    assert halves.shape == (2, 3, 3)
    assert halves.dtype == torch.int32
    assert torch.equal(leafkernels.common_prefix_lengths(ids, group_size=3, backend=backend), halves)
    names = torch.tensor([4, 4, 4, 1, 1, 1], device=DEVICE)
    table = leafkernels.common_prefix_lengths(ids, groups=names, backend=backend)
    assert torch.equal(table[:3, :3], halves[0])
    assert torch.equal(table[3:, 3:], halves[1])
    assert (table[:3, 3:] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5), (3, 0), (2, 3, 0)])
def test_empty_inputs_have_an_answer(backend: str, shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    count_per_prompt = torch.full(shape[:-2], 3, dtype=torch.int64, device=DEVICE)
    for count in (None, 3, count_per_prompt):
        lengths = leafkernels.common_prefix_lengths(ids, limit=count, start=count, backend=backend)
        assert lengths.shape == (*shape[:-1], shape[-2])
        assert not lengths.any()


@pytest.mark.parametrize("ids", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_reads_every_integer(backend: str, ids: torch.dtype) -> None:
    group = random_group(4, 30, seed=4, vocabulary=200)["token_ids"]
    expected = python_ref.common_prefix_lengths(group.tolist())
    assert leafkernels.common_prefix_lengths(group.to(ids), backend=backend).tolist() == expected


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ids_that_differ_in_their_high_half_only(backend: str) -> None:
    rows = [[1, 2 + (1 << 32), 3], [1, 2, 3], [1, 2 + (1 << 40), 3]]
    assert lengths_of(rows, backend).tolist() == [[3, 1, 1], [1, 3, 1], [1, 1, 3]]
