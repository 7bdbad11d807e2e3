"""The kinds of policy losses: each backend against the reference, and the reference against the written formulas."""

import math
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE
from torch import Tensor

import leafkernels
import python_ref
from leafkernels.losses.aggregates import AGGREGATES
from leafkernels.losses.kinds import KINDS, KL_KINDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Of each kind its defaults, and others.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "clip": [{}, {"clip": (0.1, 0.3), "dual_clip": 1.2, "max_log_ratio": 0.5}, {"importance": "sequence"}],
    "cispo": [{}, {"clip": (0.1, 0.2), "max_log_ratio": 0.3}, {"clip": (0.1, 0.1), "importance": "sequence"}],
    "sapo": [{}, {"tau": (2.0, 0.5), "max_log_ratio": 0.3}, {"importance": "sequence"}],
    "vespo": [{}, {"shape": (1.0, 2.0), "shape_negative": (2.0, 0.5)}],
    "gmpo": [{}, {"clip": (0.1, 0.2)}],
    "dppo_tv": [{}, {"clip": (0.01, 0.02), "max_ratio": 1.1}],
    "dppo_kl": [{}, {"clip": (0.001, 0.002), "max_ratio": 1.1, "max_log_ratio": 0.3}],
    "dro": [{}, {"beta": 0.3}],
    "reinforce": [{}],
    "clip_cov": [{}, {"share": 0.3, "covariance": (-1.0, 2.0), "clip": (0.1, 0.1)}],
    "kl_cov": [{}, {"share": 0.4, "penalty": 0.5}],
    "fipo": [{}, {"half_life": 1.5, "future_clip": (0.5, 0.5), "dual_clip": 1.5}],
}
CASES = [(kind, options) for kind, cases in OPTIONS.items() for options in cases]
KL = st.fixed_dictionaries(
    {"kl_coef": st.sampled_from([0.0, 0.3]), "kl_kind": st.sampled_from(KL_KINDS), "kl_weighted": st.booleans()}
)


def test_every_kind_is_tried() -> None:
    assert set(OPTIONS) == set(KINDS) == set(python_ref.LOSS_KINDS)
    for kind, entry in KINDS.items():
        ours = {name: value for name, value in entry.options.items() if name != "max_log_ratio"}
        assert ours == python_ref.LOSS_KINDS[kind]


def inputs(seed: int, lengths: list[int], dtype: torch.dtype = torch.float64, spread: float = 0.3) -> dict[str, Tensor]:
    """Packed tensors of rows of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def normal() -> Tensor:
        return torch.randn(total, generator=generator, dtype=torch.float64)

    old = -torch.rand(total, generator=generator, dtype=torch.float64) * 3 - 0.05
    tensors = {
        "logprobs": (old + normal() * spread).clamp_max(-0.01),
        "old_logprobs": old,
        "advantages": normal() * (torch.rand(total, generator=generator) < 0.8),
        "ref_logprobs": old + normal() * 0.2,
        "entropy": normal().abs(),
        "token_weights": normal().abs() * (torch.rand(total, generator=generator) < 0.9),
    }
    tensors = {name: tensor.to(DEVICE, dtype) for name, tensor in tensors.items()}
    tensors["response_mask"] = (torch.rand(total, generator=generator) < 0.7).to(DEVICE)
    return tensors


def padded(tensor: Tensor, lengths: list[int], fill: float = math.nan) -> Tensor:
    width = max(lengths, default=0)
    rows = [torch.nn.functional.pad(row, (0, width - len(row)), value=fill) for row in tensor.split(lengths)]
    return torch.stack(rows) if rows else tensor.new_zeros((0, 0))


def in_layout(tensors: dict[str, Tensor], lengths: list[int], packed: bool) -> dict[str, Tensor]:
    if packed:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
        return tensors | {"cu_seqlens": bounds}
    return {
        name: padded(tensor, lengths, 0 if tensor.dtype == torch.bool else math.nan) for name, tensor in tensors.items()
    }


def loss_and_gradients(**arguments: Any) -> tuple[Any, Tensor, Tensor]:
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in ("logprobs", "entropy")}
    result = leafkernels.policy_loss(**{**arguments, **leaves})
    return result, *torch.autograd.grad(result.loss, tuple(leaves.values()), materialize_grads=True)


def by_reference(tensors: dict[str, Tensor], lengths: list[int], **options: Any) -> tuple[list[float], Tensor, Tensor]:
    """What ``python_ref`` makes of rows of different lengths."""
    lists = {name: [row.tolist() for row in tensor.split(lengths)] for name, tensor in tensors.items()}
    values = list(python_ref.policy_loss(**lists, **options).values())
    lists.pop("entropy")
    grads = python_ref.policy_loss_backward(**lists, **options)
    flat = (torch.tensor([x for row in table for x in row], dtype=torch.float64) for table in grads)
    return values, *flat


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{kind} {options}" for kind, options in CASES])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_agrees_with_the_reference(
    backend: str, kind: str, options: dict[str, Any], small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, statistics and gradients, padded and packed; float32 sums of at most 20 numbers of order 1 in Triton."""
    dtype, tolerance = (torch.float32, 3e-5) if backend == "triton" else (torch.float64, 1e-12)
    drawn = torch.rand(40, generator=torch.Generator().manual_seed(7)).to(DEVICE)

    @given(
        st.integers(0, 10**6),
        st.lists(st.integers(0, 6), min_size=1, max_size=3),
        KL,
        st.booleans(),
        st.sampled_from(sorted(AGGREGATES)),
        st.booleans(),
        st.booleans(),
    )
    @settings(
        max_examples=4 if backend == "triton" else 20,
        phases=[Phase.generate] if backend == "triton" else [Phase.generate, Phase.shrink],
    )
    def run(
        seed: int,
        lengths: list[int],
        kl: dict[str, Any],
        packed: bool,
        aggregate: str,
        is_part: bool,
        is_weighted: bool,
    ) -> None:
        tensors = inputs(seed, lengths, dtype)
        if not is_weighted:
            del tensors["token_weights"]
        entry = AGGREGATES[aggregate]
        words = {**options, **kl, "kind": kind, "aggregate": aggregate, "entropy_coef": 0.1}
        if entry.constant == "needed" or (packed and entry.constant):
            words["constant"] = 7.0
        if is_part:
            words |= {"num_tokens": 31} if entry.all_tokens else {"num_rows": 5} if entry.rows else {}
        row_tables = drawn[: sum(lengths)]
        chosen = row_tables if packed else padded(row_tables, lengths)
        for module in ("policy_loss", "policy_loss_from_logits"):
            path = f"leafkernels.losses.{module}.drawn_numbers"
            monkeypatch.setattr(path, lambda _: chosen, raising=True)
        found, *grads = loss_and_gradients(**in_layout(tensors, lengths, packed), **words, backend=backend)
        if kind == "clip_cov":
            words["drawn"] = [row.tolist() for row in row_tables.split(lengths)]
        if entry.constant == "width" and not packed:
            words["constant"] = max(lengths) or 1
        values, *expected = by_reference(tensors, lengths, **words)
        for name, ours, theirs in zip(found._fields, found, values, strict=True):
            assert float(ours.detach()) == pytest.approx(theirs, rel=tolerance, abs=tolerance), name
        for ours, theirs in zip(grads, expected, strict=True):
            theirs = theirs if packed else padded(theirs, lengths, 0.0)
            torch.testing.assert_close(ours.double().cpu(), theirs, rtol=tolerance, atol=tolerance)

    run()
