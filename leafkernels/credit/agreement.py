"""Which credit fits these rollouts: agreement of a scheme's gradient with that of held-out rollouts.

A scheme sees K of a prompt's rollouts, and its policy gradient is held against RLOO's on all others, which is unbiased
for any policy: noise in it lowers every cosine and favours none. A gradient needs parameters that rollouts share; those
of the model itself are best, and an n-gram policy fitted on the prompt's rollouts costs next to nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.checks import check_choice, check_count, check_finite, check_like, check_real
from leafkernels._core.precision import ROUNDING, is_rounding
from leafkernels.credit.estimators import dr_grpo, rloo
from leafkernels.credit.prefix_lengths import common_prefix_lengths
from leafkernels.rows.layout import as_rows
from leafkernels.rows.rollouts import Rollouts, read_rollouts

Scheme = Callable[..., Tensor]
Gradients = Callable[[Tensor, Tensor], Tensor]

# Held-out rollouts beyond as many as a scheme sees.
SPARE = 8
# Rollouts whose reward is not the commonest: a handful must not decide the gradient that counts as truth.
LEAST_COMMON = 8
# A token has a truth where so many held-out rollouts share its prefix, and so many of these continue with it.
_SHARING, _CHOOSING = 8, 4
# Least number of prompts for an interval, and the number above which its ends are percentiles of the bootstrap: a 95%
# interval of percentiles covers 84% with 5 normal differences and 94% with 41. The method between covers 95% or more,
# and 92% or more where differences are skewed.
FEWEST, _MANY = 5, 40
# Credit is float32, and a scheme's credit of larger rewards may overflow it.
_LARGEST_REWARD = 1e37


class Difference(NamedTuple):
    """Mean over prompts of a scheme's agreement minus another's, with its interval; NaN for too few prompts."""

    mean: float
    low: float
    high: float


class GradientAgreement(NamedTuple):
    """What was measured, by prompt in the order of the groups, split and scheme. All tensors are float64 on the CPU.

    NaN marks what could not be measured: a prompt without a token, with too few scored rollouts, or with fewer than 8
    whose reward is not the commonest, or a split in which the rewards that the schemes saw, or the others, were all
    equal. A gradient of 0 agrees with nothing: its cosine is 0.
    """

    names: tuple[str, ...]
    cosines: Tensor  # (P, splits, S): of the gradients
    token_accuracy: Tensor  # (P, splits, S): cosine of credit and truth token by token; it misleads, see docs/credit.md
    differing: Tensor  # (P, splits, S): share of the tokens whose credit is no multiple of Dr. GRPO's

    @property
    def num_measured(self) -> int:
        """Prompts with a split that was measured."""
        return int((~self.cosines.isnan()).any(2).any(1).sum())

    def mean(self, of: str = "cosines") -> dict[str, float]:
        """The mean over prompts of the mean over splits of ``"cosines"``, ``"token_accuracy"`` or ``"differing"``."""
        check_choice("of", of, ("cosines", "token_accuracy", "differing"))
        means = getattr(self, of).nanmean(1).nanmean(0).tolist()
        return dict(zip(self.names, means, strict=True))

    def difference(self, name: str, to: str, *, resamples: int = 4000, coverage: float = 0.95) -> Difference:
        """Agreement of ``name`` minus that of ``to``, paired by split, with an interval by bootstrap.

        Prompts are drawn with replacement, not splits: the splits of a prompt share rollouts. The draws are the same in
        every call. From 40 measured prompts on the ends are percentiles of the drawn means; below, where these are too
        narrow, of the drawn means over their deviation (a studentised bootstrap). Below 5 the ends are NaN, and without
        a prompt that was measured all three are.
        """
        check_choice("name", name, self.names)
        check_choice("to", to, self.names)
        check_count("resamples", resamples, 1)
        check_finite("coverage", coverage)
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must lie between 0 and 1, got {coverage}")
        first, second = (self.cosines[:, :, self.names.index(scheme)] for scheme in (name, to))
        mean_per_prompt = (first - second).nanmean(1)
        mean_per_prompt = mean_per_prompt[~mean_per_prompt.isnan()]
        count, mean = len(mean_per_prompt), float(mean_per_prompt.mean())
        if count < FEWEST:
            return Difference(mean, float("nan"), float("nan"))
        draws = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(count))
        drawn = mean_per_prompt[draws]
        tail = (1.0 - coverage) / 2
        tails = torch.tensor([tail, 1.0 - tail], dtype=torch.float64)
        if count >= _MANY:
            return Difference(mean, *drawn.mean(1).quantile(tails).tolist())
        deviation = float(mean_per_prompt.std())
        if deviation == 0.0:
            return Difference(mean, mean, mean)
        # Draws of few prompts may all be equal, with deviation 0: its floor is a quarter of the prompts' own.
        # A draw deviates less than the prompts that it is drawn from, by the root below.
        ratios = (drawn.mean(1) - mean) / drawn.std(1).clamp_min(deviation / 4)
        low, high = (ratios.quantile(tails) * deviation * (count / (count - 1)) ** 0.5).tolist()
        return Difference(mean, mean - high, mean - low)


def gradient_agreement(
    schemes: Mapping[str, Scheme],
    logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    step_rewards: Tensor | None = None,
    reward_weights: Sequence[float] | Tensor | None = None,
    num_rollouts: int = 8,
    num_splits: int = 8,
    context: int = 4,
    gradients: Gradients | None = None,
    seed: int = 0,
) -> GradientAgreement:
    """Cosine of each scheme's gradient on ``num_rollouts`` rollouts of a prompt with RLOO's on all other rollouts.

        g(A) = sum over rollouts and tokens of A_t grad log pi(token t)
        agreement = cosine of g(scheme, seen rollouts) and g(RLOO, all others)

    One prompt is worked on at a time, on the CPU, and two runs give the same bits. Rollouts whose reward is NaN are
    left out; rewards beyond 1e37 are refused. A prompt needs 2 * num_rollouts + 8 scored rollouts, of which 8 must have
    another reward than the commonest: else a handful would decide the gradient to agree with.

    Args:
        schemes: functions by name, called as ``grpo`` is with tensors (splits, K, T): ``leafkernels.ESTIMATORS``, or
            ``{"mine": functools.partial(leafkernels.tree_td, shrinkage=8.0)}``.
        logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens: as in ``span_advantages``.
        step_rewards: as there. Schemes get them as ``step_rewards=``, RLOO too; a rollout's reward is, above, all that
            it earns.
        reward_weights: as there. Mean and deviation are those of all rollouts of a prompt, and schemes get one reward.
        num_rollouts: K, how many rollouts a scheme sees.
        num_splits: how often a prompt's rollouts are split at random.
        context: tokens that the n-gram policy looks back. Its parameters are the logits of the next token after each
            context; its probabilities are counted on all rollouts of the prompt. Not used with ``gradients``.
        gradients: ``gradients(advantages, rows)`` gives a vector (D,), the gradient of sum(advantages * log pi) in
            parameters of your own. ``advantages`` is shaped like ``token_ids``, on its device, and 0 but in ``rows``,
            int64, the numbers of the rows that take part; the other rows need no forward pass.
        seed: of the splits; prompt p draws them with seed + p.

    Returns:
        ``GradientAgreement``; NaN where a prompt or a split could not be measured.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it and what came.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> token_ids = torch.randint(0, 3, (6, 40, 6))
        >>> rewards = (token_ids[..., 0] == 1).double()  # all is decided by the first token
        >>> found = leafkernels.gradient_agreement(
        ...     {"grpo": leafkernels.grpo, "tree_td": leafkernels.tree_td}, torch.zeros(6, 40, 6), token_ids, rewards
        ... )
        >>> found.difference("tree_td", "grpo").low > 0
        True
    """
    _check_schemes(schemes)
    if gradients is not None and not callable(gradients):
        raise TypeError(f"gradients must be a function or None, got {type(gradients).__name__}")
    check_count("seed", seed, -(2**63), 2**63 - 1)
    for name, value, least in (
        ("num_rollouts", num_rollouts, 2),
        ("num_splits", num_splits, 1),
        ("context", context, 0),
    ):
        check_count(name, value, least)
    call = logprobs, token_ids, rewards, response_mask, groups, group_size, cu_seqlens
    rollouts = read_rollouts(*call, "auto", step_rewards, reward_weights)
    too_large = rollouts.rewards.abs() > _LARGEST_REWARD
    if bool(too_large.any()):
        raise ValueError(
            f"rewards must be at most {_LARGEST_REWARD} in size, or NaN for a rollout without one, got "
            f"{float(rollouts.rewards[too_large][0])}"
        )
    results = []
    layout = rollouts.layout
    starts = layout.group_starts.tolist()
    for number in range(len(starts) - 1):
        rows = layout.rows_by_group[starts[number] : starts[number + 1]]
        prompt = _ScoredRollouts(rollouts, logprobs, response_mask, rows[~rollouts.rewards[rows].isnan()])
        policy = _NGrams(prompt, context) if gradients is None else _CallerGradients(prompt, gradients, rollouts)
        results.append(_measure(prompt, policy, schemes, num_rollouts, num_splits, seed + number))
    if not results:
        return GradientAgreement(tuple(schemes), *torch.zeros((3, 0, num_splits, len(schemes)), dtype=torch.float64))
    return GradientAgreement(tuple(schemes), *torch.stack(results, 1))


def _check_schemes(schemes: Any) -> None:
    if not isinstance(schemes, Mapping):
        raise TypeError(f"schemes must map names to functions, got {type(schemes).__name__}")
    if not schemes:
        raise ValueError("schemes must hold one scheme at least, got none")
    for name, scheme in schemes.items():
        if not isinstance(name, str) or not callable(scheme):
            raise TypeError(
                f"schemes must map names to functions, got {name!r} with a value of {type(scheme).__name__}"
            )


def _check_all_finite(name: str, value: Tensor) -> None:
    is_wrong = ~value.isfinite()
    if bool(is_wrong.any()):
        raise ValueError(f"{name} must be finite, got {float(value[is_wrong][0])}")


class _ScoredRollouts:
    """The scored rollouts of one prompt on the CPU, (n, T) from the first token of each row on."""

    def __init__(self, rollouts: Rollouts, logprobs: Tensor, response_mask: Tensor | None, rows: Tensor) -> None:
        token_ids, layout = as_rows(rollouts.token_ids), rollouts.layout
        stride = token_ids.shape[-1] if token_ids.dim() == 2 else 0
        lengths = layout.row_lengths[rows]
        at = torch.arange(int(lengths.max()) if len(rows) else 0, device=rows.device)
        is_token = at < lengths[:, None]
        # Where each token lies in the tensors of the call, flattened; padding points at the first element.
        places = torch.where(is_token, (rows * stride + layout.row_starts[rows])[:, None] + at, 0)
        self.rows, self.places = rows, places
        self.is_token = is_token.cpu()
        self.token_ids = _taken(token_ids, places).cpu()
        self.logprobs = _taken(as_rows(logprobs), places).detach().cpu()
        live = is_token if response_mask is None else is_token & (_taken(as_rows(response_mask), places) != 0)
        self.mask = live.cpu()
        self.rewards = rollouts.rewards[rows].detach().to("cpu", torch.float64)
        self.ends = rollouts.one_reward[rows].detach().to("cpu", torch.float64)
        steps = rollouts.given[1]
        self.step_rewards = None if steps is None else _taken(as_rows(steps), places).detach().cpu().double()

    def credit(self, scheme: Scheme, members: Tensor, name: str = "dr_grpo") -> Tensor:
        """(splits, k, T) float64 of the rows ``members`` (splits, k), 0 where the mask is False."""
        mask, result = self.mask[members], f"what {name} returns"
        more = {} if self.step_rewards is None else {"step_rewards": self.step_rewards[members]}
        call = self.logprobs[members], self.token_ids[members], self.ends[members]
        credit = scheme(*call, response_mask=mask, **more)
        check_real(result, credit)
        check_like(result, credit, "token_ids", mask.shape, mask.device)
        credit = credit.to(torch.float64).masked_fill(~mask, 0.0)
        _check_all_finite(result, credit)
        return credit


def _taken(tensor: Tensor, places: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[places] if places.numel() else flat.new_zeros(places.shape)


class _NGrams:
    """A softmax over the next token after each context of C tokens, its probabilities counted on all rollouts."""

    def __init__(self, prompt: _ScoredRollouts, context: int) -> None:
        # Numbered from 0, so that a name and a token are one number.
        known, ids = prompt.token_ids.masked_fill(~prompt.is_token, 0).unique(return_inverse=True)
        names = torch.zeros_like(ids)
        for _ in range(min(context, ids.shape[1])):
            # One token more to look back: the name of the context one place earlier, and the token there.
            found = (names[:, :-1] * len(known) + ids[:, :-1]).unique(return_inverse=True)[1]
            names = torch.cat([torch.zeros_like(names[:, :1]), found + 1], 1)
        live = prompt.mask
        pairs, pair_of_token = (names[live] * len(known) + ids[live]).unique(return_inverse=True)
        contexts, context_of_pair = (pairs // max(len(known), 1)).unique(return_inverse=True)
        counts = torch.bincount(pair_of_token, minlength=len(pairs)).to(torch.float64)
        count_per_context = torch.zeros(len(contexts), dtype=torch.float64).index_add_(0, context_of_pair, counts)
        self._num_contexts = len(contexts)
        self._context_of_pair, self._chances = context_of_pair, counts / count_per_context[context_of_pair]
        # The last number stands for tokens that do not count.
        self._pair_of_token = torch.full(live.shape, len(pairs))
        self._pair_of_token[live] = pair_of_token

    def gradients(self, credit: Tensor, members: Tensor) -> Tensor:
        """(splits, D): the sum of credit * (one at the token - probabilities) over the logits of each context."""
        num_pairs = len(self._chances)
        credit_per_pair = credit.new_zeros((len(members), num_pairs + 1))
        credit_per_pair.scatter_add_(1, self._pair_of_token[members].flatten(1), credit.flatten(1))
        credit_per_pair = credit_per_pair[:, :num_pairs]
        credit_per_context = credit.new_zeros((len(members), self._num_contexts))
        credit_per_context.scatter_add_(1, self._context_of_pair.expand_as(credit_per_pair), credit_per_pair)
        return credit_per_pair - credit_per_context[:, self._context_of_pair] * self._chances


class _CallerGradients:
    """The gradients that ``gradients=`` computes, a split at a time."""

    def __init__(self, prompt: _ScoredRollouts, gradients: Gradients, rollouts: Rollouts) -> None:
        self._prompt, self._function, self._rollouts, self._size = prompt, gradients, rollouts, 0

    def gradients(self, credit: Tensor, members: Tensor) -> Tensor:
        prompt, token_ids, name = self._prompt, self._rollouts.token_ids, "what gradients returns"
        found = []
        for split_credit, chosen in zip(credit, members, strict=True):
            flat = torch.zeros(token_ids.numel(), dtype=torch.float32, device=token_ids.device)
            taken = prompt.is_token[chosen]
            flat[prompt.places[chosen][taken]] = split_credit[taken].to(flat)
            vector = check_real(name, self._function(flat.reshape(token_ids.shape), prompt.rows[chosen]))
            if vector.dim() != 1 or not len(vector):
                raise ValueError(f"{name} must be a vector (D,), got shape {tuple(vector.shape)}")
            self._size = self._size or len(vector)
            if len(vector) != self._size:
                raise ValueError(f"{name} must be as long in every call, {self._size}, got {len(vector)}")
            _check_all_finite(name, vector)
            found.append(vector.detach().to("cpu", torch.float64))
        return torch.stack(found)


def _measure(
    prompt: _ScoredRollouts,
    policy: _NGrams | _CallerGradients,
    schemes: Mapping[str, Scheme],
    seen: int,
    splits: int,
    seed: int,
) -> Tensor:
    """(3, splits, S): cosines, token accuracy and share of differing tokens, NaN for splits that were not measured."""
    found = torch.full((3, splits, len(schemes)), torch.nan, dtype=torch.float64)
    if not prompt.mask.any() or not can_be_measured(prompt.rewards, seen):
        return found
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(len(prompt.rewards), generator=generator) for _ in range(splits)])
    members, others = order[:, :seen], order[:, seen:]
    is_mixed = torch.ones(splits, dtype=torch.bool)
    for part in (members, others):
        part_rewards = prompt.rewards[part]
        is_mixed &= ~is_rounding(part_rewards.amin(1), part_rewards.amax(1))
    if is_mixed.any():
        found[:, is_mixed] = _hold_against(prompt, policy, schemes, members[is_mixed], others[is_mixed])
    return found


def _hold_against(
    prompt: _ScoredRollouts,
    policy: _NGrams | _CallerGradients,
    schemes: Mapping[str, Scheme],
    members: Tensor,
    others: Tensor,
) -> Tensor:
    """(3, splits, S): credit of the schemes on ``members`` (splits, K) against that of RLOO on ``others``."""
    # Without step rewards RLOO is Dr. GRPO times G / (G - 1), a factor that no cosine depends on.
    unbiased = dr_grpo if prompt.step_rewards is None else rloo
    truth = policy.gradients(prompt.credit(unbiased, others), others)
    token_truth, is_known = _token_truth(prompt, members, others)
    flat, live = prompt.credit(dr_grpo, members), prompt.mask[members]
    found = []
    for name, scheme in schemes.items():
        credit = prompt.credit(scheme, members, f"schemes[{name!r}]")
        cosine = _cosine(policy.gradients(credit, members), truth)
        accuracy = _cosine(torch.where(is_known, credit, 0.0).flatten(1), token_truth.flatten(1))
        found.append(torch.stack([cosine, accuracy, _differing(credit, flat, live)]))
    return torch.stack(found, 2)


def can_be_measured(rewards: Tensor, num_rollouts: int) -> bool:
    """Whether the scored rewards (n,) of a prompt are enough, and differ enough, to be split."""
    if len(rewards) < 2 * num_rollouts + SPARE:
        return False
    # Rewards that differ by rounding alone count as one.
    ordered = rewards.double().sort().values
    ends = torch.searchsorted(ordered, ordered + ROUNDING * ordered.abs().max(), right=True)
    commonest = int((ends - torch.arange(len(ordered))).max())
    return len(rewards) - commonest >= LEAST_COMMON


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """(splits,) cosines of the rows of two matrices; 0 where either row is 0: it agrees with nothing."""
    cosines = []
    # A row at a time: with gradients of a whole model there is no room for a second matrix.
    for pair in zip(first, second, strict=True):
        # Divided by the largest number of each first, so that no square leaves the range of float64.
        largest = [row.abs().amax() for row in pair]
        one, other = (row / size.where(size > 0, 1.0) for row, size in zip(pair, largest, strict=True))
        sizes = one.square().sum().sqrt() * other.square().sum().sqrt()
        cosines.append(torch.where(sizes == 0, 0.0, (one * other).sum() / sizes))
    return torch.stack(cosines)


def _token_truth(prompt: _ScoredRollouts, members: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """(splits, k, T): mean reward of the held-out rollouts that share prefix and token minus that of those that share
    the prefix, and where enough of them do."""
    shared = common_prefix_lengths(prompt.token_ids, response_mask=prompt.is_token).long()
    lengths = shared[members[:, :, None], others[:, None, :]]
    shape = (*members.shape, prompt.token_ids.shape[1] + 1)
    rewards = prompt.rewards[others][:, None, :].expand_as(lengths)
    # At t: of the held-out rollouts that share t tokens or more.
    sums, counts = (
        torch.zeros(shape, dtype=torch.float64).scatter_add_(2, lengths, entries).flip(2).cumsum(2).flip(2)
        for entries in (rewards, torch.ones_like(rewards))
    )
    means = sums / counts.clamp_min(1)
    is_known = (counts[..., :-1] >= _SHARING) & (counts[..., 1:] >= _CHOOSING) & prompt.mask[members]
    return torch.where(is_known, means[..., 1:] - means[..., :-1], 0.0), is_known


def _differing(credit: Tensor, flat: Tensor, live: Tensor) -> Tensor:
    """(splits,): share of live tokens whose credit is not the multiple of ``flat`` that the median token has."""
    ratios = torch.where(live & (flat != 0), credit / flat, torch.nan)
    multiple = ratios.flatten(1).nanmedian(1).values[:, None, None].nan_to_num(0.0)
    # Credit is float32: a multiple is one up to a few roundings of the largest number.
    slack = 1e-5 * credit.abs().amax((1, 2), keepdim=True)
    differs = ((credit - multiple * flat).abs() > slack) & live
    return differs.sum((1, 2)).double() / live.sum((1, 2)).clamp_min(1)
