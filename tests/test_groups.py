"""group_index."""

import math
import re
from typing import Any

import numpy
import pytest
import torch
from rollouts import DEVICE, random_group

import leafkernels


def test_numbers_names_in_order_of_appearance() -> None:
    index = leafkernels.group_index(["b", "a", "b", ("x", 1), "a"], device=DEVICE)
    assert index.tolist() == [0, 1, 0, 2, 1]
    assert index.dtype == torch.int64
    assert leafkernels.group_index([]).shape == (0,)


IDS = torch.tensor([7, 3, 7, 7])


@pytest.mark.parametrize(
    "names",
    [IDS, IDS.int(), IDS.double(), list(IDS), [(i, "a") for i in IDS], IDS.numpy(), list(IDS.numpy()), iter(IDS)]
    + [
        [numpy.array(int(i)) for i in IDS],
        [("a", (i,)) for i in IDS.numpy()],
        numpy.array(["u", "v", "u", "u"], object),
    ]
    + [[IDS[0], 3, numpy.int64(7), 7.0]],
)
def test_what_tensors_and_arrays_hold_is_the_name(names: Any) -> None:
    """Tensors hash by identity: taken as they are, every row would be a prompt of its own."""
    assert leafkernels.group_index(names).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (IDS.view(2, 2), ValueError, "names must hold one name for each row, shape (rows,), got shape (2, 2)"),
        (numpy.array(3), ValueError, "names must hold one name for each row, shape (rows,), got shape ()"),
        ([1.0, math.nan], ValueError, "names must not hold NaN, which equals no other name, got nan for row 1"),
        (
            [("a", math.nan)],
            ValueError,
            "names must not hold NaN, which equals no other name, got ('a', nan) for row 0",
        ),
        (
            IDS * torch.tensor([1, math.nan, 1, 1]),
            ValueError,
            "names must not hold NaN, which equals no other name, got nan for row 1",
        ),
        (
            [0, IDS],
            TypeError,
            "names must hold names that can be compared (strings, ints, tuples), got [7, 3, 7, 7] for row 1",
        ),
        ("abab", TypeError, "names must be a list or a tensor of names for the rows, got str"),
        (3, TypeError, "names must be a list or a tensor of names for the rows, got int"),
    ],
)
def test_names_that_name_nothing(names: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        leafkernels.group_index(names)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_scattered_groups_equal_their_prompts_alone(backend: str) -> None:
    group = random_group(6, 12, seed=9, vocabulary=2)
    names = ["u1", "u2", "u1", "u1", "u2", "u3"]
    advantages = leafkernels.span_advantages(
        **group, groups=leafkernels.group_index(names, device=DEVICE), backend=backend
    )
    for name in set(names):
        rows = [i for i, other in enumerate(names) if other == name]
        alone = leafkernels.span_advantages(**{k: v[rows] for k, v in group.items()}, backend=backend)
        assert torch.equal(advantages[rows], alone)
