"""From a transformers model to numbers for each token, at the cost of what the rows do not share."""

from leafkernels.models.tree_logprobs import TreeLogprobs, TreeStats, tree_logprobs, tree_stats

__all__ = ["TreeLogprobs", "TreeStats", "tree_logprobs", "tree_stats"]
