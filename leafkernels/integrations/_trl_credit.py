"""The options of the credit in the configs of TRL's trainers: ``CreditConfig``."""

from dataclasses import dataclass, field
from typing import Any

from leafkernels import ESTIMATORS
from leafkernels.credit.options import CreditOptions

# None unless set, and then refused with an estimator that does not read them.
_OPTIONAL = ("quantile", "k")
_KNOWN = [name for name, scheme in ESTIMATORS.items() if not scheme.reads_squares]


@dataclass
class CreditConfig:
    """The estimator, and the options of ``leafkernels.span_advantages`` and ``tree_td`` under the same names."""

    estimator: str = field(
        default="leaf",
        metadata={"help": f"The credit: {', '.join(map(repr, _KNOWN))}. Each takes those of the options it knows."},
    )
    num_boundaries: int = field(
        default=2, metadata={"help": "Positions of a prompt where the tree of its completions may fork, at most."}
    )
    min_separation: int | None = field(
        default=None,
        metadata={"help": "Least distance of two boundaries. None: max(2, shortest completion // (boundaries + 1))."},
    )
    terms: str = field(
        default="both",
        metadata={"help": "'both', 'global' (against the group) or 'local' (against the parent node)."},
    )
    multiplicity_power: float = field(
        default=0.5, metadata={"help": "Spans shared by n completions are scaled by n ** -multiplicity_power."}
    )
    leave_one_out: bool = field(default=False, metadata={"help": "The unbiased variant."})
    normalize: str | None = field(
        default=None,
        metadata={
            "help": "'span', 'batch', 'reward_std' or 'none'. None follows scale_rewards: 'span' for 'group', as where "
            "there is no such option, 'batch' for 'batch', 'none' for 'none'; 'batch' with "
            "multi_objective_aggregation='normalize_then_sum'. tree_td has 'reward_std', also for 'group', and 'none'."
        },
    )
    shrinkage: float = field(
        default=0.0, metadata={"help": "tree_td: how many rollouts' worth the parent's value counts at a node."}
    )
    group_weight: float = field(default=0.5, metadata={"help": "tree_td: weight of the reward less the group's mean."})
    quantile: float | None = field(
        default=None, metadata={"help": "qae: the share of a prompt's rewards that its baseline reaches. None: 0.4."}
    )
    k: int | None = field(
        default=None, metadata={"help": "pass_at_k: completions of which the best one counts. None: 2."}
    )


def check_estimator(name: Any) -> None:
    """Raise ValueError unless a trainer can give the estimator of that name all it reads."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(map(repr, ESTIMATORS))}, got {name!r}")
    if ESTIMATORS[name].reads_squares:
        raise ValueError(
            "estimator must be one that needs no sum_squares of the distributions that tokens were drawn from, which "
            f"TRL's forward pass does not give, got {name!r}"
        )


def options_of(args: Any) -> dict[str, Any]:
    """Those of a config that its estimator takes; raises ValueError where one is set that it does not read."""
    taken = ESTIMATORS[args.estimator].options
    for name in _OPTIONAL:
        if getattr(args, name) is not None and name not in taken:
            raise ValueError(
                f"{name} must be None with estimator={args.estimator!r}, which does not read it, "
                f"got {getattr(args, name)!r}"
            )
    names = ("shrinkage", "group_weight", *_OPTIONAL, *CreditOptions._fields)
    found = {name: getattr(args, name) for name in names if name in taken}
    return {name: value for name, value in found.items() if name not in _OPTIONAL or value is not None}
