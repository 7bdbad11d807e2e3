"""What is logged of pairs of answers, one preferred."""

import torch
from torch import Tensor

from leafkernels._core.checks import check_positive
from leafkernels.losses.preference import answers, check_pairs, mean_over, tokens_first

_SHARES = {"100%": 1.0, "50%": 0.5, "25%": 0.25}


@torch.no_grad()
def simpo_metrics(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float = 2.0,
) -> dict[str, Tensor]:
    """Metrics of preference on log-probabilities, by name. Arguments as in ``simpo_loss``.

    Each is a mean over the pairs, under the name that preference trainers log: ``logps/chosen`` and ``logps/rejected``,
    an answer's mean log-probability a token; ``rewards/chosen`` and ``rewards/rejected``, ``beta`` times that;
    ``rewards/margins``, their difference; ``rewards/accuracies``, the share of pairs where it is above 0.

    Returns:
        Scalars on the device of the log-probabilities.

    Example:
        >>> chosen, rejected = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-2.0, -3.0]])
        >>> leafkernels.simpo_metrics(chosen, rejected, torch.ones(1, 2), torch.ones(1, 2))["rewards/margins"]
        tensor(3.)
    """
    check_positive("beta", beta)
    means = {}
    for name, logprobs, mask in (
        ("chosen", chosen_logprobs, chosen_mask),
        ("rejected", rejected_logprobs, rejected_mask),
    ):
        means[name] = mean_over(*answers(name, logprobs, mask, "logprobs"))
    check_pairs(means["chosen"], means["rejected"], "logprobs")
    margins = beta * (means["chosen"] - means["rejected"])
    found = {f"rewards/{name}": beta * values for name, values in means.items()}
    found |= {"rewards/accuracies": (margins > 0).to(margins.dtype), "rewards/margins": margins}
    found |= {f"logps/{name}": values for name, values in means.items()}
    return {name: values.mean() for name, values in found.items()}


@torch.no_grad()
def token_reward_metrics(
    chosen_rewards: Tensor, rejected_rewards: Tensor, chosen_mask: Tensor, rejected_mask: Tensor
) -> dict[str, Tensor]:
    """Metrics of preference on rewards, by name, also early in the answers. Arguments as in ``token_reward_loss``.

    Each is a mean over the pairs, under the name that the authors log:

    - ``chosen_value_50%``, ``rejected_value_50%`` (100%, 50%, 25%): mean reward of the first half of an answer, at
      least of one token; ``[-1]``: of its last token;
    - ``diff_value_50%``: mean of chosen minus rejected, token by token, over that part of the shorter answer;
      ``diff_value_acc_50%``, ``diff_value_acc>=_50%``: share of these above 0, and not below 0;
    - ``diff_value_seq_mean``, ``diff_value_[-1]`` and their ``acc``: of the answers' mean, and last, rewards.

    Returns:
        Scalars on the device of the rewards.

    Example:
        >>> chosen, rejected = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]])
        >>> found = leafkernels.token_reward_metrics(chosen, rejected, torch.ones(1, 2), torch.ones(1, 2))
        >>> found["diff_value_acc_50%"], found["diff_value_acc_[-1]"]
        (tensor(0.), tensor(1.))
    """
    sides = {}
    for name, rewards, mask in (
        ("chosen", chosen_rewards, chosen_mask),
        ("rejected", rejected_rewards, rejected_mask),
    ):
        rewards, mask = answers(name, rewards, mask)
        sides[name] = tokens_first(rewards, mask), mask.sum(1)
    (chosen, chosen_lengths), (rejected, rejected_lengths) = sides.values()
    check_pairs(chosen, rejected)
    found = {}
    for name, (rewards, lengths) in sides.items():
        for part, share in _SHARES.items():
            found[f"{name}_value_{part}"] = mean_over(rewards, _first(rewards, lengths, share))
        found[f"{name}_value_[-1]"] = _last(rewards, lengths)
    last = found["chosen_value_[-1]"] - found["rejected_value_[-1]"]
    means = found["chosen_value_100%"] - found["rejected_value_100%"]
    width = min(chosen.shape[1], rejected.shape[1])
    difference = chosen[:, :width] - rejected[:, :width]
    shorter = torch.minimum(chosen_lengths, rejected_lengths)
    found |= {"diff_value_[-1]": last, "diff_value_acc_[-1]": (last > 0).to(last.dtype)}
    found |= {"diff_value_seq_mean": means, "diff_value_acc_seq_mean": (means > 0).to(means.dtype)}
    for part, share in _SHARES.items():
        tokens = _first(difference, shorter, share)
        found[f"diff_value_{part}"] = mean_over(difference, tokens)
        found[f"diff_value_acc_{part}"] = mean_over((difference > 0).to(difference.dtype), tokens)
        found[f"diff_value_acc>=_{part}"] = mean_over((difference >= 0).to(difference.dtype), tokens)
    return {name: values.mean() for name, values in found.items()}


def _first(rewards: Tensor, lengths: Tensor, share: float) -> Tensor:
    """(B, T) bool: the first ``share`` of each row's tokens, rounded down, at least one."""
    counts = (lengths * share).floor().clamp_min(1)
    return torch.arange(rewards.shape[1], device=rewards.device) < counts[:, None]


def _last(rewards: Tensor, lengths: Tensor) -> Tensor:
    return rewards.gather(1, (lengths - 1).clamp_min(0)[:, None])[:, 0]
