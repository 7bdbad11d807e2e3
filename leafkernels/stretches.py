"""Where a row lies: the stretch of a rollout from its first to its last unmasked token."""

from torch import Tensor

from leafkernels._backend import implementation
from leafkernels._ops import register


def _impl(mask: Tensor, slot_starts: Tensor, slot_ends: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return implementation(backend).mask_stretches(mask, slot_starts, slot_ends)


mask_stretches = register(
    "mask_stretches(Tensor mask, Tensor slot_starts, Tensor slot_ends, str backend) -> (Tensor, Tensor)",
    _impl,
    lambda mask, slot_starts, slot_ends, backend: tuple(slot_starts.new_empty(slot_starts.shape) for _ in range(2)),
)
