"""The policy losses of tokens alone and their gradients from the logits, a few rows at a time while in the cache.

See ``leafkernels.kernels.policy_loss_from_logits`` for the mathematics.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leafkernels._core.precision import compute_dtype
from leafkernels.eager.policy_loss import token_loss
from leafkernels.eager.surprisal import chunks, fold, logit_gradient, merge_surprisal_states, pick

if TYPE_CHECKING:
    from leafkernels.losses.kinds import LossOptions
    from leafkernels.losses.policy_loss_from_logits import LossConstants


def policy_loss_from_logits(
    logits: Tensor, constants: "LossConstants", options: "LossOptions", with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Terms (6, N) of each row, in the order of ``PolicyLoss``, the first times its weight.

    And the gradient (N, V) of the sum of the first, in the dtype of the logits; empty if unwanted.
    """
    dtype = compute_dtype(logits.dtype)
    terms = torch.zeros((6, logits.shape[0]), dtype=dtype, device=logits.device)
    gradients = torch.zeros(logits.shape if with_gradient else (0,), dtype=logits.dtype, device=logits.device)
    scale = constants.temperature.to(dtype).reciprocal()
    for rows, x, room in chunks(logits, constants.mask):
        part = type(constants)(*(None if constant is None else constant[rows] for constant in constants))  # type: ignore
        states = fold(x, scale[rows], room)[..., None]
        statistics = merge_surprisal_states(states, pick(x, part.token_ids), part.temperature, None)
        surprisal, entropy, top, log_total = statistics
        old = -surprisal if part.old_logprobs is None else part.old_logprobs
        log_ratio = surprisal * 0 if part.old_logprobs is None else -surprisal - old
        tokens = part.advantages, part.ref_logprobs, entropy, part.token_weights
        loss, slope, ratio, is_clipped, kl = token_loss(-surprisal, old, log_ratio, *tokens, None, options)
        moved = log_ratio.expm1() - log_ratio
        terms[:, rows] = torch.stack((part.weights * loss, is_clipped.to(dtype), moved, ratio, kl, entropy))
        if with_gradient:
            grad_surprisal = -slope * part.weights
            grad_entropy = -options.entropy_coef * part.weights if options.entropy_coef else None
            gradients[rows] = logit_gradient(
                x, part.token_ids, surprisal, entropy, top, log_total, grad_surprisal, grad_entropy, scale[rows], room
            ).to(logits.dtype)
    return terms, gradients


def scale_gradient(gradients: Tensor, factor: Tensor) -> None:
    """Multiply the gradients by one number, in place; nothing is done where that is 1."""
    if float(factor) != 1:
        gradients.mul_(factor)
