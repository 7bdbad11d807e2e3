"""Divergence of two distributions over the vocabulary from rows of both models' logits: the operation."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from leafkernels._core.backend import implementation
from leafkernels._core.derivatives import refuse_second_derivative
from leafkernels._core.operation import operation
from leafkernels._core.precision import compute_dtype
from leafkernels.vocabulary.slices import merge_slices


class DivergenceKind(NamedTuple):
    """Which divergence; ``beta`` is the teacher's share of the mixture."""

    name: str
    beta: float


class Pair(NamedTuple):
    """What a row of both models' logits is looked at with."""

    student_temperature: Tensor  # (N,)
    teacher_temperature: Tensor  # (N,)
    mask: Tensor | None  # (N,) bool; None: every row counts

    def chunk(self, rows: slice | Tensor) -> "Pair":
        """Those of some rows."""
        mask = None if self.mask is None else self.mask[rows]
        return Pair(self.student_temperature[rows], self.teacher_temperature[rows], mask)


class PairTops(NamedTuple):
    """The largest logit of each row, and log sum e^((x - top) / temperature); (N,) each."""

    student_top: Tensor
    student_log_total: Tensor
    teacher_top: Tensor
    teacher_log_total: Tensor


class PairStatistics(NamedTuple):
    """Results of a row, and what its gradient needs beside the logits; (N,) each, 0 and False in masked rows."""

    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agrees: Tensor  # bool
    student_part: Tensor  # KL(student || mixture), of which the gradient is made; reverse KL is that itself
    student_top: Tensor
    student_log_total: Tensor
    teacher_top: Tensor
    teacher_log_total: Tensor

    @property
    def tops(self) -> PairTops:
        """What both distributions are made with."""
        return PairTops._make(self[5:])


def pair_statistics(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    pair: Pair,
    kind: DivergenceKind,
    vocab_group: "dist.ProcessGroup | None" = None,
) -> PairStatistics:
    """Of rows of which both models' logits may be a slice."""
    folds = implementation(backend, "surprisal")
    # What is wanted of a row here is no id's.
    no_ids = torch.zeros(student.shape[0], dtype=torch.int64, device=student.device)
    found = []
    for logits, temperature in ((student, pair.student_temperature), (teacher, pair.teacher_temperature)):
        if vocab_group is None:
            statistics = folds.surprisal_entropy(logits, no_ids, temperature, pair.mask)
        else:
            states, picked = folds.surprisal_states(logits, no_ids, temperature, pair.mask)
            statistics = merge_slices(states, picked, temperature, pair.mask, backend, vocab_group)
        found.append(statistics[1:])
    (student_entropy, *student_tops), (teacher_entropy, *teacher_tops) = found
    tops = PairTops._make([*student_tops, *teacher_tops])
    partial = implementation(backend, "divergence").divergence_sums(student, teacher, tops, pair, kind)
    sums, nearest = partial[:2].sum(2), partial[2].amax(1)
    if vocab_group is not None:
        dist.all_reduce(sums, group=vocab_group)
        dist.all_reduce(nearest, dist.ReduceOp.MAX, group=vocab_group)
    # A row without a distribution is not infinitely far from one.
    sums = sums.masked_fill((tops.student_log_total + tops.teacher_log_total).isnan(), torch.nan)
    divergence, part = sums.unbind()
    agrees = (nearest == 0) & ~divergence.isnan()
    agrees = agrees if pair.mask is None else agrees & pair.mask
    part = part.clone() if kind.name == "jsd" else divergence.clone()
    return PairStatistics(divergence.clone(), student_entropy, teacher_entropy, agrees, part, *tops)


@operation(run=pair_statistics)
def _divergence_rows(student: Tensor, teacher: Tensor, pair: Pair, kind: DivergenceKind) -> PairStatistics:
    dtype = compute_dtype(student.dtype)
    kinds = (torch.bool if field == "top1_agrees" else dtype for field in PairStatistics._fields)
    return PairStatistics(*(student.new_empty((student.shape[0],), dtype=kind) for kind in kinds))


def _written_anew(backend: str, width: int, student: Tensor, *others: Any) -> Tensor:
    gradients = torch.empty((student.shape[0], width), dtype=student.dtype, device=student.device)
    num_ids = student.shape[1]
    gradients[:, num_ids:] = 0
    implementation(backend, "divergence").write_gradients(gradients[:, :num_ids], student, *others)
    return gradients


@operation(run=lambda backend, student, *others: _written_anew(backend, others[-1], student, *others[:-1]))
def _divergence_rows_backward(
    student: Tensor,
    teacher: Tensor,
    grad_divergence: Tensor,
    grad_entropy: Tensor | None,
    statistics: PairStatistics,
    pair: Pair,
    kind: DivergenceKind,
    width: int,
) -> Tensor:
    return student.new_empty((student.shape[0], width))


class _DivergenceRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        pair: Pair,
        kind: DivergenceKind,
        num_ids: int,
        backend: str,
        vocab_group: "dist.ProcessGroup | None",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        common = student[:, :num_ids], teacher[:, :num_ids]
        if vocab_group is None:
            statistics = _divergence_rows(backend, *common, pair, kind)
        else:
            with torch.cuda.device_of(student):
                statistics = pair_statistics(backend, *common, pair, kind, vocab_group)
        ctx.save_for_backward(student, teacher, *statistics, *pair)
        ctx.kind, ctx.num_ids, ctx.backend = kind, num_ids, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics.teacher_entropy, statistics.top1_agrees)
        return statistics[:4]

    @staticmethod
    def backward(ctx: Any, grad_divergence: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative("divergence")
        student, teacher, *rest = ctx.saved_tensors
        num_fields = len(PairStatistics._fields)
        statistics, pair = PairStatistics._make(rest[:num_fields]), Pair._make(rest[num_fields:])
        common = student[:, : ctx.num_ids], teacher[:, : ctx.num_ids]
        if grad_divergence is None:
            grad_divergence = torch.zeros_like(statistics.divergence)
        grads = grad_divergence, grad_entropy
        gradient = _divergence_rows_backward(ctx.backend, *common, *grads, statistics, pair, ctx.kind, student.shape[1])
        return gradient, None, None, None, None, None, None


def divergence_of_rows(
    student: Tensor,
    teacher: Tensor,
    pair: Pair,
    kind: DivergenceKind,
    num_ids: int,
    backend: str,
    vocab_group: "dist.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergence, both entropies, and whether the tops agree, (N,) each, of the first ``num_ids`` columns.

    With a gradient for the student's logits.
    """
    return _DivergenceRows.apply(student, teacher, pair, kind, num_ids, backend, vocab_group)  # type: ignore[no-any-return]
