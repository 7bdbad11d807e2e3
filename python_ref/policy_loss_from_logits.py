"""The clipped policy loss from logits, and its gradient, token by token."""

from collections.abc import Sequence
from typing import Any

from python_ref.policy_loss import Table, exp, expm1, gains, policy_loss
from python_ref.surprisal import surprisal_entropy, surprisal_entropy_backward


def policy_loss_from_logits(
    logits: Sequence[Sequence[Sequence[float]]],
    token_ids: Sequence[Sequence[int]],
    old_logprobs: Table | None,
    advantages: Table,
    response_mask: Sequence[Sequence[bool]],
    *,
    temperature: Table | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    ref_logprobs: Table | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    aggregate: str = "token_mean",
    constant: float | None = None,
) -> tuple[dict[str, float], list[list[list[float]]]]:
    """Loss and statistics as ``policy_loss`` gives them, and the gradient of the loss with respect to the logits.

    Without ``old_logprobs`` the policy is its own old one: every ratio is 1.
    """
    logprobs, entropies, gradients = [], [], []
    number = sum(map(sum, response_mask))
    rows_with_any = sum(map(any, response_mask))
    for i, mask in enumerate(response_mask):
        temperatures = [1.0] * len(mask) if temperature is None else temperature[i]
        surprisals, of_row = surprisal_entropy(logits[i], token_ids[i], temperature=temperatures)
        logprobs.append([-s for s in surprisals])
        entropies.append(of_row)
        of_logprobs, of_entropies = [], []
        for t, live in enumerate(mask):
            if not live:
                of_logprobs.append(0.0)
                of_entropies.append(0.0)
                continue
            weight = {
                "token_mean": 1 / max(number, 1),
                "sequence_mean": 1 / (max(sum(mask), 1) * max(rows_with_any, 1)),
                "sum": 1.0,
                "constant": 1 / (constant or 1.0),
            }[aggregate]
            ratio = 1.0 if old_logprobs is None else exp(logprobs[i][t] - old_logprobs[i][t])
            gain, bounded = gains(ratio, advantages[i][t], clip)
            slope = 0.0 if bounded < gain else -gain
            if ref_logprobs is not None and kl_coef != 0:
                slope -= kl_coef * expm1(ref_logprobs[i][t] - logprobs[i][t])
            of_logprobs.append(weight * slope)
            of_entropies.append(-weight * entropy_coef)
        # A masked token is not looked at, whatever its logits.
        shown = [row if live else [0.0] * len(row) for row, live in zip(logits[i], mask, strict=True)]
        of_surprisals = [-g for g in of_logprobs]
        gradients.append(
            surprisal_entropy_backward(of_surprisals, of_entropies, shown, token_ids[i], temperature=temperatures)
        )
    options: dict[str, Any] = {"clip": clip, "kl_coef": kl_coef, "aggregate": aggregate, "constant": constant}
    found = policy_loss(
        logprobs,
        logprobs if old_logprobs is None else old_logprobs,
        advantages,
        response_mask,
        ref_logprobs=ref_logprobs,
        entropy=entropies,
        entropy_coef=entropy_coef,
        **options,
    )
    return found, gradients
