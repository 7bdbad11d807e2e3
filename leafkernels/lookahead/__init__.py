"""Decoding that looks ahead with a reward for each token (SLA, arXiv 2503.00029). Models need transformers."""

from leafkernels.lookahead.search import Candidate, Commit, Search, Stepper, search
from leafkernels.lookahead.stepper import TransformersStepper

__all__ = ["Candidate", "Commit", "Search", "Stepper", "TransformersStepper", "search"]
