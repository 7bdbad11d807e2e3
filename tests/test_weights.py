"""Weights of tokens that keep entropy up: against the reference, by hand, and what is refused."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import DEVICE
from support import examples

import leafkernels
import python_ref

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 0.5, -2.0])
LOGPROBS = st.sampled_from([-0.1, -1.0, -1.0, -3.0, -math.inf, math.nan])
SHARES = st.sampled_from([0.0, 0.1, 0.5, 1 / 3, 1.0])


@given(st.data(), st.integers(0, 12), SHARES, st.booleans(), st.booleans())
@examples(torch=150)
def test_stare_agrees_with_the_reference(data: Any, size: int, share: float, masked: bool, gated: bool) -> None:
    def draw(values: Any) -> list[Any]:
        return data.draw(st.lists(values, min_size=size, max_size=size))

    advantages, logprobs, mask = draw(NUMBERS), draw(LOGPROBS), draw(st.booleans()) if masked else None
    options: dict[str, Any] = {"share": share, "up": 1.25, "down": 0.75}
    more = {"entropy": draw(st.sampled_from([0.0, 1.0, 2.0])), "target_entropy": 1.0} if gated else {}
    expected = python_ref.stare_weights(advantages, logprobs, mask, **options, **more)
    if gated:
        more["entropy"] = torch.tensor(more["entropy"], device=DEVICE).float()
    found = leafkernels.stare_weights(
        torch.tensor(advantages, device=DEVICE).float(),
        torch.tensor(logprobs, device=DEVICE).float(),
        None if mask is None else torch.tensor(mask, device=DEVICE).bool(),
        **options,
        **more,
    )
    assert found.tolist() == expected


@given(st.lists(st.tuples(NUMBERS, st.sampled_from([0.0, 0.3, 1.0, 9.0])), max_size=9), st.sampled_from([1.5, 2.0]))
@examples(torch=100)
def test_entropy_weights_agree_with_the_reference(pairs: list[tuple[float, float]], kappa: float) -> None:
    advantages, entropy = ([pair[k] for pair in pairs] for k in (0, 1))
    expected = python_ref.entropy_weights(advantages, entropy, alpha=0.25, kappa=kappa)
    tensors = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (advantages, entropy))
    found = leafkernels.entropy_weights(*tensors, alpha=0.25, kappa=kappa)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert all(weight > 0 for weight in found.tolist())


@given(st.data(), st.integers(0, 12), SHARES, st.booleans())
@examples(torch=100)
def test_top_entropy_agrees_with_the_reference(data: Any, size: int, share: float, masked: bool) -> None:
    values = st.sampled_from([0.0, 0.5, 0.5, 2.0, math.inf, -math.inf, math.nan])
    entropy = data.draw(st.lists(values, min_size=size, max_size=size))
    mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size)) if masked else None
    found = leafkernels.top_entropy_weights(
        torch.tensor(entropy, device=DEVICE).float(),
        None if mask is None else torch.tensor(mask, device=DEVICE).bool(),
        share=share,
    )
    assert found.tolist() == python_ref.top_entropy_weights(entropy, mask, share=share)


def test_top_entropy_by_hand() -> None:
    """A fifth of ten tokens, over all rows; a masked one is none of them."""
    entropy = torch.tensor([[0.1, 2.0, 0.3, 0.2, 0.1], [0.2, 1.0, 0.0, 9.0, 3.0]], device=DEVICE)
    assert leafkernels.top_entropy_weights(entropy).tolist() == [[0] * 5, [0, 0, 0, 1, 1]]
    mask = torch.ones(2, 5, device=DEVICE)
    mask[1, 3] = 0
    assert leafkernels.top_entropy_weights(entropy, mask).tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert leafkernels.top_entropy_weights(entropy, share=0.0).sum() == 0
    with pytest.raises(ValueError, match="share must lie between 0 and 1, got 1.2"):
        leafkernels.top_entropy_weights(entropy, share=1.2)
    with pytest.raises(TypeError, match="entropy must be floating point .*, got torch.int64"):
        leafkernels.top_entropy_weights(mask.long())


def test_by_hand() -> None:
    """Of four tokens above 0 the half of least log-probability, over all rows; of two below 0 one."""
    advantages = torch.tensor([[1.0, 2.0, -1.0], [1.0, 1.0, -1.0]], device=DEVICE)
    logprobs = torch.tensor([[-3.0, -0.1, -5.0], [-0.2, -2.0, -6.0]], device=DEVICE)
    found = leafkernels.stare_weights(advantages, logprobs, share=0.5, down=0.5)
    torch.testing.assert_close(found, torch.tensor([[1.1, 1.0, 1.0], [1.0, 1.1, 0.5]], device=DEVICE))
    entropy = torch.full((2, 3), 0.3, device=DEVICE)
    for target, is_on in ((0.2, False), (0.4, True)):
        gated = leafkernels.stare_weights(advantages, logprobs, share=0.5, entropy=entropy, target_entropy=target)
        assert bool((gated != 1.0).any()) == is_on


ONES = torch.ones(2, device=DEVICE)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "kind", "text"),
    [
        ("stare_weights", (ONES.long(), ONES), {}, TypeError, "advantages must be floating point"),
        ("stare_weights", (ONES, ONES[:1]), {}, ValueError, "logprobs must have the shape of advantages, .2,., got"),
        ("stare_weights", (ONES, ONES), {"share": 2}, ValueError, "share must lie between 0 and 1, got 2"),
        ("stare_weights", (ONES, ONES), {"up": 0.0}, ValueError, "up must be positive, got 0.0"),
        ("stare_weights", (ONES, ONES), {"entropy": ONES}, ValueError, "entropy and target_entropy must be given toge"),
        ("entropy_weights", (ONES, ONES), {"alpha": -1}, ValueError, "alpha must be at least 0, got -1"),
        ("entropy_weights", (ONES, ONES), {"kappa": 1}, ValueError, "kappa must be above 1, got 1"),
        ("entropy_weights", (ONES, ONES[:1]), {}, ValueError, "entropy must have the shape of advantages, .2,., got"),
    ],
)
def test_refusals(function: str, arguments: Any, options: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        getattr(leafkernels, function)(*arguments, **options)
