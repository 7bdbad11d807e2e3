"""LEAF span advantages for GRPO loops: one advantage per span of a rollout, from the prefixes that rollouts share."""

from typing import TYPE_CHECKING, Any

from leafkernels.advantages import SpanTree, span_advantages, span_tree
from leafkernels.boundaries import select_boundaries
from leafkernels.estimators import dr_grpo, grpo, rloo, tempo, treerl
from leafkernels.groups import group_index
from leafkernels.linear_surprisal import linear_surprisal_entropy
from leafkernels.loss import PolicyLoss, policy_loss
from leafkernels.loss_from_logits import policy_loss_from_logits
from leafkernels.prefix_lengths import common_prefix_lengths
from leafkernels.presets import PRESETS
from leafkernels.scatter import scatter_spans
from leafkernels.surprisal import SurprisalEntropy, surprisal_entropy
from leafkernels.values import SpanValues, span_values

if TYPE_CHECKING:
    from leafkernels.command.notebook import report

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "PolicyLoss",
    "SpanTree",
    "SpanValues",
    "SurprisalEntropy",
    "common_prefix_lengths",
    "dr_grpo",
    "group_index",
    "grpo",
    "linear_surprisal_entropy",
    "policy_loss",
    "policy_loss_from_logits",
    "report",
    "rloo",
    "scatter_spans",
    "select_boundaries",
    "span_advantages",
    "span_tree",
    "span_values",
    "surprisal_entropy",
    "tempo",
    "treerl",
]


def __getattr__(name: str) -> Any:
    # What draws pages is loaded when it is asked for: a training loop needs neither rich nor jinja2.
    if name == "report":
        from leafkernels.command.notebook import report

        return report
    raise AttributeError(f"module 'leafkernels' has no attribute {name!r}")
