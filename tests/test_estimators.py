"""GRPO, Dr. GRPO and RLOO: what is special to schemes of whole rollouts; tests/test_laws.py has the laws of all."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import ROOT
from rollouts import BACKENDS, DEVICE, Rollouts, random_group, rollouts
from support import examples

import leafkernels
from leafkernels import ESTIMATORS

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_page_lists_every_scheme_as_the_registry_has_it(name: str) -> None:
    scheme, text = ESTIMATORS[name], (ROOT / "docs/credit.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^\| .*\| `{scheme.__name__}` \| (?:row|span|token) \|.*$", text, re.M)
    address = scheme.source.replace("arXiv ", "https://arxiv.org/abs/")
    title = f"[{scheme.title}]({address})" if address else scheme.title
    formula = "[on one page](leaf.md)" if name == "leaf" else scheme.formula
    assert line == f"| {title} | `{scheme.__name__}` | {scheme.per} | {formula} |"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_log_probabilities_are_read_where_the_registry_says_so(name: str) -> None:
    group = random_group(5, 12, seed=1, vocabulary=2)
    changed = {**group, "logprobs": group["logprobs"].flip(1)}
    is_equal = torch.equal(ESTIMATORS[name](**group), ESTIMATORS[name](**changed))
    assert is_equal != ESTIMATORS[name].reads_logprobs


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_neither_logprobs_nor_tokens_matter_to_estimators_of_whole_rollouts(name: str) -> None:
    first, second = random_group(5, 8, seed=1), random_group(5, 8, seed=2)
    result = getattr(leafkernels, name)(**first)
    assert torch.equal(result, getattr(leafkernels, name)(second["logprobs"], second["token_ids"], first["rewards"]))
    assert torch.equal(result, result[:, :1].expand(result.shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_baselines_by_hand(backend: str) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]], device=DEVICE)
    call: dict[str, Any] = {"token_ids": torch.zeros(3, 4, dtype=torch.int64, device=DEVICE), "backend": backend}
    call["logprobs"] = torch.zeros(3, 4, device=DEVICE)

    def first(name: str, rewards: list[float], **options: Any) -> list[float]:
        found = ESTIMATORS[name](**call, rewards=torch.tensor(rewards, device=DEVICE), **options)
        return [round(value, 4) for value in found[:, 0].tolist()]

    # Four, two and one tokens: 4 * 1 + 2 * 0 + 1 * 3 over 7 is 1.
    assert first("opo", [1.0, 0.0, 3.0], response_mask=mask) == [0.0, -1.0, 2.0]
    # Deviation of 0, 1, 3: the root of 7/3. A share of 1/3 has at most 0, of 2/3 at most 1.
    std = (7 / 3) ** 0.5
    for quantile, baseline in ((0.0, 0.0), (1 / 3, 0.0), (0.4, 1.0), (2 / 3, 1.0), (1.0, 3.0)):
        expected = [round((r - baseline) / std, 3) for r in (1.0, 0.0, 3.0)]
        assert [round(value, 3) for value in first("qae", [1.0, 0.0, 3.0], quantile=quantile)] == expected
    assert first("maxrl", [1.0, 0.0, 2.0]) == [0.0, -1.0, 1.0]
    assert first("maxrl", [1.0, -1.0, 0.0]) == [0.0, 0.0, 0.0]
    # Pairs of 1, 0, 3 are best at 1, 3, 3, with mean 7/3 and deviation sqrt(8/9); with row 0 at 1, 3, with row 1 too.
    best = (8 / 9) ** 0.5
    assert first("pass_at_k", [1.0, 0.0, 3.0]) == [round(x / best, 4) for x in (-1 / 3, -1 / 3, 2 / 3)]
    assert first("pass_at_k", [1.0, 0.0, 3.0], k=1) == [
        round((r - 4 / 3) / (14 / 9) ** 0.5, 4) for r in (1.0, 0.0, 3.0)
    ]
    assert first("pass_at_k", [1.0, 0.0, 3.0], k=3) == first("pass_at_k", [1.0, 0.0, 3.0], k=99) == [0.0, 0.0, 0.0]


@given(st.integers(2, 12), st.integers(1, 11), st.integers(1, 12))
@examples(torch=40)
def test_pass_at_k_of_right_and_wrong_is_the_closed_form(rows: int, right: int, k: int) -> None:
    """arXiv 2508.10751: of N rows, of which some are wrong, C(wrong, k) / C(N, k) sets have none that is right."""
    if right >= rows or k > rows:
        return
    wrong = rows - right
    rewards = torch.tensor([1.0] * right + [0.0] * wrong, device=DEVICE)
    call = torch.zeros(rows, 1, device=DEVICE), torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE), rewards
    found = leafkernels.pass_at_k(*call, k=k)[:, 0].tolist()
    mean = 1 - math.comb(wrong, k) / math.comb(rows, k)
    std = math.sqrt(mean * (1 - mean))
    if std == 0:
        assert found == [0.0] * rows
        return
    held = 1 - math.comb(wrong - 1, k - 1) / math.comb(rows - 1, k - 1)
    assert found[0] == pytest.approx((1 - mean) / (std + 1e-6), rel=1e-6)
    assert found[-1] == pytest.approx((held - mean) / (std + 1e-6), rel=1e-6, abs=1e-7)


@given(rollouts())
@examples(torch=100)
def test_estimators_of_whole_rollouts_are_multiples_of_each_other(case: Rollouts) -> None:
    inputs = case.padded()
    grpo, dr_grpo, rloo = (getattr(leafkernels, name)(**inputs) for name in ("grpo", "dr_grpo", "rloo"))
    for prompt in set(case.groups):
        rows = inputs["groups"] == prompt
        scored = inputs["rewards"][rows]
        scored = scored[~scored.isnan()].double()
        if len(scored) > 1:
            ratio = len(scored) / (len(scored) - 1)
            torch.testing.assert_close(rloo[rows], dr_grpo[rows] * ratio, rtol=1e-6, atol=0)
            scale = (scored.std() + 1e-6).float()
            torch.testing.assert_close(grpo[rows] * scale, dr_grpo[rows], rtol=1e-6, atol=0)


@given(st.lists(st.sampled_from([0.0, 1.0, 0.25, -3.0]), min_size=2, max_size=6), st.integers(1, 6), st.integers(0, 3))
@examples(torch=60)
def test_rows_that_share_no_boundary_prefix(rewards: list[float], tokens: int, num_boundaries: int) -> None:
    """Law 3 of the spans: twice Dr. GRPO with both terms, RLOO with one and leave_one_out; TreeRL is twice RLOO."""
    r = torch.tensor(rewards, device=DEVICE)
    ids = torch.arange(len(rewards) * tokens, device=DEVICE).reshape(len(rewards), tokens)
    call = -torch.rand(ids.shape, device=DEVICE), ids, r

    def spans(**options: Any) -> torch.Tensor:
        return leafkernels.span_advantages(*call, num_boundaries=num_boundaries, normalize="none", **options)

    near: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(spans(), 2 * leafkernels.dr_grpo(*call), **near)
    for terms in ("global", "local"):
        torch.testing.assert_close(spans(terms=terms), leafkernels.dr_grpo(*call), **near)
        torch.testing.assert_close(spans(terms=terms, leave_one_out=True), leafkernels.rloo(*call), **near)
    torch.testing.assert_close(
        leafkernels.treerl(*call, num_boundaries=num_boundaries), 2 * leafkernels.rloo(*call), **near
    )
    # For TEMPO all rows part at token 0, where GRPO's advantage counts twice.
    tempo = leafkernels.grpo(*call)
    tempo[:, 0] *= 2
    torch.testing.assert_close(leafkernels.tempo(*call), tempo, **near)


@given(seed=st.integers(0, 10**6), num_boundaries=st.integers(1, 4))
@examples(torch=40)
def test_dr_grpo_has_the_policy_gradient_of_global_spans(seed: int, num_boundaries: int) -> None:
    """Corollary of law 2: tokens that share their whole prefix have one log-probability, and equal sums of credit."""
    group = random_group(6, 12, seed, vocabulary=2)
    options: dict[str, Any] = {"num_boundaries": num_boundaries, "multiplicity_power": 0.0, "normalize": "none"}
    spans = leafkernels.span_advantages(**group, terms="global", **options)
    flat = leafkernels.dr_grpo(**group)
    ids = group["token_ids"]
    for t in range(ids.shape[1]):
        for i in range(ids.shape[0]):
            same = (ids[:, : t + 1] == ids[i, : t + 1]).all(1)
            torch.testing.assert_close(spans[same, t].sum(), flat[same, t].sum(), rtol=1e-5, atol=1e-5)


# ---- the Dr. GRPO identity, end to end through a small model and autograd (it follows from the law of conservation)


class TinyPolicy(torch.nn.Module):
    """A recurrent language model small enough to see every gradient."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary + 1, 8)
        self.recurrent = torch.nn.GRU(8, 16, batch_first=True)
        self.head = torch.nn.Linear(16, vocabulary)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (G, T) of the tokens, each given those before it."""
        begin = torch.full_like(token_ids[:, :1], self.embed.num_embeddings - 1)
        hidden, _ = self.recurrent(self.embed(torch.cat([begin, token_ids[:, :-1]], dim=1)))
        return self.head(hidden).log_softmax(-1).gather(-1, token_ids[..., None]).squeeze(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_boundaries", [1, 2, 5])
def test_global_terms_have_the_gradient_of_dr_grpo(backend: str, num_boundaries: int) -> None:
    torch.manual_seed(num_boundaries)
    group = random_group(8, 14, seed=num_boundaries, vocabulary=2)
    policy = TinyPolicy(vocabulary=2).to(DEVICE)
    mask = torch.ones(8, 14, dtype=torch.bool, device=DEVICE)
    mask[3, 9:], mask[5, 11:] = False, False
    group["token_ids"][7] = group["token_ids"][2]  # an identical pair shares every boundary
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.0, 0.25, 1.0], device=DEVICE)

    def gradients(weights: torch.Tensor) -> list[torch.Tensor]:
        logprobs = policy(group["token_ids"])
        ratio = (logprobs - logprobs.detach()).exp()
        return list(torch.autograd.grad(-(ratio * weights * mask).sum(), list(policy.parameters())))

    old = policy(group["token_ids"]).detach()
    options = {"response_mask": mask, "num_boundaries": num_boundaries, "multiplicity_power": 0.0, "backend": backend}
    leaf = leafkernels.span_advantages(old, group["token_ids"], rewards, terms="global", normalize="none", **options)
    flat = (rewards - rewards.mean())[:, None].expand(leaf.shape)
    assert not torch.equal(leaf * mask, flat * mask), "nothing is shared: the test would test nothing"
    for actual, expected in zip(gradients(leaf), gradients(flat), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    # It is the global term that has this property, and the test can see that another has not.
    local = leafkernels.span_advantages(old, group["token_ids"], rewards, terms="local", normalize="none", **options)
    worst = max(float((a - b).abs().max()) for a, b in zip(gradients(local), gradients(flat), strict=True))
    assert worst > 1e-3
