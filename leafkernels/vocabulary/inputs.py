"""What the functions of a vocabulary have in common: numbers of a row, and checks."""

from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import pad

from leafkernels._core.checks import FLOAT32, check_device, check_positive, check_real, values_readable
from leafkernels._core.precision import compute_dtype

if TYPE_CHECKING:
    import torch.distributed as dist

    from leafkernels.vocabulary.sampling_mask import SamplingMask


class VocabularyOptions(TypedDict, total=False):
    """What ``surprisal_entropy`` and its hidden-state form both take by keyword."""

    temperature: float | Tensor
    response_mask: Tensor | None
    sampling_mask: "SamplingMask | None"
    vocab_group: "dist.ProcessGroup | None"
    backend: str


class SampledTokens(NamedTuple):
    """What a row of logits is looked at for."""

    token_ids: Tensor  # (N,)
    temperature: Tensor  # (N,)
    mask: Tensor | None  # (N,) bool; None: every row counts

    def with_one_more(self) -> "SampledTokens":
        """With a last row that stands for none, for chunks whose rows may be fewer than was said."""
        return self._replace(
            token_ids=pad(self.token_ids, (0, 1)), temperature=pad(self.temperature, (0, 1), value=1.0)
        )

    def chunk(self, rows: slice | Tensor) -> "SampledTokens":
        """Those of some rows, all of which count."""
        return SampledTokens(self.token_ids[rows], self.temperature[rows], None)

    def live(self) -> list[int]:
        """The rows that count."""
        return list(range(len(self.token_ids))) if self.mask is None else self.mask.nonzero().flatten().tolist()


class RowStatistics(NamedTuple):
    """What the gradient of a row of logits needs beside the logits, (N,) each; 0 in masked rows."""

    surprisal: Tensor
    entropy: Tensor
    top: Tensor  # the largest logit
    log_total: Tensor  # log sum e^((x - top) / temperature)


def for_live_rows(found: Any, rows: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Surprisals and entropies that ``python_ref`` found for some rows, as tensors of all rows of ``like``; else 0."""
    results = like.new_zeros((2, like.shape[0]), dtype=compute_dtype(like.dtype))
    results[:, rows] = torch.tensor(found, dtype=results.dtype, device=like.device)
    return results[0].clone(), results[1].clone()


def check_temperature(
    temperature: float | Tensor, token_ids: Tensor, mask: Tensor | None, logit_scale: float = 1.0
) -> Tensor:
    """One temperature for each row, on the device of the tokens; those of masked rows may be anything.

    Logits that are scaled before the temperature divides them are logits at the quotient of the two, which it gives.
    """
    name = "temperature" if logit_scale == 1 else "temperature / logit_scale"
    if isinstance(temperature, Tensor):
        check_real("temperature", temperature)
        if temperature.shape != token_ids.shape:
            raise ValueError(
                f"temperature must be a number or have one entry for each row, shape {tuple(token_ids.shape)}, "
                f"got shape {tuple(temperature.shape)}"
            )
        check_device("temperature", temperature, "token_ids", token_ids.device)
        temperature = temperature.detach()
        if logit_scale != 1:
            temperature = temperature.double() / logit_scale
        if values_readable(temperature):
            live_values = temperature if mask is None else temperature[mask]
            is_bad = ~((live_values >= FLOAT32.tiny) & (live_values <= FLOAT32.max))
            if bool(is_bad.any()):
                found = float(live_values[is_bad][0])
                where = " in float32" if 0 < found < torch.inf else ""
                raise ValueError(f"{name} must be positive and finite{where}, got {found}")
        return temperature
    check_positive("temperature", temperature)
    check_positive(name, temperature / logit_scale)
    return torch.full(token_ids.shape, temperature / logit_scale, dtype=torch.float64, device=token_ids.device)


def check_own_memory(name: str, tensor: Tensor) -> None:
    """Raise unless a gradient may be written over ``tensor``, which requires one: see ``inplace_backward``."""
    for kind, leaf in (("a leaf", tensor), ("a view of a leaf", tensor._base)):
        if leaf is not None and leaf.is_leaf:
            raise ValueError(f"{name} must be the result of a computation with inplace_backward=True, got {kind}")
    # From the finest stride up, each must step over all that the ones before reach.
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach and tensor.numel():
            raise ValueError(
                f"{name} must have memory of its own for each entry with inplace_backward=True, got shape "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        reach += (size - 1) * stride
