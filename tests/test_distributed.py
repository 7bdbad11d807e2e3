"""Groups that straddle ranks, and vocabularies split over them, with 2 and 4 gloo processes against one process."""

import contextlib
import itertools
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pages
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import PAIR, WORLDS, Ranks, process_group
from rollouts import BACKENDS, DEVICE, Rollouts, random_group, rollouts
from support import every_estimator, examples, options_of, takes, without_interpreter
from test_linear_surprisal import tolerance as linear_tolerance
from test_loops import example, expected, slime_of_rank
from test_policy_loss_from_logits import inputs as loss_inputs
from test_surprisal import tolerance

import leafkernels
import python_ref
from bench.bench_distributed import LAYOUTS, counted, groups_of_ranks, traffic
from leafkernels.distributed import GatheredGroups, gather_groups, owners_of_rows
from leafkernels.vocabulary.statistics import STATISTICS
from python_ref.sampling_mask import mask_logits


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.close()


Shares = list[tuple[Rollouts, str, int]]  # of each rank: rows, layout, and columns of padding more than they need


def advantages_of_rank(
    inputs: dict[str, Any], options: dict[str, Any], world: int, estimator: str = "leaf"
) -> torch.Tensor:
    """What a trainer writes, on each rank."""
    gathered = gather_groups(**inputs, process_group=process_group(world))
    if takes(estimator, "gathered"):
        options = options | {"gathered": gathered}
    return gathered.local(leafkernels.ESTIMATORS[estimator](**gathered.inputs, **options))


def inputs_of(case: Rollouts, layout: str, extra: int = 0) -> dict[str, Any]:
    inputs = case.packed() if layout == "packed" else case.padded(layout, extra)
    return {name: tensor.cpu() for name, tensor in inputs.items()}


def with_groups(inputs: dict[str, Any], groups: str | int | None) -> dict[str, Any]:
    """The groups as they are, as names, or the given int or None."""
    if groups == "tensor":
        return inputs
    if groups == "names":
        return inputs | {"groups": [f"prompt {name}" for name in inputs["groups"].tolist()]}
    return inputs | {"groups": None, "group_size": groups}


@st.composite
def splits(draw: st.DrawFn, world: int) -> tuple[Rollouts, Shares, str | int | None]:
    """Rollouts, what of them lies on which rank (often nothing, or all), and how their groups are given."""
    case = draw(rollouts())
    num_rows = len(case.groups)
    cuts = sorted(draw(st.lists(st.integers(0, num_rows), min_size=world - 1, max_size=world - 1)))
    split = []
    for begin, end in itertools.pairwise([0, *cuts, num_rows]):
        fields = (case.token_ids, case.logprobs, case.mask, case.rewards, case.groups)
        rows = Rollouts(*(field[begin:end] for field in fields))
        split.append((rows, draw(st.sampled_from(["right", "left", "packed"])), draw(st.integers(0, 2))))
    divisors = [size for size in range(1, num_rows + 1) if num_rows % size == 0]
    return case, split, draw(st.sampled_from(["tensor", "names", None, *divisors]))


def check_split_rows(estimator: str, world: int, count: int, ranks: Ranks) -> None:
    @examples(torch=count)
    @given(splits(world))
    def check(drawn: tuple[Rollouts, Shares, str | int | None]) -> None:
        case, split, groups = drawn
        options = options_of(estimator, case.options)
        whole = with_groups(inputs_of(case, "right", extra=1), "tensor" if groups == "names" else groups)
        # As integers: 0 and -0 are not the same bits.
        expected = leafkernels.ESTIMATORS[estimator](**whole, **options)
        rows = iter(case.rows_of(expected.view(torch.int32)))

        calls = [(with_groups(inputs_of(*shard), groups), options, world, estimator) for shard in split]
        for (shard, layout, _), (inputs, *_), found in zip(
            split, calls, ranks.call(advantages_of_rank, calls), strict=True
        ):
            assert found.dtype == torch.float32
            assert found.shape == inputs["token_ids"].shape
            assert not found[~inputs["response_mask"]].any()
            for row in shard.rows_of(found.view(torch.int32), layout):
                assert row == next(rows)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_gets_its_part_of_what_one_process_computes(world: int, ranks: Ranks) -> None:
    """Bit for bit: uneven rows, none, other lengths and paddings on each rank, NaN rewards, any naming of groups."""
    check_split_rows("leaf", world, 100, ranks)


@every_estimator
def test_every_estimator_is_one_process(name: str, ranks: Ranks) -> None:
    """Whichever rows lie on which of four ranks."""
    check_split_rows(name, 4, 15, ranks)


@pytest.mark.parametrize("normalize", ["batch", "span"])
def test_rewards_that_differ_by_rounding_alone_on_several_ranks(normalize: str, ranks: Ranks) -> None:
    """The prompt of rows 0, 2 and 4 gets exactly 0, as in one process: a unit of the last place is no signal."""
    group = {name: tensor.cpu() for name, tensor in random_group(6, 12, seed=1, vocabulary=2).items()}
    group["rewards"] = torch.tensor([30.0, 0.25, 30 + 2**-19, 1.0, 30.0, 0.5])
    group["groups"] = torch.arange(6) % 2
    expected = leafkernels.span_advantages(**group, normalize=normalize)
    parts = [{name: tensor[rows] for name, tensor in group.items()} for rows in (slice(0, 1), slice(1, 6))]
    found = torch.cat(ranks.call(advantages_of_rank, [(part, {"normalize": normalize}, 2) for part in parts]))
    assert torch.equal(found, expected)
    assert not found[::2].any() and found[1::2].any()


@pytest.mark.parametrize("ids", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sends_every_dtype_as_it_comes(dtype: torch.dtype, ids: torch.dtype, ranks: Ranks) -> None:
    """Without a mask, in strided views, with rewards that ask for a gradient."""
    group = {name: tensor.cpu() for name, tensor in random_group(6, 40, seed=1, vocabulary=3).items()}
    logprobs, token_ids = group["logprobs"].to(dtype), group["token_ids"].to(ids)
    rewards = group["rewards"].requires_grad_()
    expected = leafkernels.span_advantages(logprobs, token_ids, rewards, group_size=3)
    calls = []
    for rows in (slice(0, 1), slice(1, 6)):
        wide = torch.zeros(rows.stop - rows.start, 90, dtype=ids)
        wide[:, 5:85:2] = token_ids[rows]
        inputs = {"logprobs": logprobs[rows].T.contiguous().T, "token_ids": wide[:, 5:85:2], "group_size": 3}
        calls.append((inputs | {"rewards": rewards[rows].detach().requires_grad_()}, {}, 2))
    found = torch.cat(ranks.call(advantages_of_rank, calls))
    assert torch.equal(found, expected)
    assert not found.requires_grad


def advantages_of_columns(inputs: dict[str, Any], world: int) -> torch.Tensor:
    """On a rank whose arguments are columns of tables; made there, because pickling tells no stride of one element."""
    return advantages_of_rank({name: torch.stack([t, t], -1)[..., 0] for name, t in inputs.items()}, {}, world)


@pytest.mark.parametrize("masked", [False, True])
def test_one_row_of_a_table(masked: bool, ranks: Ranks) -> None:
    """A section of one element keeps the stride of the table that it is a column of."""
    inputs = {"logprobs": -torch.ones(2, 1), "token_ids": IDS[:, :1], "rewards": torch.tensor([1.0, 0.0]).double()}
    inputs |= {"groups": torch.tensor([5, 5])} | ({"response_mask": torch.ones(2, 1)} if masked else {})
    calls = [({name: tensor[row : row + 1] for name, tensor in inputs.items()}, 2) for row in range(2)]
    found = torch.cat(ranks.call(advantages_of_columns, calls))
    assert torch.equal(found, leafkernels.span_advantages(**inputs))


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """Bytes of each collective on tensors, as they are called."""
    sent: list[int] = []

    def counted(collective: Any, position: int) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            sent.append(args[position].numel() * args[position].element_size())
            return collective(*args, **options)

        return call

    gather, reduce = counted(dist.all_gather, 1), counted(dist.all_reduce, 0)
    with mock.patch.object(dist, "all_gather", gather), mock.patch.object(dist, "all_reduce", reduce):
        yield sent


def traffic_of_rank(inputs: dict[str, Any], world: int) -> tuple[dict[str, torch.Size], dict[str, int]]:
    """Shapes of what was gathered, and the bytes that came from other ranks until the results were at home."""
    group = process_group(world)
    with counted(dist.get_rank(group)) as received:
        gathered = gather_groups(**inputs, process_group=group)
        gathered.local(torch.zeros_like(gathered.inputs["token_ids"], dtype=torch.float32))
    return {k: v.shape for k, v in gathered.inputs.items() if isinstance(v, torch.Tensor)}, received


def test_padding_is_not_sent(ranks: Ranks) -> None:
    """A token costs its id, its log-probability and a byte, and its result on the way home; a row its reward."""
    mask = torch.zeros(3, 1000, dtype=torch.bool)
    mask[0, 5:15], mask[1, :20], mask[2, 990:] = True, True, True
    mask[1, 4:9] = False  # a hole is part of its row
    inputs = {"logprobs": torch.zeros(3, 1000), "token_ids": torch.zeros(3, 1000, dtype=torch.int64)}
    inputs |= {"rewards": torch.zeros(3), "response_mask": mask, "groups": torch.zeros(3, dtype=torch.int32)}
    owner, other = ranks.call(traffic_of_rank, [(inputs, 2)] * 2)
    for (shapes, received), rows, size in ((owner, 6, 40 * (8 + 4 + 1) + 3 * 8), (other, 0, 40 * 4)):
        row_shapes = {"rewards": (rows,), "groups": (rows,), "cu_seqlens": (rows + 1,)}
        tokens = (80 if rows else 0,)
        assert shapes == row_shapes | dict.fromkeys(("logprobs", "token_ids", "response_mask"), tokens)
        assert received["rows"] == size
        assert received["collectives"] == 5
        assert received["everyone"] == 0


def row_lengths(world: int) -> list[list[int]]:
    """Of four rows a rank, none empty but one."""
    rng = random.Random(world)
    return [[0 if rank == row == 1 else rng.randrange(1, 30) for row in range(4)] for rank in range(world)]


@pytest.mark.parametrize("layout", [*LAYOUTS, "any"])
def test_what_is_received_is_the_formula(layout: str, ranks: Ranks) -> None:
    """Counted at the collectives; of names a few bytes a row, however long they are."""
    lengths, rng = row_lengths(4), random.Random(3)
    groups = groups_of_ranks(layout, 4, 4) if layout != "any" else [[rng.randrange(5) for _ in "rows"] for _ in lengths]
    calls = []
    for rank_lengths, group_ids in zip(lengths, groups, strict=True):
        mask = torch.arange(30) < torch.tensor(rank_lengths)[:, None]
        rows = {"logprobs": torch.zeros(4, 30), "token_ids": torch.zeros(4, 30, dtype=torch.int32)}
        rows |= {"rewards": torch.zeros(4), "response_mask": mask, "groups": [f"{g:0>1000}" for g in group_ids]}
        calls.append((rows, 4))
    found = [received for _, received in ranks.call(traffic_of_rank, calls)]
    expected = traffic(lengths, sum(groups, []), 4 + 4 + 1)
    assert [received["rows"] for received in found] == expected
    for received in found:
        assert received["collectives"] == (0 if layout == "whole" else 5)
        assert received["headers"] <= 3 * (4 * 24 + 400)
    assert any(expected) == (layout != "whole")


def test_traffic_does_not_grow_with_the_ranks() -> None:
    """By the formula. Groups that straddle in one way everywhere are shared out evenly."""
    worlds = (8, 64, 4096)
    for layout in LAYOUTS:
        most = []
        for world in worlds:
            groups = sum(groups_of_ranks(layout, world, 4), [])
            received = traffic([[100] * 4] * world, groups, 13)
            most.append(max(received))
            if layout == "all":
                owners = owners_of_rows([[100] * 4] * world, groups)
                assert max(Counter(owners).values()) == 4
        assert len(set(most)) == 1
        assert (most[0] == 0) == (layout == "whole")


def test_who_owns_a_group() -> None:
    # The rank with most tokens; the lowest of several; a group of empty rows has one too.
    assert owners_of_rows([[5, 3], [9]], [0, 1, 0]) == [1, 0, 1]
    assert owners_of_rows([[5], [5]], [0, 0]) == [0, 0]
    assert owners_of_rows([[], [0], [0]], [7, 7]) == [1, 1]
    # Then the one to which less has come.
    assert owners_of_rows([[5, 5], [5, 4]], [0, 1, 0, 1]) == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "names",
    [
        [("a", 1), ("a", 1.0), ("b", 1), ("a", True)],
        [3, 3.0, None, 2.5],
        ["x", b"x", "x", b"x"],
        ["\ud800", "", "\ud800", 10**30],
        [math.inf, -math.inf, math.inf, float(2**70)],
    ],
)
def test_names_of_every_kind_meet(names: list[Any], ranks: Ranks) -> None:
    """As in one process: equal names are one prompt, whichever ranks they come from."""
    group = {name: tensor.cpu() for name, tensor in random_group(4, 6, seed=5, vocabulary=2).items()}
    expected = leafkernels.span_advantages(**group, groups=leafkernels.group_index(names))
    calls = []
    for row, name in enumerate(names):
        calls.append(({k: t[row : row + 1] for k, t in group.items()} | {"groups": [name]}, {}, 4))
    assert torch.equal(torch.cat(ranks.call(advantages_of_rank, calls)), expected)


def results_of_rank(shape: tuple[int, ...] | None, dtype: torch.dtype, size: int | None, world: int) -> str:
    """What ``local`` says to results of that shape (None: the right one) and dtype."""
    gathered = gather_groups(**good_inputs(group_size=size), process_group=process_group(world))
    shape = gathered.inputs["token_ids"].shape if shape is None else shape
    try:
        return str(tuple(gathered.local(torch.zeros(shape, dtype=dtype)).shape))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_results_that_are_refused_are_so_on_every_rank(ranks: Ranks) -> None:
    """But where nothing travels each rank is on its own."""
    kind = torch.float32
    shape = "ValueError: tokens must have the shape of the gathered token_ids, (12,), got shape (2, 3)"
    told = "RuntimeError: GatheredGroups.local was refused on rank 0 of the group"
    assert ranks.call(results_of_rank, [((2, 3), kind, None, 2), (None, kind, None, 2)]) == [shape, told]
    alone = shape.replace("(12,)", "(6,)")
    assert ranks.call(results_of_rank, [((2, 3), kind, 2, 2), (None, kind, 2, 2)]) == [alone, "(2, 3)"]
    dtypes = "ValueError: tokens must have one dtype on every rank, got torch.{} on rank {} and another elsewhere"
    found = ranks.call(results_of_rank, [(None, kind, None, 2), (None, torch.float64, None, 2)])
    assert found == [dtypes.format("float32", 0), dtypes.format("float64", 1)]


def test_what_was_gathered_is_checked() -> None:
    arguments = good_inputs()
    with pytest.raises(TypeError, match=r"^gathered must be what gather_groups returned, got int$"):
        leafkernels.span_advantages(**arguments, gathered=1)
    other = GatheredGroups({"rewards": torch.zeros(5)}, torch.Size([5, 3]), None, None, [0] * 5, None)
    with pytest.raises(ValueError, match=r"^gathered must hold the rows of token_ids, 2, got 5$"):
        leafkernels.span_tree(**arguments, gathered=other)


DYING = """
import os, sys, torch, torch.distributed as dist
from datetime import timedelta
from leafkernels.distributed import gather_groups
import leafkernels.distributed as gather
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=5))
if rank == 1:
    gather._exchange = lambda *_: os._exit(3)
gather_groups(torch.zeros(2, 3), torch.zeros(2, 3).long(), torch.zeros(2))
"""


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    """Within the process group's timeout, with the exchange in which it was missed."""
    environment = without_interpreter(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    left, dead = [
        subprocess.Popen(
            [sys.executable, "-c", DYING, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    _, text = left.communicate(timeout=90)
    dead.communicate(timeout=90)
    assert (left.returncode, dead.returncode) == (1, 3)
    message = "the exchange of token_ids of gather_groups with other ranks failed: a rank has died or has not called"
    assert f"RuntimeError: {message} (" in text


def distillation_of_rank(tokens: tuple[torch.Tensor, ...], step: int, world: int) -> list[torch.Tensor]:
    """What a trainer writes, on each rank: statistics of its micro-batches, of all ranks, and each micro-batch."""
    micro_batches = [[tensor[start : start + step] for tensor in tokens] for start in range(0, len(tokens[0]), step)]
    parts = [leafkernels.fire_statistics(*micro[1:]) for micro in [[t[:0] for t in tokens], *micro_batches]]
    statistics = leafkernels.FireStatistics.concatenate(parts).gather(process_group(world))
    found = [leafkernels.fire_opd(*micro, normalize="kept", statistics=statistics) for micro in micro_batches]
    return [torch.cat([fire[i] for fire in found]) if found else torch.zeros(0) for i in range(4)]


@pytest.mark.parametrize("world", WORLDS)
def test_distillation_of_all_ranks_is_that_of_one(world: int, ranks: Ranks) -> None:
    """Bit for bit, with uneven rows, none on one rank, and micro-batches of other sizes."""
    generator = torch.Generator().manual_seed(world)
    tokens = [-torch.rand(9, 20, generator=generator) for _ in range(2)]
    tokens += [torch.rand(9, 20, generator=generator) for _ in range(2)]
    tokens.append(torch.rand(9, 20, generator=generator) < 0.8)
    whole = leafkernels.fire_opd(*tokens, normalize="kept")
    assert 0 < whole.keep.sum() < 9
    sizes = [4, 0, 3, 2] if world == 4 else [2, 7]
    shares = zip(*(tensor.split(sizes) for tensor in tokens), strict=True)
    answers = ranks.call(distillation_of_rank, [(share, 1 + i, world) for i, share in enumerate(shares)])
    for field in range(4):
        joined = torch.cat([answer[field] for answer, size in zip(answers, sizes, strict=True) if size])
        assert torch.equal(joined, whole[field])


def test_no_rows_at_all(ranks: Ranks) -> None:
    nothing = {"logprobs": torch.zeros(0, 7), "token_ids": torch.zeros(0, 7, dtype=torch.int64)}
    nothing["rewards"] = torch.zeros(0)
    assert [a.shape for a in ranks.call(advantages_of_rank, [(nothing, {}, 2)] * 2)] == [(0, 7)] * 2


def refusal_of_rank(inputs: dict[str, Any], world: int) -> str:
    try:
        gather_groups(**inputs, process_group=process_group(world))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def good_inputs(**changes: Any) -> dict[str, Any]:
    inputs = {"logprobs": torch.zeros(2, 3), "token_ids": torch.zeros(2, 3, dtype=torch.int64)}
    return inputs | {"rewards": torch.zeros(2)} | changes


IDS = good_inputs()["token_ids"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": IDS.float()}, "TypeError: token_ids must hold integers, got torch.float32"),
        (
            {"logprobs": IDS},
            "TypeError: logprobs must be floating point (float32, bfloat16, float16 or float64), got torch.int64",
        ),
        (
            {"logprobs": torch.zeros(2, 4)},
            "ValueError: logprobs must have the shape of token_ids, (2, 3), got shape (2, 4)",
        ),
        (
            {"logprobs": torch.zeros(1, 2, 3), "token_ids": IDS[None]},
            "ValueError: token_ids must have shape (rows, tokens), or (total,) together with cu_seqlens, "
            "got shape (1, 2, 3)",
        ),
        (
            {"rewards": torch.zeros(3)},
            "ValueError: rewards must have one entry for each row of token_ids, shape (2,), got shape (3,)",
        ),
        (
            {"response_mask": IDS[0]},
            "ValueError: response_mask must have the shape of token_ids, (2, 3), got shape (3,)",
        ),
        ({"groups": torch.zeros(2)}, "TypeError: groups must hold integers, got torch.float32"),
        ({"groups": IDS[0]}, "ValueError: groups must name one prompt for each of 2 rows, got shape (3,)"),
        ({"groups": ["a"]}, "ValueError: groups must name one prompt for each of 2 rows, got 1 names"),
        (
            {"groups": "ab"},
            "TypeError: groups must be an integer tensor or a list of names for the rows, got str",
        ),
        ({"group_size": 0}, "ValueError: group_size must be at least 1, got 0"),
        ({"group_size": True}, "TypeError: group_size must be an int, got bool"),
        (
            {"groups": 4},
            "TypeError: groups must be an integer tensor or a list of names for the rows, got int",
        ),
        (
            {"groups": IDS[:, 0], "group_size": 2},
            "ValueError: group_size must be None where groups names the prompts, got 2",
        ),
        (
            {"groups": [0.0, math.nan]},
            "ValueError: groups must not hold NaN, which equals no other name, got nan for row 1",
        ),
        (
            {"token_ids": IDS.to_sparse()},
            "TypeError: token_ids must be a dense torch.Tensor, got one of layout torch.sparse_coo",
        ),
        (
            {"rewards": torch.zeros(2).to_sparse()},
            "TypeError: rewards must be a dense torch.Tensor, got one of layout torch.sparse_coo",
        ),
    ],
)
def test_a_rank_that_is_refused_tells_the_others(changes: dict[str, Any], message: str, ranks: Ranks) -> None:
    """Nobody hangs, and everybody knows why."""
    bad, good = ranks.call(refusal_of_rank, [(good_inputs(**changes), 2), (good_inputs(), 2)])
    assert bad == message
    assert good == f"RuntimeError: gather_groups was refused on rank 0 of the group: {message.split(': ', 1)[1]}"


class Odd:
    """Arguments that only the rank itself can make."""

    @staticmethod
    def equal_nothing() -> Any:
        return [Odd(), Odd()]

    @staticmethod
    def cannot_be_compared() -> Any:
        return [["a"], ["b"]]

    @staticmethod
    def fail() -> Any:
        yield "a"
        raise LookupError("no such prompt")

    @staticmethod
    def fail_without_a_word() -> Any:
        yield "a"
        raise ZeroDivisionError


def odd_refusal_of_rank(names: str | None, world: int) -> str:
    try:
        return refusal_of_rank(good_inputs(groups=getattr(Odd, names)() if names else ["a", "b"]), world)
    except (LookupError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("equal_nothing", "TypeError: groups must hold names that are equal on every rank (strings, numbers, tuples "),
        (
            "cannot_be_compared",
            "TypeError: groups must hold names that can be compared (strings, ints, tuples), got ['a'] for row 0",
        ),
        ("fail", "LookupError: no such prompt"),
        ("fail_without_a_word", "ZeroDivisionError: "),
    ],
)
def test_names_that_fail_on_their_rank_fail_on_all(names: str, message: str, ranks: Ranks) -> None:
    bad, good = ranks.call(odd_refusal_of_rank, [(names, 2), (None, 2)])
    assert bad.startswith(message)
    told = bad.split(": ", 1)[1] or bad.split(": ")[0]
    assert good == f"RuntimeError: gather_groups was refused on rank 0 of the group: {told}"


@pytest.mark.parametrize(
    ("name", "value", "usual", "came"),
    [
        ("token_ids", IDS.int(), "torch.int64 on cpu", "torch.int32 on cpu"),
        ("logprobs", IDS.half(), "torch.float32", "torch.float16"),
        ("response_mask", IDS, "None", "a mask"),
        ("groups", IDS[:, 0], "None", "a tensor"),
        ("groups", ["a", "b"], "None", "names"),
        ("group_size", 4, "None", "4"),
    ],
)
def test_ranks_that_do_not_fit_together(name: str, value: Any, usual: str, came: str, ranks: Ranks) -> None:
    calls = [(good_inputs(), 4), (good_inputs(), 4), (good_inputs(), 4), (good_inputs(**{name: value}), 4)]
    message = f"ValueError: {name} must be alike on every rank, got {usual} on rank 0 and {came} on rank 3"
    assert ranks.call(refusal_of_rank, calls) == [message] * 4


def test_runs_must_divide_the_rows_of_all_ranks(ranks: Ranks) -> None:
    calls = [(good_inputs(group_size=5), 2)] * 2
    for message in ranks.call(refusal_of_rank, calls):
        assert message == "ValueError: group_size must divide the number of rows of all ranks, 4, got 5"


def outsider_of_rank(size: int) -> str:
    """Asks the group of that size, also on ranks that are not in it."""
    return refusal_of_rank(good_inputs(), size)


def test_who_may_call(ranks: Ranks) -> None:
    answers = ranks.call(outsider_of_rank, [(2,)] * 4)
    for rank, answer in enumerate(answers):
        outside = f"ValueError: process_group must contain the calling rank, got one without rank {rank}"
        assert answer == ("nothing was refused" if rank in PAIR else outside)
    message = "torch.distributed must be initialised: call torch.distributed.init_process_group on every rank first"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        gather_groups(**good_inputs())


# Surprisal and entropy with the vocabulary split over the ranks.

INF = math.inf
# The least finite number is what masks write who do without -inf.
LOGITS = (0.0, -0.0, 1.0, -1.5, 3.0, 10.0, -30.0, 60.0, -INF, torch.finfo(torch.float32).min)
KINDS = {"any": LOGITS, "flat": (1.0,), "banned": (-INF,), "bad": (1.0, 60.0, -INF, INF, math.nan)}


class Split(NamedTuple):
    """Rows whose slices lie on the ranks, and everything else that a call takes."""

    logits: torch.Tensor
    sizes: list[int]
    ids: torch.Tensor
    temperature: float | torch.Tensor
    mask: torch.Tensor | None
    weights: list[torch.Tensor]  # gradients of the surprisal and of the entropy, which may not be asked for
    kept: list[list[int]] | None = None  # of a sampling mask

    def options(self, backend: str, **more: Any) -> dict[str, Any]:
        if self.kept is not None:
            more["sampling_mask"] = leafkernels.SamplingMask.from_lists(self.kept)
        return {"temperature": self.temperature, "response_mask": self.mask, "backend": backend, **more}

    def calls(self, options: dict[str, Any]) -> list[tuple]:
        slices = self.logits.split(self.sizes, dim=1)
        return [(part, self.ids, self.weights, options, len(self.sizes)) for part in slices]


@st.composite
def vocabularies(draw: st.DrawFn, world: int, dtypes: tuple[torch.dtype, ...]) -> Split:
    """Slices of any size, none too; of a row, some banned as a whole, or with an inf or a NaN."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=world, max_size=world))
    num_rows, vocab_size = draw(st.integers(1, 4)), sum(sizes)
    rows = [
        [
            draw(st.sampled_from(KINDS[kind]))
            for size in sizes
            for kind in [draw(st.sampled_from([*KINDS, "any"]))] * size
        ]
        for _ in range(num_rows)
    ]

    def per_row(values: st.SearchStrategy) -> st.SearchStrategy:
        return st.lists(values, min_size=num_rows, max_size=num_rows).map(torch.tensor)

    return Split(
        torch.tensor(rows).reshape(num_rows, vocab_size).to(draw(st.sampled_from(dtypes))),
        sizes,
        draw(per_row(st.integers(-1, vocab_size))),
        draw(st.sampled_from([1.0, 0.5]) | per_row(st.sampled_from([1.0, 0.5, 3.0]))),
        draw(st.none() | per_row(st.booleans())),
        [draw(per_row(st.sampled_from([1.0, -0.5, 0.0]))) for _ in range(draw(st.integers(1, 2)))],
        draw(
            st.none()
            | st.lists(st.lists(st.integers(-1, vocab_size), max_size=8), min_size=num_rows, max_size=num_rows)
        ),
    )


def surprisal_of_rank(
    logits: torch.Tensor, ids: torch.Tensor, weights: list[torch.Tensor], options: dict[str, Any], world: int
) -> tuple[torch.Tensor, ...]:
    """On each rank: surprisal, entropy and the gradient of its slice; in small blocks, so that a slice has several."""
    leaf = logits.clone().requires_grad_()
    small = mock.patch.multiple("leafkernels.kernels.surprisal", BLOCK=8, THREADS=1)
    with mock.patch("leafkernels.eager.surprisal._CHUNK", 8), small:
        found = leafkernels.surprisal_entropy(leaf * 1.0, ids, vocab_group=process_group(world), **options)
        (gradient,) = torch.autograd.grad(found[: len(weights)], leaf, [w.to(found.entropy.dtype) for w in weights])
    with torch.no_grad():
        again = leafkernels.surprisal_entropy(leaf * 1.0, ids, vocab_group=process_group(world), **options)
    torch.testing.assert_close(again, tuple(f.detach() for f in found), rtol=1e-5, atol=1e-6, equal_nan=True)
    return found.surprisal.detach(), found.entropy.detach(), gradient


def check_split(case: Split, answers: list[tuple[torch.Tensor, ...]]) -> None:
    """Against the reference on whole rows, in float64."""
    for found, first_answer in zip(zip(*answers, strict=True), answers[0], strict=True):
        if first_answer.dim() == 1:
            for answer in found:
                torch.testing.assert_close(answer, first_answer, rtol=0, atol=0, equal_nan=True)
    surprisal, entropy, _ = answers[0]
    gradient = torch.cat([answer[2] for answer in answers], dim=1)
    assert gradient.dtype == case.logits.dtype
    weights = [w.tolist() for w in case.weights] + [[0.0] * len(case.ids)]
    temperatures = torch.as_tensor(case.temperature).expand(len(case.ids)).tolist()
    for i, (row, token, t) in enumerate(zip(case.logits.double(), case.ids.tolist(), temperatures, strict=True)):
        if case.mask is not None and not case.mask[i]:
            assert surprisal[i] == entropy[i] == 0
            assert not gradient[i].any()
            continue
        masks = {"temperature": t, "sampling_mask": None if case.kept is None else [case.kept[i]]}
        (s,), (h,) = python_ref.surprisal_entropy([row.tolist()], [token], **masks)
        row = torch.tensor(mask_logits([row.tolist()], [token], masks["sampling_mask"])[0], dtype=row.dtype)
        counted = row[row.isfinite() & (row > torch.finfo(torch.float32).min)]
        lead = float(counted.max() - counted.min()) / t if counted.numel() else 0.0
        rtol = tolerance(case.logits.dtype, len(row), lead)
        for actual, want in ((surprisal[i], s), (entropy[i], h)):
            expected = torch.tensor(INF if want > torch.finfo(actual.dtype).max else want, dtype=torch.float64)
            torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=1e-30, equal_nan=True)
        if not len(row):
            continue
        a, b = (w[i] for w in weights[:2])
        (want,) = python_ref.surprisal_entropy_backward([a], [b], [case.logits[i].tolist()], [token], **masks)
        expected = torch.tensor(want, dtype=torch.float64)
        # Of each term its own error: that of p, and of p times log p + H, which may cancel; then one rounding.
        log_p = (row / t).log_softmax(0)
        p, is_token = log_p.exp(), torch.arange(len(row)) == token
        spread = torch.where(p > 0, p * (1 - log_p + h), 0.0)
        bound = 2 * rtol * (abs(a) * (p + is_token) + abs(b) * spread) / t
        bound += torch.finfo(case.logits.dtype).eps * expected.abs() + 1e-30
        error = (gradient[i].double() - expected).abs()
        assert (error.isnan() == expected.isnan()).all()
        assert (expected.isnan() | (error == 0) | (error <= bound)).all(), (error, bound)


PEAKED = torch.tensor([[61.0, 1.0, 1.0, 0.5, 1.0, -INF, -INF, 0.0], [0.0, 0.0, -INF, -INF, -INF, -INF, 61.0, 61.0]])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", WORLDS)
def test_a_split_vocabulary_gives_what_the_whole_one_gives(world: int, backend: str, ranks: Ranks) -> None:
    """Entropies of 1e-24, banned slices, rows that are no distribution, ids of any slice or none, masks."""
    if backend == "triton" and DEVICE == "cuda":
        pytest.skip("the processes compute on the CPU, where the kernels need the interpreter")
    dtypes = (torch.float32, torch.bfloat16) if backend == "triton" else (torch.float32, torch.bfloat16, torch.float64)

    @examples(backend, torch=100, triton=10)
    @given(vocabularies(world, dtypes), st.booleans())
    def check(case: Split, in_place: bool) -> None:
        options = case.options(backend, inplace_backward=in_place)
        check_split(case, ranks.call(surprisal_of_rank, case.calls(options)))

    check()
    weights = [torch.ones(2), torch.full((2,), 1e20)]
    case = Split(PEAKED, [8 // world] * world, torch.tensor([0, 7]), 1.0, None, weights)
    check_split(case, ranks.call(surprisal_of_rank, case.calls(case.options(backend))))


def statistics_of_rank(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    options: dict[str, Any],
    world: int,
) -> list[torch.Tensor]:
    """On each rank both forms, of its slice."""
    options = {**options, "statistics": STATISTICS, "vocab_group": process_group(world)}
    found = leafkernels.surprisal_entropy(logits, ids, **options)
    from_states = leafkernels.linear_surprisal_entropy(hidden, weight, ids, **options, chunk_tokens=2)
    return [tensor for result in (found, from_states) for tensor in result if tensor is not None]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_statistics_of_a_split_vocabulary(backend: str, ranks: Ranks) -> None:
    """The top in any slice, in two of them, banned slices, a slice without ids, kept ids, masks."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(6, 3, generator=generator), torch.randn(11, 3, generator=generator)
    logits = torch.randint(-2, 3, (6, 11), generator=generator).float()
    logits[0, [2, 9]] = 9.0
    logits[1, :7] = -INF
    logits[2] = -INF
    ids = torch.tensor([1, 10, 3, 7, 0, 12])
    for kept in (None, [[], [], [], [9, 2, 7], [3], [10]]):
        options: dict[str, Any] = {
            "temperature": 0.5,
            "response_mask": torch.tensor([1, 1, 1, 1, 0, 1]),
            "backend": backend,
        }
        options["sampling_mask"] = None if kept is None else leafkernels.SamplingMask.from_lists(kept)
        sizes = (7, 0, 3, 1)
        parts = zip(logits.split(sizes, 1), weight.split(sizes), strict=True)
        answers = ranks.call(statistics_of_rank, [(part, hidden, rows, ids, options, 4) for part, rows in parts])
        more: dict[str, Any] = {**options, "statistics": STATISTICS}
        whole = leafkernels.surprisal_entropy(logits, ids, **more)
        from_states = leafkernels.linear_surprisal_entropy(hidden, weight, ids, **more)
        for answer in answers:
            for actual, want in zip(answer, [*whole, *from_states], strict=True):
                torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-6, equal_nan=True)


def collectives_of_rank(logits: torch.Tensor, ids: torch.Tensor, world: int) -> tuple[list[int], list[int]]:
    """Bytes of the collectives of the forward pass, and of the backward pass."""
    with counted_collectives() as forward:
        found = leafkernels.surprisal_entropy(logits.requires_grad_(), ids, vocab_group=process_group(world))
    with counted_collectives() as backward:
        (found.surprisal.sum() + found.entropy.sum()).backward()
    return forward, backward


@pytest.mark.parametrize("vocab_size", [8, 8000])
def test_what_is_sent_does_not_grow_with_the_vocabulary(vocab_size: int, ranks: Ranks) -> None:
    """Two sizes, then one all-reduce for each reduction: the maximum, and five sums from there."""
    ids = torch.zeros(10, dtype=torch.int64)
    for sent in ranks.call(collectives_of_rank, [(torch.zeros(10, vocab_size), ids, 4)] * 4):
        assert sent == ([16, 10 * 4, 10 * 5 * 4], [])


def test_ranks_whose_rows_do_not_fit_together(ranks: Ranks) -> None:
    """On a CPU, where reading the numbers costs nothing."""
    calls = [(torch.zeros(num_rows, 4), torch.zeros(num_rows, dtype=torch.int64), 2) for num_rows in (3, 5)]
    message = r"token_ids must be the same on every rank of vocab_group, got \[3, 5\] rows by rank"
    with pytest.raises(RuntimeError, match=message):
        ranks.call(collectives_of_rank, calls)
    with pytest.raises(RuntimeError, match="torch.distributed must be initialised"):
        leafkernels.surprisal_entropy(torch.zeros(3, 4), torch.zeros(3).long(), vocab_group=object())


# Heads whose rows are split over the ranks, and the loss from slices of the logits.

HEAD = ("hidden", "lm_head_weight", "bias")


class Head(NamedTuple):
    """Hidden states, of which every rank has all, a head whose rows lie on the ranks, and weights of both results."""

    tensors: dict[str, Any]
    sizes: list[int]
    weights: torch.Tensor

    @classmethod
    def random(cls, seed: int, sizes: list[int], dtype: torch.dtype, rows: int = 7, width: int = 5) -> "Head":
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        vocabulary = sum(sizes)
        tensors = {
            "hidden": normal(rows, width),
            "lm_head_weight": normal(vocabulary, width),
            "token_ids": torch.randint(0, vocabulary, (rows,), generator=generator),
            "bias": normal(vocabulary),
            "temperature": torch.rand(rows, generator=generator) + 0.5,
            "response_mask": torch.arange(rows) % 3 != 1,
        }
        return cls(tensors, sizes, torch.rand(2, rows, generator=generator, dtype=torch.float64))

    def calls(self, frozen: tuple[str, ...] = (), **options: Any) -> list[tuple]:
        """On rank i the chunks are i + 1 tokens long, which no rank needs to know of another."""
        calls = []
        for rank, parts in enumerate(
            zip(*(self.tensors[name].split(self.sizes) for name in HEAD[1:]), strict=True), start=1
        ):
            tensors = {**self.tensors, **dict(zip(HEAD[1:], parts, strict=True))}
            calls.append((tensors, self.weights, frozen, {"chunk_tokens": rank, **options}, len(self.sizes)))
        return calls


def head_of_rank(
    tensors: dict[str, Any], weights: torch.Tensor, frozen: tuple[str, ...], options: dict[str, Any], world: int | None
) -> list[torch.Tensor]:
    """Surprisal, entropy, and the gradients of what is not frozen; in small blocks, and every run the same bits."""
    group = None if world is None else process_group(world)
    small = mock.patch.multiple("leafkernels.kernels.surprisal", BLOCK=8, THREADS=1)
    runs = []
    with mock.patch("leafkernels.eager.surprisal._CHUNK", 8), small:
        for _ in range(2):
            leaves = {k: tensors[k].detach().clone().requires_grad_(k not in frozen) for k in HEAD}
            found = leafkernels.linear_surprisal_entropy(**{**tensors, **leaves}, vocab_group=group, **options)
            (weights[0] * found.surprisal + weights[1] * found.entropy).sum().backward()
            runs.append([*(f.detach() for f in found), *(t.grad for t in leaves.values() if t.grad is not None)])
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    return runs[0]


def joined(answers: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """What every rank has alike (surprisal, entropy, the gradient of hidden), and the slices one after another."""
    alike, slices = [answer[:3] for answer in answers], [answer[3:] for answer in answers]
    for answer in alike:
        torch.testing.assert_close(answer, alike[0], rtol=0, atol=0, equal_nan=True)
    return alike[0] + [torch.cat(parts) for parts in zip(*slices, strict=True)]


HEADS = {2: [[4, 9], [13, 0]], 4: [[6, 1, 4, 9], [0, 7, 0, 13]]}


# Of seven rows the ids of a sampling mask: in one slice and in several, none, one, one that there is none of.
KEPT = [[0, 3, 3, 12], [1, 2], [], [12], [5, 99], [0], list(range(13))]


@pytest.mark.parametrize(("softcap", "masked"), [(None, False), (2.0, False), (None, True), (2.0, True)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", WORLDS)
def test_a_split_head_gives_what_the_whole_one_gives(
    world: int, backend: str, softcap: float | None, masked: bool, ranks: Ranks
) -> None:
    """Against one process in float64: uneven slices, and some without any row; over all ids, and over kept ones."""
    if backend == "triton" and DEVICE == "cuda":
        pytest.skip("the processes compute on the CPU, where the kernels need the interpreter")
    few = backend == "triton"  # the interpreter is slow
    dtypes = [torch.float32] if few else [torch.float32, torch.float64]
    for seed, (sizes, dtype) in enumerate(itertools.product(HEADS[world][few:], dtypes)):
        case = Head.random(seed, sizes, dtype)
        wide = {k: v.double() if v.is_floating_point() and k != "temperature" else v for k, v in case.tensors.items()}
        options: dict[str, Any] = {"logit_softcap": softcap}
        if masked:
            options["sampling_mask"] = leafkernels.SamplingMask.from_lists(KEPT)
        expected = head_of_rank(wide, case.weights, (), {**options, "backend": "torch"}, None)
        found = joined(ranks.call(head_of_rank, case.calls(**options, backend=backend)))
        for actual, want in zip(found, expected, strict=True):
            assert actual.dtype == dtype
            atol = linear_tolerance(5, sum(sizes), dtype, max(10.0, 4 * float(want.abs().max())))
            torch.testing.assert_close(actual.double(), want, rtol=0, atol=atol)


def divergence_of_rank(
    tensors: dict[str, torch.Tensor], options: dict[str, Any], world: int | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """From logits and from states: what every rank has alike, and the gradients of slices."""
    group = None if world is None else process_group(world)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    states = [leaves[name] for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")]
    mask, options = torch.arange(len(tensors["student_hidden"])) % 3 != 1, {**options, "vocab_group": group}
    alike, slices = [], []
    small = mock.patch.multiple("leafkernels.kernels.divergence", BLOCK=8, THREADS=1)
    with small, mock.patch.multiple("leafkernels.kernels.surprisal", BLOCK=8, THREADS=1):
        for found, leaf in (
            (
                leafkernels.linear_divergence(
                    *states, student_bias=leaves["student_bias"], response_mask=mask, chunk_tokens=3, **options
                ),
                [leaves["student_hidden"], leaves["student_weight"], leaves["student_bias"]],
            ),
            (leafkernels.divergence(leaves["student"], leaves["teacher"], **options), [leaves["student"]]),
        ):
            gradients = torch.autograd.grad((found.divergence - 0.3 * found.student_entropy).sum(), leaf)
            alike += [*(numbers.detach() for numbers in found), *gradients[: len(gradients) // 3]]
            slices += gradients[len(gradients) // 3 :]
    return alike, [*slices[:-1], slices[-1].T]  # ids first


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", WORLDS)
def test_split_vocabularies_diverge_as_the_whole_ones(world: int, backend: str, kind: str, ranks: Ranks) -> None:
    """Uneven slices, some without any id, and one whose ids the student's bias bans as a whole."""
    if backend == "triton" and (DEVICE == "cuda" or kind != "jsd"):
        pytest.skip("the processes compute on the CPU, where the kernels need the interpreter, which is slow")
    sizes = HEADS[world][1]
    ids = sum(sizes)
    shapes = {"student_hidden": (7, 5), "student_weight": (ids, 5), "student_bias": (ids,), "student": (7, ids)}
    shapes |= {"teacher_hidden": (7, 6), "teacher_weight": (ids, 6), "teacher": (7, ids)}
    generator = torch.Generator().manual_seed(world)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if kind == "reverse_kl":
        tensors["student_bias"][: sizes[1]] = -INF
    options = {"kind": kind, "beta": 0.3, "temperature": 0.7}
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    whole = divergence_of_rank(wide, {**options, "backend": "torch"}, None)
    dims = {"student_weight": 0, "student_bias": 0, "teacher_weight": 0, "student": 1, "teacher": 1}
    parts = {name: tensors[name].split(sizes, dim) for name, dim in dims.items()}
    calls = [
        ({**tensors, **{name: part[rank] for name, part in parts.items()}}, {**options, "backend": backend}, world)
        for rank in range(world)
    ]
    found = ranks.call(divergence_of_rank, calls)
    for alike, _ in found:
        for actual, want in zip(alike, whole[0], strict=True):
            torch.testing.assert_close(actual.double(), want.double(), rtol=1e-5, atol=1e-5)
    for i, want in enumerate(whole[1]):
        joint = torch.cat([slices[i] for _, slices in found])
        torch.testing.assert_close(joint.double(), want, rtol=1e-5, atol=1e-5)


def rows_of_other_ranks(logits: torch.Tensor, world: int) -> str:
    with pytest.raises(ValueError, match="^student_logits must have the same rows on every rank") as refused:
        leafkernels.divergence(logits, logits, vocab_group=process_group(world))
    return str(refused.value)


def test_divergences_refuse_what_ranks_do_not_share(ranks: Ranks) -> None:
    answers = ranks.call(rows_of_other_ranks, [(torch.zeros(rows, 3), 2) for rows in (2, 5)])
    assert (
        answers == ["student_logits must have the same rows on every rank of vocab_group, got [2, 5] rows by rank"] * 2
    )


def test_a_split_head_keeps_peaked_rows_and_banned_ids(ranks: Ranks) -> None:
    """The entropy of 1e-24 of a row whose top leads by 61; a slice that its bias bans as a whole; NaN in one row."""
    weight = torch.tensor([[61.0, 1.0, 1.0, 0.5, 1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, -2.0, 3.0, 0.0, 0.0]]).T
    tensors = {
        "hidden": torch.tensor([[1.0, 0.0], [0.0, 1.0], [math.nan, 0.0], [0.0, 1.0]]).double(),
        "lm_head_weight": weight.double(),
        "bias": torch.tensor([0.0] * 6 + [-INF] * 2).double(),
        "token_ids": torch.tensor([0, 7, 1, 9]),
    }
    case = Head(tensors, [2, 2, 2, 2], torch.ones(2, 4, dtype=torch.float64))
    expected = head_of_rank(tensors, case.weights, (), {}, None)
    assert 0 < expected[1][0] < 1e-22
    assert expected[0][1] == INF
    assert expected[0].isnan().tolist() == [False, False, True, True]
    found = joined(ranks.call(head_of_rank, case.calls()))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0, equal_nan=True)


def sharded_head_of_rank(
    hidden: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, world: int
) -> tuple[torch.Tensor, dict[str, str]]:
    """The gradient of a head that FSDP2 shards, by the way of the page; and what the functions say of a DTensor."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DeviceMesh, Partial, Replicate, distribute_tensor

    mesh = DeviceMesh.from_group(process_group(world), "cpu")
    head = torch.nn.Linear(*weight.T.shape, bias=False)
    head.weight.data.copy_(weight)
    fully_shard(head, mesh=mesh)
    logits = distribute_tensor(hidden @ weight.T, mesh, [Replicate()])
    zeros = torch.zeros(1, len(ids))
    said = {}
    for name, call in {
        "linear_surprisal_entropy": lambda: leafkernels.linear_surprisal_entropy(hidden, head.weight, ids),
        "surprisal_entropy": lambda: leafkernels.surprisal_entropy(logits, ids),
        "policy_loss_from_logits": lambda: leafkernels.policy_loss_from_logits(
            logits[None], ids[None], None, zeros, zeros + 1
        ),
    }.items():
        with pytest.raises(TypeError) as raised:
            call()
        said[name] = str(raised.value)
    whole = head.weight.full_tensor(grad_placements=[Partial("avg")])
    leafkernels.linear_surprisal_entropy(hidden, whole, ids).surprisal.mean().backward()
    return head.weight.grad.full_tensor(), said


def test_a_head_that_fsdp_shards(ranks: Ranks) -> None:
    """A DTensor is refused; made whole as the page has it, its gradient is the mean over the ranks, as FSDP2's are."""
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(8, 6, generator=generator), torch.randn(11, 6, generator=generator)
    ids = torch.arange(8)
    calls = [(hidden[part], ids[part], weight, 2) for part in (slice(0, 4), slice(4, 8))]
    leaf = weight.clone().requires_grad_()
    leafkernels.linear_surprisal_entropy(hidden, leaf, ids).surprisal.mean().backward()
    for gradient, said in ranks.call(sharded_head_of_rank, calls):
        torch.testing.assert_close(gradient, leaf.grad)
        for name, message in said.items():
            argument, shape = ("lm_head_weight", "(11, 6)") if name.startswith("linear") else ("logits", "(")
            assert message.startswith(f"{argument} must be a torch.Tensor of this rank, as full_tensor() or to_local()")
            assert f"got a DTensor of global shape {shape}" in message


def test_masked_tokens_and_bounds_of_the_live_ones_of_a_split_head(ranks: Ranks) -> None:
    """Masked tokens are not read; a bound changes nothing, and what a bound too small leaves out is NaN."""
    case = Head.random(3, [6, 3], torch.float64)
    clean = joined(ranks.call(head_of_rank, case.calls()))
    mask = case.tensors["response_mask"]
    case.tensors["hidden"][~mask], case.tensors["token_ids"][~mask] = math.nan, 1000
    assert mask.sum() == 5
    for bound in (None, 5, 7):
        found = joined(ranks.call(head_of_rank, case.calls(num_live=bound)))
        for actual, want in zip(found, clean, strict=True):
            # A product of matrices with another number of rows may add up in another order.
            atol = linear_tolerance(10, 9, torch.float64, 4 * float(want.abs().max()))
            torch.testing.assert_close(actual, want, rtol=0, atol=atol)
    found = joined(ranks.call(head_of_rank, case.calls(num_live=4)))
    last = int(mask.nonzero()[-1])
    for result in found[:2]:
        assert result.isnan().nonzero().flatten().tolist() == [last]
    case.tensors["response_mask"][:] = False
    for result in joined(ranks.call(head_of_rank, case.calls())):
        assert not result.any()


def test_a_split_head_in_half_precision(ranks: Ranks) -> None:
    """The gradient of hidden is a sum of four products, each rounded, with three sums of them: no more is lost."""
    sizes = [40, 30, 10, 20]
    case = Head.random(4, sizes, torch.bfloat16, rows=32, width=16)
    found = joined(ranks.call(head_of_rank, case.calls(backend="torch")))
    whole = head_of_rank(case.tensors, case.weights, (), {"backend": "torch"}, None)
    wide = {k: v.double() if k in HEAD else v for k, v in case.tensors.items()}
    exact = head_of_rank(wide, case.weights, (), {}, None)
    unit = torch.finfo(torch.bfloat16).eps / 2
    for number, (ours, unsplit, want) in enumerate(zip(found, whole, exact, strict=True)):
        assert ours.dtype == unsplit.dtype
        roundings = 7 if number == 2 else 1
        assert (ours.double() - want).norm() <= (unsplit.double() - want).norm() + roundings * unit * want.norm()


def head_traffic_of_rank(*arguments: Any) -> tuple[int, list[int]]:
    """How many results came back, and the bytes of each collective of two passes forward and back."""
    with (
        mock.patch("leafkernels.vocabulary.chunks.add_product", side_effect=AssertionError),
        counted_collectives() as sent,
    ):
        found = head_of_rank(*arguments)
    return len(found), sent


@pytest.mark.parametrize("frozen", [HEAD[1:], HEAD[:2]])
def test_what_a_split_head_sends(frozen: tuple[str, ...], ranks: Ranks) -> None:
    """However many chunks: the two sizes, a maximum and five sums for each row, and back the gradient of hidden,
    where it has one; a frozen weight costs no product."""
    case = Head.random(5, [6, 3], torch.float32)
    back = [7 * 5 * 4] if "hidden" not in frozen else []
    for answer in ranks.call(head_traffic_of_rank, case.calls(frozen)):
        assert answer == (3, 2 * ([16, 7 * 4, 7 * 5 * 4] + back))


def test_a_split_head_under_autocast_and_without_a_gradient(ranks: Ranks) -> None:
    case = Head.random(6, [6, 3], torch.float32)
    answers = ranks.call(autocast_of_rank, case.calls())
    rounded = {k: v.bfloat16() if k in HEAD else v for k, v in case.tensors.items()}
    expected = leafkernels.linear_surprisal_entropy(**rounded)
    for answer in answers:
        torch.testing.assert_close(answer, tuple(expected), rtol=1e-5, atol=1e-6)


def autocast_of_rank(
    tensors: dict[str, Any], _weights: torch.Tensor, _frozen: tuple[str, ...], options: dict[str, Any], world: int
) -> tuple[torch.Tensor, ...]:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return tuple(leafkernels.linear_surprisal_entropy(**tensors, vocab_group=process_group(world), **options))


def loss_of_rank(logits: torch.Tensor, tensors: dict[str, Any], options: dict[str, Any], world: int | None) -> tuple:
    """The fields of the loss, and the gradient of this rank's slice of the logits."""
    leaf = logits.clone().requires_grad_()
    options = options if world is None else {**options, "vocab_group": process_group(world)}
    result = leafkernels.policy_loss_from_logits(leaf, **tensors, **options)
    result.loss.backward()
    assert not any(statistic.requires_grad for statistic in result[1:])
    with torch.no_grad():
        again = leafkernels.policy_loss_from_logits(leaf, **tensors, **options)
    torch.testing.assert_close(tuple(again), tuple(f.detach() for f in result), rtol=1e-6, atol=1e-7)
    return tuple(f.detach() for f in result), leaf.grad


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_the_loss_from_slices_over_kept_ids(importance: str, backend: str, ranks: Ranks) -> None:
    """Rows that keep all ids, those of one slice, or of two, and masked ones: as whole rows that -inf fills."""
    inputs = {name: tensor.cpu() for name, tensor in loss_inputs(7, 2, 4, 12, torch.float64).items()}
    logits = inputs.pop("logits")
    kept = [[], [0, 1, 2], [11], [], [3, 9], [0, 11], list(range(12)), [5]]
    mask = leafkernels.SamplingMask.from_lists(kept)
    options = {"kl_coef": 0.1, "entropy_coef": 0.05, "importance": importance, "backend": backend}
    sizes = (3, 0, 7, 2)
    calls = [(part, inputs, {**options, "sampling_mask": mask}, 4) for part in logits.split(sizes, -1)]
    answers = ranks.call(loss_of_rank, calls)
    whole = loss_of_rank(logits, inputs, {**options, "sampling_mask": mask}, None)
    flat = logits.flatten(0, 1).tolist()
    filled = mask_logits(flat, inputs["token_ids"].flatten().tolist(), kept)
    by_hand = loss_of_rank(torch.tensor(filled, dtype=torch.float64).view_as(logits), inputs, options, None)
    for found, _ in answers:
        torch.testing.assert_close(found, whole[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found, by_hand[0], rtol=1e-9, atol=1e-12)
    gradient = torch.cat([answer[1] for answer in answers], -1)
    torch.testing.assert_close(gradient, whole[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, by_hand[1], rtol=1e-9, atol=1e-12)
    assert gradient[:, :, 3:10].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", WORLDS)
def test_the_loss_from_slices_is_that_from_whole_rows(world: int, backend: str, ranks: Ranks) -> None:
    """In float64 to its rounding; in float32, of numbers of order 1, no rounding leaves 2e-5."""
    if backend == "triton" and DEVICE == "cuda":
        pytest.skip("the processes compute on the CPU, where the kernels need the interpreter")
    dtype, error = (torch.float32, 2e-5) if backend == "triton" else (torch.float64, 1e-10)
    every = {"kl_coef": 0.1, "entropy_coef": 0.01, "clip": (0.1, 0.15), "aggregate": "constant", "constant": 7.0}
    few = backend == "triton"  # the interpreter is slow
    for seed, options in enumerate(
        (every, {"entropy_coef": 0.01, "aggregate": "sequence_mean"}, {})[: 1 if few else 3]
    ):
        tensors = loss_inputs(seed, 3, 4, sum(HEADS[world][0]), dtype)
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        out = ~tensors["response_mask"]
        for name in ("logits", "advantages", "old_logprobs"):
            tensors[name][out] = math.nan
        if seed == 1:
            tensors["old_logprobs"] = None
        logits = tensors.pop("logits")
        expected, gradient = loss_of_rank(logits, tensors, {**options, "backend": "torch"}, None)
        for sizes in HEADS[world][few:]:
            calls = [(part, tensors, {**options, "backend": backend}, world) for part in logits.split(sizes, dim=2)]
            answers = ranks.call(loss_of_rank, calls)
            for found, _ in answers:
                torch.testing.assert_close(found, answers[0][0], rtol=0, atol=0)
                torch.testing.assert_close(found, expected, rtol=error, atol=error)
            found_gradient = torch.cat([grad_slice for _, grad_slice in answers], dim=2)
            torch.testing.assert_close(found_gradient, gradient, rtol=error, atol=error)


def vocabulary_refusal_of_rank(name: str, rows: int, world: int) -> str:
    """What a function of a split vocabulary says, with so many rows, to a group of that size."""
    ids, group = torch.zeros(1, rows, dtype=torch.int64), process_group(world)
    try:
        if name == "linear_surprisal_entropy":
            leafkernels.linear_surprisal_entropy(torch.zeros(1, rows, 3), torch.zeros(4, 3), ids, vocab_group=group)
        else:
            ones, logits = torch.ones(1, rows), torch.zeros(1, rows, 4)
            leafkernels.policy_loss_from_logits(logits, ids, None, ones, ones, vocab_group=group)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("name", ["linear_surprisal_entropy", "policy_loss_from_logits"])
def test_what_every_function_of_a_split_vocabulary_refuses(name: str, ranks: Ranks) -> None:
    message = "token_ids must be the same on every rank of vocab_group, got [3, 5] rows by rank"
    assert ranks.call(vocabulary_refusal_of_rank, [(name, 3, 2), (name, 5, 2)]) == [message] * 2
    for rank, answer in enumerate(ranks.call(vocabulary_refusal_of_rank, [(name, 3, 2)] * 4)):
        outside = f"vocab_group must contain the calling rank, got one without rank {rank}"
        assert answer == ("nothing was refused" if rank in PAIR else outside)
    with (
        mock.patch.object(sys.modules[__name__], "process_group", lambda _: object()),
        pytest.raises(RuntimeError, match="torch.distributed must be initialised"),
    ):
        vocabulary_refusal_of_rank(name, 3, 2)


def both_of_rank(backend: str, device: str, rows: dict[str, Any], logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """On each of a pair of ranks, joined by ``backend``: advantages, and surprisal, entropy and gradient."""
    pair = dist.new_group(list(PAIR), backend=backend, use_local_synchronization=True)
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank(pair))
    rows = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in rows.items()}
    gathered = gather_groups(**rows, process_group=pair)
    advantages = gathered.local(leafkernels.span_advantages(**gathered.inputs))
    leaf = logits.to(device).requires_grad_()
    ids = torch.arange(len(logits), device=device)
    found = leafkernels.surprisal_entropy(leaf, ids, vocab_group=pair)
    (found.surprisal + found.entropy).sum().backward()
    assert leaf.grad is not None
    states = torch.eye(len(logits), device=device)  # of which a head with the logits as its columns makes the logits
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    leafkernels.surprisal_entropy(leaf, ids, vocab_group=pair)
    from_states = leafkernels.linear_surprisal_entropy(states, leaf.T, ids, vocab_group=pair)
    (grad_slice,) = torch.autograd.grad((from_states.surprisal + from_states.entropy).sum(), leaf)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close((*from_states, grad_slice), (*found, leaf.grad), rtol=1e-5, atol=1e-6)
    return tuple(t.detach().cpu() for t in (advantages, *found, leaf.grad))


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("gloo", "cpu"),
        pytest.param(
            "nccl",
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
        ),
    ],
)
def test_both_with_either_kind_of_process_group(backend: str, device: str, ranks: Ranks) -> None:
    """On GPUs also that a split vocabulary synchronises nothing."""
    group = {name: tensor.cpu() for name, tensor in random_group(7, 50, seed=2, vocabulary=3).items()}
    mask = torch.arange(50) < torch.tensor([50, 20, 31, 0, 50, 44, 7])[:, None]
    whole = group | {"response_mask": mask, "groups": torch.tensor([0, 1, 0, 1, 1, 0, 0])}
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(7))
    calls = []
    for rows, part in ((slice(0, 2), logits[:, :30]), (slice(2, 7), logits[:, 30:])):
        calls.append((backend, device, {name: tensor[rows] for name, tensor in whole.items()}, part))
    answers = ranks.call(both_of_rank, calls)
    advantages = torch.cat([answer[0] for answer in answers])
    torch.testing.assert_close(advantages, leafkernels.span_advantages(**whole), rtol=2e-7, atol=1e-8)
    leaf = logits.requires_grad_()
    found = leafkernels.surprisal_entropy(leaf, torch.arange(6))
    (found.surprisal + found.entropy).sum().backward()
    for answer in answers:
        torch.testing.assert_close(answer[1:3], tuple(f.detach() for f in found), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([answer[3] for answer in answers], 1), leaf.grad, rtol=1e-4, atol=1e-6)


def snippet_of_rank(snippet: str, names: dict[str, Any], result: str) -> torch.Tensor:
    names["tensor_parallel_group"] = process_group(4)
    exec(snippet, names)
    return names[result].detach()


def test_the_snippets_of_the_documentation(ranks: Ranks) -> None:
    rows, vocabulary, head, from_logits = (block.text for block in pages.blocks(pages.read("distributed.md"), "python"))
    group = {name: tensor.cpu() for name, tensor in random_group(8, 9, seed=3, vocabulary=2).items()}
    group["response_mask"] = torch.ones(8, 9)
    uids = list("aaabbbba")
    parts = [slice(2 * rank, 2 * rank + 2) for rank in range(4)]
    names = [{name: tensor[part] for name, tensor in group.items()} | {"uids": uids[part]} for part in parts]
    advantages = torch.cat(ranks.call(snippet_of_rank, [(rows, rank_names, "advantages") for rank_names in names]))
    assert torch.equal(advantages, leafkernels.span_advantages(**group, groups=leafkernels.group_index(uids)))

    logits, ids = torch.randn(2, 9, 24), torch.randint(0, 24, (2, 9))
    slices = [{"logits_slice": part.clone().requires_grad_(), "token_ids": ids} for part in logits.split(6, dim=2)]
    losses = ranks.call(snippet_of_rank, [(vocabulary, rank_slice, "loss") for rank_slice in slices])
    found = leafkernels.surprisal_entropy(logits, ids, temperature=0.9)
    for loss in losses:
        torch.testing.assert_close(loss, (found.surprisal + 0.01 * found.entropy).mean(), rtol=1e-5, atol=0)

    hidden, weight, bias = torch.randn(2, 9, 5), torch.randn(24, 5), torch.randn(24)
    logits = hidden @ weight.T + bias
    shared = {"token_ids": ids, "response_mask": torch.ones(2, 9), "old_logprobs": -torch.ones(2, 9)}
    shared |= {"advantages": torch.randn(2, 9)}
    expected = leafkernels.policy_loss_from_logits(logits, **shared).loss
    for snippet, slices in (
        (head, zip(weight.split(6), bias.split(6), strict=True)),
        (from_logits, logits.split(6, dim=2)),
    ):
        names = []
        for part in slices:
            own = {"logits_slice": part} if snippet is from_logits else {"weight_slice": part[0], "bias_slice": part[1]}
            own = {name: tensor.clone().requires_grad_() for name, tensor in own.items()}
            names.append({"hidden": hidden.clone().requires_grad_(), **own, **shared})
        for loss in ranks.call(snippet_of_rank, [(snippet, rank_names, "loss") for rank_names in names]):
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_the_page_of_slime_on_two_ranks(ranks: Ranks) -> None:
    """Its scheduler deals the rollouts of a prompt out; a rank alone would give zeros."""
    deal = [[0, 4, 5], [3, 1, 2]]
    whole = expected(example())
    for rows, found in zip(deal, ranks.call(slime_of_rank, [(rows,) for rows in deal]), strict=True):
        assert any(row.any() for row in found)
        for i, row in zip(rows, found, strict=True):
            assert torch.equal(row, whole[i].cpu())


@every_estimator
@pytest.mark.parametrize("functions", [0, 3])
def test_step_rewards_and_several_functions_on_ranks(name: str, functions: int, ranks: Ranks) -> None:
    """Rows of one prompt on two ranks, padded on one and packed on the other: the bits of one process."""
    generator = torch.Generator().manual_seed(functions)
    group = {key: tensor.cpu() for key, tensor in random_group(6, 9, seed=2, vocabulary=2).items()}
    whole: dict[str, Any] = group | {"groups": torch.arange(6) % 2}
    whole["step_rewards"] = torch.randn(6, 9, generator=generator)
    whole["response_mask"] = torch.arange(9) != 4 * torch.ones(6, 1)
    if functions:
        whole["rewards"] = torch.rand(6, functions, generator=generator)
        whole["rewards"][2, 1] = math.nan
    else:
        whole["rewards"] = None
    if functions and name == "maxrl":
        pytest.skip("takes one reward a row")
    more: dict[str, Any] = {"reward_weights": [1.0, -0.5, 2.0]} if functions else {}
    if takes(name, "states"):
        whole |= {"steps": torch.arange(9).expand(6, 9) // 4, "states": torch.arange(9).expand(6, 9) % 2}
    if takes(name, "sum_squares"):
        whole["sum_squares"] = torch.rand(6, 9, generator=generator)
    expected = leafkernels.ESTIMATORS[name](**whole, **more)
    calls = []
    for rows in (slice(0, 2), slice(2, 6)):
        part = {key: tensor if tensor is None else tensor[rows] for key, tensor in whole.items()}
        if rows.start:
            flat = {
                key: tensor.flatten() for key, tensor in part.items() if tensor is not None and tensor.shape[1:] == (9,)
            }
            part |= flat | {"cu_seqlens": torch.arange(0, 37, 9, dtype=torch.int32)}
        calls.append((part | more, {}, 2, name))
    found = torch.cat([rows.reshape(-1, 9) for rows in ranks.call(advantages_of_rank, calls)])
    assert torch.equal(found, expected)


def test_rewards_that_ranks_give_in_other_forms(ranks: Ranks) -> None:
    inputs: dict[str, Any] = {"logprobs": torch.zeros(2, 3), "token_ids": torch.zeros(2, 3, dtype=torch.int64)}
    steps, rewards = {"step_rewards": torch.zeros(2, 3)}, {"rewards": torch.zeros(2)}
    for first, second, text in (
        (rewards, steps, "rewards must be alike on every rank, got shape .'rows',. on rank 0 and None on rank 1"),
        (
            rewards,
            rewards | steps,
            "step_rewards must be alike on every rank, got None on rank 0 and a tensor on rank 1",
        ),
    ):
        with pytest.raises(RuntimeError, match=text):
            ranks.call(advantages_of_rank, [(inputs | first, {}, 2), (inputs | second, {}, 2)])
