"""From a transformers model to numbers for each token, at the cost of what the rows do not share."""

from leafkernels.models.segments import TreeSegments, tree_segments
from leafkernels.models.tree_logprobs import TreeLogprobs, TreeStats, tree_logprobs, tree_stats

__all__ = ["TreeLogprobs", "TreeSegments", "TreeStats", "tree_logprobs", "tree_segments", "tree_stats"]
