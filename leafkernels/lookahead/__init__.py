"""Decoding that looks ahead with a reward for each token (SLA, arXiv 2503.00029). Needs transformers."""

from leafkernels.lookahead.stepper import TransformersStepper

__all__ = ["TransformersStepper"]
