"""The kinds of policy losses: each backend against the reference, and the reference against the written formulas."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rollouts import BACKENDS, DEVICE
from torch import Tensor

import leafkernels
import python_ref
from leafkernels import surprisal_entropy
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
    "kl_cov": [{}, {"share": 0.4, "penalty": 0.7}],
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
        max_examples={"triton": 4, "reference": 3}.get(backend, 12),
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


def as_written(kind: str, x: dict[str, Tensor], **given: Any) -> Tensor:
    """(N, T): the value of each token as docs/losses.md writes it, for autograd; the reference knows its own slopes."""
    options = {**python_ref.LOSS_KINDS[kind], **given}
    mask, logprobs, old, advantages = (x[name] for name in ("response_mask", "logprobs", "old_logprobs", "advantages"))
    log_ratio = torch.where(mask, logprobs - old, 0.0)
    count = mask.sum(1, keepdim=True).clamp_min(1)
    bound = options.get("max_log_ratio") or math.inf
    if options.get("importance") == "sequence":
        log_ratio = logprobs - logprobs.detach() + (log_ratio.sum(1, keepdim=True) / count).detach()
    ratio = log_ratio.clamp(-bound, bound).exp()
    low, high = options.get("clip", (0.0, 0.0))
    if kind in ("clip", "fipo"):
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        if options["dual_clip"]:
            loss = torch.where(advantages < 0, torch.minimum(loss, -options["dual_clip"] * advantages), loss)
        if kind == "fipo":
            below, above = options["future_clip"]
            places = torch.arange(loss.shape[1], dtype=loss.dtype, device=loss.device)
            distance = places - places[:, None]
            discount = torch.where(distance >= 0, 0.5 ** (distance / options["half_life"]), 0.0).to(loss)
            loss = loss * (log_ratio.detach() @ discount.T).exp().clamp(1 - below, 1 + above)
        return loss
    if kind == "cispo":
        return -ratio.clamp(1 - low, 1 + high).detach() * advantages * logprobs
    if kind == "sapo":
        tau = torch.where(advantages > 0, *(torch.tensor(t, dtype=torch.float64) for t in options["tau"]))
        return -4 / tau * (tau * (ratio - 1)).sigmoid() * advantages
    if kind == "vespo":
        log_w = log_ratio.clamp(-20, 20).sum(1, keepdim=True)
        if "token_weights" in x:
            log_w = log_w + torch.where(mask, x["token_weights"].log().clamp(math.log(1e-8), 20), 0.0).sum(1)[:, None]
        log_w = log_w.clamp(math.log(1e-8), 20).detach()
        phi = [
            (scale + k * log_w - scale * log_w.exp()).exp()
            for k, scale in (options["shape"], options["shape_negative"])
        ]
        return -torch.where(advantages < 0, phi[1], phi[0]) * advantages * logprobs
    if kind == "gmpo":
        # A row's own value, whose derivative is shared out over its tokens by their own advantages.
        side = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
        side = torch.where(mask & (advantages != 0), side, 0.0)
        return -(side - side.detach() + (side.sum(1, keepdim=True) / count).detach()).exp() * advantages
    if kind in ("dppo_tv", "dppo_kl"):
        p, q = logprobs.exp(), old.exp()
        distance = (p - q).abs()
        if kind == "dppo_kl":
            distance = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        is_far = torch.where(advantages > 0, (p > q) & (distance > high), (p < q) & (distance > low))
        return -ratio.clamp(max=options["max_ratio"]).detach() * advantages * logprobs * ~is_far
    if kind == "dro":
        return -(advantages * logprobs - options["beta"] / 2 * log_ratio**2)
    if kind == "reinforce":
        return -advantages * logprobs
    chosen = mask.nonzero()
    centred = [value - value[mask].mean() for value in (advantages, logprobs.detach())]
    covariance = (centred[0] * centred[1])[mask]
    most = max(int(options["share"] * len(chosen)), 1)
    marked = torch.zeros_like(mask)
    if kind == "kl_cov":
        marked[tuple(chosen[covariance.topk(most).indices].T)] = True
        return -ratio * advantages + marked.to(ratio) * options["penalty"] * log_ratio.abs()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    is_open = (ratio.clamp(1 - low, 1 + high) * advantages >= ratio * advantages)[mask]
    is_open &= (covariance > options["covariance"][0]) & (covariance < options["covariance"][1])
    order = torch.where(is_open, x["drawn"][mask], 2.0).argsort()[: min(most, int(is_open.sum()))]
    marked[tuple(chosen[order].T)] = True
    return loss * ~marked


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{kind} {options}" for kind, options in CASES])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_are_those_of_the_formula(
    weighted: bool, kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, of PyTorch's own derivative of what is written: sums of 24 numbers of order 1."""
    for seed in range(8):
        tensors = in_layout(inputs(seed, [8, 5, 8]), [8, 5, 8], packed=False)
        tensors = {name: tensor.nan_to_num(0.0) for name, tensor in tensors.items()}
        weights = tensors.pop("token_weights")
        weights[:, 0] = 1.5
        mask = tensors["response_mask"]
        drawn = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).double().to(DEVICE)
        monkeypatch.setattr("leafkernels.losses.policy_loss.drawn_numbers", lambda _, drawn=drawn: drawn)
        leaf = tensors["logprobs"].clone().requires_grad_()
        arguments = {**tensors, "logprobs": leaf}
        scale = 1.0
        if weighted:
            arguments["token_weights"] = weights
            scale = weights if kind != "vespo" else 1.0
        values = as_written(kind, {**arguments, "drawn": drawn}, **options) * scale
        expected = torch.where(mask, values, 0.0).sum()
        (want,) = torch.autograd.grad(expected, leaf)
        found = leafkernels.policy_loss(**arguments, kind=kind, aggregate="sum", **options)
        (gradient,) = torch.autograd.grad(found.loss, leaf)
        torch.testing.assert_close(found.loss, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(gradient, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kl_weighted", [False, True])
@pytest.mark.parametrize("kl_kind", KL_KINDS)
def test_the_gradient_of_each_divergence_is_that_which_the_page_names(kl_kind: str, kl_weighted: bool) -> None:
    """A policy that is a table, and all its tokens, each as often as the policy that sampled draws it."""
    generator = torch.Generator().manual_seed(1)
    logits, other, third = torch.randn(3, 7, dtype=torch.float64, generator=generator).to(DEVICE).unbind()
    logits.requires_grad_()
    policy, ref = logits.log_softmax(0), other.log_softmax(0)
    # Without the ratio the statement is of tokens that the policy itself has sampled.
    old = (third if kl_weighted else logits.detach()).log_softmax(0)
    leaf = policy.detach().clone().requires_grad_()
    parts = []
    for token in range(7):
        of_token = [x[token].view(1, 1) for x in (leaf, old, torch.zeros_like(old), torch.ones_like(old))]
        options = {"kl_coef": 1.0, "kl_kind": kl_kind, "kl_weighted": kl_weighted, "aggregate": "sum"}
        parts.append(leafkernels.policy_loss(*of_token, ref_logprobs=ref[token].view(1, 1), **options).loss)
    (slopes,) = torch.autograd.grad((torch.stack(parts) * old.exp()).sum(), leaf)
    (found,) = torch.autograd.grad((slopes * policy).sum(), logits, retain_graph=True)
    p, d = policy.exp(), policy - ref
    of_policy = {
        "KL(policy || ref)": (p * d).sum(),
        "KL(ref || policy)": -(ref.exp() * policy).sum(),
        "twice the total variation": (p - ref.exp()).abs().sum(),
        "the mean of its square": (p * d**2 / 2).sum(),
        "the mean of its absolute value": (p * d.abs()).sum(),
        "nothing": 0 * p.sum(),
    }
    says = {
        ("k1", False): "nothing",
        ("k2", False): "KL(policy || ref)",
        ("k3", False): "KL(ref || policy)",
        ("abs", False): "twice the total variation",
        ("k3+", False): "KL(policy || ref)",
        ("k1", True): "KL(policy || ref)",
        ("k2", True): "the mean of its square",
        ("k3", True): "KL(policy || ref)",
        ("abs", True): "the mean of its absolute value",
        ("k3+", True): "KL(policy || ref)",
    }[kl_kind, kl_weighted]
    gradients = {}
    for name, value in of_policy.items():
        (gradients[name],) = torch.autograd.grad(value, logits, retain_graph=True)
    torch.testing.assert_close(found, gradients.pop(says), rtol=1e-12, atol=1e-13)
    assert all((found - gradient).abs().max() > 1e-3 for gradient in gradients.values())


HARD = [-math.inf, -90.0, -1.0, 0.0]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_hard_rows(kind: str) -> None:
    """Each pair of hard log-probabilities and advantage: the backends agree, also where the answer is no number.

    Rubbish beside them that is masked has no gradient. In float32, where e^90 overflows.
    """
    kl = {"kl_coef": 0.1, "kl_kind": "k2", "kl_weighted": True}
    for importance in ("token", "sequence") if KINDS[kind].sequences else ("token",):
        cases = [(p, q, a) for p in HARD for q in HARD for a in (-1.5, 0.0, 2.0)]
        columns = [torch.tensor(column, dtype=torch.float32, device=DEVICE) for column in zip(*cases, strict=True)]
        ones = torch.ones_like(columns[0])
        tensors = [
            torch.stack((ones * math.nan, column, ones * math.inf), 1) for column in (*columns, ones, columns[1], ones)
        ]
        names = "logprobs", "old_logprobs", "advantages", "token_weights", "ref_logprobs", "entropy"
        arguments = dict(zip(names, tensors, strict=True))
        arguments["response_mask"] = torch.stack((ones * 0, ones, ones * 0), 1)
        if KINDS[kind].reads == "token" and importance == "token":
            arguments = {name: tensor.reshape(1, -1) for name, tensor in arguments.items()}
        # Each alone where a kind reads the batch, which would let one row's NaN into all.
        step = 1 if KINDS[kind].reads == "batch" else len(ones)
        results = []
        for backend in ("torch", "triton"):
            options = {"kind": kind, "importance": importance, "aggregate": "sum", "backend": backend, **kl}
            parts = []
            for i in range(0, len(ones), step):
                part = {name: tensor[i : i + step] for name, tensor in arguments.items()}
                parts.append(loss_and_gradients(**part, **options)[1])
            results.append(torch.cat(parts))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6, equal_nan=True)
        assert not results[0].view(-1, 3)[:, [0, 2]].any()


def test_a_weight_of_0_and_an_advantage_of_0_lose_nothing_of_an_infinite_ratio() -> None:
    for kind in sorted(KINDS):
        for advantage, weight in ((0.0, 1.0), (-1.0, 0.0)):
            # A penalty of the distance is infinite; "vespo" takes a weight of 0 for a small factor of its ratio.
            if (kind in ("dro", "kl_cov") and weight) or (kind == "vespo" and not weight):
                continue
            numbers = {"logprobs": -1.0, "old_logprobs": -math.inf, "advantages": advantage, "token_weights": weight}
            tensors = {name: torch.full((1, 1), number, device=DEVICE) for name, number in numbers.items()}
            tensors |= {"response_mask": torch.ones(1, 1, device=DEVICE), "entropy": torch.zeros(1, 1, device=DEVICE)}
            for backend in ("torch", "triton", "reference"):
                found, gradient, _ = loss_and_gradients(**tensors, kind=kind, backend=backend)
                assert float(found.loss.detach()) == 0, (kind, backend)
                assert float(gradient) == 0, (kind, backend)


def test_no_rows_and_rows_of_nothing() -> None:
    for kind in sorted(KINDS):
        for lengths in ([], [0], [0, 0]):
            for packed in (True, False):
                tensors = in_layout(inputs(0, lengths), lengths, packed)
                for backend in ("torch", "reference"):
                    found, *_ = loss_and_gradients(**tensors, kind=kind, backend=backend)
                    assert [float(x.detach()) for x in found] == [0.0] * 6, (kind, lengths, packed, backend)
                tensors = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
                found, *_ = loss_and_gradients(**tensors, kind=kind, backend="triton")
                assert [float(x.detach()) for x in found] == [0.0] * 6, (kind, lengths, packed, "triton")


@pytest.mark.parametrize("aggregate", sorted(AGGREGATES))
def test_the_losses_of_micro_batches_add_up(aggregate: str) -> None:
    """Value and gradient, with counts of the whole step, as integers and as tensors; a constant is as it is."""
    entry = AGGREGATES[aggregate]
    lengths = [4, 0, 6, 3, 5]
    tensors = in_layout(inputs(3, lengths), lengths, packed=False)
    tensors["response_mask"][3] = False
    options: dict[str, Any] = {"aggregate": aggregate, "kl_coef": 0.1, "entropy_coef": 0.1}
    if entry.constant:
        options["constant"] = 11.0
    whole, *expected = loss_and_gradients(**tensors, **options)
    alive = int(tensors["response_mask"].any(1).sum())
    if entry.all_tokens:
        options["num_tokens"] = int(tensors["response_mask"].sum())
    elif entry.rows:
        options["num_rows"] = torch.tensor(alive if entry.rows == "alive" else len(lengths), device=DEVICE)
    parts = []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        parts.append(loss_and_gradients(**{name: x[rows] for name, x in tensors.items()}, **options))
    torch.testing.assert_close(sum(part[0].loss for part in parts), whole.loss, rtol=1e-13, atol=1e-14)
    for i, want in enumerate(expected):
        torch.testing.assert_close(torch.cat([part[1 + i] for part in parts]), want, rtol=1e-13, atol=1e-14)


def test_a_step_without_a_token_has_the_loss_0() -> None:
    """As a batch without one has, whose tokens are counted by the call; and no NaN of 0 / 0."""
    tensors = in_layout(inputs(0, [3, 2]), [3, 2], packed=False)
    masked = tensors | {"response_mask": tensors["response_mask"] & False}
    for backend in ("torch", "reference"):
        for count in (0, torch.tensor(0, device=DEVICE)):
            for options in ({"num_tokens": count}, {"num_rows": count, "aggregate": "sequence_mean"}):
                found, *gradients = loss_and_gradients(**masked, backend=backend, **options)
                assert float(found.loss.detach()) == 0
                assert not any(gradient.any() for gradient in gradients)
                if DEVICE == "cpu" and backend == "torch":  # where it is seen
                    with pytest.raises(
                        ValueError, match=r"^num_(tokens|rows) must be positive where tokens count, got 0"
                    ):
                        loss_and_gradients(**tensors, backend=backend, **options)


def test_a_weighted_divergence_of_0_is_0_whatever_the_ratio() -> None:
    """Policy and reference agree about a token that the old policy found next to impossible."""
    for kl_kind in KL_KINDS:
        for old in (-200.0, -math.inf):
            numbers = {"logprobs": -1.0, "old_logprobs": old, "advantages": 1.0, "ref_logprobs": -1.0}
            tensors = {name: torch.full((1, 1), number, device=DEVICE) for name, number in numbers.items()}
            tensors |= {"response_mask": torch.ones(1, 1, device=DEVICE), "entropy": torch.zeros(1, 1, device=DEVICE)}
            for backend in ("torch", "triton", "reference"):
                options = {"kl_coef": 0.5, "kl_kind": kl_kind, "kl_weighted": True, "backend": backend}
                found, gradient, _ = loss_and_gradients(**tensors, **options)
                assert float(found.loss.detach()) == pytest.approx(-1.2), (kl_kind, backend)
                assert float(found.mean_kl) == 0, (kl_kind, backend)
                # The mean of k1 has a gradient of its own.
                assert kl_kind == "k1" or float(gradient) == 0, (kl_kind, backend)


def test_log_probabilities_that_rounding_left_above_0_are_0() -> None:
    """Their KL is that of certainty, and no NaN, which would let tokens pass that have moved far."""
    for policy, old, advantage in ((1e-6, -1.0, 1.0), (-1.0, 1e-6, -1.0), (1e-6, 1e-6, 1.0), (1e-6, -1e-3, 1.0)):
        results = []
        for change in (0.0, 1.0):
            numbers = {"logprobs": policy, "old_logprobs": old, "advantages": advantage}
            tensors = {
                name: torch.full((1, 1), number if change or name == "advantages" else min(number, 0.0), device=DEVICE)
                for name, number in numbers.items()
            }
            tensors |= {"response_mask": torch.ones(1, 1, device=DEVICE), "entropy": torch.zeros(1, 1, device=DEVICE)}
            for backend in ("torch", "triton", "reference"):
                found, *_ = loss_and_gradients(**tensors, kind="dppo_kl", backend=backend)
                results.append(float(found.clip_fraction))
        assert len(set(results)) == 1, (policy, old, results)


def test_errors() -> None:
    tensors = in_layout(inputs(0, [3, 4]), [3, 4], packed=False)
    tensors = {name: tensor.nan_to_num(0.0) for name, tensor in tensors.items()}

    def check_refuses(error: type[Exception], message: str, **changes: Any) -> None:
        for backend in ("torch", "reference"):
            with pytest.raises(error, match=f"^{re.escape(message)}"):
                leafkernels.policy_loss(**{**tensors, **changes}, backend=backend)

    check_refuses(ValueError, f"kind must be one of {', '.join(map(repr, KINDS))}, got 'ppo'", kind="ppo")
    message = "tau must be left out with kind='clip', which reads clip, dual_clip, max_log_ratio, got tau=(1.0, 1.0)"
    check_refuses(ValueError, message, tau=(1.0, 1.0))
    message = "clip must be left out with kind='reinforce', which reads no option, got clip=(0.2, 0.2)"
    check_refuses(ValueError, message, kind="reinforce", clip=(0.2, 0.2))
    check_refuses(ValueError, "dual_clip must be left out with kind='cispo'", kind="cispo", dual_clip=3.0)
    check_refuses(TypeError, "klcoef is no option of a policy loss; kind='clip' reads clip, dual_clip", klcoef=0.1)
    message = "importance must be 'token' with kind='gmpo', got 'sequence', which 'clip', 'cispo', 'sapo' have"
    check_refuses(ValueError, message, kind="gmpo", importance="sequence")
    message = "clip must be (below, above) with below >= 0 and above >= 0, got (-0.1, 0.4)"
    check_refuses(ValueError, message, kind="gmpo", clip=(-0.1, 0.4))
    check_refuses(ValueError, "clip must be (below, above) with 0 <= below <= 1", kind="cispo", clip=(2.0, 0.4))
    check_refuses(TypeError, "tau must be a pair (where the advantage is positive", kind="sapo", tau=1.0)
    check_refuses(ValueError, "tau must be positive, got 0", kind="sapo", tau=(0, 1))
    check_refuses(TypeError, "beta must be a number, got str", kind="dro", beta="1")
    check_refuses(ValueError, "max_ratio must be positive, got -1", kind="dppo_tv", max_ratio=-1)
    check_refuses(ValueError, "share must be at most 1, got 2", kind="kl_cov", share=2)
    message = "covariance must be (low, high) with low < high, got (1, 1)"
    check_refuses(ValueError, message, kind="clip_cov", covariance=(1, 1))
    check_refuses(ValueError, "future_clip must be at least 0, got -1", kind="fipo", future_clip=(-1, 0))
    check_refuses(ValueError, "kl_kind must be one of 'k3', 'k1', 'k2', 'abs', 'k3+', got 'k4'", kl_kind="k4")
    check_refuses(TypeError, "kl_weighted must be a bool, got int", kl_weighted=1)
    for wrong in (-0.5, math.nan):
        weights = tensors["token_weights"].masked_fill(tensors["response_mask"], wrong)
        message = f"token_weights must be at least 0 where the mask is True, got {wrong}"
        check_refuses(ValueError, message, token_weights=weights)
    check_refuses(
        ValueError,
        "token_weights must have the shape of logprobs, (2, 4), got shape (2, 1)",
        token_weights=tensors["token_weights"][:, :1],
    )
    message = "num_tokens must be None with aggregate='sequence_mean', which does not divide by it"
    check_refuses(ValueError, message, aggregate="sequence_mean", num_tokens=3)
    check_refuses(ValueError, "num_rows must be None with aggregate='token_mean'", num_rows=3)
    check_refuses(ValueError, "num_tokens must be at least 0, got -1", num_tokens=-1)
    check_refuses(ValueError, "num_tokens must be at least 0, got -2.0", num_tokens=torch.tensor(-2, device="cpu"))
    for clip in ((0.2, None), ("0.2", 0.2), (0.2, True)):
        check_refuses(TypeError, "clip must hold numbers (math.inf: no bound), got", clip=clip)
    check_refuses(ValueError, "num_tokens must be one number, got shape (2,)", num_tokens=torch.ones(2))
    check_refuses(ValueError, "constant must be given with aggregate='dr_grpo', and only then", aggregate="dr_grpo")
    offsets = torch.tensor([0, 3, 8], device=DEVICE)
    check_refuses(ValueError, "logprobs must have shape (total,) together with cu_seqlens", cu_seqlens=offsets)
    flat = {name: tensor.flatten() for name, tensor in tensors.items()}
    message = "cu_seqlens must end at the number of tokens, 8, got 7"
    check_refuses(ValueError, message, **flat, cu_seqlens=torch.tensor([0, 3, 7], device=DEVICE))
    message = "constant must be given with aggregate='seq-mean-token-sum-norm' where rows are packed, got None"
    check_refuses(ValueError, message, **flat, cu_seqlens=offsets, aggregate="seq-mean-token-sum-norm")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_from_logits(kind: str, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind, padded and packed, on and off policy, is surprisal_entropy and policy_loss; and the reference."""
    lengths = [3, 0, 4]
    for options, packed in ((OPTIONS[kind][0], False), (OPTIONS[kind][-1], True)):
        tensors = in_layout(inputs(5, lengths, torch.float32), lengths, packed)
        tensors = {name: x if name == "cu_seqlens" else x.nan_to_num(0.0) for name, x in tensors.items()}
        tensors.pop("entropy")
        shape = tensors.pop("logprobs").shape
        generator = torch.Generator().manual_seed(3)
        logits = torch.randn(*shape, 11, generator=generator).to(DEVICE)
        ids = torch.randint(0, 11, shape, generator=generator).to(DEVICE)
        drawn = torch.rand(shape, generator=generator).to(DEVICE)
        for module in ("policy_loss", "policy_loss_from_logits"):
            monkeypatch.setattr(f"leafkernels.losses.{module}.drawn_numbers", lambda _, drawn=drawn: drawn)
        arguments = {**tensors, "kind": kind, "kl_coef": 0.2, "kl_weighted": True, "entropy_coef": 0.1, **options}
        arguments["aggregate"] = "sequence_mean"
        found = surprisal_entropy(logits, ids, response_mask=tensors["response_mask"])
        arguments["old_logprobs"] = found.logprobs - 0.2 * (0.5 - drawn)
        results = []
        for backend in ("composed", "torch", "triton", "reference"):
            leaf = logits.clone().requires_grad_()
            if backend == "composed":
                rows = surprisal_entropy(leaf, ids, response_mask=tensors["response_mask"])
                result = leafkernels.policy_loss(rows.logprobs, **arguments, entropy=rows.entropy)
            else:
                call = {**arguments, "token_ids": ids, "backend": backend}
                result = leafkernels.policy_loss_from_logits(leaf, **call)
            result.loss.backward()
            results.append((*result, leaf.grad))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=2e-5, atol=2e-5)
