"""Divergence from hidden states: the logits of both as sums of products, then as from logits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from python_ref.divergence import divergence, divergence_backward
from python_ref.linear_surprisal import Matrix, head_gradients, head_logits


class Head(NamedTuple):
    """What makes a model's logits s (hidden . weight of an id + bias), capped at c as c tanh(x / c)."""

    hidden: Matrix
    weight: Matrix
    bias: Sequence[float] | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None


def linear_divergence(
    student: Head, teacher: Head | None, **options: Any
) -> tuple[list[float], list[float], list[float], list[bool]]:
    """``divergence`` of the logits of two heads, with its options."""
    return divergence(head_logits(*student), None if teacher is None else head_logits(*teacher), **options)


def linear_divergence_backward(
    divergence_gradients: Sequence[float],
    entropy_gradients: Sequence[float],
    student: Head,
    teacher: Head | None,
    **options: Any,
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """Gradients of the student's hidden states, weight and bias."""
    logits = head_logits(*student)
    teacher_logits = None if teacher is None else head_logits(*teacher)
    grads = divergence_backward(divergence_gradients, entropy_gradients, logits, teacher_logits, **options)
    hidden, weight, _, scale, softcap = student
    return head_gradients(grads, logits, hidden, weight, scale, softcap)
