"""Every operation in vectorised PyTorch: what runs on the CPU, and what ``backend="torch"`` runs anywhere.

Memory stays proportional to the tokens plus, for each row, the number of boundaries; where a table of prefix lengths is
asked for, to the pairs. On CUDA tensors these functions read sizes back from the device; the Triton kernels never do.
"""

from leafkernels.eager.boundaries import select_boundaries
from leafkernels.eager.distillation import fire_scope, fire_statistics, fire_weights
from leafkernels.eager.find import mask_stretches
from leafkernels.eager.nodes import nodes_of_prefix_lengths, prefix_nodes
from leafkernels.eager.policy_loss import policy_loss
from leafkernels.eager.policy_loss_from_logits import policy_loss_from_logits, scale_gradient
from leafkernels.eager.prefix_lengths import common_prefix_lengths
from leafkernels.eager.prefix_tree import order_rows, tree_nodes
from leafkernels.eager.reward_channel import channel_state
from leafkernels.eager.scatter import gather_spans, scatter_spans
from leafkernels.eager.surprisal import (
    merge_surprisal_states,
    surprisal_entropy,
    surprisal_entropy_backward,
    surprisal_states,
    surprisal_sums,
)
from leafkernels.eager.values import span_values, span_values_backward

__all__ = [
    "channel_state",
    "common_prefix_lengths",
    "fire_scope",
    "fire_statistics",
    "fire_weights",
    "gather_spans",
    "mask_stretches",
    "merge_surprisal_states",
    "nodes_of_prefix_lengths",
    "order_rows",
    "policy_loss",
    "policy_loss_from_logits",
    "prefix_nodes",
    "scale_gradient",
    "scatter_spans",
    "select_boundaries",
    "span_values",
    "span_values_backward",
    "surprisal_entropy",
    "surprisal_entropy_backward",
    "surprisal_states",
    "surprisal_sums",
    "tree_nodes",
]
