"""Decoding that looks ahead with a reward for each token (SLA, arXiv 2503.00029). Models need transformers."""

from typing import Any

from leafkernels.lookahead.reward_channel import RewardChannel
from leafkernels.lookahead.search import Candidate, Commit, Search, Stepper, search, search_all
from leafkernels.lookahead.stepper import TransformersStepper
from leafkernels.lookahead.transformers import RewardTransformer
from leafkernels.losses.preference import token_reward_loss
from leafkernels.losses.preference_metrics import token_reward_metrics

__all__ = [
    "Candidate",
    "Commit",
    "RewardChannel",
    "RewardTransformer",
    "Search",
    "Stepper",
    "TokenRewardConfig",
    "TokenRewardTrainer",
    "TransformersStepper",
    "search",
    "search_all",
    "token_reward_loss",
    "token_reward_metrics",
]


def __getattr__(name: str) -> Any:
    # Searching with a stepper of one's own needs no transformers.
    if name in ("TokenRewardConfig", "TokenRewardTrainer"):
        from leafkernels.lookahead import training

        return getattr(training, name)
    raise AttributeError(f"module 'leafkernels.lookahead' has no attribute {name!r}")
