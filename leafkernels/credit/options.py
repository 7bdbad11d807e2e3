"""The options of LEAF credit: one bundle, checked once and carried whole."""

from typing import NamedTuple, TypedDict

from leafkernels._core.checks import check_choice, check_count, check_finite

TERMS = ("both", "global", "local")
# What an operation takes as an int.
_MOST = 2**63 - 1
NORMALIZE = ("span", "batch", "reward_std", "none")

# Options that belong together, by name: ``--preset`` of the command and ``preset=`` of ``LeafGRPOConfig``.
PRESETS: dict[str, dict[str, int | float | str]] = {
    # K, B and the terms as in the settings of the reported runs that the LEAF authors released with their code
    # (rollout_budget_K, fork_budget_B, advantage_terms); the power is the paper's 1 / sqrt(n).
    "leaf-paper": {"num_generations": 8, "num_boundaries": 2, "terms": "both", "multiplicity_power": 0.5},
}


class CreditOptions(NamedTuple):
    """Options of ``span_advantages``, which documents them, with their defaults."""

    num_boundaries: int = 2
    min_separation: int | None = None
    terms: str = "both"
    multiplicity_power: float = 0.5
    leave_one_out: bool = False
    normalize: str = "span"

    def checked(self) -> "CreditOptions":
        """The same options; raises unless each is what it must be."""
        check_count("num_boundaries", self.num_boundaries, 0, _MOST)
        if self.min_separation is not None:
            check_count("min_separation", self.min_separation, 1, _MOST)
        check_choice("terms", self.terms, TERMS)
        check_choice("normalize", self.normalize, NORMALIZE)
        check_finite("multiplicity_power", self.multiplicity_power)
        if not isinstance(self.leave_one_out, bool):
            raise TypeError(f"leave_one_out must be a bool, got {type(self.leave_one_out).__name__}")
        return self._replace(multiplicity_power=float(self.multiplicity_power))


class CreditFields(TypedDict, total=False):
    """The fields of ``CreditOptions`` as keyword arguments."""

    num_boundaries: int
    min_separation: int | None
    terms: str
    multiplicity_power: float
    leave_one_out: bool
    normalize: str
