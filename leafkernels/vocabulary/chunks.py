"""A head over the vocabulary, a chunk of rows at a time: their logits in one buffer, and the products of gradients."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leafkernels._core.checks import check_device, check_positive, check_real
from leafkernels._core.precision import compute_dtype

# What a chunk's logits may take. Chunks must be long: after each, the float32 gradient of the weight is read and
# written once, which at 1,000 tokens moves as many bytes as one of the four matrix products takes time for.
CHUNK_BYTES = 960 << 20

# Elements of a chunk's gradient that are widened to float32 at a time, where no matrix product does so itself.
_WIDENED = 1 << 22


class HeadOptions(NamedTuple):
    """How the head's logits are made, and how many rows at a time."""

    softcap: float | None
    num_live: int | None
    chunk: int
    dtype: torch.dtype


class HeadTensors(NamedTuple):
    """What makes a model's logits."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D), or more rows, of which only the ids in common count
    bias: Tensor | None  # (V,)


class ChunkedHead:
    """The chunks of live rows, and the logits of each in one buffer."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        options: HeadOptions,
        wide: bool = False,
    ) -> None:
        """``wide``: logits in float32, whatever the products are made of."""
        self.hidden, self.mask = hidden, mask
        self.softcap, num_live, self.chunk, self.dtype = options
        self.num_rows = hidden.shape[0]
        if num_live is None:
            num_live = self.num_rows if mask is None else int(mask.sum())  # reads one number back from a device
        self.num_live = min(num_live, self.num_rows)
        # Of another dtype for the products, and as large: not for none.
        self.weight = weight.to(self.dtype) if self.num_live else weight
        self.bias = None if bias is None else bias.to(self.dtype)
        dtype = compute_dtype(self.dtype) if wide else self.dtype
        self.buffer = hidden.new_empty((min(self.chunk, self.num_live), weight.shape[0]), dtype=dtype)

    def chunks(self) -> Iterator[slice | Tensor]:
        """Live rows in order; indices of ``num_rows`` stand for none, where fewer are live than was said."""
        if self.mask is None:
            yield from (slice(i, min(i + self.chunk, self.num_rows)) for i in range(0, self.num_rows, self.chunk))
        elif self.num_live:
            # Each live row goes to its rank; all others, and those that were not expected, after the last.
            ranks = (self.mask.cumsum(0) - 1).clamp_max_(self.num_live).masked_fill_(~self.mask, self.num_live)
            rows = torch.full((self.num_live + 1,), self.num_rows, device=self.mask.device)
            rows[ranks] = torch.arange(self.num_rows, device=self.mask.device)
            yield from rows[:-1].split(self.chunk)

    def states(self, rows: slice | Tensor) -> Tensor:
        """Hidden states of a chunk, 0 where there is no row."""
        if isinstance(rows, slice):
            return self.hidden[rows].to(self.dtype)
        taken = self.hidden[rows.clamp_max(self.num_rows - 1)].to(self.dtype)
        return taken.masked_fill_((rows == self.num_rows)[:, None], 0.0)

    def logits(self, states: Tensor) -> Tensor:
        """In the buffer, until the next chunk."""
        logits = self.buffer[: states.shape[0]]
        if logits.dtype != self.dtype:
            write_product(logits, states, self.weight)
            if self.bias is not None:
                logits.add_(self.bias)
        elif self.bias is None:
            torch.mm(states, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, states, self.weight.T, out=logits)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def new_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], dtype: torch.dtype
) -> list[Tensor]:
    """Of the hidden states, with one row more, and in ``dtype`` of weight and bias; empty where not needed."""
    shapes = (hidden.shape[0] + 1, hidden.shape[1]), weight.shape, weight.shape[:1]
    dtypes = hidden.dtype, dtype, dtype
    return [
        hidden.new_zeros(shape if needed else (0,), dtype=dtype)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    ]


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with sums and ``total`` in float32 whatever ``a`` and ``b`` are."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # PyTorch 2.8 and later
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        wide = b.to(total.dtype)
        step = max(1, _WIDENED // max(a.shape[1], 1))
        for part, columns in zip(total.split(step), a.split(step), strict=True):
            part.addmm_(columns.to(total.dtype), wide)


def write_product(product: Tensor, a: Tensor, b: Tensor) -> None:
    """product = a @ b.T, with sums and ``product`` in float32 whatever ``a`` and ``b`` are."""
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):  # PyTorch 2.8 and later
        torch.ops.aten.mm.dtype_out(a, b.T, product.dtype, out=product)
    else:
        wide = a.to(product.dtype)
        step = max(1, _WIDENED // max(b.shape[1], 1))
        for start in range(0, b.shape[0], step):
            torch.mm(wide, b[start : start + step].to(product.dtype).T, out=product[:, start : start + step])


class HeadGradients:
    """Of a head's hidden states, weight and bias, from the gradients of its chunks' logits."""

    def __init__(self, head: ChunkedHead, tensors: HeadTensors, needs: list[bool]) -> None:
        self.head, self.tensors, self.needs = head, tensors, needs
        self.widest = compute_dtype(head.dtype)
        self.hidden, self.weight, self.bias = new_gradients(*tensors, needs, self.widest)
        is_wide = head.buffer.dtype != head.dtype
        self.buffer = torch.empty_like(head.buffer, dtype=head.dtype) if is_wide else head.buffer

    def add(self, rows: slice | Tensor, states: Tensor) -> None:
        """The gradient of the chunk's logits stands in the buffer."""
        gradients = self.buffer[: states.shape[0]]
        num_ids = gradients.shape[1]
        if self.needs[0]:
            self.hidden[rows] = (gradients @ self.head.weight).to(self.hidden.dtype)
        if self.needs[1]:
            add_product(self.weight[:num_ids], gradients.T, states)
        if self.needs[2]:
            self.bias[:num_ids] += gradients.sum(0, dtype=self.widest)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each empty where it is not needed."""
        _, weight, bias = self.tensors
        grad_hidden = self.hidden[:-1] if self.needs[0] else self.hidden
        return grad_hidden, self.weight.to(weight.dtype), self.bias if bias is None else self.bias.to(bias.dtype)


def no_gradients(tensors: HeadTensors, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = tensors
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if needs[2] else (0,)),
    )


def dtype_of_products(tensor: Tensor) -> torch.dtype:
    """Its own, or autocast's, which leaves float64 alone."""
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return tensor.dtype
    return torch.get_autocast_dtype(tensor.device.type)


def check_head(
    hidden: Any, weight: Any, bias: Any, prefix: str = "", weight_name: str = "lm_head_weight"
) -> torch.dtype:
    """The dtype of a head's products; raise unless the three fit. ``prefix`` names the model in their names."""
    name = f"{prefix}hidden"
    check_real(name, hidden)
    if hidden.dim() == 0:
        raise ValueError(f"{name} must have shape (..., width), got a scalar")
    dtype = dtype_of_products(hidden)
    for other_name, parameter in {weight_name: weight, **({} if bias is None else {f"{prefix}bias": bias})}.items():
        check_real(other_name, parameter)
        check_device(other_name, parameter, name, hidden.device)
        if dtype_of_products(parameter) != dtype:
            raise TypeError(f"{other_name} must have the dtype of {name}, {hidden.dtype}, got {parameter.dtype}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} must have shape (vocabulary, {hidden.shape[-1]}), got shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias must have one entry for each id, shape {tuple(weight.shape[:1])}, "
            f"got shape {tuple(bias.shape)}"
        )
    return dtype


def scaled_softcap(scale: float, softcap: float | None, prefix: str = "") -> float | None:
    """The softcap of logits whose ``scale`` the temperature takes: c tanh(s x / c) / T = c/s tanh(x / (c/s)) / (T/s).

    Raise unless both are positive.
    """
    check_positive(f"{prefix}logit_scale", scale)
    if softcap is None:
        return None
    check_positive(f"{prefix}logit_softcap", softcap)
    check_positive(f"{prefix}logit_softcap / {prefix}logit_scale", softcap / scale)
    return float(softcap / scale)
