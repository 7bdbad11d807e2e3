"""The credit schemes by name: one entry holds all that differs from scheme to scheme."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from leafkernels.credit.advantages import span_advantages
from leafkernels.credit.baselines import maxrl, opo, pass_at_k, qae
from leafkernels.credit.differences import tempo, tree_td, treerl
from leafkernels.credit.estimators import dr_grpo, grpo, rloo
from leafkernels.credit.key_tokens import ktae
from leafkernels.credit.token_baseline import otb


@dataclass(frozen=True)
class Estimator:
    """A credit scheme, called as its function is."""

    function: Callable[..., Tensor]
    """Takes the arguments of ``grpo``, and options of its own by keyword; one advantage for each token."""
    title: str = ""
    formula: str = ""
    """Of a token's advantage, as docs/credit.md writes it: r is a row's reward, mean and std those of its prompt, V the
    mean reward of the n rows that share a prefix."""
    source: str = ""
    per: str = "token"
    """Unit of credit: "row", "span" or "token"."""
    reads_logprobs: bool = True
    """Whether the values of ``logprobs`` matter, not their shape alone: a trainer may have to compute them."""
    reads_squares: bool = False
    """Whether it takes ``sum_squares``, without which it is only near what the paper has; trainers that do not compute
    them refuse it."""
    normalization: str = "none"
    """"reward_std" or "none", with which the credit is linear in the rewards; "option": the function's ``normalize``,
    whose default is in its signature."""
    is_shift_invariant: bool = True
    """Whether adding one number to all rewards of a prompt changes nothing."""
    is_odd: bool = True
    """Whether turning the sign of all rewards turns that of the credit."""
    is_scaled_grpo: bool = False
    """Whether the credit is GRPO's times a number for each prompt, which no cosine of a prompt's gradient sees."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)

    @property
    def __name__(self) -> str:
        return self.function.__name__

    @property
    def __wrapped__(self) -> Callable[..., Tensor]:
        """What ``inspect.signature`` reads."""
        return self.function

    @property
    def normalized(self) -> str:
        """What ``normalize`` is where a trainer's own switch asks for normalised credit."""
        default = inspect.signature(self.function).parameters["normalize"].default
        return "reward_std" if default == "none" else str(default)

    @property
    def options(self) -> tuple[str, ...]:
        """The keyword arguments that ``grpo`` does not have."""
        return tuple(name for name in inspect.signature(self.function).parameters if name not in _COMMON)


_COMMON = frozenset(inspect.signature(grpo).parameters)


class _Estimators(dict[str, Estimator]):
    """A plain function becomes an entry when it is put in."""

    def __setitem__(self, name: str, scheme: Estimator | Callable[..., Tensor]) -> None:
        super().__setitem__(name, scheme if isinstance(scheme, Estimator) else Estimator(scheme, title=name))


ESTIMATORS: dict[str, Estimator] = _Estimators(
    leaf=Estimator(
        span_advantages,
        "LEAF",
        "[(V_k - mean) + (V_k - V_(k-1))] / sqrt(n_k), z-scored over the spans of a prompt",
        "arXiv 2606.07610",
        per="span",
        normalization="option",
    ),
    grpo=Estimator(
        grpo,
        "GRPO",
        "(r - mean) / (std + 1e-6)",
        "arXiv 2402.03300",
        per="row",
        reads_logprobs=False,
        normalization="reward_std",
    ),
    dr_grpo=Estimator(
        dr_grpo, "Dr. GRPO", "r - mean", "arXiv 2503.20783", per="row", reads_logprobs=False, is_scaled_grpo=True
    ),
    rloo=Estimator(
        rloo,
        "RLOO",
        "G / (G - 1) * (r - mean)",
        "arXiv 2402.14740",
        per="row",
        reads_logprobs=False,
        is_scaled_grpo=True,
    ),
    opo=Estimator(opo, "OPO", "r - sum(l r) / sum(l)", "arXiv 2505.23585", per="row", reads_logprobs=False),
    otb=Estimator(
        otb,
        "OTB",
        "r - sum(W r) / sum(W), W the sum up to the token of 1 - 2 p + sum p^2",
        "arXiv 2602.07078",
        reads_squares=True,
    ),
    qae=Estimator(
        qae,
        "QAE",
        "(r - quantile) / (std + 1e-6)",
        "arXiv 2509.22611",
        per="row",
        reads_logprobs=False,
        normalization="reward_std",
        is_odd=False,
    ),
    maxrl=Estimator(
        maxrl,
        "MaxRL",
        "(r - mean) / abs(mean)",
        "arXiv 2602.02710",
        per="row",
        reads_logprobs=False,
        normalization="reward_std",
        is_shift_invariant=False,
        is_scaled_grpo=True,
    ),
    pass_at_k=Estimator(
        pass_at_k,
        "pass@k",
        "(best of k with the row - best of k) / (std of it + 1e-6)",
        "arXiv 2508.10751",
        per="row",
        reads_logprobs=False,
        normalization="reward_std",
        is_odd=False,
    ),
    ktae=Estimator(
        ktae,
        "KTAE",
        "(r - mean) / (std + 1e-6) + tanh((F + IG) D / 4)",
        "arXiv 2505.16826",
        reads_logprobs=False,
        normalization="reward_std",
        is_shift_invariant=False,
        is_odd=False,
    ),
    tempo=Estimator(
        tempo,
        "TEMPO",
        "(r - mean + V(after it) - V(before it)) / (std + 1e-6)",
        "arXiv 2509.18314",
        reads_logprobs=False,
        normalization="reward_std",
    ),
    tree_td=Estimator(
        tree_td,
        "TD on the tree",
        "V(after it) - V(before it) + 0.5 (r - mean)",
        reads_logprobs=False,
        normalization="option",
    ),
    treerl=Estimator(
        treerl,
        "TreeRL",
        "2 V_k / sqrt(n_k) - V_(k-1) / sqrt(n_(k-1))",
        "arXiv 2506.11902",
        per="span",
    ),
)
"""Every credit scheme by its name; all take the arguments of ``grpo``. Put in your own to see it everywhere."""
