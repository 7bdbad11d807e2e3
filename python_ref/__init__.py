"""LEAF span advantages in plain Python: the specification that people read and that tests hold the kernels to.

Lists in, lists out, standard library only, written as the definitions are (arXiv 2606.07610), with nested loops over
prefixes and no shared tricks. Every module has the name of the operation in ``leafkernels`` that it specifies.
"""

from python_ref.advantages import span_advantages
from python_ref.baselines import maxrl, opo, pass_at_k, qae
from python_ref.boundaries import select_boundaries
from python_ref.differences import tempo, tree_td, treerl
from python_ref.distillation import fire_opd, fire_statistics
from python_ref.divergence import divergence, divergence_backward
from python_ref.estimators import dr_grpo, grpo, rloo
from python_ref.key_tokens import ktae
from python_ref.linear_divergence import Head, linear_divergence, linear_divergence_backward
from python_ref.linear_surprisal import linear_surprisal_entropy, linear_surprisal_entropy_backward
from python_ref.policy_loss import KINDS as LOSS_KINDS
from python_ref.policy_loss import policy_loss, policy_loss_backward
from python_ref.policy_loss_from_logits import policy_loss_from_logits
from python_ref.prefix_lengths import common_prefix_lengths
from python_ref.prefix_tree import PrefixTree, prefix_tree
from python_ref.returns import returns_to_go, total_returns, weighed_rewards
from python_ref.reward_channel import channel_states, reward_channel
from python_ref.scatter import gather_spans, scatter_spans
from python_ref.surprisal import surprisal_entropy, surprisal_entropy_backward
from python_ref.tree import SpanTree, span_tree
from python_ref.values import normalize_spans, span_values
from python_ref.weights import entropy_weights, stare_weights, top_entropy_weights

__all__ = [
    "LOSS_KINDS",
    "Head",
    "PrefixTree",
    "SpanTree",
    "channel_states",
    "common_prefix_lengths",
    "divergence",
    "divergence_backward",
    "dr_grpo",
    "entropy_weights",
    "fire_opd",
    "fire_statistics",
    "gather_spans",
    "grpo",
    "ktae",
    "linear_divergence",
    "linear_divergence_backward",
    "linear_surprisal_entropy",
    "linear_surprisal_entropy_backward",
    "maxrl",
    "normalize_spans",
    "opo",
    "pass_at_k",
    "policy_loss",
    "policy_loss_backward",
    "policy_loss_from_logits",
    "prefix_tree",
    "returns_to_go",
    "qae",
    "reward_channel",
    "rloo",
    "scatter_spans",
    "select_boundaries",
    "span_advantages",
    "span_tree",
    "span_values",
    "stare_weights",
    "surprisal_entropy",
    "surprisal_entropy_backward",
    "tempo",
    "top_entropy_weights",
    "tree_td",
    "total_returns",
    "treerl",
    "weighed_rewards",
]
