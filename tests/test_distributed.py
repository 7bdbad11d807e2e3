"""Groups that straddle ranks, with 2 and 4 gloo processes: every rank gets its part of the single-process result."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import PAIR, WORLDS, Ranks, process_group
from rollouts import Rollouts, random_group, rollouts

import leafkernels
from leafkernels.distributed import gather_groups

Split = list[tuple[Rollouts, str, int]]  # of each rank: rows, layout, and columns of padding more than they need


def advantages_of_rank(inputs: dict[str, Any], options: dict[str, Any], world: int) -> torch.Tensor:
    """What a trainer writes, on each rank."""
    gathered = gather_groups(**inputs, process_group=process_group(world))
    return gathered.local(leafkernels.span_advantages(**gathered.inputs, **options))


def inputs_of(case: Rollouts, layout: str, extra: int = 0) -> dict[str, Any]:
    inputs = case.packed() if layout == "packed" else case.padded(layout, extra)
    return {name: tensor.cpu() for name, tensor in inputs.items()}


def with_groups(inputs: dict[str, Any], groups: str | int | None) -> dict[str, Any]:
    """The groups as they are, as names, or the given int or None."""
    if groups == "tensor":
        return inputs
    if groups == "names":
        return inputs | {"groups": [f"prompt {name}" for name in inputs["groups"].tolist()]}
    return inputs | {"groups": groups}


@st.composite
def splits(draw: st.DrawFn, world: int) -> tuple[Rollouts, Split, str | int | None]:
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


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_gets_its_part_of_what_one_process_computes(world: int, ranks: Ranks) -> None:
    """Bit for bit: uneven rows, none, other lengths and paddings on each rank, NaN rewards, any naming of groups."""

    @settings(max_examples=100)
    @given(splits(world))
    def check(drawn: tuple[Rollouts, Split, str | int | None]) -> None:
        case, split, groups = drawn
        whole = with_groups(inputs_of(case, "right", extra=1), "tensor" if groups == "names" else groups)
        # As integers: 0 and -0 are not the same bits.
        rows = iter(case.rows_of(leafkernels.span_advantages(**whole, **case.options).view(torch.int32)))

        calls = [(with_groups(inputs_of(*of_rank), groups), case.options, world) for of_rank in split]
        for (of_rank, layout, _), (inputs, *_), found in zip(
            split, calls, ranks.call(advantages_of_rank, calls), strict=True
        ):
            assert found.dtype == torch.float32
            assert found.shape == inputs["token_ids"].shape
            assert not found[~inputs["response_mask"]].any()
            for row in of_rank.rows_of(found.view(torch.int32), layout):
                assert row == next(rows)

    check()


@pytest.mark.parametrize("ids", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sends_every_dtype_as_it_comes(dtype: torch.dtype, ids: torch.dtype, ranks: Ranks) -> None:
    """Without a mask, in strided views, with rewards that ask for a gradient."""
    group = {name: tensor.cpu() for name, tensor in random_group(6, 40, seed=1, vocabulary=3).items()}
    logprobs, token_ids = group["logprobs"].to(dtype), group["token_ids"].to(ids)
    rewards = group["rewards"].requires_grad_()
    expected = leafkernels.span_advantages(logprobs, token_ids, rewards, groups=3)
    calls = []
    for rows in (slice(0, 1), slice(1, 6)):
        wide = torch.zeros(rows.stop - rows.start, 90, dtype=ids)
        wide[:, 5:85:2] = token_ids[rows]
        inputs = {"logprobs": logprobs[rows].T.contiguous().T, "token_ids": wide[:, 5:85:2], "groups": 3}
        calls.append((inputs | {"rewards": rewards[rows].detach().requires_grad_()}, {}, 2))
    found = torch.cat(ranks.call(advantages_of_rank, calls))
    assert torch.equal(found, expected)
    assert not found.requires_grad


def traffic_of_rank(inputs: dict[str, Any], world: int) -> tuple[dict[str, torch.Size], list[int]]:
    """Shapes of what was gathered, and the bytes of each collective that brought it."""
    sent = []
    gather = dist.all_gather_into_tensor

    def counted(output: torch.Tensor, own: torch.Tensor, **options: Any) -> None:
        sent.append(own.numel() * own.element_size())
        gather(output, own, **options)

    with mock.patch.object(dist, "all_gather_into_tensor", counted):
        gathered = gather_groups(**inputs, process_group=process_group(world))
    return {k: v.shape for k, v in gathered.inputs.items() if isinstance(v, torch.Tensor)}, sent


def test_padding_is_not_sent(ranks: Ranks) -> None:
    """A token costs its id, its log-probability and a byte; a row two numbers, and one more if a tensor names it."""
    mask = torch.zeros(3, 1000, dtype=torch.bool)
    mask[0, 5:15], mask[1, :20], mask[2, 990:] = True, True, True
    mask[1, 4:9] = False  # a hole is part of its row
    inputs = {"logprobs": torch.zeros(3, 1000), "token_ids": torch.zeros(3, 1000, dtype=torch.int64)}
    inputs |= {"rewards": torch.zeros(3), "response_mask": mask, "groups": torch.zeros(3, dtype=torch.int32)}
    for shapes, sent in ranks.call(traffic_of_rank, [(inputs, 2)] * 2):
        of_rows = {"rewards": (6,), "groups": (6,), "cu_seqlens": (7,)}
        assert shapes == of_rows | dict.fromkeys(("logprobs", "token_ids", "response_mask"), (80,))
        assert sum(sent) == 40 * (8 + 4 + 1) + 3 * (8 + 8 + 8)
        assert len(sent) == 6


def wrong_tokens_of_rank() -> str:
    with pytest.raises(ValueError) as refusal:
        gather_groups(**good_inputs(), process_group=process_group(2)).local(torch.zeros(2, 3))
    return str(refusal.value)


def test_local_takes_what_was_gathered(ranks: Ranks) -> None:
    message = "tokens must have the shape of the gathered token_ids, (12,), got shape (2, 3)"
    assert ranks.call(wrong_tokens_of_rank, [()] * 2) == [message] * 2


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
            "TypeError: groups must be an int, an integer tensor or a list of names for the rows, got str",
        ),
        ({"groups": 0}, "ValueError: groups must be at least 1, got 0"),
        ({"groups": True}, "TypeError: groups must be an int, got bool"),
    ],
)
def test_a_rank_that_is_refused_tells_the_others(changes: dict[str, Any], message: str, ranks: Ranks) -> None:
    """Nobody hangs, and everybody knows why."""
    bad, good = ranks.call(refusal_of_rank, [(good_inputs(**changes), 2), (good_inputs(), 2)])
    assert bad == message
    assert good == f"RuntimeError: gather_groups was refused on rank 0 of the group: {message.split(': ', 1)[1]}"


@pytest.mark.parametrize(
    ("name", "value", "usual", "came"),
    [
        ("token_ids", IDS.int(), "torch.int64 on cpu", "torch.int32 on cpu"),
        ("logprobs", IDS.half(), "torch.float32", "torch.float16"),
        ("response_mask", IDS, "None", "a mask"),
        ("groups", IDS[:, 0], "None", "a tensor"),
        ("groups", ["a", "b"], "None", "names"),
        ("groups", 4, "None", "4"),
    ],
)
def test_ranks_that_do_not_fit_together(name: str, value: Any, usual: str, came: str, ranks: Ranks) -> None:
    calls = [(good_inputs(), 4), (good_inputs(), 4), (good_inputs(), 4), (good_inputs(**{name: value}), 4)]
    message = f"ValueError: {name} must be alike on every rank, got {usual} on rank 0 and {came} on rank 3"
    assert ranks.call(refusal_of_rank, calls) == [message] * 4


def test_runs_must_divide_the_rows_of_all_ranks(ranks: Ranks) -> None:
    calls = [(good_inputs(groups=5), 2)] * 2
    for message in ranks.call(refusal_of_rank, calls):
        assert message == "ValueError: groups must be a divisor of the number of rows of all ranks, 4, got 5"


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
