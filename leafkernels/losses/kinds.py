"""The table of losses: which formula and which options a kind has; and the options of a call, checked."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from leafkernels._core.checks import check_choice, check_finite, check_positive

IMPORTANCE = ("token", "sequence")
KL_KINDS = ("k3", "k1", "k2", "abs", "k3+")


class Kind(NamedTuple):
    """A loss: the defaults of its options, and what computes it."""

    options: dict[str, Any]
    """Names and defaults. The numbers of the first ones are those of the formula, four at most."""
    formula: str = ""
    """That of each backend; its own name if empty."""
    row_statistic: str = ""
    """Of which numbers of its row a token's loss is: "mean" or "product" of ratios, or those of "sides"; or none."""
    reads: str = "token"
    """How far a token's loss looks: to the "token" alone, its "row", or the "batch"."""
    sequences: bool = False
    """Whether importance="sequence" is defined for it."""

    @property
    def bounds_ratio(self) -> bool:
        """Whether ``max_log_ratio`` is an option."""
        return "max_log_ratio" in self.options


_PPO = {"clip": (0.2, 0.2), "dual_clip": None}
_BOUND = {"max_log_ratio": None}

KINDS = {
    "clip": Kind(_PPO | _BOUND, sequences=True),
    "cispo": Kind({"clip": (1.0, 4.0)} | _BOUND, sequences=True),
    "sapo": Kind({"tau": (1.0, 1.05)} | _BOUND, sequences=True),
    "vespo": Kind({"shape": (2.0, 3.0), "shape_negative": (3.0, 2.0)}, row_statistic="product", reads="row"),
    "gmpo": Kind({"clip": (0.4, 0.4)}, row_statistic="sides", reads="row"),
    "dppo_tv": Kind({"clip": (0.15, 0.15), "max_ratio": 20.0} | _BOUND),
    "dppo_kl": Kind({"clip": (0.05, 0.05), "max_ratio": 20.0} | _BOUND),
    "dro": Kind({"beta": 1.0}),
    "reinforce": Kind({}),
    "clip_cov": Kind(_PPO | _BOUND | {"share": 2e-4, "covariance": (1.0, 5.0)}, formula="clip", reads="batch"),
    "kl_cov": Kind({"share": 2e-4, "penalty": 1.0}, formula="clip", reads="batch"),
    "fipo": Kind(_PPO | _BOUND | {"half_life": 32.0, "future_clip": (0.0, 0.2)}, formula="clip", reads="row"),
}
"""By name; docs/losses.md has their formulas and sources."""

_UNCLIPPED = (1.0, math.inf, math.inf, 0.0)


class LossOptions(NamedTuple):
    """Options of a policy loss as the backends take them; ``policy_loss`` documents them."""

    numbers: Sequence[float]  # four, of the formula
    max_log_ratio: float = math.inf  # no such bound
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    formula: str = "clip"
    row_statistic: str = ""
    kl_kind: str = "k3"
    kl_weighted: bool = False


class Loss(NamedTuple):
    """A loss with its options."""

    kind: Kind
    options: LossOptions
    words: dict[str, Any]
    """The same as ``python_ref`` takes them, beside aggregate and counts."""


def check_loss(
    kind: str,
    given: dict[str, Any],
    importance: str,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_kind: str,
    kl_weighted: bool,
    entropy_coef: float,
) -> Loss:
    """The loss that a call asks for; ``given`` are the options of its kind, None where the default is to be taken.

    Raises:
        TypeError, ValueError: an option is not what it must be, or the kind does not read it.
    """
    check_choice("kind", kind, tuple(KINDS))
    entry = KINDS[kind]
    check_choice("importance", importance, IMPORTANCE)
    if importance == "sequence" and not entry.sequences:
        having = ", ".join(repr(name) for name, other in KINDS.items() if other.sequences)
        raise ValueError(f"importance must be 'token' with kind={kind!r}, got 'sequence', which {having} have")
    values = dict(entry.options)
    for name, value in given.items():
        if value is None:
            continue
        if name not in values:
            names = ", ".join(values) or "no option"
            if not any(name in other.options for other in KINDS.values()):
                raise TypeError(f"{name} is no option of a policy loss; kind={kind!r} reads {names}")
            raise ValueError(f"{name} must be left out with kind={kind!r}, which reads {names}, got {name}={value!r}")
        _check_option(kind, name, value)
        values[name] = value
    check_choice("kl_kind", kl_kind, KL_KINDS)
    if not isinstance(kl_weighted, bool):
        raise TypeError(f"kl_weighted must be a bool, got {type(kl_weighted).__name__}")
    check_finite("kl_coef", kl_coef)
    check_finite("entropy_coef", entropy_coef)
    if kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs must be given where kl_coef is not 0, got kl_coef={kl_coef}")
    bound = values.get("max_log_ratio")
    options = LossOptions(
        _numbers(kind, values),
        math.inf if bound is None else float(bound),
        float(kl_coef),
        float(entropy_coef),
        entry.formula or kind,
        "mean" if importance == "sequence" else entry.row_statistic,
        kl_kind,
        kl_weighted,
    )
    words = {"kind": kind, "importance": importance, "kl_coef": kl_coef, "kl_kind": kl_kind, "kl_weighted": kl_weighted}
    return Loss(entry, options, {**words, **values, "entropy_coef": entropy_coef})


def _numbers(kind: str, values: dict[str, Any]) -> tuple[float, ...]:
    if kind == "kl_cov":
        return _UNCLIPPED
    flat: list[float] = []
    for name, value in values.items():
        if name != "max_log_ratio":
            flat += value if isinstance(value, (tuple, list)) else (math.inf if value is None else value,)
    first, second, third, fourth = (float(number) for number in (*flat, 0.0, 0.0, 0.0, 0.0)[:4])
    return first, second, third, fourth


def _check_option(kind: str, name: str, value: Any) -> None:
    if name == "clip":
        # A ratio falls to 0 at the least; log-ratios and divergences have no such end.
        _check_pair(name, value, "(below, above)")
        low, high = value
        for number in value:
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(f"clip must hold numbers (math.inf: no bound), got {value!r}")
        most = 1 if KINDS[kind].formula == "clip" or kind in ("clip", "cispo") else math.inf
        if not (0 <= low <= most and high >= 0):
            least = "0 <= below <= 1" if most == 1 else "below >= 0"
            raise ValueError(f"clip must be (below, above) with {least} and above >= 0, got {value!r}")
    elif name == "dual_clip":
        check_finite(name, value)
        if value <= 1:
            raise ValueError(f"dual_clip must be greater than 1, got {value}")
    elif name in _PAIRS:
        what, check = _PAIRS[name]
        _check_pair(name, value, what)
        for number in value:
            check(name, number)
        if name == "covariance" and value[0] >= value[1]:
            raise ValueError(f"covariance must be (low, high) with low < high, got {value!r}")
    elif name == "penalty":
        check_finite(name, value)
    else:
        check_positive(name, value)
        if name == "share" and value > 1:
            raise ValueError(f"share must be at most 1, got {value}")


def _check_pair(name: str, value: Any, what: str) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a pair {what}, got {value!r}")


def _check_at_least_0(name: str, value: Any) -> None:
    check_finite(name, value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


_PAIRS: dict[str, tuple[str, Callable[[str, Any], None]]] = {
    "tau": ("(where the advantage is positive, elsewhere)", check_positive),
    "shape": ("(k, lambda)", check_positive),
    "shape_negative": ("(k, lambda)", check_positive),
    "covariance": ("(low, high)", check_finite),
    "future_clip": ("(below, above)", _check_at_least_0),
}
