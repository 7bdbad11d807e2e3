"""LEAF span advantages for GRPO loops: one advantage per span of a rollout, from the prefixes that rollouts share."""

from leafkernels.advantages import SpanTree, span_advantages, span_tree
from leafkernels.boundaries import select_boundaries
from leafkernels.groups import group_index
from leafkernels.linear_surprisal import linear_surprisal_entropy
from leafkernels.loss import PolicyLoss, policy_loss
from leafkernels.loss_from_logits import policy_loss_from_logits
from leafkernels.prefix_lengths import common_prefix_lengths
from leafkernels.scatter import scatter_spans
from leafkernels.surprisal import SurprisalEntropy, surprisal_entropy
from leafkernels.values import SpanValues, span_values

__version__ = "0.1.0"

__all__ = [
    "PolicyLoss",
    "SpanTree",
    "SpanValues",
    "SurprisalEntropy",
    "common_prefix_lengths",
    "group_index",
    "linear_surprisal_entropy",
    "policy_loss",
    "policy_loss_from_logits",
    "scatter_spans",
    "select_boundaries",
    "span_advantages",
    "span_tree",
    "span_values",
    "surprisal_entropy",
]
