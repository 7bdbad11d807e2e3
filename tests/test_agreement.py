"""How well a scheme's gradient agrees with that of rollouts it has not seen: by hand, by law, and on real rollouts."""

import gzip
import json
import math
from collections import Counter
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import ROOT
from rollouts import DEVICE
from support import examples, results_of

import leafkernels
from leafkernels import ESTIMATORS, GradientAgreement, gradient_agreement
from leafkernels.credit.agreement import _hold_against, _NGrams, _ScoredRollouts, can_be_measured
from leafkernels.rows.rollouts import read_rollouts

Call = dict[str, torch.Tensor]


def prompts(count: int, rows: int = 40, tokens: int = 6, seed: int = 0, vocabulary: int = 3) -> Call:
    """Rollouts (P, G, T) whose reward hangs on the first two tokens, and on chance."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (count, rows, tokens), generator=generator)
    chance = 0.15 + 0.4 * (ids[..., 0] == 1) + 0.3 * (ids[..., 1] == 1)
    rewards = (torch.rand(chance.shape, generator=generator) < chance).double()
    return {"logprobs": torch.zeros(ids.shape), "token_ids": ids, "rewards": rewards}


def on_device(call: Call) -> Call:
    return {name: tensor.to(DEVICE) for name, tensor in call.items()}


def prompt_of(ids: torch.Tensor, rewards: list[float], mask: torch.Tensor | None = None) -> _ScoredRollouts:
    logprobs = torch.zeros(ids.shape)
    rollouts = read_rollouts(logprobs, ids, torch.tensor(rewards), mask, None, None, None, "torch")
    return _ScoredRollouts(rollouts, logprobs, mask, torch.arange(len(ids)))


def test_gradient_of_the_n_gram_policy_by_hand() -> None:
    """Context 1: after nothing 1, 1, 2; after 1 come 5, 6; after 2 comes 5."""
    prompt = prompt_of(torch.tensor([[1, 5], [1, 6], [2, 5]]), [1.0, 0.0, 0.0])
    credit = torch.tensor([[[3.0, 1.0], [0.0, -1.0], [6.0, 2.0]]], dtype=torch.float64)
    found = _NGrams(prompt, 1).gradients(credit, torch.tensor([[0, 1, 2]]))
    # 1 and 2 at the start: 3 - 9 * 2/3 and 6 - 9 * 1/3. 5 and 6 after 1: 1 - 0 and -1 - 0. 5 after 2 has no choice.
    assert sorted(found[0].tolist()) == pytest.approx([-3.0, -1.0, 0.0, 1.0, 3.0])
    # Two of the rows, one of them twice, in another order.
    found = _NGrams(prompt, 1).gradients(credit[:, :2], torch.tensor([[2, 2]]))
    assert sorted(found[0].tolist()) == pytest.approx([-2.0, 0.0, 0.0, 0.0, 2.0])
    # Without context all tokens are one choice, of 1, 1, 2, 5, 5, 6: sums 3, 6, 3, -1 less 11 times the chances.
    found = _NGrams(prompt, 0).gradients(credit, torch.tensor([[0, 1, 2]]))
    by_hand = [3 - 11 * 2 / 6, 6 - 11 / 6, 3 - 11 * 2 / 6, -1 - 11 / 6]
    assert sorted(found[0].tolist()) == pytest.approx(sorted(by_hand))


@given(st.integers(0, 10**6), st.integers(0, 5), st.booleans())
@examples(torch=40)
def test_gradient_of_the_n_gram_policy_by_autograd(seed: int, context: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 3, (6, 5), generator=generator)
    lengths = torch.randint(0, 6, (6,), generator=generator)
    mask = torch.arange(5) < lengths[:, None]
    if masked:
        mask &= torch.rand(ids.shape, generator=generator) < 0.8
        mask[:, 0] = lengths > 0  # so that rows begin in the first column, as below
    prompt = prompt_of(ids, [0.0] * 6, mask)
    width = prompt.token_ids.shape[1]
    credit = torch.randn((1, 6, width), generator=generator, dtype=torch.float64).masked_fill(~prompt.mask, 0.0)
    counts: dict[tuple, Counter] = {}
    places = [(i, t) for i in range(6) for t in range(width) if prompt.mask[i, t]]
    for i, t in places:
        counts.setdefault(tuple(ids[i, max(0, t - context) : t].tolist()), Counter())[int(ids[i, t])] += 1
    # A context at the start of a row is shorter, and so another one, as tuples of other lengths are.
    pairs = [(name, token) for name, of in counts.items() for token in of]
    logits = torch.tensor([math.log(counts[name][token]) for name, token in pairs], dtype=torch.float64)
    logits.requires_grad_()
    total = logits.sum() * 0.0
    for i, t in places:
        name = tuple(ids[i, max(0, t - context) : t].tolist())
        choices = [k for k, (other, _) in enumerate(pairs) if other == name]
        chosen = choices.index(pairs.index((name, int(ids[i, t]))))
        total = total + credit[0, i, t] * logits[choices].log_softmax(0)[chosen]
    (expected,) = torch.autograd.grad(total, logits)
    found = _NGrams(prompt, context).gradients(credit, torch.arange(6)[None])[0]
    torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 10**6))
@examples(torch=15)
def test_token_truth_by_prefixes(seed: int) -> None:
    """The same credit as the truth has accuracy 1, and what is not known does not count."""
    call = prompts(1, rows=40, tokens=3, seed=seed, vocabulary=2)
    ids, rewards = call["token_ids"][0], call["rewards"][0]

    def truth(_: Any, token_ids: torch.Tensor, seen: torch.Tensor, *, response_mask: torch.Tensor) -> torch.Tensor:
        found = torch.full(token_ids.shape, 77.0)
        for split, rows in enumerate(token_ids.tolist()):
            # The rows that are not seen, as a multiset: rows and rewards of the prompt less those of the split.
            left = Counter(zip(map(tuple, ids.tolist()), rewards.tolist(), strict=True))
            left.subtract(zip(map(tuple, rows), seen[split].tolist(), strict=True))
            for i, row in enumerate(rows):
                for t in range(len(row)):
                    before, after = (
                        [r for (other, r), n in left.items() for _ in range(n) if other[:k] == tuple(row[:k])]
                        for k in (t, t + 1)
                    )
                    if len(before) >= 8 and len(after) >= 4:
                        found[split, i, t] = sum(after) / len(after) - sum(before) / len(before)
        return found

    found = gradient_agreement({"truth": truth}, **call, num_splits=2)
    if found.num_measured:
        accuracy = found.token_accuracy[~found.token_accuracy.isnan()]
        torch.testing.assert_close(accuracy, torch.ones_like(accuracy), rtol=1e-6, atol=1e-6)


def test_the_truth_agrees_with_itself() -> None:
    """Where the rollouts seen are those held out: Dr. GRPO 1, its opposite -1, and nothing 0."""
    call = prompts(1)
    prompt = prompt_of(call["token_ids"][0], call["rewards"][0].tolist())
    every = torch.arange(40)[None]
    schemes: dict[str, Any] = {
        "itself": leafkernels.dr_grpo,
        "rloo": leafkernels.rloo,
        "opposite": lambda *a, **k: -leafkernels.dr_grpo(*a, **k),
        "nothing": lambda *a, **k: torch.zeros(a[1].shape),
    }
    cosines, _, differing = _hold_against(prompt, _NGrams(prompt, 2), schemes, every, every)
    expected = torch.tensor([[1.0, 1.0, -1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-6)  # credit is float32
    assert differing.tolist() == [[0.0] * 4]


def test_rloo_is_unbiased() -> None:
    """Over all ways to see 4 of 7 rollouts, RLOO's gradient is 4 / 7 of that of all; nothing else has to hold of it."""
    call = prompts(1, rows=7)
    prompt = prompt_of(call["token_ids"][0], call["rewards"][0].tolist())
    policy = _NGrams(prompt, 2)
    members = torch.tensor(list(combinations(range(7), 4)))
    mean = policy.gradients(prompt.credit(leafkernels.rloo, members), members).mean(0)
    every = torch.arange(7)[None]
    whole = policy.gradients(prompt.credit(leafkernels.rloo, every), every)[0]
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(mean, whole * 4 / 7, rtol=0, atol=1e-6)


def test_the_mean_over_many_splits_approaches_the_whole() -> None:
    """RLOO's agreement with what it has not seen comes from the signal, and grows with the rollouts it sees."""
    call = prompts(6, rows=80, seed=3)
    means = [
        gradient_agreement({"rloo": leafkernels.rloo}, **call, num_rollouts=k, num_splits=40).mean()["rloo"]
        for k in (4, 8, 16, 32)
    ]
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.1


def test_a_positive_factor_changes_nothing_and_noise_agrees_with_nothing() -> None:
    call = prompts(24)
    generator = torch.Generator().manual_seed(5)

    def noise(logprobs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.randn(logprobs.shape, generator=generator)

    def tenfold(*arguments: Any, **options: Any) -> torch.Tensor:
        return 10 * leafkernels.tempo(*arguments, **options)

    found = gradient_agreement({**ESTIMATORS, "tenfold": tenfold, "noise": noise}, **call)
    at = found.names.index
    measured = ~found.cosines[:, :, 0].isnan()
    for of in (found.cosines, found.token_accuracy):
        torch.testing.assert_close(of[measured][:, at("tenfold")], of[measured][:, at("tempo")], rtol=0, atol=1e-6)
        # Schemes of one number a row differ by a factor for each prompt.
        for name in ("grpo", "rloo"):
            torch.testing.assert_close(of[measured][:, at(name)], of[measured][:, at("dr_grpo")], rtol=0, atol=1e-6)
    assert torch.equal(found.differing[measured][:, at("tenfold")], found.differing[measured][:, at("tempo")])
    assert found.mean("differing")["rloo"] == 0.0 < found.mean("differing")["tempo"] < found.mean("differing")["noise"]
    zero = found._replace(cosines=torch.cat([found.cosines, torch.zeros_like(found.cosines[:, :, :1])], 2))
    zero = zero._replace(names=(*found.names, "zero"))
    # Once in a thousand draws of the noise an interval of this coverage lies to one side.
    mean, low, high = zero.difference("noise", "zero", coverage=0.999)
    assert low < 0 < high and abs(mean) < 0.05
    assert zero.difference("dr_grpo", "zero").low > 0.1


def test_runs_repeat_and_prompts_are_independent() -> None:
    call = prompts(3)
    measure = partial(gradient_agreement, {"tempo": leafkernels.tempo}, num_splits=3)
    whole = measure(**call, seed=7)
    again = measure(**call, seed=7)
    for number in range(3):
        alone = measure(**{name: tensor[number] for name, tensor in call.items()}, seed=7 + number)
        for one, two, three in zip(whole[1:], again[1:], alone[1:], strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(one[number : number + 1], three, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(measure(**call, seed=8).cosines, whole.cosines)


def test_layouts_masks_and_names_give_the_same() -> None:
    call = on_device(prompts(2, tokens=5))
    measure = partial(gradient_agreement, ESTIMATORS, num_splits=2)
    whole = measure(**call)
    assert whole.num_measured == 2
    flat = {name: tensor.flatten(0, 1) for name, tensor in call.items()}
    names = torch.tensor([4, 9], device=DEVICE).repeat_interleave(40)
    wide = torch.nn.functional.pad(flat["token_ids"], (2, 1), value=1), torch.ones(80, 8, device=DEVICE)
    mask = torch.nn.functional.pad(torch.ones(80, 5, dtype=torch.bool, device=DEVICE), (2, 1))
    packed = {name: tensor.flatten() for name, tensor in flat.items()}
    bounds = torch.arange(0, 401, 5, dtype=torch.int32, device=DEVICE)
    others = [
        measure(**flat, group_size=40),
        measure(**flat, groups=names),
        measure(**packed, cu_seqlens=bounds, group_size=40),
        measure(wide[1], wide[0], flat["rewards"], response_mask=mask, groups=names),
        measure(**{**flat, "token_ids": flat["token_ids"] * 10**15 - 3}, group_size=40),
    ]
    for other in others:
        for one, two in zip(whole[1:], other[1:], strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    # Rollouts without a reward are not there.
    more = torch.cat([flat["token_ids"], flat["token_ids"][:3]]), torch.cat([names, names[:3]])
    rewards = torch.nn.functional.pad(flat["rewards"], (0, 3), value=math.nan)
    other = measure(torch.zeros(83, 5, device=DEVICE), more[0], rewards, groups=more[1])
    torch.testing.assert_close(other.cosines, whole.cosines, rtol=0, atol=0)


def test_holes_are_not_trained_on_by_any_scheme() -> None:
    """Where a tool speaks no boundary lies, whatever its surprisal: schemes get the mask of the call."""
    call = prompts(2, tokens=12)
    mask = torch.rand((2, 40, 12), generator=torch.Generator().manual_seed(1)) < 0.7
    call["logprobs"] = -torch.rand((2, 40, 12), generator=torch.Generator().manual_seed(2))
    plain = gradient_agreement(ESTIMATORS, **call, response_mask=mask, num_splits=3)
    for odd in (-50.0, math.nan):
        call["logprobs"] = call["logprobs"].masked_fill(~mask, odd)
        found = gradient_agreement(ESTIMATORS, **call, response_mask=mask, num_splits=3)
        for one, two in zip(plain[1:], found[1:], strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)

    shown = 0

    def seen(_: torch.Tensor, token_ids: torch.Tensor, *__: Any, response_mask: torch.Tensor) -> torch.Tensor:
        nonlocal shown
        shown += int(response_mask.sum())
        return torch.zeros(token_ids.shape)

    unbatched = {name: tensor[0] for name, tensor in call.items()}
    every = _ScoredRollouts(
        read_rollouts(*unbatched.values(), mask[0], None, None, None, "torch"),
        unbatched["logprobs"],
        mask[0],
        torch.arange(40),
    )
    every.credit(seen, torch.arange(40)[None])
    assert shown == int(mask[0].sum())


def test_gradients_of_the_caller() -> None:
    """The gradient of a model with parameters of its own, rows by their numbers in the call; here of bigrams."""
    call = prompts(2, tokens=4)
    flat = {name: tensor.flatten(0, 1) for name, tensor in call.items()}
    ids, groups = flat["token_ids"], torch.arange(80) % 2
    flat = {**flat, "token_ids": ids, "groups": groups}
    table = torch.randn((4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = torch.nn.functional.pad(ids[:, :-1] + 1, (1, 0))
    seen: list[tuple[int, ...]] = []

    def gradients(advantages: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        assert advantages.shape == ids.shape
        assert not advantages[~torch.isin(torch.arange(80), rows)].any()
        assert len(groups[rows].unique()) == 1
        seen.append(tuple(rows.tolist()))
        logits = table.clone().requires_grad_()
        logprobs = logits[before[rows]].log_softmax(-1).gather(-1, ids[rows][..., None])[..., 0]
        (found,) = torch.autograd.grad((advantages[rows] * logprobs).sum(), logits)
        return found.flatten()

    found = gradient_agreement({"grpo": leafkernels.grpo, "td": leafkernels.tree_td}, **flat, gradients=gradients)
    assert found.num_measured == 2
    # Of each split: all that is not seen, once, and what is seen, once for each scheme.
    splits = int((~found.cosines[:, :, 0].isnan()).sum())
    assert splits > 10 and Counter(map(len, seen)) == {32: splits, 8: 2 * splits}
    assert found.mean()["grpo"] > 0.1
    # The probabilities of bigrams counted on each prompt: the policy of the package, by another way.
    tables = []
    for prompt in range(2):
        counts = torch.zeros(4, 3, dtype=torch.float64)
        counts.index_put_(
            (before[groups == prompt], ids[groups == prompt]), torch.tensor(1.0).double(), accumulate=True
        )
        tables.append(counts.clamp_min(1e-300).log())

    def counted(advantages: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        nonlocal table
        table = tables[int(groups[rows[0]])]
        return gradients(advantages, rows)

    ours = gradient_agreement(ESTIMATORS, **flat, context=1)
    theirs = gradient_agreement(ESTIMATORS, **flat, gradients=counted)
    torch.testing.assert_close(ours.cosines, theirs.cosines, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.slow
def test_gradients_of_a_model_that_runs_what_rollouts_share_once() -> None:
    """As those of an ordinary forward pass, for fewer tokens."""
    pytest.importorskip("transformers", minversion="5.23")
    from tiny_decoders import build_model

    from leafkernels.models import tree_logprobs

    call = prompts(2, tokens=5)
    flat = {name: tensor.flatten(0, 1) for name, tensor in call.items()}
    begins = torch.arange(1, 21)[None] + torch.arange(80)[:, None] // 40  # twenty tokens of a prompt
    sequences = torch.cat([begins, flat["token_ids"] + 3], 1)
    asked = torch.arange(25).expand(80, 25) >= 20
    model, read = build_model("llama"), list[int]()
    weights = list(model.parameters())

    def count(_: Any, inputs: Any, __: Any) -> None:
        read[-1] += inputs[0].numel()

    model.get_input_embeddings().register_forward_hook(count)

    def of_tree(advantages: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logprobs = tree_logprobs(model, sequences[rows], response_mask=asked[rows]).logprobs[:, 20:]
        return flattened((advantages[rows] * logprobs).sum())

    def of_rows(advantages: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        chances = model(input_ids=sequences[rows]).logits[:, 19:-1].log_softmax(-1)
        return flattened((advantages[rows] * chances.gather(-1, sequences[rows, 20:, None])[..., 0]).sum())

    def flattened(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])

    schemes = {"grpo": leafkernels.grpo, "leaf": leafkernels.span_advantages}
    options = {"group_size": 40, "num_rollouts": 4, "num_splits": 2}
    found = []
    for gradients in (of_tree, of_tree, of_rows):  # the first tries the model on a few tokens
        read.append(0)
        found.append(gradient_agreement(schemes, **flat, **options, gradients=gradients))
    assert found[0].num_measured == 2
    torch.testing.assert_close(found[1].cosines, found[2].cosines, rtol=0, atol=1e-4)
    assert read[1] < 0.6 * read[2]


def test_what_cannot_be_measured_is_nan() -> None:
    call = prompts(5)
    call["rewards"][0] = 1.0
    call["rewards"][1, 7:] = 0.0  # at most seven of another reward
    call["rewards"][2, :17] = math.nan  # 23 are left, and 24 are needed
    found = gradient_agreement({"grpo": leafkernels.grpo}, **call)
    assert found.cosines[:3].isnan().all() and found.token_accuracy[:3].isnan().all()
    assert found.cosines[3:].isnan().logical_not().any(1).all()
    assert found.num_measured == 2
    assert found.mean()["grpo"] == pytest.approx(float(found.cosines[3:].nanmean(1).mean()))
    nothing = gradient_agreement({"grpo": leafkernels.grpo}, **{name: t[:3] for name, t in call.items()})
    assert nothing.num_measured == 0
    assert all(map(math.isnan, nothing.difference("grpo", "grpo")))
    empty = gradient_agreement(ESTIMATORS, torch.zeros(0, 4, 3), torch.zeros(0, 4, 3).long(), torch.zeros(0, 4))
    assert empty.cosines.shape == (0, 8, len(ESTIMATORS))
    rewards = torch.tensor([1.0] * 8 + [0.0] * 16)
    assert can_be_measured(rewards, 8) and not can_be_measured(rewards[1:], 8)
    assert not can_be_measured(torch.tensor([1.0] * 7 + [0.0] * 17), 8)


def test_a_prompt_without_a_token_cannot_be_measured() -> None:
    """Neither masked nor packed, and the prompts beside it are what they are alone."""
    call = prompts(2)
    mask = torch.ones(2, 40, 6, dtype=torch.bool)
    mask[0] = False
    found = gradient_agreement(ESTIMATORS, **call, response_mask=mask)
    assert found.cosines[0].isnan().all() and found.differing[0].isnan().all() and found.num_measured == 1
    alone = gradient_agreement(ESTIMATORS, **{name: tensor[1] for name, tensor in call.items()}, seed=1)
    torch.testing.assert_close(found.cosines[1:], alone.cosines, rtol=0, atol=0, equal_nan=True)
    bounds = torch.tensor([0] * 41 + list(range(6, 241, 6)), dtype=torch.int32)
    packed = {name: tensor[1].flatten() for name, tensor in call.items()} | {"rewards": call["rewards"].flatten()}
    other = gradient_agreement(ESTIMATORS, **packed, cu_seqlens=bounds, group_size=40)
    torch.testing.assert_close(other.cosines, found.cosines, rtol=0, atol=1e-12, equal_nan=True)
    gone = gradient_agreement(ESTIMATORS, **packed, cu_seqlens=bounds, group_size=40, gradients=first_column)
    assert gone.cosines[0].isnan().all()


def test_rewards_that_differ_by_rounding_alone_are_not_measured() -> None:
    """As equal ones: a unit of float32's last place is no signal."""
    call = prompts(2)
    call["rewards"] = 30.0 + 2**-19 * call["rewards"]
    found = gradient_agreement({"grpo": leafkernels.grpo}, **call)
    assert found.num_measured == 0
    real = prompts(2)
    one, two = (
        gradient_agreement({"grpo": leafkernels.grpo}, real["logprobs"], real["token_ids"], rewards)
        for rewards in (real["rewards"], (real["rewards"] + 30.0) + 2**-19 * (real["token_ids"][..., 2] == 0))
    )
    assert one.num_measured == two.num_measured == 2
    torch.testing.assert_close(one.cosines, two.cosines, rtol=0, atol=1e-4)


NORMAL, EXPONENTIAL = (lambda draws: draws), (lambda draws: -torch.special.log_ndtr(draws) - 1.0)


@pytest.mark.parametrize("count", [5, 7, 10, 20, 41])
@pytest.mark.parametrize(("shape", "least"), [(NORMAL, 0.93), (EXPONENTIAL, 0.90)])
def test_coverage_of_the_interval(count: int, shape: Any, least: float) -> None:
    """Of 300 samples whose mean is 0. Of a thousand others 0.95 were covered and more, 0.93 of the skewed ones."""
    covered = widths = 0.0
    for gain_per_prompt in shape(
        torch.randn((300, count), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ):
        cosines = torch.stack([gain_per_prompt, torch.zeros(count)], 1)[:, None]
        found = GradientAgreement(("a", "b"), cosines, cosines, cosines).difference("a", "b")
        covered += found.low <= 0.0 <= found.high
        widths += found.high - found.low
    assert covered / 300 >= least
    # No more than is needed: an interval of everything covers, too.
    assert widths / 300 < {5: 4.0, 7: 2.8, 10: 2.1, 20: 1.2, 41: 0.7}[count]


def test_intervals_need_five_prompts() -> None:
    for count in range(1, 7):
        cosines = torch.randn((count, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mean, *ends = GradientAgreement(("a", "b"), cosines, cosines, cosines).difference("a", "b")
        assert math.isfinite(mean)
        assert all(map(math.isnan if count < 5 else math.isfinite, ends))
    # Prompts of which most differ alike, and whose draws often have no deviation.
    ties = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    cosines = torch.stack([ties, torch.zeros(5)], 1)[:, None]
    found = GradientAgreement(("a", "b"), cosines, cosines, cosines)
    mean, low, high = found.difference("a", "b")
    assert mean == 0.2 and -2.0 < low < 0.0 < high < 10.0
    assert found.difference("a", "a") == (0.0, 0.0, 0.0)


def first_column(advantages: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return advantages[:1].flatten()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_pass_for_no_agreement(value: float) -> None:
    """A scheme that gives nothing has 0; one that gives NaN or inf has no agreement at all."""
    call, generator = prompts(1), torch.Generator().manual_seed(0)
    seen = (torch.rand((1, 40, 6), generator=generator) < 0.9) | (torch.arange(6) == 0)

    def nothing(logprobs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros_like(logprobs)

    def once(logprobs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros_like(logprobs).index_fill_(-1, torch.tensor([0]), value)

    def where_masked(logprobs: torch.Tensor, *_: Any, response_mask: torch.Tensor) -> torch.Tensor:
        return torch.where(response_mask & (logprobs == 0), 1.0, value)

    found = gradient_agreement({"nothing": nothing}, **call)
    assert found.mean() == {"nothing": 0.0}
    with pytest.raises(ValueError, match=rf"^what schemes\['once'\] returns must be finite, got {value}$"):
        gradient_agreement({"grpo": leafkernels.grpo, "once": once}, **call)
    with pytest.raises(ValueError, match=f"^what gradients returns must be finite, got {value}$"):
        gradient_agreement(ESTIMATORS, **call, gradients=lambda *_: torch.tensor([0.0, value]))
    # What the mask hides is not looked at.
    logprobs = torch.where(seen, 0.0, -1.0)
    found = gradient_agreement({"mine": where_masked}, **(call | {"logprobs": logprobs}), response_mask=seen)
    assert found.num_measured == 1 and found.cosines.nan_to_num().isfinite().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300])
def test_rewards_that_are_too_large_are_refused(value: float) -> None:
    call = prompts(1)
    largest = call | {"rewards": (call["rewards"] - 0.5) * 2e37}
    schemes = {name: scheme for name, scheme in ESTIMATORS.items() if scheme.is_shift_invariant}
    found, expected = gradient_agreement(schemes, **largest), gradient_agreement(schemes, **call)
    torch.testing.assert_close(found.cosines, expected.cosines, rtol=0, atol=1e-6, equal_nan=True)
    call["rewards"][0, 3] = value
    with pytest.raises(ValueError) as raised:
        gradient_agreement(ESTIMATORS, **call)
    text = f"rewards must be at most 1e+37 in size, or NaN for a rollout without one, got {value}"
    assert str(raised.value) == text


@pytest.mark.parametrize("factor", [1e-250, 1e-20, 1e250])
def test_a_factor_of_the_gradients_changes_nothing(factor: float) -> None:
    """Of any size: squares that leave the range of float64 must not pass for no agreement."""
    call = prompts(1)

    def gradients(advantages: torch.Tensor, rows: torch.Tensor, size: float) -> torch.Tensor:
        return (advantages * (call["token_ids"] == 1))[0].sum(0).double() * size

    found = [
        gradient_agreement({"grpo": leafkernels.grpo}, **call, gradients=partial(gradients, size=size)).cosines
        for size in (1.0, factor)
    ]
    assert bool((found[0] != 0).all())
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0, equal_nan=True)


def test_intervals_come_from_prompts() -> None:
    """A difference that all splits of a prompt share is no surer for many splits."""
    generator = torch.Generator().manual_seed(0)
    gain_per_prompt = torch.randn((30, 1, 1), generator=generator, dtype=torch.float64)
    widths = []
    for splits in (1, 50):
        cosines = torch.cat([gain_per_prompt.expand(-1, splits, 1), torch.zeros(30, splits, 1)], 2)
        found = GradientAgreement(("a", "b"), cosines, cosines, cosines)
        mean, low, high = found.difference("a", "b")
        assert mean == pytest.approx(float(gain_per_prompt.mean()))
        widths.append(high - low)
        assert found.difference("b", "a") == pytest.approx((-mean, -high, -low), abs=0.02)
    assert widths[0] == pytest.approx(widths[1])
    # That of the normal interval, for 30 draws; a bootstrap of 4,000 is off by some per cent.
    assert widths[0] == pytest.approx(2 * 1.96 * float(gain_per_prompt.std()) / 30**0.5, rel=0.1)
    narrow = found.difference("a", "b", coverage=0.5)
    assert low < narrow.low < narrow.mean < narrow.high < high


def gives(value: Any) -> Any:
    """A function of anything that returns the value."""
    return lambda *_, **__: value


def unchanged(advantages: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """No gradient: advantages as they come."""
    return advantages


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"schemes": {}}, ValueError, "schemes must hold one scheme at least, got none"),
        ({"schemes": [leafkernels.grpo]}, TypeError, "schemes must map names to functions, got list"),
        ({"schemes": "grpo"}, TypeError, "schemes must map names to functions, got str"),
        (
            {"schemes": {"grpo": "grpo"}},
            TypeError,
            "schemes must map names to functions, got 'grpo' with a value of str",
        ),
        (
            {"schemes": {1: leafkernels.grpo}},
            TypeError,
            "schemes must map names to functions, got 1 with a value of function",
        ),
        ({"schemes": {"a": gives(None)}}, TypeError, "what schemes['a'] returns must be a torch.Tensor, got NoneType"),
        (
            {"schemes": {"a": gives(torch.zeros(3))}},
            ValueError,
            "what schemes['a'] returns must have the shape of token_ids, (7, 8, 6), got shape (3,)",
        ),
        ({"num_rollouts": 1}, ValueError, "num_rollouts must be at least 2, got 1"),
        ({"num_splits": 0}, ValueError, "num_splits must be at least 1, got 0"),
        ({"context": -1}, ValueError, "context must be at least 0, got -1"),
        ({"context": 2.0}, TypeError, "context must be an int, got float"),
        ({"logprobs": [0.0]}, TypeError, "logprobs must be a torch.Tensor, got list"),
        ({"seed": "a"}, TypeError, "seed must be an int, got str"),
        ({"seed": None}, TypeError, "seed must be an int, got NoneType"),
        ({"seed": 2**63}, ValueError, f"seed must be at most {2**63 - 1}, got {2**63}"),
        ({"gradients": "a"}, TypeError, "gradients must be a function or None, got str"),
        ({"gradients": gives(None)}, TypeError, "what gradients returns must be a torch.Tensor, got NoneType"),
        ({"gradients": unchanged}, ValueError, "what gradients returns must be a vector (D,), got shape (1, 40, 6)"),
        (
            {"gradients": gives(torch.ones(0))},
            ValueError,
            "what gradients returns must be a vector (D,), got shape (0,)",
        ),
        (
            {"gradients": lambda advantages, rows: torch.ones(len(rows))},
            ValueError,
            "what gradients returns must be as long in every call, 32, got 8",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        gradient_agreement(**{"schemes": ESTIMATORS, **prompts(1), **change})
    assert str(raised.value) == text


@pytest.mark.parametrize(
    ("ask", "error", "text"),
    [
        ({"of": "names"}, ValueError, "of must be one of 'cosines', 'token_accuracy', 'differing', got 'names'"),
        ({"name": "c"}, ValueError, "name must be one of 'a', 'b', got 'c'"),
        ({"to": None}, ValueError, "to must be one of 'a', 'b', got None"),
        ({"resamples": 0}, ValueError, "resamples must be at least 1, got 0"),
        ({"resamples": "9"}, TypeError, "resamples must be an int, got str"),
        ({"coverage": 95}, ValueError, "coverage must lie between 0 and 1, got 95"),
        ({"coverage": 0.0}, ValueError, "coverage must lie between 0 and 1, got 0.0"),
        ({"coverage": "95%"}, TypeError, "coverage must be a number, got str"),
    ],
    ids=str,
)
def test_errors_of_what_was_measured(ask: dict[str, Any], error: type[Exception], text: str) -> None:
    nothing = torch.full((3, 2, 2), math.nan, dtype=torch.float64)
    found = GradientAgreement(("a", "b"), nothing, nothing, nothing)
    with pytest.raises(error) as raised:
        found.mean(**ask) if "of" in ask else found.difference(**{"name": "a", "to": "b", **ask})
    assert str(raised.value) == text


STUDY = ROOT / "examples" / "study" / "agreement"
Row = dict[str, Any]


def results(name: str) -> list[Row]:
    return results_of(STUDY, name)


def in_words(path: Path) -> str:
    """A page without its line breaks."""
    return " ".join(path.read_text(encoding="utf-8").split())


def with_interval(row: Row) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["to_dr_grpo"])


def line_of(scheme: str, rollouts: int, label: str) -> str:
    """A line of a table, contexts of 2, 4 and 8 tokens; Dr. GRPO has its agreement, others the difference to it."""
    rows = [row for row in results("table") if row["scheme"] == scheme and row["rollouts"] == rollouts]
    assert [row["context"] for row in rows] == [2, 4, 8] and {row["problems"] for row in rows} == {41}
    cells = [f"{row['agreement']:.3f}" if scheme == "dr_grpo" else with_interval(row) for row in rows]
    return f"| {' | '.join([label, *cells])} |"


# Names of the schemes on the pages for users.
LABELS = {
    "dr_grpo": "Dr. GRPO, GRPO, RLOO",
    "leaf": "LEAF, 2 boundaries",
    "leaf, 8 boundaries": "LEAF, 8 boundaries",
    "treerl": "TreeRL",
    "tempo": "TEMPO",
    "tree_td 1, 0.3": "`tree_td` (1, 0.3)",
    "tree_td 4, 0.2": "`tree_td` (4, 0.2)",
    "tree_td": "`tree_td`, (0, 0.5)",
    "tree_td 0, 0": "differences alone, (0, 0)",
}


def test_tables_of_agreement_are_those_of_the_results() -> None:
    study = (STUDY / "README.md").read_text(encoding="utf-8").splitlines()
    # One scheme at several K has several lines, each under the K of its own.
    for rollouts in (4, 8, 16, 32):
        start = study.index(f"| K = {rollouts} | context 2 | context 4 | context 8 |") + 2
        shown = study[start : study.index("", start)]
        names = [line.split(" | ")[0].removeprefix("| ") for line in shown]
        assert len(names) == 11 and shown == [line_of(name, rollouts, name) for name in names]
    credit = pages.read("credit.md").splitlines()
    assert [
        line for line in (line_of(*of) for of in ((n, 8, label) for n, label in LABELS.items())) if line not in credit
    ] == []
    said = in_words(pages.PAGES["credit.md"])
    leaf, tempo, tree_td = (line_of(name, 32, "").split(" | ")[2].split()[0] for name in ("leaf", "tempo", "tree_td"))
    assert f"at K = 32 and context 4 LEAF is at {leaf}, TEMPO at {tempo} and `tree_td` at {tree_td}" in said


def test_what_is_said_of_the_first_rule_is_in_its_results() -> None:
    rows = results("first")
    counts = {row["unlike"]: row["problems"] for row in rows if "unlike" in row}
    found = {(row["seed"], row["scheme"], row["context"]): row for row in rows if "seed" in row}
    assert {row["problems"] for row in found.values()} == {counts[2]}
    order = {
        "(4, 0.2)": "tree_td 4, 0.2",
        "(1, 0.3)": "tree_td 1, 0.3",
        "TEMPO": "tempo",
        "`tree_td`": "tree_td",
        "LEAF": "leaf",
    }
    by_seed = [", ".join(f"{k} {with_interval(found[s, n, 4])}" for k, n in order.items()) for s in (0, 1000)]
    said = in_words(pages.PAGES["credit.md"])
    assert (
        f"with the seeds of the table above (0 on): {by_seed[0]}; with those of the search (1000 on): {by_seed[1]}."
        in said
    )
    assert f"{counts[1]} of 82, of which the {counts[2]} with two or more" in said and f"{counts[8]} remained" in said
    protocol = in_words(STUDY / "PROTOCOL.md")
    gain_fixed, gain_tempo = (
        "{:+.3f}, {:+.3f} and {:+.3f}".format(*(found[1000, name, c]["to_dr_grpo"][0] for c in (2, 4, 8)))
        for name in ("tree_td 4, 0.2", "tempo")
    )
    assert f"at {gain_fixed} for contexts 2, 4 and 8, TEMPO at {gain_tempo};" in protocol
    assert f"{counts[2]} of 82 measured" in protocol and f"{counts[1]} problems have mixed rewards" in protocol


def test_tables_of_training_are_those_of_the_results() -> None:
    """The eight settings on both pages, and what is counted in all of them."""
    rows = results("tabular")
    settings = [row["setting"] for row in rows if row["scheme"] == "tempo"]
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    found = {(row["scheme"], settings.index(row["setting"])): row for row in rows}
    study = (STUDY / "README.md").read_text(encoding="utf-8").splitlines()
    for name in schemes:
        cells = [f"{found[name, k]['gain']:+.3f} ± {found[name, k]['interval']:.3f}" for k in range(8)]
        assert f"| {' | '.join([name, *cells])} |" in study
    credit = pages.read("credit.md").splitlines()
    start = (
        credit.index("| mean reward over training minus GRPO's | LEAF | TEMPO | (4, 0.2) | (1, 0.3) | (0, 0.5) |") + 2
    )
    columns = ("leaf", "tempo", "tree_td 4, 0.2", "tree_td 1, 0.3", "tree_td 0, 0.5")
    shown = [line.strip("| ").split(" | ")[1:] for line in credit[start : credit.index("", start)]]
    assert shown == [[f"{found[name, k]['gain']:+.3f}" for name in columns] for k in range(8)]
    swept = results("sweep")
    tempo_gains = {str(row["setting"]): row["gain"] for row in swept if row["scheme"] == "tempo"}
    for label in ("(4, 0.2)", "(1, 0.3)", "(0, 0.5)", "TEMPO"):
        own_rows = [
            row for row in swept if row["scheme"] == (f"tree_td {label[1:-1]}" if label != "TEMPO" else "tempo")
        ]
        prefix = [row for row in own_rows if row["setting"]["reward"] == "prefix"]
        ahead = sum(row["gain"] > tempo_gains[str(row["setting"])] for row in prefix)
        worst = min(own_rows, key=lambda row: row["gain"])
        cells = [
            f"{ahead} of {len(prefix)}" if label != "TEMPO" else "",
            f"{sum(row['gain'] < -0.003 for row in own_rows)} of {len(own_rows)}",
            f"{worst['gain']:+.3f} ± {worst['interval']:.3f}",
        ]
        assert f"| {' | '.join([label, *cells])} |".replace("  ", " ") in credit


# What was found on 39 of the problems by another program, which chose them and their splits otherwise: the difference
# to Dr. GRPO at K = 8, with contexts of 2, 4 and 8 tokens.
FOUND = {
    "leaf": (-0.014, -0.014, -0.015),
    "leaf, 8 boundaries": (-0.015, -0.016, -0.017),
    "treerl": (-0.013, -0.013, -0.015),
    "tempo": (0.009, 0.018, 0.033),
    "0, 0": (-0.110, -0.072, 0.011),
    "0, 0.2": (-0.018, 0.002, 0.041),
    "4, 0.2": (0.010, 0.024, 0.046),
    "8, 0.2": (0.011, 0.022, 0.038),
    "surprisal": (-0.16, -0.065, -0.008),
}


def by_surprisal(logprobs: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    return leafkernels.dr_grpo(logprobs, *arguments, **options) * -logprobs.nan_to_num(0.0)


def packed_prompts(path: Path) -> list[Call]:
    calls = []
    with gzip.open(path, "rt") as file:
        for line in file:
            rows = json.loads(line)["completions"]
            packed = {
                "logprobs": torch.tensor([x for row in rows for x in row["logprobs"]]),
                "token_ids": torch.tensor([x for row in rows for x in row["token_ids"]]),
                "rewards": torch.tensor([float(row["reward"]) for row in rows]),
                "cu_seqlens": torch.tensor([0, *(len(row["token_ids"]) for row in rows)]).cumsum(0).int(),
            }
            calls.append(packed)
    return calls


@pytest.mark.slow
def test_real_rollouts_of_code(shared: Path) -> None:
    """Each difference that was found elsewhere has our sign and lies in our interval."""
    schemes = {**ESTIMATORS, "surprisal": by_surprisal}
    schemes["leaf, 8 boundaries"] = partial(leafkernels.span_advantages, num_boundaries=8, min_separation=2)
    for shrinkage, group_weight in ((0.0, 0.0), (0.0, 0.2), (4.0, 0.2), (8.0, 0.2)):
        name = f"{shrinkage:g}, {group_weight:g}"
        schemes[name] = partial(leafkernels.tree_td, shrinkage=shrinkage, group_weight=group_weight)
    calls = packed_prompts(shared / "rollouts" / "humaneval_codegen16b.jsonl.gz")
    outside = []
    for place, context in enumerate((2, 4, 8)):
        parts = [
            gradient_agreement(schemes, **call, num_splits=4, context=context, seed=number)
            for number, call in enumerate(calls)
        ]
        columns = list(zip(*parts, strict=True))[1:]
        found = GradientAgreement(parts[0].names, *(torch.cat(column) for column in columns))
        assert found.num_measured == 41
        for name, values in FOUND.items():
            mean, low, high = found.difference(name, "dr_grpo")
            if not low < values[place] < high or (mean > 0) != (values[place] > 0):
                outside.append((context, name, mean, low, high))
        if context > 2:  # with two tokens they are level
            assert found.difference("tree_td", "dr_grpo").low > 0
            assert found.difference("tree_td", "tempo").mean > 0
        # The measure that misleads: the tree's differences alone have the highest.
        accuracy = found.mean("token_accuracy")
        assert max(accuracy, key=accuracy.__getitem__) == "0, 0"
    assert outside == []
