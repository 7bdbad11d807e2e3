"""KTAE: what goes with having a token; tests/test_laws.py has the laws of all schemes."""

import itertools
import math

import pytest
import torch
from rollouts import DEVICE, assert_rows_close

import leafkernels
import python_ref
from leafkernels.credit import key_tokens
from python_ref.key_tokens import fisher, information, key_value


def test_the_parts_by_hand() -> None:
    """The lady tasting tea: of 4 and 4 cups 3 and 1; 34 of 70 ways are no likelier."""
    assert math.isclose(fisher(3, 1, 4, 4), math.exp(-2 * 34 / 70))
    assert fisher(2, 2, 4, 4) == fisher(4, 4, 4, 4) == fisher(1, 1, 1, 3) == 0.0
    assert math.isclose(fisher(4, 0, 4, 4), math.exp(-2 * 2 / 70))
    assert math.isclose(information(4, 0, 4, 4), 1.0)
    assert math.isclose(information(2, 2, 4, 4), 0.0, abs_tol=1e-15)
    # One of two right rows has it, and both wrong ones: H(1/2) - 3/4 H(1/3).
    bits = -(math.log2(1 / 3) + 2 * math.log2(2 / 3)) / 3
    assert math.isclose(information(1, 2, 2, 2), 1 - 0.75 * bits)
    assert key_value(5, [[5, 5, 1]], [[5, 1, 2]]) == 0.0  # in all rows: no association
    found = key_value(5, [[5, 5, 1], [1, 1, 1]], [[5, 1, 2], [5, 5, 5]])
    often, seldom = 3 * (2 / 6) / (2 / 6 + 2), 3 * (4 / 6) / (4 / 6 + 2)
    direction = math.asin(math.sqrt(0.5)) - math.pi / 2 + often / (seldom + 1e-5) - seldom / (often + 1e-5)
    assert math.isclose(found, math.tanh((1 - 0.75 * bits) * direction / 4))


def test_every_table_of_few_rows() -> None:
    tables = [
        (a, b, right, wrong)
        for right, wrong in itertools.product(range(1, 9), repeat=2)
        for a, b in itertools.product(range(right + 1), range(wrong + 1))
    ]
    columns = torch.tensor(tables, dtype=torch.float64, device=DEVICE).T
    for found, reference in (
        (key_tokens._fisher(*columns, 16), fisher),
        (key_tokens._information(*columns), information),
    ):
        expected = torch.tensor([reference(*table) for table in tables], dtype=torch.float64, device=DEVICE)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_many_rows_agree_with_the_reference(seed: int) -> None:
    """Two prompts of 30 rows in turn, with holes and rows that are not scored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (60, 12), generator=generator)
    ids[:, 0] = 3
    rewards = (torch.rand(60, generator=generator) < 0.4).double()
    rewards[7] = math.nan
    mask = torch.rand(60, 12, generator=generator) < 0.8
    groups = torch.arange(60) % 2
    steps = torch.where(torch.rand(60, 12, generator=generator) < 0.1, -0.5, 0.0)
    call = {"response_mask": mask, "groups": groups}
    for more in ({}, {"step_rewards": steps}):
        tensors = {key: tensor.to(DEVICE) for key, tensor in {**call, **more}.items()}
        found = leafkernels.ktae(torch.zeros(60, 12, device=DEVICE), ids.to(DEVICE), rewards.to(DEVICE), **tensors)
        lists = {key: tensor.tolist() for key, tensor in {**call, **more}.items()}
        expected = python_ref.ktae([[0.0] * 12] * 60, ids.tolist(), rewards.tolist(), **lists)
        assert_rows_close(found.tolist(), expected)


def test_rows_that_are_all_right_or_all_wrong_have_the_credit_of_grpo() -> None:
    ids = torch.tensor([[1, 2], [1, 3], [4, 2]], device=DEVICE)
    for rewards in ([1.0, 0.5, 0.25], [-1.0, 0.0, -0.5]):
        call = torch.zeros(3, 2, device=DEVICE), ids, torch.tensor(rewards, device=DEVICE)
        torch.testing.assert_close(leafkernels.ktae(*call), leafkernels.grpo(*call), rtol=2e-7, atol=0)
