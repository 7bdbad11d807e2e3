"""Losses of a pair of answers, one preferred, from a reward for each token (SLA, arXiv 2503.00029)."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad, softplus

from leafkernels._core.checks import (
    check_choice,
    check_finite,
    check_mask,
    check_positive,
    check_real,
    check_tensor,
    values_readable,
)
from leafkernels._core.precision import compute_dtype
from leafkernels.losses.tokens import unpacked
from leafkernels.rows.find import check_cu_seqlens

KINDS = ("sequence_bt", "token_bt", "token_bce", "sequence_bce")


def token_reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    kind: str = "sequence_bt",
    scale: float = 1.0,
    margin: float = 0.0,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Preference loss on a reward for each token, a scalar. B pairs; chosen and rejected may differ in width.

    With r the rewards of an answer's tokens and L their number, chosen before rejected, averaged over the pairs:

        sequence_bt    -log sigmoid(scale (mean r_w - mean r_l - margin))
        token_bt       mean over j < max(L_w, L_l) of -log sigmoid(scale (r_w[j] - r_l[j] - margin));
                       the shorter answer repeats its last reward
        token_bce      half of the mean of -log sigmoid(r_w) over all chosen tokens of the batch, and half of that of
                       -log sigmoid(-r_l) over all rejected ones
        sequence_bce   half of -log mean sigmoid(r_w), and half of -log mean sigmoid(-r_l)

    Args:
        chosen_rewards: (B, T), float16, bfloat16, float32 or float64.
        rejected_rewards: (B, T').
        chosen_mask: (B, T), nonzero at the tokens of the answer. What stands elsewhere is not read, NaN neither.
        rejected_mask: (B, T'), likewise.
        kind: one of the above.
        scale: a factor, for the two Bradley-Terry kinds.
        margin: by how much the better answer should be better, for the same.
        chosen_cu_seqlens, rejected_cu_seqlens: (B + 1,) int32, the offsets of packed answers, whose rewards and mask
            then are (total,). They are laid out in rows, on a CPU of the longest answer, elsewhere, where no length is
            read, of all tokens.

    Returns:
        A scalar, float32 (float64 if a reward is), differentiable in both rewards.

    Raises:
        TypeError, ValueError: an argument is not what it must be, or an answer on the CPU has no token; the message
            names it. On other devices nothing waits for the masks, and an answer without a token gives NaN.

    Example:
        >>> chosen, rejected = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 2.0]])
        >>> leafkernels.token_reward_loss(chosen, rejected, torch.ones(1, 2), torch.ones(1, 2))
        tensor(0.3133)
    """
    options: dict[str, Any] = {"kind": kind, "scale": scale, "margin": margin}
    options |= {"chosen_cu_seqlens": chosen_cu_seqlens, "rejected_cu_seqlens": rejected_cu_seqlens}
    sums = token_reward_sums(chosen_rewards, rejected_rewards, chosen_mask, rejected_mask, **options)
    counts = answer_counts(chosen_mask, rejected_mask)
    if chosen_cu_seqlens is not None:
        counts[0] = chosen_cu_seqlens.shape[0] - 1
    return (sums / counts).sum()


def token_reward_sums(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    kind: str = "sequence_bt",
    scale: float = 1.0,
    margin: float = 0.0,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
) -> Tensor:
    """(3,): what ``token_reward_loss`` sums over the pairs, the chosen tokens and the rejected ones.

    Divided by the ``answer_counts`` of a whole step, the sums of its parts add up to the loss of the step.
    """
    check_choice("kind", kind, KINDS)
    check_positive("scale", scale)
    check_finite("margin", margin)
    chosen, chosen_mask = answers("chosen", chosen_rewards, chosen_mask, "rewards", chosen_cu_seqlens)
    rejected, rejected_mask = answers("rejected", rejected_rewards, rejected_mask, "rewards", rejected_cu_seqlens)
    check_pairs(chosen, rejected)
    if kind == "token_bce":
        sides = (softplus(-chosen), chosen_mask), (softplus(rejected), rejected_mask)
        return pad(torch.stack([0.5 * torch.where(mask, x, 0.0).sum() for x, mask in sides]), (1, 0))
    if kind == "sequence_bt":
        difference = mean_over(chosen, chosen_mask) - mean_over(rejected, rejected_mask)
        loss_per_pair = softplus(-scale * (difference - margin))
    elif kind == "token_bt":
        difference, is_token = _aligned(chosen, chosen_mask, rejected, rejected_mask)
        loss_per_pair = mean_over(softplus(-scale * (difference - margin)), is_token)
    else:
        loss_per_pair = -0.5 * (_log_mean_sigmoid(chosen, chosen_mask) + _log_mean_sigmoid(-rejected, rejected_mask))
    return pad(loss_per_pair.sum()[None], (0, 2))


def answer_counts(chosen_mask: Tensor, rejected_mask: Tensor) -> Tensor:
    """(3,) int64: pairs, tokens of the chosen answers and tokens of the rejected ones."""
    pairs = torch.full((), len(chosen_mask), device=chosen_mask.device)
    return torch.stack([pairs, (chosen_mask != 0).sum(), (rejected_mask != 0).sum()])


def simpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    kind: str = "sigmoid",
    beta: float = 2.0,
    margin: float = 0.5,
    label_smoothing: float = 0.0,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
) -> Tensor:
    """SimPO loss (arXiv 2405.14734), a scalar: preference learning on log-probabilities, without a reference model.

    With x the mean log-probability of the chosen answer's tokens minus that of the rejected one's minus the margin,
    averaged over the pairs:

        sigmoid    (1 - label_smoothing) -log sigmoid(beta x) + label_smoothing -log sigmoid(-beta x)
        hinge      max(0, 1 - beta x)

    Args:
        chosen_logprobs: (B, T) log-probabilities of the tokens, as ``surprisal_entropy`` gives them; what stands
            outside of the mask is not read.
        rejected_logprobs: (B, T').
        chosen_mask, rejected_mask: of the same shapes, nonzero at the tokens of the answers.
        kind: one of the above.
        beta: positive.
        margin: by how much the better answer's mean should be higher; the paper's gamma / beta.
        label_smoothing: from 0 to less than 1, for "sigmoid".
        chosen_cu_seqlens, rejected_cu_seqlens: as in ``token_reward_loss``.

    Returns:
        A scalar, float32 (float64 if a log-probability is), differentiable in both.

    Raises:
        TypeError, ValueError: as ``token_reward_loss``.

    Example:
        >>> chosen, rejected = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-2.0, -3.0]])
        >>> leafkernels.simpo_loss(chosen, rejected, torch.ones(1, 2), torch.ones(1, 2))
        tensor(0.1269)
    """
    check_choice("kind", kind, ("sigmoid", "hinge"))
    check_positive("beta", beta)
    check_finite("margin", margin)
    check_finite("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {label_smoothing}")
    chosen, chosen_mask = answers("chosen", chosen_logprobs, chosen_mask, "logprobs", chosen_cu_seqlens)
    rejected, rejected_mask = answers("rejected", rejected_logprobs, rejected_mask, "logprobs", rejected_cu_seqlens)
    check_pairs(chosen, rejected, "logprobs")
    x = beta * (mean_over(chosen, chosen_mask) - mean_over(rejected, rejected_mask) - margin)
    if kind == "hinge":
        return (1 - x).clamp_min(0).mean()
    return ((1 - label_smoothing) * softplus(-x) + label_smoothing * softplus(x)).mean()


def answers(
    name: str, rewards: Any, mask: Any, what: str = "rewards", cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_real(f"{name}_{what}", rewards)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, f"{name}_{what}", rewards)
    elif rewards.dim() != 2:
        raise ValueError(f"{name}_{what} must have shape (pairs, tokens), got shape {tuple(rewards.shape)}")
    check_tensor(f"{name}_mask", mask)
    is_token = cast(Tensor, check_mask(mask, f"{name}_{what}", rewards.shape, rewards.device, f"{name}_mask"))
    if cu_seqlens is not None:
        rewards, is_token = unpacked(rewards, is_token, cu_seqlens)
    if values_readable(is_token):
        empty = (~is_token.any(1)).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"{name}_mask must have a token in every row, got none in row {empty[0]}")
    rewards = rewards.to(compute_dtype(rewards.dtype))
    return torch.where(is_token, rewards, 0.0), is_token


def check_pairs(chosen: Tensor, rejected: Tensor, what: str = "rewards") -> None:
    if chosen.shape[0] != rejected.shape[0] or chosen.shape[0] == 0:
        raise ValueError(
            f"rejected_{what} must have the rows of chosen_{what}, {chosen.shape[0]}, and at least one, got "
            f"{rejected.shape[0]}"
        )
    if chosen.device != rejected.device:
        raise ValueError(f"rejected_{what} must be on {chosen.device}, got {rejected.device}")


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Over the last dimension, where the mask is True."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)


def tokens_first(rewards: Tensor, mask: Tensor) -> Tensor:
    """The rewards of each row's tokens first, in their order."""
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return rewards.gather(1, order)


def _aligned(chosen: Tensor, chosen_mask: Tensor, rejected: Tensor, rejected_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, width): chosen minus rejected at the j-th token of each, the last repeated; and where the longer has one."""
    sides, lengths = [], []
    at = torch.arange(max(chosen.shape[1], rejected.shape[1]), device=chosen.device)
    for rewards, mask in ((chosen, chosen_mask), (rejected, rejected_mask)):
        length = mask.sum(1, keepdim=True)
        sides.append(tokens_first(rewards, mask).gather(1, at.minimum((length - 1).clamp_min(0))))
        lengths.append(length)
    return sides[0] - sides[1], at < torch.maximum(*lengths)


def _log_mean_sigmoid(rewards: Tensor, mask: Tensor) -> Tensor:
    """(B,): the logarithm of the mean of sigmoid(r) over the tokens, also where each sigmoid is 0 in float32."""
    return logsigmoid(rewards).masked_fill(~mask, -torch.inf).logsumexp(1) - mask.sum(1).to(rewards.dtype).log()
