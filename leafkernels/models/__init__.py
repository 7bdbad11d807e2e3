"""From a transformers model to numbers for each token, at the cost of what the rows do not share."""

from leafkernels.models.batch import TreeBatch, tree_batch
from leafkernels.models.segments import TreeSegments, tree_segments
from leafkernels.models.tree_logprobs import TreeLogprobs, TreeStats, tree_hidden_states, tree_logprobs, tree_stats

__all__ = [
    "TreeBatch",
    "TreeLogprobs",
    "TreeSegments",
    "TreeStats",
    "tree_batch",
    "tree_hidden_states",
    "tree_logprobs",
    "tree_segments",
    "tree_stats",
]
