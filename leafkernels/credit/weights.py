"""Weights of tokens by their entropy: factors of their advantages, for ``token_weights`` of a loss."""

import torch
from torch import Tensor

from leafkernels._core.checks import check_finite, check_like, check_mask, check_positive, check_real


def stare_weights(
    advantages: Tensor,
    logprobs: Tensor,
    response_mask: Tensor | None = None,
    *,
    share: float = 0.1,
    up: float = 1.1,
    down: float = 1.0,
    entropy: Tensor | None = None,
    target_entropy: float | None = None,
) -> Tensor:
    """``up`` for the most surprising tokens of positive advantage, ``down`` for those of negative, 1 for all others.

    Of the unmasked tokens with an advantage above 0 the ceil(share * number) of least log-probability are weighed by
    ``up``, of those below 0 as many of theirs by ``down`` (STARE, arXiv 2606.19236: its O1 with the defaults, its C2
    with down=0.9). Of equal log-probabilities the first in order counts; one that is NaN never does. PyTorch, without
    a synchronisation.

    Selection, rounding and constants are those of its authors' code, which multiplies the clipped loss by them, as
    ``token_weights`` does, and whose main runs have a ``target_entropy`` of 0.3; models of 14B and more 1.05 and 0.95.

    Args:
        advantages, logprobs: of one shape, floating point; both are constants.
        response_mask: of that shape, nonzero where a token counts; None: all.
        share: from 0 to 1.
        up, down: above 0.
        entropy: of the same shape. With ``target_entropy``, all weights are 1 unless its mean over the unmasked tokens
            lies below that.
        target_entropy: nats.

    Returns:
        float32, shaped like ``advantages``.

    Example:
        >>> advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
        >>> leafkernels.stare_weights(advantages, torch.tensor([[-0.1, -3.0, -0.1, -3.0]]), share=0.5, down=0.9)
        tensor([[1.0000, 1.1000, 1.0000, 0.9000]])
    """
    check_real("advantages", advantages)
    check_real("logprobs", logprobs)
    check_like("logprobs", logprobs, "advantages", advantages.shape, advantages.device)
    mask = check_mask(response_mask, "advantages", advantages.shape, advantages.device)
    _check_share(share)
    check_positive("up", up)
    check_positive("down", down)
    if (entropy is None) != (target_entropy is None):
        raise ValueError("entropy and target_entropy must be given together, got one of them")
    surprisal = -logprobs.detach().reshape(-1)
    live = ~surprisal.isnan() if mask is None else mask.reshape(-1) & ~surprisal.isnan()
    flat = advantages.detach().reshape(-1)
    weights = torch.ones_like(flat, dtype=torch.float32)
    for is_one, weight in ((live & (flat > 0), up), (live & (flat < 0), down)):
        weights = weights.masked_fill(_largest(surprisal, is_one, share), weight)
    if entropy is not None and target_entropy is not None:
        check_real("entropy", entropy)
        check_like("entropy", entropy, "advantages", advantages.shape, advantages.device)
        check_finite("target_entropy", target_entropy)
        counted = torch.ones_like(live) if mask is None else mask.reshape(-1)
        total = entropy.detach().reshape(-1).double().masked_fill(~counted, 0.0).sum()
        weights = torch.where(total < target_entropy * counted.sum(), weights, 1.0)
    return weights.reshape(advantages.shape)


def _check_share(share: float) -> None:
    check_finite("share", share)
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")


def _largest(values: Tensor, is_one: Tensor, share: float) -> Tensor:
    """(M,) bool: of the values (M,) of some tokens the ceil(share * number) largest; of equal ones the first."""
    order = torch.argsort(values.masked_fill(~is_one, -torch.inf), descending=True, stable=True)
    # Values of -inf are no ties with those of other tokens, which come last.
    order = order[torch.argsort((~is_one[order]).to(torch.int8), stable=True)]
    rank = torch.empty_like(order).index_copy(0, order, torch.arange(order.shape[0], device=order.device))
    return is_one & (rank < (is_one.sum() * share - 1e-9).ceil())


def top_entropy_weights(entropy: Tensor, response_mask: Tensor | None = None, *, share: float = 0.2) -> Tensor:
    """1 for the ceil(share * number) unmasked tokens of highest entropy in the call, 0 for all others.

    With them only the forks of an answer are trained on (arXiv 2506.01939, which takes a fifth). Of equal entropies the
    first in order counts; one that is NaN never does. PyTorch, without a synchronisation.

    Args:
        entropy: of any shape, floating point, a constant; the surprisal of the sampled tokens where there is none.
        response_mask: of that shape, nonzero where a token counts; None: all.
        share: from 0 to 1.

    Returns:
        float32, shaped like ``entropy``.

    Example:
        >>> leafkernels.top_entropy_weights(torch.tensor([[0.1, 2.0, 0.3], [0.2, 0.1, 0.0]]))
        tensor([[0., 1., 1.],
                [0., 0., 0.]])
    """
    check_real("entropy", entropy)
    mask = check_mask(response_mask, "entropy", entropy.shape, entropy.device)
    _check_share(share)
    values = entropy.detach().reshape(-1)
    is_one = ~values.isnan() if mask is None else mask.reshape(-1) & ~values.isnan()
    return _largest(values, is_one, share).to(torch.float32).reshape(entropy.shape)


def entropy_weights(advantages: Tensor, entropy: Tensor, *, alpha: float = 0.4, kappa: float = 2.0) -> Tensor:
    """1 + min(alpha * entropy, |A| / kappa) / A, with which A becomes A + min(alpha * entropy, |A| / kappa).

    Tokens of high entropy gain, by no more than a share of their advantage, whose sign stays (arXiv 2506.14758). Both
    arguments are constants. Advantages of 0 have the weight 1. The formula was checked against a summary of the paper,
    and 0.4 and 2 against a public implementation that is not its authors'; neither its text nor their code was at hand.

    Args:
        advantages, entropy: of one shape, floating point.
        alpha: at least 0.
        kappa: above 1, so that no weight is 0 or below.

    Returns:
        float32, shaped like ``advantages``.

    Example:
        >>> leafkernels.entropy_weights(torch.tensor([1.0, 1.0, -1.0, 0.0]), torch.tensor([0.5, 5.0, 5.0, 5.0]))
        tensor([1.2000, 1.5000, 0.5000, 1.0000])
    """
    check_real("advantages", advantages)
    check_real("entropy", entropy)
    check_like("entropy", entropy, "advantages", advantages.shape, advantages.device)
    check_finite("alpha", alpha)
    check_finite("kappa", kappa)
    if alpha < 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    if kappa <= 1:
        raise ValueError(f"kappa must be above 1, got {kappa}")
    credit = advantages.detach().double()
    gain = torch.minimum(alpha * entropy.detach().double(), credit.abs() / kappa)
    is_zero = credit == 0.0
    return torch.where(is_zero, 1.0, 1.0 + gain / credit.masked_fill(is_zero, 1.0)).float()
