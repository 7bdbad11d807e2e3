"""group_index."""

import pytest
import torch
from rollouts import DEVICE, random_group

import leafkernels


def test_numbers_names_in_order_of_appearance() -> None:
    index = leafkernels.group_index(["b", "a", "b", ("x", 1), "a"], device=DEVICE)
    assert index.tolist() == [0, 1, 0, 2, 1]
    assert index.dtype == torch.int64
    assert leafkernels.group_index([]).shape == (0,)


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
