"""Every operation on ``python_ref``: what ``backend="reference"`` runs; slow, on any device."""

from leafkernels.reference.boundaries import select_boundaries
from leafkernels.reference.distillation import fire_scope, fire_statistics, fire_weights
from leafkernels.reference.find import mask_stretches
from leafkernels.reference.linear_surprisal import linear_surprisal_entropy, linear_surprisal_entropy_backward
from leafkernels.reference.nodes import nodes_of_prefix_lengths, prefix_nodes
from leafkernels.reference.policy_loss import policy_loss
from leafkernels.reference.policy_loss_from_logits import policy_loss_from_logits, scale_gradient
from leafkernels.reference.prefix_lengths import common_prefix_lengths
from leafkernels.reference.prefix_tree import prefix_tree
from leafkernels.reference.reward_channel import channel_state
from leafkernels.reference.scatter import gather_spans, scatter_spans
from leafkernels.reference.surprisal import (
    merge_surprisal_states,
    surprisal_entropy,
    surprisal_entropy_backward,
    surprisal_states,
)
from leafkernels.reference.values import span_values

__all__ = [
    "channel_state",
    "common_prefix_lengths",
    "fire_scope",
    "fire_statistics",
    "fire_weights",
    "gather_spans",
    "linear_surprisal_entropy",
    "linear_surprisal_entropy_backward",
    "mask_stretches",
    "merge_surprisal_states",
    "nodes_of_prefix_lengths",
    "policy_loss",
    "policy_loss_from_logits",
    "prefix_nodes",
    "prefix_tree",
    "scale_gradient",
    "scatter_spans",
    "select_boundaries",
    "span_values",
    "surprisal_entropy",
    "surprisal_entropy_backward",
    "surprisal_states",
]
