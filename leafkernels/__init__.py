"""LEAF span advantages for GRPO loops: one advantage per span of a rollout, from the prefixes that rollouts share."""

import leafkernels._core.interrupt as _interrupt  # noqa: F401 - before what takes seconds

# isort: split
from typing import TYPE_CHECKING, Any

from leafkernels.credit.advantages import span_advantages
from leafkernels.credit.agreement import GradientAgreement, gradient_agreement
from leafkernels.credit.baselines import maxrl, opo, pass_at_k, qae
from leafkernels.credit.boundaries import select_boundaries
from leafkernels.credit.differences import tempo, tree_td, treerl
from leafkernels.credit.distillation import FireOPD, FireStatistics, fire_opd, fire_statistics
from leafkernels.credit.estimators import dr_grpo, grpo, rloo
from leafkernels.credit.fire_teachers import fire_teachers
from leafkernels.credit.key_tokens import ktae
from leafkernels.credit.options import PRESETS
from leafkernels.credit.prefix_lengths import common_prefix_lengths
from leafkernels.credit.registry import ESTIMATORS, Estimator
from leafkernels.credit.scatter import scatter_spans
from leafkernels.credit.token_baseline import otb
from leafkernels.credit.tree import SpanTree, span_tree
from leafkernels.credit.values import SpanValues, span_values
from leafkernels.credit.weights import entropy_weights, stare_weights, top_entropy_weights
from leafkernels.losses.equal import DroppedEqual, drop_equal
from leafkernels.losses.policy_loss import PolicyLoss, policy_loss
from leafkernels.losses.policy_loss_from_logits import policy_loss_from_logits
from leafkernels.losses.preference import simpo_loss, token_reward_loss
from leafkernels.losses.preference_metrics import simpo_metrics, token_reward_metrics
from leafkernels.losses.rollout_weights import RolloutWeights, rollout_weights
from leafkernels.rows.groups import group_index
from leafkernels.rows.prefix_tree import PrefixTree, prefix_tree
from leafkernels.vocabulary.divergence import Divergence, TeacherTopK, divergence
from leafkernels.vocabulary.linear_divergence import linear_divergence
from leafkernels.vocabulary.linear_surprisal import linear_surprisal_entropy
from leafkernels.vocabulary.sampling_mask import SamplingMask
from leafkernels.vocabulary.statistics import TokenStatistics
from leafkernels.vocabulary.surprisal import SurprisalEntropy, surprisal_entropy

if TYPE_CHECKING:
    from leafkernels.command.tensors import report, save_rollouts

__version__ = "0.1.0"

# A comment begins a page of the API reference.
__all__ = [
    # Credit
    "ESTIMATORS",
    "PRESETS",
    "Estimator",
    "GradientAgreement",
    "dr_grpo",
    "entropy_weights",
    "gradient_agreement",
    "group_index",
    "grpo",
    "ktae",
    "maxrl",
    "opo",
    "otb",
    "pass_at_k",
    "qae",
    "report",
    "rloo",
    "save_rollouts",
    "span_advantages",
    "stare_weights",
    "tempo",
    "top_entropy_weights",
    "tree_td",
    "treerl",
    # Trees
    "PrefixTree",
    "SpanTree",
    "SpanValues",
    "common_prefix_lengths",
    "prefix_tree",
    "scatter_spans",
    "select_boundaries",
    "span_tree",
    "span_values",
    # Vocabulary
    "Divergence",
    "SamplingMask",
    "SurprisalEntropy",
    "TeacherTopK",
    "TokenStatistics",
    "divergence",
    "linear_divergence",
    "linear_surprisal_entropy",
    "surprisal_entropy",
    # Losses
    "DroppedEqual",
    "PolicyLoss",
    "RolloutWeights",
    "drop_equal",
    "policy_loss",
    "policy_loss_from_logits",
    "rollout_weights",
    # Distillation
    "FireOPD",
    "FireStatistics",
    "fire_opd",
    "fire_statistics",
    "fire_teachers",
    # Preferences
    "simpo_loss",
    "simpo_metrics",
    "token_reward_loss",
    "token_reward_metrics",
]


def __getattr__(name: str) -> Any:
    # What draws pages is loaded when it is asked for: a training loop needs neither rich nor jinja2.
    if name in ("report", "save_rollouts"):
        from leafkernels.command import tensors

        return getattr(tensors, name)
    raise AttributeError(f"module 'leafkernels' has no attribute {name!r}")
