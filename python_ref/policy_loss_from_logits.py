"""The policy losses from logits, and its gradient, token by token."""

from collections.abc import Sequence
from typing import Any

from python_ref.policy_loss import Table, policy_loss, policy_loss_backward
from python_ref.surprisal import surprisal_entropy, surprisal_entropy_backward


def policy_loss_from_logits(
    logits: Sequence[Sequence[Sequence[float]]],
    token_ids: Sequence[Sequence[int]],
    old_logprobs: Table | None,
    advantages: Table,
    response_mask: Sequence[Sequence[bool]],
    *,
    temperature: Table | None = None,
    **options: Any,
) -> tuple[dict[str, float], list[list[list[float]]]]:
    """Loss and statistics as ``policy_loss`` gives them, and the gradient of the loss with respect to the logits.

    Without ``old_logprobs`` the policy is its own old one: every ratio is 1. The options are those of ``policy_loss``.
    """
    logprobs, entropies, gradients = [], [], []
    temperatures = [[1.0] * len(mask) for mask in response_mask] if temperature is None else temperature
    for i in range(len(response_mask)):
        surprisals, row_entropies = surprisal_entropy(logits[i], token_ids[i], temperature=temperatures[i])
        logprobs.append([-s for s in surprisals])
        entropies.append(row_entropies)
    policies = logprobs, logprobs if old_logprobs is None else old_logprobs
    slopes, grad_entropies = policy_loss_backward(*policies, advantages, response_mask, **options)
    for i, mask in enumerate(response_mask):
        grad_surprisals = [-slope for slope in slopes[i]]
        # A masked token is not looked at, whatever its logits.
        shown = [row if live else [0.0] * len(row) for row, live in zip(logits[i], mask, strict=True)]
        gradients.append(
            surprisal_entropy_backward(
                grad_surprisals, grad_entropies[i], shown, token_ids[i], temperature=temperatures[i]
            )
        )
    return policy_loss(*policies, advantages, response_mask, entropy=entropies, **options), gradients
