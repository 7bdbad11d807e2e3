"""Every operation as Triton kernels: what runs on CUDA tensors. Imports torch and triton only.

No launcher reads anything back to the host, no atomic is used but for minima, which do not depend on their order, and
no size is specialised on: a new length, number of rows or stride compiles nothing.
"""

from leafkernels.kernels.boundaries import launch_select_boundaries as select_boundaries
from leafkernels.kernels.distillation import launch_fire_scope as fire_scope
from leafkernels.kernels.distillation import launch_fire_statistics as fire_statistics
from leafkernels.kernels.distillation import launch_fire_weights as fire_weights
from leafkernels.kernels.find import launch_mask_stretches as mask_stretches
from leafkernels.kernels.find import launch_regular_layout as regular_layout
from leafkernels.kernels.nodes import launch_nodes_of_prefix_lengths as nodes_of_prefix_lengths
from leafkernels.kernels.nodes import launch_prefix_nodes as prefix_nodes
from leafkernels.kernels.policy_loss import launch_policy_loss as policy_loss
from leafkernels.kernels.policy_loss_from_logits import launch_policy_loss_from_logits as policy_loss_from_logits
from leafkernels.kernels.policy_loss_from_logits import launch_scale_gradient as scale_gradient
from leafkernels.kernels.prefix_lengths import launch_common_prefix_lengths as common_prefix_lengths
from leafkernels.kernels.prefix_tree import launch_order_rows as order_rows
from leafkernels.kernels.prefix_tree import launch_tree_nodes as tree_nodes
from leafkernels.kernels.reward_channel import launch_channel_state as channel_state
from leafkernels.kernels.scatter import launch_gather_spans as gather_spans
from leafkernels.kernels.scatter import launch_scatter_spans as scatter_spans
from leafkernels.kernels.surprisal import launch_merge_surprisal_states as merge_surprisal_states
from leafkernels.kernels.surprisal import launch_surprisal_entropy as surprisal_entropy
from leafkernels.kernels.surprisal import launch_surprisal_entropy_backward as surprisal_entropy_backward
from leafkernels.kernels.surprisal import launch_surprisal_states as surprisal_states
from leafkernels.kernels.values import launch_span_values as span_values

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
    "regular_layout",
    "scale_gradient",
    "scatter_spans",
    "select_boundaries",
    "span_values",
    "surprisal_entropy",
    "surprisal_entropy_backward",
    "surprisal_states",
    "tree_nodes",
]
