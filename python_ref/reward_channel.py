"""The reward channel of SLA (arXiv 2503.00029): a number for each token, from what a decoder's layers read."""

import math
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def channel_states(hidden: Sequence[Matrix], norms: Matrix, weights: Sequence[Matrix], eps: float) -> list[list[float]]:
    """u_{n-1} of each token, of R numbers.

        u_0 = silu(W_0 norm_0(h_0))        u_i = silu(W_i norm_i([h_i; u_{i-1}])) + u_{i-1}

    Args:
        hidden: for each of n layers and each token, the D numbers that the layer reads.
        norms: for each layer the weights of its norm, D of them in the first layer and D + R in the others.
        weights: for each layer R rows, as long as its norm.
        eps: of the norms.
    """
    states: list[list[float]] = []
    for token in range(len(hidden[0])):
        state: list[float] = []
        for layer, (norm, weight) in enumerate(zip(norms, weights, strict=True)):
            normal = rms_norm([*hidden[layer][token], *state], norm, eps)
            found = [silu(dot(row, normal)) for row in weight]
            state = [new + old for new, old in zip(found, state, strict=True)] if layer else found
        states.append(state)
    return states


def reward_channel(
    hidden_states: Sequence[Matrix], norms: Matrix, weights: Sequence[Matrix], head: Sequence[Matrix], eps: float
) -> list[float]:
    """The reward of each token: what the head makes of [h_n; u_{n-1}].

    Args:
        hidden_states: as ``hidden`` of ``channel_states``, and behind it h_n, the output of the final norm.
        norms, weights, eps: as there.
        head: matrices, SiLU between them; the last one has one row.
    """
    rewards = []
    for last, state in zip(hidden_states[-1], channel_states(hidden_states[:-1], norms, weights, eps), strict=True):
        numbers = [*last, *state]
        for layer, matrix in enumerate(head):
            numbers = [dot(row, [silu(x) for x in numbers] if layer else numbers) for row in matrix]
        rewards.append(numbers[0])
    return rewards


def rms_norm(numbers: Sequence[float], weights: Sequence[float], eps: float) -> list[float]:
    """Each number times its weight, over the root of the mean square (plus eps) of all."""
    root = math.sqrt(math.fsum(x * x for x in numbers) / len(numbers) + eps)
    return [weight * x / root for weight, x in zip(weights, numbers, strict=True)]


def silu(x: float) -> float:
    """x / (1 + e^-x)."""
    if x < 0:  # where e^-x would overflow
        return x * math.exp(x) / (1 + math.exp(x))
    return x / (1 + math.exp(-x))


def dot(row: Sequence[float], numbers: Sequence[float]) -> float:
    """The sum of products."""
    return math.fsum(a * b for a, b in zip(row, numbers, strict=True))
