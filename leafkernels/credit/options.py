"""The options of LEAF credit: one bundle, checked once and carried whole."""

from typing import NamedTuple, TypedDict

from leafkernels._core.checks import check_choice, check_count

TERMS = ("both", "global", "local")
NORMALIZE = ("span", "batch", "reward_std", "none")


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
        check_boundary_options(self.num_boundaries, self.min_separation)
        check_choice("terms", self.terms, TERMS)
        check_choice("normalize", self.normalize, NORMALIZE)
        power = self.multiplicity_power
        if isinstance(power, bool) or not isinstance(power, (int, float)):
            raise TypeError(f"multiplicity_power must be a number, got {type(power).__name__}")
        if not isinstance(self.leave_one_out, bool):
            raise TypeError(f"leave_one_out must be a bool, got {type(self.leave_one_out).__name__}")
        return self._replace(multiplicity_power=float(power))


class CreditFields(TypedDict, total=False):
    """The fields of ``CreditOptions`` as keyword arguments."""

    num_boundaries: int
    min_separation: int | None
    terms: str
    multiplicity_power: float
    leave_one_out: bool
    normalize: str


def check_boundary_options(num_boundaries: int, min_separation: int | None) -> None:
    """Raise unless both are counts that make sense."""
    check_count("num_boundaries", num_boundaries, 0)
    if min_separation is not None:
        check_count("min_separation", min_separation, 1)
