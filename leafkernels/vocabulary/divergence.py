"""Divergence of a student's distribution over the vocabulary from a teacher's, from the logits of both."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from leafkernels._core.backend import resolve_backend
from leafkernels._core.checks import (
    check_choice,
    check_count,
    check_device,
    check_finite,
    check_integer,
    check_kernel_dtype,
    check_like,
    check_mask,
    check_real,
    check_tensor,
    place,
    values_readable,
)
from leafkernels._core.derivatives import refuse_forward_mode
from leafkernels.vocabulary.divergence_ids import (
    Split,
    SplitLogits,
    divergence_of_splits,
    split_of_logprobs,
    top_of_logits,
)
from leafkernels.vocabulary.divergence_reference import logits_by_reference
from leafkernels.vocabulary.divergence_rows import DivergenceKind, Pair, divergence_of_rows
from leafkernels.vocabulary.inputs import check_temperature
from leafkernels.vocabulary.slices import check_same_rows

KINDS = ("reverse_kl", "forward_kl", "jsd")

# What was stored with few digits passes 1 by a rounding of that: the most that a log-probability may be, and that the
# probabilities of one distribution may add up to.
MOST_LOGPROB = 0.01
MOST_PROBABILITY = 1.05


class Divergence(NamedTuple):
    """Numbers of each token in nats, 0 where the mask is False; shaped like the rows, float32 (float64 for float64)."""

    divergence: Tensor
    """Of the student from the teacher, with a gradient for the student."""
    student_entropy: Tensor
    """Over the whole vocabulary, with a gradient for the student."""
    teacher_entropy: Tensor
    """Over the whole vocabulary, a constant; of a ``TeacherTopK`` over the classes that it has."""
    top1_agrees: Tensor
    """bool: whether the student's most likely id is the teacher's."""


class TeacherTopK(NamedTuple):
    """What a served or stored teacher says of each token: some ids, each once, and their log-probabilities."""

    ids: Tensor
    """(..., k) integers; -1, or any other that is negative, where an entry is missing."""
    logprobs: Tensor
    """(..., k), nats, as the teacher gave them: no temperature divides them. -inf where an entry is missing.

    Those of a row are of one distribution; on a CPU a row whose probabilities add up to more than 1.05 is refused."""


class DivergenceOptions(NamedTuple):
    """Which divergence, over which ids."""

    kind: DivergenceKind
    top_k: int | None
    tail: bool
    num_ids: int


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherTopK,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    tail: bool = True,
    response_mask: Tensor | None = None,
    num_ids: int | None = None,
    vocab_group: "dist.ProcessGroup | None" = None,
    backend: str = "auto",
) -> Divergence:
    """Divergence of the student from the teacher at each token, over the whole vocabulary, and both entropies.

    With p = softmax(student_logits / temperature) and q = softmax(teacher_logits / temperature):

        "reverse_kl"  KL(p || q) = sum p log(p / q)
        "forward_kl"  KL(q || p)
        "jsd"         beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

    beta is the teacher's share, as in GKD (arXiv 2306.13649) and in TRL, whose ends beta = 0 and 1 are the kinds
    "forward_kl" and "reverse_kl" here: for beta near 0 the formula is beta times the one, near 1 (1 - beta) times the
    other. No factor temperature ** 2 is applied.

    Differentiable in the student's logits, once and in reverse mode, for any weights on the divergence and the
    student's entropy; nothing flows to the teacher. No probabilities are held for either.

    Summed as terms that are not negative, p log(p / q) - p + q, so nothing cancels: two equal rows have 0, exactly, and
    so is their gradient; rows shifted by 1e4 lose no digit, and rows whose top leads by 60 have their divergence of
    1e-25. An id banned by both (-inf, or 10,000 below the row's top) adds nothing. One that only the teacher bans
    makes the reverse KL infinite, one that only the student bans the forward KL; the JSD stays finite. Where a
    divergence is infinite the gradient of a reverse KL is NaN, unless that of the divergence is 0; of a forward KL it
    is p - q, as everywhere. A row that holds NaN or +inf, or -inf alone, gives NaN, for that row only.

    Args:
        student_logits: (..., V), float32, bfloat16, float16 or float64 (computed in float32, float64 for float64; the
            Triton backend takes no float64); rows may have any stride.
        teacher_logits: (..., V) likewise, of another dtype if it is, float64 only with float64; or a ``TeacherTopK``.
        kind: "reverse_kl", "forward_kl" or "jsd".
        beta: of "jsd", between 0 and 1.
        temperature: positive; a float, or one for each row. Divides both logits.
        top_k: tell only the teacher's ``top_k`` most likely ids apart; the rest are one class more (``tail``), or left
            out of both distributions, each of which is then renormalised over the k. The entropies are still those of
            the whole vocabulary. Of ids that are equally likely at the end of the k, any may be taken. At least as
            many as there are ids: as None. A ``TeacherTopK`` says itself which they are.
        tail: see ``top_k``. With a ``TeacherTopK`` the last class has what its probabilities leave of 1, at least the
            rounding of 1 in float32, below which they say nothing.
        response_mask: (...); rows where it is False are not read, give 0, and get zero gradient.
        num_ids: only the first ``num_ids`` ids of both count, where vocabularies are padded; None: all, of which both
            must have as many. Logits of the others are not read and get zero gradient.
        vocab_group: the tensor-parallel ranks, if each has a slice of both vocabularies: as in ``surprisal_entropy``.
            Not with ``top_k``, a ``TeacherTopK`` or ``num_ids``.
        backend: "auto", "triton", "torch" or "reference".

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 1.0, 1.0]])
        >>> leafkernels.divergence(student, teacher, kind="reverse_kl").divergence
        tensor([0.6688])

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message says which, and what came.
    """
    check_real("student_logits", student_logits)
    if student_logits.dim() == 0:
        raise ValueError("student_logits must have shape (..., vocabulary), got a scalar")
    shape, device = student_logits.shape[:-1], student_logits.device
    teacher_size = None
    if not isinstance(teacher_logits, TeacherTopK):
        check_real("teacher_logits", teacher_logits)
        if teacher_logits.shape[:-1] != shape or teacher_logits.dim() == 0:
            raise ValueError(
                f"teacher_logits must have one row for each of student_logits, {tuple(shape)}, "
                f"got shape {tuple(teacher_logits.shape)}"
            )
        check_device("teacher_logits", teacher_logits, "student_logits", device)
        check_same_precision("teacher_logits", teacher_logits.dtype, "student_logits", student_logits.dtype)
        teacher_size = teacher_logits.shape[-1]
    sizes = student_logits.shape[-1], teacher_size
    options = check_options(kind, beta, top_k, tail, num_ids, vocab_group, *sizes)
    like = torch.empty(shape, dtype=torch.bool, device=device)
    mask = check_mask(response_mask, "the rows of student_logits", shape, device)
    temperatures = check_temperature(temperature, like, mask).reshape(-1).contiguous()
    backend = resolve_backend(backend, device)
    check_kernel_dtype("student_logits", student_logits.dtype, backend)
    refuse_forward_mode("divergence", student_logits)

    if vocab_group is not None:
        check_same_rows("student_logits", shape.numel(), device, vocab_group)
    row_mask = None if mask is None else mask.reshape(-1).contiguous()
    pair = Pair(temperatures, temperatures, row_mask)
    student = in_rows(student_logits)
    served = rows = None
    if isinstance(teacher_logits, TeacherTopK):
        served = check_teacher(teacher_logits, shape, options, row_mask, device)
    else:
        rows = in_rows(teacher_logits.detach())
    if backend == "reference":
        found = logits_by_reference(student, rows, served, temperatures, row_mask, options, vocab_group)
    elif served is not None:
        ids, logprobs = served
        teacher = split_of_logprobs(ids, logprobs, student.dtype)
        found = _at_ids(student, ids, teacher, pair, options, False, backend)
    elif rows is not None:
        if options.top_k is None:
            kind_and_size = options.kind, options.num_ids
            found = divergence_of_rows(student, rows, pair, *kind_and_size, backend, vocab_group)
        else:
            common = rows[:, : options.num_ids]
            ids, teacher = top_of_logits(backend, common, options.top_k, temperatures, row_mask)
            found = _at_ids(student, ids, teacher, pair, options, True, backend)
    return Divergence(*(numbers.view(shape) for numbers in found))


def _at_ids(
    student: Tensor, ids: Tensor, teacher: Split, pair: Pair, options: DivergenceOptions, is_whole: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    split = SplitLogits.apply(student, ids, pair.student_temperature, pair.mask, options.num_ids, backend)
    kind, _, tail, _ = options
    return divergence_of_splits(Split._make(split), teacher, pair.mask, kind, tail, is_whole, backend)


def in_rows(logits: Tensor) -> Tensor:
    """(N, V), whose last dimension has stride 1."""
    rows = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def check_same_precision(name: str, dtype: torch.dtype, other_name: str, other: torch.dtype) -> None:
    """Raise TypeError where one is float64 and the other not."""
    if (dtype == torch.float64) != (other == torch.float64):
        raise TypeError(f"{name} must be float64 if and only if {other_name} is, {other}, got {dtype}")


def check_options(
    kind: Any,
    beta: Any,
    top_k: Any,
    tail: Any,
    num_ids: Any,
    vocab_group: "dist.ProcessGroup | None",
    student_size: int,
    teacher_size: int | None,
) -> DivergenceOptions:
    """The options of vocabularies of these sizes; None is that of a ``TeacherTopK``."""
    check_choice("kind", kind, KINDS)
    check_finite("beta", beta)
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1 (at 0 and 1 take forward_kl and reverse_kl), got {beta}")
    if not isinstance(tail, bool):
        raise TypeError(f"tail must be True or False, got {type(tail).__name__}")
    if vocab_group is not None:
        place("vocab_group", vocab_group)
        if num_ids is not None:
            raise ValueError("num_ids must be None with vocab_group, whose ranks give slices of the ids in common")
        if top_k is not None or teacher_size is None:
            raise ValueError("top_k must be None with vocab_group, and the teacher no TeacherTopK")
    most = student_size if teacher_size is None else min(student_size, teacher_size)
    if num_ids is None:
        if teacher_size not in (None, student_size):
            raise ValueError(
                f"num_ids must be given where the vocabularies differ in size, at most {most}: the student's has "
                f"{student_size} ids, the teacher's {teacher_size}"
            )
        num_ids = student_size
    check_count("num_ids", num_ids, 1 if vocab_group is None else 0, most)
    if top_k is not None:
        if teacher_size is None:
            raise ValueError(f"top_k must be None with a TeacherTopK, which says itself which ids it has, got {top_k}")
        check_count("top_k", top_k, 1)
        top_k = None if top_k >= num_ids else top_k
    return DivergenceOptions(DivergenceKind(kind, float(beta)), top_k, tail, num_ids)


def check_teacher(
    teacher: TeacherTopK, shape: torch.Size, options: DivergenceOptions, mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The ids (N, k), -1 where an entry is missing, and their log-probabilities, NaN for ids that are no student's."""
    ids, logprobs = check_integer("ids", teacher.ids), check_real("logprobs", teacher.logprobs)
    if ids.shape[:-1] != shape or ids.dim() == 0 or ids.shape[-1] == 0:
        raise ValueError(f"ids must have shape (*{tuple(shape)}, k) with k at least 1, got {tuple(ids.shape)}")
    check_device("ids", ids, "the student", device)
    check_like("logprobs", check_tensor("logprobs", logprobs), "ids", ids.shape, ids.device)
    k = ids.shape[-1]
    rows, numbers = ids.reshape(-1, k).to(torch.int64), logprobs.detach().reshape(-1, k)
    is_here = (rows >= 0) & (numbers != -torch.inf)
    rows = rows.masked_fill(~is_here, -1)
    is_outside = rows >= options.num_ids
    if values_readable(rows):
        live, live_numbers = (rows, numbers) if mask is None else (rows[mask], numbers[mask])
        if bool((live >= options.num_ids).any()):
            raise ValueError(f"ids must lie below num_ids, {options.num_ids}, got {int(live.max())}")
        ranked = live.sort(1).values
        if bool(((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any()):
            raise ValueError("ids must hold each id once in a row, got one twice")
        if bool((live_numbers > MOST_LOGPROB).any()):
            raise ValueError(f"logprobs must be log-probabilities, at most 0, got {float(live_numbers.max())}")
        sums = live_numbers.double().exp().masked_fill(live < 0, 0.0).sum(1)
        if bool((sums > MOST_PROBABILITY).any()):
            raise ValueError(
                "logprobs must be those of one distribution, whose probabilities add up to at most 1, got a row of "
                f"{float(sums.max()):.3g}"
            )
    # An id that no vocabulary has says nothing: what counts it is NaN.
    numbers = numbers.masked_fill(is_outside, torch.nan)
    return rows, numbers
